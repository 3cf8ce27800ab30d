"""The quality metrics against slow computations by hand, on tiny models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import DEMO, LLAMA, context, mean, save
from torch import Tensor

from compress.data import Windows
from compress.errors import DataError, ModelError
from compress.objective import IGNORED, masked
from eval.metrics import scores as scores_module
from eval.metrics.base import Context, NotMeasurable, load_model
from eval.metrics.generation import Generation
from eval.metrics.quality import KL, NLL, BitsPerByte, Perplexity, Top1Agreement, ratio
from eval.metrics.speed import Decode, Prefill


@torch.no_grad()
def log_p(model: Any, prefix: Tensor) -> Tensor:
    """log p of the token after ``prefix``, float64 [vocabulary]."""
    return model(prefix[None]).logits[0, -1].double().log_softmax(-1)


def by_hand(model: Any, tokens: Tensor) -> list[list[float]]:
    """−log p of each token but the first, window by window, from its prefix alone."""
    return [
        [-log_p(model, window[:i])[window[i]].item() for i in range(1, len(window))]
        for window in tokens
    ]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_nll_is_the_mean_over_a_loop_by_hand(folders: dict[str, str], text: str, name: str) -> None:
    given = context(folders[name], text)
    row = NLL().measure(given)
    losses = by_hand(given.model, given.windows.tokens)
    assert row.samples == pytest.approx([mean(window) for window in losses], rel=1e-5)
    assert row.value == pytest.approx(mean([x for window in losses for x in window]), rel=1e-5)
    assert row.stderr == pytest.approx(torch.tensor(row.samples).std().item() / 2, rel=1e-4)
    assert row.data["windows"] == 4
    assert row.data["hash"] == given.windows.hash


def test_perplexity_is_exp_of_nll(folders: dict[str, str], text: str) -> None:
    given = context(folders["llama"], text)
    nll, perplexity = NLL().measure(given), Perplexity().measure(given)
    assert nll.value is not None
    assert nll.stderr is not None
    assert perplexity.value == pytest.approx(math.exp(nll.value))
    assert perplexity.stderr == pytest.approx(math.exp(nll.value) * nll.stderr)


def test_perplexity_of_a_broken_model_is_infinite(folders: dict[str, str], text: str) -> None:
    given = context(folders["llama"], text)
    with torch.no_grad():
        given.model.lm_head.weight.mul_(1e6)
    assert Perplexity().measure(given).value == math.inf


@pytest.mark.parametrize("stride", [1, 5, 11])
def test_sliding_windows_predict_their_last_tokens(
    folders: dict[str, str], text: str, stride: int
) -> None:
    given = context(folders["llama"], text, stride=stride, samples=2)
    row = NLL().measure(given)
    running = given.windows.tokens.reshape(-1)
    expected = []
    for start in range(0, len(running) - 12 + 1, stride):
        window = running[start : start + 12]
        expected.append(mean(by_hand(given.model, window[None])[0][-stride:]))
    assert row.samples == pytest.approx(expected, rel=1e-5)
    assert row.value == pytest.approx(mean(expected), rel=1e-5)
    assert row.setup["stride"] == stride


@pytest.mark.parametrize("stride", [0, 12])
def test_a_stride_must_fit_the_window(folders: dict[str, str], text: str, stride: int) -> None:
    with pytest.raises(NotMeasurable, match="from 1 to 11"):
        NLL().measure(context(folders["llama"], text, stride=stride))


def test_bits_per_byte_by_hand(folders: dict[str, str], text: str) -> None:
    given = context(folders["llama"], text)
    row = BitsPerByte().measure(given)
    bits = sum(x for window in by_hand(given.model, given.windows.tokens) for x in window)
    size = sum(len(given.tokenizer.decode(window[1:]).encode()) for window in given.windows.tokens)
    assert row.value == pytest.approx(bits / math.log(2) / size, rel=1e-5)
    assert mean(row.samples) == pytest.approx(row.value)


def test_ratio_has_the_standard_error_of_a_ratio_estimator() -> None:
    values, weights = torch.tensor([2.0, 3.0, 7.0]).double(), torch.tensor([1.0, 2.0, 3.0]).double()
    residuals = [2 - 2 * 1, 3 - 2 * 2, 7 - 2 * 3]
    expected = math.sqrt(3 / 2 * sum(x * x for x in residuals)) / 6
    assert ratio(values, weights) == (pytest.approx(2.0), pytest.approx(expected))
    assert ratio(values[:1], weights[:1]) == (2.0, None)


def test_kl_and_agreement_with_itself(folders: dict[str, str], text: str) -> None:
    copy = context(folders["llama"], text, original=folders["llama"])
    copy.load_original = load_model
    assert KL().measure(copy).value == 0
    assert Top1Agreement().measure(copy).value == 1


def test_kl_and_agreement_by_hand(folders: dict[str, str], text: str) -> None:
    given = context(folders["llama"], text, original=folders["other llama"])
    kl, agree = [], []
    for window in given.windows.tokens:
        pairs = [
            (log_p(given.reference, window[:i]), log_p(given.model, window[:i]))
            for i in range(1, len(window))
        ]
        kl.append(mean([(p.exp() * (p - q)).sum().item() for p, q in pairs]))
        agree.append(mean([float(p.argmax() == q.argmax()) for p, q in pairs]))
    assert KL().measure(given).samples == pytest.approx(kl, rel=1e-4)
    assert Top1Agreement().measure(given).samples == pytest.approx(agree)


def test_agreement_counts_only_equal_choices(folders: dict[str, str], text: str) -> None:
    given = context(folders["llama"], text, original=folders["other llama"])
    given.model.load_state_dict(given.reference.state_dict())
    with torch.no_grad():  # the head's rows move by one: no choice can stay the same
        given.model.lm_head.weight.copy_(given.model.lm_head.weight.roll(1, 0))
    assert Top1Agreement().measure(given).value == 0


def test_samples_are_paired(folders: dict[str, str], text: str) -> None:
    """Sample i of every checkpoint is about window i, whatever the batch."""
    one = NLL().measure(context(folders["llama"], text))
    two = NLL().measure(context(folders["other llama"], text, batch=1))
    assert one.data == two.data
    assert [one.value, two.value] == [pytest.approx(mean(row.samples)) for row in (one, two)]
    alone = context(folders["other llama"], text)
    whole = alone.windows
    alone.__dict__["windows"] = Windows(
        whole.tokens[2:3], whole.token_bytes[2:3], whole.name, whole.part, whole.hash
    )
    assert NLL().measure(alone).samples == pytest.approx(two.samples[2:3])


def test_chunks_change_nothing(
    folders: dict[str, str], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows() -> list[list[float]]:
        given = context(folders["llama"], text, original=folders["other llama"])
        return [metric().measure(given).samples for metric in (NLL, KL, Top1Agreement)]

    before = rows()
    monkeypatch.setattr(scores_module, "CHUNK", 3 * 2048)
    monkeypatch.setattr(scores_module, "LOGITS", 2 * 12 * 2048)
    for old, new in zip(before, rows(), strict=True):
        assert new == pytest.approx(old, rel=1e-5)


def masked_context(folders: dict[str, str], text: str, **settings: Any) -> Context:
    given = context(folders["bert"], text, **{"length": 40} | settings)
    given.tokenizer.mask_token = "~"
    given.tokenizer.cls_token, given.tokenizer.sep_token = "^", "`"
    return given


def test_masked_tokens_are_drawn_by_the_seed(folders: dict[str, str], text: str) -> None:
    given = masked_context(folders, text)
    tokens, tokenizer = given.windows.tokens, given.tokenizer
    one, two, three = (
        masked(tokens, given.windows.token_bytes, tokenizer, seed) for seed in (0, 0, 1)
    )
    assert one.targets is not None
    assert two.targets is not None
    assert three.targets is not None
    assert torch.equal(one.targets, two.targets)
    assert not torch.equal(one.targets, three.targets)
    hidden = one.targets != IGNORED
    assert hidden.sum(1).tolist() == [6] * 4
    inputs = one.inputs["input_ids"]
    assert (inputs[hidden] == tokenizer.mask_token_id).all()
    assert torch.equal(one.targets[hidden], tokens[hidden])
    assert (inputs[:, 0] == tokenizer.cls_token_id).all()
    assert (inputs[:, -1] == tokenizer.sep_token_id).all()
    for seed in range(10):  # special tokens are never hidden, and nothing is lost to them
        drawn = masked(tokens, given.windows.token_bytes, tokenizer, seed)
        assert drawn.targets is not None
        assert not (drawn.targets != IGNORED)[:, [0, -1]].any()
        assert (drawn.targets != IGNORED).sum(1).tolist() == [6] * 4


def test_nll_of_a_masked_model_by_hand(folders: dict[str, str], text: str) -> None:
    given = masked_context(folders, text)
    row = NLL().measure(given)
    examples = masked(
        given.windows.tokens, given.windows.token_bytes, given.tokenizer, given.settings.seed
    )
    assert examples.targets is not None
    expected = []
    for window, target in zip(examples.inputs["input_ids"], examples.targets, strict=True):
        with torch.no_grad():
            table = given.model(window[None]).logits[0].double().log_softmax(-1)
        expected.append(mean([-table[i, t].item() for i, t in enumerate(target) if t != IGNORED]))
    assert row.samples == pytest.approx(expected, rel=1e-5)


def test_nll_of_an_encoder_decoder_by_hand(folders: dict[str, str], text: str) -> None:
    given = context(folders["t5"], text)
    row = NLL().measure(given)
    with torch.no_grad():
        expected = [
            given.model(input_ids=window[None, :6], labels=window[None, 6:]).loss.item()
            for window in given.windows.tokens
        ]
    assert row.samples == pytest.approx(expected, rel=1e-5)


def test_a_classifier_has_kl_but_no_nll(folders: dict[str, str], text: str) -> None:
    given = context(folders["classifier"], text, original=folders["other classifier"])
    with torch.no_grad():
        tokens = given.windows.tokens
        q, p = (m(tokens).logits.log_softmax(-1) for m in (given.model, given.reference))
    assert KL().measure(given).samples == pytest.approx(
        (p.exp() * (p - q)).sum(-1).tolist(), rel=1e-4
    )
    with pytest.raises(NotMeasurable, match="BertForSequenceClassification predicts no tokens"):
        NLL().measure(given)


def test_what_cannot_be_measured_says_so(folders: dict[str, str], text: str) -> None:
    with pytest.raises(NotMeasurable, match=r"BertModel gives no logits.*size_bytes"):
        NLL().measure(context(folders["encoder"], text))
    with pytest.raises(NotMeasurable, match="ViTForImageClassification reads pixel_values"):
        NLL().measure(context(folders["vit"], text))
    with pytest.raises(NotMeasurable, match="ViTForImageClassification without a tokenizer"):
        NLL().conditions(context(folders["vit"], text))
    with pytest.raises(NotMeasurable, match="ViTForImageClassification reads pixel_values"):
        Prefill().measure(context(folders["vit"], text, length=None))
    with pytest.raises(NotMeasurable, match="BertForMaskedLM does not write text token by token"):
        Decode().measure(context(folders["bert"], text))
    with pytest.raises(NotMeasurable, match="BertForMaskedLM does not write"):
        Generation().measure(context(folders["bert"], text))
    with pytest.raises(NotMeasurable, match="mask token"):
        NLL().measure(context(folders["bert"], text))
    with pytest.raises(NotMeasurable, match="sliding windows are for causal models"):
        NLL().measure(context(folders["t5"], text, stride=3))
    with pytest.raises(NotMeasurable, match="--baseline"):
        KL().measure(context(folders["llama"], text))
    with pytest.raises(DataError, match="--data"):
        NLL().measure(context(folders["llama"], None))
    with pytest.raises(DataError, match="the model takes 64"):
        NLL().measure(context(folders["llama"], text, length=65))


def test_windows_fit_the_model_by_default(folders: dict[str, str], text: str) -> None:
    assert context(folders["llama"], text, length=None).length == 64
    assert context(str(DEMO), text, length=None).length == 256


def test_another_vocabulary_is_refused(folders: dict[str, str], text: str, tmp_path: Path) -> None:
    other = save(tmp_path, "LlamaForCausalLM", LLAMA)
    table = json.loads((tmp_path / "tokenizer.json").read_text())
    words = table["model"]["vocab"]
    words["b"], words["c"] = words["c"], words["b"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(ModelError, match="different vocabularies"):
        KL().measure(context(folders["llama"], text, original=other))
