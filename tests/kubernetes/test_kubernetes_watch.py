"""Evidence from a real API server: what changes shows, a compacted history is listed anew, outages are outlasted."""

from __future__ import annotations

import asyncio
import json
import signal
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import Cluster, container_status, path_of, pod, replica_set, workload

from agent.sources import EvidenceRequest
from agent.sources import kubernetes_cache as cache_module
from agent.sources.kubernetes import KubernetesQuery, KubernetesSource
from agent.sources.kubernetes_cache import Cache, Connection, Watched
from rules.model import Fact

pytestmark = pytest.mark.full


@pytest.fixture
def connection(cluster: Cluster, tmp_path: Path) -> Connection:
    token = tmp_path / "token"
    token.write_text(cluster.token_of("wide", "alertmedic"))
    return Connection(cluster.url, token, cluster.ca_file)


async def until(watched: Watched, condition: Callable[[], object], seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            watched.changed.clear()
            if not condition():
                await watched.changed.wait()


def of(cache: Cache, kind: str) -> Watched:
    return next(w for w in cache.watched if w.kind == kind)


async def facts(cache: Cache, **labels: str) -> dict[str, Fact]:
    alerts = ({"namespace": "shop", **labels},)
    asked = EvidenceRequest(queries=(KubernetesQuery(),), services=(), start=0.0, end=2e9, alerts=alerts)
    (evidence,) = await KubernetesSource(cache).fetch(asked, 10.0)
    assert evidence.missing is None
    return {f"{f.kind} {f.subject}": f for f in evidence.facts}


async def test_the_charts_account_may_watch_all_of_it(cluster: Cluster, connection: Connection) -> None:
    async with Cache(connection, [], nodes=True) as cache:
        for watched in cache.watched:
            await until(watched, lambda w=watched: w.watches)  # type: ignore[misc]
        assert cache.missing() == {}


async def test_a_pods_death_and_a_rollout_show(cluster: Cluster, connection: Connection) -> None:
    async with Cache(connection, ["shop"], nodes=False) as cache:
        watched = of(cache, "pod")
        await until(watched, lambda: watched.watches)
        item = cluster.create(workload("Deployment", "seen"))
        above = replica_set(cluster, item, 1)
        made = pod(cluster, "seen-x", above)
        dead = {"status": {"containerStatuses": [container_status(3, "OOMKilled", ready=False)]}}
        cluster.call("PATCH", path_of("pod/shop/seen-x") + "/status", dead)
        uid = made["metadata"]["uid"]
        await until(watched, lambda: uid in watched.items and watched.items[uid].attributes["restarts"] == 3.0)
        await until(of(cache, "deployment"), lambda: any(i.name == "seen" for i in cache.items("deployment")))
        await until(of(cache, "replicaset"), lambda: any(i.owner.endswith("/seen") for i in cache.items("replicaset")))
        found = await facts(cache, pod="seen-x")
        assert found["kubernetes.pod pod/shop/seen-x"].attributes["last_reason"] == "OOMKilled"
        assert found["kubernetes.pod pod/shop/seen-x"].attributes["owner"] == "deployment/shop/seen"
        assert found["kubernetes.rollout deployment/shop/seen"].attributes["revision"] == 1.0


async def test_a_compacted_version_is_listed_anew(cluster: Cluster, connection: Connection) -> None:
    """410 Gone from the real server: the version that the watch would go on from is no longer kept."""
    pod(cluster, "gone-0", None)
    async with Cache(connection, ["shop"], nodes=False) as cache:
        watched = of(cache, "pod")
        await until(watched, lambda: watched.watches)
        watched.version = "1"  # as if the agent had been cut off for hours
        cluster.patch("pod/shop/gone-0", {"metadata": {"labels": {"x": "y"}}})
        revision = cluster.get("pod/shop/gone-0")["metadata"]["resourceVersion"]
        compact = json.dumps({"revision": revision, "physical": False}).encode()
        where = f"http://127.0.0.1:{cluster.etcd_ports[0]}/v3/kv/compaction"
        await asyncio.to_thread(lambda: urllib.request.urlopen(urllib.request.Request(where, data=compact), timeout=10))
        cluster.stop("apiserver", signal.SIGKILL)  # its watch cache forgets too
        watched.version = "1"
        await asyncio.to_thread(cluster.start_server)
        await until(watched, lambda: watched.lists == 2 and watched.missing is None)
        assert any(i.name == "gone-0" for i in cache.items("pod"))


async def test_an_outage_is_told_and_outlasted(
    cluster: Cluster, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "PAUSE_SECONDS", (0.2, 1.0))
    pod(cluster, "kept-0", None)
    async with Cache(connection, ["shop"], nodes=False) as cache:
        watched = of(cache, "pod")
        await until(watched, lambda: watched.watches)
        cluster.stop("apiserver", signal.SIGKILL)
        await until(watched, lambda: watched.missing is not None)
        assert "kubernetes.pod pod/shop/kept-0" in await facts(cache, pod="kept-0"), "known from before"
        await asyncio.to_thread(cluster.start_server)
        pod(cluster, "kept-1", None)
        await until(watched, lambda: any(i.name == "kept-1" for i in cache.items("pod")))
        assert watched.missing is None


async def test_a_dropped_connection_goes_on_where_it_was(cluster: Cluster, connection: Connection) -> None:
    """Through a proxy that is cut: no event in between is lost, and nothing is listed again."""
    pod(cluster, "cut-0", None)
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", cluster.port)
        writers.extend((writer, up_writer))

        async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            try:
                while data := await source.read(65536):
                    target.write(data)
                    await target.drain()
            except OSError:
                pass
            target.close()

        await asyncio.gather(pump(reader, up_writer), pump(up_reader, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    through = Connection(f"https://127.0.0.1:{port}", connection.token_file, connection.ca_file)
    async with server, Cache(through, ["shop"], nodes=False) as cache:
        watched = of(cache, "pod")
        await until(watched, lambda: watched.watches)
        for writer in writers:
            writer.transport.abort()
        pod(cluster, "cut-1", None)
        await until(watched, lambda: any(i.name == "cut-1" for i in cache.items("pod")))
        assert watched.lists == 1
        assert watched.watches >= 2
