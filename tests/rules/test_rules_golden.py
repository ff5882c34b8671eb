"""Golden situations: each cause is found, and each near miss is not mistaken for it."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest
from rules_world import (
    ABNORMAL,
    FAULTS,
    NORMAL,
    ONSET,
    START,
    Shop,
    bad_flag,
    blocking_session,
    cpu_neighbour,
    golden,
    listener,
    payments_slow,
    process,
    quiet,
    sid,
    without,
    worker_crashed,
)

from rules.diagnose import diagnose
from rules.model import Diagnosis, Fact, Situation, Topology
from rules.packs import PackSet

NO_PROPOSAL = {
    "payments_slow",
    "payments_failing",
    "bad_build",
    "database_late",
    "database_later",
    "database_unreachable",
    "disk_slow",
    "cache_stampede",
}


def best(diagnosis: Diagnosis) -> tuple[str, str] | None:
    return (diagnosis.best.cause, diagnosis.best.service) if diagnosis.best else None


def replaced(situation: Situation, **changes: object) -> Situation:
    fields = {name: getattr(situation, name) for name in Situation.__dataclass_fields__}
    return Situation(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    ("strike", "normal", "abnormal"),
    [(s, n, a) for n, a in ((NORMAL, ABNORMAL), (20, 8), (200, 40)) for s in (-6, 0, 3, 7) if s <= a / 2],
)
def test_every_cause_is_found(packs: PackSet, fault: str, strike: int, normal: int, abnormal: int) -> None:
    """Whenever the fault struck around the assumed onset, as long as it lasted for half of the abnormal window."""
    _, cause, service = FAULTS[fault]
    diagnosis = diagnose(golden(fault, strike=ONSET + strike, normal=normal, abnormal=abnormal, seed=strike + 9), packs)
    assert best(diagnosis) == (cause, service), diagnosis.sentence
    assert diagnosis.hypotheses[0].posterior >= 0.6
    assert diagnosis.margin >= 0.2


@pytest.mark.parametrize("fault", FAULTS)
def test_noise_makes_it_unsure_but_never_wrong(packs: PackSet, fault: str) -> None:
    right = 0
    for seed in range(8):
        found = best(diagnose(golden(fault, seed=seed, noise=0.2), packs))
        assert found in (None, FAULTS[fault][1:])
        right += found is not None
    assert right >= 6


@pytest.mark.parametrize("fault", FAULTS)
def test_a_diagnosis_explains_itself(packs: PackSet, fault: str) -> None:
    diagnosis = diagnose(golden(fault), packs)
    hypothesis = diagnosis.hypotheses[0]
    assert hypothesis.path[0] == "front"
    assert hypothesis.path[-1] == hypothesis.service
    assert any(c.log_odds > 0 and c.series for c in hypothesis.contributions)
    assert any(c.log_odds < 0 for c in hypothesis.contributions)  # the prior at least
    assert "{" not in hypothesis.sentence
    assert "unknown" not in hypothesis.sentence
    assert hypothesis.sentence in diagnosis.sentence
    assert hypothesis.confidence >= hypothesis.posterior
    assert bool(hypothesis.proposals) == (fault not in NO_PROPOSAL)
    assert msgspec.json.decode(msgspec.json.encode(diagnosis), type=Diagnosis) == diagnosis


def test_proposals_name_what_was_seen(packs: PackSet) -> None:
    (kill,) = diagnose(golden("cpu_neighbour"), packs).hypotheses[0].proposals
    assert kill.action == "process.terminate_group"
    assert kill.service == "node-1"
    assert kill.params["pgid"] == 700
    assert kill.params["pid"] in (700, 701)
    assert kill.params["start"] == ONSET + 3
    (flag,) = diagnose(golden("bad_flag"), packs).hypotheses[0].proposals
    assert (flag.action, flag.params) == ("feature_flag.set", {"flag": "live_recommendations", "value": False})
    (restart,) = diagnose(golden("worker_stopped"), packs).hypotheses[0].proposals
    assert (restart.action, restart.params) == ("service.restart", {"service": "worker"})


def test_a_dump_is_proposed_before_the_restart_where_one_is_configured(packs: PackSet) -> None:
    stuck = golden("worker_stopped")
    named = {"namespace": "shop", "pod": "worker-0", "container": "app"}
    alerts = tuple(msgspec.structs.replace(a, labels={**a.labels, **named}) for a in stuck.alerts)
    in_a_pod = replace(stuck, alerts=alerts)
    both = [diagnose(replace(in_a_pod, configured=frozenset(c)), packs) for c in ((), ("diagnostic/heap_histogram",))]
    assert all([p.action for p in d.hypotheses[0].proposals] == ["service.restart"] for d in both)
    configured = frozenset({"diagnostic/thread_dump"})
    wanted = {"namespace": "shop", "name": "worker-0", "diagnostic": "thread_dump"}
    other = msgspec.structs.replace(alerts[0], fingerprint="other", labels={**alerts[0].labels, "container": "proxy"})
    unnamed = tuple(msgspec.structs.replace(a, labels={**a.labels, "container": ""}) for a in alerts)
    for told, params in (
        (alerts, {**wanted, "container": "app"}),
        (unnamed, wanted),
        ((*alerts, other), wanted),  # which of two is nobody's guess: the look-up refuses a pod with several
    ):
        look = replace(in_a_pod, alerts=told, configured=configured)
        dump, restart = diagnose(look, packs).hypotheses[0].proposals
        assert (dump.action, dump.params, restart.action) == ("kubernetes.diagnose", params, "service.restart")
    (alone,) = diagnose(replace(stuck, configured=configured), packs).hypotheses[0].proposals
    assert alone.action == "service.restart", "no pod, no dump out of one"


def test_a_crash_and_a_hang_look_alike_from_outside_but_not_on_the_host(packs: PackSet) -> None:
    crashed, stuck = diagnose(golden("worker_crashed"), packs), diagnose(golden("worker_stopped"), packs)
    assert next(h.cause for h in crashed.hypotheses if h.service == "worker") == "process.crashed"
    assert "process.stuck" not in {h.cause for h in crashed.hypotheses}
    assert "process.crashed" not in {h.cause for h in stuck.hypotheses}


@pytest.mark.parametrize("seed", range(5))
def test_nothing_wrong_is_insufficient_evidence(packs: PackSet, seed: int) -> None:
    diagnosis = diagnose(quiet(seed), packs)
    assert diagnosis.verdict == "insufficient_evidence"
    assert all(not h.proposals for h in diagnosis.hypotheses)
    assert diagnosis.sentence.startswith("Insufficient evidence")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passed_before_the_window_is_over(packs: PackSet, fault: str) -> None:
    """Resolved: the series were bad before the onset and are back to normal since; the host sees nothing."""
    shop, calm = Shop(), Shop()
    FAULTS[fault][0](shop)
    late = shop.times >= ONSET
    for series, row in shop.series.items():
        begun = np.roll(row, -ABNORMAL)
        shop.series[series] = np.where(late, calm.series[series], np.where(shop.times >= ONSET - 10, begun, row))
    shop.facts = calm.facts
    assert diagnose(shop.situation(), packs).verdict == "insufficient_evidence"


def test_evidence_that_did_not_come_is_named(packs: PackSet) -> None:
    situation = without(golden("bad_flag"), lambda e: e.source == "host", "connection refused")
    diagnosis = diagnose(situation, packs)
    assert diagnosis.verdict == "insufficient_evidence"
    assert diagnosis.missing["http_latency_p95"] == "connection refused"
    assert "connection refused" in diagnosis.sentence


@pytest.mark.parametrize(
    ("fault", "cause"), [("worker_crashed", "process.crashed"), ("cpu_neighbour", "host.cpu_neighbour")]
)
def test_without_prometheus_the_host_alone_can_tell(packs: PackSet, fault: str, cause: str) -> None:
    diagnosis = diagnose(without(golden(fault), lambda e: e.source == "host"), packs)
    assert diagnosis.hypotheses[0].cause == cause
    assert best(diagnosis) is not None
    assert len(diagnosis.missing) > 30


@pytest.mark.parametrize("fault", ["payments_slow", "memory_leak", "bad_flag", "pool_exhausted"])
def test_without_prometheus_nobody_guesses(packs: PackSet, fault: str) -> None:
    assert best(diagnose(without(golden(fault), lambda e: e.source == "host"), packs)) is None


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("half", [0, 1])
def test_half_of_the_evidence_never_leads_to_a_wrong_action(packs: PackSet, fault: str, half: int) -> None:
    """What tells two causes apart may be missing; then at least the service is right, and so is what is proposed."""
    situation = golden(fault)
    names = sorted({e.name for e in situation.evidence})[half::2]
    found = diagnose(without(situation, lambda e: e.name in names), packs).best
    if found is not None:
        right = diagnose(situation, packs).hypotheses[0]
        assert found.service == right.service
        assert {p.action for p in found.proposals} <= {p.action for p in right.proposals} | {"diagnostic.capture"}


@pytest.mark.parametrize("fault", FAULTS)
def test_without_facts_of_the_host(packs: PackSet, fault: str) -> None:
    """Prometheus alone: a crash and a hang may be told apart by their scrapes; nothing is mistaken."""
    diagnosis = diagnose(without(golden(fault), lambda e: e.source != "host", "psutil: access denied"), packs)
    assert diagnosis.hypotheses[0].cause == FAULTS[fault][1]


class TestNearMisses:
    def test_disks_that_are_always_busy_are_not_blamed(self, packs: PackSet) -> None:
        """The pressure as it is now is high, as it was all day; something else made orders slow."""
        shop = Shop()
        FAULTS["cache_stampede"][0](shop)
        shop.series[sid("host_io_waiting_ratio", "node-1")][:] = 0.6
        shop.drop_facts("host.pressure", "")
        shop.facts.append(Fact("host.pressure", "io", "", {"resource": "io", "some_avg10": 61.0, "some_avg300": 60.0}))
        diagnosis = diagnose(shop.situation(), packs)
        assert best(diagnosis) == ("program.cache_stampede", "orders")
        assert all(h.cause != "host.io_stalled" for h in diagnosis.hypotheses)

    def test_who_waits_for_a_slow_dependency_is_not_deadlocked(self, packs: PackSet) -> None:
        """It makes fewer calls and computes less, as one whose threads wait for each other; but its calls come back."""
        shop = Shop()
        FAULTS["payments_slow"][0](shop)
        shop.series[sid("call_rate", "orders", server_address="payments")] = np.where(shop.after, 0.2, 10.0)
        shop.shift("process_cpu_cores", "orders", 0.02)
        diagnosis = diagnose(shop.situation(), packs)
        assert best(diagnosis) == ("http.dependency_slow", "payments")
        assert all(h.cause != "program.deadlocked" for h in diagnosis.hypotheses if h.service == "orders")

    def test_who_refuses_calls_for_a_wrong_clock_does_not_fail(self, packs: PackSet) -> None:
        shop = Shop()
        FAULTS["payments_failing"][0](shop)
        shop.series[sid("clock_offset_seconds", "orders")] = np.where(shop.after, 600.0, 0.01)
        diagnosis = diagnose(shop.situation(), packs)
        assert best(diagnosis) == ("program.clock_skew", "orders")
        assert all(h.cause != "http.dependency_failing" for h in diagnosis.hypotheses)

    def test_a_busy_build_that_was_always_there_is_not_blamed_for_a_locked_database(self, packs: PackSet) -> None:
        shop = Shop()
        blocking_session(shop)
        shop.facts += [process(800 + i, name="cc1plus", cpu=95.0, start=START - 9000.0) for i in range(3)]
        assert best(diagnose(shop.situation(), packs)) == ("postgres.blocking_session", "postgres")

    def test_the_suspect_is_the_new_process_on_the_services_cpu(self, packs: PackSet) -> None:
        """Not the build that uses more CPU, but anywhere and for longer."""
        shop = Shop()
        cpu_neighbour(shop)
        shop.facts.append(process(650, name="cc1plus", cpu=97.0, start=ONSET - 50))
        (kill,) = diagnose(shop.situation(), packs).hypotheses[0].proposals
        assert kill.params["pgid"] == 700
        assert kill.autonomy_cap == "auto"

    def test_between_two_suspects_a_person_chooses(self, packs: PackSet) -> None:
        shop = Shop()
        cpu_neighbour(shop)
        shop.facts.append(process(650, name="backup", cpu=70.0, start=ONSET, cpus="1"))
        (kill,) = diagnose(shop.situation(), packs).hypotheses[0].proposals
        assert kill.autonomy_cap == "approve"
        assert "Another one is nearly as suspicious" in kill.reason

    def test_the_agent_itself_is_no_neighbour(self, packs: PackSet) -> None:
        shop = Shop()
        cpu_neighbour(shop)
        shop.facts = [f for f in shop.facts if f.attributes.get("pgid") != 700]
        shop.facts.append(process(700, name="alertmedic", cpu=95.0, start=ONSET, self=True))
        for hypothesis in diagnose(shop.situation(), packs).hypotheses:
            assert not any(p.params.get("pid") == 700 for p in hypothesis.proposals)

    def test_a_process_of_a_service_is_no_neighbour(self, packs: PackSet) -> None:
        shop = Shop()
        cpu_neighbour(shop)
        shop.facts = [f for f in shop.facts if f.attributes.get("pgid") != 700]
        shop.facts.append(process(700, "worker", cpu=95.0, start=ONSET))
        assert best(diagnose(shop.situation(), packs)) != ("host.cpu_neighbour", "node-1")

    def test_a_process_on_another_cpu_takes_nothing_away(self, packs: PackSet) -> None:
        shop = Shop()
        shop.slow_front()
        shop.facts = [process(100 + i, s, cpus="1") for i, s in enumerate(("front", "orders", "worker"))]
        shop.facts.append(process(700, name="sh", cpu=99.0, start=ONSET, cpus="0"))
        diagnosis = diagnose(shop.situation(), packs)
        assert "host.cpu_neighbour" not in {h.cause for h in diagnosis.hypotheses}

    def test_a_flag_that_was_always_on_is_not_blamed(self, packs: PackSet) -> None:
        shop = Shop()
        bad_flag(shop)
        shop.series[sid("feature_flag_enabled", "orders", flag="live_recommendations")][:] = 1.0
        assert best(diagnose(shop.situation(), packs)) == ("process.cpu_saturation", "orders")

    def test_a_pool_that_is_always_full_is_not_blamed(self, packs: PackSet) -> None:
        shop = Shop()
        payments_slow(shop)
        shop.series[sid("worker_busy_ratio", "worker")][:] = 1.0
        diagnosis = diagnose(shop.situation(), packs)
        assert best(diagnosis) == ("http.dependency_slow", "payments")
        assert "worker.pool_exhausted" not in {h.cause for h in diagnosis.hypotheses}

    def test_a_slow_caller_makes_all_its_calls_look_slow(self, packs: PackSet) -> None:
        """Not the payments' fault: every call of orders takes longer."""
        assert best(diagnose(golden("cpu_neighbour"), packs)) != ("http.dependency_slow", "payments")
        assert best(diagnose(golden("bad_flag"), packs)) != ("http.dependency_slow", "payments")

    def test_what_the_entry_does_not_depend_on_is_no_candidate(self, packs: PackSet) -> None:
        shop = Shop()
        worker_crashed(shop)
        situation = shop.situation()
        edges = tuple(e for e in situation.topology.edges if "worker" not in e)
        cut = replaced(situation, topology=Topology(edges, situation.topology.kinds))
        assert all(h.service != "worker" for h in diagnose(cut, packs).hypotheses)

    def test_an_idle_transaction_that_blocks_nobody(self, packs: PackSet) -> None:
        shop = Shop()
        shop.ramp("pg_idle_in_transaction_seconds", "postgres", 1.0)
        assert diagnose(shop.situation(), packs).verdict == "insufficient_evidence"

    def test_more_traffic_that_is_served_well(self, packs: PackSet) -> None:
        shop = Shop()
        shop.shift("http_request_rate", "front", 60.0)
        shop.shift("process_cpu_cores", "front", 0.3)
        assert diagnose(shop.situation(), packs).verdict == "insufficient_evidence"

    def test_memory_that_was_always_high(self, packs: PackSet) -> None:
        shop = Shop()
        shop.slow_front()
        shop.series[sid("process_memory_used_ratio", "orders")][:] = 0.93
        diagnosis = diagnose(shop.situation(), packs)
        assert "process.memory_leak" not in {h.cause for h in diagnosis.hypotheses}


