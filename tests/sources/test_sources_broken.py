"""What broken, slow and hostile servers do to us: a reason, never an exception."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import socket
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import numpy as np
import pytest
from aiohttp import web
from sources_world import NOTHING, Dataset, Fake, Query, Server, answering, one, port, request_of

from agent.sources.prometheus import Prometheus, PrometheusSource
from rules.model import SeriesId

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


@pytest.mark.parametrize("odd", [5, True, {"a": 1}, "text", 0.5])
async def test_warnings_of_another_shape_are_no_reason_to_fail(fake: Fake, odd: object) -> None:
    fake.answer = answering(json.dumps({**NOTHING, "warnings": odd, "infos": odd}))
    async with PrometheusSource(Prometheus(url=fake.url)) as source:
        evidence = await one(source)
    assert (evidence.missing, evidence.warnings) == (None, ())
