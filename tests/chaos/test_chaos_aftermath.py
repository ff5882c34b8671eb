"""What a run left behind: a journal in which nothing was done twice, and recordings that evaluation can read."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from chaos_runs import run

from actions.model import Plan, Step, StepMoved, StepState
from agent import golden
from agent.chaos import block
from agent.chaos.aftermath import CHECKED, done_twice, keep_recording
from agent.chaos.arms import Doings
from agent.chaos.follow import Job
from agent.chaos.isolation import Keeping
from agent.chaos.measure import Run
from agent.chaos.scenario import load_scenarios
from agent.evaluate import evaluate, find_cases
from agent.journal.records import Diagnosed, PlanMade, Record, StepRecorded
from agent.journal.wal import Wal
from agent.packs import load_packs
from agent.sources.recorded import read_recording
from agent.store import journal_directory
from rules.diagnose import diagnose

S = StepState
RAN = [(S.PLANNED, S.INTENT), (S.INTENT, S.RAN), (S.RAN, S.VERIFIED)]
CRASHED = [(S.PLANNED, S.INTENT), (S.INTENT, S.UNKNOWN)]
STORIES: dict[str, tuple[list[tuple[S, S, str]], str]] = {
    "once": ([(*m, "") for m in RAN], ""),
    "crashed, found done": ([*((*m, "") for m in CRASHED), (S.UNKNOWN, S.RAN, "found by its check")], ""),
    "crashed, found not done": (
        [*((*m, "") for m in CRASHED), (S.UNKNOWN, S.PLANNED, CHECKED), *((*m, "") for m in RAN)],
        "",
    ),
    "crashed, repeated blindly": (
        [*((*m, "") for m in CRASHED), (S.UNKNOWN, S.PLANNED, "it may be repeated"), *((*m, "") for m in RAN)],
        "nobody had looked",
    ),
    "repeated after it ran": ([*((*m, "") for m in RAN[:2]), *((*m, "") for m in RAN)], "though it had taken effect"),
    "undone, then done": (
        [*((*m, "") for m in RAN[:2]), (S.RAN, S.UNDOING, ""), (S.UNDOING, S.UNDONE, ""), *((*m, "") for m in RAN)],
        "",
    ),
}


def plan(id: str = "plan-1", *, idempotent: bool = False, read_only: bool = False) -> PlanMade:
    step = Step(
        action="service.restart.supervisord",
        version=1,
        target="service=worker",
        argv=("true",),
        idempotent=idempotent,
        read_only=read_only,
    )
    made = Plan(
        id=id,
        incident="inc-1",
        service="worker",
        cause="x",
        steps=(step,),
        autonomy="auto",
        made_at=1.0,
        expires_at=9.0,
    )
    return PlanMade(at=1.0, plan=made)


def moves(story: list[tuple[S, S, str]], id: str = "plan-1") -> list[Record]:
    return [
        StepRecorded(move=StepMoved(incident="inc-1", plan=id, step=0, before=b, after=a, at=2.0 + n, reason=why))
        for n, (b, a, why) in enumerate(story)
    ]


@pytest.mark.parametrize("name", STORIES)
def test_an_execution_is_repeated_only_after_a_look_that_it_had_not_happened(name: str) -> None:
    story, word = STORIES[name]
    found = done_twice([plan(), *moves(story)])
    assert any(word in line for line in found) if word else found == ()
    assert done_twice([plan(idempotent=True), *moves(story)]) == ()
    assert done_twice([plan(read_only=True), *moves(story)]) == ()


def test_the_same_thing_by_two_plans_is_done_twice_too() -> None:
    story = STORIES["once"][0]
    found = done_twice([plan(), plan("plan-2"), *moves(story), *moves(story, "plan-2")])
    assert found == ("service.restart.supervisord on service=worker: took effect 2 times",)


@pytest.fixture
def looks(tmp_path: Path) -> Path:
    """A golden incident as a look of the agent's, with names that must not get out."""
    place = tmp_path / "looks" / "inc-1-0-2"
    shutil.copytree(golden.shipped() / "shop-bad-flag", place)
    (place / "expected.json").unlink()
    facts = json.loads((place / "facts.json").read_bytes())
    for fact in facts:
        if fact["kind"] == "host.process":
            fact["attributes"] |= {"cmdline": "secret --of alice", "user": "alice"}
            fact["attributes"]["name"] = fact["attributes"].get("name", "") if fact["service"] else "alice-tool"
    (place / "facts.json").write_text(json.dumps(facts))
    alert = (place / "alert.json").read_text()
    (place / "alert.json").write_text(alert.replace("http://prometheus/", "http://alice-laptop:9090/"))
    return place.parent


