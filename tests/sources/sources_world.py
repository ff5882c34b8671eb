"""What the tests of evidence sources share: a known data set, and how to start real servers."""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from agent.sources import EvidenceRequest
from agent.sources.prometheus import PrometheusSource
from rules.model import Evidence

STEP = 15
POINTS = 241  # one hour


@dataclass(frozen=True)
class Query:
    name: str
    query: str
    source: str = "prometheus"


@dataclass(frozen=True)
class Dataset:
    """What both stores hold. `begin` and `end` are unix seconds, multiples of 60, more than two hours ago."""

    begin: int
    end: int
    names: tuple[str, ...]  # service names nobody would choose
    wide: int
    text: str = field(repr=False)


def strange_names() -> tuple[str, ...]:
    """Service names made of everything that means something to RE2, PromQL, HTTP forms or Go's strings."""
    rng = random.Random(7)
    pieces = [
        *"\\.+*?()|[]{}^$\"'`-_/ %&=#;,~!@:<>0aZ",
        "\n",
        "\t",
        "\r",
        "\x01",
        "\x7f",
        "\x85",
        "é",
        "世界",
        "\u2028",
    ]
    pieces += [
        "😀",
        "\ufffd",
        "\ufeff",
        "\\d",
        "\\Q",
        "\\E",
        "(?i)",
        ".*",
        "\\n",
        "$scope",
        "$service",
        "\\u0041",
        "a|b",
    ]
    made = {"".join(rng.choices(pieces, k=rng.randint(1, 6))) for _ in range(300)}
    return tuple(sorted(made | set(pieces) | {"front", "Front", "front ", " front", "fron", "front|orders", "x" * 500}))


def line(metric: str, labels: dict[str, str], value: object, at: float | None) -> str:
    quoted = ",".join(
        '{}="{}"'.format(k, v.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")) for k, v in labels.items()
    )
    return f"{metric}{{{quoted}}} {value}" + ("" if at is None else f" {at}")


def build_dataset() -> Dataset:
    end = int(time.time()) // 60 * 60 - 2 * 3600 - 600
    begin = end - (POINTS - 1) * STEP
    rng = random.Random(11)
    names = strange_names()
    lines: list[str] = []
    for service in ("front", "orders", "worker"):
        for route in ("/", "/buy"):
            total = 0.0
            for i in range(POINTS):
                total = 0.0 if i == 150 else total + rng.random() * 10  # a restart
                at = begin + i * STEP
                lines.append(line("requests_total", {"service": service, "route": route}, f"{total!r}", at))
    for i in range(POINTS):
        at = begin + i * STEP
        if not 80 <= i < 160:
            lines.append(line("gappy", {"service": "front"}, i, at))
        odd = ("NaN", "+Inf", "-Inf", "1.5")[i % 4]
        lines.append(line("special", {"service": "front"}, odd, at))
        lines.append(line("old_name", {"service": "front", "app": "shop"}, i, at))
        lines.append(line("new_name", {"service": "front", "app": "shop"}, -i, at))
    lines.append(line("single", {"service": "front"}, 42, begin + 600))
    wide = 600
    for i in range(wide):
        lines.append(line("wide", {"service": f"s{i:04d}"}, i, begin + 1800))
    for i, name in enumerate(names):
        lines.append(line("strange", {"service": name, "n": str(i)}, i, begin + 1800))
    return Dataset(begin, end, names, wide, "\n".join(lines) + "\n")


RULES = """
groups:
- name: shop
  rules:
  - alert: AlwaysFiring
    expr: vector(1) > 0
    labels: {severity: page, service: front}
    annotations: {summary: "it is {{ $value }}"}
  - alert: NeverFiring
    expr: vector(1) > 2
    for: 5m
  - record: job:up:sum
    expr: sum(up)
"""


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(url, timeout=2) as response:
                if response.status == 200:
                    return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            pass
        time.sleep(0.05)
    pytest.fail(f"{url} did not come up: {log.read_text()[-2000:]}")


def stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
    process.wait(10)


def port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        found: int = s.getsockname()[1]
        return found


@dataclass
class Server:
    url: str
    process: subprocess.Popen[bytes]


def start_prometheus(binary: str, where: Path, data: Path) -> Server:
    (where / "rules.yml").write_text(RULES)
    config = "global: {evaluation_interval: 200ms, scrape_interval: 1s}\nrule_files: [rules.yml]\n"
    (where / "prometheus.yml").write_text(config)
    listen = port()
    log = where / "log"
    argv = [binary, f"--config.file={where / 'prometheus.yml'}", f"--storage.tsdb.path={data}"]
    argv += [f"--web.listen-address=127.0.0.1:{listen}", "--storage.tsdb.retention.time=30d"]
    with log.open("wb") as out:
        process = subprocess.Popen(argv, stdout=out, stderr=out)
    server = Server(f"http://127.0.0.1:{listen}", process)
    wait_for(f"{server.url}/-/ready", process, log)
    return server


def in_millis(row: str) -> str:
    head, _, at = row.rpartition(" ")
    return f"{head} {int(at) * 1000}\n"


@dataclass
class Seen:
    path: str
    method: str
    headers: dict[str, str]
    form: dict[str, str]


@dataclass
class Fake:
    """A small HTTP server of ours. `answer` may be replaced by the test."""

    url: str = ""
    seen: list[Seen] = field(default_factory=list)
    answer: Callable[[web.Request], Awaitable[web.StreamResponse]] | None = None


Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


NOTHING: dict[str, Any] = {"status": "success", "data": {"resultType": "matrix", "result": []}}


def request_of(
    *queries: Query, start: float = 0.0, end: float = 3600.0, step: float = 30.0, **more: Any
) -> EvidenceRequest:
    return EvidenceRequest(queries, more.pop("services", ("front",)), start, end, step, **more)


async def one(source: PrometheusSource, query: str = "up", deadline: float = 20.0, **more: Any) -> Evidence:
    (evidence,) = await source.fetch(request_of(Query("signal", query), **more), deadline)
    return evidence


def answering(body: bytes | str, status: int = 200) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def answer(_: web.Request) -> web.StreamResponse:
        raw = body.encode() if isinstance(body, str) else body
        return web.Response(body=raw, status=status, content_type="application/json")

    return answer
