"""Killing a process tree where there is no cgroup to kill it by.

Called by `sandbox.execution` for runs without a leaf. A process belongs to a run if it is in the session or
group of the run's first process, descends from one that does, or carries the run's cookie in its environment; the last
finds daemons that forked twice and left their session. One that also cleared its environment gets away: that is what
cgroups are for, and why results say what enforced the limits. Never signals a process it has not just identified.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

COOKIE = "ALERTMEDIC_RUN"


def kill_tree(root: int, cookie: str, deadline_seconds: float) -> bool:
    """Stops, then kills all processes of the run whose first process is `root` (not reaped yet, so that its number
    cannot have been given away). True when a look found none alive; False if some were left at the deadline."""
    deadline = time.monotonic() + deadline_seconds
    while True:
        # The kernel signals a whole group at once, also a member that is forking: a chain whose every generation lives
        # a millisecond is never seen by a look at /proc, and dies here. (A chain that also makes a new session each
        # time escapes both: that needs a cgroup.)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(root, signal.SIGKILL)
        members = _frozen(root, cookie, deadline)
        if not members:
            return True
        for process in members:
            _signal(process, signal.SIGKILL)
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)


def kill_carriers(cookie: str, deadline_seconds: float) -> bool:
    """Kills what carries the cookie of a run whose first process is unknown, its agent being dead. True when a look
    found none."""
    deadline = time.monotonic() + deadline_seconds
    while True:
        found = [pid for pid in psutil.pids() if pid != os.getpid() and _carries(pid, cookie) and start_ticks(pid)]
        if not found:
            return True
        for pid in found:
            with suppress(psutil.NoSuchProcess):
                _signal(psutil.Process(pid), signal.SIGKILL)
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)


def _frozen(root: int, cookie: str, deadline: float) -> list[psutil.Process]:
    """The members, stopped, looked for until no look finds a new one: what is stopped cannot fork."""
    known: dict[int, psutil.Process] = {}
    while True:
        new = [p for p in _members(root, cookie) if known.get(p.pid) != p]
        if not new or time.monotonic() > deadline:
            return list(known.values())
        for process in new:
            known[process.pid] = process
            _signal(process, signal.SIGSTOP)


@dataclass(frozen=True, slots=True)
class _Stat:
    """What /proc/PID/stat tells in one read (proc(5)); psutil would take four. `started`: clock ticks since boot."""

    state: str
    parent: int
    group: int
    session: int
    started: int

    @classmethod
    def of(cls, pid: int) -> _Stat | None:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None  # gone meanwhile
        return cls(fields[0], int(fields[1]), int(fields[2]), int(fields[3]), int(fields[19]))


def start_ticks(pid: int) -> int | None:
    """When that process was started, in clock ticks since boot; with the number, its identity. None: there is none."""
    stat = _Stat.of(pid)
    return None if stat is None or stat.state in "ZX" else stat.started


def _members(root: int, cookie: str) -> list[psutil.Process]:
    """The live processes of the run. Only what was started after its first process can belong to it."""
    first = _Stat.of(root)
    looks = {pid: stat for pid in psutil.pids() if pid != os.getpid() and (stat := _Stat.of(pid)) is not None}
    young = {pid: stat for pid, stat in looks.items() if first is None or stat.started >= first.started}
    inside = {pid for pid, s in young.items() if root in (pid, s.group, s.session) or _carries(pid, cookie)}
    grown = True
    while grown:
        children = {pid for pid, s in young.items() if s.parent in inside and pid not in inside}
        grown = bool(children)
        inside |= children
    alive = []
    for pid in inside:
        if young[pid].state not in "ZX":  # a zombie waits for its parent, and does nothing more
            with suppress(psutil.NoSuchProcess):
                alive.append(psutil.Process(pid))
    return alive


def _carries(pid: int, cookie: str) -> bool:
    try:
        return psutil.Process(pid).environ().get(COOKIE) == cookie
    except psutil.Error:
        return False  # gone, or another user's: not started by us, or we could not kill it anyway
    except OSError:
        return False  # the kernel refuses the environment of a process that is just exiting


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return  # gone, or not ours to kill: the next look tells which
