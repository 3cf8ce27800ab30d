"""The training loop: resumed runs end the same, the best step stays; what each method trains."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from tiny import LLAMA, TEXT, normal
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import compress
from compress.anatomy import anatomize
from compress.compressors.base import TrainingRun
from compress.compressors.distillation.distill import Distill
from compress.compressors.distillation.lora import LoRA
from compress.compressors.distillation.recovery import Recovery
from compress.compressors.lowrank.svd import SVD
from compress.compressors.pruning.magnitude import Magnitude
from compress.compressors.quantization.rtn import RTN
from compress.data import Windows, windows
from compress.errors import RecipeError
from compress.muon import A, B, C, Muon, evened
from compress.problem import LayerProblem
from compress.training import STATE, Objective, Schedule, Trainer, _batch
from compress.weights import Dense, Weight
from compress.weights.modeling_compressed import attach

HELD = normal(9, 4, seed=1, scale=1.0)


class Killed(Exception):
    pass


class Triple(Objective):
    """y = 3x, learnt by a linear module; one of its parameters is never used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 1)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, rows: Tensor, step: int | None) -> Tensor:
        return (self.linear(rows) - 3 * rows.sum(1, keepdim=True)).square().sum()


def regression(
    folder: Path,
    *,
    steps: int = 30,
    kill_at: int | None = None,
    patience: int = 100,
    rate: float = 0.05,
    accumulate: int = 1,
    held: Tensor | None = None,
    matrix: str = "",
    keep: Literal["best", "last"] = "best",
) -> tuple[nn.Module, dict[str, Any], list[tuple[int, int, dict[str, float]]]]:
    """Train ``Triple``; what was reported, without the numbers that depend on the clock."""
    model, seen = Triple(), []

    def report(step: int, total: int, numbers: dict[str, float]) -> None:
        assert numbers.pop("tokens_per_s") > 0
        assert numbers.pop("seconds_left") >= 0
        seen.append((step, total, numbers))
        if step == kill_at:
            raise Killed

    schedule = Schedule(steps, rate, 8, accumulate, check_every=5, patience=patience, keep=keep)
    trainer = Trainer(
        model, schedule, seed=3, folder=folder, report=report, matrix=lambda name: name == matrix
    )
    summary = trainer.fit(normal(40, 4, scale=1.0), HELD if held is None else held)
    trainer.release()
    return model, summary, seen


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("matrix", ["", "linear.weight"])  # which is Muon's
@pytest.mark.parametrize("rate", [0.05, 3.0])  # the second is so high that the loss also rises
@pytest.mark.parametrize("kill_at", [3, 5, 12, 29])
def test_a_killed_training_goes_on_and_ends_the_same(
    tmp_path: Path, kill_at: int, rate: float, matrix: str
) -> None:
    whole, summary, seen = regression(tmp_path / "whole", rate=rate, matrix=matrix)
    with pytest.raises(Killed):
        regression(tmp_path / "cut", kill_at=kill_at, rate=rate, matrix=matrix)
    assert (tmp_path / "cut" / STATE).exists() == (kill_at >= 5)
    resumed, again, rest = regression(tmp_path / "cut", rate=rate, matrix=matrix)
    assert rest[0][0] == kill_at // 5 * 5 + 1
    assert rest == seen[kill_at // 5 * 5 :]
    assert again == summary
    assert all(torch.equal(a, b) for a, b in zip(values(whole), values(resumed), strict=True))


def test_a_finished_training_is_not_repeated(tmp_path: Path) -> None:
    whole, summary, _ = regression(tmp_path)
    resumed, again, steps = regression(tmp_path)
    assert steps == []
    assert again == summary
    assert all(torch.equal(a, b) for a, b in zip(values(whole), values(resumed), strict=True))


def test_steps_are_reported_with_held_out_checks(tmp_path: Path) -> None:
    _, summary, seen = regression(tmp_path, steps=12)
    assert [step for step, _, _ in seen] == list(range(1, 13))
    assert {total for _, total, _ in seen} == {12}
    assert [step for step, _, numbers in seen if "held" in numbers] == [5, 10, 12]
    losses = summary["held_out_loss"]
    assert losses["last"] == round(seen[-1][2]["held"], 6)
    assert losses["best"] <= losses["last"] < losses["before"]


def test_the_best_step_is_kept(tmp_path: Path) -> None:
    """A rate so high that the loss rises and falls: what stays is the best check."""
    model, summary, seen = regression(tmp_path, rate=3.0)
    held = {step: numbers["held"] for step, _, numbers in seen if "held" in numbers}
    losses = summary["held_out_loss"]
    best = min([*held.values(), losses["before"]])
    assert losses["best"] == round(best, 6)
    assert summary["best_step"] == 0 or held[summary["best_step"]] == best
    assert summary["best_step"] != 30
    now = model(HELD, None).item() / len(HELD)
    assert now == pytest.approx(best, rel=1e-5)


def test_the_last_step_is_kept_and_reached_if_that_is_asked_for(tmp_path: Path) -> None:
    """The same rate, at which the loss gets worse; the patience of one check would end it."""
    way: dict[str, Any] = {"rate": 3.0, "patience": 1, "keep": "last"}
    model, summary, _ = regression(tmp_path, **way)
    losses = summary["held_out_loss"]
    assert summary["steps"] == 30
    assert losses["best"] < losses["last"]
    assert model(HELD, None).item() / len(HELD) == pytest.approx(losses["last"], rel=1e-5)
    again, same, rest = regression(tmp_path, **way)
    assert (same, rest) == (summary, [])
    assert all(torch.equal(a, b) for a, b in zip(values(model), values(again), strict=True))


def test_it_ends_when_nothing_gets_better(tmp_path: Path) -> None:
    still = torch.zeros(3, 4)  # only the bias is seen here
    _, summary, seen = regression(tmp_path, patience=2, held=still, rate=1.0, steps=200)
    held = [numbers["held"] for _, _, numbers in seen if "held" in numbers]
    assert summary["steps"] == len(seen) < 200
    assert all(
        value >= min([*held[:-2], summary["held_out_loss"]["before"]]) for value in held[-2:]
    )


def test_the_curve_is_in_the_summary(tmp_path: Path) -> None:
    _, summary, seen = regression(tmp_path, steps=12)
    first, *rest = summary["curve"]
    assert first == {"step": 0, "held": summary["held_out_loss"]["before"]}
    assert [point["step"] for point in rest] == [5, 10, 12]
    assert [point["held"] for point in rest] == [
        round(numbers["held"], 6) for _, _, numbers in seen if "held" in numbers
    ]
    losses = [numbers["loss"] for _, _, numbers in seen]
    assert rest[1]["loss"] == pytest.approx(sum(losses[5:10]) / 5, abs=1e-6)


def test_a_step_in_pieces_is_the_same_step(tmp_path: Path) -> None:
    whole, summary, seen = regression(tmp_path / "whole")
    pieces, again, parts = regression(tmp_path / "pieces", accumulate=3)  # 3, 3 and 2 of 8
    assert again["held_out_loss"]["best"] == pytest.approx(summary["held_out_loss"]["best"])
    for (_, _, a), (_, _, b) in zip(seen, parts, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    for a, b in zip(values(whole), values(pieces), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    with pytest.raises(RecipeError, match="a batch of 8 windows cannot be shared by 1 processes"):
        regression(tmp_path / "many", accumulate=9)


def test_every_window_has_its_turn_once_an_epoch() -> None:
    for epoch in range(3):
        order = torch.cat([_batch(epoch * 5 + i, 41, 8, seed=1) for i in range(5)])
        assert len(order) == 40
        assert max(Counter(order.tolist()).values()) == 1
    assert not torch.equal(_batch(0, 41, 8, 1), _batch(5, 41, 8, 1))
    assert not torch.equal(_batch(0, 41, 8, 1), _batch(0, 41, 8, 2))
    assert sorted(_batch(7, 3, 8, seed=1).tolist()) == [0, 1, 2]


@pytest.mark.parametrize("floor", [0.0, 0.5])
def test_the_rate_ends_at_its_floor(floor: float) -> None:
    schedule = Schedule(steps=100, learning_rate=2.0, batch=1, floor=floor)
    assert max(schedule.rate(step) for step in range(101)) == 2.0
    assert schedule.rate(100) == pytest.approx(2 * floor)


def test_the_rate_warms_up_and_decays_to_a_tenth() -> None:
    schedule = Schedule(steps=100, learning_rate=2.0, batch=1, warmup=0.1)
    rates = [schedule.rate(step) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert max(rates) == 2.0
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert rates[100] == pytest.approx(0.2)
    halfway = 2.0 * (0.1 + 0.45 * (1 + math.cos(math.pi / 2)))
    assert rates[55] == pytest.approx(halfway)
    assert Schedule(steps=1, learning_rate=1.0, batch=1).rate(0) == 1.0


# distill and lora on a tiny model


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LLAMA).eval()


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Windows:
    path = tmp_path_factory.mktemp("text") / "t.txt"
    path.write_text(TEXT)
    return windows(str(path), tokenizer, part="calibration", samples=12, length=16)


def train(
    method: Recovery,
    weights: dict[str, Weight],
    calibration: Windows,
    tokenizer: Any,
    folder: Path,
    sites: set[str],
) -> tuple[LlamaForCausalLM, TrainingRun, dict[str, Any]]:
    student = llama()
    for name, weight in weights.items():
        tensors = {  # as ``assemble`` does: copies, floating ones in float32
            k: x.float().clone() if x.is_floating_point() else x for k, x in weight.tensors.items()
        }
        attach(student.get_submodule(name), weight.spec, tensors)
    run = TrainingRun(
        student=student,
        original=llama,
        teacher=llama,
        teacher_hash="llama",
        text=calibration,
        held=3,
        tokenizer=tokenizer,
        sites=frozenset(sites),
        all=frozenset(site.name for site in anatomize(llama()).sites),
        folder=folder,
        cache=folder / "cache",
        report=lambda *_: None,
    )
    return student, run, method.train(run)


MLP = "model.layers.0.mlp."
NAMES = [MLP + leaf for leaf in ("gate_proj", "up_proj", "down_proj")]
SHORT: dict[str, Any] = {
    "steps": 25,
    "batch": 4,
    "learning_rate": 0.01,
    "samples": 12,
    "length": 16,
}


def solved() -> dict[str, Weight]:
    """A sparse, a low-rank and a packed weight for the first layer's feed-forward part."""
    methods = [Magnitude(sparsity=0.5), SVD(ratio=0.5), RTN(bits=3, group=16)]
    model = llama()
    return {
        name: method.solve(LayerProblem.of(model.get_submodule(name).weight.detach()))
        for name, method in zip(NAMES, methods, strict=True)
    }


@pytest.mark.parametrize("norms", [True, False])
def test_distill_trains_what_is_stored_and_nothing_else(
    calibration: Windows, tokenizer: Any, tmp_path: Path, norms: bool
) -> None:
    weights = solved()
    other = "model.layers.1.mlp.up_proj"
    before = llama().state_dict()
    student, _, summary = train(
        Distill(norms=norms, **SHORT), weights, calibration, tokenizer, tmp_path, {*NAMES, other}
    )
    assert summary["held_out_loss"]["best"] < summary["held_out_loss"]["before"]
    changed = {k for k, v in student.state_dict().items() if k in before and not v.equal(before[k])}
    vectors = {name for name, tensor in before.items() if tensor.ndim == 1}
    assert changed == {f"{other}.weight"} | (vectors if norms else set())
    after = {name: student.get_submodule(name) for name in NAMES}
    moved = {name: not module.weight.equal(weights[name].dense()) for name, module in after.items()}
    assert moved == {NAMES[0]: True, NAMES[1]: True, NAMES[2]: False}
    assert (after[NAMES[0]].weight == 0).equal(weights[NAMES[0]].dense() == 0)
    site = next(s for s in anatomize(llama()).sites if s.name == NAMES[0])
    back = Distill().finish(after[NAMES[0]], site, weights[NAMES[0]])
    assert back.spec == weights[NAMES[0]].spec
    assert back.dense().equal(after[NAMES[0]].weight)


def test_muon_moves_the_matrices_of_blocks_alone(
    calibration: Windows, tokenizer: Any, tmp_path: Path
) -> None:
    """A first step of Muon is an orthogonal one; values of a sparse matrix are none."""
    weights = {NAMES[0]: solved()[NAMES[0]]}
    sites = {*NAMES, "model.embed_tokens"}
    method = Distill(optimizer="muon", weight_decay=0.0, **SHORT | {"steps": 1, "patience": 9})
    student, run, _ = train(method, weights, calibration, tokenizer, tmp_path, sites)
    assert method.matrices(run) == {f"{name}.weight" for name in NAMES[1:]}
    assert Distill().matrices(run) == frozenset()
    before = llama().get_submodule(NAMES[1]).weight
    moved = (student.get_submodule(NAMES[1]).weight - before).detach()
    assert float(torch.linalg.matrix_norm(moved)) > 0
    values = torch.linalg.svdvals(moved)
    assert float(values[0] / values[-1]) < 4  # those of a gradient differ by more


@pytest.mark.parametrize("shape", [(8, 24), (24, 8)])
def test_muon_is_torch_s_in_more_digits(shape: tuple[int, int]) -> None:
    ours, theirs = (nn.Parameter(normal(*shape, scale=1.0)) for _ in range(2))
    mine = Muon([ours], lr=0.1, weight_decay=0.1)
    other = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for seed in range(4):
        ours.grad = normal(*shape, seed=seed, scale=10.0**seed)
        theirs.grad = ours.grad.clone()
        mine.step()
        other.step()
    moved = theirs - normal(*shape, scale=1.0)
    assert (ours - theirs).norm() < 0.02 * moved.norm()  # bfloat16's rounding
    values = torch.linalg.svdvals(evened(ours.detach()))
    assert values.min() > 0.65
    assert values.max() < 1.25


@pytest.mark.parametrize("shape", [(8, 24), (24, 8)])
def test_muon_changes_singular_values_by_its_polynomial(shape: tuple[int, int]) -> None:
    matrix = normal(*shape, scale=1.0)
    values = torch.linalg.svdvals(matrix.double()) / matrix.double().norm()
    for _ in range(5):
        values = A * values + B * values**3 + C * values**5
    found = torch.linalg.svdvals(evened(matrix)).double()
    torch.testing.assert_close(found.sort().values, values.sort().values, rtol=1e-4, atol=1e-5)


def test_lora_trains_adapters_alone_and_merges_into_dense(
    calibration: Windows, tokenizer: Any, tmp_path: Path
) -> None:
    weights = {NAMES[2]: RTN(bits=2, group=16)(llama().get_submodule(NAMES[2]).weight.detach())}
    names = set(NAMES[1:])
    method = LoRA(rank=4, alpha=8.0, **SHORT)
    student, _, summary = train(method, weights, calibration, tokenizer, tmp_path, names)
    assert summary["held_out_loss"]["best"] < summary["held_out_loss"]["before"]
    sites = {site.name: site for site in anatomize(llama()).sites}
    before = llama()
    results = {}
    for name in names:
        old = weights.get(name) or Dense.of(before.get_submodule(name).weight.detach())
        results[name] = method.finish(student.get_submodule(name), sites[name], old)
        assert results[name].kind == method.result(old.kind)
        x = normal(5, old.shape[1], scale=1.0)
        with torch.no_grad():
            expected = student.get_submodule(name)(x)
        torch.testing.assert_close(x @ results[name].dense().T, expected, rtol=1e-4, atol=1e-4)
    assert results[NAMES[2]].kind == "sum"
    assert results[NAMES[1]].kind == "dense"
    assert not results[NAMES[1]].dense().equal(before.get_submodule(NAMES[1]).weight)
    twice = method.finish(student.get_submodule(NAMES[2]), sites[NAMES[2]], results[NAMES[2]])
    assert [term.kind for term in getattr(twice, "terms", [])] == [
        "quantized",
        "lowrank",
        "lowrank",
    ]


def test_the_rate_falls_with_the_width_unless_it_is_said() -> None:
    model = llama()
    assert Distill().rate(model) == 1e-3
    model.config = LlamaConfig(hidden_size=4096)
    assert Distill().rate(model) == pytest.approx(3.125e-5)
    assert Distill(learning_rate=0.01).rate(model) == 0.01
    assert LoRA().rate(model) == 1e-3


@pytest.mark.parametrize(("steps", "every"), [(60, 25), (500, 25), (2400, 120)])
def test_a_long_training_is_checked_twenty_times(
    calibration: Windows,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
    every: int,
) -> None:
    seen = []

    def trainer(objective: Objective, schedule: Schedule, **_: Any) -> Trainer:
        seen.append(schedule.check_every)
        raise Killed

    monkeypatch.setattr("compress.compressors.distillation.recovery.Trainer", trainer)
    method = Distill(**SHORT | {"steps": steps})
    with pytest.raises(Killed):
        train(method, {}, calibration, tokenizer, tmp_path, set(NAMES))
    assert seen == [every]


@pytest.mark.parametrize(
    ("stage", "there", "zero", "message"),
    [
        ({"use": "distill"}, False, "2", "not installed: pip install"),
        ({"use": "distill"}, True, "3", "ZeRO-3 is not supported"),
        ({"use": "distill", "optimizer": "muon"}, True, "2", "muon moves whole matrices"),
        ({"use": "rtn"}, False, "2", None),  # it trains nothing
    ],
)
def test_what_deepspeed_cannot_do_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: dict[str, Any], there: bool, zero: str,
    message: str | None,
) -> None:  # fmt: skip
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", zero)
    monkeypatch.setattr("compress.zero.find_spec", lambda name: object() if there else None)
    recipe = {"stages": [stage], "calibration": {"data": "demo"}}
    if message is None:
        assert compress.apply(recipe, model="demo", out=tmp_path / "x", verify=False)
        return
    with pytest.raises(RecipeError, match=message):
        compress.apply(recipe, model="demo", out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_cross_entropy_alone_needs_no_teacher_gradient(
    calibration: Windows, tokenizer: Any, tmp_path: Path
) -> None:
    _, _, summary = train(
        Distill(kl_share=0.0, **SHORT), {}, calibration, tokenizer, tmp_path, set(NAMES)
    )
    assert summary["steps"] == 25
    assert summary["best_step"] == 0  # the student is the teacher: no step can be nearer
    assert summary["held_out_loss"]["best"] == pytest.approx(0, abs=1e-6)
