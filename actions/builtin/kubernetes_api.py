"""The API server as the shipped Kubernetes actions speak to it: one request at a time, over http.client.

Used by the other `actions.builtin.kubernetes*`. http.client only: these programs get a quarter of a CPU, and to import
a Kubernetes client would take most of their time. It follows no redirect and reads no proxy, kubeconfig or environment:
address, token and certificate authority are arguments, so they are in the plan. The token is read again for every
request, since it rotates. Every change is made as field manager `alertmedic`, checked
strictly, and bound to the resourceVersion that was just read. Objects outside the namespaces of the plan, and those
that the agent itself lives in, are refused before anything is asked.
"""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

TIMEOUT_SECONDS = 8.0
MAX_BODY = 16 * 1024 * 1024
PAGE = 250
BUSY_TRIES = 4  # of a request that is answered 429 by the server's own flow control
MAX_RETRY_SECONDS = 5.0
MANAGER = "alertmedic"
OWN_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
SYSTEM_NAMESPACES = frozenset({"kube-system", "kube-public", "kube-node-lease"})
STRATEGIC = "application/strategic-merge-patch+json"

Document = dict[str, Any]
Query = dict[str, str] | Sequence[tuple[str, str]]

# Our word for a kind -> path of its API group, resource, kind as owner references spell it.
KINDS: dict[str, tuple[str, str, str]] = {
    "pod": ("api/v1", "pods", "Pod"),
    "configmap": ("api/v1", "configmaps", "ConfigMap"),
    "node": ("api/v1", "nodes", "Node"),
    "deployment": ("apis/apps/v1", "deployments", "Deployment"),
    "replicaset": ("apis/apps/v1", "replicasets", "ReplicaSet"),
    "statefulset": ("apis/apps/v1", "statefulsets", "StatefulSet"),
    "daemonset": ("apis/apps/v1", "daemonsets", "DaemonSet"),
    "controllerrevision": ("apis/apps/v1", "controllerrevisions", "ControllerRevision"),
    "cronjob": ("apis/batch/v1", "cronjobs", "CronJob"),
    "job": ("apis/batch/v1", "jobs", "Job"),
    "autoscaler": ("apis/autoscaling/v2", "horizontalpodautoscalers", "HorizontalPodAutoscaler"),
    "event": ("api/v1", "events", "Event"),
}
WORKLOADS = frozenset({"deployment", "statefulset", "daemonset"})


class ApiError(Exception):
    """The API server did not do what was asked. `status` is 0 where no answer came, so nobody knows what it did;
    `budget`: a disruption budget forbids the eviction now; `retry_after`: seconds the server asks to wait."""

    def __init__(self, what: str, status: int = 0, *, budget: bool = False, retry_after: float = 1.0) -> None:
        super().__init__(what)
        self.status = status
        self.budget = budget
        self.retry_after = retry_after


class Refused(Exception):  # noqa: N818 - not an error: the target must not be touched, and has not been
    """The target is protected, or is not what was planned."""


@dataclass(frozen=True, slots=True)
class Name:
    """`kind/namespace/name`, or `node/name`."""

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}" if self.kind == "node" else f"{self.kind}/{self.namespace}/{self.name}"

    @classmethod
    def parse(cls, text: str) -> Name:
        """Raises ValueError for what is no such name."""
        kind, *rest = text.split("/")
        if kind not in KINDS or len(rest) != (1 if kind == "node" else 2) or not all(rest):
            raise ValueError(f"{text!r:.200} is no kind/namespace/name that this action knows")
        return cls(kind, "" if kind == "node" else rest[0], rest[-1])


