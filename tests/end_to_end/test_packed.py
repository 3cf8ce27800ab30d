"""``runtime="packed"``: the logits of the unpacked model, without the unpacked weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.checkpoint import load
from compress.errors import ModelError
from compress.export.export import export
from compress.runtime.matrices import Int4, block_rows

ALL = {"targets": ["all"]}
# family, kernels, stages
Q8 = {"use": "rtn", "bits": 8, "group": 32}
SVD = {"use": "svd", "ratio": 0.5}
UNEVEN = {"symmetric": False}
FOLDERS: dict[str, tuple[str, set[str], list[dict[str, Any]]]] = {
    "4 bits": ("llama", {"dense", "int4"}, [{"use": "rtn"}]),
    "3 bits, zero-points": ("llama", {"dense", "int4"}, [{"use": "rtn", "bits": 3, **UNEVEN}]),
    "2 bits": ("llama", {"dense", "int4"}, [{"use": "rtn", "bits": 2}]),
    "8 bits": ("llama", {"dense", "int4 twice"}, [Q8]),
    "8 bits, zero-points": ("llama", {"dense", "int4 twice"}, [Q8 | UNEVEN]),
    "6 bits": ("llama", {"dense", "int4 twice"}, [Q8 | {"bits": 6}]),
    "whole rows": ("llama", {"dense", "int4"}, [{"use": "rtn", "group": "channel"}]),
    "8 bits, whole rows": ("llama", {"dense", "int8"}, [Q8 | {"group": "channel"}]),
    "8-bit activations": ("llama", {"dense", "int8"}, [{"use": "w8a8"}]),
    "bitsandbytes": ("llama", {"dense", "int8"}, [{"use": "int8"}]),
    "tied table": ("llama", {"int4"}, [{"use": "rtn", **ALL}]),
    "tied table of 8 bits": ("llama", {"int4 twice"}, [Q8 | ALL]),
    "tied table of whole rows": ("llama", {"int8"}, [Q8 | ALL | {"group": "channel"}]),
    "Conv1D": ("gpt2", {"int4"}, [{"use": "rtn", **ALL}]),
    "Conv1D of 8 bits": ("gpt2", {"dense", "int8"}, [Q8 | {"group": "channel"}]),
    "groups of 24": ("llama", {"dense"}, [{"use": "rtn", "group": 24}]),
    "Huffman codes": ("llama", {"dense", "int4"}, [{"use": "ecrtn", "bits": 2}]),
    "long Huffman codes": ("llama", {"int8"}, [{"use": "ecrtn", "bits": 5, **ALL}]),
    "factors": ("llama", {"dense", "two products"}, [SVD]),
    "packed factors": ("llama", {"dense", "two products"}, [SVD, {"use": "rtn"}]),
    "sparse": ("llama", {"dense", "csr"}, [{"use": "magnitude", "sparsity": 0.8}]),
    "many zeros": ("llama", {"dense", "csr"}, [{"use": "magnitude", "sparsity": 0.8}]),
    "half of it zeros": ("llama", {"dense"}, [{"use": "magnitude"}]),
    "no kernel": ("llama", {"dense"}, [{"use": "nf4"}]),
    "float8": ("llama", {"dense"}, [{"use": "fp8", "activations": True}]),
    "residual": (
        "llama",
        {"dense", "int4 + two products"},
        [{"use": "rtn", "bits": 3}, {"use": "residual", "rank": 4}],
    ),
    "encoder": ("bert", {"dense", "int4"}, [{"use": "rtn"}]),
    "two stacks": ("t5", {"dense", "int4"}, [{"use": "rtn"}]),
}
ODD = {"hidden_size": 72, "intermediate_size": 100}  # fills neither blocks nor groups
UNPACKED = ("no kernel", "float8", "groups of 24")


@pytest.mark.parametrize("name", FOLDERS)
def test_logits_are_those_of_the_unpacked_model(
    name: str, source: Callable[..., Path], apply: Callable[..., Path]
) -> None:
    family, kernels, stages = FOLDERS[name]
    changes: dict[str, Any] = {"tie_word_embeddings": True} if "tied" in name else {}
    changes |= ODD if "rows" in name or "zero-points" in name else {}
    storage = "compact" if name == "sparse" else "plain"
    folder = apply(source(family, **changes), stages, storage=storage)
    model = load(folder, runtime="packed")
    assert set(model.packed_report.kernels.values()) == kernels
    assert bool(model.packed_report.unpacked) == (name in UNPACKED)
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


def test_dense_weights_never_appear(
    source: Callable[..., Path], apply: Callable[..., Path]
) -> None:
    """Neither after loading nor after a prompt: the model holds what the folder holds."""
    folder = apply(source("llama", hidden_size=256), [{"use": "rtn", **ALL}])
    model = load(folder, runtime="packed")
    model(input_ids=torch.arange(60)[None])
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    held = sum(t.numel() * t.element_size() for t in tensors)
    assert held < 1.15 * (folder / "model.safetensors").stat().st_size


def test_text_is_generated(source: Callable[..., Path], apply: Callable[..., Path]) -> None:
    folder = apply(source("demo"), [{"use": "rtn"}])
    tokens = torch.arange(8)[None] + 50
    packed, plain = (
        load(folder, runtime=runtime).generate(tokens, max_new_tokens=8, do_sample=False)
        for runtime in ("packed", "transformers")
    )
    assert packed.tolist() == plain.tolist()


def test_it_stays_where_its_kernels_are(
    source: Callable[..., Path], apply: Callable[..., Path]
) -> None:
    for name in ("factors", "4 bits", "sparse"):
        model = load(apply(source("llama"), FOLDERS[name][2], name=name), runtime="packed")
        with pytest.raises(ModelError, match="runtime='transformers', or serve with vLLM"):
            model.to("meta")
        for cast in (model.half, model.double):
            with pytest.raises(ModelError, match="keeps the dtypes"):
                cast()
        assert model.to("cpu")(input_ids=torch.arange(4)[None]).logits.isfinite().all()


def test_what_the_kernels_do_not_compute_is_refused(
    source: Callable[..., Path], apply: Callable[..., Path]
) -> None:
    folder = apply(source("llama"), [{"use": "rtn"}])
    with pytest.raises(ModelError, match="bfloat16"):
        load(folder, runtime="packed", dtype=torch.float32)
    with pytest.raises(ModelError, match="is for running"):
        load(folder, runtime="packed").save_pretrained(folder / "again")
    with pytest.raises(ModelError, match="leave dtype away"):
        load(folder, runtime="onnx", dtype=torch.float32)
    with pytest.raises(ModelError, match="there are transformers, packed, onnx"):
        load(folder, runtime="fast")


@pytest.mark.parametrize("layout", ["gptq", "huffman"])
def test_folders_in_other_layouts(
    layout: str, source: Callable[..., Path], apply: Callable[..., Path], tmp_path: Path
) -> None:
    folder = apply(source("llama"), [{"use": "rtn"}])
    export(folder, layout, tmp_path / "other", verify=False)
    model = load(tmp_path / "other", runtime="packed")
    assert "int4" in model.packed_report.kernels.values()
    tokens = torch.arange(40)[None]
    with torch.inference_mode():
        found, right = model(tokens).logits, load(folder, runtime="packed")(tokens).logits
    assert (found - right).norm() < 0.03 * right.norm()


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@pytest.mark.parametrize("rows", [50, 192])
def test_kernel_decoding_and_rows_agree(bits: int, rows: int) -> None:
    assert block_rows() in (32, 64)
    torch.manual_seed(0)
    codes = torch.randint(0, 1 << bits, (rows, 160), dtype=torch.uint8)
    scale, zero = torch.rand(rows, 5), torch.randint(0, 1 << bits, (rows, 5))
    matrix = Int4(codes, scale, zero, 32, bits)
    wanted = (codes - zero.repeat_interleave(32, 1)) * scale.repeat_interleave(32, 1)
    eye = torch.eye(160).bfloat16()
    matrix.few = 0
    decoded = matrix(eye).T
    few = torch.cat([matrix.multiply(part) for part in eye.split(4)]).T
    for found in (decoded, few, matrix.rows(torch.arange(rows))):
        torch.testing.assert_close(found.float(), wanted, rtol=2e-2, atol=6e-3 * (1 << bits))
