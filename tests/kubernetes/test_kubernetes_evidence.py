"""Evidence from a scripted API server: pages, bookmarks, 410, drops, outages, bounds; facts with their owners.

The real API server has its turn in test_kubernetes_watch.py, in the full tests."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiohttp import web

from agent.sources import EvidenceRequest
from agent.sources import kubernetes_cache as cache_module
from agent.sources.kubernetes import EVIDENCE, KubernetesQuery, KubernetesSource
from agent.sources.kubernetes_cache import KINDS, Cache, Connection, Watched, item_of
from rules.model import Evidence, Fact

Document = dict[str, Any]


@dataclass
class Server:
    """Lists from `objects`, watches from `feed`; `list_status` and `watch_status` answer once each with an error."""

    objects: dict[str, list[Document]] = field(default_factory=dict)
    version: int = 10
    feeds: dict[str, asyncio.Queue[Document | None]] = field(default_factory=dict)
    list_status: list[int] = field(default_factory=list)
    watch_status: list[int] = field(default_factory=list)
    lists: list[str] = field(default_factory=list)
    watches: list[str] = field(default_factory=list)
    url: str = ""

    def feed(self, resource: str) -> asyncio.Queue[Document | None]:
        return self.feeds.setdefault(resource, asyncio.Queue())

    async def handle(self, request: web.Request) -> web.StreamResponse:
        assert request.headers["Authorization"] == "Bearer secret"
        resource = request.path.rsplit("/", 1)[1]
        if request.query.get("watch"):
            if resource == "pods":
                self.watches.append(request.query["resourceVersion"])
                if self.watch_status:
                    return web.json_response({"message": "no"}, status=self.watch_status.pop(0))
            answer = web.StreamResponse()
            await answer.prepare(request)
            while (event := await self.feed(resource).get()) is not None:
                await answer.write(event["raw"] if "raw" in event else orjson.dumps(event) + b"\n")
            return answer
        if resource == "pods":
            self.lists.append(request.query.get("continue", ""))
            if self.list_status and (status := self.list_status.pop(0)) != 200:
                return web.json_response({"message": "the server says no"}, status=status)
        items = self.objects.get(resource, [])
        at, limit = int(request.query.get("continue", "0")), int(request.query["limit"])
        metadata: Document = {"resourceVersion": str(self.version)}
        if at + limit < len(items):
            metadata["continue"] = str(at + limit)
        return web.json_response({"metadata": metadata, "items": items[at : at + limit]})


@contextlib.asynccontextmanager
async def serving(server: Server) -> AsyncIterator[Server]:
    runner = web.ServerRunner(web.Server(server.handle), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    server.url = f"http://{host}:{port}"
    try:
        yield server
    finally:
        for queue in server.feeds.values():
            queue.put_nowait(None)
        await runner.cleanup()


@pytest.fixture
async def server(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Server]:
    monkeypatch.setattr(cache_module, "PAUSE_SECONDS", (0.01, 0.05))
    async with serving(Server()) as made:
        yield made


@pytest.fixture
def connection(server: Server, tmp_path: Path) -> Connection:
    (tmp_path / "token").write_text("secret\n")
    return Connection(server.url, tmp_path / "token", tmp_path / "ca.crt", 5.0, max_objects=100)


async def until(watched: Watched, condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            watched.changed.clear()
            if not condition():
                await watched.changed.wait()


def pods_of(cache: Cache) -> Watched:
    return next(w for w in cache.watched if w.kind == "pod")


def names(cache: Cache) -> set[str]:
    return {i.name for i in cache.items("pod")}


def pod(name: str, version: int = 1, uid: str = "", **status: Any) -> Document:
    return {"metadata": {"name": name, "namespace": "shop", "uid": uid or f"uid-{name}",
                         "resourceVersion": str(version), "labels": {"app": "cart"}},
            "spec": {"nodeName": "a", "containers": [{"name": "app"}]}, "status": status}  # fmt: skip


async def test_pages_then_a_watch_with_bookmarks(server: Server, connection: Connection, monkeypatch: Any) -> None:
    monkeypatch.setattr(cache_module, "PAGE", 2)
    server.objects["pods"] = [pod(f"p{i}") for i in range(5)]
    async with Cache(connection, ["shop"], nodes=False) as cache:
        watched = pods_of(cache)
        await until(watched, lambda: watched.watches == 1)
        assert names(cache) == {f"p{i}" for i in range(5)}
        assert server.lists == ["", "2", "4"]
        feed = server.feed("pods")
        await feed.put({"type": "ADDED", "object": pod("new", 11)})
        await feed.put({"type": "DELETED", "object": pod("p0", 12)})
        await feed.put({"type": "MODIFIED", "object": pod("p1", 13, phase="Failed")})
        await feed.put({"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "40"}}})
        await until(watched, lambda: watched.version == "40")
        assert names(cache) == {"p1", "p2", "p3", "p4", "new"}
        await feed.put(None)  # the server ends the watch: on from the bookmark, without listing again
        await until(watched, lambda: watched.watches == 2)
        assert server.watches == ["10", "40"]
        assert watched.lists == 1


@pytest.mark.parametrize("where", ["status", "event"])
async def test_gone_lists_anew(server: Server, connection: Connection, where: str) -> None:
    server.objects["pods"] = [pod("old")]
    async with Cache(connection, ["shop"], nodes=False) as cache:
        watched = pods_of(cache)
        await until(watched, lambda: watched.watches == 1)
        server.objects["pods"], server.version = [pod("young")], 99
        if where == "status":
            server.watch_status.append(410)
            await server.feed("pods").put(None)
        else:
            await server.feed("pods").put({"type": "ERROR", "object": {"code": 410, "message": "too old"}})
        await until(watched, lambda: watched.lists == 2)
        assert names(cache) == {"young"}
        await until(watched, lambda: server.watches[-1] == "99")


async def test_a_list_that_expires_half_way_begins_anew(
    server: Server, connection: Connection, monkeypatch: Any
) -> None:
    monkeypatch.setattr(cache_module, "PAGE", 2)
    server.objects["pods"] = [pod(f"p{i}") for i in range(5)]
    server.list_status = [200, 410]
    async with Cache(connection, ["shop"], nodes=False) as cache:
        watched = pods_of(cache)
        await until(watched, lambda: watched.watches == 1)
        assert server.lists == ["", "2", "", "2", "4"]
        assert len(names(cache)) == 5


async def test_an_outage_keeps_what_was_known_and_says_since_when(server: Server, connection: Connection) -> None:
    server.objects["pods"] = [pod("p")]
    async with Cache(connection, ["shop"], nodes=False) as cache:
        watched = pods_of(cache)
        await until(watched, lambda: watched.watches == 1)
        server.watch_status += [500] * 3
        await server.feed("pods").put(None)
        await until(watched, lambda: watched.missing is not None)
        assert "500" in str(watched.missing)
        assert names(cache) == {"p"}, "what was known is still the best there is"
        (evidence,) = await KubernetesSource(cache).fetch(request(), 5.0)
        assert evidence.missing is None
        assert any("pods" in w and "500" in w for w in evidence.warnings)
        await until(watched, lambda: watched.missing is None)
        assert watched.lists == 1, "the watch went on where it was"


async def test_without_the_right_it_is_missing_with_the_reason(server: Server, connection: Connection) -> None:
    server.list_status = [403] * 1000
    async with Cache(connection, ["shop"], nodes=False) as cache:
        watched = pods_of(cache)
        await until(watched, lambda: "403" in str(watched.missing))
        (evidence,) = await KubernetesSource(cache).fetch(request(), 5.0)
        assert evidence.facts == ()
        assert "403" in str(evidence.missing)
        assert "the server says no" in str(evidence.missing)


async def test_too_many_objects_are_given_up(server: Server, connection: Connection) -> None:
    server.objects["pods"] = [pod(f"p{i}") for i in range(101)]
    async with Cache(connection, ["shop"], nodes=False) as cache:
        watched = pods_of(cache)
        await until(watched, lambda: "more than 100" in str(watched.missing))
        assert not watched.items


async def test_events_are_bounded_by_forgetting_the_oldest(
    server: Server, connection: Connection, monkeypatch: Any
) -> None:
    monkeypatch.setattr(cache_module, "MAX_EVENTS", 50)
    async with Cache(connection, ["shop"], nodes=False) as cache:
        watched = next(w for w in cache.watched if w.kind == "event")
        await until(watched, lambda: watched.watches == 1)
        for i in range(200):
            body = {"metadata": {"name": f"e{i}", "namespace": "shop", "uid": f"e{i}", "resourceVersion": str(20 + i)}}
            await server.feed("events").put({"type": "ADDED", "object": body})
        await until(watched, lambda: watched.version == "219")
        assert [i.name for i in watched.items.values()] == [f"e{i}" for i in range(150, 200)]


async def test_what_is_no_object_lists_anew(server: Server, connection: Connection) -> None:
    server.objects["pods"] = [pod("p")]
    async with Cache(connection, ["shop"], nodes=False) as cache:
        watched = pods_of(cache)
        await until(watched, lambda: watched.watches == 1)
        await server.feed("pods").put({"raw": b'{"type": "ADDED", "object": 3}\n'})
        await until(watched, lambda: watched.lists == 2)
        assert names(cache) == {"p"}


# -- facts


def request(**labels: str) -> EvidenceRequest:
    alerts = ({"namespace": "shop", **labels},)
    return EvidenceRequest(queries=(KubernetesQuery(),), services=(), start=0.0, end=2000.0, alerts=alerts)


def reference(kind: str, name: str) -> list[Document]:
    return [{"kind": kind, "name": name, "controller": True}]


def shop() -> dict[str, list[Document]]:
    """A deployment with a bad second revision, an autoscaler at its bound, a node under pressure, a volume."""
    at = "1970-01-01T00:30:00Z"

    def meta(name: str, **more: Any) -> Document:
        return {"name": name, "namespace": "shop", "uid": f"u-{name}", "creationTimestamp": at, "generation": 1, **more}

    def revision(number: int) -> Document:
        return {"metadata": meta(f"cart-{number}", ownerReferences=reference("Deployment", "cart"),
                                 annotations={"deployment.kubernetes.io/revision": str(number)}),
                "spec": {"template": {"spec": {"containers": [{"image": f"cart:{number}"}]}}}}  # fmt: skip

    ended = {"terminated": {"reason": "OOMKilled", "exitCode": 137, "finishedAt": at}}
    waiting = {"waiting": {"reason": "CrashLoopBackOff"}}
    sick = {"metadata": meta("cart-2-x", labels={"app": "cart"}, ownerReferences=reference("ReplicaSet", "cart-2")),
            "spec": {"nodeName": "a", "containers": [{"name": "app", "livenessProbe": {}}],
                     "volumes": [{"persistentVolumeClaim": {"claimName": "data"}}]},
            "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "False"}],
                       "containerStatuses": [{"name": "app", "restartCount": 7, "state": waiting,
                                              "lastState": ended}]}}  # fmt: skip
    other = {"metadata": meta("other-0"), "spec": {"nodeName": "b"}, "status": {"phase": "Running"}}
    about = {"kind": "Pod", "namespace": "shop", "name": "cart-2-x"}
    event = {
        "metadata": meta("ev"),
        "type": "Warning",
        "reason": "BackOff",
        "message": "restarting\nfailed",
        "count": 9,
    }
    event |= {"lastTimestamp": at, "involvedObject": about}
    target = {"kind": "Deployment", "name": "cart"}
    return {
        "pods": [sick, other],
        "replicasets": [revision(1), revision(2)],
        "deployments": [{"metadata": meta("cart"), "spec": {"replicas": 3}, "status": {"availableReplicas": 1}}],
        "horizontalpodautoscalers": [
            {"metadata": meta("cart"), "spec": {"maxReplicas": 3, "scaleTargetRef": target},
             "status": {"desiredReplicas": 3}}
        ],
        "persistentvolumeclaims": [{"metadata": meta("data"), "status": {"phase": "Pending"}}],
        "services": [{"metadata": meta("cart"), "spec": {"selector": {"app": "cart"}}}],
        "endpointslices": [
            {"metadata": meta("cart-s", labels={"kubernetes.io/service-name": "cart"}),
             "endpoints": [{"conditions": {"ready": False}}]}
        ],
        "events": [event],
        "nodes": [
            {"metadata": {"name": "a", "uid": "n-a"},
             "status": {"conditions": [{"type": "Ready", "status": "True"},
                                       {"type": "MemoryPressure", "status": "True"}]}}
        ],
    }  # fmt: skip


def cached(objects: dict[str, list[Document]]) -> Cache:
    """A cache that knows this, without anybody to ask."""
    cache = Cache(Connection("http://127.0.0.1:1", Path("/none"), Path("/none")), ["shop"], nodes=True)
    for watched in cache.watched:
        documents = objects.get(KINDS[watched.kind].resource, [])
        watched.items = {i.uid: i for i in (item_of(watched.kind, d) for d in documents)}
        watched.missing = None
    return cache


async def look(asked: EvidenceRequest) -> dict[str, list[Fact]]:
    (evidence,) = await KubernetesSource(cached(shop())).fetch(asked, 5.0)
    assert isinstance(evidence, Evidence)
    assert evidence.name == EVIDENCE
    found: dict[str, list[Fact]] = {}
    for fact in evidence.facts:
        found.setdefault(fact.kind, []).append(fact)
    return found


@pytest.mark.parametrize(
    ("labels", "subject"),
    [
        ({"pod": "cart-2-x"}, "pod/shop/cart-2-x"),
        ({"deployment": "cart"}, "deployment/shop/cart"),
        ({"horizontalpodautoscaler": "cart"}, "autoscaler/shop/cart"),
    ],
)
async def test_whatever_the_alert_names_the_whole_chain_is_told(labels: dict[str, str], subject: str) -> None:
    found = await look(request(**labels))
    (pod_fact,) = found["kubernetes.pod"]
    assert pod_fact.subject == "pod/shop/cart-2-x"
    assert pod_fact.service == (subject if "pod" in labels else "deployment/shop/cart")
    attributes = pod_fact.attributes
    assert attributes["owner"] == "deployment/shop/cart"
    assert (attributes["last_reason"], attributes["last_exit_code"], attributes["restarts"]) == (
        "OOMKilled",
        137.0,
        7.0,
    )
    assert (attributes["waiting_reason"], attributes["ended_seconds_ago"]) == ("CrashLoopBackOff", 200.0)
    for kind in ("workload", "rollout", "autoscaler"):
        assert {f.service for f in found[f"kubernetes.{kind}"]} == {subject}, "a cause at the subject sees them"
    (rollout,) = found["kubernetes.rollout"]
    assert (rollout.attributes["images_before"], rollout.attributes["images"]) == ("cart:1", "cart:2")
    assert (rollout.attributes["image_changed"], rollout.attributes["age_seconds"]) == (True, 200.0)
    assert found["kubernetes.workload"][0].attributes["short"] == 2.0
    assert found["kubernetes.autoscaler"][0].attributes["at_max"] is True
    assert found["kubernetes.claim"][0].attributes["phase"] == "Pending"
    assert found["kubernetes.endpoints"][0].attributes["not_ready"] == 1.0
    assert found["kubernetes.node"][0].attributes["memory_pressure"] is True
    (event,) = found["kubernetes.event"]
    assert event.attributes["message"] == "restarting failed", "one line, whatever was sent"
    assert event.service == pod_fact.service


async def test_a_service_of_the_topology_leads_to_its_workload() -> None:
    asked = EvidenceRequest(queries=(KubernetesQuery(),), services=("cart",), start=0.0, end=2000.0)
    found = await look(asked)
    assert {f.service for kind in ("pod", "workload", "rollout") for f in found[f"kubernetes.{kind}"]} == {"cart"}


async def test_a_node_leads_to_its_pods() -> None:
    found = await look(request(node="b"))
    assert [f.subject for f in found["kubernetes.pod"]] == ["pod/shop/other-0"]


async def test_a_namespace_alone_tells_what_is_unhealthy_there() -> None:
    found = await look(request())
    assert {f.subject for f in found["kubernetes.pod"]} == {"pod/shop/cart-2-x", "pod/shop/other-0"}


@pytest.mark.full
async def test_ten_thousand_pods_stay_within_bounds(server: Server, connection: Connection) -> None:
    """Memory and CPU are measured by `python -m bench kubernetes`; here only that every object arrives and a look is
    bounded."""
    server.objects["pods"] = [pod(f"p{i}", phase="Running") for i in range(10_000)]
    big = Connection(connection.url, connection.token_file, connection.ca_file, 30.0, 50_000)
    async with Cache(big, ["shop"], nodes=False) as cache:
        watched = pods_of(cache)
        await until(watched, lambda: watched.watches == 1)
        assert len(watched.items) == 10_000
        (evidence,) = await KubernetesSource(cache).fetch(request(pod="p17"), 30.0)
        assert len(evidence.facts) <= 400