class Api:
    """Requests to one API server. `namespaces`: what may be touched; empty: all but the system's own."""

    def __init__(self, url: str, token_file: str, ca_file: str, namespaces: tuple[str, ...] = ()) -> None:
        parts = urlsplit(url)
        if parts.scheme != "https" or not parts.hostname or parts.username is not None:
            raise ValueError(f"--api: {url!r:.200} is no https URL without credentials")
        self._host, self._port, self._prefix = parts.hostname, parts.port or 443, parts.path.rstrip("/")
        self._token_file, self.namespaces = Path(token_file), namespaces
        self._context = ssl.create_default_context(cafile=ca_file)

    def allow(self, name: Name) -> None:
        """Raises Refused for what lies outside the plan's namespaces, or is the agent itself."""
        if name.kind == "node":
            return
        if self.namespaces and name.namespace not in self.namespaces:
            raise Refused(f"{name}: the namespace is not one of {', '.join(self.namespaces)}")
        if not self.namespaces and name.namespace in SYSTEM_NAMESPACES:
            raise Refused(f"{name}: the namespace is the cluster's own; name it in kubernetes.namespaces to act in it")
        if is_own(name):
            raise Refused(f"{name} is what the agent itself runs in")

    def get(self, name: Name) -> Document:
        self.allow(name)
        return self.call("GET", _path(name))

    def patch(self, name: Name, body: Document, *, dry_run: bool = False) -> Document:
        """A strategic merge patch. The body holds the resourceVersion it is based on: another one by now is a 409."""
        self.allow(name)
        return self.call("PATCH", _path(name), body, dry_run=dry_run, query={"fieldValidation": "Strict"})

    def evict(self, name: Name, uid: str, *, dry_run: bool = False) -> None:
        """Asks the eviction API, which keeps disruption budgets, for the pod with this uid and no other. The caller has
        asked whether it is allowed."""
        options: Document = {"preconditions": {"uid": uid}}
        if dry_run:
            options["dryRun"] = ["All"]
        body = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": name.name, "namespace": name.namespace},
            "deleteOptions": options,
        }
        self.call("POST", f"{_path(name)}/eviction", body, dry_run=dry_run)

    def list(self, kind: str, namespace: str, **selectors: str) -> Iterator[Document]:
        """Every object, page by page. A list that expires half-way (410) is begun anew, once."""
        group, resource, _ = KINDS[kind]
        path = f"/{group}/namespaces/{quote(namespace, safe='')}/{resource}" if namespace else f"/{group}/{resource}"
        for again in (True, False):
            seen: list[Document] = []
            token = ""
            try:
                while True:
                    query = {"limit": str(PAGE), **selectors, **({"continue": token} if token else {})}
                    page = self.call("GET", path, query=query)
                    seen += page.get("items") or []
                    token = page.get("metadata", {}).get("continue") or ""
                    if not token:
                        yield from seen
                        return
            except ApiError as error:
                if error.status != 410 or not again:
                    raise

    def text(self, path: str, query: Query) -> str:
        """A plain text answer, as logs are."""
        return self._request("GET", path, None, query)[1].decode(errors="replace")

    def upgrade(self, path: str, query: Sequence[tuple[str, str]]) -> tuple[str, dict[str, str], ssl.SSLContext]:
        """(URL, headers, TLS context) with which a WebSocket is opened to the same server, as the same account."""
        authority = f"[{self._host}]" if ":" in self._host else self._host
        target = f"wss://{authority}:{self._port}{self._prefix}{path}?{urlencode(query)}"
        return target, self._headers(), self._context

    def _headers(self) -> dict[str, str]:
        return {"User-Agent": MANAGER, "Authorization": f"Bearer {self._token_file.read_text().strip()}"}

    def call(
        self, method: str, path: str, body: Document | None = None, *, dry_run: bool = False,
        query: dict[str, str] | None = None,
    ) -> Document:  # fmt: skip
        """The object that the server answers with. What its flow control turns away is sent again, a bounded number of
        times: nothing was done with it. Raises ApiError."""
        asked = dict(query or {})
        if method != "GET":
            asked["fieldManager"] = MANAGER
            if dry_run:
                asked["dryRun"] = "All"
        for left in reversed(range(BUSY_TRIES)):
            try:
                status, text = self._request(method, path, body, asked)
                break
            except ApiError as error:
                if error.status != 429 or error.budget or not left:
                    raise
                time.sleep(min(error.retry_after, MAX_RETRY_SECONDS))
        try:
            answer = json.loads(text)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise ApiError(f"{method} {path}: the answer is no JSON object", status)
        return answer

    def _request(self, method: str, path: str, body: Document | None, query: Query) -> tuple[int, bytes]:
        headers = {"Accept": "application/json", **self._headers()}
        if body is not None:
            headers["Content-Type"] = STRATEGIC if method == "PATCH" else "application/json"
        target = f"{self._prefix}{path}" + (f"?{urlencode(query)}" if query else "")
        connection = http.client.HTTPSConnection(self._host, self._port, timeout=TIMEOUT_SECONDS, context=self._context)
        try:
            connection.request(method, target, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            text = response.read(MAX_BODY + 1)
        except (OSError, http.client.HTTPException) as error:
            raise ApiError(f"{method} {path}: {error or type(error).__name__}") from error
        finally:
            connection.close()
        if len(text) > MAX_BODY:
            raise ApiError(f"{method} {path}: the answer has more than {MAX_BODY} bytes", response.status)
        if not 200 <= response.status < 300:
            raise _error(method, path, response, text)
        return response.status, text


def _error(method: str, path: str, response: http.client.HTTPResponse, text: bytes) -> ApiError:
    try:
        status = json.loads(text)
    except ValueError:
        status = {}
    status = status if isinstance(status, dict) else {}
    causes = (status.get("details") or {}).get("causes") or []
    message = str(status.get("message") or text[:200].decode(errors="replace"))
    try:
        retry_after = max(0.0, float(response.headers.get("Retry-After", "1")))
    except ValueError:
        retry_after = 1.0
    return ApiError(
        f"{method} {path}: {response.status} {' '.join(message.split())[:400]}",
        response.status,
        budget=any(c.get("reason") == "DisruptionBudget" for c in causes),
        retry_after=retry_after,
    )


def _path(name: Name) -> str:
    group, resource, _ = KINDS[name.kind]
    where = f"/namespaces/{quote(name.namespace, safe='')}" if name.namespace else ""
    return f"/{group}{where}/{resource}/{quote(name.name, safe='')}"


def log_path(name: Name) -> str:
    return f"{_path(name)}/log"


def exec_path(name: Name) -> str:
    return f"{_path(name)}/exec"


def own_pod() -> tuple[str, str]:
    """(namespace, name) of the pod that this process runs in; empty where it runs in none."""
    try:
        return OWN_NAMESPACE.read_text().strip(), socket.gethostname()
    except OSError:
        return "", ""


def is_own(name: Name) -> bool:
    """Whether that is the agent's pod, or by its name the workload that made it."""
    namespace, pod = own_pod()
    if not pod or name.namespace != namespace:
        return False
    return pod == name.name if name.kind == "pod" else name.kind in WORKLOADS and pod.startswith(f"{name.name}-")


def owner(item: Document) -> tuple[str, str] | None:
    """(kind as we call it, name) of the object's controller; None without one, or of a kind we do not know."""
    for reference in item["metadata"].get("ownerReferences") or []:
        if reference.get("controller"):
            for kind, (_, _, spelled) in KINDS.items():
                if spelled == reference["kind"]:
                    return kind, reference["name"]
    return None


def workload(api: Api, name: Name) -> tuple[Name, Document]:
    """The workload that has to change for this object, by owner references: pod -> ReplicaSet -> Deployment. Raises
    Refused where nothing owns it that could be rolled out."""
    found = api.get(name)
    while name.kind not in WORKLOADS:
        above = owner(found)
        if above is None:
            raise Refused(f"{name} has no deployment, statefulset or daemonset above it")
        name = Name(above[0], name.namespace, above[1])
        found = api.get(name)
    return name, found
