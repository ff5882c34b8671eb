"""One run from beginning to end, and what a restarted agent does about the run of its predecessor.

Called by `actions.runner` (`run`, `leaf_name`, `kill_leaf`) and at the service's start (`use`). This page is where the
order of things is decided: leaf, working directory, process, wait, kill, count, remove. All that blocks happens in the
sandbox's own threads. Nothing of a run outlives `run`, however it ends: by itself, by timeout, by cancellation.
"""

from __future__ import annotations

import asyncio
import functools
import os
import re
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

from sandbox import hardening, launcher, namespaces, processes
from sandbox.capability import Capability, SandboxUnavailable, probe
from sandbox.cgroup import LEAF_NAME, Leaf, Usage, find_leaf, mounts
from sandbox.failpoint import failpoint
from sandbox.hardening import Profile
from sandbox.model import Limits, Needs, Protection, RunResult

KILL_SECONDS = 10.0  # for a killed tree to be gone; only an uninterruptible system call takes longer
EOF_SECONDS = 1.0  # for the pipes to end after that; only a process outside the leaf can still hold them
LAUNCHER_BYTES = 4096  # of stderr are always looked at, for the launcher's own message
WORKDIR = "alertmedic-"  # and the leaf's name: a run's working directory
REDACTED = b"[secret]"
LEAST_SECRET = 4  # shorter values are not redacted: they would be found in every number

SWEEPABLE = re.compile(r"run-(?P<space>\d+)-(?P<pid>\d+)-(?P<start>\d+)-[0-9a-f]+")

