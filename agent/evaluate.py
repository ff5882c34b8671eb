"""How good diagnosis is, measured on recorded incidents whose cause is known.

Called by `alertmedic evaluate` and by the accuracy tests. A recording goes through exactly the code that a live
incident goes through; its truth.json is read only here, and only after the diagnosis of that case is done. Nothing
here tunes anything.

AC@k is the share of cases whose truth is among the first k of a ranking, Avg@5 the mean of AC@1 to AC@5, as in the
literature on root cause analysis (Pham et al., ASE 2024). "Insufficient evidence" on a case with a fault is a miss at
every k. Specificity is the share of fault-free cases answered "insufficient evidence".
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from agent import baselines
from agent.engines import Engine, diagnosed
from agent.sources.recorded import RecordingError, read_recording
from rules.model import Diagnosis, Situation
from rules.packs import PackSet

LIMIT = 50  # hypotheses asked for: enough for five different services
BINS = 10
MAX_TRUTH_BYTES = 1 << 20


class Truth(msgspec.Struct, frozen=True):
    """truth.json. `service` None: nothing was wrong. `metrics` are the series that count as the true metric."""

    service: str | None
    fault: str
    metrics: tuple[str, ...] = ()
    extra: dict[str, Any] = {}


@dataclass(frozen=True, slots=True)
class Case:
    """A recording's directory and the set it belongs to (the directory above it)."""

    directory: Path
    set: str


@dataclass(frozen=True, slots=True)
class Ranking:
    """What was answered, as three rankings. `probability` is the posterior of everything at the first service
    together; None if there was no hypothesis at all."""

    ranked: bool
    services: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    metrics: tuple[str, ...]
    probability: float | None

    @classmethod
    def of(cls, diagnosis: Diagnosis) -> Ranking:
        found = diagnosis.hypotheses
        services = tuple(dict.fromkeys(h.service for h in found))
        series = (s for h in found for c in h.contributions if c.log_odds > 0 for s in c.series)
        return cls(
            ranked=diagnosis.verdict == "ranked",
            services=services,
            pairs=tuple(dict.fromkeys((h.service, h.fault) for h in found)),
            metrics=tuple(dict.fromkeys(series)),
            probability=math.fsum(h.posterior for h in found if h.service == services[0]) if services else None,
        )


@dataclass(frozen=True, slots=True)
class Scored:
    """One case's outcome. A rank counts from 1; None: not in the ranking, or the answer was "insufficient evidence"."""

    case: Case
    truth: Truth
    ranking: Ranking
    seconds: float
    service: int | None
    pair: int | None
    metric: int | None
    baselines: Mapping[str, tuple[int | None, int | None]] = field(default_factory=dict)  # ranks: service, metric


def find_cases(directories: Iterable[Path]) -> tuple[Case, ...]:
    """Every recording under the directories (a case, a set of cases or several sets), by path.

    Raises RecordingError where a directory holds none."""
    found: list[Case] = []
    for directory in directories:
        inside = sorted({path.parent.resolve() for path in directory.glob("**/alert.json")})
        if not inside:
            raise RecordingError(f"{directory}: no recording in it (a recording is a directory with alert.json)")
        found += [Case(path, path.parent.name) for path in inside]
    return tuple(dict.fromkeys(found))


def read_truth(directory: Path) -> Truth:
    """The answer of a recording. Raises RecordingError."""
    path = directory / "truth.json"
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(MAX_TRUTH_BYTES), type=Truth)
    except OSError as error:
        raise RecordingError(f"{path}: {error.strerror or error}") from error
    except msgspec.MsgspecError as error:
        raise RecordingError(f"{path}: {error}") from error


def evaluate(
    cases: Sequence[Case],
    packs: PackSet,
    progress: Callable[[Case], None] = lambda _: None,
    engine: Engine | None = None,
) -> tuple[Scored, ...]:
    """Diagnoses every case, its rules run by `engine` (None: the built-in one), then compares it with its truth. Raises
    RecordingError."""
    scored: list[Scored] = []
    for case in cases:
        begun = time.perf_counter()
        situation = read_recording(case.directory)
        ranking = Ranking.of(diagnosed(situation, packs, LIMIT, engine))
        seconds = time.perf_counter() - begun
        truth = read_truth(case.directory)
        others = baseline_ranks(situation, truth) if truth.service is not None else {}
        scored.append(replace(score(case, ranking, truth, seconds), baselines=others))
        progress(case)
    return tuple(scored)


