"""Calls of declared endpoints, pools that become smaller, and silences of a real Alertmanager."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from actions_servers import (
    carry_out,
    checked,
    directory,
    do,
    free_port,
    one_step,
    plan_for,
    refused,
    running,
    with_option,
)  # fmt: skip
from aiohttp import web
from aiohttp.test_utils import TestServer

from actions.model import Plan, Refusal


@dataclass
class Service:
    """Endpoints that do something once for each idempotency key."""

    done: list[tuple[str, str]] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    answer: int = 200
    size: int = 8
    base: str = ""

    async def act(self, request: web.Request) -> web.Response:
        key = request.headers["Idempotency-Key"]
        self.tokens.add(request.headers.get("Authorization", ""))
        self.bodies.append(await request.json())
        if self.answer == 302:
            raise web.HTTPFound(self.base + "/elsewhere")
        if self.answer != 200:
            return web.Response(status=self.answer, text="no")
        if (request.method, key) not in self.done:
            self.done.append((request.method, key))
        return web.json_response({"ok": True})

    async def asked(self, request: web.Request) -> web.Response:
        return web.json_response({"done": request.match_info["key"] in {k for _, k in self.done}})

    async def elsewhere(self, _: web.Request) -> web.Response:
        self.done.append(("GET", "elsewhere"))
        return web.json_response({})

    async def pool(self, request: web.Request) -> web.Response:
        if request.method == "PUT":
            body = await request.json()
            if body["expected"] != self.size:
                raise web.HTTPConflict
            self.size = body["size"]
        return web.json_response({"size": self.size})

    def entry(self, **more: str) -> dict[str, str]:
        both = {f"{kind}_url": f"{self.base}/act" for kind in ("call", "cache")}
        checks = {f"{kind}_check_url": f"{self.base}/asked" for kind in ("call", "cache")}
        return {**both, **checks, "scale_url": f"{self.base}/pool", "workers_min": "3", **more}


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    made, app = Service(), web.Application()
    app.router.add_route("*", "/act", made.act)
    app.router.add_get("/asked/{key}", made.asked)
    app.router.add_route("*", "/elsewhere", made.elsewhere)
    app.router.add_route("*", "/pool", made.pool)
    async with TestServer(app, host="127.0.0.1") as server:
        made.base = str(server.make_url("")).rstrip("/")
        yield made


@pytest.mark.parametrize(("action", "method"), [("http.call", "POST"), ("cache.clear", "DELETE")])
async def test_an_endpoint_is_called_once_however_often_the_step_runs(
    service: Service, action: str, method: str
) -> None:
    secrets = {"ALERTMEDIC_HTTP_TOKEN": "t0ken"}
    made = await plan_for(action, service.entry(), secrets)
    assert isinstance(made, Plan), made
    assert made.autonomy == "approve"
    step = made.steps[0]
    assert await checked(step) == 1
    assert await carry_out(made, secrets=secrets) == "verified"
    assert await checked(step) == 0
    assert service.bodies[0]["service"] == "svc"
    assert (await do(step.argv, step)).ok
    assert [m for m, _ in service.done] == [method]
    assert "Bearer t0ken" in service.tokens
    assert "t0ken" not in repr(made)


@pytest.mark.parametrize(("answer", "code"), [(409, 93), (423, 93), (500, 1), (404, 1), (302, 1)])
async def test_an_endpoint_that_refuses_fails_or_points_elsewhere(service: Service, answer: int, code: int) -> None:
    step = await one_step("http.call", service.entry())
    service.answer = answer
    assert (await do(step.argv, step)).exit_code == code
    assert service.done == []


async def test_without_a_second_address_nobody_can_tell(service: Service) -> None:
    entry = {k: v for k, v in service.entry().items() if "check" not in k}
    step = await one_step("http.call", entry)
    assert await checked(step) == 94


@pytest.mark.parametrize("params", [{"url": "http://evil"}, {"call_url": "http://evil"}, {"method": "GET"}])
async def test_a_proposal_cannot_choose_the_address_or_the_method(service: Service, params: dict[str, str]) -> None:
    plain, made = await one_step("http.call", service.entry()), await one_step("http.call", service.entry(), **params)
    assert made.argv == plain.argv


async def test_a_pool_becomes_smaller_and_as_large_as_before(service: Service) -> None:
    made = await plan_for("workers.scale_down", service.entry())
    assert await carry_out(made, verdict=False) == "undone"
    assert service.size == 8
    assert await carry_out(made) == "verified"
    assert service.size == 4
    step = made.steps[0]
    assert await checked(step) == 0
    assert (await do(step.argv, step)).exit_code == 93  # it is not 8 any more
    made = await plan_for("workers.scale_down", service.entry())
    assert await carry_out(made) == "verified"
    assert service.size == 3  # workers_min, not 2
    assert (await refused("workers.scale_down", service.entry())).reason is Refusal.EMPTY_TARGET
    assert (await refused("workers.scale_down", service.entry(), factor=0.1)).reason is Refusal.BAD_PARAMETERS


@dataclass
class Alertmanager:
    base: str

    @property
    def entry(self) -> dict[str, str]:
        return {"alertmanager_url": self.base}

    def silences(self) -> list[dict[str, Any]]:
        with urllib.request.urlopen(f"{self.base}/api/v2/silences", timeout=5) as answer:
            found: list[dict[str, Any]] = json.load(answer)
        return [s for s in found if s["status"]["state"] == "active"]

    def post(self, body: dict[str, Any]) -> None:
        request = urllib.request.Request(
            f"{self.base}/api/v2/silences", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        urllib.request.urlopen(request, timeout=5).close()


@pytest.fixture(scope="module")
def alertmanager(program: Callable[..., str]) -> Iterator[Alertmanager]:
    binary = program("prometheus-alertmanager")
    port = free_port()
    with directory("am") as home:
        (home / "c.yml").write_text("route: {receiver: none}\nreceivers: [{name: none}]\n")
        argv = [binary, f"--config.file={home}/c.yml", f"--storage.path={home}", "--cluster.listen-address=",
                f"--web.listen-address=127.0.0.1:{port}"]  # fmt: skip
        made = Alertmanager(f"http://127.0.0.1:{port}")
        with running(argv, lambda: made.silences() is not None, log=home / "log"):
            yield made


async def test_a_silence_is_made_extended_and_ended(alertmanager: Alertmanager) -> None:
    made = await plan_for("alertmanager.silence", alertmanager.entry, silence_seconds=120)
    assert isinstance(made, Plan), made
    step = made.steps[0]
    assert await checked(step) == 1
    assert (await do(step.undo, step)).exit_code == 93  # none is there
    assert await carry_out(made) == "verified"
    assert (await do(step.argv, step)).ok
    (silence,) = alertmanager.silences()
    assert silence["createdBy"] == "alertmedic"
    assert silence["matchers"] == [{"name": "service", "value": "svc", "isRegex": False, "isEqual": True}]
    assert silence["endsAt"] > silence["startsAt"]
    assert await checked(step) == 0
    assert (await do(step.undo, step)).ok
    assert alertmanager.silences() == []
    assert await carry_out(made, verdict=False) == "undone"
    assert alertmanager.silences() == []


async def test_a_silence_of_a_person_is_never_touched(alertmanager: Alertmanager) -> None:
    step = await one_step("alertmanager.silence", alertmanager.entry)
    theirs = {
        "matchers": [{"name": "service", "value": "svc", "isRegex": False}], "createdBy": "ann", "comment": "mine",
        "startsAt": "2026-01-01T00:00:00Z", "endsAt": "2099-01-01T00:00:00Z",
    }  # fmt: skip
    alertmanager.post(theirs)
    assert (await do(step.undo, step)).exit_code == 93
    assert [s["createdBy"] for s in alertmanager.silences()] == ["ann"]
    too_long = await refused("alertmanager.silence", alertmanager.entry, silence_seconds=86400)
    assert too_long.reason is Refusal.BAD_PARAMETERS
    gone = with_option(step.check, url=f"http://127.0.0.1:{free_port()}")
    assert (await do(gone, step)).exit_code == 94
