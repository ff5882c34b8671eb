"""Start to ready and memory of the service, against a bare process that imports aiohttp and numpy and listens.

`bench(runs)` starts both in turn, each as a process of its own, and takes the time until the port answers. Memory is
that of the service after it took a few hundred webhooks.

    python -m bench.startup
"""

from __future__ import annotations

import http.client
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
PAYLOAD = ROOT / "tests" / "data" / "payloads" / "ten_alerts.json"
BARE = """
import asyncio, sys
import aiohttp.web, numpy
async def main():
    app = aiohttp.web.Application()
    runner = aiohttp.web.AppRunner(app)
    await runner.setup()
    await aiohttp.web.TCPSite(runner, "127.0.0.1", int(sys.argv[1])).start()
    await asyncio.Event().wait()
asyncio.run(main())
"""


def bench(runs: int = 9) -> dict[str, Any]:
    """`{"ready_seconds", "bare_seconds", "ratio", "rss_mb", "rss_after_webhooks_mb"}`, medians over `runs` pairs."""
    ours, bare = [], []
    idle, loaded = 0.0, 0.0
    with tempfile.TemporaryDirectory(prefix="alertmedic-bench-") as name:
        for turn in range(runs + 1):  # the first pair warms the page cache and does not count
            port = _free_port()
            command = [sys.executable, "-m", "agent", "serve", "--listen", f"127.0.0.1:{port}"]
            process, seconds = _until_it_listens([*command, "--state-dir", f"{name}/{turn}"], port)
            if turn == runs:
                idle = _rss(process)
                _webhooks(port, 300)
                loaded = _rss(process)
            _end(process)
            port = _free_port()
            process, bare_seconds = _until_it_listens([sys.executable, "-c", BARE, str(port)], port)
            _end(process)
            if turn:
                ours.append(seconds)
                bare.append(bare_seconds)
    ratio = statistics.median(a / b for a, b in zip(ours, bare, strict=True))
    return {
        "ready_seconds": round(statistics.median(ours), 3),
        "bare_seconds": round(statistics.median(bare), 3),
        "ratio": round(ratio, 2),
        "rss_mb": round(idle, 1),
        "rss_after_webhooks_mb": round(loaded, 1),
    }


def _until_it_listens(command: list[str], port: int) -> tuple[subprocess.Popen[bytes], float]:
    begun = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and time.perf_counter() < begun + 60:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1):
                return process, time.perf_counter() - begun
        except OSError:
            time.sleep(0.002)
    _end(process)
    raise RuntimeError(f"{command[1:4]} did not listen")


def _webhooks(port: int, count: int) -> None:
    """Distinct payloads of ten alerts, so that all of them are journalled and investigated."""
    template = json.loads(PAYLOAD.read_text())
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    for n in range(count):
        for i, alert in enumerate(template["alerts"]):
            alert["fingerprint"] = f"{n:08x}{i:08x}"
        connection.request("POST", "/webhook", json.dumps(template), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        if answer.status != 200:
            raise RuntimeError(f"webhook answered {answer.status}")
    connection.close()


def _rss(process: subprocess.Popen[bytes]) -> float:
    return float(psutil.Process(process.pid).memory_info().rss / 1e6)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


if __name__ == "__main__":
    print(json.dumps(bench(), indent=2))
