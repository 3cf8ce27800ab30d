"""The laws as a picture: data, curve and band.

On the left the dense ladder, moved so that the original lies on it (``equivalent.py``), with each
compressed checkpoint where it is worth as many parameters; then, for each setting, what it loses.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np

from compress.errors import CheckpointError
from eval import chart
from eval.chart import DARK, FAMILIES, FONT, LIGHT, Theme
from eval.scaling.degradation import SETTINGS, Degradation
from eval.scaling.ladder import METRIC, Ladder, parameters
from eval.scaling.study import Compressed, Study

SIDE, POINTS = 340, 60
PALETTE = ("quantization", "pruning", "low-rank", "distillation", "chain", "other")
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Scaling laws</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>:root{color-scheme:light dark}body{margin:24px;overflow-x:auto;background:%s}
@media(prefers-color-scheme:dark){body{background:%s}}</style></head>
<body><div id="chart"></div><script>%s</script><script>
const specs=%s, dark=matchMedia("(prefers-color-scheme: dark)");
const draw=()=>vegaEmbed("#chart",specs[dark.matches?1:0],{renderer:"svg",actions:false});
dark.addEventListener("change",draw);draw();
</script></body></html>
"""


def draw(study: Study, out: Path) -> None:
    """Write ``out``, a page that stands alone (.html) or a picture (.png).

    Raises:
        CheckpointError: another ending, or there is nothing to draw.
    """
    if out.suffix not in (".html", ".png"):
        raise CheckpointError(f"{out}: the picture's name must end in .html or .png")
    if study.ladder is None and not study.laws:
        raise CheckpointError("there is neither a ladder nor a law to draw: " + _notes(study))
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".png":
        out.write_bytes(chart.png(specification(study, LIGHT)))
        return
    specs = json.dumps([specification(study, theme) for theme in (LIGHT, DARK)])
    safe = specs.replace("</", "<\\/")
    page = PAGE % (LIGHT.background, DARK.background, chart.script(), safe)
    out.write_text(page, encoding="utf-8")


def specification(study: Study, theme: Theme) -> dict[str, Any]:
    """The picture as a Vega-Lite specification."""
    panels = [] if study.ladder is None else [_ladder(study.ladder, study.compressed, theme)]
    for setting in SETTINGS:
        laws = [law for law in study.laws if law.setting == setting]
        if laws:
            panels.append(_degradation(laws, theme))
    whole = alt.concat(*panels, columns=2, background=theme.background, spacing=36)
    whole = (
        whole.resolve_scale(color="independent")
        .configure(font=FONT)
        .configure_view(stroke=None)
        .configure_title(color=theme.ink, fontSize=13, fontWeight=600, anchor="start", offset=10)
        .configure_axis(
            labelColor=theme.faint,
            titleColor=theme.faint,
            gridColor=theme.grid,
            titleFontWeight="normal",
            domain=False,
            ticks=False,
            labelFontSize=12,
            titleFontSize=12,
        )
        .configure_legend(
            labelColor=theme.ink, titleColor=theme.faint, labelFontSize=12, symbolOpacity=1
        )
    )
    return whole.to_dict(validate=False)


