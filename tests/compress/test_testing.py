"""The conformance checks: built-ins pass with many settings, and each defect is found."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from pydantic import ConfigDict, Field

from compress.compressors.base import Compressor, LayerCompressor, TrainingCompressor
from compress.errors import RecipeError
from compress.problem import LayerProblem
from compress.testing import ConformanceError, check_compressor
from compress.weights import Dense, Sparse, Weight


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("magnitude", {"pattern": "2:4"}),
        ("magnitude", {"pattern": "1:4"}),
        ("magnitude", {"per": "global", "sparsity": 0.9}),
        ("magnitude", {"per": "row", "sparsity": 0.0}),
        ("rtn", {"bits": 2, "symmetric": False, "group": "channel"}),
        ("rtn", {"bits": 4, "symmetric": False, "group": 32}),
        ("rtn", {"bits": 3, "group": 8}),
        ("rtn", {"bits": 8}),
        ("nf4", {"group": 256, "double_quant": True}),
        ("svd", {"energy": 0.9}),
        ("svd", {"rank": 4}),
        ("svd", {"ratio": 1.0}),
        ("lora", {"rank": 2}),
        ("distill", {"norms": False, "kl_share": 1}),
    ],
)
def test_builtins_conform(name: str, parameters: dict[str, Any]) -> None:
    passed = check_compressor(name, **parameters)
    assert passed[:3] == ["documented", "validated", "round_trips_through_yaml"]


class Good(LayerCompressor):
    """ŵ = w where |w| > cut · mean|w|, else 0; the base of all the wrong ones below."""

    makes: ClassVar = "sparse"
    packs: ClassVar = False
    cut: float = Field(0.5, gt=0, description="share of the mean")

    def solve(self, problem: LayerProblem) -> Weight:
        W = problem.W
        return Sparse.of(W, W.abs() > self.cut * W.abs().mean(), problem.dtype)


class Undocumented(Good):
    """Does something."""


class Nameless(Good):
    """x = y"""

    other: int = 3


class Loose(Good):
    """x = y"""

    model_config = ConfigDict(extra="ignore")


class Changeable(Good):
    """x = y"""

    model_config = ConfigDict(frozen=False)


class Forgetful(Good):
    """x = y"""

    other: int | None = Field(3, description="None is dropped from a dump")


class UnknownKind(Good):
    """x = y"""

    makes: ClassVar = "ternary"


class WrongKind(Good):
    """x = y"""

    makes: ClassVar = "quantized"


class Meddling(Good):
    """x = y"""

    def solve(self, problem: LayerProblem) -> Weight:
        problem.W.mul_(0.5)
        return super().solve(problem)


class Random(Good):
    """x = y"""

    def solve(self, problem: LayerProblem) -> Weight:
        W = problem.W
        return Sparse.of(W, torch.rand_like(W) > 0.5, problem.dtype)


class Transposed(Good):
    """x = y"""

    def solve(self, problem: LayerProblem) -> Weight:
        return Sparse.of(problem.W.T, problem.W.T > 0, problem.dtype)


class Widened(Good):
    """x = y"""

    def solve(self, problem: LayerProblem) -> Weight:
        return Sparse.of(problem.W, problem.W > 0, torch.float64)


class Infinite(Good):
    """x = y"""

    def solve(self, problem: LayerProblem) -> Weight:
        W = problem.W
        return Sparse.of(W / W.norm(), W > -1e9, problem.dtype)


class Optimist(Good):
    """x = y"""

    def predict(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        return 100


class Useless(Good):
    """x = y"""

    def solve(self, problem: LayerProblem) -> Weight:
        return Sparse.of(-problem.W, problem.W != 0, problem.dtype)


class FillsZeros(Good):
    """x = y"""

    makes: ClassVar = "dense"

    def solve(self, problem: LayerProblem) -> Weight:
        return Dense.of(problem.W + 1e-3, problem.dtype)


class OddSpec(Good):
    """x = y"""

    def solve(self, problem: LayerProblem) -> Weight:
        weight = super().solve(problem)
        weight.spec["extra"] = (1, 2)
        return weight


class Promises(Good):
    """x = y"""

    accepts: ClassVar = frozenset({"dense", "sparse"})

    def result(self, kind: str) -> str:
        return "nf4" if kind == "sparse" else "sparse"


class Refuses(Good):
    """x = y"""

    def solve(self, problem: LayerProblem) -> Weight:
        raise RecipeError("not today")


class NoText(TrainingCompressor):
    """x = y"""

    def tokens(self) -> tuple[int, int]:
        return 0, 16

    def train(self, run: Any) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Undocumented, "documented: the docstring names neither a source"),
        (Nameless, "documented: parameter 'other' has no description"),
        (Loose, "validated: unknown parameters are accepted"),
        (Changeable, "validated: 'cut' can be assigned to"),
        (UnknownKind, "declares_kinds: makes 'ternary'"),
        (WrongKind, "normal: made sparse, and neither quantized nor the matrix"),
        (Meddling, "normal: solve\\(\\) changed the problem's weight"),
        (Random, "normal: two calls gave different"),
        (Transposed, "normal: shape \\(128, 64\\)"),
        (Widened, "normal: torch.float64, model has torch.float32"),
        (Infinite, "zeros: dense\\(\\) holds NaN"),
        (Optimist, "normal: takes [0-9,]+ bytes, predict\\(\\) said 100"),
        (Useless, "normal: relative error 4, no better than zeros"),
        (FillsZeros, "zeros: a weight of zeros must stay zero"),
        (OddSpec, "normal: the spec does not come back from JSON"),
        (Promises, "from sparse: result\\(\\) promises nf4, got sparse"),
        (Refuses, "normal: refused \\(not today\\)"),
        (NoText, "asks_for_text: tokens\\(\\) is \\(0, 16\\)"),
    ],
)
def test_each_defect_is_found(cls: type[Compressor], message: str) -> None:
    with pytest.raises(ConformanceError, match=f"^{cls.__name__}: .*{message}"):
        check_compressor(cls)


def test_a_parameter_that_yaml_loses_is_found() -> None:
    with pytest.raises(ConformanceError, match="round_trips_through_yaml: Forgetful"):
        check_compressor(Forgetful, other=None)


def test_the_base_of_the_wrong_ones_is_right() -> None:
    assert len(check_compressor(Good)) == 6
    state = torch.random.get_rng_state()
    check_compressor(Good)
    assert torch.equal(state, torch.random.get_rng_state())
