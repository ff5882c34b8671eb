"""Every alert of kube-prometheus through the running service, without a Kubernetes API: the object that it says has to
change, and what it proposes, are those of the table."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from agent_world import Services
from alerts_world import KubeAgent, KubeScenario, scenario, table
from anyalert_world import backfill, entry, rules, start

SEED = 20261126


def test_the_table_knows_every_alert_and_no_other() -> None:
    alerts = table()["alerts"]
    assert set(alerts) == {rule.id for rule in rules()}
    assert len(alerts) == 139
    for rule in rules():
        assert alerts[rule.id]["cause"] in entry(rule).causes, rule.id


def test_a_subset_of_the_alerts(tmp_path: Path, program: Callable[[str, str], str]) -> None:
    """One of each shape of object at least, the rest by chance."""
    by_shape: dict[str, list[Any]] = {}
    for rule in rules():
        by_shape.setdefault(table()["alerts"][rule.id]["shape"], []).append(rule)
    chance = random.Random(SEED)
    chosen = [chance.choice(found) for _, found in sorted(by_shape.items())]
    check(tmp_path, program, chosen)


@pytest.mark.full
def test_all_alerts(tmp_path: Path, program: Callable[[str, str], str]) -> None:
    check(tmp_path, program, list(rules()))


def check(directory: Path, program: Callable[[str, str], str], chosen: list[Any]) -> None:
    begins = time.time() // 60 * 60 - 10 * 60
    scenarios = [scenario(rule, begins) for rule in chosen]
    data = backfill(program("promtool", "prometheus"), directory, scenarios, begins)
    server = start(program("prometheus", "prometheus"), directory, data)
    agent = KubeAgent(directory / "agent", "", server.url, Services([]), autonomy="suggest")
    try:
        agent.start()
        told = agent.diagnosed([s.payload() for s in scenarios], 60.0 + 4.0 * len(scenarios))
        wrong = [text for s in scenarios if (text := difference(s, told[s.alert.fingerprint]))]
        assert wrong == [], "\n".join(wrong)
    finally:
        agent.stop()
        server.process.kill()
        server.process.wait()


def difference(about: KubeScenario, incident: dict[str, Any]) -> str:
    """How the incident differs from the table; "" if it does not."""
    expected = about.expected
    first = incident["hypotheses"][0] if incident["hypotheses"] else {"cause": "", "proposals": [], "no_remedy": ""}
    proposals = [
        " ".join([p["action"], *(f"{k}={v}" for k, v in sorted(p["params"].items()))]) for p in first["proposals"]
    ]
    got = (first["cause"], incident["owner"], proposals[0] if proposals else "none")
    wanted = (expected.cause, expected.owner, expected.proposal)
    if got == wanted:
        return ""
    return (
        f"{about.rule.id} {about.alert.labels}: {got}, expected {wanted}; {incident['sentence']} {incident['missing']}"
    )
