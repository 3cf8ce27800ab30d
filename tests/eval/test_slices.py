"""Slices: what belongs to which, against loops by hand; the worst is named when it is measured."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import context

from compress.objective import IGNORED
from eval.metrics.columns import SMALLEST, Labels, of_rows, parts, thirds
from eval.metrics.examples import from_context
from eval.metrics.quality import KL, NLL
from eval.metrics.scores import scores
from eval.results import Part, Result
from eval.slices import slices, worst


def sums(row: Result, column: str, label: str) -> tuple[float, float]:
    part = row.slices[column][label]
    return sum(part.sums), sum(part.counts)


def test_every_prediction_is_in_one_slice_of_each_column(
    folders: dict[str, str], text: str
) -> None:
    given = context(folders["llama"], text, samples=40)
    row = NLL().measure(given)
    for column, found in row.slices.items():
        total = [sum(values) for values in zip(*(sums(row, column, x) for x in found), strict=True)]
        assert total[1] == 40 * 11, column
        assert total[0] / total[1] == pytest.approx(row.value, rel=1e-6)
        assert len(found) > 1


def test_token_frequency_and_context_by_hand(folders: dict[str, str], text: str) -> None:
    given = context(folders["llama"], text, samples=40)
    row = NLL().measure(given)
    targets, nll = from_context(given).targets, scores(given).nll
    assert targets is not None
    assert nll is not None
    seen = targets[targets != IGNORED].tolist()
    rare, count, early = 0.0, 0, 0.0
    (label, *_) = row.slices["token frequency"]
    limit = float(label.removeprefix("≤ ").replace(",", ""))
    for window, losses in zip(targets.tolist(), nll.tolist(), strict=True):
        for place, (token, loss) in enumerate(zip(window, losses, strict=True)):
            if token != IGNORED and seen.count(token) <= limit:
                rare, count = rare + loss, count + 1
            if token != IGNORED and place + 1 <= 4:  # the token at 1 has one before it
                early += loss
    assert sums(row, "token frequency", label) == (pytest.approx(rare, rel=1e-6), count)
    assert sums(row, "context tokens", "≤ 4")[0] == pytest.approx(early, rel=1e-6)


def test_overlapping_windows_count_their_own_context(folders: dict[str, str], text: str) -> None:
    row = NLL().measure(context(folders["llama"], text, samples=6, stride=3))
    found = row.slices["context tokens"]  # the last three of twelve have 9, 10 and 11 before them
    assert list(found) == ["≤ 9", "9 to 10", "> 10"]
    assert all(set(part.counts) == {1.0} for part in found.values())


def test_columns_of_the_documents_are_slices(folders: dict[str, str], tmp_path: Path) -> None:
    import json

    lines = [{"text": f"def f{i}(x):\n    return x + {i * i}\n" * 3, "kind": f"k{i % 2}", "size": i}
             for i in range(300)]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = context(folders["llama"], str(path), samples=60, original=folders["other llama"])
    row = KL().measure(given)
    assert set(row.slices["kind"]) == {"k0", "k1"}
    assert len(row.slices["size"]) == 3
    windows, kl = given.windows, scores(given, compare=True).kl
    assert windows.documents is not None
    assert kl is not None
    expected = 0.0
    for w in range(60):
        for place in range(11):  # the prediction at ``place`` is of the next token
            document = int(windows.documents[w, place + 1])
            if windows.columns[document]["kind"] == "k1":
                expected += kl[w, place].item()
    assert sums(row, "kind", "k1")[0] == pytest.approx(expected, rel=1e-6)
    assert len(row.documents) == 60
    assert row.documents[0] in windows.documents[0].tolist()


def test_thirds_hold_a_third_each() -> None:
    values = torch.arange(90).view(9, 10)
    kept = values % 10 != 9
    found = thirds(values, kept)
    assert found.names == ["≤ 28", "28 to 58", "> 58"]  # 0 to 8, 10 to 18, 20 to 28, …
    held = [int((found.index == k).sum()) for k in range(3)]
    assert max(held) - min(held) <= 2
    assert (found.index[~kept] == -1).all()
    assert thirds(torch.ones(4, 4).long(), torch.ones(4, 4).bool()).names == ["all"]


def test_small_labels_are_counted_together_and_ids_are_no_slices() -> None:
    rows = [{"id": f"n{i}", "topic": "a" if i < 60 else "b" if i < 98 else f"rare{i}", "one": 1}
            for i in range(100)]  # fmt: skip
    owners = torch.arange(100)[:, None]
    found = of_rows(rows, owners, torch.ones_like(owners).bool())
    assert set(found) == {"topic"}
    assert found["topic"].names == ["a", "b", "other"]
    assert torch.bincount(found["topic"].index[:, 0]).tolist() == [60, 38, 2]
    assert SMALLEST == 0.02


def made(losses: dict[str, float], seed: int, per: int = 40) -> Result:
    """A result whose slices lose as told; examples share their difficulty with ``seed`` 0."""
    shared, own = random.Random(0), random.Random(seed)
    values, index = [], []
    for number, loss in enumerate(losses.values()):
        for _ in range(per):
            values.append(shared.gauss(2, 0.5) + loss + own.gauss(0, 0.02))
            index.append(number)
    column = Labels(list(losses), torch.tensor(index)[:, None])
    counts = torch.ones(len(values), 1).double()
    found = parts({"kind": column}, torch.tensor(values).double()[:, None], counts)
    return Result(checkpoint="x", metric="nll", value=2, unit="nats/token", samples=values,
                  data={"hash": "a"}, slices=found)  # fmt: skip


def test_the_worst_slice_is_the_one_that_loses_most() -> None:
    a, b = made({"a": 0.01, "b": 0.2, "c": 0.05}, 1), made({"a": 0, "b": 0, "c": 0}, 2)
    found = {s.label: s for s in slices(a, b)}
    assert found["b"].difference.mean == pytest.approx(0.2, abs=0.02)
    assert found["b"].excess == pytest.approx(0.2 - 0.26 / 3, abs=0.02)
    assert found["a"].high < 0 < found["b"].low
    assert sum(s.share for s in found.values()) == pytest.approx(1)
    picked = worst(list(found.values()), higher_is_better=False)
    assert picked is found["b"]
    assert picked.name == "kind b"
    best = worst(list(found.values()), higher_is_better=True)
    assert best is not None
    assert best.label == "a"


def test_no_slice_is_named_when_all_lose_alike() -> None:
    named = 0
    for seed in range(100):
        a, b = made(dict.fromkeys("abcdef", 0.1), 2 * seed + 1), made(dict.fromkeys("abcdef", 0), 0)
        named += worst(slices(a, b), higher_is_better=False) is not None
    assert named <= 8  # the intervals hold together with 95%, and only one side counts


def test_the_excess_has_the_spread_that_is_seen() -> None:
    found: list[Any] = []
    for seed in range(300):
        a = made({"a": 0.1, "b": 0.1}, 2 * seed + 1, 20)
        b = made({"a": 0, "b": 0}, 2 * seed + 2, 20)
        found.append(slices(a, b)[0])
    inside = sum(s.low <= 0 <= s.high for s in found) / 300
    assert inside == pytest.approx(0.975, abs=0.02)  # two slices: 1 − 0.05/2


def test_slices_of_other_data_are_refused() -> None:
    from compress.errors import DataError

    a = made({"a": 0.1, "b": 0}, 1)
    part = a.slices["kind"]["a"]
    other = a.model_copy(update={"slices": {"kind": {"a": Part(
        examples=part.examples[1:], sums=part.sums[1:], counts=part.counts[1:])}}})  # fmt: skip
    with pytest.raises(DataError, match="kind a differs"):
        slices(a, other)
