"""`approve`, `reject`, `pause`, `resume`, `breakers reset`: a person's decisions.

They go to the running service through its Unix socket `<state_dir>/control.sock`. While none runs, they are journalled
directly, under the journal's lock and through the same `Operations`, and the service finds them when it starts. When
the journal is locked and the socket does not answer, nothing is recorded and the command says so: a decision never gets
lost on the way.
"""

from __future__ import annotations

import asyncio
import getpass
import http.client
import json
import os
import socket
import urllib.parse
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from agent.commands.output import CommandError, Exit, emit_json, say

if TYPE_CHECKING:
    from agent.operations import Operations
    from agent.store import Store

SECONDS = 30.0
Decision = Literal["approve", "reject"]
T = TypeVar("T")


class _Unix(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def call(path: Path, method: str, target: str, body: Any = None, timeout: float = SECONDS) -> tuple[int, Any] | None:
    """(status, decoded JSON) of the service's answer, or None when no service listens at `path`. Raises CommandError
    (UNREACHABLE) when one does and gives no usable answer within `timeout` seconds of silence."""
    connection = _Unix(path, timeout)
    try:
        try:
            connection.connect()
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        sent = None if body is None else json.dumps(body).encode()
        connection.request(method, target, sent, {"Content-Type": "application/json"} if sent else {})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read() or b"null")
    except PermissionError as error:
        hint = "run this as the service's user or as root"
        raise CommandError(f"control socket {path}: permission denied", hint, Exit.UNREACHABLE) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        what = "no answer in time" if isinstance(error, TimeoutError) else f"no usable answer: {error}"
        hint = "look at the service's log; nothing is known to have been recorded"
        raise CommandError(f"control socket {path}: {what}", hint, Exit.UNREACHABLE) from error
    finally:
        connection.close()


def decide(state_dir: Path, incident: str, decision: Decision, *, digest: str, note: str, as_json: bool) -> Exit:
    """Approves or rejects the plan that waits. Without `digest` it is the plan that waits at this moment; the answer
    shows its exact argv."""
    socket_path = state_dir / "control.sock"
    at = f"/api/v1/incidents/{urllib.parse.quote(incident, safe='')}"
    if (seen := call(socket_path, "GET", at)) is None:
        answer, plan = offline(state_dir, lambda s, o: _decide_offline(s, o, incident, decision, digest, note))
    else:
        plan = checked(*seen)["plan"] or {}
        body = {"digest": digest or plan.get("digest", ""), "note": note, "who": who()}
        if (reply := call(socket_path, "POST", f"{at}/{decision}", body)) is None:
            raise CommandError("the service has just stopped", "try again", Exit.UNREACHABLE)
        answer = checked(*reply)
    if as_json:
        emit_json(answer | {"plan_steps": [list(step["argv"]) for step in plan.get("steps", [])]})
        return Exit.OK
    import shlex

    said = f" ({answer['detail']})" if answer["detail"] else ""
    say(f"{answer['outcome'].replace('_', ' ')}: {answer['incident']} {answer['plan']}{said}")
    for step in plan.get("steps", []):
        say(f"  {shlex.join(step['argv'])}")
    return Exit.OK


async def _decide_offline(
    store: Store, operations: Operations, incident: str, decision: Decision, digest: str, note: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    import msgspec

    from agent.http.render import incident_json

    found = store.state.incidents.get(incident)
    plan: dict[str, Any] = (incident_json(found)["plan"] if found is not None else None) or {}
    act = operations.approve if decision == "approve" else operations.reject
    answer = await act(incident, digest or plan.get("digest", ""), who(), origin(), note)
    if answer.outcome not in ("approved", "partly_approved", "rejected"):
        suggested = found is not None and found.plan_state == "suggested"
        hint = "start the service: it knows whether suggestions may be approved" if suggested else ""
        raise CommandError(answer.detail or answer.outcome, hint or f"alertmedic incidents {incident}")
    return msgspec.to_builtins(answer), plan


def pause(state_dir: Path, *, paused: bool, note: str, as_json: bool) -> Exit:
    """Pauses or resumes all actions."""
    target = "/api/v1/pause" if paused else "/api/v1/resume"
    reply = call(state_dir / "control.sock", "POST", target, {"note": note, "who": who()})
    if reply is None:
        offline(state_dir, lambda _, o: o.pause(paused, who(), origin(), note))
    else:
        checked(*reply)
    if as_json:
        emit_json({"paused": paused})
    else:
        say("all actions are paused" if paused else "actions may start again")
    return Exit.OK


def reset_breaker(state_dir: Path, key: str, *, note: str, as_json: bool) -> Exit:
    """Closes a circuit breaker by hand."""
    reply = call(state_dir / "control.sock", "POST", "/api/v1/breakers/reset", {"key": key, "note": note, "who": who()})
    if reply is None:
        if not offline(state_dir, lambda _, o: o.reset_breaker(key, who(), origin(), note)):
            raise CommandError(f"no breaker {key!r}", "alertmedic breakers lists them")
    else:
        checked(*reply)
    if as_json:
        emit_json({"key": key, "state": "closed"})
    else:
        say(f"closed: {key}")
    return Exit.OK


def who() -> str:
    """The name of the user who sits here; the service adds the uid that the kernel tells."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid={os.getuid()}"


def origin() -> str:
    return f"cli uid={os.getuid()}"


def checked(status: int, answer: Any) -> Any:
    """The answer, or CommandError with the service's reason."""
    if status == 200:
        return answer
    error = answer.get("error", {}) if isinstance(answer, dict) else {}
    code = Exit.UNREACHABLE if status >= 500 else Exit.FAULT
    raise CommandError(error.get("reason") or f"the service answered {status}", error.get("hint", ""), code)


def offline(state_dir: Path, act: Callable[[Store, Operations], Awaitable[T]]) -> T:
    """Acts on the journal itself, as its only writer. Raises CommandError (UNREACHABLE) when a service holds it."""
    from agent.journal.files import JournalLocked
    from agent.store import Store, journal_directory

    if not journal_directory(state_dir).is_dir():
        raise CommandError(f"no service is running and there is no journal in {state_dir}", "check --state-dir")

    async def run() -> T:
        from actions.policy import GuardPolicy
        from agent.operations import Operations

        store = Store.open(state_dir)
        try:
            # Only a service knows the policy: where none runs, what is only suggested stays so.
            policy = GuardPolicy(approve_suggestions=False)
            return await act(store, Operations(store, _JournalBreakers(store), policy=policy))
        finally:
            await store.close()

    try:
        return asyncio.run(run())
    except JournalLocked as error:
        hint = "the service is starting, stopping or stuck: try again, or look at its log"
        what = f"the journal in {state_dir} is in use, and its service does not answer on control.sock"
        raise CommandError(what, hint, Exit.UNREACHABLE) from error


class _JournalBreakers:
    """The breakers of a service that is not running, as its journal has them: what `Operations` needs of a runner."""

    def __init__(self, store: Store) -> None:
        from actions import breaker

        self._store = store
        self.breakers = breaker.fold(store.state.breakers.values())

    async def reset_breaker(self, key: str, reason: str = "reset by a person") -> None:
        import time

        from actions import breaker
        from agent.journal.records import BreakerRecorded

        after, move = breaker.reset(self.breakers[key], time.time(), reason)
        await self._store.record(BreakerRecorded(move=move))
        self.breakers[key] = after
