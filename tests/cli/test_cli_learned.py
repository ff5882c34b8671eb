"""`feedback` and `model`: through the running service's socket, and into a stopped service's journal."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from cli_world import Service, alertmedic, awaiting_approval

from agent.http.api import Said
from agent.store import Store, read_state

CAUSE = "process.stuck@worker"


def prepare(state_dir: Path) -> str:
    async def write() -> str:
        store = Store.open(state_dir)
        id = await awaiting_approval(store)
        await store.close()
        return id

    return asyncio.run(write())


def test_a_stopped_service_keeps_what_is_said(tmp_path: Path) -> None:
    id = prepare(tmp_path)
    done = alertmedic(
        "feedback", id[:9], "--cause", CAUSE, "--helped", "yes", "--note", "it hung", "--state-dir", tmp_path
    )
    assert done.code == 0, done.err
    assert "no service is running" in done.out
    state = read_state(tmp_path)
    given = state.incidents[id].feedback
    assert given is not None
    assert (given.cause, given.service, given.helped, given.note) == ("process.stuck", "worker", True, "it hung")
    assert given.origin.startswith("cli uid=")
    assert [o.incident for o in state.observations] == [id]
    assert "says that the cause was process.stuck on worker" in alertmedic("incidents", id, "--state-dir", tmp_path).out
    shown = alertmedic("incidents", id, "--json", "--state-dir", tmp_path).json["incidents"][0]
    assert shown["feedback"]["cause"] == "process.stuck"
    assert shown["clear"] in (True, False)
    listed = alertmedic("model", "list", "--json", "--state-dir", tmp_path).json
    assert listed == {"serving": 0, "pinned": False, "earlier": [], "versions": []}


def test_what_is_no_feedback_is_refused(tmp_path: Path) -> None:
    id = prepare(tmp_path)
    for cause, code in (("process.stuck", 2), ("@worker", 2), ("gremlins@worker", 1)):
        assert alertmedic("feedback", id, "--cause", cause, "--state-dir", tmp_path).code == code
    assert alertmedic("feedback", "inc-none", "--cause", CAUSE, "--state-dir", tmp_path).code == 1
    assert alertmedic("model", "use", "7", "--state-dir", tmp_path).code == 1
    assert alertmedic("model", "use", "newest", "--state-dir", tmp_path).code == 2
    assert read_state(tmp_path).observations == []


def test_a_running_service_learns_and_forgets(tmp_path: Path, serving: Callable[..., Service]) -> None:
    id = prepare(tmp_path)
    service = serving(tmp_path)
    done = alertmedic("feedback", id, "--cause", CAUSE, "--state-dir", tmp_path)
    assert done.code == 0, done.err
    assert "model 1 serves, golden incidents: " in done.out
    assert alertmedic("feedback", id, "--cause", "gremlins@worker", "--state-dir", tmp_path).code == 1
    listed = alertmedic("model", "list", "--json", "--state-dir", tmp_path).json
    assert listed["serving"] == 1
    assert listed["versions"][0]["refused"] == ""
    assert {c["cause"] for c in listed["versions"][0]["counts"]} == {"process.stuck"}
    assert "serves" in alertmedic("model", "list", "--state-dir", tmp_path).out
    assert alertmedic("model", "revert", "--json", "--state-dir", tmp_path).json == {"serving": 0}
    assert alertmedic("model", "use", "1", "--note", "again", "--json", "--state-dir", tmp_path).json == {"serving": 1}
    assert alertmedic("model", "use", "9", "--state-dir", tmp_path).code == 1
    assert alertmedic("model", "use", "shipped", "--json", "--state-dir", tmp_path).json == {"serving": 0}
    assert alertmedic("model", "use", "latest", "--state-dir", tmp_path).code == 0
    status, body = service.get("/api/v1/models")
    assert status == 200
    assert b'"pinned":false' in body.replace(b" ", b"")
    assert service.stop() == 0
    assert read_state(tmp_path).models.earlier[-3:] == (1, 0, 1)
    assert Said(cause="c", service="s").helped is None
