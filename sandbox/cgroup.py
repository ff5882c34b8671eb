"""The cgroup v2 tree: where it is mounted, the node that holds the leaves, and one leaf's life.

Called by `sandbox.capability` (which node, which controllers) and `sandbox.execution` (one leaf a run). cgroupspy
makes, removes and walks nodes; it knows the files of v1 only, so every v2 control file is read and written here. Never
decides what may run, and touches no cgroup that `sandbox` did not make, except to enable controllers in its parents.

File formats: Documentation/admin-guide/cgroup-v2.rst of the Linux kernel.
"""

from __future__ import annotations

import errno
import os
import re
import select
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cgroupspy.nodes import Node
from cgroupspy.trees import Tree

from sandbox.model import Limits, Totals

NODE = "alertmedic"  # holds the leaves; shared by all agents of a host, whose leaf names are unique
AGENT_LEAF = "alertmedic-agent"  # where the processes of a delegated cgroup go, so that it may have controllers
LEAF_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
NEEDED = ("cpu", "memory", "pids")  # all three, or the limits are not called enforced
REMOVE_SECONDS = 2.0  # an empty cgroup may stay busy for a moment while its last task is switched out


@dataclass(frozen=True, slots=True)
class Mount:
    """One cgroup2 mount. `root` is the cgroup shown at `point`, as seen from this process's cgroup namespace."""

    point: Path
    root: str
    writable: bool

    def holding(self, cgroup: str) -> Path | None:
        """The directory of a cgroup path as /proc/self/cgroup writes it, None if it lies outside this mount."""
        if self.root == "/":
            return self.point / cgroup.strip("/")
        if cgroup == self.root or cgroup.startswith(self.root + "/"):
            return self.point / cgroup[len(self.root) :].strip("/")
        return None


def mounts(mountinfo: str) -> list[Mount]:
    """The cgroup2 mounts in the text of /proc/self/mountinfo (proc(5): root is field 4, mount point 5, options 6)."""
    found = []
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        fields, rest = left.split(" "), right.split(" ")
        if len(fields) < 6 or rest[0] != "cgroup2":
            continue
        root, point = (re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), f) for f in fields[3:5])
        writable = "rw" in fields[5].split(",") and "rw" in rest[-1].split(",")
        found.append(Mount(Path(point), root, writable))
    return found


def own_cgroup(proc_self_cgroup: str) -> str:
    """This process's v2 cgroup path in the text of /proc/self/cgroup; "/" where there is no v2 line."""
    for line in proc_self_cgroup.splitlines():
        if line.startswith("0::"):
            return line[3:].removesuffix(" (deleted)")
    return "/"