def test_a_recording_of_a_run_is_read_by_evaluation_and_a_golden_incident(looks: Path, tmp_path: Path) -> None:
    scenario = load_scenarios()["bad_flag"]
    situation = read_recording(looks / "inc-1-0-2")
    packs = load_packs()
    seen = Diagnosed(at=5.0, incident="inc-1", diagnosis=diagnose(situation, packs), evidence_at=situation.until)
    out = tmp_path / "out"
    place = keep_recording(run("bad_flag"), scenario, [seen], looks, out)
    assert place == out / "auto" / "bad-flag-1"
    assert "alice" in (looks / "inc-1-0-2" / "facts.json").read_text()
    assert "alice" in (looks / "inc-1-0-2" / "alert.json").read_text()
    assert not [path for path in place.glob("*.json") if "alice" in path.read_text()]
    scored = evaluate(find_cases([out]), packs)
    assert [(s.truth.service, s.service, s.pair) for s in scored] == [("orders", 1, 1)]
    assert [o.fault for o in golden.judge_all([out], packs)] == [""]
    # The same again, as a resumed run would: it takes the place of the first.
    assert keep_recording(run("bad_flag"), scenario, [seen], looks, out) == place


def test_a_run_without_a_look_leaves_no_recording(looks: Path, tmp_path: Path) -> None:
    scenario = load_scenarios()["bad_flag"]
    assert keep_recording(run("bad_flag"), scenario, [], looks, tmp_path / "out") is None
    assert not (tmp_path / "out").exists()


async def test_the_child_judges_the_journal_and_keeps_the_look(
    looks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything but the shop is real: the agent's journal, written as the agent writes it, and its look."""
    situation = read_recording(looks / "inc-1-0-2")
    seen = Diagnosed(
        at=1_800_000_000.0, incident="inc-1", diagnosis=diagnose(situation, load_packs()), evidence_at=situation.until
    )
    wal = Wal.open(journal_directory(tmp_path / "state"))
    story = STORIES["repeated after it ran"][0]
    await wal.append([seen, plan(), *moves(story)])
    await wal.close()

    class World:
        keeps_looks = False
        state_dir = tmp_path / "state"

        def __init__(self) -> None:
            self.looks, self.browse = looks, self

        @classmethod
        @contextlib.asynccontextmanager
        async def running(cls, *_: object) -> AsyncIterator[World]:
            yield cls()

        @contextlib.asynccontextmanager
        async def probing(self) -> AsyncIterator[None]:
            yield

    @contextlib.asynccontextmanager
    async def arm(world: World) -> AsyncIterator[Doings]:
        assert world.keeps_looks
        yield Doings()

    async def followed(world: object, job: Job, doings: Doings) -> Run:
        return run(job.scenario.name, job.arm, job.repetition, at=0.5)

    monkeypatch.setattr(block, "ChaosWorld", World)
    monkeypatch.setattr(block, "ARMS", {"auto": arm})
    monkeypatch.setattr(block, "follow", followed)
    monkeypatch.setattr(block, "BASELINE_SECONDS", 0.0)
    keeping = Keeping(record=str(tmp_path / "out"), made_by="this")
    jobs = [Job(load_scenarios()["bad_flag"], "auto", 1, 7)]
    made = [one async for one in block.runs_in_shop("auto", jobs, keeping, 0)]
    assert [one.made_by for one in made] == ["this"]
    assert any("though it had taken effect" in what for what in made[0].repeated)
    assert (tmp_path / "out" / "auto" / "bad-flag-1" / "expected.json").exists()
