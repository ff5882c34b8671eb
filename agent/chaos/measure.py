"""What a run measured, and what many runs say together. Pure: numbers in, numbers out.

Used by `agent.chaos.run` (a `Run` is one line of its file) and `agent.chaos.report`. Times are seconds after the fault;
None: it has not happened. A run that does not recover is censored at the cap that was fixed beforehand, so that means
are restricted means: an arm is not made better by what it never heals.

Restricted mean survival time: Royston and Parmar, "Restricted mean survival time", BMC Med. Res. Methodol. 13:152
(2013). Intervals: percentile bootstrap over scenarios (clusters), since repetitions of one scenario are alike: Field
and Welsh, "Bootstrapping clustered data", J. R. Stat. Soc. B 69 (2007).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

CAP_SECONDS = 120.0
RESAMPLES = 4000
LEVEL = 0.95
VERSION = 1


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One run of one scenario under one arm."""

    version: int = VERSION
    scenario: str
    kind: str
    healed_by: str
    arm: str
    repetition: int
    seed: int
    at: float  # unix seconds of the first injection (of the start, where nothing is injected)
    killed_agent: bool = False  # it was to be killed at a random moment
    killed_at: float | None = None  # None: the run was over before
    made_by: str = ""  # version and digest of packs
    degraded: float | None = None
    alert: float | None = None
    acknowledged: float | None = None
    diagnosed: float | None = None
    acted: float | None = None
    recovered: float | None = None
    top: tuple[str, ...] = ()  # "cause@service", best first
    truth: tuple[str, ...] = ()  # "cause@service" of everything that names the cause rightly
    rank: int | None = None  # of the true cause, from 1
    answer: str = ""  # ranked | insufficient_evidence | "": no diagnosis
    actions: tuple[str, ...] = ()  # "action@service", in order
    wrong: tuple[str, ...] = ()  # those of them that were not right here
    needless: tuple[str, ...] = ()  # those of a control
    repeated: tuple[str, ...] = ()  # what the agent's journal shows to have been done twice, in words
    undone: int = 0
    attempts: int = 0
    collateral: float = 0.0  # share of bad probes among those that should have stayed good
    outcome: str = ""  # of the agent's incidents: resolved | escalated | ...
    void: str = ""  # why the run proves nothing: the world did not do what the scenario says
    seconds: float = 0.0  # how long the run took, all included
    story: tuple[str, ...] = ()

    def time(self, cap: float = CAP_SECONDS) -> float:
        """Seconds out of bounds, at most `cap`: 0 where the service never was degraded."""
        if self.degraded is None:
            return 0.0
        return cap if self.recovered is None else min(self.recovered, cap)

    @property
    def healed(self) -> bool:
        return self.recovered is not None and self.recovered <= CAP_SECONDS


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its bootstrap interval (`LEVEL`); all NaN where there is nothing to estimate from."""

    value: float
    low: float
    high: float
    cases: int

    def plain(self) -> dict[str, Any]:
        def number(x: float) -> float | None:
            return None if math.isnan(x) else round(x, 3)

        return {"value": number(self.value), "low": number(self.low), "high": number(self.high), "cases": self.cases}


NOTHING = Interval(math.nan, math.nan, math.nan, 0)


def bootstrap(
    groups: Mapping[str, Sequence[float]], statistic: Callable[[Sequence[float]], float], seed: int = 1
) -> Interval:
    """`statistic` of all values, with a percentile interval from resampling whole groups with replacement."""
    kept = [list(values) for values in groups.values() if values]
    if not kept:
        return NOTHING
    every = [v for values in kept for v in values]
    chance = np.random.default_rng(seed)
    picks = chance.integers(0, len(kept), size=(RESAMPLES, len(kept)))
    drawn = [statistic([v for i in row for v in kept[i]]) for row in picks]
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(statistic(every), float(low), float(high), len(every))


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def restricted_mean(runs: Sequence[Run], cap: float = CAP_SECONDS, seed: int = 1) -> Interval:
    """Mean seconds out of bounds up to `cap`, over runs in which something was broken."""
    groups: dict[str, list[float]] = {}
    for run in runs:
        groups.setdefault(run.scenario, []).append(run.time(cap))
    return bootstrap(groups, mean, seed)


def paired_difference(ours: Sequence[Run], theirs: Sequence[Run], seed: int = 1) -> Interval:
    """Mean of (their seconds - ours) over pairs (scenario, repetition) that both healed: positive is faster."""
    others = {(r.scenario, r.repetition): r for r in theirs}
    groups: dict[str, list[float]] = {}
    for run in ours:
        other = others.get((run.scenario, run.repetition))
        if other is not None and run.healed and other.healed:
            groups.setdefault(run.scenario, []).append(other.time() - run.time())
    return bootstrap(groups, mean, seed)


def reduction(ours: Sequence[Run], theirs: Sequence[Run], cap: float = CAP_SECONDS, seed: int = 1) -> Interval:
    """1 - (our restricted mean / theirs), over pairs (scenario, repetition) that both have; scenarios resampled."""
    others = {(r.scenario, r.repetition): r for r in theirs}
    pairs: dict[str, list[tuple[float, float]]] = {}
    for run in ours:
        other = others.get((run.scenario, run.repetition))
        if other is not None:
            pairs.setdefault(run.scenario, []).append((run.time(cap), other.time(cap)))
    kept = list(pairs.values())
    if not kept:
        return NOTHING

    def ratio(groups: Sequence[Sequence[tuple[float, float]]]) -> float:
        a = math.fsum(x for g in groups for x, _ in g)
        b = math.fsum(y for g in groups for _, y in g)
        return 1.0 - a / b if b else math.nan

    chance = np.random.default_rng(seed)
    picks = chance.integers(0, len(kept), size=(RESAMPLES, len(kept)))
    drawn = [r for row in picks if not math.isnan(r := ratio([kept[i] for i in row]))]
    if not drawn:
        return NOTHING
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(ratio(kept), float(low), float(high), sum(map(len, kept)))


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest-rank percentile (no value is made up between two that were seen); NaN of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def share(hits: int, of: int) -> dict[str, Any]:
    """A proportion with its Wilson interval (E. B. Wilson, J. Am. Stat. Assoc. 22, 1927)."""
    if of == 0:
        return {"hits": 0, "of": 0, "share": None, "low": None, "high": None}
    z, p = 1.959964, hits / of
    middle = (p + z * z / (2 * of)) / (1 + z * z / of)
    half = z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of)) / (1 + z * z / of)
    return {
        "hits": hits,
        "of": of,
        "share": round(p, 4),
        "low": round(max(0.0, middle - half), 4),
        "high": round(min(1.0, middle + half), 4),
    }
