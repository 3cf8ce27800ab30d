"""The model that is to be compressed: its config, its anatomy, and its tensors one at a time.

Nothing but the tensors asked for is read, so a checkpoint larger than memory can be compressed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from compress.anatomy import Anatomy, Block, anatomize
from compress.errors import ModelError, first_line
from compress.store import Part
from compress.weights import Dense, Weight
from compress.weights.modeling_compressed import resize

DEMO = Path(__file__).parent / "demo" / "pycoder-1m"
INDEX = "model.safetensors.index.json"
# What a Hugging Face folder may hold beside config and weights, and a compressed copy keeps.
COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "chat_template.jinja", "chat_template.json", "preprocessor_config.json",
    "processor_config.json",
)  # fmt: skip


def resolve(model: str | Path) -> Path:
    """The local folder of ``demo``, of a path, or of a hub id (downloaded, safetensors only).

    A GGUF file is its own.
    """
    if str(model) == "demo":
        return DEMO
    path = Path(model).expanduser()
    if path.is_dir() or (path.suffix == ".gguf" and path.is_file()):
        return path
    if path.exists() or str(model).startswith((".", "/", "~")) or str(model).count("/") > 1:
        raise ModelError(f"{model}: no such model folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                str(model),
                allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"],
            )
        )
    except Exception as error:
        reason = first_line(error, 120)
        raise ModelError(
            f"model '{model}': neither a local folder nor a hub model that could be "
            f"downloaded ({reason})"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file says; nothing if there is none, or none that can be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def read_config(folder: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of a model folder.

    Raises:
        ModelError: no config.json, not JSON, or a model type that transformers does not know.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json, so this is not a Hugging Face model folder")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        reason = first_line(error)
        raise ModelError(f"{folder}/config.json: {reason}") from error


def model_class(config: PretrainedConfig, folder: Path | str) -> type[Any]:
    """The transformers class that ``config.architectures`` names.

    Raises:
        ModelError: none is named, or transformers has no such class.
    """
    names = config.architectures or []
    if not names:
        raise ModelError(f"{folder}/config.json: 'architectures' is empty; name the model class")
    cls = getattr(transformers, names[0], None)
    if cls is None:
        raise ModelError(f"{folder}: transformers {transformers.__version__} has no {names[0]}")
    return cls


def digest(folder: Path, files: Iterable[Path]) -> str:
    """SHA-256 over the config of a model folder and its weight ``files``, 16 hex digits."""
    config = folder / "config.json"
    found = hashlib.sha256(config.read_bytes() if config.is_file() else b"")
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                found.update(chunk)
    return found.hexdigest()[:16]


class Source:
    """A model folder, opened for reading tensor by tensor.

    ``untie`` gives tied tensors (an output head tied to the embedding) copies of their own.

    ``changes`` are the entries of config.json that structural stages have changed: see ``shape``.

    Raises:
        ModelError: not a model folder, already compressed, not understood, or a tensor is missing.
    """

    changes: Mapping[str, Any] = MappingProxyType({})
    there: dict[str, tuple[Path, str]]  # every tensor of the files, as this model would name it

    def __init__(self, model: str | Path, *, untie: bool = False) -> None:
        self.name = str(model) if str(model) == "demo" else str(Path(model).expanduser())
        self.folder = resolve(model)
        self.config, self.model_class = self._described()
        if untie:
            self.config.tie_word_embeddings = False
        self.files = self._files()
        self.skeleton = self.new_skeleton()
        self.anatomy: Anatomy = anatomize(self.skeleton)
        self._place = self._places(untie)
        self.anatomy = self._stored_dtypes()

    def _described(self) -> tuple[PretrainedConfig, type[Any]]:
        """The config and the model class of a folder that is not compressed."""
        raw = read_json(self.folder / "config.json")
        method = (raw.get("quantization_config") or {}).get("quant_method")
        if method or "compressed_sites" in raw:
            raise ModelError(
                f"{self.folder} is already compressed ({method or 'compressed modules'}); start "
                "from the original model with all stages in one recipe"
            )
        config = read_config(self.folder)
        return config, model_class(config, self.folder)

    def _files(self) -> list[Path]:
        index = self.folder / INDEX
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError) as error:
                raise ModelError(f"{index}: not a safetensors index") from error
            files = [self.folder / name for name in names]
        else:
            files = sorted(self.folder.glob("model*.safetensors"))
        missing = [f.name for f in files if not f.is_file()]
        if missing:
            raise ModelError(f"{self.folder}: {missing[0]} is listed in {INDEX} but is not there")
        if not files:
            pickled = [*self.folder.glob("*.bin"), *self.folder.glob("*.pt")]
            hint = (
                (
                    f" ({pickled[0].name} is a pickle, which can run code and is never read; "
                    "convert it to safetensors)"
                )
                if pickled
                else ""
            )
            if any(self.folder.glob("*.onnx")):
                hint = "; it holds ONNX graphs, which runtime='onnx' runs and nothing is made from"
            raise ModelError(f"{self.folder}: no model*.safetensors file{hint}")
        return files

    def new_skeleton(self) -> PreTrainedModel:
        """The model with parameters on the meta device and its buffers computed."""
        try:
            with init_empty_weights(include_buffers=False):
                model = self.model_class(self.config)
        except Exception as error:
            reason = first_line(error)
            raise ModelError(
                f"{self.folder}: {self.model_class.__name__} rejects its config: {reason}"
            ) from error
        resize(model, getattr(self.config, "compressed_shapes", {}))
        model.tie_weights()
        return model.eval()

    def _places(self, untie: bool) -> dict[str, tuple[Path, str]]:
        """Each tensor of the model → (file, its name there).

        Tensors that transformers would join or split while it loads are not found.
        """
        transforms = get_model_conversion_mapping(self.skeleton)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        there = self.there = {}
        for file in self.files:
            for key in open_file(file).keys():  # noqa: SIM118 - not a dict
                name, converted = rename_source_key(key, renamings, converters)
                if converted is None:
                    there[name] = (file, key)
        prefix = f"{self.skeleton.base_model_prefix}."
        ties = self.anatomy.aliases if not untie else anatomize(self._tied_skeleton()).aliases
        groups: dict[str, list[str]] = {}
        for alias, name in ties.items():
            groups.setdefault(name, [name]).append(alias)
            groups[alias] = groups[name]
        place = {}
        for block in self.anatomy.blocks:
            for name in block.tensors:
                for candidate in (name, *groups.get(name, ())):
                    spellings = (candidate, candidate.removeprefix(prefix), prefix + candidate)
                    found = next((there[s] for s in spellings if s in there), None)
                    if found is not None:
                        place[name] = found
                        break
                else:
                    self._check_buffer(name)
        return place

    def _stored_dtypes(self) -> Anatomy:
        """The anatomy with every site in the dtype of its file."""
        stored = {name: dtype for name, _, dtype in self.headers()}
        blocks = tuple(
            replace(block, sites=tuple(replace(s, dtype=stored[s.parameter]) for s in block.sites))
            for block in self.anatomy.blocks
        )
        return Anatomy(blocks, self.anatomy.aliases)

    def _tied_skeleton(self) -> nn.Module:
        self.config.tie_word_embeddings = True
        try:
            return self.new_skeleton()
        finally:
            self.config.tie_word_embeddings = False

    def _check_buffer(self, name: str) -> None:
        """A missing buffer keeps the value the model computes; a missing parameter is an error."""
        if name in dict(self.skeleton.named_parameters()):
            raise ModelError(f"{self.folder}: the checkpoint has no tensor for {name}")

    @cached_property
    def _shapes(self) -> dict[str, torch.Size]:
        return {name: tensor.shape for name, tensor in self.skeleton.state_dict().items()}

    def tensor(self, name: str) -> Tensor:
        """One tensor, in the dtype it is stored in.

        Raises:
            ModelError: unreadable, not finite, or of another shape than the model's.
        """
        if name not in self._place:
            return self.skeleton.state_dict()[name]
        file, key = self._place[name]
        try:
            tensor = open_file(file).get_tensor(key)
        except SafetensorError as error:
            raise ModelError(f"{file}: cannot read {key} ({error})") from error
        if tensor.shape != (expected := self._shapes[name]):
            raise ModelError(
                f"{file}: {key} is {list(tensor.shape)}, the config asks for {list(expected)}"
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ModelError(f"{file}: {key} holds NaN or infinite values")
        return tensor

    def block(self, block: Block) -> tuple[dict[str, Weight], dict[str, Tensor]]:
        """The weights of a block's sites as [out, in], and its other tensors, by name."""
        sites = {site.parameter: site for site in block.sites}
        weights: dict[str, Weight] = {}
        others: dict[str, Tensor] = {}
        for name in block.tensors:
            tensor = self.tensor(name)
            site = sites.get(name)
            if site is None:
                others[name] = tensor
            else:
                weights[site.name] = Dense.of(tensor.T if site.layout == "conv1d" else tensor)
        return weights, others

    @property
    def original(self) -> Source:
        """The model folder itself, before structural stages."""
        return self

    @cached_property
    def hash(self) -> str:
        """See ``digest``."""
        return digest(self.folder, self.files)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files on disk."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most of the model's numbers, as stored; packed ones, of 8 bits, aside."""
        counts: dict[torch.dtype, int] = {}
        for name, shape, dtype in self.headers():
            if dtype.is_floating_point and dtype.itemsize > 1 and name:
                counts[dtype] = counts.get(dtype, 0) + shape.numel()
        return max(counts, key=lambda d: counts[d])

    @property
    def parameters(self) -> int:
        """Parameters of the model, tied ones once."""
        return sum(shape.numel() for _, shape, _ in self.headers())

    def headers(self) -> Iterator[tuple[str, torch.Size, torch.dtype]]:
        """Name, shape and dtype of every tensor of the model, without reading any."""
        opened = {file: open_file(file) for file in {file for file, _ in self._place.values()}}
        for name, (file, key) in self._place.items():
            piece = opened[file].get_slice(key)
            yield name, torch.Size(piece.get_shape()), _DTYPES[piece.get_dtype()]


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
           "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
           "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
           "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}  # fmt: skip


def open_file(file: Path) -> Any:
    """A safetensors file, of which tensors can be read one by one."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: not a whole safetensors file ({error})") from error


class Original:
    """The model itself, read as a store of blocks."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def read(self, number: int) -> Part:
        return Part(*self.source.block(self.source.anatomy.blocks[number]))

    def header(self, number: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        return {name: weight.spec for name, weight in self.read(number).weights.items()}, []
