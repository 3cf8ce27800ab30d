"""Distillation: losses in pieces, cached teachers, features, text of the student's own, grids."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pydantic import ValidationError
from tiny import BERT, GPT2, LLAMA, T5, TEXT
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from compress.anatomy import anatomize
from compress.compressors.base import TrainingRun
from compress.compressors.distillation import goal, teacher
from compress.compressors.distillation.distill import Distill
from compress.compressors.distillation.features import Features, layer_map
from compress.compressors.distillation.goal import Distillation
from compress.compressors.distillation.policy import continued
from compress.compressors.distillation.predictor import Predictor
from compress.compressors.distillation.recovery import Recovery
from compress.compressors.distillation.teacher import Cached, Online, read
from compress.compressors.distillation.tune_scales import TuneScales
from compress.compressors.pruning.magnitude import Magnitude
from compress.compressors.quantization.rtn import RTN
from compress.data import Windows, windows
from compress.errors import ModelError, RecipeError
from compress.objective import IGNORED, Examples, examples
from compress.problem import LayerProblem
from compress.weights import Weight
from compress.weights.modeling_compressed import attach

GEMMA = transformers.Gemma2Config(
    vocab_size=2048, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
    num_key_value_heads=2, intermediate_size=64, max_position_embeddings=64,
    final_logit_softcapping=1.0, initializer_range=0.5,
)  # fmt: skip
KINDS: dict[str, tuple[str, Any]] = {
    "llama": ("LlamaForCausalLM", LLAMA),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "bert": ("BertForMaskedLM", BERT),
    "t5": ("T5ForConditionalGeneration", T5),
    "gemma2": ("Gemma2ForCausalLM", GEMMA),
}
FIRST = torch.tensor([0])
CPU = torch.device("cpu")


class Killed(Exception):
    pass


def model(kind: str = "llama", seed: int = 0, **changes: Any) -> Any:
    name, config = KINDS[kind]
    config = type(config).from_dict(config.to_dict() | changes)
    torch.manual_seed(seed)
    return getattr(transformers, name)(config).eval()


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Windows:
    path = tmp_path_factory.mktemp("text") / "t.txt"
    path.write_text(TEXT)
    return windows(str(path), tokenizer, part="calibration", samples=48, length=16)


def asked(student: Any, tokens: Windows, tokenizer: Any) -> Examples:
    if student.config.model_type == "bert":
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.mask_token = tokenizer.convert_ids_to_tokens(5)
    return examples(student, tokens.tokens, tokens.token_bytes, tokenizer)


def slow_loss(
    student: Any, other: Any, text: Examples, rows: Tensor, T: float, share: float
) -> Any:
    """Whole logits, all positions, then those that count."""
    assert text.targets is not None
    labels = text.targets[rows]
    counted = labels != IGNORED
    s, t = (text.call(m, rows).logits[counted] for m in (student, other))
    p, q = ((x / T).log_softmax(-1) for x in (t, s))
    kl = F.kl_div(q, p, reduction="sum", log_target=True) * T**2
    return share * kl + (1 - share) * F.cross_entropy(s, labels[counted], reduction="sum")


@pytest.mark.parametrize("kind", KINDS)
def test_losses_in_pieces_are_those_of_whole_logits(
    kind: str, tokens: Windows, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, other = model(kind, 1), model(kind).requires_grad_(False)
    text = asked(student, tokens, tokenizer)
    first = read(text, FIRST, CPU)
    objective = Distillation(student, Online(other, first), text, temperature=2.0, kl_share=0.7)
    assert isinstance(objective.predictor.head, torch.nn.Module) is (kind != "gemma2")
    monkeypatch.setattr(goal, "PIECE", 2048 * 5)  # five tokens at a time
    rows = torch.tensor([3, 1, 4])
    found = objective(rows, 0)
    gradients = torch.autograd.grad(found, list(student.parameters()), allow_unused=True)
    expected = slow_loss(student, other, text, rows, 2.0, 0.7)
    slow = torch.autograd.grad(expected, list(student.parameters()), allow_unused=True)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-3)
    for a, b in zip(gradients, slow, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 + 1e-4 * float(b.abs().max()))
    held = objective(rows, None)
    torch.testing.assert_close(
        held, slow_loss(student, other, text, rows, 1.0, 1.0), rtol=1e-4, atol=1e-3
    )
    assert text.targets is not None
    assert objective.count(rows, 0) == int((text.targets[rows] != IGNORED).sum())


def test_the_head_sees_no_token_before_its_turn(tokens: Windows, tokenizer: Any) -> None:
    student = model()
    batch = read(asked(student, tokens, tokenizer), torch.arange(3), CPU)
    predictor = Predictor(student, batch)
    seen = []
    student.lm_head.register_forward_hook(lambda _, args, out: seen.append(out.shape[1]))
    states, output = predictor.run(batch)
    assert seen == [0]
    assert output.logits.numel() == 0
    assert states.shape == (3, 16, 32)
    torch.testing.assert_close(predictor.logits(states), student(**batch.inputs).logits)


# trained on a tiny model


SHORT: dict[str, Any] = {
    "steps": 10, "batch": 4, "learning_rate": 0.01, "samples": 12, "length": 16,
}  # fmt: skip


def train(
    method: Recovery,
    tokens: Windows,
    tokenizer: Any,
    folder: Path,
    student: Any = None,
    other: Any = None,
    sites: set[str] | None = None,
    kill_at: int = -1,
) -> tuple[Any, dict[str, Any], list[dict[str, float]]]:
    student = model(seed=1) if student is None else student
    kinds = (nn.Linear, nn.Embedding, Conv1D)
    names = {name for name, module in student.named_modules() if isinstance(module, kinds)}
    seen: list[dict[str, float]] = []

    def report(step: int, steps: int, numbers: dict[str, float]) -> None:
        if "loss" not in numbers:  # the cache is being filled
            return
        seen.append({k: v for k, v in numbers.items() if k in ("loss", "held")})
        if step == kill_at:
            raise Killed

    run = TrainingRun(
        student=student,
        original=model,
        teacher=other or model,
        teacher_hash="teacher",
        text=tokens,
        held=8,
        tokenizer=tokenizer,
        sites=frozenset(names if sites is None else sites),
        all=frozenset(names),
        folder=folder,
        cache=folder.parent / "cache",
        report=report,
    )
    return student, method.train(run), seen


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "reverse", "kl_share": 0.5},
        {"loss": "skewed", "temperature": 2.0},
        {"loss": "js", "beta": 0.3},
        {"hidden": 1.0, "attention": 1.0},
        {"on_policy": 0.5},
        {"cache": 64},
        {"recompute": True, "accumulate": 2},
        {"precision": "bfloat16"},
    ],
    ids=lambda o: "-".join(o),
)
def test_every_option_learns_and_goes_on_after_a_kill(
    options: dict[str, Any], tokens: Windows, tokenizer: Any, tmp_path: Path
) -> None:
    method = Distill(**{**SHORT, "steps": 30, "learning_rate": 0.003, **options})
    student, summary, seen = train(method, tokens, tokenizer, tmp_path / "whole")
    losses = summary["held_out_loss"]
    assert losses["best"] < 0.97 * losses["before"]
    with pytest.raises(Killed):
        train(method, tokens, tokenizer, tmp_path / "cut", kill_at=27)
    resumed, again, rest = train(method, tokens, tokenizer, tmp_path / "cut")
    assert again == summary
    assert rest == seen[25:]
    for a, b in zip(student.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_recomputed_blocks_and_pieces_give_the_same_curve(
    tokens: Windows, tokenizer: Any, tmp_path: Path
) -> None:
    _, plain, _ = train(Distill(**SHORT), tokens, tokenizer, tmp_path / "plain")
    method = Distill(**SHORT, recompute=True, accumulate=3)
    _, other, _ = train(method, tokens, tokenizer, tmp_path / "other")
    for a, b in zip(plain["curve"], other["curve"], strict=True):
        assert a == pytest.approx(b, rel=1e-3)


def test_a_cache_stands_for_the_teacher(
    tokens: Windows, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Almost all classes kept: the online curve; a killed filling goes on; then no teacher."""
    monkeypatch.setattr(teacher, "BLOCK", 5)
    _, online, _ = train(Distill(**SHORT), tokens, tokenizer, tmp_path / "online")
    calls = 0

    def once() -> Any:
        nonlocal calls
        calls += 1
        return model()

    method = Distill(**SHORT, cache=2000)
    with monkeypatch.context() as patch:
        patch.setattr(Cached, "_kept", _killed_at(7))
        with pytest.raises(Killed):
            train(method, tokens, tokenizer, tmp_path / "killed", other=once)
    (folder,) = (tmp_path / "cache").iterdir()
    blocks = sorted(folder.glob("*.safetensors"))
    assert [b.name for b in blocks] == ["block-00000.safetensors"]
    written = blocks[0].stat().st_mtime_ns
    _, cached, _ = train(method, tokens, tokenizer, tmp_path / "cached", other=once)
    assert blocks[0].stat().st_mtime_ns == written
    assert len(list(folder.glob("*.safetensors"))) == 10
    assert calls == 2
    for a, b in zip(online["curve"], cached["curve"], strict=True):
        assert a == pytest.approx(b, rel=0.01)

    def never() -> Any:
        raise AssertionError

    train(method, tokens, tokenizer, tmp_path / "again", other=never)
    few, _ = train(Distill(**SHORT, cache=4), tokens, tokenizer, tmp_path / "few")[1:]
    assert few["held_out_loss"]["before"] < online["held_out_loss"]["before"]
    assert len(list((tmp_path / "cache").iterdir())) == 2


