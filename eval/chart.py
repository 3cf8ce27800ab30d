"""The one chart: quality against size, every checkpoint a point.

Across is size on disk on a logarithmic scale: halving is one step wherever it happens. Up is the
difference to the reference (the original model) on a symmetric logarithmic scale: linear within
the noise of the measurement, logarithmic beyond it. So a checkpoint that is ruined does not
squash the others, a difference of zero still has a place, and error bars may cross it.

Altair says what the chart is, in Vega-Lite; the same specification is drawn in the page and in the
PNG.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import altair as alt
import vl_convert

from eval.labels import LETTER, Box, place

FAMILIES = {  # name: (colour on light, colour on dark); a healed family is a tint of its own
    "original": ("#1b1b1a", "#f2f0ec"),
    "quantization": ("#1f66b0", "#6cabf0"),
    "healed quantization": ("#79a9d8", "#b3d2f5"),
    "pruning": ("#c2570c", "#f08c45"),
    "healed pruning": ("#e8a56f", "#f6c7a0"),
    "low-rank": ("#12806a", "#45c2a4"),
    "healed low-rank": ("#71b9a9", "#a6e2d3"),
    "distillation": ("#8246a8", "#bd8fe0"),
    "chain": ("#b3224f", "#f0708f"),
    "other": ("#77746e", "#a5a29b"),
}

HEIGHT, WIDTH = 440, 960
LEFT, MARGIN = 52, 60  # pixels for the labels of the y axis; those and the edge on the right
FONT = "Helvetica Neue, Helvetica, Liberation Sans, Arial, sans-serif"


@dataclass(frozen=True)
class Point:
    """One checkpoint as the chart sees it."""

    name: str
    family: str
    size: float
    """Bytes on disk."""
    difference: float
    """Quality minus the reference's, in the metric's unit."""
    stderr: float
    """Half-length of the error bar; 0 draws none."""
    facts: dict[str, str]
    """What hovering tells, title to text, in order."""
    after: str = ""
    """The point from which the last stages of its recipe lead here."""


@dataclass(frozen=True)
class Theme:
    """The colours that change between light and dark."""

    background: str
    ink: str
    faint: str
    grid: str
    shade: int
    """Which of a family's two colours."""


LIGHT = Theme("#ffffff", "#1b1b1a", "#6d6a64", "#eceae5", 0)
DARK = Theme("#151517", "#ece9e4", "#9c9992", "#2b2b2e", 1)


