"""`gateway status|promote|rollback|judge`: the two diagnosis channels. Status reads the journal when no service runs;
what changes something asks the running service, since the channels live there."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from agent.commands.decide import call, checked
from agent.commands.output import CommandError, Exit, emit_json, say, table

COUNTS = (("both", "both"), ("A alone", "a_only"), ("B alone", "b_only"), ("neither", "neither"))


def status(state_dir: Path, *, as_json: bool) -> Exit:
    reply = call(state_dir / "control.sock", "GET", "/api/v1/gateway")
    return _show(_offline(state_dir) if reply is None else checked(*reply), as_json=as_json)


def move(state_dir: Path, what: Literal["promote", "rollback"], note: str, *, force: bool, as_json: bool) -> Exit:
    body = {"note": note} | ({"force": True} if force else {})
    return _show(_asked(state_dir, what, body), as_json=as_json)


def judge(state_dir: Path, trace: str, cause: str, service: str, *, as_json: bool) -> Exit:
    body = {"trace_id": trace, "cause": cause, "service": service}
    return _show(_asked(state_dir, "judge", body), as_json=as_json)


def _asked(state_dir: Path, what: str, body: dict[str, Any]) -> dict[str, Any]:
    reply = call(state_dir / "control.sock", "POST", f"/api/v1/gateway/{what}", body)
    if reply is None:
        raise CommandError(f"gateway {what}: no service runs", "start it: the channels live there", Exit.UNREACHABLE)
    answer: dict[str, Any] = checked(*reply)
    return answer


def _offline(state_dir: Path) -> dict[str, Any]:
    from agent.gateway.render import state_json
    from agent.store import read_state

    return state_json(read_state(state_dir).gateway) | {"channel": "no service runs"}


def _show(of: dict[str, Any], *, as_json: bool) -> Exit:
    if as_json:
        emit_json(of)
        return Exit.OK
    score = of["score"]
    version = f" ({of['promoted_version']})" if of["promoted_version"] else ""
    say(f"primary: {of['primary']}{version}; {of['channel'] or 'the other channel is ready'}")
    say(f"{of['compared']} comparisons recorded, {of['differed']} differ, {score['judged']} are judged:")
    counts = [f"{name} {score[key]}" for name, key in COUNTS]
    say(f"  right: {', '.join(counts)}")
    low, high = score["interval"]
    say(
        f"  B against A: {score['difference']:+.3f} (95 %: {low:+.3f} to {high:+.3f}), McNemar p {score['p_value']:.4f}"
    )
    say(f"  evidence ratio {score['evidence_ratio']:.2f}: {_words(score['decision'])}")
    rows = [("trace", "A", "B", "judged")]
    for one in of["comparisons"]:
        rows.append((one["trace"], _answer(one["a"]), _answer(one["b"]), one["judged"] or "-"))
    if len(rows) > 1:
        say("")
        table(rows, empty="")
    return Exit.OK


def _words(decision: str) -> str:
    if decision == "undecided":
        return "nothing can be said yet"
    return f"{decision.upper()} is better"


def _answer(of: dict[str, Any]) -> str:
    if of["status"] != "ok":
        return str(of["status"])
    return f"{of['cause']} on {of['service']}" if of.get("cause") else str(of["verdict"]).replace("_", " ")
