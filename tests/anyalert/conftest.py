"""One real Prometheus with every scenario that the run needs, and the rules of kube-prometheus loaded."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from anyalert_world import Scenario, Server, backfill, entry, rules, start, systems
from dependency_world import Depends, depending
from dependency_world import backfill as backfill_depending

PER_ALERT = 2  # causes that `make test` simulates for each alert of its subset


def scenarios(full: bool, ends_at: float) -> list[Scenario]:
    """Two causes for two of three alerts and one cause for each other system, or, in full, every cause of every alert.
    Watchdogs have nothing to simulate."""
    found = []
    for i, rule in enumerate(rules()):
        causes = entry(rule).causes
        if len(causes) < 2 or rule.name == "InfoInhibitor" or not (full or i % 3 != 2):
            continue
        for j, cause in enumerate(causes if full else causes[:PER_ALERT]):
            found.append(Scenario(f"{i}-{j}", rule, cause, ends_at))
    for i, rule in enumerate(systems()):
        for j, cause in enumerate(entry(rule).causes if full else entry(rule).causes[:1]):
            found.append(Scenario(f"{i}-s{j}", rule, cause, ends_at))
    return found


@pytest.fixture(scope="session")
def volume(request: pytest.FixtureRequest) -> bool:
    """Whether the full volume was asked for."""
    return any(item.get_closest_marker("full") for item in request.session.items)


@pytest.fixture(scope="session")
def any_at() -> float:
    """When every simulated alert begins to fire."""
    return time.time() // 60 * 60 - 3 * 3600


@pytest.fixture(scope="session")
def simulated(volume: bool, any_at: float) -> list[Scenario]:
    return scenarios(volume, any_at)


@pytest.fixture(scope="session")
def prometheus(
    tmp_path_factory: pytest.TempPathFactory,
    simulated: list[Scenario],
    any_at: float,
    program: Callable[[str, str], str],
) -> Iterator[Server]:
    where = tmp_path_factory.mktemp("anyalert")
    data = backfill(program("promtool", "prometheus"), where, simulated, any_at)
    server = start(program("prometheus", "prometheus"), where, data)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()


@pytest.fixture(scope="session")
def dependencies(volume: bool, any_at: float) -> list[Depends]:
    return depending(volume, any_at)


@pytest.fixture(scope="session")
def below(
    tmp_path_factory: pytest.TempPathFactory, dependencies: list[Depends], program: Callable[[str, str], str]
) -> Iterator[Server]:
    """A Prometheus with services that depend on systems of every kind."""
    where = tmp_path_factory.mktemp("below")
    data = backfill_depending(program("promtool", "prometheus"), where, dependencies)
    server = start(program("prometheus", "prometheus"), where, data)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()
