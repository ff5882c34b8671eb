"""What the same time of earlier days leads to expect, so that a peak which comes every night is no anomaly, and its
absence is one.

Called by `rules.features` and `rules.derived` for situations that have a history (`Situation.history`); without one
nothing here runs. Pure arithmetic over features of both days.

A series is measured on each earlier day as it is today (same windows, same held level). Where it moved there, what was
added there is expected today:

    expected  baseline today + (level then - baseline then)
    scale     max(scale today, scale of the samples then, a tenth of what was added then)

and today is measured against that. Where it did not move, that day leads to expect today's own baseline. Of several
days the one counts that is nearest to what is seen: weekdays differ from Sundays, so a change is usual if any of the
days had it, and is missed only where all of them had it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from rules.model import Evidence, FloatArray, Frame, SeriesId, Situation

if TYPE_CHECKING:
    from rules.features import Features

MOVED = 3.0  # scales by which a series moved then, for that to be expected today
SWING = 0.1  # of what was added then is as much as peaks differ from day to day


@dataclass(frozen=True, slots=True, eq=False)
class Expected:
    """What one earlier day says of the series of one frame: `change` is level minus baseline then (0: it did not
    move), `scale` the scale of a comparison with it, `known` whether the day says anything of the series at all,
    `silent` whether it had no samples then either."""

    change: FloatArray
    scale: FloatArray
    known: np.ndarray[tuple[int], np.dtype[np.bool_]]
    silent: np.ndarray[tuple[int], np.dtype[np.bool_]]


def pasts_of(situation: Situation) -> tuple[Situation, ...]:
    """The situation of each earlier day, its times moved so that they line up with today's. What was seen there while
    an incident was open (`quiet`) is left out: what was wrong then is not what is usual."""
    return tuple(
        replace(
            situation,
            evidence=tuple(_moved(piece, past.offset, situation.quiet) for piece in past.evidence),
            history=(),
            quiet=(),
            spans=None,
            logs=None,
        )
        for past in situation.history
    )


def _moved(piece: Evidence, offset: float, quiet: Sequence[tuple[float, float]]) -> Evidence:
    times = piece.frame.times
    values = piece.frame.values
    for start, end in quiet:
        values = np.where((times >= start) & (times <= end), np.nan, values)
    return replace(piece, frame=Frame(times + offset, piece.frame.ids, values))


def aligned(ids: Sequence[SeriesId], frames: Sequence[Frame]) -> Frame | None:
    """The series `ids` as they are in `frames`, in that order, NaN where a series is not; None if there is none."""
    wanted = {series: i for i, series in enumerate(ids)}
    found = [(f, [(j, wanted[s]) for j, s in enumerate(f.ids) if s in wanted]) for f in frames]
    found = [(frame, rows) for frame, rows in found if rows]
    if not found:
        return None
    times = np.unique(np.concatenate([frame.times for frame, _ in found]))
    values = np.full((len(ids), times.shape[0]), np.nan)
    for frame, rows in found:
        at = np.searchsorted(times, frame.times)
        for there, here in rows:
            values[here, at] = frame.values[there]
    return Frame(times, tuple(ids), values)


def expectation(today: Features, then: Features, spread: FloatArray) -> Expected:
    """`spread`: the scale of the abnormal window's samples on the earlier day, NaN where there are none."""
    added = then.level - then.baseline
    known = then.sampled & then.present
    moved = known & (np.abs(added) >= MOVED * then.scale)
    change = np.where(moved, added, 0.0)
    scale = np.fmax.reduce([today.scale, spread, SWING * np.abs(change)])
    return Expected(change, np.where(moved, scale, today.scale), known | then.silent, then.silent)


def against(today: Features, days: Sequence[Expected], sign: FloatArray) -> Features:
    """Today's features, with baseline, scale and z of the day that is nearest to what is seen. `seasonal` tells which
    series are measured against such a day; their onset is to be found anew."""
    baseline, scale, z = today.baseline.copy(), today.scale.copy(), today.z.copy()
    nearest = np.full(z.shape, np.inf)
    seasonal = np.zeros(z.shape, dtype=bool)
    silent = today.silent.copy()
    for day in days:
        silent &= ~(day.known & day.silent)
        expected = today.baseline + day.change
        shift = (today.level - expected) / day.scale
        moved = day.change != 0.0
        there = np.where(moved, np.where(sign == 0, np.abs(shift), shift * sign), today.z)
        usable = day.known & ~day.silent & today.based & np.isfinite(there)
        closer = usable & (np.abs(there) < nearest)
        nearest = np.where(closer, np.abs(there), nearest)
        baseline = np.where(closer, expected, baseline)
        scale = np.where(closer & moved, day.scale, np.where(closer, today.scale, scale))
        z = np.where(closer, there, z)
        seasonal = np.where(closer, moved, seasonal)
    return replace(
        today, baseline=baseline, scale=scale, z=z, silent=silent, seasonal=seasonal, apart=today.apart & ~seasonal
    )
