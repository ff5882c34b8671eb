"""Recorded spans and log lines: what is kept of them, and what happens to bad and to endless files."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from agent.sources import spans as reader
from agent.sources.recorded import RecordingError, read_recording, write_recording
from rules.model import Alert, Situation

ONSET = 1_700_000_000.0


def span(number: int, parent: int | None = None, **more: Any) -> dict[str, Any]:
    return {
        "trace_id": "t",
        "span_id": str(number),
        "parent_id": None if parent is None else str(parent),
        "service": f"s{number % 2}",
        "operation": "op",
        "start": ONSET + number,
        "duration_ms": 250.0,
        **more,
    }


def line(number: int, **more: Any) -> dict[str, Any]:
    return {
        "time": ONSET + number,
        "service": f"s{number % 2}",
        "trace_id": "t",
        "span_id": str(number),
        "severity": "INFO",
        "message": f"order {number} is saved",
        **more,
    }


def packed(path: Path, rows: Iterable[Mapping[str, Any] | str]) -> None:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()))


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    alert = Alert(
        tenant="default",
        fingerprint="0123456789abcdef",
        status="firing",
        labels={"alertname": "Slow", "service": "s0"},
        starts_at=ONSET,
        digest="d",
    )
    write_recording(tmp_path / "case", Situation((alert,), "s0", ONSET, ONSET + 60))
    return tmp_path / "case"


def test_spans_find_their_parents_and_lines_their_spans(recording: Path) -> None:
    # The child comes first, one span twice, one parent never; lines of spans that are there and of others.
    rows = [span(1, parent=0), span(0), span(0, duration_ms=9.0), span(2, parent=77)]
    packed(recording / "traces.jsonl.gz", rows)
    packed(
        recording / "logs.jsonl.gz",
        [line(1), line(0, severity="error"), line(5), line(2, trace_id=None, span_id=None, severity=None)],
    )
    situation = read_recording(recording)
    spans, logs = situation.spans, situation.logs
    assert spans is not None
    assert logs is not None
    assert [spans.services[i] for i in spans.service] == ["s1", "s0", "s0"]
    assert spans.parent.tolist() == [1, -1, -1]
    assert spans.duration.tolist() == [0.25, 0.25, 0.25]
    assert logs.span.tolist() == [0, 1, -1, -1]
    assert logs.error.tolist() == [False, True, False, False]
    assert logs.templates == ("order * is saved",)
    assert situation.missing() == {}


def test_without_files_there_are_no_events(recording: Path) -> None:
    situation = read_recording(recording)
    assert (situation.spans, situation.logs) == (None, None)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("{", "line 2"),
        ('{"trace_id": "t"}', "line 2.*span_id"),
        (json.dumps(span(3) | {"start": "soon"}), "line 2.*start"),
    ],
)
def test_a_bad_line_is_named(recording: Path, bad: str, said: str) -> None:
    packed(recording / "traces.jsonl.gz", [span(1), bad])
    with pytest.raises(RecordingError, match=rf"traces\.jsonl\.gz, {said}"):
        read_recording(recording)


def test_a_file_that_is_cut_off_is_named(recording: Path) -> None:
    packed(recording / "logs.jsonl.gz", [line(i) for i in range(100)])
    path = recording / "logs.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RecordingError, match=r"logs\.jsonl\.gz"):
        read_recording(recording)


def test_endless_files_are_cut_and_it_is_said(recording: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_LINES", 10)
    packed(recording / "traces.jsonl.gz", [span(i) for i in range(25)])
    packed(recording / "logs.jsonl.gz", [line(i) for i in range(25)])
    situation = read_recording(recording)
    assert situation.spans is not None
    assert situation.spans.start.size == 10
    assert situation.missing() == {
        "spans": "only the first 10 spans were read",
        "logs": "only the first 10 log lines were read",
    }


def test_a_line_without_end_is_refused(recording: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_LINE_BYTES", 1000)
    packed(recording / "logs.jsonl.gz", [line(1), line(2, message="x" * 2000)])
    with pytest.raises(RecordingError, match="line 2: more than 1000 bytes"):
        read_recording(recording)