def test_a_slow_leak_is_seen_although_the_baseline_holds_most_of_it(packs: PackSet) -> None:
    shop = Shop(normal=240, abnormal=20)
    shop.slow_front(0.3, 0.4)
    shop.shift("http_error_ratio", "orders", 0.4)
    grown = np.linspace(6e7, 4.6e8, shop.times.shape[0]) + shop.rng.normal(0, 1e6, shop.times.shape[0])
    shop.series[sid("process_memory_bytes", "orders")][:] = grown
    shop.series[sid("process_memory_used_ratio", "orders")][:] = grown / 5.1e8
    assert best(diagnose(shop.situation(), packs)) == ("process.memory_leak", "orders")


def test_an_earlier_incident_is_no_baseline(packs: PackSet) -> None:
    """The same fault half of the normal window long: without `quiet` it would look normal."""
    shop = Shop(normal=80)
    payments_slow(shop)
    before = (shop.times >= ONSET - 70) & (shop.times < ONSET - 20)
    for series, row in shop.series.items():
        row[before] = row[-1] if series.metric.startswith("http") else row[before]
    situation = shop.situation()
    assert best(diagnose(situation, packs)) != ("http.dependency_slow", "payments")
    told = replaced(situation, quiet=((ONSET - 70.0, ONSET - 20.0),))
    assert best(diagnose(told, packs)) == ("http.dependency_slow", "payments")


