"""Recordings: a live situation survives being written and read; public recordings can be read."""

from __future__ import annotations

import csv
import gzip
import json
import math
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sources_world import Query

from agent.packs import load_packs
from agent.sources import EvidenceRequest, gather
from agent.sources.recorded import RecordedSource, RecordingError, parse_series, read_recording, write_recording
from rules.diagnose import diagnose
from rules.model import Alert, Evidence, Fact, Frame, Logs, SeriesId, Situation, Spans, Topology

ROOT = Path(__file__).resolve().parents[2]
PUBLIC = ROOT.parent / "shared" / "rca"

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=12)
WORD = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1, max_size=8)
LABEL = st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_]{0,6}", fullmatch=True)
METRIC = st.from_regex(r"[a-zA-Z_:][a-zA-Z0-9_:.]{0,8}", fullmatch=True)
MICROS = st.integers(0, 4 * 10**15).map(lambda n: n / 1e6)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
SERIES = st.builds(SeriesId.of, METRIC, st.dictionaries(LABEL, TEXT, max_size=3))


@st.composite
def frames(draw: st.DrawFn) -> Frame:
    ids = draw(st.lists(SERIES, max_size=4, unique=True))
    if not ids:
        return Frame.empty()
    times = np.asarray(sorted(draw(st.sets(MICROS, min_size=1, max_size=6))))
    cells = st.one_of(FINITE, st.just(math.nan))
    rows = draw(
        st.lists(st.lists(cells, min_size=len(times), max_size=len(times)), min_size=len(ids), max_size=len(ids))
    )
    return Frame(times, tuple(ids), np.asarray(rows, dtype=np.float64))


FACTS = st.builds(
    Fact, METRIC, TEXT, TEXT, st.dictionaries(LABEL, st.one_of(TEXT, FINITE, st.booleans(), st.integers()), max_size=3)
)
EVIDENCE = st.builds(
    Evidence,
    name=METRIC,
    source=WORD,
    frame=frames(),
    facts=st.lists(FACTS, max_size=3).map(tuple),
    warnings=st.lists(TEXT, max_size=2).map(tuple),
    query=TEXT,
    seconds=FINITE,
    partial=TEXT,
) | st.builds(Evidence, name=METRIC, source=WORD, missing=TEXT, query=TEXT)


@st.composite
def alerts(draw: st.DrawFn) -> tuple[Alert, ...]:
    tenant = draw(st.from_regex(r"[a-z]{1,8}", fullmatch=True))

    def one(status: str, ends: float) -> st.SearchStrategy[Alert]:
        return st.builds(
            Alert,
            tenant=st.just(tenant),
            fingerprint=WORD,
            status=st.just(status),
            labels=st.dictionaries(WORD, TEXT, min_size=1, max_size=3),
            annotations=st.dictionaries(WORD, TEXT, max_size=2),
            starts_at=MICROS,
            ends_at=st.just(ends if status == "resolved" else None),
            generator_url=TEXT,
            digest=WORD,
        )

    either = MICROS.flatmap(lambda ends: one("resolved", ends)) | one("firing", 0.0)
    return tuple(draw(st.lists(either, min_size=1, max_size=3)))


SITUATIONS = st.builds(
    Situation,
    alerts=alerts(),
    entry=TEXT,
    onset=FINITE,
    until=FINITE,
    evidence=st.lists(EVIDENCE, max_size=4).map(tuple),
    topology=st.builds(
        Topology,
        st.lists(st.tuples(WORD, WORD), max_size=4).map(tuple),
        st.dictionaries(WORD, st.sampled_from(["http", "host"]), max_size=3),
    ),
    quiet=st.lists(st.tuples(FINITE, FINITE), max_size=2).map(tuple),
)


def plain(situation: Situation) -> dict[str, Any]:
    """Everything of a situation in comparable form. NaN is None, -0.0 and 0.0 differ, 1 and 1.0 and True differ."""

    def frame(f: Frame) -> Any:
        return [
            f.times.tolist(),
            f.ids,
            [[None if math.isnan(v) else repr(v) for v in row] for row in f.values.tolist()],
        ]

    def columns(of: Spans | Logs | None) -> Any:
        if of is None:
            return None
        values = ((name, getattr(of, name)) for name in of.__dataclass_fields__)
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values}

    return {
        "spans": columns(situation.spans),
        "logs": columns(situation.logs),
        "alerts": situation.alerts,
        "head": (situation.entry, situation.onset, situation.until, situation.quiet, situation.topology),
        "evidence": [
            (
                *(e.name, e.source, e.missing, e.partial, e.warnings, e.query, e.seconds, frame(e.frame)),
                [(f.kind, f.subject, f.service, {k: (type(v), v) for k, v in f.attributes.items()}) for f in e.facts],
            )
            for e in situation.evidence
        ],
    }


