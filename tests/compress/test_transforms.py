"""Scales: the model stays the same, and it or a turned one becomes easier to round."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import normal
from torch import Tensor, nn

import compress
from compress import recipe as recipes
from compress import run as runs
from compress.compressors.base import SharedInput
from compress.compressors.quantization.awq import AWQ
from compress.compressors.quantization.rtn import RTN
from compress.compressors.quantization.smoothquant import SmoothQuant
from compress.compressors.quantization.w8a8 import W8A8
from compress.errors import DataError
from compress.plain_load import observe
from compress.verify import Verifier, probe_inputs, relative_difference
from compress.weights.modeling_compressed import round_tokens
from eval.benchmarks.outlier_model import plant

sys.path.append(str(Path(__file__).parents[1] / "end_to_end"))
import models

Apply = Callable[..., Path]
AWQ_RTN = [{"use": "awq", "bits": 3, "group": 32}, {"use": "rtn", "bits": 3, "group": 32}]


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier() as started:
        yield started


@pytest.fixture
def apply(text: str, tmp_path: Path) -> Apply:
    """``apply(model, stages)`` → the checkpoint folder, not verified."""
    numbers = itertools.count()

    def applied(model: Path, stages: list[dict[str, Any]], **keys: Any) -> Path:
        calibration = {"data": text, "samples": 8}
        recipe = {"model": str(model), "calibration": calibration, "stages": stages, **keys}
        out = tmp_path / f"out-{next(numbers)}"
        runs.apply(recipes.load_one(recipe), out, verify=False)
        return out

    return applied


def shared(rows: int = 48, width: int = 96) -> SharedInput:
    """Inputs of which a few are many times as large, read by two matrices."""
    x = normal(512, width, scale=1)
    x[:, ::17] *= 30
    matrices = [normal(rows, width, seed=1), normal(2 * rows, width, seed=2)]
    return SharedInput(matrices, x.T @ x / len(x), x.abs().mean(0), x.abs().amax(0))


def logits(folder: Path) -> list[float]:
    model = compress.load(folder)
    return observe(model, probe_inputs(model))


# The methods by themselves


def test_awq_is_the_best_of_the_grid() -> None:
    inputs = shared()
    rounding = RTN(bits=3, group=32, symmetric=True)

    def error(s: Tensor) -> float:
        total = 0.0
        for W in inputs.matrices:
            D = rounding(W * s).dense() / s - W
            total += float((D @ inputs.H @ D.T).trace() / (W @ inputs.H @ W.T).trace())
        return total

    columns = torch.cat(inputs.matrices).square().mean(0).sqrt()
    tried = [error(torch.ones_like(columns))]
    for alpha in (k / 5 for k in range(6)):
        for s in (inputs.mean**alpha, inputs.mean**alpha / columns ** (1 - alpha)):
            tried.append(error(s / (s.max() * s.min()) ** 0.5))
    found = error(AWQ(bits=3, group=32, steps=5, symmetric=True).scale(inputs))
    assert found == pytest.approx(min(tried), rel=1e-4)
    assert found < 0.7 * tried[0], "the outliers were worth no scale"


def test_awq_leaves_even_inputs_alone() -> None:
    """Columns of one size read inputs of one size: every scale that is tried is 1."""
    one, signs = torch.ones(96), normal(48, 96).sign()
    assert torch.equal(AWQ().scale(SharedInput([signs], torch.eye(96), one, one)), one)


def test_smoothquant_by_its_formula() -> None:
    inputs = shared()
    inputs.most[3] = 0
    inputs.matrices[0][:, 5] = inputs.matrices[1][:, 5] = 0
    scale = SmoothQuant(alpha=0.7).scale(inputs)
    for j in range(len(scale)):
        weight = max(float(W[:, j].abs().max()) for W in inputs.matrices)
        wanted = 1.0 if j in (3, 5) else float(inputs.most[j]) ** 0.7 / weight**0.3
        assert float(scale[j]) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("numbers", [8, 4, "float8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_round_as_compressed_tensors_does(dtype: torch.dtype, numbers: int | str) -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils.helpers import compute_dynamic_scales_and_zp

    x = normal(3, 5, 64, scale=2).to(dtype)
    x[:, :, 7] *= 100
    x[1, 2] = 0
    kind: dict[str, Any] = {"num_bits": 8, "type": "float"}
    if isinstance(numbers, int):
        kind = {"num_bits": numbers, "type": "int"}
    args = QuantizationArgs(**kind, strategy="token", dynamic=True, symmetric=True)
    scale, zero = compute_dynamic_scales_and_zp(x, args, nn.Linear(1, 1))
    rounded = round_tokens(x, numbers)
    assert torch.equal(rounded, fake_quantize(x, scale, zero, args))
    assert not torch.equal(rounded, x)


def test_the_gradient_passes_the_rounding() -> None:
    x = normal(2, 8).requires_grad_()
    round_tokens(x, 4).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones(2, 8))


def test_w8a8_weights_are_rtn_at_8_bits() -> None:
    W = normal(24, 60)
    made, plain = W8A8()(W), RTN(bits=8, group="channel", symmetric=True)(W)
    assert torch.equal(made.dense(), plain.dense())
    assert made.spec["activations"] == 8


# The model stays the same


@pytest.mark.parametrize(
    ("family", "use"),
    [("llama", "awq"), ("gpt2", "awq"), ("gemma", "smoothquant"), ("t5", "smoothquant")],
)
def test_scaled_models_stay_the_same(family: str, use: str, apply: Apply, tmp_path: Path) -> None:
    model = models.save(tmp_path / "model", family)
    out = apply(model, [{"use": use}])
    assert relative_difference(logits(out), logits(model)) < 1e-4
    old, new = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    sites = models.record(out)["sites"]
    assert len(changed) > len(sites) / 2
    assert {site["method"] for site in sites} <= {use, "as it was"}
    assert all(old[name].dtype == new[name].dtype for name in old)


def test_what_no_wire_leads_to_is_left_and_named(apply: Apply, tmp_path: Path) -> None:
    model = models.save(tmp_path / "model", "bert")
    out = apply(model, [{"use": "smoothquant"}])
    method = {site["role"]: site["method"] for site in models.record(out)["sites"]}
    assert method["o_proj"] == method["v_proj"] == "smoothquant"  # v_proj is the producer
    assert method["q_proj"] == method["up_proj"] == method["down_proj"] == "as it was"


def test_a_wire_needs_all_its_readers(apply: Apply, tmp_path: Path) -> None:
    """gate_proj is not taken, so up_proj cannot be scaled; down_proj can."""
    model = models.save(tmp_path / "model", "llama")
    out = apply(model, [{"use": "smoothquant", "targets": ["up_proj", "down_proj"]}])
    old, new = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    name = "model.layers.0.post_attention_layernorm.weight"
    assert torch.equal(old[name], new[name])
    assert not torch.equal(old[key := "model.layers.0.mlp.down_proj.weight"], new[key])


def test_scales_need_text(tmp_path: Path) -> None:
    model = models.save(tmp_path / "model", "llama")
    recipe = recipes.load_one({"model": str(model), "stages": [{"use": "awq"}]})
    with pytest.raises(DataError, match=r"awq needs text: set calibration\.data"):
        runs.apply(recipe, tmp_path / "out", verify=False)


@pytest.mark.parametrize("first", ["hadamard", "smoothquant"])
def test_resumed_runs_give_the_same_bytes(first: str, text: str, tmp_path: Path) -> None:
    model = models.save(tmp_path / "model", "llama")
    stages = [{"use": first}, {"use": "rtn"}]
    calibration = {"data": text, "samples": 4}
    recipe = recipes.load_one({"model": str(model), "calibration": calibration, "stages": stages})
    events = runs.run(recipe, tmp_path / "out", verify=False)
    for _ in range(2):
        next(events)
    events.close()
    runs.apply(recipe, tmp_path / "out", verify=False)
    runs.apply(recipe, tmp_path / "clean" / "out", verify=False)
    assert models.digests(tmp_path / "out") == models.digests(tmp_path / "clean" / "out")


# It becomes easier to round


def test_outliers_are_what_they_help_against(apply: Apply, tmp_path: Path) -> None:
    model = plant(models.save(tmp_path / "model", "llama"))
    before = logits(model)

    def wrong(*stages: dict[str, Any]) -> float:
        return relative_difference(logits(apply(model, list(stages))), before)

    plain, rtn = wrong({"use": "w8a8"}), wrong(AWQ_RTN[1])
    assert wrong({"use": "smoothquant"}, {"use": "w8a8"}) < 0.5 * plain
    assert wrong({"use": "hadamard"}, {"use": "w8a8"}) < 0.5 * plain
    assert wrong({"use": "hadamard"}, AWQ_RTN[1]) < 0.9 * rtn
    assert wrong(*AWQ_RTN) < 0.9 * rtn


@pytest.mark.parametrize("family", ["gpt2", "t5", "llama", "opt"])
def test_w8a8_loads_as_it_was_in_memory(family: str, verifier: Verifier, tmp_path: Path) -> None:
    """compressed-tensors rounds inputs, those of OPT's MLPs as one; so does the modelling file."""
    model = models.save(tmp_path / "model", family)
    model = plant(model) if family == "llama" else model
    recipe = recipes.load_one({"model": str(model), "stages": [{"use": "w8a8"}]})
    runs.apply(recipe, tmp_path / "out", verifier=verifier)
    if family in ("gpt2", "t5"):  # transformers keeps T5's wo out of quantizers' hands
        assert models.record(tmp_path / "out")["storage"] == "modelling file"
    else:
        assert models.loaded_difference(tmp_path / "out") < 2e-3  # nothing if all round alike
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["quantization_config"]["format"] == "int-quantized"
    changed = relative_difference(logits(tmp_path / "out"), logits(model))
    assert 1e-5 < changed < 1
