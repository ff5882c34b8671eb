"""Cause and effect: which of two moved first, and how the trouble lies on the call graph. Called by `rules.diagnose`.

**Lead and lag.** Of the differences x of a candidate's leading series and y of the alerting service's, c(s) is the
circular cross-correlation at lag s. The candidate leads by as much as it explains y's future better than y explains
its future,

    T = max over 1 <= k <= K of c(k)  -  max over 1 <= k <= K of c(-k)

and chance is told by surrogates: x is shifted around the circle by every s, which keeps everything of both series but
their alignment, so that p = (1 + number of shifts whose T_s is at least T) / (1 + number of shifts), one-sided
(Schreiber and Schmitz, "Surrogate time series", Physica D 142, 2000). No randomness, no distribution assumed; one fast
Fourier transform gives every shift. At P_LEADS the candidate's lead (or its lag, when roles are changed) counts LEAD
nats; where samples are further apart than FINE_SECONDS it is not asked at all: on public incidents onset order helped
little at a minute a sample.

**Direction.** Symptoms travel from callee to caller: how many of a candidate's callers suffer, and how many of its
callees. Told, not counted: the groups at callers and callees count it already.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from rules.evidence import Observer
from rules.features import Finding
from rules.model import FloatArray, SeriesId

FINE_SECONDS = 15.0  # a sample, at most
LAG_SECONDS = 60.0  # as far as a lead is looked for
MIN_SAMPLES = 40
P_LEADS = 0.05
LEAD = 0.5  # nats: as much as the first rule that fires, about


@dataclass(frozen=True, slots=True)
class Lead:
    """`seconds` by which the candidate moved before the alerting service (negative: after it), with the p of that."""

    seconds: float
    p: float
    nats: float
    cause: SeriesId
    effect: SeriesId


@dataclass
class Clock:
    """Asks one situation who moved first; remembers what it was asked."""

    observer: Observer
    _rows: Mapping[SeriesId, tuple[FloatArray, FloatArray]] = field(init=False, repr=False)
    _effect: Finding | None = field(init=False)
    _known: dict[SeriesId, Lead | None] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        bad = [f for f in self.observer.symptom().findings if f.bad]
        rows: dict[SeriesId, tuple[FloatArray, FloatArray]] = {}
        for evidence in self.observer.situation.evidence:
            times = evidence.frame.times
            earlier = np.zeros(times.shape, dtype=bool)  # other trouble: who moved first in it says nothing of this
            for begin, end in self.observer.situation.quiet:
                earlier |= (times >= begin) & (times <= end)
            for series, values in zip(evidence.frame.ids, evidence.frame.values, strict=True):
                rows.setdefault(series, (times, np.where(earlier, np.nan, values) if earlier.any() else values))
        self._rows = rows
        self._effect = next((f for f in bad if f.series in rows), None)

    def lead(self, finding: Finding) -> Lead | None:
        """Whether the finding's series moved before the alerting service's symptom, or after it; None: neither, or it
        cannot be told."""
        if finding.series not in self._known:
            self._known[finding.series] = self._asked(finding)
        return self._known[finding.series]

    def _asked(self, finding: Finding) -> Lead | None:
        effect = self._effect
        if effect is None or finding.series == effect.series or finding.series not in self._rows:
            return None
        times, x = self._rows[finding.series]
        others, y = self._rows[effect.series]
        if times.shape != others.shape or not np.array_equal(times, others):
            return None
        return _compared(times, x, y, finding.series, effect.series)


def lead_lag(x: FloatArray, y: FloatArray, lags: int) -> tuple[int, float, float]:
    """(samples by which x leads, p that it leads, p that y leads) of two series on one grid; see the module."""
    n = x.size - 1
    if n < 2 * lags + 2:
        return 0, 1.0, 1.0
    with np.errstate(all="ignore"):
        a, b = _differences(x), _differences(y)
    if not a.any() or not b.any():
        return 0, 1.0, 1.0
    correlation = np.fft.irfft(np.conj(np.fft.rfft(a)) * np.fft.rfft(b), n)  # c(s) = sum over t of a(t) b(t + s)
    steps = np.arange(1, lags + 1)
    ahead = np.stack([np.roll(correlation, -k) for k in steps])  # c(s + k), by k and s
    behind = np.stack([np.roll(correlation, k) for k in steps])
    statistic = ahead.max(axis=0) - behind.max(axis=0)
    chance = np.ones(n, dtype=bool)
    chance[: lags + 1] = chance[n - lags :] = False  # shifts so small that they are still the lead itself
    slack = 1e-9 * max(float(np.abs(correlation).max()), 1e-300)
    shifts = int(chance.sum())
    leads = (1 + int((statistic[chance] >= statistic[0] - slack).sum())) / (1 + shifts)
    follows = (1 + int((statistic[chance] <= statistic[0] + slack).sum())) / (1 + shifts)
    if leads <= follows:
        return int(steps[int(np.argmax(ahead[:, 0]))]), leads, follows
    return -int(steps[int(np.argmax(behind[:, 0]))]), leads, follows


def _differences(values: FloatArray) -> FloatArray:
    """Steps from sample to sample in units of their own spread; 0 where a sample is missing."""
    steps = np.diff(values)
    steps = np.where(np.isfinite(steps), steps, 0.0)
    spread = float(steps.std())
    return (steps - steps.mean()) / spread if np.isfinite(spread) and spread > 0 else np.zeros_like(steps)


def _compared(times: FloatArray, x: FloatArray, y: FloatArray, cause: SeriesId, effect: SeriesId) -> Lead | None:
    if times.size < MIN_SAMPLES:
        return None
    step = float(np.median(np.diff(times)))
    if not 0 < step <= FINE_SECONDS:
        return None
    lags = max(min(int(LAG_SECONDS / step), times.size // 5), 1)
    samples, leads, follows = lead_lag(x, y, lags)
    p = min(leads, follows)
    if p > P_LEADS:
        return None
    return Lead(samples * step, p, LEAD if leads <= follows else -LEAD, cause, effect)


def direction(observer: Observer, service: str) -> tuple[int, int, int, int]:
    """How many of a service's callers suffer and how many it has, and the same of its callees (hosts left out)."""
    suffering = {f.service for f in observer.findings if f.bad}
    callers = observer.graph.callers.get(service, frozenset())
    callees = observer.graph.callees.get(service, frozenset()) - observer.graph.hosts(service)
    return len(callers & suffering), len(callers), len(callees & suffering), len(callees)
