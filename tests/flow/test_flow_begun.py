"""What was begun is never lost to a full queue, and is not held up by a flood of new incidents."""

from __future__ import annotations

import asyncio

from agent.schedule import Schedule


async def _take(schedule: Schedule) -> str:
    return await asyncio.wait_for(schedule.take(), 5)


async def test_what_was_begun_is_queued_though_the_queue_is_full() -> None:
    journal = [f"new{n}" for n in range(6)]
    schedule = Schedule(2, lambda tenant: journal)
    for incident in journal:
        schedule.offer("t", incident)
    assert schedule.offer("t", "approved", begun=True)
    taken = []
    for _ in range(3):
        incident = await _take(schedule)
        taken.append(incident)
        if incident in journal:
            journal.remove(incident)
        schedule.done(incident)
    assert taken == ["new0", "new1", "approved"]


async def test_what_changed_while_it_ran_is_queued_though_the_queue_is_full() -> None:
    schedule = Schedule(1, lambda tenant: ())
    schedule.offer("t", "a")
    assert await _take(schedule) == "a"
    schedule.offer("t", "b")
    assert schedule.offer("t", "a")
    schedule.done("a")
    assert [await _take(schedule), await _take(schedule)] == ["b", "a"]
