"""`change` and `/api/v1/changes`: through the running service's socket, over HTTP, and into a stopped one's journal."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_world import Service, alertmedic

from agent.fold_changes import KEPT_SECONDS, MAX_CHANGES, PER_HOUR, ChangeTold
from agent.http.api import Changed, TooMany
from agent.operations import Operations
from agent.store import Store, read_state


def post(service: Service, body: object) -> tuple[int, Any]:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{service.port}/api/v1/changes", raw, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def made(n: int, at: float) -> ChangeTold:
    return ChangeTold(at=at, tenant="t", kind="deploy", service="s", id=str(n), when=at, who="w", origin="o")


def test_a_stopped_service_keeps_what_is_told(tmp_path: Path) -> None:
    asyncio.run(Store.open(tmp_path).close())
    told = ("change", "add", "--service", "orders", "--id", "1.4.2", "--text", "new pool", "--time", f"{time.time()}")
    for word in ("recorded: deploy 1.4.2 of orders", "known already"):
        done = alertmedic(*told, "--state-dir", tmp_path)
        assert done.code == 0, done.err
        assert word in done.out
    (change,) = read_state(tmp_path).changes
    assert (change.service, change.kind, change.id, change.text) == ("orders", "deploy", "1.4.2", "new pool")
    assert "new pool" in alertmedic("change", "list", "--state-dir", tmp_path).out
    for wrong in (("--service", " "), ("--service", "a\nb"), ("--service", "s", "--time", "1000")):
        assert alertmedic("change", "add", *wrong, "--state-dir", tmp_path).code == 2
    assert len(read_state(tmp_path).changes) == 1


def test_a_running_service_is_told_by_both_ways(tmp_path: Path, serving: Callable[..., Service]) -> None:
    service = serving(tmp_path)
    assert alertmedic("change", "add", "--service", "orders", "--kind", "flag", "--state-dir", tmp_path).code == 0
    now = time.time()
    status, body = post(service, {"service": "front", "id": "7", "time": now, "kind": "release"})
    assert (status, body["recorded"]) == (200, True)
    assert post(service, {"service": "front", "id": "7", "time": now, "kind": "release"})[1]["recorded"] is False
    wrong: tuple[Any, ...] = (
        {},
        {"service": ""},
        {"service": "s", "kind": "war"},
        {"service": "s", "tiem": 1},
        {"service": "s", "time": "yesterday"},
        {"service": "s", "time": 12},
        {"service": "s", "time": now + 4000},
        {"service": "s", "text": "x" * 1001},
        {"service": "s", "text": "a\u0000b"},
        {"service": "s", "who": "somebody else"},
        b"nonsense",
    )
    for bad in wrong:
        status, body = post(service, bad)
        assert status == 400, bad
        assert body["error"]["reason"]
    status, raw = service.get("/api/v1/changes")
    assert status == 200
    assert [c["service"] for c in json.loads(raw)["changes"]] == ["front", "orders"]
    assert service.stop() == 0
    assert [c.kind for c in read_state(tmp_path).changes] == ["flag", "release"]


async def test_it_is_bounded(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    try:
        now = 1_800_000_000.0
        for n in range(PER_HOUR):
            await store.record(made(n, now))
        operations = Operations(store, None, clock=lambda: now + 1)  # type: ignore[arg-type]
        change = Changed(tenant="t", kind="deploy", service="s", id="one more", when=now)
        with pytest.raises(TooMany):
            await operations.change(change, "w", "o")
        later = Operations(store, None, clock=lambda: now + 3601)  # type: ignore[arg-type]
        assert await later.change(change, "w", "o")
        for n in range(MAX_CHANGES):
            await store.record(made(PER_HOUR + n, now + 3602))
        assert len(store.state.changes) == MAX_CHANGES
        await store.record(made(0, now + 2 * KEPT_SECONDS))
        assert len(store.state.changes) == 1
    finally:
        await store.close()
    assert [c.id for c in read_state(tmp_path).changes] == ["0"]
