"""Every command, as a person or a script would call it."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from compress import cli, registry
from compress.memory import ASKED
from eval import harness
from eval.harness import Progress

SHARED = {
    "calibration": {"data": "demo"},
    "evaluate": {"metrics": ["nll", "size_bytes"], "samples": 4, "length": 64},
}
VARIANTS = {"dense": [], "rtn-4": [{"use": "rtn"}]}
NAMES = sorted(registry.available())
Run = Callable[..., Any]
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("comparison") / "two.yaml"
    path.write_text(yaml.safe_dump({"model": "demo", **SHARED, "variants": VARIANTS}))
    return path


@pytest.fixture
def done(comparison: Path, compress: Run) -> Path:
    """The folder of a finished `compress run`; made once."""
    out = comparison.parent / "runs"
    if not (out / "report.html").exists():
        answer = compress("run", comparison, "--out", out)
        assert answer.code == 0
        assert "rtn-4" in answer.err
        assert "%" in answer.err
        assert "nll" in answer.out
    return out


def test_run(done: Path) -> None:
    for name in VARIANTS:
        assert (done / name / "config.json").exists()
        rows = [json.loads(line) for line in (done / name / "results.jsonl").open()]
        assert {row["metric"] for row in rows} == {"nll", "size_bytes"}
    page = (done / "report.html").read_text()
    assert "rtn-4" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert (done / "report.md").exists()
    assert not list(done.glob(".*"))


def test_run_again_does_nothing_twice(done: Path, comparison: Path, compress: Run) -> None:
    def written() -> dict[str, int]:
        files = [*done.glob("*/*.safetensors"), *done.glob("*/compression.json")]
        return {str(path): path.stat().st_mtime_ns for path in files}

    before = written()
    answer = compress("run", comparison, "--out", done)
    assert answer.code == 0
    assert answer.err.count("done already") == len(VARIANTS)
    assert written() == before


def test_run_again_after_a_change(done: Path, comparison: Path, compress: Run) -> None:
    """Only the variant that the change concerns is made again."""
    copy = comparison.parent / "changed"
    shutil.copytree(done, copy)
    changed = {"model": "demo", **SHARED, "variants": {**VARIANTS, "rtn-4": [{"use": "svd"}]}}
    path = comparison.parent / "changed.yaml"
    path.write_text(yaml.safe_dump(changed))
    answer = compress("run", path, "--out", copy, "--json")
    assert answer.code == 0
    assert answer.err.count("done already") == 1
    rows = [json.loads(line) for line in answer.out.splitlines()]
    sizes = [row["value"] for row in rows if row["metric"] == "size_bytes"]
    assert sizes == [(copy / n / "model.safetensors").stat().st_size for n in VARIANTS]
    assert json.loads((copy / "rtn-4" / "compression.json").read_text())["summary"] == "svd"


@pytest.mark.parametrize(
    ("last", "code", "message"),
    [
        ([{"use": "rtn", "targets": ["nothing*"]}], 2, "last: 'nothing*' matches no weight"),
        ([{"use": "hadamard"}], 3, "last: lm_head reads the table of model.embed_tokens"),
        ([{"use": "distill", "length": 10_000}], 4, "last: "),
    ],
)
def test_run_checks_all_variants_before_the_first(
    last: list[dict[str, Any]], code: int, message: str, compress: Run, tmp_path: Path
) -> None:
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump({**SHARED, "variants": {"dense": [], "last": last}}))
    answer = compress("run", path, "--model", "demo", "--out", tmp_path / "runs")
    assert answer.code == code
    assert message in answer.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "stage",
    [
        {"use": "rtn"},
        {"use": "rtn", "bits": 3, "symmetric": False},
        {"use": "svd", "ratio": 0.5},
        {"use": "nf4"},
        {"use": "nf4", "double_quant": True},
        {"use": "int8"},
        {"use": "fp8"},
        {"use": "magnitude"},
    ],
    ids=lambda stage: " ".join(map(str, stage.values())),
)
def test_dry_run_predicts_the_bytes(
    stage: dict[str, Any], compress: Run, recipe: Write, tmp_path: Path
) -> None:
    path = recipe(stage, storage="compact")
    before = set(tmp_path.rglob("*"))
    answer = compress("apply", path, "--dry-run", "--json")
    assert answer.code == 0
    assert set(tmp_path.rglob("*")) == before
    plan = json.loads(answer.out)
    assert compress("apply", path, "--out", tmp_path / "out", "-q").code == 0
    real = json.loads((tmp_path / "out" / "compression.json").read_text())["bytes"]
    assert plan["model_after"] == pytest.approx(real["disk"], rel=0.03)
    shown = compress("apply", path, "--dry-run")
    assert f"{plan['model_after']:,}" in shown.out


def test_apply_says_what_it_made(compress: Run, recipe: Write, tmp_path: Path) -> None:
    answer = compress("apply", recipe({"use": "rtn"}), "--out", tmp_path / "a", "--json")
    assert answer.err == ""
    (line,) = answer.out.splitlines()
    said = json.loads(line)
    assert said["out"] == str(tmp_path / "a")
    assert said["bytes"]["disk"] == (tmp_path / "a" / "model.safetensors").stat().st_size
    again = compress("apply", recipe({"use": "rtn"}), "--out", tmp_path / "a", "--overwrite")
    assert again.code == 0
    assert again.out == ""
    assert "loads with transformers and compressed-tensors" in " ".join(again.err.split())


def test_apply_without_loading_the_result(
    compress: Run, recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.run.Verifier", None)  # would fail if it were started
    path = recipe({"use": "rtn"})
    assert compress("apply", path, "--out", tmp_path / "a", "--no-verify", "-q").code == 0
    monkeypatch.undo()
    assert compress("verify", tmp_path / "a").code == 0


def test_options_override_the_recipe(
    compress: Run, recipe: Write, model: Path, tmp_path: Path
) -> None:
    path = recipe({"use": "rtn", "bits": 4}, seed=1)
    options = ["--set", "stages.0.bits=3", "--seed", "7", "--model", model, "--data", "x.txt", "-q"]
    assert compress("apply", path, *options, "--out", tmp_path / "out").code == 0
    written = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert written["stages"][0]["bits"] == 3
    assert (written["seed"], written["model"]) == (7, str(model))
    assert written["calibration"]["data"] == "x.txt"


def test_quiet_prints_nothing(compress: Run, done: Path, tmp_path: Path, comparison: Path) -> None:
    commands: list[list[Any]] = [
        ["run", comparison, "--out", done],
        ["eval", done / "rtn-4", "--metrics", "size_bytes"],
        ["report", done / "rtn-4", "--out", tmp_path / "r.html"],
    ]
    for command in commands:
        answer = compress(*command, "--quiet")
        assert (answer.code, answer.out, answer.err) == (0, "", "")


def test_quiet_training_prints_nothing(compress: Run, recipe: Write, tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n" * 9}) for i in range(300)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    stage = {"use": "lora", "rank": 2, "steps": 2, "samples": 4, "length": 16}
    path = recipe({"use": "nf4"}, stage, calibration={"data": str(tmp_path / "text.jsonl")})
    answer = compress("apply", path, "--out", tmp_path / "out", "--quiet")
    assert (answer.code, answer.out, answer.err) == (0, "", "")


def test_eval_prints_json_lines(compress: Run, done: Path) -> None:
    folders = [str(done / name) for name in VARIANTS]
    options = ["--metrics", "nll,size_bytes,kl", "--samples", "4", "--length", "64", "--json"]
    answer = compress("eval", *folders, *options)
    assert (answer.code, answer.err) == (0, "")
    rows = [json.loads(line) for line in answer.out.splitlines()]
    assert {tuple(row) for row in rows} == {("checkpoint", "metric", "value", "stderr", "unit")}
    named = {(row["checkpoint"], row["metric"]) for row in rows}
    assert named == {(f, m) for f in folders for m in ("nll", "size_bytes", "kl")}
    value = {(row["checkpoint"], row["metric"]): row["value"] for row in rows}
    assert value[folders[0], "kl"] == 0
    assert value[folders[1], "kl"] > 0
    assert value[folders[1], "nll"] > value[folders[0], "nll"]


def test_report(compress: Run, done: Path, tmp_path: Path) -> None:
    folders = [done / name for name in VARIANTS]
    answer = compress("report", *folders, "--out", tmp_path / "r.html")
    assert answer.code == 0
    assert {p.suffix for p in tmp_path.glob("r*")} >= {".html", ".md", ".png"}
    assert "r.html" in answer.err.replace("\n", "")
    answer = compress("report", *folders, "--out", tmp_path / "b.html", "--metric", "size_bytes")
    assert "size_bytes minus the original" in (tmp_path / "b.html").read_text()
    assert (tmp_path / "b.csv").read_text().startswith("checkpoint,metric,")


def test_eval_of_tasks_and_of_a_data_set(compress: Run, done: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    folder = done / "dense"
    answer = compress("eval", folder, "--tasks", "demo_brackets", "--limit", 4, "--json")
    assert (answer.code, answer.err) == (0, "")
    (row,) = [json.loads(line) for line in answer.out.splitlines()]
    assert (row["metric"], row["unit"]) == ("task:demo_brackets", "acc")
    options = ["--metrics", "size_bytes", "--tasks", "demo_brackets", "--limit", 4]
    answer = compress("eval", folder, *options)
    assert "brackets" in answer.out
    assert "bytes" in answer.out
    answer = compress("eval", folder, "--metrics", "accuracy", "--dataset", "x.csv")
    assert answer.code == 3
    assert "give --dataset" in answer.line
    answer = compress("eval", folder, "--dataset", "x.csv", "--columns", "text")
    assert answer.code == 2
    assert "--columns text: write KEY=VALUE" in answer.line


def test_questions_are_counted_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*_: Any, watch: Any, **__: Any) -> Iterator[Progress]:
        yield Progress("folder/small: task:x", 1, 2)
        with contextlib.redirect_stderr(io.StringIO()):  # as while the harness runs
            watch(3, 9)
            time.sleep(0.3)  # the screen is drawn ten times a second
        yield Progress("done", 2, 2)

    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(harness, "evaluate", slow)
    assert cli._evaluate(["folder/small"], None, False) == []
    assert "small: task:x" in terminal.getvalue()
    assert "3/9" in terminal.getvalue()


def test_push_is_refused_without_a_name(compress: Run, done: Path) -> None:
    answer = compress("push", done / "dense", "--to", "nobody")
    assert answer.code == 2
    assert "expected USER/NAME" in answer.line


def test_verify(compress: Run, done: Path, tmp_path: Path) -> None:
    answer = compress("verify", done / "rtn-4", "--json")
    assert (answer.code, answer.err) == (0, "")
    found = json.loads(answer.out)
    assert found["storage"] == "compressed-tensors"
    assert found["difference"] <= found["tolerance"]
    assert found["vllm"] == "reads it"
    copy = Path(shutil.copytree(done / "rtn-4", tmp_path / "copy"))
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1000] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    answer = compress("verify", copy)
    assert answer.code == 5
    assert answer.line.startswith("error ")
    assert "model.safetensors is not the file that was written" in answer.line
    (copy / "model.safetensors").unlink()
    answer = compress("verify", copy)
    assert (answer.code, "model.safetensors is missing" in answer.line) == (5, True)


def test_verify_sees_other_logits(compress: Run, done: Path, tmp_path: Path) -> None:
    """Whole files are not enough: what loads must compute what was recorded."""
    copy = Path(shutil.copytree(done / "rtn-4", tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    config["rms_norm_eps"] = 0.5
    (copy / "config.json").write_text(json.dumps(config))
    answer = compress("verify", copy)
    assert answer.code == 5
    assert "logits differ" in answer.line


def test_list(compress: Run) -> None:
    answer = compress("list")
    assert answer.code == 0
    assert all(name in answer.out for name in [*NAMES, "perplexity", "compresskit"])
    rows = [json.loads(line) for line in compress("list", "--json").out.splitlines()]
    assert {row["name"] for row in rows if row["kind"] == "compressor"} == set(NAMES)
    assert {row["kind"] for row in rows} == {"compressor", "exporter", "metric"}


@pytest.mark.parametrize("name", NAMES)
def test_explain(name: str, compress: Run) -> None:
    answer = compress("explain", name)
    assert (answer.code, answer.err) == (0, "")
    cls = registry.get(name)
    assert all(key in answer.out for key in cls.model_fields)
    assert f"use: {name}" in answer.out
    said = json.loads(compress("explain", name, "--json").out)
    assert set(said["parameters"]) == set(cls.model_fields)
    assert said["name"] == name


def test_help(compress: Run) -> None:
    answer = compress("--help")
    assert answer.code == 0
    for command in ("run", "apply", "eval", "report", "verify", "push", "list", "explain"):
        assert command in answer.out
        assert compress(command, "--help").code == 0


def test_plan_writes_a_recipe_that_apply_obeys(compress: Run, tmp_path: Path) -> None:
    recipe, small = tmp_path / "plan.yaml", tmp_path / "small"
    text = ("--set", "calibration.samples=4", "--set", "calibration.length=32")
    answer = compress("plan", "--size", "5%", "--out", recipe, *text)
    assert answer.code == 2
    assert "bytes are too few" in answer.line
    assert not recipe.exists()
    answer = compress("plan", "--size", "30%", "--out", recipe, *text)
    assert answer.code == 0
    assert "layer 5" in answer.out
    assert "below the size" in answer.out
    answer = compress("apply", recipe, "--out", small, "--no-verify", "--json")
    taken = json.loads(answer.out)["bytes"]
    assert 0.99 * 0.3 * taken["original"] < taken["disk"] <= 0.3 * taken["original"]
    assert compress("plan", "--size", "a third", "--out", recipe).code == 2
    answer = compress("plan", "--keep", "99%", "--effort", 2, "--out", recipe)
    assert answer.code == 2
    assert "--effort" in answer.err


def test_little_memory_changes_no_byte(
    compress: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ASKED, "")  # as it was, afterwards
    recipe = tmp_path / "gptq.yaml"
    recipe.write_text("calibration: {data: demo, samples: 16, length: 256}\nstages: [{use: gptq}]")
    for out, *memory in (["free"], ["little", "--memory", "1MB"]):
        made = compress("apply", recipe, "--out", tmp_path / out, "--no-verify", *memory)
        assert made.code == 0
    free, little = (tmp_path / out / "model.safetensors" for out in ("free", "little"))
    assert free.read_bytes() == little.read_bytes()
    wrong = compress("apply", recipe, "--out", tmp_path / "wrong", "--memory", "much")
    assert wrong.code == 2
    assert "size much" in wrong.line
    assert compress("plan", "--size", "30%", "--out", recipe, "--memory", "much").code == 2


def test_help_waits_for_no_model_library() -> None:
    """Commands import what they need when they run."""
    code = "import compress.cli, sys; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_export(compress: Run, tmp_path: Path) -> None:
    out = tmp_path / "dense"
    answer = compress("export", "demo", "--to", "dense", "--out", out, "--json")
    assert answer.code == 0, answer.err
    said = json.loads(answer.out)
    assert (said["to"], said["held"], said["difference"]) == ("dense", {"exactly": 43}, 0)
    assert (out / "config.json").exists()
    rows = [json.loads(line) for line in compress("export", "--list", "--json").out.splitlines()]
    assert {"dense", "gguf", "gptq"} <= {row["name"] for row in rows}
    assert "expanded" in compress("export", "--list").out
    assert compress("export", "demo").code == 2
