"""Signals that nobody measures but that follow from measured ones over the call graph. Called by `rules.diagnose`.

A slow or failing service makes all of its callers slow or failing, so what a service *adds* tells more than what it
has:

    own_n(t) = (v_n r_n - sum over callees c of share(n, c) v_c r_c) / r_entry
    share(n, c) = r_n / sum of r over the callers of c

with v the value of a request (seconds, or the part that failed) and r the requests: what all of n's requests cost, less
what its callees cost them, for each request of the alerting service. A callee that had no requests before the onset is
not subtracted: who began to call it answers for it. Own changes add up along the graph, so that a service's share of
all that was added is how much of the trouble it explains.

These series go through `rules.features` like any other. What follows from spans and logs is in `rules.traces`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rules.features import WEAK, Finding, Traits, finding_of, frames_of, measure_with
from rules.model import BoolArray, FloatArray, Frame, SeriesId, Situation
from rules.packs import Derivation, PackSet, Signal, State
from rules.seasons import pasts_of
from rules.traces import trace_findings

KNOWN_BEFORE = 0.25  # of the normal samples with requests make a callee known


@dataclass(frozen=True, slots=True)
class _Grid:
    """The measured series on one time grid: `rows[signal][service]` for those with no label but the service."""

    frame: Frame
    normal: BoolArray
    rows: Mapping[str, Mapping[str, FloatArray]]
    counted: Mapping[str, bool]  # whether a signal counts per second (or per sample)

    @classmethod
    def of(cls, frame: Frame, situation: Situation, signals: Mapping[str, Signal]) -> _Grid:
        rows: dict[str, dict[str, FloatArray]] = {}
        for i, series in enumerate(frame.ids):
            if series.service and len(series.labels) == 1:
                rows.setdefault(series.metric, {}).setdefault(series.service, frame.values[i])
        counted = {name: signals[name].unit == "per_s" for name in rows}
        return cls(frame, frame.times < situation.onset, rows, counted)

    def first(self, names: Iterable[str]) -> Mapping[str, FloatArray]:
        """The rows of the first of these signals that any service has."""
        return next((self.rows[name] for name in names if self.rows.get(name)), {})

    def per_sample(self, names: Iterable[str]) -> float:
        """By what requests are multiplied to be counts a sample."""
        name = next((name for name in names if self.rows.get(name)), "")
        steps = np.diff(self.frame.times)
        return float(np.median(steps)) if steps.size and self.counted.get(name) else 1.0


def derived_findings(situation: Situation, packs: PackSet) -> tuple[Finding, ...]:
    """Findings of every derived signal whose ingredients are there, ordered by series."""
    with np.errstate(all="ignore"):  # what overflows is no number, and `measure` takes that for no sample
        found = _derived(situation, packs)
    return tuple(found[s] for s in sorted(found, key=lambda s: (s.metric, s.labels)))


def _derived(situation: Situation, packs: PackSet) -> dict[SeriesId, Finding]:
    derived = {name: s for name, s in packs.signals.items() if s.derive is not None}
    found: dict[SeriesId, Finding] = {}
    days = [(past, [frame for frame, _ in _frames(past, packs, derived)]) for past in pasts_of(situation)]
    for frame, noise in _frames(situation, packs, derived):
        for finding in _measured(frame, noise, situation, derived, days):
            found.setdefault(finding.series, finding)
    for name, signal in sorted(derived.items()):
        if signal.derive is not None and signal.derive.kind == "share":
            parts = [f for f in found.values() if f.signal in signal.derive.of]
            for finding in _shares(name, signal, parts):
                found[finding.series] = finding
    for finding in trace_findings(situation, derived):
        found.setdefault(finding.series, finding)
    return found


def _frames(
    situation: Situation, packs: PackSet, derived: Mapping[str, Signal]
) -> Iterator[tuple[Frame, dict[SeriesId, float]]]:
    """The derived series of each grid, and the noise that some of them have by their nature."""
    for frame in frames_of(situation.evidence, packs) if derived else ():
        grid = _Grid.of(frame, situation, packs.signals)
        rows: dict[SeriesId, FloatArray] = {}
        noise: dict[SeriesId, float] = {}
        for name, signal in sorted(derived.items()):
            if signal.derive is not None and signal.derive.kind == "own":
                rows |= _own(name, signal.derive, grid, situation)
            elif signal.derive is not None and signal.derive.kind == "difference":
                rows |= _difference(name, signal.derive, grid)
            elif signal.derive is not None and signal.derive.kind == "per_request":
                rows |= _per_request_of(name, signal.derive, grid)
            elif signal.derive is not None and signal.derive.kind == "calls":
                for series, row, deviation in _calls(name, signal, grid, situation):
                    rows[series], noise[series] = row, deviation
        if rows:
            yield Frame(frame.times, tuple(rows), np.vstack(list(rows.values()))), noise


def _measured(
    frame: Frame,
    noise: Mapping[SeriesId, float],
    situation: Situation,
    signals: Mapping[str, Signal],
    days: Sequence[tuple[Situation, Sequence[Frame]]],
) -> list[Finding]:
    of = [signals[s.metric] for s in frame.ids]
    traits = Traits.of(of)
    floor = np.maximum(traits.floor, [noise.get(series, 0.0) for series in frame.ids])
    features = measure_with(frame, replace(traits, floor=floor), situation, days)
    return [finding_of(s, signal, features, i) for i, (s, signal) in enumerate(zip(frame.ids, of, strict=True))]


def _own(name: str, derive: Derivation, grid: _Grid, situation: Situation) -> dict[SeriesId, FloatArray]:
    """One series a service that has the value; see the module's formula. Nothing without requests to weigh by."""
    values, traffic = grid.first(derive.of), grid.first(derive.traffic)
    if not values or not traffic or not grid.normal.any():
        return {}
    requests = {s: np.nan_to_num(row) for s, row in traffic.items()}
    worth = {s: np.nan_to_num(_lack(row, derive)) for s, row in values.items()}
    total = {s: row * requests[s] for s, row in worth.items() if s in requests}
    callers: dict[str, set[str]] = {}
    callees: dict[str, set[str]] = {}
    for caller, callee in situation.topology.edges:
        if caller != callee:
            callers.setdefault(callee, set()).add(caller)
            callees.setdefault(caller, set()).add(callee)
    known = {s for s in total if (requests[s][grid.normal] > 0).mean() >= KNOWN_BEFORE}
    into = {s: _sum([requests[c] for c in callers.get(s, ()) if c in requests]) for s in total}
    per = _per_request(requests, situation.entry, grid.normal)
    if derive.relative:
        per = per * _usual(_lack(values.get(situation.entry, np.empty(0)), derive), worth, grid.normal)
    found: dict[SeriesId, FloatArray] = {}
    counts = grid.per_sample(derive.traffic)
    for service in sorted(known):
        if np.median(requests[service][grid.normal]) * counts < derive.enough:
            continue
        parts = [
            total[c] * requests[service] / np.maximum(into[c], 1e-12) for c in callees.get(service, ()) if c in known
        ]
        row = total[service] - _sum(parts) if parts else total[service]
        found[SeriesId.of(name, {"service": service})] = row / per
    return found


