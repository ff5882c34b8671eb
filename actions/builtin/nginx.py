"""Reloads nginx after a test of its configuration, and makes two small changes to it. Actions `nginx.*`.

Runs as `python -I -m actions.builtin.nginx resolve|run|check|undo --mode reload|backlog|drain`. The master process is
identified by its pid file, its pid and its start; it is signalled through a pidfd. A reload has happened when no worker
is left that was there before (old ones may still serve their last connections; they are not counted once they shut
down). A configuration that nginx's own test does not accept is put back before anything is signalled.

backlog: sets `backlog=` of the `listen` directives of one port. drain: marks one server of one upstream as `down`,
provided that enough others are left. Both are changes of one file in plain directives; what is written otherwise
(includes, variables) is not found, and then nothing is done.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections.abc import Callable

from actions.builtin import CANNOT_TELL, DONE, FAILED, config_file, proc
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

NAMES = ("nginx",)
DEFAULT_BACKLOG = 511
LISTEN = re.compile(
    r"(?m)^(?P<head>[ \t]*listen[ \t]+(?:[0-9.]+:|\[[0-9a-fA-F:]+\]:|\*:)?(?P<port>[0-9]+))(?P<rest>[^;{}#\n]*);"
)
UPSTREAM = re.compile(r"(?m)^[ \t]*upstream[ \t]+(?P<name>[A-Za-z0-9_.-]+)[ \t\n]*\{(?P<body>[^{}]*)\}")
SERVER = re.compile(r"(?m)^(?P<head>[ \t]*server[ \t]+(?P<address>[A-Za-z0-9.:\[\]_/-]+))(?P<rest>[^;{}#\n]*);")


def workers(master: int) -> set[tuple[int, int]]:
    """The master's workers that take connections, as (pid, start)."""
    found = set()
    for p in proc.everyone().values():
        if p.parent == master and p.alive and "shutting down" not in proc.command_line(p.pid):
            found.add((p.pid, p.start))
    return found


def test(conf: str) -> None:
    """nginx's own test. Raises Trouble with what it says."""
    tool([find("nginx"), "-t", "-q", "-c", conf])


def reload(args: argparse.Namespace) -> bool:
    """Signals the planned master; whether all its workers are new ones."""
    master = same_server(args.pid_file, NAMES, args.server)
    before = workers(master.pid)
    signal_process(master, signal.SIGHUP)

    def anew() -> bool:
        now = workers(master.pid)
        return bool(now) and not now & before

    return wait_for(anew, args.seconds)


def generation(args: argparse.Namespace) -> str:
    """The workers' identity: the start of the youngest."""
    master = server_of(args.pid_file, NAMES)
    return str(max((start for _, start in workers(master.pid)), default=0))


def resolve_reload(args: argparse.Namespace) -> int:
    master = server_of(args.pid_file, NAMES)
    note = f"nginx, pid {master.pid}, {len(workers(master.pid))} worker(s)"
    return target(f"nginx={args.pid_file}", note, server=identity_of(master), generation=generation(args))


def run_reload(args: argparse.Namespace) -> int:
    same_server(args.pid_file, NAMES, args.server)
    try:
        test(args.conf)
    except Trouble as error:
        raise Refused(str(error)) from error
    anew = reload(args)
    say({"reloaded": anew})
    return DONE if anew else FAILED


def check_reload(args: argparse.Namespace) -> int:
    """It has happened when the workers are younger than they were."""
    same_server(args.pid_file, NAMES, args.server)
    now = int(generation(args))
    say({"generation": now})
    return DONE if now > int(args.generation) else FAILED


def with_backlog(text: str, args: argparse.Namespace) -> str:
    """The text with another backlog for the port; as it was where there is nothing to change."""

    def one(match: re.Match[str]) -> str:
        if int(match["port"]) != args.port:
            return match[0]
        now = re.search(r"[ \t]+backlog=([0-9]+)", match["rest"])
        if int(now[1]) >= args.backlog if now else args.backlog <= DEFAULT_BACKLOG:
            return match[0]
        rest = match["rest"].replace(now[0], "") if now else match["rest"]
        return f"{match['head']}{rest} backlog={args.backlog};"

    # nginx wants the options of a listening socket once, whatever number of servers share it.
    first = next((m for m in LISTEN.finditer(text) if int(m["port"]) == args.port), None)
    if first is None:
        raise Refused(f"{args.conf} has no plain listen directive for port {args.port}")
    return text[: first.start()] + one(first) + text[first.end() :]


