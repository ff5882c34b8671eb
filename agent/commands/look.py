"""`incidents`, `breakers`, `quarantine`: what the journal says, with the service running or stopped.

Reads the journal's files read-only and never speaks to the service, so that what happened can be looked at when nothing
works any more.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from agent.commands.output import CommandError, Exit, emit_json, on_terminal, say, table

if TYPE_CHECKING:
    from agent.fold_model import Incident
    from agent.incidents import State


def read(state_dir: Path) -> State:
    """The state as the journal has it now."""
    from agent.store import read_state

    return read_state(state_dir)


def find(state: State, wanted: str) -> Incident:
    """The incident of that id, or the only one whose id begins so."""
    matches = [i for id, i in state.incidents.items() if id == wanted]
    matches = matches or [i for id, i in state.incidents.items() if id.startswith(wanted)]
    if len(matches) != 1:
        what = f"{len(matches)} incidents begin with {wanted!r}" if matches else f"no incident {wanted!r}"
        raise CommandError(what, "alertmedic incidents lists them")
    return matches[0]


def incidents(state_dir: Path, wanted: str, *, as_json: bool, states: tuple[str, ...], tenant: str, limit: int) -> Exit:
    """The list, newest first, or the story of one."""
    state = read(state_dir)
    if wanted:
        found = find(state, wanted)
        if as_json:
            from agent.http.render import incident_json

            emit_json({"incidents": [incident_json(found)]})
            return Exit.OK
        return tell(found)
    chosen = [
        i
        for i in reversed(state.incidents.values())
        if (not states or i.state.value in states) and (not tenant or i.tenant == tenant)
    ]
    shown = chosen[:limit] if limit else chosen
    if as_json:
        from agent.http.render import incident_json

        emit_json({"incidents": [incident_json(i) for i in shown]})
        return Exit.OK
    from agent.story import listing

    table(listing(shown, time.time()), empty=f"no incidents in {state_dir}")
    if len(shown) < len(chosen):
        say(f"and {len(chosen) - len(shown)} more")
    return Exit.OK


def tell(incident: Incident) -> Exit:
    """The story for people: a table on a terminal, else plain text."""
    if on_terminal():
        from rich.console import Console

        from agent.story import as_rich

        Console().print(as_rich(incident, time.time()))
    else:
        from agent.story import as_text

        sys.stdout.write(as_text(incident, time.time()))
    return Exit.OK


def breakers(state_dir: Path, *, as_json: bool) -> Exit:
    from agent.http.render import breaker_json

    found = [breaker_json(b) for b in read(state_dir).breakers.values()]
    if as_json:
        emit_json({"breakers": found})
        return Exit.OK
    rows = [("key", "state", "since", "open until", "reason")]
    rows += [(b["key"], b["state"], b["since"], b["open_until"] or "", b["reason"]) for b in found]
    table(rows, empty="no circuit breaker has counted anything yet")
    return Exit.OK


def quarantine(state_dir: Path, *, as_json: bool) -> Exit:
    """What could not be understood, newest first."""
    from agent.http.render import quarantine_json

    state = read(state_dir)
    found = [quarantine_json(record) for record in reversed(state.quarantined)]
    if as_json:
        emit_json({"quarantined": found, "total": state.quarantined_count})
        return Exit.OK
    rows = [("at", "tenant", "alert", "path", "reason", "head")]
    for record in found:
        index = "the whole body" if record["index"] is None else f"alerts[{record['index']}]"
        rows.append((record["at"], record["tenant"], index, record["path"], record["reason"], record["head"][:60]))
    table(rows, empty="nothing is in quarantine")
    return Exit.OK
