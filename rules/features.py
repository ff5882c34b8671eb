"""Series to findings: what changed, by how much, since when, and whether that is bad. Called by `rules.diagnose` and
`rules.verify`; vectorised over all series that share a grid; nothing here knows causes.

For every series, robustly against its own normal window:

    baseline  median of the normal samples (quiet windows and the last sixth left out, see `_guarded`)
    scale     max(IQR / 1.35, 5 % of |baseline|, sd / 4, the signal's floor) * (1 + 2 / samples); with 200 samples or
              more also a third of what one sample in twenty deviates
    level     the value held for at least half of the abnormal window, not its maximum (ages and steady growth: of its
              last third); the first samples, which may still be normal, are left out
    z         (level - baseline) / scale, signed so that positive is the bad direction

Where the situation holds the same time of earlier days, `rules.seasons` puts what was usual then in the place of the
baseline.

z >= 3 is a weak change, z >= 6 a strong one, z <= -6 a change for the better ("contrary"). The floors, the level held
for half of the window and the sign per kind of signal are what made robust scores work on public recordings.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rules.model import BoolArray, Evidence, FloatArray, Frame, SeriesId, Situation
from rules.packs import PackSet, Signal, State
from rules.seasons import against, aligned, expectation, pasts_of
from rules.subjects import SUBJECT, causes_named, node_name
from rules.trends import trend_findings

WEAK = 3.0
STRONG = 6.0
APART = 4.5  # scales that are strong too where every settled sample lies beyond every normal one
APART_NORMAL, APART_SETTLED = 30, 3  # so many samples of either are needed for that
CROSSED = 2.0  # scales by which a saturation must have moved to its limit
COLLAPSE = 0.1  # a rate at a tenth of its baseline has stopped
MIN_BASELINE = 3  # fewer normal samples are no baseline
TAIL_FROM = 200  # so many normal samples tell what one in twenty is like: nothing smaller, held, is a change
HARM_AT_ONCE = 10.0  # seconds, and two samples: what fails only after that was well since the change
GUARD_FROM = 12  # so many normal samples of a series before the last sixth is given up
_STARTS_AT_ZERO = frozenset({"error_ratio", "rate", "count", "age", "flag"})  # kinds whose absence means none
_UP, _DOWN = 1.0, -1.0


Harm = Literal["", "later"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one series says. `baseline`, `scale` and `level` are in the signal's unit, NaN where there is none. `state`
    None: the series cannot speak (no baseline, no samples, or its service answers no scrape)."""

    series: SeriesId
    signal: str
    group: str
    service: str
    peer: str
    state: State | None
    direction: str  # up | down | flat | silent
    baseline: float
    scale: float
    level: float
    z: float  # positive is bad
    onset: float  # when the sustained change began, NaN: no change
    seasonal: bool = False  # the baseline is what is usual at this time of the day or week
    slope: float = 0.0  # of a trend that is sustained: per second (see `rules.trends`)
    left: float = math.nan  # of a trend: seconds until its limit, NaN: it does not go there, or nobody knows the limit
    harm: Harm = ""  # later: its service was well for some time after this had changed

    @property
    def bad(self) -> bool:
        return self.state in ("strong", "weak")


@dataclass(frozen=True, slots=True)
class Features:
    """The numbers behind the findings of one matrix; every array has one entry a series."""

    baseline: FloatArray
    scale: FloatArray
    level: FloatArray
    z: FloatArray
    onset: FloatArray
    silent: BoolArray
    based: BoolArray  # has a baseline (or may take zero for one)
    sampled: BoolArray  # has a baseline of its own samples
    present: BoolArray  # has samples in the abnormal window
    apart: BoolArray  # every settled sample lies beyond every normal one
    seasonal: BoolArray  # measured against the same time of an earlier day


@dataclass(frozen=True, slots=True)
class Traits:
    """What the packs know of each series, as arrays aligned with the rows of the matrix."""

    sign: FloatArray  # +1 up is bad, -1 down is bad, 0 both or neither
    floor: FloatArray
    growth: BoolArray
    from_zero: BoolArray  # no samples before means zero before
    latest: BoolArray  # goes on changing while the fault lasts: the end of the window is what counts

    @classmethod
    def of(cls, signals: Sequence[Signal]) -> Traits:
        sign = {"up": _UP, "down": _DOWN}
        return cls(
            np.array([sign.get(s.bad, 0.0) for s in signals]),
            np.array([s.floor for s in signals]),
            np.array([s.growth for s in signals], dtype=bool),
            np.array([s.kind in _STARTS_AT_ZERO for s in signals], dtype=bool),
            np.array([s.kind == "age" or s.growth for s in signals], dtype=bool),
        )


