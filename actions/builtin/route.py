"""Withdraws route announcements. Actions `route.withdraw.bird` and `route.withdraw.frr`.

Runs as `python -I -m actions.builtin.route resolve|run|check|undo --daemon bird|frr`. BIRD: one protocol is disabled
through birdc, so that all that it announces is withdrawn; the protocols that hold the host's own routes (kernel,
device, direct, pipe) are refused. FRR: one BGP neighbour is shut down through vtysh, in the running configuration only
(nothing is written to a file). Undoing enables it again, if it is still as we left it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys

from actions.builtin import DONE, FAILED
from actions.builtin.program import (
    Refused,
    Trouble,
    execute,
    find,
    nothing_to_do,
    options,
    say,
    shorten,
    target,
    tool,
    wait_for,
)

WITHDRAWABLE = ("BGP", "OSPF", "RIP", "Babel", "Static")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def bird_state(args: argparse.Namespace) -> str:
    """`on` or `off`. Raises Refused for what is no protocol that may be withdrawn."""
    if not NAME.fullmatch(args.name):
        raise Refused("a protocol has a plain name")
    text = tool([find("birdc"), "-s", args.socket, "-r", "show", "protocols", args.name])
    for line in text.splitlines():
        words = line.split()
        if words[:1] == [args.name] and len(words) >= 4:
            if words[1] not in WITHDRAWABLE:
                raise Refused(f"{args.name} is a {words[1]} protocol: it holds the routes of this host")
            return "off" if words[3] == "down" else "on"
    raise Trouble(f"bird knows no protocol {args.name}: {shorten(text)}")


def bird_set(args: argparse.Namespace, state: str) -> None:
    text = tool([find("birdc"), "-s", args.socket, "disable" if state == "off" else "enable", args.name])
    if args.name not in text:
        raise Trouble(shorten(text))


def vtysh(args: argparse.Namespace, *commands: str) -> str:
    argv = [find("vtysh"), *(["--vty_socket", args.socket] if args.socket else [])]
    for command in commands:
        argv += ["-c", command]
    text = tool(argv)
    if "% " in text and "{" not in text:
        raise Trouble(shorten(text))
    return text


def frr_state(args: argparse.Namespace) -> str:
    text = vtysh(args, f"show bgp neighbors {args.name} json")
    neighbour = json.loads(text).get(args.name)
    if not isinstance(neighbour, dict):
        raise Refused(f"FRR knows no BGP neighbour {args.name}")
    return "off" if neighbour.get("adminShutDown") else "on"


def frr_set(args: argparse.Namespace, state: str) -> None:
    no = "" if state == "off" else "no "
    vtysh(args, "configure terminal", f"router bgp {args.asn}", f"{no}neighbor {args.name} shutdown")


def state(args: argparse.Namespace) -> str:
    return bird_state(args) if args.daemon == "bird" else frr_state(args)


def change(args: argparse.Namespace, wanted: str) -> int:
    (bird_set if args.daemon == "bird" else frr_set)(args, wanted)
    reached = wait_for(lambda: state(args) == wanted, args.seconds)
    say({"name": args.name, "state": state(args)})
    return DONE if reached else FAILED


def resolve(args: argparse.Namespace) -> int:
    if state(args) == "off":
        return nothing_to_do()
    return target(f"route={args.daemon}/{args.name}", f"{args.daemon}: {args.name} announces")


def run(args: argparse.Namespace) -> int:
    if state(args) != "on":
        raise Refused(f"{args.name} is withdrawn already")
    return change(args, "off")


def undo(args: argparse.Namespace) -> int:
    if state(args) != "off":
        raise Refused(f"{args.name} announces already")
    return change(args, "on")


def check(args: argparse.Namespace) -> int:
    now = state(args)
    say({"name": args.name, "state": now})
    return DONE if now == "off" else FAILED


def main() -> int:
    parser = options("resolve", "run", "check", "undo")
    parser.add_argument("--daemon", choices=("bird", "frr"), required=True)
    parser.add_argument("--socket", default="", help="bird's control socket, or vtysh's directory of sockets")
    parser.add_argument("--name", required=True, help="a protocol, or a neighbour's address")
    parser.add_argument("--asn", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=5.0)
    return execute(parser, {"resolve": resolve, "run": run, "check": check, "undo": undo})


if __name__ == "__main__":
    sys.exit(main())
