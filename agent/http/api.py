"""The API that people and the command line use: incidents, approvals, pause, breakers, quarantine.

Its handlers are routed by `agent.http.server`. Exists so that reading and deciding over HTTP and over the Unix socket
is the same code. It reads `store.state` and calls `Operations`, which journals; it changes nothing itself. What a
caller may not see does not exist for him: an incident of another tenant is 404.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal, Protocol, TypeVar

import msgspec
import orjson
from aiohttp import web

from actions.model import IllegalMove
from agent.fold_changes import AHEAD_SECONDS, KEPT_SECONDS, ChangeKind
from agent.fold_model import Incident, IncidentState
from agent.http.auth import AccessError, Caller, Guard
from agent.http.body import JSON, RequestError, read_body
from agent.http.render import (
    breaker_json,
    change_json,
    incident_json,
    models_json,
    output_json,
    plain,
    quarantine_json,
    rfc3339,
)
from agent.store import Store

Outcome = Literal[
    "approved",
    "partly_approved",
    "rejected",
    "unknown_incident",
    "nothing_waiting",
    "stale_digest",
    "expired",
    "refused",
]
Handler = Callable[[web.BaseRequest, str], Awaitable[web.StreamResponse]]  # with what the path names

MAX_LIMIT: Final = 1000
MAX_BODY_BYTES: Final = 65_536
_STATUS: Final[dict[Outcome, int]] = {
    "approved": 200,
    "partly_approved": 200,
    "rejected": 200,
    "unknown_incident": 404,
}


class ApprovalAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a decision. Anything but approved, partly_approved (another person must approve too) and rejected
    changed nothing; `detail` is a sentence."""

    outcome: Outcome
    incident: str
    plan: str = ""
    detail: str = ""


class Operations(Protocol):
    """What people may do, each journalled before it returns. `who` is a name, `origin` where it came from ("cli uid=0",
    "http 10.0.0.4"). All raise JournalUnavailable when nothing could be recorded."""

    async def approve(self, incident: str, digest: str, who: str, origin: str, note: str) -> ApprovalAnswer: ...

    async def reject(self, incident: str, digest: str, who: str, origin: str, note: str) -> ApprovalAnswer: ...

    async def pause(self, paused: bool, who: str, origin: str, note: str) -> None:
        """Pauses (True) or resumes (False) all actions."""

    async def reset_breaker(self, key: str, who: str, origin: str, note: str) -> bool:
        """Closes the breaker; False when there is none of that key."""

    async def feedback(self, incident: str, said: Said, who: str, origin: str) -> str:
        """Keeps what a person says; answers what it did to the model, in words. Raises UnknownIncident, and ValueError
        for a cause that nobody knows."""

    async def change(self, change: Changed, who: str, origin: str) -> bool:
        """Keeps what was changed; False if that was told already. Raises TooMany."""

    async def use_model(self, version: int | None, who: str, origin: str, note: str) -> int:
        """Model `version` serves until another is chosen (0: the shipped one; None: whatever is learned); answers which
        one serves. Raises IllegalMove for one that is not known or was refused."""

    async def revert_model(self, who: str, origin: str, note: str) -> int:
        """The model that served before serves again, until another is chosen."""


class Said(msgspec.Struct, frozen=True, kw_only=True):
    """What a person says an incident's cause was."""

    cause: str
    service: str
    helped: bool | None = None
    note: str = ""


class Changed(msgspec.Struct, frozen=True, kw_only=True):
    """What was changed, when (unix seconds)."""

    tenant: str
    kind: ChangeKind
    service: str
    id: str
    when: float
    text: str = ""


class TooMany(ValueError):  # noqa: N818
    """A tenant told of more changes within the hour than are kept."""


