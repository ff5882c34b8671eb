"""What is hidden from whom when likelihoods are counted anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from agent import crossval
from agent.evaluate import Case, Truth
from agent.packs import load_packs
from rules.learn import Counts, LearnedModel, count, learned
from rules.model import Alert, Evidence, Frame, SeriesId, Situation, Topology
from rules.packs import PackSet

ONSET = 1_700_000_000.0
TIMES = ONSET + 60.0 * np.arange(-60, 6)


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
    hidden: list[frozenset[str]] = []

    def marked(observer: Any, service: str | None, fault: str) -> Counts:
        counts = count(observer, service, fault)
        counts["mark", observer.situation.alerts[0].fingerprint, "strong", True] += 1
        return counts

    def noted(packs: PackSet, counts: Counts, causes: Any) -> LearnedModel:
        hidden.append(frozenset(k[1] for k, n in counts.items() if k[0] == "mark" and n))
        return learned(packs, counts, [c for c in causes if c != "mark"])

    def read(directory: Path) -> Situation:
        whole = busy("a", "b")
        alert = Alert(tenant="", fingerprint=directory.name, status="firing", labels={}, starts_at=0.0, digest="")
        return Situation((alert,), whole.entry, whole.onset, whole.until, whole.evidence, whole.topology)

    monkeypatch.setattr(crossval, "count", marked)
    monkeypatch.setattr(crossval, "learned", noted)
    monkeypatch.setattr(crossval, "read_recording", read)
    monkeypatch.setattr(
        crossval, "read_truth", lambda d: Truth(truths[d.name][0], "cpu", (), {"source": truths[d.name][1]})
    )
    cases = [Case(tmp_path / name, name.partition("-")[0]) for name in truths]
    found = crossval.cross_validate(cases, packs, unlicensed=("sockshop",))
    everything = frozenset(truths) - {"sockshop-1"}
    assert hidden == [
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
