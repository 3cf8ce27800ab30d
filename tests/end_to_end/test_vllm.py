"""Which folders vLLM reads, by the rules that were found to be its reader's."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from compressed_tensors.quantization import QuantizationArgs

from compress import serve_command
from compress.errors import ModelError
from compress.export import vllm
from compress.export.export import export
from compress.stored import Stored

Made = Callable[..., Path]
SOME = {"use": "rtn", "targets": ["q_proj"]}
REST = {"use": "rtn", "bits": 8, "targets": ["k_proj", "v_proj"]}
# stages → what is said, and how a site's inputs and matrix are packed by vLLM's names
FOLDERS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "4 bits": ([{"use": "rtn"}], "reads it"),
    "zero-points": ([{"use": "rtn", "symmetric": False}], "reads it"),
    "rows of 8 bits": ([{"use": "rtn", "bits": 8, "group": "channel"}], "reads it"),
    "8-bit inputs": ([{"use": "w8a8"}], "reads it"),
    "float8": ([{"use": "fp8", "activations": True}], "reads it"),
    "zeros": ([{"use": "magnitude", "pattern": "2:4"}], "reads it"),
    "3 bits": ([{"use": "rtn", "bits": 3}], "reads it, 3 bits in groups of 64 by its Humming"),
    "groups of 16": ([{"use": "rtn", "group": 16}], "reads it, 4 bits in groups of 16 by its Hum"),
    "one of three": ([SOME], "q_proj, k_proj, v_proj are one matrix there"),
    "two settings": ([SOME, REST], "q_proj, k_proj, v_proj are one matrix there"),
    "a setting each": ([{**SOME, "targets": ["attention"]}, {**REST, "targets": ["mlp"]}], "reads"),
    "a tied table": ([{"use": "rtn", "targets": ["all"]}], "cannot read a packed embedding"),
    "bitsandbytes": ([{"use": "nf4"}], "no bitsandbytes any more"),
    "factors": ([{"use": "svd"}], "modelling file of its own"),
    "an adapter": ([{"use": "rtn"}, {"use": "residual", "rank": 2}], "--enable-lora"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_said_of_vllm(name: str, source: Made, apply: Made) -> None:
    stages, words = FOLDERS[name]
    tied = name == "a tied table"
    folder = apply(source("llama", hidden_size=128, tie_word_embeddings=tied), stages)
    said = vllm.said(Stored(folder))
    assert words in said
    assert ("does not run it" in said) == (not words.startswith("reads"))


def test_groups_have_the_scheme_that_vllm_looks_for(source: Made, apply: Made) -> None:
    """The conditions of its ``_is_dynamic_token_w8a8``, ``_is_fp8_w8a8`` and ``WNA16``."""
    for stage, kind in (
        ({"use": "w8a8"}, "int"),
        ({"use": "fp8", "activations": True}, "float"),
        ({"use": "rtn", "bits": 8}, "packed"),
    ):
        folder = apply(source("llama"), [stage], name=f"out-{kind}")
        said = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert said["quant_method"] == "compressed-tensors"
        for group in said["config_groups"].values():
            weights = QuantizationArgs.model_validate(group["weights"])
            assert weights.symmetric
            assert not weights.dynamic
            assert weights.actorder is None
            if kind == "packed":
                assert group["format"] == "pack-quantized"
                assert weights.strategy in ("group", "channel")
                assert group["input_activations"] is None
                continue
            inputs = QuantizationArgs.model_validate(group["input_activations"])
            assert group["format"] == f"{kind}-quantized"
            assert weights.type == inputs.type == kind
            assert (weights.num_bits, inputs.num_bits) == (8, 8)
            assert (weights.strategy, inputs.strategy, inputs.dynamic) == ("channel", "token", True)


def test_gptq_without_zero_points_only(source: Made, apply: Made, tmp_path: Path) -> None:
    for symmetric in (True, False):
        stage = {"use": "rtn", "symmetric": symmetric}
        folder = apply(source("llama"), [stage], name=f"out-{symmetric}")
        record = export(folder, "gptq", tmp_path / f"gptq-{symmetric}")
        assert (record["vllm"] == "reads it") == symmetric


def test_a_server_that_would_not_run_it(
    source: Made, apply: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr(serve_command, "find_spec", lambda name: known("json"))
    good = apply(source("llama"), [{"use": "rtn"}], name="good")
    bad = apply(source("llama"), [SOME], name="bad")
    assert "vllm.entrypoints.openai.api_server" in serve_command.command(good, "h", 1, None)
    assert "transformers.cli.transformers" in serve_command.command(bad, "h", 1, None)
    with pytest.raises(ModelError, match="vLLM does not run it: q_proj"):
        serve_command.command(bad, "h", 1, "vllm")
