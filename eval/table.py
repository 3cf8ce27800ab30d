"""The report's table: a row per checkpoint, a column per quantity that at least one row has."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from compress.errors import DataError
from eval.chart import bytes_text
from eval.compare import paired
from eval.measured import Measured
from eval.results import Result
from eval.scaling.equivalent import Equivalent


@dataclass(frozen=True)
class Gap:
    """A checkpoint's quality minus the reference's; ``verdict`` is empty when not paired."""

    mean: float
    stderr: float
    verdict: str = ""
    interval: tuple[float, float] | None = None
    words: str = ""
    """The verdict in a sentence, with the sample size and the one that would settle it."""

    @property
    def text(self) -> str:
        """``+0.0480 ± 0.0014``"""
        return plus_minus(self.mean, self.stderr)


@dataclass(frozen=True)
class Cell:
    """``sort`` is what the page sorts by; None goes last."""

    text: str = ""
    sort: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Column:
    """``cells`` has one cell for each checkpoint, in their order."""

    key: str
    title: str
    hint: str
    cells: list[Cell]


def share(value: float) -> str:
    """``53.3%``; what is not quite all never reads as all."""
    return ">99.9%" if 0.9995 <= value < 1 else f"{100 * value:.3g}%"


def number(value: float, digits: int = 4) -> str:
    """``digits`` significant ones, thousands apart, the sign of a minus."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "not a number"
    text = f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"
    return text.replace("-", "−")


def plus_minus(mean: float, stderr: float) -> str:
    """``+0.0480 ± 0.0014``: the error to two digits, the mean to the same place."""
    if stderr > 0:
        places = min(max(1 - math.floor(math.log10(stderr)), 0), 6)
        return f"{mean:+.{places}f} ± {stderr:.{places}f}".replace("-", "−")
    return f"{mean:+.4g}".replace("-", "−") if mean else "0"


def gap(row: Result, reference: Result) -> Gap:
    """Paired where the samples allow it, else the difference of the values with own error.

    Raises:
        DataError: the two were measured on different text.
    """
    if row.samples and reference.samples:
        found = paired(row, reference)
        interval = (found.low, found.high)
        return Gap(found.mean, found.stderr, found.verdict, interval, found.words)
    if row.data.get("hash") != reference.data.get("hash"):
        raise DataError(f"{row.checkpoint}: {row.metric} was measured on other text")
    if row.value is None or reference.value is None:
        raise DataError(f"{row.checkpoint}: {row.metric} has no value")
    return Gap(row.value - reference.value, row.stderr or 0.0)


def columns(
    rows: Sequence[Measured], gaps: Mapping[str, Gap], original_size: float | None, metric: str,
    equivalents: Mapping[str, Equivalent] | None = None,
) -> list[Column]:  # fmt: skip
    """All columns that have something to say. ``gaps`` are of ``metric``, by checkpoint name."""

    def column(key: str, title: str, hint: str, cell: Callable[[Measured], Cell | None]) -> Column:
        return Column(key, title, hint, [cell(row) or Cell() for row in rows])

    def of(key: str, title: str, hint: str, text: Callable[[float], str]) -> Column:
        return column(key, title, hint, lambda row: _cell(row.results.get(key), text))

    def size(row: Measured) -> Cell | None:
        if not row.size:
            return None
        ideal = row.record.get("bytes", {}).get("ideal", row.size)
        note = f"{bytes_text(ideal)} compact" if ideal < 0.95 * row.size else ""
        return Cell(bytes_text(row.size), row.size, note)

    def size_share(row: Measured) -> Cell | None:
        if not row.size or not original_size:
            return None
        return Cell(share(row.size / original_size), row.size / original_size)

    def parameters(row: Measured) -> Cell | None:
        count = row.record.get("parameters")
        return Cell(f"{count:,}", count) if count and len(shapes) > 1 else None

    def difference(row: Measured) -> Cell | None:
        found = gaps.get(row.name)
        return Cell(found.text, found.mean, found.verdict) if found else None

    def error(row: Measured) -> Cell | None:
        worst = row.relative_error_max
        return None if worst is None else Cell(f"{worst:.3g}", worst)

    def worth(row: Measured) -> Cell | None:
        found = (equivalents or {}).get(row.name)
        if found is None:
            return None
        note = f"{found.share:.2f} of itself" if found.share else ""
        return Cell(found.text, found.parameters or found.high, note)

    shapes = {row.record["parameters"] for row in rows if "parameters" in row.record}
    known = [
        column("size", "Size", "weights on disk", size),
        column("share", "Share", "of the original's bytes", size_share),
        column("parameters", "Parameters", "where methods change the shape", parameters),
        of("bits_per_param", "Bits/param", "bits per parameter", lambda v: number(v, 3)),
        of("nll", "nll", "nats per token, lower is better", lambda v: f"{v:.4f}"),
        column("difference", f"Δ {metric}", "difference to the reference ± its standard error",
               difference),
        column("equivalent", "Worth", "parameters of a dense model that predicts as well ± "
               "standard error; too few if the ladder saw fewer tokens than the original", worth),
        of("perplexity", "Perplexity", "exp(nll), lower is better", number),
        of("bits_per_byte", "Bits/byte", "bits to code a byte of text", lambda v: f"{v:.3f}"),
        of("kl", "KL", "divergence from the original, nats/token", lambda v: number(v, 3)),
        of("top1_agreement", "Top-1", "same most likely token as the original", share),
        of("generation", "Same text", "leading tokens written as by the original", share),
        of("prefill_tokens_per_s", "Prefill", "tokens/s, and ratio to the original", number),
        of("decode_tokens_per_s", "Decode", "tokens/s, and ratio to the original", number),
        of("peak_memory", "Peak memory", "and ratio to the original", bytes_text),
        column("relative_error", "Max error", "largest relative output error of a layer", error),
    ]  # fmt: skip
    taken = {column.key for column in known} | {"size_bytes"}
    others = {m: r.unit for row in rows for m, r in row.results.items()
              if m not in taken and not r.samples}  # fmt: skip  # tasks have a section of their own
    for name, unit in others.items():
        known.append(of(name, name, unit, bytes_text if unit == "bytes" else number))
    return [column for column in known if any(cell.text for cell in column.cells)]


def _cell(result: Result | None, text: Callable[[float], str]) -> Cell | None:
    if result is None or result.value is None:
        return None
    finite = math.isfinite(result.value)
    ratio = result.detail.get("ratio")
    return Cell(
        text(result.value) if finite else number(result.value),
        result.value if finite else None,
        f"{ratio:.2f}×" if isinstance(ratio, int | float) else "",
    )
