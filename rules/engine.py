"""The rule engine: which rules fire over findings, facts and the call graph, and which nodes are candidates at all.

Called by `rules.diagnose`. A rule is a conjunction of patterns over flat records; equal variables join; there is no
negation, so that missing evidence can never fire a rule (a normal series is a record too: `state: absent`). Matching
is by index: constants select records once per pattern, joins go through a hash of the variables already bound. Only
equality joins exist, so that any forward-chaining engine can stand in for this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from rules.features import Finding
from rules.model import Fact, Situation
from rules.packs import Condition, PackSet, Pattern, Rule, Scalar
from rules.subjects import kind_of

Record = Mapping[str, Scalar]
Binding = tuple[tuple[str, Scalar], ...]

MAX_BINDINGS = 10_000  # of one rule, at any point of its joins; what exceeds it is left out, in record order
LOCAL_HOST = "host"  # node that stands for this machine when the topology names no host


@dataclass(frozen=True, slots=True)
class Fired:
    """One match of one rule: its id and the variables, sorted by name."""

    rule: str
    binding: Binding

    def value(self, name: str) -> Scalar | None:
        return dict(self.binding).get(name)


@dataclass(frozen=True)
class Graph:
    """The call graph as far as it matters: everything reachable from the entry service. `host` is the node that this
    machine's facts are about ("" if that cannot be told)."""

    entry: str
    kinds: Mapping[str, str]
    paths: Mapping[str, tuple[str, ...]]
    callers: Mapping[str, frozenset[str]]
    callees: Mapping[str, frozenset[str]]
    host: str

    def kind(self, service: str) -> str:
        return self.kinds.get(service, "")

    def hosts(self, service: str) -> frozenset[str]:
        return frozenset(s for s in self.callees.get(service, ()) if self.kind(s) == "host")


def graph_of(situation: Situation, packs: PackSet, findings: Sequence[Finding]) -> Graph:
    """Edges come from the topology; a service of which it knows no calls gets those its own call series name."""
    edges = set(situation.topology.edges)
    known_callers = {a for a, b in edges if situation.topology.kinds.get(b) != "host"}
    edges |= {(f.service, f.peer) for f in findings if f.peer and f.service and f.service not in known_callers}
    facts = [f for kind in ("host.process", "host.cpu") for f in situation.facts(kind)]
    speaking = {f.service for f in findings if f.service}
    nodes = {s for edge in edges for s in edge} | set(situation.topology.kinds) | speaking
    nodes |= {f.service for f in situation.facts("kubernetes.node") if kind_of(f.service)}
    nodes |= {situation.entry} - {""}
    implied: dict[str, str] = {}
    for finding in findings:
        if kind := packs.signals[finding.signal].implies:
            implied.setdefault(finding.service, kind)
    kinds = {s: kind_of(s) or _kind(s, situation, implied, speaking) for s in nodes}
    if situation.entry and any(caller == situation.entry for caller, _ in edges):  # else it reaches everything anyway
        edges |= {(situation.entry, s) for s in nodes if kind_of(s) and s != situation.entry}
    host = _local_host(edges, kinds, facts)
    if host == LOCAL_HOST and host not in nodes:
        kinds[host] = "host"
        edges |= {(s, host) for s in nodes}
        nodes.add(host)
    callees: dict[str, set[str]] = {s: set() for s in nodes}
    callers: dict[str, set[str]] = {s: set() for s in nodes}
    for caller, callee in edges:
        callees[caller].add(callee)
        callers[callee].add(caller)
    return Graph(
        entry=situation.entry,
        kinds=kinds,
        paths=_paths(situation.entry, callees),
        callers={s: frozenset(v) for s, v in callers.items()},
        callees={s: frozenset(v) for s, v in callees.items()},
        host=host,
    )


def records_of(
    graph: Graph, findings: Iterable[Finding], facts: Iterable[tuple[Fact, Record]]
) -> dict[str, list[Record]]:
    """Everything rules may look at, by kind of record; facts come with their (derived) attributes."""
    found: dict[str, list[Record]] = {"finding": [], "edge": [], "node": [], "fact": []}
    for f in findings:
        if f.state is not None:
            found["finding"].append(
                {
                    "signal": f.signal,
                    "group": f.group,
                    "service": f.service,
                    "peer": f.peer,
                    "state": f.state,
                    "direction": f.direction,
                    "harm": f.harm,
                }
            )
    for caller, callees in graph.callees.items():
        found["edge"] += [{"caller": caller, "callee": callee} for callee in callees]
    found["node"] += [
        {"service": service, "kind": graph.kind(service), "local": service == graph.host} for service in graph.paths
    ]
    found["fact"] += [
        {**attributes, "kind": fact.kind, "subject": fact.subject, "service": fact.service}
        for fact, attributes in facts
    ]
    return {kind: sorted(records, key=_sort_key) for kind, records in found.items()}


@dataclass(frozen=True)
class CompiledPattern:
    """A pattern split into tests on one record and variables to bind."""

    kind: str
    tests: tuple[tuple[str, Condition], ...]
    variables: tuple[tuple[str, str], ...]  # (field, $name)

    @classmethod
    def of(cls, pattern: Pattern) -> CompiledPattern:
        variables = {k: v for k, v in pattern.where.items() if isinstance(v, str) and v.startswith("$")}
        tests = {k: v for k, v in pattern.where.items() if k not in variables}
        if pattern.match == "finding" and tests.get("state") == "bad":
            tests["state"] = ["strong", "weak"]
        return cls(pattern.match, tuple(tests.items()), tuple(sorted(variables.items())))


