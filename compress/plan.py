"""Give a size, get the best model: bits for every matrix, so that the file is no larger.

Every matrix is rounded once to each number of bits, on the calibration text and in the model as it
is; what that costs in loss is told by the loss's own gradients (``quantization.bits.cost``). The
least sum of costs whose file fits the size is a recipe like any other: ``gptq`` with an override
for each matrix.
"""

from __future__ import annotations

import tempfile
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import torch

from compress.anatomy import Site
from compress.calibration import calibrates, check_text
from compress.compressors.quantization.bits import WIDTHS, Choice, choose
from compress.compressors.quantization.gptq import GPTQ
from compress.errors import DataError, ModelError, RecipeError
from compress.events import Event
from compress.formats import choose as choose_format
from compress.layerwise import problems
from compress.objective import family
from compress.recipe import Recipe, Stage
from compress.run import Original
from compress.source import Source
from compress.store import Store, file_size
from compress.weights import Dense, Quantized, Weight
from compress.weights.quantized import scale_dtype


@dataclass(frozen=True)
class Plan:
    """A recipe that is predicted to fit.

    bits    of every matrix that it takes, by its name
    bytes   of the weight file that it makes, exactly
    budget  bytes that were given
    cost    Σ ½ tr(F D H Dᵀ) of the trials: KL to the original in nats a token, as far as that is
            quadratic and errors add up; an upper guess, as the trials do not make up for each other
    """

    recipe: Recipe
    bits: dict[str, int]
    bytes: int
    budget: int
    cost: float


def plan(recipe: Recipe, source: Source, stage: Stage, budget: int) -> Generator[Event, None, Plan]:
    """The bits that ``stage`` (a gptq) gives to each matrix for a file of ``budget`` bytes.

    The model is in memory once, as float32, for one backward pass over the text.

    Raises:
        RecipeError: even the fewest bits are too many. ModelError: the model predicts no tokens.
        DataError: there is no text.
    """
    gptq = stage.compressor
    assert isinstance(gptq, GPTQ)
    sites = stage.sites(source.anatomy)
    if not calibrates(stage, recipe, source):
        if not recipe.data:
            raise DataError("a plan needs text: give --data")
        raise ModelError(f"{source.model_class.__name__} reads no text, so nothing tells costs")
    if family(source.skeleton) == "other":
        name = source.model_class.__name__
        raise ModelError(f"{name} predicts no tokens, so nothing tells what an error costs")
    check_text(recipe.model_copy(update={"stages": [stage]}), source)
    sized = _Sizes(source, gptq, recipe.storage)
    least = sized.file({site.name: WIDTHS[0] for site in sites})
    if least > budget:
        raise RecipeError(
            f"{budget:,} bytes are too few: {len(sites)} matrices in {WIDTHS[0]} bits come to "
            f"{least:,} ({least / source.nbytes:.1%}); take more of them (targets: all), or "
            "wider groups"
        )
    choices: list[Choice] = []
    with tempfile.TemporaryDirectory() as folder:
        looked = problems(stage, recipe, source, Original(source), Store(Path(folder)))
        yield Event("plan", 0, len(sites))
        for problem in looked:
            choices.append(Choice.of(problem, gptq.trial, gptq.size))
            yield Event("plan", len(choices), len(sites))
    bits = _fitting(choices, sized, budget)
    overrides = {
        name: gptq.model_copy(update={"bits": b}) for name, b in bits.items() if b != gptq.bits
    }
    made = recipe.model_copy(update={"stages": [stage.model_copy(update={"overrides": overrides})]})
    cost = sum(float(c.costs[WIDTHS.index(bits[c.name])]) for c in choices)
    return Plan(made, bits, sized.file(bits), budget, cost)


def _fitting(choices: list[Choice], sized: _Sizes, budget: int) -> dict[str, int]:
    """The best choice whose file, names and all, is not above ``budget`` bytes."""
    left = budget - sized.file({}) + sum(sized.dense[c.name] for c in choices)
    while True:
        bits = choose(choices, left)
        over = sized.file(bits) - budget
        if over <= 0:
            return bits
        left -= over


class _Sizes:
    """How large the weight file is, before anything is compressed."""

    def __init__(self, source: Source, gptq: GPTQ, storage: str) -> None:
        self.source, self.gptq, self.storage = source, gptq, storage
        self.sites = {site.name: site for site in source.anatomy.sites}
        self.dense = {name: site.nbytes for name, site in self.sites.items()}
        self.known: dict[tuple[str, int | None], Weight] = {}
        inside = {site.parameter for site in self.sites.values()}
        self.others = {
            name: torch.empty(shape, dtype=dtype, device="meta")
            for name, shape, dtype in source.headers()
            if name not in inside
        }

    def file(self, bits: dict[str, int]) -> int:
        """Bytes of the file with these matrices packed and all others as they are."""
        weights = {name: self._weight(name, bits.get(name)) for name in self.sites}
        specs = {name: weight.spec for name, weight in weights.items()}
        how = choose_format(
            self.source.anatomy, specs, self.source.model_class, self.source.config, self.storage
        )
        tensors = dict(self.others)
        for name, site in self.sites.items():
            tensors |= how.tensors(site, weights[name])
        return file_size(tensors)

    def _weight(self, name: str, bits: int | None) -> Weight:
        """One of the right shape, of no numbers."""
        if (name, bits) not in self.known:
            self.known[name, bits] = self._made(self.sites[name], bits)
        return self.known[name, bits]

    def _made(self, site: Site, bits: int | None) -> Weight:
        rows, columns = site.shape
        if bits is None:
            return Dense.of(torch.empty(rows, columns, dtype=site.dtype, device="meta"))
        group = columns if self.gptq.group == "channel" else min(self.gptq.group, columns)
        grid = torch.zeros(rows, -(-columns // group))
        packed = Quantized.pack(
            torch.zeros(rows, columns, dtype=torch.uint8),
            grid.to(scale_dtype(site.dtype)),
            None if self.gptq.symmetric else grid,
            bits=bits,
            group=group,
            dtype=site.dtype,
        )
        return Quantized(packed.spec, {k: t.to("meta") for k, t in packed.tensors.items()})
