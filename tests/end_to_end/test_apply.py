"""Every built-in compressor on models of every family: the folder it writes, and what is in it.

``apply`` ends with ``verify``: plain transformers, in a process without this library, gave the
logits that the compressor had in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from safetensors.torch import load_file

import compress
from compress.verify import relative_difference

Apply = Callable[..., Path]
Source = Callable[..., Path]
SHORT = {"steps": 6, "samples": 8, "length": 16, "batch": 4}
LORA = {"use": "lora", "rank": 2, **SHORT}
DISTILL = {"use": "distill", **SHORT}
RTN = {"use": "rtn", "group": 32}
# case → (storage, stages). "packed" is compressed-tensors, or the modelling file for Conv1D.
CASES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "magnitude layer": ("dense", [{"use": "magnitude"}]),
    "magnitude row": ("dense", [{"use": "magnitude", "per": "row", "sparsity": 0.25}]),
    "magnitude global": ("dense", [{"use": "magnitude", "per": "global"}]),
    "magnitude 2:4": ("dense", [{"use": "magnitude", "pattern": "2:4"}]),
    **{
        f"rtn {bits} {'symmetric' if symmetric else 'zero-point'}": (
            "packed",
            [{**RTN, "bits": bits, "symmetric": symmetric}],
        )
        for bits in (2, 3, 4, 8)
        for symmetric in (True, False)
    },
    "rtn 64": ("packed", [{"use": "rtn", "group": 64}]),
    "rtn channel": ("packed", [{"use": "rtn", "group": "channel"}]),
    "rtn channel zero-point": ("packed", [{"use": "rtn", "group": "channel", "symmetric": False}]),
    "int8": ("bitsandbytes", [{"use": "int8"}]),
    "nf4": ("bitsandbytes", [{"use": "nf4"}]),
    "nf4 double": ("bitsandbytes", [{"use": "nf4", "double_quant": True}]),
    "svd ratio": ("modelling file", [{"use": "svd", "ratio": 0.5}]),
    "svd rank": ("modelling file", [{"use": "svd", "rank": 4}]),
    "svd energy": ("modelling file", [{"use": "svd", "energy": 0.6}]),
    "lora": ("dense", [LORA]),
    "distill": ("dense", [DISTILL]),
    "svd, rtn": ("modelling file", [{"use": "svd"}, RTN]),
    "magnitude, rtn": ("packed", [{"use": "magnitude"}, RTN]),
    "rtn, lora": ("packed", [{**RTN, "bits": 2}, LORA]),
    "rtn, lora on others": (
        "packed",
        [{**RTN, "bits": 2, "targets": ["mlp"]}, {**LORA, "targets": ["attention"]}],
    ),
    "nf4, lora": ("bitsandbytes", [{"use": "nf4"}, LORA]),
    "magnitude, distill": ("dense", [{"use": "magnitude"}, DISTILL]),
    "svd, distill": ("modelling file", [{"use": "svd"}, DISTILL]),
}
WIDTHS = [c for c in CASES if c.startswith(("rtn 2", "rtn 3", "rtn 8"))]  # tiny models suffice
CONV1D = ("gpt2",)
SMALL_SET = {
    "rtn": ("packed", [RTN]),
    "svd": ("modelling file", [{"use": "svd"}]),
    "magnitude": ("dense", [{"use": "magnitude"}]),
    "int8": ("bitsandbytes", [{"use": "int8"}]),
    "everything": ("modelling file", [{"use": "svd", "targets": ["all"]}, RTN]),
}
# Families whose tables are scaled, shifted or shared, or whose code reads weights.
PECULIAR = ("gemma", "opt", "roberta", "t5", "whisper")
OTHERS = [f for f in models.FAMILIES if f not in ("llama", "gpt2", "bert")]


@pytest.mark.parametrize(
    ("family", "case"),
    [(f, c) for f in ("demo", "gpt2", "bert") for c in CASES if f != "demo" or c not in WIDTHS],
)
def test_every_compressor(family: str, case: str, apply: Apply, source: Source) -> None:
    kind, stages = CASES[case]
    model = source(family)
    folder = apply(model, stages)
    storage = check_folder(folder, model, kind, stages, conv1d=family in CONV1D)
    if len(stages) == 1 and stages[0]["use"] not in ("lora", "distill"):
        check_in_memory(folder, model, stages[0])
        if storage != "bitsandbytes":
            check_errors(folder, model)
    elif family == "gpt2" and len(stages) == 2 and stages[1]["use"] in ("lora", "distill"):
        check_trained(folder, model, stages[1]["use"])


@pytest.mark.parametrize(
    ("family", "case"),
    [
        (family, case)
        for family in OTHERS
        for case in SMALL_SET
        if family in PECULIAR or case in ("rtn", "svd", "magnitude")
    ],
)
def test_other_families(family: str, case: str, apply: Apply, source: Source) -> None:
    kind, stages = SMALL_SET[case]
    if family == "t5" and case == "int8":
        kind = "modelling file"  # transformers keeps T5's wo out of bitsandbytes
    check_folder(apply(source(family), stages), source(family), kind, stages)


@pytest.mark.parametrize("untie", [False, True])
@pytest.mark.parametrize("use", ["rtn", "svd", "magnitude"])
def test_embedding_and_head(use: str, untie: bool, apply: Apply, source: Source) -> None:
    model = source("llama", tie_word_embeddings=True)
    folder = apply(model, [{"use": use, "targets": ["all"]}], untie=untie)
    info = models.record(folder)
    roles = [site["role"] for site in info["sites"] if site["block"] is None]
    assert roles == (["embed", "head"] if untie else ["embed"])
    assert compress.load(folder).config.tie_word_embeddings is not untie
    assert models.loaded_difference(folder) < 5e-3
    if use != "magnitude":
        assert info["bytes"]["disk"] < 0.9 * info["bytes"]["original"]


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_packed_table_stays_plain(symmetric: bool, apply: Apply, source: Source) -> None:
    model = source("llama", tie_word_embeddings=True)
    folder = apply(model, [{**RTN, "targets": ["embed"], "symmetric": symmetric}])
    assert models.record(folder)["storage"] == "compressed-tensors"
    assert models.loaded_difference(folder) < 5e-3


@pytest.mark.parametrize(
    ("stage", "storage"),
    [
        ({"use": "rtn"}, "modelling file"),
        ({"use": "rtn", "symmetric": False}, "modelling file"),
        ({"use": "rtn", "group": "channel"}, "compressed-tensors"),
        ({"use": "nf4"}, "modelling file"),
        ({"use": "int8"}, "bitsandbytes"),
        ({"use": "svd"}, "modelling file"),
    ],
)
def test_widths_that_no_group_divides(
    stage: dict[str, Any], storage: str, apply: Apply, source: Source
) -> None:
    model = source("llama", hidden_size=48, intermediate_size=88)
    folder = apply(model, [stage])
    assert models.record(folder)["storage"] == storage
    remote = storage == "modelling file"
    assert ("AutoTokenizer asks" in (folder / "README.md").read_text()) == remote
    check_in_memory(folder, model, stage)


@pytest.mark.parametrize("family", ["demo", "gpt2", "bert"])
def test_compact_sparse_weights(family: str, apply: Apply, source: Source) -> None:
    stages = [{"use": "magnitude", "sparsity": 0.75, "targets": ["all"]}]
    plain = models.record(apply(source(family), stages, name="plain"))
    folder = apply(source(family), stages, name="compact", storage="compact")
    info = models.record(folder)
    assert (plain["storage"], info["storage"]) == ("dense", "modelling file")
    assert info["bytes"]["disk"] < 0.45 * plain["bytes"]["disk"]
    assert info["bytes"]["ideal"] == plain["bytes"]["ideal"]
    assert info["expected"]["logits"] == plain["expected"]["logits"]
    assert models.loaded_difference(folder) < 5e-2


def test_mixed_stages_of_one_kind_stay_plain(apply: Apply, source: Source) -> None:
    stages = [{**RTN, "targets": ["attention"]}, {**RTN, "bits": 8, "targets": ["mlp"]}]
    info = models.record(apply(source("llama"), stages))
    assert info["storage"] == "compressed-tensors"
    kinds = {(site["role"], site["number"]) for site in info["sites"]}
    assert kinds >= {("q_proj", 0), ("down_proj", 1)}
    assert not kinds & {("q_proj", 1), ("down_proj", 0)}


def test_blocks_and_skip_leave_the_rest_alone(apply: Apply, source: Source) -> None:
    model = source("demo")
    folder = apply(model, [{"use": "magnitude", "blocks": [0, -1], "skip": ["q_proj"]}])
    before, after = load_file(model / "model.safetensors"), load_file(folder / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    names = {site["name"] + ".weight" for site in models.record(folder)["sites"]}
    assert changed == names
    assert {name.split(".")[2] for name in names} == {"0", "5"}
    assert not any("q_proj" in name for name in names)


def check_folder(
    folder: Path, model: Path, kind: str, stages: list[dict[str, Any]], conv1d: bool = False
) -> str:
    """The folder is complete, stored as expected, and loads to what it should; its storage."""
    info = models.record(folder)
    packed = "modelling file" if conv1d else "compressed-tensors"
    storage = packed if kind == "packed" else kind
    assert info["storage"] == storage
    expected = {"config.json", "model.safetensors", "recipe.yaml", "compression.json", "README.md"}
    expected |= {p.name for p in model.iterdir() if p.suffix == ".json"}
    if storage == "modelling file":
        expected |= {"modeling.py", "modeling_compressed.py"}
    adapted = stages[-1]["use"] == "lora" and "targets" not in stages[-1]
    if len(stages) == 2 and adapted and storage != "modelling file":
        expected |= {"adapter_config.json", "adapter_model.safetensors"}
        assert info["loads_with"].endswith("peft")
    assert {p.name for p in folder.iterdir()} == expected
    sizes = info["bytes"]
    assert sizes["disk"] == sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    if any(site["packs"] for site in info["sites"]):
        assert sizes["disk"] < sizes["original"]
        assert sum(s["bytes"] for s in info["sites"]) < sum(
            s["bytes_before"] for s in info["sites"]
        )
    dtype = {"float32": 5e-3, "bfloat16": 5e-2}[info["expected"]["dtype"]]
    assert models.loaded_difference(folder) < (0.1 if stages[0]["use"] == "int8" else dtype)
    return storage


def check_in_memory(folder: Path, model: Path, stage: dict[str, Any]) -> None:
    """The same compressor on the model in memory gives the logits of the folder."""
    loaded = compress.load(model)
    parameters = {key: value for key, value in stage.items() if key != "use"}
    compress.compressor(stage["use"], **parameters).apply(loaded)
    ours = models.logits(loaded, folder)
    close = 5e-2 if models.record(folder)["expected"]["dtype"] == "bfloat16" else 5e-3
    assert relative_difference(ours, models.record(folder)["expected"]["logits"]) < close


def check_errors(folder: Path, model: Path) -> None:
    """‖W − Ŵ‖² / ‖W‖² of the weights that load is what ``compression.json`` says."""
    before, after = compress.load(model), compress.load(folder)
    for site in models.record(folder)["sites"][::5]:
        W = before.get_submodule(site["name"]).weight.detach().float()
        change = W - after.get_submodule(site["name"]).weight.detach().float()
        error = (change.square().sum() / W.square().sum()).item()
        assert error == pytest.approx(site["relative_error"], rel=0.05, abs=2e-5)
        assert error > 0


def check_trained(folder: Path, model: Path, use: str) -> None:
    """The training changed something, and it reached the folder."""
    before = load_file(model / "model.safetensors")
    after = load_file(folder / "model.safetensors")
    if (folder / "adapter_model.safetensors").exists():
        updates = load_file(folder / "adapter_model.safetensors")
        assert all(t.any() for name, t in updates.items() if "lora_B" in name)
    elif use == "distill":
        assert any(not torch.equal(before[k], after[k]) for k in after if "norm" in k or "ln_" in k)
    elif any(".term1" in name for name in after):
        assert all(t.any() for name, t in after.items() if name.endswith("term1_left_weight"))
    else:  # merged into the matrices that were dense
        names = [
            n for n in after if n in before and "weight" in n and ("attn" in n or "query" in n)
        ]
        assert any(not torch.equal(before[n], after[n]) for n in names)
