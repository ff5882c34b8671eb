"""`kubernetes.diagnose` for real: agent -> kube-apiserver -> Kubernetes' own streaming server -> a process."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from actions_world import in_sandbox
from cluster import Answer, Cluster, container_status, kubelet_program, path_of, template
from test_kubernetes_apiserver import Hands, carry_out

from actions.builtin import DONE, FAILED, NOTHING_DONE
from actions.builtin.kubernetes_api import Api, ApiError, Name
from actions.builtin.kubernetes_exec import KEPT, MAX_READ, PROTOCOLS, STDOUT, objection, stream
from actions.model import Refusal, Step
from sandbox.model import RunResult

pytestmark = pytest.mark.full
numbers = itertools.count(1)
PYTHON = sys.executable
# What the operator has configured. Each runs for real, as a process of this machine.
DIAGNOSTICS = {
    "where": [PYTHON, "-c", "import os; print(os.environ['POD'], os.environ['CONTAINER'])"],
    "words": [PYTHON, "-c", "import sys; print(sys.argv[1:])", "a b", "$(id)", "&command=id", "ü"],
    "fails": [PYTHON, "-c", "import sys; print('half'); sys.stderr.write('no such pid'); sys.exit(7)"],
    "long": [PYTHON, "-c", "print('x' * 300_000)"],
    "endless": ["yes"],
    "hangs": [PYTHON, "-uc", "print('begun'); import signal; signal.pause()"],
    "absent": ["/nowhere/jcmd", "1", "Thread.print"],
}
DIAGNOSE = "kubernetes.diagnose"


@pytest.fixture(scope="module")
def node(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A node whose kubelet answers exec."""
    directory = tmp_path_factory.mktemp("kubelet")
    cert, key = directory / "kubelet.crt", directory / "kubelet.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert, "-days", "2",
         "-subj", "/CN=kubelet", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [kubelet_program(), cert, key], stdout=subprocess.PIPE, stderr=log, start_new_session=True
        )
    assert process.stdout is not None
    port = int(process.stdout.readline())
    name = "with-kubelet"
    cluster.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}})
    status = {"addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
              "daemonEndpoints": {"kubeletEndpoint": {"Port": port}}}  # fmt: skip
    cluster.patch(f"node/{name}", {"status": status}, sub="/status")
    try:
        yield name
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # with what it has started
        process.wait(10)
        cluster.delete(f"node/{name}")


def started(cluster: Cluster, name: str, start: str = "first", containers: tuple[str, ...] = ("app",)) -> None:
    """What the kubelet reports: every container runs."""
    states = [container_status(0) | {"name": c, "containerID": f"containerd://{name}-{c}-{start}"} for c in containers]
    status = {"phase": "Running", "containerStatuses": states}
    cluster.call("PATCH", path_of(f"pod/shop/{name}") + "/status", {"status": status})


def make_pod(cluster: Cluster, name: str, node: str, containers: tuple[str, ...] = ("app",)) -> None:
    spec = template(name)["spec"]
    spec = {"nodeName": node, "containers": [spec["containers"][0] | {"name": c} for c in containers]}
    cluster.create({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "shop"}, "spec": spec})
    started(cluster, name, containers=containers)


@pytest.fixture
def pod(cluster: Cluster, node: str) -> str:
    name = f"jvm{next(numbers)}"
    make_pod(cluster, name, node)
    return name


class Doctor(Hands):
    """A release with `diagnose` on, and what its operator lets run."""

    diagnostics: dict[str, list[str]] = DIAGNOSTICS

    @property
    def reach(self) -> dict[str, str]:
        found = {"kubernetes_diagnostics": json.dumps(self.diagnostics)} if self.diagnostics else {}
        return super().reach | found

    async def step(self, pod: str, diagnostic: str, **more: Any) -> Step:
        plan = await self.plan(DIAGNOSE, namespace="shop", name=pod, diagnostic=diagnostic, **more)
        (step,) = plan.steps
        return step


@pytest.fixture
def doctor(cluster: Cluster, tmp_path: Path) -> Doctor:
    return Doctor(cluster, tmp_path, "doctor")


async def ran(step: Step) -> tuple[RunResult, dict[str, Any]]:
    result = await in_sandbox(step.argv, step.limits)
    return result, json.loads(result.stdout or "{}")


# -- what comes out


async def test_what_it_prints_is_copied_out(doctor: Doctor, pod: str) -> None:
    plan = await doctor.plan(DIAGNOSE, namespace="shop", name=pod, diagnostic="where")
    assert any("the server would accept it" in n and "os.environ" in n for n in plan.notes), plan.notes
    (step,) = plan.steps
    assert step.read_only
    result, said = await ran(step)
    assert result.exit_code == DONE, result
    assert said["stdout"] == f"{pod} app\n"
    assert said["exit_code"] == 0
    assert said["protocol"] == "v5.channel.k8s.io"
    assert await carry_out(plan) == "planned intent ran verified"