class _Body(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    who: str = ""  # the command line says who sits there; over TCP the credential does
    note: str = ""


class _Decision(_Body, frozen=True, kw_only=True, forbid_unknown_fields=True):
    digest: str


class _Feedback(_Body, frozen=True, kw_only=True, forbid_unknown_fields=True):
    cause: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    service: Annotated[str, msgspec.Meta(min_length=1, max_length=500)]
    helped: bool | None = None


class _Change(_Body, frozen=True, kw_only=True, forbid_unknown_fields=True):
    service: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    kind: ChangeKind = "deploy"
    id: Annotated[str, msgspec.Meta(max_length=200)] = ""
    text: Annotated[str, msgspec.Meta(max_length=1000)] = ""
    time: float | Annotated[str, msgspec.Meta(max_length=64)] | None = None  # unix seconds, or RFC 3339
    tenant: Annotated[str, msgspec.Meta(pattern=r"^[a-zA-Z0-9._-]{1,64}\Z")] = "default"


class _Use(_Body, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: int | Literal["latest"]


class _Reset(_Body, frozen=True, kw_only=True, forbid_unknown_fields=True):
    key: str


_B = TypeVar("_B", bound=_Body)


class Api:
    """The handlers, one per path and method. They raise RequestError, AccessError or JournalError."""

    def __init__(
        self,
        store: Store,
        operations: Operations,
        guard: Guard,
        read_seconds: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._clock = clock
        self._store = store
        self._operations = operations
        self._guard = guard
        self._read_seconds = read_seconds

    def routes(self) -> dict[str, dict[str, Handler]]:
        """By path and method; `*` stands for one step of the path, which the handler gets."""
        return {
            "/api/v1/incidents": {"GET": self.incidents},
            "/api/v1/incidents/*": {"GET": self.incident},
            "/api/v1/incidents/*/output": {"GET": self.output},
            "/api/v1/incidents/*/approve": {"POST": self.approve},
            "/api/v1/incidents/*/reject": {"POST": self.reject},
            "/api/v1/incidents/*/feedback": {"POST": self.feedback},
            "/api/v1/changes": {"GET": self.changes, "POST": self.change},
            "/api/v1/models": {"GET": self.models},
            "/api/v1/models/use": {"POST": self.use_model},
            "/api/v1/models/revert": {"POST": self.revert_model},
            "/api/v1/pause": {"POST": self.pause},
            "/api/v1/resume": {"POST": self.resume},
            "/api/v1/breakers": {"GET": self.breakers},
            "/api/v1/breakers/reset": {"POST": self.reset},
            "/api/v1/quarantine": {"GET": self.quarantine},
        }

    # -- reading

    async def incidents(self, request: web.BaseRequest, _: str) -> web.StreamResponse:
        """`?state=&tenant=&limit=`: newest first."""
        caller = self._guard.admit(request, "read")
        query = _query(request, ("state", "tenant", "limit"))
        limit = _limit(query.get("limit", "100"))
        state = query.get("state")
        if state is not None and state not in {s.value for s in IncidentState}:
            raise RequestError(400, f"no such state: {state[:40]!r}", "state", ", ".join(IncidentState))
        tenant = query.get("tenant")
        found: list[dict[str, Any]] = []
        for incident in reversed(self._store.state.incidents.values()):
            if len(found) == limit:
                break
            wanted = (state is None or incident.state == state) and (tenant is None or incident.tenant == tenant)
            if wanted and caller.sees(incident.tenant):
                found.append(incident_json(incident))
        return _json({"incidents": found})

    async def incident(self, request: web.BaseRequest, id: str) -> web.StreamResponse:
        caller = self._guard.admit(request, "read")
        return _json(incident_json(self._visible(id, caller)))

    async def output(self, request: web.BaseRequest, id: str) -> web.StreamResponse:
        """What the steps of its current plan printed, whole."""
        caller = self._guard.admit(request, "read")
        return _json(output_json(self._visible(id, caller)))

    async def breakers(self, request: web.BaseRequest, _: str) -> web.StreamResponse:
        """Breakers belong to the host, not to a tenant."""
        _for_all(self._guard.admit(request, "read"))
        return _json({"breakers": [breaker_json(b) for b in self._store.state.breakers.values()]})

    async def quarantine(self, request: web.BaseRequest, _: str) -> web.StreamResponse:
        """Newest first; `total` counts since the journal began, and what is listed is bounded."""
        caller = self._guard.admit(request, "read")
        query = _query(request, ("tenant", "limit"))
        limit = _limit(query.get("limit", "100"))
        tenant = query.get("tenant")
        seen = [
            q
            for q in reversed(self._store.state.quarantined)
            if caller.sees(q.tenant) and (tenant is None or q.tenant == tenant)
        ]
        total = self._store.state.quarantined_count if caller.sees_all and tenant is None else len(seen)
        return _json({"quarantine": [quarantine_json(q) for q in seen[:limit]], "total": total})

    # -- deciding

    async def approve(self, request: web.BaseRequest, id: str) -> web.StreamResponse:
        return await self._decide(request, id, self._operations.approve)

    async def reject(self, request: web.BaseRequest, id: str) -> web.StreamResponse:
        return await self._decide(request, id, self._operations.reject)

    async def _decide(
        self,
        request: web.BaseRequest,
        id: str,
        decide: Callable[[str, str, str, str, str], Awaitable[ApprovalAnswer]],
    ) -> web.StreamResponse:
        caller = self._guard.admit(request, "approve")
        incident = self._visible(id, caller)
        body = await self._body(request, _Decision)
        answer = await decide(incident.id, body.digest, _who(caller, body), caller.origin, body.note)
        status = _STATUS.get(answer.outcome, 409)
        if status != 200:
            hint = "alertmedic incidents " + incident.id
            raise RequestError(status, answer.detail or answer.outcome.replace("_", " "), answer.outcome, hint)
        return _json(msgspec.to_builtins(answer))

    async def pause(self, request: web.BaseRequest, _: str) -> web.StreamResponse:
        return await self._pause(request, paused=True)

    async def resume(self, request: web.BaseRequest, _: str) -> web.StreamResponse:
        return await self._pause(request, paused=False)

    async def _pause(self, request: web.BaseRequest, *, paused: bool) -> web.StreamResponse:
        caller = self._guard.admit(request, "approve")
        _for_all(caller)
        body = await self._body(request, _Body)
        await self._operations.pause(paused, _who(caller, body), caller.origin, body.note)
        return _json({"paused": paused})

    async def reset(self, request: web.BaseRequest, _: str) -> web.StreamResponse:
        caller = self._guard.admit(request, "approve")
        _for_all(caller)
        body = await self._body(request, _Reset)
        if not await self._operations.reset_breaker(body.key, _who(caller, body), caller.origin, body.note):
            raise RequestError(404, f"no breaker {body.key[:200]!r}", "$.key", "GET /api/v1/breakers lists them")
        return _json({"key": body.key, "state": "closed"})

    async def feedback(self, request: web.BaseRequest, id: str) -> web.StreamResponse:
        caller = self._guard.admit(request, "approve")
        incident = self._visible(id, caller)
        body = await self._body(request, _Feedback)
        said = Said(cause=body.cause, service=body.service, helped=body.helped, note=body.note)
        try:
            told = await self._operations.feedback(incident.id, said, _who(caller, body), caller.origin)
        except ValueError as error:
            raise RequestError(400, str(error), "$.cause", "alertmedic packs list") from error
        return _json({"incident": incident.id, "recorded": True, "model": told})

    async def change(self, request: web.BaseRequest, _: str) -> web.StreamResponse:
        """Whoever may send alerts may say what was changed: both are claims, and neither lets anything be done."""
        caller = self._guard.admit(request, "webhook")
        body = await self._body(request, _Change)
        if not caller.sees(body.tenant):
            raise AccessError(403, f"{caller.name} is not for tenant {body.tenant!r}", "use a credential of the tenant")
        told = changed_of(
            tenant=body.tenant,
            kind=body.kind,
            service=body.service,
            id=body.id,
            text=body.text,
            told=body.time,
            now=self._clock(),
        )
        try:
            new = await self._operations.change(told, _who(caller, body), caller.origin)
        except TooMany as error:
            raise RequestError(429, str(error), "$") from error
        return _json({"recorded": new, "change": {**plain(told), "when": rfc3339(told.when)}})

    async def changes(self, request: web.BaseRequest, _: str) -> web.StreamResponse:
        """`?tenant=&limit=`: the newest told first."""
        caller = self._guard.admit(request, "read")
        query = _query(request, ("tenant", "limit"))
        limit, tenant = _limit(query.get("limit", "100")), query.get("tenant")
        found = [
            change_json(c)
            for c in reversed(self._store.state.changes)
            if caller.sees(c.tenant) and (tenant is None or c.tenant == tenant)
        ]
        return _json({"changes": found[:limit]})

    async def models(self, request: web.BaseRequest, _: str) -> web.StreamResponse:
        """The models made from feedback belong to all tenants."""
        _for_all(self._guard.admit(request, "read"))
        return _json(models_json(self._store.state.models))

    async def use_model(self, request: web.BaseRequest, _: str) -> web.StreamResponse:
        caller = self._guard.admit(request, "approve")
        _for_all(caller)
        body = await self._body(request, _Use)
        version = None if body.version == "latest" else int(body.version)
        return await self._chosen(self._operations.use_model(version, _who(caller, body), caller.origin, body.note))

    async def revert_model(self, request: web.BaseRequest, _: str) -> web.StreamResponse:
        caller = self._guard.admit(request, "approve")
        _for_all(caller)
        body = await self._body(request, _Body)
        return await self._chosen(self._operations.revert_model(_who(caller, body), caller.origin, body.note))

    async def _chosen(self, choosing: Awaitable[int]) -> web.StreamResponse:
        try:
            return _json({"serving": await choosing})
        except IllegalMove as error:
            raise RequestError(409, str(error), "$.version", "GET /api/v1/models lists them") from error

    # -- requests

    def _visible(self, id: str, caller: Caller) -> Incident:
        incident = self._store.state.incidents.get(id)
        if incident is None or not caller.sees(incident.tenant):
            raise RequestError(404, f"no incident {id[:64]!r}", "id", "GET /api/v1/incidents lists them")
        return incident

    async def _body(self, request: web.BaseRequest, kind: type[_B]) -> _B:
        """The JSON body, an empty one being an empty object. No content type is asked for: a web page cannot get here,
        since everything that writes demands a credential of its own or the Unix socket."""
        raw = await read_body(request, MAX_BODY_BYTES, self._read_seconds)
        try:
            body = msgspec.json.decode(raw or b"{}", type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            text, _, path = str(error).partition(" - at `")
            raise RequestError(400, text, path.rstrip("`") or "$") from error
        if len(body.note) > 4096 or len(body.who) > 256:
            raise RequestError(400, "at most 4096 characters of note and 256 of who", "$.note")
        return body


def _who(caller: Caller, body: _Body) -> str:
    """Over TCP the credential's name; a name that the body claims is kept only from the Unix socket, beside the uid."""
    if not body.who:
        return caller.name
    if not caller.origin.startswith("cli "):
        raise RequestError(400, "over TCP the credential says who decides", "$.who", "leave it out")
    return f"{body.who} ({caller.name})"


def changed_of(
    *, tenant: str, kind: ChangeKind, service: str, id: str, text: str, told: float | str | None, now: float
) -> Changed:
    """A change as it is kept. `told`: when it was made (unix seconds, RFC 3339, None: now). Raises RequestError."""
    if not service.strip():
        raise RequestError(400, "which service was changed?", "$.service")
    return Changed(
        tenant=tenant,
        kind=kind,
        service=_line("service", service),
        id=_line("id", id) or kind,
        when=_when(told, now),
        text=_line("text", text),
    )


def _line(name: str, text: str) -> str:
    """A foreign text on one line. Raises RequestError for what cannot be printed."""
    if not text.isprintable():
        raise RequestError(400, "control characters do not belong there", f"$.{name}")
    return text.strip()


def _when(told: float | str | None, now: float) -> float:
    """The time of a change, now where none is told. Raises RequestError for what is no time, or none that counts."""
    when = now
    if isinstance(told, str):
        try:
            parsed = datetime.fromisoformat(told)
            when = (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()
        except (ValueError, OverflowError) as error:
            raise RequestError(400, f"{told[:64]!r} is no time", "$.time", "RFC 3339 or unix seconds") from error
    elif told is not None:
        when = told
    if not now - KEPT_SECONDS <= when <= now + AHEAD_SECONDS:
        raise RequestError(400, "it is in the future, or more than seven days ago", "$.time", "unix seconds are meant")
    return when


def _for_all(caller: Caller) -> None:
    if not caller.sees_all:
        raise AccessError(
            403, f"{caller.name} is bound to tenants; this concerns all", "use a credential for all tenants"
        )


def _query(request: web.BaseRequest, known: tuple[str, ...]) -> dict[str, str]:
    """Each parameter at most once, and no unknown one: a filter with a typo must not show everything."""
    query: dict[str, str] = {}
    for name, value in request.query.items():
        if name not in known or name in query:
            raise RequestError(400, "unknown or repeated parameter", name[:64], ", ".join(known))
        query[name] = value
    return query


def _limit(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 4 and 1 <= int(text) <= MAX_LIMIT):
        raise RequestError(400, f"expected 1 to {MAX_LIMIT}", "limit")
    return int(text)


def _json(value: object) -> web.Response:
    return web.Response(body=orjson.dumps(value), headers={"Content-Type": JSON})