def specification(
    points: Sequence[Point],
    *,
    title: Sequence[str],
    reference_size: float,
    theme: Theme = LIGHT,
    higher_is_better: bool = False,
    width: int = WIDTH,
) -> dict[str, Any]:
    """The chart as a Vega-Lite specification, ``width`` pixels wide with its axes.

    ``title`` is written over the y axis, a bold line and a plain one. Sizes are labelled in bytes
    and as a share of ``reference_size``.
    """
    front = pareto(points, higher_is_better)
    frame = _Frame.around(points, width - MARGIN)
    x = alt.X(
        "size:Q",
        title="Size on disk, and share of the original",
        scale=alt.Scale(type="log", domain=list(frame.sizes), nice=False),
        axis=_size_axis(frame, reference_size),
    )
    y = alt.Y(
        "difference:Q",
        title=None,
        scale=alt.Scale(
            type="symlog", constant=frame.constant, domain=list(frame.differences), nice=False
        ),
        axis=_difference_axis(frame),
    )
    families = [name for name in FAMILIES if any(point.family == name for point in points)]
    color = alt.Color(
        "family:N",
        title=None,
        scale=alt.Scale(domain=families, range=[FAMILIES[name][theme.shade] for name in families]),
        legend=alt.Legend(orient="top", columns=_legend_columns(families, frame.width)),
    )
    data = alt.Data(values=_rows(points, front, frame))
    zero = (
        alt.Chart(alt.Data(values=[{"difference": 0}]))
        .mark_rule(color=theme.faint, strokeDash=[2, 3])
        .encode(y=y)
    )
    line = (
        alt.Chart()
        .transform_filter("datum.front")
        .mark_line(interpolate="step-after", color=theme.faint, strokeWidth=1.25, opacity=0.75)
        .encode(x=x, y=y, order="size:Q")
    )
    paths = (
        alt.Chart()
        .transform_filter("isValid(datum.from_size)")
        .mark_rule(strokeDash=[5, 4], strokeWidth=1.5, opacity=0.8, aria=False)
        .encode(x=alt.X("from_size:Q"), x2="size:Q", y="from_difference:Q", y2="difference:Q",
                color=color)
    )  # fmt: skip
    bars = (
        alt.Chart()
        .mark_rule(strokeWidth=1.5, opacity=0.6, aria=False)
        .encode(x=x, y=alt.Y("low:Q", title=None), y2="high:Q", color=color)
    )
    dots = (
        alt.Chart()
        .mark_point(filled=True, opacity=1, stroke=theme.background, strokeWidth=1)
        .encode(
            x=x,
            y=y,
            color=color,
            size=alt.condition("datum.original", alt.value(170), alt.value(95)),
            shape=alt.condition("datum.original", alt.value("diamond"), alt.value("circle")),
            tooltip="facts:N",
            description="spoken:N",
        )
    )
    labels = (
        alt.Chart()
        .transform_filter("datum.align")
        .mark_text(
            aria=False,
            baseline="middle",
            color=theme.ink,
            fontSize=12,
            dx=alt.ExprRef("datum.dx"),
            dy=alt.ExprRef("datum.dy"),
            align=alt.ExprRef("datum.align"),
        )
        .encode(x=x, y=y, text="name:N")
    )
    chart = (
        alt.layer(zero, line, paths, bars, dots, labels, data=data)
        .properties(
            width=frame.width,
            height=frame.height,
            padding={"left": 0, "right": 0, "top": 4, "bottom": 4},
            background=theme.background,
            title=alt.TitleParams(
                text=title[0],
                subtitle=list(title[1:]),
                anchor="start",
                frame="group",
                dx=-LEFT,
            ),
        )
        .configure(font=FONT)
        .configure_view(stroke=None)
        .configure_title(
            color=theme.ink,
            fontSize=13,
            fontWeight=600,
            subtitleColor=theme.faint,
            subtitleFontSize=12,
            subtitlePadding=5,
            offset=14,
        )
        .configure_axis(
            labelColor=theme.faint,
            titleColor=theme.faint,
            gridColor=theme.grid,
            domain=False,
            ticks=False,
            labelFontSize=12,
            titleFontSize=12,
            titleFontWeight="normal",
            titlePadding=12,
            labelPadding=8,
        )
        .configure_axisY(minExtent=LEFT, maxExtent=LEFT)
        .configure_legend(labelColor=theme.ink, labelFontSize=12, symbolOpacity=1, offset=14)
    )
    return chart.to_dict(validate=False)  # built by Altair, so valid; checking takes seconds


def png(spec: dict[str, Any]) -> bytes:
    """``spec`` drawn at twice its size, with a margin."""
    return vl_convert.vegalite_to_png(spec | {"padding": 24}, scale=2)


@cache
def script() -> str:
    """vega-embed with all it needs, as one script that sets ``window.vegaEmbed``."""
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return bundle.replace("</script", "<\\/script")


def pareto(points: Sequence[Point], higher_is_better: bool = False) -> list[Point]:
    """The points that no other beats in both size and quality, smallest first."""
    sign = -1 if higher_is_better else 1
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.size, sign * point.difference)):
        if not front or sign * point.difference < sign * front[-1].difference:
            front.append(point)
    return front


def bytes_text(count: float) -> str:
    """``1.2 MB``: decimal units, three significant digits at most."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if abs(count) < 999.5 or unit == "TB":
            break
        count /= 1000
    return f"{count:.3g} {unit}"


@dataclass(frozen=True)
class _Frame:
    """The plotting area: its domains, and where in it a value lies (pixels, y downwards)."""

    width: int
    height: int
    sizes: tuple[float, float]
    differences: tuple[float, float]
    constant: float
    """Half-width of the linear part of the y scale."""

    @staticmethod
    def around(points: Sequence[Point], width: int) -> _Frame:
        """The frame that shows every point and error bar, with a little room."""
        smallest, largest = min(p.size for p in points), max(p.size for p in points)
        room = max((largest / smallest) ** 0.08, 1.1)
        constant = _constant(points)
        ends = [0.0, *(p.difference + side * p.stderr for p in points for side in (-1, 1))]
        low, high = _bend(min(ends) / constant), _bend(max(ends) / constant)
        spare = 0.08 * (high - low or 1.0)
        return _Frame(
            width,
            HEIGHT,
            (smallest / room, largest * room),
            (constant * _unbend(low - spare), constant * _unbend(high + spare)),
            constant,
        )

    def x(self, size: float) -> float:
        low, high = self.sizes
        return self.width * math.log(size / low) / math.log(high / low)

    def y(self, difference: float) -> float:
        low, high = (_bend(end / self.constant) for end in self.differences)
        return self.height * (high - _bend(difference / self.constant)) / (high - low)


def _bend(value: float) -> float:
    """Vega's symlog with constant 1."""
    return math.copysign(math.log1p(abs(value)), value)


