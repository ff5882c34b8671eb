"""Traces: parentage across stages, restarts and processes; a collector that is dead or slow delays nobody."""

from __future__ import annotations

import asyncio
import socket
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from agent.telemetry import Telemetry
from agent.tracing import Tracing, format_traceparent, otlp_exporter, parse_traceparent

INCOMING = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Kept(InMemorySpanExporter):
    """Keeps what was exported when it is closed, too."""

    def shutdown(self) -> None:
        pass


def exported(tracing: Tracing, kept: Kept) -> dict[str, ReadableSpan]:
    tracing.close(10.0)
    return {span.name: span for span in kept.get_finished_spans()}


def end(tracing: Tracing, traceparent: str = "", *, ok: bool = True) -> None:
    tracing.incident_ended(
        "inc-a", traceparent, opened_at=100.0, ended_at=160.5, attributes={"incident.state": "resolved"}, ok=ok
    )


def test_stages_are_children_of_the_incident_which_continues_the_incoming_trace() -> None:
    kept = Kept()
    tracing = Tracing("1", kept)
    telemetry = Telemetry("1", tracing)
    with telemetry.stage("evidence", "inc-a", INCOMING):
        pass
    with telemetry.stage("step_run", "inc-a", INCOMING) as handed_on:
        assert tracing.traceparent_for("inc-a", INCOMING) == handed_on
    end(tracing, INCOMING)
    spans = exported(tracing, kept)
    root, evidence, run = spans["incident"], spans["evidence"], spans["step_run"]
    assert root.parent is not None
    assert format_traceparent(root.parent) == INCOMING
    assert f"{root.context.trace_id:032x}" == INCOMING.split("-")[1]
    for child in (evidence, run):
        assert child.parent is not None
        assert (child.parent.trace_id, child.parent.span_id) == (root.context.trace_id, root.context.span_id)
        assert child.attributes is not None
        assert child.attributes["incident.id"] == "inc-a"
    assert handed_on == format_traceparent(run.context)
    assert (root.start_time, root.end_time) == (100_000_000_000, 160_500_000_000)
    assert root.attributes is not None
    assert root.attributes["incident.state"] == "resolved"


def test_without_an_incoming_trace_a_restart_goes_on_in_the_same_one() -> None:
    """Two processes are two Tracing objects: the second knows of the first only the incident's id."""
    first, second = Kept(), Kept()
    before, after = Tracing("1", first), Tracing("1", second)
    with before.span("evidence", "inc-a"):
        pass
    with after.span("verification", "inc-a"):
        pass
    end(after)
    old, new = exported(before, first), exported(after, second)
    root = new["incident"]
    assert root.parent is None
    for child in (old["evidence"], new["verification"]):
        assert child.parent is not None
        assert (child.parent.trace_id, child.parent.span_id) == (root.context.trace_id, root.context.span_id)


def test_nested_spans_and_failed_ones() -> None:
    kept = Kept()
    tracing = Tracing("1", kept)

    def fail() -> None:
        with tracing.span("plan", "inc-a"), tracing.span("step_run", "inc-a"):
            raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        fail()
    with tracing.span("plan", "inc-a"), tracing.span("evidence", "inc-b"):
        pass
    end(tracing, ok=False)
    spans = exported(tracing, kept)
    outer = [s for s in kept.get_finished_spans() if s.name == "plan"]
    inner = spans["step_run"]
    assert inner.parent is not None
    assert inner.parent.span_id == outer[0].context.span_id
    assert not inner.status.is_ok
    assert not spans["incident"].status.is_ok
    other = spans["evidence"]
    assert other.parent is not None
    assert other.parent.trace_id != outer[0].context.trace_id, "another incident's span is no child of this one's"


async def test_tasks_of_two_incidents_do_not_mix() -> None:
    kept = Kept()
    tracing = Tracing("1", kept)
    telemetry = Telemetry("1", tracing)
    entered = asyncio.Barrier(2)

    async def task(incident: str) -> None:
        with telemetry.stage("evidence", incident):
            await entered.wait()
            with telemetry.stage("diagnosis", incident):
                await entered.wait()

    await asyncio.gather(task("inc-a"), task("inc-b"))
    await asyncio.to_thread(tracing.close, 10.0)
    spans = kept.get_finished_spans()
    for incident in ("inc-a", "inc-b"):
        mine = {s.name: s for s in spans if (s.attributes or {}).get("incident.id") == incident}
        inner = mine["diagnosis"].parent
        assert inner is not None
        assert inner.span_id == mine["evidence"].context.span_id


