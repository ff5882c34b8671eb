"""Real servers with known data, and a small one that records what it was asked."""

from __future__ import annotations

import os
import shutil
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from sources_world import (
    Dataset,
    Fake,
    Seen,
    Server,
    build_dataset,
    in_millis,
    port,
    start_prometheus,
    stop,
    wait_for,
)


@pytest.fixture(scope="session")
def dataset() -> Dataset:
    return build_dataset()


@pytest.fixture(scope="session")
def tsdb(tmp_path_factory: pytest.TempPathFactory, dataset: Dataset, program: Callable[[str, str], str]) -> Path:
    where = tmp_path_factory.mktemp("tsdb")
    source = where / "data.om"
    source.write_text(dataset.text + "# EOF\n")
    done = subprocess.run(
        [
            program("promtool", "prometheus"),
            "tsdb",
            "create-blocks-from",
            "openmetrics",
            str(source),
            str(where / "data"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return where / "data"


@pytest.fixture(scope="session")
def prometheus(
    tmp_path_factory: pytest.TempPathFactory, tsdb: Path, program: Callable[[str, str], str]
) -> Iterator[Server]:
    where = tmp_path_factory.mktemp("prometheus")
    shutil.copytree(tsdb, where / "data")
    server = start_prometheus(program("prometheus", "prometheus"), where, where / "data")
    yield server
    stop(server.process)


@pytest.fixture
def own_prometheus(tmp_path: Path, tsdb: Path, program: Callable[[str, str], str]) -> Iterator[Server]:
    """A server that the test may kill."""
    shutil.copytree(tsdb, tmp_path / "data")
    server = start_prometheus(program("prometheus", "prometheus"), tmp_path, tmp_path / "data")
    yield server
    stop(server.process)


@pytest.fixture(scope="session")
def victoria(
    tmp_path_factory: pytest.TempPathFactory, dataset: Dataset, program: Callable[[str, str], str]
) -> Iterator[Server]:
    where = tmp_path_factory.mktemp("victoria")
    listen = port()
    log = where / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [
                program("victoria-metrics", "victoria-metrics"),
                f"-storageDataPath={where / 'data'}",
                f"-httpListenAddr=127.0.0.1:{listen}",
                "-retentionPeriod=1y",
                "-search.disableCache",
            ],
            stdout=out,
            stderr=out,
            env={**os.environ, "GOMAXPROCS": "2"},
        )
    server = Server(f"http://127.0.0.1:{listen}", process)
    wait_for(f"{server.url}/health", process, log)
    body = "".join(in_millis(row) for row in dataset.text.split("\n") if row)
    request = urllib.request.Request(f"{server.url}/api/v1/import/prometheus", data=body.encode(), method="POST")
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.status == 204
    urllib.request.urlopen(f"{server.url}/internal/force_flush", timeout=60).close()
    yield server
    stop(process)


@pytest.fixture
async def fake(request: pytest.FixtureRequest) -> Any:
    """A server that records what it was asked. Indirect parameter: an ssl context."""
    server = Fake()

    async def handle(asked: web.Request) -> web.StreamResponse:
        form = dict(await asked.post()) if asked.method == "POST" else dict(asked.query)
        server.seen.append(Seen(asked.path, asked.method, dict(asked.headers), {k: str(v) for k, v in form.items()}))
        if server.answer is None:
            return web.json_response({"status": "success", "data": {"resultType": "matrix", "result": []}})
        return await server.answer(asked)

    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=getattr(request, "param", None))
    await site.start()
    assert site._server is not None
    bound = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
    server.url = f"{'https' if getattr(request, 'param', None) else 'http'}://127.0.0.1:{bound}"
    yield server
    await runner.cleanup()
