"""Recovery: only the series that justified an action decide, and missing data never does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from rules_world import FAULTS, ONSET, Shop, blocked_without_completions, golden, process, quiet, sid, without

from rules.diagnose import diagnose
from rules.model import Evidence, Frame, Situation
from rules.packs import PackSet
from rules.verify import Justification, judge, justification_of, symptoms_of

ACTED = ONSET + 16.0
WATCHED = sorted(FAULTS)


def justified(packs: PackSet, fault: str) -> Justification:
    situation = golden(fault)
    best = diagnose(situation, packs).best
    assert best is not None
    return justification_of(situation, best, packs)


def afterwards(shop: Shop, seconds: float = 20.0) -> Situation:
    """The shop's window moved so that its last part lies after the action."""
    situation = shop.situation()
    moved = tuple(
        replace(e, frame=Frame(e.frame.times + seconds, e.frame.ids, e.frame.values)) for e in situation.evidence
    )
    return replace(situation, onset=ACTED, until=situation.until + seconds, evidence=moved)


@pytest.mark.parametrize("fault", WATCHED)
def test_back_to_normal_is_recovered(packs: PackSet, fault: str) -> None:
    verdict = judge(justified(packs, fault), afterwards(Shop(seed=5)), packs, since=ACTED)
    assert verdict.recovered, verdict.text
    assert all(c.state == "within" for c in verdict.checked)


@pytest.mark.parametrize("fault", WATCHED)
def test_unchanged_is_not_recovered(packs: PackSet, fault: str) -> None:
    shop = Shop(seed=5)
    FAULTS[fault][0](shop)
    verdict = judge(justified(packs, fault), afterwards(shop), packs, since=ACTED)
    assert not verdict.recovered
    assert verdict.text.startswith("Not recovered")


@pytest.mark.parametrize("fault", WATCHED)
def test_missing_data_is_not_recovery(packs: PackSet, fault: str) -> None:
    now = without(afterwards(Shop()), lambda e: e.source == "host")
    verdict = judge(justified(packs, fault), now, packs, since=ACTED)
    assert not verdict.recovered
    assert any(c.state == "missing" for c in verdict.checked)


@pytest.mark.parametrize("fault", WATCHED)
def test_each_watched_series_can_withhold_the_verdict(packs: PackSet, fault: str) -> None:
    """Bad or missing alone, it is enough."""
    justification = justified(packs, fault)
    for watched in justification.series:
        for value in (
            np.nan,
            watched.threshold + (1 if watched.direction == "up" else -1) * (1 + abs(watched.threshold)),
        ):
            shop = Shop(seed=5)
            shop.series[sid(watched.metric, **dict(watched.labels))][-3:] = value
            verdict = judge(justification, afterwards(shop), packs, since=ACTED)
            assert not verdict.recovered, (watched, value)


@pytest.mark.parametrize(("usual", "left", "recovered"), [(0.04, 0.8, True), (0.5, 0.8, True), (0.04, 0.93, False)])
def test_a_disk_need_not_be_as_empty_as_before(packs: PackSet, usual: float, left: float, recovered: bool) -> None:
    """`disk.free_logs` stops at 80 %: that is a cure, also of a disk that was nearly empty a minute ago."""
    full, freed = Shop(), Shop(seed=5)
    disk = sid("host_disk_used_ratio", "node-1", mountpoint="/")
    full.series[disk][:] = usual
    FAULTS["disk_full"][0](full)
    best = diagnose(full.situation(), packs).best
    assert best is not None
    assert best.cause == "host.disk_full"
    freed.series[disk][:] = left
    verdict = judge(justification_of(full.situation(), best, packs), afterwards(freed), packs, since=ACTED)
    assert verdict.recovered is recovered, verdict.text


def test_samples_from_before_the_action_do_not_count(packs: PackSet) -> None:
    justification = justified(packs, "bad_flag")
    now = afterwards(Shop())
    assert judge(justification, now, packs, since=now.until - 3.5).recovered
    assert not judge(justification, now, packs, since=now.until - 1.5).recovered  # fewer than three samples
    assert not judge(justification, now, packs, since=now.until).recovered


def test_one_lost_scrape_does_not_hide_a_recovery(packs: PackSet) -> None:
    shop = Shop()
    for row in shop.series.values():
        row[-2] = np.nan
    assert judge(justified(packs, "payments_slow"), afterwards(shop), packs, since=ACTED).recovered


def test_old_samples_are_no_samples(packs: PackSet) -> None:
    """Recovered once, then silent: the series must be there at the end."""
    shop = Shop()
    for row in shop.series.values():
        row[-4:] = np.nan
    assert not judge(justified(packs, "payments_slow"), afterwards(shop), packs, since=ACTED).recovered


