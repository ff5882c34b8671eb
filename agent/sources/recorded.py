"""Recorded incidents: reading them, writing them, and answering from them as an evidence source.

Called by tests, `agent.demo` and whoever keeps a situation for later (golden incidents, learning, replay). Exists
because a live incident and a recording are the same thing: `write_recording` then `read_recording` gives an equal
`Situation`. It never reads `truth.json` (the answer) and never evaluates anything it reads.

One directory an incident:

* alert.json: webhook payload, version 4. `labels.service` is the entry service, `startsAt` the onset.
* series.csv.gz: wide table, `time` (unix seconds), then one column a series in Prometheus notation; empty: no sample.
  Rows before the onset are the normal window, the others the abnormal one.
* topology.json: `{"edges": [[caller, callee], ...], "kinds": {service: kind}}`; kinds are optional.
* history-SECONDS.csv.gz: optional, as series.csv.gz, of the same windows so many seconds before (a day, a week), with
  the times of then.
* traces.jsonl.gz, logs.jsonl.gz: optional, one span or log record a line (`agent.sources.spans`).
* changes.json: optional, `{"releases": [], "commits": [], "deploys": [], "flags": []}`, objects that become facts.
* facts.json: optional, `[{"evidence", "kind", "subject", "service", "attributes"}, ...]`.
* missing.json: optional, `{evidence: reason}` of what could not be had.
* situation.json: optional, what the other files have no place for (see `_Meta`), so that nothing is lost.

Without situation.json every metric is an `Evidence` of its own, with source `recorded`, and `until` is the last row.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from agent.alerts import PayloadError, parse_payload
from agent.sources import EvidenceRequest, SourceError, bounded
from agent.sources.spans import SpanRows, read_logs, read_spans, write_logs, write_spans
from rules.model import Alert, Evidence, Fact, FloatArray, Frame, History, Logs, SeriesId, Situation, Spans, Topology

MAX_CSV_BYTES = 512 * 1024 * 1024  # of series.csv, unpacked
MAX_JSON_BYTES = 64 * 1024 * 1024
SERIES = re.compile(r"(?P<metric>[^{}\s\"]+)(?:\{(?P<labels>.*)\})?", re.DOTALL)
LABEL = re.compile(r'([^={},"\s]+)="((?:[^"\\]|\\.)*)"(,|\Z)', re.DOTALL)
HISTORY = re.compile(r"history-([1-9][0-9]{0,8})\.csv\.gz")
BYTE = re.compile(r"\(byte (\d+)\)")
ESCAPE = re.compile(r"\\(.)", re.DOTALL)
UNESCAPED = {"n": "\n", '"': '"', "\\": "\\"}


class RecordingError(SourceError):
    """A recording that cannot be read. The text names the file and what is wrong in it."""


class _Piece(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One `Evidence` but for its values and facts. `columns` are numbers of series columns, from 0; `rows` are the rows
    of its own grid where that is not the whole table."""

    name: str
    source: str
    query: str = ""
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()
    columns: tuple[int, ...] = ()
    rows: tuple[int, ...] | None = None
    missing: str | None = None
    partial: str = ""


class _Meta(msgspec.Struct, frozen=True, kw_only=True):
    """situation.json, version 1. `digests` are those of the alerts, in their order."""

    version: int
    tenant: str
    entry: str
    onset: float
    until: float
    quiet: tuple[tuple[float, float], ...]
    digests: tuple[str, ...]
    evidence: tuple[_Piece, ...]