def baseline_ranks(situation: Situation, truth: Truth) -> dict[str, tuple[int | None, int | None]]:
    """Where the true service and the true metric stand in the baselines' rankings."""
    found = {}
    for name, method in baselines.METHODS.items():
        order = [series for _, series in method(situation)]
        services = tuple(dict.fromkeys(series.service for series in order))
        found[name] = (_place(services, {truth.service}), _place([str(s) for s in order], set(truth.metrics)))
    return found


def score(case: Case, ranking: Ranking, truth: Truth, seconds: float) -> Scored:
    """Where the truth stands in each ranking."""
    return Scored(
        case=case,
        truth=truth,
        ranking=ranking,
        seconds=seconds,
        service=_rank(ranking, ranking.services, {truth.service}),
        pair=_rank(ranking, ranking.pairs, {(truth.service, truth.fault)}),
        metric=_rank(ranking, ranking.metrics, set(truth.metrics)),
    )


def report(scored: Sequence[Scored]) -> dict[str, Any]:
    """The figures as plain data: `sets`, by name, and `calibration`. Fractions; None where there is nothing to count.
    Fault-free cases of every set are counted together under `nofault`, by the system they came from."""
    faulty = [s for s in scored if s.truth.service is not None]
    calm = [s for s in scored if s.truth.service is None]
    sets: dict[str, Any] = {}
    for name in sorted({s.case.set for s in faulty}):
        of_set = [s for s in faulty if s.case.set == name]
        sets[name] = {
            "cases": len(of_set),
            "service": accuracy([s.service for s in of_set]),
            "pair": accuracy([s.pair for s in of_set]),
            "metric": accuracy([s.metric for s in of_set if s.truth.metrics]),
            "seconds_per_case": math.fsum(s.seconds for s in of_set) / len(of_set),
        }
        if all(s.baselines for s in of_set):
            sets[name]["baselines"] = {
                method: {
                    "service": accuracy([s.baselines[method][0] for s in of_set]),
                    "metric": accuracy([s.baselines[method][1] for s in of_set if s.truth.metrics]),
                }
                for method in baselines.METHODS
            }
    if calm:
        sources = sorted({_source(s) for s in calm})
        by_source = {name: specificity([s for s in calm if _source(s) == name]) for name in sources}
        seconds = math.fsum(s.seconds for s in calm) / len(calm)
        sets["nofault"] = {
            "cases": len(calm),
            "specificity": specificity(calm),
            "by_source": by_source,
            "seconds_per_case": seconds,
        }
    return {"sets": sets, "calibration": calibration(scored)}


def accuracy(ranks: Sequence[int | None]) -> dict[str, float | int | None]:
    """AC@1, AC@3, AC@5 and Avg@5 of the ranks, and how many there are."""
    if not ranks:
        return {"cases": 0, "ac1": None, "ac3": None, "ac5": None, "avg5": None}
    at = [sum(r is not None and r <= k for r in ranks) / len(ranks) for k in range(1, 6)]
    return {"cases": len(ranks), "ac1": at[0], "ac3": at[2], "ac5": at[4], "avg5": math.fsum(at) / 5}


def specificity(calm: Sequence[Scored]) -> float:
    return sum(not s.ranking.ranked for s in calm) / len(calm)


def calibration(scored: Sequence[Scored]) -> dict[str, float | int | None]:
    """Whether probabilities mean what they say: of the first service of every case that has one (fault-free cases too,
    where it is always wrong). `brier` is the mean squared error, `ece` the expected calibration error over ten
    bins of equal mass: mean of |mean probability - share that was right|, weighted by size."""
    pairs = sorted(
        (s.ranking.probability, s.ranking.services[0] == s.truth.service)
        for s in scored
        if s.ranking.probability is not None
    )
    if not pairs:
        return {"cases": 0, "brier": None, "ece": None}
    n = len(pairs)
    brier = math.fsum((p - right) ** 2 for p, right in pairs) / n
    edges = [round(i * n / BINS) for i in range(BINS + 1)]
    bins = [pairs[a:b] for a, b in pairwise(edges) if b > a]
    ece = math.fsum(abs(math.fsum(p for p, _ in b) - sum(right for _, right in b)) for b in bins) / n
    return {"cases": n, "brier": brier, "ece": ece}


def _rank(ranking: Ranking, order: Sequence[Any], right: set[Any]) -> int | None:
    return _place(order, right) if ranking.ranked else None


def _place(order: Sequence[Any], right: set[Any]) -> int | None:
    return next((i for i, item in enumerate(order, 1) if item in right), None)


def _source(scored: Scored) -> str:
    """The system a fault-free case was recorded on."""
    return str(scored.truth.extra.get("source", scored.case.set))
