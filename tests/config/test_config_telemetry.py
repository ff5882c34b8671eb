"""Metrics: conventional exposition, bounded labels, ratios; checked through the parser and, where it is, promtool."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from actions.model import BreakerState, Refusal
from agent.telemetry import MAX_SOURCES, MAX_TENANTS, OTHER, Telemetry
from sandbox.model import EnforcedBy, RunResult

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(telemetry: Telemetry) -> Samples:
    body, content_type = telemetry.render()
    assert content_type.startswith("text/plain")
    found: Samples = {}
    for family in text_string_to_metric_families(body.decode()):
        for s in family.samples:
            found[s.name, tuple(sorted(s.labels.items()))] = s.value
    return found


def value(found: Samples, name: str, **labels: str) -> float:
    return found[name, tuple(sorted(labels.items()))]


def test_counts_of_a_life() -> None:
    telemetry = Telemetry("1.0")
    telemetry.webhook_request(200)
    telemetry.webhook_request(200)
    telemetry.webhook_request(503)
    telemetry.alerts(accepted=3, duplicates=2, quarantined=1)
    telemetry.incident_opened()
    telemetry.evidence("prometheus", missing=True)
    telemetry.evidence("prometheus", missing=False)
    telemetry.refused(Refusal.COOLDOWN)
    telemetry.set_incidents({"open": 2, "resolved": 1})
    telemetry.set_breakers({BreakerState.OPEN: 1})
    telemetry.set_paused(True)
    telemetry.set_sandbox(EnforcedBy.RLIMITS)
    telemetry.set_journal(lag_bytes=5, size_bytes=4096, segments=2, last_fsync_seconds=0.003)
    found = samples(telemetry)
    assert value(found, "alertmedic_webhook_requests_total", code="200") == 2
    assert value(found, "alertmedic_webhook_requests_total", code="503") == 1
    assert value(found, "alertmedic_alerts_total", result="duplicate") == 2
    assert value(found, "alertmedic_evidence_total", source="prometheus", result="missing") == 1
    assert value(found, "alertmedic_refusals_total", reason="cooldown") == 1
    assert value(found, "alertmedic_refusals_total", reason="storm") == 0
    assert value(found, "alertmedic_incidents", state="open") == 2
    assert value(found, "alertmedic_breakers", state="open") == 1
    assert value(found, "alertmedic_breakers", state="closed") == 0
    assert value(found, "alertmedic_paused") == 1
    assert value(found, "alertmedic_sandbox_enforced_by", enforced_by="rlimits") == 1
    assert value(found, "alertmedic_sandbox_enforced_by", enforced_by="cgroup2") == 0
    assert value(found, "alertmedic_journal_segments") == 2
    assert value(found, "alertmedic_journal_last_fsync_seconds") == 0.003


def test_ratios_follow_the_counters_and_are_nan_before_the_first() -> None:
    telemetry = Telemetry("1.0")
    before = samples(telemetry)
    assert math.isnan(value(before, "alertmedic_hypothesis_hit_ratio"))
    assert math.isnan(value(before, "alertmedic_healing_success_ratio"))
    telemetry.hypotheses_generated(3)
    telemetry.hypotheses_generated(1)
    telemetry.hypothesis_successful()
    for recovered in (True, True, False):
        telemetry.healing_started()
        telemetry.healing_ended(recovered=recovered)
    found = samples(telemetry)
    assert value(found, "alertmedic_hypothesis_hit_ratio") == 0.25
    assert value(found, "alertmedic_hypotheses_total", result="generated") == 4
    assert value(found, "alertmedic_healing_success_ratio") == pytest.approx(2 / 3)
    assert value(found, "alertmedic_healings_total", result="failed") == 1


@pytest.mark.parametrize(
    ("result", "outcome"),
    [
        (RunResult(exit_code=0), "ok"),
        (RunResult(exit_code=3), "failed"),
        (RunResult(exit_code=None, signal=9), "failed"),
        (RunResult(exit_code=None, signal=9, timed_out=True), "timeout"),
        (RunResult(exit_code=None, signal=9, oom_killed=True), "oom"),
        (RunResult(exit_code=None, error="no such file"), "not_started"),
    ],
)
def test_outcomes_of_sandboxed_runs(result: RunResult, outcome: str) -> None:
    telemetry = Telemetry("1.0")
    telemetry.sandbox_run(result)
    found = samples(telemetry)
    assert value(found, "alertmedic_sandbox_runs_total", enforced_by="rlimits", outcome=outcome) == 1


def test_a_stage_is_timed_also_when_it_fails() -> None:
    telemetry = Telemetry("1.0")
    with telemetry.stage("diagnosis"):
        pass
    with pytest.raises(RuntimeError), telemetry.stage("diagnosis"):
        raise RuntimeError
    telemetry.observe("diagnosis", 0.04)
    found = samples(telemetry)
    assert value(found, "alertmedic_diagnosis_duration_seconds_count") == 3
    assert value(found, "alertmedic_diagnosis_duration_seconds_bucket", le="0.05") - value(
        found, "alertmedic_diagnosis_duration_seconds_bucket", le="0.03"
    ) == pytest.approx(1)


def test_samplers_run_at_each_scrape_and_vanished_label_values_go() -> None:
    telemetry = Telemetry("1.0")
    queue = {"a": 1}
    telemetry.on_scrape(lambda: telemetry.set_queue(queue, 7))
    assert value(samples(telemetry), "alertmedic_queue_waiting", tenant="a") == 1
    queue.clear()
    queue["b"] = 4
    found = samples(telemetry)
    assert value(found, "alertmedic_queue_waiting", tenant="b") == 4
    assert ("alertmedic_queue_waiting", (("tenant", "a"),)) not in found
    assert value(found, "alertmedic_queue_watermark") == 7


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.text(max_size=8), max_size=200), st.lists(st.text(max_size=8), max_size=60))
def test_labels_are_bounded_whatever_comes(tenants: list[str], sources: list[str]) -> None:
    telemetry = Telemetry("1.0")
    for source in sources:
        telemetry.evidence(source, missing=True)
    telemetry.set_queue(dict.fromkeys(tenants, 1), 1)
    for code in (0, 99, 200, 600, 10**9):
        telemetry.webhook_request(code)
    found = samples(telemetry)
    waiting = [v for (name, _), v in found.items() if name == "alertmedic_queue_waiting"]
    assert len(waiting) <= MAX_TENANTS + 1
    assert sum(waiting) == len(set(tenants))
    counted = [v for (name, _), v in found.items() if name == "alertmedic_evidence_total"]
    assert len(counted) <= MAX_SOURCES + 1
    assert sum(counted) == len(sources)
    assert value(found, "alertmedic_webhook_requests_total", code=OTHER) == 4


def test_no_series_but_the_documented_ones_are_exposed() -> None:
    assert not [name for name, _ in samples(Telemetry("1.0")) if name.endswith("_created")]


def test_two_agents_in_one_process_do_not_mix() -> None:
    one, two = Telemetry("1"), Telemetry("2")
    one.incident_opened()
    assert value(samples(two), "alertmedic_incidents_opened_total") == 0


def test_promtool_finds_nothing_to_complain_about(program: Callable[[str, str], str]) -> None:
    promtool = program("promtool", "prometheus")
    telemetry = Telemetry("1.0")
    telemetry.webhook_request(200)
    done = subprocess.run(
        [promtool, "check", "metrics"], input=telemetry.render()[0], capture_output=True, timeout=60, check=False
    )
    ours = [line for line in (done.stdout + done.stderr).decode().splitlines() if "alertmedic" in line]
    assert ours == []
