"""When a downstream is down: stated answers, no calls, one probe; and one incident's failure is its own."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from flow_world import NOW, World, open_world

from actions.model import BreakerMoved, BreakerState
from agent.dependency import INTERNAL, Dependency, DependencyOpen
from agent.downstream import Downstream
from agent.fold_model import IncidentState
from agent.sources.prometheus import Prometheus, PrometheusSource, QueryError

_I = IncidentState


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Server:
    """What is called. `seconds` pass by with each call."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.calls, self.seconds, self.down = clock, 0, 0.0, False
        self.hold: asyncio.Event | None = None

    async def __call__(self) -> str:
        self.calls += 1
        if self.hold is not None:
            await self.hold.wait()
        self.clock.now += self.seconds
        if self.down:
            raise OSError("connection refused")
        return f"answer {self.calls}"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def moves() -> list[BreakerMoved]:
    return []


@pytest.fixture
def dependency(clock: Clock, moves: list[BreakerMoved]) -> Dependency[str]:
    return Dependency("x", moves.append, clock=clock, monotonic=clock)


async def test_while_it_is_open_nothing_is_asked_and_the_answer_says_what_it_is(
    dependency: Dependency[str], clock: Clock, moves: list[BreakerMoved]
) -> None:
    server = Server(clock)
    live = await dependency.ask(server)
    assert (live.value, live.source) == ("answer 1", "live")
    server.down = True
    answers = [await dependency.ask(server) for _ in range(10)]
    assert server.calls == 1 + INTERNAL.failures
    assert {(a.value, a.source, a.at) for a in answers} == {("answer 1", "stale", live.at)}
    assert "open for another" in answers[-1].reason
    assert answers[-1] == await dependency.ask(server)  # the same world, the same answer
    assert [(m.before, m.after, m.calls) for m in moves] == [(BreakerState.CLOSED, BreakerState.OPEN, ())]


async def test_without_a_last_good_answer_it_is_static_or_none(dependency: Dependency[str], clock: Clock) -> None:
    server = Server(clock)
    server.down = True
    assert (await dependency.ask(server)).source == "none"
    static = await dependency.ask(server, static="configured")
    assert (static.value, static.source, static.reason) == ("configured", "static", "connection refused")


async def test_exactly_one_probe_and_the_others_wait_for_it(dependency: Dependency[str], clock: Clock) -> None:
    server = Server(clock)
    server.down = True
    for _ in range(INTERNAL.failures):
        await dependency.ask(server)
    clock.now += INTERNAL.open_seconds
    server.down, server.hold, server.calls = False, asyncio.Event(), 0
    tasks = [asyncio.create_task(dependency.call(server)) for _ in range(20)]
    for _ in range(5):
        await asyncio.sleep(0)
    assert server.calls == 1
    server.hold.set()
    assert len(await asyncio.gather(*tasks)) == server.calls == 20
    assert dependency.breaker.state is BreakerState.CLOSED


async def test_a_probe_that_fails_lets_nobody_through_and_the_wait_doubles(
    dependency: Dependency[str], clock: Clock
) -> None:
    server = Server(clock)
    server.down = True
    for _ in range(INTERNAL.failures):
        await dependency.ask(server)
    clock.now += INTERNAL.open_seconds
    server.hold, server.calls = asyncio.Event(), 0
    tasks = [asyncio.create_task(dependency.call(server)) for _ in range(20)]
    for _ in range(5):
        await asyncio.sleep(0)
    server.hold.set()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert server.calls == 1
    assert [type(e) for e in ended].count(DependencyOpen) == 19
    assert dependency.breaker.open_until - clock.now == pytest.approx(2 * INTERNAL.open_seconds)


async def test_slow_calls_open_it_unless_their_time_does_not_count(dependency: Dependency[str], clock: Clock) -> None:
    server = Server(clock)
    server.seconds = 0.81
    for _ in range(INTERNAL.min_calls):
        await dependency.ask(server, timed=False)
    assert dependency.breaker.state is BreakerState.CLOSED
    for _ in range(INTERNAL.min_calls):
        await dependency.ask(server)
    assert dependency.breaker.state is BreakerState.OPEN


async def test_a_cancelled_probe_gives_its_place_back(dependency: Dependency[str], clock: Clock) -> None:
    server = Server(clock)
    server.down = True
    for _ in range(INTERNAL.failures):
        await dependency.ask(server)
    clock.now += INTERNAL.open_seconds
    server.down, server.hold = False, asyncio.Event()
    probe = asyncio.create_task(dependency.call(server))
    await asyncio.sleep(0)
    probe.cancel()
    await asyncio.gather(probe, return_exceptions=True)
    server.hold.set()
    assert await dependency.call(server)


