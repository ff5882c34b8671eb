"""What the evidence says about one node, group by group: strong, weak, absent, contrary, silent, or nothing.

Called by `rules.diagnose` for every candidate. A group is one decorrelated piece of evidence: the strongest of its
series (or facts) decides it, once, so that ten series of the same trouble do not count ten times. Never ranks anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property, lru_cache

from rules.anyalert import DRILLDOWN
from rules.engine import Fired, Graph, Record, holds
from rules.features import Finding
from rules.model import Fact, Situation
from rules.owners import Owners
from rules.packs import Condition, FactTest, PackSet, Scalar, Signal, State
from rules.subjects import causes_named
from rules.trends import told

SUSPICION_HALVES_SECONDS = 60.0  # a neighbour hurts at once: the earlier it began, the less likely it is the one
RECENCY_HALVES_SECONDS = 600.0  # of changes
CLEAN_CUT = 0.95  # so well does a part fit that nothing is left for the others
RIVAL = 0.6  # of the leading fact's weight
_SEVERITY: dict[State | None, int] = {"strong": 5, "weak": 4, "silent": 3, "contrary": 2, "absent": 1, None: 0}


@dataclass(frozen=True, slots=True)
class Observation:
    """A group's state at a candidate and what it rests on, leading first. State None: nobody can say."""

    state: State | None
    findings: tuple[Finding, ...] = ()
    facts: tuple[Fact, ...] = ()


NOTHING = Observation(None)


@dataclass
class Observer:
    """Looks at one situation; remembers what it was asked."""

    situation: Situation
    packs: PackSet
    findings: Sequence[Finding]
    graph: Graph
    fired: tuple[Fired, ...] | None = None  # what another engine made of the rules; None: ours is asked
    _by_service: dict[tuple[str, str], list[Finding]] = field(default_factory=dict, repr=False)
    _by_peer: dict[tuple[str, str], list[Finding]] = field(default_factory=dict, repr=False)
    _known: dict[tuple[str, str, str], Observation] = field(default_factory=dict, repr=False)
    _processes: dict[str, Record] = field(default_factory=dict, repr=False)
    _arrived: frozenset[str] = field(default=frozenset(), repr=False)

    def __post_init__(self) -> None:
        self._arrived = frozenset(e.name for e in self.situation.evidence if e.missing is None)
        for finding in self.findings:
            self._by_service.setdefault((finding.group, finding.service), []).append(finding)
            if finding.peer:
                self._by_peer.setdefault((finding.group, finding.peer), []).append(finding)

    @cached_property
    def owners(self) -> Owners:
        """Which Kubernetes objects stand above what the situation is about."""
        return Owners(self.situation)

    @cached_property
    def named(self) -> frozenset[str]:
        """The causes that the packs name for the situation's alerts."""
        return causes_named(self.situation, self.packs.alerts)

    def observe(self, service: str, group: str, at: str = "self") -> Observation:
        """The state of `group`, looked at `at` the node `service`."""
        key = (service, group, at)
        if key not in self._known:
            self._known[key] = self._look(service, group, at)
        return self._known[key]

    def symptom(self) -> Observation:
        """Whether anything is wrong at the entry service: bad or silent findings there, of any group. Nothing known of
        its symptom groups: no state."""
        here = [f for f in self.findings if f.service == self.graph.entry]
        bad = [f for f in here if f.state in ("strong", "weak", "silent")]
        if bad:
            return Observation("strong", _leading(bad))
        calm = [f for f in here if f.state is not None and self.packs.groups[f.group].symptom]
        return Observation("absent", tuple(calm)) if calm else NOTHING

    def facts(self) -> list[tuple[Fact, Record]]:
        """Every fact with its attributes, derived ones included."""
        return [(f, self.attributes(f)) for e in self.situation.evidence for f in e.facts]

    def attributes(self, fact: Fact) -> Record:
        """A fact's attributes and what follows from them (see `FactTest`)."""
        if fact.kind != "host.process":
            return {**fact.attributes, "service": fact.service, **self._change(fact)}
        if fact.subject not in self._processes:
            derived: dict[str, Scalar] = {
                "service": fact.service,
                "shares_cpu": self._meets_cpu(fact, pinned=False),
                "takes_pinned_cpu": self._meets_cpu(fact, pinned=True),
                "group_cpu_percent": self._group_cpu(fact),
            }
            start = fact.attributes.get("start")
            if isinstance(start, (int, float)) and not isinstance(start, bool) and math.isfinite(start):
                derived["age_at_onset_seconds"] = age = self.situation.onset - start
                recent = 2.0 ** -min(max(age, 0.0) / SUSPICION_HALVES_SECONDS, 60.0)
                derived["suspicion"] = self._group_cpu(fact) * self._contended(fact) * recent
            self._processes[fact.subject] = {**fact.attributes, **derived}
        return self._processes[fact.subject]

    def _change(self, fact: Fact) -> Record:
        """How long before the onset a change was made, or what a Kubernetes fact tells the age of; nothing of other
        facts, or if it does not say when."""
        old = fact.attributes.get("age_seconds") if fact.kind.startswith("kubernetes.") else None
        if isinstance(old, (int, float)) and not isinstance(old, bool):
            return {"age_at_onset_seconds": old - (self.situation.until - self.situation.onset)}
        when = _moment(fact.attributes.get("time")) if fact.kind.startswith("change.") else None
        if when is None:
            return {}
        age = self.situation.onset - when
        return {"age_at_onset_seconds": age, "recency": 2.0 ** -min(abs(age) / RECENCY_HALVES_SECONDS, 60.0)}

    def rivalled(self, seen: Observation, group: str) -> bool:
        """Whether a fact outside the leading one's process group comes near it by what its group prefers."""
        test = self.packs.groups[group].facts
        if test is None or not test.prefer or len(seen.facts) < 2:
            return False
        first = seen.facts[0]
        bar = RIVAL * _number(self.attributes(first).get(test.prefer))
        return any(
            fact.attributes.get("pgid") != first.attributes.get("pgid")
            and _number(self.attributes(fact).get(test.prefer)) >= bar
            for fact in seen.facts[1:]
        )

    def looked(self, evidence: str) -> bool:
        """Whether that evidence arrived, be it empty."""
        return evidence in self._arrived

    def fact_state(self, fact: Fact, test: FactTest) -> State:
        """Strong, weak or absent, of one fact that `test.where` selects; absent if it does not."""
        attributes = self.attributes(fact)
        if not _all(test.where, attributes):
            return "absent"
        if test.strong is not None and _all(test.strong, attributes):
            return "strong"
        return "weak" if test.weak is not None and _all(test.weak, attributes) else "absent"

    def _look(self, service: str, group: str, at: str) -> Observation:
        if at == "inbound":
            return _strongest(self._by_peer.get((group, service), ()))
        if at == "siblings":
            calls = [f for c in self._nodes(service, "callers") for f in self._by_service.get((group, c), ())]
            return _strongest([f for f in calls if f.peer and f.peer != service])
        nodes = self._nodes(service, at)
        test = self.packs.groups[group].facts
        if test is not None:
            return _worst(self._test(node, test) for node in nodes)
        seen = _strongest([f for node in nodes for f in self._by_service.get((group, node), ())])
        return Observation("absent") if seen is NOTHING and nodes and self._answered_none(group) else seen

    def _answered_none(self, group: str) -> bool:
        """Whether a signal of the group was asked for and answered, and no such series counts as absence."""
        return any(self.looked(name) for name in self.packs.speaks_by_absence.get(group, ()))

    def _nodes(self, service: str, at: str) -> list[str]:
        graph = self.graph
        if at == "self":
            return [service]
        if at == "entry":
            return [graph.entry]
        if at == "callers":
            return sorted(graph.callers.get(service, ()))
        hosts = graph.hosts(service)
        return sorted(hosts if at == "host" else graph.callees.get(service, frozenset()) - hosts)

    def _test(self, node: str, test: FactTest) -> Observation:
        """The strongest matching fact. A source that failed says nothing; a source that saw nothing says so."""
        if test.owner == "host" and node != self.graph.host:
            return NOTHING
        if not self.looked(test.evidence):
            return NOTHING
        found: dict[State, list[tuple[float, Fact]]] = {"strong": [], "weak": [], "absent": []}
        for fact in self.situation.facts(test.kind):
            attributes = self.attributes(fact)
            if (test.owner == "candidate" and fact.service != node) or not _all(test.where, attributes):
                continue
            found[self.fact_state(fact, test)].append((_number(attributes.get(test.prefer)), fact))
        for state, facts in found.items():
            if facts:
                facts.sort(key=lambda pair: (-pair[0], pair[1].subject))
                return Observation(state, facts=tuple(fact for _, fact in facts))
        return Observation("absent") if test.none == "absent" else NOTHING

    def _meets_cpu(self, fact: Fact, pinned: bool) -> bool:
        """Whether the process may run where some service's process may run (true where affinities are unknown), or with
        `pinned`: whether it is confined to CPUs to which a service is confined as well."""
        own = _cpus(fact)
        services = [_cpus(f) for f in self.situation.facts("host.process") if f.service and f.subject != fact.subject]
        if not pinned:
            return not own or not services or any(not cpus or cpus & own for cpus in services)
        every = frozenset().union(*(_cpus(f) for f in self.situation.facts("host.process")))
        return bool(own) and any(own <= cpus and len(cpus) < len(every) for cpus in services)

    def _contended(self, fact: Fact) -> float:
        """The share of the process' CPUs on which the most confined service must run; 1 if affinities are unknown."""
        own = _cpus(fact)
        services = [c for f in self.situation.facts("host.process") if f.service and (c := _cpus(f))]
        if not own or not services:
            return 1.0
        smallest = min(len(cpus) for cpus in services)
        return max(len(own & cpus) for cpus in services if len(cpus) == smallest) / len(own)

    def _group_cpu(self, fact: Fact) -> float:
        """CPU percent of all processes seen in the same process group and of the same service."""
        pgid = fact.attributes.get("pgid")
        if pgid is None:
            return _number(fact.attributes.get("cpu_percent"))
        group = [
            f
            for f in self.situation.facts("host.process")
            if f.attributes.get("pgid") == pgid and f.service == fact.service
        ]
        return math.fsum(_number(f.attributes.get("cpu_percent")) for f in group)


def describe(finding: Finding, signal: Signal) -> str:
    """`95th percentile latency of orders 0.05 s -> 1.9 s`, in plain words."""
    what = f"{signal.title or finding.signal} of {finding.service or 'unknown'}"
    labels = [f"{k} {v}" for k, v in finding.series.labels if k not in ("service", signal.peer)]
    if finding.peer:
        what += f" to {finding.peer}"
    if labels:
        what += f" ({', '.join(labels)})"
    if signal.derive is not None and signal.derive.kind == "trend":
        return told(
            finding, what, quantity(abs(finding.slope) * 60.0, signal.unit), quantity(finding.level, signal.unit)
        )
    if finding.direction == "silent":
        return f"{what} fell silent"
    if finding.direction == "flat":
        usual = "usual at this time" if finding.seasonal else "usual"
        return f"{what} as {usual}, {quantity(finding.level, signal.unit)}"
    if finding.seasonal:
        expected = quantity(finding.baseline, signal.unit)
        return f"{what} {quantity(finding.level, signal.unit)}, where {expected} is usual at this time"
    return f"{what} {quantity(finding.baseline, signal.unit)} -> {quantity(finding.level, signal.unit)}"


def describe_change(fact: Fact, attributes: Record) -> str:
    """`deploy 1.4.2 of orders 7 min before the onset (1.4.1 before)`; `attributes` with those of `Observer`."""
    kind = fact.kind.removeprefix("change.")
    what = kind if fact.subject in ("", kind) else f"{kind} {clean(fact.subject)}"
    age = attributes.get("age_at_onset_seconds")
    when = ""
    if isinstance(age, float):
        far = f"{abs(age) / 60.0:.0f} min" if abs(age) < 7200.0 else f"{abs(age) / 3600.0:.0f} h"
        when = f" {far} {'before' if age >= 0 else 'after'} the onset"
    more = [f"{clean(str(attributes['previous']))} before"] if attributes.get("previous") else []
    more += [clean(str(attributes["text"]), 200)] if attributes.get("text") else []
    of = f" of {clean(fact.service)}" if fact.service else ""
    return f"{what}{of}{when}" + (f" ({', '.join(more)})" if more else "")


