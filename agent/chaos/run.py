"""Many runs: which, in which order, how many worlds at once, and what has been done already.

Called by `alertmedic chaos run`. Arms are interleaved on the same faults with the same seeds, so that whatever the
machine does meanwhile does it to all of them; with several worlds at once they stand side by side. What burns the
machine's CPU, memory or disks runs alone. Results are appended to a file, one JSON object a line, synced after each
run, by this process only: interrupted at any moment, the same command goes on where it stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gzip
import hashlib
import itertools
import os
import random
import shutil
import subprocess
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import msgspec

from agent.chaos.arms import WITH_AGENT, Doings
from agent.chaos.block import runs_in_shop
from agent.chaos.follow import Job, follow
from agent.chaos.isolation import Keeping, Task, TaskJob, runs_of
from agent.chaos.measure import VERSION, Run
from agent.chaos.scenario import Scenario
from agent.chaos.workload import UserWorkload, WorkloadFile
from agent.demo.children import WorldError

ATTEMPTS = 2  # at a run whose world broke; then its block is left for the next time
GIVEN_UP = 3  # blocks so left, and it is no accident any more: everything ends
ROOT = Path(__file__).parents[2]
_decode = msgspec.json.Decoder(Run).decode


class ResultsError(Exception):
    """The file of results cannot be used; says which line of which file."""


@dataclass(frozen=True)
class Block:
    """Jobs of one arm that share a world. `alone`: no other world may run meanwhile."""

    arm: str
    jobs: tuple[Job, ...]
    alone: bool = False


@dataclass
class Results:
    """The file of runs. A line that was cut short by a crash is dropped when it is the last, refused elsewhere. Packed
    (`.gz`) it can be read."""

    path: Path
    runs: list[Run] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path) -> Results:
        """Raises ResultsError, OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        body = _body(path)
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
        if torn and path.suffix != ".gz":
            os.truncate(path, len(body) - len(torn))
        return cls(path, runs)

    @classmethod
    @contextlib.contextmanager
    def writing(cls, path: Path) -> Iterator[Results]:
        """Like `open`, for the one process at a time that adds to the file. Raises ResultsError if there is another."""
        if path.suffix == ".gz":
            raise ResultsError(f"chaos: {path} is packed; hint: gunzip it to go on")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ResultsError(f"chaos: {path}: another chaos run adds to it; hint: --results FILE") from error
            yield cls.open(path)

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


def _body(path: Path) -> bytes:
    """Raises ResultsError for what is no packed file."""
    body = path.read_bytes() if path.exists() else b""
    try:
        return gzip.decompress(body) if path.suffix == ".gz" else body
    except (OSError, EOFError, zlib.error) as error:
        raise ResultsError(f"chaos: {path}: {error}") from error


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
    """All runs in order: by repetition, `share` scenarios at a time, every arm on these before the next ones; what must
    run alone comes last in its repetition, and a world whose clock can be set is shared with nothing else. Arms in
    `once` are run in the first repetition only, and so are controls in arms without the agent: nothing is broken there,
    and the comparison of arms is over what is."""
    chance = random.Random(seed)  # noqa: S311 - an order, no secret
    blocks: list[Block] = []
    for repetition in range(1, repetitions + 1):
        names = list(scenarios)
        chance.shuffle(names)
        for alone, clock in itertools.product((False, True), repeat=2):
            mine = [n for n in names if (scenarios[n].exclusive, scenarios[n].sets_clock) == (alone, clock)]
            for start in range(0, len(mine), share):
                seeds = {name: chance.randrange(1 << 30) for name in mine[start : start + share]}
                order = [arm for arm in arms if repetition == 1 or arm not in once]
                chance.shuffle(order)
                for arm in order:
                    wanted = [n for n in seeds if repetition == 1 or arm in WITH_AGENT or not scenarios[n].control]
                    jobs = tuple(Job(scenarios[n], arm, repetition, seeds[n], kill_agent) for n in wanted)
                    blocks += [Block(arm, jobs, alone)] if jobs else []
    return blocks


@dataclass
class Progress:
    """What is told while it runs: calls of `tell`, and an estimate of what is left from the runs so far."""

    total: int
    tell: Callable[[str, Run | None], None]
    worlds: int = 1
    done: int = 0
    waiting: Counter[tuple[str, bool]] = field(default_factory=Counter)  # jobs by arm and whether they run alone
    spent: dict[str, list[float]] = field(default_factory=dict)  # seconds of runs made by this process, by arm

    def begin(self, blocks: Iterable[Block], has: Callable[[Job], bool]) -> None:
        self.waiting = Counter((b.arm, b.alone) for b in blocks for job in b.jobs if not has(job))
        self.done = self.total - self.waiting.total()

    def made(self, block: Block, seconds: float) -> None:
        self.done += 1
        self.waiting[block.arm, block.alone] -= 1
        self.spent.setdefault(block.arm, []).append(seconds)

    def left(self) -> float | None:
        """Seconds, by the mean of the runs that this process made of each arm (of all, for an arm that had none yet),
        as many at once as there are worlds, but for those that run alone; None before the first."""
        every = [s for seconds in self.spent.values() for s in seconds]
        if not every:
            return None

        def usual(arm: str) -> float:
            seconds = self.spent.get(arm, every)
            return sum(seconds) / len(seconds)

        return sum(n * usual(arm) / (1 if alone else self.worlds) for (arm, alone), n in self.waiting.items())


