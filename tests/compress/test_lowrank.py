"""Low-rank methods against explicit roots, torch's SVD, and every allocation there is."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from tiny import normal
from torch import Tensor

from compress.compressors.base import LayerCompressor
from compress.compressors.budget import allocate
from compress.compressors.lowrank.residual import Residual
from compress.compressors.lowrank.svd import SVD
from compress.compressors.lowrank.truncation import left_singular, projections
from compress.compressors.pruning.masks import keep_share
from compress.compressors.quantization.nf4 import NF4
from compress.compressors.quantization.rtn import RTN
from compress.moments import Moments
from compress.problem import LayerProblem, relative_error
from compress.weights import Dense, LowRank, Sparse, Sum, Weight

SHAPES = [(24, 60), (60, 24), (32, 32)]


def moment(size: int, seed: int = 5, samples: int = 400) -> Tensor:
    """A second moment [size, size] of correlated vectors."""
    X = normal(samples, size, seed=seed, scale=1.0) @ normal(size, size, seed=seed + 1, scale=1.0)
    return X.T @ X / samples


def measured(W: Tensor, name: str = "site", dtype: torch.dtype = torch.float32) -> LayerProblem:
    rows, columns = W.shape
    H, F = Moments(moment(columns)), moment(rows, seed=9)
    return LayerProblem(name, Dense.of(W.to(dtype)), H, None, Moments(F))


def root(H: Tensor) -> Tensor:
    """The symmetric H^½ of the damped moment."""
    values, Q = torch.linalg.eigh(Moments(H).damped)
    return Q * values.sqrt() @ Q.T


def slow_truncation(T: Tensor, rank: int, H: Tensor, F: Tensor | None = None) -> Tensor:
    """F^−½ · [F^½ T H^½]_rank · H^−½, every root and inverse written out."""
    S = root(H)
    R = torch.eye(len(T), dtype=torch.float64) if F is None else root(F)
    U, sigma, Vt = torch.linalg.svd(R @ T.double() @ S)
    M = U[:, :rank] @ torch.diag(sigma[:rank]) @ Vt[:rank]
    return torch.linalg.inv(R) @ M @ torch.linalg.inv(S)


# singular values and projections


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (20, 20)])
def test_singular_values_and_vectors_against_torch(shape: tuple[int, int]) -> None:
    W = normal(*shape)
    sigma, U = left_singular(W)
    theirs_U, theirs, _ = torch.linalg.svd(W.double(), full_matrices=False)
    torch.testing.assert_close(sigma, theirs, rtol=1e-8, atol=1e-12)
    signs = (U * theirs_U).sum(0)  # vectors are the same but for their sign
    torch.testing.assert_close(signs.abs(), torch.ones_like(signs), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_is_the_tail_of_the_spectrum(shape: tuple[int, int], weighted: bool) -> None:
    T = normal(*shape)
    H = Moments(moment(shape[1]))
    F = Moments(moment(shape[0], seed=9)) if weighted else None
    sigma, P, Q = projections(T, H, F)
    for rank in (1, 5, 23):
        lost = T.double() - P[:, :rank] @ Q[:, :rank].T @ T.double()
        left = lost if F is None else F.damped @ lost
        loss = ((left @ H.damped) * lost).sum()
        torch.testing.assert_close(loss, sigma[rank:].square().sum(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("pivoted", [False, True])
def test_solutions_against_explicit_roots(
    shape: tuple[int, int], weighted: bool, pivoted: bool
) -> None:
    problem = measured(normal(*shape))
    solver = SVD(rank=6, pivoted=pivoted, loss_weighted=weighted)
    slow = slow_truncation(problem.target, 6, problem.H, problem.gradients.H if weighted else None)
    torch.testing.assert_close(solver.compress(problem).dense(), slow.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_each_metric_is_best_in_its_own_measure(shape: tuple[int, int]) -> None:
    problem = measured(normal(*shape))
    solved = {
        "loss": SVD(rank=6), "outputs": SVD(rank=6, loss_weighted=False),
        "weights": SVD(rank=6, metric="weights"),
    }  # fmt: skip
    lost = {name: problem.W - s.compress(problem).dense() for name, s in solved.items()}
    measures = {
        "loss": lambda D: ((problem.gradients.H @ D @ problem.H) * D).sum().item(),
        "outputs": lambda D: ((D @ problem.H) * D).sum().item(),
        "weights": lambda D: D.square().sum().item(),
    }
    for name, measure in measures.items():
        errors = {other: measure(D) for other, D in lost.items()}
        assert min(errors, key=errors.__getitem__) == name


def test_the_target_is_what_is_truncated() -> None:
    W, T = normal(20, 30), normal(20, 30, seed=1)
    problem = LayerProblem("site", Dense.of(W), Moments(moment(30)), T)
    slow = slow_truncation(T, 4, problem.H)
    torch.testing.assert_close(
        SVD(rank=4).compress(problem).dense(), slow.float(), rtol=1e-4, atol=1e-5
    )


def test_dead_inputs_cost_no_rank() -> None:
    """An input that was always zero does not turn the factors, however large its weights."""
    W, H = normal(20, 30), moment(30)
    H[7] = 0
    H[:, 7] = 0
    loud = W.clone()
    loud[:, 7] = 1000 * normal(20, seed=3)
    alive = torch.arange(30) != 7
    quiet = SVD(rank=4)(W, H).dense()
    torch.testing.assert_close(SVD(rank=4)(loud, H).dense()[:, alive], quiet[:, alive])


@pytest.mark.parametrize("samples", [1, 3])
def test_few_samples_are_enough(samples: int) -> None:
    X, W = normal(samples, 40, scale=3.0), normal(24, 40)
    problem = LayerProblem.of(W, X.T @ X / samples)
    weight = SVD(rank=4).compress(problem)
    assert torch.isfinite(weight.dense()).all()
    assert relative_error(problem, weight) < 1e-3  # the outputs span less than the rank


@pytest.mark.parametrize("solver", [SVD(rank=1), SVD(ratio=0.3), SVD(rank=1, pivoted=False)])
@pytest.mark.parametrize("shape", [(1, 40), (40, 1), (2, 2)])
def test_one_row_or_column_with_data(solver: SVD, shape: tuple[int, int]) -> None:
    problem = measured(normal(*shape))
    assert torch.isfinite(solver.compress(problem).dense()).all()


def test_everything_zero() -> None:
    for pivoted in (False, True):
        solver = SVD(rank=3, pivoted=pivoted)
        assert torch.equal(solver(torch.zeros(20, 30)).dense(), torch.zeros(20, 30))
        assert torch.isfinite(solver(normal(20, 30), torch.zeros(30, 30)).dense()).all()
        nothing = Moments(torch.zeros(20, 20))
        problem = LayerProblem("site", Dense.of(normal(20, 30)), Moments(moment(30)), None, nothing)
        assert torch.isfinite(solver.compress(problem).dense()).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pivoted", [False, True])
def test_rounding_to_16_bits_costs_little(dtype: torch.dtype, pivoted: bool) -> None:
    W = normal(96, 128)
    W[::9, ::31] *= 100
    problem = LayerProblem.of(W.to(dtype), moment(128))
    weight = SVD(rank=40, pivoted=pivoted).compress(problem)
    exact = slow_truncation(problem.W, 40, problem.H).float()
    best = relative_error(problem, Dense.of(exact))
    assert weight.dtype == dtype
    assert relative_error(problem, weight) < 1.05 * best + 2e-5


# factors


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (8, 8), (1, 5), (5, 1)])
def test_factors_stand_for_the_same_product(shape: tuple[int, int]) -> None:
    rows, columns = shape
    for rank in {1, min(shape)}:
        left, right = normal(rows, rank, scale=1.0), normal(rank, columns, seed=1, scale=1.0)
        for make in (LowRank.pivoted, LowRank.balanced):
            weight = make(left, right, torch.float32)
            assert weight.rank == rank
            torch.testing.assert_close(weight.dense(), left @ right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(30, 40), (40, 30)])
def test_pivoted_factors_hold_part_of_the_product_and_no_number_too_many(
    shape: tuple[int, int],
) -> None:
    left, right = normal(shape[0], 12, scale=1.0), normal(12, shape[1], seed=1, scale=1.0)
    product = (left.double() @ right.double()).bfloat16().float()
    weight = LowRank.pivoted(left, right, torch.bfloat16)
    made, base = weight.left.dense(), weight.right.dense()
    if shape[0] > shape[1]:
        made, base, product = base.T, made.T, product.T
    pivots = (made != 0).sum(1) == 1
    assert pivots.sum() == 12
    assert torch.equal(base[made[pivots].argmax(1)], product[pivots])
    assert made.abs().max() < 3
    assert weight.parameters == 12 * (40 + 30 - 12) + 12
    assert weight.nbytes == LowRank.pivoted_bytes(shape, torch.tensor([12]), 2).item()


def test_pivots_of_factors_of_lower_rank() -> None:
    left, right = normal(20, 2) @ normal(2, 6, seed=1), normal(6, 9, seed=2)
    weight = LowRank.pivoted(left, right, torch.float32)
    torch.testing.assert_close(weight.dense(), left @ right, rtol=1e-4, atol=1e-7)
    zeros = LowRank.pivoted(torch.zeros(8, 3), torch.zeros(3, 5), torch.float32)
    assert torch.equal(zeros.dense(), torch.zeros(8, 5))


def test_balanced_factors_have_one_spectrum() -> None:
    weight = LowRank.balanced(normal(24, 4, scale=9.0), normal(4, 60, seed=1), torch.float32)
    left, right = weight.left.dense(), weight.right.dense()
    torch.testing.assert_close(left.T @ left, right @ right.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (128, 128)])
def test_ratio_is_a_share_of_bytes(ratio: float, pivoted: bool, shape: tuple[int, int]) -> None:
    W = normal(*shape).bfloat16()
    solver = SVD(ratio=ratio, pivoted=pivoted)
    weight = solver(W)
    assert isinstance(weight, LowRank)
    assert weight.nbytes == solver.predict(shape, torch.bfloat16)
    more = SVD(rank=weight.rank + 1, pivoted=pivoted).predict(shape, torch.bfloat16)
    assert weight.nbytes <= ratio * W.nbytes < more


def test_pivots_are_worth_rank_at_equal_bytes() -> None:
    W, H = normal(96, 96), moment(96)
    plain, pivoted = SVD(ratio=0.7, pivoted=False)(W, H), SVD(ratio=0.7)(W, H)
    assert isinstance(plain, LowRank)
    assert isinstance(pivoted, LowRank)
    assert pivoted.nbytes <= 0.7 * W.nbytes
    assert pivoted.rank > 1.2 * plain.rank
    problem = LayerProblem.of(W, H)
    assert relative_error(problem, pivoted) < relative_error(problem, plain)


# ranks


def every_choice(options: list[tuple[Tensor, Tensor]], budget: int) -> float:
    """The least total error within the budget, of all combinations."""
    errors = [
        sum(float(error[c]) for (_, error), c in zip(options, chosen, strict=True))
        for chosen in itertools.product(*(range(len(size)) for size, _ in options))
        if sum(int(size[c]) for (size, _), c in zip(options, chosen, strict=True)) <= budget
    ]
    return min(errors)


def random_options(seed: int) -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    options = []
    for count in (5, 4, 6):
        steps = torch.randint(1, 20, (count,), generator=random)
        falls = torch.rand(count, generator=random).sort(descending=True).values
        options.append((steps.cumsum(0), falls.flip(0).cumsum(0).flip(0) - falls[-1]))
    return options


def test_allocation_against_every_choice() -> None:
    exact = 0
    for seed in range(60):
        options = random_options(seed)
        least, most = (sum(int(size[i]) for size, _ in options) for i in (0, -1))
        budget = least + (most - least) * (seed % 10) // 10
        chosen = allocate(options, budget)
        used = sum(int(size[c]) for (size, _), c in zip(options, chosen, strict=True))
        error = sum(float(e[c]) for (_, e), c in zip(options, chosen, strict=True))
        best = every_choice(options, budget)
        assert used <= budget
        if budget - 20 >= least:  # a step is at most 19 bytes
            assert error <= every_choice(options, budget - 20) + 1e-9
        exact += error <= best + 1e-9
    assert exact > 40


def test_allocation_at_the_ends() -> None:
    options = random_options(0)
    assert allocate(options, 0) == [0, 0, 0]
    assert allocate(options, 10**6) == [len(size) - 1 for size, _ in options]
    size, error = options[0]
    assert allocate([(size, 0 * error)], 10**6) == [0]
    assert allocate([], 5) == []


def two_sites() -> list[LayerProblem]:
    """One that the loss hardly sees, and one that it depends on."""
    calm, keen = measured(normal(48, 48), "calm"), measured(normal(64, 40, seed=1), "keen")
    assert calm.gradients is not None
    less = Moments(1e-3 * calm.gradients.H)
    return [LayerProblem("calm", calm.weight, calm.moments, None, less), keen]


@pytest.mark.parametrize("ratio", [0.3, 0.6, 0.9])
def test_global_ranks_go_where_the_loss_looks(ratio: float) -> None:
    sites = two_sites()
    solver = SVD(ratio=ratio).prepare(lambda: iter(sites))
    calm, keen = (solver.compress(site) for site in sites)
    whole = sum(site.weight.nbytes for site in sites)
    assert calm.nbytes + keen.nbytes <= ratio * whole
    assert calm.nbytes + keen.nbytes > 0.95 * ratio * whole
    assert calm.nbytes / 48 / 48 < keen.nbytes / 64 / 40

    def loss(solver: SVD) -> float:
        total = 0.0
        for site in sites:
            D = site.W - solver.compress(site).dense()
            total += ((site.gradients.H @ D @ site.H) * D).sum().item()
        return total

    assert loss(solver) < 0.8 * loss(SVD(ratio=ratio, ranks="uniform"))


def test_a_matrix_stays_dense_where_factors_do_not_pay() -> None:
    sites = two_sites()
    solver = SVD(ratio=0.8, pivoted=False).prepare(lambda: iter(sites))
    calm, keen = (solver.compress(site) for site in sites)
    assert keen.kind == "dense"
    assert torch.equal(keen.dense(), sites[1].W)
    assert calm.nbytes + keen.nbytes <= 0.8 * sum(site.weight.nbytes for site in sites)


@pytest.mark.parametrize(
    "solver", [SVD(rank=3), SVD(energy=0.5), SVD(ranks="uniform"), SVD(metric="weights")],
)  # fmt: skip
def test_ranks_that_need_no_other_site_are_not_prepared(solver: SVD) -> None:
    def fail() -> list[LayerProblem]:
        raise AssertionError("read the problems in vain")

    assert solver.prepare(fail) is solver


@pytest.mark.parametrize("ratio", [0.3, 0.6])
@pytest.mark.parametrize("weighted", [False, True])
def test_without_gradients_errors_are_compared_over_norms(ratio: float, weighted: bool) -> None:
    calm, keen = measured(normal(48, 48), "calm"), measured(30 * normal(64, 40, seed=1), "keen")
    sites = [replace(calm, gradients=None), replace(keen, gradients=None)]
    solver = SVD(ratio=ratio, loss_weighted=weighted).prepare(lambda: iter(sites))
    budget = ratio * sum(site.weight.nbytes for site in sites)
    options = []
    for site in sites:
        energy = torch.linalg.svdvals(site.W.double() @ root(site.H)).square()
        rank = torch.arange(1, len(energy) + 1)
        size = LowRank.pivoted_bytes(site.weight.shape, rank, 4)
        error = (energy.sum() - energy.cumsum(0)) / energy.sum() ** 0.5
        options.append(dict(zip(size.tolist(), error.tolist(), strict=True)))
    best = min(
        a + b
        for (m, a), (n, b) in itertools.product(*(o.items() for o in options))
        if m + n <= budget
    )
    found = [solver.compress(site).nbytes for site in sites]
    assert sum(found) <= budget
    assert sum(o[n] for o, n in zip(options, found, strict=True)) < 1.02 * best


def test_without_data_every_matrix_keeps_the_same_share() -> None:
    plain = [LayerProblem.of(site.W, None, site.name) for site in two_sites()]
    solver = SVD(ratio=0.5).prepare(lambda: iter(plain))
    for problem in plain:
        weight = solver.compress(problem)
        alone = SVD(ratio=0.5, ranks="uniform").compress(problem)
        assert weight.nbytes == alone.nbytes


def test_preparing_leaves_the_compressor_as_it_was() -> None:
    sites, solver = two_sites(), SVD(ratio=0.5)
    prepared = solver.prepare(lambda: iter(sites))
    assert prepared.compress(sites[0]).nbytes != solver.compress(sites[0]).nbytes
    assert solver == SVD(ratio=0.5)
    assert prepared.model_dump() == solver.model_dump()


# residual


def packed(W: Tensor, use: LayerCompressor) -> Weight:
    return use(W.bfloat16())


STARTS = [RTN(bits=2, group=32), RTN(bits=3, group=32), NF4()]


@pytest.mark.parametrize("use", STARTS)
@pytest.mark.parametrize("rank", [1, 8])
def test_residual_is_the_truncation_of_what_was_lost(use: LayerCompressor, rank: int) -> None:
    W, H = normal(64, 96), moment(96)
    Q = packed(W, use)
    problem = LayerProblem("site", Q, Moments(H), W)
    weight = Residual(rank=rank).compress(problem)
    assert isinstance(weight, Sum)
    assert [term.kind for term in weight.terms] == [Q.kind, "lowrank"]
    assert torch.equal(weight.terms[0].dense(), Q.dense())
    slow = Q.dense() + slow_truncation(W - Q.dense(), rank, H).float()
    torch.testing.assert_close(weight.dense(), slow, rtol=0.02, atol=2e-4)
    assert relative_error(problem, weight) < relative_error(problem, Q)


def test_residual_without_data_is_the_plain_svd() -> None:
    W = normal(64, 96)
    Q = packed(W, RTN(bits=2, group=32))
    weight = Residual(rank=8).compress(LayerProblem("site", Q, None, W))
    U, sigma, Vt = torch.linalg.svd(W - Q.dense(), full_matrices=False)
    slow = Q.dense() + U[:, :8] * sigma[:8] @ Vt[:8]
    torch.testing.assert_close(weight.dense(), slow, rtol=0.02, atol=2e-4)


def test_residual_of_full_rank_gives_everything_back() -> None:
    W = normal(24, 32)
    problem = LayerProblem("site", packed(W, RTN(bits=2, group=32)), Moments(moment(32)), W)
    assert relative_error(problem, Residual(rank=99).compress(problem)) < 1e-4


def test_residual_follows_the_loss() -> None:
    W = normal(64, 96)
    Q = packed(W, RTN(bits=2, group=32))
    problem = LayerProblem("site", Q, Moments(moment(96)), W, Moments(moment(64, seed=9)))
    slow = Q.dense() + slow_truncation(W - Q.dense(), 8, problem.H, problem.gradients.H).float()
    torch.testing.assert_close(Residual(rank=8).compress(problem).dense(), slow,
                               rtol=0.02, atol=3e-4)  # fmt: skip


def test_residual_of_a_pruned_weight() -> None:
    W = normal(64, 96)
    Q = Sparse.of(W, keep_share(W.abs(), 0.5))
    problem = LayerProblem("site", Q, Moments(moment(96)), W)
    weight = Residual(rank=8).compress(problem)
    assert relative_error(problem, weight) < 0.7 * relative_error(problem, Q)


@pytest.mark.parametrize(
    ("parameters", "rank"), [({}, 16), ({"rank": 3}, 3), ({"ratio": 0.1}, 3), ({"ratio": 1e-6}, 1)]
)
def test_rank_of_a_residual(parameters: dict[str, float], rank: int) -> None:
    solver = Residual.model_validate(parameters)
    W = normal(64, 96)
    weight = solver.compress(LayerProblem("site", packed(W, RTN(bits=2)), None, W))
    assert isinstance(weight, Sum)
    assert weight.terms[1].spec["rank"] == rank


def test_residual_refuses_two_sizes() -> None:
    with pytest.raises(ValidationError):
        Residual(rank=2, ratio=0.1)
