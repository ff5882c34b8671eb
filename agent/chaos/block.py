"""The child that holds one world: makes the runs of one block in it and tells them, one JSON object a line.

Run by `agent.chaos.isolation` as `python -m agent.chaos.block`, PID 1 of its own namespaces, with its task on standard
input. It ends, and its whole world with it, when its work is done, when the world breaks, or when its input ends: then
the harness wants it to, or is no more. It writes no results: the harness does, in one place.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import os
import socket
import struct
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import BinaryIO

import msgspec

from agent.chaos.aftermath import done_twice, keep_recording, records_since
from agent.chaos.arms import ARMS, WITH_AGENT
from agent.chaos.follow import Job, follow
from agent.chaos.isolation import Keeping, Task, Told
from agent.chaos.measure import Run
from agent.chaos.world import ChaosWorld, ClockWorld
from agent.demo.children import WorldError

BASELINE_SECONDS = 25.0  # of healthy traffic before the first fault of a world
PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 47, 4  # prctl(2)
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 0x1  # netdevice(7)


async def runs_in_shop(arm: str, jobs: Sequence[Job], keeping: Keeping, cpu: int) -> AsyncGenerator[Run, None]:
    """Builds a shop with its arm at work and makes the jobs' runs in it. Raises WorldError."""
    kind = ClockWorld if any(job.scenario.sets_clock for job in jobs) else ChaosWorld
    async with kind.running(jobs[0].seed % 10_000, keeping.worlds, cpu) as world, world.browse.probing():
        world.keeps_looks = bool(keeping.record)
        async with ARMS[arm](world) as doings:
            await asyncio.sleep(BASELINE_SECONDS)
            for job in jobs:
                run = msgspec.structs.replace(await follow(world, job, doings), made_by=keeping.made_by)
                yield await asyncio.to_thread(_looked_back, world, job, run, keeping) if arm in WITH_AGENT else run


def _looked_back(world: ChaosWorld, job: Job, run: Run, keeping: Keeping) -> Run:
    """The run with what the agent's journal says of it; its recording is kept where that is wanted."""
    records = records_since(world.state_dir, run.at)
    if keeping.record and not run.void:
        keep_recording(run, job.scenario, records, world.looks, Path(keeping.record))
    return msgspec.structs.replace(run, repeated=done_twice(records))


def settle_in() -> None:
    """Brings the loopback up and gives up the capabilities that this took. Raises WorldError, OSError."""
    if os.getpid() != 1 or not Path("/proc/1/cmdline").read_bytes().startswith(os.fsencode(sys.executable)):
        raise WorldError("chaos: a block is run by `alertmedic chaos run`, in a PID namespace with its own /proc")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        request = struct.pack("16sh22x", b"lo", 0)
        flags = struct.unpack_from("16xh", fcntl.ioctl(asking, SIOCGIFFLAGS, request))[0]
        fcntl.ioctl(asking, SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", flags | IFF_UP))
    if os.geteuid() != 0:  # root keeps what it has on the host
        ctypes.CDLL(None, use_errno=True).prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)


async def serve(out: BinaryIO) -> int:
    """Reads the task, makes its runs, and watches for the end of its input meanwhile."""
    lines = asyncio.StreamReader(limit=16 * 1024 * 1024)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    first = await lines.readline()
    if not first:
        return 0
    task = msgspec.json.decode(first, type=Task)
    work = asyncio.ensure_future(_work(task, out))
    end = asyncio.ensure_future(lines.read())
    await asyncio.wait((work, end), return_when=asyncio.FIRST_COMPLETED)
    end.cancel()
    if not work.done():
        work.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await work
        return 130
    return work.result()


async def _work(task: Task, out: BinaryIO) -> int:
    jobs = [job.job(task.arm) for job in task.jobs]
    try:
        async with aclosing(runs_in_shop(task.arm, jobs, task.keeping, task.cpu)) as runs:
            async for run in runs:
                _tell(out, Told(run=run))
    except WorldError as error:
        _tell(out, Told(broken=str(error)))
        return 1
    _tell(out, Told(done=True))
    return 0


def _tell(out: BinaryIO, told: Told) -> None:
    with contextlib.suppress(BrokenPipeError):  # the harness is gone; the end of our input says so too
        out.write(msgspec.json.encode(told) + b"\n")
        out.flush()


def main(argv: list[str]) -> int:
    try:
        settle_in()
    except (WorldError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    if argv == ["--try"]:
        return 0
    # Only runs may be told on standard output: whatever else writes there goes where errors go.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return asyncio.run(serve(out))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
