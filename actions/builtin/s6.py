"""Restarts a service through its own s6-supervise. Action `service.restart.s6`.

Runs as `python -I -m actions.builtin.s6 resolve|run|check`. s6-supervise stays the parent of what it starts, so nothing
of the service ends with our sandbox. The service's identity is its pid with the start in kernel ticks; where those have
changed since the plan, somebody else has restarted it and nothing is done. A service that somebody wants to be down
(`s6-svc -d`) is left down.

Never creates, enables or removes services.
"""

from __future__ import annotations

import argparse
import sys

from actions.builtin import DONE, FAILED, proc
from actions.builtin.program import Refused, Trouble, execute, find, options, say, target, tool, wait_for

NONE = "none"  # the identity of a service that does not run


def status(directory: str) -> dict[str, str]:
    """up, wantedup, ready (true or false), pid (-1: none). Raises Trouble."""
    fields = ("up", "wantedup", "ready", "pid")
    values = tool([find("s6-svstat"), "-o", ",".join(fields), "--", directory]).split()
    if len(values) != len(fields):
        raise Trouble(f"s6-svstat answered {len(values)} of {len(fields)} fields")
    return dict(zip(fields, values, strict=True))


def identity(found: dict[str, str]) -> str:
    process = proc.read(int(found["pid"])) if found["up"] == "true" else None
    return f"{process.pid}:{process.start}" if process is not None else NONE


def resolve(args: argparse.Namespace) -> int:
    found = status(args.service)
    if found["wantedup"] != "true":
        raise Refused(f"somebody wants {args.service} to be down")
    note = f"{args.service} is {'up' if found['up'] == 'true' else 'down'}, pid {found['pid']}"
    return target(f"s6={args.service}", note, process=identity(found))


def run(args: argparse.Namespace) -> int:
    found = status(args.service)
    now = identity(found)
    if found["wantedup"] != "true":
        raise Refused(f"somebody wants {args.service} to be down")
    if now not in (NONE, args.process):
        raise Refused(f"{args.service} runs as {now} now, planned was {args.process}")
    tool([find("s6-svc"), "-r" if now != NONE else "-u", "--", args.service])

    def anew() -> bool:
        return identity(status(args.service)) not in (NONE, now)

    restarted = wait_for(anew, args.seconds)
    say({"before": now, "after": identity(status(args.service)), "restarted": restarted})
    return DONE if restarted else FAILED


def check(args: argparse.Namespace) -> int:
    """It has happened when the service runs as another process than planned."""
    now = identity(status(args.service))
    say({"now": now})
    return DONE if now not in (NONE, args.process) else FAILED


def main() -> int:
    parser = options("resolve", "run", "check")
    parser.add_argument("--service", required=True, help="the service directory")
    parser.add_argument("--process", default=NONE)
    parser.add_argument("--seconds", type=float, default=30.0)
    return execute(parser, {"resolve": resolve, "run": run, "check": check})


if __name__ == "__main__":
    sys.exit(main())
