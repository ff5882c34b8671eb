"""The demo's driver: the command line, what is configured, the probe's law, and the verdicts and their report."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from actions.model import Plan, Step, StepState
from agent.config import load
from agent.demo import settings
from agent.demo.children import free_ports
from agent.demo.probe import IN_A_ROW, Checkout, degraded_at, recovered_at
from agent.demo.report import EXPECTED, Measured, Verdict, judge, write
from agent.fold_model import Incident, IncidentState, StepView
from agent.http.render import incident_json
from rules.model import Diagnosis, Hypothesis
from sandbox.model import EnforcedBy, RunResult

PORTS = settings.Ports(*range(20001, 20012))
PROBES = st.lists(st.booleans(), max_size=40).map(lambda good: [Checkout(i * 0.4, 0.1, g) for i, g in enumerate(good)])


def incident(fault: str, state: IncidentState, step: StepState | None, cause: str = "") -> dict[str, Any]:
    """An incident as the real API shows it: diagnosed as `cause` (default: rightly), its one step in state `step`."""
    expected = EXPECTED[fault]
    top = Hypothesis(
        cause=cause or expected.cause, service=expected.service, fault="x", title="x", posterior=0.9, confidence=0.9
    )
    made = Incident(
        id="inc-aaaaaaaaaaaa",
        tenant="default",
        key="k",
        state=state,
        opened_at=1000.0,
        opened_seq=1,
        updated_at=1010.0,
        updated_seq=9,
        last_alert_at=1000.0,
        diagnosis=Diagnosis(verdict="ranked", hypotheses=(top,), candidates=4),
    )
    if step is not None:
        action = Step(action="service.restart.supervisord", version=1, target="program=worker", argv=("/bin/true",))
        made.plan = Plan(
            id="p", incident=made.id, service="worker", cause=top.cause, steps=(action,), autonomy="auto",
            made_at=1005.0, expires_at=2000.0,
        )  # fmt: skip
        made.plan_state = "done"
        made.steps = [StepView(state=step, result=RunResult(exit_code=0, enforced_by=EnforcedBy.RLIMITS))]
    shown: dict[str, Any] = json.loads(json.dumps(incident_json(made)))
    return shown


RESOLVED, ESCALATED, MEASURED = (
    IncidentState.RESOLVED,
    IncidentState.ESCALATED,
    Measured(1000.0, 1005.0, 1006.0, 1012.5),
)


def verdict(fault: str, *incidents: dict[str, Any], measured: Measured = MEASURED) -> Verdict:
    return judge(fault, incidents, measured)


def test_healed_with_the_right_cause_passes() -> None:
    got = verdict("worker_crash", incident("worker_crash", RESOLVED, StepState.VERIFIED))
    assert got.passed
    assert (got.outcome, got.correct, got.mttr_seconds) == ("healed", True, 12.5)
    assert (got.action, got.enforced_by, got.top_cause) == (
        "service.restart.supervisord",
        "rlimits",
        "process.crashed",
    )


def test_the_fault_without_remedy_passes_only_untouched() -> None:
    assert verdict("payments_slow", incident("payments_slow", ESCALATED, None)).passed
    assert verdict("payments_slow", incident("payments_slow", ESCALATED, StepState.PLANNED)).passed
    for state in (RESOLVED, ESCALATED):
        got = verdict("payments_slow", incident("payments_slow", state, StepState.VERIFIED))
        assert not got.passed
        assert got.action == "service.restart.supervisord"


@pytest.mark.parametrize(
    ("name", "incidents", "measured"),
    [
        ("no incident at all", [], MEASURED),
        ("wrong cause", [incident("worker_crash", RESOLVED, StepState.VERIFIED, "process.stuck")], MEASURED),
        ("only escalated", [incident("worker_crash", ESCALATED, None)], MEASURED),
        ("resolved by itself", [incident("worker_crash", RESOLVED, None)], MEASURED),
        (
            "agent says resolved, probe does not",
            [incident("worker_crash", RESOLVED, StepState.VERIFIED)],
            Measured(1.0),
        ),
        ("acted, then gave up", [incident("worker_crash", ESCALATED, StepState.UNDONE)], MEASURED),
        ("acted twice", [incident("worker_crash", RESOLVED, StepState.VERIFIED)] * 2, MEASURED),
        (
            "a second incident of another opinion",
            [
                incident("worker_crash", RESOLVED, StepState.VERIFIED),
                incident("worker_crash", ESCALATED, None, "host.cpu_neighbour"),
            ],
            MEASURED,
        ),
    ],
)
def test_anything_else_does_not_pass(name: str, incidents: list[dict[str, Any]], measured: Measured) -> None:
    assert not verdict("worker_crash", *incidents, measured=measured).passed, name


def test_the_report_has_the_promised_shape(tmp_path: Path) -> None:
    report = tmp_path / "build" / "demo-report.json"
    write(report, [verdict("worker_crash", incident("worker_crash", RESOLVED, StepState.VERIFIED)), verdict("db_lock")])
    document = json.loads(report.read_text())
    assert list(document) == ["incidents"]
    for row in document["incidents"]:
        assert list(row) == [
            "fault", "alert", "top_cause", "posterior", "correct", "action", "outcome", "enforced_by",
            "fault_at", "alert_at", "diagnosed_at", "recovered_at", "mttr_seconds",
        ]  # fmt: skip
    healed, failed = document["incidents"]
    assert healed["fault_at"] == "1970-01-01T00:16:40.000Z"
    assert (failed["outcome"], failed["action"], failed["mttr_seconds"]) == ("failed", None, None)


@given(PROBES)
def test_recovery_needs_good_probes_in_a_row_after_the_last_bad_one(probes: list[Checkout]) -> None:
    at = recovered_at(probes)
    bad = [c.at for c in probes if not c.good]
    after = [c for c in probes if bad and c.at > bad[-1]]
    if at is None:
        assert not bad or len(after) < IN_A_ROW
    else:
        assert at == after[IN_A_ROW - 1].at + 0.1
    pairs = [two for one, two in itertools.pairwise(probes) if not one.good and not two.good]
    assert degraded_at(probes) == (pairs[0].at + 0.1 if pairs else None)


def test_the_agents_configuration_is_what_the_agent_takes(tmp_path: Path) -> None:
    file = tmp_path / "alertmedic.yaml"
    file.write_text(settings.agent(PORTS, tmp_path / "shop", tmp_path / "state"))
    config = load(file, environ={})
    assert config.autonomy.default == "auto"
    assert config.sandbox.allow_unenforced_auto
    assert set(config.topology.kinds) == {service for pair in config.topology.edge_pairs for service in pair}


def test_prometheus_and_alertmanager_take_their_configuration(program: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "alerts.yml").write_text(settings.alert_rules())
    (tmp_path / "prometheus.yml").write_text(settings.prometheus(PORTS, tmp_path / "alerts.yml"))
    (tmp_path / "alertmanager.yml").write_text(settings.alertmanager(PORTS))
    promtool, amtool = program("promtool", "prometheus"), program("amtool", "prometheus-alertmanager")
    subprocess.run([promtool, "check", "config", str(tmp_path / "prometheus.yml")], check=True, capture_output=True)
    subprocess.run([amtool, "check-config", str(tmp_path / "alertmanager.yml")], check=True, capture_output=True)
    (rule,) = yaml.safe_load(settings.alert_rules())["groups"][0]["rules"]
    assert rule["labels"] == {"severity": "critical"}
    assert 'service="front"' in rule["expr"]
    assert not [name for name in ("orders", "worker", "postgres", "payments", "node") if name in rule["expr"]]


def test_a_missing_program_is_named_with_its_package(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "agent.demo"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "prometheus not found: apt-get install prometheus" in done.stdout


def test_an_unknown_fault_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "agent.demo", "--faults", "earthquake"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "no such fault: earthquake" in done.stderr


def test_the_table_says_wrong_where_it_was_wrong() -> None:
    from agent.demo.report import table

    rows = [verdict("worker_crash", incident("worker_crash", RESOLVED, StepState.VERIFIED)), verdict("db_lock")]
    console = Console(width=200, file=io.StringIO())
    with console.capture() as shown:
        console.print(table(rows, [MEASURED, MEASURED]))
    lines = shown.get().splitlines()
    assert "right" in next(line for line in lines if "worker_crash" in line)
    assert "WRONG" in next(line for line in lines if "db_lock" in line)


def test_ports_are_distinct() -> None:
    ports = free_ports(11)
    assert len(set(ports)) == 11


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_the_driver(programs: None, tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C and SIGTERM take the world down in order; and even where the driver is killed, its children end."""
    output = (tmp_path / "out").open("w")
    record = ["--record", str(tmp_path / "recordings"), "--faults", "db_lock"]
    driver = subprocess.Popen([sys.executable, "-m", "agent.demo", *record], stdout=output, cwd=tmp_path)
    try:
        started, directory = when_built(driver)
        driver.send_signal(number)
        assert driver.wait(40) == (-9 if number is signal.SIGKILL else 130)
    finally:
        driver.kill()
        driver.wait()
    _, alive = psutil.wait_procs(started, timeout=20)
    assert not alive
    assert directory.exists() == (number is signal.SIGKILL)  # the killed one could not remove its directory
    shutil.rmtree(directory, ignore_errors=True)


def when_built(driver: subprocess.Popen[bytes]) -> tuple[list[psutil.Process], Path]:
    """The driver's descendants, once the injector, which starts last, is among them; and its world's directory."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert driver.poll() is None
        started = psutil.Process(driver.pid).children(recursive=True)
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                if "agent.demo.faults" in process.cmdline():
                    return started, Path(process.cwd()).parent
        time.sleep(0.1)
    pytest.fail("the world was not built within 60 s")
