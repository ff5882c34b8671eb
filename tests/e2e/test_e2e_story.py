"""The whole way with real components: Prometheus and Alertmanager, the service as a process, the command line as a user
has it. Every test has a service of its own, whose fault only its own action can heal."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from agent_world import Agent, Services, free_port, query, start_alertmanager, start_prometheus, until

NAMES = ["healed", "suggested", "approved", "rejected", "paused", "withdrawn", "blind", "missed", "claimed", "tenants"]
NAMES += ["flapping", "moved"]


@dataclass
class World:
    services: Services
    prometheus: str

    def broken(self, service: str) -> None:
        """Breaks the service and waits until Prometheus sees it."""
        self.services.broken[service] = 1
        seen = f'min_over_time(probe_broken{{service="{service}"}}[1s]) > 0'
        until(lambda: query(self.prometheus, seen), f"Prometheus sees that {service} is broken")


@pytest.fixture(scope="module")
def world(program: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    services = Services(NAMES)
    port = free_port()
    directory = tmp_path_factory.mktemp("prometheus")
    process = start_prometheus(program("prometheus"), directory, services.url.removeprefix("http://"), port)
    try:
        url = f"http://127.0.0.1:{port}"
        until(lambda: query(url, "min(count_over_time(probe_broken[1m])) >= 16"), "Prometheus has a baseline")
        yield World(services, url)
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def agent_of(world: World, tmp_path: Path) -> Iterator[Callable[..., Agent]]:
    made: list[Agent] = []

    def make(service: str, **options: Any) -> Agent:
        agent = Agent(tmp_path, service, world.prometheus, world.services, **options)
        made.append(agent)
        return agent

    yield make
    for agent in made:
        agent.stop()


def in_state(agent: Agent, *states: str) -> dict[str, Any]:
    """The incident, once it is in one of the states."""

    def found() -> dict[str, Any] | None:
        return next((i for i in agent.incidents() if i["state"] in states), None)

    incident: dict[str, Any] = until(found, f"an incident is {' or '.join(states)}: {agent.log}")
    return incident


def metrics(agent: Agent) -> dict[str, float]:
    with urllib.request.urlopen("http://{}:{}/metrics".format(*agent.address), timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, value in (li.rsplit(" ", 1) for li in lines if not li.startswith("#"))}


def test_from_alertmanager_to_verified_recovery(
    world: World, agent_of: Callable[..., Agent], program: Callable[[str], str], tmp_path: Path
) -> None:
    """A rule of a real Prometheus fires, a real Alertmanager sends it, the agent heals, the alert resolves."""
    agent = agent_of("healed", port=free_port(), verify_seconds=20.0)
    agent.start()
    own, am = free_port(), free_port()
    (tmp_path / "own").mkdir()
    alertmanager = start_alertmanager(
        program("prometheus-alertmanager"), tmp_path / "own", am, "http://{}:{}/webhook".format(*agent.address)
    )
    target = world.services.url.removeprefix("http://")
    prometheus = start_prometheus(program("prometheus"), tmp_path / "own", target, own, f"127.0.0.1:{am}")
    try:
        until(lambda: query(f"http://127.0.0.1:{own}", "probe_broken"), "the second Prometheus scrapes")
        world.broken("healed")
        incident = in_state(agent, "resolved")
        assert world.services.broken["healed"] == 0
        assert agent.lines("effects") == [incident["id"]]
        assert set(incident) >= {"id", "state", "tenant", "opened_at", "alerts", "hypotheses", "plan", "story"}
        assert incident["tenant"] == "default"
        assert incident["alerts"][0]["labels"]["alertname"] == "ProbeFails"
        assert set(incident["alerts"][0]) >= {"fingerprint", "labels", "status", "starts_at"}
        assert incident["hypotheses"][0]["cause"] == "probe.broken"
        assert incident["hypotheses"][0]["contributions"]
        assert "within bounds" in json.dumps(incident["story"])
        until(lambda: in_state(agent, "resolved")["alerts"][0]["status"] == "resolved", "the alert resolves")
        counted = metrics(agent)
        assert counted["alertmedic_healing_success_ratio"] == 1.0
        assert counted['alertmedic_healings_total{result="recovered"}'] == 1.0
        assert counted["alertmedic_diagnosis_duration_seconds_count"] >= 1.0
    finally:
        for process in (prometheus, alertmanager):
            process.kill()
            process.wait()


def test_suggests_by_default_and_does_nothing_until_somebody_asks_for_it(
    world: World, agent_of: Callable[..., Agent]
) -> None:
    agent = agent_of("suggested", autonomy="suggest", verify_seconds=20.0)
    agent.start()
    world.broken("suggested")
    assert agent.alert("Broken") == 200
    incident = in_state(agent, "suggested")
    argv = incident["plan"]["steps"][0]["argv"]
    assert argv[-1] == incident["id"]
    told = agent.command("incidents", incident["id"])
    assert told.returncode == 0
    assert "crash_test.replace" in told.stdout
    refused = agent.command("approve", incident["id"], "--digest", "0" * 32)
    assert refused.returncode != 0
    assert in_state(agent, "suggested")["id"] == incident["id"]
    assert agent.lines("effects") == []
    asked = agent.command("approve", incident["id"], "--digest", incident["plan"]["digest"])
    assert asked.returncode == 0, asked.stderr
    assert in_state(agent, "resolved")["plan"]["autonomy"] == "approve"
    assert agent.lines("effects") == [incident["id"]]
    told = agent.command("story", incident["id"], "--json")
    assert told.returncode == 0, told.stderr
    export = json.loads(told.stdout)
    assert export["journal"]["ok"]
    assert [s["checked"] for s in export["snapshots"].values()] == [True]


def test_acts_when_approved_once(world: World, agent_of: Callable[..., Agent]) -> None:
    agent = agent_of("approved", autonomy="approve", verify_seconds=20.0)
    agent.start()
    world.broken("approved")
    assert agent.alert("Broken") == 200
    incident = in_state(agent, "awaiting_approval")
    stale = agent.command("approve", incident["id"], "--digest", "0" * 32)
    assert stale.returncode != 0
    assert agent.lines("effects") == []
    approved = agent.command("approve", incident["id"])
    assert approved.returncode == 0, approved.stderr
    again = agent.command("approve", incident["id"])
    assert again.returncode == 0
    assert "recorded before" in again.stdout
    in_state(agent, "resolved")
    assert agent.lines("effects") == [incident["id"]]


def looked_again(agent: Agent, before: dict[str, Any]) -> dict[str, Any]:
    """The incident once a newer look than `before` is over and a plan waits."""

    def found() -> dict[str, Any] | None:
        waiting = (i for i in agent.incidents() if i["state"] == "awaiting_approval")
        return next((i for i in waiting if i["rounds"] > before["rounds"]), None)

    incident: dict[str, Any] = until(found, f"a newer look is over: {agent.log}")
    return incident


def test_an_alert_that_fires_again_leaves_the_plan_to_who_was_asked(
    world: World, agent_of: Callable[..., Agent]
) -> None:
    agent = agent_of("flapping", autonomy="approve", verify_seconds=20.0)
    agent.start()
    world.broken("flapping")
    assert agent.alert("Broken") == 200
    first = in_state(agent, "awaiting_approval")
    assert agent.alert("Broken") == 200
    second = looked_again(agent, first)
    assert agent.alert("Another") == 200
    third = looked_again(agent, second)
    assert first["plan"] == second["plan"] == third["plan"]
    assert "a newer look confirms plan" in json.dumps(third["story"])
    approved = agent.command("approve", first["id"], "--digest", first["plan"]["digest"])
    assert approved.returncode == 0, approved.stderr
    in_state(agent, "resolved")
    assert agent.lines("effects") == [first["id"]]


def test_a_look_that_finds_another_target_asks_anew(world: World, agent_of: Callable[..., Agent]) -> None:
    agent = agent_of("moved", autonomy="approve", verify_seconds=20.0)
    action = agent.directory / "actions" / "crash.yaml"
    looked_up = 'resolve: ["/bin/cat", "{directory}/targets.json"]\n    max_targets: 1'
    action.write_text(action.read_text().replace("target: service={service}", looked_up))
    targets = agent.directory / "targets.json"
    targets.write_text('[{"identity": "pid=12,start=5"}]')
    agent.start()
    world.broken("moved")
    assert agent.alert("Broken") == 200
    first = in_state(agent, "awaiting_approval")
    assert first["plan"]["steps"][0]["target"] == "pid=12,start=5"
    targets.write_text('[{"identity": "pid=77,start=9"}]')
    assert agent.alert("Broken") == 200
    second = looked_again(agent, first)
    assert second["plan"]["steps"][0]["target"] == "pid=77,start=9"
    late = agent.command("approve", first["id"], "--digest", first["plan"]["digest"])
    assert late.returncode != 0
    assert "the target is pid=77,start=9 now, not pid=12,start=5" in late.stdout + late.stderr
    assert agent.lines("effects") == []
    assert agent.command("approve", second["id"], "--digest", second["plan"]["digest"]).returncode == 0
    in_state(agent, "resolved")
    assert agent.lines("effects") == [first["id"]]


def test_a_rejected_plan_never_runs(world: World, agent_of: Callable[..., Agent]) -> None:
    agent = agent_of("rejected", autonomy="approve")
    agent.start()
    world.broken("rejected")
    assert agent.alert("Broken") == 200
    incident = in_state(agent, "awaiting_approval")
    assert agent.command("reject", incident["id"], "--note", "not today").returncode == 0
    ended = in_state(agent, "escalated")
    assert "not today" in json.dumps(ended["story"])
    assert agent.command("approve", incident["id"]).returncode != 0
    assert agent.lines("effects") == []


def test_pause_stops_actions_over_a_restart(world: World, agent_of: Callable[..., Agent]) -> None:
    agent = agent_of("paused")
    agent.start()
    assert agent.command("pause").returncode == 0
    agent.stop()
    agent.start()
    world.broken("paused")
    assert agent.alert("Broken") == 200
    incident = in_state(agent, "escalated")
    assert "paused" in json.dumps(incident["story"])
    assert agent.lines("effects") == []


def test_resolved_withdraws_a_waiting_plan(world: World, agent_of: Callable[..., Agent]) -> None:
    agent = agent_of("withdrawn", autonomy="approve", verify_seconds=20.0)
    agent.start()
    world.broken("withdrawn")
    assert agent.alert("Broken") == 200
    incident = in_state(agent, "awaiting_approval")
    world.services.broken["withdrawn"] = 0
    assert agent.alert("Broken", "resolved") == 200
    in_state(agent, "resolved")
    assert agent.command("approve", incident["id"]).returncode != 0
    assert agent.lines("effects") == []


def test_a_false_resolved_closes_nothing(world: World, agent_of: Callable[..., Agent]) -> None:
    """Alertmanager says resolved while the series are still bad, as it does when a Prometheus dies."""
    agent = agent_of("claimed", autonomy="approve", verify_seconds=1.5)
    agent.start()
    world.broken("claimed")
    assert agent.alert("Broken") == 200
    in_state(agent, "awaiting_approval")
    assert agent.alert("Broken", "resolved") == 200
    incident = in_state(agent, "escalated")
    assert "said to be resolved" in json.dumps(incident["story"])


def test_without_prometheus_it_says_so(world: World, agent_of: Callable[..., Agent]) -> None:
    agent = agent_of("blind")
    config = agent.directory / "alertmedic.yaml"
    config.write_text(config.read_text().replace(world.prometheus, f"http://127.0.0.1:{free_port()}"))
    agent.start()
    assert agent.alert("Broken") == 200
    incident = in_state(agent, "escalated")
    assert "nsufficient evidence" in json.dumps(incident["story"])
    told = agent.command("incidents", incident["id"])
    assert "refused" in told.stdout
    assert agent.lines("effects") == []


def test_an_alert_that_fired_while_it_was_down(
    world: World, agent_of: Callable[..., Agent], program: Callable[[str], str], tmp_path: Path
) -> None:
    """Alertmanager sent it to nobody and would not repeat it for hours: it is found on start, once."""
    port = free_port()
    (tmp_path / "own").mkdir()
    alertmanager = start_alertmanager(
        program("prometheus-alertmanager"), tmp_path / "own", port, f"http://127.0.0.1:{free_port()}/webhook"
    )
    url = f"http://127.0.0.1:{port}"
    agent = agent_of("missed", autonomy="observe", extra=f"alertmanager: {{url: '{url}'}}")
    try:
        until(lambda: posted(url, "missed"), "Alertmanager takes the alert")
        for _ in range(2):
            agent.start()
            until(agent.incidents, "the alert is found")
            agent.stop()
        (incident,) = agent.incidents()
        assert [a["labels"]["service"] for a in incident["alerts"]] == ["missed"]
    finally:
        alertmanager.kill()
        alertmanager.wait()


def posted(url: str, service: str) -> bool:
    body = json.dumps([{"labels": {"alertname": "Missed", "service": service}}]).encode()
    request = urllib.request.Request(f"{url}/api/v2/alerts", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=5):
            return True
    except OSError:
        return False


def test_tenants_do_not_meet(world: World, agent_of: Callable[..., Agent]) -> None:
    agent = agent_of("tenants", autonomy="observe")
    agent.start()
    for tenant in ("blue", "green"):
        code, _ = agent.request("POST", f"/webhook/{tenant}", agent.payload("Broken"))
        assert code == 200
    incidents = until(lambda: list(agent.incidents()) if len(agent.incidents()) == 2 else None, "two incidents")
    assert {i["tenant"] for i in incidents} == {"blue", "green"}
    blue = agent.command("incidents", "--json", "--tenant", "blue")
    assert [i["tenant"] for i in json.loads(blue.stdout)["incidents"]] == ["blue"]


def test_drains_on_sigterm(world: World, agent_of: Callable[..., Agent]) -> None:
    agent = agent_of("tenants")
    agent.start()
    assert agent.process is not None
    agent.process.terminate()
    try:
        assert agent.process.wait(30) == 0
    except subprocess.TimeoutExpired:
        pytest.fail(f"it did not end: {agent.log}")