T = TypeVar("T")
OPEN = Profile()  # whose threads give nothing up
_capability: Capability | None = None
_tried: set[bool] = set()  # whether what runs with full (False) and with fewer needs depend on has been found out


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
    be cleaned up after, and `kill_leaf("")` says so). It names the agent too, by which `sweep` knows its own kind."""
    return _fresh_name() if current().root is not None else ""


def _fresh_name() -> str:
    return f"run-{_identity(os.getpid())}-{secrets.token_hex(6)}"


@functools.lru_cache(maxsize=1)
def _identity(pid: int) -> str:
    """What tells this process from every other one that there was. Read once: the files are in /proc, and a name is
    asked for on the event loop."""
    return f"{Path('/proc/self/ns/pid').stat().st_ino}-{pid}-{processes.start_ticks(pid)}"


async def run(
    argv: Sequence[str],
    limits: Limits,
    *,
    env: Mapping[str, str] | None = None,
    user: str = "",
    stdin: bytes = b"",
    protection: Protection = "automatic",
    leaf: str = "",
    needs: Needs | None = None,
    secrets: Mapping[str, str] | None = None,
    redact: Sequence[str] = (),
) -> RunResult:
    """Runs one program within `limits` and tells what became of it.

    `argv[0]` is an absolute path or a name on PATH; no shell reads any of `argv`. Of our environment the program gets
    nothing: it has a fixed PATH and LANG, and HOME, TMPDIR and PWD name its private working directory, which is removed
    afterwards; `env` is added and wins. `user` is a name or a number, "" for our own. `leaf` is from `leaf_name`.

    The program and all it started are killed at the timeout, on cancellation (which is then raised again), and also
    when the program has ended by itself. Which system calls it may never make is in `sandbox.syscalls`; what else it
    gives up is in its `needs`, and behind bubblewrap a signal that ends it becomes the exit code 128 + signal. A
    program with the agent's own user and all `needs` could move itself out of its leaf: `user` or fewer needs take that
    away.
    At most 64 runs of a kind go on at once; more wait for their turn.

    `secrets`: values by name. The program reads each from the descriptor whose number is in its variable `NAME_FD`;
    they, and the values in `redact`, are taken out of its captured output.

    Raises SandboxUnavailable, before anything is made, if `protection` is "required" and the limits cannot be enforced,
    or `needs.isolation` is and there is no namespace layer; everything else that prevents a start is `RunResult.error`.
    """
    needs = needs or Needs()
    known = _capability if _capability is not None else await _in_thread(current)
    capability = known.holding(limits)
    what = f"sandbox: {argv[0] if argv else 'nothing'!r} not started"
    if protection == "required" and not capability.enforced_by.limits_enforced:
        raise SandboxUnavailable(f"{what}: {capability.reason}")
    if needs.restricted in _tried:
        profile = hardening.profile_for(needs)
    else:  # in a thread: finding out what works here starts programs
        profile = await _in_thread(lambda: hardening.profile_for(needs))
        _tried.add(needs.restricted)
    if needs.isolation == "required" and not profile.namespaced:
        raise SandboxUnavailable(f"{what}: isolation is required: {namespaces.unavailable() or 'its needs leave none'}")
    hidden = [os.fsencode(text) for text in (*(secrets or {}).values(), *redact) if len(text) >= LEAST_SECRET]
    box = _Box(capability, limits, leaf, profile, hidden)
    try:
        return await _in_thread(lambda: box.run(argv, env, user, stdin, needs, secrets), box.stop, profile)
    finally:
        box.close()


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


async def sweep(deadline_seconds: float) -> list[str]:
    """Ends and removes every run whose agent is no longer alive, and returns their names. To be called at the start:
    runs whose leaf is in no journal (target look-ups) would otherwise go on for ever when their agent crashed. Leaves
    of other living agents of this host, and of other PID namespaces, are left alone."""
    return await _in_thread(lambda: _sweep(deadline_seconds))


def _sweep(deadline_seconds: float) -> list[str]:
    root = current().root
    swept = []
    for path in sorted(root.iterdir()) if root is not None else []:
        if _orphaned(path.name) and _kill_leaf(path.name, deadline_seconds):
            swept.append(path.name)
    # Runs without a leaf: their processes carry the name. And directories whose leaf was removed already.
    for path in sorted(Path(tempfile.gettempdir()).glob(f"{WORKDIR}run-*")):
        name = path.name.removeprefix(WORKDIR)
        if name in swept or not _orphaned(name):
            continue
        gone = root is None or _kill_leaf(name, deadline_seconds)  # it may be in another node
        if gone and processes.kill_carriers(name, deadline_seconds):
            _remove_directory(path)
            swept.append(name)
    return swept


def _orphaned(name: str) -> bool:
    """Whether a run of that name was made by an agent of this PID namespace that is no longer alive."""
    named = SWEEPABLE.fullmatch(name)
    if named is None or int(named["space"]) != Path("/proc/self/ns/pid").stat().st_ino:
        return False
    return processes.start_ticks(int(named["pid"])) != int(named["start"])  # equal: alive, and maybe us


class _Box:
    """One run: what it has made so far, and how to unmake it. All of it blocks, in one sandbox thread from beginning to
    end: on a busy machine every hand-over between threads would cost more than the launcher. Only `stop` is called from
    outside."""

    def __init__(
        self, capability: Capability, limits: Limits, leaf: str, profile: Profile, hidden: Sequence[bytes] = ()
    ) -> None:
        self.capability = capability
        self.limits = limits
        self.profile = profile
        self.hidden = sorted(hidden, key=len, reverse=True)
        self.status_text = _Output(LAUNCHER_BYTES)
        self.name = leaf or _fresh_name()
        self.leaf: Leaf | None = None
        self.workdir: Path | None = None
        self.started: launcher.Started | None = None
        self.changed_user = False
        self.out = _Output(limits.output_bytes)
        self.err = _Output(max(limits.output_bytes, LAUNCHER_BYTES))
        self.began = self.ended = 0.0
        self.timed_out = False
        self.status: int | None = None
        self.usage = Usage(None, None, 0, None)
        self.error = ""
        self._stopping = os.eventfd(0, os.EFD_CLOEXEC)

    def stop(self) -> None:
        """Makes `run` kill and clean up now."""
        os.eventfd_write(self._stopping, 1)

    def close(self) -> None:
        os.close(self._stopping)

    def run(
        self,
        argv: Sequence[str],
        env: Mapping[str, str] | None,
        user: str,
        stdin: bytes,
        needs: Needs,
        secrets: Mapping[str, str] | None,
    ) -> RunResult:
        self._start(argv, env, (user, stdin, needs, secrets))
        if self.started is None:
            self._finish()
            return self._result()
        pipes = {self.started.stdout: self.out, self.started.stderr: self.err}
        if self.started.status >= 0:
            pipes[self.started.status] = self.status_text
        opened = tuple(pipes)
        try:
            self.timed_out = not self._listen(pipes, self.began + self.limits.timeout_seconds)
            self.ended = time.monotonic()
            failpoint("sandbox_after_exit")
            self._finish()
            _drain(pipes, time.monotonic() + EOF_SECONDS)
        finally:
            for fd in opened:
                os.close(fd)
        failed = launcher.launch_error(
            self.started.secret,
            self.status or 0,
            bytes(self.err.kept),
            changed_user=self.changed_user,
            status=bytes(self.status_text.kept) if self.started.status >= 0 else None,
        )
        if failed:
            self.status, self.error = None, failed
        return self._result()

    def _start(
        self,
        argv: Sequence[str],
        env: Mapping[str, str] | None,
        rest: tuple[str, bytes, Needs, Mapping[str, str] | None],
    ) -> None:
        """Leaf, working directory, process. What prevents a start is put into `error`."""
        try:
            if not LEAF_NAME.fullmatch(self.name):
                raise launcher.CannotStart(f"{self.name!r} cannot be the name of a leaf")
            launcher.check_limits(self.limits)
            workdir = _workdir(self.name)
            command = launcher.check(argv, self._environment(env, workdir), *rest)
            if self.capability.root is not None:
                self.leaf = Leaf.create(self.capability.root, self.name)
                self.leaf.limit(self._leaf_limits(), self.capability.controllers)
            workdir.mkdir(0o700)
            self.workdir = workdir
            if command.identity is not None:
                self.changed_user = True
                os.chown(workdir, command.identity.uid, command.identity.gid)
            failpoint("sandbox_before_spawn")
            self.began = time.monotonic()
            procs = self.leaf.procs if self.leaf else None
            controllers = self.capability.controllers
            self.started = launcher.spawn(command, self.limits, workdir, procs, controllers, self.profile)
            failpoint("sandbox_after_spawn")
        except (launcher.CannotStart, OSError) as x:
            self.error = str(x)

    def _leaf_limits(self) -> Limits:
        """The program's, and room for the processes of the namespace layer itself."""
        if not self.profile.namespaced:
            return self.limits
        return msgspec.structs.replace(self.limits, pids=self.limits.pids + namespaces.OWN_PROCESSES)

    def _environment(self, env: Mapping[str, str] | None, workdir: Path) -> dict[str, str]:
        default = {
            "PATH": launcher.DEFAULT_PATH,
            "LANG": "C.UTF-8",
            **dict.fromkeys(("HOME", "TMPDIR", "PWD"), str(workdir)),
        }
        cookie = {} if self.capability.root is not None else {processes.COOKIE: self.name}
        return {**default, **(env or {}), **cookie}

    def _listen(self, pipes: dict[int, _Output], deadline: float) -> bool:
        """Takes the output until the program exits or `stop` is called; False when its time was over before."""
        assert self.started is not None
        ends = {self.started.pidfd, self._stopping}
        poller = select.poll()
        for fd in (*ends, *pipes):
            poller.register(fd, select.POLLIN)
        while True:
            left = max(0.0, deadline - time.monotonic())
            ready = {fd for fd, _ in poller.poll(left * 1000)}
            if ready & ends:
                return True
            if not left:
                return False
            for fd in ready:
                if not pipes[fd].take(fd):
                    poller.unregister(fd)
                    del pipes[fd]

    def _finish(self) -> None:
        """Kills what is left of the tree, reaps, counts, removes. What cannot be done is put into `error`."""
        faults = []
        try:
            if not self._end():
                faults.append(f"processes were still alive {KILL_SECONDS:g} s after they were killed")
            if self.leaf is not None:
                self.usage = self.leaf.usage(self.capability.controllers)
            failpoint("sandbox_before_cleanup")
            if self.leaf is not None and not self.leaf.remove():
                faults.append(f"leaf {self.leaf.path} could not be removed")
        except OSError as x:
            faults.append(f"cleaning up: {x}")
        if self.workdir is not None:
            _remove_directory(self.workdir)
        self.error = "; ".join([self.error, *faults] if self.error else faults)

    def _end(self) -> bool:
        """Kills and reaps. The first process must be dead when the leaf is looked at for the last time: only it, a
        launcher still, could enter the leaf after that. True when nothing is left."""
        if self.started is None:
            return self.leaf is None or self.leaf.kill(KILL_SECONDS)
        pid, pidfd = self.started.process.pid, self.started.pidfd
        gone = True
        if self.leaf is None:
            gone = processes.kill_tree(pid, self.name, KILL_SECONDS)
        elif not _exited(pidfd, 0):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            gone = self.leaf.kill(KILL_SECONDS)
        dead = _exited(pidfd, KILL_SECONDS)
        os.close(pidfd)
        if dead:
            _, status, used = os.wait4(pid, 0)
            self.status = self.started.process.returncode = os.waitstatus_to_exitcode(status)
            self.usage = Usage(used.ru_utime + used.ru_stime, None, 0, None)
        return gone and dead and (self.leaf is None or self.leaf.kill(KILL_SECONDS))

    def _result(self) -> RunResult:
        result = RunResult(
            exit_code=None,
            timed_out=self.timed_out,
            oom_killed=self.usage.oom_kills > 0,
            seconds=max(0.0, self.ended - self.began),
            cpu_seconds=self.usage.cpu_seconds,
            memory_peak_bytes=self.usage.memory_peak_bytes,
            pids_refused=self.usage.pids_refused,
            enforced_by=self.capability.enforced_by,
            layers=hardening.layers(
                self.profile,
                leaf=self.leaf is not None,
                limited=self.capability.enforced_by.limits_enforced,
                changed_user=self.changed_user,
            ),
            leaf=self.name if self.leaf else "",
            error=self.error,
        )
        if self.status is None:
            return result
        bound = self.limits.output_bytes
        return msgspec.structs.replace(
            result,
            exit_code=self.status if self.status >= 0 else None,
            signal=-self.status if self.status < 0 else None,
            stdout=self.out.without(self.hidden, bound).decode("utf-8", "replace"),
            stderr=self.err.without(self.hidden, bound).decode("utf-8", "replace"),
            stdout_dropped=self.out.dropped,
            stderr_dropped=self.err.dropped + len(self.err.kept[bound:]),
        )


