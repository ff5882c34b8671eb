"""The order of runs, how many worlds there are at once, and the file that makes them resumable."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import pytest
from chaos_runs import run
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.chaos.arms import WITH_AGENT
from agent.chaos.faults import known
from agent.chaos.follow import Job
from agent.chaos.measure import Run
from agent.chaos.run import Block, Progress, Results, ResultsError, made_by, place_for_worlds, plan, run_all
from agent.chaos.scenario import load_scenarios
from agent.chaos.world import HARNESS_FAULTS
from agent.commands.chaos import report
from agent.demo.children import WorldError

SCENARIOS = load_scenarios(None, known() | HARNESS_FAULTS)
ARMS = ("nothing", "liveness", "command", "auto", "approve")


def test_every_arm_gets_every_scenario_once_a_repetition_with_the_same_seed() -> None:
    blocks = plan(SCENARIOS, ARMS, repetitions=3, seed=7, share=3)
    jobs = [job for block in blocks for job in block.jobs]
    assert len({job.key for job in jobs}) == len(jobs)
    for repetition in (1, 2, 3):
        for name, scenario in SCENARIOS.items():
            mine = [j for j in jobs if (j.scenario.name, j.repetition) == (name, repetition)]
            assert len({j.seed for j in mine}) == 1
            # Where nothing is broken the arms without an agent are run once; doing nothing is always run once.
            usual = WITH_AGENT if scenario.control else set(ARMS) - {"nothing"}
            assert {j.arm for j in mine} == (set(ARMS) if repetition == 1 else usual)
    assert plan(SCENARIOS, ARMS, repetitions=3, seed=7, share=3) == blocks
    assert plan(SCENARIOS, ARMS, repetitions=3, seed=8, share=3) != blocks


def test_arms_are_interleaved() -> None:
    """Before any arm goes on to the next scenarios, every other one has had these."""
    blocks = plan(SCENARIOS, ARMS, repetitions=1, seed=3, share=2)
    for start in range(0, len(blocks), len(ARMS)):
        group = blocks[start : start + len(ARMS)]
        assert {b.arm for b in group} == set(ARMS)
        assert len({tuple(j.scenario.name for j in b.jobs) for b in group}) == 1


def test_exclusive_scenarios_share_no_block_with_others() -> None:
    blocks = plan(SCENARIOS, ARMS, repetitions=2, seed=3, share=4)
    assert any(b.alone for b in blocks)
    assert any(not b.alone for b in blocks)
    for block in blocks:
        assert {j.scenario.exclusive for j in block.jobs} == {block.alone}


def _run_of(job: Job) -> Run:
    return run(job.scenario.name, job.arm, job.repetition, seed=job.seed, killed_agent=job.kill_agent)


class Worlds:
    """Makes runs without a world, and watches how many there are at once."""

    def __init__(self, breaks: Callable[[Job], bool] = lambda job: False) -> None:
        self.breaks = breaks
        self.active: dict[int, bool] = {}
        self.most = 0
        self.made: list[str] = []

    async def __call__(self, block: Block, slot: int) -> AsyncGenerator[Run, None]:
        assert slot not in self.active
        assert not self.active or not (block.alone or any(self.active.values()))
        self.active[slot] = block.alone
        self.most = max(self.most, len(self.active))
        try:
            for job in block.jobs:
                for _ in range(1 + job.seed % 4):
                    await asyncio.sleep(0)
                if self.breaks(job):
                    raise WorldError("the shop burnt down")
                self.made.append(job.key)
                yield _run_of(job)
        finally:
            del self.active[slot]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 1000), st.integers(1, 4), st.integers(1, 5), st.integers(0, 60))
def test_interrupted_anywhere_and_with_any_worlds_every_run_is_made_once(
    tmp_path_factory: pytest.TempPathFactory, seed: int, worlds: int, share: int, until: int
) -> None:
    blocks = plan(SCENARIOS, ARMS, repetitions=1, seed=seed, share=share)
    wanted = Counter(job.key for b in blocks for job in b.jobs)
    path = tmp_path_factory.mktemp("runs") / "runs.jsonl"
    first, second = Worlds(), Worlds()

    async def interrupted() -> None:
        with Results.writing(path) as results:
            going: asyncio.Task[None]

            def tell(what: str, made: Run | None) -> None:
                if len(results.runs) >= until:
                    going.cancel()

            progress = Progress(wanted.total(), tell)
            going = asyncio.ensure_future(run_all(blocks, results, progress, first, worlds))
            await asyncio.wait((going,))

    asyncio.run(interrupted())
    assert not first.active
    with Results.writing(path) as results:
        done = len(results.runs)
        progress = Progress(wanted.total(), lambda what, made: None)
        asyncio.run(run_all(blocks, results, progress, second, worlds))
        assert progress.done == progress.total
        assert progress.left() in (None, 0.0)
    assert len(second.made) == wanted.total() - done
    assert first.most <= worlds
    assert second.most <= worlds
    found = Counter(f"{r.scenario}/{r.arm}/{r.repetition}" for r in Results.open(path).runs)
    assert found == wanted


async def test_a_world_that_breaks_is_built_again_and_then_left_for_another_time(tmp_path: Path) -> None:
    blocks = plan(SCENARIOS, ARMS, repetitions=1, seed=3, share=2)
    broken: Counter[str] = Counter()

    def once(job: Job) -> bool:
        broken[job.key] += 1
        return broken[job.key] == 1

    worlds = Worlds(once)
    results = Results.open(tmp_path / "runs.jsonl")
    total = sum(len(b.jobs) for b in blocks)
    await run_all(blocks, results, Progress(total, lambda what, made: None), worlds, 3)
    assert len(results.runs) == total

    told: list[str] = []
    worlds = Worlds(lambda job: (job.scenario.name, job.arm) == ("db_lock", "auto"))
    results = Results.open(tmp_path / "others.jsonl")
    with pytest.raises(WorldError, match="burnt down"):
        await run_all(blocks, results, Progress(total, lambda what, made: told.append(what)), worlds, 3)
    left = next(b for b in blocks if b.arm == "auto" and any(j.scenario.name == "db_lock" for j in b.jobs))
    assert {j.key for b in blocks for j in b.jobs if not results.has(j)} <= {j.key for j in left.jobs}
    assert any("db_lock" in line and "burnt down" in line for line in told)

    worlds = Worlds(lambda job: True)
    results = Results.open(tmp_path / "none.jsonl")
    with pytest.raises(WorldError, match="burnt down"):
        await run_all(blocks, results, Progress(total, lambda what, made: None), worlds, 3)
    assert not worlds.active
    assert not results.runs


HARNESS = """
import asyncio, sys, time
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from agent.chaos.run import Progress, Results, plan, run_all
from test_chaos_run import ARMS, SCENARIOS, Worlds
blocks = plan(SCENARIOS, ARMS, repetitions=1, seed=5, share=2)
def tell(what, made):
    print(what, flush=True)
    time.sleep(0.002)