def _killed_at(row: int) -> Any:
    calls, original = 0, Cached._kept

    def kept(logits: Tensor, top: int) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        if calls > row:
            raise Killed
        return original(logits, top)

    return staticmethod(kept)


def test_what_a_cache_does_not_hold_is_refused() -> None:
    for options in ({"hidden": 1.0}, {"attention": 1.0}, {"on_policy": 0.1}):
        with pytest.raises(ValidationError, match="leave out cache"):
            Distill(cache=8, **options)


def test_the_student_writes_by_its_own_probabilities(tokens: Windows, tokenizer: Any) -> None:
    student = model()
    batch = read(asked(student, tokens, tokenizer), torch.arange(1), CPU)
    predictor = Predictor(student, batch)
    prompts = tokens.tokens[:1, :8].expand(600, 8)
    found = continued(predictor, prompts, 10, list(range(600)))
    assert found.shape == (600, 10)
    assert torch.equal(found[:, :8], prompts)
    with torch.no_grad():
        p = student(prompts[:1]).logits[0, -1].softmax(-1)
        logits = student(found[:1, :9]).logits[0, -1]
    likely = p.argmax()
    share = (found[:, 8] == likely).float().mean().item()
    assert share == pytest.approx(p[likely].item(), abs=4 * (p[likely] / 600).sqrt().item())
    draw = torch.Generator().manual_seed(0)
    torch.rand(2048, generator=draw)
    noise = -(-torch.rand(2048, generator=draw).log()).log()
    assert found[0, 9] == (logits + noise).argmax()
    one = continued(predictor, prompts[:1], 10, [5])
    assert torch.equal(one[0], found[5])


