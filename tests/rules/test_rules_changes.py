"""Recent changes before the onset: releases, deployments, commits and flags that come with a recording."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rules_world import FAULTS, ONSET, Shop, golden, sid

from agent.sources.recorded import read_recording, write_recording
from rules.diagnose import diagnose, observe
from rules.model import Alert, Evidence, Fact, Frame, SeriesId, Situation, Topology
from rules.packs import PackSet


def slow(*changes: Fact, which: str = "orders") -> Situation:
    """front calls orders and stock; one of them became slow by itself."""
    times = ONSET + 60.0 * np.arange(-60, 8)
    rng = np.random.default_rng(4)
    ids, rows = [], []
    for service, base in (("front", 0.4), ("orders", 0.1), ("stock", 0.1)):
        added = 1.5 if service in (which, "front") else 0.0
        ids += [SeriesId.of(name, {"service": service}) for name in ("latency_avg_seconds", "requests_sum")]
        rows += [np.where(times >= ONSET, base + added, base) * rng.normal(1, 0.02, times.size)]
        rows += [np.full(times.size, 600.0)]
    series = Evidence("all", "recorded", Frame(times, tuple(ids), np.array(rows)))
    edges = (("front", "orders"), ("front", "stock"))
    changed = Evidence("changes", "recorded", facts=changes)
    labels = {"service": "front"}
    alert = Alert(tenant="t", fingerprint="f" * 16, status="firing", labels=labels, starts_at=ONSET, digest="d")
    return Situation((alert,), "front", ONSET, float(times[-1]), (series, changed), Topology(edges))


def change(kind: str, service: str, before: float, **attributes: str) -> Fact:
    return Fact(f"change.{kind}", f"{kind}-1", service, {"time": ONSET - before, **attributes})


@pytest.mark.parametrize(
    ("kind", "cause", "fault"),
    [
        ("release", "service.bad_release", "release"),
        ("deploy", "service.bad_deployment", "release"),
        ("commit", "service.bad_commit", "commit"),
    ],
)
def test_a_change_right_before_it_became_slow_is_why(packs: PackSet, kind: str, cause: str, fault: str) -> None:
    found = diagnose(slow(change(kind, "orders", 300)), packs)
    first = found.hypotheses[0]
    assert (first.cause, first.service, first.fault) == (cause, "orders", fault)
    assert any(c.evidence == "effects" and c.log_odds > 0 for c in first.contributions)
    assert f"{kind}-1" in first.sentence


@pytest.mark.parametrize(
    "changes",
    [
        (),
        (change("release", "orders", 40 * 3600),),  # long ago
        (change("release", "orders", -300),),  # afterwards
        (Fact("change.release", "r", "orders", {"time": "yesterday"}),),  # nobody knows when
        (Fact("change.release", "r", "orders", {}),),
    ],
)
def test_what_was_not_changed_then_is_not_blamed(packs: PackSet, changes: tuple[Fact, ...]) -> None:
    found = diagnose(slow(*changes), packs)
    assert (found.hypotheses[0].service, found.hypotheses[0].fault) == ("orders", "latency")


def test_a_change_elsewhere_is_no_better_than_what_is_seen(packs: PackSet) -> None:
    """stock was released, orders became slow: the slow one stays in front."""
    found = diagnose(slow(change("release", "stock", 300)), packs, 20)
    assert found.hypotheses[0].service == "orders"


def test_the_latest_of_several_leads(packs: PackSet) -> None:
    early, late = change("release", "orders", 1500), change("release", "orders", 60)
    seen = observe(slow(early, replace(late, subject="release-2")), packs).observe("orders", "released")
    assert [f.subject for f in seen.facts] == ["release-2", "release-1"]


def test_times_are_numbers_or_iso(packs: PackSet) -> None:
    stamp = "2023-11-14T22:13:20+00:00"  # 1,700,000,000
    for value in (1_700_000_000, 1_700_000_000.0, stamp, stamp.replace("+00:00", "Z"), "2023-11-14T22:13:20"):
        fact = Fact("change.commit", "c", "orders", {"time": value})
        assert observe(slow(fact), packs).attributes(fact)["age_at_onset_seconds"] == ONSET - 1_700_000_000


def test_a_flag_that_was_changed_counts_without_a_series_of_it(packs: PackSet) -> None:
    situation = golden("bad_flag")
    silent = replace(
        situation,
        evidence=(
            *(e for e in situation.evidence if e.name != "feature_flag_enabled"),
            Evidence("changes", "recorded", facts=(change("flag", "orders", 20, flag="live_recommendations"),)),
        ),
    )
    first = diagnose(silent, packs).hypotheses[0]
    assert (first.cause, first.service) == ("http.bad_flag", "orders")
    assert "live_recommendations" in first.sentence


def test_they_come_out_of_changes_json(packs: PackSet, tmp_path: Path) -> None:
    without = slow()
    write_recording(tmp_path, replace(without, evidence=without.evidence[:1]))
    (tmp_path / "situation.json").unlink()
    told = {"releases": [{"service": "orders", "version": "1.4.2", "time": ONSET - 240}], "commits": []}
    (tmp_path / "changes.json").write_text(json.dumps(told))
    first = diagnose(read_recording(tmp_path), packs).hypotheses[0]
    assert (first.service, first.fault) == ("orders", "release")
    assert "1.4.2" in first.sentence


def released(fault: str, before: float, seed: int = 1) -> Situation:
    """A fault of the shop, `before` seconds after another build of orders began to run."""
    shop = Shop(seed=seed)
    FAULTS[fault][0](shop)
    shop.series[sid("builds_seen", "orders")][shop.times >= shop.strike - before] = 2.0
    return shop.situation()


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("fault", sorted(FAULTS.keys() - {"bad_build"}))
def test_a_build_that_did_well_at_first_is_not_blamed_for_what_has_its_own_evidence(
    packs: PackSet, fault: str, seed: int
) -> None:
    first = diagnose(released(fault, before=20.0, seed=seed), packs).hypotheses[0]
    assert (first.cause, first.service) == FAULTS[fault][1:]


@pytest.mark.parametrize("before", [0.0, 5.0, 9.0])
def test_a_build_is_blamed_for_what_fails_with_it(packs: PackSet, before: float) -> None:
    diagnosis = diagnose(released("bad_build", before), packs)
    assert diagnosis.best is not None
    assert (diagnosis.best.cause, diagnosis.best.service) == ("service.bad_release", "orders")


@pytest.mark.parametrize(
    ("before", "lasting", "harm"),
    [(20.0, True, "later"), (5.0, True, ""), (0.0, True, ""), (-3.0, True, ""), (20.0, False, "")],
)
def test_harm_that_came_later_is_told_only_where_both_beginnings_are_known(
    packs: PackSet, before: float, lasting: bool, harm: str
) -> None:
    """Failures that go to and fro have no beginning from which on they last: then nothing is said."""
    shop = Shop()
    FAULTS["bad_build"][0](shop)
    shop.series[sid("builds_seen", "orders")][:] = np.where(shop.times >= shop.strike - before, 2.0, 1.0)
    if not lasting:
        for service in ("front", "orders"):
            row = shop.series[sid("http_error_ratio", service)]
            row[shop.after] = np.where(np.arange(int(shop.after.sum())) % 3 == 0, 0.0, row[shop.after])
    (finding,) = [f for f in observe(shop.situation(), packs).findings if f.signal == "builds_seen" and f.bad]
    assert finding.harm == harm