def with_drained(text: str, args: argparse.Namespace) -> str:
    """The text with the server marked as down. Raises Refused when too few others would be left."""
    upstream = next((m for m in UPSTREAM.finditer(text) if m["name"] == args.upstream), None)
    if upstream is None:
        raise Refused(f"{args.conf} has no plain upstream {args.upstream}")
    servers = list(SERVER.finditer(upstream["body"]))
    up = [s for s in servers if "down" not in s["rest"].split()]
    chosen = next((s for s in servers if s["address"] == args.member), None)
    if chosen is None:
        raise Refused(f"upstream {args.upstream} has no server {args.member}")
    if chosen not in up:
        return text
    if (len(up) - 1) * 100 < args.keep_percent * len(servers) or len(up) < 2:
        raise Refused(f"only {len(up) - 1} of {len(servers)} servers of {args.upstream} would be left")
    at = upstream.start("body")
    line = f"{chosen['head']}{chosen['rest']} down;"
    return text[: at + chosen.start()] + line + text[at + chosen.end() :]


EDITS: dict[str, Callable[[str, argparse.Namespace], str]] = {"backlog": with_backlog, "drain": with_drained}


def resolve_edit(args: argparse.Namespace) -> int:
    text = config_file.read(args.conf)
    wanted = EDITS[args.mode](text, args)
    if wanted == text:
        return nothing_to_do()
    master = server_of(args.pid_file, NAMES)
    digests = {"before": config_file.digest(text), "after": config_file.digest(wanted)}
    return target(f"nginx={args.conf}", f"{args.mode}: {changed(text, wanted)}", server=identity_of(master), **digests,
                  old=changed(wanted, text))  # fmt: skip


def changed(text: str, wanted: str) -> str:
    """The one line of `wanted` that is not in `text`'s place, without the space around it."""
    for a, b in zip(text.splitlines(), wanted.splitlines(), strict=False):
        if a != b:
            return b.strip()
    return ""


def run_edit(args: argparse.Namespace) -> int:
    same_server(args.pid_file, NAMES, args.server)
    text = config_file.read(args.conf)
    wanted = EDITS[args.mode](text, args)
    if (config_file.digest(text), config_file.digest(wanted)) != (args.before, args.after):
        raise Refused(f"{args.conf} has been changed since the plan was made")
    return put(args, text, wanted)


def undo_edit(args: argparse.Namespace) -> int:
    """Puts the one line back that was changed."""
    same_server(args.pid_file, NAMES, args.server)
    text = config_file.read(args.conf)
    if config_file.digest(text) == args.before:
        say({"restored": True, "already": True})
        return DONE
    lines = text.splitlines(keepends=True)
    for i, line in enumerate(lines):
        space = line[: len(line) - len(line.lstrip())]
        end = line[len(line.rstrip()) :]
        restored = "".join([*lines[:i], space + args.old + end, *lines[i + 1 :]])
        if config_file.digest(restored) == args.before:
            return put(args, text, restored)
    raise Refused(f"{args.conf} has been changed since; it is no longer ours to put back")


def put(args: argparse.Namespace, text: str, wanted: str) -> int:
    """Writes, tests, reloads; a configuration that does not pass the test is put back."""
    config_file.replace(args.conf, wanted, config_file.digest(text))
    try:
        test(args.conf)
    except Trouble as error:
        config_file.replace(args.conf, text, config_file.digest(wanted))
        raise Refused(f"put back: {error}") from error
    anew = reload(args)
    say({"changed": changed(text, wanted), "reloaded": anew})
    return DONE if anew else FAILED


def check_edit(args: argparse.Namespace) -> int:
    """It has happened when the file is as planned and the workers are younger than the file."""
    same = {args.after: DONE, args.before: FAILED}.get(config_file.digest(config_file.read(args.conf)), CANNOT_TELL)
    if same == DONE:
        from pathlib import Path

        started = proc.boot_seconds() + int(generation(args)) / proc.TICKS_PER_SECOND
        # Within the second nobody can tell which came first.
        same = DONE if started >= Path(args.conf).stat().st_ctime - 1.0 else CANNOT_TELL
    say({"file": {DONE: "changed", FAILED: "as before"}.get(same, "cannot tell")})
    return same


def main() -> int:
    parser = options("resolve", "run", "check", "undo")
    parser.add_argument("--mode", choices=("reload", "backlog", "drain"), required=True)
    parser.add_argument("--conf", required=True)
    parser.add_argument("--pid-file", required=True)
    parser.add_argument("--server", default="", help="pid:start of the master")
    parser.add_argument("--generation", default="0")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--backlog", type=int, default=2048)
    parser.add_argument("--upstream", default="")
    parser.add_argument("--member", default="")
    parser.add_argument("--keep-percent", type=float, default=50.0)
    parser.add_argument("--before", default="")
    parser.add_argument("--after", default="")
    parser.add_argument("--old", default="")
    parser.add_argument("--seconds", type=float, default=10.0)
    reloading = {"resolve": resolve_reload, "run": run_reload, "check": check_reload}
    editing = {"resolve": resolve_edit, "run": run_edit, "check": check_edit, "undo": undo_edit}

    def act(args: argparse.Namespace) -> int:
        return (reloading if args.mode == "reload" else editing)[args.operation](args)

    return execute(parser, dict.fromkeys(("resolve", "run", "check", "undo"), act))


if __name__ == "__main__":
    sys.exit(main())
