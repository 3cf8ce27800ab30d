"""A byte-level BPE tokenizer as the metadata of a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compress.checkpoint import load_tokenizer

# How text is split before merging → llama.cpp's name for it. None is ByteLevel's own expression.
SPLITS = {
    None: "gpt-2",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's kinds of token


def refusal(folder: Path) -> str | None:
    """Why llama.cpp would cut text in other tokens; None when it would not."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return "the folder has no tokenizer.json, and a GGUF file brings its tokenizer along"
    whole = json.loads(path.read_text())
    if whole["model"].get("type", "BPE") != "BPE" or not _steps(whole, "ByteLevel"):
        return "its tokenizer is not a byte-level BPE"
    if whole["normalizer"] is not None and whole["normalizer"].get("type") != "NFC":
        return f"its tokenizer normalizes text ({whole['normalizer'].get('type')})"
    if any(step.get("add_prefix_space") for step in _steps(whole, "ByteLevel")):
        return "its tokenizer puts a space before the text"
    if _split(whole) not in SPLITS:
        return f"its tokenizer splits text by {_split(whole)!r}, for which llama.cpp has no name"
    return None


def add(writer: Any, folder: Path, vocabulary: int) -> None:
    """Write tokens, merges and special tokens; ``vocabulary`` rows of the embedding have one."""
    whole = json.loads((folder / "tokenizer.json").read_text())
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    added = {token["id"]: token for token in whole["added_tokens"]}
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    tokens, kinds = [], []
    for number in range(vocabulary):
        kind = NORMAL if number in by_id else UNUSED
        if number in added:
            kind = CONTROL if added[number]["special"] else USER_DEFINED
        tokens.append(by_id.get(number, f"[PAD{number}]"))
        kinds.append(kind)
    merges = [m if isinstance(m, str) else " ".join(m) for m in whole["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(SPLITS[_split(whole)])
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    begun = tokenizer("a").input_ids
    writer.add_add_bos_token(bool(begun) and begun[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(begun) and begun[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _steps(whole: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """The steps of this kind that come before merging."""
    first = whole["pre_tokenizer"] or {}
    return [s for s in first.get("pretokenizers", [first]) if s.get("type") == kind]


def _split(whole: dict[str, Any]) -> str | None:
    """The expression that text is split by; None for ByteLevel's own."""
    found = [step["pattern"].get("Regex", "a string") for step in _steps(whole, "Split")]
    own = any(step.get("use_regex", True) for step in _steps(whole, "ByteLevel"))
    if len(found) + own != 1:
        return "several expressions"
    return None if own else found[0]
