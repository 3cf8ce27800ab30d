"""Three small tasks for models of Python, made from the demo text that no model was fitted to.

Every document of the evaluation part of ``data: demo`` gives at most one question to a task, so
that questions are independent, and always the same one: what is drawn is seeded by its key. The
library repeats itself; a question that calibration text answers word by word is left out.

    demo_completion    which of four lines of a file comes next
    demo_brackets      which bracket closes the innermost one that is open
    demo_identifiers   which of four names, all used before, is used here

``compress eval`` makes them in memory. ``python -m eval.demo_tasks DIR`` writes them as YAML and
JSON lines, for lm-evaluation-harness by itself.
"""

from __future__ import annotations

import io
import json
import keyword
import random
import sys
import tokenize
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from compress.data import Document, documents

LINES, LETTERS = 12, 400  # of context before a question, at most
SHORTEST = 16  # letters of a line that is asked for
LONG_NAME = 5  # letters of an identifier that is asked for
READ = 10_000  # letters of a file in which brackets and identifiers are looked for
TELLING = 60  # letters of context that, with the answer, calibration text must not hold
CLOSING = {"(": ")", "[": "]", "{": "}"}

Question = dict[str, Any]


def configuration(name: str) -> dict[str, Any]:
    """The task as lm-evaluation-harness reads it, but for where its questions are."""
    metric = {"aggregation": "mean", "higher_is_better": True}
    return {
        "task": name,
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", **metric}, {"metric": "acc_norm", **metric}],
        "metadata": {"version": 1.0},
    }


@cache
def questions(name: str) -> list[Question]:
    """``context``, ``choices``, the number of the right one as ``answer``, and the domain."""
    ask = TASKS[name]
    found = []
    for document in documents("demo", "evaluation"):
        draw = random.Random(f"{name} {document.key}")
        asked = ask(document, draw)
        if asked is not None and not _is_calibration(asked[0][-TELLING:] + asked[1]):
            context, right, wrong = asked
            choices = [right, *wrong]
            draw.shuffle(choices)
            found.append({"context": context, "choices": choices, "answer": choices.index(right),
                          **document.columns})  # fmt: skip
    return found


def write(folder: Path) -> list[Path]:
    """``NAME.yaml`` and ``NAME.jsonl`` of each task; the YAML files."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name in TASKS:
        lines = folder / f"{name}.jsonl"
        lines.write_text("".join(json.dumps(asked) + "\n" for asked in questions(name)))
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(lines)}}}
        written.append(folder / f"{name}.yaml")
        written[-1].write_text(yaml.safe_dump(configuration(name) | source, sort_keys=False))
    return written


@cache
def _calibration() -> str:
    return "\0".join(document.read() for document in documents("demo", "calibration"))


def _is_calibration(text: str) -> bool:
    return text in _calibration()


Asked = tuple[str, str, list[str]] | None  # context, the right choice, the wrong ones


def _completion(document: Document, draw: random.Random) -> Asked:
    """Wrong lines are from the same file and as far indented."""
    lines = document.read().splitlines()
    places = [i for i in range(LINES, len(lines)) if len(lines[i].strip()) >= SHORTEST]
    draw.shuffle(places)
    for place in places[:20]:
        right = lines[place].rstrip()
        others = {
            line.rstrip()
            for i, line in enumerate(lines)
            if abs(i - place) > LINES
            and len(line.strip()) >= SHORTEST
            and _indent(line) == _indent(right)
        }
        others -= {line.rstrip() for line in lines[place - LINES : place + 1]}
        if len(others) >= 3 and right not in map(str.rstrip, lines[:place]):
            context = "\n".join(lines[place - LINES : place]) + "\n"
            return context[-LETTERS:], right, draw.sample(sorted(others), 3)
    return None


def _brackets(document: Document, draw: random.Random) -> Asked:
    """Of a file with at least two kinds, each as likely: round brackets are most of a program."""
    text = document.read()
    closings: dict[str, list[int]] = {closing: [] for closing in CLOSING.values()}
    opened: list[tuple[str, int]] = []
    for token, start in _tokens(text):
        if token.string in CLOSING:
            opened.append((CLOSING[token.string], start))
        elif token.string in closings and opened:
            closing, begin = opened.pop()
            if closing == token.string and 2 < start - begin < LETTERS // 2:
                closings[closing].append(start)
    kinds = [kind for kind in closings if closings[kind]]
    if len(kinds) < 2:
        return None
    right = draw.choice(kinds)
    return _before(text, draw.choice(closings[right])), right, sorted({*closings} - {right})


def _identifiers(document: Document, draw: random.Random) -> Asked:
    """Wrong names are in the same context, none begins like the right one."""
    text = document.read()
    names = [
        (token.string, start)
        for token, start in _tokens(text)
        if token.type == tokenize.NAME
        and len(token.string) >= LONG_NAME
        and not keyword.iskeyword(token.string)
    ]
    order = list(range(len(names)))
    draw.shuffle(order)
    for place in order[:60]:
        right, start = names[place]
        context = _before(text, start)
        near = [name for name, at in names[:place] if at >= start - len(context)]
        others = sorted({name for name in near if name[:2] != right[:2]})
        if right in near and len(others) >= 3:
            return context, right, draw.sample(others, 3)
    return None


def _tokens(text: str) -> Iterator[tuple[tokenize.TokenInfo, int]]:
    """Python's names and operators, and where in the text each starts, up to what is no Python."""
    starts = [0]
    for line in io.StringIO(text[:READ]):
        starts.append(starts[-1] + len(line))
    try:
        for token in tokenize.generate_tokens(io.StringIO(text[:READ]).readline):
            if token.type in (tokenize.OP, tokenize.NAME):
                yield token, starts[token.start[0] - 1] + token.start[1]
    except (tokenize.TokenError, SyntaxError):
        return


def _before(text: str, place: int) -> str:
    """The text before ``place``, from the beginning of a line."""
    start = max(0, place - LETTERS)
    return text[text.find("\n", start, place) + 1 if start else 0 : place]


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


TASKS: dict[str, Callable[[Document, random.Random], Asked]] = {
    "demo_completion": _completion,
    "demo_brackets": _brackets,
    "demo_identifiers": _identifiers,
}

if __name__ == "__main__":
    write(Path(sys.argv[1]))
