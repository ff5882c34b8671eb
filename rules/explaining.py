"""What one cause explains of another: a cause that says why accounts for those that only say what is seen.

Called by `rules.diagnose`. A *generic* cause describes an effect ("the service adds latency that none of its callees
explains"). A specific one with its own evidence (a memory leak, a lock) makes a service behave just so. Weighed apart,
the two compete, and the effect, which is seen best, would hide its cause. So a specific cause takes over what speaks
for the generic ones that it accounts for, as in a noisy-or: with probability EFFECT it shows that way,

    log P(effect seen | specific) / P(effect seen | something else) = log(EFFECT * exp(r) + 1 - EFFECT)

where r are the log-odds that the effect's evidence gives the generic cause itself. It never loses by it: a cause need
not show that way. Accounted for is

* the effect at the specific cause's own service, unless its own evidence looks at that already;
* the effect at its callers, if they cannot see past it: a service's own latency is what its *measured* callees leave
  over, so what happens in a callee that nobody measures, or on a host, shows as its caller's own;
* with probability FAR the effect at any service that depends on it: a caller that gives up waiting fails by itself, and
  who waits for a queue is slow although all of its calls are fast.

Several services that suffer at once are what a common cause looks like: the strongest counts, the others together at
most COMMON nats, since they see the same trouble.

A generic cause keeps its place where nothing more telling has evidence of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rules.bayes import MAX_RULE_NATS
from rules.engine import Graph
from rules.evidence import Observer

EFFECT = 0.5  # a cause shows in its service's latency or failures as often as not
FAR = 0.1  # and beyond that, by timeouts and queues, in one case of ten
COMMON = MAX_RULE_NATS


@dataclass(frozen=True, slots=True)
class Explained:
    """What a candidate accounts for: nats, and the generic (service, cause) pairs, strongest first."""

    nats: float
    effects: tuple[tuple[str, str], ...]


def explained(
    observer: Observer,
    candidates: Sequence[tuple[str, str]],
    evidence: Sequence[float],
    speaking: Sequence[bool],
) -> dict[int, Explained]:
    """By number of the candidate, for the specific ones that have something to account for. `candidates`: (service,
    cause); `evidence`: log-odds of all of its evidence; `speaking`: whether its defining evidence speaks for it."""
    causes = observer.packs.causes
    effects: dict[str, tuple[float, str]] = {}
    for (service, cause), weight, speaks in zip(candidates, evidence, speaking, strict=True):
        if causes[cause].generic and speaks and weight > 0:
            effects[service] = max(effects.get(service, (0.0, "")), (weight, cause))
    if not effects:
        return {}
    looked = {group for c in causes.values() if c.generic for group in c.needs if "@" not in group}
    measured = _measured(observer, looked)
    below = {service: _reachable(observer.graph, service) for service in effects}
    found = {}
    for i, ((service, cause), speaks) in enumerate(zip(candidates, speaking, strict=True)):
        if causes[cause].generic or not speaks:
            continue
        near = set() if service in measured else set(observer.graph.callers.get(service, ()))
        if not any(line.group in looked and line.at == "self" for line in causes[cause].evidence):
            near.add(service)
        far = {s for s, reached in below.items() if service in reached} - {service}
        places = {**dict.fromkeys(far, FAR), **dict.fromkeys(near, EFFECT)}
        if seen := _accounted(places, effects):
            found[i] = seen
    return found


def _accounted(places: Mapping[str, float], effects: Mapping[str, tuple[float, str]]) -> Explained | None:
    """`places`: with which probability the effect shows there."""
    gains = [(_gain(effects[s][0], shows), s) for s, shows in places.items() if s in effects]
    gains = sorted(((gain, s) for gain, s in gains if gain > 0), key=lambda g: (-g[0], g[1]))
    if not gains:
        return None
    nats = gains[0][0] + min(math.fsum(gain for gain, _ in gains[1:]), COMMON)
    return Explained(nats, tuple((service, effects[service][1]) for _, service in gains))


def _gain(weight: float, shows: float) -> float:
    if weight > 50.0:
        return weight + math.log(shows)
    return math.log(shows * math.exp(weight) + 1.0 - shows)


def _reachable(graph: Graph, service: str) -> set[str]:
    reached: set[str] = set()
    frontier = [service]
    while frontier:
        fresh = graph.callees.get(frontier.pop(), frozenset()) - reached
        reached |= fresh
        frontier += fresh
    return reached


def _measured(observer: Observer, groups: set[str]) -> set[str]:
    """The services at which the effects are told apart: they have such series of their own, and still answer."""
    known = [f for f in observer.findings if f.state is not None]
    deaf = {f.service for f in known if f.bad and observer.packs.signals[f.signal].kind == "up"}
    return {f.service for f in known if f.group in groups} - deaf
