"""``compress fit`` over evaluated folders: ladders, originals, questions, pictures, the report."""

from __future__ import annotations

import json
import math
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from compress import cli
from compress.errors import CheckpointError, DataError, RecipeError
from eval.chart import LIGHT
from eval.report import write_report
from eval.results import Result, write
from eval.scaling import ladder, predict
from eval.scaling.figure import draw, specification
from eval.scaling.study import study

TEXT = {"name": "demo", "part": "evaluation", "hash": "0123456789abcdef", "windows": 64,
        "length": 256}  # fmt: skip
DEMO_SIZE, DEMO_BYTES = 1_443_456, 2_892_912
SIZES = (100_000, 200_000, 400_000, 800_000, 1_500_000, 3_000_000, 7_000_000)


def nll_row(name: str, level: float, **more: Any) -> Result:
    """An nll of 64 windows whose mean is ``level``."""
    base = random.Random(7)
    noise = [base.gauss(0, 0.4) for _ in range(TEXT["windows"])]
    own = random.Random(name)
    samples = [level + x - sum(noise) / len(noise) + own.gauss(0, 0.001) for x in noise]
    return Result(
        checkpoint=name, metric="nll", value=sum(samples) / len(samples), stderr=0.04,
        unit="nats/token", samples=samples, **{"data": TEXT} | more,
    )  # fmt: skip


def dense(N: float) -> float:
    return 2.2 + 40 * N**-0.25


@pytest.fixture
def rungs(tmp_path: Path) -> Path:
    """A ladder of seven sizes."""
    path = tmp_path / "ladder.jsonl"
    rows = [
        nll_row(f"d{N}", dense(N), detail={"parameters": N, "tokens": 10**6, "seed": 0})
        for N in SIZES
    ]
    path.write_text("".join(row.model_dump_json() + "\n" for row in rows))
    return path


def make(root: Path, name: str, loss: float, size: float, stages: list[dict[str, Any]]) -> Path:
    """An evaluated checkpoint of the demo model that lost ``loss``; the original has no stages."""
    folder = root / name
    folder.mkdir(parents=True)
    record = {
        "base": {"model": "demo", "hash": "ab12", "parameters": DEMO_SIZE}, "name": name,
        "recipe": {"stages": stages}, "bytes": {"disk": size, "original": DEMO_BYTES},
        "summary": " → ".join(
            " ".join([s["use"], *(f"{k}={v}" for k, v in s.items() if k not in ("use", "targets"))])
            for s in stages
        ),
        "families": {"rtn": "quantization", "svd": "low-rank"},
    }  # fmt: skip
    (folder / "compression.json").write_text(json.dumps(record))
    sizes = Result(checkpoint=name, metric="size_bytes", value=size, unit="bytes")
    write(folder, [nll_row(name, 2.73 + loss), sizes])
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """The original, rtn at 2 to 6 bits, and two ranks of svd."""
    root = tmp_path / "runs"
    made = [make(root, "dense", 0, DEMO_BYTES, [])]
    for bits in (2, 3, 4, 5, 6):
        stage = {"use": "rtn", "bits": bits, "group": 64, "targets": ["blocks"]}
        loss = 20 * 4.0**-bits
        made.append(make(root, f"rtn-{bits}", loss, 580_000 + 147_000 * bits, [stage]))
    for ratio in (0.5, 0.7):
        stage = {"use": "svd", "ratio": ratio, "targets": ["blocks"]}
        made.append(make(root, f"svd-{ratio}", 1 - ratio, DEMO_BYTES * ratio, [stage]))
    return made


def test_checkpoints_get_equivalents_and_methods_get_laws(rungs: Path, folders: list[Path]) -> None:
    found = study(folders, ladder=rungs)
    worth = {item.checkpoint.name: item.equivalent for item in found.compressed}
    for bits in (3, 4, 5):
        by_hand = (DEMO_SIZE**-0.25 + 20 * 4.0**-bits / 40) ** -4
        assert worth[f"rtn-{bits}"].parameters == pytest.approx(by_hand, rel=0.02)
    (law,) = found.laws
    assert (law.method, law.setting) == ("rtn", "bits")
    assert law.coefficients[1] == pytest.approx(math.log(4), rel=0.05)
    assert len(found.held_out) == 2
    for held in found.held_out:
        assert held.prediction.delta == pytest.approx(held.loss.delta, rel=0.1)
    assert found.ladder.held_out()[1] == pytest.approx(dense(SIZES[-1]), rel=0.01)
    assert any("svd: a law needs three settings" in note for note in found.notes)


def test_the_ladder_may_be_dense_checkpoints(tmp_path: Path, folders: list[Path]) -> None:
    for N in SIZES:
        folder = tmp_path / f"d{N}"
        folder.mkdir()
        record = {"base": {"model": f"d{N}", "hash": str(N), "parameters": N}}
        (folder / "compression.json").write_text(json.dumps(record))
        write(folder, [nll_row(f"d{N}", dense(N))])
        folders.append(folder)
    found = study(folders)
    assert found.ladder.source == "the dense checkpoints"
    assert len({rung.parameters for rung in found.ladder.rungs}) == len(SIZES) + 1


