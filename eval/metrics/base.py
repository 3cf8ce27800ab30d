"""What a metric is, and what it is given: one checkpoint, its original, and evaluation text."""

from __future__ import annotations

import hashlib
import json
import platform
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import torch
from transformers import AutoImageProcessor, PreTrainedModel

from compress import checkpoint, gguf_file
from compress.data import Windows, windows
from compress.errors import DataError, ModelError, NotMeasurable
from compress.objective import window_length
from eval import labelled
from eval.labelled import Labelled
from eval.results import Result

PREDICT_TEXT = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration")
Watch: TypeAlias = Callable[[int, int], None]
"""Told how many parts of a measurement are done, and of how many."""
ANY_MODEL = "size_bytes, bits_per_param and peak_memory"  # what every model has


@dataclass(frozen=True)
class Settings:
    """How to measure: shared by all metrics of one run.

    samples  windows of evaluation text
    limit    examples of a task or a data set; None is all
    length   tokens of a window; None is 256, or what the model takes if that is less
    stride   None: windows do not overlap. s < length: windows start s tokens apart, and each
             predicts only its last s tokens, the rest being context
    batch    windows in one forward pass, at most (fewer when the vocabulary is large)
    seed     which documents come first, and which tokens are masked
    threads  CPU threads while speed is measured
    dataset  a data set with labels (eval/labelled.py), for models that do not predict text
    columns  role → column of the data set, where the column's name does not say it
    """

    samples: int = 128
    limit: int | None = None
    length: int | None = None
    stride: int | None = None
    batch: int = 16
    seed: int = 0
    threads: int = 1
    dataset: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)


def load_model(name: str) -> PreTrainedModel:
    """Load a checkpoint, onto the GPU when there is one."""
    model = checkpoint.load(name)
    if torch.cuda.is_available() and model.device.type == "cpu":
        model.to("cuda")  # type: ignore[arg-type]
    return model


@dataclass
class Context:
    """One checkpoint under measurement. Everything costly is made when first read, then kept.

    ``cache`` belongs to this checkpoint; ``shared`` is one for all checkpoints of a run, so that
    what concerns the original is done once.
    """

    folder: str
    data: str | None = None
    original: str | None = None
    settings: Settings = field(default_factory=Settings)
    load_original: Callable[[str], PreTrainedModel] = load_model
    cache: dict[str, Any] = field(default_factory=dict)
    shared: dict[Any, Any] = field(default_factory=dict)
    watch: Watch = lambda done, total: None

    def batches(self, count: int, size: int) -> Iterator[slice]:
        """``count`` rows, ``size`` at a time; whoever watches is told when each is done."""
        for start in range(0, count, size):
            yield slice(start, start + size)
            self.watch(min(start + size, count), count)

    @cached_property
    def path(self) -> Path:
        """Where the checkpoint lies on disk, for "demo" and hub ids too."""
        return checkpoint.resolve(self.folder)

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json`` as it is written; empty when there is none."""
        return read_config(self.path)

    @cached_property
    def length(self) -> int:
        """Tokens of a window.

        Raises:
            DataError: the settings ask for a longer window than the model takes.
        """
        try:
            return window_length(self.config, self.settings.length)
        except DataError as error:
            raise DataError(f"{self.folder}: {error}") from None

    @cached_property
    def model(self) -> PreTrainedModel:
        """The checkpoint's model, in eval mode."""
        return load_model(self.folder)

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer; None when the folder has none."""
        return checkpoint.load_tokenizer(self.folder)

    @property
    def is_original(self) -> bool:
        """Whether the checkpoint is the very model that others are compared with."""
        return self.original is not None and checkpoint.resolve(self.original) == self.path

    @cached_property
    def reference(self) -> PreTrainedModel | None:
        """The dense original; None when it is not known.

        Raises:
            ModelError: it has another vocabulary, so that nothing can be compared.
        """
        if self.original is None:
            return None
        if self.is_original:
            return self.model
        theirs = checkpoint.load_tokenizer(self.original)
        if theirs and self.tokenizer and theirs.get_vocab() != self.tokenizer.get_vocab():
            raise ModelError(
                f"{self.folder} and its original {self.original} have different vocabularies; "
                "compare with a model of the same tokenizer"
            )
        return self.load_original(self.original)

    @property
    def reads_dataset(self) -> bool:
        """Whether the data set takes the place of the text: not for models that predict text."""
        names = self.config.get("architectures") or [""]
        return self.settings.dataset is not None and not names[0].endswith(PREDICT_TEXT)

    @cached_property
    def labelled(self) -> Labelled:
        """The data set, read once for all checkpoints.

        Raises:
            NotMeasurable: none is given, or the model predicts text.
            DataError, RecipeError: it cannot be read as it is described.
        """
        settings = self.settings
        if settings.dataset is None or not self.reads_dataset:
            raise NotMeasurable(
                f"{self.folder}: this is measured on a data set, with a model that does not "
                "predict text; give --dataset"
            )
        key = ("labelled", settings.dataset)
        if key not in self.shared:
            self.shared[key] = labelled.read(settings.dataset, settings.columns, settings.limit)
        return self.shared[key]

    @cached_property
    def processor(self) -> Any:
        """The checkpoint's image processor; None when the folder has none."""
        if not (self.path / "preprocessor_config.json").exists():
            return None
        return AutoImageProcessor.from_pretrained(self.path)

    def described(self) -> dict[str, Any]:
        """What a result row records about its data."""
        return self.labelled.describe() if self.reads_dataset else self.windows.describe()

    @cached_property
    def windows(self) -> Windows:
        """Evaluation text, in the checkpoint's own tokens.

        Raises:
            NotMeasurable: the checkpoint has no tokenizer.
            DataError: no text was named, or it cannot be read.
        """
        if self.tokenizer is None:
            kind = ", ".join(self.config.get("architectures") or ["a model"])
            raise NotMeasurable(
                f"{self.folder}: {kind} without a tokenizer, so it cannot be given text; "
                f"it can be measured by {ANY_MODEL}"
            )
        if self.data is None:
            raise DataError(f"{self.folder}: which text to measure on? give --data")
        return windows(
            self.data,
            self.tokenizer,
            part="evaluation",
            samples=self.settings.samples,
            length=self.length,
            seed=self.settings.seed,
        )

    def fingerprint(self, name: str) -> str:
        """The fingerprint of a checkpoint's weights, read from disk once in a run."""
        key = ("fingerprint", name)
        if key not in self.shared:
            self.shared[key] = fingerprint(checkpoint.resolve(name))
        return self.shared[key]