def test_an_unsampled_trace_is_continued_and_not_recorded() -> None:
    kept = Kept()
    tracing = Tracing("1", kept)
    unsampled = INCOMING[:-2] + "00"
    with tracing.span("evidence", "inc-a", unsampled) as handed_on:
        assert handed_on.startswith("00-0af7651916cd43dd8448eb211c80319c-")
        assert handed_on.endswith("-00")
    end(tracing, unsampled)
    assert exported(tracing, kept) == {}


def test_without_an_exporter_ids_are_made_all_the_same() -> None:
    tracing = Tracing("1")
    with tracing.span("evidence", "inc-a", INCOMING) as handed_on:
        assert handed_on.split("-")[1] == INCOMING.split("-")[1]
        assert handed_on.split("-")[2] != INCOMING.split("-")[2]
    end(tracing, INCOMING)
    tracing.close(1.0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
        "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "00-00000000000000000000000000000000-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
        "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\n",
    ],
)
def test_a_malformed_traceparent_starts_a_trace_of_our_own(text: str) -> None:
    assert parse_traceparent(text) is None
    tracing = Tracing("1")
    assert tracing.traceparent_for("inc-a", text) == tracing.traceparent_for("inc-a")


@given(st.text(max_size=80), st.text(max_size=20))
def test_any_text_gives_a_valid_traceparent(text: str, incident: str) -> None:
    made = Tracing("1").traceparent_for(incident, text)
    assert parse_traceparent(made) is not None


def test_a_later_version_of_the_header_is_read() -> None:
    found = parse_traceparent("01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-03-future")
    assert found is not None
    assert int(found.trace_flags) == 1


def test_a_dead_collector_delays_nobody() -> None:
    """The collector accepts connections and never answers: spans go on being made, and closing keeps its deadline."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="extra alertmedic[otlp]")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        tracing = Tracing("1", otlp_exporter(f"http://127.0.0.1:{port}", 5.0), max_spans=16)
        for _ in range(500):  # many more than may wait; any that blocked would not return while the server is silent
            with tracing.span("evidence", "inc-a"):
                pass
        closing = threading.Thread(target=tracing.close, args=(0.2,))
        closing.start()
        closing.join(30.0)
        assert not closing.is_alive()


def test_a_blocked_exporter_leaves_the_queue_bounded() -> None:
    release = threading.Event()
    entered = threading.Event()

    class Blocked(SpanExporter):
        seen = 0

        def export(self, spans: object) -> SpanExportResult:
            entered.set()
            release.wait(30.0)
            Blocked.seen += len(list(spans))  # type: ignore[call-overload]
            return SpanExportResult.SUCCESS

    tracing = Tracing("1", Blocked(), max_spans=16)
    with tracing.span("evidence", "inc-a"):
        pass
    for _ in range(16):
        with tracing.span("evidence", "inc-a"):
            pass
    assert entered.wait(30.0)
    for _ in range(300):
        with tracing.span("evidence", "inc-a"):
            pass
    release.set()
    tracing.close(30.0)
    deadline = time.monotonic() + 30.0
    while Blocked.seen < 17 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert 17 <= Blocked.seen <= 17 + 16 + 16


def test_the_exporter_speaks_to_a_real_http_server() -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="extra alertmedic[otlp]")
    from http.server import BaseHTTPRequestHandler, HTTPServer

    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    received: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        tracing = Tracing("1.2.3", otlp_exporter(f"http://127.0.0.1:{server.server_port}/", 5.0))
        with tracing.span("evidence", "inc-a", INCOMING):
            pass
        end(tracing, INCOMING)
        tracing.close(20.0)
    finally:
        server.shutdown()
        thread.join(30.0)
        server.server_close()
    names: list[str] = []
    for path, body in received:
        assert path == "/v1/traces"
        request = ExportTraceServiceRequest.FromString(body)
        for resource in request.resource_spans:
            named = {a.key: a.value.string_value for a in resource.resource.attributes}
            assert (named["service.name"], named["service.version"]) == ("alertmedic", "1.2.3")
            names += [span.name for scope in resource.scope_spans for span in scope.spans]
    assert sorted(names) == ["evidence", "incident"]
