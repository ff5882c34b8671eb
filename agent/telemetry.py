"""What the agent says of itself: metrics, and through `agent.tracing` the spans of its stages.

One `Telemetry` is built by `agent.app` and passed to whoever has something to count; `agent.http` serves `render()`.
There are no globals, so two agents in one process do not mix. Every label has a bounded set of values: what comes
from outside (tenants, sources) is counted under `other` beyond a bound. It never decides anything, never blocks on a
collector, and never carries the text of a label or an alert.

Metric names, types and meanings: docs/metrics.md, compared by a test. Units are base units (seconds, bytes, ratios).
"""

from __future__ import annotations

import contextlib
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector

from actions.model import BreakerState, Refusal
from sandbox.model import EnforcedBy, RunResult

if TYPE_CHECKING:
    from agent.tracing import Tracing

Stage = Literal["intake", "journal_append", "evidence", "diagnosis", "plan", "step_run", "verification"]

MAX_TENANTS = 50
MAX_SOURCES = 20
OTHER = "other"

_FAST = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_NETWORK = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 7.5, 10, 15, 20, 30)
_DIAGNOSIS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5)
_RUN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60)
_LONG = (1, 2.5, 5, 10, 15, 30, 60, 120, 300, 600, 1200, 1800, 3600)
_STAGES: dict[Stage, tuple[str, tuple[float, ...]]] = {
    "intake": ("One webhook request, from its first byte to the durable answer.", _FAST),
    "journal_append": ("One append, waiting for its fdatasync.", _FAST),
    "evidence": ("Gathering the evidence of one look, all sources.", _NETWORK),
    "diagnosis": ("Ranking the hypotheses of one look.", _DIAGNOSIS),
    "plan": ("Turning a proposal into a plan, target look-up included.", _RUN),
    "step_run": ("One sandboxed run of a step.", _RUN),
    "verification": ("From the end of the last step to the verdict of the series.", _LONG),
}


