"""Narrower blocks: which channels go, and how those that stay make up for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.compressors.base import (
    LOSS_WEIGHTED,
    PROPAGATE,
    CalibratedCompressor,
    LayerCompressor,
    StructureCompressor,
)
from compress.compressors.budget import allocate
from compress.problem import LayerProblem
from compress.weights import Dense, Weight

CHUNKS = 16  # rounds in which channels go; A⁻¹ is brought up to date after each
OPTIONS = 16  # widths between which an allocation chooses for each matrix


class Width(StructureCompressor):
    """Remove MLP channels and whole heads, and let what stays make up for them (least squares).

    A channel of the MLP is a column of down_proj and the rows of up_proj and gate_proj that make
    it; a head is the columns of o_proj that read it and the rows of q_proj, k_proj and v_proj.
    Where heads share keys and values, whole groups go. With the second moment A of what W
    (down_proj or o_proj) reads, removing j costs tr(W_j [A⁻¹]_jj⁻¹ W_jᵀ), ‖W_j‖²/[A⁻¹]_jj for one
    channel; for what stays, S, Ŵ = W A_{:,S} A_SS⁻¹ (Optimal Brain Surgeon, Hassibi & Stork 1993;
    ZipLM, arXiv 2302.04089), and a bias takes up the means. Channels go in rounds, A⁻¹ being
    brought up to date. Without ``compensate`` those go for which ‖W_j‖² A_jj is least, and nothing
    else changes. ``targets`` may be mlp or attention alone, ``blocks`` the layers.
    """

    multiple: int = Field(32, ge=1, description="what stays of an MLP's width is a multiple of it")
    allocation: Literal["uniform", "error"] = Field(
        "uniform",
        description="the same share of every layer, which needs no modelling file; or by error",
    )
    compensate: bool = Field(True, description="solve anew for what stays")
    propagate: float = Field(0.5, ge=0, le=1, description=PROPAGATE)
    loss_weighted: bool = Field(False, description=LOSS_WEIGHTED)

    default_targets: ClassVar = ("mlp", "attention")


class Narrow(CalibratedCompressor):
    """What Width does to each matrix that reads channels: columns that go are zero (ZipLM, 2023).

    units  by site: how many removable runs of columns it has
    keep   by site: how many of them stay
    prices  by site: parameters that go with each
    """

    name: ClassVar = "width"

    units: dict[str, int] = Field(description="removable runs of columns of each site")
    keep: dict[str, int] = Field(description="how many of them stay")
    steps: dict[str, int] = Field(description="what stays is a multiple of it")
    prices: dict[str, int] = Field(description="parameters that go with one")
    by_error: bool = Field(False, description="whether sites may keep different shares")
    compensate: bool = Field(True, description="solve anew for what stays")

    @property
    def shifts(self) -> bool:
        return self.compensate

    def data_free(self) -> LayerCompressor:
        return self.model_copy(update={"compensate": False})

    def solve(self, problem: LayerProblem) -> Weight:
        units, keep = self.units[problem.name], self.keep[problem.name]
        if not self.compensate or problem.moments is None:
            return Dense.of(drop(problem.W, problem.H_diag, units, keep), problem.dtype)
        return Dense.of(remove(*self.given(problem), units, keep)[0], problem.dtype)

    def best(self, problem: LayerProblem) -> tuple[Weight, str]:
        return self.solve(problem), self.name

    def prepare(self, problems: Callable[[], Iterable[LayerProblem]]) -> LayerCompressor:
        if not self.by_error:
            return self
        names, widths, options, budget = [], [], [], 0
        for problem in problems():
            name, price = problem.name, self.prices[problem.name]
            wanted, errors = self.curve(problem)
            names.append(name)
            widths.append(wanted)
            options.append((wanted * price, errors / max(problem.energy, 1e-300) ** 0.5))
            budget += self.keep[name] * price
        chosen = allocate(options, budget)
        keep = {n: int(w[c]) for n, w, c in zip(names, widths, chosen, strict=True)}
        return self.model_copy(update={"keep": keep})

    def curve(self, problem: LayerProblem) -> tuple[Tensor, Tensor]:
        """Widths that may be kept, ascending, and the error at each."""
        units, step = self.units[problem.name], self.steps[problem.name]
        stride = step * max(1, units // (step * OPTIONS))
        wanted = [*range(min(step, units), units, stride), units]
        errors = remove(*self.given(problem), units, wanted[0], stops=wanted)[1]
        return torch.tensor(wanted), torch.tensor(errors).flip(0)

    @staticmethod
    def given(problem: LayerProblem) -> tuple[Tensor, Tensor]:
        """The matrix and A, inputs that never are anything but zero left out."""
        moments = problem.moments
        if moments is None:
            return problem.target, torch.eye(problem.weight.shape[1])
        return problem.target * ~moments.dead, moments.damped


def drop(W: Tensor, power: Tensor, units: int, keep: int) -> Tensor:
    """W [out, in] without the columns of least ‖W_j‖² A_jj; ``power`` [in] is the diagonal of A."""
    cost = (W.square().sum(0) * power).view(units, -1).sum(1)
    gone = cost.argsort(stable=True)[: units - keep]
    kept = torch.ones(units, dtype=torch.bool).index_fill_(0, gone, False)
    return W * kept.repeat_interleave(W.shape[1] // units)


def remove(
    W: Tensor, A: Tensor, units: int, keep: int, stops: list[int] | None = None
) -> tuple[Tensor, list[float]]:
    """Ŵ [out, in], all but ``keep`` of ``units`` equal runs of columns zero; errors at ``stops``.

    A [in, in] is positive definite. Each round removes the runs that cost least by themselves; the
    errors tr((W − Ŵ) A (W − Ŵ)ᵀ) are exact.
    """
    size = W.shape[1] // units
    left, alive = W.double(), torch.arange(units)
    inverse = torch.linalg.inv(A.double())
    error, errors = 0.0, []
    ends = sorted({*(stops or ()), keep}, reverse=True)
    chunk = max(1, -(-(units - keep) // CHUNKS))
    for end in ends:
        while len(alive) > end:
            n = len(alive)
            runs = left.view(len(left), n, size).transpose(0, 1)  # [n, out, size]
            own = inverse.view(n, size, n, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
            cost = (
                torch.linalg.solve(own, runs.transpose(1, 2)).mul(runs.transpose(1, 2)).sum((1, 2))
            )
            gone = cost.argsort(stable=True)[: min(chunk, n - end)]
            stays = torch.ones(n, dtype=torch.bool).index_fill_(0, gone, False)
            s = stays.repeat_interleave(size)
            step = torch.linalg.solve(inverse[~s][:, ~s], inverse[~s][:, s])
            taken = left[:, ~s]
            error += float((torch.linalg.solve(inverse[~s][:, ~s], taken.T) * taken.T).sum())
            left = left[:, s] - taken @ step
            inverse = inverse[s][:, s] - inverse[s][:, ~s] @ step
            alive = alive[stays]
        errors.append(error)
    whole = torch.zeros(len(W), units, size, dtype=torch.float64)
    whole[:, alive] = left.view(len(W), len(alive), size)
    return whole.flatten(1).float(), errors
