"""What a step printed, as people read it: a short head in a story, the whole on request.

Called by `agent.story`, `agent.http.render` and the command line. Exists because a look (a thread dump, what processes
do) prints one JSON document of up to 192 KiB on one line. Pure. It decides nothing, and lets no control character out:
an attacker may have spoken through the program that printed them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from agent.log import printable

HEAD_LINES = 6  # of one output, in all
HEAD_WIDTH = 160  # characters of one line
SHORT = 480  # characters of a document that is shown as it is


def head(text: str) -> tuple[str, ...]:
    """At most HEAD_LINES lines from the beginning of what a document says, or from the end of any other text (where a
    program says why it ended); then, if that is not all, how large it is."""
    if not is_cut(text):
        return tuple(printable(line) for line in text.splitlines())
    said = _document(text)
    lines = text.splitlines() if said is None else said
    shown, which = (lines[-HEAD_LINES:], "last") if said is None else (lines[:HEAD_LINES], "first")
    return (*map(_cut, shown), f"({which} {len(shown)} of {len(lines)} lines, {size(text)} bytes in all)")


def is_cut(text: str) -> bool:
    """Whether `head` is not all of it."""
    return len(text) > SHORT or len(text.splitlines()) > HEAD_LINES


def whole(text: str) -> str:
    """All of it, as lines: a document's fields one after the other, their line ends as line ends."""
    said = _document(text)
    lines = text.splitlines() if said is None else said
    return "".join(f"{printable(line)}\n" for line in lines)


def shortened(text: str) -> str:
    """For an answer in which many outputs may stand: as it is where it is short, else its head."""
    return "\n".join(head(text)) if is_cut(text) else text


def size(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _cut(line: str) -> str:
    return printable(line if len(line) <= HEAD_WIDTH else line[: HEAD_WIDTH - 1] + "…")


def _document(text: str) -> list[str] | None:
    """What a JSON document says, as lines; None for what is none: cut off, nested too deeply, another text."""
    try:
        found = json.loads(text)
        return list(_lines(found)) if isinstance(found, dict) else None
    except (ValueError, RecursionError):
        return None


def _lines(document: dict[str, Any]) -> Iterator[str]:
    """What is short goes first, on one line; then each text, and each list or mapping, under its name."""
    brief = {k: v for k, v in document.items() if not _long(v)}
    if brief:
        yield ", ".join(f"{k}: {v if isinstance(v, str) else json.dumps(v)}" for k, v in brief.items())
    for name, value in document.items():
        if name in brief:
            continue
        yield f"{name}:"
        if isinstance(value, str):
            yield from value.splitlines()
        else:
            yield from json.dumps(value, indent=1, ensure_ascii=False).splitlines()


def _long(value: object) -> bool:
    if isinstance(value, str):
        return len(value) > HEAD_WIDTH or len(value.splitlines()) > 1
    return len(json.dumps(value)) > HEAD_WIDTH
