"""The comparison with other toolkits, with one that a few lines here stand for."""

from __future__ import annotations

import json
import math
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.source import Source
from eval.peers import __main__ as program
from eval.peers import child, jobs, measure
from eval.peers.jobs import OURS, PRUNING, RECIPES, Job, Method, Setting, Text, Toolkit
from eval.peers.measure import Row, known, read
from eval.peers.summary import chart, markdown, summarize

ADAPTER = '''
"""A toolkit that rounds matrices to so many bits of their largest entry, and likes to leave one."""
import torch
from safetensors.torch import load_file

PACKAGES = ["torch"]
b"x" * 300_000_000  # what imports take on the way


def compress(job, model):
    assert load_file(job.tokens)["tokens"].shape == (job.samples, job.length)
    for name, module in model.named_modules():
        if hasattr(module, "weight") and module.weight.dim() == 2:
            inside = "layers" in name and "layers.0.mlp.down_proj" not in name
            if inside or job.method == "everything":
                step = module.weight.abs().max() / 2 ** (job.bits - 1)
                module.weight.data = (module.weight / step).round() * step
    return model
'''
ROUND = Method("rounding", "to the largest", "round")
RTN = RECIPES[0]


@pytest.fixture
def toolkits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours, and the stand-in, which needs no environment."""
    adapter = tmp_path / "rounding.py"
    adapter.write_text(ADAPTER)
    both = {OURS: jobs.TOOLKITS[OURS], "rounding": Toolkit("rounding", adapter)}
    for module in (jobs, measure, program):
        monkeypatch.setattr(module, "TOOLKITS", both)


@pytest.fixture
def job(folders: dict[str, str], text: str) -> Job:
    return Job(ROUND, Setting(2, 16), 0, folders["llama"], Text(text, 4, 16, 6))


def matrices(model: str) -> list[torch.Size]:
    return [
        torch.Size(site.shape) for site in Source(model).anatomy.sites if site.block is not None
    ]


@pytest.mark.usefixtures("toolkits")
def test_a_peer_from_tokens_to_numbers(job: Job, tmp_path: Path) -> None:
    row = measure.run(job, tmp_path)
    assert not row.error
    assert len(row.samples) == 6
    gap = statistics.fmean(row.samples) - statistics.fmean(measure.nll(job.model, job.text))
    assert abs(gap) > 1e-4
    assert row.skipped == 1
    assert row.matrices == sum(shape.numel() for shape in matrices(job.model)) * 4
    assert row.bytes > row.matrices
    assert 0 < row.memory < 100_000_000
    assert row.versions["torch"] == torch.__version__
    assert row.seconds > 0
    assert row.cpu_seconds > 0


@pytest.mark.usefixtures("toolkits")
def test_ours_goes_the_same_way(job: Job, tmp_path: Path) -> None:
    row = measure.run(replace(job, method=RTN, setting=Setting(4, 16)), tmp_path)
    assert not row.error
    assert row.skipped == 0
    # Codes, scales of two bytes, and a shape.
    assert row.matrices == sum(
        shape.numel() // 2 + shape.numel() // 16 * 2 + 16 for shape in matrices(job.model)
    )


@pytest.mark.usefixtures("toolkits")
def test_one_that_changes_the_head_has_failed(job: Job, tmp_path: Path) -> None:
    row = measure.run(replace(job, method=replace(ROUND, method="everything")), tmp_path)
    assert row.error == "it changed lm_head.weight, which is in no block"
    assert row.samples == []


@pytest.mark.usefixtures("toolkits")
def test_the_last_words_of_a_child_are_kept(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "child.py"
    monkeypatch.setattr(measure, "CHILD", script)
    script.write_text("raise ValueError('it does not like this model')")
    assert measure.run(job, tmp_path).error == "ValueError: it does not like this model"
    script.write_text("import os; os.abort()")
    assert measure.run(job, tmp_path).error == "it was killed"


class Doubling(torch.nn.Linear):
    """Stores half of its weight, as integers, and has its own forward."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__(*reversed(weight.shape))
        del self.weight
        self.register_buffer("codes", (weight / 2).to(torch.int8))
        self.bias.data = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.codes * 2.0).T + self.bias


def test_the_dense_copy_is_what_a_layer_does() -> None:
    weight, bias = torch.arange(12.0).view(3, 4) * 2, torch.ones(3)
    model = torch.nn.ModuleDict({"a": Doubling(weight, bias), "b": torch.nn.Linear(4, 3)})
    model.dtype = torch.float32  # as transformers' models have
    original = {"a.weight": torch.zeros(3, 4), "a.bias": bias, "b.weight": torch.zeros(3, 4)}
    state = child.dense_state(model, original)
    assert torch.equal(state["a.weight"], weight)
    assert torch.equal(state["a.bias"], bias)
    assert torch.equal(state["b.weight"], model["b"].weight)


