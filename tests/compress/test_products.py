"""Products of bfloat16 without kernels for them: the same numbers, types and gradients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from compress import products
from compress.products import fast_products, has_bfloat16, narrow_factors


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "has_bfloat16", lambda: False)


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).bfloat16()


@pytest.mark.parametrize(
    ("one_dnn", "instructions", "expected"),
    [
        (True, {"avx512", "avx512_bf16"}, True),
        (True, {"avx512", "amx_tile"}, True),
        (True, {"avx512"}, False),  # it says yes, and widens
        (True, set(), True),  # not Intel's, or AVX2 with its own instructions
        (False, {"avx2"}, False),
        (None, {"avx512"}, True),  # a torch without it cannot tell
    ],
)
def test_processors_that_only_pretend_are_known(
    monkeypatch: pytest.MonkeyPatch, one_dnn: bool | None, instructions: set[str], expected: bool
) -> None:
    known = {} if one_dnn is None else {"_is_mkldnn_bf16_supported": lambda: one_dnn}
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**known))
    monkeypatch.setattr(products, "_has", lambda name: name in instructions)
    assert has_bfloat16.__wrapped__() is expected


CASES: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "linear": (functional.linear, (numbers(3, 700, 37), numbers(211, 37), numbers(211))),
    "linear, few rows": (functional.linear, (numbers(3, 5, 37), numbers(211, 37), numbers(211))),
    "linear, one row": (functional.linear, (numbers(5), numbers(3, 5))),
    "linear, no rows": (functional.linear, (numbers(0, 5), numbers(3, 5))),
    "addmm": (torch.addmm, (numbers(9), numbers(17, 5), numbers(5, 9))),
    "@": (lambda a, b: a @ b, (numbers(2, 70, 5), numbers(2, 5, 3))),
    "bmm": (torch.bmm, (numbers(2, 70, 5), numbers(2, 5, 3))),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("grad", [False, True])
def test_a_product_is_the_exact_one_rounded_once(name: str, grad: bool) -> None:
    function, arguments = CASES[name]
    exact = function(*(a.double() for a in arguments))
    with fast_products(), torch.set_grad_enabled(grad):
        found = function(*arguments)
    assert found.dtype == torch.bfloat16
    assert found.shape == exact.shape
    torch.testing.assert_close(found, exact.bfloat16(), rtol=2**-7, atol=1e-6)


def test_products_are_of_float32() -> None:
    """Sums of many small numbers in bfloat16 would stop growing."""
    seen = []

    class Watching(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.extend(
                a.dtype for a in args if isinstance(a, Tensor) and func is functional.linear
            )
            return func(*args, **(kwargs or {}))

    with Watching(), fast_products():
        functional.linear(numbers(40, 8), numbers(2, 8))
    assert set(seen) == {torch.float32}


def test_gradients_come_back_in_bfloat16() -> None:
    x, w = numbers(60, 5).requires_grad_(), numbers(3, 5).requires_grad_()
    with fast_products():
        functional.linear(x, w).sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(x.grad, w.detach().float().sum(0).bfloat16().expand(60, 5))


def test_other_types_are_left_alone() -> None:
    a, b = torch.ones(2, 3, dtype=torch.float16), torch.ones(3, 2, dtype=torch.float16)
    with fast_products():
        assert (a @ b).dtype == torch.float16
        assert (a.long() @ b.long()).dtype == torch.int64


def test_where_there_are_kernels_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "has_bfloat16", lambda: True)
    assert not isinstance(fast_products(), torch.overrides.TorchFunctionMode)


def test_a_torch_that_cannot_tell_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    products.has_bfloat16.cache_clear()
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert products.has_bfloat16()
    monkeypatch.undo()
    products.has_bfloat16.cache_clear()


@pytest.mark.parametrize("kernels", [False, True])
def test_factors_are_narrow_where_that_is_faster_and_for_no_longer_than_asked(
    monkeypatch: pytest.MonkeyPatch, kernels: bool
) -> None:
    matmul = SimpleNamespace(fp32_precision="ieee")
    monkeypatch.setattr(products, "has_bfloat16", lambda: kernels)
    monkeypatch.setattr(torch.backends.mkldnn, "matmul", matmul, raising=False)
    with narrow_factors():
        assert matmul.fp32_precision == ("bf16" if kernels else "ieee")
    assert matmul.fp32_precision == "ieee"
    with suppress(KeyError), narrow_factors():
        raise KeyError
    assert matmul.fp32_precision == "ieee"


def test_a_torch_without_such_a_setting_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "has_bfloat16", lambda: True)
    monkeypatch.setattr(torch.backends, "mkldnn", object())
    with narrow_factors():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).sum() == 8
