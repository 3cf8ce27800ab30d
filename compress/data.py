"""Text in, token windows out: the only place where calibration and evaluation text is read.

Every source is a list of documents. A document belongs to *calibration* or to *evaluation* by one
bit of the SHA-256 of its key (its path, or its content), so that the two never share a document,
whoever asks and in whatever order. Sources: ``demo`` (the standard library of the running Python),
a local ``.txt``, ``.json``, ``.jsonl`` or ``.parquet`` file, a folder of such files, or any
``datasets`` name written ``name:config:split:column``.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from compress.errors import DataError, first_line

Part: TypeAlias = Literal["calibration", "evaluation"]
TEXT_COLUMNS = ("text", "content", "document", "sentence", "code")
PER_DOCUMENT = 2048  # tokens of a document before the next has its turn, so that text is varied
CHUNK = 8192  # characters: a plain text file is cut into documents of about this size


class Document(NamedTuple):
    """A text of a source, or the file that holds it, and what else the source says of it."""

    key: str
    content: str | Path
    columns: dict[str, Any]

    def read(self) -> str:
        return self.content if isinstance(self.content, str) else _read_text(self.content)


@dataclass(frozen=True)
class Windows:
    """Token windows of equal length, cut from one part of a text source.

    tokens      int64 [windows, length]
    token_bytes int64 [windows, length], UTF-8 bytes of text that each token stands for
    documents   int64 [windows, length], the document that each token is from, an index of columns;
                None where that is not known
    columns     of each document, what its source says of it: folder, language, stars, …
    """

    tokens: Tensor
    token_bytes: Tensor
    name: str
    part: Part
    hash: str
    documents: Tensor | None = None
    columns: Sequence[dict[str, Any]] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    def describe(self) -> dict[str, Any]:
        """What a result row records about its text."""
        count, length = self.tokens.shape
        return {
            "name": self.name,
            "part": self.part,
            "hash": self.hash,
            "windows": count,
            "length": length,
        }

    def batches(self, size: int) -> Iterator[Tensor]:
        """int64 [≤ size, length], in order."""
        yield from self.tokens.split(size)


def windows(
    source: str, tokenizer: Any, *, part: Part, samples: int, length: int, seed: int = 0
) -> Windows:
    """Read ``source`` and cut ``samples`` windows of ``length`` tokens from one part of it.

    ``seed`` rotates which documents come first; seed 0 is the order of the documents' hashes.
    Fewer windows than asked for are returned when the text is short.

    Raises:
        DataError: the source cannot be read, or holds less than one window in this part.
    """
    if tokenizer is None:
        raise DataError(f"text '{source}' needs a tokenizer and the model folder has none")
    ids: list[int] = []
    sizes: list[int] = []
    owners: list[int] = []
    columns: list[dict[str, Any]] = []
    later: list[tuple[list[int], list[int]]] = []  # what long documents hold beyond their share
    share = max(PER_DOCUMENT, length)
    for document in documents(source, part, seed):
        coded, counts = _tokenize(tokenizer, document.read())
        ids += coded[:share]
        sizes += counts[:share]
        owners += [len(columns)] * len(coded[:share])
        columns.append(document.columns)
        later.append((coded[share:], counts[share:]))
        if len(ids) >= samples * length:
            break
    for owner, (coded, counts) in enumerate(later):
        ids += coded
        sizes += counts
        owners += [owner] * len(coded)
    count = min(samples, len(ids) // length)
    if count == 0:
        raise DataError(
            f"'{source}' gives {len(ids)} tokens for {part}, less than one window of {length}; "
            "use more text or a shorter window"
        )
    tokens = torch.tensor(ids[: count * length]).view(count, length)
    token_bytes = torch.tensor(sizes[: count * length]).view(count, length)
    owner_of = torch.tensor(owners[: count * length]).view(count, length)
    digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]
    return Windows(tokens, token_bytes, source, part, digest, owner_of, columns)


def documents(source: str, part: Part, seed: int = 0) -> Iterable[Document]:
    """The documents of ``part``; finite sources in the order of their salted key hashes.

    Raises:
        DataError: the source cannot be read.
    """
    wanted = 0 if part == "calibration" else 1
    found = _documents(source)
    if isinstance(found, list):
        salt = b"" if seed == 0 else str(seed).encode()
        found.sort(key=lambda d: hashlib.sha256(salt + d.key.encode()).digest())
    for document in found:
        if hashlib.sha256(b"part" + document.key.encode()).digest()[0] & 1 == wanted:
            text = document.read()
            if text.strip():
                yield document._replace(content=text)


def _documents(source: str) -> list[Document] | Iterator[Document]:
    """Every document: a list when all are at hand, else a stream."""
    if source == "demo":
        root = Path(sysconfig.get_paths()["stdlib"])
        skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
        found = []
        for folder, inner, names in os.walk(root):
            inner[:] = [name for name in inner if name not in skip]
            domain = {"domain": "/".join(Path(folder).relative_to(root).parts[:1]) or "top level"}
            paths = [Path(folder, name) for name in names if name.endswith(".py")]
            found += [Document(path.relative_to(root).as_posix(), path, domain) for path in paths]
        return found
    path = Path(source)
    if path.is_dir():
        files = [p for p in path.rglob("*") if p.suffix in (".txt", ".json", ".jsonl", ".parquet")]
        if not files:
            raise DataError(f"{path}: no .txt, .json, .jsonl or .parquet file in this folder")
        return [
            document._replace(columns={"domain": file.relative_to(path).parts[0]}
                              | document.columns)
            for file in sorted(files)
            for document in _file_documents(file)
        ]  # fmt: skip
    if path.is_file():
        return _file_documents(path)
    if path.suffix in (".txt", ".json", ".jsonl", ".parquet") or source.startswith((".", "/", "~")):
        raise DataError(f"{source}: no such file or folder")
    return _hub_documents(source)


def _file_documents(path: Path) -> list[Document]:
    if path.suffix in (".json", ".jsonl", ".parquet"):
        kind = "parquet" if path.suffix == ".parquet" else "json"
        try:
            rows = load_dataset(kind, data_files=str(path), split="train")
        except Exception as error:
            raise DataError(f"{path}: not readable as {kind} ({first_line(error)})") from error
        column = _text_column(rows.column_names, str(path))
        return [_row_document(row, column) for row in rows if isinstance(row[column], str)]
    text = _read_text(path)
    return [Document(chunk, chunk, {}) for chunk in _chunks(text)]


def _row_document(row: dict[str, Any], column: str) -> Document:
    """A row of a table; its other columns are kept where they are single values."""
    others = {k: v for k, v in row.items() if k != column and isinstance(v, str | int | float)}
    return Document(row[column], row[column], others)


def _hub_documents(source: str) -> Iterator[Document]:
    name, config, split, column = (*source.split(":"), "", "", "")[:4]
    try:
        rows = load_dataset(name, config or None, split=split or "train", streaming=True)
        column = column or _text_column(list(next(iter(rows))), source)
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"data '{source}': neither a local file nor a data set that could be loaded "
            f"({first_line(error)}); write demo, a path, or name:config:split:column"
        ) from error
    return (_row_document(row, column) for row in rows)


def load_dataset(*arguments: Any, **options: Any) -> Any:
    """``datasets.load_dataset`` without its bars and log lines; errors come as exceptions."""
    import datasets

    level, shown = datasets.logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(*arguments, **options)
    finally:
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()


def _text_column(names: list[str], where: str) -> str:
    for name in TEXT_COLUMNS:
        if name in names:
            return name
    raise DataError(
        f"{where}: no text column among {', '.join(names)}; expected one of "
        f"{', '.join(TEXT_COLUMNS)}, or name:config:split:column"
    )


def _chunks(text: str) -> Iterator[str]:
    """Cut at line ends, so that no document begins within a line."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + CHUNK)
        end = len(text) if end < 0 else end + 1
        yield text[start:end]
        start = end


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        if path.suffix == ".py":  # a library file in another encoding is not worth a failure
            return path.read_text(encoding="utf-8", errors="replace")
        raise DataError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error


def _tokenize(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Token ids of one document, closed by the end-of-text token, and the bytes each stands for."""
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    closing = [] if end is None else [end]
    if tokenizer.is_fast:
        coded = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids = list(coded["input_ids"])
        counts, previous = [], 0
        for _, stop in coded["offset_mapping"]:  # bytes from the last token's end to this one's
            counts.append(len(text[previous:stop].encode()) if stop > previous else 0)
            previous = max(previous, stop)
    else:
        ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        counts = [len(tokenizer.decode([i]).encode()) for i in ids]
    return ids + closing, counts + [0] * len(closing)
