"""What a compressor is: a frozen, validated configuration that *is* the method.

Four shapes. A LayerCompressor turns the weight of one site into another, one layer problem at a
time; a TrainingCompressor changes a whole compressed model by gradient steps; a
TransformCompressor writes a dense model as an equal one that is easier to compress; a
StructureCompressor makes a model of another shape, which the stages after it see as theirs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from compress.anatomy import Site, anatomize, select
from compress.data import Windows
from compress.errors import RecipeError
from compress.moments import Moments
from compress.problem import LayerProblem, relative_error
from compress.weights import Dense, LowRank, Weight
from compress.weights.modeling_compressed import Compressed, attach, attach_alias

Shape = tuple[int, int]
LOSS_WEIGHTED = "weigh tokens by how much the loss depends on the layer's output"
PROPAGATE = "how far to correct for the error of the layers before (0 not, 1 fully)"


class Compressor(BaseModel):
    """Common to all: how weights are chosen by kind, and what a recipe may say."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )

    name: ClassVar[str] = ""
    family: ClassVar[str] = "other"  # pruning, quantization, low-rank, distillation
    headline: ClassVar[tuple[str, ...]] = ()  # parameters that a chart names even at their default
    accepts: ClassVar[frozenset[str]] = frozenset({"dense"})  # kinds of weight it can start from
    makes: ClassVar[str] = "dense"  # kind of weight it ends with
    layouts: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "embedding"})
    packs: ClassVar[bool] = True  # whether the stored bytes must fall
    restores: ClassVar[bool] = False  # whether it aims at the original model's weights, not its own
    default_targets: ClassVar[tuple[str, ...]] = ("blocks",)

    def result(self, kind: str) -> str:
        """The kind of weight this makes of one of ``kind``."""
        return self.makes

    def summary(self) -> str:
        """``rtn bits=3 group=64``: the name, the headline, and what differs from its default."""
        shown = [
            f"{key}={getattr(self, key)}"
            for key, field in type(self).model_fields.items()
            if (getattr(self, key) != field.default or key in self.headline)
            and getattr(self, key) is not None
        ]
        return " ".join([self.name, *shown])


class LayerCompressor(Compressor, ABC):
    """Solves one layer problem at a time."""

    @abstractmethod
    def solve(self, problem: LayerProblem) -> Weight:
        """The compressed weight for ``problem``; must not change the problem's tensors."""

    def predict(self, shape: Shape, dtype: torch.dtype) -> int:
        """Bytes of the weight that ``solve`` makes of a dense [out, in], without solving.

        The default knows nothing and answers with the dense bytes.
        """
        return shape[0] * shape[1] * dtype.itemsize

    def pieces(self, shape: Shape) -> list[Shape]:
        """Shapes of the matrices that the result multiplies by; more than one for factors."""
        return [shape]

    def prepare(self, problems: Callable[[], Iterable[LayerProblem]]) -> LayerCompressor:
        """Look at all problems of a stage first; returns the compressor that then solves them.

        ``problems()`` reads the weights one by one and may be called again for another pass.
        """
        return self

    def at_site(self, name: str) -> LayerCompressor:
        """What solves this site: itself, unless ``prepare`` gave sites settings of their own."""
        return self

    def result(self, kind: str) -> str:
        return "lowrank" if kind == "lowrank" else self.makes

    def compress(self, problem: LayerProblem) -> Weight:
        """``solve``, and for a low-rank weight ``solve`` of each factor."""
        if problem.weight.kind == "lowrank":
            left, right = self._factor_problems(problem)
            return LowRank.join(self.solve(left), self.solve(right), problem.dtype)
        return self.solve(problem)

    def _factor_problems(self, problem: LayerProblem) -> tuple[LayerProblem, LayerProblem]:
        """The right factor reads the inputs; the left reads what the right puts out."""
        assert isinstance(problem.weight, LowRank)
        left, right = problem.weight.left, problem.weight.right
        moments = problem.moments
        if moments is not None:
            B = right.dense()
            moments = Moments(B @ moments.H @ B.T)
        return (
            LayerProblem(problem.name + ".left", left, moments),
            LayerProblem(problem.name + ".right", right, problem.moments),
        )

    def __call__(self, matrix: Tensor, H: Tensor | None = None) -> Weight:
        """Compress one matrix [out, in]; H [in, in] is the second moment of its inputs."""
        return self.solve(LayerProblem.of(matrix, H))

    def apply(self, model: nn.Module, targets: Iterable[str] = ("blocks",)) -> dict[str, float]:
        """Compress a model in memory, in place; returns the relative error of each site.

        The modules keep their class and compute their weight from the compressed one.
        """
        anatomy = anatomize(model)
        sites = select(anatomy.sites, list(targets), [], None, anatomy.layers)

        def problems() -> Iterator[LayerProblem]:
            for site in sites:
                matrix = model.get_parameter(site.parameter).detach()
                yield LayerProblem.of(
                    matrix.T if site.layout == "conv1d" else matrix, None, site.name
                )

        solver = self.prepare(problems)
        errors = {}
        for site, problem in zip(sites, problems(), strict=True):
            weight = solver.at_site(site.name).compress(problem)
            errors[site.name] = relative_error(problem, weight)
            if isinstance(weight, Dense):
                kept = model.get_parameter(site.parameter)
                dense = weight.dense()
                kept.data.copy_(dense.T if site.layout == "conv1d" else dense)
                continue
            module = attach(model.get_submodule(site.name), weight.spec, weight.tensors)
            for alias in site.aliases:
                attach_alias(model.get_submodule(alias), module)
        return errors