def change_facts(change: Callable[[Shop], None]) -> Situation:
    shop = Shop()
    change(shop)
    return afterwards(shop)


def test_the_neighbour_must_be_gone_or_calm(packs: PackSet) -> None:
    justification = justified(packs, "cpu_neighbour")
    assert {f.subject.split(",")[0] for f in justification.facts} == {"pid=700", "pid=701"}

    def still_there(cpu: float) -> Callable[[Shop], None]:
        return lambda shop: shop.facts.append(process(700, name="sh", cpu=cpu, start=ONSET + 3, pgid=700, cpus="1"))

    assert judge(justification, change_facts(lambda shop: None), packs, since=ACTED).recovered
    assert judge(justification, change_facts(still_there(2.0)), packs, since=ACTED).recovered
    assert not judge(justification, change_facts(still_there(90.0)), packs, since=ACTED).recovered
    blind = without(change_facts(lambda shop: None), lambda e: e.source != "host")
    assert not judge(justification, blind, packs, since=ACTED).recovered  # nobody looked


def test_other_busy_processes_are_not_what_the_action_is_for(packs: PackSet) -> None:
    shop = Shop()
    FAULTS["cpu_neighbour"][0](shop)
    shop.facts.append(process(650, name="backup", cpu=55.0, start=ONSET - 5, cpus="1"))
    situation = shop.situation()
    best = diagnose(situation, packs).best
    assert best is not None
    watched = {f.subject.split(",")[0] for f in justification_of(situation, best, packs).facts}
    assert watched == {"pid=700", "pid=701"}


def test_a_listener_must_be_back(packs: PackSet) -> None:
    justification = justified(packs, "worker_crashed")
    gone = change_facts(lambda shop: shop.drop_facts("host.listener", "worker"))
    assert not judge(justification, gone, packs, since=ACTED).recovered
    assert judge(justification, change_facts(lambda shop: None), packs, since=ACTED).recovered


def test_what_had_fallen_silent_must_speak_again(packs: PackSet) -> None:
    situation = golden("blocked_without_completions")
    best = diagnose(situation, packs).best
    assert best is not None
    justification = justification_of(situation, best, packs)
    silent = {w.metric for w in justification.series if w.level is None}
    assert "http_latency_p95" in {w.metric for w in symptoms_of(situation, packs).series} | silent
    shop = Shop()
    blocked_without_completions(shop)
    assert not judge(justification, afterwards(shop), packs, since=ACTED).recovered
    assert judge(justification, afterwards(Shop()), packs, since=ACTED).recovered


def test_demand_need_not_fall_for_a_recovery(packs: PackSet) -> None:
    """More workers cure an exhausted pool although the customers still come."""
    justification = justified(packs, "pool_exhausted")
    shop = Shop()
    shop.put("http_request_rate", "front", 40.0)
    shop.put("http_request_rate", "orders", 75.0)
    shop.put("worker_busy_ratio", "worker", 0.22)
    assert judge(justification, afterwards(shop), packs, since=ACTED).recovered


def test_the_symptom_alone(packs: PackSet) -> None:
    justification = symptoms_of(golden("payments_slow"), packs)
    assert {w.role for w in justification.series} == {"symptom"}
    assert {dict(w.labels)["service"] for w in justification.series} == {"front"}
    assert judge(justification, afterwards(Shop()), packs, since=ACTED).recovered
    assert not symptoms_of(quiet(), packs).series


def test_without_any_series_nothing_is_verified(packs: PackSet) -> None:
    situation = without(golden("cpu_neighbour"), lambda e: e.source == "host")
    best = diagnose(situation, packs).best
    assert best is not None
    justification = justification_of(situation, best, packs)
    assert justification.facts
    assert not justification.series
    verdict = judge(justification, afterwards(Shop()), packs, since=ACTED)
    assert not verdict.recovered
    assert "no series" in verdict.text


def test_a_justification_can_be_journalled(packs: PackSet) -> None:
    for fault in WATCHED:
        justification = justified(packs, fault)
        assert justification.series
        assert msgspec.json.decode(msgspec.json.encode(justification), type=Justification) == justification


def test_evidence_that_failed_is_named_missing(packs: PackSet) -> None:
    justification = justified(packs, "bad_flag")
    nothing = Situation(
        alerts=(),
        entry="front",
        onset=ACTED,
        until=ACTED + 20,
        evidence=(Evidence(name="x", source="x", missing="late"),),
    )
    verdict = judge(justification, nothing, packs, since=ACTED)
    assert {c.state for c in verdict.checked} == {"missing"}
