"""Which label values explain a change: one instance, one version, one zone, one batch of hardware, one handler.

Called by `rules.anyalert` with one number before and one after for every series of an expression. Pure arithmetic over
label combinations; never looks at names, so that consistently renamed labels give the same answer.

For a combination S (one value for each of at most three labels), with b and a the series' values before and after:

    explanatory power   EP(S) = sum over S of (a - b) / sum over all of (a - b)
    surprise            JS(S) = (p log(2 p / (p + q)) + q log(2 q / (p + q))) / 2,  p = b(S) / b(all), q = a(S) / a(all)
    fit                 PS(S) = 1 - sum |a - e| / sum |a - b|,  e = b * a(S) / b(S) within S, b outside

EP and JS are those of Adtributor (Bhagwan et al., NSDI 2014, equations 2 and 6), PS is the potential score of HotSpot
(Sun et al., IEEE Access 2018): what the change would look like if S had changed, all of it alike, and nothing else. The
best is the largest PS, less PARSIMONY for every label after the first; combinations of the same series are one answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rules.model import BoolArray, FloatArray

MAX_SERIES = 2_000  # the rest, with the smallest changes, is left out of the search
MAX_LABELS = 16
MAX_DEPTH = 3
BEAM = 40  # combinations of each size that are refined further
PARSIMONY = 0.05  # of fit that one more label must bring
FITS = 0.6
POWER = 0.67  # of the change: Adtributor's threshold
MOST = 0.5  # of the series: what concerns more than half is not one of many
ALIKE = 0.8
MIN_SERIES = 3
LARGEST = 1e150  # so that no sum overflows


@dataclass(frozen=True, slots=True)
class Explanation:
    """A combination of label values. `also` are other labels that single out the same series; `series` of `of` series
    have these values. `power`, `fit` as above, in fractions; `surprise` in nats."""

    labels: tuple[tuple[str, str], ...]
    also: tuple[tuple[str, str], ...]
    power: float
    fit: float
    surprise: float
    series: int
    of: int


@dataclass(frozen=True, slots=True)
class Drilldown:
    """`best`: what explains the change, None if no combination stands out. `alike`: the fit of "all series changed in
    the same proportion", in fractions. `of`: series that were looked at."""

    best: Explanation | None
    alike: float
    of: int

    @property
    def even(self) -> bool:
        """Whether all series changed alike, so that what they share is to blame."""
        return self.best is None and self.of >= MIN_SERIES and self.alike >= ALIKE


def drill(labels: Sequence[Mapping[str, str]], before: FloatArray, after: FloatArray) -> Drilldown:
    """`labels`: of each series; `before`, `after`: (series,), NaN where there is none (taken for 0). Fewer than three
    series, or none that changed: nothing to explain."""
    b, a = (np.clip(np.nan_to_num(x, posinf=0.0, neginf=0.0), -LARGEST, LARGEST) for x in (before, after))
    change = a - b
    if change.shape[0] > MAX_SERIES:
        kept = np.sort(np.argsort(-np.abs(change), kind="stable")[:MAX_SERIES])
        labels, b, a, change = [labels[i] for i in kept], b[kept], a[kept], change[kept]
    n = change.shape[0]
    scale = float(np.abs(change).sum())
    if n < MIN_SERIES or scale <= 1e-9 * float(np.abs(b).sum() + np.abs(a).sum()) or not math.isfinite(scale):
        return Drilldown(None, 0.0, n)
    masks = _elements(labels, b, a)
    found = _search(masks, b, a)
    alike = _fit(np.ones(n, dtype=bool), b, a, scale)
    total = float(change.sum())
    best: Explanation | None = None
    for score, combination, mask in found:
        power = float(change[mask].sum()) / total if total else 0.0
        if power < POWER or score < max(FITS, alike):
            continue  # "all of them alike" is the simplest explanation of all
        also = tuple(sorted(pair for pair, other in masks.items() if pair not in combination and _same(mask, other)))
        fit = _fit(mask, b, a, scale)
        surprise = _surprise(mask, b, a)
        best = Explanation(tuple(sorted(combination)), also, power, fit, surprise, int(mask.sum()), n)
        break
    return Drilldown(best, alike, n)


Combination = tuple[tuple[str, str], ...]


