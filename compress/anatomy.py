"""A model taken apart: blocks, and in them the sites whose weights can be compressed.

Works on a model on the meta device, so that looking costs no memory. Blocks are the items of the
model's ``nn.ModuleList``s of layers; a site is a Linear, a transformers Conv1D, or an embedding.
Roles are the names that Llama gives, so that one recipe fits many families. A matrix that lives in
anything else (fused experts, convolutions within a block) is refused by name: compressing a model
and silently missing most of its weights is worse than an error.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from compress.errors import ModelError, RecipeError, did_you_mean

# Last parts of a module's name → role. The longest match wins.
ROLES = {
    # attention
    "q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "o_proj",
    "out_proj": "o_proj", "q_lin": "q_proj", "k_lin": "k_proj", "v_lin": "v_proj",
    "out_lin": "o_proj", "query": "q_proj", "key": "k_proj", "value": "v_proj",
    "attention.output.dense": "o_proj", "attention.dense": "o_proj", "self_attn.dense": "o_proj",
    "self_attention.dense": "o_proj", "attn.c_proj": "o_proj", "attn.c_attn": "qkv_proj",
    "crossattention.c_proj": "o_proj", "query_key_value": "qkv_proj", "qkv_proj": "qkv_proj",
    "qkv": "qkv_proj", "SelfAttention.q": "q_proj", "SelfAttention.k": "k_proj",
    "SelfAttention.v": "v_proj", "SelfAttention.o": "o_proj", "EncDecAttention.q": "q_proj",
    "EncDecAttention.k": "k_proj", "EncDecAttention.v": "v_proj", "EncDecAttention.o": "o_proj",
    # feed-forward
    "gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj",
    "gate_up_proj": "gate_up_proj", "mlp.c_fc": "up_proj", "mlp.c_proj": "down_proj",
    "fc1": "up_proj", "fc2": "down_proj", "lin1": "up_proj", "lin2": "down_proj",
    "dense_h_to_4h": "up_proj", "dense_4h_to_h": "down_proj", "intermediate.dense": "up_proj",
    "output.dense": "down_proj", "wi": "up_proj", "wi_0": "gate_proj", "wi_1": "up_proj",
    "wo": "down_proj",
}  # fmt: skip
GROUPS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj", "gate_up_proj"),
}
_KINDS: dict[type, str] = {nn.Linear: "linear", Conv1D: "conv1d", nn.Embedding: "embedding"}

# Modules of one parent that inference engines such as vLLM hold as one matrix: one setting for all.
JOINED: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
)


@dataclass(frozen=True)
class Site:
    """A weight that can be compressed, seen as a matrix [out, in].

    An embedding is [vocabulary, hidden]; a Conv1D holds the transpose. ``aliases`` are the modules
    that are tied to this one (an output head tied to the embedding): one table, counted once.
    """

    name: str
    role: str
    block: int | None
    shape: tuple[int, int]
    layout: str  # linear | conv1d | embedding
    dtype: torch.dtype
    aliases: tuple[str, ...] = ()
    tied_roles: tuple[str, ...] = ()

    @property
    def parameter(self) -> str:
        return f"{self.name}.weight"

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.dtype.itemsize


@dataclass(frozen=True)
class Block:
    """The unit that is streamed: one layer, or (index None) all that stands outside of layers."""

    name: str
    index: int | None
    sites: tuple[Site, ...]
    tensors: tuple[str, ...] = field(repr=False)  # every tensor of the state dict, tied ones once


@dataclass(frozen=True)
class Anatomy:
    """All blocks of a model, the part outside of layers first."""

    blocks: tuple[Block, ...]
    aliases: dict[str, str]  # tied parameter → the parameter that holds the tensor

    @property
    def sites(self) -> list[Site]:
        return [site for block in self.blocks for site in block.sites]

    @property
    def layers(self) -> int:
        return sum(block.index is not None for block in self.blocks)


def anatomize(model: nn.Module) -> Anatomy:
    """Take ``model`` (on any device, the meta device included) apart.

    A site's dtype is that of the model's parameter; ``Source`` puts the stored one in its place.

    Raises:
        ModelError: no layers were found, or a layer holds matrices that no site stands for.
    """
    lists = _layer_lists(model)
    if not lists:
        raise ModelError(
            f"{type(model).__name__}: found no layers (an nn.ModuleList whose items hold Linear or "
            "Conv1D modules); this architecture is not understood"
        )
    layers = [f"{name}.{i}" for name, items in lists for i in range(len(items))]
    aliases = _ties(model)
    names = [n for n in model.state_dict() if n not in aliases]
    tied: dict[str, list[str]] = {}
    for alias, name in aliases.items():
        tied.setdefault(name, []).append(alias.rpartition(".")[0])

    def block(name: str, index: int | None, members: list[str]) -> Block:
        sites = []
        for tensor in members:
            site = _site(model, tensor, index)
            if site is not None:
                others = tuple(tied.get(tensor, ()))
                roles = tuple(_outer_role(model, other) for other in others)
                sites.append(replace(site, aliases=others, tied_roles=roles))
        return Block(name, index, tuple(sites), tuple(members))

    inside: dict[str, list[str]] = {layer: [] for layer in layers}
    outside: list[str] = []
    for tensor in names:
        pieces = tensor.split(".")
        owners = (".".join(pieces[:i]) for i in range(len(pieces), 0, -1))
        owner = next((name for name in owners if name in inside), None)
        (outside if owner is None else inside[owner]).append(tensor)
    blocks = [block("outside", None, outside)]
    blocks += [block(layer, i, inside[layer]) for i, layer in enumerate(layers)]
    _refuse_unknown(model, blocks[1:])
    return Anatomy(tuple(blocks), aliases)


def select(
    sites: Sequence[Site],
    targets: Sequence[str],
    skip: Sequence[str],
    blocks: Sequence[int] | None,
    layers: int,
) -> list[Site]:
    """The sites that a stage takes.

    ``targets`` and ``skip`` hold roles (q_proj, embed, head, …), the words blocks (every Linear
    and Conv1D in a layer), attention, mlp and all, glob patterns on the whole module name, or
    regular expressions behind ``re:``.
    ``blocks`` are layer numbers; negative ones count from the last.

    Raises:
        RecipeError: a pattern that matches nothing, or a layer that does not exist.
    """
    for pattern in [*targets, *skip]:
        _check_expression(pattern)
        if not any(matches(site, pattern) for site in sites):
            known = {site.role for site in sites} | {r for s in sites for r in s.tied_roles}
            hint = did_you_mean(pattern, known | {"all", "blocks", *GROUPS})
            raise RecipeError(f"'{pattern}' matches no weight of this model{hint}")
    chosen = [s for s in sites if any(matches(s, t) for t in targets)]
    chosen = [s for s in chosen if not any(matches(s, t) for t in skip)]
    if blocks is not None:
        for number in blocks:
            if not -layers <= number < layers:
                raise RecipeError(
                    f"blocks: there is no layer {number}; this model has {layers}, "
                    f"numbered 0 to {layers - 1}"
                )
        wanted = {number % layers for number in blocks}
        chosen = [s for s in chosen if s.block in wanted]
    if not chosen:
        raise RecipeError("targets, skip and blocks together leave no weight to compress")
    return chosen


def joined(sites: Iterable[Site]) -> list[list[Site]]:
    """The sites that engines hold as one, together; all others by themselves. In their order."""
    found: dict[tuple[str, ...], list[Site]] = {}
    for site in sites:
        parent, _, last = site.name.rpartition(".")
        key = next(((parent, *names) for names in JOINED if last in names), (site.name,))
        found.setdefault(key, []).append(site)
    return list(found.values())


def _check_expression(pattern: str) -> None:
    if not pattern.startswith("re:"):
        return
    try:
        re.compile(pattern[3:])
    except re.error as error:
        raise RecipeError(f"'{pattern}' is not a regular expression ({error})") from error


def matches(site: Site, pattern: str) -> bool:
    """Whether a role, a word, a glob or a ``re:`` pattern takes this site."""
    if pattern == "all":
        return True
    if pattern == "blocks":
        return site.block is not None and site.layout != "embedding"
    roles = (site.role, *site.tied_roles)
    if pattern in GROUPS:
        return site.role in GROUPS[pattern]
    names = (site.name, *site.aliases)
    if pattern.startswith("re:"):
        return any(re.search(pattern[3:], name) for name in names)
    if pattern in roles or pattern in names:
        return True
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def _layer_lists(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """Outermost ModuleLists whose items hold a Linear or a Conv1D somewhere below."""
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if any(name.startswith(outer + ".") for outer, _ in found):
            continue
        if all(any(_kind(m) in ("linear", "conv1d") for m in item.modules()) for item in module):
            found.append((name, module))
    return found


def _kind(module: nn.Module) -> str | None:
    return next((kind for cls, kind in _KINDS.items() if isinstance(module, cls)), None)


def _ties(model: nn.Module) -> dict[str, str]:
    """Parameters that share one tensor: the first name holds it, the others map to it.

    An embedding holds before a head does, because that is where checkpoints keep the tensor.
    """
    holder: dict[int, str] = {}
    aliases: dict[str, str] = {}
    state = model.state_dict(keep_vars=True)

    def is_embedding(name: str) -> bool:
        return isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding)

    for name in sorted(state, key=lambda n: not is_embedding(n)):
        first = holder.setdefault(id(state[name]), name)
        if first != name:
            aliases[name] = first
    return aliases


def _site(model: nn.Module, tensor: str, index: int | None) -> Site | None:
    name, _, leaf = tensor.rpartition(".")
    module = model.get_submodule(name)
    layout = _kind(module)
    if leaf != "weight" or layout is None:
        return None
    weight = module.get_parameter("weight")
    rows, columns = weight.shape
    if layout == "conv1d":
        rows, columns = columns, rows
    role = _outer_role(model, name) if index is None else _inner_role(name)
    return Site(name, role, index, (rows, columns), layout, weight.dtype)


def _inner_role(name: str) -> str:
    pieces = name.split(".")
    for start in range(max(0, len(pieces) - 3), len(pieces)):
        role = ROLES.get(".".join(pieces[start:]))
        if role is not None:
            return role
    return pieces[-1]


def _outer_role(model: nn.Module, name: str) -> str:
    """embed for the token table, head for the output layer, else the module's own name."""
    module = model.get_submodule(name)
    for role, getter in (("embed", "get_input_embeddings"), ("head", "get_output_embeddings")):
        try:
            if getattr(model, getter)() is module:
                return role
        except (AttributeError, NotImplementedError, TypeError):
            continue
    leaf = name.rpartition(".")[2]
    if isinstance(module, nn.Embedding):
        return "embed" if leaf in ("shared", "embed_tokens") else "positions"
    return "head" if leaf in ("lm_head", "classifier", "score", "qa_outputs") else leaf


def _refuse_unknown(model: nn.Module, layers: Iterable[Block]) -> None:
    """Every matrix in a layer must be a site; norms, biases and small vectors need not be."""
    state = model.state_dict()
    for block in layers:
        known = {site.parameter for site in block.sites}
        for tensor in block.tensors:
            shape = state[tensor].shape
            if tensor not in known and sum(n > 1 for n in shape) > 1:
                owner = type(model.get_submodule(tensor.rpartition(".")[0])).__name__
                raise ModelError(
                    f"{type(model).__name__}: {tensor} {list(shape)} belongs to {owner}, which is "
                    "not understood (only Linear, Conv1D and Embedding are); refusing to compress "
                    "the model around it"
                )