class Metric(ABC):
    """One number about one checkpoint. Subclasses are plug-ins, made without arguments."""

    name: ClassVar[str]
    unit: ClassVar[str]
    higher_is_better: ClassVar[bool | None] = None
    needs_reference: ClassVar[bool] = False
    """Without the original there is no value."""
    beside_original: ClassVar[bool] = False
    """The original is measured too, when there is one, and stands in ``detail``."""
    needs_data: ClassVar[bool] = False
    """The value depends on the evaluation text."""

    @abstractmethod
    def measure(self, context: Context) -> Result:
        """Measure. Implementations end with ``return self.result(context, value, …)``.

        Raises:
            NotMeasurable: the metric does not exist for this model.
        """

    def setup(self, context: Context) -> dict[str, Any]:
        """Whatever else the value depends on. Must not load the model: it is read to find out
        whether an earlier row can be used again."""
        return {}

    def conditions(self, context: Context) -> dict[str, Any]:
        """The fields ``data`` and ``setup`` of a row measured now."""
        setup = {"weights": context.fingerprint(context.folder)}
        if (self.needs_reference or self.beside_original) and context.original is not None:
            setup["original"] = context.fingerprint(context.original)
        return {
            "data": context.described() if self.needs_data else {},
            "setup": setup | self.setup(context),
        }

    def result(self, context: Context, value: float | None, **fields: Any) -> Result:
        """A row; ``fields`` are those of :class:`Result` that are not filled in here."""
        return Result(
            checkpoint=context.folder,
            metric=self.name,
            value=value,
            unit=self.unit,
            versions=versions(),
            **{"higher_is_better": self.higher_is_better, **self.conditions(context), **fields},
        )


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a folder; empty when there is none, as beside a bare adapter.

    Of a GGUF file it is what its metadata says.
    """
    packed = gguf_file.find(folder)
    if packed is not None:
        said = gguf_file.config(packed).to_dict()
        return said | {"architectures": said["architectures"] or ["ModelForCausalLM"]}
    file = folder / "config.json"
    return json.loads(file.read_text()) if file.exists() else {}


def fingerprint(folder: Path) -> str:
    """SHA-256 of a folder's weights and configuration, its first 16 hexadecimal digits."""
    digest = hashlib.sha256()
    packed = gguf_file.find(folder)
    files = [*checkpoint.weight_files(folder), *sorted(folder.glob("*config.json"))]
    for path in [packed] if packed else files:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "compresskit"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a source tree that is not installed
            found[package] = "unknown"
    return found
