"""A real kube-apiserver with a real etcd, for the full tests. No controller, scheduler or kubelet runs: where one would
act, the test does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from chart import TOOLS

from actions.builtin.kubernetes_api import KINDS

ADMIN = "admin-token-of-the-tests"
Document = dict[str, Any]


class Answer(Exception):  # noqa: N818
    def __init__(self, status: int, body: str) -> None:
        super().__init__(f"{status} {body[:500]}")
        self.status = status


def apiserver_program() -> Path:
    return _built("kube-apiserver")


def kubelet_program() -> Path:
    """What answers pods/exec: tests/kubernetes/apiserver/kubelet."""
    return _built("kubelet")


def gateway_definitions() -> list[Path]:
    """The Gateway API's own definitions of Gateway and HTTPRoute, of its standard channel."""
    directory = _built("gateway-api", "gateway", "sigs.k8s.io/gateway-api")
    return [directory / f"gateway.networking.k8s.io_{kind}.yaml" for kind in ("gateways", "httproutes")]


def operator_definitions() -> list[Path]:
    """The Prometheus operator's own definitions of what the chart makes for it."""
    directory = _built(
        "prometheus-operator", "prometheus-operator", "github.com/prometheus-operator/prometheus-operator"
    )
    kinds = ("servicemonitors", "prometheusrules", "alertmanagerconfigs")
    return [directory / f"monitoring.coreos.com_{kind}.yaml" for kind in kinds]


def _built(program: str, directory: str = "apiserver", module: str = "k8s.io/kubernetes") -> Path:
    """What tools/build-apiserver has made, of the version that the tests' module names."""
    modules = (Path(__file__).parent / directory / "go.mod").read_text()
    found = re.search(rf"{re.escape(module)} (v[0-9.]+)", modules)
    assert found
    path = TOOLS / f"{program}-{found[1]}"
    if path.exists():
        return path
    message = f"{path} is not built: run tools/build-apiserver"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


