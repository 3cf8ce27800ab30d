"""A recipe's stages in order: read blocks, compress, write blocks, and at the end a checkpoint.

``run`` is a generator of events; nothing here prints. A run that was killed goes on from
its finished blocks and ends with the same bytes, because every block depends on the recipe, the
model and the seed alone.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from compress import calibration, distributed
from compress.assemble import assemble, take_back
from compress.blockwise import rounded_inputs, streamed
from compress.calibration import calibrates, check_text
from compress.checkpoint import fingerprint, load, load_tokenizer, record
from compress.compressors.base import (
    LayerCompressor,
    StructureCompressor,
    TrainingCompressor,
    TrainingRun,
    TransformCompressor,
)
from compress.errors import CheckpointError, DataError
from compress.events import Event, outcome
from compress.formats import CompressedTensors, auto_classes
from compress.layerwise import solve
from compress.plain_load import observe
from compress.planning.goals import resolved
from compress.preflight import check_disk, check_output, preflight
from compress.problem import LayerProblem
from compress.recipe import Recipe, Stage
from compress.solvers import record as record_site
from compress.source import Original, Source
from compress.store import Blocks, Store
from compress.structure import followed, restructure
from compress.transform import transform
from compress.verify import Verifier, probe_inputs
from compress.workdir import (
    disk_errors,
    finish,
    finished_stages,
    locked,
    place,
    reported,
    tidied,
    work_folder,
)
from compress.writer import Writer, versions

HELD = 128  # windows held out from training at most: enough to tell steps apart, quickly read


def run(
    recipe: Recipe,
    out: Path,
    *,
    name: str | None = None,
    overwrite: bool = False,
    verify: bool = True,
    verifier: Verifier | None = None,
    source: Source | None = None,
) -> Generator[Event, None, dict[str, Any]]:
    """Apply ``recipe`` and write the checkpoint folder ``out``; returns its record.

    ``verifier`` and ``source`` may be shared between runs. The folder appears only when a process
    of its own has loaded it with plain transformers and found the same logits; ``verify`` False
    leaves that out, for models that do not fit into memory whole.

    Raises:
        CompressError: anything the user can put right; nothing is left at ``out`` then.
    """
    if distributed.rank():
        return (yield from _help(recipe, out))
    check_output(out, overwrite=overwrite)
    source = source or Source(recipe.model, untie=recipe.untie)
    recipe = yield from resolved(recipe, source)
    needs = preflight(recipe, source)
    check_text(recipe, source)
    check_disk(out, needs.disk)
    work = work_folder(out)
    with disk_errors(out), locked(work), _own(verify, verifier) as checker, tidied(work):
        check_output(out, overwrite=overwrite)  # again: another run may have ended meanwhile
        done = distributed.least(finished_stages(work, recipe, source.hash))
        before: Blocks = Store(work / f"stage-{done - 1}") if done else Original(source)
        model = source  # as the stage finds it
        for number, stage in enumerate(recipe.stages):
            if number >= done:
                store = Store(work / f"stage-{number}")
                yield from _stage(number, stage, recipe, model, before, store)
                distributed.wait()
                if isinstance(before, Store):
                    before.remove()
                before = store
            model = followed(stage, reported(work, number), model)
        yield Event("check", 0, 2)
        reports = [reported(work, number) for number in range(len(recipe.stages))]
        writer = Writer(model, before, recipe, work / "draft")
        flat = isinstance(writer.format, CompressedTensors)
        expected = expect(model, before, flat_together=flat)
        info = writer.write(name or out.name, expected, reports)
        yield Event("check", 1, 2)
        checked = checker.check(work / "draft") if checker else {}
        place(work / "draft", out)
        shutil.rmtree(work)
        distributed.wait()
        yield Event("check", 2, 2, checked and {"difference": checked["difference"]}, info)
    return info


def _help(recipe: Recipe, out: Path) -> Generator[Event, None, dict[str, Any]]:
    """What processes other than the first do: their share of what runs the model, and wait."""
    source = Source(recipe.model, untie=recipe.untie)
    recipe = yield from resolved(recipe, source)
    work = work_folder(out)
    done = distributed.least(len(recipe.stages))
    before: Blocks = Store(work / f"stage-{done - 1}") if done else Original(source)
    model = source
    for number, stage in enumerate(recipe.stages):
        if number >= done:
            store = Store(work / f"stage-{number}")
            if not _alone(stage, recipe, model):
                yield from _stage(number, stage, recipe, model, before, store)
            distributed.wait()
            before = store
        model = followed(stage, reported(work, number), model)
    distributed.wait()
    return record(out)


def apply(recipe: Recipe, out: Path, **options: Any) -> dict[str, Any]:
    """``run`` without progress: writes the checkpoint folder ``out`` and returns its record."""
    return outcome(run(recipe, out, **options))


def is_done(recipe: Recipe, source: Source, out: Path) -> bool:
    """Whether ``out`` already holds what this recipe makes of this model."""
    try:
        info = record(out)
    except CheckpointError:
        return False
    return bool(info) and (info["recipe"], info["base"]["hash"], info["versions"]) == (
        recipe.dump(),
        source.hash,
        versions(),
    )


def _alone(stage: Stage, recipe: Recipe, source: Source) -> bool:
    """Whether the first process does a stage without the others: nothing runs the model."""
    return isinstance(stage.compressor, LayerCompressor) and not calibrates(stage, recipe, source)


def _stage(
    number: int,
    stage: Stage,
    recipe: Recipe,
    source: Source,
    before: Blocks,
    store: Store,
) -> Iterator[Event]:
    torch.manual_seed(recipe.seed * 1000 + number)
    report: dict[str, Any] = {}
    if isinstance(stage.compressor, TrainingCompressor):
        report = yield from _train(number, stage, recipe, source, before, store)
    elif isinstance(stage.compressor, TransformCompressor):
        yield from transform(number, stage, recipe, source, before, store)
    elif isinstance(stage.compressor, StructureCompressor):
        report = yield from restructure(number, stage, recipe, source, before, store)
    else:
        assert isinstance(stage.compressor, LayerCompressor)
        yield from solve(number, stage, recipe, source, before, store)
    if not distributed.rank():
        finish(store.folder.parent, number, report)


def _train(
    number: int,
    stage: Stage,
    recipe: Recipe,
    source: Source,
    before: Blocks,
    store: Store,
) -> Generator[Event, None, dict[str, Any]]:
    """Assemble the model in memory, train it, and take the blocks back.

    Every process does so; the first writes.
    """
    compressor = stage.compressor
    assert isinstance(compressor, TrainingCompressor)
    teacher = compressor.teacher or source.folder
    samples, length = compressor.tokens()
    text = calibration.text(recipe, source, samples, length)
    if len(text) < 2:
        raise DataError(f"{recipe.data}: one window of {length} tokens is too little to train on")
    chosen = stage.sites(source.anatomy)
    events: list[Event] = []

    def report(step: int, steps: int, numbers: dict[str, float]) -> None:
        events.append(Event(stage.use, step, steps, numbers))

    student = assemble(source, before, torch.float32)
    training = TrainingRun(
        student=student,
        original=lambda: load(source.folder, dtype=torch.float32),
        teacher=lambda: load(teacher, dtype=torch.float32),
        teacher_hash=fingerprint(compressor.teacher) if compressor.teacher else source.hash,
        text=text,
        held=max(1, min(len(text) // 8, HELD)),
        tokenizer=load_tokenizer(source.folder),
        sites=frozenset(s.name for s in chosen),
        all=frozenset(s.name for s in source.anatomy.sites),
        folder=store.folder,
        cache=store.folder.parent.parent / ".teacher-cache",
        report=report,
        seed=recipe.seed,
    )
    summary = yield from _in_thread(lambda: compressor.train(training), events)
    if distributed.rank():
        return summary
    for i, block in enumerate(source.anatomy.blocks):
        old = before.read(i)

        def final(module: Any, site: Any, weight: Any) -> Any:
            if site.name in training.sites:
                return compressor.finish(module, site, weight)
            return TrainingCompressor.finish(compressor, module, site, weight)

        part = take_back(student, source, old, i, final)
        for site in block.sites:
            changed = part.weights[site.name]
            if changed.kind != old.weights[site.name].kind:
                problem = LayerProblem(site.name, old.weights[site.name])
                part.records.append(record_site(number, stage, site, problem, changed))
        store.write(i, part)
    (store.folder / "training.safetensors").unlink(missing_ok=True)
    return summary


def _in_thread(work: Any, events: list[Event]) -> Generator[Event, None, Any]:
    """Run ``work`` in a thread and yield the events it appends, as they come."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        while not future.done() or events:
            if events:
                yield events.pop(0)
            else:
                time.sleep(0.05)
        return future.result()


def expect(source: Source, store: Blocks, *, flat_together: bool) -> dict[str, Any]:
    """What the compressed model puts out for a small probe, run block by block from ``store``.

    ``flat_together``: see ``rounded_inputs``.
    """
    skeleton = source.new_skeleton()
    inputs = probe_inputs(skeleton)
    dtype = getattr(source.config, "dtype", None) or source.dtype
    specs: dict[str, Any] = {}
    for number in range(len(source.anatomy.blocks)):
        specs |= store.header(number)[0]
    with (
        streamed(skeleton, source.anatomy, store.read, dtype) as model,
        rounded_inputs(model, specs, flat_together=flat_together),
    ):
        logits = observe(model, inputs)
    return {
        "auto_class": auto_classes(source.model_class, source.config)[0],
        "inputs": inputs,
        "logits": logits,
        "dtype": str(dtype).split(".")[1],
    }


@contextmanager
def _own(verify: bool, verifier: Verifier | None) -> Iterator[Verifier | None]:
    if not verify or verifier is not None:
        yield verifier if verify else None
        return
    with Verifier() as started:
        yield started
