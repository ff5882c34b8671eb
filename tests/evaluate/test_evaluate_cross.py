"""Counting likelihoods anew, and what is hidden from whom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from agent import crossval
from agent.evaluate import Case, Truth
from agent.packs import load_packs
from rules.diagnose import observe
from rules.learn import IMAGINED_GIVEN, IMAGINED_OTHERWISE, Counts, count, refit
from rules.model import Alert, Evidence, Frame, SeriesId, Situation, Topology
from rules.packs import PackSet

ONSET = 1_700_000_000.0
TIMES = ONSET + 60.0 * np.arange(-60, 6)
CAUSE = "service.cpu_exhausted"


@pytest.fixture(scope="module")
def packs() -> PackSet:
    return load_packs()


def busy(service: str, *calm: str) -> Situation:
    """The CPU of one service goes to its limit, that of the others stays."""
    rows = [[10.0] * 60 + [98.0 if s == service else 10.0] * 6 for s in (service, *calm)]
    ids = tuple(SeriesId.of("cpu_usage_percent", {"service": s}) for s in (service, *calm))
    evidence = (Evidence("cpu_usage_percent", "recorded", Frame(TIMES, ids, np.array(rows))),)
    edges = tuple(("front", s) for s in (service, *calm))
    return Situation((), "front", ONSET, float(TIMES[-1]), evidence, Topology(edges))


def table(packs: PackSet, column: str) -> dict[str, tuple[float, float]]:
    (line,) = (line for line in packs.causes[CAUSE].evidence if line.column == column)
    return dict(line.states)


def test_counts_are_of_the_cause_at_the_true_service_and_of_all_others(packs: PackSet) -> None:
    counts = count(observe(busy("a", "b", "c"), packs), "a", "cpu")
    assert counts[CAUSE, "cpu_use", "strong", True] == 1
    assert counts[CAUSE, "cpu_use", "absent", False] == 2
    assert counts["service.memory_growth", "cpu_use", "strong", False] == 1  # another fault at the same place
    calm = count(observe(busy("a", "b"), packs), None, "none")
    assert not any(given for _, _, _, given in calm)


def test_tables_are_frequencies_with_imagined_observations(packs: PackSet) -> None:
    counts: Counts = Counts()
    counts[CAUSE, "cpu_use", "strong", True] = 7
    counts[CAUSE, "cpu_use", "absent", False] = 70
    fitted = table(refit(packs, counts, {CAUSE}), "cpu_use")
    assert fitted["strong"][0] == pytest.approx((7 + 0.6 * IMAGINED_GIVEN) / (7 + IMAGINED_GIVEN))
    assert fitted["strong"][1] == pytest.approx(0.01 * IMAGINED_OTHERWISE / (70 + IMAGINED_OTHERWISE))


def test_what_was_never_seen_and_does_not_define_says_nothing(packs: PackSet) -> None:
    fitted = refit(packs, Counts(), {CAUSE})
    assert all(given == otherwise for given, otherwise in table(fitted, "memory_use").values())
    strong, absent = table(fitted, "cpu_use")["strong"], table(fitted, "cpu_use")["absent"]
    assert strong[0] > strong[1]
    assert absent[0] < absent[1]
    others = {n: c for n, c in packs.causes.items() if n != CAUSE}
    assert {n: c for n, c in fitted.causes.items() if n != CAUSE} == others


def test_nobody_learns_from_what_would_give_the_answer_away(
    packs: PackSet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Which incidents each case was learned from, by a mark that every incident leaves in the counts."""
    truths = {
        "one-1": ("a", "one"),
        "one-2": ("a", "one"),
        "one-3": ("b", "one"),
        "two-1": ("a", "two"),
        "sockshop-1": ("a", "sockshop"),
        "calm-1": (None, "one"),
    }
    learned: list[frozenset[str]] = []

    def marked(observer: Any, service: str | None, fault: str) -> Counts:
        counts = count(observer, service, fault)
        counts["mark", observer.situation.alerts[0].fingerprint, "strong", True] += 1
        return counts

    def noted(packs: PackSet, counts: Counts, causes: Any) -> PackSet:
        learned.append(frozenset(k[1] for k, n in counts.items() if k[0] == "mark" and n))
        return refit(packs, counts, causes)

    def read(directory: Path) -> Situation:
        whole = busy("a", "b")
        alert = Alert(tenant="", fingerprint=directory.name, status="firing", labels={}, starts_at=0.0, digest="")
        return Situation((alert,), whole.entry, whole.onset, whole.until, whole.evidence, whole.topology)

    monkeypatch.setattr(crossval, "count", marked)
    monkeypatch.setattr(crossval, "refit", noted)
    monkeypatch.setattr(crossval, "read_recording", read)
    monkeypatch.setattr(
        crossval, "read_truth", lambda d: Truth(truths[d.name][0], "cpu", (), {"source": truths[d.name][1]})
    )
    cases = [Case(tmp_path / name, name.partition("-")[0]) for name in truths]
    found = crossval.cross_validate(cases, packs, unlicensed=("sockshop",))
    everything = frozenset(truths) - {"sockshop-1"}
    assert learned == [
        everything - {"one-1", "one-2"},
        everything - {"one-3"},
        everything - {"two-1"},
        everything,  # sockshop-1: never learned from anyway
        everything - {"calm-1"},
        everything - {"one-1", "one-2", "one-3", "calm-1"},
        everything - {"two-1"},
        everything,
    ]
    assert set(found) == {"service", "system"}
    assert found["service"]["sets"]["one"]["service"]["cases"] == 3
    assert msgspec.json.encode(found)
