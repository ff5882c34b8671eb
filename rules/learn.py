"""Likelihoods counted from incidents whose cause is known. Called by `agent.crossval`; pure.

Exists to tell how well the packs' structure (which groups speak for which cause) carries over to systems that nobody
looked at: the tables are thrown away and counted anew from other incidents. Nothing shipped is made by this.

    P(state | cause)          (n + m p) / (N + m)   over the true services of incidents with the cause's fault
    P(state | something else) likewise, over all other candidates of all incidents, fault-free ones included

with `m` imagined observations of a prior `p` that knows only which columns define the cause. A column that no incident
of a cause ever showed and that does not define it says nothing: both probabilities are the same then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

import msgspec

from rules.evidence import Observer
from rules.packs import Cause, Likelihood, PackSet, State

Counts = Counter[tuple[str, str, State, bool]]  # cause, column, state, whether it was the cause: how often

IMAGINED_GIVEN = 3.0
IMAGINED_OTHERWISE = 30.0
_DEFINING: Mapping[State, float] = {"strong": 0.6, "weak": 0.2, "absent": 0.2}
_BACKGROUND: Mapping[State, float] = {"strong": 0.01, "weak": 0.02, "absent": 0.97}
_SMALLEST = 1e-3


def count(observer: Observer, service: str | None, fault: str) -> Counts:
    """What each cause's columns showed at every candidate of one incident. `service` None: nothing was wrong."""
    counts: Counts = Counter()
    for name, cause in observer.packs.causes.items():
        for at in observer.graph.paths:
            if observer.graph.kind(at) not in cause.kinds:
                continue
            for line in cause.evidence:
                state = observer.observe(at, line.group, line.at).state
                if state is not None:
                    counts[name, line.column, state, at == service and cause.fault == fault] += 1
    return counts


def refit(packs: PackSet, counts: Counts, causes: Collection[str]) -> PackSet:
    """The packs with the tables of `causes` replaced."""
    return PackSet.of(
        msgspec.structs.replace(
            pack,
            causes={name: _refitted(name, c, counts) if name in causes else c for name, c in pack.causes.items()},
        )
        for pack in packs.packs
    )


def _refitted(name: str, cause: Cause, counts: Counts) -> Cause:
    lines = tuple(_line(name, line, line.column in cause.needs, counts) for line in cause.evidence)
    return msgspec.structs.replace(cause, evidence=lines)


def _line(name: str, line: Likelihood, defining: bool, counts: Counts) -> Likelihood:
    states = tuple(line.states)
    otherwise = _probabilities(name, line.column, states, False, _BACKGROUND, counts)
    seen = sum(counts[name, line.column, state, True] for state in states)
    if not seen and not defining:
        given = otherwise
    else:
        prior = _DEFINING if defining else dict(zip(states, otherwise, strict=True))
        given = _probabilities(name, line.column, states, True, prior, counts)
    table = {s: (g, o) for s, g, o in zip(states, given, otherwise, strict=True)}
    return msgspec.structs.replace(line, states=table)


def _probabilities(
    name: str, column: str, states: tuple[State, ...], cause: bool, prior: Mapping[State, float], counts: Counts
) -> tuple[float, ...]:
    imagined = IMAGINED_GIVEN if cause else IMAGINED_OTHERWISE
    share = sum(prior.get(s, 0.01) for s in states)
    weights = [counts[name, column, s, cause] + imagined * prior.get(s, 0.01) / share for s in states]
    whole = sum(weights)
    return tuple(min(max(w / whole, _SMALLEST), 1.0 - _SMALLEST) for w in weights)