def _lack(row: FloatArray, derive: Derivation) -> FloatArray:
    return row if derive.full is None else np.maximum(derive.full - row, 0.0) / derive.full


def _sum(rows: Sequence[FloatArray]) -> FloatArray:
    """Sum in order of size, so that the services' names change no bit."""
    return np.asarray(np.sort(np.vstack(rows), axis=0).sum(axis=0)) if rows else np.zeros(1)


def _per_request(requests: Mapping[str, FloatArray], entry: str, normal: BoolArray) -> FloatArray:
    """The alerting service's requests, or the busiest one's if nobody counts those; never under a tenth of usual."""
    usual = {s: float(np.median(row[normal])) for s, row in requests.items()}
    at = entry if usual.get(entry, 0.0) > 0 else max(usual, key=lambda s: usual[s])
    return np.maximum(requests[at], max(0.1 * usual[at], 1e-9))


def _usual(entry: FloatArray, worth: Mapping[str, FloatArray], normal: BoolArray) -> float:
    """The usual value at the alerting service; if it has none, the largest usual value of any."""
    medians = [float(np.nanmedian(row[normal])) for row in (entry,) if row.size and np.isfinite(row[normal]).any()]
    if not medians or medians[0] <= 0:
        medians = [max((float(np.median(row[normal])) for row in worth.values()), default=0.0)]
    return max(medians[0], 1e-9)


