"""Models of another shape than their folder's: fewer layers, narrower ones, the config to match.

A ``Reshaped`` source is what the stages after a structural one see: its config and anatomy are the
new model's, its folder (tokenizer, teacher, hash) is still the original's. A shape is expressed as
plainly as it can be: by the config alone; for a Llama whose heads no longer fill its width by the
config of a Mistral, which is the same model; else by ``compressed_shapes``, which needs the
modelling file. Whether an expression is right is not known here: the stages try it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from compress.anatomy import Anatomy, Block, Site, anatomize
from compress.compressors.base import StructureCompressor
from compress.compressors.structure.hidden import Hidden
from compress.compressors.structure.width import Width
from compress.errors import ModelError, RecipeError
from compress.recipe import Recipe, Stage
from compress.source import Source, model_class

READERS = {"mlp": "down_proj", "attention": "o_proj"}
MAKERS = {
    "mlp": ("gate_proj", "up_proj", "gate_up_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "qkv_proj"),
}
# What configs call the width of the MLP, and modules the numbers that grow with their heads.
WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size", "hidden_dim")
HEADS = ("num_heads", "num_attention_heads", "n_heads", "num_key_value_heads", "split_size",
         "all_head_size", "inner_dim")  # fmt: skip


class Reshaped(Source):
    """``before`` with only some of its ``layers``, and ``changes`` of its config.json.

    Raises:
        ModelError: transformers rejects the config, or makes more matrices of it.
    """

    def __init__(self, before: Source, layers: Sequence[int], changes: Mapping[str, Any]) -> None:
        self._original = before.original
        self.name, self.folder, self.files = before.name, before.folder, before.files
        self.changes = {**before.changes, **changes}
        config = {**before.config.to_dict(), **changes}
        try:
            self.config = CONFIG_MAPPING[config["model_type"]].from_dict(config)
        except Exception as error:
            raise ModelError(f"{self.folder}: {config['model_type']} rejects {changes}") from error
        self.model_class = model_class(self.config, self.folder)
        self.skeleton = self.new_skeleton()
        anatomy = anatomize(self.skeleton)
        old = before.anatomy.blocks
        self.origins = (0, *(i + 1 for i in layers))
        stored = {name: dtype for name, _, dtype in before.headers()}
        self._stored: dict[str, torch.dtype] = {}
        for block, origin in zip(anatomy.blocks, self.origins, strict=True):
            for name in block.tensors:
                known = stored.get(renamed(name, block, old[origin]))
                if known is not None:
                    self._stored[name] = known
        other = next((s.name for s in anatomy.sites if s.parameter not in self._stored), None)
        if other is not None:
            raise ModelError(f"{self.folder}: with {changes} there is a matrix more, {other}")
        self.anatomy = Anatomy(
            tuple(
                replace(
                    b, sites=tuple(replace(s, dtype=self._stored[s.parameter]) for s in b.sites)
                )
                for b in anatomy.blocks
            ),
            anatomy.aliases,
        )

    @property
    def original(self) -> Source:
        return self._original

    def step(self, before: Source) -> dict[str, Any]:
        """What makes this of ``before``, as JSON: the arguments of ``Reshaped``."""
        changes = {k: v for k, v in self.changes.items() if before.changes.get(k, ...) != v}
        return {"layers": [origin - 1 for origin in self.origins[1:]], "changes": changes}

    @property
    def hash(self) -> str:
        return self._original.hash

    def headers(self) -> Iterator[tuple[str, torch.Size, torch.dtype]]:
        for name, dtype in self._stored.items():
            yield name, self._shapes[name], dtype


def renamed(name: str, block: Block, other: Block) -> str:
    """The name that a tensor or module of ``block`` has in ``other``."""
    return name if block.index is None else other.name + name[len(block.name) :]


def shortened(source: Source, layers: Sequence[int]) -> Reshaped:
    """The model of these layers alone.

    Raises:
        ModelError: its layers are in several lists (an encoder and a decoder).
    """
    blocks = source.anatomy.blocks[1:]
    if len({block.name.rpartition(".")[0] for block in blocks}) > 1:
        raise ModelError(
            f"{source.model_class.__name__} has several lists of layers; blocks can be dropped "
            "from models with one (decoders, encoders)"
        )
    config = source.config.to_dict()
    changes: dict[str, Any] = {_key(source, "num_hidden_layers"): len(layers)}
    for key, value in config.items():
        if isinstance(value, list) and "layer" in key and len(value) == len(blocks):
            changes[key] = [value[i] for i in layers]
    if "compressed_shapes" in config:
        changes["compressed_shapes"] = {
            renamed(name, blocks[old], replace(blocks[old], name=blocks[new].name)): sizes
            for new, old in enumerate(layers)
            for name, sizes in config["compressed_shapes"].items()
            if name.startswith(blocks[old].name + ".")
        }
    return Reshaped(source, layers, changes)


@dataclass(frozen=True)
class Channels:
    """What some sites of a block make and one reads, in ``units`` that can be removed.

    Unit u is the u-th of ``units`` equal runs of the reader's columns, and of each piece of the
    makers' rows; a fused projection has several pieces.
    """

    part: str
    reader: Site
    makers: tuple[Site, ...]
    units: int

    @property
    def price(self) -> int:
        """Parameters of one unit."""
        columns = self.reader.shape[0] * self.reader.shape[1]
        return (columns + sum(s.shape[0] * s.shape[1] for s in self.makers)) // self.units

    def pieces(self, maker: Site, *, interleaved: bool) -> list[int]:
        """How the rows of ``maker`` are cut up: fused ones piece by piece, or unit by unit."""
        rows, read = maker.shape[0], self.reader.shape[1]
        if interleaved or maker.role not in ("qkv_proj", "gate_up_proj"):
            return [rows]
        return [read, rows - read] if self.part == "mlp" else [read, *[(rows - read) // 2] * 2]

    def rows(self, maker: Site, kept: torch.Tensor, *, interleaved: bool) -> torch.Tensor:
        """Rows of ``maker`` that make the units ``kept``, int64."""
        start, found = 0, []
        for piece in self.pieces(maker, interleaved=interleaved):
            found.append(start + spread(kept, piece // self.units))
            start += piece
        return torch.cat(found)

    def columns(self, kept: torch.Tensor) -> torch.Tensor:
        """Columns of the reader that read the units ``kept``, int64."""
        return spread(kept, self.reader.shape[1] // self.units)


def spread(units: torch.Tensor, size: int) -> torch.Tensor:
    """Places of all that belongs to ``units``, each a run of ``size``."""
    return (units[:, None] * size + torch.arange(size)).flatten()


def channels(stage: Stage, source: Source) -> list[Channels]:
    """What a width stage narrows, in the order of the blocks.

    Raises:
        ModelError: a block's MLP or attention is not understood.
        RecipeError: the stage takes a part of an MLP or of an attention.
    """
    chosen = {site.name for site in stage.sites(source.anatomy)}
    found = []
    for block in source.anatomy.blocks[1:]:
        for part, role in READERS.items():
            makers = tuple(site for site in block.sites if site.role in MAKERS[part])
            readers = [site for site in block.sites if site.role == role]
            taken = [site.name in chosen for site in (*readers, *makers)]
            if not any(taken):
                continue
            if not all(taken):
                raise RecipeError(
                    f"{stage.use} takes the whole {part} of a layer: targets [{part}]"
                )
            if len(readers) != 1 or not makers:
                raise ModelError(
                    f"{source.model_class.__name__}: {block.name} has {len(readers)} {role} and "
                    f"{len(makers)} matrices before it where its {part} should have one and some; "
                    f"leave it out with targets or skip"
                )
            units = readers[0].shape[1] if part == "mlp" else _groups(source)
            sizes = [readers[0].shape[1], *(site.shape[0] for site in makers)]
            if any(size % units for size in sizes):
                raise ModelError(f"{readers[0].name}: {units} heads do not share out {sizes}")
            found.append(Channels(part, readers[0], makers, units))
    if not found:
        raise RecipeError(f"{stage.use}: targets leave neither an MLP nor an attention")
    return found


def _groups(source: Source) -> int:
    """Groups of heads that share keys and values; heads, if each has its own."""
    heads = getattr(source.config, "num_attention_heads", None)
    groups = getattr(source.config, "num_key_value_heads", None) or heads
    if not groups or "compressed_shapes" in source.config.to_dict():
        raise ModelError(f"{source.model_class.__name__}: its config does not say how many heads")
    return groups


def widths(stage: Stage, found: Sequence[Channels]) -> dict[str, int]:
    """How many units each reader keeps when every layer loses the same share."""
    compressor = stage.compressor
    assert isinstance(compressor, Width)
    return {
        one.reader.name: compressor.keeps(
            one.units, compressor.multiple if one.part == "mlp" else 1
        )
        for one in found
    }


def narrowed(
    source: Source, found: Sequence[Channels], keep: Mapping[str, int]
) -> Iterator[Reshaped]:
    """Ways to express the narrower model, the plainest first."""
    layers = range(source.anatomy.layers)
    wanted: dict[str, tuple[int, int]] = {}
    for one in found:
        rows, columns = one.reader.shape
        kept = keep[one.reader.name]
        wanted[one.reader.name] = rows, columns // one.units * kept
        for maker in one.makers:
            wanted[maker.name] = maker.shape[0] // one.units * kept, maker.shape[1]
    for changes in (*_configs(source, found, keep), _shapes(source, found, keep, wanted)):
        try:
            candidate = Reshaped(source, layers, changes)
        except ModelError:
            continue
        sites = {site.name: site.shape for site in candidate.anatomy.sites}
        same = {s.name: wanted.get(s.name, s.shape) for s in source.anatomy.sites}
        if sites == same and set(candidate.skeleton.state_dict()) == set(
            source.skeleton.state_dict()
        ):
            yield candidate


def _configs(
    source: Source, found: Sequence[Channels], keep: Mapping[str, int]
) -> Iterator[dict[str, Any]]:
    """Changes of the config alone, if all layers keep as much."""
    config = source.config.to_dict()
    shares = {(one.part, one.units, keep[one.reader.name]) for one in found}
    changes: dict[str, Any] = {}
    for part, units, kept in shares:
        if sum(other == part for other, _, _ in shares) > 1:
            return
        if part == "mlp":
            key = next((k for k in WIDTHS if k in config and config[k] in (units, None)), None)
            if key is None:
                return
            changes[key] = kept
        else:
            for name in ("num_attention_heads", "num_key_value_heads"):
                key = _key(source, name)
                if config.get(key):
                    changes[key] = config[key] // units * kept
            heads = getattr(source.config, "num_attention_heads", 1)
            reader = next(one.reader for one in found if one.part == "attention")
            changes["head_dim"] = reader.shape[1] // heads
    yield from _twins(source, changes)


def _twins(source: Source, changes: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """``changes`` as they are, and of a Llama for a Mistral, whose heads may have any size."""
    yield changes
    twin = source.model_class.__name__.replace("Llama", "Mistral")
    if source.config.model_type == "llama" and hasattr(transformers, twin):
        as_mistral = {"model_type": "mistral", "architectures": [twin], "sliding_window": None}
        yield {**changes, **as_mistral}


def _shapes(
    source: Source,
    found: Sequence[Channels],
    keep: Mapping[str, int],
    wanted: Mapping[str, tuple[int, int]],
) -> dict[str, Any]:
    """The sizes of every module, for the modelling file."""
    shapes: dict[str, dict[str, int]] = dict(source.config.to_dict().get("compressed_shapes", {}))
    for one in found:
        for site in (one.reader, *one.makers):
            rows, columns = wanted[site.name]
            names = ("nf", "nx") if site.layout == "conv1d" else ("out_features", "in_features")
            shapes[site.name] = dict(zip(names, (rows, columns), strict=True))
            owner = site.name.rpartition(".")[0]
            module = source.skeleton.get_submodule(owner)
            numbers = {key: getattr(module, key, None) for key in HEADS}
            if one.part == "attention":
                own = {k: n // one.units * keep[one.reader.name] for k, n in numbers.items() if n}
                shapes |= {owner: own} if own else {}
    return {"compressed_shapes": shapes}


def slimmed(source: Source, keep: int) -> Iterator[Reshaped]:
    """Ways to express a residual stream of ``keep`` channels, the plainest first.

    A norm adds eps to a mean over fewer channels, so eps grows as their mean does.

    Raises:
        ModelError: the config does not say how wide the stream is, or layers differ already.
    """
    config, key = source.config.to_dict(), _key(source, "hidden_size")
    if not isinstance(config.get(key), int) or "compressed_shapes" in config:
        raise ModelError(
            f"{source.model_class.__name__}: its config does not say how wide the residual stream "
            "is, or its layers differ already (hidden goes before width by error)"
        )
    changes: dict[str, Any] = {key: keep}
    heads = config.get(_key(source, "num_attention_heads"))
    if key == "hidden_size" and heads:
        changes["head_dim"] = config.get("head_dim") or config[key] // heads
    if eps := next((k for k in ("rms_norm_eps", "layer_norm_epsilon") if k in config), None):
        changes[eps] = config[eps] * config[key] / keep
    for asked in _twins(source, changes):
        try:
            yield Reshaped(source, range(source.anatomy.layers), asked)
        except ModelError:
            continue


def _key(source: Source, name: str) -> str:
    """What config.json calls an attribute (GPT-2: n_layer)."""
    return type(source.config).attribute_map.get(name, name)


def predicted(stage: Stage, source: Source) -> Source:
    """The model that ``stage`` leaves, in the shape that can be known before a weight is read.

    Which layers go is not known, so the last do; of an allocation by error the uniform one.
    """
    compressor = stage.compressor
    if not isinstance(compressor, StructureCompressor):
        return source
    if isinstance(compressor, Hidden):
        return _predicted_slim(stage, compressor, source)
    if not isinstance(compressor, Width):
        layers = source.anatomy.layers
        if compressor.keeps(layers) == layers:
            raise RecipeError(
                f"{stage.use} amount={compressor.amount}: nothing goes; of {layers} blocks that "
                "would be less than half a block"
            )
        return shortened(source, range(compressor.keeps(layers)))
    found = channels(stage, source)
    keep = widths(stage, found)
    if all(keep[one.reader.name] == one.units for one in found):
        raise RecipeError(
            f"{stage.use} amount={compressor.amount}: nothing goes; of {found[0].units} in "
            f"{found[0].reader.name} that would be less than one, or than the multiple"
        )
    return next(narrowed(source, found, keep))


def _predicted_slim(stage: Stage, compressor: Hidden, source: Source) -> Source:
    width = source.config.to_dict().get(_key(source, "hidden_size")) or 0
    keep = compressor.keeps(width, compressor.multiple)
    if keep == width:
        raise RecipeError(
            f"{stage.use} amount={compressor.amount}: nothing goes; of {width} channels that would "
            "be less than one, or than the multiple"
        )
    found = next(slimmed(source, keep), None)
    if found is None:
        raise ModelError(
            f"{source.model_class.__name__}: its config takes no hidden_size of {keep} by itself; "
            "hidden is for models with RMSNorm, as Llama's"
        )
    return found


def sources(recipe: Recipe, source: Source) -> list[Source]:
    """The model that each stage finds, and the last leaves, as far as is known beforehand."""
    seen = [source]
    for stage in recipe.stages:
        seen.append(predicted(stage, seen[-1]))
    return seen
