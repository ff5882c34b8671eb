"""What an incident looked like, small enough to keep, and which earlier ones looked alike. Pure.

`agent.investigate` keeps the signature of every look in the journal and asks for precedents; `rules.feedback` learns
from the same signatures. What it finds is information, never evidence: the causes of earlier incidents were named from
the very series that are weighed now, so that counting them again would make a wrong diagnosis the surer the more often
it was made.

Similarity is the weighted Jaccard index (Ruzicka) of what was odd, by position instead of by name:

    sum over keys of g min(a, b) / sum over keys of g max(a, b)

A key is (relative position, evidence group of the node itself or of the calls into it); its value is how bad the group
was there (strong 1, silent 1, weak 0.5, contrary 0.25, else 0); g is how much a strong state of that group says at
most, in nats. Relative position is the distance from the alerting service (at most 3) and the kind of the node.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec

from rules.evidence import Observer
from rules.packs import Likelihood, PackSet, State
from rules.subjects import causes_named

MAX_NODES = 8
MAX_DEPTH = 3
ALIKE = 0.6  # similarity from which on an earlier incident is worth telling of
VALUE: Mapping[str, float] = {"strong": 1.0, "silent": 1.0, "weak": 0.5, "contrary": 0.25}
UNKNOWN_GROUP = 1.0  # nats, of a group that no pack has any more


class NodeStates(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One node: its states by evidence column (`group` or `group@at`); what nobody could say is left out."""

    service: str
    position: str
    states: dict[str, State]


class Signature(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`vector`: value by `position/column`, of what was odd. `nodes`: the entry and the oddest nodes, in full."""

    vector: dict[str, float] = {}
    nodes: tuple[NodeStates, ...] = ()

    def states_of(self, service: str) -> dict[str, State]:
        return next((node.states for node in self.nodes if node.service == service), {})


class Precedent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An earlier incident that looked alike. `confirmed`: by a person, by a verified action, or "" (it is what was
    thought then). `fixed_by`: actions after which its series were good again."""

    incident: str
    at: float  # when it was closed
    similarity: float
    cause: str
    service: str
    confirmed: Literal["feedback", "verified", ""] = ""
    fixed_by: tuple[str, ...] = ()
    title: str = ""  # of the cause, where its diagnosis named it


def signature_of(observer: Observer) -> Signature:
    """What the situation looks like. Nodes with nothing odd are left out, but for the entry."""
    packs, graph = observer.packs, observer.graph
    known = packs.causes.keys() - (packs.alert_causes - causes_named(observer.situation, packs.alerts))
    causes = [packs.causes[name] for name in sorted(known)]
    columns: dict[str, list[Likelihood]] = {}  # by kind of node
    vector: dict[str, float] = {}
    nodes: list[tuple[float, NodeStates]] = []
    for service, path in graph.paths.items():
        kind = graph.kind(service)
        position = f"{min(len(path) - 1, MAX_DEPTH)}/{kind}"
        if kind not in columns:
            lines = {line.column: line for cause in causes if cause.fits(kind) for line in cause.evidence}
            columns[kind] = [lines[column] for column in sorted(lines)]
        seen = ((line.column, observer.observe(service, line.group, line.at).state) for line in columns[kind])
        states = {column: state for column, state in seen if state is not None}
        odd = {c: VALUE[s] for c, s in states.items() if s in VALUE and c.partition("@")[2] in ("", "inbound")}
        for column, value in odd.items():
            key = f"{position}/{column}"
            vector[key] = max(value, vector.get(key, 0.0))
        if odd or service == graph.entry:
            size = math.inf if service == graph.entry else math.fsum(odd.values())
            nodes.append((size, NodeStates(service=service, position=position, states=states)))
    nodes.sort(key=lambda pair: (-pair[0], pair[1].position, pair[1].service))
    return Signature(vector=dict(sorted(vector.items())), nodes=tuple(node for _, node in nodes[:MAX_NODES]))


def weights(packs: PackSet) -> dict[str, float]:
    """How much a strong state of each group says at most about any cause, in nats."""
    found: dict[str, float] = {}
    for cause in packs.causes.values():
        for line in cause.evidence:
            if "strong" in line.states:
                given, otherwise = line.states["strong"]
                found[line.group] = max(found.get(line.group, 0.0), abs(math.log(given / otherwise)))
    return found


def similarity(one: Signature, other: Signature, weight: Mapping[str, float]) -> float:
    """0 (nothing in common, or nothing odd) to 1 (alike). Symmetric; whatever the order of keys."""
    shared, total = [], []
    for key in sorted({*one.vector, *other.vector}):
        a, b = one.vector.get(key, 0.0), other.vector.get(key, 0.0)
        g = weight.get(key.rpartition("/")[2].partition("@")[0], UNKNOWN_GROUP)
        shared.append(g * min(a, b))
        total.append(g * max(a, b))
    whole = math.fsum(total)
    return math.fsum(shared) / whole if whole > 0 else 0.0


def nearest(found: Iterable[Precedent], limit: int = 3) -> tuple[Precedent, ...]:
    """The most alike, of equals what is confirmed, then the newest first."""
    alike = [p for p in found if p.similarity >= ALIKE]
    alike.sort(key=lambda p: (-round(p.similarity, 6), p.confirmed == "", -p.at, p.incident))
    return tuple(alike[:limit])
