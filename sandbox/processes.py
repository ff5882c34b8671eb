"""Killing a process tree where there is no cgroup to kill it by.

Called by `sandbox.execution` in the fallback without a leaf. A process belongs to a run if it is in the session or
group of the run's first process, descends from one that does, or carries the run's cookie in its environment; the last
finds daemons that forked twice and left their session. One that also cleared its environment gets away: that is what
cgroups are for, and why results say what enforced the limits. Never signals a process it has not just identified.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import psutil

COOKIE = "ALERTMEDIC_RUN"


def kill_tree(root: int, cookie: str, deadline_seconds: float) -> bool:
    """Stops, then kills all processes of the run whose first process is `root` (not reaped yet, so that its number
    cannot have been given away). True when a look found none alive; False if some were left at the deadline."""
    deadline = time.monotonic() + deadline_seconds
    while True:
        members = _frozen(root, cookie, deadline)
        if not members:
            return True
        for process in members:
            _signal(process, signal.SIGKILL)
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


def _members(root: int, cookie: str) -> list[psutil.Process]:
    everybody = dict(_look(root, cookie))
    inside = {pid for pid, (_, _, marked) in everybody.items() if marked}
    grown = True
    while grown:
        children = {pid for pid, (_, parent, _) in everybody.items() if parent in inside and pid not in inside}
        grown = bool(children)
        inside |= children
    alive = []
    for pid in inside:
        process = everybody[pid][0]
        try:
            if process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                alive.append(process)
        except psutil.NoSuchProcess:
            continue
    return alive


def _look(root: int, cookie: str) -> Iterator[tuple[int, tuple[psutil.Process, int, bool]]]:
    """pid -> (process, parent, does it itself show that it belongs to the run)."""
    for pid in psutil.pids():
        if pid == os.getpid():
            continue
        try:
            process = psutil.Process(pid)
            marked = pid == root or root in (os.getsid(pid), os.getpgid(pid)) or _carries(process, cookie)
            yield pid, (process, process.ppid(), marked)
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue  # gone meanwhile


def _carries(process: psutil.Process, cookie: str) -> bool:
    try:
        return process.environ().get(COOKIE) == cookie
    except psutil.AccessDenied:
        return False  # another user's: not started by us, or we could not kill it anyway
    except OSError:
        return False  # the kernel refuses the environment of a process that is just exiting


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return  # gone, or not ours to kill: the next look tells which
