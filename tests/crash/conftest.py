"""One Prometheus for all crash tests: a baseline takes seconds to gather, and every run brings a service of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from agent_world import Services, free_port, query, start_prometheus, until
from crash_names import all_services


@pytest.fixture(scope="session")
def services() -> Services:
    return Services(all_services())


@pytest.fixture(scope="session")
def prometheus(
    services: Services, program: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    port = free_port()
    directory = tmp_path_factory.mktemp("prometheus")
    process = start_prometheus(program("prometheus"), directory, services.url.removeprefix("http://"), port)
    try:
        url = f"http://127.0.0.1:{port}"
        # Enough of a baseline that "broken" stands out from it.
        until(lambda: query(url, "min(count_over_time(probe_broken[1m])) >= 16"), "Prometheus has a baseline")
        yield url
    finally:
        process.kill()
        process.wait()
