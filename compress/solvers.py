"""What solves each site of a stage, and what is said of its answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from compress.anatomy import Site
from compress.compressors.base import LayerCompressor
from compress.errors import ModelError
from compress.problem import LayerProblem, relative_error
from compress.recipe import Stage
from compress.source import Source
from compress.weights import Weight
from compress.weights.base import rounding


def solvers_of(stage: Stage, source: Source) -> dict[str, LayerCompressor]:
    """What solves each site of a stage: its compressor, or that with a site's own parameters."""
    solvers = {}
    for site in stage.sites(source.anatomy):
        solver = stage.compressor_for(site)
        assert isinstance(solver, LayerCompressor)
        solvers[site.name] = solver
    return solvers


def prepared_all(
    solvers: dict[str, LayerCompressor],
    common: LayerCompressor,
    problems: Callable[[], Iterable[LayerProblem]],
) -> dict[str, LayerCompressor]:
    """``solvers``, once ``common`` has looked at the problems of the sites that it solves."""
    if not any(solver is common for solver in solvers.values()):
        return solvers
    prepared = common.prepare(problems)
    return {
        name: prepared.at_site(name) if solver is common else solver
        for name, solver in solvers.items()
    }


def about(number: int, stage: Stage, site: Site, weight: Weight) -> dict[str, Any]:
    """What every record of a site begins with."""
    return {
        "number": number,
        "stage": stage.use,
        "name": site.name,
        "role": site.role,
        "block": site.block,
        "shape": list(site.shape),
        "kind": weight.kind,
    }


def record(
    number: int, stage: Stage, site: Site, problem: LayerProblem, weight: Weight
) -> dict[str, Any]:
    """What compression.json says of one site and stage.

    Raises:
        ModelError: the weight is not finite.
    """
    error = relative_error(problem, weight)
    if not error < float("inf"):
        raise ModelError(f"{stage.use} made a weight of {site.name} that is not finite")
    return (
        about(number, stage, site, weight)
        | {
            "bytes_before": problem.weight.nbytes,
            "bytes": weight.nbytes,
            "relative_error": error,
            "packs": stage.compressor_for(site).packs,
            "kept": weight.kind == problem.weight.kind == "dense" and error < 1e-9,
        }
        | rounding(weight.spec)
    )
