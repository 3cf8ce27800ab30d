"""Each method against a slow obvious reference, and the measure they are all judged by."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from tiny import GPT2, LLAMA, normal
from torch import Tensor
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from compress.compressors.base import LayerCompressor
from compress.compressors.lowrank.svd import SVD
from compress.compressors.pruning.magnitude import Magnitude, global_threshold
from compress.compressors.quantization.int8 import Int8
from compress.compressors.quantization.nf4 import NF4
from compress.compressors.quantization.rtn import RTN
from compress.moments import Moments
from compress.problem import LayerProblem, relative_error
from compress.weights import Dense, LowRank, Quantized


def problems(matrices: list[Tensor]) -> list[LayerProblem]:
    return [LayerProblem.of(matrix) for matrix in matrices]


# relative error


def test_relative_error_is_that_of_the_layers_outputs() -> None:
    W, X = normal(12, 20), normal(300, 20, seed=1) @ normal(20, 20, seed=2)
    solution = RTN(bits=3)(W)
    wrong = (X @ W.T - X @ solution.dense().T).square().sum() / (X @ W.T).square().sum()
    problem = LayerProblem.of(W, X.T @ X / len(X))
    assert relative_error(problem, solution) == pytest.approx(wrong.item(), rel=1e-3)


def test_relative_error_without_data_is_that_of_the_weight() -> None:
    W = normal(12, 20)
    solution = Magnitude(sparsity=0.5)(W)
    expected = ((W - solution.dense()).norm() / W.norm()) ** 2
    assert relative_error(LayerProblem.of(W), solution) == pytest.approx(expected.item(), rel=1e-5)
    assert relative_error(LayerProblem.of(W), Dense.of(W)) == 0
    assert relative_error(LayerProblem.of(W), Dense.of(0 * W)) == 1
    assert relative_error(LayerProblem.of(0 * W), Dense.of(0 * W)) == 0
    assert relative_error(LayerProblem.of(0 * W), Dense.of(W)) == float("inf")


# magnitude


@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.5, 0.77, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_global_threshold_is_the_order_statistic(sparsity: float, dtype: torch.dtype) -> None:
    matrices = [normal(7, 13).to(dtype), normal(20, 5, seed=1).to(dtype) * 30, torch.zeros(3, 4)]
    values = torch.cat([m.float().abs().flatten() for m in matrices]).sort().values
    found = global_threshold(lambda: problems(matrices), sparsity)
    gone = round(sparsity * len(values))
    if gone == len(values):
        assert not (values >= found).any()
    else:
        assert found == values[gone].item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_global_pruning_removes_the_smallest_of_all_matrices(dtype: torch.dtype) -> None:
    matrices = [normal(16, 24).to(dtype), (normal(10, 8, seed=1) * 3).to(dtype)]
    solver = Magnitude(per="global", sparsity=0.6).prepare(lambda: problems(matrices))
    kept = [solver.solve(problem).dense() for problem in problems(matrices)]
    flat = torch.cat([m.float().flatten() for m in matrices])
    ours = torch.cat([k.flatten() for k in kept])
    smallest_kept = flat[ours != 0].abs().min()
    largest_gone = flat[ours == 0].abs().max()
    assert largest_gone < smallest_kept  # ties stay or go together
    ties = int((flat.abs() == smallest_kept).sum()) - 1
    assert 0 <= round(0.6 * len(flat)) - int((ours == 0).sum()) <= ties


def test_global_pruning_keeps_ties_and_stores_no_zeros() -> None:
    W = torch.tensor([[1.0, -1.0, 1.0, 0.0, 0.0, 2.0, 0.0, 0.0]])
    solver = Magnitude(per="global", sparsity=0.6).prepare(lambda: problems([W]))
    weight = solver.solve(LayerProblem.of(W))
    assert torch.equal(weight.dense(), W)
    assert weight.parameters == 4
    solver = Magnitude(per="global", sparsity=0.25).prepare(lambda: problems([W]))
    assert solver.solve(LayerProblem.of(W)).parameters == 4


def test_one_matrix_alone_is_pruned_as_a_whole_when_global() -> None:
    W = normal(4, 16) * torch.tensor([[1.0], [10.0], [100.0], [1000.0]])
    assert torch.equal(
        Magnitude(per="global")(W).dense(), Magnitude(per="layer", sparsity=0.5)(W).dense()
    )


@pytest.mark.parametrize("per", ["layer", "row"])
def test_magnitude_takes_the_share_from_each(per: str) -> None:
    W = normal(9, 30) * torch.arange(1, 10)[:, None]
    dense = Magnitude(sparsity=0.3, per=per)(W).dense()
    counts = (dense == 0).sum(1)
    assert counts.sum() == 81
    assert (counts == 9).all() == (per == "row")


def test_magnitude_is_the_best_mask_of_its_size() -> None:
    W = normal(6, 10)
    best = W.flatten().square().sort().values[:30].sum() / W.square().sum()
    weight = Magnitude(sparsity=0.5)(W)
    assert relative_error(LayerProblem.of(W), weight) == pytest.approx(best.item(), rel=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"sparsity": 1.0}, {"sparsity": -0.1}, {"pattern": "4:4"}, {"pattern": "0:4"},
        {"pattern": "2:4", "sparsity": 0.5}, {"pattern": "2:4", "per": "row"}, {"per": "column"},
        {"sparsity": float("nan")}, {"pattern": "two of four"},
    ],
)  # fmt: skip
def test_magnitude_refuses(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Magnitude.model_validate(wrong)


# svd


@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (32, 32)])
@pytest.mark.parametrize("rank", [1, 3, 10])
def test_svd_error_is_the_energy_of_the_tail(shape: tuple[int, int], rank: int) -> None:
    W = normal(*shape)
    weight = SVD(rank=rank)(W)
    assert isinstance(weight, LowRank)
    assert weight.rank == rank
    sigma = torch.linalg.svdvals(W.double())
    tail = (sigma[rank:].square().sum() / sigma.square().sum()).item()
    assert relative_error(LayerProblem.of(W), weight) == pytest.approx(tail, rel=1e-4)


def test_svd_shares_the_singular_values_between_the_factors() -> None:
    weight = SVD(rank=4, pivoted=False)(normal(24, 60))
    assert isinstance(weight, LowRank)
    left, right = weight.left.dense(), weight.right.dense()
    torch.testing.assert_close(left.T @ left, right @ right.T, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("energy", [0.1, 0.5, 0.7])
def test_energy_takes_the_least_rank_that_keeps_it(energy: float) -> None:
    W = normal(48, 8) @ normal(8, 64, seed=1) + normal(48, 64, seed=2) * 0.01
    weight = SVD(energy=energy)(W)
    assert isinstance(weight, LowRank)
    share = torch.linalg.svdvals(W.double()).square().cumsum(0) / W.double().square().sum()
    assert share[weight.rank - 1] >= energy
    assert weight.rank == 1 or share[weight.rank - 2] < energy


@pytest.mark.parametrize("parameters", [{"rank": 20}, {"ratio": 1.0}, {"energy": 0.9999}])
def test_a_matrix_that_would_grow_stays_dense(parameters: dict[str, float]) -> None:
    W = normal(20, 30)
    solver = SVD.model_validate(parameters)
    weight = solver(W)
    assert weight.kind == "dense"
    assert torch.equal(weight.dense(), W)
    if "energy" not in parameters:
        assert solver.pieces((20, 30)) == [(20, 30)]


def test_svd_of_less_than_full_rank_is_exact() -> None:
    W = normal(30, 2) @ normal(2, 40, seed=1)
    assert relative_error(LayerProblem.of(W), SVD(rank=5)(W)) < 1e-10


# rounding


@pytest.mark.parametrize("solver", [RTN(bits=4), RTN(bits=3, symmetric=False), NF4(), Int8()])
def test_factors_are_rounded_each_for_itself(solver: LayerCompressor) -> None:
    W = normal(128, 192).bfloat16()
    factors = SVD(ratio=0.5, pivoted=False)(W)
    weight = solver.compress(LayerProblem("site", factors))
    assert isinstance(weight, LowRank)
    assert isinstance(factors, LowRank)
    for side in ("left", "right"):
        alone = solver(getattr(factors, side).dense().bfloat16())
        assert torch.equal(getattr(weight, side).dense(), alone.dense())
    assert weight.nbytes < factors.nbytes
    assert relative_error(LayerProblem("site", factors), weight) < 0.2


def test_problems_of_factors_see_the_inputs_they_read() -> None:
    X, W = normal(200, 24, seed=1), normal(16, 24)
    factors = SVD(rank=4)(W)
    assert isinstance(factors, LowRank)
    problem = LayerProblem("site", factors, Moments(X.T @ X / 200))
    left, right = RTN()._factor_problems(problem)
    assert left.H is not None
    assert right.H is problem.H
    Y = X @ factors.right.dense().T
    torch.testing.assert_close(left.H, Y.T @ Y / 200, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_more_bits_and_smaller_groups_are_nearer(bits: int) -> None:
    problem = LayerProblem.of(normal(32, 128))
    errors = [relative_error(problem, RTN(bits=bits, group=g).solve(problem)) for g in (16, 128)]
    assert errors[0] < errors[1]
    if bits > 2:
        assert errors[1] < relative_error(problem, RTN(bits=bits - 1, group=128).solve(problem))


def test_a_channel_is_one_group() -> None:
    weight = RTN(group="channel")(normal(8, 40))
    assert isinstance(weight, Quantized)
    assert weight.spec["group"] == 40
    assert weight.tensors["weight_scale"].shape == (8, 1)


def test_importance_moves_the_error_to_where_inputs_are_small() -> None:
    W = normal(16, 64)
    H = torch.diag(torch.cat([torch.full((32,), 100.0), torch.full((32,), 0.01)]))
    solver = RTN(bits=2, group=64)
    change = (solver(W, H).dense() - W).square()
    plain = (solver(W).dense() - W).square()
    assert change[:, :32].sum() < plain[:, :32].sum()
    problem = LayerProblem.of(W, H)
    assert relative_error(problem, solver(W, H)) < relative_error(problem, solver(W))


# a model in memory


@pytest.mark.parametrize(
    "solver",
    [RTN(bits=4), SVD(ratio=0.9), SVD(rank=1000), Magnitude(sparsity=0.5, per="global"), NF4()],
)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_apply_to_a_model_in_memory(solver: LayerCompressor, kind: str) -> None:
    torch.manual_seed(0)
    make = {"llama": lambda: LlamaForCausalLM(LLAMA), "gpt2": lambda: GPT2LMHeadModel(GPT2)}[kind]
    model = make().eval()
    tokens = torch.arange(16).view(1, 16)
    name = {"llama": "model.layers.0.mlp.up_proj", "gpt2": "transformer.h.0.mlp.c_fc"}[kind]
    matrix = model.get_submodule(name).weight.detach().clone()
    with torch.no_grad():
        before = model(tokens).logits
        errors = solver.apply(model, targets=["blocks"])
        after = model(tokens).logits
    assert len(errors) == {"llama": 14, "gpt2": 8}[kind]
    assert torch.isfinite(after).all()
    change = (model.get_submodule(name).weight - matrix).square().sum() / matrix.square().sum()
    assert change.item() == pytest.approx(errors[name], rel=1e-3, abs=1e-9)
    assert torch.equal(before, after) == (solver == SVD(rank=1000))


def test_apply_keeps_ties() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2).eval()
    errors = RTN(bits=2, group=16).apply(model, targets=["embed"])
    assert list(errors) == ["transformer.wte"]
    assert torch.equal(model.lm_head.weight, model.transformer.wte.weight)
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()
