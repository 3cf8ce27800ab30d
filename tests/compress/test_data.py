"""Text sources: two parts that never meet, the same windows every time, and clear refusals."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch

from compress import data as data_module
from compress.data import Windows, windows
from compress.errors import DataError

KINDS = ["demo", "txt", "jsonl", "json", "parquet", "folder"]


def documents(count: int = 60) -> list[str]:
    """Texts that share no line; some are not ASCII."""
    return [
        "".join(f"name_{i}_{j} = '{i * j} é{i}ü 漢{j}'\n" for j in range(30)) for i in range(count)
    ]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("data")
    texts = documents()
    rows = [{"id": i, "content": text} for i, text in enumerate(texts)]
    (root / "a.txt").write_text("".join(texts), encoding="utf-8")
    (root / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "a.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / "a.parquet")
    folder = root / "folder"
    (folder / "deep").mkdir(parents=True)
    for i in range(12):
        (folder / "deep" / f"{i}.txt").write_text("".join(texts[5 * i : 5 * i + 5]), "utf-8")
    (folder / "notes.md").write_text("not text that is asked for")
    named = {kind: str(root / f"a.{kind}") for kind in ("txt", "jsonl", "json", "parquet")}
    return named | {"demo": "demo", "folder": str(folder)}


def read(source: str, tokenizer: Any, part: Any, **options: Any) -> Windows:
    given = {"samples": 10_000 if source != "demo" else 300, "length": 64} | options
    return windows(source, tokenizer, part=part, **given)


def texts(source: str, part: Any, seed: int = 0) -> list[str]:
    return [document.read() for document in data_module.documents(source, part, seed)]


def keys(source: str, part: Any, seed: int = 0) -> list[str]:
    return [hashlib.sha256(text.encode()).hexdigest() for text in texts(source, part, seed)]


@pytest.mark.parametrize("kind", KINDS)
def test_calibration_and_evaluation_share_nothing(sources: dict[str, str], kind: str) -> None:
    calibration = set(keys(sources[kind], "calibration"))
    evaluation = set(keys(sources[kind], "evaluation", seed=7))
    assert calibration
    assert evaluation
    assert not calibration & evaluation
    assert calibration == set(keys(sources[kind], "calibration", seed=7))
    whole = {d[0] for d in data_module._documents(sources[kind])}
    assert len(calibration | evaluation) <= len(whole)


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_rows_are_all_used_and_no_line_is_in_both_parts(sources: dict[str, str], kind: str) -> None:
    parts = [set(texts(sources[kind], part)) for part in ("calibration", "evaluation")]
    assert parts[0] | parts[1] == set(documents())
    lines = [{line for text in part for line in text.splitlines()} for part in parts]
    assert not lines[0] & lines[1]


def test_a_plain_file_is_cut_at_line_ends_and_loses_nothing(sources: dict[str, str]) -> None:
    chunks = [str(d.content) for d in data_module._documents(sources["txt"])]
    assert "".join(chunks) == "".join(documents())
    assert len(chunks) > 4
    assert all(chunk.endswith("\n") for chunk in chunks)


@pytest.mark.parametrize("kind", KINDS)
def test_windows_are_the_same_every_time(
    sources: dict[str, str], tokenizer: Any, kind: str
) -> None:
    first, second = (read(sources[kind], tokenizer, "calibration", samples=5) for _ in range(2))
    assert torch.equal(first.tokens, second.tokens)
    assert first.hash == second.hash
    assert first.hash == hashlib.sha256(first.tokens.numpy().tobytes()).hexdigest()[:16]
    other = read(sources[kind], tokenizer, "evaluation", samples=5)
    assert other.hash != first.hash
    assert first.describe() == {
        "name": sources[kind], "part": "calibration", "hash": first.hash,
        "windows": 5, "length": 64,
    }  # fmt: skip


def test_tokens_know_their_documents_and_what_is_said_of_them(
    tmp_path: Path, tokenizer: Any
) -> None:
    rows = [{"text": text, "language": f"l{i % 3}", "tags": ["no"], "stars": i}
            for i, text in enumerate(documents())]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read(str(path), tokenizer, "evaluation")
    assert found.documents is not None
    for tokens, owners in zip(found.tokens, found.documents, strict=True):
        for owner in owners.unique().tolist():
            columns = found.columns[owner]
            assert set(columns) == {"language", "stars"}
            text = tokenizer.decode(tokens[owners == owner], skip_special_tokens=True)
            assert text.strip("\ufffd") in rows[columns["stars"]]["text"]


def test_a_folder_of_texts_names_their_domains(sources: dict[str, str], tokenizer: Any) -> None:
    found = read(sources["folder"], tokenizer, "evaluation")
    assert {columns["domain"] for columns in found.columns} == {"deep"}
    demo = read("demo", tokenizer, "evaluation")
    assert {"top level", "encodings"} < {columns["domain"] for columns in demo.columns}


def test_the_seed_decides_which_documents_come_first(tokenizer: Any) -> None:
    zero, one, again = (
        read("demo", tokenizer, "calibration", samples=4, seed=seed) for seed in (0, 1, 1)
    )
    assert zero.hash != one.hash
    assert one.hash == again.hash


def test_more_windows_begin_as_fewer_do(tokenizer: Any) -> None:
    few, many = (read("demo", tokenizer, "evaluation", samples=n) for n in (3, 40))
    assert torch.equal(many.tokens[:3], few.tokens)
    assert [len(batch) for batch in many.batches(16)] == [16, 16, 8]
    assert torch.equal(torch.cat(list(many.batches(16))), many.tokens)


@pytest.mark.parametrize("kind", ["jsonl", "txt", "demo"])
def test_bytes_are_those_of_the_text_that_tokens_stand_for(
    sources: dict[str, str], tokenizer: Any, kind: str
) -> None:
    found = read(sources[kind], tokenizer, "calibration", samples=40)
    end = tokenizer.eos_token_id
    ids, counts = found.tokens.flatten().tolist(), found.token_bytes.flatten().tolist()
    start = 0
    checked = 0
    for stop, token in enumerate(ids):
        if token == end:
            assert counts[stop] == 0
            text = tokenizer.decode(ids[start:stop], clean_up_tokenization_spaces=False)
            if start and "\ufffd" not in text:
                assert sum(counts[start:stop]) == len(text.encode())
                checked += 1
            start = stop + 1
    assert kind != "jsonl" or checked >= 2
    whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert sum(counts) == pytest.approx(len(whole.encode()), abs=8)


def test_a_long_document_takes_turns(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"text": f"{name}\n" * 4000} for name in ("alpha", "beta", "gamma", "delta", "eps")]
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = texts(str(path), "calibration")
    assert len(whole) > 1
    found = read(str(path), tokenizer, "calibration", length=data_module.PER_DOCUMENT)
    share = data_module.PER_DOCUMENT
    for text, window in zip(whole, found.tokens, strict=False):
        assert window.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"][:share]
    total = sum(len(tokenizer(text)["input_ids"]) + 1 for text in whole)
    assert len(found) == total // share  # what was left over comes after


def test_slow_tokenizers_count_bytes_token_by_token() -> None:
    class Letters:
        is_fast = False
        eos_token_id = None
        sep_token_id = 0

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [ord(c) for c in text]}

        def decode(self, ids: list[int]) -> str:
            return "".join(map(chr, ids))

    assert data_module._tokenize(Letters(), "aé漢") == ([97, 233, 28450, 0], [1, 2, 3, 0])


# what cannot be read


def refused(source: Any, tokenizer: Any, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(str(source), tokenizer, "calibration", **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_files(tmp_path: Path, tokenizer: Any) -> None:
    for name in ("none.txt", "none.jsonl", "none"):
        assert "no such file or folder" in refused(tmp_path / name, tokenizer)
    assert "no such file or folder" in refused("none.parquet", tokenizer)
    (tmp_path / "empty").mkdir()
    assert "no .txt, .json, .jsonl or .parquet file" in refused(tmp_path / "empty", tokenizer)


def test_not_utf8(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert "latin.txt: not UTF-8 text (byte 3)" in refused(tmp_path / "latin.txt", tokenizer)


def test_no_text_column(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"label": 1, "title": "x"}\n')
    assert "no text column among label, title; expected one of text," in refused(path, tokenizer)


def test_not_the_format_its_name_says(tmp_path: Path, tokenizer: Any) -> None:
    for name, kind in (("a.jsonl", "json"), ("a.parquet", "parquet")):
        (tmp_path / name).write_text("neither { this nor that")
        assert f"{name}: not readable as {kind}" in refused(tmp_path / name, tokenizer)


def test_too_short(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x = 1\n")
    assert "less than one window of 64" in refused(path, tokenizer)
    path.write_text("")
    assert "gives 0 tokens for calibration" in refused(path, tokenizer)


def test_a_model_without_a_tokenizer(sources: dict[str, str]) -> None:
    assert "needs a tokenizer" in refused(sources["txt"], None)


def test_the_library_of_python_may_hold_other_encodings(tmp_path: Path) -> None:
    (tmp_path / "old.py").write_bytes(b"# caf\xe9\n")
    assert data_module._read_text(tmp_path / "old.py") == "# caf\ufffd\n"
