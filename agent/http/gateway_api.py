"""The paths of the A/B gateway: ask both channels, see and give judgements, change who is primary.

Routed by `agent.http.server` beside the API. Reading needs the scope `read`, everything that changes something needs
`approve` over all tenants, since a channel serves all of them. It decides nothing: `agent.gateway` does.
"""

from __future__ import annotations

from typing import Any, Final, TypeVar

import msgspec
import orjson
from aiohttp import web

from agent.gateway.gateway import Gateway, GatewayError, Request
from agent.gateway.render import evaluation_json, state_json
from agent.http.api import Handler
from agent.http.auth import AccessError, Guard
from agent.http.body import JSON, RequestError, read_body

MAX_BODY_BYTES: Final = 65_536


class _Move(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    note: str = ""
    force: bool = False


class _Judgement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    trace_id: str
    cause: str
    service: str


_B = TypeVar("_B", bound=msgspec.Struct)


class GatewayApi:
    def __init__(self, gateway: Gateway, guard: Guard, read_seconds: float) -> None:
        self._gateway = gateway
        self._guard = guard
        self._read_seconds = read_seconds

    def routes(self) -> dict[str, dict[str, Handler]]:
        return {
            "/api/v1/gateway": {"GET": self.status},
            "/api/v1/gateway/evaluate": {"POST": self.evaluate},
            "/api/v1/gateway/judge": {"POST": self.judge},
            "/api/v1/gateway/promote": {"POST": self.promote},
            "/api/v1/gateway/rollback": {"POST": self.rollback},
        }

    async def evaluate(self, request: web.BaseRequest, _: str) -> web.StreamResponse:
        caller = self._guard.admit(request, "read")
        body = await self._body(request, Request)
        if body.incident:
            incident = self._gateway.incident(body.incident)
            if incident is None or not caller.sees(incident.tenant):
                raise RequestError(404, f"no incident {body.incident[:64]!r}", "$.incident")
        elif not caller.sees_all:
            raise AccessError(403, f"{caller.name} is bound to tenants; recordings belong to none", "name an incident")
        try:
            return _json(evaluation_json(await self._gateway.evaluate(body)))
        except GatewayError as error:
            raise _told(error) from error

    async def status(self, request: web.BaseRequest, _: str) -> web.StreamResponse:
        if not self._guard.admit(request, "read").sees_all:
            raise AccessError(403, "this credential is bound to tenants", "use a credential for all tenants")
        return _json(self._status())

    async def judge(self, request: web.BaseRequest, _: str) -> web.StreamResponse:
        who = self._may_decide(request)
        body = await self._body(request, _Judgement)
        try:
            await self._gateway.judge(body.trace_id, body.cause[:256], body.service[:1024], who)
        except GatewayError as error:
            raise _told(error) from error
        return _json(self._status())

    async def promote(self, request: web.BaseRequest, _: str) -> web.StreamResponse:
        return await self._move(request, promote=True)

    async def rollback(self, request: web.BaseRequest, _: str) -> web.StreamResponse:
        return await self._move(request, promote=False)

    async def _move(self, request: web.BaseRequest, *, promote: bool) -> web.StreamResponse:
        who = self._may_decide(request)
        body = await self._body(request, _Move)
        try:
            if promote:
                await self._gateway.promote(who, body.note, force=body.force)
            else:
                await self._gateway.rollback(who, body.note)
        except GatewayError as error:
            raise _told(error) from error
        return _json(self._status())

    def _status(self) -> dict[str, Any]:
        return state_json(self._gateway.state) | {"channel": self._gateway.channel_problem}

    def _may_decide(self, request: web.BaseRequest) -> str:
        caller = self._guard.admit(request, "approve")
        if not caller.sees_all:
            raise AccessError(403, f"{caller.name} is bound to tenants; this concerns all", "use one for all tenants")
        return f"{caller.name} ({caller.origin})"

    async def _body(self, request: web.BaseRequest, kind: type[_B]) -> _B:
        raw = await read_body(request, MAX_BODY_BYTES, self._read_seconds)
        try:
            return msgspec.json.decode(raw or b"{}", type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            text, _, path = str(error).partition(" - at `")
            raise RequestError(400, text, path.rstrip("`") or "$") from error


def _told(error: GatewayError) -> RequestError:
    return RequestError(error.status, str(error), error.path, error.hint)


def _json(value: object) -> web.Response:
    return web.Response(body=orjson.dumps(value), headers={"Content-Type": JSON})