async def test_words_stay_words(doctor: Doctor, pod: str) -> None:
    _, said = await ran(await doctor.step(pod, "words"))
    assert said["stdout"] == "['a b', '$(id)', '&command=id', 'ü']\n"


async def test_an_exit_code_is_told(doctor: Doctor, pod: str) -> None:
    result, said = await ran(await doctor.step(pod, "fails"))
    assert result.exit_code == FAILED
    assert (said["exit_code"], said["stdout"], said["stderr"]) == (7, "half\n", "no such pid")


async def test_what_is_over_the_bound_is_cut_and_counted(doctor: Doctor, pod: str) -> None:
    result, said = await ran(await doctor.step(pod, "long"))
    assert result.exit_code == DONE
    assert result.stdout_dropped == 0
    assert said["stdout"] == "x" * KEPT[STDOUT]
    assert said["stdout_left_out"] == 300_001 - KEPT[STDOUT]


async def test_what_never_ends_speaking_is_left(doctor: Doctor, pod: str) -> None:
    result, said = await ran(await doctor.step(pod, "endless"))
    assert result.exit_code == FAILED
    assert str(MAX_READ) in said["broke_off"]
    assert said["stdout"].startswith("y\ny\n")
    assert "exit_code" not in said


async def test_a_hang_ends_with_the_time_and_keeps_what_was_said(doctor: Doctor, pod: str) -> None:
    result, said = await ran(await doctor.step(pod, "hangs", seconds=2))
    assert result.exit_code == FAILED
    assert not result.timed_out, "the step itself ends in time"
    assert said["broke_off"].startswith("no end after 2 s")
    assert said["stdout"] == "begun\n"


async def test_a_program_that_is_not_there_is_told(doctor: Doctor, pod: str) -> None:
    result, said = await ran(await doctor.step(pod, "absent"))
    assert result.exit_code == FAILED
    assert "/nowhere/jcmd" in said["did_not_run"]


@contextlib.asynccontextmanager
async def proxy(target: int, connection: int) -> AsyncIterator[tuple[int, asyncio.Event]]:
    """A TCP proxy, and an event that cuts its connection number `connection` off."""
    count, cut = itertools.count(1), asyncio.Event()
    pumps: set[asyncio.Task[None]] = set()

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
            sink.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", target)
        both = [asyncio.create_task(pump(reader, up_writer)), asyncio.create_task(pump(up_reader, writer))]
        pumps.update(both)
        if next(count) == connection:
            await cut.wait()
            writer.transport.abort()
            up_writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], cut
    finally:
        server.close()
        for task in pumps:
            task.cancel()


async def test_a_connection_cut_in_mid_stream_is_no_end(
    doctor: Doctor, cluster: Cluster, pod: str, tmp_path: Path
) -> None:
    """The program tells that it runs by a file, then the stream breaks; the step says so and keeps what had come."""
    sign = tmp_path / "sign"
    program = "import pathlib, signal, sys; print('half'); pathlib.Path(sys.argv[1]).touch(); signal.pause()"
    doctor.diagnostics = {"signs": [PYTHON, "-uc", program, str(sign)]}
    step = await doctor.step(pod, "signs", seconds=60)
    async with proxy(cluster.port, 2) as (port, cut):  # the first connection reads the pod
        argv = tuple(a.replace(str(cluster.port), str(port)) for a in step.argv)
        running = asyncio.create_task(in_sandbox(argv, step.limits))
        while not sign.exists() and not running.done():
            await asyncio.sleep(0.05)
        cut.set()
        result = await running
    said = json.loads(result.stdout)
    assert result.exit_code == FAILED
    assert "connection" in said["broke_off"]
    assert "exit_code" not in said


async def test_v4_is_spoken_where_v5_is_not_known(doctor: Doctor, pod: str) -> None:
    """With v4 the API server lets the WebSocket through to the kubelet instead of translating it."""
    api = Api(doctor.cluster.url, str(doctor.token_file), str(doctor.cluster.ca_file), ("shop",))
    found = await stream(api, Name("pod", "shop", pod), "app", DIAGNOSTICS["fails"], 20.0, PROTOCOLS[1:])
    assert found.protocol == "v4.channel.k8s.io"
    assert (found.exit_code(), bytes(found.kept[STDOUT])) == (7, b"half\n")


