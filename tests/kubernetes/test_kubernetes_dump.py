"""From an alert to a thread dump that people read, through the running service: webhook, diagnosis by a real
Prometheus, plan, the autonomy ladder, exec through a real API server, the story."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from agent_world import Services, until
from alerts_world import KubeAgent
from anyalert_world import Server, backfill, start
from cluster import Cluster
from test_kubernetes_exec import make_pod, node

pytestmark = pytest.mark.full
__all__ = ["node"]
STEP = 60
PODS = ("asked-0", "alone-0", "bare-0")
# What jcmd would print: two threads that wait for each other, many more, and one that was named by whoever could.
DUMP = """
import sys
print('Found one Java-level deadlock:')
print('"transfer-1": waiting to lock monitor 0x1, which is held by "transfer-2"')
print('"evil \\x1b]0;owned\\x07": runnable')
for n in range(2000):
    print(f'"pool-{n}" #{n} daemon waiting on condition')
print('end of', sys.argv[1])
"""


@dataclass
class Locked:
    """Threads of a JVM in a pod that lock each other from `fault_at` on."""

    pod: str
    fault_at: float

    @property
    def labels(self) -> dict[str, str]:
        return {"namespace": "shop", "pod": self.pod, "container": "app", "instance": "10.1.0.1:8080", "job": "jvm"}

    def series(self) -> Iterator[tuple[str, dict[str, str], list[tuple[float, float]]]]:
        first = int(self.fault_at // STEP * STEP) - 75 * STEP
        times = [float(t) for t in range(first, first + 180 * STEP, STEP)]
        for metric, calm, faulty in (("jvm_threads_deadlocked", 0.0, 4.0), ("jvm_threads_live_threads", 80.0, 80.0)):
            yield metric, self.labels, [(t, faulty if t >= self.fault_at else calm) for t in times]

    def payload(self) -> dict[str, Any]:
        """As Alertmanager's webhook sends it."""
        begun = datetime.fromtimestamp(self.fault_at + 120, UTC).isoformat().replace("+00:00", "Z")
        labels = {**self.labels, "alertname": "ThreadsDeadlocked", "severity": "page"}
        query = urlencode({"g0.expr": "jvm_threads_deadlocked > 0", "g0.tab": "1"})
        one = {"status": "firing", "labels": labels, "annotations": {}, "startsAt": begun,
               "endsAt": "0001-01-01T00:00:00Z", "generatorURL": f"http://prometheus:9090/graph?{query}",
               "fingerprint": f"{PODS.index(self.pod):016x}"}  # fmt: skip
        return {"receiver": "alertmedic", "status": "firing", "alerts": [one], "groupLabels": {"pod": self.pod},
                "commonLabels": labels, "commonAnnotations": {}, "externalURL": "http://alertmanager:9093",
                "version": "4", "groupKey": f'{{}}:{{pod="{self.pod}"}}', "truncatedAlerts": 0}  # fmt: skip


@pytest.fixture(scope="module")
def prometheus(
    program: Callable[[str, str], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, float]]:
    where = tmp_path_factory.mktemp("dump")
    begins = time.time() // STEP * STEP - 20 * STEP
    locked: list[Any] = [Locked(pod, begins) for pod in PODS]
    server = start(
        program("prometheus", "prometheus"), where, backfill(program("promtool", "prometheus"), where, locked, begins)
    )
    try:
        yield server, begins
    finally:
        server.process.kill()
        server.process.wait()


Story = Callable[..., tuple[KubeAgent, dict[str, Any]]]


