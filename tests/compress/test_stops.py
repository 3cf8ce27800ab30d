"""Forward passes that wait at every site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import normal
from torch import Tensor, nn

from compress.blockwise import stops
from compress.offload import SMALL

NAMES = ("first", "second", "third")


class Chain(nn.Module):
    """Three linear layers; the second is skipped by short inputs, as an expert may be."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        for i, name in enumerate(NAMES):
            layer = nn.Linear(4, 4, bias=False)
            layer.weight.data = normal(4, 4, seed=i, scale=0.5)
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.first(x).tanh()
        if len(x) > 1:
            x = self.second(input=x).tanh()
        return self.third(x)


def forwards(*lengths: int) -> list[Any]:
    given = [normal(n, 4, seed=7 + n, scale=1) for n in lengths]
    return [lambda model, x=x: model(x) for x in given]


def captured(model: nn.Module, name: str, forward: Any) -> Tensor:
    """What the site reads, in a plain forward pass."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["input"]),
        with_kwargs=True,
    )
    with torch.no_grad():
        forward(model)
    handle.remove()
    return seen[0]


def test_every_site_sees_what_the_model_is_by_then() -> None:
    model, reference, passes = Chain(), Chain(), forwards(3, 5)
    for place, stop in enumerate(stops([model], passes, NAMES)):
        assert stop.name == NAMES[place]
        for number, forward in enumerate(passes):
            expected = captured(reference, stop.name, forward)
            torch.testing.assert_close(stop.inputs[number], expected)
        for one in (model, reference):
            one.get_submodule(stop.name).weight.data *= -0.5
    assert model.calls == 2, "each pass runs once"


def test_two_models_wait_for_each_other() -> None:
    changed, original, passes = Chain(), Chain(), forwards(3)
    untouched = Chain()
    for stop in stops([changed, original], passes, NAMES):
        [(_, (here, there))] = stop.batches()
        torch.testing.assert_close(there, captured(untouched, stop.name, passes[0]))
        assert torch.equal(here, there) is (stop.name == "first")
        changed.get_submodule(stop.name).weight.data.zero_()


def test_a_pass_that_does_not_come_by() -> None:
    found = {stop.name: set(stop.inputs) for stop in stops([Chain()], forwards(3, 1), NAMES)}
    assert found == {"first": {0, 1}, "second": {0}, "third": {0, 1}}


def test_a_site_that_nobody_comes_to() -> None:
    assert [stop.name for stop in stops([Chain()], forwards(1), NAMES)] == ["first", "third"]


def test_the_rest_is_not_computed() -> None:
    model = Chain()
    model.third.forward = None  # would fail
    assert [stop.name for stop in stops([model], forwards(3), NAMES[:2])] == ["first", "second"]


@pytest.mark.parametrize("where", [0, 1, 2])
def test_the_caller_may_leave(where: int) -> None:
    model = Chain()
    passes = stops([model], forwards(3, 2), NAMES)
    for _ in range(where + 1):
        next(passes)
    passes.close()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_error_in_a_pass_is_raised() -> None:
    model = Chain()
    model.second.weight.data = torch.zeros(4, 5)
    with pytest.raises(RuntimeError, match="shape"):
        list(stops([model], forwards(3), NAMES))
    assert not any(module._forward_pre_hooks for module in model.modules())


class Shared(nn.Module):
    """Two layers read one tensor, a third reads its equal."""

    def __init__(self) -> None:
        super().__init__()
        self.computed: list[str] = []
        for name in ("query", "key", "value"):
            setattr(self, name, nn.Linear(4, 4, bias=False))
            getattr(self, name).register_forward_hook(lambda *_, n=name: self.computed.append(n))

    def forward(self, x: Tensor) -> Tensor:
        return self.query(x) + self.key(x) + self.value(x.clone())


def test_the_first_pass_shows_who_reads_the_same() -> None:
    model = Shared()
    passes = stops([model], forwards(3, 5), ("query", "key", "value"))
    query, key = next(passes), next(passes)
    assert model.computed == ["query"], "the second pass did not move"
    assert all(key.inputs[n] is query.inputs[n] for n in (0, 1))
    value = next(passes)
    assert all(torch.equal(value.inputs[n], query.inputs[n]) for n in (0, 1))
    assert value.inputs[1] is not query.inputs[1]
    passes.close()
    assert model.computed == ["query", "key", "query", "key"]


class Feed(nn.Module):
    """A narrow state that is widened and narrowed again, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[str] = []
        for i, shape in enumerate([(64, 256), (256, 64)] * 2):
            layer = nn.Linear(*shape, bias=False)
            layer.register_forward_hook(lambda *_, n=str(i): self.done.append(n))
            setattr(self, f"layer{i}", layer)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(4):
            x = getattr(self, f"layer{i}")(x.tanh())
        return x


def test_the_others_wait_where_they_hold_less(tmp_path: Path) -> None:
    first, other = Feed(), Feed()
    given = [normal(SMALL // 64, 64, seed=n, scale=1) for n in range(3)]
    forwards = [lambda model, x=x: model(x) for x in given]
    names = [f"layer{i}" for i in range(4)]
    seen = {}
    for stop in stops([first, other], forwards, names, tmp_path):
        came = sum(beside is not None for _, (_, beside) in stop.batches())
        assert came == 3
        seen[stop.name] = len(other.done)
    # of three passes only the first finds out where it is worth going on; none goes to the end
    assert seen == {"layer0": 1, "layer1": 6, "layer2": 7, "layer3": 9}


def test_sites_need_not_be_named_in_the_order_of_the_passes() -> None:
    first, other, passes = Chain(), Chain(), forwards(3, 5)
    came = {}
    for stop in stops([first, other], passes, NAMES[::-1]):
        came[stop.name] = [beside is not None for _, (_, beside) in stop.batches()]
    assert came == {name: [True, True] for name in NAMES}
