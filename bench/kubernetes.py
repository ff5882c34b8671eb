"""What watching a large cluster costs: 10,000 pods, then 1,000 events and 1,000 pod changes a minute.

`python -m bench.kubernetes [SECONDS]`, and part of `make bench`. The API server is a process of its own that speaks
lists and watches; the cache under test is alone in its process. The reference is a client that keeps the objects as
decoded JSON, which is what a cache of whole objects does at least.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import orjson
import psutil
from aiohttp import web

PODS = 10_000
PER_MINUTE = 1_000


def pod(i: int, version: int = 1) -> dict[str, Any]:
    """About 3.5 KB, as a small pod of a real cluster has."""
    at = "2026-01-01T00:00:00Z"
    env = [{"name": f"SETTING_{n}", "value": f"value-{n}-of-the-service"} for n in range(12)]
    container = {"name": "app", "image": f"registry.example.com/team/app-{i % 200}:1.{i % 7}", "env": env,
                 "resources": {"limits": {"memory": "256Mi"}, "requests": {"cpu": "100m", "memory": "128Mi"}},
                 "readinessProbe": {"httpGet": {"path": "/ready", "port": 8080}},
                 "volumeMounts": [{"name": f"v{n}", "mountPath": f"/var/run/v{n}"} for n in range(3)]}  # fmt: skip
    names = ("Initialized", "Ready", "ContainersReady", "PodScheduled")
    conditions = [{"type": n, "status": "True", "lastProbeTime": None, "lastTransitionTime": at} for n in names]
    fields = {f"f:spec-{n}": {f"f:member-{m}": {} for m in range(4)} for n in range(10)}
    owner = {"kind": "ReplicaSet", "name": f"app-{i % 200}-7c9d8b6f5d", "uid": f"rs-{i % 200}", "controller": True}
    return {
        "metadata": {"name": f"app-{i % 200}-7c9d8b6f5d-{i:05d}", "namespace": f"ns-{i % 40}", "uid": f"uid-{i:08d}",
                     "resourceVersion": str(version), "creationTimestamp": at, "ownerReferences": [owner],
                     "labels": {"app": f"app-{i % 200}", "pod-template-hash": "7c9d8b6f5d", "team": f"t{i % 9}"},
                     "managedFields": [{"manager": "kubelet", "fieldsV1": fields}]},
        "spec": {"nodeName": f"node-{i % 300}", "containers": [container],
                 "volumes": [{"name": f"v{n}", "emptyDir": {}} for n in range(3)]},
        "status": {"phase": "Running", "conditions": conditions, "podIP": f"10.{i >> 16}.{i >> 8 & 255}.{i & 255}",
                   "containerStatuses": [{"name": "app", "ready": True, "restartCount": version % 5,
                                          "state": {"running": {"startedAt": at}}}]},
    }  # fmt: skip


def event(i: int) -> dict[str, Any]:
    return {
        "metadata": {"name": f"e{i}", "namespace": f"ns-{i % 40}", "uid": f"e-{i}", "resourceVersion": str(100 + i)},
        "involvedObject": {"kind": "Pod", "namespace": f"ns-{i % 40}", "name": f"app-{i % 200}-7c9d8b6f5d-{i:05d}"},
        "type": "Warning", "reason": "Unhealthy", "count": 1, "lastTimestamp": "2026-01-01T00:00:00Z",
        "message": "Readiness probe failed: Get http://10.0.0.1:8080/ready: context deadline exceeded",
    }  # fmt: skip


async def serve() -> None:
    """Prints its port, then serves until its input ends."""
    pages = [orjson.dumps([pod(j) for j in range(i, i + 500)]) for i in range(0, PODS, 500)]

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        resource = request.path.rsplit("/", 1)[1]
        if request.query.get("watch"):
            answer = web.StreamResponse()
            await answer.prepare(request)
            i = 0
            with contextlib.suppress(ConnectionResetError):  # who watches goes at the end of a measurement
                while request.transport is not None and not request.transport.is_closing():
                    await asyncio.sleep(60.0 / PER_MINUTE)
                    if resource in ("pods", "events"):
                        body = pod(i % PODS, 100 + i) if resource == "pods" else event(i)
                        kind = "MODIFIED" if resource == "pods" else "ADDED"
                        await answer.write(orjson.dumps({"type": kind, "object": body}) + b"\n")
                    i += 1
            return answer
        at = int(request.query.get("continue", "0")) if resource == "pods" else len(pages) - 1
        metadata = {"resourceVersion": "10"} | ({"continue": str(at + 1)} if at + 1 < len(pages) else {})
        items = pages[at] if resource == "pods" else b"[]"
        body = b'{"metadata":' + orjson.dumps(metadata) + b',"items":' + items + b"}"
        return web.Response(body=body, content_type="application/json")

    runner = web.ServerRunner(web.Server(handle))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


async def measure(port: int, seconds: float, whole: bool) -> dict[str, float]:
    from agent.sources import EvidenceRequest, kubernetes_cache
    from agent.sources.kubernetes import KubernetesQuery, KubernetesSource
    from agent.sources.kubernetes_cache import Cache, Connection

    if whole:  # the reference: every object as it was decoded
        made = kubernetes_cache.item_of

        def keep(kind: str, document: dict[str, Any]) -> Any:
            item = made(kind, document)
            return item._replace(attributes={**item.attributes, "document": document})

        kubernetes_cache.item_of = keep
    process = psutil.Process()
    with tempfile.TemporaryDirectory() as directory:
        token = Path(directory) / "token"
        token.write_text("x")
        before = process.memory_info().rss
        began = sum(process.cpu_times()[:2])
        async with Cache(Connection(f"http://127.0.0.1:{port}", token, token), [], nodes=False) as cache:
            pods = next(w for w in cache.watched if w.kind == "pod")
            while not pods.watches:
                pods.changed.clear()
                await pods.changed.wait()
            listed, after_list = sum(process.cpu_times()[:2]), process.memory_info().rss
            await asyncio.sleep(seconds)
            watched, peak = sum(process.cpu_times()[:2]), process.memory_info().rss
            labels = {"namespace": "ns-7", "pod": "app-7-7c9d8b6f5d-00007"}
            asked = EvidenceRequest((KubernetesQuery(),), (), 0.0, 2e9, alerts=(labels,))
            source = KubernetesSource(cache)
            looks = []
            for _ in range(5):
                start = time.perf_counter()
                (evidence,) = await source.fetch(asked, 30.0)
                looks.append(time.perf_counter() - start)
            assert len(pods.items) == PODS
            assert evidence.facts
    return {
        "objects": len(pods.items),
        "memory_mib": round((after_list - before) / 2**20, 1),
        "memory_after_watching_mib": round((peak - before) / 2**20, 1),
        "list_cpu_seconds": round(listed - began, 2),
        "watch_cpu_percent": round(100 * (watched - listed) / seconds, 2),
        "look_ms": round(1000 * sorted(looks)[2], 1),
    }


def bench(seconds: float) -> dict[str, Any]:
    """Figures of the cache, of the reference, and their ratios."""
    server = subprocess.Popen(
        [sys.executable, "-m", "bench.kubernetes", "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        figures: dict[str, Any] = {}
        for name in ("cache", "whole_objects"):
            command = [sys.executable, "-m", "bench.kubernetes", "--measure", name, port, str(seconds)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=seconds + 120)
            figures[name] = json.loads(done.stdout)
    finally:
        server.communicate()
    for key in ("memory_mib", "watch_cpu_percent"):
        figures[f"{key}_ratio"] = round(figures["cache"][key] / figures["whole_objects"][key], 2)
    return figures


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        asyncio.run(serve())
    elif sys.argv[1:2] == ["--measure"]:
        print(json.dumps(asyncio.run(measure(int(sys.argv[3]), float(sys.argv[4]), sys.argv[2] == "whole_objects"))))
    else:
        print(json.dumps(bench(float(sys.argv[1]) if sys.argv[1:] else 60.0), indent=1))