def _elements(labels: Sequence[Mapping[str, str]], b: FloatArray, a: FloatArray) -> dict[tuple[str, str], BoolArray]:
    """Per label value which series have it; labels that all series share tell nothing. The labels of which one
    value's share moved furthest are kept."""
    values: dict[str, dict[str, list[int]]] = {}
    for i, of in enumerate(labels):
        for name, value in of.items():
            values.setdefault(name, {}).setdefault(value, []).append(i)
    telling = [name for name, by in values.items() if len(by) > 1 or len(next(iter(by.values()))) < len(labels)]
    moved = {name: _moved(list(values[name].values()), b, a) for name in telling}
    rows = {name: sorted(map(tuple, values[name].values())) for name in telling}
    telling.sort(key=lambda name: (-round(moved[name], 12), len(rows[name]), rows[name]))
    masks: dict[tuple[str, str], BoolArray] = {}
    for name in telling[:MAX_LABELS]:
        for value, at in values[name].items():
            mask = np.zeros(len(labels), dtype=bool)
            mask[at] = True
            masks[name, value] = mask
    return masks


def _search(
    masks: Mapping[tuple[str, str], BoolArray], b: FloatArray, a: FloatArray
) -> list[tuple[float, Combination, BoolArray]]:
    """Combinations of at most half of the series by score, best first; those of the same series are one, the one with
    the fewest labels. Breadth first: what explains little is not refined (its parts explain less)."""
    scale = float(np.abs(a - b).sum())
    n = b.shape[0]
    scored: dict[bytes, tuple[float, Combination, BoolArray]] = {}
    level: list[tuple[Combination, BoolArray]] = [((pair,), mask) for pair, mask in masks.items()]
    for depth in range(1, MAX_DEPTH + 1):
        ranked: list[tuple[float, Combination, BoolArray]] = []
        for combination, mask in level:
            key = mask.tobytes()
            if key in scored or not mask.any():
                continue
            score = _fit(mask, b, a, scale) - PARSIMONY * (depth - 1)
            scored[key] = (score, combination, mask)
            covered = float(np.abs((a - b)[mask]).sum()) / scale
            ranked.append((covered, combination, mask))
        ranked.sort(key=lambda item: (-round(item[0], 12), int(item[2].sum()), item[2].tobytes()))
        seeds = [(combination, mask) for covered, combination, mask in ranked[:BEAM] if covered >= POWER / 2]
        level = [
            ((*combination, pair), mask & other)
            for combination, mask in seeds
            for pair, other in masks.items()
            if all(pair[0] != name for name, _ in combination)
        ]
    small = [item for item in scored.values() if item[2].sum() <= MOST * n]
    small.sort(key=lambda item: (-round(item[0], 12), len(item[1]), int(item[2].sum()), item[2].tobytes()))
    return small


def _fit(mask: BoolArray, b: FloatArray, a: FloatArray, scale: float) -> float:
    """PS. Where nothing was there before, the change is expected to be shared out evenly."""
    base, total = float(b[mask].sum()), float(a[mask].sum())
    expected = b.copy()
    if base > 1e-12 * total >= 0 and base > 0:
        expected[mask] = b[mask] * (total / base)
    else:
        expected[mask] = b[mask] + (total - base) / int(mask.sum())
    return max(0.0, 1.0 - float(np.abs(a - expected).sum()) / scale)


def _surprise(mask: BoolArray, b: FloatArray, a: FloatArray) -> float:
    """JS of the shares before and after, of what is there at all."""
    whole_before, whole_after = float(np.abs(b).sum()), float(np.abs(a).sum())
    p = float(np.abs(b[mask]).sum()) / whole_before if whole_before else 0.0
    q = float(np.abs(a[mask]).sum()) / whole_after if whole_after else 0.0
    terms = [x * math.log(2 * x / (p + q)) for x in (p, q) if x > 0]
    return max(0.0, 0.5 * math.fsum(terms))


def _moved(rows: list[list[int]], b: FloatArray, a: FloatArray) -> float:
    """How far the share of that value of a label moved which moved furthest."""
    before, after = np.abs(b), np.abs(a)
    whole_before, whole_after = float(before.sum()), float(after.sum())
    if not whole_after:
        before, after, whole_before, whole_after = after, before, whole_after, whole_before
    largest = max(
        (
            float(after[at].sum()) / whole_after - (float(before[at].sum()) / whole_before if whole_before else 0.0)
            for at in rows
        ),
        default=0.0,
        key=abs,
    )
    return abs(largest)


def _same(one: BoolArray, other: BoolArray) -> bool:
    return bool((one == other).all())
