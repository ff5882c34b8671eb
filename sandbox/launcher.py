"""Starting one program so that its first instruction runs inside its limits.

Called by `sandbox.execution` in a thread of `hardening.threads()`. Where it can (`sandbox.direct`), the new process is
cloned into its leaf and makes the system calls that hold it before it executes the program: nothing is in between.
Elsewhere a fixed shell script enters the leaf, sets the rlimits and execs the program; all it gets arrives as
positional parameters, which the shell passes on without reading them. A `preexec_fn` would do it too, but makes Python
fork instead of vfork: 27 ms a start with a 500 MB parent. The namespace layer puts bubblewrap in between, either way.

Never parses a command, never looks at what a program is for, and never lets a descriptor through but 0, 1, 2 and those
of its secrets.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import grp
import os
import pwd
import re
import resource
import secrets
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sandbox import direct, hardening, namespaces
from sandbox.direct import Call
from sandbox.hardening import Profile
from sandbox.model import Limits, Needs

SHELL = "/bin/sh"
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ADDRESS_SPACE_FACTOR = 4  # RLIMIT_AS counts reserved, never touched memory too: room for libraries and thread stacks

# $1 the leaf's cgroup.procs or "", $2 oom_score_adj or "", $3..$6 rlimits, then the program. `$0` is a secret: what the
# shell says about a failure begins with it, so that no program's own output can pass for a failure to start.
SCRIPT = """\
if [ -n "$1" ]; then echo 0 > "$1" || exit 125; fi
if [ -n "$2" ]; then echo "$2" > /proc/self/oom_score_adj || exit 125; fi
ulimit -c 0 && ulimit -n "$3" && ulimit -f "$4" && ulimit -v "$5" && ulimit -t "$6" || exit 125
shift 6
exec "$@"
"""
_UNLIMITED = 2**64 - 1
EXEC_ONLY = 'exec "$@"'  # behind setpriv, for its error messages to begin with the secret as well

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# A shell reads these at its start, or sets them: they would act on the launcher, or not arrive as they were given.
RESERVED = frozenset(("BASHOPTS", "BASH_ENV", "ENV", "EUID", "IFS", "LINENO", "OPTARG", "OPTIND", "PPID"))
RESERVED |= {"GCONV_PATH", "PS1", "PS2", "PS4", "SHELLOPTS", "UID"}


class CannotStart(Exception):  # noqa: N818
    """The program was not started; the text says why. Becomes `RunResult.error`."""


@dataclass(frozen=True, slots=True)
class Identity:
    """The user a program runs as, with all its groups."""

    uid: int
    gid: int
    groups: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Command:
    """A checked command: `argv[0]` is an absolute path, nothing holds a NUL, the environment survives a shell."""

    argv: tuple[str, ...]
    env: dict[str, str]
    identity: Identity | None
    stdin: bytes
    needs: Needs = field(default_factory=Needs)
    secrets: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Started:
    """A running child. The pipes are non-blocking read ends; `pidfd` becomes readable when it exits (Linux 5.3).
    `status`: what bubblewrap tells, -1 for a run without it."""

    process: Child | subprocess.Popen[bytes]
    pidfd: int
    stdout: int
    stderr: int
    secret: str
    status: int = -1


def check(
    argv: Sequence[str],
    env: Mapping[str, str],
    user: str,
    stdin: bytes,
    needs: Needs | None = None,
    secrets: Mapping[str, str] | None = None,
) -> Command:
    """Checks what can be checked before anything is made. Raises CannotStart.

    A program name without "/" is looked for on the PATH of `env`. A file that is neither ELF nor begins with "#!" is
    refused, since a shell's exec would read it as a shell script.
    """
    if not argv:
        raise CannotStart("argv is empty: name a program")
    for at, argument in enumerate(argv):
        _check_text(f"argv[{at}]", argument)
    for name, value in env.items():
        if not NAME.fullmatch(name) or name in RESERVED or name.startswith(("LD_", "BASH_FUNC_")):
            raise CannotStart(f"environment variable {name!r} cannot be passed on: a loader or shell would act on it")
        _check_text(f"environment variable {name}", value)
    needs, secrets = needs or Needs(), dict(secrets or {})
    if wrong := namespaces.check(needs):
        raise CannotStart(wrong)
    if bad := [name for name in secrets if not NAME.fullmatch(name)]:
        raise CannotStart(f"secret {bad[0]!r}: not a possible name of an environment variable")
    program = _program(argv[0], env.get("PATH", DEFAULT_PATH))
    return Command((program, *argv[1:]), dict(env), _identity(user), stdin, needs, secrets)


def check_limits(limits: Limits) -> None:
    """Raises CannotStart for a limit that would mean no limit, or cannot be met by anything."""
    positive = ["cpu_quota_us", "cpu_period_us", "memory_bytes", "pids", "timeout_seconds", "open_files", "file_bytes"]
    wrong = [name for name in positive if not 0 < getattr(limits, name) < float("inf")]  # so that NaN fails too
    wrong += [name for name in ("swap_bytes", "output_bytes") if getattr(limits, name) < 0]
    if wrong:
        raise CannotStart(f"limits out of range: {', '.join(f'{n}={getattr(limits, n)}' for n in wrong)}")


def _check_text(what: str, text: str) -> None:
    if "\0" in text:
        raise CannotStart(f"{what} holds a NUL character, which no program can be given")
    try:
        os.fsencode(text)
    except UnicodeEncodeError as x:
        raise CannotStart(f"{what} cannot be encoded: {x.reason}") from x


def _program(name: str, path: str) -> str:
    if "/" in name:
        if not name.startswith("/"):
            raise CannotStart(f"{name!r}: a program is named by an absolute path or by a name on PATH")
        found: str | None = name
    else:
        found = shutil.which(name, path=path)
    if not found:
        raise CannotStart(f"{name!r}: no such program on PATH ({path})")
    try:
        with Path(found).open("rb") as f:
            head = f.read(4)
    except PermissionError:
        return found  # may be executable all the same; exec will tell
    except OSError as x:
        raise CannotStart(f"{found!r}: {x.strerror}") from x
    if head != b"\x7fELF" and not head.startswith(b"#!"):
        raise CannotStart(f"{found!r}: neither an ELF program nor a script that begins with #!")
    return found


def _identity(user: str) -> Identity | None:
    """The user by name or number; None when it is us already. Only root can become somebody else."""
    if not user:
        return None
    try:
        entry = pwd.getpwuid(int(user)) if user.isdecimal() else pwd.getpwnam(user)
    except (KeyError, ValueError, OverflowError) as x:
        raise CannotStart(f"no such user: {user!r}") from x
    if entry.pw_uid == os.geteuid():
        return None
    if os.geteuid() != 0:
        raise CannotStart(f"cannot run as {user!r}: only an agent that runs as root can change the user")
    groups = {entry.pw_gid, *(g.gr_gid for g in grp.getgrall() if entry.pw_name in g.gr_mem)}
    return Identity(entry.pw_uid, entry.pw_gid, tuple(sorted(groups)))


def spawn(
    command: Command,
    limits: Limits,
    workdir: Path,
    procs: Path | None,
    controllers: frozenset[str],
    profile: Profile | None = None,
) -> Started:
    """Starts the program in `workdir`, in the leaf whose cgroup.procs is `procs`. Returns when the launcher runs.

    Raises CannotStart or OSError. What a shell or bubblewrap in between cannot do is known only later (`launch_error`).
    """
    profile = profile or Profile()
    with contextlib.ExitStack() as ours, contextlib.ExitStack() as kept:
        (out, stdout), (err, stderr) = (_pipe(kept, ours) for _ in range(2))
        status, passed, prefix = -1, list[int](), list[str]()
        env = {**command.env, **_secret_files(command, passed, ours)}
        if profile.namespaced:
            status, told = _pipe(kept, ours)
            rules = _memory_file("seccomp", hardening.filter_code(profile), ours)
            passed += [told, rules]
            prefix = namespaces.arguments(
                namespaces.bubblewrap(), command.needs, limits, str(workdir), seccomp=rules, status=told,
                identity=command.identity is not None,
            )  # fmt: skip
            prefix += _become(command.identity)
        where = _Where(workdir, procs, _rlimits(limits, controllers), (_stdin(command.stdin, ours), stdout, stderr))
        if profile.locked:
            process: Child | subprocess.Popen[bytes]
            process, pidfd, secret = _by_shell(command, profile, where, env, prefix, passed)
        else:
            process = _directly(command, profile, where, env, prefix, passed)
            pidfd, secret = process.pidfd, ""
        kept.pop_all()
        return Started(process, pidfd, out, err, secret, status)


@dataclass(frozen=True, slots=True)
class _Where:
    """What a process starts with: directory, the leaf's cgroup.procs, rlimits by kind, descriptors 0 to 2."""

    workdir: Path
    procs: Path | None
    rlimits: dict[int, int]
    streams: tuple[int, int, int]