@settings(max_examples=40, deadline=None)
@given(SITUATIONS)
def test_what_is_written_reads_back_equal(situation: Situation) -> None:
    directory = Path(tempfile.mkdtemp(prefix="recording-"))
    try:
        write_recording(directory, situation)
        assert plain(read_recording(directory)) == plain(situation)
    finally:
        shutil.rmtree(directory)


@given(SERIES)
def test_a_series_name_reads_back(series: SeriesId) -> None:
    assert parse_series(str(series)) == series


@pytest.mark.parametrize(
    "text", ["", "a{", 'a{b="c"', "a{b=c}", 'a{b="c",b="d"}', 'a{b="c""d"}', 'a{="c"}', "a b", "a}"]
)
def test_what_is_no_series_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no series"):
        parse_series(text)


ALERT = Alert(
    tenant="t",
    fingerprint="f",
    status="firing",
    labels={"alertname": "Slow", "service": "front"},
    starts_at=60.0,
    digest="d",
)


def small() -> Situation:
    frame = Frame(
        np.asarray([0.0, 30.0, 60.0, 90.0]),
        (SeriesId.of("latency", {"service": "front"}), SeriesId.of("latency", {"service": "orders"})),
        np.asarray([[1.0, 2.0, 3.0, math.nan], [5.0, 6.0, 7.0, 8.0]]),
    )
    found = (Evidence("latency", "prometheus", frame), Evidence("errors", "prometheus", missing="timeout after 15 s"))
    return Situation((ALERT,), "front", 60.0, 90.0, found, Topology((("front", "orders"),), {"front": "http"}))


def test_the_plain_files_alone_are_a_recording_too(tmp_path: Path) -> None:
    write_recording(tmp_path, small())
    (tmp_path / "situation.json").unlink()
    read = read_recording(tmp_path, "other")
    assert (read.entry, read.onset, read.until, read.alerts[0].tenant) == ("front", 60.0, 90.0, "other")
    assert read.missing() == {"errors": "timeout after 15 s"}
    (latency,) = (e for e in read.evidence if e.name == "latency")
    assert latency.source == "recorded"
    np.testing.assert_array_equal(latency.frame.values, small().evidence[0].frame.values)


def test_changes_are_facts(tmp_path: Path) -> None:
    write_recording(tmp_path, small())
    (tmp_path / "situation.json").unlink()
    changes = {"releases": [], "deploys": [{"id": "d1", "service": "orders", "at": 55.0}], "flags": [{"flag": "new"}]}
    (tmp_path / "changes.json").write_text(json.dumps(changes))
    read = read_recording(tmp_path)
    assert read.facts("change.deploy") == (Fact("change.deploy", "d1", "orders", {"id": "d1", "at": 55.0}),)
    assert [f.subject for f in read.facts("change.flag")] == ["new"]


def test_an_existing_recording_is_not_overwritten(tmp_path: Path) -> None:
    write_recording(tmp_path, small())
    with pytest.raises(FileExistsError):
        write_recording(tmp_path, small())


def test_equal_situations_make_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_recording(tmp_path / name, small())
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_facts_must_be_finite(tmp_path: Path, value: float) -> None:
    odd = replace(small(), evidence=(Evidence("e", "host", facts=(Fact("k", "s", "", {"a": value}),)),))
    with pytest.raises(ValueError):
        write_recording(tmp_path / "r", odd)
    assert not (tmp_path / "r" / "alert.json").exists()


def test_alerts_of_two_tenants_are_refused(tmp_path: Path) -> None:
    import msgspec

    two = (ALERT, msgspec.structs.replace(ALERT, tenant="u"))
    with pytest.raises(ValueError, match="one tenant"):
        write_recording(tmp_path / "r", replace(small(), alerts=two))


