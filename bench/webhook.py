"""Webhook throughput with durable acknowledgement, against a bare handler and a bare handler with group commit.

`bench(seconds)` runs three servers, each in a process of its own, under the same load from a third process:

- `ours`: the service's port, real intake, real journal on the real disk, 200 when the alerts are durable;
- `bare`: an aiohttp handler that reads the body, decodes it by orjson and answers;
- `synced`: the same handler, which also appends the body to a file and waits for a group-committed fdatasync.

The load is closed loop: N connections, each sends its next request when the last was answered. A body is the captured
ten-alert payload (8 KB) with fingerprints and start times of its own, so that nothing is a duplicate. Rounds are
interleaved, medians are reported, and only their ratios mean anything beyond this machine. Of ours it also says what
was acknowledged and not yet folded into incidents when the load ended, how fast the rest of it was, and the sustained
rate: acknowledged requests by the time until all of them were folded (the others have nothing left to do by then).

    python -m bench.webhook [SECONDS]
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAYLOAD = ROOT / "tests" / "data" / "payloads" / "ten_alerts.json"
SERVERS = ("ours", "synced", "bare")
CONNECTIONS = (64, 16)
WARM_SECONDS = 0.3


def bench(seconds: float = 30.0, rounds: int = 3) -> dict[str, Any]:
    """Takes about `seconds` plus process starts. Result: per number of connections and server the medians of requests
    per second, p50 and p99 (ms) and CPU time of the server per request (us), and the ratios of ours to the others."""
    each = max(0.5, seconds / (rounds * len(SERVERS) * len(CONNECTIONS)) - WARM_SECONDS)
    taken: dict[int, dict[str, list[dict[str, float]]]] = {n: {s: [] for s in SERVERS} for n in CONNECTIONS}
    for turn in range(rounds):
        for connections in CONNECTIONS:
            for server in SERVERS if turn % 2 == 0 else SERVERS[::-1]:
                taken[connections][server].append(_round(server, connections, each))
    result: dict[str, Any] = {"seconds_per_round": each, "rounds": rounds, "body_bytes": len(_body_parts()[0])}
    for connections, servers in taken.items():
        median = {s: {k: statistics.median(r[k] for r in runs) for k in runs[0]} for s, runs in servers.items()}
        ours, synced, bare = (median[s] for s in SERVERS)
        result[f"connections_{connections}"] = {
            **median,
            "throughput_to_synced": ours["requests_per_second"] / synced["requests_per_second"],
            "sustained_to_synced": ours["sustained_per_second"] / synced["requests_per_second"],
            "cpu_to_synced": ours["server_cpu_us_per_request"] / synced["server_cpu_us_per_request"],
            "throughput_to_bare": ours["requests_per_second"] / bare["requests_per_second"],
            "p99_to_synced": ours["p99_ms"] / synced["p99_ms"],
            "p99_to_bare": ours["p99_ms"] / bare["p99_ms"],
        }
    return result


def _round(server: str, connections: int, seconds: float) -> dict[str, float]:
    """One server, freshly started on an empty directory of the real disk, under load."""
    build = ROOT / "build"
    build.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=build, prefix="bench-webhook-") as directory:
        command = [sys.executable, "-m", "bench.webhook"]
        serving = subprocess.Popen(
            [*command, "serve", server, directory], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            assert serving.stdout is not None
            port = serving.stdout.readline().strip()
            if not port:
                raise RuntimeError(f"bench: the server {server!r} did not start; its error is above")
            arguments = [port, str(connections), str(seconds), str(serving.pid)]
            load = subprocess.run([*command, "load", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
        finally:
            serving.kill()
            serving.wait()
            for stream in (serving.stdin, serving.stdout):
                if stream is not None:
                    stream.close()
    measured: dict[str, float] = json.loads(load.stdout)
    return measured


# -- load


def _body_parts() -> tuple[bytes, list[bytes]]:
    """The captured body, and its pieces around the ten fingerprints (16 digits) and start times (30 characters)."""
    document = json.loads(PAYLOAD.read_bytes())
    body = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    pieces: list[bytes] = []
    rest = body
    for alert in document["alerts"]:
        for value in (alert["startsAt"], alert["fingerprint"]):
            before, _, rest = rest.partition(json.dumps(value).encode())
            pieces.append(before + b'"')
            rest = b'"' + rest
    return body, [*pieces, rest]


class _Bodies:
    """Request after request, no two alike."""

    def __init__(self) -> None:
        body, self._pieces = _body_parts()
        self._head = (
            "POST /webhook HTTP/1.1\r\nHost: bench\r\nUser-Agent: Alertmanager/0.25.0\r\n"
            f"Content-Length: {len(body)}\r\nContent-Type: application/json\r\n\r\n"
        ).encode()
        self._count = 0

    def next(self) -> bytes:
        self._count += 1
        starts = b"2026-11-20T09:59:50.%09dZ" % self._count
        out = [self._head]
        for at in range(0, len(self._pieces) - 1, 2):
            out += (self._pieces[at], starts, self._pieces[at + 1], b"%016x" % (self._count * 32 + at))
        out.append(self._pieces[-1])
        return b"".join(out)


class _Connection(asyncio.Protocol):
    def __init__(self, bodies: _Bodies, taken: list[float], ended: Callable[[Exception], None]) -> None:
        self._bodies = bodies
        self._taken = taken
        self._ended = ended
        self._got = b""
        self._sent = 0.0
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._send()

    def _send(self) -> None:
        assert self._transport is not None
        request = self._bodies.next()
        self._sent = time.perf_counter()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        got = self._got = self._got + data
        head, separator, body = got.partition(b"\r\n\r\n")
        if not separator:
            return
        at = head.lower().index(b"content-length:") + 15
        if len(body) < int(head[at:].split(b"\r\n", 1)[0]):
            return
        self._taken.append(time.perf_counter() - self._sent)
        self._got = b""
        if not got.startswith(b"HTTP/1.1 200") or (b"accepted" in body and b'"accepted":10,' not in body):
            self._ended(RuntimeError(f"bench: unexpected answer {got[:300]!r}"))
            return
        self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended(exc or RuntimeError("bench: the server closed a connection"))


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _load(port: int, connections: int, seconds: float, pid: int) -> dict[str, float]:
    loop = asyncio.get_running_loop()
    broken: asyncio.Future[None] = loop.create_future()

    def ended(error: Exception) -> None:
        if not broken.done():
            broken.set_exception(error)

    taken: list[float] = []
    bodies = _Bodies()
    transports = []
    for _ in range(connections):
        transport, _protocol = await loop.create_connection(
            lambda: _Connection(bodies, taken, ended), "127.0.0.1", port
        )
        transports.append(transport)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(asyncio.shield(broken), WARM_SECONDS)
    taken.clear()
    begin, cpu = time.perf_counter(), _cpu_seconds(pid)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(asyncio.shield(broken), seconds)
    took, count = time.perf_counter() - begin, len(taken)
    latencies = sorted(taken)
    cpu = _cpu_seconds(pid) - cpu
    if not broken.done():
        broken.cancel()
    for transport in transports:
        transport.abort()
    lag = await _lag(port)
    return {
        "requests_per_second": count / took,
        "sustained_per_second": count / (took + lag.get("drain_ms", 0.0) / 1e3),
        "p50_ms": latencies[count // 2] * 1e3,
        "p99_ms": latencies[min(count - 1, count * 99 // 100)] * 1e3,
        "server_cpu_us_per_request": cpu / count * 1e6,
        **lag,
    }


async def _lag(port: int) -> dict[str, float]:
    """What our server has acknowledged and not yet folded, and how fast it does that now; {} of the other servers."""
    first = await _behind(port)
    if first is None:
        return {}
    begin, left = time.perf_counter(), first
    while left:
        left = await _behind(port) or 0
    seconds = time.perf_counter() - begin
    return {"behind_at_end": first, "drain_ms": seconds * 1e3, "drained_per_second": first / seconds if first else 0.0}


async def _behind(port: int) -> int | None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /-/ready HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
    _, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    behind = json.loads(body).get("behind") if body.startswith(b"{") else None
    return int(behind) if behind is not None else None


# -- servers


class _GroupCommit:
    """Appends bodies to one file; whoever waits is woken after the fdatasync that covers his. A thread of its own."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
        self._loop = asyncio.get_running_loop()
        self._wanted = threading.Condition()
        self._waiting: list[tuple[bytes, asyncio.Future[None]]] = []
        threading.Thread(target=self._run, daemon=True).start()

    async def append(self, body: bytes) -> None:
        done: asyncio.Future[None] = self._loop.create_future()
        with self._wanted:
            self._waiting.append((body, done))
            self._wanted.notify()
        await done

    def _run(self) -> None:
        while True:
            with self._wanted:
                while not self._waiting:
                    self._wanted.wait()
                batch, self._waiting = self._waiting, []
            left = memoryview(b"".join(body for body, _ in batch))
            while left:
                left = left[os.write(self._file, left) :]
            os.fdatasync(self._file)
            self._loop.call_soon_threadsafe(self._wake, batch)

    @staticmethod
    def _wake(batch: list[tuple[bytes, asyncio.Future[None]]]) -> None:
        for _, done in batch:
            if not done.done():
                done.set_result(None)


