"""Silences the alerts of one service for a bounded time. Action `alertmanager.silence`.

Runs as `python -I -m actions.builtin.silence run|check|undo`. Through Alertmanager's API v2. The silence says who made
it and for which incident, matches one label with one value exactly, and ends by itself even if nobody removes it.
`undo` ends ours at once; a silence that a person made is never touched. Made twice it would only be extended: one of
ours with the same comment is found and updated.
"""

from __future__ import annotations

import argparse
import sys
from datetime import UTC, datetime, timedelta
from typing import Any

from actions.builtin import DONE, FAILED
from actions.builtin.http_json import HttpError, request
from actions.builtin.program import Refused, Trouble, execute, options, say

AUTHOR = "alertmedic"


def ask(args: argparse.Namespace, method: str, path: str, body: Any = None) -> Any:
    try:
        return request(method, f"{args.url.rstrip('/')}/api/v2{path}", body)
    except HttpError as error:
        raise Trouble(str(error)) from error


def comment(args: argparse.Namespace) -> str:
    return f"remediation of {args.incident}, planned at {args.planned_at}"


def ours(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Silences of this plan that are in force."""
    found = ask(args, "GET", "/silences")
    return [
        s
        for s in found
        if s["createdBy"] == AUTHOR and s["comment"] == comment(args) and s["status"]["state"] in ("active", "pending")
    ]


def run(args: argparse.Namespace) -> int:
    now = datetime.now(UTC)
    body: dict[str, Any] = {
        "matchers": [{"name": args.label, "value": args.service, "isRegex": False, "isEqual": True}],
        "startsAt": now.isoformat(),
        "endsAt": (now + timedelta(seconds=args.duration)).isoformat(),
        "createdBy": AUTHOR,
        "comment": comment(args),
    }
    if existing := ours(args):
        body["id"] = existing[0]["id"]
    made = ask(args, "POST", "/silences", body)
    say({"silence": made.get("silenceID"), "until": body["endsAt"]})
    return DONE if ours(args) else FAILED


def undo(args: argparse.Namespace) -> int:
    found = ours(args)
    if not found:
        raise Refused("no silence of this plan is in force any more")
    for silence in found:
        ask(args, "DELETE", f"/silence/{silence['id']}")
    left = ours(args)
    say({"ended": len(found) - len(left)})
    return FAILED if left else DONE


def check(args: argparse.Namespace) -> int:
    found = ours(args)
    say({"in_force": len(found)})
    return DONE if found else FAILED


def main() -> int:
    parser = options("run", "check", "undo")
    parser.add_argument("--url", required=True)
    parser.add_argument("--label", required=True)
    parser.add_argument("--service", required=True)
    parser.add_argument("--incident", required=True)
    parser.add_argument("--planned-at", required=True)
    parser.add_argument("--duration", type=int, default=900)
    return execute(parser, {"run": run, "check": check, "undo": undo})


if __name__ == "__main__":
    sys.exit(main())
