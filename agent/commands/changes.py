"""`change`: telling AlertMedic what was changed, and what it was told.

Called by `agent.cli`, by people and by deploy pipelines on the same machine (others post to `/api/v1/changes`). What is
told goes to the running service, or into the journal of a stopped one, the way that decisions go.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.commands.decide import call, checked, offline, origin, who
from agent.commands.look import read
from agent.commands.output import CommandError, Exit, emit_json, say, table

if TYPE_CHECKING:
    from agent.fold_changes import ChangeKind


def add(
    state_dir: Path,
    service: str,
    kind: ChangeKind,
    *,
    id: str,
    text: str,
    at: float | None,
    tenant: str,
    as_json: bool,
) -> Exit:
    """`at`: when it was made, unix seconds; None: now."""
    from agent.http.api import TooMany, changed_of
    from agent.http.body import RequestError
    from agent.http.render import plain, rfc3339

    now = time.time()
    try:
        told = changed_of(tenant=tenant, kind=kind, service=service, id=id, text=text, told=at, now=now)
    except RequestError as error:
        raise CommandError(f"change add: {error}", error.hint, Exit.USAGE) from error
    body = {"service": told.service, "kind": kind, "id": told.id, "text": told.text, "time": told.when}
    reply = call(state_dir / "control.sock", "POST", "/api/v1/changes", {**body, "tenant": tenant, "who": who()})
    if reply is None:
        try:
            new = offline(state_dir, lambda _, o: o.change(told, who(), origin()))
        except TooMany as error:
            raise CommandError(str(error), "try again later") from error
        answer: dict[str, Any] = {"recorded": new, "change": {**plain(told), "when": rfc3339(told.when)}}
    else:
        answer = checked(*reply)
    if as_json:
        emit_json(answer)
    else:
        made = answer["change"]
        word = "recorded" if answer["recorded"] else "known already"
        say(f"{word}: {made['kind']} {made['id']} of {made['service']} at {made['when']}")
    return Exit.OK


def list_changes(state_dir: Path, *, as_json: bool) -> Exit:
    """What was told within the last seven days, newest first."""
    from agent.http.render import change_json

    found = [change_json(c) for c in reversed(read(state_dir).changes)]
    if as_json:
        emit_json({"changes": found})
        return Exit.OK
    rows = [("made", "kind", "service", "id", "text", "told by")]
    rows += [(c["when"], c["kind"], c["service"], c["id"], c["text"], c["who"]) for c in found]
    table(rows, empty="nobody told of a change")
    return Exit.OK
