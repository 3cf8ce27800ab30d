"""The model card's results: put in, replaced, and never into a card that is not ours."""

from __future__ import annotations

from pathlib import Path

from eval import card
from eval.results import Result

DATA = {"name": "demo", "part": "evaluation", "hash": "ab12", "windows": 4, "length": 64}


def row(value: float) -> Result:
    return Result(checkpoint="x", metric="nll", value=value, stderr=0.01, unit="nats/token",
                  data=DATA)  # fmt: skip


def test_results_are_put_in_and_replaced(tmp_path: Path) -> None:
    (tmp_path / "compression.json").write_text("{}")
    (tmp_path / "README.md").write_text("# model\n\ntext\n")
    card.update(tmp_path, [row(2.5)])
    card.update(tmp_path, [row(2.25)])
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("# model\n\ntext\n")
    assert text.count(card.BEGIN) == text.count(card.END) == text.count("## Results") == 1
    assert "| nll | 2.25 ± 0.01 | nats/token |" in text
    assert "2.5 " not in text
    assert "4 windows of 64 tokens" in text


def test_a_foreign_card_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# theirs\n")
    card.update(tmp_path, [row(2.5)])
    assert (tmp_path / "README.md").read_text() == "# theirs\n"