@dataclass(slots=True)
class Child:
    """A process started directly. `returncode` is set by who reaps it."""

    pid: int
    pidfd: int
    returncode: int | None = None


def _directly(
    command: Command, profile: Profile, where: _Where, env: dict[str, str], prefix: list[str], passed: list[int]
) -> Child:
    """By `sandbox.direct`: in its leaf from its first instruction, and nothing in between but `prefix`."""
    before, after = hardening.calls(profile)
    calls = list(before)
    if score := _oom_score():
        calls.append(Call("open", (direct.text("/proc/self/oom_score_adj"), os.O_WRONLY)))
        calls.append(Call("write", (0, direct.text(score), len(score)), direct.RESULT_FIRST))
    default = (ctypes.c_uint64 * 4)()  # struct kernel_sigaction of SIG_DFL: Python ignores these two
    calls += [Call("rt_sigaction", (number, default, 0, 8)) for number in (signal.SIGPIPE, signal.SIGXFSZ)]
    calls += [Call("dup3", (fd, to, 0)) for to, fd in enumerate(where.streams)]
    calls.append(Call("close_range", (3, 0xFFFFFFFF, 4)))  # CLOSE_RANGE_CLOEXEC
    calls += [Call("fcntl", (fd, 2, 0)) for fd in passed]  # F_SETFD: these stay open
    calls += [Call("setsid"), Call("chdir", (direct.text(str(where.workdir)),)), Call("umask", (0o022,))]
    for kind, value in where.rlimits.items():
        calls.append(Call("prlimit64", (0, kind, (ctypes.c_uint64 * 2)(value & _UNLIMITED, value & _UNLIMITED), 0)))
    if command.identity is not None and not profile.namespaced:
        user, group, groups = command.identity.uid, command.identity.gid, command.identity.groups
        calls.append(Call("setgroups", (len(groups), (ctypes.c_uint32 * len(groups))(*groups))))
        calls += [Call("setresgid", (group,) * 3), Call("setresuid", (user,) * 3)]
    argv = [*prefix, *command.argv]
    calls += [*after, direct.unmask(), direct.execute(argv, env)]
    cgroup = None if where.procs is None else os.open(where.procs.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return Child(*direct.start(calls, cgroup))
    except direct.Failed as x:
        what = repr(argv[0]) if x.call == "execve" else x.call
        hint = " (it, or the interpreter in its first line, is not found)" if x.number == errno.ENOENT else ""
        raise CannotStart(f"{what}: {os.strerror(x.number)}{hint}") from x
    finally:
        if cgroup is not None:
            os.close(cgroup)


def _by_shell(
    command: Command, profile: Profile, where: _Where, env: dict[str, str], prefix: list[str], passed: list[int]
) -> tuple[subprocess.Popen[bytes], int, str]:
    """By SCRIPT, in a thread that has given up what the program must not have."""
    hardening.lock_down(profile)
    secret = secrets.token_hex(8)
    argv = [SHELL, "-c", SCRIPT, secret, str(where.procs or ""), _oom_score(), *_ulimits(where.rlimits), *prefix]
    if command.identity is not None and not profile.namespaced:
        argv += [*_become(command.identity), SHELL, "-c", EXEC_ONLY, secret]
    stdin, stdout, stderr = where.streams
    process = subprocess.Popen(
        [*argv, *command.argv],
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        env=env,
        cwd=where.workdir,
        umask=0o022,
        start_new_session=True,
        pass_fds=passed,
    )
    try:
        return process, os.pidfd_open(process.pid), secret
    except OSError as x:
        process.kill()
        process.wait()
        raise CannotStart(f"pidfd_open: {x.strerror} (Linux 5.3 or newer is needed)") from x


def _secret_files(command: Command, passed: list[int], ours: contextlib.ExitStack) -> dict[str, str]:
    """Each secret in a file without a name. The program's environment holds the descriptor's number alone, `NAME_FD`:
    an environment is inherited, shown by /proc and printed by programs that fail."""
    numbers = {}
    for name, value in command.secrets.items():
        fd = _memory_file("secret", os.fsencode(value), ours)
        os.fchmod(fd, 0o600)  # libpq, for one, refuses a password file that others could read
        if command.identity is not None:
            os.fchown(fd, command.identity.uid, command.identity.gid)
        passed.append(fd)
        numbers[f"{name}_FD"] = str(fd)
    return numbers


def _memory_file(name: str, data: bytes, ours: contextlib.ExitStack) -> int:
    """A descriptor to read `data` from: a file in memory, so that no one has to feed a pipe while the program runs."""
    fd = _above(os.memfd_create(name, os.MFD_CLOEXEC))
    ours.callback(os.close, fd)
    with os.fdopen(os.dup(fd), "wb") as f:
        f.write(data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _above(fd: int) -> int:
    """The descriptor, moved away from 0, 1 and 2, which an agent may have been started without."""
    if fd > 2:
        return fd
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(fd)


def _pipe(kept: contextlib.ExitStack, ours: contextlib.ExitStack) -> tuple[int, int]:
    """A pipe whose read end, non-blocking, is closed with `kept` and whose write end with `ours`."""
    reading, writing = (_above(fd) for fd in os.pipe2(os.O_CLOEXEC))
    kept.callback(os.close, reading)
    ours.callback(os.close, writing)
    os.set_blocking(reading, False)
    return reading, writing


def launch_error(secret: str, exit_code: int, stderr: bytes, *, changed_user: bool, status: bytes | None = None) -> str:
    """Why the launcher did not get as far as the program, by its message on the child's stderr; "" if it did. `status`
    is what bubblewrap told, None without it; then the secret, which the program could see, means nothing."""
    line = stderr.decode(errors="replace").strip()
    if status is not None:
        if exit_code <= 0 or namespaces.began(status):
            return ""
        return line.splitlines()[0].removeprefix(f"{secret}: ") if line else "bubblewrap could not start it"
    if exit_code in (125, 126, 127) and line.startswith(f"{secret}: "):
        return re.sub(r"^(line )?\d+: (exec: )?", "", line.removeprefix(f"{secret}: ").splitlines()[0])
    if changed_user and exit_code == 127 and line.startswith("setpriv: ") and "\n" not in line:
        return line
    return ""


def _oom_score() -> str:
    """Zero if the agent protects itself from the OOM killer: inherited, that would exempt the payload too."""
    try:
        return "0" if int(Path("/proc/self/oom_score_adj").read_text()) < 0 else ""
    except OSError:
        return ""


def _rlimits(limits: Limits, controllers: frozenset[str]) -> dict[int, int]:
    """By kind of resource(7): no core dump, open files, file size, address space and CPU seconds.

    Address space and CPU time stand in for controllers that are missing. CPU seconds: what `cpu.max` would have let the
    program use before its timeout. None is above our own hard limit, which an unprivileged agent could not exceed.
    """
    share = limits.cpu_quota_us / limits.cpu_period_us
    wanted = {
        resource.RLIMIT_CORE: 1,  # less than any dump; 0 would still feed a core_pattern that is a pipe (core(5))
        resource.RLIMIT_NOFILE: limits.open_files,
        resource.RLIMIT_FSIZE: limits.file_bytes,
        resource.RLIMIT_AS: -1 if "memory" in controllers else limits.memory_bytes * ADDRESS_SPACE_FACTOR,
        resource.RLIMIT_CPU: -1 if "cpu" in controllers else int(limits.timeout_seconds * share) + 2,
    }
    hard = {kind: resource.getrlimit(kind)[1] for kind in wanted}
    return {kind: hard[kind] if value < 0 else value if hard[kind] < 0 else min(value, hard[kind])
            for kind, value in wanted.items()}  # fmt: skip


def _ulimits(rlimits: dict[int, int]) -> list[str]:
    """As the shell takes them: files by 512 bytes, address space by 1024."""
    units = {resource.RLIMIT_NOFILE: 1, resource.RLIMIT_FSIZE: 512, resource.RLIMIT_AS: 1024, resource.RLIMIT_CPU: 1}
    return ["unlimited" if rlimits[kind] < 0 else str(max(1, rlimits[kind] // unit)) for kind, unit in units.items()]


def _become(identity: Identity | None) -> list[str]:
    if identity is None:
        return []
    ids = [f"--reuid={identity.uid}", f"--regid={identity.gid}", f"--groups={','.join(map(str, identity.groups))}"]
    program = shutil.which("setpriv", path=DEFAULT_PATH)
    if program is None:
        raise CannotStart("cannot change the user: setpriv not found (Debian: apt-get install util-linux)")
    return [program, *ids, "--inh-caps=-all", "--no-new-privs", "--"]


def _stdin(data: bytes, ours: contextlib.ExitStack) -> int:
    if data:
        return _memory_file("stdin", data, ours)
    fd = _above(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    ours.callback(os.close, fd)
    return fd
