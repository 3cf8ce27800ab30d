"""The templates of the report, and how text is written into Markdown."""

from __future__ import annotations

import re

from jinja2 import Environment, PackageLoader, StrictUndefined


def environment(*, autoescape: bool) -> Environment:
    """The templates; ``autoescape`` for HTML."""
    made = Environment(
        loader=PackageLoader("eval", "templates"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.policies["json.dumps_kwargs"] = {"allow_nan": False}  # and keep the order of keys
    made.filters["md"] = markdown
    made.filters["fence"] = fence
    return made


def markdown(text: object) -> str:
    """``text`` as literal Markdown on one line, inside a table too."""
    line = " ".join(str(text).split())
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", line)


def fence(text: str, language: str = "") -> str:
    """``text`` as a code block, fenced by more backticks than it holds in a row."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"
