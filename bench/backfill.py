"""A real Prometheus whose past is known: series are written as OpenMetrics, made into blocks by promtool, and served.

Used by `bench.live` and by tests that need whole incidents. The shop it holds: `front` calls `orders`, `orders` calls
`payments`; from `onset` on `orders` leaks memory, answers slowly and fails, and `front` with it.
"""

from __future__ import annotations

import random
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

STEP = 15
BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
EDGES = {"front": ["orders"], "orders": ["payments"]}


@dataclass(frozen=True)
class Past:
    """Unix seconds. `services` is how many services there are beside the three of the shop, all of them well."""

    begin: int
    onset: int
    end: int
    extra: int = 0

    @property
    def times(self) -> range:
        return range(self.begin, self.end + 1, STEP)

    @property
    def services(self) -> tuple[str, ...]:
        return ("front", "orders", "payments", *(f"extra-{n:03d}" for n in range(self.extra)))


def past(extra: int = 0, normal: int = 3600, abnormal: int = 600) -> Past:
    """One that ended a good two hours ago: what is newer belongs to the server's head, not to a block."""
    end = int(time.time()) // 60 * 60 - 2 * 3600 - 600
    return Past(end - abnormal - normal, end - abnormal, end, extra)


def lines(past: Past, seed: int = 5) -> Iterator[str]:
    """OpenMetrics, series by series."""
    rng = random.Random(seed)
    duration = "http_server_request_duration_seconds"
    for service in past.services:
        ill = service in ("front", "orders")
        counts: dict[tuple[str, str], list[float]] = {}
        gauges: dict[str, list[float]] = {"up": [], "process_resident_memory_bytes": [], "scrape_duration_seconds": []}
        totals = dict.fromkeys(("200", "500", "sum", "cpu", *map(str, BUCKETS), "+Inf"), 0.0)
        for at in past.times:
            bad = ill and at >= past.onset
            requests = 150.0 + rng.uniform(-6, 6)
            failed = requests * (0.3 if bad else 0.0)
            mean = (0.9 if bad else 0.08) * rng.uniform(0.95, 1.05)
            totals["200"] += requests - failed
            totals["500"] += failed
            totals["sum"] += requests * mean
            totals["cpu"] += STEP * rng.uniform(0.09, 0.11)
            for le in BUCKETS:
                totals[str(le)] += requests * min(1.0, le / (2 * mean))
            totals["+Inf"] += requests
            for key, total in totals.items():
                counts.setdefault(_series(key), []).append(total)
            leaked = (at - past.onset) / (past.end - past.onset) if bad and service == "orders" else 0.0
            gauges["up"].append(1.0)
            gauges["scrape_duration_seconds"].append(rng.uniform(0.004, 0.006))
            gauges["process_resident_memory_bytes"].append(1e8 * rng.uniform(0.99, 1.01) + 3.9e8 * leaked)
        gauges["process_memory_limit_bytes"] = [5e8] * len(past.times)
        for (suffix, labels), values in counts.items():
            name = "process_cpu_seconds_total" if suffix == "cpu" else f"{duration}{suffix}"
            yield from _samples(name, f'service="{service}"{labels}', values, past)
        for name, values in gauges.items():
            yield from _samples(name, f'service="{service}"', values, past)


def _series(key: str) -> tuple[str, str]:
    if key in ("200", "500"):
        return "_count", f',http_response_status_code="{key}"'
    if key == "sum":
        return "_sum", ""
    return ("cpu", "") if key == "cpu" else ("_bucket", f',le="{key}"')


def _samples(name: str, labels: str, values: list[float], past: Past) -> Iterator[str]:
    for at, value in zip(past.times, values, strict=True):
        yield f"{name}{{{labels}}} {value!r} {at}\n"


def blocks(promtool: str, directory: Path, text: Iterator[str]) -> Path:
    """Makes the blocks, and answers where they are. Raises RuntimeError."""
    source, data = directory / "past.om", directory / "data"
    with source.open("w") as file:
        file.writelines(text)
        file.write("# EOF\n")
    command = [promtool, "tsdb", "create-blocks-from", "openmetrics", str(source), str(data)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise RuntimeError(f"promtool could not make blocks: {done.stderr[-500:]}")
    return data


def serve(prometheus: str, directory: Path, data: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A server over the blocks, ready, that scrapes nothing, and its URL. Raises RuntimeError."""
    (directory / "prometheus.yml").write_text("global: {}\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    command = [prometheus, f"--config.file={directory / 'prometheus.yml'}", f"--storage.tsdb.path={data}"]
    command += [f"--web.listen-address={url.removeprefix('http://')}", "--storage.tsdb.retention.time=30d"]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    _until(lambda: _ready(url), process, directory / "log")
    return process, url


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/-/ready", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def _until(ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    due = time.monotonic() + 60
    while not ready():
        if process.poll() is not None or time.monotonic() > due:
            process.kill()
            process.wait()
            raise RuntimeError(f"prometheus did not start: {log.read_text()[-500:]}")
        time.sleep(0.05)