class CalibratedCompressor(LayerCompressor, ABC):
    """A layer method that looks at what the layer reads; with H = I it is its data-free self."""

    weighs_tokens: ClassVar[bool] = True  # when it is loss-weighted
    plans_tables: ClassVar[bool] = False  # whether prepare looks at embeddings as well
    needs_text: ClassVar[bool] = True  # or else, without text, the data-free self is what is wanted

    propagate: float = Field(0.5, ge=0, le=1, description=PROPAGATE)
    loss_weighted: bool = Field(False, description=LOSS_WEIGHTED)

    @property
    def reads_gradients(self) -> bool:
        """Whether the loss's gradients are measured first, which takes the model in memory."""
        return self.loss_weighted

    @property
    def shifts(self) -> bool:
        """Whether a bias takes up the means, so that inputs count less theirs."""
        return False

    @abstractmethod
    def data_free(self) -> LayerCompressor:
        """The method that this one must not do worse than, and falls back to."""

    def compress(self, problem: LayerProblem) -> Weight:
        return self.best(problem)[0]

    def apply(self, model: nn.Module, targets: Iterable[str] = ("blocks",)) -> dict[str, float]:
        """As its data-free self, where that is meant; a recipe reads text.

        Raises:
            RecipeError: the method is nothing without data.
        """
        if self.needs_text:
            raise RecipeError(
                f"{self.name} looks at what layers read: use compress.apply with a recipe that "
                f"has calibration.data, or {self.name}(matrix, H) for one matrix"
            )
        return super().apply(model, targets)

    def informed(self, problem: LayerProblem) -> bool:
        """Whether the problem holds what this method looks at."""
        return problem.moments is not None

    def wrong(self, problem: LayerProblem, weight: Weight) -> float:
        """By what ``best`` compares."""
        return relative_error(problem, weight)

    def best(self, problem: LayerProblem) -> tuple[Weight, str]:
        """The solution and the name of the method that made it: this one, or its data-free self."""
        plain = self.data_free()
        fallback = plain.compress(problem)
        if not self.informed(problem):
            return fallback, plain.name
        weight = super().compress(problem)
        if self.wrong(problem, fallback) < self.wrong(problem, weight):
            return fallback, plain.name
        return weight, self.name


class TransformCompressor(Compressor, ABC):
    """Writes a dense model as an equal one that is easier to compress; saves no byte itself."""

    family: ClassVar[str] = "quantization"
    packs: ClassVar[bool] = False