def _unbend(value: float) -> float:
    return math.copysign(math.expm1(abs(value)), value)


def _constant(points: Sequence[Point]) -> float:
    """About two standard errors, kept within a sane share of the largest difference."""
    largest = max(abs(point.difference) for point in points) or 1.0
    noise = [point.stderr for point in points if point.stderr > 0]
    typical = 2 * statistics.median(noise) if noise else largest / 100
    return min(max(typical, largest / 1000), largest)


def _rows(points: Sequence[Point], front: Sequence[Point], frame: _Frame) -> list[dict[str, Any]]:
    """The chart's data: a row per point, with the place of its name in this frame."""
    spots = [(frame.x(point.size), frame.y(point.difference)) for point in points]
    places = place(
        spots,
        [point.name for point in points],
        _lines(points, front, frame),
        frame.width,
        frame.height,
    )
    rows = []
    named = {point.name: point for point in points}
    for point, spot in zip(points, places, strict=True):
        told = ", ".join(f"{title} {text}" for title, text in point.facts.items())
        row = {
            "name": point.name,
            "family": point.family,
            "original": point.family == "original",
            "front": point in front,
            "size": point.size,
            "difference": point.difference,
            "low": point.difference - point.stderr,
            "high": point.difference + point.stderr,
            "facts": point.facts,
            "spoken": f"{point.name}: {told}",
        }
        if point.after:
            before = named[point.after]
            row |= {"from_size": before.size, "from_difference": before.difference}
        rows.append(row | (asdict(spot) if spot else {}))
    return rows


def _lines(points: Sequence[Point], front: Sequence[Point], frame: _Frame) -> list[Box]:
    """What names should not be written over besides dots: error bars, front, the line at zero."""
    boxes = [Box(0, frame.y(0) - 1, frame.width, frame.y(0) + 1)]
    for point in points:
        x, half = frame.x(point.size), point.stderr
        top, bottom = frame.y(point.difference + half), frame.y(point.difference - half)
        boxes.append(Box(x - 1, top, x + 1, bottom))
    for left, right in pairwise(front):
        start, end = frame.x(left.size), frame.x(right.size)
        level, drop = sorted((frame.y(left.difference), frame.y(right.difference)))
        boxes.append(Box(start, frame.y(left.difference) - 1, end, frame.y(left.difference) + 1))
        boxes.append(Box(end - 1, level, end + 1, drop))
    return boxes


def _legend_columns(families: Sequence[str], width: int) -> int:
    """All in one row if they fit, else as many as do."""
    row = sum(LETTER * len(name) + 34 for name in families)
    return len(families) if row < width else max(2, width // 150)


def _size_axis(frame: _Frame, reference: float) -> alt.Axis:
    """Ticks at the reference halved and halved again; three quarters between if there is room.

    The label has two lines, ``1.4 MB`` over ``50%``; d3 writes 1.4M, so the unit is moved apart.
    """
    low, high = frame.sizes
    shares = [2.0**-k for k in range(-10, 20)]
    if high / low < 8 and frame.width > 600:
        shares += [0.75 * share for share in shares]
    size, share = "format(datum.value, '.2~s')", f"format(datum.value / {reference}, '.2~p')"
    return alt.Axis(
        values=sorted(reference * s for s in shares if low <= reference * s <= high),
        labelExpr=f"[slice({size}, 0, -1) + ' ' + slice({size}, -1) + 'B', {share}]",
        labelOverlap="greedy",
        labelSeparation=8,
    )


def _difference_axis(frame: _Frame) -> alt.Axis:
    """Ticks at 0 and at ±1 and ±3 of each power of ten beyond the linear part."""
    power = math.floor(math.log10(frame.constant))
    sizes = [m * 10.0**k for k in range(power, power + 6) for m in (1, 3)]
    beyond = [size for size in sizes if size >= frame.constant]
    return alt.Axis(
        values=[0.0, *(sign * size for size in beyond for sign in (1, -1))],
        labelExpr="datum.value == 0 ? '0' : format(datum.value, '+.1~r')",
        labelOverlap="greedy",
        labelSeparation=6,
    )
