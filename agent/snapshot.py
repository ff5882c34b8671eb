"""Fault snapshots: what the service and its processes looked like right before a step, kept for the person who reads
the story afterwards.

Called by `actions.runner` through `agent.remediation`, before the intent is journalled; the intent carries the file's
name. A snapshot is one atomic file: CRC-32 of the body in the first line, JSON in the rest, synced before its name is
told. It is bounded in size and number (the oldest go first), reads /proc and nothing else, and never holds a command's
output or a secret's value.
"""

from __future__ import annotations

import asyncio
import json
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from actions.model import Plan

KEPT = 200
MAX_PROCESSES = 50
MAX_CMDLINE = 200


class SnapshotError(ValueError):
    """A snapshot that is not what was written."""


class FaultSnapshots:
    """Writes into `directory`; `inventory` tells which port a service listens on, and so which processes are its."""

    def __init__(self, directory: Path, inventory: Mapping[str, Mapping[str, str]], clock: Callable[[], float]) -> None:
        self._directory = directory
        self._inventory = inventory
        self._clock = clock

    async def take(self, plan: Plan, step: int) -> str:
        """Writes a snapshot for step number `step` and returns its file name. Raises OSError when it cannot be kept."""
        return await asyncio.to_thread(self._take, plan, step)

    def _take(self, plan: Plan, step: int) -> str:
        port = self._inventory.get(plan.service, {}).get("listen_port", "")
        target = plan.steps[step].params.get("pid")
        body = {
            "incident": plan.incident,
            "plan": plan.id,
            "step": step,
            "action": plan.steps[step].action,
            "target": plan.steps[step].target,
            "at": self._clock(),
            "host": _host(),
            "processes": [_process(p) for p in _processes(port, target if isinstance(target, int) else 0)],
        }
        name = f"{plan.id}-{step}-{int(self._clock() * 1000)}.snap"
        self._write(name, json.dumps(body, sort_keys=True).encode())
        self._forget()
        return name

    def _write(self, name: str, body: bytes) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._directory / name
        part = path.with_suffix(".part")
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(b"%08x\n" % zlib.crc32(body) + body)
                file.flush()
                os.fsync(file.fileno())
            part.rename(path)
        except OSError:
            part.unlink(missing_ok=True)
            raise
        directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _forget(self) -> None:
        files = sorted(self._directory.glob("*.snap"), key=lambda p: p.stat().st_mtime)
        for old in files[:-KEPT]:
            old.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any]:
    """The snapshot's content. Raises SnapshotError when the file is cut off or was changed, OSError when it is gone."""
    head, _, body = path.read_bytes().partition(b"\n")
    if head != b"%08x" % zlib.crc32(body):
        raise SnapshotError(f"snapshot {path.name}: the checksum does not match; it was cut off or changed")
    decoded = json.loads(body)
    if not isinstance(decoded, dict):
        raise SnapshotError(f"snapshot {path.name}: expected an object")
    return decoded


def _host() -> dict[str, Any]:
    memory = psutil.virtual_memory()
    return {"load": psutil.getloadavg(), "memory_available_bytes": memory.available, "memory_total_bytes": memory.total}


def _processes(port: str, pid: int) -> list[psutil.Process]:
    """The processes that listen on `port` and the one called `pid`, with all their children."""
    roots = {pid} if pid else set()
    if port:
        roots |= {
            c.pid
            for c in psutil.net_connections("tcp")
            if c.status == psutil.CONN_LISTEN and c.laddr and c.laddr.port == int(port) and c.pid
        }
    found: dict[int, psutil.Process] = {}
    for root in sorted(roots):
        try:
            process = psutil.Process(root)
            found[root] = process
            found.update({child.pid: child for child in process.children(recursive=True)})
        except psutil.Error:
            continue  # gone between two looks: there is nothing left to keep
    return list(found.values())[:MAX_PROCESSES]


def _process(process: psutil.Process) -> dict[str, Any]:
    try:
        with process.oneshot():
            memory, limits = process.memory_info(), {}
            for name in ("NOFILE", "NPROC", "AS"):
                limits[name.lower()] = process.rlimit(getattr(psutil, f"RLIMIT_{name}"))
            return {
                "pid": process.pid,
                "ppid": process.ppid(),
                "start": process.create_time(),
                "name": process.name(),
                "cmdline": " ".join(process.cmdline())[:MAX_CMDLINE],
                "status": process.status(),
                "user": process.username(),
                "rss_bytes": memory.rss,
                "vms_bytes": memory.vms,
                "cpu_seconds": sum(process.cpu_times()[:2]),
                "threads": process.num_threads(),
                "fds": process.num_fds(),
                "sockets": len(process.net_connections()),
                "limits": limits,
                "cgroup": Path(f"/proc/{process.pid}/cgroup").read_text()[:1000],
            }
    except (psutil.Error, OSError) as error:
        return {"pid": process.pid, "unreadable": str(error)}
