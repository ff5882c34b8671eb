"""Evidence from real Prometheus and VictoriaMetrics, checked against an independent client; and from broken servers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import socket
import ssl
import subprocess
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from prometheus_api_client import PrometheusConnect
from sources_world import STEP, Dataset, Fake, Query, Server, in_millis, line, port

from agent.sources import EvidenceRequest, gather
from agent.sources.prometheus import Prometheus, PrometheusSource, QueryError
from rules.model import Evidence, SeriesId

NOTHING: dict[str, Any] = {"status": "success", "data": {"resultType": "matrix", "result": []}}


def request_of(
    *queries: Query, start: float = 0.0, end: float = 3600.0, step: float = 30.0, **more: Any
) -> EvidenceRequest:
    return EvidenceRequest(queries, more.pop("services", ("front",)), start, end, step, **more)


async def one(source: PrometheusSource, query: str = "up", deadline: float = 20.0, **more: Any) -> Evidence:
    (evidence,) = await source.fetch(request_of(Query("signal", query), **more), deadline)
    return evidence


def by_the_other_client(
    url: str, query: str, grid: np.ndarray[Any, Any], step: float
) -> dict[Any, np.ndarray[Any, Any]]:
    """The same query by prometheus-api-client, laid on our grid by its timestamps."""
    client = PrometheusConnect(url=url, timeout=20)
    try:
        result = client.custom_query_range(
            query, datetime.fromtimestamp(grid[0], UTC), datetime.fromtimestamp(grid[-1], UTC), str(step)
        )
    finally:
        client.close()
    rows = {}
    for item in result:
        row = np.full(len(grid), math.nan)
        for at, value in item["values"]:
            (index,) = np.nonzero(grid == at)
            row[index] = float(value) if math.isfinite(float(value)) else math.nan
        labels = {k: v for k, v in item["metric"].items() if k != "__name__"}
        rows[frozenset(labels.items())] = row
    return rows


QUERIES = [
    "requests_total{$scope}",
    "sum by ($service) (rate(requests_total{$scope}[$rate]))",
    "sum by ($service, route) (increase(requests_total{$scope}[5m]))",
    "gappy{$scope}",
    "special{$scope}",
    "1 / (gappy{$scope} - 30)",
    "single{$scope}",
    "wide",
    'strange{n=~".*7"}',
    "absent_metric{$scope}",
    '{__name__=~"gappy|single", $scope}',
]


@pytest.mark.parametrize("server", ["prometheus", "victoria"])
@pytest.mark.parametrize("step", [15.0, 30.0, 7.0])
async def test_our_matrices_equal_those_of_the_independent_client(
    server: str, step: float, dataset: Dataset, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue(server).url
    queries = [Query(f"q{i}", query) for i, query in enumerate(QUERIES)]
    services = ("front", "orders", "worker")
    # VictoriaMetrics moves the window of longer answers to multiples of the step, unless told not to use its cache.
    async with PrometheusSource(Prometheus(url=url, parameters={"nocache": "1"})) as source:
        asked = request_of(*queries, start=dataset.begin - 100, end=dataset.end + 100, step=step, services=services)
        answers = await source.fetch(asked, 30.0)
    compared = 0
    for evidence in answers:
        assert evidence.missing is None, (evidence.query, evidence.missing)
        grid = (
            evidence.frame.times if evidence.frame.ids else np.arange(dataset.begin // step * step, dataset.end, step)
        )
        theirs = await asyncio.to_thread(by_the_other_client, url, evidence.query, grid, step)
        if "__name__" in evidence.query:  # ours lays the two metrics over each other
            assert len(evidence.frame.ids) == 1
            continue
        ours = dict(zip(evidence.frame.ids, evidence.frame.values, strict=True))
        assert {frozenset(i.labels) for i in ours} == set(theirs)
        for series, row in ours.items():
            assert series.metric == evidence.name
            np.testing.assert_array_equal(row, theirs[frozenset(series.labels)], evidence.query)
            compared += int(np.count_nonzero(~np.isnan(row)))
    assert compared > 3000


async def test_values_lie_where_they_were_written(prometheus: Server, dataset: Dataset) -> None:
    async with PrometheusSource(Prometheus(url=prometheus.url)) as source:
        asked = {"start": dataset.begin, "end": dataset.end, "step": STEP}
        gappy = await one(source, "gappy", **asked)
        single = await one(source, "single", **asked)
        special = await one(source, "special", **asked)
    assert gappy.frame.times.tolist() == [dataset.begin + i * STEP for i in range(241)]
    row = gappy.frame.values[0]
    assert row[:80].tolist() == list(range(80))
    assert np.isnan(row[100:160]).all()  # the gap but for Prometheus' look-back of five minutes
    assert row[160:].tolist() == list(range(160, 241))
    at = np.nonzero(~np.isnan(single.frame.values[0]))[0]
    assert at[0] == 600 // STEP
    assert set(single.frame.values[0][at]) == {42.0}
    assert set(special.frame.values[0][~np.isnan(special.frame.values[0])]) == {1.5}
    assert any("120 samples were infinite" in w for w in special.warnings)
    assert gappy.warnings == ()


async def test_a_wide_window_widens_the_step_and_says_so(prometheus: Server, dataset: Dataset) -> None:
    async with PrometheusSource(Prometheus(url=prometheus.url)) as source:
        evidence = await one(source, "gappy", start=dataset.end - 30 * 86400, end=dataset.end, step=15)
    assert evidence.missing is None
    assert len(evidence.frame.times) <= 11_000
    assert np.unique(np.diff(evidence.frame.times)).tolist() == [240.0]
    assert any("step widened from 15 s to 240 s" in w for w in evidence.warnings)
    assert np.count_nonzero(~np.isnan(evidence.frame.values)) > 5


async def test_the_largest_window_that_fits_is_answered(prometheus: Server, dataset: Dataset) -> None:
    async with PrometheusSource(Prometheus(url=prometheus.url)) as source:
        evidence = await one(source, "gappy", start=dataset.begin, end=dataset.begin + 10_999, step=1)
    assert evidence.missing is None
    assert len(evidence.frame.times) == 11_000
    assert evidence.warnings == ()


async def test_more_series_than_allowed_are_left_out_and_said(prometheus: Server, dataset: Dataset) -> None:
    asked = {"start": dataset.begin + 1800, "end": dataset.begin + 1900, "step": 50}
    async with PrometheusSource(Prometheus(url=prometheus.url, max_series=100)) as source:
        bounded = await one(source, "wide", **asked)
    async with PrometheusSource(Prometheus(url=prometheus.url, max_cells=30)) as source:
        cells = await one(source, "wide", **asked)
    assert [i.service for i in bounded.frame.ids] == [f"s{i:04d}" for i in range(100)]
    assert bounded.warnings == ("600 series, only the first 100 are kept: narrow the query",)
    assert len(cells.frame.ids) == 30 // len(cells.frame.times)


async def test_an_answer_that_is_too_large_is_not_read(prometheus: Server, dataset: Dataset) -> None:
    async with PrometheusSource(Prometheus(url=prometheus.url, max_bytes=10_000)) as source:
        evidence = await one(source, "wide", start=dataset.begin, end=dataset.end, step=15)
    assert evidence.missing == "answer too large: more than 10000 bytes; narrow the query or widen the step"


async def test_labels_are_renamed_to_the_canonical_ones(prometheus: Server, dataset: Dataset) -> None:
    at = {"start": dataset.begin, "end": dataset.begin + 60, "step": 30}
    async with PrometheusSource(Prometheus(url=prometheus.url, service_label="app")) as source:
        evidence = await one(source, "new_name{$scope}", services=("shop",), **at)
        both = await one(source, '{__name__=~"old_name|new_name"}', **at)
    assert evidence.frame.ids == (SeriesId.of("signal", {"service": "shop", "exported_service": "front"}),)
    assert len(both.frame.ids) == 1
    assert any("1 series had the same name" in w for w in both.warnings)


ERRORS = [
    ("sum(", "http 400: bad_data: "),
    ("rate(gappy)", "http 400: bad_data: "),
    ("label_replace(gappy, 'a', '$1', 'b', '(')", "http 422: execution: "),
    ('{__name__=~"gappy|single|special"} + on() group_left() {__name__=~"gappy|single"}', "http 422: execution: "),
]


@pytest.mark.parametrize(("query", "reason"), ERRORS)
async def test_prometheus_own_words_are_the_reason(
    prometheus: Server, dataset: Dataset, query: str, reason: str
) -> None:
    async with PrometheusSource(Prometheus(url=prometheus.url)) as source:
        evidence = await one(source, query, start=dataset.begin, end=dataset.end)
    assert evidence.missing is not None
    assert evidence.missing.startswith(reason)
    assert len(evidence.missing) <= 300
    assert evidence.frame.ids == ()


async def test_victoria_metrics_words_are_the_reason(victoria: Server) -> None:
    async with PrometheusSource(Prometheus(url=victoria.url)) as source:
        evidence = await one(source, "sum(")
    assert evidence.missing is not None
    assert evidence.missing.startswith("http 422: 422: ")


async def test_a_query_that_cannot_be_filled_is_missing_and_the_others_are_not(prometheus: Server) -> None:
    async with PrometheusSource(Prometheus(url=prometheus.url)) as source:
        asked = request_of(Query("a", "up{$services}"), Query("b", "vector(1)"), Query("c", "up{$scope}"), services=())
        a, b, c = await source.fetch(asked, 20.0)
    assert a.missing == "unknown variable $services: a query knows $service, $scope and $rate"
    assert b.missing is None
    assert b.frame.values[0].tolist() == [1.0] * 121
    assert c.missing is not None
    assert c.missing.startswith("no services in scope")


# -- servers that misbehave


# Sorts an hour of seconds for each second of an hour, for six series: minutes of work.
SLOW = "quantile_over_time(0.5, quantile_over_time(0.5, requests_total[1h:1s])[1h:1s])"


async def querying(url: str) -> None:
    """Returns once the server is busy with a query of ours."""

    def active() -> bool:
        with urllib.request.urlopen(f"{url}/metrics", timeout=5) as response:
            return any(row == "prometheus_engine_queries 1" for row in response.read().decode().split("\n"))

    async with asyncio.timeout(20):
        while not await asyncio.to_thread(active):
            await asyncio.sleep(0.02)


async def test_a_server_killed_in_the_middle_of_a_query(own_prometheus: Server, dataset: Dataset) -> None:
    async with PrometheusSource(Prometheus(url=own_prometheus.url)) as source:
        task = asyncio.create_task(one(source, SLOW, start=dataset.begin, end=dataset.end, deadline=60.0))
        await querying(own_prometheus.url)
        own_prometheus.process.kill()
        evidence = await task
        await asyncio.to_thread(own_prometheus.process.wait, 20)
        after = await one(source, "up")
    assert evidence.missing == "the server closed the connection before it answered"
    assert after.missing == f"connection refused: 127.0.0.1:{own_prometheus.url.rpartition(':')[2]}"


async def test_the_server_itself_gives_up_before_we_do(own_prometheus: Server, dataset: Dataset) -> None:
    async with PrometheusSource(Prometheus(url=own_prometheus.url)) as source:
        evidence = await one(source, SLOW, start=dataset.begin, end=dataset.end, deadline=1.0)
    assert evidence.missing is not None
    assert evidence.missing.startswith("http 503: timeout: ") or evidence.missing == "timeout after 1 s"


async def test_cancelling_a_query_ends_it_for_the_server_too() -> None:
    asked, left = asyncio.Event(), asyncio.Event()

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        asked.set()
        while await reader.read(1000):  # the form, then nothing until the other side goes
            pass
        left.set()

    async with raw_server(wait) as url, PrometheusSource(Prometheus(url=url)) as source, asyncio.timeout(20):
        task = asyncio.create_task(one(source))
        await asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await left.wait()


async def test_nobody_listens() -> None:
    closed = port()
    async with PrometheusSource(Prometheus(url=f"http://127.0.0.1:{closed}")) as source:
        assert (await one(source)).missing == f"connection refused: 127.0.0.1:{closed}"


async def test_a_name_that_does_not_resolve() -> None:
    async with PrometheusSource(Prometheus(url="http://prometheus.invalid:9090")) as source:
        assert (await one(source)).missing == "name not resolved: prometheus.invalid"


@contextlib.asynccontextmanager
async def raw_server(
    answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[str]:
    """A TCP server; `answer` does with a connection what it likes."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            await answer(reader, writer)
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