def _difference(name: str, derive: Derivation, grid: _Grid) -> dict[SeriesId, FloatArray]:
    """`of` minus `minus` for every set of labels that has both."""
    rows = {s: grid.frame.values[i] for i, s in enumerate(grid.frame.ids) if s.metric in (*derive.of, derive.minus)}
    return {
        SeriesId(name, s.labels): row - rows[SeriesId(derive.minus, s.labels)]
        for s, row in rows.items()
        if s.metric in derive.of and SeriesId(derive.minus, s.labels) in rows
    }


def _calls(name: str, signal: Signal, grid: _Grid, situation: Situation) -> list[tuple[SeriesId, FloatArray, float]]:
    """Calls for each request of the caller, to every callee that nobody else calls, and their shot noise: the deviation
    of a mean of Poisson counts over the half of the abnormal samples that a level must hold."""
    derive = signal.derive
    traffic = grid.first(derive.traffic) if derive is not None else {}
    callers: dict[str, set[str]] = {}
    for caller, callee in situation.topology.edges:
        if caller != callee:
            callers.setdefault(callee, set()).add(caller)
    counts = grid.per_sample(derive.traffic) if derive is not None else 1.0
    held = max(int((~grid.normal).sum()) / 2.0, 1.0)
    found = []
    for callee, by in sorted(callers.items()):
        caller = min(by)
        if len(by) != 1 or callee not in traffic or caller not in traffic:
            continue
        made, asked = traffic[callee], traffic[caller]
        row = np.where(asked > 0, made / np.where(asked > 0, asked, 1.0), np.nan)
        usual_made, usual_asked = (
            float(np.nanmedian(v[grid.normal])) if np.isfinite(v[grid.normal]).any() else 0.0 for v in (made, asked)
        )
        if usual_made <= 0 or usual_asked <= 0:
            continue
        deviation = (usual_made * counts / held) ** 0.5 / (usual_asked * counts)
        found.append((SeriesId.of(name, {"service": caller, signal.peer: callee}), row, deviation))
    return found


def _per_request_of(name: str, derive: Derivation, grid: _Grid) -> dict[SeriesId, FloatArray]:
    """`of` for each request, of every service with enough of them; relative to its own usual value."""
    values, traffic = grid.first(derive.of), grid.first(derive.traffic)
    found: dict[SeriesId, FloatArray] = {}
    counts = grid.per_sample(derive.traffic)
    for service in sorted(values.keys() & traffic.keys()):
        requests = np.nan_to_num(traffic[service])
        if not grid.normal.any() or np.median(requests[grid.normal]) * counts < max(derive.enough, 1.0):
            continue
        row = np.where(requests > 0, values[service] / np.where(requests > 0, requests, 1.0), np.nan)
        usual = float(np.nanmedian(row[grid.normal])) if np.isfinite(row[grid.normal]).any() else 0.0
        if usual > 0:
            found[SeriesId.of(name, {"service": service})] = row / usual
    return found


def _shares(name: str, signal: Signal, parts: Sequence[Finding]) -> list[Finding]:
    """Each service's part of all significant growth of the own signal. Nothing has grown: no shares."""
    grown = {f.service: max(f.level - f.baseline, 0.0) for f in parts if f.z >= WEAK}
    whole = float(np.sort(np.array(list(grown.values()))).sum()) if grown else 0.0
    if whole <= 0:
        return []
    found = []
    for part in parts:
        share = grown.get(part.service, 0.0) / whole
        z = share / signal.floor
        state: State = "strong" if z >= 2 * WEAK else "weak" if z >= WEAK else "absent"
        found.append(
            Finding(
                series=SeriesId(name, part.series.labels),
                signal=name,
                group=signal.group,
                service=part.service,
                peer="",
                state=state,
                direction="up" if z >= WEAK else "flat",
                baseline=0.0,
                scale=signal.floor,
                level=share,
                z=z,
                onset=part.onset,
            )
        )
    return found