class Telemetry:
    """Counts and times. All methods are cheap and may be called from the event loop; none raises for a value it has not
    met (the label becomes `other`). `tracing` None: stages are timed, and make no spans."""

    def __init__(self, version: str, tracing: Tracing | None = None) -> None:
        # A series more for each counter, which nobody asks for.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.tracing = tracing
        self.registry = CollectorRegistry(auto_describe=True)
        self._samplers: list[Callable[[], None]] = []
        self._tenants: set[str] = set()
        self._sources: set[str] = set()
        self._outcome_counts()
        self._intake_counts()
        self._states()
        self._stages = {
            stage: Histogram(f"alertmedic_{stage}_duration_seconds", text, buckets=buckets, registry=self.registry)
            for stage, (text, buckets) in _STAGES.items()
        }
        info = self._gauge("build_info", "Always 1; what is running.", ("version", "python"))
        info.labels(version, platform.python_version()).set(1)
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"alertmedic_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(f"alertmedic_{name}", text, labels, registry=self.registry)

    def _intake_counts(self) -> None:
        self._requests = self._counter("webhook_requests_total", "Webhook requests by HTTP status code.", ("code",))
        self._alerts = self._counter("alerts_total", "Alerts by what became of them.", ("result",))
        for result in ("accepted", "duplicate", "quarantined"):
            self._alerts.labels(result)
        self._evidence = self._counter("evidence_total", "Answers of evidence sources.", ("source", "result"))

    def _outcome_counts(self) -> None:
        self._opened = self._counter("incidents_opened_total", "Incidents that were opened.")
        self._hypotheses = self._counter(
            "hypotheses_total",
            "Hypotheses generated, and of these the ones that led to a successful action.",
            ("result",),
        )
        self._healings = self._counter(
            "healings_total", "Remediations started, and of these the ones that recovered or failed.", ("result",)
        )
        self._hit_ratio = self._gauge(
            "hypothesis_hit_ratio", "Hypotheses that led to a successful action / generated, since the start."
        )
        self._healing_ratio = self._gauge("healing_success_ratio", "Recovered / started, since the start.")
        self._generated = self._successful = self._started = self._recovered = 0
        for name in ("generated", "successful"):
            self._hypotheses.labels(name)
        for name in ("started", "recovered", "failed"):
            self._healings.labels(name)
        self._set_ratios()
        self._refusals = self._counter("refusals_total", "Why nothing was done.", ("reason",))
        for reason in Refusal:
            self._refusals.labels(reason.value)
        self._gateway = self._counter(
            "gateway_evaluations_total", "Comparisons of diagnosis channels by the other channel's answer.", ("b",)
        )
        self._gateway_differences = self._counter(
            "gateway_differences_total", "Comparisons in which both channels answered, and differed."
        )
        self._runs = self._counter("sandbox_runs_total", "Sandboxed runs.", ("enforced_by", "outcome"))

    def _states(self) -> None:
        self._incidents = self._gauge("incidents", "Incidents by state.", ("state",))
        self._waiting = self._gauge("queue_waiting", "Incidents that await investigation.", ("tenant",))
        self._watermark = self._gauge("queue_watermark", "The longest that one tenant's queue has been.")
        self._breakers = self._gauge("breakers", "Circuit breakers by state.", ("state",))
        for state in BreakerState:
            self._breakers.labels(state.value)
        self._paused = self._gauge("paused", "1 while all actions are paused.")
        self._sandbox = self._gauge(
            "sandbox_enforced_by", "1 for what holds processes in their limits.", ("enforced_by",)
        )
        self._lag = self._gauge("journal_lag_bytes", "Bytes given to the journal and not yet durable.")
        self._bytes = self._gauge("journal_size_bytes", "Bytes of the journal's segments on disk.")
        self._segments = self._gauge("journal_segments", "Segments of the journal on disk.")
        self._fsync = self._gauge("journal_last_fsync_seconds", "How long the journal's last fdatasync took.")
        self._behind = self._gauge("fold_behind_records", "Durable records that are not yet part of an incident.")
        self._behind_for = self._gauge("fold_behind_seconds", "For how long the oldest of them has been durable.")

    # -- intake ---------------------------------------------------------------------------------------------------

    def webhook_request(self, code: int) -> None:
        self._requests.labels(str(code) if 100 <= code <= 599 else OTHER).inc()

    def alerts(self, *, accepted: int = 0, duplicates: int = 0, quarantined: int = 0) -> None:
        for result, count in (("accepted", accepted), ("duplicate", duplicates), ("quarantined", quarantined)):
            self._alerts.labels(result).inc(count)

    # -- stages ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def stage(self, stage: Stage, incident: str = "", traceparent: str = "") -> Iterator[str]:
        """Times the block, and makes it a child span of the incident's trace when there is an incident. Gives the
        traceparent of that span ("" without tracing), to be handed to whatever the block starts. `traceparent` is the
        incident's, as it came in."""
        begin = time.perf_counter()
        try:
            if self.tracing is None or not incident:
                yield ""
            else:
                with self.tracing.span(stage, incident, traceparent) as child:
                    yield child
        finally:
            self.observe(stage, time.perf_counter() - begin)

    def observe(self, stage: Stage, seconds: float) -> None:
        """A stage that the caller timed itself."""
        self._stages[stage].observe(seconds)

    # -- outcomes -------------------------------------------------------------------------------------------------

    def incident_opened(self) -> None:
        self._opened.inc()

    def hypotheses_generated(self, count: int) -> None:
        self._generated += count
        self._hypotheses.labels("generated").inc(count)
        self._set_ratios()

    def hypothesis_successful(self) -> None:
        """A hypothesis led to an action after which the series were back in bounds."""
        self._successful += 1
        self._hypotheses.labels("successful").inc()
        self._set_ratios()

    def healing_started(self) -> None:
        self._started += 1
        self._healings.labels("started").inc()
        self._set_ratios()

    def healing_ended(self, *, recovered: bool) -> None:
        self._recovered += recovered
        self._healings.labels("recovered" if recovered else "failed").inc()
        self._set_ratios()

    def _set_ratios(self) -> None:
        self._hit_ratio.set(self._successful / self._generated if self._generated else math.nan)
        self._healing_ratio.set(self._recovered / self._started if self._started else math.nan)

    def refused(self, reason: Refusal) -> None:
        self._refusals.labels(reason.value).inc()

    def sandbox_run(self, result: RunResult) -> None:
        outcome = "failed"
        if result.ok:
            outcome = "ok"
        elif result.error:
            outcome = "not_started"
        elif result.oom_killed:
            outcome = "oom"
        elif result.timed_out:
            outcome = "timeout"
        self._runs.labels(result.enforced_by.value, outcome).inc()

    def gateway_evaluation(self, b: str, *, differs: bool) -> None:
        self._gateway.labels(b).inc()
        if differs:
            self._gateway_differences.inc()

    def evidence(self, source: str, *, missing: bool) -> None:
        self._evidence.labels(_bounded(source, self._sources, MAX_SOURCES), "missing" if missing else "present").inc()

    # -- states ---------------------------------------------------------------------------------------------------

    def on_scrape(self, sampler: Callable[[], None]) -> None:
        """`sampler` is called before each `render`, to set the states below from their owners."""
        self._samplers.append(sampler)

    def set_incidents(self, by_state: Mapping[str, int]) -> None:
        """`by_state` names every state of the incident table; states that had incidents before fall to 0."""
        _set_all(self._incidents, by_state)

    def set_queue(self, waiting: Mapping[str, int], watermark: int) -> None:
        """`waiting` by tenant: the first MAX_TENANTS tenants seen have a label value each, the rest are summed."""
        bounded: dict[str, int] = {}
        for tenant in sorted(waiting):
            name = _bounded(tenant, self._tenants, MAX_TENANTS)
            bounded[name] = bounded.get(name, 0) + waiting[tenant]
        _set_all(self._waiting, bounded)
        self._watermark.set(watermark)

    def set_breakers(self, by_state: Mapping[BreakerState, int]) -> None:
        _set_all(self._breakers, {state.value: by_state.get(state, 0) for state in BreakerState})

    def set_paused(self, paused: bool) -> None:
        self._paused.set(paused)

    def set_sandbox(self, enforced_by: EnforcedBy) -> None:
        _set_all(self._sandbox, {e.value: int(e is enforced_by) for e in EnforcedBy})

    def set_fold(self, records: int, seconds: float) -> None:
        self._behind.set(records)
        self._behind_for.set(seconds)

    def set_journal(self, *, lag_bytes: int, size_bytes: int, segments: int, last_fsync_seconds: float) -> None:
        self._lag.set(lag_bytes)
        self._bytes.set(size_bytes)
        self._segments.set(segments)
        self._fsync.set(last_fsync_seconds)

    def render(self) -> tuple[bytes, str]:
        """The exposition and its content type (Prometheus text format)."""
        for sampler in self._samplers:
            sampler()
        return generate_latest(self.registry), CONTENT_TYPE_LATEST


def _bounded(value: str, seen: set[str], bound: int) -> str:
    if value in seen:
        return value
    if len(seen) >= bound:
        return OTHER
    seen.add(value)
    return value


def _set_all(gauge: Gauge, values: Mapping[str, int]) -> None:
    """Sets the gauge for exactly these label values: a value that is gone must not keep its last number."""
    gauge.clear()
    for name, value in values.items():
        gauge.labels(name).set(value)