def test_a_larger_model_that_is_worse_is_no_rung(rungs: Path, folders: list[Path]) -> None:
    before = study(folders, ladder=rungs).ladder
    size = 2 * SIZES[-1]
    detail = {"parameters": size, "tokens": 10**6, "seed": 0}
    worse = nll_row("large", dense(SIZES[-1]) + 0.2, detail=detail)
    rungs.write_text(rungs.read_text() + worse.model_dump_json() + "\n")
    ladder.read.cache_clear()
    after = study(folders, ladder=rungs).ladder
    assert [rung.parameters for rung in after.undertrained] == [size]
    assert after.curve.limits == before.curve.limits
    shipped = ladder.read(ladder.DEMO)
    assert [round(r.parameters / 1e6, 2) for r in shipped.undertrained] == [5.57, 6.82]
    assert len(shipped.rungs) == 7


def test_a_missing_original_and_other_text_are_errors(rungs: Path, folders: list[Path]) -> None:
    with pytest.raises(DataError, match="original, demo, is not among the folders"):
        study(folders[1:], ladder=rungs)
    other = nll_row("rtn-2", 3.9, data=TEXT | {"hash": "ffff"})
    write(folders[1], [other])
    with pytest.raises(DataError, match="different text"):
        study(folders, ladder=rungs)


def test_a_ladder_of_other_text_is_refused_and_of_other_windows_is_noted(
    rungs: Path, folders: list[Path]
) -> None:
    text = rungs.read_text()
    rungs.write_text(text.replace("0123456789abcdef", "f" * 16))
    tokens, windows = study(folders, ladder=rungs).notes[:2]
    assert "saw 1M tokens each" in tokens
    assert "other windows of demo" in windows
    other = rungs.with_name("other.jsonl")
    other.write_text(text.replace('"name":"demo"', '"name":"wikitext"'))
    with pytest.raises(DataError, match=r"on demo in windows of 256, the ladder .* on wikitext"):
        study(folders, ladder=other)


def test_ladder_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="give --ladder FILE"):
        ladder.read(tmp_path / "absent.jsonl")
    path = tmp_path / "rows.jsonl"
    path.write_text(nll_row("a", 3.0).model_dump_json() + "\n")
    with pytest.raises(CheckpointError, match=r"rows.jsonl:1: not a row of a ladder"):
        ladder.read(path)
    rows = [nll_row("a", 3.0, detail={"parameters": n, "tokens": n}) for n in (10, 20)]
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("".join(row.model_dump_json() + "\n" for row in rows))
    with pytest.raises(DataError, match="trained on different tokens"):
        ladder.read(mixed)


def test_questions(rungs: Path, folders: list[Path]) -> None:
    found = study(folders, ladder=rungs)
    (answer,) = predict.answers(found, "bits=4.5")
    assert answer.nll == pytest.approx(2.73 + 20 * 4**-4.5, abs=0.005)
    assert answer.low < answer.nll < answer.high
    for text, message in (
        ("bit=3", "did you mean 'bits'"),
        ("bits=three", "not a number"),
        ("group=64", "give one of bits, sparsity, ratio"),
    ):
        with pytest.raises(RecipeError, match=message):
            predict.answers(found, text)
    with pytest.raises(DataError, match="no law of sparsity"):
        predict.answers(found, "sparsity=0.5")
    with pytest.raises(DataError, match="outside what was measured, 2 to 6"):
        predict.answers(found, "bits=8")


def test_the_picture_has_data_curve_and_band(
    tmp_path: Path, rungs: Path, folders: list[Path]
) -> None:
    found = study(folders, ladder=rungs)
    spec = specification(found, LIGHT)
    marks = re.findall(r'"type": "(area|line|point)"', json.dumps(spec))
    assert {"area", "line", "point"} <= set(marks)
    assert json.dumps(spec, allow_nan=False).count('"what": "compressed"') == len(folders) - 1
    draw(found, tmp_path / "laws.html")
    page = (tmp_path / "laws.html").read_text()
    assert page.startswith("<!doctype html>")
    assert not re.search(r"<(script|link)[^>]+(src|href)=", page)
    draw(found, tmp_path / "laws.png")
    assert (tmp_path / "laws.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(CheckpointError, match=r"\.html or \.png"):
        draw(found, tmp_path / "laws.pdf")


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["compress", "fit", *arguments])
    cli.main()


def test_the_command_prints_tables_or_one_object_a_line(
    rungs: Path, folders: list[Path], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = [*map(str, folders), "--ladder", str(rungs), "--predict", "bits=4.5", "--size", "45%"]
    call(monkeypatch, *given, "--json")
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    kinds = [record["kind"] for record in records]
    assert kinds.count("equivalent") == len(folders) - 1
    assert {"curve", "degradation", "held_out", "prediction", "best"} <= set(kinds)
    best = next(record for record in records if record["kind"] == "best")
    assert best["bits"] == 4  # 5 bits take 1.315 MB, and 45% are 1.302 MB
    call(monkeypatch, *given)
    shown = capsys.readouterr().out
    for text in ("L(N) = ", "held out 7M", "of itself", "rtn bits=4.5 group=64"):
        assert text in shown


def test_the_report_says_what_checkpoints_are_worth(
    tmp_path: Path, rungs: Path, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from eval.scaling import study as studies

    monkeypatch.setattr(studies, "DEMO", rungs)
    write_report(folders, tmp_path / "report.html")
    text = (tmp_path / "report.md").read_text()
    assert " Worth |" in text
    assert re.search(r"ladder it is worth a dense model of 1\.\d+M ± 0\.\d+M param", text)
    monkeypatch.setattr(studies, "DEMO", tmp_path / "absent.jsonl")
    write_report(folders, tmp_path / "plain.html")
    assert "Worth" not in (tmp_path / "plain.md").read_text()
