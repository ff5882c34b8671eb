"""Rule packs as typed data: signals, evidence queries, evidence groups, causes, rules and proposals.

`agent.packs` reads YAML and calls `parse_pack`; `rules.engine`, `rules.bayes` and `rules.diagnose` use the `PackSet`;
`agent.sources` runs `PackSet.queries()`. A pack is checked completely before it is used: every fault is reported, each
with the path of its key. Nothing here reads a file, and no text of a pack is ever evaluated: sentences substitute a
fixed vocabulary, parameters are constants or references to a small set of named things.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import msgspec

from rules.convert import converted, fields_of
from rules.faults import Fault as Fault
from rules.faults import PackError as PackError
from rules.subjects import ENTITIES, SUBJECT, fault_of

SignalKind = Literal["latency", "error_ratio", "rate", "saturation", "level", "count", "up", "age", "flag"]
State = Literal["strong", "weak", "absent", "contrary", "silent"]
At = Literal["self", "callers", "callees", "host", "inbound", "siblings", "entry"]
Scalar = str | bool | int | float
Condition = Scalar | list[Scalar] | dict[Literal[">=", ">", "<=", "<"], float]

DERIVED = "derived"  # source of facts that diagnosis itself makes of other evidence
STATES: tuple[State, ...] = get_args(State)
VOCABULARY = frozenset(
    {"service", "entry", "path", "posterior", "evidence"}  # of the hypothesis
    | {"pid", "process", "cpu_percent", "user", "subject"}  # of the fact that the cause points at
    | {"flag", "peer", "queue", "mountpoint"}  # labels of the series that the cause points at
)
REFERENCE = re.compile(
    r"(candidate\.service|candidate\.entry|fact\.[a-z_]+|label\.[a-zA-Z_][a-zA-Z0-9_]*|alert\.[a-zA-Z_][a-zA-Z0-9_]*"
    r"|owner\.(kind|namespace|name|node))"
)
TABLES = ("alerts", "queries", "signals", "groups", "causes", "rules")  # of a pack, each by id
REACHED = 0.5  # so likely is a cause that is reached along a path, against one that the alert's own metrics name
_OF_ALERT = re.compile(r"\$alert\([^()]*\)")
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_METRIC = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_NAME = re.compile(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)*")


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of everything in a pack: an unknown key is an error."""


class EvidenceQuery(_Strict, frozen=True, kw_only=True):
    """One question to a source. `query` may hold `$service` (label name), `$scope` (a complete matcher over the
    services of the incident), `$alert(...)` (matchers made of the alert's own labels, see `rules.subjects`) and `$rate`
    (a duration); the source replaces them by validated, escaped text. Every series of the answer becomes
    `name{service=...}` with its remaining labels kept."""

    name: str
    query: str
    source: str = "prometheus"


class Derivation(_Strict, frozen=True, kw_only=True):
    """How a signal is computed from others instead of being asked for (see `rules.derived` and `rules.traces`).

    own: what of `of` times `traffic` a service adds itself: its total minus its callees' totals, per request of the
    alerting service. share: a service's part of all that was added, of the own signals `of`. difference: `of` minus
    `minus`, series by series. calls: how often a service calls a callee that nobody else calls, per request.
    per_request: `of` divided by `traffic`. trend: whether the one signal `of` goes on growing, and when it reaches the
    signal's `limit`, or the series `minus` of the same labels (see `rules.trends`). call_gap and the log kinds: from
    spans and logs. Of several names the first that the situation has is used."""

    kind: Literal[
        "own",
        "share",
        "difference",
        "calls",
        "per_request",
        "trend",
        "call_gap",
        "log_break",
        "log_missing",
        "log_error",
        "log_new",
    ]
    of: tuple[str, ...] = ()
    minus: str = ""
    traffic: tuple[str, ...] = ()
    full: float | None = None  # value at which all is well: what counts is how far below it a sample is
    relative: bool = False  # in units of what the alerting service usually has
    enough: float = 0.0  # requests a sample (at usual times) below which a service says nothing: too few to tell


