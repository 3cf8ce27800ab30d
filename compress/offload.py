"""Forward passes that wait with what they hold on disk, if that is much.

A pass holds tensors in variables all over the model's code. They stay where they are, and only
their memory goes: a storage can be emptied, and is filled again when the pass reads it. Much of
what a pass holds it never reads again, as queries once attention is done.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch.overrides import TorchFunctionMode

from compress.memory import give_back

SMALL = 1 << 16  # bytes of a storage that is not worth a file
FREED = 1 << 26  # bytes emptied until what is free goes back to the system, which takes time


@dataclass(frozen=True)
class _Away:
    """A storage that is empty, and where in the file its bytes are."""

    storage: UntypedStorage
    nbytes: int
    place: int


@dataclass
class _Held:
    """What one pass has made: tensors that may be alive, and the storages that were put on disk."""

    tensors: list[weakref.ref[Tensor]] = field(default_factory=list)
    nbytes: int = 0  # in memory while it waits
    put: dict[int, _Away] = field(default_factory=dict)


class Offload:
    """What passes over ``models`` hold: ``limit`` bytes in memory, the rest in ``folder``.

    The file has no name, and so is gone with the process. Weights are not the passes' own.
    """

    def __init__(self, models: Sequence[nn.Module], folder: Path, limit: int) -> None:
        self.file, self.limit = _File(folder), limit
        self.passes: dict[Hashable, _Held] = {}
        self.away: dict[int, _Away] = {}  # by identity of the storage
        self.total = self.freed = 0
        modules = [module for model in models for module in model.modules()]
        self._named = [d for m in modules for d in (m._parameters, m._buffers)]
        self._scripted = any(map(_has_scripts, {type(module).__module__ for module in modules}))

    @contextmanager
    def running(self, key: Hashable) -> Iterator[None]:
        """While the pass ``key`` runs, until it waits again."""
        held = self.passes.setdefault(key, _Held())
        self.total -= held.nbytes
        if self._scripted:
            self.fetch(held.put)
        with _Recording(self, held.tensors):
            yield
        with torch._C.DisableTorchFunction():
            self._wait(held)

    @contextmanager
    def there(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        """While ``tensors`` of passes that wait are looked at, not changed."""
        places = [self.away.get(tensor.untyped_storage()._cdata) for tensor in tensors]
        for away in filter(None, places):
            self.file.read(away)
        yield
        for away in filter(None, places):
            away.storage.resize_(0)
            self.freed += away.nbytes
        self._give_back()

    def fetch(self, storages: Iterable[int]) -> None:
        """Have those that are away in memory again."""
        for one in storages:
            if away := self.away.pop(one, None):
                self.file.read(away)
                self.file.free(away)

    def held(self, key: Hashable) -> int:
        """Bytes in memory that the pass ``key`` holds while it waits."""
        return self.passes[key].nbytes

    def close(self) -> None:
        self.file.close()
        self.passes.clear()
        self.away.clear()

    def _wait(self, held: _Held) -> None:
        alive = [tensor for ref in held.tensors if (tensor := ref()) is not None]
        held.tensors = [weakref.ref(tensor) for tensor in alive]
        storages = {s._cdata: s for s in map(Tensor.untyped_storage, alive)}
        held.put = {one: away for one, away in held.put.items() if self.away.get(one) is away}
        for one in held.put.keys() - storages.keys():
            self.file.free(held.put.pop(one))
            del self.away[one]
        large = [s for s in storages.values() if s.nbytes() >= SMALL and s.resizable()]
        held.nbytes = sum(storage.nbytes() for storage in large)
        if self.total + held.nbytes > self.limit:
            weights = self._weights()
            self._put(held, [s for s in large if s._cdata not in weights])
            held.nbytes = 0
            self._give_back()
        self.total += held.nbytes

    def _give_back(self) -> None:
        if self.freed > FREED:  # holes where small tensors were would add up, pass by pass
            give_back()
            self.freed = 0

    def _weights(self) -> set[int]:
        """The storages of parameters and buffers: all passes need them."""
        return {
            tensor.untyped_storage()._cdata
            for named in self._named
            for tensor in named.values()
            if tensor is not None
        }

    def _put(self, held: _Held, storages: Iterable[UntypedStorage]) -> None:
        for storage in storages:
            self.freed += storage.nbytes()
            held.put[storage._cdata] = self.away[storage._cdata] = self.file.take(storage)


class _File:
    """Bytes of storages in a file without a name. What is freed takes others of the same size."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file: IO[bytes] | None = None
        self.end = 0
        self.places: dict[int, list[int]] = {}

    def take(self, storage: UntypedStorage) -> _Away:
        """Move a storage's bytes here from memory."""
        if self.file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.file = TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115
        nbytes = storage.nbytes()
        if self.places.get(nbytes):
            place = self.places[nbytes].pop()
        else:
            place, self.end = self.end, self.end + nbytes
        self.file.seek(place)
        data = _bytes(storage)
        while data:
            data = data[self.file.write(data) :]
        storage.resize_(0)
        return _Away(storage, nbytes, place)

    def read(self, away: _Away) -> None:
        """Have it in memory, too."""
        assert self.file is not None
        away.storage.resize_(away.nbytes)
        self.file.seek(away.place)
        data = _bytes(away.storage)
        while data:
            count = self.file.readinto(data)  # type: ignore[attr-defined]
            if not count:
                raise OSError(f"{self.folder}: what waits there ends too early")
            data = data[count:]

    def free(self, away: _Away) -> None:
        self.places.setdefault(away.nbytes, []).append(away.place)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def _bytes(storage: UntypedStorage) -> memoryview:
    # not through numpy, after which a storage cannot be resized
    return memoryview((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())).cast("B")


def _has_scripts(module: str) -> bool:
    """Whether a module's code has functions of torch.jit, which nobody sees reading."""
    code = vars(sys.modules.get(module, object))
    return any(isinstance(value, torch.jit.ScriptFunction) for value in code.values())


_apart = False  # whether tensors are made now that no pass holds


@contextmanager
def apart() -> Iterator[None]:
    """Tensors made in here are not of the pass that runs: weights that it is given."""
    global _apart
    before, _apart = _apart, True
    try:
        yield
    finally:
        _apart = before


class _Recording(TorchFunctionMode):
    """Fills what a torch function reads, and remembers all it returns without keeping it alive."""

    def __init__(self, offload: Offload, tensors: list[weakref.ref[Tensor]]) -> None:
        super().__init__()
        self.offload, self.tensors = offload, tensors

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.offload.away:
            given = _tensors([*args, *kwargs.values()])
            self.offload.fetch(tensor.untyped_storage()._cdata for tensor in given)
        made = func(*args, **kwargs)
        if not _apart:
            self.tensors += map(weakref.ref, _tensors([made]))
        return made


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Those among ``values``, and in tuples and lists there."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)
