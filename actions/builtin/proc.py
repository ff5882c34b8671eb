"""What /proc says of processes, as little as the shipped actions need.

Used by `actions.builtin.process_group` and `actions.builtin.diagnostic`. Read directly instead of through psutil: it
starts in a third of the time, and a start time in kernel ticks is an exact identity, while one in seconds moves when
somebody sets the clock. Formats: proc(5).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
KERNEL_THREAD = 0x00200000  # PF_KTHREAD
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
TCP_LISTEN = "0A"
NAME_CHARACTERS = 15  # TASK_COMM_LEN without its NUL
MAX_ARGUMENT_BYTES = 16384


@dataclass(frozen=True, slots=True)
class Process:
    """One process at one moment. `start` is in ticks since boot: with the pid it names the process for good."""

    pid: int
    name: str
    status: str
    parent: int
    group: int
    session: int
    flags: int
    cpu_ticks: int
    start: int
    user: int
    rss_bytes: int
    threads: int

    @property
    def alive(self) -> bool:
        return self.status not in ("Z", "X")


def read(pid: int) -> Process | None:
    """The process, or None when there is none (any more) or it may not be seen."""
    try:
        stat = (PROC / str(pid) / "stat").read_text(errors="replace")
        user = (PROC / str(pid)).stat().st_uid
    except (OSError, ValueError):
        return None
    # The name may hold spaces and parentheses: it ends at the last one.
    name, _, rest = stat.partition("(")[2].rpartition(")")
    fields = rest.split()
    if len(fields) < 22:
        return None
    return Process(
        pid=pid,
        name=name,
        status=fields[0],
        parent=int(fields[1]),
        group=int(fields[2]),
        session=int(fields[3]),
        flags=int(fields[6]),
        cpu_ticks=int(fields[11]) + int(fields[12]),
        start=int(fields[19]),
        user=user,
        rss_bytes=int(fields[21]) * os.sysconf("SC_PAGE_SIZE"),
        threads=int(fields[17]),
    )


def everyone() -> dict[int, Process]:
    """All processes that can be seen, by pid."""
    pids = (int(entry) for entry in os.listdir(PROC) if entry.isdecimal())  # noqa: PTH208 - names only
    found = (read(pid) for pid in pids)
    return {p.pid: p for p in found if p is not None}


def ancestors(process: Process, all_of_them: dict[int, Process]) -> Iterator[Process]:
    """Parent, its parent, and so on up to pid 1."""
    seen = {process.pid}
    while (parent := all_of_them.get(process.parent)) is not None and parent.pid not in seen:
        seen.add(parent.pid)
        yield parent
        process = parent


def boot_seconds() -> float:
    """Unix time of boot, as the kernel sees it now. Raises OSError or ValueError."""
    for line in (PROC / "stat").read_text().splitlines():
        if line.startswith("btime "):
            return float(line.split()[1])
    raise ValueError("/proc/stat has no btime")


def command_line(pid: int, limit: int = 200) -> str:
    """The command line with spaces between arguments, printable and bounded; "" for kernel threads and the gone."""
    try:
        with (PROC / str(pid) / "cmdline").open("rb") as file:
            raw = file.read(limit * 4)
    except OSError:
        return ""
    text = raw.rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
    return "".join(c if c.isprintable() else "?" for c in text)[:limit]


def names(process: Process) -> set[str]:
    """What the process may be called: the kernel keeps 15 characters, the rest is in the arguments (of the program, or
    of the script that an interpreter runs)."""
    found = {process.name}
    if len(process.name) >= NAME_CHARACTERS:
        try:
            with (PROC / str(process.pid) / "cmdline").open("rb") as file:
                arguments = file.read(MAX_ARGUMENT_BYTES).decode(errors="replace").split("\0")[:3]
        except OSError:
            return found
        longer = (argument.rpartition("/")[2] for argument in arguments)
        found |= {name for name in longer if name.startswith(process.name)}
    return found


def listening(ports: set[int]) -> dict[str, int]:
    """Socket inodes that listen on one of the TCP ports: inode -> port."""
    found: dict[str, int] = {}
    for table in ("tcp", "tcp6"):
        try:
            lines = (PROC / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            port = int(fields[1].rpartition(":")[2], 16)
            if fields[3] == TCP_LISTEN and port in ports:
                found[fields[9]] = port
    return found


def sockets(pid: int) -> set[str]:
    """Inodes of the process' sockets. Raises PermissionError when we may not look."""
    found: set[str] = set()
    try:
        names = os.listdir(PROC / str(pid) / "fd")  # noqa: PTH208 - names only
    except (FileNotFoundError, ProcessLookupError):
        return found
    for name in names:
        try:
            target = os.readlink(PROC / str(pid) / "fd" / name)  # noqa: PTH115 - the raw text
        except PermissionError:  # the names may be listed, what they are may not be seen
            raise
        except OSError:
            continue
        if target.startswith("socket:["):
            found.add(target[8:-1])
    return found


def unit_of(pid: int) -> str:
    """The systemd service (`mysql.service`) whose control group holds the process, "" if none does."""
    try:
        lines = (PROC / str(pid) / "cgroup").read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        parts = line.partition(":")[2].partition(":")[2].split("/")
        if "system.slice" in parts:
            units = [p for p in parts if p.endswith(".service")]
            if units:
                return units[-1]
    return ""