class Signal(_Strict, frozen=True, kw_only=True):
    """What a canonical series means. `floor` is the smallest scale (in the signal's unit) by which a change is
    measured: three floors are a weak change, six a strong one. `limit` is the value at which a saturation is bad in
    itself. `peer` is the label naming the callee when the series describes calls. `silent` is what silence of a series
    that used to speak counts as, provided its service still answers scrapes."""

    kind: SignalKind
    bad: Literal["up", "down", "both", "none"]
    floor: float
    group: str
    title: str = ""
    unit: Literal["", "s", "ratio", "bytes", "cores", "per_s", "timestamp"] = ""
    limit: float | None = None
    peer: str = ""
    growth: bool = False  # a steady rise over the whole window counts, even when the baseline holds part of it
    silent: Literal["missing", "absent", "weak", "strong", "silent"] = "missing"
    implies: str = ""  # node kind of the service that has this signal, where the topology does not say
    # Which node its series describe: "" the service of their label, `subject` what the alert is about, or an entity
    # kind (`pod`, `node`, ...; see `rules.subjects`) that their own labels name.
    node: str = ""
    none: Literal["absent", "missing"] = "missing"  # what an answer without any series counts as
    derive: Derivation | None = None


class FactTest(_Strict, frozen=True, kw_only=True):
    """How facts decide a group's state: the strongest matching fact does. An attribute that a fact lacks is false to an
    equality with `false` and matches nothing else. Derived attributes: `service`; for changes (kinds `change.*`, with
    their `time`) `age_at_onset_seconds` and `recency` (1 at the onset, halved for every ten minutes before it); for
    processes `age_at_onset_seconds` (negative: started after the onset), `group_cpu_percent` (of its process group),
    `shares_cpu` (may run where some service may run), `takes_pinned_cpu` (is pinned to CPUs on which a service is
    pinned too) and `suspicion` (group CPU on the CPUs of the most confined service, halved for every minute by which
    it began before the onset)."""

    kind: str
    evidence: str  # the Evidence that brings such facts; if that is missing, so is the group
    source: str = "host"  # which source brings it; "": nobody is asked, it comes with what was recorded
    owner: Literal["candidate", "host"] = "candidate"  # facts of the service itself, or of the host it stands for
    where: dict[str, Condition] = {}
    strong: dict[str, Condition] | None = None
    weak: dict[str, Condition] | None = None
    prefer: str = ""  # numeric attribute; among equals the largest represents the group
    none: Literal["absent", "missing"] = "missing"  # state when no fact matches `where`


class Group(_Strict, frozen=True, kw_only=True):
    """A decorrelated piece of evidence: the strongest of its signals (or facts) counts, once."""

    title: str
    symptom: bool = False  # at the entry service, all of these absent speaks against every cause
    watch: bool = True  # must be back to normal for a recovery; false for what a cure need not change (demand, say)
    facts: FactTest | None = None


class Likelihood(_Strict, frozen=True, kw_only=True):
    """`states[state] = (P(state | cause), P(state | something else))` of group `group` looked at `at` the candidate
    (itself, its callers, callees, host, the calls into it, its siblings: all
    other calls of its callers, the entry service). States that are not listed
    and missing evidence contribute exactly 0."""

    group: str
    at: At = "self"
    states: dict[State, tuple[float, float]]

    @property
    def column(self) -> str:
        return self.group if self.at == "self" else f"{self.group}@{self.at}"


class Reference(_Strict, frozen=True, kw_only=True):
    """A parameter taken from the hypothesis: `candidate.service`, `fact.<attribute>`, `label.<label>`, or from the
    alert: `alert.<label>`; or from the Kubernetes object above the pod of the leading series or fact, or else above the
    candidate: `owner.kind`, `owner.namespace`, `owner.name`, or of a node `owner.node` (see `rules.owners`).
    `optional`: one that finds nothing leaves the parameter out."""

    source: str = msgspec.field(name="from")
    optional: bool = False


