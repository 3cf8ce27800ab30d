"""Entropy-coded integers: round trips, bytes within the bits, less error than grids."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import normal

from compress.compressors.quantization.bits import cost
from compress.compressors.quantization.ecgptq import ECGPTQ, importance, unit_steps
from compress.compressors.quantization.ecrtn import ECRTN
from compress.compressors.quantization.gptq import GPTQ
from compress.compressors.quantization.rates import Rate, share_out
from compress.compressors.quantization.rtn import RTN
from compress.compressors.quantization.steps import Steps, entropy
from compress.moments import Moments
from compress.problem import LayerProblem, Table, relative_error
from compress.weights import Coded, Weight


def moments(width: int, seed: int = 1) -> Moments:
    X = normal(4 * width, width, seed=seed, scale=1) * torch.linspace(0.1, 3, width)
    return Moments(X.T @ X / len(X))


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    levels=st.sampled_from([1, 2, 3, 4, 7, 16, 17, 60, 256, 900]),
    far=st.lists(st.integers(-2048, 2047), max_size=3),
    seed=st.integers(0, 9),
)
def test_codes_come_back(rows: int, columns: int, levels: int, far: list[int], seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, levels, (rows, columns), generator=random) - levels // 2
    codes.view(-1)[: len(far)] = torch.tensor(far)[: codes.numel()]
    row = torch.randint(100, 150, (rows,), generator=random).byte()
    column = torch.randint(100, 150, (columns,), generator=random).byte()
    weight = Coded.of(codes, row, column, 0.5, torch.bfloat16)
    again = Weight.restore(weight.spec, weight.tensors).dense()
    for i in range(rows):
        for j in range(columns):
            power = (int(row[i]) - 128 + int(column[j]) - 128) / 8
            assert math.isclose(again[i, j], int(codes[i, j]) * 0.5 * 2**power, rel_tol=1e-5)


@pytest.mark.parametrize("far", [0, 1, 20])
@pytest.mark.parametrize("spread", [0.3, 0.4, 0.6, 1.0, 2.0, 4.0])
def test_the_stream_is_near_the_entropy(spread: float, far: int) -> None:
    """Also where a few codes are far from all others: they do not keep the rest from sharing."""
    codes = (normal(256, 256, scale=1) * spread).round().int()
    codes.view(-1)[:far] = torch.tensor([-100, 77])[torch.arange(far) % 2].int()
    ones = torch.full((256,), 128, dtype=torch.uint8)
    weight = Coded.of(codes, ones, ones, 1.0, torch.float32)
    assert torch.equal(weight.dense().int(), codes)
    assert weight.spec["rare"] >= far or weight.spec["digits"] == 1
    taken = 8 * len(weight.tensors["stream"]) / codes.numel()
    assert entropy(codes) - 1e-6 <= taken <= entropy(codes) + 0.06


def test_streams_of_folders_before_rare_codes_are_read() -> None:
    codes = torch.tensor([[0, 1, 2], [2, 1, 0]])
    ones = torch.full((3,), 128, dtype=torch.uint8)
    weight = Coded.of(codes, ones[:2], ones, 1.0, torch.float32)
    del weight.spec["rare"]
    assert torch.equal(weight.dense().int(), codes)


@pytest.mark.parametrize("bits", [1.5, 2.25, 3.0, 4.25, 6.0])
@pytest.mark.parametrize("shape", [(64, 96), (33, 100), (128, 40)])
def test_bytes_fit_into_the_bits_and_are_used(bits: float, shape: tuple[int, int]) -> None:
    problem = LayerProblem.of(normal(*shape), moments(shape[1]).H)
    for method in (ECRTN(bits=bits), ECGPTQ(bits=bits)):
        weight = method.compress(problem)
        wanted = method.predict(shape, torch.float32)
        assert wanted * 0.97 - 8 <= weight.nbytes <= wanted


def test_fractions_of_a_bit_fit_and_each_is_worth_more() -> None:
    problem = LayerProblem.of(normal(256, 320), moments(320).H)
    for method in (ECRTN, ECGPTQ):
        errors = [1.0]  # of nothing at all
        for bits in (0.3, 0.5, 0.75, 1.0):
            weight = method(bits=bits).compress(problem)
            wanted = method(bits=bits).predict((256, 320), torch.float32)
            assert wanted - 0.012 * 256 * 320 / 8 <= weight.nbytes <= wanted
            errors.append(relative_error(problem, weight))
        assert all(more < 0.97 * less for less, more in itertools.pairwise(errors))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_less_error_than_a_grid_of_the_same_bytes(bits: int) -> None:
    problem = LayerProblem.of(normal(256, 256), moments(256).H)
    plain, grid = LayerProblem.of(normal(256, 256)), RTN(bits=bits)
    more = 8 * grid.predict((256, 256), torch.float32) / 256**2
    rounded, coded = grid.compress(plain), ECRTN(bits=more).compress(plain)
    assert coded.nbytes <= rounded.nbytes
    assert relative_error(plain, coded) < 0.75 * relative_error(plain, rounded)
    fed, coded = GPTQ(bits=bits).compress(problem), ECGPTQ(bits=more).compress(problem)
    assert coded.nbytes <= fed.nbytes
    assert relative_error(problem, coded) < 0.75 * relative_error(problem, fed)


def test_columns_have_steps_by_what_is_left_of_them() -> None:
    """The diagonal of the factor of H⁻¹, in the order of rounding."""
    H = moments(12)
    order = H.H.diagonal().argsort(descending=True, stable=True)
    U = torch.linalg.cholesky(torch.linalg.inv(H.damped[order][:, order]), upper=True)
    _, columns, _ = unit_steps(LayerProblem.of(normal(8, 12), H.H))
    torch.testing.assert_close(columns[order], U.diagonal().float(), rtol=1e-4, atol=1e-6)


def test_rows_that_matter_more_have_finer_steps_and_cost_less_in_all() -> None:
    F = torch.diag(torch.logspace(-2, 2, 64))
    problem = LayerProblem("w", LayerProblem.of(normal(64, 128)).weight, moments(128),
                           gradients=Moments(F))  # fmt: skip
    even = LayerProblem("w", problem.weight, problem.moments)
    aware, blind = ECGPTQ(bits=3).compress(problem), ECGPTQ(bits=3).compress(even)
    assert aware.tensors["row"][0] > aware.tensors["row"][-1]
    assert cost(problem, aware) < 0.7 * cost(problem, blind)


def test_frequent_rows_of_a_table_are_not_cut_off() -> None:
    """Their steps are so fine that codes go far beyond a byte."""
    table = Table(1.0 / torch.arange(1, 301) ** 2, torch.eye(64))
    problem = LayerProblem("t", LayerProblem.of(normal(300, 64)).weight, table=table)
    bits, costs = zip(*ECGPTQ().trials(problem), strict=True)
    assert all(b > a for a, b in itertools.pairwise(bits))
    falls = [math.log2(a / b) for a, b in itertools.pairwise(costs)]
    gains = [b - a for a, b in itertools.pairwise(bits)]
    assert all(fall > 1.8 * gain for fall, gain in zip(falls[6:], gains[6:], strict=True))


def test_rows_of_a_table_count_by_lookups_and_logits() -> None:
    weight = LayerProblem.of(normal(10, 16)).weight
    table = Table(torch.arange(10) / 45, torch.eye(16), torch.full((10,), 0.1))
    F = importance(LayerProblem("t", weight, Moments(2 * torch.eye(16)), table=table))
    expected = torch.arange(10) / 45 + 0.2
    torch.testing.assert_close(F, expected + 0.05 * expected.mean())


def test_bits_are_shared_out_at_one_step_size() -> None:
    small, large = normal(128, 128, scale=1.0), normal(128, 128, seed=1, scale=4.0)
    shares = share_out([Rate.of("small", small), Rate.of("large", large)], 3.5)
    assert math.isclose(sum(shares.values()) / 2, 3.5, abs_tol=1e-3)
    assert math.isclose(shares["large"] - shares["small"], 2.0, abs_tol=0.1)  # log₂ 4


def test_less_than_the_usual_least_is_shared_out_as_asked() -> None:
    rates = [Rate.of(str(n), normal(128, 128, seed=n, scale=2.0**n)) for n in range(2)]
    assert math.isclose(sum(share_out(rates, 0.3).values()) / 2, 0.3, abs_tol=1e-3)


def test_steps_are_near_those_asked_for() -> None:
    rows, columns = torch.rand(50) + 0.01, torch.rand(30) + 0.01
    sizes = Steps.of(rows, columns).sizes()
    assert (sizes / torch.outer(rows, columns)).log2().abs().max() < 1 / 8 + 1e-4