def test_bytes_of_the_matrices_leave_out_the_rest(tmp_path: Path) -> None:
    codes, scale, bias = torch.zeros(8, dtype=torch.int8), torch.zeros(2), torch.zeros(5)
    other = {"x.y10.codes": codes.clone(), "embed.weight": torch.zeros(100)}
    save_file({"x.y1.codes": codes, "x.y1.scale": scale, "x.y1.bias": bias} | other,
              tmp_path / "model.safetensors")  # fmt: skip
    assert child.matrix_bytes(tmp_path, ["x.y1"]) == 16
    torch.save({"x.y1": {"codes": codes, "meta": {"scale": scale}, "group": 64}}, tmp_path / "q.pt")
    assert child.matrix_bytes(tmp_path, ["x.y1"]) == 32


def test_changed_matrices_are_found_and_vectors_are_not(tmp_path: Path) -> None:
    one, two = {"a": torch.ones(2, 2), "norm": torch.ones(2)}, {"b": torch.ones(2, 2)}
    files = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    for file, state in zip(files, (one, two), strict=True):
        save_file(state, file)
    after = tmp_path / "after.safetensors"
    save_file({"a": torch.ones(2, 2), "norm": torch.zeros(2), "b": torch.zeros(2, 2)}, after)
    assert measure.changed(files, after) == {"b"}


def test_what_float16_cannot_hold_has_not_changed(tmp_path: Path) -> None:
    before, after = tmp_path / "before.safetensors", tmp_path / "after.safetensors"
    table = torch.tensor([[1.0, 2.0**-30], [-3.5, 0.1]], dtype=torch.bfloat16)
    rounded = table.half().to(torch.bfloat16)
    assert not torch.equal(table, rounded)
    other = torch.tensor([[1.0, 2.0**-29], [-3.5, 0.1]], dtype=torch.bfloat16)
    same = {"table": table, "other": table.clone(), "shorter": table.clone()}
    save_file(same | {"matrix": table.clone()}, before)
    save_file(
        {"table": rounded, "other": other, "shorter": table[:1], "matrix": table + 2.0**-7}, after
    )
    assert measure.changed([before], after) == {"other", "shorter", "matrix"}


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["eval.peers", *map(str, arguments)])
    program.main()


@pytest.mark.usefixtures("toolkits")
def test_the_program_does_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []

    def fake(job: Job, home: Path) -> Row:
        seen.append(f"{job.method.name} {job.setting.label} {job.seed}")
        if job.method.name == "broken":
            return Row(job, error="ValueError: no")
        return Row(job, [1.5, 2.5 + job.seed], 10, 9, 0, 2.0, 3_000_000)

    monkeypatch.setattr(program, "run", fake)
    monkeypatch.setattr(program, "nll", lambda model, text: [1.0, 2.0])
    later = Method(OURS, "later", "later", {"stages": [{"use": "not-yet"}]})
    monkeypatch.setattr(program, "RECIPES", (RTN, later))
    monkeypatch.setattr(program, "PEERS", (ROUND, Method("rounding", "broken", "broken")))
    out = tmp_path / "out"
    usual = ("--bits", 3, "--group", "channel", "--seeds", 0, 1, "--out", out)

    call(monkeypatch, *usual)
    first = capsys.readouterr()
    where = "3 bits, whole rows"
    assert seen == [f"rtn {where} 0", f"to the largest {where} 0", f"broken {where} 0",
                    f"to the largest {where} 1", f"broken {where} 1"]  # fmt: skip
    assert "not there, left out: later" in first.err
    assert f"failed: rounding broken, {where}, seed 0: ValueError: no" in first.err
    assert "| rounding | to the largest | +0.7500 ± 0.2500 | 1.50 |" in first.out
    assert "| compresskit | **rtn** | +0.5000" in first.out
    assert (out / "peers.md").read_text() in first.out
    assert (out / "peers.png").read_bytes().startswith(b"\x89PNG")
    assert [bool(row.error) for row in read(out / "results.jsonl")] == [
        False, False, True, False, True,
    ]  # fmt: skip

    def again(*options: object) -> list[str]:
        seen.clear()
        call(monkeypatch, *usual, *options)
        return [line.split()[0] for line in seen]

    assert again() == []
    assert again("--retry") == ["broken", "broken"]
    assert again("--redo", OURS) == ["rtn"]
    assert again("--redo", "rounding", "--methods", "to the largest") == ["to"] * 2
    assert "**rtn**" in capsys.readouterr().out  # what was not asked for now is still in the table
    assert again("--model", "other", "--toolkits", OURS) == ["rtn"]
    assert "to the largest" not in capsys.readouterr().out  # of another model
    with pytest.raises(SystemExit):
        again("--methods", "tothelargest")


def row(name: str, seed: int, samples: list[float], error: str = "", **setting: Any) -> Row:
    method = Method("rounding" if name != "rtn" else OURS, name, name)
    job = Job(method, Setting(**setting or {"bits": 4, "group": 64}), seed, "demo", Text("demo"))
    return Row(job, samples, 1000, 900, 0, 2.0, 3_000_000, error=error)


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
    assert "| 1,000 | 900 | 2.0 | 0.0 | 3 MB |" in line
    left = markdown([best, replace(other, skipped=2)])
    assert "| a (2 matrices left as they were) |" in left