class ProposalTemplate(_Strict, frozen=True, kw_only=True):
    """An action by name. `using` names the evidence column whose leading fact or series `fact.*` and `label.*` mean; a
    reference that finds nothing withdraws the whole proposal (but for an `optional` one), and so does a `configured`
    that is not among what the operator has set up (`Situation.configured`): `diagnostic/thread_dump` is the one of that
    name in `kubernetes.diagnostics`."""

    action: str
    params: dict[str, Scalar | Reference] = {}
    using: str = ""
    configured: str = ""
    reason: str = ""
    runbook: str = ""
    autonomy_cap: Literal["observe", "suggest", "approve", "auto"] = "auto"


class Cause(_Strict, frozen=True, kw_only=True):
    """A possible root cause of a node of one of `kinds`. `prior` is its probability at one service, before any
    evidence, given that something is wrong (of a cause that alerts name: given the alert). `needs` are its defining
    evidence columns: unless one of them (or a rule) speaks for it, it is no candidate. The kind `any` fits every node.
    No proposals: there is no safe remedy, so the incident is escalated; `no_remedy` says why (`packs lint` asks for
    it). A `generic` cause says what is seen of a service and not why: specific ones account for it (see
    `rules.explaining`)."""

    title: str
    fault: str
    kinds: tuple[str, ...]
    prior: float
    evidence: tuple[Likelihood, ...]
    needs: tuple[str, ...]
    sentence: str
    proposals: tuple[ProposalTemplate, ...] = ()
    no_remedy: str = ""
    runbook: str = ""
    generic: bool = False

    def fits(self, kind: str) -> bool:
        """Whether it may be a cause at a node of that kind."""
        return kind in self.kinds or "any" in self.kinds


class AlertEntry(_Strict, frozen=True, kw_only=True):
    """What is known about one alert: its possible causes and what it is about. Its key is the alert's name, or
    `name/severity`; with `metrics` (globs) it also stands for every alert that no name matches and whose expression
    reads such a metric. A cause that any entry names is a candidate only for alerts whose entry names it; with
    `reached_by` (names of metrics), whatever the alert, also at each service on a path that has one of these metrics,
    REACHED times as likely before any evidence: its queries are then asked of services, `$scope` in the place of
    `$alert(...)`, those of them that group by `$service`."""

    causes: tuple[str, ...]
    subject: str = ""  # entity kind; "": the most specific one that the alert's labels name
    metrics: tuple[str, ...] = ()
    reached_by: tuple[str, ...] = ()


class Pattern(_Strict, frozen=True, kw_only=True):
    """One condition of a rule. `where` maps a field to a constant, a list (any of), a comparison, or a variable `$x`;
    equal variables join. Fields: finding(signal, group, service, peer, state, direction, harm), edge(caller, callee),
    node(service, kind, local: it is this machine), fact(kind, subject, service, attributes...). `state: bad` is strong
    or weak; `harm` is `later` where the service failed or was late only some time after this changed, else empty."""

    match: Literal["finding", "edge", "node", "fact"]
    where: dict[str, Condition]


class Outcome(_Strict, frozen=True, kw_only=True):
    """Exactly one of `support` and `prune`: a cause id; `service` is a variable or a name. `weight` is in nats."""

    service: str
    support: str = ""
    prune: str = ""
    weight: float = 0.7


class Rule(_Strict, frozen=True, kw_only=True):
    title: str
    when: tuple[Pattern, ...]
    then: Outcome


class Pack(_Strict, frozen=True, kw_only=True):
    """One file. Ids are keys, so that they cannot come twice. The causes of a `fallback` pack compete only where all
    others together explain less than half."""

    pack: str
    version: int
    description: str = ""
    fallback: bool = False
    alerts: dict[str, AlertEntry] = {}
    queries: dict[str, str] = {}
    signals: dict[str, Signal] = {}
    groups: dict[str, Group] = {}
    causes: dict[str, Cause] = {}
    rules: dict[str, Rule] = {}


