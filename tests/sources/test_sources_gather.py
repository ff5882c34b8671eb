"""Asking all sources at once: one deadline, reasons instead of exceptions, partial answers kept."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sources_world import Query

from agent.sources import Budget, EvidenceRequest, SourceError, bounded, gather
from rules.model import Evidence, Frame, SeriesId

Answer = Callable[[EvidenceRequest], Awaitable[tuple[Evidence, ...]]]


class Fixed:
    """A source that does as told."""

    def __init__(self, name: str, answer: Answer | None = None) -> None:
        self.name = name
        self.answer = answer
        self.asked: list[EvidenceRequest] = []
        self.deadlines: list[float] = []
        self.cancelled = False

    async def fetch(self, request: EvidenceRequest, deadline_seconds: float) -> tuple[Evidence, ...]:
        self.asked.append(request)
        self.deadlines.append(deadline_seconds)
        try:
            if self.answer is not None:
                return await self.answer(request)
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        return tuple(Evidence(q.name, self.name, query=f"{self.name}:{q.query}") for q in reversed(request.queries))


async def never(_: EvidenceRequest) -> tuple[Evidence, ...]:
    await asyncio.Event().wait()
    raise AssertionError


def request_of(*queries: Query) -> EvidenceRequest:
    return EvidenceRequest(queries, ("front",), 0.0, 60.0)


async def test_every_source_gets_its_own_queries_and_answers_come_in_order() -> None:
    a, b = Fixed("a"), Fixed("b")
    asked = [Query("x", "1", "a"), Query("y", "2", "b"), Query("z", "3", "a"), Query("x", "4", "b")]
    answers = await gather([a, b], request_of(*asked), 5.0)
    assert [(e.name, e.source, e.query) for e in answers] == [
        ("x", "a", "a:1"),
        ("y", "b", "b:2"),
        ("z", "a", "a:3"),
        ("x", "b", "b:4"),
    ]
    assert [q.query for q in a.asked[0].queries] == ["1", "3"]
    assert 0 < a.deadlines[0] < 5.0


async def test_a_source_without_queries_is_not_asked() -> None:
    a = Fixed("a")
    assert await gather([a], request_of(), 5.0) == ()
    assert a.asked == []


async def test_an_unknown_source_is_missing() -> None:
    (evidence,) = await gather([], request_of(Query("x", "1", "loki")), 5.0)
    assert evidence.missing == "no source named 'loki' is configured"
    assert (evidence.name, evidence.source, evidence.query) == ("x", "loki", "1")


async def test_a_source_error_is_the_reason_for_each_of_its_queries() -> None:
    async def fails(_: EvidenceRequest) -> tuple[Evidence, ...]:
        raise SourceError("no such\nhost " + "x" * 1000)

    good = Fixed("good")
    asked = [Query("x", "1", "bad"), Query("y", "2", "good"), Query("z", "3", "bad")]
    x, y, z = await gather([Fixed("bad", fails), good], request_of(*asked), 5.0)
    assert x.missing == z.missing
    assert x.missing is not None
    assert x.missing.startswith("no such host xxx")
    assert len(x.missing) == 300
    assert y.missing is None


async def test_a_late_source_is_missing_and_cancelled_and_the_others_are_kept() -> None:
    late, good = Fixed("late", never), Fixed("good")
    asked = [Query("x", "1", "late"), Query("y", "2", "good"), Query("z", "3", "late")]
    x, y, z = await gather([late, good], request_of(*asked), 0.05)
    assert x.missing == z.missing == "timeout after 0.05 s"
    assert y.missing is None
    assert late.cancelled


async def test_sources_are_asked_at_the_same_time() -> None:
    began = {"a": asyncio.Event(), "b": asyncio.Event()}

    def waits_for(own: str, other: str) -> Answer:
        async def answer(request: EvidenceRequest) -> tuple[Evidence, ...]:
            began[own].set()
            await began[other].wait()
            return tuple(Evidence(q.name, own) for q in request.queries)

        return answer

    sources = [Fixed("a", waits_for("a", "b")), Fixed("b", waits_for("b", "a"))]
    x, y = await gather(sources, request_of(Query("x", "1", "a"), Query("y", "2", "b")), 20.0)
    assert (x.missing, y.missing) == (None, None)


async def test_what_a_source_leaves_out_is_missing() -> None:
    async def half(request: EvidenceRequest) -> tuple[Evidence, ...]:
        return (Evidence("x", "a"),)

    asked = request_of(Query("x", "1", "a"), Query("y", "2", "a"), Query("x", "3", "a"))
    answers = await gather([Fixed("a", half)], asked, 5.0)
    assert [e.missing for e in answers] == [None, *["the source a gave no answer to this query"] * 2]


async def test_a_bug_in_a_source_is_not_hidden() -> None:
    async def bug(_: EvidenceRequest) -> tuple[Evidence, ...]:
        raise ZeroDivisionError

    other = Fixed("b", never)
    with pytest.raises(ZeroDivisionError):
        await gather([Fixed("a", bug), other], request_of(Query("x", "1", "a"), Query("y", "1", "b")), 0.05)
    assert other.cancelled


async def test_cancelling_cancels_the_sources() -> None:
    late = Fixed("late", never)
    task = asyncio.create_task(gather([late], request_of(Query("x", "1", "late")), 60.0))
    while not late.asked:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert late.cancelled


async def test_a_source_that_will_not_be_cancelled_holds_nobody_up() -> None:
    release = asyncio.Event()

    async def stubborn(_: EvidenceRequest) -> tuple[Evidence, ...]:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue
        return ()

    async with asyncio.timeout(20):
        (evidence,) = await gather([Fixed("a", stubborn)], request_of(Query("x", "1", "a")), 0.05)
    assert evidence.missing == "timeout after 0.05 s"
    release.set()


async def test_two_sources_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="same name"):
        await gather([Fixed("a"), Fixed("a")], request_of(), 1.0)


@pytest.mark.parametrize("window", [(1.0, 0.0, 30.0), (0.0, 1.0, 0.0), (math.nan, 1.0, 1.0), (0.0, math.inf, 1.0)])
def test_a_window_that_is_none_is_refused(window: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="window"):
        EvidenceRequest((), (), *window)


@given(st.text(st.characters()), st.integers(4, 50))
def test_foreign_text_is_bounded_and_printable(text: str, limit: int) -> None:
    kept = bounded(text, limit)
    assert len(kept) <= limit
    assert kept.isprintable()
    assert bounded(kept, limit) == kept


def wide(name: str, series: int, points: int = 4) -> Evidence:
    ids = tuple(SeriesId.of(name, {"service": f"s{i:06d}"}) for i in range(series))
    return Evidence(name, "a", Frame(np.arange(float(points)), ids, np.ones((series, points))))


@given(
    sizes=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5)), max_size=8),
    queries=st.integers(1, 9),
    series=st.integers(1, 30),
    samples=st.integers(1, 60),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_budget_holds_and_what_is_over_is_named(
    sizes: list[tuple[int, int]], queries: int, series: int, samples: int
) -> None:
    class Wide:
        name = "a"

        async def fetch(self, request: EvidenceRequest, deadline_seconds: float) -> tuple[Evidence, ...]:
            assert len(request.queries) <= queries
            return tuple(wide(q.name, *sizes[int(q.name[1:])]) for q in request.queries)

    asked = tuple(Query(f"q{i}", "", "a") for i in range(len(sizes)))
    request = EvidenceRequest(asked, ("front",), 0.0, 60.0)
    found = asyncio.run(gather([Wide()], request, 5.0, Budget(queries, series, samples)))
    assert [e.name for e in found] == [q.name for q in asked]
    assert sum(len(e.frame.ids) for e in found) <= series
    assert sum(e.frame.values.size for e in found) <= samples
    for i, (evidence, (count, _)) in enumerate(zip(found, sizes, strict=True)):
        whole = len(evidence.frame.ids) == count
        if i >= queries:
            assert evidence.missing == f"not asked: a look has at most {queries} queries"
        elif not evidence.frame.ids and count:
            assert "left out: a look takes at most" in (evidence.missing or "")
        else:
            assert evidence.missing is None
            assert whole == (evidence.partial == "")