def describe_fact(fact: Fact, attributes: Record | None = None) -> str:
    """A process, a listener, a change or any other fact, by its telling attributes."""
    a = fact.attributes
    if fact.kind.startswith("change.") and attributes is not None and "age_at_onset_seconds" in attributes:
        return describe_change(fact, attributes)
    of = f" of {fact.service}" if fact.service else ""
    if fact.kind == "host.process":
        cpu = f", {_number(a.get('cpu_percent')):.0f} % of a CPU" if "cpu_percent" in a else ""
        wait = f", waits {_number(a['cpu_wait_percent']):.0f} % for one" if "cpu_wait_percent" in a else ""
        named = f"process {a.get('pid', '?')} ({clean(str(a.get('name', '?')))}){of}"
        return f"{named} is {a.get('status', 'alive')}{cpu}{wait}"
    if fact.kind == "host.listener":
        return f"{fact.subject}{of} {'is listened on' if a.get('present') else 'has no listener'}"
    if fact.kind == DRILLDOWN:
        return _drilldown_told(fact)
    told = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {clean(str(v))}" for k, v in sorted(a.items()))
    return f"{fact.kind} {clean(fact.subject)}{of}: {told}"


def _drilldown_told(fact: Fact) -> str:
    """`hardware r740: 9 of 24 series, which make up 100 % of the change; the other 15 are as usual`, or that all of
    them changed alike. What the others did is only said where the fit says so."""
    a, what = fact.attributes, clean(fact.subject)
    of = _number(a.get("of"))
    if "series" not in a:
        return f"{what}: {of:.0f} series changed in the same proportion ({_number(a.get('alike')):.0%})"
    series = _number(a.get("series"))
    text = f"{what}: {series:.0f} of {of:.0f} series, which make up {_number(a.get('explains')):.0%} of the change"
    if of > series and _number(a.get("fit")) >= CLEAN_CUT:
        text += f"; the other {of - series:.0f} are as usual"
    return text


def quantity(value: float, unit: str) -> str:
    """A number with its unit, in the precision that a person reads."""
    if value != value:
        return "unknown"
    if unit == "ratio":
        return f"{value * 100:.3g} %"
    if unit == "bytes":
        return f"{value / (1 << 20):.4g} MiB"
    return f"{value:.3g}{ {'s': ' s', 'cores': ' cores', 'per_s': '/s'}.get(unit, '') }"


def clean(text: str, limit: int = 80) -> str:
    """Text from outside, made printable and bounded."""
    printable = "".join(c if c.isprintable() else "?" for c in text[: limit + 1])
    return printable if len(text) <= limit else printable[: limit - 1] + "…"


def _strongest(findings: Iterable[Finding]) -> Observation:
    """The worst state any series is in, with the series in that state."""
    known = list(findings)
    if not known:
        return NOTHING
    state = max((f.state for f in known), key=lambda s: _SEVERITY[s])
    return Observation(state, _leading([f for f in known if f.state == state])) if state is not None else NOTHING


def _leading(findings: list[Finding]) -> tuple[Finding, ...]:
    return tuple(sorted(findings, key=lambda f: (-_SEVERITY[f.state], -f.z, f.series.metric, f.series.labels)))


def _worst(observations: Iterable[Observation]) -> Observation:
    """One group over several nodes: the most severe state, with all that is in it."""
    known = list(observations)
    if not known:
        return NOTHING
    state = max((o.state for o in known), key=lambda s: _SEVERITY[s])
    return Observation(state, facts=tuple(f for o in known if o.state == state for f in o.facts))


def _all(conditions: Mapping[str, Condition], attributes: Record) -> bool:
    return all(holds(condition, attributes.get(name)) for name, condition in conditions.items())


def _number(value: Scalar | None) -> float:
    return float(value) if isinstance(value, (int, float)) and value == value else 0.0


def _moment(value: Scalar | None) -> float | None:
    """Unix seconds of a number or of an ISO 8601 text (UTC, if it names no zone)."""
    if isinstance(value, str):
        try:
            parsed = datetime.fromisoformat(value)
            value = (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()
        except (ValueError, OverflowError):
            return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _cpus(fact: Fact) -> frozenset[int]:
    """Affinity as a set, from `0,2-3`; empty where unknown."""
    return _cpus_in(str(fact.attributes.get("cpus", "")))


@lru_cache(maxsize=64)  # nearly all processes of a host have the same, and each is held against all others
def _cpus_in(text: str) -> frozenset[int]:
    found: set[int] = set()
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if all(number.isdecimal() and len(number) < 8 for number in ((low, high) if dash else (low,))):
            found.update(range(int(low), min(int(high or low), int(low) + 4096) + 1))
    return frozenset(found)
