"""Accuracy floors on the public recordings, where they are at hand: RCA_RECORDINGS names their directory, else
they are looked for beside the checkout. Floors lie below what is measured (docs/diagnosis.md): only a loss fails."""

from __future__ import annotations

import gzip
import os
import random
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from agent.crossval import cross_validate
from agent.evaluate import LIMIT, evaluate, find_cases, report
from agent.packs import load_bare_packs, load_packs
from agent.sources.recorded import read_recording
from rules.diagnose import diagnose

ROOT = Path(os.environ.get("RCA_RECORDINGS") or Path(__file__).parents[3] / "shared" / "rca")
SETS = ("petshop", "trainticket", "onlineboutique", "sockshop", "nofault")
pytestmark = pytest.mark.skipif(
    not all((ROOT / name).is_dir() for name in SETS), reason="no recordings; set RCA_RECORDINGS"
)
# AC@1 and AC@3 by service, AC@1 by (service, fault type): what the issue asks for when cross-validated without the true
# service. They hold for the shipped model and from other systems alone as well.
FLOORS = {
    "petshop": (24 / 26, 26 / 26, 0.85),
    "trainticket": (23 / 24, 24 / 24, 0.85),
    "onlineboutique": (21 / 24, 23 / 24, 0.75),
    "sockshop": (1.0, 1.0, 0.95),
}
WAYS = ("shipped", "service", "system")


@cache
def figures(way: str) -> dict[str, Any]:
    cases = find_cases([ROOT])
    if way == "shipped":
        return report(evaluate(cases, load_packs()))
    found: dict[str, Any] = cross()[way]
    return found


@cache
def cross() -> dict[str, Any]:
    return cross_validate(find_cases([ROOT]), load_bare_packs(), unlicensed=("sockshop",))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FLOORS)
def test_accuracy(name: str, way: str) -> None:
    found, (first, third, pair) = figures(way)["sets"][name], FLOORS[name]
    assert found["service"]["ac1"] >= first - 1e-9
    assert found["service"]["ac3"] >= third - 1e-9
    assert found["pair"]["ac1"] >= pair


@pytest.mark.parametrize("way", WAYS)
def test_never_below_the_baselines(way: str) -> None:
    for name in FLOORS:
        for of in figures("shipped")["sets"][name]["baselines"].values():
            for level in ("service", "metric"):
                for k in ("ac1", "ac3", "ac5", "avg5"):
                    ours, theirs = figures(way)["sets"][name][level][k], of[level][k]
                    if theirs is not None:
                        assert ours > theirs or ours == theirs == 1.0, (name, level, k)


def test_the_baselines_are_the_published_ones() -> None:
    """As measured by others on the same cases (the recordings' README)."""
    n_sigma = {n: f["baselines"]["n_sigma"]["service"] for n, f in figures("shipped")["sets"].items() if n in FLOORS}
    assert [round(n_sigma[n]["ac1"], 3) for n in FLOORS] == [0.192, 0.042, 0.75, 1.0]
    assert [round(n_sigma[n]["avg5"], 3) for n in FLOORS] == [0.423, 0.167, 0.842, 1.0]
    baro = figures("shipped")["sets"]["onlineboutique"]["baselines"]["baro"]["service"]
    assert [round(baro[k], 3) for k in ("ac1", "ac3", "ac5")] == [0.75, 0.875, 0.917]


@pytest.mark.parametrize("way", WAYS)
def test_the_true_metric_comes_first(way: str) -> None:
    assert figures(way)["sets"]["sockshop"]["metric"]["ac1"] == 1.0


@pytest.mark.parametrize("way", WAYS)
def test_no_cause_where_there_is_none(way: str) -> None:
    assert min(figures(way)["sets"]["nofault"]["by_source"].values()) >= 0.9


@pytest.mark.parametrize("way", WAYS)
def test_probabilities_mean_what_they_say(way: str) -> None:
    assert figures(way)["calibration"]["ece"] <= 0.10
    assert figures(way)["calibration"]["brier"] <= 0.05


def renamed(directory: Path, to: Path, names: dict[str, str]) -> None:
    """A copy in which every service has another name in every file, and truth.json is missing."""
    pattern = re.compile("|".join(re.escape(n) for n in sorted(names, key=len, reverse=True)))
    for path in directory.iterdir():
        if path.name == "truth.json":
            continue
        body = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        body = pattern.sub(lambda m: names[m[0]], body.decode()).encode()
        (to / path.name).write_bytes(gzip.compress(body, 1) if path.suffix == ".gz" else body)


def every_case() -> list[Any]:
    """All recordings; outside of `make test-full` a seeded few of each set."""
    found = []
    for name in SETS:
        directories = sorted(d for d in (ROOT / name).glob("*") if d.is_dir())
        few = set(random.Random(7).sample(directories, min(2, len(directories))))
        found += [
            pytest.param(d, id=f"{name}-{d.name}", marks=() if d in few else pytest.mark.full) for d in directories
        ]
    return found


@pytest.mark.parametrize("directory", every_case())
def test_names_and_the_truth_mean_nothing(directory: Path, tmp_path: Path) -> None:
    """Without truth.json, and with every service called otherwise in every file (kinds and suffixes in its name too),
    every hypothesis stands in the same place with the same figures, ties included."""
    before = read_recording(directory)
    services = set(before.topology.services()) | {s.service for e in before.evidence for s in e.frame.ids}
    services |= set(before.spans.services if before.spans else ())
    rng = random.Random(directory.name)
    codes = rng.sample(range(10**6), len(services))
    names = {s: f"n{code:06d}x" for s, code in zip(sorted(services - {""}), codes, strict=False)}
    renamed(directory, tmp_path, names)
    packs = load_packs()
    was, now = (diagnose(s, packs, LIMIT) for s in (before, read_recording(tmp_path)))
    assert [(names[h.service], h.cause, h.posterior, h.confidence) for h in was.hypotheses] == [
        (h.service, h.cause, h.posterior, h.confidence) for h in now.hypotheses
    ]
    assert (was.verdict, was.clear, was.candidates) == (now.verdict, now.clear, now.candidates)