BROKEN: dict[str, tuple[str, bytes]] = {
    "no alert": ("alert.json", b"{}"),
    "alert is no JSON": ("alert.json", b"{"),
    "graph of another shape": ("topology.json", b'{"edges": [["a"]]}'),
    "not gzip": ("series.csv.gz", b"time\n"),
    "cut off": ("series.csv.gz", gzip.compress(b"time,a\n1,2\n" * 100)[:-12]),
    "no time column": ("series.csv.gz", gzip.compress(b"at,a\n1,2\n")),
    "a word for a number": ("series.csv.gz", gzip.compress(b"time,a\n1,x\n")),
    "a short row": ("series.csv.gz", gzip.compress(b"time,a\n1\n")),
    "times go back": ("series.csv.gz", gzip.compress(b"time,a\n2,1\n1,1\n")),
    "no time": ("series.csv.gz", gzip.compress(b"time,a\n,1\n")),
    "a name that is none": ("series.csv.gz", gzip.compress(b'time,"a{b"\n1,1\n')),
    "not UTF-8": ("series.csv.gz", gzip.compress(b"time,\xff\n1,1\n")),
    "fewer columns than named": ("series.csv.gz", gzip.compress(b"time\n0\n30\n60\n90\n")),
    "another version": ("situation.json", b'{"version": 2}'),
    "changes of another kind": ("facts.json", b'[{"kind": 1}]'),
}


@pytest.mark.parametrize(
    ("file", "body", "said"),
    [
        ("series.csv.gz", gzip.compress(b"time,a\n1,2\n2,x\n"), "series.csv.gz, line 3: could not convert"),
        ("series.csv.gz", gzip.compress(b"time,a\n1,2\n2,3\n3\n"), "line 4: a row of 1 columns where 2 are named"),
        ("series.csv.gz", gzip.compress(b'time,"a\nb",c\n1,2,3\n2,2,3\n1,2,3\n'), "line 2: .*no series"),
        ("series.csv.gz", gzip.compress(b"time,a\n1,2\n3,2\n2,3\n"), "line 4: times do not ascend"),
        ("topology.json", b'{\n "edges": [\n  ["a", "b"],,\n ]}', "topology.json, line 3: "),
        ("topology.json", b'{\n "edges": [\n  ["a"]]}', r"topology.json: .*\$.edges"),
        ("topology.json", b'{"edges": [["a", "\xff"]]}', "topology.json"),
        ("situation.json", b'{"version": 1}', "situation.json: .*missing required field"),
    ],
    ids=range(8),
)
def test_a_broken_file_is_named_with_line_and_reason(tmp_path: Path, file: str, body: bytes, said: str) -> None:
    write_recording(tmp_path, small())
    (tmp_path / file).write_bytes(body)
    with pytest.raises(RecordingError, match=said):
        read_recording(tmp_path)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named(tmp_path: Path, name: str) -> None:
    write_recording(tmp_path, small())
    file, body = BROKEN[name]
    (tmp_path / file).write_bytes(body)
    with pytest.raises(RecordingError, match=r"\.(json|gz)"):
        read_recording(tmp_path)


async def test_a_recording_answers_queries_like_a_source() -> None:
    source = RecordedSource(small(), "prometheus")
    asked = tuple(Query(name, "q") for name in ("latency", "errors", "cpu"))
    request = EvidenceRequest(asked, ("front",), 30.0, 60.0)
    latency, errors, cpu = await gather([source], request, 1.0)
    assert latency.frame.ids == (SeriesId.of("latency", {"service": "front"}),)
    assert latency.frame.times.tolist() == [30.0, 60.0]
    assert latency.frame.values.tolist() == [[2.0, 3.0]]
    assert errors.missing == "timeout after 15 s"
    assert cpu.missing == "not in the recording"


def public_cases() -> list[Path]:
    return sorted(path.parent for path in PUBLIC.glob("*/*/alert.json")) if PUBLIC.is_dir() else []


SETS = sorted({case.parent.name for case in public_cases()})


