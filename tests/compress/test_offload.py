"""Passes whose tensors wait on disk compute what they would in memory."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tiny import normal
from torch import Tensor, nn

from compress import blockwise, memory
from compress.blockwise import stops
from compress.errors import RecipeError
from compress.offload import SMALL, Offload

WIDTH, ROWS = 64, SMALL // 64 // 4  # a hidden state is just large enough for the disk


class Block(nn.Module):
    """Holds tensors in variables, in a view, in a list, and half-way through an expression."""

    def __init__(self) -> None:
        super().__init__()
        for seed, name in enumerate(("first", "second", "third")):
            layer = nn.Linear(WIDTH, WIDTH, bias=False)
            layer.weight.data = normal(WIDTH, WIDTH, seed=seed, scale=0.1)
            setattr(self, name, layer)
        self.register_buffer("shared", normal(ROWS, WIDTH, seed=9, scale=1))

    def forward(self, x: Tensor) -> Tensor:
        residual = x + self.shared
        turned = residual.T
        parts = list(residual.mul(2).split(ROWS // 2))
        y = residual.tanh() * self.first(residual)
        y = y.exp_() + self.second(y)
        y += residual
        return self.third(y) + turned.T + torch.cat(parts)


def passes(count: int) -> list[Any]:
    given = [normal(ROWS, WIDTH, seed=20 + n, scale=1) for n in range(count)]
    return [lambda model, x=x: model(x) for x in given]


def seen(model: nn.Module, folder: Path | None) -> list[Tensor]:
    found = []
    for stop in stops([model, Block()], passes(3), ("first", "second", "third"), folder):
        for _, inputs in stop.batches():
            found += [x.clone() for x in inputs if x is not None]
        model.get_submodule(stop.name).weight.data *= 0.5
    return found


@pytest.mark.parametrize("free", [0, 8 * SMALL, 1 << 40])
def test_nothing_changes(free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "available", lambda: free)
    here, there = seen(Block(), None), seen(Block(), tmp_path)
    assert len(here) == 3 * 3 * 2
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
    assert not list(tmp_path.iterdir()), "the files have no name"


def test_what_waits_is_not_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "available", lambda: 0)
    model = Block()
    for stop in stops([model], passes(3), ("first", "second"), tmp_path):
        assert [x.untyped_storage().nbytes() for x in stop.inputs.values()] == [0, 0, 0]
        for number, (x,) in stop.batches():
            assert x is stop.inputs[number]
            assert x.untyped_storage().nbytes() == SMALL
            others = [y for n, y in stop.inputs.items() if n != number]
            assert all(y.untyped_storage().nbytes() == 0 for y in others)
    assert model.shared.untyped_storage().nbytes() == SMALL
    assert all(p.untyped_storage().nbytes() for p in model.parameters())


def test_only_what_is_read_comes_back(tmp_path: Path) -> None:
    offload = Offload([], tmp_path, 0)
    with offload.running("one"):
        added, joined, named, left = (torch.full((SMALL,), float(n)) for n in range(4))
    unread, read = left.untyped_storage(), joined.untyped_storage()
    for _ in range(3):
        with offload.running("one"):
            added += 1
            torch.cat([joined, joined])
            torch.add(1, other=named)
            assert (unread.nbytes(), read.nbytes()) == (0, 4 * SMALL)
    with offload.there([left, added]):
        assert left.eq(3).all()
        assert added.eq(3).all()
    assert offload.file.end == 4 * 4 * SMALL, "places are used again"
    with offload.running("one"):
        assert added.eq(3).all()
        assert joined.eq(1).all()
    offload.close()


def test_passes_may_share_what_one_of_them_made(tmp_path: Path) -> None:
    """As models do that keep a mask from one call to the next."""
    offload = Offload([], tmp_path, 0)
    with offload.running("one"):
        kept = torch.ones(SMALL)
    with offload.running("two"):
        own = kept + 1
        kept += 1
    del kept
    with offload.running("three"):
        others = [torch.full((SMALL,), 3.0) for _ in range(2)]
    with offload.running("one"):
        pass
    with offload.running("two"):
        assert own.eq(2).all()
        more = [torch.zeros(SMALL) for _ in range(2)]  # takes places that are free
    with offload.running("three"):
        assert all(other.eq(3).all() for other in others)
    with offload.there([own, *more]):
        assert own.eq(2).all()
        assert not torch.cat(more).any()
    offload.close()


def test_scripted_functions_read_unseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Scripted(nn.Module): ...

    monkeypatch.setattr(sys.modules[__name__], "twice", torch.jit.script(_twice), raising=False)
    offload = Offload([Scripted()], tmp_path, 0)
    with offload.running("one"):
        tensor = torch.ones(SMALL)
    with offload.running("one"):
        assert twice(tensor).eq(2).all()  # type: ignore[name-defined]  # noqa: F821
    offload.close()


def _twice(x: Tensor) -> Tensor:
    return x + x


def test_files_go_with_the_passes(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    offload = Offload([], tmp_path / "made", 0)
    with offload.running("one"):
        tensor = torch.ones(SMALL)
    assert tensor.untyped_storage().nbytes() == 0
    with offload.running("one"):
        assert tensor.eq(1).all()
        del tensor
    offload.close()
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        name = "full"

        def seek(self, *_: int) -> None: ...
        def close(self) -> None: ...
        def write(self, _: memoryview) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("compress.offload.TemporaryFile", lambda **_: Full())
    monkeypatch.setattr(blockwise, "available", lambda: 0)
    with pytest.raises(OSError, match="No space left"):
        list(stops([Block()], passes(2), ("first",), tmp_path))


def test_control_groups_limit_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = memory.available()
    assert whole > 0
    monkeypatch.setattr(memory, "_limits", lambda: [10**12, 10**6])
    assert memory.available() == 0
    monkeypatch.setattr(memory, "_limits", lambda: [])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory.available() == pytest.approx(whole / 2, rel=0.2)


def test_a_person_may_say_how_much_may_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    own, machine = psutil.Process().memory_info().rss, psutil.virtual_memory()
    monkeypatch.setenv(memory.ASKED, f"{own + 10**8}")
    assert memory.available() == pytest.approx(10**8, abs=3e7)
    monkeypatch.setenv(memory.ASKED, "1MB")
    assert memory.available() == 0
    monkeypatch.setenv(memory.ASKED, "100%")
    assert memory.available() <= machine.total - own + 3e7
    monkeypatch.setenv(memory.ASKED, "much")
    with pytest.raises(RecipeError, match="size much: write a share or bytes"):
        memory.available()
