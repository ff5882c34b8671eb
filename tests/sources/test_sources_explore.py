"""`alertmedic metrics`: looking around through prometheus-api-client."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys

import pytest
from sources_world import STEP, Dataset, Fake, Server, port

from agent.explore import ExploreError, Explorer
from agent.sources.prometheus import Prometheus


def test_names_labels_values_and_samples(prometheus: Server, dataset: Dataset) -> None:
    with Explorer(Prometheus(url=f"{prometheus.url}/", timeout_seconds=20)) as explorer:
        assert {"gappy", "requests_total", "strange"} <= set(explorer.list_metrics(now=dataset.end))
        assert explorer.list_metrics(['{__name__=~"g.*"}'], now=dataset.end) == ["gappy"]
        labels = explorer.labels_of("requests_total", now=dataset.end)
        assert labels == {"route": ["/", "/buy"], "service": ["front", "orders", "worker"]}
        assert explorer.values_of("service", ["gappy"], now=dataset.end) == ["front"]
        assert set(explorer.labels_of("strange", now=dataset.end)["service"]) == set(dataset.names)
        assert explorer.samples("gappy", dataset.begin, dataset.begin + 30, STEP) == [
            {
                "metric": {"__name__": "gappy", "service": "front"},
                "values": [[dataset.begin, 0.0], [dataset.begin + 15, 1.0], [dataset.begin + 30, 2.0]],
            }
        ]
        (special,) = explorer.latest("special", at=dataset.begin + STEP)
        assert special["value"] == [dataset.begin + STEP, None]


def test_it_works_on_the_second_store(victoria: Server, dataset: Dataset) -> None:
    with Explorer(Prometheus(url=victoria.url, timeout_seconds=20)) as explorer:
        assert "gappy" in explorer.list_metrics(now=dataset.end)
        assert explorer.labels_of("gappy", now=dataset.end) == {"service": ["front"]}


def test_an_error_names_the_operation(prometheus: Server, dataset: Dataset) -> None:
    with Explorer(Prometheus(url=prometheus.url)) as explorer:
        with pytest.raises(ExploreError, match=r"query 'sum\(': PrometheusApiClientException: .*bad_data"):
            explorer.samples("sum(", dataset.begin, dataset.end, 15)
        with pytest.raises(ExploreError, match="labels of"):
            explorer.labels_of("{", now=dataset.end)


def test_nobody_listens() -> None:
    with (
        Explorer(Prometheus(url=f"http://127.0.0.1:{port()}")) as explorer,
        pytest.raises(ExploreError, match="refused"),
    ):
        explorer.list_metrics(now=0.0)


def test_a_hung_server_meets_the_timeout_once() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen(8)
        s.settimeout(0.1)
        config = Prometheus(url=f"http://127.0.0.1:{s.getsockname()[1]}", timeout_seconds=0.2)
        with Explorer(config) as explorer, pytest.raises(ExploreError, match="timed out"):
            explorer.latest("up")
        s.accept()[0].close()
        with pytest.raises(TimeoutError):  # the client's own retries are off: there was one connection
            s.accept()


async def test_credentials_are_sent(fake: Fake) -> None:
    def ask(config: Prometheus) -> None:
        with Explorer(config) as explorer:
            assert explorer.latest("up") == []

    url = fake.url
    await asyncio.to_thread(ask, Prometheus(url=url, bearer=lambda: "t", tenant_header="X-Scope-OrgID", tenant="a"))
    await asyncio.to_thread(ask, Prometheus(url=url, username="u", password="p"))
    assert fake.seen[0].headers["Authorization"] == "Bearer t"
    assert fake.seen[0].headers["X-Scope-OrgID"] == "a"
    assert fake.seen[1].headers["Authorization"] == "Basic dTpw"


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_api_client", None)
    monkeypatch.setitem(sys.modules, "prometheus_api_client.prometheus_connect", None)
    with pytest.raises(ExploreError, match=r"alertmedic\[explore\]"):
        Explorer(Prometheus(url="http://x"))


def test_the_service_does_not_load_the_explorers_libraries() -> None:
    code = """
import sys
import agent.sources.prometheus, agent.sources.host, agent.sources.recorded, agent.topology, agent.explore
heavy = {"prometheus_api_client", "requests", "pandas", "promql_parser", "rich", "asyncpg"} & set(sys.modules)
sys.exit(f"loaded: {heavy}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
