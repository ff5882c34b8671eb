"""Facts about this machine, by psutil: processes, listeners, CPU, memory, disks, pressure.

Asked by `agent.sources.gather` for the evidence `host.processes`, which carries all of them. Exists because a runaway
neighbour or a stopped process has no series that names it, and an action needs an identity (pid and start time). It
never changes anything, never follows a process that vanishes (it is left out), and never blocks the loop: it looks in a
thread, twice some half a second apart, since CPU use is a difference.

Facts and their attributes (numbers are in base units; what may not be read is left out):

| kind | subject | attributes |
|---|---|---|
| host.process | `pid=12,start=1700000000.12` | pid, ppid, pgid, start, name, cmdline (masked, bounded), user, status, |
| | | cpu_percent (100 = one CPU), cpu_wait_percent (of services: runnable without a CPU), cpus ("0,1"), |
| | | rss_bytes, threads, fds, fd_limit, self |
| host.listener | `port=9101` | present, pid, start, status, address; one per service with a `listen_port` |
| host.cpu | `host` | percent, iowait_percent, steal_percent, count, load1 |
| host.memory | `host` | percent, total_bytes, available_bytes, swap_total_bytes, swap_used_bytes |
| host.disk | `mount=/` | mount, device, fstype, percent, total_bytes, used_bytes, free_bytes, inodes_percent,
services | | host.pressure | `cpu`, `memory`, `io` | resource, some_avg10, some_avg60, some_avg300, full_avg10, ...
(percent of time stalled) |

`status` is psutil's word (running, sleeping, disk-sleep, stopped, tracing-stop, zombie, dead, idle). A process belongs
to a service if it or one of its ancestors listens on the service's port. `self` marks the agent, its ancestors and its
descendants: ending any of them could end the agent. Kernel threads are left out. Told are the processes that belong to
a service and those that use most CPU (with their process group) or memory, at most MAX_PROCESSES.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from agent.sources import EvidenceRequest, bounded
from rules.model import Evidence, Fact

EVIDENCE = "host.processes"
LOOK_SECONDS = 0.5
TOP = 10  # processes by CPU, and by memory
MAX_PROCESSES = 256
MAX_MOUNTS = 64
MAX_THREADS = 256  # of one process, whose waiting is summed
MAX_CPUS = 1024  # a longer list is left out: half of an affinity would be a wrong one
CMDLINE_LIMIT = 256
PF_KTHREAD = 0x00200000  # linux/sched.h
PROC = Path("/proc")
SECRET = re.compile(r"(?i)((?:pass(?:word|wd|phrase)?|secret|token|api[-_]?key)[\w-]*[= :]+|://[^/\s:@]*:)[^\s@]+")

Attributes = dict[str, str | float | bool]


@dataclass(frozen=True, slots=True)
class HostQuery:
    """The one question this source answers; append it to the queries of a request."""

    name: str = EVIDENCE
    query: str = ""
    source: str = "host"


@dataclass(slots=True)
class _Process:
    """What both looks found out about one process."""

    process: psutil.Process
    pid: int
    start: float
    ppid: int
    cpu_seconds: float
    at: float  # monotonic
    pgid: int = 0
    rss: int = 0
    cpu_percent: float = 0.0
    cpu_wait_percent: float | None = None  # None: not measured
    service: str = ""


@dataclass(frozen=True, slots=True)
class _Look:
    processes: dict[int, _Process]
    cpu: Mapping[str, float]  # seconds by state, of the whole machine


@dataclass(frozen=True, slots=True)
class _Wait:
    """How long the threads of a process have been runnable without a CPU, since they began."""

    seconds: float
    at: float  # monotonic

    def percent_since(self, before: _Wait) -> float:
        """Of the time in between, over all threads: 100 is one thread that never ran though it could."""
        return round(100.0 * max(0.0, self.seconds - before.seconds) / max(self.at - before.at, 0.01), 1)


class HostSource:
    """The machine the agent runs on. `inventory` is service -> {key: value}; read are `host`, `listen_port`,
    `log_root`.

    Services on another host (`host` neither empty nor this machine's name) are not looked for. Raises ValueError for a
    `listen_port` that is none. `own_pid` is the process whose tree is `self`."""

    def __init__(
        self,
        inventory: Mapping[str, Mapping[str, str]],
        name: str = "host",
        *,
        look_seconds: float = LOOK_SECONDS,
        own_pid: int | None = None,
    ) -> None:
        self.name = name
        local = {service: entry for service, entry in inventory.items() if _is_local(entry.get("host", ""))}
        self._ports: dict[str, int] = {}
        for service, entry in local.items():
            if text := entry.get("listen_port", ""):
                if not text.isascii() or not text.isdigit() or not 0 < int(text) < 65536:
                    raise ValueError(f"inventory: listen_port {text!r:.40} of {service!r:.100} is no TCP port")
                self._ports[service] = int(text)
        self._roots = {service: entry["log_root"] for service, entry in local.items() if entry.get("log_root")}
        self._look_seconds = look_seconds
        self._own_pid = own_pid or os.getpid()
        self._turn = asyncio.Lock()  # looking is work for the machine in trouble: one look at a time

    async def fetch(self, request: EvidenceRequest, deadline_seconds: float) -> tuple[Evidence, ...]:
        """One look for all queries. Raises nothing of its own; late or unknown is `missing`."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        facts: tuple[Fact, ...] = ()
        warnings: tuple[str, ...] = ()
        reason = None
        if any(query.name == EVIDENCE for query in request.queries):
            try:
                async with asyncio.timeout(deadline_seconds), self._turn:
                    facts, warnings = await self._facts(began + deadline_seconds - loop.time())
            except TimeoutError:
                reason = f"timeout after {deadline_seconds:g} s"
            except (psutil.Error, OSError) as error:
                reason = bounded(f"looking at this host: {type(error).__name__}: {error}")
        seconds = loop.time() - began
        return tuple(
            Evidence(query.name, self.name, facts=facts, missing=reason, warnings=warnings, seconds=seconds)
            if query.name == EVIDENCE
            else Evidence(query.name, self.name, missing=f"the host source knows {EVIDENCE} only", query=query.query)
            for query in request.queries
        )

    async def _facts(self, seconds: float) -> tuple[tuple[Fact, ...], tuple[str, ...]]:
        until = time.monotonic() + 0.8 * seconds
        first, waits = await asyncio.to_thread(self._first_look, until)
        await asyncio.sleep(min(self._look_seconds, seconds / 4))
        return await asyncio.to_thread(self._second_look, first, waits, until)

    def _first_look(self, until: float) -> tuple[_Look, dict[int, _Wait]]:
        first = _look(until)
        listeners, _ = _listeners(frozenset(self._ports.values()))
        self._assign(first.processes, listeners)
        return first, _waits([found for found in first.processes.values() if found.service])

    def _second_look(
        self, first: _Look, waits: Mapping[int, _Wait], until: float
    ) -> tuple[tuple[Fact, ...], tuple[str, ...]]:
        second = _look(until)
        for pid, wait in _waits([second.processes[pid] for pid in waits if pid in second.processes]).items():
            second.processes[pid].cpu_wait_percent = wait.percent_since(waits[pid])
        for pid, found in second.processes.items():
            before = first.processes.get(pid)
            if before is not None and before.start == found.start:
                used, over = found.cpu_seconds - before.cpu_seconds, found.at - before.at
            else:  # it began in between
                used, over = found.cpu_seconds, time.time() - found.start
            found.cpu_percent = round(100.0 * max(0.0, used) / max(over, 0.01), 1)
        listeners, unreadable = _listeners(frozenset(self._ports.values()))
        self._assign(second.processes, listeners)
        own = _tree(self._own_pid, second.processes)
        facts = _process_facts(second.processes, own, until)
        facts += [
            _listener_fact(service, port, listeners.get(port, ()), second.processes)
            for service, port in sorted(self._ports.items())
        ]
        facts += [_cpu_fact(first.cpu, second.cpu), _memory_fact(), *_disk_facts(self._roots), *_pressure_facts()]
        warnings = [
            "the owners of some listening ports may not be read: run as root or with CAP_SYS_PTRACE"
        ] * unreadable
        if time.monotonic() >= until:
            warnings.append("the look at this host's processes was cut short by the deadline")
        return tuple(facts), tuple(warnings)

    def _assign(self, processes: Mapping[int, _Process], listeners: Mapping[int, tuple[_Listener, ...]]) -> None:
        """Gives every process the service that it or its nearest listening ancestor serves."""
        owners: dict[int, str] = {}
        for service, port in sorted(self._ports.items()):
            for listener in listeners.get(port, ()):
                if listener.pid:
                    owners.setdefault(listener.pid, service)
        for found in processes.values():
            for pid in _ancestry(found.pid, processes):
                if pid in owners:
                    found.service = owners[pid]
                    break


@dataclass(frozen=True, slots=True)
class _Listener:
    pid: int  # 0: not readable
    address: str


def _is_local(host: str) -> bool:
    here = socket.gethostname()
    return host in ("", "local", "localhost", "127.0.0.1", "::1", here, here.partition(".")[0])


def _look(until: float) -> _Look:
    """Every process with its CPU time; stops at `until` (monotonic) with what it has."""
    cpu = psutil.cpu_times()._asdict()
    processes: dict[int, _Process] = {}
    for process in psutil.process_iter():
        if time.monotonic() >= until:
            break
        try:
            with process.oneshot():
                times = process.cpu_times()
                found = _Process(
                    process,
                    process.pid,
                    process.create_time(),
                    process.ppid(),
                    times.user + times.system,
                    time.monotonic(),
                    os.getpgid(process.pid),
                    process.memory_info().rss,
                )
        except (psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError, PermissionError):
            continue
        processes[found.pid] = found
    return _Look(processes, cpu)


def _waits(processes: Iterable[_Process]) -> dict[int, _Wait]:
    """The run-queue delay of each process, by the kernel's own account (/proc/PID/task/TID/schedstat, second field:
    nanoseconds). Where the kernel keeps none, there is none."""
    found: dict[int, _Wait] = {}
    for process in processes:
        try:
            tasks = sorted((PROC / str(process.pid) / "task").iterdir())[:MAX_THREADS]
            delays = [int((task / "schedstat").read_text().split()[1]) for task in tasks]
        except (OSError, IndexError, ValueError):
            continue  # gone meanwhile, or a kernel without schedstat
        found[process.pid] = _Wait(sum(delays) / 1e9, time.monotonic())
    return found


def _listeners(ports: frozenset[int]) -> tuple[dict[int, tuple[_Listener, ...]], bool]:
    """Who listens on these TCP ports, and whether some owner could not be read."""
    found: dict[int, list[_Listener]] = {}
    if ports:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port in ports:
                address = f"{connection.laddr.ip}:{connection.laddr.port}"
                found.setdefault(connection.laddr.port, []).append(_Listener(connection.pid or 0, address))
    ordered = {port: tuple(sorted(who, key=lambda one: (one.pid, one.address))) for port, who in found.items()}
    return ordered, any(not one.pid for who in ordered.values() for one in who)


def _ancestry(pid: int, processes: Mapping[int, _Process]) -> Iterable[int]:
    """`pid`, its parent, and so on (a recycled parent id cannot make this endless)."""
    seen: set[int] = set()
    while pid in processes and pid not in seen:
        seen.add(pid)
        yield pid
        pid = processes[pid].ppid


def _tree(pid: int, processes: Mapping[int, _Process]) -> frozenset[int]:
    """The process, its ancestors and its descendants."""
    below = {one for one in processes if pid in _ancestry(one, processes)}
    return frozenset(below | set(_ancestry(pid, processes)))


def _process_facts(processes: Mapping[int, _Process], own: frozenset[int], until: float) -> list[Fact]:
    by_cpu = sorted(processes.values(), key=lambda p: (-p.cpu_percent, p.pid))
    by_rss = sorted(processes.values(), key=lambda p: (-p.rss, p.pid))
    busy = [p for p in by_cpu if p.cpu_percent > 0][:TOP]
    groups = {p.pgid for p in busy}
    wanted = [*busy, *by_rss[:TOP], *(p for p in by_cpu if p.service), *(p for p in by_cpu if p.pgid in groups)]
    users: dict[int, str] = {}
    facts: list[Fact] = []
    for found in dict.fromkeys(p.pid for p in wanted):
        if len(facts) >= MAX_PROCESSES or time.monotonic() >= until:
            break
        fact = _process_fact(processes[found], found in own, users)
        if fact is not None:
            facts.append(fact)
    return facts


def _process_fact(found: _Process, own: bool, users: dict[int, str]) -> Fact | None:
    """The process as a fact; None if it is gone, replaced by another one, or a kernel thread."""
    process = found.process
    attributes: Attributes = {
        "pid": found.pid,
        "ppid": found.ppid,
        "pgid": found.pgid,
        "start": found.start,
        "rss_bytes": found.rss,
        "cpu_percent": found.cpu_percent,
        "self": own,
    }
    if found.cpu_wait_percent is not None:
        attributes["cpu_wait_percent"] = found.cpu_wait_percent
    try:
        if _is_kernel_thread(found.pid) or not process.is_running():
            return None
        with process.oneshot():
            attributes["name"] = bounded(process.name(), 64)
            attributes["status"] = process.status()
            attributes["threads"] = process.num_threads()
            uid = process.uids().effective
            attributes["user"] = users[uid] if uid in users else users.setdefault(uid, process.username())
            attributes["cmdline"] = bounded(SECRET.sub(r"\1***", " ".join(process.cmdline())[:4096]), CMDLINE_LIMIT)
    except psutil.ZombieProcess:
        attributes["status"] = psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, OSError):
        return None
    except psutil.AccessDenied:
        pass
    try:
        cpus = process.cpu_affinity()
        if len(cpus) <= MAX_CPUS:
            attributes["cpus"] = ",".join(map(str, cpus))
        attributes["fds"] = process.num_fds()
        attributes["fd_limit"] = process.rlimit(psutil.RLIMIT_NOFILE)[0]
    except (psutil.Error, OSError):
        pass  # not ours to read (another user's process), or gone: the rest of the fact stands
    return Fact("host.process", f"pid={found.pid},start={found.start:.2f}", found.service, attributes)