def findings_of(situation: Situation, packs: PackSet) -> tuple[Finding, ...]:
    """All findings, ordered by series name. A series that comes twice counts once, the first wins."""
    found: dict[SeriesId, Finding] = {}
    measured = []
    about = packs.groups_of(causes_named(situation, packs.alerts))
    days = [(past, frames_of(past.evidence, packs)) for past in pasts_of(situation)]
    known: set[str] = set()  # services of which anything was seen before the onset
    for frame in frames_of(situation.evidence, packs):
        signals = [packs.signals[s.metric] for s in frame.ids]
        features = measure_with(frame, Traits.of(signals), situation, days)
        measured.append((frame, signals, features))
        known.update(s.service for s, seen in zip(frame.ids, features.sampled.tolist(), strict=True) if seen)
    for frame, signals, features in measured:
        # "None before" is no baseline where nobody looked before.
        features.based[:] &= features.sampled | np.array([s.service in known for s in frame.ids], dtype=bool)
        for i, (series, signal) in enumerate(zip(frame.ids, signals, strict=True)):
            if series not in found:
                found[series] = finding_of(series, signal, features, i, _node(series, signal, situation.entry, about))
    found.update((f.series, f) for f in trend_findings([f for f, _, _ in measured], found, situation, packs))
    deaf = {f.service for f in found.values() if packs.signals[f.signal].kind == "up" and _unreachable(f)}
    heard = tuple(_heard(found[s], packs, deaf) for s in sorted(found, key=lambda s: (s.metric, s.labels)))
    spacing = max((float(np.median(np.diff(f.times))) for f, _, _ in measured if f.times.shape[0] > 1), default=0.0)
    return _with_harm(heard, packs, HARM_AT_ONCE + 2 * spacing)