@dataclass(frozen=True)
class Matcher:
    """Rules compiled for matching; build once a pack set."""

    rules: Mapping[str, Rule]
    patterns: dict[str, tuple[CompiledPattern, ...]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        compiled = {name: tuple(CompiledPattern.of(p) for p in rule.when) for name, rule in self.rules.items()}
        object.__setattr__(self, "patterns", compiled)

    def match(self, records: Mapping[str, Sequence[Record]]) -> tuple[Fired, ...]:
        """Every match of every rule, ordered by rule and variables. The order of records does not matter as long as no
        rule exceeds MAX_BINDINGS."""
        indexes: dict[tuple[str, str], dict[Scalar, list[Record]]] = {}
        fired: set[Fired] = set()
        for name, patterns in self.patterns.items():
            bindings: list[dict[str, Scalar]] = [{}]
            for pattern in patterns:
                bindings = _join(bindings, pattern, select(pattern, records, indexes))
                if not bindings:
                    break
            fired.update(Fired(name, tuple(sorted(b.items()))) for b in bindings)
        return tuple(sorted(fired, key=lambda f: (f.rule, str(f.binding))))


def holds(condition: Condition, value: Scalar | None) -> bool:
    """Whether a value meets a condition: equality, membership, or every comparison. A value that is absent equals false
    and nothing else."""
    if isinstance(condition, dict):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        return all(_COMPARE[op](value, bound) for op, bound in condition.items())
    if isinstance(condition, list):
        return any(holds(c, value) for c in condition)
    if value is None:
        return condition is False
    return isinstance(value, bool) == isinstance(condition, bool) and value == condition


_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": lambda a, b: a >= b,
    ">": lambda a, b: a > b,
    "<=": lambda a, b: a <= b,
    "<": lambda a, b: a < b,
}


def select(
    pattern: CompiledPattern,
    records: Mapping[str, Sequence[Record]],
    indexes: dict[tuple[str, str], dict[Scalar, list[Record]]],
) -> list[Record]:
    """Records that pass the pattern's tests; the first test on a plain string goes through an index."""
    pool: Sequence[Record] = records.get(pattern.kind, ())
    tests = pattern.tests
    for i, (name, condition) in enumerate(tests):
        if isinstance(condition, str):
            index = indexes.get((pattern.kind, name))
            if index is None:
                index = indexes[pattern.kind, name] = {}
                for record in pool:
                    if isinstance(value := record.get(name), str):
                        index.setdefault(value, []).append(record)
            pool, tests = index.get(condition, ()), tests[:i] + tests[i + 1 :]
            break
    return [r for r in pool if all(holds(condition, r.get(name)) for name, condition in tests)]


def _join(
    bindings: list[dict[str, Scalar]], pattern: CompiledPattern, selected: list[Record]
) -> list[dict[str, Scalar]]:
    """Extends each binding by each record that agrees with it on the variables both know."""
    bound = set(bindings[0])
    shared = [(f, v) for f, v in pattern.variables if v in bound]
    fresh = [(f, v) for f, v in pattern.variables if v not in bound]
    index: dict[tuple[Scalar | None, ...], dict[tuple[Scalar, ...], dict[str, Scalar]]] = {}
    for record in selected:
        extension: dict[str, Scalar] = {}
        for name, variable in fresh:
            value = record.get(name)
            if value is None or extension.setdefault(variable, value) != value:
                break
        else:
            extensions = index.setdefault(tuple(record.get(f) for f, _ in shared), {})
            extensions.setdefault(tuple(extension.values()), extension)
    joined: list[dict[str, Scalar]] = []
    for binding in bindings:
        for extension in index.get(tuple(binding[v] for _, v in shared), {}).values():
            joined.append({**binding, **extension})
            if len(joined) >= MAX_BINDINGS:
                return joined
    return joined


def _kind(service: str, situation: Situation, implied: Mapping[str, str], speaking: set[str]) -> str:
    """The topology's word, else what the service's own signals imply, else external if it has none, else http."""
    if service in situation.topology.kinds:
        return situation.topology.kinds[service]
    if service in implied:
        return implied[service]
    return "http" if service in speaking or service == situation.entry else "external"


def _local_host(edges: set[tuple[str, str]], kinds: Mapping[str, str], facts: Sequence[Fact]) -> str:
    """The node that this machine is: the one host under all services that own processes here, or the only host."""
    if not facts:
        return ""
    hosts = {s for s, kind in kinds.items() if kind == "host"}
    if not hosts:
        return LOCAL_HOST
    owners = {f.service for f in facts if f.service in kinds}
    under = {b for a, b in edges if a in owners and b in hosts} or hosts
    return next(iter(under)) if len(under) == 1 else ""


def _paths(entry: str, callees: Mapping[str, set[str]]) -> dict[str, tuple[str, ...]]:
    """Shortest path to everything reachable, breadth first. An entry that nobody knows a call of reaches everything:
    then there is no graph to prune by."""
    if not callees.get(entry):
        start = (entry,) if entry else ()
        return {s: (start if s == entry else (*start, s)) for s in sorted({*callees, *start})}
    paths: dict[str, tuple[str, ...]] = {entry: (entry,)}
    frontier = [entry]
    while frontier:
        reached = []
        for at in frontier:
            for callee in sorted(callees[at]):
                if callee not in paths:
                    paths[callee] = (*paths[at], callee)
                    reached.append(callee)
        frontier = reached
    return paths


def _sort_key(record: Record) -> str:
    return str(sorted((k, str(v)) for k, v in record.items()))
