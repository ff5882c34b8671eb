"""Drains a server of a HAProxy backend, raises a frontend's maxconn, reloads. Actions `haproxy.*`.

Runs as `python -I -m actions.builtin.haproxy resolve|run|check|undo --mode drain|maxconn|reload`. drain and maxconn
speak to the runtime socket. A drained server takes no new connections, the ones it has go on; undoing makes it ready
again if it is still drained; it is refused when too few other servers are up. maxconn is what a frontend takes at once,
the rest waits in the kernel's accept queue; undoing sets the old number. reload has HAProxy test its configuration
first, then signals the master process (SIGUSR2; HAProxy must run in master-worker mode).

The accept backlog itself cannot be raised here: a reload hands the listening sockets on as they are, so that only a
restart, which drops connections, would change it.
"""

from __future__ import annotations

import argparse
import csv
import re
import signal
import socket
import sys

from actions.builtin import CANNOT_TELL, DONE, FAILED, proc
from actions.builtin.program import (
    Refused,
    Trouble,
    execute,
    find,
    identity_of,
    nothing_to_do,
    options,
    same_server,
    say,
    server_of,
    signal_process,
    target,
    tool,
    wait_for,
)

NAMES = ("haproxy",)
SOCKET_SECONDS = 5.0
MAX_ANSWER = 4 * 1024 * 1024
WORD = re.compile(r"[A-Za-z0-9_.:-]+")


def command(path: str, text: str) -> str:
    """The answer of the runtime socket to one command. Raises Trouble and OSError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
        s.settimeout(SOCKET_SECONDS)
        s.connect(path)
        s.sendall(text.encode() + b"\n")
        answer = b""
        while chunk := s.recv(65536):
            answer += chunk
            if len(answer) > MAX_ANSWER:
                raise Trouble(f"{path}: the answer is longer than {MAX_ANSWER} bytes")
    return answer.decode(errors="replace").strip()


def servers(args: argparse.Namespace) -> dict[str, str]:
    """State of each server of the backend, as in `show stat`: UP, DOWN, DRAIN, MAINT, "no check"."""
    rows = csv.DictReader(command(args.socket, "show stat").removeprefix("# ").splitlines())
    found = {
        row["svname"]: row["status"]
        for row in rows
        if row["pxname"] == args.backend and row["svname"] not in ("FRONTEND", "BACKEND")
    }
    if args.member not in found:
        raise Refused(f"backend {args.backend} has no server {args.member}")
    return found


def up(status: str) -> bool:
    return status.startswith("UP") or status == "no check"


def resolve_drain(args: argparse.Namespace) -> int:
    found = servers(args)
    if not up(found[args.member]) and found[args.member] != "DOWN":
        return nothing_to_do()
    enough(found, args)
    note = (
        f"{args.backend}/{args.member} is {found[args.member]}, {sum(map(up, found.values()))} of {len(found)} are up"
    )
    return target(f"haproxy={args.backend}/{args.member}", note, state=found[args.member])


def enough(found: dict[str, str], args: argparse.Namespace) -> None:
    others = sum(up(status) for name, status in found.items() if name != args.member)
    if not others or others * 100 < args.keep_percent * len(found):
        raise Refused(f"only {others} of {len(found)} servers of {args.backend} would be left")


def set_state(args: argparse.Namespace, state: str) -> dict[str, str]:
    if not WORD.fullmatch(args.backend) or not WORD.fullmatch(args.member):
        raise Refused("backend and server are plain words")
    if problem := command(args.socket, f"set server {args.backend}/{args.member} state {state}"):
        raise Trouble(problem)
    found = servers(args)
    say({"server": args.member, "state": found[args.member]})
    return found


def run_drain(args: argparse.Namespace) -> int:
    found = servers(args)
    if found[args.member].split()[0] != args.state.split()[0]:
        raise Refused(f"{args.member} is {found[args.member]} now, planned was {args.state}")
    enough(found, args)
    return DONE if set_state(args, "drain")[args.member].startswith("DRAIN") else FAILED


def undo_drain(args: argparse.Namespace) -> int:
    now = servers(args)[args.member]
    if not now.startswith("DRAIN"):
        raise Refused(f"{args.member} is {now}: it is not drained any more")
    return FAILED if set_state(args, "ready")[args.member].startswith("DRAIN") else DONE


def check_drain(args: argparse.Namespace) -> int:
    now = servers(args)[args.member]
    say({"server": args.member, "state": now})
    if now.startswith("DRAIN"):
        return DONE
    return FAILED if up(now) or now.startswith("DOWN") else CANNOT_TELL


def limit(args: argparse.Namespace) -> int:
    """The frontend's maxconn now. Raises Refused."""
    rows = csv.DictReader(command(args.socket, "show stat").removeprefix("# ").splitlines())
    for row in rows:
        if (row["pxname"], row["svname"]) == (args.frontend, "FRONTEND"):
            return int(row["slim"])
    raise Refused(f"there is no frontend {args.frontend}")