def parse_pack(data: object, where: str) -> Pack:
    """Plain data (as YAML gives it) to a checked pack. Raises PackError with every fault; `where` names the file."""
    faults: list[Fault] = []
    pack = converted(Pack, data, (), faults)
    if pack is not None:
        assert isinstance(pack, Pack)
        _check_pack(pack, faults)
        if not faults:
            return pack
    elif (rest := parse_rest(data, where)) is not None:
        _check_pack(rest[0], faults)
    raise PackError(where, faults)


def parse_rest(data: object, name: str) -> tuple[Pack, dict[str, frozenset[str]]] | None:
    """What is left of a pack that `parse_pack` refused, and the names it defines by table, so that its other faults can
    be told in the same run; never to be used. Entries with a fault of shape are left out of the first, not of the
    second. `name`: what it is called if it does not say so itself. None for what is no pack at all."""
    if not isinstance(data, Mapping):
        return None
    own = data.get("pack")
    rest: dict[str, Any] = {"pack": own if isinstance(own, str) else name, "version": 1}
    names: dict[str, frozenset[str]] = {}
    for table in TABLES:
        entries = data.get(table)
        rest[table] = {}
        if not isinstance(entries, Mapping):
            continue
        names[table] = frozenset(str(key) for key in entries)
        kind = get_args(fields_of(Pack)[table].type)[1]
        for key, entry in entries.items():
            faults: list[Fault] = []
            found = converted(kind, entry, (), faults)
            if isinstance(key, str) and not faults:
                rest[table][key] = found
    return Pack(**rest), names


def loose_references(packs: Iterable[Pack], names: Mapping[str, Collection[str]]) -> list[Fault]:
    """References of these packs that lead nowhere; the first part of a path is the pack. `names`: what is defined
    besides, by table, in entries that could not be read (`parse_rest`)."""
    known = PackSet(tuple(packs))
    faults: list[Fault] = []
    for pack in known.packs:
        _check_references(pack, known, names, faults)
    return faults


