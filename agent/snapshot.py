"""Fault snapshots: what undoing needs, and what the service looked like right before a step, kept for whoever reads the
story afterwards.

Called by `actions.runner` through `agent.remediation`, before the intent is journalled; the intent carries the file's
name. A snapshot is one whole file, written beside its name, synced and renamed before that is told (metadata goes the
other way: appended records, synced in groups). The CRC-32 of its body is in its first line and in its name, and so in
the journal's hash chain. It holds the step (targets, arguments of undo and check), the process tree with limits,
descriptors and sockets, the usage of their cgroups, the last lines of the service's declared logs (with what looks like
a secret masked), and the series that justify the plan. Files are bounded in size; the oldest are removed by age, number
and total size. It never holds a command's output or the value of a secret that we pass on, and only reads.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import stat
import threading
import time
import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil

from actions.model import Plan

KEPT = 500  # files
KEPT_BYTES = 64 * 1024 * 1024
MAX_BYTES = 256 * 1024  # of one file
MAX_PROCESSES = 50
MAX_CMDLINE = 200
MAX_LOGS = 5
LOG_BYTES = 16 * 1024  # from the end of each
LOG_LINES = 50
EVIDENCE_SECONDS = 2.0
PRUNE_EVERY = 32  # snapshots
# What reads like a secret in a line: `password=...`, `Authorization: Bearer ...`, credentials in a URL.
_SECRET = re.compile(
    r"(?i)((?:password|passwd|secret|token|api[_-]?key|authorization)[\"']?\s*[=:]\s*[\"']?(?:bearer\s+|basic\s+)?)[^\s\"',;]+"
)
_CREDENTIALS = re.compile(r"(://[^/\s:@]+:)[^@/\s]+@")
_CGROUP_FILES = ("memory.current", "memory.max", "memory.events", "cpu.stat", "cpu.max", "pids.current", "pids.max")

Evidence = Callable[[Plan], Awaitable[Mapping[str, Any]]]


class SnapshotError(ValueError):
    """A snapshot that is not what was written."""


class FaultSnapshots:
    """Writes into `directory`. `inventory` tells which port a service listens on, and so which processes are its;
    `logs` which files it logs to. `evidence` reads the plan's series, within 2 s. Snapshots older than `keep_seconds`
    are removed."""

    def __init__(
        self,
        directory: Path,
        inventory: Mapping[str, Mapping[str, str]],
        clock: Callable[[], float],
        *,
        logs: Mapping[str, Sequence[str]] | None = None,
        evidence: Evidence | None = None,
        keep_seconds: float = 30 * 86400.0,
    ) -> None:
        self._directory = directory
        self._inventory, self._logs = inventory, logs or {}
        self._clock = clock
        self._evidence = evidence
        self._keep_seconds = keep_seconds
        self._taken = 0
        self._pruning = threading.Lock()

    async def take(self, plan: Plan, step: int) -> str:
        """Writes a snapshot for step number `step` and returns its file name. Raises OSError when it cannot be kept."""
        evidence = await self._series(plan)
        return await asyncio.to_thread(self._take, plan, step, evidence)

    async def _series(self, plan: Plan) -> Mapping[str, Any]:
        if self._evidence is None:
            return {"missing": "nobody reads series here"}
        try:
            async with asyncio.timeout(EVIDENCE_SECONDS):
                return await self._evidence(plan)
        except Exception as error:  # noqa: BLE001 - said in the snapshot; the step does not wait for evidence
            return {"missing": f"{type(error).__name__}: {error}"[:300]}

    def _take(self, plan: Plan, step: int, evidence: Mapping[str, Any]) -> str:
        todo = plan.steps[step]
        port = self._inventory.get(plan.service, {}).get("listen_port", "")
        target = todo.params.get("pid")
        processes = _processes(port, target if isinstance(target, int) else 0)
        seen = [_process(p) for p in processes]
        body = {
            "incident": plan.incident,
            "plan": plan.id,
            "digest": plan.digest,
            "step": step,
            "action": todo.action,
            "target": todo.target,
            "undo": {"argv": todo.undo, "check": todo.check, "params": todo.params, "user": todo.user},
            "at": self._clock(),
            "host": _host(),
            "processes": seen,
            "cgroups": {path: _cgroup(path) for path in sorted({p["cgroup"] for p in seen if p.get("cgroup")})},
            "logs": {path: _tail(Path(path)) for path in self._logs.get(plan.service, ())[:MAX_LOGS]},
            "evidence": dict(evidence),
        }
        encoded = _bounded(body)
        name = f"{plan.id}-{step}-{int(self._clock() * 1000)}-{zlib.crc32(encoded):08x}.snap"
        self._write(name, encoded)
        self._taken += 1
        if self._taken % PRUNE_EVERY == 1:
            self.prune()
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

    def prune(self) -> int:
        """Removes what is too old, too many or too much, oldest first, and parts that a crash left. How many went."""
        if not self._pruning.acquire(blocking=False):
            return 0
        try:
            return self._prune(time.time())  # the clock that files are dated by
        finally:
            self._pruning.release()

    def _prune(self, now: float) -> int:
        found: list[tuple[float, int, str]] = []
        gone = 0
        with os.scandir(self._directory) as entries:
            for entry in entries:
                try:
                    info = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if entry.name.endswith(".snap"):
                    found.append((info.st_mtime, info.st_size, entry.path))
                elif entry.name.endswith(".part") and now - info.st_mtime > 60.0:  # nobody is writing it
                    Path(entry.path).unlink(missing_ok=True)
                    gone += 1
        found.sort(reverse=True)
        total = 0
        for n, (written, size, path) in enumerate(found):
            total += size
            # The newest stays in any case: its name is about to be journalled.
            if n and (n >= KEPT or total > KEPT_BYTES or now - written > self._keep_seconds):
                Path(path).unlink(missing_ok=True)
                gone += 1
        return gone


def read(path: Path) -> dict[str, Any]:
    """The snapshot's content. Raises SnapshotError when the file is cut off, was changed, or is not the one that its
    name (and so the journal) tells of; OSError when it is gone."""
    head, _, body = path.read_bytes().partition(b"\n")
    crc = b"%08x" % zlib.crc32(body)
    if head != crc:
        raise SnapshotError(f"snapshot {path.name}: the checksum does not match; it was cut off or changed")
    named = re.search(r"-([0-9a-f]{8})\.snap\Z", path.name)
    if named is not None and named[1].encode() != crc:
        raise SnapshotError(f"snapshot {path.name}: it was replaced by another one")
    decoded = json.loads(body)
    if not isinstance(decoded, dict):
        raise SnapshotError(f"snapshot {path.name}: expected an object")
    return decoded


def masked(line: str) -> str:
    """The line with what reads like a secret replaced."""
    return _CREDENTIALS.sub(r"\1***@", _SECRET.sub(r"\1***", line))


def _bounded(body: dict[str, Any]) -> bytes:
    """The body as JSON within MAX_BYTES: logs go first, then evidence, then processes from the end. What undoing needs
    always stays."""
    encoded = msgspec.json.encode(body, order="sorted")
    for part in ("logs", "evidence", "cgroups"):
        if len(encoded) <= MAX_BYTES:
            return encoded
        body = {**body, part: {"missing": "left out: the snapshot would have been too large"}}
        encoded = msgspec.json.encode(body, order="sorted")
    while len(encoded) > MAX_BYTES and body["processes"]:
        body = {**body, "processes": body["processes"][: len(body["processes"]) // 2]}
        encoded = msgspec.json.encode(body, order="sorted")
    return encoded


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
            for name in ("NOFILE", "NPROC", "AS", "CORE", "STACK"):
                limits[name.lower()] = process.rlimit(getattr(psutil, f"RLIMIT_{name}"))
            return {
                "pid": process.pid,
                "ppid": process.ppid(),
                "start": process.create_time(),
                "name": process.name(),
                "cmdline": masked(" ".join(process.cmdline()))[:MAX_CMDLINE],
                "status": process.status(),
                "user": process.username(),
                "rss_bytes": memory.rss,
                "vms_bytes": memory.vms,
                "cpu_seconds": sum(process.cpu_times()[:2]),
                "threads": process.num_threads(),
                "fds": process.num_fds(),
                "sockets": len(process.net_connections()),
                "limits": limits,
                "cgroup": Path(f"/proc/{process.pid}/cgroup").read_text().strip()[:1000],
            }
    except (psutil.Error, OSError) as error:
        return {"pid": process.pid, "unreadable": str(error)}


def _cgroup(lines: str) -> dict[str, Any]:
    """Usage and limits of a process' cgroup v2, as the kernel tells them; {} where there is none to be read."""
    v2 = next((line[3:] for line in lines.splitlines() if line.startswith("0::")), "")
    for root in ("/sys/fs/cgroup", "/sys/fs/cgroup/unified"):
        directory = Path(root + v2)
        if not v2 or not (directory / "cgroup.procs").exists():
            continue
        used = {}
        for name in _CGROUP_FILES:
            try:
                used[name] = (directory / name).read_text()[:500].strip()
            except OSError:
                continue  # that controller is not enabled here
        return used
    return {}


def _tail(path: Path) -> dict[str, Any]:
    """The last lines of a log file; no link is followed, and nothing but a regular file is read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode):
                return {"missing": "not a regular file"}
            begin = max(0, info.st_size - LOG_BYTES)
            file.seek(begin)
            text = file.read(LOG_BYTES).decode("utf-8", "replace")
    except OSError as error:
        return {"missing": error.strerror or str(error)}
    lines = text.splitlines()[1 if begin else 0 :][-LOG_LINES:]
    return {"bytes": info.st_size, "modified": info.st_mtime, "lines": [masked(line) for line in lines]}