def resolve_maxconn(args: argparse.Namespace) -> int:
    now = limit(args)
    wanted = min(args.max, int(now * args.factor))
    if wanted <= now:
        return nothing_to_do()
    note = f"frontend {args.frontend} takes {now} connections, wanted are {wanted}"
    return target(f"haproxy={args.frontend}", note, previous=now, wanted=wanted)


def set_maxconn(args: argparse.Namespace) -> int:
    now = limit(args)
    if now != args.previous:
        raise Refused(f"maxconn is {now} now, planned was {args.previous}")
    if not WORD.fullmatch(args.frontend):
        raise Refused("a frontend is a plain word")
    if problem := command(args.socket, f"set maxconn frontend {args.frontend} {args.wanted}"):
        raise Trouble(problem)
    after = limit(args)
    say({"frontend": args.frontend, "before": now, "after": after})
    return DONE if after == args.wanted else FAILED


def check_maxconn(args: argparse.Namespace) -> int:
    now = limit(args)
    say({"frontend": args.frontend, "now": now})
    return {args.wanted: DONE, args.previous: FAILED}.get(now, CANNOT_TELL)


def workers(master: int) -> set[tuple[int, int]]:
    return {(p.pid, p.start) for p in proc.everyone().values() if p.parent == master and p.alive}


def youngest(master: int) -> int:
    return max((start for _, start in workers(master)), default=0)


def resolve_reload(args: argparse.Namespace) -> int:
    master = server_of(args.pid_file, NAMES)
    if not workers(master.pid):
        raise Refused(f"pid {master.pid} is no master process: HAProxy must run in master-worker mode")
    note = f"haproxy, pid {master.pid}"
    return target(f"haproxy={args.pid_file}", note, server=identity_of(master), generation=str(youngest(master.pid)))


def run_reload(args: argparse.Namespace) -> int:
    master = same_server(args.pid_file, NAMES, args.server)
    try:
        tool([find("haproxy"), "-c", "-f", args.conf])
    except Trouble as error:
        raise Refused(str(error)) from error
    before = workers(master.pid)
    signal_process(master, signal.SIGUSR2)
    anew = wait_for(lambda: bool(workers(master.pid) - before), args.seconds)
    say({"reloaded": anew})
    return DONE if anew else FAILED


def check_reload(args: argparse.Namespace) -> int:
    """It has happened when a worker is younger than they all were."""
    now = youngest(same_server(args.pid_file, NAMES, args.server).pid)
    say({"generation": now})
    return DONE if now > int(args.generation) else FAILED


MODES = {
    "drain": {"resolve": resolve_drain, "run": run_drain, "check": check_drain, "undo": undo_drain},
    "maxconn": {"resolve": resolve_maxconn, "run": set_maxconn, "check": check_maxconn},
    "reload": {"resolve": resolve_reload, "run": run_reload, "check": check_reload},
}


def main() -> int:
    parser = options("resolve", "run", "check", "undo")
    parser.add_argument("--mode", choices=tuple(MODES), required=True)
    parser.add_argument("--socket", default="")
    parser.add_argument("--backend", default="")
    parser.add_argument("--member", default="")
    parser.add_argument("--state", default="")
    parser.add_argument("--keep-percent", type=float, default=50.0)
    parser.add_argument("--conf", default="")
    parser.add_argument("--pid-file", default="")
    parser.add_argument("--server", default="")
    parser.add_argument("--generation", default="0")
    parser.add_argument("--frontend", default="")
    parser.add_argument("--factor", type=float, default=2.0)
    parser.add_argument("--max", type=int, default=0)
    parser.add_argument("--previous", type=int, default=-1)
    parser.add_argument("--wanted", type=int, default=-1)
    parser.add_argument("--seconds", type=float, default=10.0)

    def act(args: argparse.Namespace) -> int:
        return MODES[args.mode][args.operation](args)

    return execute(parser, dict.fromkeys(("resolve", "run", "check", "undo"), act))


if __name__ == "__main__":
    sys.exit(main())
