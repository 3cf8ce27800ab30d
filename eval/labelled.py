"""A data set with labels: what a classifier or an embedding model is measured on.

``--dataset`` names it as ``--data`` names text: a local .csv, .json, .jsonl or .parquet file, a
folder that ``datasets`` saved, or ``name:config:split`` from the hub (validation, else test, else
train, unless a split is given). Which column is what is found by its name, or said:
``--columns text=sentence,label=stars``. Roles are text, text_pair, image (pictures, or arrays of
pixel values as the model takes them) and label; all other columns are kept for slices.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.data import load_dataset
from compress.errors import DataError, NotMeasurable, RecipeError, did_you_mean, first_line
from compress.objective import Examples, context_length

USUAL = {  # role → names that its column usually has
    "text": ("text", "sentence", "sentence1", "premise", "question1", "content"),
    "text_pair": ("text_pair", "sentence2", "hypothesis", "question2"),
    "image": ("image", "img", "pixel_values"),
    "label": ("label", "labels", "target", "fine_label"),
}
SPLITS = ("validation", "test", "train")
FILES = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Labelled:
    """Rows of a data set, in order.

    inputs   role → values of its column, one a row
    labels   as they are in the data; None where it has none
    columns  of each row, all that is a single value
    """

    name: str
    inputs: dict[str, list[Any]]
    labels: list[Any] | None
    columns: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.columns)

    def describe(self) -> dict[str, Any]:
        """What a result row records about its data."""
        digest = hashlib.sha256()
        for values in [*self.inputs.values(), self.labels or []]:
            for value in values:
                digest.update(_bytes(value))
        return {"name": self.name, "hash": digest.hexdigest()[:16], "examples": len(self)}


@dataclass(frozen=True)
class Padded(Examples):
    """Examples of different lengths: a batch is cut to the longest in it."""

    def call(self, model: Any, rows: slice | Tensor) -> Any:
        inputs = {name: values[rows] for name, values in self.inputs.items()}
        if "attention_mask" in inputs:
            longest = int(inputs["attention_mask"].sum(1).max())
            inputs = {name: values[:, :longest] for name, values in inputs.items()}
        moved = {
            name: values.to(model.device, model.dtype if values.is_floating_point() else None)
            for name, values in inputs.items()
        }
        return model(**moved, **self.options)


def read(source: str, columns: Mapping[str, str], limit: int | None = None) -> Labelled:
    """The first ``limit`` rows of a data set.

    Raises:
        DataError: it cannot be read, or has no column to give to a model.
        RecipeError: ``columns`` names a role or a column that is not there.
    """
    rows = _rows(source)
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    for role, column in columns.items():
        if role not in USUAL:
            raise RecipeError(f"columns: no role is called '{role}'{did_you_mean(role, USUAL)}")
        if column not in rows.column_names:
            near = did_you_mean(column, rows.column_names)
            raise RecipeError(f"columns: {source} has no column '{column}'{near}")
    found = {
        role: columns.get(role) or next((name for name in usual if name in rows.column_names), None)
        for role, usual in USUAL.items()
    }
    inputs = {role: list(rows[name]) for role, name in found.items() if name and role != "label"}
    if not {"text", "image"} & set(inputs) or not len(rows):
        raise DataError(
            f"{source}: no rows with a text or an image among {', '.join(rows.column_names)}; say "
            "which column it is: --columns text=NAME or image=NAME"
        )
    labels = list(rows[found["label"]]) if found["label"] else None
    known = [
        name for name, feature in rows.features.items()
        if getattr(feature, "dtype", "") in ("string", "int64", "int32", "bool", "float64")
    ]  # fmt: skip
    values = {name: list(rows[name]) for name in known if name not in (found["text_pair"],)}
    others = [
        {name: column[i] for name, column in values.items() if name != found["text"]}
        | ({"letters": len(inputs["text"][i])} if "text" in inputs else {})
        for i in range(len(rows))
    ]
    return Labelled(source, inputs, labels, others)


def examples(data: Labelled, model: Any, tokenizer: Any, processor: Any) -> Examples:
    """The rows as ``model`` reads them.

    Raises:
        NotMeasurable: the model reads something else than the data holds.
    """
    name = type(model).__name__
    if model.main_input_name == "input_ids" and "text" in data.inputs:
        if tokenizer is None:
            raise NotMeasurable(f"{name} has no tokenizer, so it cannot be given text")
        if tokenizer.pad_token is None:  # masked; models without one get batches of one row
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        tokenizer.padding_side = "right"
        limit = context_length(model.config.to_dict())
        coded = tokenizer(
            data.inputs["text"], data.inputs.get("text_pair"), padding=True,
            truncation=limit is not None, max_length=limit, return_tensors="pt",
        )  # fmt: skip
        wanted = ("input_ids", "attention_mask", "token_type_ids")
        return Padded({key: coded[key] for key in wanted if key in coded})
    if model.main_input_name == "pixel_values" and "image" in data.inputs:
        images = data.inputs["image"]
        if isinstance(images[0], list):
            return Padded({"pixel_values": torch.tensor(images, dtype=torch.float32)})
        if processor is None:
            raise NotMeasurable(f"{name} has no image processor in its folder; give pixel values")
        return Padded({"pixel_values": processor(images, return_tensors="pt")["pixel_values"]})
    held = " and ".join(data.inputs)
    raise NotMeasurable(f"{name} reads {model.main_input_name}; {data.name} holds {held}")


def classes(data: Labelled, config: Any) -> Tensor:
    """The labels as the model numbers its classes, int64 [rows].

    Raises:
        DataError: there are none, or one that the model does not have.
    """
    if data.labels is None:
        raise DataError(f"{data.name}: no label among its columns; say --columns label=NAME")
    names = {str(name): int(number) for name, number in (config.label2id or {}).items()}
    numbers = [names.get(x, -1) if isinstance(x, str) else int(x) for x in data.labels]
    for label, number in zip(data.labels, numbers, strict=True):
        if not 0 <= number < config.num_labels:
            raise DataError(
                f"{data.name}: label {label!r} is no class of the model, which has "
                f"{config.num_labels}: {', '.join(list(names)[:8])}"
            )
    return torch.tensor(numbers)


def _rows(source: str) -> Any:
    """A map-style data set."""
    import datasets

    path = Path(source)
    try:
        if path.suffix in FILES:
            return load_dataset(FILES[path.suffix], data_files=str(path), split="train")
        if path.is_dir() and (path / "state.json").exists():
            return datasets.load_from_disk(str(path))
        name, config, split = (*source.split(":"), "", "")[:3]
        found = load_dataset(source) if path.is_dir() else load_dataset(name, config or None)
        return found[split or next(s for s in (*SPLITS, *found) if s in found)]
    except Exception as error:
        reason = first_line(error)
        raise DataError(
            f"data set '{source}' does not load ({reason}); give a .csv, .json, .jsonl or .parquet "
            "file, a folder that datasets saved, or name:config:split"
        ) from error


def _bytes(value: Any) -> bytes:
    if hasattr(value, "tobytes"):  # a picture
        return value.tobytes()
    return json.dumps(value, default=str).encode()