def test_without_any_topology_everything_seen_is_a_candidate(packs: PackSet) -> None:
    for fault in ("bad_flag", "memory_leak", "payments_slow"):
        situation = replaced(golden(fault), topology=Topology())
        assert best(diagnose(situation, packs)) == FAULTS[fault][1:], fault


def test_an_alert_that_names_no_service(packs: PackSet) -> None:
    situation = replaced(golden("worker_crashed"), entry="")
    assert best(diagnose(situation, packs)) == ("process.crashed", "worker")


def test_text_from_labels_stays_text(packs: PackSet) -> None:
    """A flag named like a template, and a process named like one: substituted once, never evaluated, bounded."""
    shop = Shop()
    bad_flag(shop)
    name = "{service.__class__}" + "x" * 1000 + "\n"
    row = shop.series.pop(sid("feature_flag_enabled", "orders", flag="live_recommendations"))
    shop.series[sid("feature_flag_enabled", "orders", flag=name)] = row
    hypothesis = diagnose(shop.situation(), packs).hypotheses[0]
    assert "{service.__class__}" in hypothesis.sentence
    assert len(hypothesis.sentence) < 700
    assert "\n" not in hypothesis.sentence
    assert hypothesis.proposals[0].params["flag"] == name  # the guard validates; diagnosis does not alter identities