def read(directory: Path, name: str) -> str:
    """A control file's text, whole (each is at most some pages). OSError as the kernel gives it."""
    fd = os.open(f"{directory}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 65536).decode()
    finally:
        os.close(fd)


def write(directory: Path, name: str, value: str) -> None:
    """One write(2) to a control file, which is how the kernel takes them. OSError with the file's name in it."""
    path = f"{directory}/{name}"
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    except OSError as x:
        raise OSError(x.errno, f"{x.strerror} (writing {value!r})", path) from x
    finally:
        os.close(fd)


def values(directory: Path, name: str) -> dict[str, int]:
    """A flat-keyed file ("oom_kill 2") without what is no number ("max"); empty if there is no such file."""
    try:
        text = read(directory, name)
    except FileNotFoundError:
        return {}
    pairs = (line.split() for line in text.splitlines())
    return {p[0]: int(p[1]) for p in pairs if len(p) == 2 and p[1].isdecimal()}


def node_under(base: Path) -> Path:
    """The node that holds the leaves, made below `base` if it is not there. OSError if it cannot be made."""
    Node(os.fsencode(base)).create_cgroup(NODE)
    return base / NODE


def limit_node(node: Path, totals: Totals) -> None:
    """What all leaves together may use; a controller that the node itself does not have limits nothing."""
    period = Limits().cpu_period_us
    cpu = f"{period * totals.cpu_percent // 100} {period}" if totals.cpu_percent else f"max {period}"
    wanted = {
        "cpu.max": cpu,
        "memory.max": str(totals.memory_bytes or "max"),
        "pids.max": str(totals.pids or "max"),
    }
    for name, value in wanted.items():
        if (node / name).exists():
            write(node, name, value)


def enable(directory: Path, *, owned: bool) -> frozenset[str]:
    """Switches on, for the children of `directory`, the controllers that limits need; returns those that are on.

    A cgroup with processes of its own cannot give its children `memory` or `io` (the no-internal-process rule); with
    `cpu` or `pids` it would become the root of a threaded subtree, whose children no process can enter. So if `owned`,
    every process in it is first moved into a leaf of its own, else nothing is switched on. Owned is a tree that belongs
    to us, such as a unit with `Delegate=yes` or a container; afterwards nothing can join `directory` any more
    (`kubectl exec` cannot). Only the real root (without cgroup.type) may have both.
    """
    on = frozenset(read(directory, "cgroup.subtree_control").split())
    offered = read(directory, "cgroup.controllers").split()
    wanted = [c for c in (*NEEDED, "io") if c in offered and c not in on]
    if wanted and (directory / "cgroup.type").exists() and read(directory, "cgroup.procs").strip():
        if not owned:
            return on
        _evacuate(directory)
    for controller in wanted:
        try:
            write(directory, "cgroup.subtree_control", f"+{controller}")
        except OSError as x:
            if x.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.ENOENT, errno.EOPNOTSUPP):
                raise
    return frozenset(read(directory, "cgroup.subtree_control").split())


def _evacuate(directory: Path) -> None:
    """Moves every process of `directory` into its leaf AGENT_LEAF. New ones may appear meanwhile: again, boundedly."""
    Node(os.fsencode(directory)).create_cgroup(AGENT_LEAF)
    for _ in range(100):
        pids = read(directory, "cgroup.procs").split()
        if not pids:
            return
        for pid in pids:
            try:
                write(directory / AGENT_LEAF, "cgroup.procs", pid)
            except OSError as x:
                if x.errno != errno.ESRCH:  # gone meanwhile
                    raise
    raise OSError(errno.EBUSY, "processes keep appearing in it; is it really delegated to us?", directory)


def find_leaf(name: str, points: list[Path]) -> Path | None:
    """The leaf of that name anywhere below the cgroup2 mounts `points`, whichever node an earlier agent had used."""
    for point in points:
        for _ in range(5):  # a cgroup that vanishes while the tree is read makes cgroupspy fail: read again
            try:
                tree = Tree(os.fsencode(point))
            except FileNotFoundError:
                continue
            for found in tree.walk():
                if found.name == name.encode():
                    return Path(os.fsdecode(found.full_path))
            break
        else:
            raise OSError(errno.EAGAIN, "the cgroup tree kept changing while it was searched", str(point))
    return None


@dataclass(frozen=True, slots=True)
class Usage:
    """What a leaf used. None: this kernel, or a leaf without that controller, does not tell."""

    cpu_seconds: float | None
    memory_peak_bytes: int | None
    oom_kills: int
    pids_refused: int | None


