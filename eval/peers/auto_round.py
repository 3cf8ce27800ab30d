"""AutoRound (https://github.com/intel/auto-round), saved in its own format."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from auto_round import AutoRound, AutoScheme
from auto_round.schemes import QuantizationScheme
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

PACKAGES = ["auto-round"]
MIXED = (2, 3, 4, 8)  # bits that an automatic scheme chooses from


def compress(job: SimpleNamespace, model: Any) -> Any:
    """``options`` are AutoRound's own: ``iters``, ``enable_alg_ext``, …

    With ``avg_bits`` among them its AutoScheme gives every matrix some of ``MIXED`` bits.
    """
    windows = load_file(job.tokens)["tokens"]
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    average = job.options.pop("avg_bits", None)
    scheme: Any = _scheme(job, job.bits)
    dataset: Any = list(windows.split(8))
    if average is not None:
        choices = [QuantizationScheme.from_dict(_scheme(job, bits)) for bits in MIXED]
        scheme = AutoScheme(average, choices, nsamples=len(windows), seqlen=windows.shape[1])
        dataset = _file(job, windows, tokenizer)
    rounder = AutoRound(
        model,
        tokenizer,
        scheme=scheme,
        dataset=dataset,
        nsamples=len(windows),
        seqlen=windows.shape[1],
        batch_size=8,
        seed=job.seed,
        device_map="cpu",
        enable_torch_compile=False,
        **job.options,
    )
    rounder.quantize()
    return rounder


def _scheme(job: SimpleNamespace, bits: int) -> dict[str, Any]:
    return {
        "bits": bits,
        "group_size": job.group or -1,
        "sym": job.symmetric,
        "data_type": "int",
        "act_bits": 16,
    }


def _file(job: SimpleNamespace, windows: Any, tokenizer: Any) -> str:
    """The text as it is read with AutoScheme: a file; texts shorter than a window are left out.

    So each window is followed by the next one.
    """
    texts = tokenizer.batch_decode(windows)
    path = Path(job.out) / "text.jsonl"
    pairs = zip(texts, [*texts[1:], texts[0]], strict=True)
    path.write_text("".join(json.dumps({"text": a + b}) + "\n" for a, b in pairs))
    return str(path)


def save(job: SimpleNamespace, model: Any, folder: Path) -> None:
    """In its own format; what it did not touch in the dtype that it had.

    On processors without instructions for bfloat16 it writes embeddings and norms in float32, twice
    their bytes.
    """
    model.save_quantized(str(folder), format="auto_round")
    dtypes = {
        name: tensor.dtype
        for file in Path(job.model).glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    for file in folder.rglob("*.safetensors"):
        tensors = load_file(file)
        if any(dtypes.get(name, t.dtype) != t.dtype for name, t in tensors.items()):
            same = {name: t.to(dtypes.get(name, t.dtype)) for name, t in tensors.items()}
            save_file(same, file, {"format": "pt"})
