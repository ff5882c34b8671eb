"""Frees a disk that logs have filled. Action `disk.free_logs`.

Runs as `python -I -m actions.builtin.free_logs resolve|run|check --root DIR`. Removes rotated log files, oldest first,
until the file system is below the goal; where truncation is asked for, also empties live logs (their last part is kept
beside them). Every path is walked by descriptors with O_NOFOLLOW: no link is followed, the root and its mount are
never left. A file that somebody has open for writing is not removed: a read lease, which the kernel refuses while there
are writers, is held while it is unlinked (fcntl(2), F_SETLEASE). Files with several names are left alone, since one of
the names may be no log.

There is no undo: what is removed is gone. Prints what it freed.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import signal
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from actions.builtin import CANNOT_TELL, DONE, FAILED, NOTHING_DONE, crashed

MAX_DEPTH = 8
MAX_SEEN = 100_000
MAX_SHOWN = 50
TAIL_BYTES = 64 * 1024
LIVE = re.compile(r".+\.(log|out|err|jsonl)", re.DOTALL)
ROTATED = re.compile(
    r".+\.(log|out|err|jsonl)[.-](\d[\d.T_-]*)(\.(gz|xz|bz2|zst))?|.+\.log\.old|.+\.(log|out)\.(gz|xz|zst)", re.DOTALL
)
FORBIDDEN_ROOTS = (
    "/",
    "/bin",
    "/boot",
    "/dev",
    "/etc",
    "/home",
    "/lib",
    "/proc",
    "/root",
    "/run",
    "/sys",
    "/usr",
    "/var",
)


class RootError(Exception):
    """The root is not what was planned, or may not be one."""


@dataclass(frozen=True, slots=True)
class LogFile:
    directory: tuple[str, ...]  # names below the root
    name: str
    size: int
    modified: float
    device: int
    inode: int
    rotated: bool

    @property
    def path(self) -> str:
        return "/".join((*self.directory, self.name))


def open_root(root: str, identity: str, protected: tuple[str, ...]) -> int:
    """A descriptor of the root. `identity` is `dev:ino`, "" where none was planned yet. Raises RootError or OSError."""
    plain = os.path.normpath(root)
    # normpath keeps two leading slashes: POSIX lets them mean something else.
    absolute = root.startswith("/") and not root.startswith("//")
    if not absolute or plain != root.rstrip("/") or plain in FORBIDDEN_ROOTS:
        raise RootError(f"{root} may not be a root of logs")
    if is_protected(plain, protected):
        raise RootError(f"{root} is protected")
    fd = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for name in plain.strip("/").split("/"):  # no part of the way may be a link
        try:
            below = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
        finally:
            os.close(fd)
        fd = below
    found = os.fstat(fd)
    if identity and identity != f"{found.st_dev}:{found.st_ino}":
        os.close(fd)
        raise RootError(f"{root} is another directory than when the plan was made")
    return fd


def is_protected(path: str, globs: tuple[str, ...]) -> bool:
    """Whether the path or a directory above it matches a glob."""
    return any(fnmatchcase(path, glob) or fnmatchcase(path, glob.rstrip("/") + "/*") for glob in globs)


def walk(root: int) -> Iterator[LogFile]:
    """Log files below the root, without leaving its mount. Files that somebody links elsewhere too are left out."""
    mount, seen = mount_of(root), 0
    pending: list[tuple[str, ...]] = [()]
    while pending:
        directory = pending.pop()
        fd = open_below(root, directory)
        if fd is None:
            continue
        try:
            if mount_of(fd) != mount:
                continue
            with os.scandir(fd) as entries:
                for entry in entries:
                    seen += 1
                    if seen > MAX_SEEN:
                        return
                    try:
                        info = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:  # rotated away while we looked
                        continue
                    if stat.S_ISDIR(info.st_mode) and len(directory) < MAX_DEPTH:
                        pending.append((*directory, entry.name))
                    elif stat.S_ISREG(info.st_mode) and info.st_nlink == 1:
                        rotated = ROTATED.fullmatch(entry.name) is not None
                        if rotated or LIVE.fullmatch(entry.name):
                            # What the disk gets back; file systems that do not count blocks say 0.
                            size = info.st_blocks * 512 or info.st_size
                            yield LogFile(directory, entry.name, size, info.st_mtime, info.st_dev, info.st_ino, rotated)
        finally:
            os.close(fd)


def mount_of(fd: int) -> str:
    """The id of the mount that the descriptor is on (proc(5), fdinfo). Not the device: the files of an overlay may have
    others than its directories. Raises OSError, and ValueError where the kernel does not say."""
    with open(f"/proc/self/fdinfo/{fd}") as file:  # noqa: PTH123 - shorter to start than pathlib
        for line in file:
            if line.startswith("mnt_id:"):
                return line.split()[1]
    raise ValueError("the kernel does not name mounts")


def open_below(root: int, names: tuple[str, ...]) -> int | None:
    """A descriptor of a directory below the root, each part opened without following links; None if it is gone."""
    fd = os.dup(root)
    for name in names:
        try:
            below = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
        except OSError:
            return None
        finally:
            os.close(fd)
        fd = below
    return fd


def used_percent(root: int) -> float:
    """How full the file system is, as df(1) counts: what is reserved for root is not available."""
    fs = os.fstatvfs(root)
    used = fs.f_blocks - fs.f_bfree
    return 100.0 * used / max(1, used + fs.f_bavail)


def candidates(root: int, args: argparse.Namespace) -> list[LogFile]:
    """What may be freed, in the order in which it is: rotated files by age, then live ones by size."""
    now, globs = time.time(), protected_globs(args)
    files = [f for f in walk(root) if not is_protected(f"{args.root.rstrip('/')}/{f.path}", globs)]
    old = [f for f in files if f.rotated and now - f.modified >= args.min_age_seconds and f.size]
    live = [f for f in files if not f.rotated and f.size > 2 * TAIL_BYTES] if args.truncate == "yes" else []
    ordered = sorted(old, key=lambda f: f.modified) + sorted(live, key=lambda f: -f.size)
    return ordered[: args.max_files]


def protected_globs(args: argparse.Namespace) -> tuple[str, ...]:
    return tuple(g for g in args.protected_paths.split(",") if g)


def remove(root: int, file: LogFile) -> str:
    """Unlinks the file; "" or why not."""
    directory = open_below(root, file.directory)
    if directory is None:
        return "its directory has changed"
    try:
        fd = os.open(file.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        try:
            if not _same(os.fstat(fd), file) or mount_of(fd) != mount_of(root):
                return "it has been replaced"
            try:
                fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            except OSError:
                return "somebody may be writing to it"
            os.unlink(file.name, dir_fd=directory)
        finally:
            os.close(fd)  # ends the lease
    except OSError as error:
        return str(error.strerror)
    finally:
        os.close(directory)
    return ""


def truncate(root: int, file: LogFile, stamp: int) -> str:
    """Empties a live log after its last part has been read; writes that part beside it. "" or why not."""
    directory = open_below(root, file.directory)
    if directory is None:
        return "its directory has changed"
    try:
        fd = os.open(file.name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        try:
            info = os.fstat(fd)
            if not _same(info, file) or mount_of(fd) != mount_of(root):
                return "it has been replaced"
            tail = os.pread(fd, TAIL_BYTES, max(0, info.st_size - TAIL_BYTES))
            os.ftruncate(fd, 0)
        finally:
            os.close(fd)
        kept = os.open(
            f"{file.name}.{stamp}",
            os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC,
            stat.S_IMODE(info.st_mode) & 0o666,
            dir_fd=directory,
        )
        try:
            os.fchown(kept, info.st_uid, info.st_gid)
            os.write(kept, tail)
        finally:
            os.close(kept)
    except OSError as error:
        return str(error.strerror)
    finally:
        os.close(directory)
    return ""


def _same(info: os.stat_result, file: LogFile) -> bool:
    return (info.st_dev, info.st_ino) == (file.device, file.inode) and stat.S_ISREG(info.st_mode) and info.st_nlink == 1


def resolve(root: int, args: argparse.Namespace) -> int:
    found, used = candidates(root, args), used_percent(root)
    if used < args.goal_percent or not found:
        _say([])
        return DONE
    info = os.fstat(root)
    mib = sum(f.size for f in found) / 2**20
    note = f"{args.root}: {len(found)} log file(s), {mib:.1f} MiB; the file system is {used:.0f} % full"
    target = {"identity": f"root={args.root}", "params": {"root_id": f"{info.st_dev}:{info.st_ino}"}, "note": note}
    _say([target])
    return DONE


def run(root: int, args: argparse.Namespace) -> int:
    before, freed, done, kept = used_percent(root), 0, [], []
    for file in candidates(root, args):
        if used_percent(root) < args.goal_percent or freed >= args.max_bytes:
            break
        why = remove(root, file) if file.rotated else truncate(root, file, int(time.time()))
        if why:
            kept.append({"file": file.path, "why": why})
        else:
            freed += file.size
            done.append({"file": file.path, "bytes": file.size, "how": "removed" if file.rotated else "truncated"})
    after = used_percent(root)
    _say(
        {
            "freed_bytes": freed,
            "files": len(done),
            "used_percent": {"before": round(before, 1), "after": round(after, 1)},
            "done": done[:MAX_SHOWN],
            "kept": kept[:MAX_SHOWN],
        }
    )
    if not done and before >= args.goal_percent:
        return FAILED if kept else NOTHING_DONE
    return DONE


def check(root: int, args: argparse.Namespace) -> int:
    """It has happened when the goal is reached or nothing is left that could be freed."""
    used, left = used_percent(root), candidates(root, args)
    _say({"used_percent": round(used, 1), "left": len(left)})
    return DONE if used < args.goal_percent or not left else FAILED


def _say(value: Any) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=True) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("operation", choices=("resolve", "run", "check"))
    parser.add_argument("--root", required=True)
    parser.add_argument("--root-id", default="")
    parser.add_argument("--min-age-seconds", type=float, default=3600.0)
    parser.add_argument("--goal-percent", type=float, default=80.0)
    parser.add_argument("--max-files", type=int, default=1000)
    parser.add_argument("--max-bytes", type=int, default=2**40)
    parser.add_argument("--truncate", choices=("yes", "no"), default="no")
    parser.add_argument("--protected-paths", default="")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGIO, signal.SIG_IGN)  # comes when somebody opens a file while we hold its lease
    try:
        root = open_root(args.root, args.root_id, protected_globs(args))
    except RootError as error:
        sys.stderr.write(f"free_logs: {error}\n")
        return CANNOT_TELL if args.operation == "check" else NOTHING_DONE
    except OSError as error:
        sys.stderr.write(f"free_logs: {args.root}: {error.strerror}\n")
        return CANNOT_TELL if args.operation == "check" else FAILED
    try:
        return {"resolve": resolve, "run": run, "check": check}[args.operation](root, args)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"free_logs: {args.root}: {error}\n")
        return CANNOT_TELL if args.operation == "check" else FAILED
    finally:
        os.close(root)


if __name__ == "__main__":
    sys.excepthook = crashed
    sys.exit(main())