class StructureCompressor(Compressor, ABC):
    """Makes a dense model of fewer blocks or narrower ones: an ordinary, smaller model."""

    family: ClassVar[str] = "pruning"
    headline: ClassVar[tuple[str, ...]] = ("amount",)
    layouts: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})
    needs_text: ClassVar[bool] = True

    amount: float = Field(0.25, gt=0, lt=1, description="share that goes, of what there is")

    def keeps(self, count: int, multiple: int = 1) -> int:
        """How many of ``count`` blocks, heads or channels stay: the nearest number.

        With a ``multiple`` above 1 it is the next lower multiple, where there is one.
        """
        left = count * (1 - self.amount) + 1e-9  # 0.1 of 10 is 1
        lower = int(left) // multiple * multiple
        return lower if multiple > 1 and lower else max(1, int(left + 0.5))


@dataclass(frozen=True)
class SharedInput:
    """A tensor x [tokens, in], the matrices of the sites that read it, and what is known of it.

    matrices  float32 [out, in] each
    H         float32 [in, in], xᵀx / tokens
    mean      float32 [in], mean |x|
    most      float32 [in], max |x|
    """

    matrices: list[Tensor]
    H: Tensor
    mean: Tensor
    most: Tensor


class ScalingCompressor(TransformCompressor, ABC):
    """Multiplies the columns of matrices by scales and divides what makes their inputs by them."""

    needs_text: ClassVar[bool] = True

    @abstractmethod
    def scale(self, inputs: SharedInput) -> Tensor:
        """float32 [in], positive: what the columns of all ``inputs.matrices`` are multiplied by."""


class RotationCompressor(TransformCompressor, ABC):
    """Turns the coordinates of the residual stream, in all that write to it and read from it."""

    default_targets: ClassVar[tuple[str, ...]] = ("all",)

    heads: bool = Field(
        False, description="turn values within each head as well; pays if o_proj's inputs round"
    )

    @abstractmethod
    def rotation(self, width: int) -> Tensor:
        """float64 [width, width], orthogonal."""


@dataclass(frozen=True)
class TrainingRun:
    """What a training compressor works on.

    student     the compressed model in memory; compressed sites decode their weight as they run
    original    loads the model that is compressed, as it was
    teacher     loads the one to learn from, mostly the same; ``teacher_hash`` says which it is
    text        calibration text, int64 [windows, length] and its bytes
    held        how many of the last windows to keep from training
    tokenizer   of the model
    sites, all  modules that the stage takes, and all modules with a matrix
    folder      where the state of the training goes, so that it can be resumed
    cache       where what teachers predict is kept for other runs, too
    report      called with (step, steps, numbers) after every step
    """

    student: nn.Module
    original: Callable[[], nn.Module]
    teacher: Callable[[], nn.Module]
    teacher_hash: str
    text: Windows
    held: int
    tokenizer: Any
    sites: frozenset[str]
    all: frozenset[str]
    folder: Path
    cache: Path
    report: Callable[[int, int, dict[str, float]], None]
    seed: int = 0


class TrainingCompressor(Compressor, ABC):
    """Changes a model by training; the kinds of its weights stay as they are."""

    accepts: ClassVar[frozenset[str]] = frozenset(Weight.kinds)
    packs: ClassVar[bool] = False

    teacher: str | None = Field(
        None, description="folder of another model to learn from, with the same tokenizer"
    )

    def result(self, kind: str) -> str:
        return kind

    @abstractmethod
    def tokens(self) -> tuple[int, int]:
        """Calibration text it wants: (windows, tokens in a window)."""

    @abstractmethod
    def train(self, run: TrainingRun) -> dict[str, Any]:
        """Train ``run.student`` in place; returns numbers for the record."""

    def disk(self) -> int:
        """Bytes of its own that it keeps on disk, beside the state of the training."""
        return 0

    def finish(self, module: nn.Module, site: Site, weight: Weight) -> Weight:
        """The weight of ``site`` after training; ``weight`` is what it was before."""
        return read_back(module, site, weight)


def read_back(module: nn.Module, site: Site, before: Weight) -> Weight:
    """What ``module`` holds now, in the storage of ``before``."""
    if isinstance(module, Compressed):
        now = module.tensors()
        tensors = {k: now[k].detach().cpu().to(t.dtype) for k, t in before.tensors.items()}
        return Weight.restore(before.spec, tensors)
    matrix = module.get_parameter("weight").detach().cpu()
    return Dense.of(matrix.T if site.layout == "conv1d" else matrix, before.dtype)