def test_a_listener_that_is_gone_needs_no_metric_at_all(packs: PackSet) -> None:
    shop = Shop()
    shop.slow_front()
    shop.drop_facts("host.listener", "worker")
    shop.drop_facts("host.process", "worker")
    shop.facts.append(listener(9103, "worker", present=False))
    diagnosis = diagnose(without(shop.situation(), lambda e: e.source == "host" or "latency" in e.name), packs)
    assert best(diagnosis) == ("process.crashed", "worker")


def test_a_neighbour_brings_no_customers(packs: PackSet) -> None:
    """A process of no service runs hot beside a service that has three times its requests: that may be its load."""
    shop = Shop()
    FAULTS["cpu_neighbour"][0](shop)
    shop.shift("http_request_rate", "orders", 110.0)
    (neighbour,) = [h for h in diagnose(shop.situation(), packs).hypotheses if h.cause == "host.cpu_neighbour"]
    said = {c.evidence: c.log_odds for c in neighbour.contributions}
    assert said["traffic@callers"] < -1.0


def test_descriptors_that_are_used_up_explain_connections_that_fail(packs: PackSet) -> None:
    """A few requests fail: too few to be sure by them alone, and surely by what the service cannot open."""
    shop = Shop()
    shop.shift("process_fds_used_ratio", "orders", 0.95)
    shop.shift("http_error_ratio", "front", 0.06)
    shop.put("call_connection_error_ratio", "orders", 0.0, server_address="payments")
    shop.shift("call_connection_error_ratio", "orders", 0.14, server_address="payments")
    assert best(diagnose(shop.situation(), packs)) == ("process.fd_exhaustion", "orders")
