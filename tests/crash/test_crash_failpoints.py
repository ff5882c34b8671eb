"""kill -9 at every named failpoint, after a 200: nothing acknowledged is lost, nothing non-idempotent happens twice.

Each failpoint is reached by the scenario that leads there: the usual one (alert, diagnosis, action, verification), one
whose action does not help (undo), one that waits for a person, and one with a tiny journal (segments, snapshots).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from agent_world import ROOT, Agent, Services, free_port, query, start_prometheus, until

USUAL = [
    "intake_before_parse",
    "intake_before_record",
    "intake_after_record",
    "intake_before_response",
    "store_before_apply",
    "wal_before_write",
    "wal_after_write",
    "wal_before_sync",
    "wal_after_sync",
    "wal_before_ack",
    "investigate_before_evidence",
    "investigate_after_evidence",
    "investigate_before_diagnosed",
    "investigate_after_diagnosed",
    "investigate_before_plan",
    "investigate_after_plan",
    "investigate_after_verifying",
    "guard_after_plan",
    "runner_before_intent",
    "runner_after_intent",
    "runner_after_run",
    "runner_before_result",
    "runner_after_result",
    "runner_before_verify",
    "runner_after_verify",
    "sandbox_before_spawn",
    "sandbox_after_spawn",
    "sandbox_after_exit",
    "sandbox_before_cleanup",
]
UNDO = ["runner_before_undo", "runner_after_undo_intent", "runner_after_undo"]
APPROVAL = ["operations_after_approval"]
TINY = ["wal_segment_created", "wal_snapshot_written", "wal_snapshot_renamed", "wal_pruned"]
CASES = [(name, "usual") for name in USUAL] + [(n, "undo") for n in UNDO] + [(n, "approval") for n in APPROVAL]
CASES += [(name, "tiny") for name in TINY]
# Where a crash can cost most: these run in every test run, the others with the full volume.
ALWAYS = {
    "intake_before_record",
    "intake_before_response",
    "wal_after_write",
    "wal_before_ack",
    "investigate_before_diagnosed",
    "runner_after_intent",
    "runner_after_run",
    "runner_after_result",
    "sandbox_after_spawn",
    "runner_after_undo_intent",
    "operations_after_approval",
    "wal_snapshot_renamed",
}
# The journal's failpoints are passed by every record: the third passage is the record that a webhook makes.
PASSAGE = {"wal_before_write": 3, "wal_after_write": 3, "wal_before_sync": 3, "wal_after_sync": 3, "wal_before_ack": 3}
PASSAGE |= {"store_before_apply": 3, "wal_segment_created": 2, "wal_pruned": 1}
TINY_JOURNAL = "journal: {segment_bytes: 4KiB, snapshot_bytes: 8KiB}"


def service_of(name: str, scenario: str) -> str:
    return f"{name.replace('_', '-')}-sick" if scenario == "undo" else name.replace("_", "-")


@pytest.fixture(scope="module")
def services() -> Services:
    return Services([service_of(name, scenario) for name, scenario in CASES])


@pytest.fixture(scope="module")
def prometheus(
    services: Services, program: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    port = free_port()
    directory = tmp_path_factory.mktemp("prometheus")
    process = start_prometheus(program("prometheus"), directory, services.url.removeprefix("http://"), port)
    try:
        url = f"http://127.0.0.1:{port}"
        # Enough of a baseline that "broken" stands out from it.
        until(lambda: query(url, "min(count_over_time(probe_broken[1m])) >= 16"), "Prometheus has a baseline")
        yield url
    finally:
        process.kill()
        process.wait()


def test_every_failpoint_of_the_code_has_a_case() -> None:
    found = {
        name
        for package in ("agent", "rules", "actions", "sandbox")
        for path in (ROOT / package).rglob("*.py")
        for name in re.findall(r'failpoint\("([a-z_]+)"\)', path.read_text())
    }
    assert found == {name for name, _ in CASES}
    assert found >= ALWAYS
    assert len(found) >= 20


@pytest.mark.parametrize(
    ("name", "scenario"),
    [pytest.param(*case, marks=() if case[0] in ALWAYS else pytest.mark.full) for case in CASES],
)
def test_killed_at(name: str, scenario: str, services: Services, prometheus: str, tmp_path: Path) -> None:
    service = service_of(name, scenario)
    agent = Agent(
        tmp_path,
        service,
        prometheus,
        services,
        autonomy="approve" if scenario == "approval" else "auto",
        extra=TINY_JOURNAL if scenario == "tiny" else "",
        verify_seconds=2.0 if scenario == "undo" else 15.0,
    )
    try:
        # One alert is acknowledged before anything goes wrong, in a run of its own.
        agent.start()
        assert agent.alert("Before", "resolved") == 200
        agent.stop()
        services.broken[service] = 1
        until(
            lambda: query(prometheus, f'min_over_time(probe_broken{{service="{service}"}}[1s]) > 0'), "the fault shows"
        )
        agent.start(f"{name}:{PASSAGE.get(name, 1)}")
        drive(agent, scenario)
        assert agent.process is not None
        assert agent.process.wait(30) == -9
        agent.start()
        settle(agent, scenario)
        check(agent, scenario)
    finally:
        services.broken[service] = 0
        agent.stop()


def drive(agent: Agent, scenario: str) -> None:
    """Does what leads to the failpoint, until the agent is dead."""
    if not agent.dead:
        agent.alert("Broken")
    if scenario == "tiny":
        for n in range(200):
            if agent.dead:
                break
            agent.alert(f"Many{n}", "resolved")
    if scenario == "approval":
        approve(agent)
    until(lambda: agent.dead, f"the failpoint is reached: {agent.log}")


def approve(agent: Agent) -> None:
    """As a person would; the answer may be lost with the agent."""
    waiting = until(
        lambda: agent.dead or [i for i in agent.incidents() if i["state"] == "awaiting_approval"],
        "a plan waits for approval",
    )
    if not agent.dead:
        agent.command("approve", waiting[0]["id"])


def settle(agent: Agent, scenario: str) -> None:
    """As Alertmanager would: what was not acknowledged is sent again. Then waits for the incident's end."""
    assert agent.alert("Broken") == 200

    def ended() -> bool:
        states = Counter(i["state"] for i in agent.incidents())
        if scenario == "approval" and states["awaiting_approval"]:
            approve(agent)
        return bool(states) and set(states) <= {"resolved", "escalated"}

    until(ended, f"the incident ends: {agent.log}", 60)


def check(agent: Agent, scenario: str) -> None:
    """Everything that was acknowledged is there, and the part was replaced at most once per incident."""
    agent.stop()
    dump = agent.command("journal", "dump", "--json")
    assert dump.returncode == 0, dump.stderr
    for fingerprint in agent.acknowledged:
        assert fingerprint in dump.stdout or snapshot_has(agent, fingerprint)
    incidents = {i["id"]: i for i in agent.incidents()}
    shown = {alert["fingerprint"] for incident in incidents.values() for alert in incident["alerts"]}
    assert agent.acknowledged[-1] in shown
    effects = Counter(agent.lines("effects"))
    assert set(effects) <= set(incidents)
    assert all(count == 1 for count in effects.values()), effects
    assert agent.command("journal", "verify").returncode == 0
    if scenario == "undo":
        assert Counter(agent.lines("undone")).keys() == effects.keys()
    elif any(i["state"] == "resolved" for i in incidents.values()):
        assert effects


def snapshot_has(agent: Agent, fingerprint: str) -> bool:
    """Pruned segments: what they held is in a snapshot."""
    files = (path for path in (agent.directory / "state" / "journal").rglob("*") if path.is_file())
    return any(fingerprint.encode() in path.read_bytes() for path in files)
