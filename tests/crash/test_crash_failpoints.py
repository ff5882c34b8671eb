"""kill -9 at every named failpoint, after a 200: nothing acknowledged is lost, nothing non-idempotent happens twice.

Each failpoint is reached by the scenario that leads there: the usual one (alert, diagnosis, action, verification), one
whose action does not help (undo), one that waits for a person, one whose alert fires again meanwhile, and one with a
tiny journal (segments, snapshots).
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from agent_world import ROOT, Agent, Services, query, until
from crash_names import ALWAYS, CASES, PASSAGE, TINY_JOURNAL, service_of


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
        autonomy="approve" if scenario in ("approval", "again") else "auto",
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
    if scenario == "again":
        waiting(agent)
        agent.alert("Broken")
    until(lambda: agent.dead, f"the failpoint is reached: {agent.log}")


def approve(agent: Agent) -> None:
    """As a person would; the answer may be lost with the agent."""
    incidents = waiting(agent)
    if not agent.dead:
        agent.command("approve", incidents[0]["id"])


def waiting(agent: Agent) -> Any:
    """The incidents whose plan waits, once there is one; True where the agent is dead."""
    return until(
        lambda: agent.dead or [i for i in agent.incidents() if i["state"] == "awaiting_approval"],
        "a plan waits for approval",
    )


def settle(agent: Agent, scenario: str) -> None:
    """As Alertmanager would: what was not acknowledged is sent again. Then waits for the incident's end."""
    assert agent.alert("Broken") == 200

    def ended() -> bool:
        states = Counter(i["state"] for i in agent.incidents())
        if scenario in ("approval", "again") and states["awaiting_approval"]:
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
    if scenario == "again":
        assert all(not i["past_plans"] for i in incidents.values())  # who was asked first was not asked anew
    if scenario == "undo":
        assert Counter(agent.lines("undone")).keys() == effects.keys()
    elif any(i["state"] == "resolved" for i in incidents.values()):
        assert effects


def snapshot_has(agent: Agent, fingerprint: str) -> bool:
    """Pruned segments: what they held is in a snapshot."""
    files = (path for path in (agent.directory / "state" / "journal").rglob("*") if path.is_file())
    return any(fingerprint.encode() in path.read_bytes() for path in files)
