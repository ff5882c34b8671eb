"""A bounded copy of what an API server knows of a cluster: listed once, then watched.

Kept by `agent.sources.kubernetes`, which answers from it, so that an incident costs the API server nothing and is
answered while the API server is away. Each kind (and namespace) has one task: list in pages, watch from there with
bookmarks, go on from the last resourceVersion when a watch ends, list anew on 410 Gone, wait with growing pauses when
nobody answers. Of an object only what evidence tells is kept, so 10,000 pods take some tens of megabytes; more objects
than the bound, and the kind is given up and says so. It never writes, never reads a Secret or a ConfigMap, and trusts
no text it is sent: names are data.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import orjson

from agent.sources import bounded

PAGE = 500
WATCH_SECONDS = 240  # after which the server ends a watch, and we go on from where it was
LINE_BYTES = 8 * 1024 * 1024  # one object of a watch
PAUSE_SECONDS = (1.0, 30.0)  # after a failure: first, at most
GIVEN_UP_SECONDS = 300.0  # until a kind with too many objects is tried again
MAX_EVENTS = 2_000
Value = str | float | bool
Document = dict[str, Any]


class Item(NamedTuple):
    """What is kept of one object. `owner`: `kind/namespace/name` of its controller. `labels`: of pods; of
    services the selector."""

    kind: str
    namespace: str
    name: str
    uid: str
    owner: str
    labels: Mapping[str, str]
    attributes: Mapping[str, Value]

    @property
    def path(self) -> str:
        return f"{self.kind}/{self.namespace}/{self.name}" if self.namespace else f"{self.kind}/{self.name}"


def seconds_of(text: str | None) -> float:
    """Unix seconds of a Kubernetes time; 0.0 for none."""
    if not text:
        return 0.0
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return 0.0


OWNERS = {
    "ReplicaSet": "replicaset",
    "Deployment": "deployment",
    "StatefulSet": "statefulset",
    "DaemonSet": "daemonset",
    "Job": "job",
    "CronJob": "cronjob",
}
NODE_CONDITIONS = {
    "Ready": "ready",
    "MemoryPressure": "memory_pressure",
    "DiskPressure": "disk_pressure",
    "PIDPressure": "pid_pressure",
    "NetworkUnavailable": "network_unavailable",
}


def _pod(item: Document) -> dict[str, Value]:
    status, spec = item.get("status") or {}, item.get("spec") or {}
    found: dict[str, Value] = {
        "phase": sys.intern(status.get("phase", "Unknown")),
        "node": sys.intern(spec.get("nodeName", "")),
        "ready": False,
        "restarts": 0.0,
        "deleting": "deletionTimestamp" in item["metadata"],
        "scheduled": True,
    }
    for condition in status.get("conditions") or []:
        if condition["type"] == "Ready":
            found["ready"] = condition["status"] == "True"
            found["ready_since"] = seconds_of(condition.get("lastTransitionTime"))
        elif condition["type"] == "PodScheduled" and condition["status"] == "False":
            found["scheduled"] = False
            found["unschedulable"] = bounded(str(condition.get("message", "")), 200)
    probes = [c for c in spec.get("containers") or [] if c.get("readinessProbe") or c.get("livenessProbe")]
    found["probes"] = float(len(probes))
    for state in (*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])):
        found["restarts"] = float(found["restarts"]) + float(state.get("restartCount", 0))
        if waiting := (state.get("state") or {}).get("waiting"):
            found["waiting_reason"] = sys.intern(str(waiting.get("reason", ""))[:60])
            found["container"] = sys.intern(state["name"])
        ended = (state.get("lastState") or {}).get("terminated") or (state.get("state") or {}).get("terminated")
        if ended and seconds_of(ended.get("finishedAt")) >= float(found.get("last_finished", 0.0)):
            found["last_reason"] = sys.intern(str(ended.get("reason", ""))[:60])
            found["last_exit_code"] = float(ended.get("exitCode", 0))
            found["last_finished"] = seconds_of(ended.get("finishedAt"))
            found["container"] = sys.intern(state["name"])
    claims = [
        v["persistentVolumeClaim"]["claimName"] for v in spec.get("volumes") or [] if v.get("persistentVolumeClaim")
    ]
    if claims:
        found["claims"] = ",".join(claims[:5])
    return found


def _workload(item: Document) -> dict[str, Value]:
    spec, status = item.get("spec") or {}, item.get("status") or {}
    daemon = "desiredNumberScheduled" in status or item.get("kind") == "DaemonSet"
    found: dict[str, Value] = {
        "desired": float(status.get("desiredNumberScheduled", 0) if daemon else spec.get("replicas", 1)),
        "ready": float(status.get("numberReady" if daemon else "readyReplicas", 0) or 0),
        "updated": float(status.get("updatedNumberScheduled" if daemon else "updatedReplicas", 0) or 0),
        "available": float(status.get("numberAvailable" if daemon else "availableReplicas", 0) or 0),
        "paused": bool(spec.get("paused")),
        "observed": status.get("observedGeneration", 0) >= item["metadata"].get("generation", 0),
        "images": _images(spec),
    }
    for condition in status.get("conditions") or []:
        if condition["type"] == "Progressing" and condition["status"] == "False":
            found["stuck_reason"] = str(condition.get("reason", ""))[:60]
    return found


def _images(spec: Document) -> str:
    containers = ((spec.get("template") or {}).get("spec") or {}).get("containers") or []
    return sys.intern(",".join(str(c.get("image", ""))[:120] for c in containers[:4]))


def _replica_set(item: Document) -> dict[str, Value]:
    revision = (item["metadata"].get("annotations") or {}).get("deployment.kubernetes.io/revision", "0")
    return {
        "revision": float(revision) if revision.isdecimal() else 0.0,
        "images": _images(item.get("spec") or {}),
        "desired": float((item.get("spec") or {}).get("replicas", 0)),
    }


def _event(item: Document) -> dict[str, Value]:
    about = item.get("involvedObject") or {}
    series = item.get("series") or {}
    last = (
        series.get("lastObservedTime")
        or item.get("lastTimestamp")
        or item.get("eventTime")
        or item["metadata"].get("creationTimestamp")
    )
    kind = str(about.get("kind", "")).lower()
    namespace = about.get("namespace", "")
    return {
        "about": f"{kind}/{namespace}/{about.get('name', '')}" if namespace else f"{kind}/{about.get('name', '')}",
        "type": sys.intern(str(item.get("type", ""))[:20]),
        "reason": sys.intern(str(item.get("reason", ""))[:60]),
        "message": bounded(str(item.get("message", "")), 200),
        "count": float(series.get("count") or item.get("count") or 1),
        "last_seen": seconds_of(last),
    }


def _node(item: Document) -> dict[str, Value]:
    found: dict[str, Value] = {"unschedulable": bool((item.get("spec") or {}).get("unschedulable"))}
    for condition in (item.get("status") or {}).get("conditions") or []:
        name = NODE_CONDITIONS.get(condition["type"])
        if name:
            found[name] = condition["status"] == "True"
            found[f"{name}_since"] = seconds_of(condition.get("lastTransitionTime"))
    found["not_ready"] = found.get("ready") is False  # a node that does not say is not counted as one
    found["pressure"] = any(found.get(f"{what}_pressure") is True for what in ("memory", "disk", "pid"))
    return found


def _autoscaler(item: Document) -> dict[str, Value]:
    spec, status = item["spec"], item.get("status") or {}
    target = spec.get("scaleTargetRef") or {}
    kind = OWNERS.get(target.get("kind", ""), "other")
    return {
        "target": f"{kind}/{item['metadata']['namespace']}/{target.get('name', '')}",
        "min": float(spec.get("minReplicas", 1)),
        "max": float(spec["maxReplicas"]),
        "current": float(status.get("currentReplicas", 0) or 0),
        "desired": float(status.get("desiredReplicas", 0) or 0),
        "at_max": (status.get("desiredReplicas", 0) or 0) >= spec["maxReplicas"],
    }


def _claim(item: Document) -> dict[str, Value]:
    return {"phase": str((item.get("status") or {}).get("phase", "Unknown"))}


def _endpoints(item: Document) -> dict[str, Value]:
    states = [bool((e.get("conditions") or {}).get("ready", True)) for e in item.get("endpoints") or []]
    service = (item["metadata"].get("labels") or {}).get("kubernetes.io/service-name", "")
    return {"of": service, "ready": float(sum(states)), "not_ready": float(len(states) - sum(states))}


def _nothing(_: Document) -> dict[str, Value]:
    return {}


class Kind(NamedTuple):
    group: str
    resource: str
    extract: Callable[[Document], dict[str, Value]]


KINDS: dict[str, Kind] = {
    "pod": Kind("api/v1", "pods", _pod),
    "event": Kind("api/v1", "events", _event),
    "service": Kind("api/v1", "services", _nothing),
    "persistentvolumeclaim": Kind("api/v1", "persistentvolumeclaims", _claim),
    "deployment": Kind("apis/apps/v1", "deployments", _workload),
    "replicaset": Kind("apis/apps/v1", "replicasets", _replica_set),
    "statefulset": Kind("apis/apps/v1", "statefulsets", _workload),
    "daemonset": Kind("apis/apps/v1", "daemonsets", _workload),
    "autoscaler": Kind("apis/autoscaling/v2", "horizontalpodautoscalers", _autoscaler),
    "endpoints": Kind("apis/discovery.k8s.io/v1", "endpointslices", _endpoints),
    "node": Kind("api/v1", "nodes", _node),
}


def item_of(kind: str, document: Document) -> Item:
    """Raises KeyError, TypeError or ValueError for what is no such object."""
    metadata = document["metadata"]
    namespace = sys.intern(metadata.get("namespace", ""))
    owner = ""
    for reference in metadata.get("ownerReferences") or []:
        if reference.get("controller"):
            owner = f"{OWNERS.get(reference['kind'], reference['kind'].lower())}/{namespace}/{reference['name']}"
    labels: Mapping[str, str] = {}
    if kind == "pod":
        labels = {sys.intern(k): sys.intern(v) for k, v in (metadata.get("labels") or {}).items()}
    elif kind == "service":
        labels = dict((document.get("spec") or {}).get("selector") or {})
    attributes = KINDS[kind].extract(document)
    attributes["created"] = seconds_of(metadata.get("creationTimestamp"))
    return Item(kind, namespace, metadata["name"], metadata["uid"], sys.intern(owner), labels, attributes)


@dataclass(frozen=True, slots=True)
class Connection:
    """How to reach the API server. The token is read again for every request: it rotates."""

    url: str
    token_file: Path
    ca_file: Path
    timeout_seconds: float = 10.0
    max_objects: int = 50_000


class GoneError(Exception):
    """The resourceVersion is too old: list anew."""


@dataclass
class Watched:
    """One kind in one namespace (or, with "", in all), and how well it is known. `missing`: why it is not, None if it
    is; `since`: unix seconds from when on that holds."""

    kind: str
    namespace: str
    items: dict[str, Item] = field(default_factory=dict)
    version: str = ""
    missing: str | None = "not listed yet"
    since: float = 0.0
    lists: int = 0
    watches: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def path(self) -> str:
        group, resource, _ = KINDS[self.kind]
        return f"/{group}/namespaces/{self.namespace}/{resource}" if self.namespace else f"/{group}/{resource}"


class Cache:
    """`async with Cache(...)`: keeps every wanted kind in memory until the block ends."""

    def __init__(self, connection: Connection, namespaces: Iterable[str], *, nodes: bool) -> None:
        self.connection = connection
        wanted = tuple(namespaces) or ("",)
        self.watched = [Watched(kind, ns) for kind in KINDS if kind != "node" for ns in wanted]
        if nodes:
            self.watched.append(Watched("node", ""))
        self._tasks: list[asyncio.Task[None]] = []
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Cache:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None), trust_env=False
        )
        self._tasks = [asyncio.create_task(self._keep(w), name=f"kubernetes {w.path}") for w in self.watched]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    def items(self, kind: str) -> Iterable[Item]:
        for watched in self.watched:
            if watched.kind == kind:
                yield from watched.items.values()

    def missing(self) -> dict[str, str]:
        """kind (with its namespace) -> why it is not known."""
        return {w.path.removeprefix("/"): w.missing for w in self.watched if w.missing is not None}

    async def _keep(self, watched: Watched) -> None:
        pause = PAUSE_SECONDS[0]
        while True:
            try:
                if not watched.version:
                    await self._list(watched)
                await self._watch(watched)
                pause = PAUSE_SECONDS[0]
                continue
            except GoneError:
                watched.version = ""
                continue
            except _TooMany as error:
                self._lost(watched, str(error))
                watched.items, watched.version = {}, ""
                await asyncio.sleep(GIVEN_UP_SECONDS)
                continue
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                self._lost(watched, bounded(f"{error or type(error).__name__}"))
            except (KeyError, TypeError, ValueError) as error:
                self._lost(watched, bounded(f"the answer is not understood: {type(error).__name__}: {error}"))
                watched.version = ""
            await asyncio.sleep(pause * random.uniform(0.75, 1.25))  # noqa: S311 - spreads load, guards nothing
            pause = min(2 * pause, PAUSE_SECONDS[1])

    def _lost(self, watched: Watched, reason: str) -> None:
        if watched.missing is None:
            watched.since = time.time()
        watched.missing = reason
        watched.changed.set()

    def _known(self, watched: Watched) -> None:
        if watched.missing is not None:
            watched.missing, watched.since = None, time.time()
        watched.changed.set()

    async def _list(self, watched: Watched) -> None:
        """All pages, then the swap: a list that fails half-way leaves what was known."""
        found: dict[str, Item] = {}
        token, version = "", ""
        while True:
            query = {"limit": str(PAGE)} | ({"continue": token} if token else {})
            async with self._get(watched.path, query, self.connection.timeout_seconds) as answer:
                page = orjson.loads(await answer.read())
            for document in page.get("items") or []:
                item = item_of(watched.kind, document)
                found[item.uid] = item
            version = version or page["metadata"]["resourceVersion"]
            token = page["metadata"].get("continue") or ""
            if watched.kind == "event" and len(found) >= MAX_EVENTS:
                break  # the watch begins at the first page's version, so nothing new is missed
            if len(found) > self.connection.max_objects:
                raise _TooMany(f"more than {self.connection.max_objects} objects (kubernetes.max_objects)")
            if not token:
                break
        watched.items, watched.version = found, version
        watched.lists += 1
        self._known(watched)

    async def _watch(self, watched: Watched) -> None:
        """Until the server ends it. Raises GoneError when the version is too old for it."""
        query = {"watch": "1", "allowWatchBookmarks": "true", "resourceVersion": watched.version,
                 "timeoutSeconds": str(WATCH_SECONDS)}  # fmt: skip
        async with self._get(watched.path, query, WATCH_SECONDS + 30.0) as answer:
            watched.watches += 1
            self._known(watched)
            rest = b""
            async for chunk in answer.content.iter_any():
                *lines, rest = (rest + chunk).split(b"\n")
                if len(rest) > LINE_BYTES:
                    raise ValueError(f"an object of more than {LINE_BYTES} bytes")
                for line in lines:
                    self._apply(watched, orjson.loads(line))
                watched.changed.set()

    def _apply(self, watched: Watched, event: Document) -> None:
        kind, document = event["type"], event["object"]
        if kind == "ERROR":
            if document.get("code") == 410:
                raise GoneError
            raise aiohttp.ClientError(f"watch: {document.get('code')} {bounded(str(document.get('message')))}")
        watched.version = document["metadata"]["resourceVersion"]
        if kind == "BOOKMARK":
            return
        uid = document["metadata"]["uid"]
        known = watched.items.pop(uid, None)
        if kind == "DELETED":
            return
        watched.items[uid] = item_of(watched.kind, document)  # the newest last, which is how events are forgotten
        if known is None and watched.kind == "event":
            while len(watched.items) > MAX_EVENTS:
                del watched.items[next(iter(watched.items))]
        elif len(watched.items) > self.connection.max_objects:
            raise _TooMany(f"more than {self.connection.max_objects} objects (kubernetes.max_objects)")

    @contextlib.asynccontextmanager
    async def _get(self, path: str, query: dict[str, str], seconds: float) -> AsyncIterator[aiohttp.ClientResponse]:
        assert self._session is not None
        token = (await asyncio.to_thread(self.connection.token_file.read_text)).strip()
        context = await asyncio.to_thread(self._trust) if self.connection.url.startswith("https:") else True
        async with self._session.get(
            self.connection.url.rstrip("/") + path,
            params=query,
            headers={"Authorization": f"Bearer {token}", "Accept": "application/json"},
            ssl=context,
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(total=None, connect=self.connection.timeout_seconds, sock_read=seconds),
        ) as answer:
            if answer.status == 410:
                raise GoneError
            if answer.status != 200:
                text = bounded((await answer.content.read(2000)).decode(errors="replace"))
                raise aiohttp.ClientError(f"{path}: {answer.status} {text}")
            yield answer

    def _trust(self) -> ssl.SSLContext:
        """Made once, and anew when the file has changed."""
        stamp = self.connection.ca_file.stat().st_mtime_ns
        if self._trusted is None or self._trusted[0] != stamp:
            self._trusted = stamp, ssl.create_default_context(cafile=str(self.connection.ca_file))
        return self._trusted[1]

    _trusted: tuple[int, ssl.SSLContext] | None = None


class _TooMany(Exception):  # noqa: N818
    """A kind with more objects than are kept."""
