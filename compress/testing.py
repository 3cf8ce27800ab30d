"""Conformance checks for compressors: what the rest of the library relies on, tried out.

Built-ins and plug-ins pass the same checks. A plug-in's test is one line:

    from compress.testing import check_compressor
    check_compressor("ternary")                  # or the class itself, and any parameters

Problems are small, made with a fixed seed, and include the ones that break methods: zeros, rows
without spread, one row or column, a width that no group divides, outliers, 16-bit weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from torch import Tensor

from compress import registry
from compress.compressors.base import (
    Compressor,
    LayerCompressor,
    RotationCompressor,
    ScalingCompressor,
    SharedInput,
    StructureCompressor,
    TrainingCompressor,
)
from compress.errors import CompressError
from compress.problem import LayerProblem, relative_error
from compress.recipe import Stage
from compress.weights import (
    NF4,
    Coded,
    Dense,
    Float8,
    Huffman,
    Int8,
    LowRank,
    Masked,
    Quantized,
    Sparse,
    Sum,
    Weight,
)

SLACK, HEADER = 1.03, 256  # stored bytes may exceed the prediction by 3% and by this many bytes


class ConformanceError(AssertionError):
    """A compressor breaks its contract: which check, on which problem, and what was found."""


def check_compressor(compressor: str | type[Compressor], **parameters: Any) -> list[str]:
    """Run every check that applies; returns the names of the checks that passed.

    ``compressor`` is a registered name or a class; ``parameters`` are what a recipe would say.

    Raises:
        ConformanceError: on the first check that fails. CompressError: the name is not known.
    """
    cls = registry.get(compressor) if isinstance(compressor, str) else compressor
    label = compressor if isinstance(compressor, str) else cls.__name__
    checks: list[Callable[[Compressor, dict[str, Any]], None]] = [
        documented,
        validated,
        round_trips_through_yaml,
        declares_kinds,
    ]
    if issubclass(cls, LayerCompressor):
        checks += [solves_every_matrix, follows_what_it_accepts]
    if issubclass(cls, TrainingCompressor):
        checks.append(asks_for_text)
    if issubclass(cls, ScalingCompressor):
        checks.append(scales_every_input)
    if issubclass(cls, RotationCompressor):
        checks.append(turns_without_loss)
    if issubclass(cls, StructureCompressor):
        checks.append(leaves_something)
    made = cls.model_validate(parameters)
    for check in checks:
        try:
            with torch.random.fork_rng(devices=[]):
                check(made, parameters)
        except ConformanceError as error:
            raise ConformanceError(f"{label}: {check.__name__}: {error}") from None
    return [check.__name__ for check in checks]


def documented(compressor: Compressor, parameters: dict[str, Any]) -> None:
    """A docstring whose first line is a sentence, with a source or a formula; parameters, too."""
    doc = type(compressor).__dict__.get("__doc__") or ""
    _require(doc.strip(), "the class has no docstring")
    _require(
        re.search(r"arXiv|doi|https?://|\b(19|20)\d\d\b|[=≤≥←∝]", doc),
        "the docstring names neither a source (arXiv 2306.11695, a year, a link) nor a formula",
    )
    for name, field in type(compressor).model_fields.items():
        _require(field.description, f"parameter '{name}' has no description")


def validated(compressor: Compressor, parameters: dict[str, Any]) -> None:
    """The configuration cannot be changed, and knows no keys but its own."""
    for name in type(compressor).model_fields:
        try:
            setattr(compressor, name, getattr(compressor, name))
        except (ValidationError, AttributeError, TypeError):
            continue
        _require(False, f"'{name}' can be assigned to; keep the frozen model_config")
    try:
        type(compressor).model_validate(parameters | {"no_such_parameter": 1})
    except ValidationError:
        return
    _require(False, "unknown parameters are accepted; keep extra='forbid' in model_config")


def round_trips_through_yaml(compressor: Compressor, parameters: dict[str, Any]) -> None:
    """What recipe.yaml of a checkpoint holds makes an equal compressor."""
    stage = Stage(compressor=compressor, targets=["blocks"]).dump()
    text = yaml.safe_dump({k: v for k, v in stage.items() if k not in ("use", "targets")})
    try:
        again = type(compressor).model_validate(yaml.safe_load(text))
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise ConformanceError(f"its own dump is refused ({reason}):\n{text}") from error
    _require(again == compressor, f"{again!r} came back from YAML, not {compressor!r}")


def declares_kinds(compressor: Compressor, parameters: dict[str, Any]) -> None:
    """Kinds of weight and layouts of module are ones that exist."""
    known = set(Weight.kinds)
    _require(compressor.accepts, "accepts is empty, so no weight can be given to it")
    _require(compressor.accepts <= known, f"accepts {sorted(compressor.accepts - known)}?")
    _require(compressor.makes in known, f"makes '{compressor.makes}'; kinds are {sorted(known)}")
    layouts = {"linear", "conv1d", "embedding"}
    _require(compressor.layouts <= layouts, f"layouts {sorted(compressor.layouts - layouts)}?")
    for kind in compressor.accepts:
        made = compressor.result(kind)
        _require(made in known, f"result('{kind}') is '{made}'; kinds are {sorted(known)}")


def asks_for_text(compressor: Compressor, parameters: dict[str, Any]) -> None:
    """``tokens`` says how many windows of what length it wants."""
    assert isinstance(compressor, TrainingCompressor)
    wanted = compressor.tokens()
    _require(
        len(wanted) == 2 and all(isinstance(n, int) and n > 0 for n in wanted),
        f"tokens() is {wanted!r}, not (windows, tokens in a window)",
    )


def scales_every_input(compressor: Compressor, parameters: dict[str, Any]) -> None:
    """``scale`` is positive, finite and the same when asked again, for awkward inputs, too."""
    assert isinstance(compressor, ScalingCompressor)
    for name, problem in problems().items():
        size = problem.H_diag.sqrt() * (torch.arange(problem.weight.shape[1]) % 5 != 1)
        H = torch.outer(size, size) + torch.diag(size**2)
        for inputs in (
            SharedInput([problem.W, 3 * problem.W], H, size, 4 * size),
            SharedInput([problem.W], 0 * H, 0 * size, 0 * size),
        ):
            scale = compressor.scale(inputs)
            _require(scale.shape == size.shape, f"{name}: scales are {list(scale.shape)}")
            _require(torch.isfinite(scale).all(), f"{name}: a scale is not finite")
            _require((scale > 0).all(), f"{name}: a scale is not positive")
            again = compressor.scale(inputs)
            _require(torch.equal(scale, again), f"{name}: two calls gave different scales")


def turns_without_loss(compressor: Compressor, parameters: dict[str, Any]) -> None:
    """``rotation`` is orthogonal and the same when asked again, for any width."""
    assert isinstance(compressor, RotationCompressor)
    for width in (1, 3, 64, 96, 100, 128):
        R = compressor.rotation(width)
        _require(R.shape == (width, width), f"width {width}: it is {list(R.shape)}")
        off = (R @ R.T - torch.eye(width, dtype=R.dtype)).abs().max()
        _require(off < 1e-9, f"width {width}: R Rᵀ is off from the identity by {off:.2g}")
        _require(torch.equal(R, compressor.rotation(width)), "two calls gave different rotations")


def leaves_something(compressor: Compressor, parameters: dict[str, Any]) -> None:
    """``keeps`` leaves one or more, no more than there are, and about the share that is wanted."""
    assert isinstance(compressor, StructureCompressor)
    for count in (1, 2, 7, 12, 96, 384):
        for multiple in (1, 8, 32):
            kept = compressor.keeps(count, multiple)
            _require(1 <= kept <= count, f"keeps({count}, {multiple}) is {kept}")
            wanted = count * (1 - compressor.amount)
            _require(
                abs(kept - wanted) <= max(multiple, 1),
                f"keeps({count}, {multiple}) is {kept}, far from {wanted:.1f}",
            )
    _require(
        compressor.layouts <= {"linear", "conv1d"} or compressor.default_targets == ("all",),
        "tables are read by no channel of a block, and change with the whole model alone",
    )


def solves_every_matrix(compressor: Compressor, parameters: dict[str, Any]) -> None:
    """``solve`` on ordinary and on awkward matrices; a clear CompressError is an answer, too."""
    assert isinstance(compressor, LayerCompressor)
    for name, problem in problems().items():
        try:
            solver = compressor.prepare(lambda problem=problem: iter([problem]))  # type: ignore[misc]
            weight = _solve_twice(solver, problem, name)
        except CompressError as error:
            _require(name not in ("normal", "with data"), f"{name}: refused ({error})")
            continue
        _is_sound(weight, problem, name)
        kept = weight.kind == "dense" and torch.equal(weight.dense(), problem.W)
        _require(
            kept or weight.kind == compressor.makes,
            f"{name}: made {weight.kind}, and neither {compressor.makes} nor the matrix as it was",
        )
        predicted = compressor.predict(problem.weight.shape, problem.dtype)
        _require(
            weight.nbytes <= SLACK * predicted + HEADER,
            f"{name}: takes {weight.nbytes:,} bytes, predict() said {predicted:,}",
        )
        wrong = relative_error(problem, weight)
        if name == "zeros":
            _require(wrong == 0, "zeros: a weight of zeros must stay zero")
        if name in ("normal", "with data"):
            _require(0 <= wrong < 1, f"{name}: relative error {wrong:.3g}, no better than zeros")


def follows_what_it_accepts(compressor: Compressor, parameters: dict[str, Any]) -> None:
    """Every kind of weight that it accepts becomes the kind that ``result`` promises."""
    assert isinstance(compressor, LayerCompressor)
    for kind in sorted(compressor.accepts):
        problem = LayerProblem(kind, starting_weight(kind))
        solver = compressor.prepare(lambda problem=problem: iter([problem]))  # type: ignore[misc]
        weight = solver.compress(problem)
        promised = compressor.result(kind)
        kept = weight.kind == "dense" and torch.equal(weight.dense(), problem.W)
        _require(
            kept or weight.kind == promised,
            f"from {kind}: result() promises {promised}, got {weight.kind}",
        )
        _require(weight.shape == problem.weight.shape, f"from {kind}: shape {weight.shape}")
        _require(torch.isfinite(weight.dense()).all(), f"from {kind}: not finite")


def problems() -> dict[str, LayerProblem]:
    """The layer problems that a method is tried on, by name."""
    random = torch.Generator().manual_seed(0)

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=random) * 0.05

    outliers = normal(48, 128)
    outliers[::7, ::31] *= 100
    inputs = normal(512, 128) @ torch.diag(torch.linspace(0.1, 10, 128))
    return {
        "normal": LayerProblem.of(normal(64, 128)),
        "with data": LayerProblem.of(normal(64, 128), inputs.T @ inputs / len(inputs)),
        "zeros": LayerProblem.of(torch.zeros(16, 64)),
        "constant rows": LayerProblem.of(torch.linspace(-1, 1, 16)[:, None].expand(16, 64).clone()),
        "some zero rows": LayerProblem.of(normal(16, 64) * (torch.arange(16)[:, None] % 2)),
        "one column": LayerProblem.of(normal(33, 1)),
        "one row": LayerProblem.of(normal(1, 96)),
        "awkward width": LayerProblem.of(normal(37, 100)),
        "bfloat16 outliers": LayerProblem.of(outliers.to(torch.bfloat16)),
        "float16": LayerProblem.of(normal(32, 64).half()),
    }


def starting_weight(kind: str) -> Weight:
    """A weight [96, 128] of this kind, bfloat16, as an earlier stage could have made it."""
    random = torch.Generator().manual_seed(1)
    matrix = (torch.randn(96, 128, generator=random) * 0.05).to(torch.bfloat16)
    thin = torch.randn(24, 128, generator=random) * 0.05
    dtype = matrix.dtype
    factors = LowRank.of(matrix[:, :24], thin, dtype)
    codes = torch.randint(0, 16, matrix.shape, generator=random)
    scale = torch.full((96, 2), 0.02, dtype=dtype)
    packed = Quantized.pack(codes, scale, None, bits=4, group=64, dtype=dtype)
    made: dict[str, Callable[[], Weight]] = {
        "dense": lambda: Dense.of(matrix),
        "sparse": lambda: Sparse.of(matrix, matrix.abs() > 0.03),
        "quantized": lambda: packed,
        "lowrank": lambda: factors,
        "sum": lambda: Sum.of(packed, factors),
        "coded": lambda: Coded.of(
            codes, torch.full((96,), 130).byte(), torch.full((128,), 120).byte(), 0.01, dtype
        ),
        "huffman": lambda: Huffman.of(packed),
        "masked": lambda: Masked.of(packed, Sparse.of(matrix, packed.dense() != 0)),
        "float8": lambda: Float8.of(matrix, scale[:, :1], dtype),
        "int8": lambda: Int8.of(matrix, dtype),
        "nf4": lambda: NF4.of(matrix, dtype, block=64, double_quant=False),
    }
    return made[kind]()


def _solve_twice(solver: LayerCompressor, problem: LayerProblem, name: str) -> Weight:
    """The solution, having seen that a second one is the same and the problem is as it was."""
    given = dict(problem.weight.tensors) | ({} if problem.H is None else {"H": problem.H})
    before = {key: tensor.clone() for key, tensor in given.items()}
    torch.manual_seed(1)
    weight = solver.solve(problem)
    for key, tensor in given.items():
        _require(torch.equal(tensor, before[key]), f"{name}: solve() changed the problem's {key}")
    torch.manual_seed(2)  # a resumed run has another state of torch's own generator
    again = solver.solve(problem)
    _require(weight.spec == again.spec, f"{name}: two calls gave different specs")
    for key, tensor in weight.tensors.items():
        same = _bytes(tensor) == _bytes(again.tensors[key])
        _require(same, f"{name}: two calls gave different {key}; seed what is random")
    return weight


def _is_sound(weight: Weight, problem: LayerProblem, name: str) -> None:
    """Shape, dtype, bytes, and the way to the disk and back."""
    _require(weight.shape == problem.weight.shape, f"{name}: shape {weight.shape}")
    _require(weight.dtype == problem.dtype, f"{name}: {weight.dtype}, model has {problem.dtype}")
    matrix = weight.dense()
    _require(matrix.dtype == torch.float32, f"{name}: dense() is {matrix.dtype}, not float32")
    _require(tuple(matrix.shape) == weight.shape, f"{name}: dense() is {tuple(matrix.shape)}")
    _require(torch.isfinite(matrix).all(), f"{name}: dense() holds NaN or infinite values")
    stored = sum(len(_bytes(tensor)) for tensor in weight.tensors.values())
    _require(weight.nbytes == stored, f"{name}: nbytes {weight.nbytes}, tensors hold {stored}")
    try:
        spec = json.loads(json.dumps(weight.spec))
    except TypeError as error:
        raise ConformanceError(f"{name}: the spec is not JSON ({error})") from error
    _require(spec == weight.spec, f"{name}: the spec does not come back from JSON as it was")
    again = Weight.restore(spec, weight.tensors)
    _require(type(again) is type(weight), f"{name}: restored as {type(again).__name__}")
    _require(torch.equal(again.dense(), matrix), f"{name}: the restored weight differs")


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8).numpy().tobytes()


def _require(condition: Any, message: str) -> None:
    if not condition:
        raise ConformanceError(message)