def _is_kernel_thread(pid: int) -> bool:
    """By the flags of /proc/PID/stat, since in a container pid 2 is an ordinary process."""
    try:
        stat = (PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return False
    fields = stat.rpartition(")")[2].split()
    return len(fields) > 6 and bool(int(fields[6]) & PF_KTHREAD)


def _listener_fact(
    service: str, port: int, listeners: tuple[_Listener, ...], processes: Mapping[int, _Process]
) -> Fact:
    attributes: Attributes = {"present": bool(listeners)}
    if listeners:
        known = [one for one in listeners if one.pid in processes]
        listener = known[0] if known else listeners[0]
        attributes["address"] = listener.address
        if known:
            owner = processes[listener.pid]
            attributes |= {"pid": owner.pid, "start": owner.start}
            try:
                attributes["status"] = owner.process.status()
            except (psutil.Error, OSError):
                attributes["present"] = False  # it went while we looked, and its listener with it
    return Fact("host.listener", f"port={port}", service, attributes)


def _cpu_fact(first: Mapping[str, float], second: Mapping[str, float]) -> Fact:
    """Shares of the time between the two looks. Guest time is part of user time, waiting for a disk is idle."""
    spent = {k: max(0.0, second[k] - first[k]) for k in second if k not in ("guest", "guest_nice")}
    total = sum(spent.values()) or 1.0
    iowait, steal = spent.get("iowait", 0.0), spent.get("steal", 0.0)
    attributes: Attributes = {
        "percent": round(100.0 * (1.0 - (spent["idle"] + iowait) / total), 1) if sum(spent.values()) else 0.0,
        "iowait_percent": round(100.0 * iowait / total, 1),
        "steal_percent": round(100.0 * steal / total, 1),
        "count": psutil.cpu_count() or 1,
        "load1": os.getloadavg()[0],
    }
    return Fact("host.cpu", "host", "", attributes)


def _memory_fact() -> Fact:
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    attributes: Attributes = {
        "percent": memory.percent,
        "total_bytes": memory.total,
        "available_bytes": memory.available,
        "swap_total_bytes": swap.total,
        "swap_used_bytes": swap.used,
    }
    return Fact("host.memory", "host", "", attributes)


def _disk_facts(roots: Mapping[str, str]) -> list[Fact]:
    """Local file systems, the root and those of the services' log roots. Network mounts are not touched: they may
    hang."""
    every = {p.mountpoint: p for p in psutil.disk_partitions(all=True)}
    mounts = {p.mountpoint for p in psutil.disk_partitions(all=False)} | {"/"}
    services: dict[str, list[str]] = {}
    for service, root in sorted(roots.items()):
        at = Path(root)
        while str(at) not in every and at != at.parent:
            at = at.parent
        mounts.add(str(at))
        services.setdefault(str(at), []).append(service)
    facts: list[Fact] = []
    devices: set[int] = set()
    for mount in sorted(mounts, key=lambda m: (m not in services, len(m), m))[:MAX_MOUNTS]:
        try:
            device = Path(mount).stat().st_dev
            usage, inodes = psutil.disk_usage(mount), os.statvfs(mount)
        except OSError:
            continue
        if device in devices or not usage.total:  # the same file system again, or one without blocks (proc)
            continue
        devices.add(device)
        partition = every.get(mount)
        attributes: Attributes = {
            "mount": bounded(mount),
            "device": bounded(partition.device) if partition else "",
            "fstype": partition.fstype if partition else "",
            "percent": usage.percent,
            "total_bytes": usage.total,
            "used_bytes": usage.used,
            "free_bytes": usage.free,
            "inodes_percent": round(100.0 * (1 - inodes.f_favail / inodes.f_files), 1) if inodes.f_files else 0.0,
            "services": ",".join(services.get(mount, ())),
        }
        facts.append(Fact("host.disk", f"mount={bounded(mount)}", "", attributes))
    return facts


def _pressure_facts() -> list[Fact]:
    """Pressure stall information, where the kernel has it (Linux 4.20 and later, CONFIG_PSI)."""
    facts: list[Fact] = []
    for resource in ("cpu", "memory", "io"):
        try:
            lines = (PROC / "pressure" / resource).read_text().splitlines()
        except OSError:  # absent, or present but switched off (EOPNOTSUPP)
            continue
        attributes: Attributes = {"resource": resource}
        for line in lines:
            share, *pairs = line.split()
            for key, _, value in (pair.partition("=") for pair in pairs):
                if key.startswith("avg"):
                    attributes[f"{share}_{key}"] = float(value)
        if len(attributes) > 1:
            facts.append(Fact("host.pressure", resource, "", attributes))
    return facts
