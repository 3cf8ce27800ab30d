"""Folders in other formats: what each holds, that logits are the same there, and what is refused.

``export`` itself compares logits, so an export that returns has passed that check.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from test_stored import FOLDERS
from typer.testing import CliRunner

from compress.checkpoint import load, load_tokenizer
from compress.cli import app
from compress.errors import CheckpointError, ModelError, RecipeError
from compress.export.export import export, make, refusal
from compress.stored import Stored
from compress.verify import relative_difference
from eval.harness import Notice, Progress, evaluate
from eval.measured import read_checkpoint

Made = Callable[..., Path]
# what each format makes of the folders of test_stored; the rest is refused
HELD: dict[str, dict[str, set[str]]] = {
    "dense": {
        "plain": {"exactly"}, "packed": {"exactly", "expanded"},
        "whole rows": {"exactly", "expanded"},
        "zero-points": {"exactly", "expanded"}, "mixed": {"exactly", "expanded"},
        "a byte a code": {"exactly", "expanded"}, "tables": {"expanded"},
        "float8": {"exactly", "expanded"}, "int8": {"exactly", "expanded"},
        "nf4": {"exactly", "expanded"}, "double": {"exactly", "expanded"}, "Conv1D": {"expanded"},
        "factors": {"exactly", "expanded"}, "adapter": {"exactly", "expanded"},
    },
    "transformers": {
        "plain": {"exactly"}, "packed": {"exactly"}, "whole rows": {"exactly"},
        "mixed": {"exactly"}, "a byte a code": {"exactly"}, "float8": {"exactly"},
        "int8": {"exactly"}, "nf4": {"exactly"}, "double": {"exactly"},
    },
    "gptq": {
        "packed": {"exactly"}, "whole rows": {"exactly"}, "zero-points": {"exactly"},
        "mixed": {"exactly"}, "tables": {"exactly", "expanded"}, "Conv1D": {"exactly", "expanded"},
        "a byte a code": {"exactly"},
    },
    "huffman": {
        "packed": {"exactly"}, "whole rows": {"exactly"}, "zero-points": {"exactly"},
        "mixed": {"exactly"}, "a byte a code": {"exactly"}, "tables": {"exactly"},
        "Conv1D": {"exactly"},
    },
    "bitsandbytes": {
        "packed": {"exactly", "rounded again"}, "nf4": {"exactly"}, "double": {"exactly"},
        "int8": {"exactly", "rounded again"}, "plain": {"exactly", "rounded again"},
        "adapter": {"exactly", "rounded again"}, "factors": {"exactly", "rounded again"},
    },
    "gguf": {
        "plain": {"exactly"}, "packed": {"exactly"}, "whole rows": {"exactly"},
        "zero-points": {"exactly", "nearly"}, "mixed": {"exactly"}, "a byte a code": {"exactly"},
        "tables": {"exactly"}, "float8": {"exactly", "rounded again"},
        "int8": {"exactly", "nearly"}, "nf4": {"exactly", "rounded again"},
        "double": {"exactly", "rounded again"}, "Conv1D": {"exactly"},
        "adapter": {"exactly", "rounded again"},
    },
}  # fmt: skip
NAMES = {
    "dense": "out",
    "huffman": "out",
    "transformers": "out",
    "gptq": "out",
    "bitsandbytes": "out",
    "gguf": "m.gguf",
}


@pytest.mark.parametrize("name", FOLDERS)
def test_every_folder_in_every_format(name: str, source: Made, apply: Made, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    family, _, stages = FOLDERS[name]
    folder = apply(source(family), stages, name="folder")
    for to, expected in HELD.items():
        out = tmp_path / to / NAMES[to]
        out.parent.mkdir()
        if name in expected:
            assert set(export(folder, to, out)["held"]) == expected[name], to
            assert load_tokenizer(out) is not None
        elif to != "bitsandbytes":  # what it refuses is told by refusal or while writing
            assert refusal(make(to, {}), Stored(folder)), to
            with pytest.raises(CheckpointError, match="cannot hold it"):
                export(folder, to, out)
            assert not list(out.parent.iterdir())


def test_it_is_said_whether_inputs_are_still_rounded(
    source: Made, apply: Made, tmp_path: Path
) -> None:
    plain, rounding = (
        apply(source("llama"), [stage], name=stage["use"])
        for stage in ({"use": "rtn", "bits": 8}, {"use": "fp8", "activations": True})
    )
    said = {to: export(rounding, to, tmp_path / to)["inputs"] for to in ("transformers", "dense")}
    assert said["transformers"] == "rounded to 8 bits"
    assert re.match("not rounded .* as 14 matrices of the folder ask for", said["dense"])
    assert export(plain, "dense", tmp_path / "plain")["inputs"] == "as they are"
    shown = CliRunner().invoke(
        app, ["export", str(rounding), "--to", "dense", "--out", str(tmp_path / "more")]
    )
    assert "what they read is not rounded" in shown.stderr.replace("\n", " ")


def test_codes_come_back_from_gptq_as_they_were(source: Made, apply: Made, tmp_path: Path) -> None:
    folder = apply(source("llama"), [{"use": "rtn", "bits": 3, "symmetric": False}])
    export(folder, "gptq", tmp_path / "gptq")
    before, after = Stored(folder), Stored(tmp_path / "gptq")
    for site in before.anatomy.sites:
        there, back = before.weight(site), after.weight(site)
        assert there.kind == back.kind
        assert torch.equal(there.dense(), back.dense())
    assert after.quantization["checkpoint_format"] == "gptq_v2"
    assert export(tmp_path / "gptq", "dense", tmp_path / "dense")["difference"] < 0.01


def test_a_huffman_code_turns_back_into_the_folder(
    source: Made, apply: Made, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    folder = apply(source("llama"), [{"use": "rtn", "bits": 3}])
    export(folder, "huffman", tmp_path / "small")
    export(tmp_path / "small", "transformers", tmp_path / "back")
    small, back = (load_file(tmp_path / name / "model.safetensors") for name in ("small", "back"))
    before = load_file(folder / "model.safetensors")
    assert any(key.endswith(".stream") for key in small)
    assert before.keys() == back.keys()
    assert all(torch.equal(before[key], back[key]) for key in before)
    config = [json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "back")]
    assert config[0]["quantization_config"] == config[1]["quantization_config"]


def test_gptq_names_what_has_other_settings(source: Made, apply: Made, tmp_path: Path) -> None:
    stages = [
        {"use": "rtn", "targets": ["attention"]},
        {"use": "rtn", "bits": 8, "group": 32, "targets": ["down_proj"]},
    ]
    export(apply(source("llama"), stages), "gptq", tmp_path / "gptq")
    said = Stored(tmp_path / "gptq").quantization
    assert (said["bits"], said["group_size"], said["sym"]) == (4, 64, True)
    name = r"^model\.layers\.0\.mlp\."
    assert said["dynamic"][f"+:{name}down_proj$"] == {"bits": 8, "group_size": 32}
    assert said["dynamic"][f"-:{name}up_proj$"] == {}


def test_plain_transformers_loads_them_without_this_library(
    source: Made, apply: Made, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    folder = apply(source("llama"), [{"use": "rtn", "bits": 8, "targets": ["all"]}])
    for to in ("dense", "bitsandbytes", "gguf"):
        export(folder, to, tmp_path / f"{to}.gguf", verify=False)
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM as A\n"
        "tokens = torch.arange(20)[None]\n"
        "for keys in ({'pretrained_model_name_or_path': 'dense.gguf'},\n"
        "             {'pretrained_model_name_or_path': 'bitsandbytes.gguf'},\n"
        "             {'pretrained_model_name_or_path': '.', 'gguf_file': 'gguf.gguf'}):\n"
        "    model = A.from_pretrained(**keys, dtype=torch.float32)\n"
        "    print(model(tokens).logits.sum().item())\n"
        "assert 'compress' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    with torch.no_grad():
        model: Any = load(folder, dtype=torch.float32)
        expected = model(torch.arange(20)[None]).logits
    dense, _, gguf = map(float, done.stdout.split())
    assert abs(dense - expected.sum().item()) < 0.02 * expected.abs().sum().item()
    assert abs(gguf - expected.sum().item()) < 0.02 * expected.abs().sum().item()


def test_a_gguf_file_is_measured_and_reported(source: Made, apply: Made, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    original = source("llama")
    folder = apply(original, [{"use": "rtn"}])
    file = tmp_path / "small.gguf"
    export(folder, "gguf", file)
    text = tmp_path / "text.txt"
    text.write_text(models.TEXT)
    rows = evaluate(
        [str(folder), str(file)], ["nll", "size_bytes", "bits_per_param"], data=str(text),
        samples=4, baseline=str(original),
    )  # fmt: skip
    found = {
        (r.checkpoint, r.metric): r.value for r in rows if not isinstance(r, Notice | Progress)
    }
    assert found[str(file), "nll"] == pytest.approx(found[str(folder), "nll"], rel=1e-2)
    assert found[str(file), "size_bytes"] == file.stat().st_size
    seen = read_checkpoint(file)
    assert (seen.family, seen.size) == ("quantization", file.stat().st_size)
    assert seen.recipe_line.startswith("rtn")


def test_folders_of_other_toolkits_are_known_as_such(
    source: Made, apply: Made, tmp_path: Path
) -> None:
    folder = apply(source("llama"), [{"use": "rtn"}])
    for to, said in (("gptq", "gptq 4 bits"), ("bitsandbytes", "bitsandbytes 4 bits")):
        out = tmp_path / to
        export(folder, to, out, verify=False)
        (out / "compression.json").unlink()
        (out / "recipe.yaml").unlink()
        row = {"checkpoint": to, "metric": "nll", "value": 1.0, "unit": "nats/token"}
        (out / "results.jsonl").write_text(json.dumps(row) + "\n")
        seen = read_checkpoint(out)
        assert (seen.recipe_line, seen.family) == (said, "quantization")


def test_awq_folders_load(source: Made, tmp_path: Path) -> None:
    """A folder in AWQ's layout, its words written by hand."""
    from safetensors.torch import load_file, save_file

    folder = models.save(tmp_path / "awq", "llama")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    rows, columns = tensors.pop(f"{name}.weight").shape
    tensors[f"{name}.qweight"] = torch.full((columns, rows // 8), 0x33333333, dtype=torch.int32)
    tensors[f"{name}.qzeros"] = torch.full(
        (columns // 32, rows // 8), 0x11111111, dtype=torch.int32
    )
    tensors[f"{name}.scales"] = torch.full((columns // 32, rows), 0.25, dtype=torch.float16)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    module: Any = load(folder).get_submodule(name)
    assert (module.weight == 0.5).all()
    config["quantization_config"]["version"] = "gemv"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="gemm version only"):
        load(folder)


def test_dense_in_another_dtype(source: Made, apply: Made, tmp_path: Path) -> None:
    folder = apply(source("gpt2"), [{"use": "svd"}])
    export(folder, "dense", tmp_path / "half", dtype="float16")
    assert load(tmp_path / "half").dtype == torch.float16
    a, b = (
        models.logits(load(f, dtype=torch.float32), folder) for f in (folder, tmp_path / "half")
    )
    assert relative_difference(a, b) < 5e-3


@pytest.mark.parametrize(
    ("to", "out", "options", "words"),
    [
        ("gguff", "x.gguf", {}, "gguf"),
        ("gguf", "x", {}, "ends in .gguf"),
        ("gguf", "x.gguf", {"otherwize": "Q8_0"}, "otherwise"),
        ("gguf", "x.gguf", {"otherwise": "Q3_K"}, "otherwise"),
        ("dense", "x", {"bits": 4}, "no option 'bits'"),
    ],
)
def test_what_cannot_be_obeyed(
    to: str, out: str, options: dict[str, Any], words: str, source: Made, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=words):
        export(source("llama"), to, tmp_path / out, **options)
    assert not list(tmp_path.iterdir())


def test_what_is_there_stays_and_wrong_logits_leave_nothing(
    source: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        export(source("llama"), "dense", tmp_path / "out")
    from compress.export.dense import DenseExporter

    monkeypatch.setattr(DenseExporter, "logits", lambda *_: torch.zeros(1))
    with pytest.raises(CheckpointError, match="differ from the folder's"):
        export(source("llama"), "dense", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
