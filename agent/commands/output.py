"""How commands speak: JSON for programs, tables and lines for people, failures with a hint.

Used by every command. Escapes control characters in whatever is meant for a terminal, and imports rich only when
standard output is one.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

from agent.log import printable


class Exit(IntEnum):
    """Exit codes of every command, as docs/configuration.md lists them."""

    OK = 0
    FAULT = 1
    USAGE = 2
    UNREACHABLE = 3


class CommandError(Exception):
    """A command cannot go on: what it was doing, to what, and what the person can do."""

    def __init__(self, what: str, hint: str = "", code: Exit = Exit.FAULT) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint
        self.code = code


def emit_json(value: Any) -> None:
    """One JSON document. Only ASCII, so that a terminal obeys nothing in it."""
    sys.stdout.write(json.dumps(value, indent=2, default=str).replace("\x7f", "\\u007f") + "\n")


def emit_json_line(value: Any) -> None:
    sys.stdout.write(json.dumps(value, default=str).replace("\x7f", "\\u007f") + "\n")


def say(text: str, *, lines: bool = False) -> None:
    sys.stdout.write(printable(text, lines=lines) + "\n")


def complain(text: str, hint: str = "") -> None:
    """One line on standard error."""
    sys.stderr.write(printable(f"alertmedic: {text}" + (f"; {hint}" if hint else "")) + "\n")


def on_terminal() -> bool:
    return sys.stdout.isatty() and os.environ.get("TERM", "") not in ("", "dumb") and "NO_COLOR" not in os.environ


def table(rows: Sequence[Sequence[str]], *, empty: str) -> None:
    """Rows, the first being the header. `empty` is said when there is nothing else."""
    if len(rows) < 2:
        say(empty)
        return
    if on_terminal():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        shown = Table(box=None, pad_edge=False, header_style="bold")
        for name in rows[0]:
            shown.add_column(name, overflow="fold")
        for row in rows[1:]:
            shown.add_row(*(Text(printable(cell)) for cell in row))
        Console().print(shown)
        return
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(rows[0]))]
    for row in cells:
        sys.stdout.write("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n")
