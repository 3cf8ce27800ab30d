"""The comparison with other toolkits, with one that a few lines here stand for."""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path

import pytest

from eval.peers import __main__ as program
from eval.peers import jobs, measure
from eval.peers.jobs import OURS, Job, Method, Setting, Text, Toolkit
from eval.peers.measure import Row, known, read
from eval.peers.summary import chart, markdown, summarize

ADAPTER = '''
"""A toolkit that rounds every matrix of the blocks to so many bits of its largest entry."""
import torch
from safetensors.torch import load_file

PACKAGES = ["torch"]


def compress(job, model):
    assert load_file(job.tokens)["tokens"].shape == (job.samples, job.length)
    if job.method == "broken":
        raise ValueError("this toolkit does not like this model")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            step = module.weight.abs().max() / 2 ** (job.bits - 1)
            module.weight.data = (module.weight / step).round() * step
    return model
'''
HERE = Path(__file__).parent


@pytest.fixture
def toolkits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours, and the stand-in, which needs no environment."""
    adapter = tmp_path / "rounding.py"
    adapter.write_text(ADAPTER)
    both = {OURS: jobs.TOOLKITS[OURS], "rounding": Toolkit("rounding", adapter)}
    for module in (jobs, measure, program):
        monkeypatch.setattr(module, "TOOLKITS", both)
    monkeypatch.setattr(
        program,
        "PEERS",
        (Method("rounding", "to the largest", "round"), Method("rounding", "broken", "broken")),
    )
    monkeypatch.setattr(program, "RECIPES", (jobs.RECIPES[0], Method(
        OURS, "later", "later", {"stages": [{"use": "not-yet"}]})))  # fmt: skip


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["eval.peers", *map(str, arguments)])
    program.main()


@pytest.mark.usefixtures("toolkits")
def test_from_jobs_to_table(
    folders: dict[str, str],
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    settings = ["--model", folders["llama"], "--data", text, "--bits", 3, "--group", 16]
    small = ["--samples", 4, "--length", 16, "--held-out", 6, "--seeds", 0, 1, "--out", out]
    call(monkeypatch, *settings, *small)
    first = capsys.readouterr()
    assert "not there, left out: later" in first.err
    assert "failed: rounding broken, 3 bits, groups of 16, seed 0: ValueError" in first.err
    rows = read(out / "results.jsonl")
    assert [(r.job.method.name, r.job.seed, bool(r.error)) for r in rows] == [
        ("rtn", 0, False),
        ("to the largest", 0, False),
        ("broken", 0, True),
        ("to the largest", 1, False),
        ("broken", 1, True),
    ]
    for row in rows:
        if not row.error:
            assert len(row.samples) == 6
            assert row.bytes > 0
            assert row.memory > 0
            assert "torch" in row.versions or row.job.method.toolkit == OURS
    assert "| rounding | to the largest |" in first.out
    assert "| compresskit | **rtn** |" in first.out
    assert (out / "peers.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "peers.md").read_text() in first.out

    call(monkeypatch, *settings, *small)  # again: nothing is left to do
    assert "[" not in capsys.readouterr().err
    call(monkeypatch, *settings, *small, "--redo", "compresskit")
    again = capsys.readouterr().err
    assert "compresskit rtn, 3 bits" in again
    assert again.count("…") == 1
    call(monkeypatch, *settings, *small, "--retry")
    assert capsys.readouterr().err.count("…") == 2


@pytest.mark.usefixtures("toolkits")
def test_the_dense_copy_is_what_was_compressed(
    folders: dict[str, str], text: str, tmp_path: Path
) -> None:
    """At 16 bits the stand-in changes next to nothing; at 2 much."""
    reading = Text(text, 4, 16, 6)
    original = measure.nll(folders["llama"], reading)
    method = Method("rounding", "to the largest", "round")

    def gap(bits: int) -> float:
        row = measure.run(Job(method, Setting(bits, 16), 0, folders["llama"], reading), tmp_path)
        assert not row.error
        return statistics.fmean(row.samples) - statistics.fmean(original)

    assert abs(gap(16)) < 0.01 < abs(gap(2))


def row(name: str, seed: int, samples: list[float], error: str = "") -> Row:
    method = Method("rounding" if name != "rtn" else OURS, name, name)
    return Row(
        Job(method, Setting(4, 64), seed, "demo", Text("demo")), samples, 1000, 2.0, 3_000_000,
        error=error,
    )  # fmt: skip


def test_differences_are_paired_and_averaged_over_seeds() -> None:
    original = [1.0, 2.0, 3.0]
    rows = [
        row("a", 0, [1.1, 2.2, 3.6]),
        row("a", 1, [1.3, 2.2, 3.2]),
        row("rtn", 0, [1.1, 2.1, 3.2]),
        row("bad", 0, [], "no"),
    ]
    best, other = summarize(rows, original)
    assert (best.name, other.name, other.seeds) == ("rtn", "a", 2)
    gaps = [0.2, 0.2, 0.4]
    assert other.mean == pytest.approx(statistics.fmean(gaps))
    assert other.stderr == pytest.approx(statistics.stdev(gaps) / math.sqrt(3))
    assert other.spread == pytest.approx(statistics.stdev([6.9 / 3, 6.7 / 3]))
    assert best.spread is None
    line = next(x for x in markdown([best, other]).splitlines() if "| a |" in x)
    assert "| 2.00 |" in line  # times our best
    assert chart([best, other]).startswith(b"\x89PNG")


def test_rows_come_back_from_their_file(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    rows = [row("a", 0, [1.0]), row("a", 1, [2.0]), row("a", 0, [3.0])]
    file.write_text("".join(r.line() + "\n" for r in rows))
    assert json.loads(rows[0].line())["job"]["method"]["toolkit"] == "rounding"
    assert [(r.job.seed, r.samples) for r in read(file)] == [(0, [3.0]), (1, [2.0])]
    assert read(tmp_path / "none") == []


def test_every_setting_names_itself_and_methods_of_ours_exist() -> None:
    assert Setting(4, None).label == "4 bits, whole rows"
    assert [s.label for s in jobs.PRUNING] == ["50% sparse", "2:4 sparse", "70% sparse"]
    there, _ = known(jobs.RECIPES)
    assert {m.name for m in there} >= {"rtn", "gptq", "gptq, autoround", "admm", "sparsegpt"}
    for toolkit in jobs.TOOLKITS.values():
        assert toolkit.adapter.exists()
        assert toolkit.requirements is None or toolkit.requirements.read_text().startswith(
            "torch==2.13.0\n"
        )
