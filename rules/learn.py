"""The learned part of the model: likelihoods counted from incidents whose cause is known. Pure.

Called by `agent.learn` (makes the shipped `rules/model.json`), `agent.crossval` (counts anew without a service or a
system) and `agent.packs` (puts the learned tables in the place of those of the packs). A pack says which groups speak
for a cause and which against; how much each says is counted:

    P(state | cause)          (n + m p) / (N + m)   over the true services of incidents with the cause's fault
    P(state | something else) likewise, over all other candidates of all incidents, fault-free ones included

the posterior mean under a Dirichlet prior of `m` imagined observations distributed as `p`. The prior knows no figure of
a pack, only the role that a column has for the cause: it defines it (alone, or as one of several), supports it, or
speaks against it. Of what does not define, the prior for the cause is the counted background tilted by the role, so
that a column which is bad everywhere says nothing. Missing evidence is not counted, which for naive Bayes is exact.

A cause that no licensed incident shows keeps the table of its pack.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Literal

import msgspec

from rules.evidence import Observer
from rules.packs import Cause, Likelihood, PackSet, State

Counts = Counter[tuple[str, str, State, bool]]  # cause, column, state, whether it was the cause: how often
Table = dict[State, tuple[float, float]]  # state -> (given the cause, given something else)
# (counts, imagined observations at the cause, elsewhere) -> probabilities
Estimate = Callable[[Table, Mapping[State, float], Mapping[State, float]], Table]
Role = Literal["defining", "one of several", "supporting", "against", "neutral"]

FORMAT = 1
IMAGINED_GIVEN = 4.0
IMAGINED_OTHERWISE = 30.0
SMALLEST = 1e-3  # no count makes anything impossible
_RARE = 0.01  # share of a state that a prior does not list (contrary, silent)
_STATES: tuple[State, ...] = ("strong", "weak", "absent")
# What an incident's cause, and anything else, is imagined to show: strong, weak, absent.
_PRIORS: Mapping[Role, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "defining": ((0.8, 0.12, 0.08), (0.005, 0.01, 0.985)),
    "one of several": ((0.5, 0.1, 0.4), (0.005, 0.01, 0.985)),
    "supporting": ((0.4, 0.1, 0.5), (0.1, 0.05, 0.85)),
    "against": ((0.05, 0.05, 0.9), (0.15, 0.1, 0.75)),
    "neutral": ((0.1, 0.05, 0.85), (0.1, 0.05, 0.85)),
}


class ModelError(ValueError):
    """A learned model that is refused; the text names where it is from, the key, and what is wrong."""


class LearnedCause(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """By column and state: `tables` are (P(state | cause), P(state | something else)), `counts` what they rest on (how
    often at the cause, how often elsewhere)."""

    tables: dict[str, Table]
    counts: dict[str, Table] = {}


class LearnedModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """model.json. `incidents` were counted, `fault_free` windows among them."""

    format: int
    version: str
    incidents: int
    fault_free: int
    imagined: tuple[float, float]  # pseudo-counts: of the cause, of something else
    causes: dict[str, LearnedCause]


def count(observer: Observer, service: str | None, fault: str) -> Counts:
    """What each cause's columns showed at every candidate of one incident. `service` None: nothing was wrong."""
    counts: Counts = Counter()
    for name, at, of_cause in candidates(observer, service, fault):
        for line in observer.packs.causes[name].evidence:
            state = observer.observe(at, line.group, line.at).state
            if state is not None:
                counts[name, line.column, state, of_cause] += 1
    return counts


def candidates(observer: Observer, service: str | None, fault: str) -> Iterator[tuple[str, str, bool]]:
    """Every (cause, service) that an incident could have been, and whether it was. Causes of certain alerts, and those
    of last resort, are no part of it."""
    packs = observer.packs
    for name in sorted(packs.causes.keys() - packs.alert_causes - packs.fallback_causes):
        cause = packs.causes[name]
        for at in observer.graph.paths:
            if cause.fits(observer.graph.kind(at)):
                yield name, at, at == service and cause.fault == fault


def shown(counts: Counts) -> frozenset[str]:
    """The causes that some counted incident had."""
    return frozenset(name for (name, _, _, of_cause), n in counts.items() if of_cause and n > 0)


def posterior_mean(seen: Table, given: Mapping[State, float], otherwise: Mapping[State, float]) -> Table:
    """(n + m p) / (N + m), in closed form."""
    of_cause = _normal({s: seen[s][0] + given[s] for s in seen})
    elsewhere = _normal({s: seen[s][1] + otherwise[s] for s in seen})
    return {s: (of_cause[s], elsewhere[s]) for s in seen}


def learned(
    packs: PackSet,
    counts: Counts,
    causes: Collection[str],
    version: str = "",
    incidents: int = 0,
    fault_free: int = 0,
    estimate: Estimate = posterior_mean,
) -> LearnedModel:
    """The tables of `causes`, as counted; `estimate` makes probabilities of counts."""
    found = {}
    for name in sorted(causes):
        cause = packs.causes[name]
        tables, seen = {}, {}
        for line in cause.evidence:
            column = seen[line.column] = _seen(packs, counts, causes, name, line)
            tables[line.column] = _monotone(_bounded(estimate(column, *pseudo_counts(cause, line, column))))
        found[name] = LearnedCause(tables=tables, counts=seen)
    return LearnedModel(
        format=FORMAT,
        version=version,
        incidents=incidents,
        fault_free=fault_free,
        imagined=(IMAGINED_GIVEN, IMAGINED_OTHERWISE),
        causes=found,
    )


