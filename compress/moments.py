"""Second moments of what a layer reads, and what solvers compute from them.

Sites that read one input share one ``Moments``, so that a factorization is made once for all.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from functools import cached_property

import torch
from torch import Tensor

from compress import distributed
from compress.products import fast_products, narrow_factors

TILE = 128  # inputs whose moments are summed at a time
DAMPING = 0.01  # of the mean diagonal (GPTQ, arXiv 2210.17323)


class Moments:
    """H = X̂ᵀX̂ / T, float32 [in, in]; and G = X̂ᵀX / T with the original model's inputs X.

    Both are sums over T tokens, weighted where the loss says that some tokens matter more, and so
    are the means of X̂ and X, float32 [in], where they are known.
    """

    def __init__(
        self,
        H: Tensor,
        G: Tensor | None = None,
        mean: Tensor | None = None,
        wanted_mean: Tensor | None = None,
    ) -> None:
        self.H = H
        self.G = G
        self.mean = mean
        self.wanted_mean = wanted_mean
        self._factors: dict[bool, tuple[Tensor, Tensor]] = {}

    def centred(self) -> Moments:
        """Those of inputs less their means: what a layer whose bias takes up the means reads."""
        assert self.mean is not None
        H = self.H - torch.outer(self.mean, self.mean)
        if self.G is None or self.wanted_mean is None:
            return Moments(H)
        return Moments(H, self.G - torch.outer(self.mean, self.wanted_mean))

    def shift(self, W: Tensor, solved: Tensor, strength: float) -> Tensor:
        """float32 [out]: what a bias gains so that the mean output stays what it was with W.

        Of what W makes of the inputs X̂ or, ``strength`` of the way, of X.
        """
        assert self.mean is not None
        wanted = self.mean
        if self.wanted_mean is not None:
            wanted = wanted + strength * (self.wanted_mean - wanted)
        return W @ wanted - solved @ self.mean

    @cached_property
    def dead(self) -> Tensor:
        """bool [in]: inputs that were always zero."""
        return self.H.diagonal() == 0

    @property
    def damped(self) -> Tensor:
        """float64 [in, in]: H + λI with λ = 0.01 · mean diagonal; positive definite.

        Dead inputs have 1 on the diagonal. λ grows tenfold for as long as a Cholesky
        factorization fails.
        """
        return self._damped[0]

    @property
    def factor(self) -> Tensor:
        """float64 [in, in]: lower L with LLᵀ = H + λI."""
        return self._damped[1]

    @cached_property
    def _damped(self) -> tuple[Tensor, Tensor]:
        """H + λI, and its lower Cholesky factor."""
        H = self.H.double()
        diagonal = H.diagonal()
        mean = diagonal[~self.dead].mean() if not self.dead.all() else torch.tensor(1.0)
        H = H + torch.diag(self.dead.double() * mean)
        strength = DAMPING * mean
        while True:
            damped = H + strength * torch.eye(len(H), dtype=torch.float64)
            factor, failed = torch.linalg.cholesky_ex(damped)
            if not failed:
                return damped, factor
            strength = strength * 10

    def inverse_factor(self, *, descending: bool = True) -> tuple[Tensor, Tensor]:
        """An order of the inputs, int64 [in], and the float32 upper U with UᵀU = (H + λI)⁻¹ in it.

        Descending: inputs with the largest H_jj come first, while most others are still free to
        make up for their rounding.
        """
        if descending not in self._factors:
            order = torch.arange(len(self.H))
            if descending:
                order = self.H.diagonal().argsort(descending=True, stable=True)
            # of the inputs backwards, because H + λI = U⁻¹U⁻ᵀ has its factor the other way round
            back = order.flip(0)
            lower = torch.linalg.cholesky(self.damped[back][:, back])
            eye = torch.eye(len(order), dtype=torch.float64)
            U = torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
            self._factors[descending] = order, U.float()
        return self._factors[descending]

    @cached_property
    def unit_eigh(self) -> tuple[Tensor, Tensor]:
        """float32 eigenvalues [in] and vectors [in, in] of H + λI scaled to a unit diagonal."""
        scale = self.damped.diagonal().sqrt()
        values, vectors = torch.linalg.eigh(self.damped / torch.outer(scale, scale))
        return values.float(), vectors.float()

    def corrected(self, W: Tensor, strength: float) -> Tensor:
        """(1 − α) W + α W (Gᵀ + λI)(H + λI)⁻¹, float32: what W should be for the inputs X̂.

        The least-squares answer to X̂ Ŵᵀ ≈ X Wᵀ, α of the way (QEP, arXiv 2504.09629).
        """
        if self.G is None or strength == 0:
            return W
        # W(Gᵀ+λI)(H+λI)⁻¹ = W + W(Gᵀ − H)(H+λI)⁻¹
        change = (self.G - self.H) @ W.T  # H is symmetric
        step = torch.cholesky_solve(change.double(), self.factor).T
        return (W.double() + strength * step).float()


def gathered(
    batches: Iterable[tuple[int, list[Tensor | None]]], width: int, weights: list[Tensor] | None
) -> Moments:
    """The moments of what a site reads, over all batches and processes.

    ``batches`` gives numbers and inputs [..., width]: X̂, and maybe X beside it. G is left out
    unless there are as many tokens of X everywhere. ``weights`` [tokens] by number of batch. H is
    summed in float32. So is G − H = X̂ᵀ(X − X̂)/T, but of a model in 16 bits each batch's is
    multiplied in 16 bits, as it was read: of a correction that is enough.
    """
    H, mean = torch.zeros(width, width), torch.zeros(width)
    change, shift = torch.zeros(width, width), torch.zeros(width)
    tokens, paired = 0, True
    room = difference = torch.empty(0)  # for each batch in turn: pages that are new take time
    for number, (inputs, *others) in batches:
        assert inputs is not None
        read = inputs.reshape(-1, width)
        if len(room) < len(read):
            room = torch.empty(len(read), width)
        x = room[: len(read)].copy_(read)
        count = None if weights is None else weights[number][:, None]
        weighted = x if count is None else x * count
        narrow = count is None and read.dtype == torch.bfloat16
        with narrow_factors() if narrow else nullcontext():
            for start in range(0, width, TILE):  # of a symmetric matrix the upper half is enough
                rows = slice(start, start + TILE)
                H[rows, start:].addmm_(weighted[:, rows].T, x[:, start:])
        mean += weighted.sum(0)
        tokens += len(x)
        original = others[0] if others else None
        if original is None or original.shape != inputs.shape:
            paired = False
        elif paired:
            if len(difference) < len(read):
                difference = torch.empty_like(read)
            ahead = difference[: len(read)]
            torch.sub(original.reshape(-1, width), read, out=ahead)
            if count is None:
                with fast_products():
                    change += read.T @ ahead
                shift += x.copy_(ahead).sum(0)
            else:
                change += weighted.T @ x.copy_(ahead)
                shift += x.mul_(count).sum(0)
    paired = bool(distributed.least(paired))
    tokens = max(1, int(distributed.total(torch.tensor(tokens))))
    H = H.triu() + H.triu(1).T
    H, mean = distributed.total(H) / tokens, distributed.total(mean) / tokens
    if not paired:
        return Moments(H, None, mean)
    change, shift = distributed.total(change) / tokens, distributed.total(shift) / tokens
    return Moments(H, H + change, mean, mean + shift)
