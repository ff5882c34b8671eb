"""The schedule: bounded, fair, and without loss."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.schedule import Schedule


async def _take(schedule: Schedule) -> str:
    return await asyncio.wait_for(schedule.take(), 5)


async def test_tenants_take_turns() -> None:
    schedule = Schedule(1024, lambda tenant: ())
    for i in range(100):
        schedule.offer("loud", f"loud-{i}")
    schedule.offer("quiet", "quiet-0")
    first = [await _take(schedule) for _ in range(3)]
    assert "quiet-0" in first


async def test_overflow_waits_in_the_journal_and_comes_back_oldest_first() -> None:
    journal = [f"i{n}" for n in range(10)]
    schedule = Schedule(4, lambda tenant: journal)
    offered = [schedule.offer("t", incident) for incident in journal]
    assert offered == [True] * 4 + [False] * 6
    taken = []
    for _ in range(10):
        incident = await _take(schedule)
        journal.remove(incident)
        taken.append(incident)
        assert schedule.depth("t") <= 4
        schedule.done(incident)
    assert taken == [f"i{n}" for n in range(10)]
    assert schedule.watermark == 4


async def test_offered_while_running_is_looked_at_again() -> None:
    schedule = Schedule(2, lambda tenant: ())
    schedule.offer("t", "a")
    assert await _take(schedule) == "a"
    assert schedule.offer("t", "a")
    assert schedule.depth() == 0
    schedule.done("a")
    assert await _take(schedule) == "a"


async def test_take_waits_until_something_is_offered() -> None:
    schedule = Schedule(2, lambda tenant: ())
    waiting = asyncio.ensure_future(schedule.take())
    await asyncio.sleep(0)
    assert not waiting.done()
    schedule.offer("t", "a")
    assert await asyncio.wait_for(waiting, 5) == "a"


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Schedule(0, lambda tenant: ())


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 30)), max_size=80),
    st.integers(1, 5),
)
def test_everything_offered_is_taken_once(offers: list[tuple[str, int]], limit: int) -> None:
    """Whatever is offered, in any order and beyond any bound, is taken exactly once while it waits."""

    async def run() -> None:
        waiting: dict[str, dict[str, None]] = {}
        schedule = Schedule(limit, lambda tenant: list(waiting.get(tenant, {})))
        for tenant, n in offers:
            waiting.setdefault(tenant, {})[f"{tenant}{n}"] = None
            schedule.offer(tenant, f"{tenant}{n}")
        expected = {incident for by_tenant in waiting.values() for incident in by_tenant}
        taken = []
        while len(taken) < len(expected):
            incident = await asyncio.wait_for(schedule.take(), 5)
            waiting[incident[0]].pop(incident)
            taken.append(incident)
            schedule.done(incident)
        assert sorted(taken) == sorted(expected)
        assert schedule.depth() == 0

    asyncio.run(run())
