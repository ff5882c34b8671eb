"""The shapes of diagnosis: alerts, series, evidence, hypotheses, proposals.

Everybody speaks these: `agent.sources` fills `Evidence`, `rules` turns a `Situation` into a `Diagnosis`, `agent`
journals the `Diagnosis`, `actions` gets a `Proposal` as plain data. Nothing here reads a clock, a file or the network.

The shape of evidence is that of a recorded incident: a wide table whose columns are series named in Prometheus notation
(`latency_p95_seconds{service="orders"}`), whose rows before the onset are the normal window and from the onset on the
abnormal one; a call graph; and facts that have no time axis. A live incident and a recording are the same thing.

Times are unix seconds (float), durations are seconds, ratios are fractions, `NaN` is "no sample".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.intp]
BoolArray = NDArray[np.bool_]

AlertStatus = Literal["firing", "resolved"]


class Alert(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One alert as Alertmanager told it. `(tenant, fingerprint)` names it; `digest` names its exact state."""

    tenant: str
    fingerprint: str
    status: AlertStatus
    labels: dict[str, str]
    annotations: dict[str, str] = {}
    starts_at: float
    ends_at: float | None = None  # None while firing
    generator_url: str = ""
    digest: str  # of status, startsAt, endsAt, labels and annotations, as sent

    @property
    def name(self) -> str:
        return self.labels.get("alertname", "")


@dataclass(frozen=True, slots=True)
class SeriesId:
    """A series' name: canonical metric and sorted labels. Hashable; `str()` is Prometheus notation."""

    metric: str
    labels: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, metric: str, labels: Mapping[str, str] | None = None) -> SeriesId:
        return cls(metric, tuple(sorted((labels or {}).items())))

    def label(self, name: str, default: str = "") -> str:
        for key, value in self.labels:
            if key == name:
                return value
        return default

    @property
    def service(self) -> str:
        return self.label("service")

    def __str__(self) -> str:
        if not self.labels:
            return self.metric
        inner = ",".join(f'{key}="{_escaped(value)}"' for key, value in self.labels)
        return f"{self.metric}{{{inner}}}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """Series aligned on one grid. `times`: (n,) ascending unix seconds; `values`: (len(ids), n), NaN for gaps."""

    times: FloatArray
    ids: tuple[SeriesId, ...]
    values: FloatArray

    def __post_init__(self) -> None:
        if self.values.shape != (len(self.ids), self.times.shape[0]):
            raise ValueError(
                f"frame: values have shape {self.values.shape}, expected ({len(self.ids)}, {self.times.shape[0]})"
            )

    @classmethod
    def empty(cls) -> Frame:
        return cls(np.empty(0), (), np.empty((0, 0)))


@dataclass(frozen=True, slots=True, eq=False)
class Spans:
    """Spans as columns, one row a span, in no particular order. `service` and `operation` index the names; `parent` is
    the row of the parent span, -1 for a root or a parent that was not seen. `start` in unix seconds, `duration` in
    seconds."""

    services: tuple[str, ...]
    operations: tuple[str, ...]
    service: IntArray
    operation: IntArray
    parent: IntArray
    start: FloatArray
    duration: FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class Logs:
    """Log lines as columns. A line is kept as its template, the constant part of its message. `span` is the row of the
    span that wrote it, -1 if unknown; `error` says whether its severity is error or worse."""

    services: tuple[str, ...]
    templates: tuple[str, ...]
    service: IntArray
    template: IntArray
    span: IntArray
    time: FloatArray
    error: BoolArray


@dataclass(frozen=True, slots=True)
class Fact:
    """Something seen that is no series: a process and what it uses, a database session, a change.

    `kind` is a dotted noun (`host.process`, `postgres.session`); `subject` is a stable identity within the kind
    (`pid=12,start=1700000000.12`); `service` is the service it belongs to, "" if none is known.
    """

    kind: str
    subject: str
    service: str = ""
    attributes: Mapping[str, str | float | bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """What one query (or one look at the host) brought, or why it brought nothing.

    `name` is the canonical signal (`http_error_ratio`, `host.processes`); every series of `frame` has it as its metric.
    `missing` is a reason ("timeout after 15 s", "connection refused") and then `frame` is empty; an empty frame without
    `missing` means that the query worked and there are no such series, which is information too. `partial` says what
    was left out of a frame that is there ("5000 of 100000 series").
    """

    name: str
    source: str  # prometheus | host | recorded | ...
    frame: Frame = field(default_factory=Frame.empty)
    facts: tuple[Fact, ...] = ()
    missing: str | None = None
    warnings: tuple[str, ...] = ()
    query: str = ""
    seconds: float = 0.0
    partial: str = ""


@dataclass(frozen=True, slots=True)
class Topology:
    """Who calls or depends on whom: `edges` are (caller, callee). `kinds` says what a node is where that is known
    (`http`, `worker`, `postgres`, `host`, `external`)."""

    edges: tuple[tuple[str, str], ...] = ()
    kinds: Mapping[str, str] = field(default_factory=dict)

    def callees(self, service: str) -> tuple[str, ...]:
        return tuple(sorted({b for a, b in self.edges if a == service}))

    def callers(self, service: str) -> tuple[str, ...]:
        return tuple(sorted({a for a, b in self.edges if b == service}))

    def services(self) -> tuple[str, ...]:
        return tuple(sorted({s for edge in self.edges for s in edge} | set(self.kinds)))

    def paths_from(self, service: str) -> dict[str, tuple[str, ...]]:
        """Shortest candidate path (alerting service first) to everything reachable from `service`, breadth first."""
        paths: dict[str, tuple[str, ...]] = {service: (service,)}
        frontier = [service]
        while frontier:
            reached: list[str] = []
            for at in frontier:
                for callee in self.callees(at):
                    if callee not in paths:
                        paths[callee] = (*paths[at], callee)
                        reached.append(callee)
            frontier = reached
        return paths


@dataclass(frozen=True, slots=True, eq=False)
class History:
    """What was seen `offset` seconds before (a day, a week): the evidence of the same windows, at the times of then."""

    offset: float
    evidence: tuple[Evidence, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Situation:
    """All that a diagnosis may look at, frozen. Normal is `time < onset`, abnormal is `time >= onset`.

    `quiet` are windows (start, end), in the normal part or in the times of `history`, during which an earlier incident
    was open: they are no baseline. `configured` names what the operator has set up and some proposals need; where
    nobody says (a recording), none is.
    """

    alerts: tuple[Alert, ...]
    entry: str  # the service where the trouble was seen, "" if the alert does not say
    onset: float
    until: float
    evidence: tuple[Evidence, ...] = ()
    topology: Topology = field(default_factory=Topology)
    quiet: tuple[tuple[float, float], ...] = ()
    spans: Spans | None = None
    logs: Logs | None = None
    history: tuple[History, ...] = ()
    configured: frozenset[str] = frozenset()

    def facts(self, kind: str) -> tuple[Fact, ...]:
        return tuple(f for e in self.evidence for f in e.facts if f.kind == kind)

    def missing(self) -> dict[str, str]:
        """What did not arrive, or not all of it: name -> reason."""
        partial = {e.name: e.partial for e in self.evidence if e.partial}
        return partial | {e.name: e.missing for e in self.evidence if e.missing is not None}


ParamValue = str | int | float | bool


class Proposal(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An action by name with plain parameters: the only thing diagnosis may say to remediation.

    `service` is the diagnosed cause (the one thing the action may touch). `targets` are identities that diagnosis saw
    (subjects of facts); the guard checks them again, and the action once more when it runs.
    """

    action: str
    service: str
    params: dict[str, ParamValue] = {}
    reason: str = ""
    runbook: str = ""
    autonomy_cap: Literal["observe", "suggest", "approve", "auto"] = "auto"


