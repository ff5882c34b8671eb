"""The frame of a shipped program: operations, exit codes, bounded output, and the official tools that it calls.

Used by the programs beside it, one per technology. A program states its options and one function per operation
(`resolve`, `run`, `check`, `undo`); each prints one JSON document with `say` and returns an exit code, or raises one of
the errors below. Nothing here knows a technology.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from actions.builtin import CANNOT_TELL, DONE, FAILED, NOTHING_DONE, crashed, proc, secret
from actions.builtin.proc import Process

TOOL_SECONDS = 15.0
TOOL_OUTPUT = 4 * 1024 * 1024
MAX_DOCUMENT = 60 * 1024  # below the sandbox's bound, so that the document stays whole
POLL_SECONDS = 0.05
TOOL_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

Operation = Callable[[argparse.Namespace], int]


class Refused(Exception):  # noqa: N818 - what it is called everywhere
    """The target is not what was planned, or must not be touched; nothing was changed."""


class Trouble(Exception):  # noqa: N818
    """The target could not be asked, or did not do what it was told: perhaps half-way."""


def say(value: Any) -> None:
    """One JSON document on a line. What is longer than the bound becomes a note of its length."""
    text = json.dumps(value, ensure_ascii=True)
    if len(text) > MAX_DOCUMENT:
        text = json.dumps({"too_long": len(text), "begins": text[:2000]})
    sys.stdout.write(text + "\n")


def target(identity: str, note: str, **params: Any) -> int:
    """What `resolve` prints for one target."""
    say([{"identity": identity, "params": params, "note": note}])
    return DONE


def nothing_to_do() -> int:
    """What `resolve` prints when there is no target."""
    say([])
    return DONE


def options(*operations: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("operation", choices=operations)
    return parser


def execute(parser: argparse.ArgumentParser, operations: Mapping[str, Operation]) -> int:
    """Runs the operation that the arguments name and turns what it raises into an exit code.

    A refusal of a check says that the target has changed, so it cannot tell; a refusal of a look-up is a protected
    target.
    """
    sys.excepthook = crashed
    args = parser.parse_args()
    checking = args.operation == "check"
    try:
        return operations[args.operation](args)
    except Refused as refusal:
        say({"refused": str(refusal)})
        return CANNOT_TELL if checking else NOTHING_DONE
    except (Trouble, OSError, ValueError, KeyError, IndexError, subprocess.SubprocessError) as error:
        what = str(error) if not isinstance(error, KeyError) else f"{error} is absent"
        sys.stderr.write(f"{parser.prog}: {args.operation}: {shorten(what)}\n")
        return CANNOT_TELL if checking else FAILED


def find(*names: str) -> str:
    """The first of the programs that is installed. Raises Trouble."""
    for name in names:
        if found := shutil.which(name, path=TOOL_PATH):
            return found
    raise Trouble(f"{' or '.join(names)} is not installed")


def tool(
    argv: Sequence[str],
    *,
    keep: Iterable[str] = (),
    more: Mapping[str, str] | None = None,
    stdin: str | None = None,
    seconds: float = TOOL_SECONDS,
) -> str:
    """The standard output of a tool. It gets a fixed environment, the variables that `keep` names, and `more`.
    Raises Trouble when it cannot be started, takes too long, fails, or says too much."""
    env = {"PATH": TOOL_PATH, "LANG": "C.UTF-8", "HOME": os.environ.get("HOME", "/nonexistent")}
    env |= {name: value for name in keep if (value := secret(name))}
    env |= more or {}
    given = b"" if stdin is None else stdin.encode()
    try:
        done = subprocess.run(list(argv), input=given, capture_output=True, timeout=seconds, env=env, check=False)
    except subprocess.TimeoutExpired as error:
        raise Trouble(f"{argv[0]}: no end after {seconds:g} s") from error
    text, errors = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    if done.returncode != 0:
        raise Trouble(f"{argv[0]} ended with {done.returncode}: {shorten(errors or text, 600)}")
    if len(text) > TOOL_OUTPUT:
        raise Trouble(f"{argv[0]} printed {len(text)} characters, more than {TOOL_OUTPUT}")
    return text


def wait_for(condition: Callable[[], bool], seconds: float, every: float = POLL_SECONDS) -> bool:
    """Whether the condition came true within the time; it is looked at again and again, with pauses between."""
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(every)
    return met


def shorten(text: str, limit: int = 400) -> str:
    """One printable line of at most `limit` characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def server_of(pid_file: str, names: Sequence[str]) -> Process:
    """The living process that a pid file names. Its program must be called one of `names`: a stale file may name
    anybody. Raises Refused and OSError."""
    with Path(pid_file).open() as file:
        text = file.read(64).split()
    if not text or not text[0].isdecimal() or int(text[0]) <= 1:
        raise Refused(f"{pid_file} names no process")
    found = proc.read(int(text[0]))
    if found is None or not found.alive or found.name not in names:
        raise Refused(f"{pid_file}: pid {text[0]} is no living {' or '.join(names)}")
    return found


def identity_of(process: Process) -> str:
    """`pid:start`, the start in ticks since boot: names the process for good."""
    return f"{process.pid}:{process.start}"


def same_server(pid_file: str, names: Sequence[str], planned: str) -> Process:
    """The server of the pid file, if it is still the planned process. Raises Refused."""
    found = server_of(pid_file, names)
    if identity_of(found) != planned:
        raise Refused(f"{pid_file}: the server is {identity_of(found)} now, planned was {planned}")
    return found


def signal_process(process: Process, number: int) -> None:
    """Signals exactly this process, through a pidfd whose process has just been compared. Raises Refused."""
    import signal

    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        raise Refused(f"pid {process.pid} has ended") from None
    try:
        now = proc.read(process.pid)
        if now is None or now.start != process.start:
            raise Refused(f"pid {process.pid} is another process now")
        signal.pidfd_send_signal(fd, number)
    except ProcessLookupError:
        raise Refused(f"pid {process.pid} has ended") from None
    finally:
        os.close(fd)
