"""Every mistake a person can make ends in one line: what is wrong, where, and what to do."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from compress import registry, store

RTN = {"use": "rtn"}
DISTILL = {"use": "distill", "steps": 2, "samples": 4, "length": 16}
RECIPE, MODEL, DATA, CHECKPOINT, PLUGIN = 2, 3, 4, 5, 6
Run = Callable[..., Any]
Write = Callable[..., Path]


@pytest.fixture
def fails(compress: Run, tmp_path: Path) -> Run:
    """Run a command that must fail with this code and these words, and leave nothing behind."""

    def failed(code: int, words: list[str], *arguments: Any) -> None:
        before = {p for p in tmp_path.rglob("*") if ".work" not in str(p)}
        answer = compress(*arguments)
        assert answer.line.startswith("error ")
        for word in words:
            assert word in answer.line
        assert answer.code == code
        assert answer.out == ""
        assert {p for p in tmp_path.rglob("*") if ".work" not in str(p)} == before

    return failed


@pytest.mark.parametrize(
    ("keys", "stage", "words"),
    [
        ({"modle": "demo"}, RTN, ["recipe.yaml", "modle", "did you mean 'model'"]),
        ({"data": "demo"}, RTN, ["data", "calibration.data"]),
        ({"calibration": {"sample": 3}}, RTN, ["calibration.sample", "'samples'"]),
        ({"evaluate": {"metric": []}}, RTN, ["evaluate.metric", "'metrics'"]),
        ({"seed": -1}, RTN, ["seed", "greater than or equal to 0", "-1"]),
        ({"storage": "small"}, RTN, ["storage", "'plain' or 'compact'", "small"]),
        ({}, {"use": "rtn", "bit": 4}, ["stages.0.bit", "did you mean 'bits'"]),
        ({}, {"use": "rtn", "bits": "four"}, ["stages.0.bits", "integer", "four"]),
        ({}, {"use": "rtn", "bits": 9}, ["stages.0.bits", "less than or equal to 8", "9"]),
        ({}, {"use": "rtn", "group": 4}, ["stages.0", "group 4 is below 8"]),
        ({}, {"use": "nf4", "group": 100}, ["stages.0.group", "64, 128, 256 or 512", "100"]),
        ({}, {"use": "magnitude", "sparsity": 1.5}, ["stages.0.sparsity", "less than 1", "1.5"]),
        ({}, {"use": "magnitude", "pattern": "4:2"}, ["stages.0", "N must be below M"]),
        ({}, {"use": "svd", "rank": 2, "ratio": 0.5}, ["stages.0", "one of rank, ratio"]),
        ({}, {"use": "rnt"}, ["stages.0.use", "'rnt'", "did you mean 'rtn'"]),
        ({}, {"bits": 4}, ["stages.0", "'use' key"]),
        ({}, {"use": "rtn", "targets": ["q_prj"]}, ["'q_prj' matches no", "'q_proj'"]),
        ({}, {"use": "rtn", "skip": ["nothing*"]}, ["'nothing*' matches no weight"]),
        ({}, {"use": "rtn", "blocks": [6]}, ["no layer 6", "numbered 0 to 5"]),
        ({}, {"use": "rtn", "blocks": "5-2"}, ["stages.0.blocks", "5-2"]),
        ({}, {"use": "rtn", "targets": ["head"], "blocks": [0]}, ["leave no weight"]),
        ({}, {"use": "int8", "targets": ["embed"]}, ["int8 cannot compress", "embedding"]),
    ],
)
def test_a_recipe_that_cannot_be_obeyed(
    keys: dict[str, Any],
    stage: dict[str, Any],
    words: list[str],
    fails: Run,
    recipe: Write,
    tmp_path: Path,
) -> None:
    fails(RECIPE, words, "apply", recipe(stage, **keys), "--out", tmp_path / "out")


def test_stages_that_cannot_follow_each_other(fails: Run, recipe: Write, tmp_path: Path) -> None:
    path = recipe(RTN, {"use": "svd"})
    words = ["stages.1 (svd) cannot follow stages.0 (rtn)", "quantized", "takes dense or sparse"]
    fails(RECIPE, words, "apply", path, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"stages: [{use: rtn", ["recipe.yaml:1", "expected"]),
        (b"\xff\xfe\x00", ["recipe.yaml", "not YAML"]),
        (b"just a sentence", ["recipe.yaml", "expected keys"]),
        (b"stages: {use: rtn}", ["stages", "list"]),
        (b"model: demo\nstages: []\nvariants: {a: []}", ["either stages or variants"]),
        (b"variants: {a/b: []}", ["a/b", "folder name"]),
        (b"variants: {a: [], b: []}", ["2 variants", "compress run"]),
    ],
)
def test_a_file_that_is_no_recipe(
    content: bytes, words: list[str], fails: Run, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    fails(RECIPE, words, "apply", path, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["apply", "absent.yaml", "--out", "x"], ["absent.yaml", "no such recipe file"]),
        (["aply", "recipe.yaml"], ["No such command 'aply'", "did you mean 'apply'"]),
        (["apply", "r.yaml", "--otu", "x"], ["--otu", "--out"]),
        (["apply"], ["RECIPE", "compress apply --help"]),
        (["explain", "svdd"], ["'svdd'", "did you mean 'svd'"]),
        (["eval", "demo", "--metrics", "ppl"], ["no metric is called 'ppl'", "perplexity"]),
    ],
)
def test_a_command_line_that_cannot_be_obeyed(
    arguments: list[str], words: list[str], fails: Run
) -> None:
    fails(RECIPE, words, *arguments)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("stages.0.bits", ["stages.0.bits", "KEY=VALUE"]),
        ("stages.3.bits=2", ["stages.3.bits", "1 items", "'3' is not one"]),
        ("stages.0.bits=nine", ["stages.0.bits", "integer", "nine"]),
        ("stages.0.bits=[", ["--set stages.0.bits=[", "not YAML"]),
        ("model.name=x", ["model.name", "'model'", "is a value"]),
    ],
)
def test_a_setting_that_fits_nowhere(
    setting: str, words: list[str], fails: Run, recipe: Write, tmp_path: Path
) -> None:
    fails(RECIPE, words, "apply", recipe(RTN), "--set", setting, "--out", tmp_path / "out")


def test_no_output_is_named(fails: Run, recipe: Write) -> None:
    fails(RECIPE, ["--out DIR is missing"], "apply", recipe(RTN))


def change_config(model: Path, **keys: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | keys))


def change_weights(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def truncate(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100_000])


def pickle_only(model: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({}, model / "pytorch_model.bin")


def not_a_number(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.3.mlp.up_proj.weight"][5, 7] = torch.nan


def index_without_file(model: Path) -> None:
    (model / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


K = "model.layers.2.self_attn.k_proj.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no config": (lambda m: (m / "config.json").unlink(), ["no config.json"]),
    "config is not JSON": (lambda m: (m / "config.json").write_text("{"), ["config.json"]),
    "no such model type": (lambda m: change_config(m, model_type="lama"), ["config.json", "lama"]),
    "no such class": (lambda m: change_config(m, architectures=["Lama"]), ["has no Lama"]),
    "no class": (lambda m: change_config(m, architectures=[]), ["'architectures' is empty"]),
    "impossible config": (lambda m: change_config(m, hidden_act="none"), ["rejects its config"]),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), ["no model*.safetensors"]),
    "pickle": (pickle_only, ["pytorch_model.bin is a pickle", "convert it to safetensors"]),
    "truncated": (truncate, ["model.safetensors", "not a whole safetensors file"]),
    "index": (index_without_file, ["model-00001-of-00002.safetensors", "is not there"]),
    "missing tensor": (lambda m: change_weights(m, lambda t: t.pop(K)), ["no tensor for " + K]),
    "other shape": (
        lambda m: change_weights(m, lambda t: t.update({K: torch.zeros(3, 5)})),
        [K, "is [3, 5]", "asks for [64, 128]"],
    ),
    "not a number": (
        lambda m: change_weights(m, not_a_number),
        ["model.layers.3.mlp.up_proj.weight", "NaN"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_model_that_cannot_be_read(
    damage: str, fails: Run, recipe: Write, model: Path, tmp_path: Path
) -> None:
    spoil, words = DAMAGE[damage]
    spoil(model)
    path = recipe(RTN)
    fails(MODEL, [str(model), *words], "apply", path, "--model", model, "--out", tmp_path / "out")


def test_no_such_model(fails: Run, recipe: Write, tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    words = [str(absent), "no such model folder"]
    fails(MODEL, words, "apply", recipe(RTN), "--model", absent, "--out", tmp_path / "out")


@pytest.mark.parametrize("use", ["rtn", "svd"])
def test_a_model_that_is_compressed_already(
    use: str, compress: Run, fails: Run, recipe: Write, tmp_path: Path
) -> None:
    path = recipe({"use": use})
    first = tmp_path / "first"
    assert compress("apply", path, "--out", first, "-q").code == 0
    words = [str(first), "already compressed", "start from the original"]
    fails(MODEL, words, "apply", path, "--model", first, "--out", tmp_path / "out")


def test_an_output_that_exists(fails: Run, recipe: Write, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    fails(
        CHECKPOINT, [str(out), "exists already", "--overwrite"], "apply", recipe(RTN), "--out", out
    )


def test_an_output_that_cannot_be(fails: Run, recipe: Write, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    path = recipe(RTN)
    fails(CHECKPOINT, ["file is a file"], "apply", path, "--out", file / "out")
    fails(CHECKPOINT, ["is a file"], "apply", path, "--out", file, "--overwrite")
    fails(CHECKPOINT, ["/proc/out"], "apply", path, "--out", "/proc/out")


def test_an_output_without_permission(
    fails: Run, recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = os.access  # root may write anywhere, so permission is taken away here
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    words = ["no permission to write in", str(tmp_path)]
    fails(CHECKPOINT, words, "apply", recipe(RTN), "--out", tmp_path / "out")


def test_a_disk_that_fills(
    fails: Run, recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = 0
    add = store.SafetensorsWriter.add

    def full(self: store.SafetensorsWriter, name: str, tensor: torch.Tensor) -> None:
        nonlocal written
        written += 1
        if written > 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, name, tensor)

    monkeypatch.setattr(store.SafetensorsWriter, "add", full)
    words = [str(tmp_path / "out"), "the disk is full", "free some room and run again"]
    fails(CHECKPOINT, words, "apply", recipe(RTN), "--out", tmp_path / "out")


def test_text_that_cannot_be_read(fails: Run, recipe: Write, model: Path, tmp_path: Path) -> None:
    texts = {"none.txt": None, "latin.txt": "d\xe9j\xe0 vu ".encode("latin-1") * 999,
             "short.txt": b"def f():\n    pass\n", "data.parquet": b"PAR?",
             "data.json": b'[{"number": 1}, {"number": 2}]'}  # fmt: skip
    words = {"none.txt": "no such file", "latin.txt": "not UTF-8 text (byte 1)",
             "short.txt": "less than one window of 16", "data.parquet": "not readable as parquet",
             "data.json": "no text column among number"}  # fmt: skip
    for name, content in texts.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        arguments = ("apply", recipe(DISTILL), "--data", path, "--out", tmp_path / "out")
        fails(DATA, [name, words[name]], *arguments)
    keys = {"model": str(model)}
    arguments = ("apply", recipe(DISTILL, **keys), "--out", tmp_path / "out")
    fails(DATA, ["distill needs text", "calibration.data", "--data"], *arguments)


def test_a_model_without_a_tokenizer(
    fails: Run, recipe: Write, model: Path, tmp_path: Path
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    path = recipe(DISTILL)
    arguments = ("--model", model, "--data", "demo", "--out", tmp_path / "out")
    fails(DATA, ["needs a tokenizer"], "apply", path, *arguments)
    fails(MODEL, ["without a tokenizer"], "eval", model, "--metrics", "nll", "--data", "demo")


def test_a_report_of_nothing(fails: Run, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    fails(CHECKPOINT, [str(model), "compress eval"], "report", model, "--out", out)


def test_a_folder_that_is_not_ours_to_verify(fails: Run, model: Path, tmp_path: Path) -> None:
    fails(CHECKPOINT, [str(model), "compression.json"], "verify", model)
    fails(MODEL, ["absent", "no such folder"], "verify", tmp_path / "absent")


class Point:
    """An entry point whose package is broken."""

    name, value, dist = "broken", "nowhere:Broken", None

    def load(self) -> type:
        raise ImportError("No module named 'nowhere'")


class Stranger(Point):
    def load(self) -> type:
        return dict


@pytest.mark.parametrize(
    ("point", "words"),
    [(Point, ["does not import", "nowhere"]), (Stranger, ["not a subclass of"])],
)
def test_a_broken_plug_in(
    point: type, words: list[str], fails: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "available", lambda *_: {"broken": point()})
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"stages": [{"use": "broken"}]}))
    fails(PLUGIN, ["'broken'", *words], "apply", path, "--out", tmp_path / "out")
    fails(PLUGIN, ["'broken'", *words], "explain", "broken")