def applied(packs: PackSet, model: LearnedModel, where: str = "model") -> PackSet:
    """The packs with learned tables in the place of their own. Causes that the packs do not have (a pack may be
    switched off) are left out. Raises ModelError for a column or a state that a cause does not have."""
    causes = {}
    for name, learned_cause in model.causes.items():
        if name not in packs.causes:
            continue
        cause = packs.causes[name]
        known = {line.column: line for line in cause.evidence}
        for column, table in learned_cause.tables.items():
            if column not in known:
                raise ModelError(f"{where}: causes.{name}.tables.{column}: the cause has no such evidence; learn anew")
            if set(table) != set(known[column].states):
                raise ModelError(f"{where}: causes.{name}.tables.{column}: not the states of its pack; learn anew")
        lines = tuple(
            msgspec.structs.replace(line, states=learned_cause.tables.get(line.column, line.states))
            for line in cause.evidence
        )
        causes[name] = msgspec.structs.replace(cause, evidence=lines)
    return PackSet.of(
        (
            msgspec.structs.replace(pack, causes={n: causes.get(n, c) for n, c in pack.causes.items()})
            for pack in packs.packs
        ),
        model.version,
    )


def parse_model(body: bytes, where: str) -> LearnedModel:
    """model.json, checked completely: shape, and that every table is a pair of probability distributions. Raises
    ModelError."""
    try:
        model = msgspec.json.decode(body, type=LearnedModel)
    except msgspec.MsgspecError as error:
        raise ModelError(f"{where}: {error}") from error
    if model.format != FORMAT:
        raise ModelError(f"{where}: format: {model.format} is not known here, {FORMAT} is; learn anew")
    for name, cause in model.causes.items():
        for column, table in cause.tables.items():
            at = f"{where}: causes.{name}.tables.{column}"
            if not all(0.0 < p < 1.0 for pair in table.values() for p in pair):  # NaN too
                raise ModelError(f"{at}: probabilities lie between 0 and 1, both excluded")
            for side, which in enumerate(("the cause", "something else")):
                if abs(math.fsum(pair[side] for pair in table.values()) - 1.0) > 1e-6:
                    raise ModelError(f"{at}: probabilities given {which} do not sum to 1")
    return model


def _seen(packs: PackSet, counts: Counts, causes: Collection[str], name: str, line: Likelihood) -> Table:
    """How often each state was seen at the cause and elsewhere. Causes that are defined by the same columns share what
    these show, since they are told apart by the others alone: an incident of either counts for both."""
    cause = packs.causes[name]
    alike = [
        other
        for other in causes
        if other != name and line.column in cause.needs and set(packs.causes[other].needs) == set(cause.needs)
    ]
    found: Table = {}
    for s in line.states:
        shared = sum(counts[other, line.column, s, True] for other in alike)
        at_cause, elsewhere = counts[name, line.column, s, True], counts[name, line.column, s, False]
        found[s] = (float(at_cause + shared), float(max(elsewhere - shared, 0)))
    return found


def role_of(cause: Cause, line: Likelihood) -> Role:
    """What a column is for a cause. Of the pack's figures only their order counts."""
    if line.column in cause.needs:
        return "defining" if len(cause.needs) == 1 else "one of several"
    given, otherwise = line.states.get("strong", (1.0, 1.0))
    if given == otherwise:
        return "neutral"
    return "supporting" if given > otherwise else "against"


def pseudo_counts(cause: Cause, line: Likelihood, seen: Table) -> tuple[dict[State, float], dict[State, float]]:
    """The Dirichlet prior of a column: imagined observations by state, at the cause and elsewhere."""
    role = role_of(cause, line)
    given, otherwise = (
        _normal({s: dict(zip(_STATES, side, strict=True)).get(s, _RARE) for s in line.states}) for side in _PRIORS[role]
    )
    if role not in ("defining", "one of several"):
        background = _normal({s: seen[s][1] + IMAGINED_OTHERWISE * otherwise[s] for s in seen})
        given = _normal({s: background[s] * given[s] / otherwise[s] for s in seen})
    return (
        {s: IMAGINED_GIVEN * p for s, p in given.items()},
        {s: IMAGINED_OTHERWISE * p for s, p in otherwise.items()},
    )


def _normal(weights: Mapping[State, float]) -> dict[State, float]:
    whole = math.fsum(weights.values())
    return {s: w / whole for s, w in weights.items()}


def _monotone(table: Table) -> Table:
    """A stronger change never says less than a weaker one: where few incidents have it otherwise, neighbouring states
    share one ratio (pool adjacent violators, from absent over weak to strong)."""
    order = [s for s in reversed(_STATES) if s in table]
    rising = "strong" not in table or table["strong"][0] >= table["strong"][1]
    pools: list[list[State]] = []
    for state in order:
        pools.append([state])
        while len(pools) > 1 and _ratio(table, pools[-1]) != _ratio(table, pools[-2]):
            if (_ratio(table, pools[-1]) > _ratio(table, pools[-2])) == rising:
                break
            last = pools.pop()
            pools[-1] += last
    pooled = dict(table)
    for pool in (p for p in pools if len(p) > 1):
        ratio = _ratio(table, pool)
        pooled |= {s: (ratio * table[s][1], table[s][1]) for s in pool}
    return pooled


def _ratio(table: Table, states: Collection[State]) -> float:
    return math.fsum(table[s][0] for s in states) / math.fsum(table[s][1] for s in states)


def _bounded(table: Table) -> Table:
    """No probability below SMALLEST; what that takes comes from the largest, so that they sum to 1."""
    sides = []
    for side in (0, 1):
        raised = {s: max(pair[side], SMALLEST) for s, pair in table.items()}
        largest = max(raised, key=lambda s: raised[s])
        raised[largest] -= math.fsum(raised.values()) - 1.0
        sides.append(raised)
    return {s: (sides[0][s], sides[1][s]) for s in table}