def test_steps_on_own_text_count_what_was_written(tokens: Windows, tokenizer: Any) -> None:
    student, other = model(seed=1), model()
    text = asked(student, tokens, tokenizer)
    online = Online(other, read(text, FIRST, CPU))
    objective = Distillation(student, online, text, on_policy=0.4, seed=2)
    own = [step for step in range(500) if objective._writes(step)]
    assert len(own) == pytest.approx(200, abs=45)
    rows = torch.tensor([0, 5])
    batch = objective._batch(rows, own[0])
    assert torch.equal(batch.inputs["input_ids"][:, :8], tokens.tokens[rows, :8])
    assert int((batch.labels != IGNORED).sum()) == objective.count(rows, own[0]) == 16
    assert torch.equal(batch.labels[:, 7:15], batch.inputs["input_ids"][:, 8:])
    assert not objective._writes(None)
    entropy = Distillation(student, online, text, on_policy=1.0, kl_share=0.0)
    assert entropy(rows, 0).item() == 0  # own text has no right answer


def test_own_text_needs_a_model_that_writes(
    tokens: Windows, tokenizer: Any, tmp_path: Path
) -> None:
    method = Distill(**SHORT, on_policy=0.5)
    with pytest.raises(ModelError, match="only models that continue text"):
        train(method, tokens, tokenizer, tmp_path, model("bert"), lambda: model("bert"))


def test_layer_maps() -> None:
    assert layer_map(3, 6, None) == [1, 3, 5]
    assert layer_map(4, 4, None) == [0, 1, 2, 3]
    assert layer_map(1, 6, None) == [5]
    assert layer_map(4, 6, None)[-1] == 5
    assert layer_map(2, 6, [0, -1]) == [0, 5]
    for wrong in ([0], [0, 6], [0, 1, 2]):
        with pytest.raises(RecipeError, match="layers: give 2 numbers"):
            layer_map(2, 6, wrong)


def test_features_of_a_narrower_student_go_through_projections(
    tokens: Windows, tokenizer: Any, tmp_path: Path
) -> None:
    narrow = model(seed=1, hidden_size=16, num_hidden_layers=1)
    method = Distill(**{**SHORT, "steps": 30}, hidden=1.0, attention=0.5, kl_share=1.0)
    _, summary, seen = train(method, tokens, tokenizer, tmp_path, narrow)
    assert seen[-1]["loss"] < seen[0]["loss"]
    assert summary["curve"][-1]["held"] < summary["curve"][0]["held"]
    same = model()
    features = Features(same, model(), hidden=1.0, attention=1.0, layers=None, seed=0)
    assert not features.projections
    other = model()
    other.set_attn_implementation("eager")
    outputs = [m(tokens.tokens[:2], **features.asked) for m in (same, other)]
    counted = torch.ones(2, 16, dtype=torch.bool)
    assert features(*outputs, counted).item() == pytest.approx(0, abs=1e-4)
    crossed = Features(same, other, hidden=1.0, attention=0.0, layers=[1, 0], seed=0)
    assert crossed(*outputs, counted).item() > 1


