"""A disk that takes few writes a second, for the processes of a cgroup of its own; for everybody else it is as ever.

Used by the injector (`agent.chaos.outer_faults`). By cgroup v1's `blkio` where it is mounted, else by the controller
`io` of cgroup v2 where the root gives it to its children. It changes nothing of the machine but one cgroup, which is
removed in the end; a process that was killed leaves an empty one behind, which the next throttle removes.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from dataclasses import dataclass
from pathlib import Path

import psutil

PREFIX = "alertmedic-chaos-"
ROUNDS = 100  # of moving out who is in it: what is there may start more meanwhile


@dataclass(frozen=True)
class Hierarchy:
    """Where such cgroups are made, and how their bound is written."""

    root: Path
    controller: str  # in /proc/PID/cgroup; "" is v2
    bound: str
    line: str  # of the bound's file


V1 = Hierarchy(Path("/sys/fs/cgroup/blkio"), "blkio", "blkio.throttle.write_iops_device", "{device} {writes}")
V2 = tuple(
    Hierarchy(Path(root), "", "io.max", "{device} wiops={writes}")
    for root in ("/sys/fs/cgroup", "/sys/fs/cgroup/unified")
)


def hierarchy() -> Hierarchy | None:
    """The one that bounds writes on this machine."""
    if (V1.root / "cgroup.procs").exists() and os.access(V1.root, os.W_OK):
        return V1
    for v2 in V2:
        with contextlib.suppress(OSError):
            given = (v2.root / "cgroup.subtree_control").read_text().split()
            if "io" in given and os.access(v2.root, os.W_OK):
                return v2
    return None


def obstacle() -> str:
    """Why no disk can be made slow here; "" where it can."""
    if hierarchy() is not None:
        return ""
    return "only root can bound writes, by cgroup v1's blkio, or v2's io in the root's cgroup.subtree_control"


@dataclass(frozen=True)
class Throttle:
    """A bound that holds until `end`."""

    cgroup: Path
    homes: dict[int, Path]  # where the processes were, by pid

    @classmethod
    def of(cls, place: Path, leader: int, writes: int) -> Throttle:
        """Of what the process `leader` and its descendants, also future ones, write to the file system at `place`.
        Raises OSError, psutil.NoSuchProcess."""
        where = hierarchy()
        if where is None:
            raise OSError(obstacle())
        remove_abandoned(where.root)
        cgroup = where.root / f"{PREFIX}{uuid.uuid4().hex[:8]}"
        cgroup.mkdir()
        throttle = cls(cgroup, {})
        with contextlib.ExitStack() as undo:
            undo.callback(throttle.end)
            device = place.stat().st_dev
            line = where.line.format(device=f"{os.major(device)}:{os.minor(device)}", writes=writes)
            (cgroup / where.bound).write_text(line)
            process = psutil.Process(leader)
            throttle._move(leader, where)  # first: what it starts from now on is bound, too
            for child in process.children(recursive=True):
                throttle._move(child.pid, where)
            undo.pop_all()
        return throttle

    def _move(self, pid: int, where: Hierarchy) -> None:
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # it has ended
            self.homes[pid] = where.root / _path_of(pid, where).lstrip("/")
            (self.cgroup / "cgroup.procs").write_text(str(pid))

    def end(self) -> None:
        """Everybody goes back to where it was (what was started meanwhile, to where its leader was); the cgroup is
        removed. Raises OSError."""
        leader = next(iter(self.homes.values()), self.cgroup.parent)
        for _ in range(ROUNDS):
            pids = [int(line) for line in (self.cgroup / "cgroup.procs").read_text().split()]
            if not pids:
                break
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    (self.homes.get(pid, leader) / "cgroup.procs").write_text(str(pid))
        self.cgroup.rmdir()  # refused while somebody is in it


def _path_of(pid: int, where: Hierarchy) -> str:
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if where.controller in controllers.split(","):
            return path
    return "/"


def remove_abandoned(root: Path) -> None:
    """What killed ones left: cgroups without a process. One in use refuses to go."""
    for cgroup in root.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            cgroup.rmdir()