@pytest.fixture
def hung() -> Iterator[str]:
    """A socket whose connections are accepted by the kernel and answered by nobody."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen(128)
        yield f"http://127.0.0.1:{s.getsockname()[1]}"


async def test_fifty_queries_to_a_hung_server_are_all_missing_under_one_deadline(hung: str) -> None:
    queries = tuple(Query(f"q{i}", "up") for i in range(50))
    async with PrometheusSource(Prometheus(url=hung, concurrency=4)) as source:
        # Fifty queries in turns of four, each with a second of its own, would not be done in ten.
        async with asyncio.timeout(10):
            answers = await source.fetch(request_of(*queries), 1.0)
        assert [e.name for e in answers] == [q.name for q in queries]
        assert {e.missing for e in answers} == {"timeout after 1 s"}


async def test_a_deadline_that_has_passed_is_missing(fake: Fake) -> None:
    async with PrometheusSource(Prometheus(url=fake.url)) as source:
        assert (await one(source, deadline=-1.0)).missing == "timeout after 0 s"
    assert fake.seen == []


async def test_a_slow_drip_meets_the_deadline() -> None:
    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        while True:
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(0.01)

    async with raw_server(drip) as url, PrometheusSource(Prometheus(url=url)) as source, asyncio.timeout(20):
        assert (await one(source, deadline=0.5)).missing == "timeout after 0.5 s"


async def test_an_answer_that_is_cut_off() -> None:
    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"status"')
        await writer.drain()

    async with raw_server(cut) as url, PrometheusSource(Prometheus(url=url)) as source:
        assert (await one(source)).missing == "the answer was cut off"


async def test_something_that_does_not_speak_http() -> None:
    async def ssh(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n")
        await writer.drain()
        await reader.read(10)

    async with raw_server(ssh) as url, PrometheusSource(Prometheus(url=url)) as source:
        evidence = await one(source)
    assert evidence.missing is not None
    assert "Bad" in evidence.missing or "Expected HTTP" in evidence.missing


def answering(body: bytes | str, status: int = 200) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def answer(_: web.Request) -> web.StreamResponse:
        raw = body.encode() if isinstance(body, str) else body
        return web.Response(body=raw, status=status, content_type="application/json")

    return answer


def matrix(*series: object) -> str:
    return json.dumps({"status": "success", "data": {"resultType": "matrix", "result": series}})


BAD_ANSWERS = {
    "empty": (b"", "query_range: the answer is not JSON"),
    "page": (b"<html>login</html>", "query_range: the answer is not JSON"),
    "bad UTF-8": (b'{"status": "\xff"}', "query_range: the answer is not JSON"),
    "another API": ('{"ok": true}', "query_range: the answer is not of the Prometheus API"),
    "a list": ("[]", "query_range: the answer is not of the Prometheus API"),
    "error with 200": ('{"status":"error","errorType":"execution","error":"no\\nluck"}', "execution: no luck"),
    "error without words": ('{"status":"error"}', "no reason given"),
    "no data": ('{"status":"success"}', "query_range: the answer has no data.result"),
    "vector": (
        '{"status":"success","data":{"resultType":"vector","result":[]}}',
        "query_range: the answer is a vector, expected a matrix",
    ),
    "series is a list": (matrix([]), "query_range: a series of the answer"),
    "no metric": (matrix({"values": []}), "query_range: a series of the answer"),
    "label is a number": (matrix({"metric": {"a": 1}, "values": []}), "query_range: a series of the answer"),
    "sample is a word": (matrix({"metric": {}, "values": [[1, "x"]]}), "query_range: a series of the answer"),
    "sample has no value": (matrix({"metric": {}, "values": [[1]]}), "query_range: a series of the answer"),
    "time is a word": (matrix({"metric": {}, "values": [["x", "1"]]}), "query_range: a series of the answer"),
    "values is null": (matrix({"metric": {}, "values": None}), "query_range: a series of the answer"),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
async def test_an_answer_of_another_shape_is_missing(fake: Fake, name: str) -> None:
    body, reason = BAD_ANSWERS[name]
    fake.answer = answering(body)
    async with PrometheusSource(Prometheus(url=fake.url)) as source:
        evidence = await one(source)
    assert evidence.missing is not None
    assert evidence.missing.startswith(reason)
    assert "\n" not in evidence.missing


HTTP_ERRORS = [
    (503, '{"status":"error","errorType":"timeout","error":"query timed out"}', "http 503: timeout: query timed out"),
    (503, "overloaded\n", "http 503: overloaded"),
    (422, '{"status":"error","errorType":"execution","error":"x"}', "http 422: execution: x"),
    (400, '{"status":"error","errorType":"bad_data","error":"y"}', "http 400: bad_data: y"),
    (401, "", "http 401: Unauthorized; check the credentials"),
    (403, "no", "http 403: no; check the credentials"),
    (404, "404 page not found", "http 404: 404 page not found; check the url's path"),
    (429, "", "http 429: Too Many Requests"),
    (500, "x" * 100_000, "http 500: " + "x" * 197 + "..."),
]


@pytest.mark.parametrize(("status", "body", "reason"), HTTP_ERRORS)
async def test_http_errors_are_told_with_the_servers_reason(fake: Fake, status: int, body: str, reason: str) -> None:
    fake.answer = answering(body, status)
    async with PrometheusSource(Prometheus(url=fake.url)) as source:
        assert (await one(source)).missing == reason


async def test_a_redirect_is_not_followed(fake: Fake) -> None:
    async def away(_: web.Request) -> web.StreamResponse:
        return web.Response(status=307, headers={"Location": f"{fake.url}/elsewhere"})

    fake.answer = away
    async with PrometheusSource(Prometheus(url=fake.url, bearer="secret")) as source:
        evidence = await one(source)
    assert evidence.missing is not None
    assert "redirects are not followed" in evidence.missing
    assert [s.path for s in fake.seen] == ["/api/v1/query_range"]


async def test_a_decompression_bomb_is_bounded(fake: Fake) -> None:
    import gzip

    async def bomb(_: web.Request) -> web.StreamResponse:
        return web.Response(body=gzip.compress(b" " * 20_000_000), headers={"Content-Encoding": "gzip"})

    fake.answer = bomb
    async with PrometheusSource(Prometheus(url=fake.url, max_bytes=1_000_000)) as source:
        evidence = await one(source)
    assert evidence.missing is not None
    assert evidence.missing.startswith("answer too large")


async def test_warnings_and_infos_are_kept_and_bounded(fake: Fake) -> None:
    warnings = ["partial response: store x did not answer"] + ["w" * 1000] * 40
    fake.answer = answering(json.dumps({**NOTHING, "warnings": warnings, "infos": ["metric might not be a counter"]}))
    async with PrometheusSource(Prometheus(url=fake.url)) as source:
        evidence = await one(source)
    assert evidence.missing is None
    assert evidence.warnings[0] == "partial response: store x did not answer"
    assert evidence.warnings[-1] == "22 more warnings left out"
    assert max(map(len, evidence.warnings)) <= 300


async def test_native_histograms_and_strays_are_left_out_and_said(fake: Fake) -> None:
    histogram = {"metric": {"service": "a"}, "histograms": [[0, {"count": "1", "sum": "1", "buckets": []}]]}
    both = {"metric": {"service": "b"}, "values": [[0, "1"], [31, "2"], [60.0, "3"], [-30, "4"]], "histograms": []}
    fake.answer = answering(matrix(histogram, both))
    async with PrometheusSource(Prometheus(url=fake.url)) as source:
        evidence = await one(source, start=0, end=60, step=30)
    assert evidence.frame.ids == (SeriesId.of("signal", {"service": "b"}),)
    np.testing.assert_array_equal(evidence.frame.values, [[1.0, math.nan, 3.0]])
    assert any(w.startswith("2 samples lay beside the grid") for w in evidence.warnings)
    assert any(w.startswith("2 series are native histograms") for w in evidence.warnings)


async def test_what_is_sent(fake: Fake) -> None:
    config = Prometheus(url=f"{fake.url}/prom/", rate="10s", parameters={"dedup": "true"})
    async with PrometheusSource(config) as source:
        await one(source, "rate(x{$scope}[$rate])", start=1000.5, end=2000.2, step=30, services=("a+b &=", "é"))
    (seen,) = fake.seen
    assert (seen.path, seen.method) == ("/prom/api/v1/query_range", "POST")
    assert seen.form.pop("timeout")
    assert seen.form == {
        "query": 'rate(x{service=~"a\\\\+b &=|é"}[10s])',
        "start": "990.000",
        "end": "1980.000",
        "step": "30.000",
        "dedup": "true",
    }
    assert "Authorization" not in seen.headers


async def test_the_server_is_told_to_give_up_earlier_than_we_do(fake: Fake) -> None:
    async with PrometheusSource(Prometheus(url=fake.url)) as source:
        await one(source, deadline=8.0)
    assert 5.0 < float(fake.seen[0].form["timeout"]) <= 7.5


async def test_bearer_token_is_read_each_time(fake: Fake) -> None:
    tokens = iter(["one", "two"])
    async with PrometheusSource(Prometheus(url=fake.url, bearer=lambda: next(tokens))) as source:
        await one(source)
        await one(source)
    assert [s.headers["Authorization"] for s in fake.seen] == ["Bearer one", "Bearer two"]


async def test_a_token_that_cannot_be_read_is_missing(fake: Fake) -> None:
    def unreadable() -> str:
        raise PermissionError(13, "Permission denied", "/run/token")

    async with PrometheusSource(Prometheus(url=fake.url, bearer=unreadable)) as source:
        evidence = await one(source)
    assert evidence.missing is not None
    assert "Permission denied" in evidence.missing
    assert fake.seen == []


async def test_basic_auth(fake: Fake) -> None:
    async with PrometheusSource(Prometheus(url=fake.url, username="médic", password="pä:ss")) as source:
        await one(source)
    assert fake.seen[0].headers["Authorization"] == "Basic bcOpZGljOnDDpDpzcw=="


async def test_secrets_are_not_shown() -> None:
    assert "hunter2" not in repr(Prometheus(url="http://x", bearer="hunter2", password="hunter2"))
    with pytest.raises(ValueError, match="credentials do not belong there") as refused:
        PrometheusSource(Prometheus(url="http://user:hunter2@x"))
    assert "hunter2" not in str(refused.value)


TENANTS = [("", "team-a", "team-a"), ("fixed", "team-a", "fixed"), ("", "", None)]


@pytest.mark.parametrize(("configured", "asked", "sent"), TENANTS)
async def test_tenant_header(fake: Fake, configured: str, asked: str, sent: str | None) -> None:
    config = Prometheus(url=fake.url, tenant_header="X-Scope-OrgID", tenant=configured)
    async with PrometheusSource(config) as source:
        await one(source, tenant=asked)
    assert fake.seen[0].headers.get("X-Scope-OrgID") == sent


async def test_without_a_tenant_header_the_tenant_is_not_sent(fake: Fake) -> None:
    async with PrometheusSource(Prometheus(url=fake.url)) as source:
        await one(source, tenant="team-a")
    assert "team-a" not in fake.seen[0].headers.values()


@pytest.mark.parametrize("tenant", ["a|b", "a\r\nX: y", "a b", "é", "a" * 151, "a/b"])
async def test_a_tenant_that_could_mean_more_is_not_sent(fake: Fake, tenant: str) -> None:
    async with PrometheusSource(Prometheus(url=fake.url, tenant_header="X-Scope-OrgID")) as source:
        evidence = await one(source, tenant=tenant)
    assert evidence.missing is not None
    assert "cannot be sent" in evidence.missing
    assert fake.seen == []


@pytest.mark.parametrize("url", ["", "prometheus:9090", "ftp://x", "http://", "http://x/?a=b", "http://x#y"])
def test_an_url_that_cannot_work_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="prometheus url"):
        PrometheusSource(Prometheus(url=url))


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory, program: Callable[[str], str]) -> Path:
    """A CA, a server's certificate for 127.0.0.1 and prometheus.test, and a client's."""
    where = tmp_path_factory.mktemp("tls")
    openssl = program("openssl")

    def run(*argv: str) -> None:
        done = subprocess.run([openssl, *argv], cwd=where, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr

    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    run("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=test CA", "-days", "2")
    for name, names in (
        ("server", "IP:127.0.0.1,DNS:prometheus.test"),
        ("client", "DNS:client"),
        ("other", "DNS:other"),
    ):
        (where / "ext").write_text(f"subjectAltName={names}\n")
        run("req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        run(
            *["x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"],
            *["-out", f"{name}.pem", "-days", "2", "-extfile", "ext"],
        )
    return where


@contextlib.asynccontextmanager
async def tls_server(certificates: Path, name: str = "server", client: bool = False) -> AsyncIterator[str]:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificates / f"{name}.pem", certificates / f"{name}.key")
    if client:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(certificates / "ca.pem")
    app = web.Application()

    async def answer(_: web.Request) -> web.Response:
        return web.json_response(NOTHING)

    app.router.add_post("/api/v1/query_range", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    listen = port()
    await web.TCPSite(runner, "127.0.0.1", listen, ssl_context=context).start()
    try:
        yield f"https://127.0.0.1:{listen}"
    finally:
        await runner.cleanup()


async def test_tls_with_a_private_ca(certificates: Path) -> None:
    async with tls_server(certificates) as url:
        async with PrometheusSource(Prometheus(url=url, ca_file=certificates / "ca.pem")) as source:
            assert (await one(source)).missing is None
        async with PrometheusSource(Prometheus(url=url)) as source:
            missing = (await one(source)).missing
            assert missing is not None
            assert missing.startswith("TLS with 127.0.0.1:")
        async with PrometheusSource(Prometheus(url=url, insecure_skip_verify=True)) as source:
            assert (await one(source)).missing is None


async def test_tls_names_must_fit(certificates: Path) -> None:
    ca = certificates / "ca.pem"
    async with tls_server(certificates) as url:
        async with PrometheusSource(Prometheus(url=url, ca_file=ca, server_name="prometheus.test")) as source:
            assert (await one(source)).missing is None
        async with PrometheusSource(Prometheus(url=url, ca_file=ca, server_name="elsewhere.test")) as source:
            missing = (await one(source)).missing
            assert missing is not None
            assert "ismatch" in missing
    async with tls_server(certificates, "other") as url, PrometheusSource(Prometheus(url=url, ca_file=ca)) as source:
        assert (await one(source)).missing is not None


async def test_client_certificate(certificates: Path) -> None:
    ca = certificates / "ca.pem"
    async with tls_server(certificates, client=True) as url:
        own = {"cert_file": certificates / "client.pem", "key_file": certificates / "client.key"}
        async with PrometheusSource(Prometheus(url=url, ca_file=ca, **own)) as source:
            assert (await one(source)).missing is None
        async with PrometheusSource(Prometheus(url=url, ca_file=ca)) as source:
            assert (await one(source)).missing is not None


async def test_at_most_so_many_requests_are_under_way(fake: Fake) -> None:
    now, most = 0, 0
    full = asyncio.Event()

    async def slow(_: web.Request) -> web.StreamResponse:
        nonlocal now, most
        now += 1
        most = max(most, now)
        if now == 3:
            full.set()
        async with asyncio.timeout(20):
            await full.wait()
        await asyncio.sleep(0.005)  # room for a fourth, were there one
        now -= 1
        return web.json_response(NOTHING)

    fake.answer = slow
    queries = tuple(Query(f"q{i}", "up") for i in range(12))
    async with PrometheusSource(Prometheus(url=fake.url, concurrency=3)) as source:
        answers = await source.fetch(request_of(*queries), 20.0)
    assert most == 3
    assert [e.missing for e in answers] == [None] * 12


async def test_a_closed_source_answers_nothing_and_leaks_nothing(fake: Fake) -> None:
    source = PrometheusSource(Prometheus(url=fake.url))
    await source.close()
    assert (await one(source)).missing == "the source prometheus is closed"
    await source.close()


async def test_answers_that_arrived_before_the_deadline_are_kept(fake: Fake) -> None:
    async def some(asked: web.Request) -> web.StreamResponse:
        if (await asked.post())["query"] == "slow":
            await asyncio.sleep(30)
        return web.json_response(NOTHING)

    fake.answer = some
    async with PrometheusSource(Prometheus(url=fake.url)) as source:
        quick, slow = await gather([source], request_of(Query("a", "quick"), Query("b", "slow")), 1.0)
    assert quick.missing is None
    assert slow.missing is not None
    assert slow.missing.startswith("timeout after")


# -- the other questions


async def test_instant_queries(prometheus: Server, dataset: Dataset) -> None:
    async with PrometheusSource(Prometheus(url=prometheus.url)) as source:
        samples, warnings = await source.query_instant('special{service="front"}', at=dataset.begin + STEP)
        (scalar,), _ = await source.query_instant("scalar(vector(2))")
        with pytest.raises(QueryError, match="expected a vector"):
            await source.query_instant("gappy[5m]", at=dataset.begin + 300)
        with pytest.raises(QueryError, match="http 400: bad_data"):
            await source.query_instant("sum(")
    assert [(s.labels["service"], s.time, s.value) for s in samples] == [("front", dataset.begin + STEP, math.inf)]
    assert warnings == ()
    assert (scalar.labels, scalar.value) == ({}, 2.0)


async def test_an_instant_answer_is_bounded(prometheus: Server, dataset: Dataset) -> None:
    async with PrometheusSource(Prometheus(url=prometheus.url, max_series=10)) as source:
        with pytest.raises(QueryError, match="600 samples, at most 10"):
            await source.query_instant("wide", at=dataset.begin + 1800)


async def test_range_queries_by_hand(prometheus: Server, dataset: Dataset) -> None:
    async with PrometheusSource(Prometheus(url=prometheus.url)) as source:
        frame, warnings = await source.query_range("gappy", (dataset.begin, dataset.begin + 60, 30))
    assert frame.ids == (SeriesId.of("gappy", {"service": "front"}),)
    assert frame.values.tolist() == [[0.0, 2.0, 4.0]]
    assert warnings == ()


async def test_series_and_label_values(prometheus: Server, dataset: Dataset) -> None:
    window = (dataset.begin, dataset.end)
    async with PrometheusSource(Prometheus(url=prometheus.url)) as source:
        series = await source.series(['gappy{service="front"}', "single"], window)
        names = await source.label_values("service", ["strange"])
        with pytest.raises(QueryError, match="not a label name"):
            await source.label_values("../../admin")
    assert sorted(s["__name__"] for s in series) == ["gappy", "single"]
    assert set(names) == set(dataset.names)


async def test_rules_and_firing_alerts(prometheus: Server) -> None:
    async with PrometheusSource(Prometheus(url=prometheus.url)) as source:
        rules = await source.rules()
        async with asyncio.timeout(20):
            while not (alerts := await source.alerts_firing()):
                await asyncio.sleep(0.05)
    assert [(r.name, r.query, r.seconds, r.group) for r in rules] == [
        ("AlwaysFiring", "vector(1) > 0", 0.0, "shop"),
        ("NeverFiring", "vector(1) > 2", 300.0, "shop"),
    ]
    assert rules[0].labels == {"severity": "page", "service": "front"}
    (alert,) = alerts
    assert alert.labels == {"alertname": "AlwaysFiring", "severity": "page", "service": "front"}
    assert alert.annotations == {"summary": "it is 1"}


@pytest.mark.parametrize("body", ["{}", '{"status":"success"}', '{"status":"success","data":{"groups":[{"rules":1}]}}'])
async def test_other_questions_raise_for_answers_of_another_shape(fake: Fake, body: str) -> None:
    fake.answer = answering(body)
    async with PrometheusSource(Prometheus(url=fake.url)) as source:
        for ask in (source.rules(), source.alerts_firing(), source.label_values("a"), source.series(["a"], (0, 1))):
            with pytest.raises(QueryError):
                await ask


def test_data_for_the_second_store_is_in_milliseconds() -> None:
    assert in_millis(line("a", {"b": "c d"}, 1, 60)) == 'a{b="c d"} 1 60000\n'
