"""Models of another shape: fewer blocks, narrower ones, alone and in chains, of several families.

``apply`` ends with ``verify``: plain transformers, in a process without this library, loaded the
folder, gave the logits that the model had in memory, and generated where it can.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from safetensors.torch import load_file

import compress
from compress import recipe as recipes
from compress import run as runs
from compress.errors import CompressError, ModelError, RecipeError
from compress.preflight import preflight
from compress.source import Source

Apply = Callable[..., Path]
Sources = Callable[..., Path]
DEPTH = {"use": "depth", "amount": 0.5}
MLP = {"use": "width", "targets": ["mlp"]}
HEADS = {"use": "width", "targets": ["attention"], "amount": 0.5}
BOTH = {"use": "width", "amount": 0.5}
UNEVEN = {"use": "width", "targets": ["mlp"], "allocation": "error", "multiple": 16}
DISTILL = {"use": "distill", "steps": 4, "samples": 8, "length": 16, "batch": 4}
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}
HEADED = {"llama": GROUPED, "gpt2": {"n_head": 4}, "bert": {"num_attention_heads": 4}}


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def parameters(folder: Path) -> int:
    tensors = load_file(folder / "model.safetensors").values()
    return sum(tensor.numel() for tensor in tensors)


def plain(family: str, stage: dict[str, Any]) -> bool:
    """Whether config.json can say the shape: GPT-2 and BERT have no size of a head of its own."""
    return "allocation" not in stage and (family == "llama" or stage in (DEPTH, MLP))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize(
    "stage", [DEPTH, MLP, HEADS, BOTH, UNEVEN], ids=["depth", "mlp", "heads", "both", "uneven"]
)
def test_shapes(family: str, stage: dict[str, Any], apply: Apply, source: Sources) -> None:
    model = source(family, **HEADED[family])
    folder = apply(model, [stage], calibrated=True)
    record = models.record(folder)
    assert record["storage"] == ("dense" if plain(family, stage) else "modelling file")
    assert models.loaded_difference(folder) < 1e-4
    assert parameters(folder) < parameters(model)
    assert record["parameters"] < record["base"]["parameters"]
    recipe = recipes.load_one({"model": str(model), "stages": [stage]})
    if stage is not UNEVEN:
        assert record["bytes"]["ideal"] == preflight(recipe, Source(model)).model_after
    loaded = compress.load(folder)
    if loaded.can_generate() and family != "bert":
        out = loaded.generate(torch.arange(5)[None], max_new_tokens=5, do_sample=False)
        assert out.shape == (1, 10)


def test_grouped_heads_go_together_and_a_llama_becomes_a_mistral(
    apply: Apply, source: Sources
) -> None:
    model = source("llama", num_attention_heads=8, num_key_value_heads=4)
    folder = apply(model, [HEADS], calibrated=True)
    made = config(folder)
    assert (made["num_attention_heads"], made["num_key_value_heads"]) == (4, 2)
    assert (made["model_type"], made["head_dim"]) == ("llama", 8)  # 4 divides 64
    folder = apply(model, [{**HEADS, "amount": 0.25}], "mistral", calibrated=True)
    made = config(folder)
    assert (made["model_type"], made["architectures"]) == ("mistral", ["MistralForCausalLM"])
    assert made["num_attention_heads"] == 6  # does not divide 64
    assert made["sliding_window"] is None
    assert models.record(folder)["storage"] == "dense"


def test_removed_channels_were_the_same_everywhere(apply: Apply, source: Sources) -> None:
    """Without compensation the rows and columns that stay are rows and columns of the original."""
    model = source("llama", **GROUPED)
    folder = apply(model, [{**BOTH, "compensate": False}], calibrated=True)
    old, new = load_file(model / "model.safetensors"), load_file(folder / "model.safetensors")
    for layer in range(2):
        start = f"model.layers.{layer}."
        for reader, makers, size in (
            ("mlp.down_proj", ["mlp.up_proj", "mlp.gate_proj"], 1),
            ("self_attn.o_proj", ["self_attn.q_proj"], 16),
        ):
            before, after = old[f"{start}{reader}.weight"], new[f"{start}{reader}.weight"]
            places = [
                next(i for i in range(before.shape[1]) if torch.equal(before[:, i], column))
                for column in after.T
            ]
            assert places == sorted(places)
            assert len(places) == before.shape[1] // 2
            assert all(p % size == i % size for i, p in enumerate(places))
            for maker in makers:
                rows = old[f"{start}{maker}.weight"][places]
                assert torch.equal(new[f"{start}{maker}.weight"], rows)


def test_dropped_blocks_leave_the_others_as_they_were(apply: Apply, source: Sources) -> None:
    model = source("llama", num_hidden_layers=3)
    stage = {"use": "depth", "amount": 0.3, "blocks": [1], "repair": False}
    folder = apply(model, [stage], calibrated=True)
    old, new = load_file(model / "model.safetensors"), load_file(folder / "model.safetensors")
    for name, tensor in new.items():
        assert torch.equal(tensor, old[name.replace("layers.1.", "layers.2.")])
    assert models.record(folder)["stages"][0]["dropped"] == [1]


def test_kl_decides_no_worse_than_influence_and_repairs_only_help(
    apply: Apply, source: Sources
) -> None:
    model = source("llama", num_hidden_layers=4)
    found = {}
    for choose in ("kl", "influence"):
        stage = {"use": "depth", "amount": 0.25, "choose": choose, "shortlist": 4}
        folder = apply(model, [stage], choose, calibrated=True)
        found[choose] = models.record(folder)["stages"][0]
    assert found["kl"]["repair"][0]["kl_before"] == pytest.approx(found["kl"]["kl"][0], abs=1e-4)
    least = [stage["repair"][0]["kl_before"] for stage in found.values()]
    assert least[0] <= least[1] + 1e-6
    for stage in found.values():
        for one in stage["repair"]:
            assert one["kept"] is (one["kl"] < one["kl_before"])
    assert any(one["kept"] for one in found["kl"]["repair"])


@pytest.mark.parametrize(
    "stages",
    [
        [DEPTH, MLP, DISTILL, {"use": "gptq", "group": 32}],
        [UNEVEN, DEPTH, {"use": "svd", "ratio": 0.5}],
        [DISTILL, HEADS, {"use": "rtn", "group": 32}],
    ],
    ids=["healed and packed", "uneven and factors", "heads after training"],
)
def test_chains(stages: list[dict[str, Any]], apply: Apply, source: Sources) -> None:
    model = source("llama", num_hidden_layers=3, **GROUPED)
    folder = apply(model, stages, calibrated=True)
    assert models.loaded_difference(folder) < 5e-3
    record = models.record(folder)
    assert [stage["use"] for stage in record["stages"]] == [stage["use"] for stage in stages]
    names = {site["name"] for site in record["sites"]}
    assert all(f"layers.{record['stages'][0].get('layers', 3)}" not in name for name in names)
    assert record["base"]["model"] == str(model)


def test_a_killed_run_goes_on_with_the_smaller_model(
    apply: Apply, source: Sources, text: str, tmp_path: Path
) -> None:
    model = source("llama", num_hidden_layers=3, **GROUPED)
    stages = [DEPTH, MLP, {"use": "rtn", "bits": 8, "group": 32}]
    whole = apply(model, stages, "whole", calibrated=True)
    recipe = recipes.load_one(
        {
            "model": str(model),
            "calibration": {"data": text, "samples": 16},
            "stages": stages,
        }
    )
    out = tmp_path / "result" / "whole"
    models.killed(recipe, out, ("depth", 1), ("width", 1), ("rtn", 2))
    runs.apply(recipe, out)
    assert models.digests(out) == models.digests(whole)


@pytest.mark.parametrize(
    ("family", "stage", "message"),
    [
        ("t5", DEPTH, "several lists of layers"),
        ("t5", HEADS, "2 o_proj"),
        ("neox", {"use": "residual", "rank": 2}, "cannot follow stages.0"),
    ],
)
def test_refusals_before_any_work(
    family: str, stage: dict[str, Any], message: str, source: Sources
) -> None:
    stages = [MLP, stage] if stage["use"] == "residual" else [stage]
    recipe = recipes.load_one({"model": str(source(family)), "stages": stages})
    with pytest.raises(CompressError, match=message):
        preflight(recipe, Source(source(family)))


def test_an_amount_of_nothing_is_refused(source: Sources) -> None:
    for stage in ({**DEPTH, "amount": 0.1}, {**HEADS, "amount": 0.1}):
        recipe = recipes.load_one({"model": str(source("llama")), "stages": [stage]})
        with pytest.raises(RecipeError, match="nothing goes"):
            preflight(recipe, Source(source("llama")))


def test_half_an_mlp_is_refused(source: Sources) -> None:
    stage = {"use": "width", "targets": ["down_proj"]}
    recipe = recipes.load_one({"model": str(source("llama")), "stages": [stage]})
    with pytest.raises(RecipeError, match="the whole mlp of a layer"):
        preflight(recipe, Source(source("llama")))


def test_layers_that_differ_by_their_place_are_not_dropped(apply: Apply, source: Sources) -> None:
    model = source("gpt2", n_layer=3, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ModelError, match="differ by their place"):
        apply(model, [DEPTH], calibrated=True)