@dataclass(frozen=True, eq=False)
class PackSet:
    """Packs that fit together. Build with `PackSet.of`. Equal only to itself, so that what is compiled from it can be
    kept with it."""

    packs: tuple[Pack, ...]
    model: str = ""  # version of the learned tables that stand in the place of the packs' own

    @classmethod
    def of(cls, packs: Iterable[Pack], model: str = "") -> PackSet:
        """Raises PackError when an id comes twice or a reference between packs leads nowhere."""
        found = cls(tuple(sorted(packs, key=lambda p: p.pack)), model)
        faults: list[Fault] = []
        for table in TABLES:
            owner: dict[str, str] = {}
            for pack in found.packs:
                for name in getattr(pack, table):
                    if name in owner:
                        faults.append(Fault((pack.pack, table, name), f"already defined by pack {owner[name]}"))
                    owner[name] = pack.pack
        faults += loose_references(found.packs, {})
        if faults:
            raise PackError("packs", faults)
        return found

    def queries(self) -> tuple[EvidenceQuery, ...]:
        """Everything to ask for, by name: the packs' queries to Prometheus, and the facts that their groups look at
        (from the source named by the group, with an empty query)."""
        found = {n: EvidenceQuery(name=n, query=text) for pack in self.packs for n, text in pack.queries.items()}
        for group in self.groups.values():
            if group.facts is not None and group.facts.source not in ("", DERIVED):
                name = group.facts.evidence
                found[name] = EvidenceQuery(name=name, query="", source=group.facts.source)
        return tuple(found[name] for name in sorted(found))

    def asked(self, causes: Collection[str]) -> tuple[EvidenceQuery, ...]:
        """What of `queries()` an incident asks whose alerts name `causes`: all that is asked of services, and of what
        is asked by an alert's labels, that which evidence of these causes looks at."""
        groups = self.groups_of(causes)
        return tuple(q for q in self.queries() if "$alert(" not in q.query or self.signals[q.name].group in groups)

    def asked_beyond(
        self, causes: Collection[str], has: Mapping[str, Collection[str]]
    ) -> tuple[tuple[EvidenceQuery, tuple[str, ...]], ...]:
        """What is asked besides, and of which services: `has` are the metrics of `reached_by` that a service has."""
        known = self.groups_of(causes)
        groups = {service: self.groups_of(self.reached(metrics)) for service, metrics in has.items()}
        found = []
        for q in self.queries():
            if "$alert(" not in q.query or "$service" not in q.query or self.signals[q.name].group in known:
                continue
            group = self.signals[q.name].group
            services = tuple(sorted(service for service, looked_at in groups.items() if group in looked_at))
            if services:
                found.append((msgspec.structs.replace(q, query=_OF_ALERT.sub("$scope", q.query)), services))
        return tuple(found)

    def groups_of(self, causes: Collection[str]) -> frozenset[str]:
        """The groups that evidence of these causes looks at."""
        return frozenset(line.group for name in causes for line in self.causes[name].evidence)

    def reached(self, metrics: Collection[str]) -> frozenset[str]:
        """The causes that services which have these metrics are reached for."""
        has = set(metrics)
        return frozenset(
            c for entry in self.alerts.values() if has.intersection(entry.reached_by) for c in entry.causes
        )

    @cached_property
    def alerts(self) -> dict[str, AlertEntry]:
        return {n: a for p in self.packs for n, a in p.alerts.items()}

    @cached_property
    def alert_causes(self) -> frozenset[str]:
        """Causes that some alert names: candidates for those alerts alone."""
        return frozenset(cause for entry in self.alerts.values() for cause in entry.causes)

    @cached_property
    def reached_by(self) -> tuple[str, ...]:
        """Every metric that services are reached by."""
        return tuple(sorted({metric for entry in self.alerts.values() for metric in entry.reached_by}))

    @cached_property
    def reachable_causes(self) -> frozenset[str]:
        return self.reached(self.reached_by)

    @cached_property
    def fallback_causes(self) -> frozenset[str]:
        return frozenset(cause for pack in self.packs if pack.fallback for cause in pack.causes)

    @cached_property
    def signals(self) -> dict[str, Signal]:
        return {n: s for p in self.packs for n, s in p.signals.items()}

    @cached_property
    def speaks_by_absence(self) -> dict[str, tuple[str, ...]]:
        """Per group the signals of which an answer without any series says that there is nothing of the kind."""
        found: dict[str, tuple[str, ...]] = {}
        for name, signal in sorted(self.signals.items()):
            if signal.none == "absent":
                found[signal.group] = (*found.get(signal.group, ()), name)
        return found

    @cached_property
    def groups(self) -> dict[str, Group]:
        return {n: g for p in self.packs for n, g in p.groups.items()}

    @cached_property
    def causes(self) -> dict[str, Cause]:
        return {n: c for p in self.packs for n, c in sorted(p.causes.items())}

    @cached_property
    def rules(self) -> dict[str, Rule]:
        return {n: r for p in self.packs for n, r in sorted(p.rules.items())}

    @cached_property
    def version(self) -> str:
        named = [f"{p.pack}/{p.version}" for p in self.packs]
        return " ".join([*named, f"model/{self.model}"] if self.model else named)


