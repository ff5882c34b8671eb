"""Ends a runaway process group. Action `process.terminate_group`.

Runs as `python -I -m actions.builtin.process_group resolve|run|check`. SIGTERM to every member, SIGKILL to what is left
after the grace time; each signal goes through a pidfd whose process has just been compared with the planned identity,
so a reused pid is never hit (pidfd_send_signal(2)). `kill(-pgid)` is not used: it could reach a member that must not be
touched.

Refused as a whole when any member is protected: pid 1, kernel threads, the agent with its ancestors and children, our
own group, supervisors and what they supervise, units of systemd, login sessions of sshd, data stores, owners of a known
service's port, and what the policy protects. A process whose protection cannot be judged is protected.
"""

from __future__ import annotations

import argparse
import json
import os
import pwd
import signal
import sys
import time
from fnmatch import fnmatchcase
from typing import Any

from actions.builtin import DONE, FAILED, NOTHING_DONE, crashed, proc
from actions.builtin.proc import Process

POLL_SECONDS = 0.05
KILL_SECONDS = 5.0
MAX_LISTED = 60
# A start time that came from the clock may differ by a step of that clock; the pid and the ticks decide later.
START_TOLERANCE = 1.5
SUPERVISORS = (
    "systemd", "supervisord", "s6-svscan", "s6-supervise", "runsv", "runsvdir", "monit", "init", "tini", "dumb-init",
    "dockerd", "containerd", "containerd-shim*", "conmon", "kubelet", "pm2*", "circusd",
)  # fmt: skip
PROTECTED = (
    *SUPERVISORS, "sshd*", "systemd-*", "dbus-*", "postgres", "postmaster", "mysqld", "mariadbd", "redis-server",
    "etcd", "beam.smp", "mongod", "prometheus", "alertmanager", "prometheus-*",
)  # fmt: skip
JOB_UNITS = ("cron.service", "crond.service", "atd.service", "anacron.service", "user@*.service")


