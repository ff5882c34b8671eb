"""What an agent says to `alertmedic sandbox run` on another host, and what comes back: JSON, one object a line.

Used by `agent.remote` (this side) and `agent.commands.sandboxed` (that side). That side first says `Hello`; only then
does this side send its one request, so that what never got a hello certainly never ran. Commands travel as JSON on
standard input: no shell, neither here nor there, ever reads them. Unknown keys are refused at any depth.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import msgspec

from sandbox.model import EnforcedBy, Limits, Needs, Protection, RunResult

PROTOCOL = 1
MAX_REQUEST_BYTES = 4 * 1024 * 1024
# Stands for the interpreter that the other host's alertmedic runs in: its path is known only there.
PYTHON_THERE = "alertmedic-python"
LEAF = re.compile(r"remote-[0-9a-f]{24}")


class Run(msgspec.Struct, frozen=True, kw_only=True, tag="run", tag_field="do", forbid_unknown_fields=True):
    """Run this, as `sandbox.run` does. `leaf`: a fresh name, by which `Kill` finds it again."""

    argv: tuple[str, ...]
    limits: Limits = Limits()
    env: dict[str, str] | None = None
    user: str = ""
    protection: Protection = "automatic"
    leaf: str
    needs: Needs = Needs()
    secrets: dict[str, str] = {}
    redact: tuple[str, ...] = ()


class Kill(msgspec.Struct, frozen=True, kw_only=True, tag="kill", tag_field="do", forbid_unknown_fields=True):
    """Make certain that nothing of that run is alive, nor ever will be."""

    leaf: str
    seconds: float = 15.0


class Probe(msgspec.Struct, frozen=True, kw_only=True, tag="probe", tag_field="do", forbid_unknown_fields=True):
    """What holds runs there?"""


Request = Run | Kill | Probe


class Hello(msgspec.Struct, frozen=True, kw_only=True):
    version: str
    protocol: Literal[1] = 1


class Killed(msgspec.Struct, frozen=True, kw_only=True):
    certain: bool


class Probed(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    enforced_by: EnforcedBy
    reason: str = ""
    root: str = ""
    controllers: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    absent_layers: dict[str, str] = {}


class Refused(msgspec.Struct, frozen=True, kw_only=True):
    """The request was not taken, and nothing was done."""

    refused: str


Answer = RunResult | Killed | Probed | Refused


class BadRequest(ValueError):  # noqa: N818
    """The text is no request. Says which key is wrong."""


def read_request(text: bytes) -> Request:
    """Raises BadRequest."""
    if len(text) > MAX_REQUEST_BYTES:
        raise BadRequest(f"the request has more than {MAX_REQUEST_BYTES} bytes")
    try:
        request: Request = msgspec.json.decode(text, type=Run | Kill | Probe)
        raw = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError) as x:
        raise BadRequest(f"not a request: {x}") from x
    if isinstance(request, Run):
        for key, kind in (("limits", Limits), ("needs", Needs)):
            if unknown := sorted(set(raw.get(key, {})) - set(kind.__struct_fields__)):
                raise BadRequest(f"{key}.{unknown[0]}: no such key")
    if isinstance(request, (Run, Kill)) and not LEAF.fullmatch(request.leaf):
        raise BadRequest(f"leaf: {request.leaf!r} does not match {LEAF.pattern}")
    return request


def line(message: Any) -> bytes:
    return msgspec.json.encode(message) + b"\n"
