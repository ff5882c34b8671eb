"""One OpenTelemetry trace an incident, across restarts.

Built by `agent.app`, used through `agent.telemetry`. An incident outlives processes and a span lives in one, so ids
are derived: the trace id is that of the incoming `traceparent`, or a digest of the incident's id, and so is the root
span's id. Children name that root from the first second on, before and after a restart; the root
itself is written when the incident ends. The SDK costs 1.3 MB and 15 ms on top of what the service imports anyway
(CPython 3.11), the OTLP exporter 3 MB and 30 ms, so both are imported late.

A collector that is slow or dead blocks nobody: spans go to a bounded queue with a thread of its own, the oldest are
dropped when it is full, and closing waits for a stated time only.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import threading
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased
from opentelemetry.trace import NonRecordingSpan, SpanContext, Status, StatusCode, TraceFlags

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?\Z")
_forced: ContextVar[tuple[int, int] | None] = ContextVar("alertmedic_forced_span_ids", default=None)


class TracingError(RuntimeError):
    """An endpoint is configured, and the package that speaks OTLP is not installed."""


def parse_traceparent(text: str) -> SpanContext | None:
    """The remote span of a W3C `traceparent` header (level 1), or None for anything malformed: a bad header starts a
    trace of our own and is no fault of the alert."""
    match = _TRACEPARENT.match(text)
    if match is None or match[1] == "ff" or (match[1] == "00" and match[5]):
        return None
    found = SpanContext(
        int(match[2], 16), int(match[3], 16), is_remote=True, trace_flags=TraceFlags(int(match[4], 16) & 1)
    )
    return found if found.is_valid else None


def format_traceparent(context: SpanContext) -> str:
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


class _Ids(RandomIdGenerator):
    """Random ids, unless the span being started has derived ones."""

    def generate_trace_id(self) -> int:
        forced = _forced.get()
        return forced[0] if forced else super().generate_trace_id()

    def generate_span_id(self) -> int:
        forced = _forced.get()
        return forced[1] if forced else super().generate_span_id()


class Tracing:
    """`exporter` None: spans are made (their ids go into logs and to started processes) and sent nowhere."""

    def __init__(self, version: str, exporter: SpanExporter | None = None, *, max_spans: int = 2048) -> None:
        # Not Resource.create: that loads detectors by entry point, and reads the host.
        resource = Resource({"service.name": "alertmedic", "service.version": version})
        self._provider = TracerProvider(
            sampler=ParentBased(ALWAYS_ON), resource=resource, id_generator=_Ids(), shutdown_on_exit=False
        )
        self._processor: SpanProcessor | None = None
        if exporter is not None:
            batch = min(512, max_spans)
            self._processor = BatchSpanProcessor(
                exporter, max_queue_size=max_spans, max_export_batch_size=batch, schedule_delay_millis=1000
            )
            self._provider.add_span_processor(self._processor)
        self._tracer = self._provider.get_tracer("alertmedic", version)

    @contextlib.contextmanager
    def span(
        self, name: str, incident: str, traceparent: str = "", attributes: Mapping[str, str | int | float] | None = None
    ) -> Iterator[str]:
        """A span around the block: child of the span that is open in this task, else of the incident's root. Gives its
        own traceparent. An exception ends it with an error status and goes on."""
        parent = trace.get_current_span().get_span_context()
        root = self._root(incident, traceparent)
        if not parent.is_valid or parent.trace_id != root.trace_id:
            parent = root
        context = trace.set_span_in_context(NonRecordingSpan(parent))
        named = {"incident.id": incident, **(attributes or {})}
        with self._tracer.start_as_current_span(name, context, attributes=named) as s:
            yield format_traceparent(s.get_span_context())

    def incident_ended(
        self,
        incident: str,
        traceparent: str,
        *,
        opened_at: float,
        ended_at: float,
        attributes: Mapping[str, str | int | float],
        ok: bool,
    ) -> None:
        """Writes the root span. Times are unix seconds. An incident that reopens has one root an ending, of one id."""
        root = self._root(incident, traceparent)
        remote = parse_traceparent(traceparent)
        token = _forced.set((root.trace_id, root.span_id))
        try:
            parent = trace.set_span_in_context(NonRecordingSpan(remote) if remote else trace.INVALID_SPAN)
            span = self._tracer.start_span(
                "incident", parent, attributes={"incident.id": incident, **attributes}, start_time=int(opened_at * 1e9)
            )
        finally:
            _forced.reset(token)
        span.set_status(Status(StatusCode.OK if ok else StatusCode.ERROR))
        span.end(int(ended_at * 1e9))

    def traceparent_for(self, incident: str, traceparent: str = "") -> str:
        """What to hand to a process started for the incident: the open span's traceparent, else the root's."""
        root = self._root(incident, traceparent)
        now = trace.get_current_span().get_span_context()
        return format_traceparent(now if now.is_valid and now.trace_id == root.trace_id else root)

    def close(self, deadline_seconds: float) -> None:
        """Sends what waits, for at most about `deadline_seconds`; the rest is lost. Blocks: call it off the loop."""
        # A thread of its own, since an exporter in the middle of a request heeds no deadline of ours.
        closing = threading.Thread(target=self._provider.shutdown, name="tracing-close", daemon=True)
        closing.start()
        closing.join(deadline_seconds)

    def _root(self, incident: str, traceparent: str) -> SpanContext:
        remote = parse_traceparent(traceparent)
        digest = hashlib.blake2b(incident.encode(), digest_size=24, person=b"alertmedic-trace").digest()
        trace_id = remote.trace_id if remote else int.from_bytes(digest[:16], "big") or 1
        flags = remote.trace_flags if remote else TraceFlags(TraceFlags.SAMPLED)
        return SpanContext(trace_id, int.from_bytes(digest[16:], "big") or 1, is_remote=False, trace_flags=flags)


def otlp_exporter(endpoint: str, timeout_seconds: float) -> SpanExporter:
    """The OTLP/HTTP exporter for a collector's base URL. Raises TracingError when the extra is not installed."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise TracingError(
            "tracing: otlp.endpoint is set, and the exporter is not installed: pip install 'alertmedic[otlp]'"
        ) from error
    url = endpoint.rstrip("/")
    exporter: Any = OTLPSpanExporter(
        endpoint=url if url.endswith("/v1/traces") else f"{url}/v1/traces", timeout=timeout_seconds
    )
    result: SpanExporter = exporter
    return result
