"""The safetensors writer and the blocks on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from compress.store import Part, SafetensorsWriter, Store
from compress.testing import starting_weight
from compress.weights import Weight


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "bytes": torch.randint(0, 255, (5,), dtype=torch.uint8),
        "half": torch.randn(3, 7).half(),
        "empty": torch.empty(0),
        "wide": torch.randn(2, 3, dtype=torch.float64),
        "flags": torch.tensor([True, False, True]),
        "brain": torch.randn(4).bfloat16(),
        "numbers": torch.arange(9).view(3, 3),
        "small": torch.randint(-5, 5, (2, 2), dtype=torch.int8),
        "turned": torch.randn(4, 6).T,
        "one": torch.arange(6.0).view(2, 3)[:1, ::3].T,  # one entry, stride 3
        "scalar": torch.tensor(3, dtype=torch.int32),
        "short": torch.arange(3, dtype=torch.int16),
    }


def write(path: Path, named: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    writer = SafetensorsWriter(path, metadata)
    for name, tensor in named.items():
        writer.add(name, tensor)
    writer.close()


def test_safetensors_reads_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write(path, tensors(), {"note": "ü"})
    found = load_file(path)
    assert set(found) == set(tensors())
    for name, tensor in tensors().items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"note": "ü"}
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_every_tensor_is_aligned_to_its_dtype(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write(path, tensors())
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    assert size % 8 == 0
    header = json.loads(raw[8 : 8 + size])
    end = 0
    for name, tensor in tensors().items():
        start, stop = header[name]["data_offsets"]
        assert start % tensor.dtype.itemsize == 0
        assert stop - start == tensor.numel() * tensor.dtype.itemsize
        end = max(end, stop)
    assert len(raw) == 8 + size + end


def test_equal_tensors_give_equal_bytes_in_any_order(tmp_path: Path) -> None:
    named = tensors()
    write(tmp_path / "a", named)
    write(tmp_path / "b", dict(reversed(named.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_interrupted_write_leaves_no_file_of_that_name(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    writer = SafetensorsWriter(path)
    writer.add("x", torch.ones(100))
    del writer  # killed here
    assert not path.exists()
    assert list(tmp_path.glob("*.safetensors")) == []
    write(path, {"x": torch.zeros(3)})
    assert torch.equal(load_file(path)["x"], torch.zeros(3))
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_failed_rewrite_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    write(path, {"x": torch.ones(3)})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("compress.store.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(path, {"x": torch.zeros(3)})
    assert torch.equal(load_file(path)["x"], torch.ones(3))


def test_blocks_come_back_with_every_kind_of_weight(tmp_path: Path) -> None:
    store = Store(tmp_path / "stage-0")
    weights = {f"layers.0.{kind}": starting_weight(kind) for kind in Weight.kinds}
    others = {"layers.0.norm.weight": torch.ones(4), "layers.0.bias": torch.zeros(2).half()}
    records = [{"stage": "rtn", "name": "layers.0.quantized", "relative_error": 0.25}]
    assert not store.has(3)
    store.write(3, Part(weights, others, records))
    assert store.has(3)
    part = store.read(3)
    assert part.records == records
    assert list(part.weights) == list(weights)
    for name, weight in weights.items():
        again = part.weights[name]
        assert type(again) is type(weight)
        assert again.spec == weight.spec
        assert set(again.tensors) == set(weight.tensors)
        assert all(torch.equal(again.tensors[k], t) for k, t in weight.tensors.items())
    assert set(part.others) == set(others)
    assert all(torch.equal(part.others[k], t) for k, t in others.items())
    assert store.header(3) == ({n: w.spec for n, w in weights.items()}, records)
    store.remove()
    assert not store.folder.exists()
    store.remove()  # twice does no harm