class _Fact(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of facts.json. `at` is the number of its evidence in situation.json, where one name comes twice."""

    evidence: str
    kind: str
    subject: str
    service: str = ""
    attributes: dict[str, str | int | float | bool] = {}
    at: int | None = None


class _Graph(msgspec.Struct, frozen=True, kw_only=True):
    edges: tuple[tuple[str, str], ...] = ()
    kinds: dict[str, str] = {}


class RecordedSource:
    """Answers queries by name from one recording. Give it the `name` of the source it stands in for.

    A signal that the recording does not have is `missing`, not empty: nobody looked."""

    def __init__(self, situation: Situation, name: str = "recorded") -> None:
        self.name = name
        self._evidence: dict[str, list[Evidence]] = {}
        for piece in situation.evidence:
            self._evidence.setdefault(piece.name, []).append(piece)

    async def fetch(self, request: EvidenceRequest, deadline_seconds: float) -> tuple[Evidence, ...]:
        """The recorded evidence of those names, cut to the window and the services of the request (series without a
        service stay)."""
        return tuple(
            _cut(piece, request)
            for query in request.queries
            for piece in self._evidence.get(query.name)
            or (Evidence(query.name, self.name, missing="not in the recording", query=query.query),)
        )


def _cut(evidence: Evidence, request: EvidenceRequest) -> Evidence:
    frame = evidence.frame
    rows = [i for i, s in enumerate(frame.ids) if not request.services or s.service in ("", *request.services)]
    if not rows:
        return replace(evidence, frame=Frame.empty())
    at = (frame.times >= request.start) & (frame.times <= request.end)
    cut = Frame(frame.times[at], tuple(frame.ids[i] for i in rows), frame.values[np.asarray(rows)][:, at])
    return replace(evidence, frame=cut)


# -- reading


def read_recording(directory: Path, tenant: str = "default") -> Situation:
    """The recorded situation. `tenant` is used where the recording names none. Raises RecordingError."""
    alerts = _read_alerts(directory, tenant)
    graph = _json(directory / "topology.json", _Graph) or _Graph()
    topology = Topology(edges=graph.edges, kinds=graph.kinds)
    meta = _json(directory / "situation.json", _Meta)
    facts = _json(directory / "facts.json", tuple[_Fact, ...]) or ()
    times, ids, values = _read_series(directory / "series.csv.gz")
    spans, logs, partial = _read_events(directory)
    history = _read_history(directory)
    if meta is None:
        missing = _json(directory / "missing.json", dict[str, str]) or {}
        evidence = _by_metric(times, ids, values, facts, missing) + _changes(directory / "changes.json")
        evidence += tuple(Evidence(name, "recorded", missing=reason) for name, reason in partial)
        until = float(times[-1]) if times.size else alerts[0].starts_at
        entry = next((a.labels["service"] for a in alerts if a.labels.get("service")), "")
        onset = min(a.starts_at for a in alerts)
        return Situation(alerts, entry, onset, until, evidence, topology, (), spans, logs, history)
    if meta.version != 1 or len(meta.digests) != len(alerts):
        raise RecordingError(f"{directory / 'situation.json'}: version or alerts do not fit the other files")
    try:
        evidence = tuple(_piece(at, piece, times, ids, values, facts) for at, piece in enumerate(meta.evidence))
    except IndexError as error:
        raise RecordingError(
            f"{directory / 'situation.json'}: names a column or row that series.csv.gz lacks"
        ) from error
    evidence += tuple(Evidence(name, "recorded", missing=reason) for name, reason in partial)
    alerts = tuple(
        msgspec.structs.replace(alert, digest=digest, tenant=meta.tenant)
        for alert, digest in zip(alerts, meta.digests, strict=True)
    )
    return Situation(alerts, meta.entry, meta.onset, meta.until, evidence, topology, meta.quiet, spans, logs, history)


def _read_history(directory: Path) -> tuple[History, ...]:
    """What was seen earlier, one file for each distance in time; its metrics are evidence of their own."""
    found = []
    for path in sorted(directory.glob("history-*.csv.gz")):
        named = HISTORY.fullmatch(path.name)
        if named is None:
            raise RecordingError(f"{path}: a history is named history-SECONDS.csv.gz")
        times, ids, values = _read_series(path)
        found.append(History(float(named[1]), _by_metric(times, ids, values, (), {})))
    return tuple(sorted(found, key=lambda past: past.offset))


def _read_events(directory: Path) -> tuple[Spans | None, Logs | None, list[tuple[str, str]]]:
    """Spans and log lines, None where there is no such file, and what was left out of them and why."""
    spans, logs, partial, at = None, None, [], SpanRows()
    try:
        if (path := directory / "traces.jsonl.gz").exists():
            spans, at, cut = read_spans(path)
            partial += [("spans", f"only the first {spans.start.size} spans were read")] * cut
        if (path := directory / "logs.jsonl.gz").exists():
            logs, cut = read_logs(path, at)
            partial += [("logs", f"only the first {logs.time.size} log lines were read")] * cut
    except SourceError as error:
        raise RecordingError(str(error)) from error
    return spans, logs, partial


def _read_alerts(directory: Path, tenant: str) -> tuple[Alert, ...]:
    path = directory / "alert.json"
    try:
        payload = parse_payload(_body(path), tenant)
    except PayloadError as error:
        raise RecordingError(f"{path}: {error}") from error
    if payload.bad or not payload.alerts:
        raise RecordingError(f"{path}: {'; '.join(f'{b.path}: {b.reason}' for b in payload.bad[:3]) or 'no alert'}")
    return payload.alerts


def _read_series(path: Path) -> tuple[FloatArray, tuple[SeriesId, ...], FloatArray]:
    """The table: times (n,), names, values (series, n). An absent file is an empty table."""
    if not path.exists():
        return np.empty(0), (), np.empty((0, 0))
    try:
        with gzip.open(path) as packed:
            body = packed.read(MAX_CSV_BYTES + 1)
        if len(body) > MAX_CSV_BYTES:
            raise RecordingError(f"{path}: more than {MAX_CSV_BYTES} bytes unpacked")
        rows = csv.reader(io.StringIO(body.decode(), newline=""), strict=True)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise RecordingError(f"{path}: {bounded(str(error))}") from error
    table: list[list[float]] = []
    lines: list[int] = []
    try:
        header = next(rows, [])
        if header[:1] != ["time"]:
            raise ValueError("the first column is not `time`")
        ids = tuple(parse_series(name) for name in header[1:])
        for row in rows:
            if len(row) != len(header):
                raise ValueError(f"a row of {len(row)} columns where {len(header)} are named")
            table.append([float(cell) if cell else math.nan for cell in row])
            lines.append(rows.line_num)
    except (csv.Error, ValueError) as error:
        raise RecordingError(f"{path}, line {max(1, rows.line_num)}: {bounded(str(error))}") from error
    whole = np.asarray(table, dtype=np.float64).reshape(len(table), len(header))
    times = whole[:, 0].copy()
    wrong = np.flatnonzero(~np.isfinite(times) | (np.diff(times, prepend=-math.inf) <= 0))
    if wrong.size:
        raise RecordingError(f"{path}, line {lines[int(wrong[0])]}: times do not ascend")
    values = np.ascontiguousarray(whole[:, 1:].T)
    values[np.isinf(values)] = math.nan  # as the live source does
    return times, ids, values


def parse_series(text: str) -> SeriesId:
    """`metric{label="value",...}` as a SeriesId: the inverse of `str(SeriesId)`. Raises ValueError."""
    matched = SERIES.fullmatch(text)
    if matched is None:
        raise ValueError(f"{bounded(text, 80)!r} is no series in Prometheus notation")
    labels: dict[str, str] = {}
    inner = matched["labels"] or ""
    at = 0
    while at < len(inner):
        label = LABEL.match(inner, at)
        if label is None or label[1] in labels:
            raise ValueError(f"{bounded(text, 80)!r} is no series in Prometheus notation (at label {len(labels) + 1})")
        labels[label[1]] = ESCAPE.sub(lambda m: UNESCAPED.get(m[1], m[0]), label[2])
        at = label.end()
    return SeriesId.of(matched["metric"], labels)


def _by_metric(
    times: FloatArray,
    ids: tuple[SeriesId, ...],
    values: FloatArray,
    facts: tuple[_Fact, ...],
    missing: Mapping[str, str],
) -> tuple[Evidence, ...]:
    columns: dict[str, list[int]] = {}
    for i, series in enumerate(ids):
        columns.setdefault(series.metric, []).append(i)
    seen: dict[str, list[Fact]] = {}
    for fact in facts:
        seen.setdefault(fact.evidence, []).append(_fact_of(fact))
    found = [
        Evidence(
            name,
            "recorded",
            Frame(times, tuple(ids[i] for i in columns[name]), values[np.asarray(columns[name])])
            if name in columns
            else Frame.empty(),
            tuple(seen.get(name, ())),
        )
        for name in dict.fromkeys((*columns, *seen))
        if name not in missing
    ]
    return (*found, *(Evidence(name, "recorded", missing=reason) for name, reason in missing.items()))


def _changes(path: Path) -> tuple[Evidence, ...]:
    """Changes as facts of kind change.release, .commit, .deploy, .flag; their plain values are attributes."""
    changes = _json(path, dict[str, list[dict[str, Any]]])
    if changes is None:
        return ()
    kinds = {
        "releases": "change.release",
        "commits": "change.commit",
        "deploys": "change.deploy",
        "flags": "change.flag",
    }
    if unknown := sorted(set(changes) - set(kinds)):
        raise RecordingError(f"{path}: unknown kind of change {bounded(unknown[0], 40)!r}")
    facts = [
        Fact(
            kinds[kind],
            next((str(one[key]) for key in ("id", "sha", "version", "name", "flag") if key in one), f"{kind}[{i}]"),
            str(one.get("service", "")),
            {k: v for k, v in one.items() if k != "service" and isinstance(v, (str, int, float, bool))},
        )
        for kind in kinds
        for i, one in enumerate(changes.get(kind, ()))
    ]
    return (Evidence("changes", "recorded", facts=tuple(facts)),)


def _piece(
    at: int,
    piece: _Piece,
    times: FloatArray,
    ids: tuple[SeriesId, ...],
    values: FloatArray,
    facts: tuple[_Fact, ...],
) -> Evidence:
    frame = Frame.empty()
    if piece.columns:
        columns = np.asarray(piece.columns)
        rows = np.arange(times.shape[0]) if piece.rows is None else np.asarray(piece.rows, dtype=np.intp)
        frame = Frame(times[rows], tuple(ids[i] for i in piece.columns), values[columns][:, rows])
    return Evidence(
        name=piece.name,
        source=piece.source,
        frame=frame,
        facts=tuple(_fact_of(f) for f in facts if (f.at == at if f.at is not None else f.evidence == piece.name)),
        missing=piece.missing,
        warnings=piece.warnings,
        query=piece.query,
        seconds=piece.seconds,
        partial=piece.partial,
    )


def _fact_of(fact: _Fact) -> Fact:
    return Fact(fact.kind, fact.subject, fact.service, fact.attributes)


def _body(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            body = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise RecordingError(f"{path}: {error.strerror or error}") from error
    if len(body) > MAX_JSON_BYTES:
        raise RecordingError(f"{path}: more than {MAX_JSON_BYTES} bytes")
    return body


def _json(path: Path, kind: Any) -> Any:
    """The file as `kind`, None if there is none. Raises RecordingError."""
    if not path.exists():
        return None
    body = _body(path)
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise RecordingError(f"{path}{_line_of(error, body)}: {bounded(str(error))}") from error


def _line_of(error: Exception, body: bytes) -> str:
    """`, line 3` where the error tells a byte of the body; errors of shape tell the path instead."""
    at = BYTE.search(str(error))
    return f", line {1 + body[: int(at[1])].count(10)}" if at else ""


# -- writing


def write_recording(directory: Path, situation: Situation) -> None:
    """Writes the situation, into a directory that is made and must not hold another recording.

    Raises ValueError for what it cannot write (no alert, alerts of two tenants, a number that is not finite), and
    OSError."""
    if not situation.alerts or len({alert.tenant for alert in situation.alerts}) != 1:
        raise ValueError("write recording: a recording has at least one alert, and alerts of one tenant")
    directory.mkdir(parents=True, exist_ok=True)
    if (directory / "alert.json").exists():
        raise FileExistsError(f"write recording: {directory} holds a recording already")
    table = _Table.of(situation.evidence)
    meta = _Meta(
        version=1,
        tenant=situation.alerts[0].tenant,
        entry=situation.entry,
        onset=situation.onset,
        until=situation.until,
        quiet=situation.quiet,
        digests=tuple(alert.digest for alert in situation.alerts),
        evidence=table.pieces,
    )
    facts = [
        _Fact(evidence=e.name, kind=f.kind, subject=f.subject, service=f.service, attributes=dict(f.attributes), at=at)
        for at, e in enumerate(situation.evidence)
        for f in e.facts
    ]
    topology = {"edges": situation.topology.edges, "kinds": situation.topology.kinds}
    files: dict[str, Any] = {"topology.json": topology, "situation.json": msgspec.to_builtins(meta)}
    if facts:
        files["facts.json"] = msgspec.to_builtins(facts)
    if missing := situation.missing():
        files["missing.json"] = missing
    files["alert.json"] = _payload(situation)
    texts = {name: json.dumps(body, indent=1, ensure_ascii=False, allow_nan=False) for name, body in files.items()}
    _write_table(directory / "series.csv.gz", table)
    for past in situation.history:
        _write_table(directory / f"history-{past.offset:.0f}.csv.gz", _Table.of(past.evidence))
    if situation.spans is not None:
        write_spans(directory / "traces.jsonl.gz", situation.spans)
    if situation.logs is not None:
        write_logs(directory / "logs.jsonl.gz", situation.logs, situation.spans)
    for name, text in texts.items():  # alert.json last: a directory with one is whole
        (directory / name).write_text(text + "\n", "utf-8")


def _write_table(path: Path, table: _Table) -> None:
    with gzip.GzipFile(path, "wb", mtime=0) as packed:  # no clock: equal input, equal bytes
        packed.write(table.csv().encode())


@dataclass(frozen=True, slots=True)
class _Table:
    """All frames laid side by side on the union of their times."""

    times: FloatArray
    pieces: tuple[_Piece, ...]
    columns: tuple[tuple[SeriesId, FloatArray], ...]

    @classmethod
    def of(cls, evidence: Iterable[Evidence]) -> _Table:
        kept = list(evidence)
        frames = [e.frame.times for e in kept if e.frame.ids]
        times = np.unique(np.concatenate(frames)) if frames else np.empty(0)
        pieces: list[_Piece] = []
        columns: list[tuple[SeriesId, FloatArray]] = []
        for e in kept:
            rows = np.searchsorted(times, e.frame.times)
            first = len(columns)
            for i, series in enumerate(e.frame.ids):
                column = np.full(times.shape[0], math.nan)
                column[rows] = e.frame.values[i]
                columns.append((series, column))
            own = e.frame.ids and rows.shape[0] != times.shape[0]
            pieces.append(
                _Piece(
                    name=e.name,
                    source=e.source,
                    query=e.query,
                    seconds=e.seconds,
                    warnings=e.warnings,
                    columns=tuple(range(first, len(columns))),
                    rows=tuple(int(r) for r in rows) if own else None,
                    missing=e.missing,
                    partial=e.partial,
                )
            )
        return cls(times, tuple(pieces), tuple(columns))

    def csv(self) -> str:
        """Numbers in the shortest form that reads back the same; header cells always quoted."""
        header = ",".join(["time", *('"' + str(series).replace('"', '""') + '"' for series, _ in self.columns)])
        values = [column for _, column in self.columns]
        rows = (
            ",".join([_cell(at), *(_cell(column[i]) for column in values)]) for i, at in enumerate(self.times.tolist())
        )
        return "\n".join([header, *rows]) + "\n"


def _cell(value: float) -> str:
    value = float(value)
    if not math.isfinite(value):
        return ""  # NaN is "no sample"; frames hold no infinities
    return str(int(value)) if value.is_integer() and 0 <= value < 2**53 and math.copysign(1, value) > 0 else repr(value)


def _payload(situation: Situation) -> dict[str, Any]:
    """The alerts as a webhook payload of version 4."""
    alerts = situation.alerts
    labels = [set(alert.labels.items()) for alert in alerts]
    annotations = [set(alert.annotations.items()) for alert in alerts]
    group = {"alertname": alerts[0].name} if alerts[0].name else {}
    return {
        "version": "4",
        "groupKey": "{}:{" + ", ".join(f"{k}={json.dumps(v, ensure_ascii=False)}" for k, v in group.items()) + "}",
        "truncatedAlerts": 0,
        "status": "firing" if any(a.status == "firing" for a in alerts) else "resolved",
        "receiver": "recording",
        "groupLabels": group,
        "commonLabels": dict(sorted(set.intersection(*labels))),
        "commonAnnotations": dict(sorted(set.intersection(*annotations))),
        "externalURL": "",
        "alerts": [
            {
                "status": alert.status,
                "labels": alert.labels,
                "annotations": alert.annotations,
                "startsAt": _rfc3339(alert.starts_at),
                "endsAt": "0001-01-01T00:00:00Z" if alert.ends_at is None else _rfc3339(alert.ends_at),
                "generatorURL": alert.generator_url,
                "fingerprint": alert.fingerprint,
            }
            for alert in alerts
        ],
    }


def _rfc3339(seconds: float) -> str:
    """To the microsecond, which is what an alert's times hold."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
