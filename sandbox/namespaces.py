"""The namespace layer: a program sees a read-only root, its own /tmp, /dev and /proc, and what it said it needs.

Called by `sandbox.launcher` for runs whose `Needs` restrict anything, and by `sandbox.hardening` to find out whether it
works here. bubblewrap does the work: an old, small, audited program that every Debian has. Never used for a run that
needs the whole host, since then it would hold nothing.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from sandbox.model import Limits, Needs

OWN_PROCESSES = 2  # bubblewrap itself, and the first process of a PID namespace; they count in pids.max
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@functools.cache
def bubblewrap() -> str:
    """The program's path, "" without it."""
    return shutil.which("bwrap", path=_SYSTEM_PATH) or ""


@functools.cache
def unavailable() -> str:
    """Why there is no namespace layer on this host; "" if there is. Found out by doing it once (some 10 ms)."""
    program = bubblewrap()
    if not program:
        return "bubblewrap not found (Debian: apt-get install bubblewrap)"
    trial = Needs(network="none", processes="own", write=())
    command = [*arguments(program, trial, Limits(), "/", seccomp=-1, status=-1, identity=False), "/bin/true"]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as x:
        return f"bubblewrap failed: {x}"
    if done.returncode != 0:
        return f"bubblewrap failed: {done.stderr.strip()[:300] or done.returncode}"
    return ""


def arguments(
    program: str, needs: Needs, limits: Limits, workdir: str, *, seccomp: int, status: int, identity: bool
) -> list[str]:
    """The command line up to and without the program. `seccomp`, `status`: descriptors that bubblewrap gets, -1 for
    none; `identity`: something behind it changes the user. `workdir` becomes a file system in memory of
    `limits.file_bytes`, so that nothing written there reaches a disk, and all of it together has a bound."""
    argv = [program, "--die-with-parent", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    argv += ["--unshare-net"] if needs.network == "none" else []
    argv += ["--unshare-pid"] if needs.processes == "own" else []
    everything = "/" in needs.write
    argv += ["--bind" if everything else "--ro-bind", "/", "/", "--dev", "/dev"]
    if needs.processes == "own":  # bubblewrap leaves some of the host's settings writable to root
        argv += ["--proc", "/proc"]
        argv += [w for name in ("sys", "sysrq-trigger") for w in ("--ro-bind-try", f"/proc/{name}", f"/proc/{name}")]
    else:
        argv += ["--ro-bind", "/proc", "/proc"]
    if Path("/sys/fs/cgroup").is_dir():
        argv += ["--ro-bind", "/sys", "/sys"]
    hidden = ["/tmp"]  # noqa: S108 - a private one takes its place
    argv += ["--size", str(limits.file_bytes), "--perms", "1777", "--tmpfs", hidden[0]]
    if needs.network == "none":
        hidden.append("/run")  # the sockets of the host's daemons
        argv += ["--tmpfs", "/run"]
    argv += [w for place in _own_places() if place.startswith(tuple(f"{h}/" for h in hidden)) for w in _shown(place)]
    for path in needs.write:
        argv += [] if path == "/" else ["--bind", path, path]
    if workdir != "/":
        argv += ["--size", str(limits.file_bytes), "--perms", "1777", "--tmpfs", workdir, "--chdir", workdir]
    argv += ["--seccomp", str(seccomp)] if seccomp >= 0 else []
    argv += ["--json-status-fd", str(status)] if status >= 0 else []
    if os.geteuid() == 0:
        argv += ["--cap-drop", "ALL"]
        argv += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"] if identity else []
    return [*argv, "--"]


def _own_places() -> list[str]:
    """Our interpreter and our code, which most actions run: they may lie where a private directory hides them."""
    return sorted({sys.prefix, sys.base_prefix, str(Path(__file__).resolve().parents[1])})


def _shown(place: str) -> tuple[str, str, str]:
    return ("--ro-bind", place, place)


def began(status: bytes) -> bool:
    """Whether the program behind bubblewrap ran, by what it wrote to its status descriptor: it tells an exit code of
    nothing that it could not start."""
    for line in status.splitlines():
        try:
            if "exit-code" in json.loads(line):
                return True
        except ValueError:
            continue  # cut off when bubblewrap was killed
    return False


def check(needs: Needs) -> str:
    """What is wrong with the paths of `needs`; "" if nothing."""
    for path in needs.write:
        if not path.startswith("/") or re.search(r"(^|/)\.\.(/|$)", path) or "\0" in path:
            return f"needs.write: {path!r} is no absolute path"
        if not Path(path).exists():
            return f"needs.write: {path} does not exist"
    return ""