def _check_pack(pack: Pack, faults: list[Fault]) -> None:
    for name, entry in pack.alerts.items():
        if entry.subject and entry.subject not in ENTITIES:
            faults.append(Fault(("alerts", name, "subject"), f"unknown entity; known: {', '.join(sorted(ENTITIES))}"))
        for i, metric in enumerate(entry.reached_by):
            if not _METRIC.fullmatch(metric):
                faults.append(Fault(("alerts", name, "reached_by", i), "is no name of a metric"))
        if not entry.causes:
            faults.append(Fault(("alerts", name, "causes"), "names no cause"))
    for table in ("queries", "signals", "groups", "causes", "rules"):
        for name in getattr(pack, table):
            if not _NAME.fullmatch(name):
                faults.append(Fault((table, name), "names are lower case words joined by _ and ."))
    for name, text in pack.queries.items():
        if "$scope" not in text and "$alert(" not in text:
            faults.append(
                Fault(("queries", name), "lacks $scope or $alert: it would ask for every series of the server")
            )
        for variable in set(re.findall(r"\$[a-zA-Z_]+", text)) - {"$scope", "$service", "$rate", "$alert"}:
            faults.append(Fault(("queries", name), f"unknown variable {variable}"))
        for items in re.findall(r"\$alert(\([^()]*\))?", text):
            if (reason := fault_of(items)) is not None:
                faults.append(Fault(("queries", name), reason))
    for name, signal in pack.signals.items():
        if not (math.isfinite(signal.floor) and signal.floor > 0):
            faults.append(Fault(("signals", name, "floor"), "must be a positive number"))
        if signal.kind == "saturation" and signal.limit is None:
            faults.append(Fault(("signals", name, "limit"), "a saturation needs its limit"))
        if signal.node and signal.node != SUBJECT and signal.node not in ENTITIES:
            known = ", ".join(sorted(ENTITIES))
            faults.append(Fault(("signals", name, "node"), f"unknown entity; known: {SUBJECT}, {known}"))
        if signal.derive is not None:
            _check_derivation(signal, signal.derive, ("signals", name), faults)
    for name, cause in pack.causes.items():
        _check_cause(cause, ("causes", name), faults)
    for name, rule in pack.rules.items():
        _check_rule(rule, ("rules", name), faults)


def _check_cause(cause: Cause, path: tuple[str | int, ...], faults: list[Fault]) -> None:
    if not 0 < cause.prior < 1:
        faults.append(Fault((*path, "prior"), "must lie between 0 and 1"))
    if not cause.kinds:
        faults.append(Fault((*path, "kinds"), "names no node kind"))
    for placeholder in _PLACEHOLDER.findall(cause.sentence):
        if placeholder not in VOCABULARY:
            known = ", ".join(sorted(VOCABULARY))
            faults.append(Fault((*path, "sentence"), f"unknown word {{{placeholder}}}; known: {known}"))
    columns: set[str] = set()
    for i, line in enumerate(cause.evidence):
        where = (*path, "evidence", i)
        if line.column in columns:
            faults.append(Fault(where, f"{line.column} comes twice"))
        columns.add(line.column)
        for j, given in enumerate(("the cause", "something else")):
            total = sum(pair[j] for pair in line.states.values())
            if total > 1.0 + 1e-9:
                faults.append(Fault((*where, "states"), f"probabilities given {given} sum to {total:.3g}, over 1"))
        for state, pair in line.states.items():
            if not all(0 < p < 1 for p in pair):
                faults.append(Fault((*where, "states", state), "probabilities lie strictly between 0 and 1"))
    for i, column in enumerate(cause.needs):
        if column not in columns:
            faults.append(Fault((*path, "needs", i), f"{column} is no evidence of this cause"))
    if not cause.needs:
        faults.append(Fault((*path, "needs"), "names no defining evidence"))
    for i, proposal in enumerate(cause.proposals):
        where = (*path, "proposals", i)
        if proposal.using and proposal.using not in columns:
            faults.append(Fault((*where, "using"), f"{proposal.using} is no evidence of this cause"))
        for key, value in proposal.params.items():
            if isinstance(value, Reference) and not REFERENCE.fullmatch(value.source):
                faults.append(Fault((*where, "params", key, "from"), f"cannot refer to {value.source!r}"))
            elif isinstance(value, Reference) and value.source.startswith(("fact.", "label.")) and not proposal.using:
                faults.append(Fault((*where, "params", key, "from"), f"{value.source} needs `using`"))


_FIELDS = {
    "finding": {"signal", "group", "service", "peer", "state", "direction", "harm"},
    "edge": {"caller", "callee"},
    "node": {"service", "kind", "local"},
}


