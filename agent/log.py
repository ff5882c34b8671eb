"""Structured logs on standard error: text for people, one JSON object a line for machines.

`agent.app` calls `configure` once; `agent.investigate` sets `incident` around an incident's task, so that every line
written inside names it. Everybody else uses `logging` as usual. Log lines carry text that attackers can write (labels,
command output), so control characters are escaped: one record is one line, and no terminal obeys it. It knows no
secrets: what is given to it is printed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal, TextIO

_incident: ContextVar[str] = ContextVar("alertmedic_incident", default="")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "incident"}


@contextlib.contextmanager
def incident(incident_id: str) -> Iterator[None]:
    """Names the incident in every line logged inside the block, in this task and those it starts."""
    token = _incident.set(incident_id)
    try:
        yield
    finally:
        _incident.reset(token)


def printable(text: str, *, lines: bool = False) -> str:
    """The text with every character that a terminal could obey, reorder or hide written as an escape. `lines` keeps
    line ends and tabs."""
    if text.isprintable():
        return text
    keep = "\n\t" if lines else ""
    return "".join(c if c.isprintable() or c in keep else _escape(c) for c in text)


def _escape(character: str) -> str:
    named = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(character)
    return named or character.encode("unicode_escape", "surrogatepass").decode("ascii")


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class TextFormatter(logging.Formatter):
    """`2026-11-20T12:00:00.000Z INFO agent.app message incident=inc-...`"""

    def format(self, record: logging.LogRecord) -> str:
        text = f"{_time(record)} {record.levelname} {record.name} {printable(record.getMessage())}"
        if named := _incident.get():
            text += f" incident={printable(named)}"
        for name, value in _extras(record).items():
            text += f" {name}={printable(str(value))}"
        if record.exc_info:
            text += "\n" + printable(self.formatException(record.exc_info), lines=True)
        return text


class JsonFormatter(logging.Formatter):
    """One object a line: time, level, logger, message, incident where there is one, extras, error."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if named := _incident.get():
            entry["incident"] = named
        entry |= {name: value for name, value in _extras(record).items() if name not in entry}
        if record.exc_info:
            entry["error"] = self.formatException(record.exc_info)
        # json escapes everything outside ASCII and below the space; DEL is left.
        return json.dumps(entry, default=str).replace("\x7f", "\\u007f")


def _extras(record: logging.LogRecord) -> dict[str, object]:
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


def configure(
    form: Literal["text", "json"], level: Literal["debug", "info", "warning", "error"], stream: TextIO | None = None
) -> None:
    """Sends all logs to `stream` (default: standard error). Replaces what was configured before."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.getLogger("asyncio").setLevel(max(logging.WARNING, root.level))