class Contribution(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one evidence group says about one hypothesis. `log_odds` > 0 speaks for it, < 0 against (natural log)."""

    evidence: str  # evidence group
    state: str  # the bin it fell into: strong | weak | absent | missing | ...
    log_odds: float
    text: str
    series: tuple[str, ...] = ()  # the series it rests on, in Prometheus notation


class Hypothesis(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A ranked root-cause candidate: (service, fault) explained. `posterior` sums to at most 1 over all candidates
    (the rest belongs to "something we have no name for")."""

    cause: str  # cause id in a pack, `postgres.blocking_session`
    service: str
    fault: str  # fault type: cpu, memory, lock, crash, ... (the recording format's vocabulary where it has a word)
    title: str
    posterior: float
    confidence: float  # rules and Bayes combined, 0..1
    path: tuple[str, ...] = ()  # from the alerting service to the cause
    rules: tuple[str, ...] = ()  # rules that fired for it
    contributions: tuple[Contribution, ...] = ()
    proposals: tuple[Proposal, ...] = ()
    sentence: str = ""
    no_remedy: str = ""  # why nothing is proposed, where the pack says so
    runbook: str = ""  # of the cause, or else of the alert


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The answer. `verdict` is `insufficient_evidence` when "something we have no name for" is at least as likely as
    all candidates together; the hypotheses are then what was considered. `clear` says whether the first hypothesis
    stands clear of all others: only then anything is proposed."""

    verdict: Literal["ranked", "insufficient_evidence"]
    hypotheses: tuple[Hypothesis, ...] = ()  # best first; three unless more were asked for
    candidates: int = 0  # how many were weighed
    missing: dict[str, str] = {}  # evidence that did not arrive: name -> reason
    sentence: str = ""
    version: str = ""  # of packs and model
    clear: bool = True
    owner: str = ""  # Kubernetes object above what the alert is about (`deployment/shop/cart`, see `rules.owners`)
    changes: tuple[str, ...] = ()  # what was changed shortly before, in words, newest first

    @property
    def best(self) -> Hypothesis | None:
        """The first hypothesis, if it stands clear."""
        return self.hypotheses[0] if self.verdict == "ranked" and self.clear and self.hypotheses else None

    @property
    def margin(self) -> float:
        """Posterior of the first minus that of the most likely other hypothesis (0 when there is none)."""
        if not self.hypotheses:
            return 0.0
        return self.hypotheses[0].posterior - max((h.posterior for h in self.hypotheses[1:]), default=0.0)


def merge_frames(frames: Iterable[Frame]) -> Frame:
    """Several frames on one grid (the union of their times); the first frame wins where a series comes twice."""
    kept = [f for f in frames if f.ids]
    if not kept:
        return Frame.empty()
    times = np.unique(np.concatenate([f.times for f in kept]))
    rows: dict[SeriesId, FloatArray] = {}
    for frame in kept:
        at = np.searchsorted(times, frame.times)
        for i, series in enumerate(frame.ids):
            if series not in rows:
                row = np.full(times.shape[0], math.nan)
                row[at] = frame.values[i]
                rows[series] = row
    return Frame(times, tuple(rows), np.vstack(list(rows.values())))


def as_params(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, ParamValue]:
    """The named values that are plain (string, number, boolean); others are left out: a gate sees them absent."""
    return {n: values[n] for n in names if isinstance(values.get(n), (str, int, float, bool))}
