"""Diagnosis against what it must not be much slower than, and against exact inference by pgmpy.

* scoring: 100 hypotheses with 200 pieces of evidence by the compiled log-odds matrix, against pgmpy's exact query on
  the same model (variable elimination), and against the bare matrix product of the same size.
* features: 1,000 series of 240 points, against one np.nanpercentile pass for three quantiles over the same matrix.
* case: the largest recording at hand with spans and log lines, read and diagnosed, against merely decompressing and
  parsing its files (csv, orjson).

Each pair is run in turn, many times, and the ratio is that of the medians: the machine may be busy.

    python -m bench.diagnosis [seconds]
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from agent.packs import load_packs
from agent.sources.recorded import read_recording
from rules.bayes import Model, posteriors
from rules.diagnose import diagnose
from rules.features import Traits, measure
from rules.model import Frame, SeriesId, Situation
from rules.packs import STATES, Signal
from rules.trends import slopes

ROOT = Path(__file__).resolve().parent.parent
RECORDINGS = (ROOT.parent / "shared" / "rca" / "trainticket", ROOT / "rules" / "golden")
HYPOTHESES, EVIDENCE = 100, 200
SERIES, POINTS = 1000, 240


def interleaved(seconds: float, **runs: Callable[[], object]) -> dict[str, float]:
    """Median seconds of each, run in turn until the time is over, at least five rounds."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(taken.values()))) < 5:
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values) for name, values in taken.items()}


def scoring(seconds: float) -> dict[str, Any]:
    """One variable with a state for every hypothesis and one for "something else", and evidence that all share."""
    rng = np.random.default_rng(1)
    tables = rng.dirichlet(np.ones(3), size=(EVIDENCE, HYPOTHESES + 1))  # P(state | hypothesis), the last is the rest
    prior = rng.dirichlet(np.ones(HYPOTHESES + 1))
    seen = rng.integers(0, 3, size=EVIDENCE)
    weights = np.zeros((HYPOTHESES, EVIDENCE, len(STATES) + 1))
    weights[:, :, :3] = np.log(tables[:, :HYPOTHESES] / tables[:, HYPOTHESES:]).transpose(1, 0, 2)
    model = Model(
        tuple(f"h{i:03d}" for i in range(HYPOTHESES)),
        tuple((f"e{j:03d}", "self") for j in range(EVIDENCE)),
        np.log(prior[:HYPOTHESES] / prior[HYPOTHESES]),
        weights,
        np.zeros((HYPOTHESES, EVIDENCE), dtype=bool),
    )
    rows = np.arange(HYPOTHESES, dtype=np.intp)
    states = np.tile(seen.astype(np.intp), (HYPOTHESES, 1))  # of every candidate, as `rules.diagnose` fills it

    def ours() -> Any:
        return posteriors(model.prior + model.contributions(rows, states).sum(axis=1))

    exact = _pgmpy(tables, prior, seen)
    difference = float(np.abs(ours() - exact()).max())
    one_hot = np.zeros((EVIDENCE * 3,))
    one_hot[np.arange(EVIDENCE) * 3 + seen] = 1.0
    flat = np.ascontiguousarray(weights[:, :, :3].reshape(HYPOTHESES, -1))

    def product() -> Any:
        return flat @ one_hot

    against = interleaved(seconds / 2, ours=ours, pgmpy=exact)
    beside = interleaved(seconds / 2, ours=ours, product=product)
    return {
        "times_faster_than_pgmpy": against["pgmpy"] / against["ours"],
        "of_the_matrix_product": beside["ours"] / beside["product"],
        "largest_difference": difference,
        "microseconds": against["ours"] * 1e6,
    }


def _pgmpy(tables: Any, prior: Any, seen: Any) -> Callable[[], Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pgmpy.factors.discrete import TabularCPD
        from pgmpy.inference import VariableElimination
        from pgmpy.models import DiscreteBayesianNetwork
    names = [f"h{i:03d}" for i in range(HYPOTHESES + 1)]
    network = DiscreteBayesianNetwork()
    network.add_node("wrong")
    network.add_cpds(TabularCPD("wrong", len(names), [[p] for p in prior], state_names={"wrong": names}))
    for j in range(EVIDENCE):
        network.add_edge("wrong", f"e{j:03d}")
        network.add_cpds(
            TabularCPD(
                f"e{j:03d}",
                3,
                tables[j].T.tolist(),
                evidence=["wrong"],
                evidence_card=[len(names)],
                state_names={f"e{j:03d}": list(STATES[:3]), "wrong": names},
            )
        )
    evidence = {f"e{j:03d}": STATES[int(s)] for j, s in enumerate(seen)}
    inference = VariableElimination(network)

    def query() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answer = inference.query(["wrong"], evidence=evidence, show_progress=False)
        at = [answer.state_names["wrong"].index(name) for name in names[:HYPOTHESES]]
        return np.asarray(answer.values)[at]

    return query


def features(seconds: float) -> dict[str, Any]:
    rng = np.random.default_rng(2)
    values = rng.normal(10, 1, (SERIES, POINTS))
    values[rng.random(values.shape) < 0.02] = np.nan
    values[::7, 200:] += 20
    times = 1_700_000_000.0 + 15.0 * np.arange(POINTS)
    frame = Frame(times, tuple(SeriesId.of("m", {"service": f"s{i}"}) for i in range(SERIES)), values)
    signal = Signal(kind="latency", bad="up", floor=0.05, group="g")
    situation = Situation((), "s0", float(times[200]), float(times[-1]))
    traits = Traits.of([signal] * SERIES)
    taken = interleaved(
        seconds,
        ours=lambda: measure(frame, traits, situation),
        trends=lambda: slopes(times, values, times >= situation.onset, times <= situation.until),
        percentiles=lambda: np.nanpercentile(values, [25, 50, 75], axis=1),
    )
    return {
        "of_one_nanpercentile_pass": taken["ours"] / taken["percentiles"],
        "milliseconds": taken["ours"] * 1e3,
        "with_trends_of_all": (taken["ours"] + taken["trends"]) / taken["percentiles"],
    }


def case(seconds: float) -> dict[str, Any]:
    found = [p.parent for root in RECORDINGS for p in sorted(root.glob("*/traces.jsonl.gz"))]
    if not found:
        return {"not_measured": "no recording with spans at hand"}
    directory = max(found, key=lambda d: sum(f.stat().st_size for f in d.iterdir()))
    packs = load_packs()

    def parse() -> None:
        for path in directory.iterdir():
            body = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            if path.name == "series.csv.gz":
                list(csv.reader(io.StringIO(body.decode(), newline="")))
            elif path.suffix == ".gz":
                for line in body.splitlines():
                    orjson.loads(line)
            elif path.suffix == ".json":
                orjson.loads(body)

    taken = interleaved(seconds, ours=lambda: diagnose(read_recording(directory), packs), parsed=parse)
    return {
        "of_merely_parsing": taken["ours"] / taken["parsed"],
        "milliseconds": taken["ours"] * 1e3,
        "milliseconds_parsing": taken["parsed"] * 1e3,
    }


def bench(seconds: float) -> dict[str, Any]:
    return {"scoring": scoring(seconds / 3), "features": features(seconds / 3), "case": case(seconds / 3)}


if __name__ == "__main__":
    print(json.dumps(bench(float(sys.argv[1]) if len(sys.argv) > 1 else 18.0), indent=2))
