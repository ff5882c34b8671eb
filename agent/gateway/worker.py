"""The other side of a process channel: one diagnosis engine in a process of its own, with limits.

Run as `python -m agent.gateway.worker` by `agent.gateway.channel` with two pipes. It ends with its parent, is the first
to be killed when memory runs out, and gives way to everything else (idle class, nice 19, idle I/O). What the engine
prints goes nowhere. A question may take so much memory as a diagnosis of its evidence could need, and ends the process
when it wants more: page faults are the one thing an idle process can slow its neighbours with.

Frames are a length (u32, big-endian) and as many bytes. The first frame is JSON (`Setting`), answered when the packs
are read. Each further frame is a pickled `Situation` (the parent is trusted, the engine need not be); the answer is
JSON: `{"diagnosis": ...}` or `{"error": ...}`.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import pickle
import resource
import signal
import struct
import sys
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

LENGTH = struct.Struct(">I")
MAX_FRAME = 1 << 30
PR_SET_PDEATHSIG = 1
OUT_OF_MEMORY = 12  # exit status: ENOMEM
# What a question may take beyond what the engine holds already. Measured: 60 MiB for the largest public incident, and
# less than 10 times its evidence for large ones.
QUESTION_BYTES = 128 * 1024 * 1024
QUESTION_TIMES = 16
IOPRIO_SET = {"x86_64": 251, "aarch64": 30}  # there is no wrapper in any C library
IOPRIO_IDLE = 3 << 13


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    dirs: tuple[str, ...] = ()
    disable: tuple[str, ...] = ()
    model: str = ""
    engine: str = ""  # module:function of (situation, packs); "": ours
    memory_bytes: int = 0
    path: tuple[str, ...] = ()  # where modules are looked for


def version_of(setting: Setting, version: str) -> str:
    """The version of packs and model, and a digest of the files of one's own: an edited pack is another channel,
    whether or not its author counted its version up. Reads files; raises OSError."""
    files = [path for d in setting.dirs for path in sorted(Path(d).iterdir()) if path.suffix == ".yaml"]
    files += [Path(setting.model)] if setting.model else []
    if not files:
        return version
    digest = blake2b(digest_size=6)
    for path in files:
        digest.update(blake2b(path.read_bytes()).digest())
    return f"{version} #{digest.hexdigest()}"


def read_frame(source: BinaryIO) -> bytes:
    """Raises EOFError when the other side is gone."""
    head = source.read(LENGTH.size)
    if len(head) < LENGTH.size:
        raise EOFError
    body = source.read(LENGTH.unpack(head)[0])
    if len(body) < LENGTH.unpack(head)[0]:
        raise EOFError
    return body


def _limit(setting: Setting, parent: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before that was set
        os._exit(1)
    os.nice(19)
    if (number := IOPRIO_SET.get(os.uname().machine)) is not None:
        ctypes.CDLL(None).syscall(number, 1, 0, IOPRIO_IDLE)
    Path("/proc/self/oom_score_adj").write_text("1000")
    resource.setrlimit(resource.RLIMIT_AS, (setting.memory_bytes, setting.memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _data_bytes() -> int:
    """What counts against RLIMIT_DATA now; 0 where nobody says."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "VmData":
            return int(rest.split()[0]) * 1024
    return 0


def _question_limit(held: int, size: int) -> None:
    """The question's own memory limit, by what was `held` before the first one and the `size` of the evidence."""
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (held + QUESTION_BYTES + QUESTION_TIMES * size, most))


def _lift_limit() -> None:
    """Between questions: how large the next one is, is not known."""
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def _engine(setting: Setting) -> tuple[Callable[[Any], Any], str]:
    """What to ask, and its version; "": each answer brings its own."""
    from agent.packs import load_packs

    packs = load_packs([Path(d) for d in setting.dirs], setting.disable, Path(setting.model) if setting.model else None)
    if setting.engine:
        module, _, name = setting.engine.partition(":")
        function = getattr(importlib.import_module(module), name)
        return lambda situation: function(situation, packs), ""
    from rules.diagnose import diagnose

    return lambda situation: diagnose(situation, packs), version_of(setting, packs.version)


def _answer(diagnose: Callable[[Any], Any], body: bytes) -> bytes:
    try:
        return msgspec.json.encode({"diagnosis": diagnose(pickle.loads(body))})  # noqa: S301 - from the parent alone
    except MemoryError:
        os._exit(OUT_OF_MEMORY)  # all of it goes back at once, and a start is held back; an answer would be no better
    except Exception as error:  # noqa: BLE001 - whatever an engine raises is its answer
        return msgspec.json.encode({"error": f"{type(error).__name__}: {error}"[:500]})


def main() -> None:
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    setting = msgspec.json.decode(read_frame(source), type=Setting)
    sys.path[:0] = [p for p in setting.path if p not in sys.path]
    _limit(setting, int(sys.argv[1]))
    try:
        diagnose, version = _engine(setting)
        first = msgspec.json.encode({"version": version})
    except Exception as error:  # noqa: BLE001 - told to the parent, which is told to the person
        diagnose, first = None, msgspec.json.encode({"error": f"{type(error).__name__}: {error}"[:500]})
    held = _data_bytes()
    while True:
        sink.write(LENGTH.pack(len(first)) + first)
        sink.flush()
        if diagnose is None:
            return
        try:
            body = read_frame(source)
        except EOFError:
            return
        _question_limit(held, len(body))
        first = _answer(diagnose, body)
        _lift_limit()


if __name__ == "__main__":
    main()
