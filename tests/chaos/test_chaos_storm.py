"""A shared world measures healing and not the storm guard; the storm guard is at work in it all the same."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest

from actions.policy import GuardPolicy, StormPolicy, storm_until
from agent.chaos.world import ChaosWorld
from agent.config import Config, load

APART, EACH = 25.0, 3  # seconds between the faults of a shared world, and incidents that one of them opens at most


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """As the agent of a chaos world reads it."""

    async def write() -> str:
        async with aiohttp.ClientSession() as session:
            world = ChaosWorld(tmp_path, session, 1)
            return world.agent_configuration()

    file = tmp_path / "alertmedic.yaml"
    file.write_text(asyncio.run(write()))
    return load(file)


def _opened(faults: int) -> list[float]:
    return [1000.0 + APART * fault + 4.0 * n for fault in range(faults) for n in range(EACH)]


@pytest.mark.parametrize("share", [6, 60])
def test_no_share_of_a_world_is_a_storm(config: Config, share: int) -> None:
    opened = _opened(share)
    assert storm_until(opened, opened[-1], config.guard_policy.storm) is None
    # It is by configuration that it is none.
    assert storm_until(opened, opened[-1], StormPolicy()) is not None


def test_more_than_faults_could_open_is_a_storm_there_too(config: Config) -> None:
    many = [1000.0 + n for n in range(config.guard_policy.storm.incidents + 1)]
    assert storm_until(many[:-1], many[-1], config.guard_policy.storm) is None
    assert storm_until(many, many[-1], config.guard_policy.storm) is not None


def test_every_fault_of_a_shared_world_may_be_healed_by_a_restart(config: Config) -> None:
    policy = config.guard_policy
    assert policy.actions_per_action_per_hour >= policy.actions_per_hour > GuardPolicy().actions_per_action_per_hour