@dataclass
class Cluster:
    """`call` speaks as cluster administrator, or with any token."""

    directory: Path
    etcd: str
    program: Path
    port: int = field(default_factory=free_port)
    etcd_ports: tuple[int, int] = field(default_factory=lambda: (free_port(), free_port()))
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    # Pages of a list then come from etcd, so that compacting it is what a slow reader would meet.
    server_options: tuple[str, ...] = ("--feature-gates=ListFromCacheSnapshot=false",)

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    @property
    def ca_file(self) -> Path:
        return self.directory / "certs" / "apiserver.crt"

    def start(self) -> None:
        (self.directory / "tokens.csv").write_text(f'{ADMIN},admin,admin,"system:masters"\n')
        key = self.directory / "sa.key"
        if not key.exists():
            subprocess.run(
                ["openssl", "genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out", key],
                check=True,
                capture_output=True,
                timeout=60,
            )
        self.start_etcd()
        self.start_server()

    def _spawn(self, name: str, argv: list[str]) -> None:
        log = (self.directory / f"{name}.log").open("ab")
        self.processes[name] = subprocess.Popen(argv, stdout=log, stderr=log, start_new_session=True)
        log.close()

    def start_etcd(self) -> None:
        client, peer = (f"http://127.0.0.1:{port}" for port in self.etcd_ports)
        self._spawn("etcd", [
            self.etcd, "--name=test", f"--data-dir={self.directory}/etcd", f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}", f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=test={peer}",
        ])  # fmt: skip

    def start_server(self, *more: str) -> None:
        key = self.directory / "sa.key"
        self._spawn("apiserver", [
            str(self.program), f"--etcd-servers=http://127.0.0.1:{self.etcd_ports[0]}", "--bind-address=127.0.0.1",
            f"--secure-port={self.port}", f"--cert-dir={self.directory}/certs",
            f"--token-auth-file={self.directory}/tokens.csv", "--authorization-mode=RBAC",
            f"--service-account-key-file={key}", f"--service-account-signing-key-file={key}",
            "--service-account-issuer=https://kubernetes.default.svc", "--service-cluster-ip-range=10.0.0.0/24",
            "--allow-privileged=true", "--event-ttl=1h", "--endpoint-reconciler-type=none", "--v=1",
            *self.server_options, *more,
        ])  # fmt: skip
        self.wait_ready()

    def wait_ready(self, seconds: float = 180.0) -> None:
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(Answer, OSError):
                self.call("GET", "/readyz", raw=True)
                self.call("GET", "/api/v1/namespaces/default")
                return
            if self.processes["apiserver"].poll() is not None or time.monotonic() > deadline:
                raise AssertionError((self.directory / "apiserver.log").read_text()[-3000:])
            time.sleep(0.2)

    def stop(self, name: str, how: int = signal.SIGTERM) -> None:
        process = self.processes.pop(name)
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(how)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)

    def close(self) -> None:
        for name in ("apiserver", "etcd"):
            if name in self.processes:
                self.stop(name, signal.SIGKILL)
        shutil.rmtree(self.directory, ignore_errors=True)

    def call(
        self, method: str, path: str, body: Document | list[Any] | None = None, *, token: str = ADMIN,
        content: str = "", raw: bool = False,
    ) -> Any:  # fmt: skip
        kind = content or ("application/merge-patch+json" if method == "PATCH" else "application/json")
        request = urllib.request.Request(
            self.url + path,
            data=None if body is None else json.dumps(body).encode(),
            method=method,
            headers={"Authorization": f"Bearer {token}", "Content-Type": kind},
        )
        context = ssl.create_default_context(cafile=self.ca_file)
        try:
            with urllib.request.urlopen(request, timeout=30, context=context) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise Answer(error.code, error.read().decode(errors="replace")) from None
        return text if raw else json.loads(text)

    def create(self, item: Document, *, dry_run: bool = False, strict: bool = False) -> Document:
        """`strict`: as kubectl does it, an unknown field is an error."""
        asked = ["dryRun=All"] * dry_run + ["fieldValidation=Strict"] * strict
        query = "?" + "&".join(asked) if asked else ""
        made: Document = self.call("POST", _collection(item) + query, item)
        return made

    def get(self, name: str) -> Document:
        found: Document = self.call("GET", path_of(name))
        return found

    def patch(self, name: str, body: Document, *, sub: str = "") -> Document:
        changed: Document = self.call("PATCH", path_of(name) + sub, body)
        return changed

    def delete(self, name: str) -> None:
        with contextlib.suppress(Answer):
            self.call("DELETE", f"{path_of(name)}?gracePeriodSeconds=0")

    def token_of(self, namespace: str, account: str) -> str:
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 3600}}
        made = self.call("POST", f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token", body)
        token: str = made["status"]["token"]
        return token

    def namespace(self, name: str, **labels: str) -> None:
        self.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
        # What the service account controller would do.
        self.create({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": name}})


PLURALS = {
    "NetworkPolicy": "networkpolicies",
    "Ingress": "ingresses",
    "EndpointSlice": "endpointslices",
}


def _collection(item: Document) -> str:
    group = item["apiVersion"]
    base = f"/api/{group}" if "/" not in group else f"/apis/{group}"
    namespace = item["metadata"].get("namespace")
    plural = PLURALS.get(item["kind"], item["kind"].lower() + "s")
    return f"{base}/namespaces/{namespace}/{plural}" if namespace else f"{base}/{plural}"


def path_of(name: str) -> str:
    """`deployment/shop/cart` as the server's path."""
    kind, *rest = name.split("/")
    group, plural, _ = KINDS[kind]
    where = f"/namespaces/{rest[0]}" if len(rest) == 2 else ""
    return f"/{group}{where}/{plural}/{rest[-1]}"


def template(app: str, **more: Any) -> Document:
    container = {"name": "app", "image": f"{app}:1", "resources": {"limits": {"memory": "256Mi", "cpu": "500m"}}}
    return {"metadata": {"labels": {"app": app}}, "spec": {"containers": [container | more]}}


def workload(kind: str, name: str, namespace: str = "shop", replicas: int = 3) -> Document:
    spec: Document = {"selector": {"matchLabels": {"app": name}}, "template": template(name)}
    if kind != "DaemonSet":
        spec["replicas"] = replicas
    if kind == "StatefulSet":
        spec["serviceName"] = name
    metadata = {"name": name, "namespace": namespace}
    return {"apiVersion": "apps/v1", "kind": kind, "metadata": metadata, "spec": spec}


def owned(item: Document, by: Document) -> Document:
    reference = {"apiVersion": by["apiVersion"], "kind": by["kind"], "name": by["metadata"]["name"],
                 "uid": by["metadata"]["uid"], "controller": True}  # fmt: skip
    item["metadata"]["ownerReferences"] = [reference]
    return item


def replica_set(cluster: Cluster, deployment: Document, revision: int) -> Document:
    """What the deployment controller makes of the deployment's present template."""
    name = f"{deployment['metadata']['name']}-{revision:05d}"
    pod = json.loads(json.dumps(deployment["spec"]["template"]))
    pod["metadata"]["labels"]["pod-template-hash"] = f"{revision:05d}"
    metadata = {"name": name, "namespace": deployment["metadata"]["namespace"],
                "annotations": {"deployment.kubernetes.io/revision": str(revision)},
                "labels": pod["metadata"]["labels"]}  # fmt: skip
    spec = {"replicas": 1, "selector": {"matchLabels": pod["metadata"]["labels"]}, "template": pod}
    item = {"apiVersion": "apps/v1", "kind": "ReplicaSet", "metadata": metadata, "spec": spec}
    return cluster.create(owned(item, deployment))


def controller_revision(cluster: Cluster, item: Document, revision: int) -> Document:
    """What the controllers of stateful and daemon sets keep of a template."""
    metadata = {"name": f"{item['metadata']['name']}-{revision:05d}", "namespace": item["metadata"]["namespace"]}
    data = {"spec": {"template": {**item["spec"]["template"], "$patch": "replace"}}}
    made = {"apiVersion": "apps/v1", "kind": "ControllerRevision", "metadata": metadata, "revision": revision,
            "data": data}  # fmt: skip
    return cluster.create(owned(made, item))


def pod(cluster: Cluster, name: str, by: Document | None, namespace: str = "shop", node: str = "") -> Document:
    """A pod that runs, as kubelet would report it."""
    spec = template(name.rpartition("-")[0] or name)
    metadata = {"name": name, "namespace": namespace, **spec["metadata"]}
    item: Document = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": dict(spec["spec"])}
    if node:
        item["spec"]["nodeName"] = node
    if by is not None:
        owned(item, by)
    cluster.create(item)
    ready = [{"type": "Ready", "status": "True"}]
    status = {"phase": "Running", "conditions": ready, "containerStatuses": [container_status(restarts=0)]}
    changed: Document = cluster.call("PATCH", path_of(f"pod/{namespace}/{name}") + "/status", {"status": status})
    return changed


def container_status(restarts: int, reason: str = "", ready: bool = True) -> Document:
    status: Document = {"name": "app", "image": "app:1", "imageID": "", "restartCount": restarts, "ready": ready,
                        "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}}}  # fmt: skip
    if reason:
        status["lastState"] = {"terminated": {"reason": reason, "exitCode": 137, "finishedAt": "2026-01-01T00:00:00Z"}}
    return status


DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"


class Definition(yaml.SafeLoader):
    """With `=` as the text that it is everywhere but in YAML 1.1."""


Definition.add_constructor("tag:yaml.org,2002:value", yaml.SafeLoader.construct_yaml_str)


@contextlib.contextmanager
def defined(cluster: Cluster, files: list[Path]) -> Iterator[None]:
    """With these custom resources, once the server serves them. They go again with all objects: the other modules'
    server has none."""
    made: list[Document] = []
    try:
        for file in files:
            definition = yaml.load(file.read_text(), Definition)
            cluster.create(definition)
            made.append(definition)
        asyncio.run(_served(cluster, made))
        yield
    finally:
        for definition in made:
            cluster.call("DELETE", f"{DEFINITIONS}/{definition['metadata']['name']}")


async def _served(cluster: Cluster, definitions: list[Document]) -> None:
    """Established takes the server a moment and is told by a condition; then each is served by its own handler."""
    async with asyncio.timeout(60):
        for definition in definitions:
            while True:
                found = await asyncio.to_thread(cluster.call, "GET", f"{DEFINITIONS}/{definition['metadata']['name']}")
                conditions = {c["type"]: c["status"] for c in found.get("status", {}).get("conditions") or []}
                if conditions.get("Established") == "True":
                    break
                await asyncio.sleep(0.1)
        for definition in definitions:
            spec = definition["spec"]
            version = next(v["name"] for v in spec["versions"] if v["served"])
            while True:
                try:
                    path = f"/apis/{spec['group']}/{version}/{spec['names']['plural']}"
                    await asyncio.to_thread(cluster.call, "GET", path)
                    break
                except Answer as error:
                    if error.status != 404:
                        raise
                    await asyncio.sleep(0.1)