# -- in the service


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    made = await open_world(tmp_path)
    yield made
    await made.store.close()


async def test_the_breaker_is_journalled_restored_listed_and_reset(world: World) -> None:
    downstream = Downstream(world.store)

    async def down() -> str:
        raise OSError("gone")

    for _ in range(INTERNAL.failures):
        await downstream.alertmanager.ask(down)
    await downstream.close()
    assert world.store.state.breakers["dependency:alertmanager"].after is BreakerState.OPEN
    again = Downstream(world.store)
    assert again.alertmanager.breaker.state is BreakerState.OPEN
    with pytest.raises(DependencyOpen):
        await again.alertmanager.call(down)

    class NoActions:
        breakers: dict[str, object] = {}  # noqa: RUF012

    both = again.beside(NoActions())  # type: ignore[arg-type]
    assert both.breakers["dependency:alertmanager"].state is BreakerState.OPEN
    await both.reset_breaker("dependency:alertmanager", "by ann")
    assert again.alertmanager.breaker.state is BreakerState.CLOSED
    assert world.store.state.breakers["dependency:alertmanager"].after is BreakerState.CLOSED


async def test_the_log_says_once_that_it_went_and_once_that_it_came_back(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    downstream = Downstream(world.store)

    async def down() -> str:
        raise OSError("gone")

    with caplog.at_level("INFO", "alertmedic.downstream"):
        for _ in range(2 * INTERNAL.failures):
            await downstream.prometheus.ask(down)
        closed, opened, half = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN
        for before, after in ((opened, half), (half, opened), (opened, half), (half, closed), (closed, closed)):
            downstream._journal(BreakerMoved(key="dependency:prometheus", before=before, after=after, at=NOW))
    await downstream.close()
    assert [(r.levelname, r.getMessage().split(" answers")[0].split(" again")[0]) for r in caplog.records] == [
        ("WARNING", "dependency:prometheus is not asked until it"),
        ("INFO", "dependency:prometheus is asked"),
    ]


async def test_a_dead_prometheus_is_asked_no_more_and_says_so() -> None:
    with socket.socket() as closed:  # a port on which nobody listens
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    breaker: Dependency[object] = Dependency("prometheus")
    async with PrometheusSource(Prometheus(url=url), breaker=breaker) as source:
        for _ in range(INTERNAL.failures):
            with pytest.raises(QueryError, match="refused"):
                await source.query_instant("up")
        with pytest.raises(QueryError, match="dependency:prometheus is open"):
            await source.query_instant("up")
        with pytest.raises(QueryError, match="not asked"):
            await source.query_range("up", (NOW, NOW + 60, 15))


@pytest.mark.parametrize("error", [OSError("x"), RecursionError("x"), MemoryError(), AssertionError("x"), KeyError(1)])
async def test_a_failure_in_one_incidents_task_never_touches_another(world: World, error: Exception) -> None:
    sick = await world.acting("Sick")
    world.now += 3600.0
    well = await world.acting("Well")
    assert sick != well
    outcome = world.outcome(well, "verified", "verified")

    async def run(incident: object, cancelled: object) -> object:
        await asyncio.sleep(0)
        if incident.id == sick:  # type: ignore[attr-defined]
            raise error
        return outcome

    world.remediation.run = run  # type: ignore[method-assign, assignment]
    await asyncio.gather(*(world.investigation.advance(id) for id in (sick, well)))
    await asyncio.wait_for(asyncio.gather(*world.investigation.acting.values()), 5)
    assert world.incident(sick).state is _I.ESCALATED
    assert type(error).__name__ in world.incident(sick).reason
    assert world.incident(well).state is _I.RESOLVED


async def test_nor_does_one_whose_evidence_cannot_be_gathered(world: World) -> None:
    sick = await world.alert(name="Sick")
    world.now += 3600.0
    well = await world.alert(name="Well")

    async def looked(incident: object, state: object) -> object:
        await asyncio.sleep(0)
        if incident.id == sick:  # type: ignore[attr-defined]
            raise RuntimeError("a bug in a source")
        return await original(incident, state)  # type: ignore[arg-type]

    original = world.situations.of
    world.situations.of = looked  # type: ignore[method-assign, assignment]
    await asyncio.gather(*(world.investigation.advance(id) for id in (sick, well)))
    assert world.incident(sick).state is _I.ESCALATED
    assert world.incident(well).diagnosis is not None
    assert "investigation failed" not in world.incident(well).reason
