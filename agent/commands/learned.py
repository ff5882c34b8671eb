"""`feedback` and `model`: what a person says an incident's cause was, and which model made of that serves.

Called by `agent.cli`. What a person says goes to the running service, or into the journal of a stopped one, the way
that decisions go (`agent.commands.decide`); looking at models only reads the journal.
"""

from __future__ import annotations

import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from agent.commands.decide import call, checked, offline, origin, who
from agent.commands.look import find, read
from agent.commands.output import CommandError, Exit, emit_json, say, table

if TYPE_CHECKING:
    from agent.config import Config

LEARN_SECONDS = 120.0  # a new model is held against the golden incidents before the service answers


def feedback(
    config: Config,
    state_dir: Path,
    wanted: str,
    cause_at: str,
    *,
    helped: Literal["yes", "no", ""],
    note: str,
    as_json: bool,
) -> Exit:
    """`cause_at` is CAUSE@SERVICE."""
    from agent.commands.packs import load
    from agent.http.api import Said

    cause, at, service = cause_at.partition("@")
    if not (cause and at and service):
        raise CommandError(f"feedback: --cause {cause_at!r} is not CAUSE@SERVICE", "", Exit.USAGE)
    if cause not in load(config).causes:
        raise CommandError(f"feedback: no pack knows the cause {cause!r}", "alertmedic packs list")
    incident = find(read(state_dir), wanted).id
    told = {"yes": True, "no": False}.get(helped)
    said = Said(cause=cause, service=service, helped=told, note=note)
    target = f"/api/v1/incidents/{urllib.parse.quote(incident, safe='')}/feedback"
    body = {"cause": cause, "service": service, "helped": told, "note": note, "who": who()}
    reply = call(state_dir / "control.sock", "POST", target, body, LEARN_SECONDS)
    if reply is None:
        model = offline(state_dir, lambda _, o: o.feedback(incident, said, who(), origin()))
        answer: dict[str, Any] = {"incident": incident, "recorded": True, "model": model}
    else:
        answer = checked(*reply)
    if as_json:
        emit_json(answer)
    else:
        say(f"recorded: {answer['incident']}: {cause} on {service}")
        say(answer["model"])
    return Exit.OK


def list_models(state_dir: Path, *, as_json: bool) -> Exit:
    """The models that were made, newest last, and which one serves."""
    from agent.http.render import models_json

    found = models_json(read(state_dir).models)
    if as_json:
        emit_json(found)
        return Exit.OK
    rows = [("model", "made", "incidents", "golden incidents", "")]
    rows.append(("shipped", "", "", "", "serves" if found["serving"] == 0 else ""))
    for version in found["versions"]:
        state = f"refused: {version['refused']}" if version["refused"] else ""
        state = "serves" if version["number"] == found["serving"] else state
        rows.append((str(version["number"]), version["at"], str(version["incidents"]), version["golden"], state))
    table(rows, empty="")
    if found["pinned"]:
        say("pinned: what is learned next serves only after `alertmedic model use latest`")
    return Exit.OK


def use(state_dir: Path, version: str, *, note: str, as_json: bool) -> Exit:
    """`shipped`, `latest` or a number."""
    number: int | Literal["latest"]
    if version == "latest":
        number = "latest"
    elif version == "shipped":
        number = 0
    elif version.isascii() and version.isdigit() and len(version) < 10:
        number = int(version)
    else:
        raise CommandError(f"model use: {version!r} is not shipped, latest or a number", "", Exit.USAGE)
    reply = call(
        state_dir / "control.sock", "POST", "/api/v1/models/use", {"version": number, "note": note, "who": who()}
    )
    if reply is None:
        serving = _offline_choice(state_dir, None if number == "latest" else number, note)
    else:
        serving = checked(*reply)["serving"]
    return _chosen(serving, as_json=as_json)


def revert(state_dir: Path, *, note: str, as_json: bool) -> Exit:
    """Back to the model that served before."""
    from actions.model import IllegalMove

    reply = call(state_dir / "control.sock", "POST", "/api/v1/models/revert", {"note": note, "who": who()})
    if reply is not None:
        return _chosen(checked(*reply)["serving"], as_json=as_json)
    try:
        return _chosen(offline(state_dir, lambda _, o: o.revert_model(who(), origin(), note)), as_json=as_json)
    except IllegalMove as error:
        raise CommandError(str(error), "alertmedic model list") from error


def _offline_choice(state_dir: Path, number: int | None, note: str) -> int:
    from actions.model import IllegalMove

    try:
        return offline(state_dir, lambda _, o: o.use_model(number, who(), origin(), note))
    except IllegalMove as error:
        raise CommandError(str(error), "alertmedic model list") from error


def _chosen(serving: int, *, as_json: bool) -> Exit:
    if as_json:
        emit_json({"serving": serving})
    else:
        say(f"model {serving} serves" if serving else "the shipped model serves")
    return Exit.OK