class _Output:
    """One pipe's content: the first `bound` bytes are kept, the rest is counted, so that no writer ever blocks."""

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self.kept = bytearray()
        self.dropped = 0

    def take(self, fd: int) -> bool:
        """Reads once. False at the end."""
        try:
            data = os.read(fd, 65536)
        except BlockingIOError:
            return True
        room = self.bound - len(self.kept)
        self.kept += data[:room]
        self.dropped += len(data[room:])
        return bool(data)

    def without(self, hidden: Sequence[bytes], bound: int) -> bytes:
        """The first `bound` bytes; hidden values, and the beginning of one that the bound cut off, are replaced."""
        data = bytes(self.kept)
        for value in hidden:
            data = data.replace(value, REDACTED)
        data, cut = data[:bound], self.dropped or len(data) > bound
        for value in hidden if cut else ():
            for length in range(min(len(value) - 1, len(data)), LEAST_SECRET - 1, -1):
                if data.endswith(value[:length]):
                    return data[:-length] + REDACTED
        return data


def _exited(pidfd: int, seconds: float) -> bool:
    poller = select.poll()  # select(2) cannot take descriptors from 1024 on, which a busy service has
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(seconds * 1000))


def _drain(pipes: dict[int, _Output], deadline: float) -> None:
    """Reads pipes to their end. They end at once, their writers being dead, unless a process that got out of the leaf,
    or into nobody's tree, still holds them: then until the deadline."""
    poller = select.poll()
    for fd in pipes:
        poller.register(fd, select.POLLIN)
    while pipes and (left := deadline - time.monotonic()) > 0:
        for fd, _ in poller.poll(left * 1000):
            if not pipes[fd].take(fd):
                poller.unregister(fd)
                del pipes[fd]


async def _in_thread(work: Callable[[], T], stop: Callable[[], None] | None = None, profile: Profile = OPEN) -> T:
    """Does `work` in a sandbox thread, to its end even if the caller is cancelled: `stop` is called then, and the
    cancellation is raised after the end. A half-made or half-removed sandbox must not be left behind."""
    job = hardening.threads(profile).submit(work)
    future = asyncio.wrap_future(job)
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait({future})
        except asyncio.CancelledError as x:
            cancelled = x
            if not job.cancel() and stop is not None:  # it has begun
                stop()
    if cancelled is not None:
        raise cancelled
    return future.result()


def _workdir(leaf: str) -> Path:
    """A run's private working directory, by its leaf's name: so a restarted agent can remove it too."""
    return Path(tempfile.gettempdir(), f"{WORKDIR}{leaf}")


def _remove_directory(path: Path) -> None:
    """Never follows a link: the program owned the directory and may have put one in its place."""
    try:
        path.rmdir()
    except OSError:
        if path.is_symlink():
            path.unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
