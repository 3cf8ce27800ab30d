"""Training curves in the report: what is drawn and told of a recorded training."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from test_report import make

from eval.curves import HEIGHT, WIDTH, curves
from eval.measured import read_checkpoint
from eval.report import write_report

TRAINED = {
    "use": "lora",
    "steps": 60,
    "best_step": 50,
    "held_out_loss": {"before": 0.9, "best": 0.4, "last": 0.5},
    "curve": [
        {"step": 0, "held": 0.9},
        {"step": 25, "loss": 0.7, "held": 0.6},
        {"step": 50, "loss": 0.3, "held": 0.4},
        {"step": 60, "loss": 0.35, "held": 0.5},
    ],
}


def trained(root: Path, **changes: Any) -> Path:
    folder = make(root, "svd-50-lora")
    record = json.loads((folder / "compression.json").read_text())
    record["stages"] = [{"use": "svd"}, TRAINED | changes]
    (folder / "compression.json").write_text(json.dumps(record))
    return folder


def test_points_lie_where_steps_and_losses_put_them(tmp_path: Path) -> None:
    (curve,) = curves([read_checkpoint(trained(tmp_path))])
    assert (curve.low, curve.high) == ("0.3", "0.9")
    held = [tuple(map(float, point.split(","))) for point in curve.held.split()]
    loss = [tuple(map(float, point.split(","))) for point in curve.loss.split()]
    assert held[0] == (0, 0)  # the highest loss, at no step
    assert loss[1] == pytest.approx((WIDTH * 50 / 60, HEIGHT), abs=0.06)  # the lowest
    assert held[-1] == pytest.approx((WIDTH, HEIGHT * 0.4 / 0.6), abs=0.06)
    assert curve.best == pytest.approx((WIDTH * 50 / 60, HEIGHT * 0.5 / 0.6))
    assert curve.told == "held-out loss 0.9 → 0.4 nats a token, best after 50 of 60 steps"


def test_what_was_not_trained_or_is_not_finite_draws_no_line(tmp_path: Path) -> None:
    plain = make(tmp_path, "int8")
    assert curves([read_checkpoint(plain)]) == []
    broken = [*TRAINED["curve"][:2], {"step": 50, "loss": float("nan"), "held": float("nan")}]
    (curve,) = curves([read_checkpoint(trained(tmp_path, curve=broken, best_step=25))])
    assert len(curve.held.split()) == 2
    assert len(curve.loss.split()) == 1


def test_page_and_markdown_show_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.report.WIDTHS", (960,))
    folders = [make(tmp_path, "pycoder-1m"), trained(tmp_path)]
    page, paste, *_ = write_report(folders, tmp_path / "report.html")
    text = page.read_text()
    assert "How training went" in text
    picture = text[text.index('<svg class="curve"') : text.index("</svg>", text.index("curve")) + 6]
    lines = ET.fromstring(picture).findall("polyline")
    assert [len(line.get("points", "").split()) for line in lines] == [3, 4]
    assert "**svd-50-lora**, lora: held-out loss 0.9 → 0.4" in paste.read_text()
