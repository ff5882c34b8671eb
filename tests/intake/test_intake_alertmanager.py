"""A real Alertmanager sends to the port: by bearer token and by basic auth, resolves, and comes again after a 503."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from intake_world import HeldStore, Port

from agent.http.auth import Credential, Guard
from agent.http.server import Options

GUARD = Guard([Credential("am", "s3cret-token"), Credential("am-basic", "pa:ss wörd", user="am")])
CONFIG = """
route:
  receiver: bearer
  group_by: [alertname]
  group_wait: 10ms
  group_interval: 1s
  repeat_interval: 1s
  routes:
    - {{ receiver: basic, matchers: ['way="basic"'] }}
    - {{ receiver: wrong, matchers: ['way="wrong"'] }}
receivers:
  - name: bearer
    webhook_configs:
      - url: {url}/webhook
        http_config: {{ authorization: {{ credentials_file: {token} }} }}
  - name: basic
    webhook_configs:
      - url: {url}/webhook/team
        http_config: {{ basic_auth: {{ username: am, password: "pa:ss wörd" }} }}
  - name: wrong
    webhook_configs:
      - url: {url}/webhook
        http_config: {{ authorization: {{ credentials: guess }} }}
"""
Tell = Callable[..., Awaitable[None]]


async def eventually(true: Callable[[], bool], what: str, seconds: float = 30) -> None:
    try:
        async with asyncio.timeout(seconds):
            while not true():
                await asyncio.sleep(0.02)
    except TimeoutError:
        pytest.fail(f"after {seconds} s: {what}")


@pytest.fixture
async def world(
    start: Any, held: HeldStore, program: Callable[[str], str], free_port: Callable[[], int], tmp_path: Path
) -> AsyncIterator[tuple[Port, Tell, list[int]]]:
    """The port, `tell(name, way, ends_in=None)` which posts an alert to Alertmanager, and the statuses answered."""
    statuses: list[int] = []
    port: Port = await start(held, Options(guard=GUARD, on_webhook=lambda status, *_: statuses.append(status)))
    (tmp_path / "token").write_text("s3cret-token")
    (tmp_path / "am.yml").write_text(CONFIG.format(url=port.url, token=tmp_path / "token"))
    address = f"127.0.0.1:{free_port()}"
    log = (tmp_path / "am.log").open("wb")
    process = subprocess.Popen(
        [
            program("prometheus-alertmanager"),
            f"--config.file={tmp_path / 'am.yml'}",
            f"--storage.path={tmp_path / 'am'}",
            f"--web.listen-address={address}",
            "--cluster.listen-address=",
        ],
        stdout=log,
        stderr=subprocess.STDOUT,
    )

    async def tell(name: str, way: str, ends_in: float | None = None) -> None:
        sent: dict[str, Any] = {"labels": {"alertname": name, "way": way}, "annotations": {"summary": "ё\u2028🔥"}}
        if ends_in is not None:
            sent["endsAt"] = (datetime.now(UTC) + timedelta(seconds=ends_in)).isoformat()
        async with port.session.post(f"http://{address}/api/v2/alerts", json=[sent]) as answer:
            assert answer.status == 200, await answer.text()

    async def up() -> bool:
        try:
            async with port.session.get(f"http://{address}/-/ready") as answer:
                return answer.status == 200
        except aiohttp.ClientError:
            return False

    try:
        async with asyncio.timeout(30):
            while not await up():
                assert process.poll() is None, (tmp_path / "am.log").read_text()
                await asyncio.sleep(0.05)
        yield port, tell, statuses
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait, 10)
        log.close()


def states(port: Port) -> list[tuple[str, str, str]]:
    return [(r.tenant, a.name, a.status) for r in port.store.received for a in r.alerts]


async def test_fires_repeats_and_resolves(world: tuple[Port, Tell, list[int]]) -> None:
    port, tell, statuses = world
    await tell("Down", "bearer")
    await tell("Slow", "basic")
    await eventually(lambda: len(states(port)) == 2, "both alerts are recorded")
    assert sorted(states(port)) == [("default", "Down", "firing"), ("team", "Slow", "firing")]
    await eventually(lambda: statuses.count(200) >= 4, "Alertmanager repeats")
    assert len(states(port)) == 2
    await tell("Down", "bearer", ends_in=0)
    await eventually(lambda: ("default", "Down", "resolved") in states(port), "the resolve is recorded")
    assert len(states(port)) == 3
    assert set(statuses) == {200}
    alert = port.store.received[0].alerts[0]
    assert alert.annotations == {"summary": "ё\u2028🔥"}
    assert port.store.received[0].external_url.startswith("http://")


async def test_comes_again_after_a_503(world: tuple[Port, Tell, list[int]]) -> None:
    port, tell, statuses = world
    port.store.failing = "append: No space left on device"
    await tell("Down", "bearer")
    await eventually(lambda: 503 in statuses, "Alertmanager was told 503")
    assert states(port) == []
    port.store.failing = ""
    await eventually(lambda: len(states(port)) == 1, "the alert came again")


async def test_a_wrong_token_is_refused(world: tuple[Port, Tell, list[int]]) -> None:
    port, tell, statuses = world
    await tell("Down", "wrong")
    await eventually(lambda: 401 in statuses, "Alertmanager was told 401")
    assert states(port) == []
