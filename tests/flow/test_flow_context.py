"""What the gates and the diagnosis are told of the world."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from flow_world import NOW, World, open_world

from actions.catalog import load_catalog
from actions.model import StepMoved, StepState
from agent.config import Config, Prometheus
from agent.journal.records import StepRecorded
from agent.remediation import Remediation
from agent.situation import Situations
from rules.model import Topology
from rules.packs import PackSet


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    made = await open_world(tmp_path)
    yield made
    await made.store.close()


async def test_verified_steps_of_the_plan_under_way_do_not_count_against_its_next_one(world: World) -> None:
    id = await world.acting(steps=2)
    path = [StepState.PLANNED, StepState.INTENT, StepState.RAN, StepState.VERIFIED]
    for before, after in itertools.pairwise(path):
        move = StepMoved(incident=id, plan=f"plan-{id}", step=0, before=before, after=after, at=NOW)
        await world.store.record(StepRecorded(move=move))
    remediation = Remediation(
        world.config,
        load_catalog((), ()),
        world.store,
        world.verifier,  # type: ignore[arg-type]
        world.telemetry,
        clock=lambda: NOW,
    )
    (mine,) = remediation.context(world.incident(id)).history
    assert mine.active
    world.now = NOW + 3600.0  # outside the merging windows: an incident of its own, for which it does count
    other = await world.alert(name="Other")
    assert other != id
    (theirs,) = remediation.context(world.incident(other)).history
    assert not theirs.active


class Graph:
    """Discovery that answers `found`, or never."""

    def __init__(self, found: Topology | None) -> None:
        self.found = found

    async def __call__(self, deadline_seconds: float) -> Topology:
        if self.found is None:
            await asyncio.Event().wait()
        assert self.found is not None
        return self.found


async def test_who_calls_whom_is_not_forgotten_while_metrics_are_silent() -> None:
    config = Config(prometheus=Prometheus(timeout_seconds=0.05))
    graph = Graph(Topology(edges=(("front", "orders"),)))
    now = NOW
    situations = Situations(config, PackSet.of(()), (), Topology(kinds={"front": "http"}), graph, lambda: now)
    assert (await situations._topology(now)).edges == (("front", "orders"),)
    for silent in (Topology(), None):
        now += 1000.0
        graph.found = silent
        assert (await situations._topology(now)).edges == (("front", "orders"),)
