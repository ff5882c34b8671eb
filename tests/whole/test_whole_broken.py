"""Whatever Prometheus does, an incident is diagnosed on what there is, and says what was missing."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from whole_world import Program, Shop, Whole

from agent.fold_model import Incident
from bench import backfill

Make = Callable[..., Awaitable[Whole]]
Mode = Callable[[str], str]  # of a query's text
GARBAGE = {
    "html": b"<html>It works!</html>",
    "nothing": b"",
    "binary": bytes(range(256)) * 40,
    "cut": b'{"status":"success","data":{"resultType":"matrix","result":[{"metric":{"service":"front"},"val',
    "scalar": b'{"status":"success","data":{"resultType":"scalar","result":[1,"1"]}}',
    "shape": b'{"status":"success","data":{"resultType":"matrix","result":[{"metric":[],"values":{"a":1}}]}}',
    "deep": b"[" * 100_000,
    "numbers": b'{"status":"success","data":{"resultType":"matrix","result":[{"metric":{},"values":[[1e400,"x"]]}]}}',
}


@pytest.fixture
async def between(shop: Shop) -> AsyncIterator[tuple[str, dict[str, Mode]]]:
    """(url, modes): a server before the shop's Prometheus that passes a query on, hangs, or answers garbage, as
    `modes["mode"]` says of its text."""
    modes: dict[str, Mode] = {"mode": lambda _: "pass"}
    stopping = asyncio.Event()

    async def handle(asked: web.Request) -> web.StreamResponse:
        form = {k: str(v) for k, v in (await asked.post()).items()}
        mode = modes["mode"](form.get("query", ""))
        if mode == "hang":
            await stopping.wait()
        if mode in GARBAGE:
            return web.Response(body=GARBAGE[mode], content_type="application/json")
        if mode == "error":
            return web.json_response({"status": "error", "errorType": "internal", "error": "no memory"}, status=500)
        async with aiohttp.ClientSession() as session:
            how = {"data": form} if asked.method == "POST" else {"params": dict(asked.query)}
            async with session.request(asked.method, f"{shop.url}{asked.path}", **how) as answer:  # type: ignore[arg-type]
                return web.Response(body=await answer.read(), status=answer.status, content_type="application/json")

    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    assert site._server is not None
    yield f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}", modes  # type: ignore[attr-defined]
    stopping.set()
    await runner.cleanup()


def told(incident: Incident) -> dict[str, str]:
    """What the incident says was missing of Prometheus; its sentence names it too."""
    assert incident.diagnosis is not None
    missing = {k: v for k, v in incident.diagnosis.missing.items() if k not in ("host.processes", "alert.expression")}
    assert "Missing: " in incident.diagnosis.sentence
    return missing


async def test_killed_before_the_look(shop: Shop, whole: Make, tmp_path: Path, program: Program) -> None:
    data = shutil.copytree(shop.data, tmp_path / "data")
    process, url = backfill.serve(program("prometheus", "prometheus"), tmp_path, data)
    one = await whole(url)
    first = await one.diagnosed(await one.alert())
    assert first.diagnosis is not None
    assert first.diagnosis.hypotheses[0].service == "orders"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    second = await one.diagnosed(await one.alert("payments", "Errors"))
    assert second.diagnosis is not None
    assert second.diagnosis.verdict == "insufficient_evidence"
    missing = told(second)
    assert len(missing) > 20
    assert all("refused" in reason for reason in missing.values()), missing


@pytest.mark.parametrize("kind", [*GARBAGE, "error"])
async def test_garbage(whole: Make, between: tuple[str, dict[str, Mode]], kind: str) -> None:
    url, modes = between
    modes["mode"] = lambda query: kind
    one = await whole(url)
    incident = await one.diagnosed(await one.alert())
    assert incident.diagnosis is not None
    assert incident.diagnosis.verdict == "insufficient_evidence"
    assert len(told(incident)) > 20


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("kind", ["hang", "html"])
async def test_half_of_the_queries(whole: Make, between: tuple[str, dict[str, Mode]], kind: str, half: int) -> None:
    """Time-outs or garbage for half of them: the other half is used, and what is missing is named with its reason."""
    url, modes = between
    modes["mode"] = lambda query: kind if query and zlib.crc32(query.encode()) % 2 == half else "pass"
    one = await whole(url, timeout_seconds=1.5, concurrency=64)
    incident = await one.diagnosed(await one.alert())
    assert incident.diagnosis is not None
    missing = told(incident)
    asked = sum(q.source == "prometheus" for q in one.packs.asked(frozenset()))
    assert 0.2 * asked < len(missing) < 0.8 * asked
    word = "timeout" if kind == "hang" else "not JSON"
    assert all(word in reason for reason in missing.values()), missing
    best = incident.diagnosis.best
    assert best is None or best.service == "orders"
    text = " ".join(line.text for line in incident.story)
    assert "Missing: " in incident.diagnosis.sentence or "without" in text


async def test_the_connection_dies_during_the_answers(whole: Make, shop: Shop) -> None:
    """Every connection is cut after its first bytes."""

    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n{")
        writer.close()

    server = await asyncio.start_server(cut, "127.0.0.1", 0)
    async with server:
        one = await whole(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        incident = await one.diagnosed(await one.alert())
    assert incident.diagnosis is not None
    assert incident.diagnosis.verdict == "insufficient_evidence"
    assert len(told(incident)) > 20


async def test_a_hundred_thousand_series(whole: Make, between: tuple[str, dict[str, Mode]], shop: Shop) -> None:
    """One metric explodes: what is over the bound is named, and the rest of the incident is diagnosed all the same."""
    row = '{{"metric":{{"service":"orders","id":"{0}"}},"values":[[{1},"1"]]}}'
    body = ",".join(row.format(n, shop.past.end) for n in range(100_000))
    GARBAGE["flood"] = f'{{"status":"success","data":{{"resultType":"matrix","result":[{body}]}}}}'.encode()
    url, modes = between
    once = ["flood"]
    modes["mode"] = lambda query: once.pop() if once and "scrape_duration" in query else "pass"
    try:
        one = await whole(url, timeout_seconds=120.0)
        incident = await one.diagnosed(await one.alert())
    finally:
        del GARBAGE["flood"]
    assert incident.diagnosis is not None
    missing: dict[str, Any] = told(incident)
    (reason,) = missing.values()
    assert "100000 series, only the first" in reason
    assert incident.diagnosis.hypotheses[0].service == "orders"