def test_the_overview_has_a_line_for_each_method_and_the_best_in_bold() -> None:
    rows = [
        row("a", 0, [1.1, 1.3], bits=4, group=64),
        row("a", 0, [1.3, 1.3], bits=3, group=64),
        row("rtn", 0, [1.2, 1.4], bits=4, group=64),
        row("a", 0, [1.3, 1.3], sparsity=0.5),
    ]
    overview, _, _ = markdown(summarize(rows, [1.0, 1.0])).partition("###")
    assert overview.splitlines() == [
        "| nll − original | 4 bits, groups of 64 | 3 bits, groups of 64 |",
        "|---|---:|---:|",
        "| rounding a | **0.2000 ± 0.1000** | **0.3000 ± 0.0000** |",
        "| compresskit rtn | 0.3000 ± 0.1000 |  |",
        "",
        "| nll − original | 50% sparse |",
        "|---|---:|",
        "| rounding a | **0.3000 ± 0.0000** |",
        "",
    ]


def test_many_bits_come_first_and_a_gain_can_be_drawn() -> None:
    rows = [
        row("a", 0, [2.0, 2.1], sparsity=0.7),
        row("a", 0, [2.0, 2.1], sparsity=0.5, pattern="2:4"),
        row("a", 0, [2.0, 2.1], bits=2, group=64),
        row("a", 0, [2.0, 2.1], sparsity=0.5),
        row("a", 0, [0.9, 1.0], bits=4, group=64),
    ]
    found = summarize(rows, [1.0, 1.0])
    labels = [s.setting.label for s in found]
    assert labels == ["4 bits, groups of 64", "2 bits, groups of 64",
                      "50% sparse", "2:4 sparse", "70% sparse"]  # fmt: skip
    assert found[0].mean < 0
    assert chart(found).startswith(b"\x89PNG")


def test_rows_come_back_from_their_file(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    rows = [row("a", 0, [1.0]), row("a", 1, [2.0]), row("a", 0, [3.0])]
    file.write_text("".join(r.line() + "\n" for r in rows))
    assert json.loads(rows[0].line())["job"]["method"]["toolkit"] == "rounding"
    assert [(r.job.seed, r.samples) for r in read(file)] == [(0, [3.0]), (1, [2.0])]
    assert read(tmp_path / "none") == []


def test_every_stage_is_told_what_it_takes_of_a_setting(job: Job, tmp_path: Path) -> None:
    def stages(name: str, setting: Setting) -> list[dict[str, Any]]:
        method = next(m for m in RECIPES if m.name == name)
        sites: Any = [SimpleNamespace(name="a", shape=(8, 64)),
                      SimpleNamespace(name="b", shape=(8, 256))]  # fmt: skip
        told = measure._wanted(
            replace(job, method=method, setting=setting), tmp_path, Path(), sites
        )
        return told["options"]["stages"]

    four = {"bits": 3, "group": "channel"}
    assert stages("awq", Setting(3)) == [{"use": "awq"} | four, {"use": "rtn"} | four]
    assert stages("gptq, autoround", Setting(3)) == [{"use": "gptq"} | four, {"use": "autoround"}]
    assert stages("ecgptq", Setting(3)) == [{"use": "ecgptq", "bits": 3.1}]
    assert stages("ecgptq", Setting(3, 64)) == [{"use": "ecgptq", "bits": 3.25}]
    assert stages("nf4", Setting(4, 64)) == [{"use": "nf4", "group": 64}]
    assert stages("admm", PRUNING[1]) == [{"use": "admm", "pattern": "2:4"}]
    assert stages("admm", PRUNING[2]) == [{"use": "admm", "sparsity": 0.7}]


def test_tokens_are_ours_for_a_seed(job: Job, tmp_path: Path) -> None:
    def tokens(seed: int) -> torch.Tensor:
        measure._wanted(replace(job, model="demo", text=Text("demo", 4, 16), seed=seed),
                        tmp_path, Path(), [])  # fmt: skip
        return load_file(tmp_path / "tokens.safetensors")["tokens"]

    assert torch.equal(tokens(0), tokens(0))
    assert not torch.equal(tokens(0), tokens(1))


def test_every_setting_names_itself_and_methods_of_ours_exist() -> None:
    assert Setting(4, None).label == "4 bits, whole rows"
    assert [s.label for s in PRUNING] == ["50% sparse", "2:4 sparse", "70% sparse"]
    there, _ = known(RECIPES)
    assert {m.name for m in there} >= {"rtn", "gptq", "gptq, autoround", "admm", "sparsegpt"}
    for toolkit in jobs.TOOLKITS.values():
        assert toolkit.adapter.exists()
        assert toolkit.requirements is None or toolkit.requirements.read_text().startswith(
            "torch==2.13.0\n"
        )