async def _serve_bare(directory: Path, *, synced: bool) -> int:
    import orjson
    from aiohttp import web

    journal = _GroupCommit(directory / "journal") if synced else None

    async def webhook(request: web.Request) -> web.Response:
        body = await request.read()
        count = len(orjson.loads(body)["alerts"])
        if journal is not None:
            await journal.append(body)
        return web.Response(body=b'{"accepted":%d,"duplicates":0}' % count, content_type="application/json")

    app = web.Application(client_max_size=8 << 20)
    app.router.add_post("/webhook", webhook)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
    return int(runner.addresses[0][1])


class _NoOperations:
    """The webhook needs none."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"bench: the operation {name} is not served here")


async def _serve_ours(directory: Path) -> int:
    from agent.app import calm_collector
    from agent.http.server import build_app, serve
    from agent.intake import Intake
    from agent.store import Store

    store = Store.open(directory)
    app = build_app(
        Intake(store),
        store,
        _NoOperations(),
        health=lambda: {"ready": True, "behind": store.behind[0]},
        metrics=lambda: (b"", "text/plain"),
    )
    serving = await serve(app, "127.0.0.1", 0)
    calm_collector()  # as the service does once it runs
    return serving.addresses[0][1]


async def _serve(server: str, directory: Path) -> None:
    """Prints the port and serves until standard input ends or the process is killed."""
    start: dict[str, Callable[[], Awaitable[int]]] = {
        "ours": lambda: _serve_ours(directory),
        "synced": lambda: _serve_bare(directory, synced=True),
        "bare": lambda: _serve_bare(directory, synced=False),
    }
    print(await start[server](), flush=True)
    await asyncio.to_thread(sys.stdin.read)


def main(arguments: list[str]) -> None:
    match arguments:
        case ["serve", server, directory]:
            asyncio.run(_serve(server, Path(directory)))
        case ["load", port, connections, seconds, pid]:
            print(json.dumps(asyncio.run(_load(int(port), int(connections), float(seconds), int(pid)))))
        case _:
            print(json.dumps(bench(float(arguments[0]) if arguments else 30.0), indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
