"""``runtime="packed"``: the logits of the unpacked model, without the unpacked weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.checkpoint import load
from compress.errors import ModelError

ALL = {"targets": ["all"]}
# family, kernels, stages
FOLDERS: dict[str, tuple[str, set[str], list[dict[str, Any]]]] = {
    "4 bits": ("llama", {"dense", "int4"}, [{"use": "rtn"}]),
    "3 bits, zero-points": ("llama", {"dense", "int4"}, [{"use": "rtn", "bits": 3, "symmetric": False}]),
    "2 bits": ("llama", {"dense", "int4"}, [{"use": "rtn", "bits": 2}]),
    "8 bits": ("llama", {"dense", "int4 twice"}, [{"use": "rtn", "bits": 8, "group": 32}]),
    "8 bits, zero-points": (
        "llama", {"dense", "int4 twice"}, [{"use": "rtn", "bits": 8, "group": 32, "symmetric": False}],
    ),
    "6 bits": ("llama", {"dense", "int4 twice"}, [{"use": "rtn", "bits": 6, "group": 32}]),
    "whole rows": ("llama", {"dense", "int4"}, [{"use": "rtn", "group": "channel"}]),
    "8 bits, whole rows": ("llama", {"dense", "int8"}, [{"use": "rtn", "bits": 8, "group": "channel"}]),
    "8-bit activations": ("llama", {"dense", "int8"}, [{"use": "w8a8"}]),
    "bitsandbytes": ("llama", {"dense", "int8"}, [{"use": "int8"}]),
    "tied table": ("llama", {"int4"}, [{"use": "rtn", **ALL}]),
    "tied table of 8 bits": ("llama", {"int4 twice"}, [{"use": "rtn", "bits": 8, "group": 32, **ALL}]),
    "Conv1D": ("gpt2", {"int4"}, [{"use": "rtn", **ALL}]),
    "factors": ("llama", {"dense", "two products"}, [{"use": "svd", "ratio": 0.5}]),
    "packed factors": (
        "llama", {"dense", "two products"}, [{"use": "svd", "ratio": 0.5}, {"use": "rtn"}],
    ),
    "sparse": ("llama", {"dense", "csr"}, [{"use": "magnitude", "sparsity": 0.8}]),
    "many zeros": ("llama", {"dense", "csr"}, [{"use": "magnitude", "sparsity": 0.8}]),
    "half of it zeros": ("llama", {"dense"}, [{"use": "magnitude"}]),
    "no kernel": ("llama", {"dense"}, [{"use": "nf4"}]),
    "residual": ("llama", {"dense", "int4 + two products"}, [{"use": "rtn", "bits": 3}, {"use": "residual", "rank": 4}]),
    "encoder": ("bert", {"dense", "int4"}, [{"use": "rtn"}]),
    "two stacks": ("t5", {"dense", "int4"}, [{"use": "rtn"}]),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_logits_are_those_of_the_unpacked_model(
    name: str, source: Callable[..., Path], apply: Callable[..., Path]
) -> None:
    family, kernels, stages = FOLDERS[name]
    changes = {"tie_word_embeddings": True} if "tied" in name else {}
    folder = apply(source(family, **changes), stages, storage="compact" if name == "sparse" else "plain")
    model = load(folder, runtime="packed")
    assert set(model.packed_report.kernels.values()) == kernels
    assert bool(model.packed_report.unpacked) == (name == "no kernel")
    exact, plain = (load(folder, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    for tokens in (torch.arange(6).view(2, 3) + 5, torch.arange(48)[None] + 9):  # few and many
        inputs = {"input_ids": tokens}
        if family == "t5":
            inputs["decoder_input_ids"] = tokens
        with torch.inference_mode():
            found, right, rounded = (
                each(**inputs).logits.float() for each in (model, exact, plain)
            )
        noise = (rounded - right).norm()  # of computing in bfloat16: a model of random weights
        if name in ("bitsandbytes", "no kernel"):  # these load in one dtype only
            noise = 0.04 * right.norm()
        assert (found - right).norm() <= 1.3 * noise + 5e-3 * right.norm()
