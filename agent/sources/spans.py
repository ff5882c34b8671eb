"""Reads recorded spans and log lines, line by line, into columns, and writes them. Called by `agent.sources.recorded`.

Exists because a recording's traces are by far its largest part: what is kept of a span are five numbers and of a log
line five, its message shrinks to a template right away. Bounded in lines and bytes a line; what exceeds the bound is
left out and said. Written lines hold what is left: a log line its template, marked as one, and ids are row numbers.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np

from agent.sources import SourceError, bounded
from rules.model import FloatArray, IntArray, Logs, Spans
from rules.traces import template_of

MAX_LINES = 1_000_000  # of one file
MAX_LINE_BYTES = 1 << 20
BUFFER_BYTES = 1 << 18
_ERRORS = frozenset({"ERROR", "ERR", "FATAL", "CRITICAL", "SEVERE", "PANIC", "ALERT", "EMERG"})
_T = TypeVar("_T")
SpanRows = dict[tuple[str, str], int]  # row of each (trace, span), so that a log line finds the span that wrote it


class _Span(msgspec.Struct, frozen=True):
    trace_id: str
    span_id: str
    service: str
    operation: str
    start: float
    duration_ms: float
    parent_id: str | None = None


class _Line(msgspec.Struct, frozen=True):
    time: float
    service: str
    message: str
    trace_id: str | None = None
    span_id: str | None = None
    severity: str | None = None
    template: bool = False  # the message is a template already: what was written from columns


class _Names(dict[str, int]):
    """Numbers names in the order of their first appearance."""

    def __missing__(self, name: str) -> int:
        self[name] = number = len(self)
        return number


def read_spans(path: Path) -> tuple[Spans, SpanRows, bool]:
    """The spans, where each stands, and whether some were left out. A span that comes twice counts once.

    Raises SourceError naming file and line."""
    services, operations, at = _Names(), _Names(), SpanRows()
    numbers: list[tuple[int, int, float, float]] = []
    parents: list[tuple[str, str] | None] = []
    cut = False
    for span in _lines(path, _Span):
        if len(numbers) >= MAX_LINES:
            cut = True
            break
        key = (span.trace_id, span.span_id)
        if key in at:
            continue
        at[key] = len(numbers)
        numbers.append((services[span.service], operations[span.operation], span.start, span.duration_ms / 1000.0))
        parents.append(None if span.parent_id is None else (span.trace_id, span.parent_id))
    table = np.array(numbers, dtype=np.float64).reshape(-1, 4)
    rows = np.fromiter((-1 if p is None else at.get(p, -1) for p in parents), dtype=np.intp, count=len(parents))
    spans = Spans(
        services=tuple(services),
        operations=tuple(operations),
        service=table[:, 0].astype(np.intp),
        operation=table[:, 1].astype(np.intp),
        parent=rows,
        start=table[:, 2].copy(),
        duration=table[:, 3].copy(),
    )
    return spans, at, cut


def read_logs(path: Path, at: SpanRows) -> tuple[Logs, bool]:
    """The log lines as templates, and whether some were left out. Raises SourceError naming file and line."""
    services, templates = _Names(), _Names()
    numbers: list[tuple[int, int, int, float, bool]] = []
    cut = False
    for line in _lines(path, _Line):
        if len(numbers) >= MAX_LINES:
            cut = True
            break
        span = at.get((line.trace_id, line.span_id), -1) if line.trace_id and line.span_id else -1
        error = (line.severity or "").upper() in _ERRORS
        template = line.message if line.template else template_of(line.message)
        numbers.append((services[line.service], templates[template], span, line.time, error))
    table = np.array(numbers, dtype=np.float64).reshape(-1, 5)
    logs = Logs(
        services=tuple(services),
        templates=tuple(templates),
        service=table[:, 0].astype(np.intp),
        template=table[:, 1].astype(np.intp),
        span=table[:, 2].astype(np.intp),
        time=table[:, 3].copy(),
        error=table[:, 4].astype(bool),
    )
    return logs, cut


def _lines(path: Path, kind: type[_T]) -> Iterator[_T]:
    decoder = msgspec.json.Decoder(kind)
    number = 0
    try:
        with gzip.open(path) as unpacked, io.BufferedReader(unpacked, BUFFER_BYTES) as packed:
            while line := packed.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise SourceError(f"{path}, line {number}: more than {MAX_LINE_BYTES} bytes")
                yield decoder.decode(line)
    except (OSError, EOFError, zlib.error, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}, line {number}: {bounded(str(error))}") from error


def write_spans(path: Path, spans: Spans) -> None:
    """What `read_spans` reads as the same columns. Raises ValueError for a number that is not finite, OSError."""
    if not (np.isfinite(spans.start).all() and np.isfinite(spans.duration).all()):
        raise ValueError("write recording: a span's start or duration is not finite")
    milliseconds = _milliseconds(spans.duration)
    columns = (spans.service, spans.operation, spans.parent, spans.start, milliseconds, _roots(spans.parent))
    _write(
        path,
        (
            {
                "trace_id": str(root),
                "span_id": str(row),
                "parent_id": None if parent < 0 else str(parent),
                "service": spans.services[service],
                "operation": spans.operations[operation],
                "start": start,
                "duration_ms": duration,
            }
            for row, (service, operation, parent, start, duration, root) in enumerate(
                zip(*(c.tolist() for c in columns), strict=True)
            )
        ),
    )


def write_logs(path: Path, logs: Logs, spans: Spans | None) -> None:
    """What `read_logs` reads as the same columns. Raises ValueError for a time that is not finite, OSError."""
    if not np.isfinite(logs.time).all():
        raise ValueError("write recording: a log line's time is not finite")
    roots = _roots(spans.parent).tolist() if spans is not None else []
    columns = (logs.service, logs.template, logs.span, logs.time, logs.error)
    _write(
        path,
        (
            {
                "time": at,
                "service": logs.services[service],
                "trace_id": None if span < 0 else str(roots[span]),
                "span_id": None if span < 0 else str(span),
                "severity": "ERROR" if error else None,
                "message": logs.templates[template],
                "template": True,
            }
            for service, template, span, at, error in zip(*(c.tolist() for c in columns), strict=True)
        ),
    )


def _write(path: Path, lines: Iterator[dict[str, object]]) -> None:
    encode = msgspec.json.Encoder().encode
    with gzip.GzipFile(path, "wb", mtime=0) as packed:  # no clock: equal input, equal bytes
        packed.writelines(encode(line) + b"\n" for line in lines)


def _roots(parent: IntArray) -> IntArray:
    """The row of the root above each span: (n,). Spans whose parents go in a circle are all of one trace, -1."""
    at = np.where(parent < 0, np.arange(parent.size), parent)
    for _ in range(max(1, int(parent.size).bit_length())):
        at = at[at]
    return np.where(parent[at] < 0, at, -1) if parent.size else at


def _milliseconds(seconds: FloatArray) -> FloatArray:
    """Milliseconds that give exactly these seconds when divided by 1,000, where there are such."""
    found = seconds * 1000.0
    for other in (np.nextafter(found, np.inf), np.nextafter(found, -np.inf)):
        found = np.where(found / 1000.0 == seconds, found, np.where(other / 1000.0 == seconds, other, found))
    return found