MakeRuns = Callable[
    [Block, int], AsyncGenerator[Run, None]
]  # of a block, in the slot of that number: each as it is done


async def run_all(
    blocks: Sequence[Block], results: Results, progress: Progress, make: MakeRuns, worlds: int = 1
) -> None:
    """Makes every run that the results do not hold yet, up to `worlds` blocks at once, begun in their order. Raises
    WorldError for blocks whose world broke `ATTEMPTS` times at a run: after the others, or if there are `GIVEN_UP`."""
    progress.worlds = worlds
    progress.begin(blocks, results.has)
    active: dict[asyncio.Task[None], tuple[int, bool]] = {}  # slot, alone
    broken: list[WorldError] = []
    try:
        for block in blocks:
            if all(results.has(job) for job in block.jobs):
                continue
            while active and (block.alone or len(active) >= worlds or any(alone for _, alone in active.values())):
                await _one_less(active, broken)
            slot = min(set(range(worlds)) - {taken for taken, _ in active.values()})
            active[asyncio.ensure_future(_run_block(block, slot, results, progress, make))] = slot, block.alone
        while active:
            await _one_less(active, broken)
    finally:
        for task in active:
            task.cancel()
        await asyncio.gather(*active, return_exceptions=True)
    if broken:
        raise broken[-1]


async def _one_less(active: dict[asyncio.Task[None], tuple[int, bool]], broken: list[WorldError]) -> None:
    done, _ = await asyncio.wait(active, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        del active[task]
        try:
            task.result()
        except WorldError as error:
            broken.append(error)
            if len(broken) >= GIVEN_UP:
                raise


async def _run_block(block: Block, slot: int, results: Results, progress: Progress, make: MakeRuns) -> None:
    attempts = 0
    while left := [job for job in block.jobs if not results.has(job)]:
        began = time.monotonic()
        try:
            async with aclosing(make(Block(block.arm, tuple(left), block.alone), slot)) as runs:
                async for run in runs:
                    results.add(run)
                    progress.made(block, time.monotonic() - began)
                    progress.tell(f"{run.scenario}/{run.arm}", run)
                    attempts, began = 0, time.monotonic()
        except WorldError as error:
            attempts += 1
            first = next(job for job in block.jobs if not results.has(job))
            progress.tell(f"{first.key}: the world broke: {error}", None)
            if attempts >= ATTEMPTS:
                raise


# -- where runs are made -----------------------------------------------------------------------------------------------


def in_worlds(keeping: Keeping, place: Path | None) -> MakeRuns:
    """A freshly built shop for each block: in a child with namespaces of its own, its temporary files in a directory of
    its own below `place`; in this process where `place` is None."""
    cpus = sorted(os.sched_getaffinity(0))

    def make(block: Block, slot: int) -> AsyncGenerator[Run, None]:
        cpu = cpus[-1 - slot % len(cpus)]  # the one that `orders` is pinned to: worlds side by side take different ones
        if place is None:
            return runs_in_shop(block.arm, block.jobs, keeping, cpu)
        jobs = tuple(TaskJob.of(job) for job in block.jobs)
        task = Task(arm=block.arm, jobs=jobs, cpu=cpu, keeping=keeping)
        return runs_of(task, place / f"world-{slot}")

    return make


def in_workload(told: WorkloadFile, left_behind: Path, made_by: str) -> MakeRuns:
    """The user's own workload, with the agent that is there: the one arm there is, in this process."""

    async def make(block: Block, slot: int) -> AsyncGenerator[Run, None]:
        async with UserWorkload.running(told, left_behind) as workload:
            for job in block.jobs:
                run = await follow(workload, job, Doings())
                yield msgspec.structs.replace(run, made_by=made_by)

    return make


@contextlib.contextmanager
def place_for_worlds(results: Path, keep: bool) -> Iterator[Path]:
    """A directory for worlds, named by the file of results: what a killed run of the same file left in it is removed,
    which is safe while that file is held (`Results.writing`)."""
    name = hashlib.sha256(os.fsencode(results.resolve())).hexdigest()[:12]
    place = Path(tempfile.gettempdir()) / f"chaos-{os.geteuid()}-{name}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    place.chmod(0o711)  # PostgreSQL's user must be able to walk through
    try:
        yield place
    finally:
        if not keep:
            shutil.rmtree(place, ignore_errors=True)


def made_by() -> str:
    """What makes a run: the version (of the repository, where this is a clone), and a digest of packs and model."""
    version = metadata.version("alertmedic")
    git = shutil.which("git")
    if git is not None and (ROOT / ".git").exists():
        describe = (git, "-C", str(ROOT), "describe", "--always", "--dirty", "--tags")
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            version = subprocess.run(describe, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    digest = hashlib.sha256()
    for path in sorted(
        p for d in ("rules", "actions") for p in (ROOT / d).rglob("*") if p.suffix in (".yaml", ".json")
    ):
        if "golden" not in path.parts:
            digest.update(os.fsencode(path.relative_to(ROOT)) + b"\0" + path.read_bytes())
    return f"{version} packs {digest.hexdigest()[:12]}"
