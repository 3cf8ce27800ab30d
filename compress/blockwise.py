"""Running a model whose weights are on disk: the only hooks in the library.

Each block is given its tensors right before it runs and loses them right after, so that memory
holds one block at a time, whatever the architecture does with its blocks. Forward passes can be
made to wait at every site, so that its weight is compressed before they go on with what it puts
out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import greenlet
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compress import distributed
from compress.anatomy import Anatomy, Block, Site
from compress.memory import available, give_back
from compress.offload import Offload, apart
from compress.products import fast_products
from compress.store import Part
from compress.weights import Weight
from compress.weights.modeling_compressed import round_tokens


@contextmanager
def streamed(
    skeleton: nn.Module,
    anatomy: Anatomy,
    read: Callable[[int], Part],
    dtype: torch.dtype,
    runs: int = 1,
) -> Iterator[nn.Module]:
    """``skeleton`` (parameters on the meta device), made runnable while the context is open.

    ``read(number)`` gives block ``number``; compressed weights run as the dense matrices they
    stand for, in ``dtype``. A block stays until ``runs`` forward passes have gone through it.
    """
    handles = []
    entered: Counter[int] = Counter()
    inside: Counter[int] = Counter()

    def enter(number: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if not entered[number]:
                with apart():
                    fill(skeleton, anatomy, anatomy.blocks[number], read(number), dtype)
            entered[number] += 1
            inside[number] += 1

        return hook

    def leave(number: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            inside[number] -= 1
            if not inside[number] and entered[number] >= runs:
                entered[number] = 0
                empty(skeleton, anatomy, anatomy.blocks[number])
                give_back()

        return hook

    try:
        fill(skeleton, anatomy, anatomy.blocks[0], read(0), dtype)
        for number, block in enumerate(anatomy.blocks[1:], start=1):
            module = skeleton.get_submodule(block.name)
            handles.append(module.register_forward_pre_hook(enter(number)))
            handles.append(module.register_forward_hook(leave(number)))
        yield skeleton
    finally:
        for handle in handles:
            handle.remove()
        for block in anatomy.blocks:
            empty(skeleton, anatomy, block)


@contextmanager
def removed(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """Hooks that are there while the context is open."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def rounded_inputs(
    model: nn.Module, specs: dict[str, dict[str, Any]], *, flat_together: bool = False
) -> Iterator[None]:
    """Sites whose spec says so round what they read, as they will when the model is loaded.

    ``flat_together``: inputs [tokens, in], as OPT's MLPs read them, share one scale, as they do
    where compressed-tensors 0.19 runs the model in transformers. vLLM gives each token its own.
    """

    def rounds(numbers: int | str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x, *rest = args
            if flat_together and x.dim() == 2:
                return round_tokens(x.flatten(), numbers).view_as(x), *rest
            return round_tokens(x, numbers), *rest

        return hook

    handles = [
        model.get_submodule(name).register_forward_pre_hook(rounds(spec["activations"]))
        for name, spec in specs.items()
        if "activations" in spec
    ]
    with removed(handles):
        yield


@contextmanager
def skipping(model: nn.Module, blocks: Sequence[str]) -> Iterator[None]:
    """The modules named ``blocks`` put out what they read, as if they were not there."""

    def skip(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        read = args[0] if args else kwargs["hidden_states"]
        return read if isinstance(output, Tensor) else (read, *output[1:])

    handles = [
        model.get_submodule(name).register_forward_hook(skip, with_kwargs=True) for name in blocks
    ]
    with removed(handles):
        yield


@contextmanager
def captured(
    model: nn.Module, reads: Sequence[str], makes: Sequence[str]
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """What the modules ``reads`` read last and ``makes`` put out last, [tokens, width] by name."""
    read: dict[str, Tensor] = {}
    made: dict[str, Tensor] = {}

    def before(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            read[name] = (args[0] if args else kwargs["hidden_states"]).flatten(0, -2)

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            made[name] = (output if isinstance(output, Tensor) else output[0]).flatten(0, -2)

        return hook

    handles = [
        *(
            model.get_submodule(name).register_forward_pre_hook(before(name), with_kwargs=True)
            for name in reads
        ),
        *(model.get_submodule(name).register_forward_hook(after(name)) for name in makes),
    ]
    with removed(handles):
        yield read, made


@dataclass(frozen=True)
class Stop:
    """All forward passes of the first model that come to ``name`` wait there.

    ``inputs`` holds what the site reads, by number of batch. ``again``: in every process it is
    what the site before read.
    """

    name: str
    inputs: dict[int, Tensor]
    again: bool
    others: Callable[[str, int], AbstractContextManager[list[Tensor | None]]]

    def batches(self) -> Iterator[tuple[int, list[Tensor | None]]]:
        """The number of a batch that came here, and what each model reads; to be gone through once.

        The others' passes come here only now, and None stands for one that does not.
        """
        for number, inputs in self.inputs.items():
            with self.others(self.name, number) as beside:
                yield number, [inputs, *beside]


def stops(
    models: Sequence[nn.Module],
    forwards: Sequence[Callable[[nn.Module], Any]],
    names: Sequence[str],
    folder: Path | None = None,
) -> Generator[Stop, None, None]:
    """Run ``forwards`` on every model, and stop wherever one of the sites reads its input.

    All passes of the first model go on together, a site at a time, each waiting in a greenlet of
    its own. What the caller does to the weights while they wait holds from there on, so every pass
    runs just once. Where the first pass goes on to a site that reads the same tensor, the others
    are taken to. The passes end when the last of ``names`` was stopped at, before that site
    computes anything. Passes of the other models, whose weights nobody changes, come to a site one
    after the other when they are asked for, and wait there or at their next site, where they hold
    less. Several processes stop at the same sites; where none of a process' passes comes to, it
    has no inputs. What the passes hold beyond half of the free memory waits in ``folder``.
    """
    offload = Offload(models, folder, available() // 2) if folder else None
    place = {name: number for number, name in enumerate(names)}
    hub = greenlet.getcurrent()
    left = set(names)

    def wait(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name in left:
                hub.switch((name, args[0] if args else next(iter(kwargs.values()))))

        return hook

    handles = [
        model.get_submodule(name).register_forward_pre_hook(wait(name), with_kwargs=True)
        for model in models
        for name in names
    ]
    waiting: dict[tuple[int, int], tuple[str, Tensor]] = {}
    passes = {
        (m, n): greenlet.greenlet(lambda model=model, forward=forward: (forward(model), None)[1])
        for m, model in enumerate(models)
        for n, forward in enumerate(forwards)
    }

    def go_on(key: tuple[int, int]) -> None:
        waiting.pop(key, None)
        running = offload.running(key) if offload else nullcontext()
        with torch.no_grad(), fast_products(), running:
            at = passes[key].switch()
        if at is not None:
            waiting[key] = at

    def ahead(key: tuple[int, int]) -> int:
        """Let one pass go on: the place of the next site, if that reads the very same tensor."""
        read = waiting[key][1]
        go_on(key)
        name, reads = waiting.get(key, ("", None))
        return place[name] if reads is read else len(names)

    lighter: dict[str, bool] = {}  # whether a pass that goes on from a site then holds less

    @contextmanager
    def others(name: str, number: int) -> Iterator[list[Tensor | None]]:
        """What the other models' passes read at ``name``."""
        keys = [(m, number) for m in range(1, len(models))]
        for key in keys:
            while not passes[key].dead:
                at = waiting.get(key, ("",))[0]
                if at in left and place[at] >= place[name]:
                    break
                go_on(key)
        here = [key for key in keys if waiting.get(key, ("",))[0] == name]
        read = [waiting[key][1] for key in [(0, number), *here]]
        with offload.there(read) if offload else nullcontext():
            yield [waiting[key][1] if key in here else None for key in keys]
        for key in here:
            if offload and name != names[-1] and lighter.get(name, True):
                before = offload.held(key)
                go_on(key)
                lighter.setdefault(name, offload.held(key) < before)

    try:
        leading = [key for key in passes if key[0] == 0]
        for key in leading:
            go_on(key)
        while left:
            nearest = min(
                (place[waiting[key][0]] for key in leading if key in waiting), default=len(names)
            )
            nearest = distributed.least(nearest)
            if nearest == len(names):
                return
            here = [key for key in leading if waiting.get(key, ("",))[0] == names[nearest]]
            inputs = {key[1]: waiting[key][1] for key in here}
            give_back()
            again = False
            while nearest < len(names):
                yield Stop(names[nearest], inputs, again, others)
                again = True
                left.discard(names[nearest])
                if not left:
                    return
                nearest = distributed.agreed(ahead(here[0]) if here else len(names), len(names))
            del inputs
            for key in here[1:]:
                go_on(key)
    finally:
        for one in passes.values():
            if one:
                one.throw()
        if offload:
            offload.close()
        for handle in handles:
            handle.remove()


def fill(model: nn.Module, anatomy: Anatomy, block: Block, part: Part, dtype: torch.dtype) -> None:
    """Put the tensors of ``part`` where ``model`` keeps them, floating ones in ``dtype``."""
    for name, tensor in dense_tensors(block, part).items():
        put(model, anatomy, name, tensor.to(dtype) if tensor.is_floating_point() else tensor)


def dense_tensors(block: Block, part: Part) -> dict[str, Tensor]:
    """Every tensor of a block as the original model would hold it."""
    return dict(part.others) | {
        site.parameter: dense_tensor(site, part.weights[site.name]) for site in block.sites
    }


def dense_tensor(site: Site, weight: Weight) -> Tensor:
    """The parameter of a site as the original model would hold it."""
    matrix = weight.dense().to(weight.dtype)
    return matrix.T.contiguous() if site.layout == "conv1d" else matrix


def empty(model: nn.Module, anatomy: Anatomy, block: Block) -> None:
    """Drop a block's parameters: they return to the meta device."""
    for name in block.tensors:
        owner, _, leaf = name.rpartition(".")
        parameter = model.get_submodule(owner)._parameters.get(leaf)
        if parameter is not None:
            put(model, anatomy, name, torch.empty_like(parameter, device="meta"))


def put(model: nn.Module, anatomy: Anatomy, name: str, tensor: Tensor) -> None:
    """Set a parameter or buffer, in every module that it is tied to."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
        return
    parameter = nn.Parameter(tensor, requires_grad=False)
    module._parameters[leaf] = parameter
    for alias, holder in anatomy.aliases.items():
        if holder == name:
            owner, _, leaf = alias.rpartition(".")
            model.get_submodule(owner)._parameters[leaf] = parameter