async def test_v4_is_chosen_by_whoever_knows_no_v5(doctor: Doctor, cluster: Cluster, node: str, pod: str) -> None:
    """Both are offered. To a node that says it takes WebSockets the server hands the handshake on as it is, and this
    one's streaming server knows v4."""
    declared = {"status": {"declaredFeatures": ["ExtendWebSocketsToKubelet"]}}
    cluster.patch(f"node/{node}", declared, sub="/status")
    try:
        result, said = await ran(await doctor.step(pod, "where"))
    finally:
        cluster.patch(f"node/{node}", {"status": {"declaredFeatures": None}}, sub="/status")
    assert result.exit_code == DONE, result
    assert (said["protocol"], said["stdout"]) == ("v4.channel.k8s.io", f"{pod} app\n")


def test_the_configuration_is_what_a_person_sees_and_the_node_hears_nothing(
    doctor: Doctor, pod: str, tmp_path: Path
) -> None:
    """`alertmedic actions dry-run` with a configuration file: the exact argument list, and no more than look-ups."""
    sign = tmp_path / "sign"
    section = {"enabled": True, "evidence": False, "api": doctor.cluster.url, "token_file": str(doctor.token_file),
               "ca_file": str(doctor.cluster.ca_file), "namespaces": ["shop"],
               "diagnostics": {"thread_dump": ["touch", str(sign)]}}  # fmt: skip
    (tmp_path / "alertmedic.yaml").write_text(json.dumps({"kubernetes": section}))
    asked = ["--service", f"pod/shop/{pod}", "--param", "namespace=shop", "--param", f"name={pod}",
             "--param", "diagnostic=thread_dump"]  # fmt: skip
    done = subprocess.run(
        [PYTHON, "-m", "agent", "actions", "dry-run", DIAGNOSE, "--config", tmp_path / "alertmedic.yaml", *asked],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"--object=pod/shop/{pod}" in done.stdout
    assert f'--command=["touch", "{sign}"]' in done.stdout
    assert "note   the server would accept it" in done.stdout
    assert not sign.exists()


# -- what is refused


async def test_a_replaced_pod_is_refused(doctor: Doctor, cluster: Cluster, node: str, pod: str) -> None:
    step = await doctor.step(pod, "where")
    cluster.delete(f"pod/shop/{pod}")
    result, said = await ran(step)
    assert (result.exit_code, said) == (NOTHING_DONE, {}), "gone"
    make_pod(cluster, pod, node)
    result, said = await ran(step)
    assert (result.exit_code, said) == (NOTHING_DONE, {})
    assert "made anew" in result.stderr


async def test_a_restarted_container_is_refused(doctor: Doctor, cluster: Cluster, pod: str) -> None:
    step = await doctor.step(pod, "where")
    started(cluster, pod, "second")
    result, _ = await ran(step)
    assert result.exit_code == NOTHING_DONE
    assert "started anew" in result.stderr


async def test_an_output_during_which_the_container_changed_is_nobodys(
    doctor: Doctor, cluster: Cluster, pod: str, tmp_path: Path
) -> None:
    here, gone = tmp_path / "here", tmp_path / "gone"
    program = ("import os, sys, time\nopen(sys.argv[1], 'w').close()\n"
               "while not os.path.exists(sys.argv[2]): time.sleep(0.05)")  # fmt: skip
    doctor.diagnostics = {"waits": [PYTHON, "-c", program, str(here), str(gone)]}
    step = await doctor.step(pod, "waits")
    running = asyncio.create_task(ran(step))
    while not here.exists() and not running.done():
        await asyncio.sleep(0.05)
    await asyncio.to_thread(started, cluster, pod, "second")
    gone.touch()
    result, said = await running
    assert result.exit_code == FAILED
    assert said["exit_code"] == 0
    assert "started anew" in said["not_certain_whose"]


async def test_without_the_right_the_plan_says_so_and_nothing_runs(cluster: Cluster, tmp_path: Path, pod: str) -> None:
    """The release `ops` has every other action on."""
    hands = Doctor(cluster, tmp_path, "ops")
    step = await hands.step(pod, "where")
    assert any("refuses it to this account" in n and "/exec: 403" in n for n in hands.notes), hands.notes
    result, said = await ran(step)
    assert (result.exit_code, said) == (NOTHING_DONE, {})
    assert "403" in result.stderr
    assert 'cannot get resource "pods/exec"' in result.stderr


@pytest.mark.parametrize("verbs", [["get"], ["create"]])
async def test_the_server_asks_for_both_verbs(cluster: Cluster, tmp_path: Path, pod: str, verbs: list[str]) -> None:
    """Kubernetes 1.35 and newer: `get` for the request, `create` for what it does. Each alone is not enough."""
    account = f"only-{verbs[0]}-{pod}"
    meta = {"name": account, "namespace": "shop"}
    rbac = {"apiVersion": "rbac.authorization.k8s.io/v1", "metadata": meta}
    cluster.create({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta})
    cluster.create(rbac | {"kind": "Role", "rules": [{"apiGroups": [""], "resources": ["pods/exec"], "verbs": verbs}]})
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": account}
    subjects = [{"kind": "ServiceAccount", **meta}]
    cluster.create(rbac | {"kind": "RoleBinding", "subjects": subjects, "roleRef": reference})
    (tmp_path / "token").write_text(cluster.token_of("shop", account))
    api = Api(cluster.url, str(tmp_path / "token"), str(cluster.ca_file), ("shop",))
    with pytest.raises(ApiError) as refused:
        await stream(api, Name("pod", "shop", pod), "app", ["id"], 20.0)
    assert refused.value.status == 403
    assert "needs get and create on pods/exec" in str(refused.value)
    assert ('cannot get resource "pods/exec"' in str(refused.value)) is (verbs == ["create"])


async def test_a_container_has_to_be_there_and_named(doctor: Doctor, cluster: Cluster, node: str, pod: str) -> None:
    refused = await doctor.declined(DIAGNOSE, namespace="shop", name=pod, diagnostic="where", container="db")
    assert refused.reason is Refusal.PROTECTED_TARGET
    assert "has no container db, only app" in refused.detail
    why = objection(Api(cluster.url, str(doctor.token_file), str(cluster.ca_file), ("shop",)),
                    Name("pod", "shop", pod), "db", ["id"])  # fmt: skip
    assert why is not None
    assert why.status == 400
    assert "container db is not valid for pod" in str(why)
    make_pod(cluster, f"{pod}-two", node, ("app", "proxy"))
    refused = await doctor.declined(DIAGNOSE, namespace="shop", name=f"{pod}-two", diagnostic="where")
    assert "name one of app, proxy" in refused.detail
    _, said = await ran(await doctor.step(f"{pod}-two", "where", container="proxy"))
    assert said["stdout"] == f"{pod}-two proxy\n"


async def test_a_container_that_does_not_run_is_refused(doctor: Doctor, cluster: Cluster, pod: str) -> None:
    waiting = container_status(3) | {"state": {"waiting": {"reason": "CrashLoopBackOff"}}}
    cluster.call("PATCH", path_of(f"pod/shop/{pod}") + "/status", {"status": {"containerStatuses": [waiting]}})
    refused = await doctor.declined(DIAGNOSE, namespace="shop", name=pod, diagnostic="where")
    assert "does not run" in refused.detail


@pytest.mark.parametrize("name", ["id", "where;id", "../where", "thread_dump"])
async def test_only_what_the_operator_configured_can_be_named(doctor: Doctor, pod: str, name: str) -> None:
    refused = await doctor.declined(DIAGNOSE, namespace="shop", name=pod, diagnostic=name)
    assert refused.reason in (Refusal.BAD_PARAMETERS, Refusal.PROTECTED_TARGET)


async def test_without_diagnostics_there_is_no_such_action(doctor: Doctor, pod: str) -> None:
    doctor.diagnostics = {}
    refused = await doctor.declined(DIAGNOSE, namespace="shop", name=pod, diagnostic="where")
    assert refused.reason is Refusal.NO_INVENTORY
    assert "kubernetes_diagnostics" in refused.detail


async def test_other_namespaces_are_not_entered(doctor: Doctor) -> None:
    for namespace in ("payments", "kube-system"):
        refused = await doctor.declined(DIAGNOSE, namespace=namespace, name="x", diagnostic="where")
        assert refused.reason is Refusal.PROTECTED_TARGET


def test_the_account_may_enter_only_its_namespaces(doctor: Doctor) -> None:
    with pytest.raises(Answer, match="403"):
        doctor.cluster.call("GET", "/api/v1/namespaces/payments/pods/x/exec?command=id&stdout=true",
                            token=doctor.token_file.read_text())  # fmt: skip


async def test_a_node_that_does_not_answer_is_told(doctor: Doctor, cluster: Cluster) -> None:
    name = f"lost{next(numbers)}"
    cluster.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}})
    status = {"addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
              "daemonEndpoints": {"kubeletEndpoint": {"Port": 1}}}  # fmt: skip
    cluster.patch(f"node/{name}", {"status": status}, sub="/status")
    make_pod(cluster, name, name)
    result, said = await ran(await doctor.step(name, "where"))
    assert result.exit_code == FAILED, result
    assert "refused" in said.get("did_not_run", "") + said.get("broke_off", "") + result.stderr
    cluster.delete(f"node/{name}")
