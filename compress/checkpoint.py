"""Folders in: loading any checkpoint, and reading what a compressed one says of itself."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedModel

from compress import gguf_file
from compress.errors import CheckpointError, ModelError
from compress.formats import compressed_class, plain_classes
from compress.source import digest, model_class, read_config, resolve
from compress.stored import UNPACKED, unpacked

RECORD = "compression.json"
RUNTIMES = {"packed": "compress.runtime.packed", "onnx": "compress.runtime.onnx"}


def load(
    path: str | Path,
    *,
    runtime: str = "transformers",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model in a checkpoint folder, in eval mode: ours, any Hugging Face folder, or ``demo``.

    ``runtime``: "transformers" unpacks what has no kernel there; "packed" computes with weights as
    they are stored, on the CPU (``compress.runtime.packed``); "onnx" runs in onnxruntime, as
    folders with nothing but ONNX graphs do whatever is asked.

    A GGUF file, or a folder that holds nothing else, is unpacked by transformers; the layouts of
    GPTQ and AWQ are unpacked here.

    Folders with our modelling file load through this library's own copy of it, without running
    code from the folder. Packed integers are unpacked at once, not at the first forward pass.

    Raises:
        ModelError: not a model folder, or an unknown runtime. CheckpointError: tensors are missing
            or do not fit.
    """
    if runtime == "transformers" and _holds_onnx(resolve(path)):
        runtime, dtype = "onnx", None if dtype is torch.float32 else dtype
    if runtime != "transformers":
        if runtime not in RUNTIMES:
            known = ", ".join(("transformers", *RUNTIMES))
            raise ModelError(f"runtime '{runtime}' is not known; there are {known}")
        module = import_module(RUNTIMES[runtime])
        if runtime == "packed":
            return module.load(path, dtype=dtype)
        if dtype is not None:
            raise ModelError(f"runtime '{runtime}' has a dtype of its own; leave dtype away")
        return module.load(path)
    folder = resolve(path)
    method, cls, described = _classes(folder, trust_remote_code)
    if method in UNPACKED:
        return unpacked(folder, dtype)
    try:
        with _quiet():
            model, info = cls.from_pretrained(
                folder if folder.is_dir() else folder.parent,
                **described,
                dtype=dtype or "auto",
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
            )
            packed = method == "compressed-tensors"
            if packed and not described["config"].quantization_config.get("dequantize"):
                model.hf_quantizer.compressor.decompress_model(model)
    except Exception as error:
        raise CheckpointError(
            f"{folder}: does not load as {cls.__name__}: {_last(error)}"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} tensors are missing, first {missing[0]}")
    if method == "bitsandbytes":
        keep_bitsandbytes_unpacked(model)
    return model.eval()


def _classes(folder: Path, trust_remote_code: bool) -> tuple[str, Any, dict[str, Any]]:
    """How the folder is stored, the model class, and what describes the model to it."""
    file = gguf_file.find(folder)
    if file is not None:
        described = {"gguf_file": file.name, "config": gguf_file.config(file)}
        return "gguf", transformers.AutoModelForCausalLM, described
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ModelError(f"{folder}: no config.json, so this is not a model folder") from error
    except ValueError as error:
        raise ModelError(f"{path}: not JSON ({error})") from error
    if "compressed_sites" in raw:
        cls, config_class = compressed_class(*plain_classes(raw))
        return "modelling file", cls, {"config": config_class.from_pretrained(folder)}
    config = read_config(folder, trust_remote_code=trust_remote_code)
    if "auto_map" in raw and trust_remote_code:
        return "remote code", transformers.AutoModelForCausalLM, {"config": config}
    method = (raw.get("quantization_config") or {}).get("quant_method", "dense")
    return method, model_class(config, folder), {"config": config}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what libraries print while they load; what goes wrong comes as an exception."""
    level, bar = (
        transformers.logging.get_verbosity(),
        transformers.logging.is_progress_bar_enabled(),
    )
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers.logging.set_verbosity(level)
        if bar:
            transformers.logging.enable_progress_bar()


def keep_bitsandbytes_unpacked(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights in place at the first forward pass.

    On CPUs with AVX512-BF16 it does, and never restores them: saving, training and dequantizing
    are silently wrong from then on (bitsandbytes #2078).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - not a submodule


def load_tokenizer(path: str | Path) -> Any | None:
    """The tokenizer of a checkpoint folder or a GGUF file, or None when it has none."""
    folder = resolve(path)
    file = gguf_file.find(folder)
    names = (
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
        "spiece.model",
        "tokenizer.model",
    )
    if file is None and not any((folder / name).exists() for name in names):
        return None
    try:
        if file is not None:
            return gguf_file.tokenizer(file)
        raw = json.loads((folder / "config.json").read_text())
        config = plain_classes(raw)[1]() if "compressed_sites" in raw else None
        return AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"{folder}: the tokenizer does not load: {_last(error)}") from error


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's weights: safetensors, else one GGUF file, or ONNX graphs
    and their data."""
    file = gguf_file.find(folder)
    if file is not None:
        return [file]
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.onnx*"))


def _holds_onnx(folder: Path) -> bool:
    return any(file.suffix == ".onnx" for file in weight_files(folder))


def fingerprint(path: str | Path) -> str:
    """The ``digest`` of a model folder that may be compressed or exported, or of a GGUF file."""
    folder = resolve(path)
    return digest(folder, weight_files(folder))


def record(path: str | Path) -> dict[str, Any]:
    """What ``compression.json`` of a folder says; empty for folders without one."""
    file = None if str(path) == "demo" else gguf_file.find(path)
    if file is not None:
        return gguf_file.record(file)
    if str(path) == "demo" or not (Path(path) / RECORD).is_file():
        return {}
    try:
        return json.loads((Path(path) / RECORD).read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}/{RECORD}: not JSON ({error})") from error


def original(path: str | Path) -> str | None:
    """The dense model that a compressed folder was made from; None for other folders."""
    return record(path).get("base", {}).get("model")


def _last(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]
