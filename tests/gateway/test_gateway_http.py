"""Over HTTP and on the command line: what is asked, who may, and what is answered."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from gateway_world import FAULT, config, opened

from agent.cli import main
from agent.gateway.gateway import Gateway
from agent.http.auth import Credential, Guard
from agent.http.gateway_api import GatewayApi
from agent.http.server import Options, Serving, build_app, serve
from agent.intake import Intake
from agent.store import Store

TOKENS = {
    "reader": Credential("reader", "r", scopes=("read",)),
    "person": Credential("person", "p", scopes=("read", "approve")),
    "bound": Credential("bound", "b", tenants=("team",), scopes=("read", "approve")),
}


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[tuple[Gateway, str]]:
    store = Store.open(tmp_path / "state")
    gateway = await opened(store, config("other"))
    options = Options(guard=Guard(TOKENS.values()))
    operations: Any = None
    app = build_app(
        Intake(store),
        store,
        operations,
        health=dict,
        metrics=lambda: (b"", ""),
        options=options,
        more=lambda o: GatewayApi(gateway, o.guard, o.read_seconds).routes(),
    )
    serving: Serving = await serve(app, "127.0.0.1", 0, socket_path=tmp_path / "state" / "control.sock")
    yield gateway, "http://{}:{}/api/v1/gateway".format(*serving.addresses[0])
    await serving.close()
    await gateway.close()
    await store.close()


async def call(url: str, who: str, body: Any = None) -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {TOKENS[who].secret}"} if who else {}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.request("GET" if body is None else "POST", url, json=body) as answer,
    ):
        return answer.status, await answer.json()


async def test_an_evaluation(world: tuple[Gateway, str]) -> None:
    _, url = world
    asked = {"trace_id": "t-1", "recording": FAULT, "timeout_ms": 60000, "feature_flags": {"candidate": True}}
    status, found = await call(f"{url}/evaluate", "reader", asked)
    assert status == 200
    assert {k: found[k] for k in ("trace_id", "recorded", "problem")} == {
        "trace_id": "t-1",
        "recorded": True,
        "problem": "",
    }
    assert found["consensus"] == {
        "agreed": False,
        "verdict": "ranked",
        "cause": found["a"]["cause"],
        "service": found["a"]["service"],
    }
    assert (found["b"]["cause"], found["b"]["score"], found["b"]["version"]) == ("x.other", 0.9, "other-1")
    assert found["a"]["diagnosis"]["hypotheses"][0]["cause"] == found["a"]["cause"]
    assert found["differences"]
    judged = {"trace_id": "t-1", "cause": found["a"]["cause"], "service": found["a"]["service"]}
    status, seen = await call(f"{url}/judge", "person", judged)
    assert (status, seen["score"]["a_only"], seen["comparisons"][0]["judged"]) == (200, 1, "a")
    assert (await call(f"{url}/judge", "person", judged))[0] == 409
    status, refused = await call(f"{url}/promote", "person", {"force": True})
    assert (status, "only advises" in refused["error"]["reason"]) == (409, True)
    assert (await call(f"{url}/rollback", "person", {}))[0] == 409


@pytest.mark.parametrize(
    ("path", "who", "body", "status"),
    [
        ("", "", None, 401),
        ("", "bound", None, 403),
        ("/evaluate", "", {}, 401),
        ("/evaluate", "bound", {"trace_id": "t", "recording": FAULT}, 403),
        ("/evaluate", "bound", {"trace_id": "t", "incident": "inc-x"}, 404),
        ("/evaluate", "reader", {"trace_id": "t"}, 400),
        ("/evaluate", "reader", {"trace_id": 1, "recording": FAULT}, 400),
        ("/evaluate", "reader", {"trace_id": "t", "recording": FAULT, "typo": 1}, 400),
        ("/evaluate", "reader", {"trace_id": "t", "recording": "../payloads"}, 404),
        ("/judge", "reader", {"trace_id": "t", "cause": "c", "service": "s"}, 403),
        ("/judge", "person", {"trace_id": "t", "cause": "c", "service": "s"}, 404),
        ("/promote", "reader", {}, 403),
        ("/promote", "bound", {}, 403),
        ("/rollback", "reader", {}, 403),
    ],
)
async def test_who_may_what(path: str, who: str, body: Any, status: int, world: tuple[Gateway, str]) -> None:
    answered, answer = await call(world[1] + path, who, body)
    assert answered == status
    assert answer["error"]["reason"]


async def test_the_command_line(world: tuple[Gateway, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import asyncio

    gateway, url = world
    await call(f"{url}/evaluate", "reader", {"trace_id": "t-1", "recording": FAULT, "timeout_ms": 60000})

    async def run(*arguments: str) -> tuple[int, str]:
        code = await asyncio.to_thread(main, ["gateway", *arguments, "--state-dir", str(tmp_path / "state")])
        said = capsys.readouterr()
        return code, said.out + said.err

    code, said = await run("status")
    assert (code, "primary: stable" in said, "t-1" in said, "x.other on elsewhere" in said) == (0, True, True, True)
    code, said = await run("judge", "t-1", "x.other", "elsewhere", "--json")
    assert (code, json.loads(said)["score"]["b_only"]) == (0, 1)
    assert (await run("promote", "--force"))[0] == 1
    assert (await run("rollback"))[0] == 1
    assert gateway.state.board.b_only == 1


def test_the_command_line_without_a_service(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gateway", "status", "--json", "--state-dir", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["primary"] == "stable"
    assert main(["gateway", "promote", "--state-dir", str(tmp_path)]) == 3
