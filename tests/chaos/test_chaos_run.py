"""The order of runs, and the file that makes them resumable."""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos_runs import run

from agent.chaos.faults import known
from agent.chaos.follow import Job
from agent.chaos.run import Progress, Results, ResultsError, plan
from agent.chaos.scenario import load_scenarios
from agent.chaos.world import HARNESS_FAULTS

SCENARIOS = load_scenarios(None, known() | HARNESS_FAULTS)
ARMS = ("nothing", "liveness", "command", "auto", "approve")


def test_every_arm_gets_every_scenario_once_a_repetition_with_the_same_seed() -> None:
    blocks = plan(SCENARIOS, ARMS, repetitions=3, seed=7, share=3)
    jobs = [job for block in blocks for job in block.jobs]
    assert len({job.key for job in jobs}) == len(jobs) == len(SCENARIOS) * (5 + 4 + 4)
    for repetition in (1, 2, 3):
        for name in SCENARIOS:
            seeds = {j.seed for j in jobs if (j.scenario.name, j.repetition) == (name, repetition)}
            assert len(seeds) == 1
    assert {j.repetition for j in jobs if j.arm == "nothing"} == {1}
    assert plan(SCENARIOS, ARMS, repetitions=3, seed=7, share=3) == blocks
    assert plan(SCENARIOS, ARMS, repetitions=3, seed=8, share=3) != blocks


def test_arms_are_interleaved() -> None:
    """Before any arm goes on to the next scenarios, every other one has had these."""
    blocks = plan(SCENARIOS, ARMS, repetitions=1, seed=3, share=2)
    for start in range(0, len(blocks), len(ARMS)):
        group = blocks[start : start + len(ARMS)]
        assert {b.arm for b in group} == set(ARMS)
        assert len({tuple(j.scenario.name for j in b.jobs) for b in group}) == 1


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


def test_the_estimate_comes_from_this_process_runs_only() -> None:
    progress = Progress(10, lambda what, made: None, done=4)
    assert progress.left() is None
    progress.done, progress.counted, progress.spent = 6, 2, 100.0
    assert progress.left() == pytest.approx(200.0)