def _check_rule(rule: Rule, path: tuple[str | int, ...], faults: list[Fault]) -> None:
    if bool(rule.then.support) == bool(rule.then.prune):
        faults.append(Fault((*path, "then"), "needs exactly one of support, prune"))
    if not 0 < rule.then.weight <= 3:
        faults.append(Fault((*path, "then", "weight"), "lies between 0 and 3 nats"))
    if not rule.when:
        faults.append(Fault((*path, "when"), "a rule without conditions would always fire"))
    bound: set[str] = set()
    for i, pattern in enumerate(rule.when):
        known = _FIELDS.get(pattern.match)
        for field, value in pattern.where.items():
            if known is not None and field not in known:
                faults.append(Fault((*path, "when", i, "where", field), f"a {pattern.match} has {sorted(known)}"))
            if isinstance(value, str) and value.startswith("$"):
                bound.add(value)
        if pattern.match == "fact" and not isinstance(pattern.where.get("kind"), str):
            faults.append(Fault((*path, "when", i, "where", "kind"), "missing"))
    if rule.then.service.startswith("$") and rule.then.service not in bound:
        faults.append(Fault((*path, "then", "service"), f"{rule.then.service} is bound by no condition"))


_INGREDIENTS = {
    "own": ("of", "traffic"),
    "share": ("of",),
    "difference": ("of", "minus"),
    "calls": ("traffic",),
    "per_request": ("of", "traffic"),
    "trend": ("of",),
}


def _check_derivation(signal: Signal, derive: Derivation, path: tuple[str | int, ...], faults: list[Fault]) -> None:
    for key in _INGREDIENTS.get(derive.kind, ()):
        if not getattr(derive, key):
            faults.append(Fault((*path, "derive", key), f"{derive.kind} cannot be computed without it"))
    if derive.kind == "trend" and (len(derive.of) > 1 or signal.bad not in ("up", "down")):
        faults.append(Fault((*path, "derive", "of"), "a trend follows one signal, up or down"))
    if derive.kind == "calls" and not signal.peer:
        faults.append(Fault((*path, "peer"), "calls need the label that names the callee"))
    if derive.full is not None and not (math.isfinite(derive.full) and derive.full > 0):
        faults.append(Fault((*path, "derive", "full"), "must be a positive number"))


def _check_references(pack: Pack, known: PackSet, names: Mapping[str, Collection[str]], faults: list[Fault]) -> None:
    groups, signals, causes = ({*getattr(known, of), *names.get(of, ())} for of in ("groups", "signals", "causes"))
    for name, signal in pack.signals.items():
        if signal.group not in groups:
            faults.append(Fault((pack.pack, "signals", name, "group"), f"unknown group {signal.group}"))
        for other in (*signal.derive.of, *signal.derive.traffic, signal.derive.minus) if signal.derive else ():
            if other and other not in signals:
                faults.append(Fault((pack.pack, "signals", name, "derive"), f"unknown signal {other}"))
    for name in pack.queries:
        if name not in signals:
            faults.append(Fault((pack.pack, "queries", name), "no signal says what this series means"))
        elif name in known.signals and known.signals[name].derive is not None:
            faults.append(Fault((pack.pack, "queries", name), "is derived from other signals, so it is not asked for"))
    for name, cause in pack.causes.items():
        for i, line in enumerate(cause.evidence):
            if line.group not in groups:
                faults.append(Fault((pack.pack, "causes", name, "evidence", i, "group"), f"unknown group {line.group}"))
    for name, entry in pack.alerts.items():
        for i, cause_name in enumerate(entry.causes):
            if cause_name not in causes:
                faults.append(Fault((pack.pack, "alerts", name, "causes", i), f"unknown cause {cause_name}"))
    for name, rule in pack.rules.items():
        target = rule.then.support or rule.then.prune
        if target not in causes:
            faults.append(Fault((pack.pack, "rules", name, "then"), f"unknown cause {target}"))
        for i, pattern in enumerate(rule.when):
            value = pattern.where.get("signal") if pattern.match == "finding" else None
            for signal_name in value if isinstance(value, list) else [value]:
                if isinstance(signal_name, str) and signal_name[:1] != "$" and signal_name not in signals:
                    path = (pack.pack, "rules", name, "when", i, "where", "signal")
                    faults.append(Fault(path, f"unknown signal {signal_name}"))