def _ladder(ladder: Ladder, compressed: list[Compressed], theme: Theme) -> Any:
    """nll by parameters: the rungs as measured, and the curve through the original."""
    original = max((item.original for item in compressed), key=parameters, default=None)
    up = 0.0
    if original is not None:
        up = (original.value(METRIC) or 0.0) - ladder.curve.nll(parameters(original))[0]
    band = []
    for N in np.geomspace(*ladder.curve.limits, POINTS):
        nll, draws = ladder.curve.nll(float(N))
        low, high = np.percentile(draws, [2.5, 97.5])
        band.append({"N": N, "nll": nll, "low": low, "high": high, "moved": nll + up})
    dots = [
        {"N": rung.parameters, "nll": rung.nll, "name": rung.name, "what": "dense ladder"}
        for rung in ladder.rungs
    ]
    if original is not None:
        dots.append(
            {"N": parameters(original), "nll": original.value(METRIC),
             "name": original.name, "what": "original"}
        )  # fmt: skip
    for item in compressed:
        if item.original is original and item.equivalent and item.equivalent.parameters:
            dots.append(
                {"N": item.equivalent.parameters, "nll": item.checkpoint.value(METRIC),
                 "name": item.checkpoint.name, "what": "compressed"}
            )  # fmt: skip
    x = alt.X("N:Q", title="parameters", scale=alt.Scale(type="log", nice=False),
              axis=alt.Axis(format="~s", tickCount=5))  # fmt: skip
    y = alt.Y("nll:Q", title="nll, nats/token", scale=alt.Scale(zero=False))
    blue, orange = FAMILIES["quantization"][theme.shade], FAMILIES["pruning"][theme.shade]
    kinds = alt.Scale(
        domain=["dense ladder", "original", "compressed"], range=[blue, theme.ink, orange]
    )
    base = alt.Chart(alt.Data(values=band)).encode(x=x)
    layers = [
        base.mark_area(opacity=0.15, color=blue).encode(y=alt.Y("low:Q", title=None), y2="high:Q"),
        base.mark_line(color=blue, strokeWidth=1.5).encode(y=y),
    ]
    if original is not None:
        moved = base.mark_line(color=theme.faint, strokeDash=[4, 3], strokeWidth=1.25)
        layers.append(moved.encode(y=alt.Y("moved:Q", title=None)))
    points = alt.Chart(alt.Data(values=dots)).mark_point(filled=True, opacity=1, size=60)
    color = alt.Color("what:N", title=None, scale=kinds, legend=alt.Legend(orient="top"))
    layers.append(points.encode(x=x, y=y, color=color, tooltip=["name:N", "N:Q", "nll:Q"]))
    return alt.layer(*layers).properties(
        width=SIDE, height=SIDE, title="Dense models by size; dashed: through the original"
    )


def _degradation(laws: list[Degradation], theme: Theme) -> Any:
    """Δ nll on a logarithmic scale by setting, a curve for each method and group."""
    lines, dots = [], []
    for law in laws:
        values = np.linspace(*law.settings, POINTS)
        for group, N in sorted({(loss.group, loss.parameters) for loss in law.losses}):
            name = law.method + (f" group={group:g}" if group > 1 else "")
            name += f", {N:,}" if "a" in law.names else ""
            for value in values:
                found = law.predict(float(value), group=group, parameters=N)
                lines.append(
                    {"x": value, "delta": found.delta, "low": found.low, "high": found.high,
                     "method": name}
                )  # fmt: skip
            dots += [
                {"x": loss.value, "delta": loss.delta, "low": loss.delta - loss.stderr,
                 "high": loss.delta + loss.stderr, "method": name, "name": loss.name}
                for loss in law.losses
                if (loss.group, loss.parameters) == (group, N)
            ]  # fmt: skip
    axis = alt.Axis(tickMinStep=1 if laws[0].setting == "bits" else 0.1, format="~g")
    x = alt.X("x:Q", title=laws[0].setting, scale=alt.Scale(zero=False), axis=axis)
    y = alt.Y("delta:Q", title="nats/token", scale=alt.Scale(type="log"),
              axis=alt.Axis(format="~g", tickCount=5))  # fmt: skip
    names = list(dict.fromkeys(line["method"] for line in lines))
    shades = [FAMILIES[name][theme.shade] for name in PALETTE]
    colors = alt.Scale(domain=names, range=[shades[i % len(shades)] for i in range(len(names))])
    color = alt.Color("method:N", title=None, scale=colors, legend=alt.Legend(orient="top"))
    base = alt.Chart(alt.Data(values=lines)).encode(x=x, color=color)
    low = alt.Y("low:Q", title=None)
    points = alt.Chart(alt.Data(values=dots)).encode(x=x, color=color)
    return alt.layer(
        base.mark_area(opacity=0.1).encode(y=low, y2="high:Q"),
        base.mark_line(strokeWidth=1.5).encode(y=y),
        points.mark_rule().encode(y=low, y2="high:Q"),
        points.mark_point(filled=True, opacity=1, size=60).encode(
            y=y, tooltip=["name:N", "x:Q", "delta:Q"]
        ),
    ).properties(width=SIDE, height=SIDE, title=f"Δ nll by {laws[0].setting}")


def _notes(study: Study) -> str:
    return "; ".join(study.notes) or "give more checkpoints"
