"""What runs in a peer's own environment: one job, from a dense folder to an answer.

    python -I child.py job.json

Started with ``-I``, so that ``hqq.py`` beside this file does not hide the package of that name. The
adapter named in the job is a file with functions over the job, of which only the second must
be there:

    load(job) -> model            the dense model; not timed
    compress(job, model) -> model the compression, and nothing else; timed
    save(job, model, folder)      as the toolkit stores it
    reload(folder) -> model       as its users load it

From the reloaded model a dense copy is written: what a layer does to the identity is its weight,
however it is stored. The last thing written is ``answer.json``. Never imported by eval.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file


def resident(field: str = "VmRSS") -> int:
    """Bytes of resident memory of this process now, or with ``VmHWM`` at its peak (Linux)."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in status if x.startswith(field + ":")).split()[1]) * 1024


def forget_peak() -> None:
    """The peak starts anew from what is resident now: what the imports took on the way is gone."""
    Path("/proc/self/clear_refs").write_text("5")


def load(job: SimpleNamespace) -> Any:
    """The dense model in the type that its folder names."""
    return transformers.AutoModelForCausalLM.from_pretrained(job.model, dtype="auto").eval()


def save(job: SimpleNamespace, model: Any, folder: Path) -> None:
    model.save_pretrained(folder)


def reload(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


@torch.inference_mode()
def dense_state(model: Any, original: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of ``original``, by name, as ``model`` has them; in their types and shapes.

    A float matrix of the right shape is taken as it is. Any other is what its Linear module makes
    of the identity: every sum has one term, so it is exact in the type that the module computes in.
    """
    found = dict(model.state_dict())
    state = {}
    for name, tensor in original.items():
        own = found.get(name)
        module_name, _, last = name.rpartition(".")
        module = model.get_submodule(module_name)
        plain = type(module) is torch.nn.Linear or isinstance(module, torch.nn.Embedding)
        stored = own is not None and own.shape == tensor.shape and own.is_floating_point()
        if last != "weight" or (stored and (plain or tensor.dim() == 1)):
            assert own is not None, f"{name} is gone"
            state[name] = own.detach().to(tensor.dtype).contiguous().clone()
            continue
        identity = torch.eye(tensor.shape[1], dtype=model.dtype)
        answer = module(identity)
        if getattr(module, "bias", None) is not None:
            answer = answer - module.bias
        state[name] = answer.T.to(tensor.dtype).contiguous()
        assert state[name].shape == tensor.shape, f"{name}: {list(answer.T.shape)}"
    return state


def write_dense(job: SimpleNamespace, model: Any, folder: Path) -> None:
    """A plain folder: the original's configuration and tokenizer, the compressed weights."""
    source = Path(job.model)
    original: dict[str, torch.Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        original |= load_file(file)
    folder.mkdir()
    for file in source.iterdir():
        plain = file.suffix in (".json", ".txt", ".model")
        if file.is_file() and plain and not file.name.endswith(".index.json"):
            shutil.copy(file, folder)
    save_file(dense_state(model, original), folder / "model.safetensors", {"format": "pt"})


def tensors(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in nested dictionaries, by dotted names."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors(item, f"{name}.{key}" if name else key)


def matrix_bytes(folder: Path, modules: list[str]) -> int:
    """Bytes of all that the weight files hold for the matrices of ``modules``: codes and scales."""
    total = 0
    inside = tuple(f"{module}." for module in modules)
    for file in folder.rglob("*"):
        if file.suffix == ".safetensors":
            stored = load_file(file)
        elif file.suffix in (".bin", ".pt"):
            stored = torch.load(file, map_location="cpu", weights_only=True)
        else:
            continue
        for name, tensor in tensors(stored):
            if name.startswith(inside) and not name.endswith(".bias"):
                total += tensor.nbytes
    return total


def versions(packages: list[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    job = SimpleNamespace(**json.loads(Path(sys.argv[1]).read_text()))
    out = Path(job.out)
    torch.set_num_threads(job.threads)
    spec = importlib.util.spec_from_file_location("adapter", job.adapter)
    assert spec is not None
    assert spec.loader is not None
    adapter = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(adapter)
    transformers.set_seed(job.seed)

    forget_peak()
    imported = resident()
    model = getattr(adapter, "load", load)(job)
    begin, busy = time.perf_counter(), time.process_time()
    model = adapter.compress(job, model)
    seconds, busy = time.perf_counter() - begin, time.process_time() - busy
    peak = resident("VmHWM")
    packed = out / "packed"
    getattr(adapter, "save", save)(job, model, packed)
    del model
    write_dense(job, getattr(adapter, "reload", reload)(packed), out / "dense")
    answer = {
        "seconds": seconds,
        "cpu_seconds": busy,
        "resident_imported": imported,
        "resident_peak": peak,
        "matrix_bytes": matrix_bytes(packed, job.modules),
        "versions": versions(["torch", "transformers", *adapter.PACKAGES]),
    }
    (out / "answer.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
