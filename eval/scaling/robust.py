"""Robust least squares, many problems at once.

Huber's loss (Annals of Mathematical Statistics 35, 1964) is quadratic within ``delta`` and linear
beyond, so that one model that went wrong does not bend a law:

    ρ(r) = r²/2  for |r| ≤ δ,   δ·(|r| − δ/2)  beyond

Its minimum is found by Levenberg-Marquardt steps on the reweighted squares: a residual beyond δ
counts δ/|r| of a square. Each step that is kept lowers the loss. All starts and all bootstrap
replicates are rows of one batch: a thousand fits take about as long as one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]
Model: TypeAlias = Callable[[Array], tuple[Array, Array]]

STEPS = 300
ENOUGH = 1e-10  # of the loss: an improvement that is none


def minimise(model: Model, starts: Array, weights: Array, delta: float) -> tuple[Array, Array]:
    """Minimise Σ weights · ρ(residuals) from every start; all float64.

    model    parameters [batch, p] → residuals [batch, n] and their derivatives [batch, n, p]
    starts   [batch, p]
    weights  [batch, n], how often (or how much) each observation counts

    Returns the parameters [batch, p] and losses [batch].
    """
    theta = starts.copy()
    damping = np.full(len(theta), 1e-2)
    residuals, slopes = model(theta)
    loss = _loss(residuals, weights, delta)
    for _ in range(STEPS):
        counted = weights * _share(residuals, delta)
        gradient = np.einsum("bnp,bn->bp", slopes, counted * residuals)
        curvature = np.einsum("bnp,bn,bnq->bpq", slopes, counted, slopes)
        size = np.einsum("bpp->bp", curvature)
        ridge = damping[:, None] * size + 1e-12 * size.max(axis=1, keepdims=True) + 1e-300
        step = np.linalg.solve(
            curvature + ridge[:, :, None] * np.eye(theta.shape[1]), gradient[:, :, None]
        )[:, :, 0]
        tried = theta - step
        tried_residuals, tried_slopes = model(tried)
        tried_loss = _loss(tried_residuals, weights, delta)
        better = tried_loss < loss  # false for a loss that is not a number
        moved = better & (tried_loss < loss * (1 - ENOUGH))
        theta[better], loss[better] = tried[better], tried_loss[better]
        residuals[better], slopes[better] = tried_residuals[better], tried_slopes[better]
        damping = np.clip(np.where(better, damping / 4, damping * 8), 1e-9, 1e9)
        if not moved.any() and damping.min() > 1e6:
            break
    return theta, loss


def linear(X: Array, y: Array, weights: Array, delta: float) -> Array:
    """Coefficients [batch, p] of y ≈ X·θ; X [n, p], y [n] or [batch, n], weights [batch, n]."""

    def model(theta: Array) -> tuple[Array, Array]:
        return theta @ X.T - y, np.broadcast_to(X, (len(theta), *X.shape)).copy()

    return minimise(model, np.zeros((len(weights), X.shape[1])), weights, delta)[0]


def _share(residuals: Array, delta: float) -> Array:
    """How much of a square each residual counts."""
    return delta / np.maximum(np.abs(residuals), delta)


def _loss(residuals: Array, weights: Array, delta: float) -> Array:
    size = np.abs(residuals)
    each = np.where(size <= delta, residuals**2 / 2, delta * (size - delta / 2))
    return (weights * each).sum(axis=1)