class Protection:
    """Judges members of the group. Everything it compares with is read once, at the beginning."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.everyone = proc.everyone()
        me = self.everyone[os.getpid()]
        self.lineage = {me.pid, *(p.pid for p in proc.ancestors(me, self.everyone))}
        agent = self.everyone.get(args.agent_pid)
        if agent is not None:
            self.lineage |= {agent.pid, *(p.pid for p in proc.ancestors(agent, self.everyone))}
        self.agent = args.agent_pid
        self.groups = {self.everyone[p].group for p in self.lineage}
        self.unit = proc.unit_of(args.agent_pid) or proc.unit_of(me.pid)
        self.names = (*PROTECTED, *_split(args.protected_processes))
        self.users = _split(args.protected_users)
        self.ports = proc.listening({int(p) for p in _split(args.known_ports)})

    def objection(self, process: Process) -> str:
        """Why the process must not be signalled, "" if it may."""
        if process.pid <= 1 or process.pid in self.lineage:
            return "is pid 1, the agent, or one of its ancestors"
        if process.flags & proc.KERNEL_THREAD or process.parent == 2 or process.pid == 2:
            return "is a kernel thread"
        if process.group in self.groups:
            return "is in our own process group or that of an ancestor"
        for called in proc.names(process):
            if any(fnmatchcase(called, name) for name in self.names):
                return f"is called {called}, which is protected"
        if owner := self._protected_user(process.user):
            return f"belongs to the protected user {owner}"
        return self._relations(process) or self._unit(process) or self._service(process)

    def _protected_user(self, uid: int) -> str:
        try:
            name = pwd.getpwuid(uid).pw_name
        except KeyError:
            name = str(uid)
        return name if any(fnmatchcase(name, u) or fnmatchcase(str(uid), u) for u in self.users) else ""

    def _relations(self, process: Process) -> str:
        above = list(proc.ancestors(process, self.everyone))
        if any(p.pid == self.agent for p in above):
            return "was started by the agent"
        for p in above:
            supervising = any(fnmatchcase(p.name, s) for s in SUPERVISORS)
            # pid 1 adopts every orphan, and a supervisor above us all (a container's) supervises its children only.
            if supervising and p.pid != 1 and (p.pid not in self.lineage or p.pid == process.parent):
                return f"is supervised by {p.name} (pid {p.pid})"
        leader = self.everyone.get(process.session)
        parent = self.everyone.get(leader.parent) if leader else None
        if parent is not None and parent.name.startswith("sshd"):
            return "belongs to somebody's login session"
        return ""

    def _unit(self, process: Process) -> str:
        unit = proc.unit_of(process.pid)
        if unit and unit != self.unit and not any(fnmatchcase(unit, glob) for glob in JOB_UNITS):
            return f"belongs to the systemd unit {unit}"
        return ""

    def _service(self, process: Process) -> str:
        if not self.ports:
            return ""
        for p in (process, *proc.ancestors(process, self.everyone)):
            if p.pid in self.lineage:
                break
            try:
                owned = proc.sockets(p.pid) & self.ports.keys()
            except PermissionError:
                return f"may own a known service's port: its files (pid {p.pid}) cannot be looked at"
            if owned:
                port = self.ports[min(owned)]
                return f"belongs to the service that listens on port {port}"
        return ""


def members(group: int) -> list[Process]:
    """Living members of the group, oldest first. A zombie has ended; only its parent can remove it."""
    found = [p for p in proc.everyone().values() if p.group == group and p.alive]
    return sorted(found, key=lambda p: (p.start, p.pid))


def identities(text: str) -> set[tuple[int, int]]:
    """From `12:3456,13:3460` (pid:start in ticks)."""
    pairs = (item.partition(":") for item in _split(text))
    return {(int(pid), int(start)) for pid, _, start in pairs}


def resolve(args: argparse.Namespace) -> int:
    process = proc.read(args.pid)
    if process is None or not process.alive or process.group != args.pgid:
        _say([])
        return DONE
    started = proc.boot_seconds() + process.start / proc.TICKS_PER_SECOND
    if abs(started - args.start) > START_TOLERANCE:
        _say([])
        return DONE
    group, protection = members(args.pgid), Protection(args)
    if objections := _objections(group, protection):
        sys.stderr.write("protected: " + "; ".join(objections) + "\n")
        return NOTHING_DONE
    listed = [process, *(p for p in group if p.pid != process.pid)][:MAX_LISTED]
    target = {
        "identity": f"pid={args.pid},start={args.start:.2f}",
        "params": {"members": ",".join(f"{p.pid}:{p.start}" for p in listed)},
        "note": f"group {args.pgid}, {len(group)} process(es): {proc.command_line(args.pid)}",
    }
    _say([target])
    return DONE


def run(args: argparse.Namespace) -> int:
    planned, group = identities(args.members), members(args.pgid)
    if not any((p.pid, p.start) in planned for p in group):
        _say({"refused": f"no planned process is in group {args.pgid} any more"})
        return NOTHING_DONE
    if objections := _objections(group, Protection(args)):
        _say({"refused": objections})
        return NOTHING_DONE
    ended = {p.pid: p.name for p in group}
    for p in group:
        _send(p, signal.SIGTERM)
        _send(p, signal.SIGCONT)  # a stopped process gets its SIGTERM only then
    left = _wait(args.pgid, args.grace)
    deadline = time.monotonic() + KILL_SECONDS
    while left and time.monotonic() < deadline:
        protection = Protection(args)  # children that were forked meanwhile are judged as well
        for p in left:
            if not protection.objection(p):
                ended[p.pid] = p.name
                _send(p, signal.SIGKILL)
        left = _wait(args.pgid, 4 * POLL_SECONDS)
    gone = {str(pid): name for pid, name in ended.items() if pid not in {p.pid for p in left}}
    _say({"group": args.pgid, "ended": gone, "left": [p.pid for p in left]})
    return FAILED if left else DONE


def check(args: argparse.Namespace) -> int:
    """It has happened when no planned process is alive in the group."""
    left = [p.pid for p in members(args.pgid) if (p.pid, p.start) in identities(args.members)]
    _say({"group": args.pgid, "left": left})
    return FAILED if left else DONE


def _objections(group: list[Process], protection: Protection) -> list[str]:
    judged = ((p, protection.objection(p)) for p in group)
    return [f"pid {p.pid} ({p.name}) {why}" for p, why in judged if why]


def _send(process: Process, number: signal.Signals) -> None:
    """Signals exactly this process: once the pidfd is open the pid cannot be reused for another unnoticed."""
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    try:
        now = proc.read(process.pid)
        if now is not None and (now.start, now.group) == (process.start, process.group):
            signal.pidfd_send_signal(fd, number)
    except ProcessLookupError:
        pass
    finally:
        os.close(fd)


def _wait(group: int, seconds: float) -> list[Process]:
    """The members that are left when all have gone or the time is over."""
    deadline = time.monotonic() + seconds
    while (left := members(group)) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return left


def _split(text: str) -> tuple[str, ...]:
    return tuple(item for item in text.split(",") if item)


def _say(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("operation", choices=("resolve", "run", "check"))
    parser.add_argument("--pid", type=int, required=True)
    parser.add_argument("--start", type=float, required=True, help="unix seconds")
    parser.add_argument("--pgid", type=int, required=True)
    parser.add_argument("--members", default="", help="pid:ticks,...")
    parser.add_argument("--grace", type=float, default=5.0)
    parser.add_argument("--agent-pid", type=int, required=True)
    parser.add_argument("--known-ports", default="")
    parser.add_argument("--protected-processes", default="")
    parser.add_argument("--protected-users", default="")
    args = parser.parse_args(argv)
    if args.pid <= 1 or args.pgid <= 1:
        sys.stderr.write("pid and group must be above 1\n")
        return NOTHING_DONE
    try:
        return {"resolve": resolve, "run": run, "check": check}[args.operation](args)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"process group {args.pgid}: {args.operation}: {error}\n")
        return FAILED if args.operation == "run" else 2


if __name__ == "__main__":
    sys.excepthook = crashed
    sys.exit(main())
