"""Size, memory, speed and generation against what they should be, and metrics as plug-ins."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tiny import DEMO, SMALL, context, mean, save

from compress.errors import ModelError, PluginError, RecipeError
from eval import metrics
from eval.metrics import memory
from eval.metrics.base import NotMeasurable, load_model
from eval.metrics.generation import Generation, leading_share
from eval.metrics.memory import PeakMemory
from eval.metrics.size import BitsPerParam, SizeBytes, count_parameters
from eval.metrics.speed import Decode, Prefill, take_turns, threads


def test_size_is_what_lies_on_disk(folders: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(folders["llama"], tmp_path, dirs_exist_ok=True)
    save_file({"a": torch.zeros(100)}, tmp_path / "adapter_model.safetensors")
    expected = sum(
        os.path.getsize(tmp_path / name)
        for name in ("model.safetensors", "adapter_model.safetensors")
    )
    assert SizeBytes().measure(context(str(tmp_path), None)).value == expected


def test_bits_per_param_counts_the_original(folders: dict[str, str], tmp_path: Path) -> None:
    plain = context(folders["llama"], None)
    count = plain.model.num_parameters()
    size = os.path.getsize(Path(folders["llama"]) / "model.safetensors")
    assert BitsPerParam().measure(plain).value == 8 * size / count

    save_file({"packed": torch.zeros(1000, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    size = os.path.getsize(tmp_path / "model.safetensors")
    small = context(str(tmp_path), None, original=folders["llama"])
    assert BitsPerParam().measure(small).value == 8 * size / count
    (tmp_path / "compression.json").write_text(json.dumps({"base": {"parameters": 500}}))
    assert BitsPerParam().measure(small).value == 8 * size / 500
    (tmp_path / "compression.json").write_text('{"format": 1}')
    with pytest.raises(NotMeasurable, match="--baseline"):
        BitsPerParam().measure(context(str(tmp_path), None))


def test_parameters_are_counted_as_the_model_counts_them(
    folders: dict[str, str], tmp_path: Path
) -> None:
    assert count_parameters(DEMO) == load_model(str(DEMO)).num_parameters()
    gpt2 = load_model(folders["gpt2"])
    tensors = {name: value.clone() for name, value in gpt2.state_dict().items()}
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8)  # as the published one has it
    tensors["rotary.inv_freq"], tensors["ids"] = torch.ones(8), torch.arange(8)
    assert "lm_head.weight" in tensors
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true}')
    assert count_parameters(tmp_path) == gpt2.num_parameters()


def test_peak_memory_holds_the_weights(tmp_path: Path) -> None:
    big = transformers.LlamaConfig(**SMALL | {"hidden_size": 2048, "num_hidden_layers": 1},
                                   intermediate_size=64, tie_word_embeddings=False)  # fmt: skip
    given = context(save(tmp_path, "LlamaForCausalLM", big, tokenizer=False), None)
    row = PeakMemory().measure(given)
    weights = os.path.getsize(tmp_path / "model.safetensors")
    assert row.value is not None
    assert weights < row.value < 5 * weights
    assert row.detail["forward"] is True
    assert "model" not in given.__dict__  # not loaded in this process


def test_peak_memory_of_the_original_is_measured_once(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    def fresh(name: str, length: int) -> dict[str, Any]:
        started.append(name)
        return {"rss": 100 * len(started), "gpu": None, "forward": True}

    monkeypatch.setattr(memory, "_fresh_process", fresh)
    first = context(folders["llama"], None, original=folders["gpt2"])
    second = context(folders["other llama"], None, original=folders["gpt2"])
    second.shared = first.shared
    assert PeakMemory().measure(first).detail == {"forward": True, "original": 200, "ratio": 0.5}
    assert PeakMemory().measure(second).detail == {"forward": True, "original": 200, "ratio": 1.5}
    assert started == [folders["llama"], folders["gpt2"], folders["other llama"]]


def test_peak_memory_names_what_does_not_load(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "CHILD", "raise SystemExit('weights are torn')")
    with pytest.raises(ModelError, match=r"llama: .*fresh process \(weights are torn\)"):
        PeakMemory().measure(context(folders["llama"], None))


def test_models_of_images_are_given_an_image(folders: dict[str, str]) -> None:
    model = load_model(folders["vit"])
    output = memory._one_input(model, 12).call(model, slice(None))
    assert output.logits.shape == (1, 2)


def test_speed_takes_turns() -> None:
    calls: list[str] = []

    def run(name: str) -> Any:
        return lambda: calls.append(name) or float(len(calls))

    seconds = take_turns({"a": run("a"), "b": run("b")}, repeats=2)
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert seconds == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def test_threads_are_given_back() -> None:
    def fail() -> None:
        with threads(2):
            assert torch.get_num_threads() == 2
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("metric", "tokens"),
    [(Prefill(sizes=((2, 10),), repeats=3), 20), (Decode(sizes=((2, 5),), repeats=3), 32)],
)
def test_speed_is_tokens_over_median_seconds(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch, metric: Any, tokens: int
) -> None:
    clock = iter([9, 9, 1, 10, 4, 40, 2, 10])  # one warm-up each, then the checkpoint leads
    monkeypatch.setattr("eval.metrics.speed.timed", lambda model, work: [work(), next(clock)][1])
    given = context(folders["llama"], None, original=folders["other llama"])
    row = metric.measure(given)
    assert row.value == tokens / 2
    spread = {
        "median": tokens / 2, "low": 3 * tokens / 8, "high": 3 * tokens / 4, "ratio": 10,
        "original": tokens / 10, "original_low": tokens / 16, "original_high": tokens / 10,
    }  # fmt: skip
    batch, prompt = metric.sizes[0]
    (size,) = row.detail.pop("sizes")
    assert size == pytest.approx({"batch": batch, "prompt": prompt} | spread)
    assert row.detail == pytest.approx(spread)
    assert row.setup["threads"] == 1
    assert row.setup["repeats"] == 3


def test_decode_feeds_one_token_at_a_time(folders: dict[str, str]) -> None:
    given = context(folders["llama"], None)
    lengths: list[int] = []
    given.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    row = Decode(sizes=((1, 7), (2, 5), (1, 7)), repeats=1, steps=3).measure(given)
    assert lengths == 2 * [7, 1, 1, 1] + 2 * [5, 1, 1, 1]
    assert row.setup["sizes"] == [[1, 7], [2, 5]]
    assert [size["batch"] for size in row.detail["sizes"]] == [1, 2]
    assert Decode(sizes=((1, 700),), repeats=1, steps=50).setup(given)["sizes"] == [[1, 12]]


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_generation_is_greedy(folders: dict[str, str], text: str, name: str) -> None:
    given = context(folders[name], text, length=16)
    row = Generation(tokens=5).measure(given)
    assert row.value is None
    prompt = given.windows.tokens[0, :12]
    written = torch.tensor([0]) if name == "t5" else prompt
    with torch.no_grad():
        for _ in range(5):
            inputs = {"input_ids": prompt[None], "decoder_input_ids": written[None]}
            if name == "llama":
                inputs = {"input_ids": written[None]}
            written = torch.cat([written, given.model(**inputs).logits[0, -1:].argmax(-1)])
    assert row.detail["texts"][0] == {
        "prompt": given.tokenizer.decode(prompt), "completion": given.tokenizer.decode(written[-5:])
    }  # fmt: skip


def test_generation_against_the_original(folders: dict[str, str], text: str) -> None:
    same = context(folders["llama"], text, original=folders["llama"])
    assert Generation().measure(same).value == 1
    given = context(folders["llama"], "demo", original=folders["other llama"])
    row = Generation().measure(given)
    assert [text["prompt"] for text in row.detail["texts"]][2] == "for i in range("
    assert row.value == mean(row.samples)
    assert row.value < 1


@pytest.mark.parametrize(
    ("tokens", "expected", "share"),
    [([1, 2], [1, 2], 1), ([1, 2, 3, 4], [1, 9, 3, 4], 0.25), ([1], [1, 2], 0.5), ([], [], 1)],
)
def test_leading_share(tokens: list[int], expected: list[int], share: float) -> None:
    assert leading_share(tokens, expected) == share


def plug_in(root: Path, value: str, package: str = "other") -> None:
    info = root / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[eval.metrics]\nblocks = {value}\n")


def test_a_plug_in_is_found(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "blocks_metric.py").write_text(
        "from eval.metrics.base import Metric\n"
        "class Blocks(Metric):\n"
        "    name, unit = 'blocks', 'blocks'\n"
        "    def measure(self, context):\n"
        "        return self.result(context, context.config['num_hidden_layers'])\n"
    )
    plug_in(tmp_path, "blocks_metric:Blocks")
    monkeypatch.syspath_prepend(tmp_path)
    assert "blocks" in metrics.available()
    assert metrics.get("blocks").measure(context(folders["llama"], None)).value == 2


def test_a_broken_plug_in_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(tmp_path, "absent_module:Blocks")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PluginError, match="absent_module:Blocks, package other"):
        metrics.get("blocks")
    plug_in(tmp_path, "builtins:dict", package="third")
    with pytest.raises(PluginError, match="offered twice"):
        metrics.get("blocks")
    shutil.rmtree(tmp_path / "other-1.0.dist-info")
    with pytest.raises(PluginError, match="not a subclass"):
        metrics.get("blocks")


def test_an_unknown_metric_gets_a_suggestion() -> None:
    with pytest.raises(RecipeError, match="did you mean 'perplexity'"):
        metrics.get("preplexity")


def test_every_metric_is_registered_under_its_own_name() -> None:
    for name in metrics.DEFAULT:
        assert metrics.get(name).name == name
