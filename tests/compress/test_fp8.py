"""Eight-bit floats: against slow readings of the format, and in checkpoints."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.naive_quantized.base import FloatQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from tiny import normal

from compress import recipe as recipes
from compress import run as runs
from compress.compressors.quantization.fp8 import FP8
from compress.compressors.quantization.rtn import RTN
from compress.problem import LayerProblem, relative_error
from compress.verify import Verifier
from compress.weights import Dense, Float8, LowRank, Sum, Weight
from compress.weights.modeling_compressed import attach, round_tokens

sys.path.append(str(Path(__file__).parents[1] / "end_to_end"))
import models

RTN_4 = {"use": "rtn", "group": 32}
LORA: dict[str, Any] = {
    "use": "lora",
    "rank": 2,
    "steps": 4,
    "samples": 8,
    "length": 16,
    "batch": 4,
}

W8A8 = {"use": "fp8", "activations": True}


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier() as started:
        yield started


def read_slowly(code: int) -> float:
    """One sign, four exponent and three mantissa bits; exponents are biased by 7."""
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    if exponent == 0:
        value = mantissa / 8 * 2.0**-6
    else:
        value = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -value if sign else value


VALUES = torch.tensor([read_slowly(code) for code in range(256) if code & 127 != 127])  # no NaN


def test_codes_decode_to_the_formula() -> None:
    codes = torch.tensor([[c for c in range(256) if c & 127 != 127]], dtype=torch.uint8)
    spec = {"kind": "float8", "shape": list(codes.shape), "dtype": "bfloat16"}
    weight = Float8(spec, {"codes": codes, "weight_scale": torch.tensor([[0.5]])})
    assert torch.equal(weight.dense(), 0.5 * VALUES[None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_best_of_the_scales_with_every_weight_at_its_nearest(dtype: torch.dtype) -> None:
    W = normal(5, 40).to(dtype)
    W[1] = 0
    W[2, 3] *= 1000
    H = torch.diag(normal(40, scale=1).square() + 0.1)
    h, stored = H.diagonal(), torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    made = FP8()(W, H).dense()
    for row, values in zip(W.float(), made, strict=True):
        errors = []
        for k in range(8):
            s = (2 ** (k / 8) * row.abs().max() / 448).clamp(min=torch.finfo(stored).tiny)
            grid = VALUES * s.to(stored).float()
            nearest = grid[(row[:, None] - grid).abs().argmin(1)]
            errors.append(float((h * (row - nearest) ** 2).sum()))
        assert float((h * (row - values) ** 2).sum()) == pytest.approx(min(errors), rel=1e-4)


def test_what_is_too_large_is_the_largest() -> None:
    """A scale that was rounded down leaves max |w| / s above 448, where a cast makes NaN."""
    matrix = torch.tensor([[1000.0, -1e9, 448.0, 1.0]])
    dense = Float8.of(matrix, torch.ones(1, 1), torch.float32).dense()
    assert dense.tolist() == [[448, -448, 448, 1]]


def test_outliers_cost_the_small_ones_nothing() -> None:
    """Integers lose what lies below their step; floats have a step for every size."""
    W = normal(64, 128)
    others = torch.ones(128)
    others[0] = 0

    def errors() -> list[float]:
        """Of all columns but the first, which the methods do not know to be the only ones."""
        judge = LayerProblem.of(W, torch.diag(others))
        return [
            relative_error(judge, method(W)) for method in (FP8(), RTN(bits=8, group="channel"))
        ]

    floats, integers = errors()
    assert integers < floats < 1e-3
    W[:, 0] *= 300
    floats_after, integers_after = errors()
    assert floats_after < 1.5 * floats
    assert integers_after > 10 * floats_after


def test_compressed_tensors_reads_it_alike() -> None:
    made = FP8()(normal(24, 60).bfloat16())
    scale = made.tensors["weight_scale"]
    state = {"weight": made.tensors["codes"].view(torch.float8_e4m3fn), "weight_scale": scale}
    weights = QuantizationArgs(num_bits=8, type="float", strategy="channel", symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    theirs = FloatQuantizationCompressor.decompress(state, scheme)["weight"]
    assert torch.equal(theirs.float(), made.dense().bfloat16().float())


@pytest.mark.parametrize("around", ["itself", "factors", "sum"])
def test_what_rounds_its_inputs_does_so_within_others(around: str) -> None:
    W, x = normal(24, 60), normal(3, 60, seed=1)
    weight: Weight = FP8(activations=True)(W)
    if around == "factors":
        weight = LowRank.join(Dense.of(normal(24, 24)), weight, torch.float32)
    if around == "sum":
        weight = Sum.of(weight, LowRank.of(normal(24, 2), normal(2, 60), torch.float32))
    module = attach(torch.nn.Linear(60, 24, bias=False), weight.spec, weight.tensors)
    expected = round_tokens(x, "float8") @ weight.dense().T
    torch.testing.assert_close(module(x), expected)
    assert not torch.allclose(module(x), x @ weight.dense().T, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "stages", "storage"),
    [
        ("llama", [{"use": "fp8"}], "float-quantized"),
        ("bert", [{"use": "fp8"}], "float-quantized"),
        ("t5", [{"use": "fp8"}], "float-quantized"),  # unpacked while loading, for its wo
        ("gpt2", [{"use": "fp8"}], "modelling file"),
        ("llama", [W8A8], "float-quantized"),
        ("gpt2", [W8A8], "modelling file"),
        ("llama", [{"use": "svd"}, W8A8], "modelling file"),
        ("llama", [W8A8, LORA], "modelling file"),
        ("llama", [{"use": "svd"}, {"use": "fp8"}], "modelling file"),
        ("llama", [{"use": "fp8"}, LORA], "float-quantized"),
        (
            "llama",
            [{"use": "fp8", "targets": ["mlp"]}, {**RTN_4, "targets": ["attention"]}],
            "mixed-precision",
        ),
    ],
)
def test_folders_load_as_they_were_in_memory(
    family: str,
    stages: list[dict[str, Any]],
    storage: str,
    verifier: Verifier,
    text: str,
    tmp_path: Path,
) -> None:
    model = models.save(tmp_path / "model", family)
    recipe = {"model": str(model), "stages": stages, "calibration": {"data": text}}
    runs.apply(recipes.load_one(recipe), tmp_path / "out", verifier=verifier)
    assert models.loaded_difference(tmp_path / "out") < 5e-3
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    found = config.get("quantization_config", {}).get("format", "modelling file")
    assert found == storage
