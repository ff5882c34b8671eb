"""A real Prometheus with a known past, and whole incidents over it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from whole_world import NoHost, Program, Shop, Whole, configuration

from agent.app import prometheus_of
from agent.sources.prometheus import PrometheusSource
from bench import backfill


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory, program: Program) -> Iterator[Shop]:
    where, past = tmp_path_factory.mktemp("shop"), backfill.past()
    data = backfill.blocks(program("promtool", "prometheus"), where, backfill.lines(past))
    process, url = backfill.serve(program("prometheus", "prometheus"), where, data)
    yield Shop(past, url, data)
    process.kill()
    process.wait()


@pytest.fixture
async def whole(shop: Shop, tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[Whole]]]:
    """`await whole(url)` is an agent's journal and investigation over what answers at `url` (default: the shop)."""
    made: list[tuple[Whole, PrometheusSource]] = []

    async def make(url: str = "", **prometheus: object) -> Whole:
        config = configuration(url or shop.url, tmp_path / f"state-{len(made)}", **prometheus)
        source = PrometheusSource(prometheus_of(config))
        made.append((Whole(config, shop.past, [NoHost(), source]), source))
        return made[-1][0]

    yield make
    for one, source in made:
        await one.close()
        await source.close()
