"""Starting one program so that its first instruction runs inside its limits.

Called by `sandbox.execution` in a thread of `threads()`. A `preexec_fn` would do it too, but makes Python fork instead
of vfork: 27 ms a start with a 500 MB parent. So a fixed shell script enters the leaf, sets the rlimits and execs the
program; all it gets arrives as positional parameters, which the shell passes on without reading them. The no_new_privs
flag costs no program at all: it belongs to the thread that starts the child, which inherits it.

Never parses a command, never looks at what a program is for, and never lets a descriptor through but 0, 1 and 2.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import grp
import os
import pwd
import re
import resource
import secrets
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sandbox.model import Limits

SHELL = "/bin/sh"
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PR_SET_NO_NEW_PRIVS = 38  # prctl(2)
MAX_RUNS = 64
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


@dataclass(frozen=True, slots=True)
class Started:
    """A running child. The pipes are non-blocking read ends; `pidfd` becomes readable when it exits (Linux 5.3)."""

    process: subprocess.Popen[bytes]
    pidfd: int
    stdout: int
    stderr: int
    secret: str


@functools.cache
def threads() -> ThreadPoolExecutor:
    """Where everything of the sandbox that blocks is done, a thread for each run; further runs wait for their turn.
    These threads give up privileges for ever (`_no_new_privs`) and must therefore serve nothing else."""
    return ThreadPoolExecutor(max_workers=MAX_RUNS, thread_name_prefix="sandbox")


def check(argv: Sequence[str], env: Mapping[str, str], user: str, stdin: bytes) -> Command:
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
    return Command((_program(argv[0], env.get("PATH", DEFAULT_PATH)), *argv[1:]), dict(env), _identity(user), stdin)


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
    if not shutil.which("setpriv", path=DEFAULT_PATH):
        raise CannotStart("cannot change the user: setpriv not found (Debian: apt-get install util-linux)")
    groups = {entry.pw_gid, *(g.gr_gid for g in grp.getgrall() if entry.pw_name in g.gr_mem)}
    return Identity(entry.pw_uid, entry.pw_gid, tuple(sorted(groups)))


def spawn(command: Command, limits: Limits, workdir: Path, procs: Path | None, controllers: frozenset[str]) -> Started:
    """Starts the program in `workdir`, in the leaf whose cgroup.procs is `procs`. Returns when the launcher runs.

    Raises CannotStart or OSError. What the launcher itself cannot do is said on the child's stderr (`launch_error`).
    """
    _no_new_privs()
    secret = secrets.token_hex(8)
    argv = [SHELL, "-c", SCRIPT, secret, str(procs or ""), _oom_score(), *_rlimits(limits, controllers)]
    argv += [*_become(command.identity, secret), *command.argv]
    with contextlib.ExitStack() as ours, contextlib.ExitStack() as kept:
        stdin = _stdin(command.stdin)
        ours.callback(os.close, stdin)
        (out, stdout), (err, stderr) = (_pipe(kept, ours) for _ in range(2))
        process = subprocess.Popen(
            argv,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=command.env,
            cwd=workdir,
            umask=0o022,
            start_new_session=True,
        )
        try:
            pidfd = os.pidfd_open(process.pid)
        except OSError as x:
            process.kill()
            process.wait()
            raise CannotStart(f"pidfd_open: {x.strerror} (Linux 5.3 or newer is needed)") from x
        kept.pop_all()
        return Started(process, pidfd, out, err, secret)


def _pipe(kept: contextlib.ExitStack, ours: contextlib.ExitStack) -> tuple[int, int]:
    """A pipe whose read end, non-blocking, is closed with `kept` and whose write end with `ours`."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    kept.callback(os.close, reading)
    ours.callback(os.close, writing)
    os.set_blocking(reading, False)
    return reading, writing


def launch_error(secret: str, exit_code: int, stderr: bytes, *, changed_user: bool) -> str:
    """Why the launcher did not get as far as the program, by its message on the child's stderr; "" if it did."""
    line = stderr.decode(errors="replace").strip()
    if exit_code in (125, 126, 127) and line.startswith(f"{secret}: "):
        return re.sub(r"^(line )?\d+: (exec: )?", "", line.removeprefix(f"{secret}: ").splitlines()[0])
    if changed_user and exit_code == 127 and line.startswith("setpriv: ") and "\n" not in line:
        return line
    return ""


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _no_new_privs() -> None:
    """Sets the flag for this thread, hence for all it will start; there is no way back (prctl(2))."""
    if _libc().prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise CannotStart(f"no_new_privs cannot be set: {os.strerror(ctypes.get_errno())}")


def _oom_score() -> str:
    """Zero if the agent protects itself from the OOM killer: inherited, that would exempt the payload too."""
    try:
        return "0" if int(Path("/proc/self/oom_score_adj").read_text()) < 0 else ""
    except OSError:
        return ""


def _rlimits(limits: Limits, controllers: frozenset[str]) -> list[str]:
    """Open files, file size (512-byte blocks), address space (KiB) and CPU seconds, as ulimit takes them.

    Address space and CPU time stand in for controllers that are missing. CPU seconds: what `cpu.max` would have let the
    program use before its timeout. None is above our own hard limit, which an unprivileged agent could not exceed.
    """
    address = "unlimited" if "memory" in controllers else str(limits.memory_bytes * ADDRESS_SPACE_FACTOR // 1024)
    share = limits.cpu_quota_us / limits.cpu_period_us
    seconds = "unlimited" if "cpu" in controllers else str(int(limits.timeout_seconds * share) + 2)
    return [
        _below(str(limits.open_files), resource.RLIMIT_NOFILE, 1),
        _below(str(-(-limits.file_bytes // 512)), resource.RLIMIT_FSIZE, 512),
        _below(address, resource.RLIMIT_AS, 1024),
        _below(seconds, resource.RLIMIT_CPU, 1),
    ]


def _below(wanted: str, kind: int, unit: int) -> str:
    hard = resource.getrlimit(kind)[1]
    if hard == resource.RLIM_INFINITY:
        return wanted
    return str(hard // unit if wanted == "unlimited" else min(int(wanted), hard // unit))


def _become(identity: Identity | None, secret: str) -> list[str]:
    if identity is None:
        return []
    ids = [f"--reuid={identity.uid}", f"--regid={identity.gid}", f"--groups={','.join(map(str, identity.groups))}"]
    program = shutil.which("setpriv", path=DEFAULT_PATH) or "setpriv"
    return [program, *ids, "--inh-caps=-all", "--no-new-privs", "--", SHELL, "-c", EXEC_ONLY, secret]


def _stdin(data: bytes) -> int:
    """A descriptor to read `data` from: a file in memory, so that no one has to feed a pipe while the program runs."""
    if not data:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    fd = os.memfd_create("stdin", os.MFD_CLOEXEC)
    with os.fdopen(os.dup(fd), "wb") as f:
        f.write(data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd
