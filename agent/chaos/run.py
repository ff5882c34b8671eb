"""Many runs: which, in which order, and what has been done already.

Called by `alertmedic chaos run`. Arms are interleaved on the same faults with the same seeds, so that whatever the
machine does meanwhile does it to all of them. Results are appended to a file, one JSON object a line, synced after each
run: interrupted at any moment, the same command goes on where it stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from agent.chaos.arms import ARMS, Doings
from agent.chaos.follow import Job, follow
from agent.chaos.measure import VERSION, Run
from agent.chaos.scenario import Scenario
from agent.chaos.workload import UserWorkload, Workload, WorkloadFile
from agent.chaos.world import ChaosWorld
from agent.demo.children import WorldError

BASELINE_SECONDS = 25.0  # of healthy traffic before the first fault of a world
ATTEMPTS = 2  # at a run whose world broke
_decode = msgspec.json.Decoder(Run).decode


class ResultsError(Exception):
    """The file of results cannot be used; says which line of which file."""


@dataclass(frozen=True)
class Block:
    """Jobs of one arm that share a world."""

    arm: str
    jobs: tuple[Job, ...]


@dataclass
class Results:
    """The file of runs. A line that was cut short by a crash is dropped when it is the last, refused elsewhere."""

    path: Path
    runs: list[Run] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path) -> Results:
        """Raises ResultsError, OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        body = path.read_bytes() if path.exists() else b""
        whole, _, torn = body.rpartition(b"\n")
        runs = []
        for number, line in enumerate(whole.split(b"\n") if whole else (), 1):
            try:
                run = _decode(line)
            except msgspec.MsgspecError as error:
                raise ResultsError(
                    f"chaos: {path}:{number}: {error}; hint: move the file away to begin anew"
                ) from error
            if run.version != VERSION:
                raise ResultsError(f"chaos: {path}:{number}: version {run.version}, this is version {VERSION}")
            runs.append(run)
        if torn:
            os.truncate(path, len(body) - len(torn))
        return cls(path, runs)

    def add(self, run: Run) -> None:
        """Durable when it returns."""
        with self.path.open("ab") as file:
            file.write(msgspec.json.encode(run) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.runs.append(run)

    def has(self, job: Job) -> bool:
        return any(
            (r.scenario, r.arm, r.repetition, r.killed_agent)
            == (job.scenario.name, job.arm, job.repetition, job.kill_agent)
            for r in self.runs
        )


def plan(
    scenarios: Mapping[str, Scenario],
    arms: Sequence[str],
    *,
    repetitions: int = 1,
    seed: int = 1,
    share: int = 1,
    once: Sequence[str] = ("nothing",),
    kill_agent: bool = False,
) -> list[Block]:
    """All runs in order: by repetition, `share` scenarios at a time, every arm on these before the next ones. Arms in
    `once` are run in the first repetition only."""
    chance = random.Random(seed)  # noqa: S311 - an order, no secret
    blocks: list[Block] = []
    for repetition in range(1, repetitions + 1):
        names = list(scenarios)
        chance.shuffle(names)
        for start in range(0, len(names), share):
            seeds = {name: chance.randrange(1 << 30) for name in names[start : start + share]}
            order = [arm for arm in arms if repetition == 1 or arm not in once]
            chance.shuffle(order)
            for arm in order:
                jobs = tuple(Job(scenarios[n], arm, repetition, s, kill_agent) for n, s in seeds.items())
                blocks.append(Block(arm, jobs))
    return blocks


@dataclass
class Progress:
    """What is told while it runs: calls of `tell`, and an estimate of what is left from the runs so far."""

    total: int
    tell: Callable[[str, Run | None], None]
    done: int = 0
    spent: float = 0.0
    counted: int = 0

    def left(self) -> float | None:
        """Seconds, by the mean of the runs that this process made; None before the first."""
        return (self.total - self.done) * self.spent / self.counted if self.counted else None


OpenWorld = Callable[[str, int], AbstractAsyncContextManager[tuple[Workload, Doings]]]  # from arm and seed


async def run_all(blocks: Sequence[Block], results: Results, progress: Progress, open_world: OpenWorld) -> None:
    """Makes every run that the results do not hold yet. Raises WorldError when a run's world broke `ATTEMPTS` times."""
    progress.done = sum(results.has(job) for block in blocks for job in block.jobs)
    for block in blocks:
        left = [job for job in block.jobs if not results.has(job)]
        attempts = 0
        while left:
            try:
                async with open_world(block.arm, left[0].seed) as (world, doings):
                    while left:
                        began = time.monotonic()
                        run = await follow(world, left[0], doings)
                        results.add(run)
                        left.pop(0)
                        progress.done, progress.counted = progress.done + 1, progress.counted + 1
                        progress.spent += time.monotonic() - began
                        progress.tell(f"{run.scenario}/{run.arm}", run)
                        attempts = 0
            except WorldError as error:
                attempts += 1
                progress.tell(f"{left[0].key}: the world broke: {error}", None)
                if attempts >= ATTEMPTS:
                    raise


def in_shop(keep: bool = False) -> OpenWorld:
    """A freshly built shop for each block, with its arm at work. `keep`: leave its directory behind."""

    @contextlib.asynccontextmanager
    async def opened(arm: str, seed: int) -> AsyncIterator[tuple[Workload, Doings]]:
        async with ChaosWorld.running(seed % 10_000, keep) as world, world.browse.probing(), ARMS[arm](world) as doings:
            await asyncio.sleep(BASELINE_SECONDS)
            yield world, doings

    return opened


def in_workload(told: WorkloadFile, left_behind: Path) -> OpenWorld:
    """The user's own workload, with the agent that is there: the one arm there is."""

    @contextlib.asynccontextmanager
    async def opened(arm: str, seed: int) -> AsyncIterator[tuple[Workload, Doings]]:
        async with UserWorkload.running(told, left_behind) as workload:
            yield workload, Doings()

    return opened