def packed(student: Any, bits: int, **options: Any) -> dict[str, Weight]:
    """Round-to-nearest weights in the feed-forward parts."""
    weights = {}
    for layer in range(2):
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            name = f"model.layers.{layer}.mlp.{leaf}"
            module = student.get_submodule(name)
            problem = LayerProblem.of(module.weight.detach().bfloat16())
            weights[name] = RTN(bits=bits, group=16, **options).solve(problem)
            tensors = {
                k: x.float().clone() if x.is_floating_point() else x
                for k, x in weights[name].tensors.items()
            }
            attach(module, weights[name].spec, tensors)
    return weights


@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (3, True)])
def test_tuned_grids_keep_the_format_and_what_is_not_theirs(
    bits: int, symmetric: bool, tokens: Windows, tokenizer: Any, tmp_path: Path
) -> None:
    student = model()
    weights = packed(student, bits, symmetric=symmetric)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    method = TuneScales(**{**SHORT, "steps": 50, "learning_rate": 0.03}, reround=False)
    _, summary, _ = train(method, tokens, tokenizer, tmp_path, student, sites=set(weights))
    assert summary["held_out_loss"]["best"] < 0.9 * summary["held_out_loss"]["before"]
    sites = {site.name: site for site in anatomize(model()).sites}
    moved = set()
    for name, old in weights.items():
        new = method.finish(student.get_submodule(name), sites[name], old)
        assert new.spec == old.spec
        assert new.nbytes == old.nbytes
        for key, tensor in old.tensors.items():
            assert new.tensors[key].dtype == tensor.dtype
            if not torch.equal(new.tensors[key], tensor):
                moved.add(key)
        torch.testing.assert_close(
            new.dense(), student.get_submodule(name).weight.detach(), rtol=0.01, atol=1e-6
        )
    assert moved == {"weight_scale"} | (set() if symmetric else {"weight_zero_point"})
    changed = {k for k, v in student.state_dict().items() if k in before and not v.equal(before[k])}
    assert changed == {k for k in before if k.endswith("norm.weight")}


def test_codes_wait_and_are_then_rounded_anew(
    tokens: Windows, tokenizer: Any, tmp_path: Path
) -> None:
    """Until a tenth of the steps they are as they were; then some move, and the loss is lower."""
    student = model()
    weights = packed(student, 2)
    sites = set(weights)
    few = {**SHORT, "steps": 30, "learning_rate": 0.02}
    with pytest.raises(Killed):  # the fourth step is the first that moves them
        train(TuneScales(**few), tokens, tokenizer, tmp_path / "a", student, sites=sites, kill_at=3)
    grids = [student.get_submodule(name).rounding for name in sites]
    assert [grid.changed() for grid in grids] == [0] * 6
    assert all((grid.offset == 0).all() and (grid.stretch != 0).any() for grid in grids)
    student = model()
    packed(student, 2)
    _, summary, _ = train(
        TuneScales(**few), tokens, tokenizer, tmp_path / "b", student, sites=sites
    )
    assert summary["codes_changed"] > 100
    still = model()
    packed(still, 2)
    method = TuneScales(**few, reround=False)
    _, fixed, _ = train(method, tokens, tokenizer, tmp_path / "c", still, sites=sites)
    assert fixed["codes_changed"] == 0
    assert summary["held_out_loss"]["best"] < fixed["held_out_loss"]["best"]


@pytest.mark.parametrize("pattern", [{"sparsity": 0.5}, {"pattern": "2:4"}])
def test_zeros_stay_zeros(
    pattern: dict[str, Any], tokens: Windows, tokenizer: Any, tmp_path: Path
) -> None:
    student = model()
    name = "model.layers.0.mlp.up_proj"
    module = student.get_submodule(name)
    old = Magnitude(**pattern).solve(LayerProblem.of(module.weight.detach().clone()))
    attach(module, old.spec, {k: v.clone() for k, v in old.tensors.items()})
    _, summary, _ = train(
        Distill(**{**SHORT, "learning_rate": 0.001}), tokens, tokenizer, tmp_path, student
    )
    assert summary["best_step"] > 0
    site = next(s for s in anatomize(model()).sites if s.name == name)
    new = Distill().finish(module, site, old)
    assert torch.equal(new.dense() == 0, old.dense() == 0)
    assert int((new.dense() == 0).sum()) == new.dense().numel() // 2
    assert not torch.equal(new.dense(), old.dense())
