"""One run from beginning to end, and what a restarted agent does about the run of its predecessor.

Called by `actions.runner` (`run`, `leaf_name`, `kill_leaf`) and at the service's start (`use`). This page is where the
order of things is decided: leaf, working directory, process, wait, kill, count, remove. All that blocks happens in the
sandbox's own threads. Nothing of a run outlives `run`, however it ends: by itself, by timeout, by cancellation.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from sandbox import launcher, processes
from sandbox.capability import Capability, SandboxUnavailable, probe
from sandbox.cgroup import LEAF_NAME, Leaf, Usage, find_leaf, mounts
from sandbox.failpoint import failpoint
from sandbox.model import Limits, Protection, RunResult

KILL_SECONDS = 10.0  # for a killed tree to be gone; only an uninterruptible system call takes longer
EOF_SECONDS = 1.0  # for the pipes to end after that; only a process outside the leaf can still hold them
LAUNCHER_BYTES = 4096  # of stderr are always looked at, for the launcher's own message

T = TypeVar("T")
_capability: Capability | None = None


def use(capability: Capability) -> None:
    """What `run`, `leaf_name` and `kill_leaf` work with from now on: the answer of `probe`, asked once at start."""
    global _capability
    _capability = capability


def current() -> Capability:
    """What runs are held by. Probes on the first call if `use` was not called; that blocks for some milliseconds."""
    capability = _capability or probe()
    use(capability)
    return capability


def leaf_name() -> str:
    """A fresh name for a leaf, to be recorded before `run(leaf=...)`; "" where there are no leaves (then a crash cannot
    be cleaned up after, and `kill_leaf("")` says so)."""
    return f"run-{secrets.token_hex(8)}" if current().root is not None else ""


async def run(
    argv: Sequence[str],
    limits: Limits,
    *,
    env: Mapping[str, str] | None = None,
    user: str = "",
    stdin: bytes = b"",
    protection: Protection = "automatic",
    leaf: str = "",
) -> RunResult:
    """Runs one program within `limits` and tells what became of it.

    `argv[0]` is an absolute path or a name on PATH; no shell reads any of `argv`. Of our environment the program gets
    nothing: it has a fixed PATH and LANG, and HOME, TMPDIR and PWD name its private working directory, which is removed
    afterwards; `env` is added and wins. `user` is a name or a number, "" for our own. `leaf` is from `leaf_name`.

    The program and all it started are killed at the timeout, on cancellation (which is then raised again), and also
    when the program has ended by itself. Raises SandboxUnavailable, before anything is made, if `protection` is
    "required" and the limits cannot be enforced; everything else that prevents a start is `RunResult.error`.
    """
    known = _capability if _capability is not None else await _in_thread(current)
    capability = known.holding(limits)
    if protection == "required" and not capability.enforced_by.limits_enforced:
        raise SandboxUnavailable(f"sandbox: {argv[0] if argv else 'nothing'!r} not started: {capability.reason}")
    box = _Box(capability, limits, leaf)
    try:
        await _in_thread(lambda: box.start(argv, env, user, stdin))
        if box.started is not None:
            box.listen()
            await box.wait()
    finally:
        await _in_thread(box.finish)
        await box.close()
    return box.result()


async def kill_leaf(leaf: str, deadline_seconds: float) -> bool:
    """Ends what a crashed agent's run may have left in the leaf of that name, and removes the leaf.

    True when it is certain that nothing of that run is alive: the leaf was emptied, or no longer exists anywhere in the
    tree. A launcher that has not entered its leaf by then finds none and gives up before the program. False when there
    are no leaves on this host, the leaf may not be touched, or it is not empty after `deadline_seconds`: a person must
    look. Raises ValueError for a name that no leaf can have.
    """
    if leaf and not LEAF_NAME.fullmatch(leaf):
        raise ValueError(f"kill_leaf: {leaf!r} cannot be the name of a leaf")
    return await _in_thread(lambda: _kill_leaf(leaf, deadline_seconds))


def _kill_leaf(leaf: str, deadline_seconds: float) -> bool:
    root = current().root
    if not leaf or root is None:
        return False
    path: Path | None = root / leaf
    try:
        if not (root / leaf).exists():  # the agent may have run in another node then
            path = find_leaf(leaf, [m.point for m in mounts(Path("/proc/self/mountinfo").read_text())])
        if path is not None:
            old = Leaf.at(path)
            if not old.kill(deadline_seconds) or not old.remove():
                return False
    except OSError:
        return False
    _remove_directory(_workdir(leaf))
    return True


class _Box:
    """One run: what it has made so far, and how to unmake it. `start` and `finish` block and run in a sandbox thread;
    `finish` copes with whatever `start` got to."""

    def __init__(self, capability: Capability, limits: Limits, leaf: str) -> None:
        self.capability = capability
        self.limits = limits
        self.name = leaf or f"run-{secrets.token_hex(8)}"
        self.leaf: Leaf | None = None
        self.workdir: Path | None = None
        self.started: launcher.Started | None = None
        self.changed_user = False
        self.streams: list[_Stream] = []
        self.began = self.ended = 0.0
        self.timed_out = False
        self.status: int | None = None
        self.usage = Usage(None, None, 0, None)
        self.error = ""

    def start(self, argv: Sequence[str], env: Mapping[str, str] | None, user: str, stdin: bytes) -> None:
        """Leaf, working directory, process. What prevents a start is put into `error`."""
        try:
            if not LEAF_NAME.fullmatch(self.name):
                raise launcher.CannotStart(f"{self.name!r} cannot be the name of a leaf")
            launcher.check_limits(self.limits)
            workdir = _workdir(self.name)
            command = launcher.check(argv, self._environment(env, workdir), user, stdin)
            if self.capability.root is not None:
                self.leaf = Leaf.create(self.capability.root, self.name)
                self.leaf.limit(self.limits, self.capability.controllers)
            workdir.mkdir(0o700)
            self.workdir = workdir
            if command.identity is not None:
                self.changed_user = True
                os.chown(workdir, command.identity.uid, command.identity.gid)
            failpoint("sandbox_before_spawn")
            self.began = time.monotonic()
            procs = self.leaf.procs if self.leaf else None
            self.started = launcher.spawn(command, self.limits, workdir, procs, self.capability.controllers)
            failpoint("sandbox_after_spawn")
        except (launcher.CannotStart, OSError) as x:
            self.error = str(x)

    def _environment(self, env: Mapping[str, str] | None, workdir: Path) -> dict[str, str]:
        default = {"PATH": launcher.DEFAULT_PATH, "LANG": "C.UTF-8", "HOME": str(workdir), "TMPDIR": str(workdir)}
        cookie = {} if self.capability.root is not None else {processes.COOKIE: self.name}
        return {**default, **(env or {}), **cookie}

    def listen(self) -> None:
        assert self.started is not None
        bounds = (self.limits.output_bytes, max(self.limits.output_bytes, LAUNCHER_BYTES))
        self.streams = [_Stream(self.started.stdout, bounds[0]), _Stream(self.started.stderr, bounds[1])]

    async def wait(self) -> None:
        """Until the program exits, or its time is over."""
        assert self.started is not None
        loop = asyncio.get_running_loop()
        exited: asyncio.Future[None] = loop.create_future()
        loop.add_reader(self.started.pidfd, _set, exited)
        try:
            left = self.began + self.limits.timeout_seconds - time.monotonic()
            done, _ = await asyncio.wait({exited}, timeout=max(0.0, left))
            self.timed_out = not done
        finally:
            loop.remove_reader(self.started.pidfd)
            self.ended = time.monotonic()

    def finish(self) -> None:
        """Kills what is left of the tree, reaps, counts, removes. What cannot be done is put into `error`."""
        faults = []
        if self.started is not None:
            failpoint("sandbox_after_exit")
        try:
            if not self._end():
                faults.append(f"processes were still alive {KILL_SECONDS:g} s after they were killed")
            if self.leaf is not None:
                self.usage = self.leaf.usage()
                failpoint("sandbox_before_cleanup")
                if not self.leaf.remove():
                    faults.append(f"leaf {self.leaf.path} could not be removed")
            elif self.started is not None:
                failpoint("sandbox_before_cleanup")
        except OSError as x:
            faults.append(f"cleaning up: {x}")
        if self.workdir is not None:
            _remove_directory(self.workdir)
        self.error = "; ".join([self.error, *faults] if self.error else faults)

    def _end(self) -> bool:
        """Kills and reaps. The first process comes first: only it, a launcher still, can yet enter the leaf, so that
        the leaf is empty for good once it was empty after that. True when nothing is left."""
        if self.started is None:
            return self.leaf is None or self.leaf.kill(KILL_SECONDS)
        pid, pidfd = self.started.process.pid, self.started.pidfd
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        gone = self.leaf.kill(KILL_SECONDS) if self.leaf else processes.kill_tree(pid, self.name, KILL_SECONDS)
        dead = bool(select.select([pidfd], [], [], KILL_SECONDS)[0])
        os.close(pidfd)
        if dead:
            _, status, used = os.wait4(pid, 0)
            self.status = self.started.process.returncode = os.waitstatus_to_exitcode(status)
            self.usage = Usage(used.ru_utime + used.ru_stime, None, 0, None)
        return gone and dead and (self.leaf is None or self.leaf.kill(KILL_SECONDS))

    async def close(self) -> None:
        """Takes what is still in the pipes. They end when the last writer is gone, which `finish` has seen to."""
        waiting = [s.ended for s in self.streams if not s.ended.done()]
        try:
            if waiting:
                await asyncio.wait(waiting, timeout=EOF_SECONDS)
        finally:
            for stream in self.streams:
                stream.close()
            if self.started is not None and not self.streams:  # cancelled before anybody listened
                os.close(self.started.stdout)
                os.close(self.started.stderr)

    def result(self) -> RunResult:
        result = RunResult(
            exit_code=None,
            timed_out=self.timed_out,
            oom_killed=self.usage.oom_kills > 0,
            seconds=max(0.0, self.ended - self.began),
            cpu_seconds=self.usage.cpu_seconds,
            memory_peak_bytes=self.usage.memory_peak_bytes,
            pids_refused=self.usage.pids_refused,
            enforced_by=self.capability.enforced_by,
            leaf=self.name if self.leaf else "",
            error=self.error,
        )
        if self.started is None or self.status is None:
            return result
        out, err = self.streams
        code = self.status
        secret, changed = self.started.secret, self.changed_user
        failed = launcher.launch_error(secret, code, bytes(err.kept), changed_user=changed)
        if failed:
            return msgspec.structs.replace(result, error=failed)
        stderr, cut = err.kept[: self.limits.output_bytes], len(err.kept[self.limits.output_bytes :])
        return msgspec.structs.replace(
            result,
            exit_code=code if code >= 0 else None,
            signal=-code if code < 0 else None,
            stdout=out.kept.decode("utf-8", "replace"),
            stderr=stderr.decode("utf-8", "replace"),
            stdout_dropped=out.dropped,
            stderr_dropped=err.dropped + cut,
        )


class _Stream:
    """Reads a pipe to its end: the first `bound` bytes are kept, the rest is counted, so that no writer ever blocks."""

    def __init__(self, fd: int, bound: int) -> None:
        self.fd = fd
        self.bound = bound
        self.kept = bytearray()
        self.dropped = 0
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(fd, self._read)

    def _read(self) -> None:
        try:
            data = os.read(self.fd, 65536)
        except BlockingIOError:
            return
        room = self.bound - len(self.kept)
        self.kept += data[:room]
        self.dropped += len(data[room:])
        if not data:
            self.close()

    def close(self) -> None:
        if not self.ended.done():
            self._loop.remove_reader(self.fd)
            os.close(self.fd)
            self.ended.set_result(None)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _in_thread(work: Callable[[], T]) -> T:
    """Does `work` in a sandbox thread, to its end even if the caller is cancelled meanwhile; the cancellation is raised
    after that. Half-made or half-removed sandboxes must not be left behind."""
    future = asyncio.get_running_loop().run_in_executor(launcher.threads(), work)
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait({future})
        except asyncio.CancelledError as x:
            cancelled = x
    if cancelled is not None:
        raise cancelled
    return future.result()


def _workdir(leaf: str) -> Path:
    """A run's private working directory, by its leaf's name: so a restarted agent can remove it too."""
    return Path(tempfile.gettempdir(), f"alertmedic-{leaf}")


def _remove_directory(path: Path) -> None:
    try:
        path.rmdir()
    except OSError:
        shutil.rmtree(path, ignore_errors=True)
