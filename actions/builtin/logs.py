"""Looks at, cleans and rotates files below a declared root. Actions `diagnostic.log_capture`, `disk.clean_by_age` and
`disk.rotate_log`.

Runs as `python -I -m actions.builtin.logs resolve|run|check --mode capture|clean|rotate --root DIR`. Every path is
walked by descriptors without following links, as in `actions.builtin.free_logs`; the root and its mount are never left.

capture (read-only): the last lines of the youngest logs, secrets masked, printable and bounded. clean: removes files
whose name matches a declared pattern and that are older than an age; what is open for writing or has several names
stays. rotate: renames one log to `NAME.TIME`, makes an empty one in its place and tells the writer to open it anew, by
the signal that it knows for that; without an answer of the writer nothing is lost, since it goes on writing to the old
file.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import stat
import sys
import time
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from actions.builtin import CANNOT_TELL, DONE, FAILED, proc
from actions.builtin.free_logs import (
    MAX_DEPTH,
    MAX_SEEN,
    LogFile,
    RootError,
    is_protected,
    mount_of,
    open_below,
    open_root,
    remove,
    walk,
)
from actions.builtin.program import (
    Refused,
    execute,
    identity_of,
    nothing_to_do,
    options,
    say,
    shorten,
    signal_process,
    target,
    wait_for,
)

MAX_FILES = 4
TAIL_BYTES = 32 * 1024
SIGNALS = {"HUP": signal.SIGHUP, "USR1": signal.SIGUSR1, "USR2": signal.SIGUSR2}
MASK = "[masked]"
SECRETS = (
    re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{6,}"),
    re.compile(r"(?i)\b[\w.-]*(?:passw(?:or)?d|passwd|pwd|secret|token|api[_-]?key|access[_-]?key|credential|cookie|session(?:id)?)"
               r"[\w.-]*[\"']?\s*[=:]\s*(?:\"[^\"]*\"|'[^']*'|[^\s,;&\"']+)"),
    re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"),
    re.compile(r"\b[A-Za-z0-9._%+-]+@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+\b"),
    re.compile(r"\beyJ[A-Za-z0-9_-]{6,}\.[A-Za-z0-9_-]{5,}\.?[A-Za-z0-9_-]*"),
    re.compile(r"\b(?:AKIA|ASIA|ghp_|gho_|xox[abp]-|sk-)[A-Za-z0-9_-]{10,}"),
    re.compile(r"\b(?:\d[ -]?){13,19}\b"),
    re.compile(r"\b[A-Fa-f0-9]{32,}\b"),
)  # fmt: skip


def masked(line: str) -> str:
    """The line, printable, without what looks like a secret or a person."""
    for pattern in SECRETS:
        line = pattern.sub(MASK, line)
    return shorten(line, 500)


def root_of(args: argparse.Namespace) -> int:
    try:
        return open_root(args.root, args.root_id, globs(args))
    except RootError as error:
        raise Refused(str(error)) from error


def globs(args: argparse.Namespace) -> tuple[str, ...]:
    return tuple(g for g in args.protected_paths.split(",") if g)


def root_id(root: int) -> str:
    info = os.fstat(root)
    return f"{info.st_dev}:{info.st_ino}"


def tail(root: int, file: LogFile, lines: int) -> list[str]:
    directory = open_below(root, file.directory)
    if directory is None:
        return []
    try:
        fd = os.open(file.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    except OSError:
        return []
    finally:
        os.close(directory)
    try:
        info = os.fstat(fd)
        if (info.st_dev, info.st_ino) != (file.device, file.inode):
            return []
        text = os.pread(fd, TAIL_BYTES, max(0, info.st_size - TAIL_BYTES)).decode(errors="replace")
    finally:
        os.close(fd)
    found = text.splitlines()[1 if info.st_size > TAIL_BYTES else 0 :]
    return [masked(line) for line in found[-lines:]]


def run_capture(args: argparse.Namespace) -> int:
    root = root_of(args)
    files = [f for f in walk(root) if not f.rotated and not is_protected(f"{args.root}/{f.path}", globs(args))]
    files.sort(key=lambda f: -f.modified)
    shown: dict[str, Any] = {}
    left = 48 * 1024
    for file in files[:MAX_FILES]:
        lines = tail(root, file, args.lines)
        while lines and sum(map(len, lines)) > left:
            lines.pop(0)
        left -= sum(map(len, lines))
        shown[shorten(file.path, 200)] = lines
    say({"files": len(files), "lines": shown})
    return DONE


def old_files(root: int, args: argparse.Namespace) -> list[LogFile]:
    now = time.time()
    found = [
        f
        for f in everything(root)
        if fnmatchcase(f.name, args.pattern)
        and now - f.modified >= args.min_age_seconds
        and not is_protected(f"{args.root.rstrip('/')}/{f.path}", globs(args))
    ]
    return sorted(found, key=lambda f: f.modified)[: args.most]


def everything(root: int) -> Iterator[LogFile]:
    """Plain files of one name below the root, on its mount."""
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
                    except FileNotFoundError:
                        continue
                    if stat.S_ISDIR(info.st_mode) and len(directory) < MAX_DEPTH:
                        pending.append((*directory, entry.name))
                    elif stat.S_ISREG(info.st_mode) and info.st_nlink == 1:
                        size = info.st_blocks * 512 or info.st_size
                        yield LogFile(directory, entry.name, size, info.st_mtime, info.st_dev, info.st_ino, True)
        finally:
            os.close(fd)


def resolve_clean(args: argparse.Namespace) -> int:
    root = root_of(args)
    found = old_files(root, args)
    if not found:
        return nothing_to_do()
    mib = sum(f.size for f in found) / 2**20
    note = (
        f"{args.root}: {len(found)} file(s) like {args.pattern}, {mib:.1f} MiB, older than {args.min_age_seconds:g} s"
    )
    return target(f"root={args.root}", note, root_id=root_id(root))


def run_clean(args: argparse.Namespace) -> int:
    root = root_of(args)
    done, kept, freed = [], [], 0
    for file in old_files(root, args):
        if why := remove(root, file):
            kept.append({"file": shorten(file.path, 200), "why": why})
        else:
            freed += file.size
            done.append(shorten(file.path, 200))
    say({"freed_bytes": freed, "files": len(done), "removed": done[:40], "kept": kept[:40]})
    if not done and not kept:
        raise Refused("no file is that old any more")
    return DONE if done else FAILED


def check_clean(args: argparse.Namespace) -> int:
    left = old_files(root_of(args), args)
    say({"left": len(left)})
    return FAILED if left else DONE


def writer(args: argparse.Namespace) -> Any:
    """The process that the pid file names: it must have the log open for writing. Raises Refused."""
    with open(args.pid_file) as file:  # noqa: PTH123 - shorter to start than pathlib
        text = file.read(64).strip()
    process = proc.read(int(text)) if text.isdecimal() and int(text) > 1 else None
    if process is None or not process.alive:
        raise Refused(f"{args.pid_file} names no living process")
    return process


def log_file(root: int, args: argparse.Namespace) -> os.stat_result:
    info = os.stat(args.file, dir_fd=root, follow_symlinks=False)
    if not stat.S_ISREG(info.st_mode) or info.st_nlink != 1:
        raise Refused(f"{args.file} is no plain file of one name")
    return info


def holds(process: Any, info: os.stat_result) -> bool:
    """Whether the process has the file open."""
    for name in os.listdir(f"/proc/{process.pid}/fd"):  # noqa: PTH208 - names only
        try:
            found = os.stat(f"/proc/{process.pid}/fd/{name}")  # noqa: PTH116
        except OSError:
            continue
        if (found.st_dev, found.st_ino) == (info.st_dev, info.st_ino):
            return True
    return False


def resolve_rotate(args: argparse.Namespace) -> int:
    root = root_of(args)
    info = log_file(root, args)
    if info.st_size < args.min_bytes:
        return nothing_to_do()
    process = writer(args)
    if not holds(process, info):
        raise Refused(f"pid {process.pid} ({process.name}) does not write to {args.file}")
    note = f"{args.file}: {info.st_size / 2**20:.1f} MiB, written by pid {process.pid} ({process.name})"
    return target(
        f"log={args.root}/{args.file}", note, root_id=root_id(root), inode=info.st_ino, writer=identity_of(process)
    )


def run_rotate(args: argparse.Namespace) -> int:
    root = root_of(args)
    info, process = log_file(root, args), writer(args)
    if info.st_ino != args.inode or identity_of(process) != args.writer:
        raise Refused(f"{args.file} or its writer is another one than when the plan was made")
    rotated = f"{args.file}.{int(time.time())}"
    os.link(args.file, rotated, src_dir_fd=root, dst_dir_fd=root, follow_symlinks=False)  # fails if it is there
    fresh = f".{args.file}.alertmedic"
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=root)
    try:
        os.fchmod(fd, stat.S_IMODE(info.st_mode))
        if (info.st_uid, info.st_gid) != (os.geteuid(), os.getegid()):
            os.fchown(fd, info.st_uid, info.st_gid)
    finally:
        os.close(fd)
    os.rename(fresh, args.file, src_dir_fd=root, dst_dir_fd=root)
    signal_process(process, SIGNALS[args.signal])
    moved = wait_for(lambda: not holds(process, info), args.seconds)
    say({"rotated": rotated, "bytes": info.st_size, "writer_moved": moved})
    return DONE if moved else FAILED


def check_rotate(args: argparse.Namespace) -> int:
    info = log_file(root_of(args), args)
    say({"inode": info.st_ino})
    if info.st_ino == args.inode:
        return FAILED
    return DONE if holds(writer(args), info) else CANNOT_TELL


MODES = {
    "capture": {"run": run_capture},
    "clean": {"resolve": resolve_clean, "run": run_clean, "check": check_clean},
    "rotate": {"resolve": resolve_rotate, "run": run_rotate, "check": check_rotate},
}


def main() -> int:
    signal.signal(signal.SIGIO, signal.SIG_IGN)  # comes when somebody opens a file while we hold its lease
    parser = options("resolve", "run", "check")
    parser.add_argument("--mode", choices=tuple(MODES), required=True)
    parser.add_argument("--root", required=True)
    parser.add_argument("--root-id", default="")
    parser.add_argument("--protected-paths", default="")
    parser.add_argument("--lines", type=int, default=50)
    parser.add_argument("--pattern", default="")
    parser.add_argument("--min-age-seconds", type=float, default=86400.0)
    parser.add_argument("--most", type=int, default=1000)
    parser.add_argument("--file", default="")
    parser.add_argument("--pid-file", default="")
    parser.add_argument("--signal", choices=tuple(SIGNALS), default="HUP")
    parser.add_argument("--min-bytes", type=int, default=1)
    parser.add_argument("--inode", type=int, default=0)
    parser.add_argument("--writer", default="")
    parser.add_argument("--seconds", type=float, default=5.0, help="for the writer to open the new file")

    def act(args: argparse.Namespace) -> int:
        return MODES[args.mode][args.operation](args)

    return execute(parser, dict.fromkeys(("resolve", "run", "check"), act))


if __name__ == "__main__":
    sys.exit(main())
