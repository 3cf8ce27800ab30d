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
    ``spread`` is the standard deviation between seeds, None for one seed.
    """

    setting: Setting
    toolkit: str
    name: str
    mean: float
    stderr: float
    spread: float | None
    seeds: int
    bytes: int
    seconds: float
    memory: int


def summarize(rows: Sequence[Row], original: Sequence[float]) -> list[Summary]:
    """One a setting and method, settings in the order of the rows, the best method first."""
    groups: dict[tuple[Setting, str, str], list[Row]] = {}
    for row in rows:
        if not row.error:
            key = (row.job.setting, row.job.method.toolkit, row.job.method.name)
            groups.setdefault(key, []).append(row)
    found = [_summary(*key, group, original) for key, group in groups.items()]
    settings = list(dict.fromkeys(row.job.setting for row in rows))
    return sorted(found, key=lambda s: (settings.index(s.setting), s.mean))


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
        statistics.fmean(gaps),
        statistics.stdev(gaps) / math.sqrt(len(gaps)),
        statistics.stdev(means) if len(means) > 1 else None,
        len(rows),
        max(row.bytes for row in rows),
        statistics.median(row.seconds for row in rows),
        max(row.memory for row in rows),
    )


def markdown(found: Sequence[Summary]) -> str:
    """A table for every setting; × is a peer's loss over that of our best method there."""
    lines: list[str] = []
    for setting in dict.fromkeys(s.setting for s in found):
        here = [s for s in found if s.setting == setting]
        best = min((s.mean for s in here if s.toolkit == OURS), default=None)
        lines += [
            f"### {setting.label}",
            "",
            "| toolkit | method | nll − original | × our best | between seeds | bytes | seconds "
            "| peak memory |",
            "|---|---|---:|---:|---:|---:|---:|---:|",
        ]
        for s in here:
            times = f"{s.mean / best:.2f}" if best and best > 0 else ""
            spread = "" if s.spread is None else f"{s.spread:.4f} ({s.seeds})"
            name = f"**{s.name}**" if s.toolkit == OURS else s.name
            lines.append(
                f"| {s.toolkit} | {name} | {s.mean:+.4f} ± {s.stderr:.4f} | {times} | {spread} "
                f"| {s.bytes:,} | {s.seconds:.0f} | {s.memory / 1e6:.0f} MB |"
            )
        lines.append("")
    return "\n".join(lines)


def chart(found: Sequence[Summary]) -> bytes:
    """PNG: a column for each setting, loss upwards on a logarithmic scale, a colour a toolkit."""
    values = [
        {
            "setting": s.setting.label,
            "toolkit": s.toolkit,
            "method": s.name,
            "loss": max(s.mean, 1e-4),
            "low": max(s.mean - s.stderr, 1e-4),
            "high": max(s.mean + s.stderr, 1e-4),
        }
        for s in found
    ]
    base = alt.Chart(alt.Data(values=values)).encode(
        x=alt.X(
            "toolkit:N", title=None, sort=list(COLORS), axis=alt.Axis(labels=False, ticks=False)
        ),
        color=alt.Color(
            "toolkit:N",
            scale=alt.Scale(domain=list(COLORS), range=list(COLORS.values())),
            legend=alt.Legend(orient="top", title=None),
        ),
    )
    loss = alt.Y("loss:Q", scale=alt.Scale(type="log"), title="nll − original, nats a token")
    points = base.mark_point(filled=True, size=70).encode(y=loss)
    bars = base.mark_rule().encode(y="low:Q", y2="high:Q")
    names = base.mark_text(align="left", dx=7, fontSize=10).encode(y=loss, text="method:N")
    layered = alt.layer(bars, points, names).properties(width=330, height=300)
    order: list[str] = list(dict.fromkeys(s.setting.label for s in found))
    faceted = layered.facet(
        facet=alt.Facet("setting:N", title=None, sort=order), columns=3
    ).resolve_scale(y="independent")
    return vl_convert.vegalite_to_png(faceted.to_json(), scale=2)
