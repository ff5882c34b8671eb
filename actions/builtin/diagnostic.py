"""Captures what a service's processes are doing. Action `diagnostic.capture`; read-only.

Runs as `python -I -m actions.builtin.diagnostic run`. Prints one bounded JSON document: the processes that listen on
the service's port with all their children, the threads, open files, sockets and limits of each, and the processes that
use most CPU time and memory. What may not be looked at is said to be so. Never stops, signals or traces a process.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from actions.builtin import DONE, FAILED, proc
from actions.builtin.proc import Process

LOOK_SECONDS = 0.5
MAX_PROCESSES = 20
MAX_TOP = 8
MAX_THREADS = 24
MAX_OUTPUT = 56 * 1024  # below the sandbox's bound, so that the document stays whole


def service_processes(everyone: dict[int, Process], ports: set[int]) -> list[Process]:
    """Owners of a listening port and all that descends from them, oldest first."""
    inodes = proc.listening(ports)
    owners: set[int] = set()
    for pid in everyone:
        try:
            if inodes and proc.sockets(pid) & inodes.keys():
                owners.add(pid)
        except PermissionError:
            continue
    found = [
        p for p in everyone.values() if p.pid in owners or any(a.pid in owners for a in proc.ancestors(p, everyone))
    ]
    return sorted(found, key=lambda p: (p.start, p.pid))


def describe(p: Process, earlier: dict[int, Process], seconds: float) -> dict[str, Any]:
    before = earlier.get(p.pid)
    used = p.cpu_ticks - before.cpu_ticks if before and before.start == p.start else 0
    return {
        "pid": p.pid,
        "name": p.name,
        "command": proc.command_line(p.pid),
        "state": p.status,
        "parent": p.parent,
        "user": p.user,
        "cpu_percent": round(100.0 * used / proc.TICKS_PER_SECOND / seconds, 1),
        "rss_bytes": p.rss_bytes,
        "threads": p.threads,
    }


def detail(pid: int) -> dict[str, Any]:
    """Threads by what they wait in, kinds of open files, socket states, limits; `denied` is what may not be read."""
    found: dict[str, Any] = {}
    denied: list[str] = []
    for key, look in (("waiting_in", _threads), ("open_files", _files), ("tcp", _tcp), ("limits", _limits)):
        try:
            found[key] = look(pid)
        except OSError:
            denied.append(key)
    return {**found, "denied": denied} if denied else found


def _threads(pid: int) -> dict[str, int]:
    waiting: Counter[str] = Counter()
    for task in os.listdir(f"/proc/{pid}/task")[:MAX_THREADS]:  # noqa: PTH208 - names only
        base = Path(f"/proc/{pid}/task/{task}")
        state = base.joinpath("stat").read_text(errors="replace").rpartition(")")[2].split()[0]
        try:
            where = base.joinpath("wchan").read_text().strip("0") or "-"
        except OSError:
            where = "-"
        waiting[f"{state} {where}"] += 1
    return dict(waiting.most_common(8))


def _files(pid: int) -> dict[str, int]:
    kinds: Counter[str] = Counter()
    for name in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208 - names only
        try:
            target = os.readlink(f"/proc/{pid}/fd/{name}")  # noqa: PTH115 - the raw text
        except OSError:
            continue
        kinds[target.partition(":")[0] if not target.startswith("/") else "file"] += 1
    return dict(kinds.most_common(8))


def _tcp(pid: int) -> dict[str, int]:
    names = {"01": "established", "02": "syn_sent", "06": "time_wait", "08": "close_wait", "0A": "listen"}
    mine, states = proc.sockets(pid), Counter[str]()
    for table in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
        except FileNotFoundError:
            continue
        for line in lines:
            fields = line.split()
            if fields[9] in mine:
                states[names.get(fields[3], fields[3])] += 1
    return dict(states)


def _limits(pid: int) -> dict[str, str]:
    wanted = ("Max open files", "Max processes", "Max address space")
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    return {line[:25].strip(): line[26:47].strip() for line in lines if line.startswith(wanted)}


def capture(ports: set[int]) -> dict[str, Any]:
    earlier, began = proc.everyone(), time.monotonic()
    time.sleep(LOOK_SECONDS)
    everyone, seconds = proc.everyone(), time.monotonic() - began
    described = {p.pid: describe(p, earlier, seconds) for p in everyone.values() if not p.flags & proc.KERNEL_THREAD}
    service = service_processes(everyone, ports)
    load = os.getloadavg()
    by_cpu = sorted(described.values(), key=lambda d: -d["cpu_percent"])[:MAX_TOP]
    by_rss = sorted(described.values(), key=lambda d: -d["rss_bytes"])[:MAX_TOP]
    return {
        "host": {"load": [round(x, 2) for x in load], "cpus": os.cpu_count(), "processes": len(everyone)},
        "service": [described[p.pid] | detail(p.pid) for p in service[:MAX_PROCESSES] if p.pid in described],
        "service_processes": len(service),
        "top_cpu": by_cpu,
        "top_memory": by_rss,
    }


def bounded(document: dict[str, Any], limit: int = MAX_OUTPUT) -> str:
    """The document as JSON of at most `limit` bytes; entries are left out from the end of its lists, and counted."""
    left_out = 0
    while True:
        text = json.dumps(document | ({"left_out": left_out} if left_out else {}))
        lists = [v for v in document.values() if isinstance(v, list) and v]
        if len(text) <= limit or not lists:
            return text
        max(lists, key=len).pop()
        left_out += 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("operation", choices=("run",))
    parser.add_argument("--port", type=int, action="append", default=[])
    args = parser.parse_args(argv)
    try:
        sys.stdout.write(bounded(capture(set(args.port))) + "\n")
    except (OSError, ValueError) as error:
        sys.stderr.write(f"diagnostic: {error}\n")
        return FAILED
    return DONE


if __name__ == "__main__":
    sys.exit(main())