@pytest.fixture
def diagnosed(prometheus: tuple[Server, float], cluster: Cluster, node: str, tmp_path: Path) -> Iterator[Story]:
    """Starts the service for one pod, tells it of the alert, and gives both after the diagnosis."""
    server, begins = prometheus
    agents: list[KubeAgent] = []

    def told(
        pod: str, autonomy: str, diagnostics: dict[str, list[str]], **more: Any
    ) -> tuple[KubeAgent, dict[str, Any]]:
        make_pod(cluster, pod, node)
        (tmp_path / "token").write_text(cluster.token_of("doctor", "alertmedic"))
        section = {"enabled": True, "api": cluster.url, "token_file": str(tmp_path / "token"), "evidence": False,
                   "ca_file": str(cluster.ca_file), "namespaces": ["shop"], "diagnostics": diagnostics}  # fmt: skip
        extra = {"kubernetes": section, "verify": {"poll_seconds": 2, "deadline_seconds": 120},
                 "sandbox": {"allow_unenforced_auto": True}, **more}  # fmt: skip
        agent = KubeAgent(tmp_path / "agent", "", server.url, Services([]), autonomy=autonomy, step_seconds=15,
                          extra="\n".join(f"{key}: {json.dumps(value)}" for key, value in extra.items()))  # fmt: skip
        agents.append(agent)
        agent.start()
        payload = Locked(pod, begins).payload()
        return agent, agent.diagnosed([payload], 60)[payload["alerts"][0]["fingerprint"]]

    yield told
    for agent in agents:
        agent.stop()


def ended(agent: KubeAgent, id: str) -> dict[str, Any]:
    def over() -> dict[str, Any] | None:
        status, found = agent.request("GET", f"/api/v1/incidents/{id}")
        return found if status == 200 and found["state"] in ("resolved", "escalated") else None

    found: dict[str, Any] = until(over, f"{id} is over", 90)
    return found


@pytest.mark.parametrize(("pod", "autonomy"), [("asked-0", "approve"), ("alone-0", "auto")])
def test_a_deadlocked_pod_is_dumped_and_handed_over_with_the_dump(
    diagnosed: Story, tmp_path: Path, pod: str, autonomy: str
) -> None:
    (tmp_path / "jcmd.py").write_text(DUMP)
    agent, incident = diagnosed(pod, autonomy, {"thread_dump": [sys.executable, str(tmp_path / "jcmd.py"), "it all"]})
    assert incident["hypotheses"][0]["cause"] == "runtime.deadlock"
    id = incident["id"]
    if autonomy == "approve":
        until(lambda: agent.request("GET", f"/api/v1/incidents/{id}")[1]["state"] == "awaiting_approval", "a plan", 60)
        done = agent.command("approve", id)
        assert done.returncode == 0, done.stdout + done.stderr
    found = ended(agent, id)
    told = "\n".join(line["text"] for line in found["story"])
    assert found["state"] == "escalated", told
    assert "nothing was changed" in told
    assert "what kubernetes.diagnose captured is kept" in told
    (step,) = found["plan"]["steps"]
    assert (step["action"], step["state"]) == ("kubernetes.diagnose", "verified")
    assert f"--object=pod/shop/{pod}" in step["argv"]
    assert len(step["result"]["stdout"]) < 1500
    assert step["result"]["stdout_bytes"] > 80_000

    shown = agent.command("incidents", id)
    assert shown.returncode == 0
    assert "Found one Java-level deadlock:" in shown.stdout
    assert "\\x1b]0;owned\\x07" in shown.stdout
    assert "\x1b" not in shown.stdout
    assert "pool-1999" not in shown.stdout
    assert f"alertmedic story {id} --output" in shown.stdout
    whole = agent.command("story", id, "--output")
    assert '"pool-1999" #1999 daemon' in whole.stdout
    assert "end of it all\n" in whole.stdout
    assert "\x1b" not in whole.stdout
    status, raw = agent.request("GET", f"/api/v1/incidents/{id}/output")
    assert status == 200
    document = json.loads(raw["steps"][0]["stdout"])
    assert document["pod"] == f"pod/shop/{pod}"
    assert "\x1b]0;owned\x07" in document["stdout"]


def test_without_a_diagnostic_of_that_name_nothing_is_said_of_it(diagnosed: Story) -> None:
    agent, incident = diagnosed("bare-0", "auto", {"heap_histogram": ["true"]})
    assert incident["hypotheses"][0]["cause"] == "runtime.deadlock"
    ended(agent, incident["id"])
    shown = agent.command("incidents", incident["id"])
    assert "proposes service.restart" in shown.stdout
    assert "diagnose" not in shown.stdout.replace("diagnosed", "")
