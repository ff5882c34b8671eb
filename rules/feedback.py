"""What people said about incidents, counted, and a model that takes it into account. Pure: time is passed in.

`agent.learning` calls it with the feedback that the journal holds. For each column of a confirmed cause the state that
was seen counts as "given the cause"; for each column of a hypothesis that was not it, as "given something else". Only
what lies within the column's window counts, so that what was learned passes again.

    P'(s) = (K P(s) + N M L(s)) / (K + N),   L(s) = (n(s) + 1) / (N + S)

P is the shipped probability of state s, n(s) how often it was seen, N their sum over the S states of the column, L the
estimate with Laplace's smoothing, M the mass of the listed states (at most 1), and K how many observations the shipped
table is worth: a Dirichlet posterior whose prior is the shipped table. Without counts nothing is touched, not one bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import msgspec

from rules.packs import Cause, Likelihood, PackSet, State

SHIPPED = 20.0  # observations that a shipped table is worth
SMALLEST = 1e-3  # no feedback makes anything impossible
DEFAULT_WINDOW = 3600.0


class Refuted(msgspec.Struct, frozen=True, kw_only=True):
    """A hypothesis that was not the cause, and what its node showed, by column."""

    cause: str
    states: dict[str, State]


class Observation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One incident's feedback: the true cause and what its node showed, by column (empty: not known)."""

    at: float
    incident: str
    cause: str
    states: dict[str, State] = {}
    refuted: tuple[Refuted, ...] = ()


class Counted(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How often a state was seen in one column: at the cause, and at nodes where it was thought but was not."""

    cause: str
    column: str
    state: State
    given: int = 0
    otherwise: int = 0


Tally = tuple[Counted, ...]  # by cause, column and state


@dataclass(frozen=True, slots=True)
class Windows:
    """For how many seconds feedback about an evidence group counts."""

    default: float = DEFAULT_WINDOW
    groups: Mapping[str, float] = field(default_factory=dict)

    def of(self, column: str) -> float:
        return self.groups.get(column.partition("@")[0], self.default)


def tally(observations: Iterable[Observation], now: float, windows: Windows) -> Tally:
    """What counts at `now`. An observation counts for a column while `at <= now <= at + window`."""
    counts: dict[tuple[str, str, State], list[int]] = {}
    for seen in observations:
        sides = [(seen.cause, seen.states, 0), *((r.cause, r.states, 1) for r in seen.refuted)]
        for cause, states, side in sides:
            for column, state in states.items():
                if seen.at <= now <= seen.at + windows.of(column):
                    counts.setdefault((cause, column, state), [0, 0])[side] += 1
    return tuple(
        Counted(cause=cause, column=column, state=state, given=n[0], otherwise=n[1])
        for (cause, column, state), n in sorted(counts.items())
    )


def expires(observations: Iterable[Observation], now: float, windows: Windows) -> float:
    """When the first observation that counts now stops counting; infinity if none does."""
    ends = (
        seen.at + windows.of(column)
        for seen in observations
        for states in (seen.states, *(r.states for r in seen.refuted))
        for column in states
    )
    return min((end for end in ends if end >= now), default=math.inf)


def adjusted(packs: PackSet, counts: Tally, version: str) -> PackSet:
    """The packs with what was counted taken into account; the very same object without any count that concerns them.
    `version` is added to the model's."""
    table: dict[tuple[str, str], dict[State, tuple[int, int]]] = {}
    for c in counts:
        table.setdefault((c.cause, c.column), {})[c.state] = (c.given, c.otherwise)
    causes: dict[str, Cause] = {}
    for name, cause in packs.causes.items():
        lines = tuple(_moved(line, table.get((name, line.column), {})) for line in cause.evidence)
        if lines != cause.evidence:
            causes[name] = msgspec.structs.replace(cause, evidence=lines)
    if not causes:
        return packs
    return PackSet.of(
        (
            msgspec.structs.replace(pack, causes={n: causes.get(n, c) for n, c in pack.causes.items()})
            for pack in packs.packs
        ),
        f"{packs.model}+{version}" if packs.model else version,
    )


def _moved(line: Likelihood, seen: Mapping[State, tuple[int, int]]) -> Likelihood:
    """States that the column does not list say nothing, whatever was seen."""
    states = list(line.states)
    sides = []
    for side in (0, 1):
        shipped = [line.states[s][side] for s in states]
        n = [seen.get(s, (0, 0))[side] for s in states]
        sides.append(_mixed(shipped, n))
    if all(moved is None for moved in sides):
        return line
    given, otherwise = ([line.states[s][i] for s in states] if m is None else m for i, m in enumerate(sides))
    return msgspec.structs.replace(line, states=dict(zip(states, zip(given, otherwise, strict=True), strict=True)))


def _mixed(shipped: list[float], n: list[int]) -> list[float] | None:
    """None: nothing was counted."""
    total = sum(n)
    if not total:
        return None
    mass = math.fsum(shipped)
    laplace = [(count + 1.0) / (total + len(n)) for count in n]
    mixed = [(SHIPPED * p + total * mass * q) / (SHIPPED + total) for p, q in zip(shipped, laplace, strict=True)]
    return [min(1.0 - SMALLEST, max(SMALLEST, p)) for p in mixed]