def measure(frame: Frame, traits: Traits, situation: Situation) -> Features:
    """Features of every series of one frame. Vectorised: two sorts and a few passes over the matrix."""
    values = np.where(np.isfinite(frame.values), frame.values, np.nan)
    normal, abnormal = _windows(frame.times, situation)
    # Contiguous, so that sums run in the same order (to the last bit) however many series stand beside one.
    whole, after = np.ascontiguousarray(values[:, normal]), np.ascontiguousarray(values[:, abnormal])
    before = _guarded(whole)
    with np.errstate(all="ignore"):
        baseline, scale, based = _baseline(before, traits)
        settled = _settled(after)
        tail = settled[:, settled.shape[1] - -(-settled.shape[1] // 3) :]
        ordered, count = _ordered(settled)
        up, down = _at(ordered, count // 2), _at(ordered, (count - 1) // 2)
        late, few = _ordered(tail)
        up = np.where(traits.latest & (few > 0), _at(late, few // 2), up)
        down = np.where(traits.latest & (few > 0), _at(late, (few - 1) // 2), down)
        outward = np.where(np.abs(up - baseline) >= np.abs(down - baseline), up, down)
        level = np.where(traits.sign > 0, up, np.where(traits.sign < 0, down, outward))
        shift = (level - baseline) / scale
        z = np.where(traits.sign == 0, np.abs(shift), shift * traits.sign)
        if traits.growth.any() and normal.any():
            z = np.where(traits.growth, np.fmax(z, _growth(before, level, traits)), z)
        silent = (np.isfinite(whole).mean(axis=1) >= 0.5) if normal.any() else np.zeros(len(frame.ids), dtype=bool)
        share = np.isfinite(settled).mean(axis=1) if settled.shape[1] else np.ones(len(frame.ids))
        onset = _onset(frame.times, values, baseline, scale, np.where(traits.sign == 0, np.sign(shift), traits.sign))
        return Features(
            baseline=baseline,
            scale=scale,
            level=level,
            z=np.nan_to_num(z, nan=0.0, posinf=1e9, neginf=-1e9),
            onset=onset,
            silent=silent & (share < 0.25),
            based=based,
            sampled=np.isfinite(before).sum(axis=1) >= MIN_BASELINE,
            present=count > 0,
            apart=_apart(before, settled, np.where(traits.sign == 0, np.sign(shift), traits.sign)),
            seasonal=np.zeros(len(frame.ids), dtype=bool),
        )


def measure_with(
    frame: Frame, traits: Traits, situation: Situation, days: Sequence[tuple[Situation, Sequence[Frame]]]
) -> Features:
    """`measure`, against what the same time of the earlier `days` leads to expect (see `rules.seasons`): each as its
    situation and its frames."""
    today = measure(frame, traits, situation)
    expected = []
    for past, frames in days:
        there = aligned(frame.ids, frames)
        if there is None:
            continue
        values = np.where(np.isfinite(there.values), there.values, np.nan)
        with np.errstate(all="ignore"):
            _, spread, _ = _baseline(_settled(values[:, _windows(there.times, past)[1]]), traits)
        expected.append(expectation(today, measure(there, traits, past), spread))
    if not expected:
        return today
    with np.errstate(all="ignore"):
        found = against(today, expected, traits.sign)
        late = np.where((frame.times >= situation.onset)[None, :], frame.values, np.nan)
        late = np.where(np.isfinite(late), late, np.nan)
        towards = np.where(traits.sign == 0, np.sign(found.level - found.baseline), traits.sign)
        onset = _onset(frame.times, late, found.baseline, found.scale, towards)
    return replace(found, onset=np.where(found.seasonal, onset, found.onset))


def compared(
    before: FloatArray, after: FloatArray, signal: Signal
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Baseline, scale, held level and z of every row of events (spans, say) that share no grid, NaN at the row's end.
    Up is bad."""
    traits = Traits.of([signal] * before.shape[0])
    with np.errstate(all="ignore"):
        baseline, scale, _ = _baseline(before, traits)
        ordered, count = _ordered(after)
        level = np.where(count >= MIN_BASELINE, _at(ordered, count // 2), np.nan)
        return baseline, scale, level, (level - baseline) / scale


def frames_of(evidence: Iterable[Evidence], packs: PackSet) -> list[Frame]:
    """The series that some pack knows, one frame for each different grid."""
    grids: dict[bytes, list[tuple[Frame, list[int]]]] = {}
    for item in evidence:
        rows = [i for i, s in enumerate(item.frame.ids) if s.metric in packs.signals]
        if rows and item.frame.times.shape[0]:
            grids.setdefault(item.frame.times.tobytes(), []).append((item.frame, rows))
    return [
        Frame(
            parts[0][0].times,
            tuple(frame.ids[i] for frame, rows in parts for i in rows),
            np.vstack([frame.values[rows] for frame, rows in parts]),
        )
        for parts in grids.values()
    ]


def _apart(before: FloatArray, settled: FloatArray, sign: FloatArray) -> BoolArray:
    """Whether every settled sample lies beyond every normal one, in the direction of `sign`: the extreme of the rank
    sum test, whatever the distribution. With n normal and k settled samples that are alike it happens once in
    (n + k choose k) times, so that thirty and three are the least that say something (one in 5,456)."""
    if before.shape[1] < APART_NORMAL or settled.shape[1] < APART_SETTLED:
        return np.zeros(before.shape[0], dtype=bool)
    towards = sign[:, None]
    highest = np.where(np.isfinite(before), before * towards, -np.inf).max(axis=1)
    lowest = np.where(np.isfinite(settled), settled * towards, np.inf).min(axis=1)
    enough = (np.isfinite(before).sum(axis=1) >= APART_NORMAL) & (np.isfinite(settled).sum(axis=1) >= APART_SETTLED)
    return np.asarray(enough & (lowest > highest), dtype=bool)


def _windows(times: FloatArray, situation: Situation) -> tuple[BoolArray, BoolArray]:
    """Which samples are normal, and which abnormal."""
    normal = times < situation.onset
    for start, end in situation.quiet:
        normal &= ~((times >= start) & (times <= end))
    return normal, (times >= situation.onset) & (times <= situation.until)


def _guarded(normal: FloatArray) -> FloatArray:
    """Without the last sixth of each series' samples, where it has enough: an alert fires some time after the fault
    began (`for`, rate windows, scrapes), so these are the least normal of all. Of its samples, not of the window: that
    may reach back to before anybody looked, and then its last sixth is all there is."""
    seen = np.cumsum(np.isfinite(normal), axis=1, dtype=np.int32)  # up to each
    count = seen[:, -1:]
    return np.where(seen > count - np.where(count >= GUARD_FROM, count // 6, 0), np.nan, normal)


def _settled(abnormal: FloatArray) -> FloatArray:
    """Without the first samples, which may still be normal since rates lag by their window: a third of a very short
    window, half of a longer one, at most fifteen."""
    n = abnormal.shape[1]
    return abnormal[:, n // 3 if n < 12 else min(n // 2, 15) :]


def _ordered(values: FloatArray) -> tuple[FloatArray, NDArray[np.intp]]:
    """Rows sorted with NaN last, and how many are finite. Quantiles by index are far faster than nanpercentile."""
    return np.sort(values, axis=1), np.isfinite(values).sum(axis=1)


def _at(ordered: FloatArray, index: NDArray[np.intp]) -> FloatArray:
    if ordered.shape[1] == 0:
        return np.full(ordered.shape[0], np.nan)
    picked = np.take_along_axis(ordered, np.clip(index, 0, ordered.shape[1] - 1)[:, None], axis=1)
    return np.asarray(picked[:, 0], dtype=np.float64)


def _quantile(ordered: FloatArray, count: NDArray[np.intp], q: float) -> FloatArray:
    """Linear interpolation between order statistics, as numpy's default."""
    position = q * np.maximum(count - 1, 0)
    low = np.floor(position).astype(np.intp)
    below, above = _at(ordered, low), _at(ordered, np.minimum(low + 1, np.maximum(count - 1, 0)))
    return np.asarray(below + (position - low) * (above - below), dtype=np.float64)


def _baseline(normal: FloatArray, traits: Traits) -> tuple[FloatArray, FloatArray, BoolArray]:
    ordered, count = _ordered(normal)
    median = _quantile(ordered, count, 0.5)
    spread = (_quantile(ordered, count, 0.75) - _quantile(ordered, count, 0.25)) / 1.35
    sd = _sd(normal, count)
    scale = np.fmax.reduce([spread, 0.05 * np.abs(median), 0.25 * sd, traits.floor])
    if normal.shape[1] >= TAIL_FROM:
        tail = np.abs(
            np.where(traits.sign < 0, _quantile(ordered, count, 0.05), _quantile(ordered, count, 0.95)) - median
        )
        scale = np.fmax(scale, np.where(count >= TAIL_FROM, tail / WEAK, 0.0))
    scale = scale * (1.0 + 2.0 / np.maximum(count, 1))
    known = count >= MIN_BASELINE
    from_zero = traits.from_zero & (count == 0) & bool(normal.shape[1] >= MIN_BASELINE)
    baseline = np.where(known, median, np.where(from_zero, 0.0, np.nan))
    return baseline, np.where(known, scale, np.where(from_zero, traits.floor, np.nan)), known | from_zero


def _sd(values: FloatArray, count: NDArray[np.intp]) -> FloatArray:
    finite = np.isfinite(values)
    n = np.maximum(count, 1)
    mean = np.where(finite, values, 0.0).sum(axis=1) / n
    deviation = np.where(finite, values - mean[:, None], 0.0)
    return np.asarray(np.sqrt((deviation**2).sum(axis=1) / n), dtype=np.float64)


def _growth(normal: FloatArray, level: FloatArray, traits: Traits) -> FloatArray:
    """Rise from the first third of the normal window to the level now, against the noise between neighbouring samples:
    a ramp inflates the IQR of its own baseline, but not the spread of its steps."""
    first, count = _ordered(normal[:, : max(normal.shape[1] // 3, 1)])
    start = _quantile(first, count, 0.5)
    steps, many = _ordered(np.diff(normal, axis=1))
    noise = (_quantile(steps, many, 0.75) - _quantile(steps, many, 0.25)) / 1.35
    last, few = _ordered(normal[:, -max(normal.shape[1] // 3, 1) :])
    sign = np.where(traits.sign < 0, _DOWN, _UP)
    rising = (_quantile(last, few, 0.5) - start) * sign > 0
    rise = sign * (level - start) / np.fmax.reduce([noise, 0.05 * np.abs(start), traits.floor])
    return np.where(rising & (count >= MIN_BASELINE), rise, np.nan)


def _onset(
    times: FloatArray, values: FloatArray, baseline: FloatArray, scale: FloatArray, sign: FloatArray
) -> FloatArray:
    """The earliest sample beyond the weak bound from which on four fifths are beyond it; NaN if there is none."""
    finite = np.isfinite(values)
    beyond = finite & ((values - baseline[:, None]) * sign[:, None] > WEAK * scale[:, None])
    ahead = np.cumsum(beyond[:, ::-1], axis=1)[:, ::-1]
    left = np.maximum(np.cumsum(finite[:, ::-1], axis=1)[:, ::-1], 1)
    lasting = beyond & (ahead >= 0.8 * left) & (ahead >= 2)
    first = np.argmax(lasting, axis=1)
    return np.where(lasting.any(axis=1), times[first] if times.shape[0] else np.nan, np.nan)


def _node(series: SeriesId, signal: Signal, entry: str, about: frozenset[str]) -> str:
    """The node that a series describes: its service, what the alert is about, or the entity that its labels name.
    Groups that no cause of the alert looks at (`about` are those that one does) were asked of services."""
    if not signal.node:
        return series.service
    if signal.node == SUBJECT:
        return series.service if series.service and signal.group not in about else entry
    return node_name(signal.node, dict(series.labels)) or entry


def finding_of(series: SeriesId, signal: Signal, features: Features, i: int, node: str | None = None) -> Finding:
    """`node`: what the series describes, its service unless told."""
    z, level, baseline = float(features.z[i]), float(features.level[i]), float(features.baseline[i])
    apart = bool(features.apart[i])
    state = _state(signal, z, level, baseline, bool(features.based[i]), bool(features.present[i]), apart)
    silent = bool(features.silent[i]) and state not in ("strong", "weak")
    if silent:
        state, direction = "silent", "silent"
    elif state is None or abs(z) < WEAK or not features.based[i]:
        direction = "flat"
    else:
        direction = "up" if level > baseline else "down"
    peer = series.label(signal.peer) if signal.peer else ""
    return Finding(
        series=series,
        signal=series.metric,
        group=signal.group,
        service=series.service if node is None else node,
        peer=host_name(peer),
        state=state,
        direction=direction,
        baseline=baseline,
        scale=float(features.scale[i]),
        level=level,
        z=z,
        onset=float(features.onset[i]),
        seasonal=bool(features.seasonal[i]),
    )


def _state(
    signal: Signal, z: float, level: float, baseline: float, based: bool, present: bool, apart: bool
) -> State | None:
    """The bin. A saturation is strong only at its limit, and being at its limit as usual is no news."""
    if not present:
        return None
    if signal.limit is not None:
        beyond = level <= signal.limit if signal.bad == "down" else level >= signal.limit
        was = based and (baseline <= signal.limit if signal.bad == "down" else baseline >= signal.limit)
        if beyond:
            if based and z < CROSSED:
                # It crossed the limit, but no further than it moves anyway; a condition that held before still holds.
                return "weak" if signal.kind == "flag" and was else "absent"
            return "weak" if was else "strong"
        if signal.kind == "saturation":
            return "weak" if based and z >= STRONG else "absent"
    if signal.kind == "up" and level < 0.5 and not (based and baseline >= 0.5):
        return "weak"  # it was not up before either
    if not based:
        return None
    if signal.bad == "none":
        return "absent"
    collapsed = signal.kind == "rate" and signal.bad == "down" and z >= WEAK and level <= COLLAPSE * baseline
    if z >= STRONG or collapsed or (apart and z >= APART):  # what has stopped has stopped, however noisy it was
        return "strong"
    if z >= WEAK:
        return "weak"
    return "contrary" if z <= -STRONG else "absent"


def _unreachable(finding: Finding) -> bool:
    return finding.state in ("strong", "weak", "silent") or (finding.state is None and not finding.level >= 0.5)


def _heard(finding: Finding, packs: PackSet, deaf: set[str]) -> Finding:
    """Silence counts as its signal says, but not for a service that answers no scrape: then all its series are silent
    for that one reason."""
    if finding.state != "silent":
        return finding
    signal = packs.signals[finding.signal]
    if signal.kind == "up":
        return finding
    counts = None if signal.silent == "missing" or finding.service in deaf else signal.silent
    return replace(finding, state=counts, direction="silent")


def _with_harm(findings: tuple[Finding, ...], packs: PackSet, at_once: float) -> tuple[Finding, ...]:
    """Tells of each change whether its service's own symptoms began only some time after it, more than `at_once`
    seconds. Where one began no one knows when, or before the change, nobody can say."""
    begun: dict[str, float] = {}
    for finding in findings:
        if finding.state == "strong" and packs.groups[finding.group].symptom:
            # NaN stays NaN: min() of Python would lose it.
            begun[finding.service] = float(np.minimum(begun.get(finding.service, np.inf), finding.onset))
    return tuple(
        replace(f, harm="later") if f.bad and begun.get(f.service, np.nan) - f.onset > at_once else f for f in findings
    )


def host_name(address: str) -> str:
    """The name in an address: `payments` of `http://payments:8080/x`, `payments:8080` and `payments`."""
    name = address.rsplit("://", 1)[-1].split("/", 1)[0]
    head, colon, tail = name.rpartition(":")
    return head if colon and tail.isdigit() and ":" not in head else name
