"""Rows → a table in Markdown and a chart: loss, bytes, seconds and memory of every toolkit."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import altair as alt
import vl_convert

from eval.peers.jobs import OURS, Setting
from eval.peers.measure import Row

COLORS = {
    OURS: "#b3224f",
    "llm-compressor": "#1f66b0",
    "auto-round": "#12806a",
    "hqq": "#c2570c",
    "bitsandbytes": "#77746e",
}


@dataclass(frozen=True)
class Summary:
    """A method at a setting, over its seeds. ``mean`` and ``stderr`` are of nll − original, paired.

    The standard error is that of the mean over windows, each window averaged over the seeds;
    ``spread`` is the standard deviation between seeds, None for one seed. ``bytes`` and the rest
    are as in a Row, the largest over the seeds; ``seconds`` and ``cpu_seconds`` are the median.
    """

    setting: Setting
    toolkit: str
    name: str
    mean: float
    stderr: float
    spread: float | None
    seeds: int
    bytes: int
    matrices: int
    skipped: int
    seconds: float
    cpu_seconds: float
    memory: int


def summarize(rows: Sequence[Row], original: Sequence[float]) -> list[Summary]:
    """One a setting and method: many bits before few, then pruning; the best method first."""
    groups: dict[tuple[Setting, str, str], list[Row]] = {}
    for row in rows:
        if not row.error:
            key = (row.job.setting, row.job.method.toolkit, row.job.method.name)
            groups.setdefault(key, []).append(row)
    found = [_summary(*key, group, original) for key, group in groups.items()]
    return sorted(found, key=lambda s: (_place(s.setting), s.mean))


def _place(setting: Setting) -> tuple[float, ...]:
    return (-(setting.bits or 0), setting.group or 0, setting.sparsity or 0, bool(setting.pattern))


def _summary(
    setting: Setting, toolkit: str, name: str, rows: list[Row], original: Sequence[float]
) -> Summary:
    columns = zip(*(row.samples for row in rows), strict=True)
    gaps = [statistics.fmean(c) - o for c, o in zip(columns, original, strict=True)]
    means = [statistics.fmean(row.samples) for row in rows]
    return Summary(
        setting,
        toolkit,
        name,
        mean=statistics.fmean(gaps),
        stderr=statistics.stdev(gaps) / math.sqrt(len(gaps)),
        spread=statistics.stdev(means) if len(means) > 1 else None,
        seeds=len(rows),
        bytes=max(row.bytes for row in rows),
        matrices=max(row.matrices for row in rows),
        skipped=max(row.skipped for row in rows),
        seconds=statistics.median(row.seconds for row in rows),
        cpu_seconds=statistics.median(row.cpu_seconds for row in rows),
        memory=max(row.memory for row in rows),
    )


def markdown(found: Sequence[Summary]) -> str:
    """All losses, and then a table for every setting."""
    kinds = [[s for s in found if bool(s.setting.bits) == quantizes] for quantizes in (True, False)]
    return "\n".join([*(_overview(kind) for kind in kinds if kind), _tables(found)])


def _overview(found: Sequence[Summary]) -> str:
    """A line a method, a column a setting, the least loss of each in bold."""
    settings = list(dict.fromkeys(s.setting for s in found))
    cells = {(s.toolkit, s.name, s.setting): s for s in found}
    methods = sorted({(s.toolkit, s.name) for s in found}, key=lambda m: (m[0] == OURS, *m))
    least = {setting: min(s.mean for s in found if s.setting == setting) for setting in settings}
    lines = [
        "| nll − original | " + " | ".join(setting.label for setting in settings) + " |",
        "|---|" + "---:|" * len(settings),
    ]
    for method in methods:
        line = f"| {' '.join(method)} "
        for setting in settings:
            s = cells.get((*method, setting))
            said = f"{s.mean:.4f} ± {s.stderr:.4f}" if s else ""
            line += f"| {f'**{said}**' if s and s.mean == least[setting] else said} "
        lines.append(line + "|")
    return "\n".join([*lines, ""])


def _tables(found: Sequence[Summary]) -> str:
    """× is a method's loss over that of our best at this setting."""
    lines: list[str] = []
    for setting in dict.fromkeys(s.setting for s in found):
        here = [s for s in found if s.setting == setting]
        best = min((s.mean for s in here if s.toolkit == OURS), default=None)
        lines += [
            f"### {setting.label}",
            "",
            "| toolkit | method | nll − original | × our best | between seeds | bytes "
            "| of matrices | seconds | of processors | peak memory |",
            "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for s in here:
            times = f"{s.mean / best:.2f}" if best and best > 0 else ""
            spread = "" if s.spread is None else f"{s.spread:.4f} ({s.seeds})"
            name = f"**{s.name}**" if s.toolkit == OURS else s.name
            left = f" ({s.skipped} matrices left as they were)" if s.skipped else ""
            lines.append(
                f"| {s.toolkit} | {name}{left} | {s.mean:+.4f} ± {s.stderr:.4f} | {times} "
                f"| {spread} | {s.bytes:,} | {s.matrices:,} | {s.seconds:.{s.seconds < 10:d}f} "
                f"| {s.cpu_seconds:.1f} | {s.memory / 1e6:.0f} MB |"
            )
        lines.append("")
    return "\n".join(lines)


def chart(found: Sequence[Summary]) -> bytes:
    """PNG: a panel for each setting, a line for each method, the best on top, loss to the right."""
    panels = [
        _panel([s for s in found if s.setting == setting])
        for setting in dict.fromkeys(s.setting for s in found)
    ]
    columns = alt.concat(*panels, columns=min(3, len(panels)), spacing=24)
    return vl_convert.vegalite_to_png(columns.to_json(), scale=2)


def _panel(here: Sequence[Summary]) -> alt.LayerChart | alt.FacetChart:
    """One setting. On the logarithmic scale, what reaches zero ends at the left edge."""
    edge = min((s.mean for s in here if s.mean > 0), default=1e-4) / 2
    top = max(edge, *(s.mean + s.stderr for s in here))
    values = [
        {
            "toolkit": s.toolkit,
            "method": f"{s.toolkit} {s.name}",
            "loss": max(s.mean, edge),
            "low": max(s.mean - s.stderr, edge),
            "high": max(s.mean + s.stderr, edge),
            "said": f"{s.mean:.3f}",
        }
        for s in here
    ]
    axis = alt.Axis(title="nll − original, nats a token", tickCount=4, format="~g")
    scale = alt.Scale(type="log", domain=[edge, 3 * top], nice=False)
    base = alt.Chart(alt.Data(values=values)).encode(
        y=alt.Y("method:N", title=None, sort=[str(s["method"]) for s in values],
                axis=alt.Axis(labelLimit=260, ticks=False, domain=False, grid=True)),
        color=alt.Color("toolkit:N", legend=None, scale=alt.Scale(
            domain=list(COLORS), range=list(COLORS.values()))),
    )  # fmt: skip
    loss = alt.X("loss:Q", scale=scale, axis=axis)
    points = base.mark_point(filled=True, size=60, opacity=1).encode(x=loss)
    bars = base.mark_rule(strokeWidth=2).encode(x="low:Q", x2="high:Q")
    said = base.mark_text(align="left", dx=8, fontSize=10).encode(x="high:Q", text="said:N")
    return alt.layer(bars, points, said).properties(
        title=here[0].setting.label, width=230, height=alt.Step(19)
    )
