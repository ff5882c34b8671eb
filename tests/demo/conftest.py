"""A demo world without an agent, shared by the tests of one module; and the proof that nothing of it stays behind."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import psutil
import pytest
import pytest_asyncio

from agent.demo.children import PROGRAMS
from agent.demo.world import World


@pytest.fixture(scope="session")
def programs(program: Callable[..., str]) -> None:
    """Everything the demo world runs is installed."""
    for wanted in PROGRAMS.values():
        program(wanted.names[0], wanted.package)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def world(programs: None) -> AsyncIterator[World]:
    async with World.running(seed=1) as running:
        yield running
        started = [psutil.Process(child.pid) for child in running.children.values()]
        processes = [*started, *(p for parent in started for p in parent.children(recursive=True))]
    left = [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert not left, f"the world has left processes behind: {left}"
    assert not running.directory.exists()
