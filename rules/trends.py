"""Sustained growth: whether a series rises (or falls) steadily, by how much, and when it will reach its limit.

Called by `rules.features` once all series are measured, for the signals that packs derive by the kind `trend`; all
series of a frame that are followed at once. Exists because a level tells a leak from nothing: what was raised once and
stays is used, what goes on growing is leaked. Never looks at causes.

The window is cut into at most twelve blocks, each stands for itself by its median, which takes out spikes and most of
the correlation of neighbouring samples. The slope is the median of the slopes between any two blocks (Theil, 1950;
Sen, J. Am. Stat. Assoc. 63, 1968); it is sustained if Mann and Kendall's test (Mann, Econometrica 13, 1945; normal
approximation with continuity correction) gives p <= 0.01 on both sides and nine in ten pairs of blocks agree in sign
(tau >= 0.8), which a single step does not: it orders hardly more than half of the pairs. The time since the onset is
asked first, then the whole window, since what leaks slowly leaked before the alert.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from rules.model import BoolArray, FloatArray, Frame, SeriesId, Situation
from rules.packs import PackSet, Signal, State

if TYPE_CHECKING:
    from rules.features import Finding

BLOCKS = 12
LEAST = 6  # so few blocks can be significant at all
CRITICAL = 2.576  # of the normal distribution, p = 0.01 on both sides
TAU = 0.8
SLIGHT, WEAK, STRONG = 1.0, 3.0, 6.0  # scales by which it rose
SOON_SECONDS, LATER_SECONDS = 4 * 3600.0, 24 * 3600.0  # to the limit: strong, weak


@dataclass(frozen=True, slots=True)
class Slopes:
    """One entry a series. `slope` per second, 0 where fewer than two blocks speak; `last`: median of the last block."""

    slope: FloatArray
    sustained: BoolArray
    span: FloatArray  # seconds over which it was seen
    last: FloatArray
    tested: BoolArray  # enough blocks to tell


def slopes(times: FloatArray, values: FloatArray, since: BoolArray, until: BoolArray) -> Slopes:
    """Of every row of `values` (NaN: no sample): in the samples `since` the onset, or, if it is not sustained there, in
    all `until` now where that is."""
    late, whole = _slopes(times[since], values[:, since]), _slopes(times[until], values[:, until])
    use = ~late.sustained & (whole.sustained | ~late.tested)
    return Slopes(
        np.where(use, whole.slope, late.slope),
        late.sustained | whole.sustained,
        np.where(use, whole.span, late.span),
        whole.last,
        late.tested | whole.tested,
    )


def _slopes(times: FloatArray, values: FloatArray) -> Slopes:
    rows, n = values.shape[0], times.shape[0]
    blocks = min(BLOCKS, n)
    if blocks < 2:
        nothing, no = np.zeros(rows), np.zeros(rows, dtype=bool)
        last = values[:, -1] if n else np.full(rows, np.nan)
        return Slopes(nothing, no, nothing, last, no)
    size = n // blocks
    at = times[n - blocks * size :].reshape(blocks, size).mean(axis=1)
    medians = _medians(values[:, n - blocks * size :].reshape(rows, blocks, size))
    first, second = np.triu_indices(blocks, 1)
    with np.errstate(all="ignore"):
        risen = medians[:, second] - medians[:, first]
        pairs = np.sort(risen / (at[second] - at[first]), axis=1)
        many = np.isfinite(pairs).sum(axis=1)
        spoke = np.isfinite(medians).sum(axis=1)
        score = np.abs(np.nansum(np.sign(risen), axis=1))
        deviation = np.sqrt(spoke * (spoke - 1) * (2 * spoke + 5) / 18.0)
        sustained = (spoke >= LEAST) & (score - 1 >= CRITICAL * deviation) & (score >= TAU * many)
    middle = np.take_along_axis(pairs, (many // 2)[:, None].clip(max=pairs.shape[1] - 1), axis=1)[:, 0]
    return Slopes(
        np.where((many > 0) & np.isfinite(middle), middle, 0.0),
        sustained,
        np.full(rows, float(at[-1] - at[0])),
        medians[:, -1],
        spoke >= LEAST,
    )


def _medians(blocks: FloatArray) -> FloatArray:
    """Of the last axis, NaN left out, the upper of two middle ones; by index, far faster than nanmedian."""
    if blocks.shape[2] == 1:
        return np.asarray(blocks[:, :, 0])
    ordered = np.sort(blocks, axis=2)
    count = np.isfinite(ordered).sum(axis=2)
    return np.asarray(
        np.take_along_axis(ordered, (count // 2).clip(max=blocks.shape[2] - 1)[:, :, None], axis=2)[:, :, 0]
    )


@dataclass(frozen=True, slots=True)
class Course:
    """How one measured series went: its finding, and its entries in `Slopes`."""

    finding: Finding
    slope: float
    sustained: bool
    span: float
    last: float
    tested: bool

    @classmethod
    def of(cls, finding: Finding, slopes: Slopes, i: int) -> Course:
        """Of the row `i`."""
        return cls(
            finding,
            float(slopes.slope[i]),
            bool(slopes.sustained[i]),
            float(slopes.span[i]),
            float(slopes.last[i]),
            bool(slopes.tested[i]),
        )


def trends_in(packs: PackSet) -> dict[str, list[tuple[str, Signal]]]:
    """The trend signals by the signal that each of them follows."""
    found: dict[str, list[tuple[str, Signal]]] = {}
    for name, signal in packs.signals.items():
        if signal.derive is not None and signal.derive.kind == "trend":
            found.setdefault(signal.derive.of[0], []).append((name, signal))
    return found


def trend_findings(
    frames: Iterable[Frame], findings: Mapping[SeriesId, Finding], situation: Situation, packs: PackSet
) -> list[Finding]:
    """A finding of every trend signal at every series that it follows; `findings` are those of the measured series.
    Where one series of a group is at its limit and can grow no further, that the others of its node do not grow says
    nothing."""
    followed = trends_in(packs)
    courses = _courses(frames, findings, situation, followed)
    found: list[tuple[Finding, Signal]] = []
    full: set[tuple[str, str]] = set()
    for measured, signals in followed.items():
        for course in (c for s, c in courses.items() if s.metric == measured):
            of = packs.signals[measured]
            for name, signal in signals:
                limit = _limit(signal, course, courses)
                beyond = of.limit if of.limit is not None else 0.95 * limit
                if course.last >= beyond if signal.bad == "up" else course.last <= beyond:
                    full.add((signal.group, course.finding.service))
                found.append((_found(name, signal, course, limit), signal))
    return [
        replace(f, state=None) if f.state == "absent" and f.direction == "flat" and (s.group, f.service) in full else f
        for f, s in found
    ]


def _courses(
    frames: Iterable[Frame],
    findings: Mapping[SeriesId, Finding],
    situation: Situation,
    followed: Mapping[str, list[tuple[str, Signal]]],
) -> dict[SeriesId, Course]:
    """Of every series that is followed, or is the limit of one that is; the first of a name counts."""
    limits = {s.derive.minus for signals in followed.values() for _, s in signals if s.derive is not None}
    found: dict[SeriesId, Course] = {}
    for frame in frames:
        rows = [i for i, s in enumerate(frame.ids) if s.metric in followed or s.metric in limits]
        if not rows:
            continue
        values = np.where(np.isfinite(frame.values[rows]), frame.values[rows], np.nan)
        until = frame.times <= situation.until
        seen = slopes(frame.times, values, until & (frame.times >= situation.onset), until)
        for at, row in enumerate(rows):
            found.setdefault(frame.ids[row], Course.of(findings[frame.ids[row]], seen, at))
    return found


def _limit(signal: Signal, course: Course, courses: Mapping[SeriesId, Course]) -> float:
    """The value at which the resource is used up, NaN if nobody knows: a constant, or the series of the same labels."""
    if signal.limit is not None:
        return signal.limit
    name = signal.derive.minus if signal.derive is not None else ""
    other = courses.get(SeriesId(name, course.finding.series.labels)) if name else None
    return other.last if other is not None else math.nan


def _found(name: str, signal: Signal, course: Course, limit: float) -> Finding:
    sign = -1.0 if signal.bad == "down" else 1.0
    rise = course.slope * course.span if course.sustained else 0.0
    scale = max(signal.floor, 0.05 * abs(course.last)) if math.isfinite(course.last) else signal.floor
    z = sign * rise / scale
    towards = course.sustained and z > 0 and math.isfinite(limit)
    left = max((limit - course.last) / course.slope, 0.0) if towards else math.nan
    known = course.tested and math.isfinite(course.last)
    return replace(
        course.finding,
        series=SeriesId(name, course.finding.series.labels),
        signal=name,
        group=signal.group,
        state=_state(z, left) if known else None,
        direction="flat" if abs(z) < SLIGHT else "up" if rise > 0 else "down",
        baseline=course.last - rise,
        scale=scale,
        level=course.last,
        z=z,
        slope=course.slope if course.sustained else 0.0,
        left=left,
        seasonal=False,
    )


def _state(z: float, left: float) -> State:
    if z >= STRONG or (z >= SLIGHT and left <= SOON_SECONDS):
        return "strong"
    if z >= WEAK or (z >= SLIGHT and left <= LATER_SECONDS):
        return "weak"
    return "contrary" if z <= -STRONG else "absent"


def told(finding: Finding, what: str, change: str, level: str) -> str:
    """`resident memory of orders grows by 12 MiB a minute, now 900 MiB, reaches its limit in 14 min`; `change` a minute
    and `level` now are with their unit."""
    if finding.direction == "flat":
        return f"{what} does not go on growing, {level}"
    text = f"{what} {'grows' if finding.slope > 0 else 'falls'} by {change} a minute, now {level}"
    if math.isfinite(finding.left):
        text += f", reaches its limit in {duration(finding.left)}"
    return text


def duration(seconds: float) -> str:
    """As a person says it: `40 s`, `14 min`, `3.5 h`, `6 days`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.3g} h" if seconds < 172800 else f"{seconds / 86400:.0f} days"