@pytest.mark.skipif(not SETS, reason="the public recordings are not on this machine")
@pytest.mark.parametrize("every", [6, pytest.param(1, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", SETS)
def test_every_public_recording_is_read(name: str, every: int) -> None:
    for case in [c for c in public_cases() if c.parent.name == name][::every]:
        read = read_recording(case)
        assert read.entry
        assert read.topology.edges
        grid = read.evidence[0].frame.times
        assert (grid < read.onset).any(), case
        assert (grid >= read.onset).any(), case
        assert all(e.missing is None and e.frame.ids for e in read.evidence), case
        with gzip.open(case / "series.csv.gz", "rt", newline="") as file:
            columns = next(csv.reader(file))[1:]
        assert sorted(str(i) for e in read.evidence for i in e.frame.ids) == sorted(map(in_label_order, columns)), case


def in_label_order(name: str) -> str:
    """These names have plain label values: no comma, no quote in them."""
    metric, _, labels = name.rstrip("}").partition("{")
    return f"{metric}{{{','.join(sorted(labels.split(',')))}}}"


@pytest.mark.parametrize("name", ["sockshop", "trainticket"])
def test_a_public_recording_survives_writing(name: str, tmp_path: Path) -> None:
    cases = [case for case in public_cases() if case.parent.name == name]
    if not cases:
        pytest.skip("the public recordings are not on this machine")
    read = read_recording(cases[0])
    write_recording(tmp_path / "r", read)
    assert plain(read_recording(tmp_path / "r")) == plain(read)


def test_spans_and_log_lines_survive_writing(tmp_path: Path) -> None:
    """A whole traced incident, to the last bit, and so its diagnosis."""
    read = read_recording(ROOT / "rules" / "golden" / "trainticket-exception")
    assert read.spans is not None
    assert read.logs is not None
    write_recording(tmp_path / "r", read)
    again = read_recording(tmp_path / "r")
    assert plain(again) == plain(read)
    assert diagnose(again, load_packs()) == diagnose(read, load_packs())
    write_recording(tmp_path / "s", again)
    for name in ("traces.jsonl.gz", "logs.jsonl.gz"):
        assert (tmp_path / "r" / name).read_bytes() == (tmp_path / "s" / name).read_bytes()


@settings(max_examples=60, deadline=None)
@given(
    parents=st.lists(st.integers(-1, 9), min_size=1, max_size=10),
    seconds=st.lists(st.floats(0, 1e6), min_size=10, max_size=10),
    lines=st.lists(st.tuples(st.integers(-1, 9), TEXT, st.booleans()), max_size=5),
)
def test_any_spans_survive_writing(
    parents: list[int], seconds: list[float], lines: list[tuple[int, str, bool]]
) -> None:
    """Whatever their parents are (one that is not there, itself, a circle), and whatever a line says."""
    n = len(parents)
    whole = np.arange(n, dtype=np.intp)
    spans = Spans(
        services=tuple(f"s{i}" for i in range(n)),
        operations=("o",),
        service=whole,
        operation=np.zeros(n, dtype=np.intp),
        parent=np.asarray([p if p < n else -1 for p in parents], dtype=np.intp),
        start=np.asarray(seconds[:n]),
        duration=np.asarray([s * 1000 / 1000.0 / 1000.0 for s in seconds[:n]]),
    )
    texts = tuple(dict.fromkeys(text for _, text, _ in lines))
    logs = Logs(
        services=("s",) if lines else (),
        templates=texts,
        service=np.zeros(len(lines), dtype=np.intp),
        template=np.asarray([texts.index(text) for _, text, _ in lines], dtype=np.intp),
        span=np.asarray([row if row < n else -1 for row, _, _ in lines], dtype=np.intp),
        time=np.asarray([float(i) for i in range(len(lines))]),
        error=np.asarray([error for _, _, error in lines], dtype=np.bool_),
    )
    directory = Path(tempfile.mkdtemp(prefix="recording-"))
    try:
        situation = replace(small(), spans=spans, logs=logs)
        write_recording(directory, situation)
        read = read_recording(directory)
        assert read.spans is not None
        circles = spans.parent >= 0
        assert ((read.spans.parent == spans.parent) | circles).all()
        np.testing.assert_allclose(read.spans.duration, spans.duration, rtol=1e-15)
        kept, given_ = plain(read), plain(situation)
        assert kept["logs"] == given_["logs"]
    finally:
        shutil.rmtree(directory)


def test_spans_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    read = read_recording(ROOT / "rules" / "golden" / "trainticket-exception")
    assert read.spans is not None
    odd = replace(read.spans, start=np.full_like(read.spans.start, math.nan))
    with pytest.raises(ValueError, match="not finite"):
        write_recording(tmp_path / "r", replace(read, spans=odd))
    assert not (tmp_path / "r" / "alert.json").exists()