with Results.writing(Path(sys.argv[1])) as results:
    asyncio.run(run_all(blocks, results, Progress(0, tell), Worlds(), 3))
"""


@pytest.mark.parametrize("after", [1, 7, 23])
def test_a_killed_harness_goes_on_exactly_where_it_was(after: int, tmp_path: Path) -> None:
    """kill -9 between any two moments: what was told is in the file, and nothing is in it twice at the end."""
    path, here = tmp_path / "runs.jsonl", str(Path(__file__).parent)
    argv = [sys.executable, "-c", HARNESS, str(path), here]
    child = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    told = [child.stdout.readline() for _ in range(after)]
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    kept = Results.open(path).runs
    assert len(kept) >= len(told)
    subprocess.run(argv, check=True, capture_output=True, timeout=60)
    runs = Results.open(path).runs
    assert runs[: len(kept)] == kept
    wanted = [job.key for b in plan(SCENARIOS, ARMS, repetitions=1, seed=5, share=2) for job in b.jobs]
    assert sorted(f"{r.scenario}/{r.arm}/{r.repetition}" for r in runs) == sorted(wanted)


def test_one_file_of_results_has_one_writer(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    with Results.writing(path), pytest.raises(ResultsError, match="another chaos run"), Results.writing(path):
        pass
    with Results.writing(path):
        pass


def test_a_report_keeps_all_there_is_to_keep_and_is_made_again_from_it(tmp_path: Path) -> None:
    results = Results.open(tmp_path / "runs.jsonl")
    for made in (run("db_lock", story=("a", "b")), run("db_lock", "liveness", recovered=None)):
        results.add(made)
    assert report(results.path, as_json=True, out=tmp_path / "one") == 0
    packed = tmp_path / "one" / "runs.jsonl.gz"
    assert Results.open(packed).runs == results.runs
    assert report(packed, as_json=True, out=tmp_path / "two") == 0
    for name in ("report.html", "summary.json", "runs.jsonl.gz"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    with pytest.raises(ResultsError, match="gunzip"), Results.writing(packed):
        pass
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(ResultsError, match=r"runs\.jsonl\.gz"):
        Results.open(packed)


def test_what_a_killed_harness_left_of_its_worlds_is_removed(tmp_path: Path) -> None:
    with place_for_worlds(tmp_path / "runs.jsonl", keep=True) as place:
        (place / "world-0").mkdir()
    with place_for_worlds(tmp_path / "other.jsonl", keep=False) as other:
        assert other != place
        assert (place / "world-0").exists()
    with place_for_worlds(tmp_path / "runs.jsonl", keep=False) as again:
        assert again == place
        assert not list(again.iterdir())
    assert not place.exists()


def test_a_run_says_what_made_it() -> None:
    assert made_by() == made_by()
    assert " packs " in made_by()


def test_results_survive_a_torn_line_and_know_what_was_done(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    results = Results.open(path)
    results.add(run("db_lock"))
    results.add(run("cpu_hog", "liveness"))
    with path.open("ab") as file:
        file.write(b'{"scenario": "bad_fl')
    again = Results.open(path)
    assert again.runs == results.runs
    assert again.has(Job(SCENARIOS["db_lock"], "auto", 1, 99))
    assert not again.has(Job(SCENARIOS["db_lock"], "auto", 2, 99))
    assert not again.has(Job(SCENARIOS["db_lock"], "auto", 1, 99, kill_agent=True))
    again.add(run("bad_flag"))
    assert len(Results.open(path).runs) == 3


def test_a_broken_line_in_the_middle_is_refused_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    Results.open(path).add(run())
    path.write_bytes(b"nonsense\n" + path.read_bytes())
    with pytest.raises(ResultsError, match=r"runs.jsonl:1: "):
        Results.open(path)


def test_the_estimate_knows_arms_worlds_and_what_runs_alone() -> None:
    blocks = plan(SCENARIOS, ("liveness", "auto"), repetitions=1, seed=3, share=2)
    progress = Progress(sum(len(b.jobs) for b in blocks), lambda what, made: None, worlds=2)
    progress.begin(blocks, lambda job: job.scenario.name != "db_lock" and not job.scenario.exclusive)
    alone = sum(s.exclusive for s in SCENARIOS.values())
    assert progress.left() is None
    lock = next(b for b in blocks if b.arm == "auto" and any(j.scenario.name == "db_lock" for j in b.jobs))
    progress.made(lock, 40.0)
    left = progress.left()
    # A run of liveness beside others, and all that run alone; no run of liveness was made, so all take the usual time.
    assert left == pytest.approx(40.0 / 2 + 2 * alone * 40.0)
