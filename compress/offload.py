"""Forward passes that wait with what they hold on disk, if that is much.

A pass holds tensors in variables all over the model's code. They stay where they are, and only
their memory goes: a storage can be emptied, and filled again before the pass goes on.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from compress.memory import give_back

SMALL = 1 << 16  # bytes of a storage that is not worth a file
FREED = 1 << 26  # bytes put on disk until what is free goes back to the system, which takes time


@dataclass
class _Held:
    """What one pass has made: tensors that may be alive, and the storages that are on disk."""

    tensors: list[weakref.ref[Tensor]] = field(default_factory=list)
    nbytes: int = 0  # in memory while it waits
    away: list[tuple[torch.UntypedStorage, int]] = field(default_factory=list)  # and their bytes
    file: IO[bytes] | None = None


class Offload:
    """What passes over ``models`` hold: ``limit`` bytes in memory, the rest in ``folder``.

    The files have no name, and so are gone with the process. Weights are not the passes' own.
    """

    def __init__(self, models: Sequence[nn.Module], folder: Path, limit: int) -> None:
        self.models, self.folder, self.limit = models, folder, limit
        self.passes: dict[Hashable, _Held] = {}
        self.total = self.freed = 0

    @contextmanager
    def running(self, key: Hashable) -> Iterator[None]:
        """While the pass ``key`` runs, until it waits again."""
        held = self.passes.setdefault(key, _Held())
        self._fetch(held)
        held.away = []
        self.total -= held.nbytes
        with _Recording(held.tensors):
            yield
        alive = [tensor for ref in held.tensors if (tensor := ref()) is not None]
        held.tensors = [weakref.ref(tensor) for tensor in alive]
        storages = _large(alive)
        held.nbytes = sum(storage.nbytes() for storage in storages.values())
        if self.total + held.nbytes > self.limit:
            weights = self._weights()
            self._put(held, [s for pointer, s in storages.items() if pointer not in weights])
            held.nbytes = 0
            if self.freed > FREED:  # holes where small tensors were would add up, pass by pass
                give_back()
                self.freed = 0
        self.total += held.nbytes

    @contextmanager
    def there(self, keys: Iterable[Hashable]) -> Iterator[None]:
        """While what these passes hold is looked at, not changed."""
        passes = [self.passes[key] for key in keys]
        for held in passes:
            self._fetch(held)
        yield
        for held in passes:
            for storage, _ in held.away:
                storage.resize_(0)

    def held(self, key: Hashable) -> int:
        """Bytes in memory that the pass ``key`` holds while it waits."""
        return self.passes[key].nbytes

    def close(self) -> None:
        for held in self.passes.values():
            if held.file:
                held.file.close()
        self.passes.clear()

    def _weights(self) -> set[int]:
        """Where the storages of parameters and buffers lie: all passes need them."""
        return {
            tensor.untyped_storage().data_ptr()
            for model in self.models
            for tensor in (*model.parameters(), *model.buffers())
            if not tensor.is_meta
        }

    def _put(self, held: _Held, storages: list[torch.UntypedStorage]) -> None:
        if held.file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            held.file = TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115
        held.file.seek(0)
        for storage in storages:
            held.away.append((storage, storage.nbytes()))
            self.freed += storage.nbytes()
            _write(held.file, storage)
            storage.resize_(0)

    def _fetch(self, held: _Held) -> None:
        if held.away:
            assert held.file is not None
            held.file.seek(0)
            for storage, nbytes in held.away:
                storage.resize_(nbytes)
                _read(held.file, storage)


def _large(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """The storages of ``tensors`` that are worth a file, by where they lie."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {s.data_ptr(): s for s in storages if s.nbytes() >= SMALL and s.resizable()}


def _bytes(storage: torch.UntypedStorage) -> memoryview:
    # not through numpy, after which a storage cannot be resized
    return memoryview((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())).cast("B")


def _write(file: IO[bytes], storage: torch.UntypedStorage) -> None:
    data = _bytes(storage)
    while data:
        data = data[file.write(data) :]


def _read(file: IO[bytes], storage: torch.UntypedStorage) -> None:
    data = _bytes(storage)
    while data:
        count = file.readinto(data)  # type: ignore[attr-defined]
        if not count:
            raise OSError(f"{file.name}: it ends too early")
        data = data[count:]


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
    """Remembers every tensor that a torch function returns, and does not keep it alive."""

    def __init__(self, tensors: list[weakref.ref[Tensor]]) -> None:
        super().__init__()
        self.tensors = tensors

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if not _apart:
            for one in made if isinstance(made, (tuple, list)) else (made,):
                if isinstance(one, Tensor):
                    self.tensors.append(weakref.ref(one))
        return made
