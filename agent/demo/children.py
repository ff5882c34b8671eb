"""Child processes of the demo world: found, started, watched, and ended whatever happens.

Used by the demo world, and by the chaos worlds that are built upon it. Every child gets its own environment (never the
driver's), a log file, and a parent-death signal where the system has `setpriv`, so that nothing outlives even a killed
driver. It never starts a service of the system and never looks for processes by name.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import pwd
import shutil
import signal
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
_SERVER_DIRS = ("/usr/sbin", "/sbin", *sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")), reverse=True))


class WorldError(Exception):
    """The demo world cannot be built or has broken: says which part, and what to look at."""


@dataclass(frozen=True)
class Program:
    """An external program: the names it goes by, and the Debian package that brings it."""

    names: tuple[str, ...]
    package: str

    def find(self) -> str | None:
        path = os.pathsep.join([os.environ.get("PATH", ""), *_SERVER_DIRS])
        return next((found for name in self.names if (found := shutil.which(name, path=path))), None)


PROGRAMS = {
    "prometheus": Program(("prometheus",), "prometheus"),
    "alertmanager": Program(("prometheus-alertmanager", "alertmanager"), "prometheus-alertmanager"),
    "node_exporter": Program(("prometheus-node-exporter", "node_exporter"), "prometheus-node-exporter"),
    "postgres_exporter": Program(("prometheus-postgres-exporter", "postgres_exporter"), "prometheus-postgres-exporter"),
    "initdb": Program(("initdb",), "postgresql"),
    "postgres": Program(("postgres",), "postgresql"),
    "psql": Program(("psql",), "postgresql-client"),
    "setpriv": Program(("setpriv",), "util-linux"),
}


def missing_programs() -> list[str]:
    """What to install, one sentence for each program that is not there."""
    return [
        f"{program.names[0]} not found: apt-get install {program.package} (or put it on PATH)"
        for program in PROGRAMS.values()
        if program.find() is None
    ]


def path_of(name: str) -> str:
    """Where the program is. Raises WorldError saying what to install."""
    if found := PROGRAMS[name].find():
        return found
    raise WorldError(f"{name} not found: apt-get install {PROGRAMS[name].package}")


def free_ports(count: int) -> list[int]:
    """Distinct TCP ports of the loopback that nobody listened on a moment ago."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def adopt_orphans() -> None:
    """Makes this process the parent of its descendants' orphans, so that none can slip away from `end_descendants`."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_descendants(processes: Sequence[psutil.Process], seconds: float = 3.0) -> None:
    """Kills these processes and waits until they are gone."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(list(processes), timeout=seconds)


def unprivileged_user() -> pwd.struct_passwd | None:
    """Who PostgreSQL runs as: None (ourselves) unless we are root, which it refuses."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise WorldError("no user postgres or nobody: PostgreSQL refuses to run as root")


def set_session_priority(pid: int, nice: int) -> None:
    """The nice value of the scheduling group of the process' session, on kernels that have such groups (sched(7), "the
    autogroup feature"); elsewhere, and where it is not permitted, nothing happens."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(str(nice))


def bare_environment() -> dict[str, str]:
    """A fresh environment of a system service: nothing of the driver's."""
    return {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "LANG": "C.UTF-8"}


async def run_to_end(package: str, program: str, *arguments: str, seconds: float = 20.0) -> None:
    """Runs a tool and waits until it has ended well. It is killed when that takes too long, and when the wait is
    cancelled. Raises WorldError; `package` is the one of Debian that brings the tool."""
    path = shutil.which(program, path=bare_environment()["PATH"])
    if path is None:
        raise WorldError(f"{program} not found: apt-get install {package}")
    pipes = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(
        *(path, *arguments), env=bare_environment(), stdin=pipes, stdout=pipes, stderr=asyncio.subprocess.PIPE
    )
    try:
        _, said = await asyncio.wait_for(process.communicate(), seconds)
    except TimeoutError as e:
        raise WorldError(f"{program} {arguments[0]} has not ended within {seconds:.0f} s") from e
    finally:  # however it was left, cancelled too
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise WorldError(f"{program} {' '.join(arguments)} failed: {said.decode(errors='replace')[-500:]}")


class Child:
    """One running child process with its log file."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path, stop: signal.Signals) -> None:
        self.name, self.process, self.log, self._stop = name, process, log, stop

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.returncode is None

    def tail(self, lines: int = 12) -> str:
        with contextlib.suppress(OSError):
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        return ""

    def check(self) -> None:
        """Raises WorldError when the process has ended by itself."""
        if not self.running:
            raise WorldError(f"{self.name} ended with status {self.process.returncode}; its last words:\n{self.tail()}")

    async def end(self, seconds: float = 5.0) -> None:
        """Asks the process to stop, kills it when it does not, and ends whatever it leaves behind."""
        descendants: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            descendants = psutil.Process(self.pid).children(recursive=True) if self.running else []
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(self._stop)
            try:
                await asyncio.wait_for(self.process.wait(), seconds)
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    self.process.kill()
                await self.process.wait()
        await asyncio.to_thread(end_descendants, [p for p in descendants if p.is_running()])


@dataclass(frozen=True)
class Command:
    """What to run, with exactly this environment. `stop` is the signal that ends it politely; with `pipes` its standard
    input and output are ours; `polite` lowers its scheduling priority, and that of its session."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    user: pwd.struct_passwd | None = None
    stop: signal.Signals = signal.SIGTERM
    pipes: bool = False
    polite: bool = False


async def start(name: str, command: Command, log: Path) -> Child:
    """Starts a child in the directory of its log file, in a session of its own: Ctrl-C reaches the driver only, which
    ends everything in order."""
    prefix = [path_of("setpriv"), "--pdeathsig", command.stop.name.removeprefix("SIG")]
    if (user := command.user) is not None:
        prefix += [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    if command.polite:
        prefix = ["nice", "-n", "10", *prefix]
    pipe = asyncio.subprocess.PIPE
    with log.open("ab") as out:
        process = await asyncio.create_subprocess_exec(
            *prefix,
            "--",
            *command.argv,
            env=dict(command.env),
            cwd=log.parent,
            stdin=pipe if command.pipes else asyncio.subprocess.DEVNULL,
            stdout=pipe if command.pipes else out,
            stderr=out,
            start_new_session=True,
        )
    if command.polite:
        set_session_priority(process.pid, 7)
    return Child(name, process, log, command.stop)
