"""Journal appends against the disk itself: how much of raw write + fdatasync is left after framing, chain and loop.

`bench(seconds)` appends 8 KB records with 1, 16 and 64 concurrent appenders, and in the same run writes the same bytes
raw: one record per fdatasync (`raw_single`), and as many per fdatasync as there are appenders (`raw_grouped`, what a
perfect group commit would do). Rounds alternate, so that a disk in a bad mood is bad to all; figures are medians.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from agent.journal.records import AlertsReceived
from agent.journal.segment import encode
from agent.journal.wal import Wal
from rules.model import Alert

APPENDERS = (1, 16, 64)
RECORD_BYTES = 8192
ROUNDS = 5


def record() -> AlertsReceived:
    """Ten alerts, about 8 KB of JSON: one ordinary webhook."""
    alerts = tuple(
        Alert(
            tenant="default",
            fingerprint=f"{n:016x}",
            status="firing",
            labels={
                "alertname": f"HighLatency{n}",
                "service": "front",
                "instance": f"10.0.0.{n}:8080",
                "severity": "page",
            },
            annotations={"summary": "latency is high", "description": "x" * 420},
            starts_at=1_700_000_000.5 + n,
            generator_url="http://prometheus:9090/graph?g0.expr=" + "y" * 80,
            digest=f"{n:032x}",
        )
        for n in range(10)
    )
    made = AlertsReceived(at=1_700_000_000.5, tenant="default", receiver="alertmedic", group_key="", alerts=alerts)
    return AlertsReceived(
        at=made.at,
        tenant="default",
        receiver="alertmedic",
        group_key="k" * max(0, RECORD_BYTES - len(encode(made).body)),
        alerts=alerts,
    )


async def _append(directory: Path, appenders: int, seconds: float) -> float:
    """Appends per second."""
    wal = Wal.open(directory)
    item = record()
    end = time.perf_counter() + seconds
    counts = [0] * appenders

    async def run(n: int) -> None:
        while time.perf_counter() < end:
            await wal.append((item,))
            counts[n] += 1

    started = time.perf_counter()
    await asyncio.gather(*(run(n) for n in range(appenders)))
    rate = sum(counts) / (time.perf_counter() - started)
    await wal.close()
    return rate


def _raw(directory: Path, grouped: int, seconds: float) -> float:
    """Records per second, `grouped` of them per fdatasync."""
    body = encode(record()).body * grouped
    directory.mkdir()
    fd = os.open(directory / "raw", os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        count, offset, started = 0, 0, time.perf_counter()
        while time.perf_counter() < started + seconds:
            offset += os.pwrite(fd, body, offset)
            os.fdatasync(fd)
            count += grouped
        return count / (time.perf_counter() - started)
    finally:
        os.close(fd)


def bench(seconds: float = 15.0) -> dict[str, Any]:
    """`{"<n>": {"appends_per_second", "raw_single", "raw_grouped", "ratio_single", "ratio_grouped"}, ...}`."""
    slice_seconds = seconds / (ROUNDS * len(APPENDERS) * 3)
    rates: dict[tuple[int, str], list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="alertmedic-bench-", dir=os.environ.get("ALERTMEDIC_BENCH_DIR")) as name:
        for turn in range(ROUNDS):
            for n in APPENDERS:
                base = Path(name) / f"{turn}-{n}"
                measured = {
                    "journal": asyncio.run(_append(base.with_suffix(".wal"), n, slice_seconds)),
                    "raw_single": _raw(base.with_suffix(".single"), 1, slice_seconds),
                    "raw_grouped": _raw(base.with_suffix(".grouped"), n, slice_seconds),
                }
                for what, rate in measured.items():
                    rates.setdefault((n, what), []).append(rate)
    result: dict[str, Any] = {"record_bytes": len(encode(record()).body), "rounds": ROUNDS}
    for n in APPENDERS:
        journal, single, grouped = (
            statistics.median(rates[n, what]) for what in ("journal", "raw_single", "raw_grouped")
        )
        result[str(n)] = {
            "appends_per_second": round(journal),
            "raw_single": round(single),
            "raw_grouped": round(grouped),
            "ratio_single": round(journal / single, 2),
            "ratio_grouped": round(journal / grouped, 2),
        }
    return result


if __name__ == "__main__":
    print(json.dumps(bench(), indent=2))