@dataclass(slots=True)
class Leaf:
    """One leaf. Made by `create`, taken up again by `at`, gone after `remove`. All methods block, none for long but
    `kill`, which waits as long as it is told to."""

    path: Path
    _parent: Any = field(repr=False)  # the cgroupspy node above

    @classmethod
    def create(cls, root: Path, name: str) -> Leaf:
        """A new, empty leaf under `root`. FileExistsError if there is one of that name: a leaf belongs to one run."""
        path = root / name
        if path.exists():  # cgroupspy would take an existing one for its own
            raise FileExistsError(errno.EEXIST, "a cgroup leaf of that name exists already", str(path))
        parent = Node(os.fsencode(root))
        parent.create_cgroup(name)
        return cls(path, parent)

    @classmethod
    def at(cls, path: Path) -> Leaf:
        """A leaf that exists already, left by an agent that crashed."""
        return cls(path, Node(os.fsencode(path.parent)))

    @property
    def procs(self) -> Path:
        return self.path / "cgroup.procs"

    def limit(self, limits: Limits, controllers: frozenset[str]) -> None:
        """Writes the limits whose controller is there. OSError names the file and the value that was refused."""
        if "memory" in controllers:
            write(self.path, "memory.max", str(limits.memory_bytes))
            with suppress(FileNotFoundError):  # a kernel without swap accounting has no such file, and mostly no swap
                write(self.path, "memory.swap.max", str(limits.swap_bytes))
            write(self.path, "memory.oom.group", "1")
        if "pids" in controllers:
            write(self.path, "pids.max", str(limits.pids))
        if "cpu" in controllers:
            write(self.path, "cpu.max", f"{limits.cpu_quota_us} {limits.cpu_period_us}")
        if "io" in controllers:
            for line in limits.io:
                write(self.path, "io.max", line)

    def populated(self) -> bool:
        return "populated 1" in read(self.path, "cgroup.events")

    def kill(self, deadline_seconds: float) -> bool:
        """Kills everything in the leaf and below it, waits until it is empty. False if it is not empty in time.

        Event-driven: the kernel wakes a poll of `cgroup.events` when the last process is gone. The kill is repeated now
        and then, since a process with the right to do so may be moved into the leaf after the first.
        """
        deadline = time.monotonic() + deadline_seconds
        if not self.populated():
            return True
        self._unthrottle()
        fd = os.open(self.path / "cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
        try:
            poller = select.poll()
            poller.register(fd, select.POLLPRI)
            while True:
                write(self.path, "cgroup.kill", "1")
                if b"populated 0" in os.pread(fd, 4096, 0):  # reading also arms the next wake-up
                    return True
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                poller.poll(max(1.0, min(left, 0.5) * 1000))
                if b"populated 0" in os.pread(fd, 4096, 0):
                    return True
        finally:
            os.close(fd)

    def _unthrottle(self) -> None:
        """A throttled process dies only when its next period begins: what is to be killed needs no limit any more."""
        with suppress(FileNotFoundError):  # a leaf without the cpu controller throttles nobody
            write(self.path, "cpu.max", "max")

    def usage(self, controllers: frozenset[str]) -> Usage:
        """What was used so far. CPU time is told even without the cpu controller."""
        cpu = values(self.path, "cpu.stat").get("usage_usec")
        peak, kills = None, 0
        if "memory" in controllers:
            with suppress(FileNotFoundError):  # before Linux 5.19
                peak = int(read(self.path, "memory.peak"))
            kills = values(self.path, "memory.events").get("oom_kill", 0)
        refused = values(self.path, "pids.events").get("max") if "pids" in controllers else None
        return Usage(None if cpu is None else cpu / 1e6, peak, kills, refused)

    def remove(self) -> bool:
        """Removes the empty leaf and cgroups that the payload made in it. False if it is still busy after a while."""
        deadline = time.monotonic() + REMOVE_SECONDS
        while True:
            try:
                self._parent.delete_cgroup(self.path.name)
                return True
            except FileNotFoundError:
                return True
            except OSError as x:
                if x.errno not in (errno.EBUSY, errno.ENOTEMPTY):
                    raise
            for inner in _inner(self.path):
                try:
                    inner.rmdir()
                except OSError as x:
                    if x.errno not in (errno.EBUSY, errno.ENOENT):
                        raise
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)


def _inner(leaf: Path) -> Iterator[Path]:
    """Cgroups below a leaf, deepest first."""
    for directory, names, _ in os.walk(leaf, topdown=False):
        yield from (Path(directory, name) for name in names)
