"""Recordings of the demo's faults: every series around each alert, and the host's processes, as JSON files.

Used by `python -m agent.demo --record DIR`, without an agent: what rules are tuned to and tested against should be
what a real system shows, unaffected by any cure. One directory a fault:

    series.json  Prometheus' answer to query_range over the window, step 1 s (`data.result` of the HTTP API)
    host.json    processes and listening ports, looked at when the alert fired
    meta.json    fault, cause and service; fault_at, alert_at, the window (unix seconds); topology, ports
"""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from agent.demo.report import EXPECTED
from agent.demo.settings import ALERT
from agent.demo.world import World

BEFORE_SECONDS, AFTER_SECONDS = 60.0, 20.0
NOT_OURS = "go_.*|promhttp_.*|python_.*|scrape_.*|node_scrape_.*|net_conntrack_.*|pg_settings_(?:[a-ln-z]|m[^a]).*"


def look_at_processes(seconds: float = 0.6) -> list[dict[str, Any]]:
    """Every process with its CPU use over `seconds`, which this takes (percent of one CPU)."""
    names = ["pid", "ppid", "create_time", "name", "cmdline", "username", "status", "num_threads", "cpu_affinity"]
    processes = list(psutil.process_iter())
    before: dict[int, float] = {}
    for process in processes:
        try:
            before[process.pid] = sum(process.cpu_times()[:2])
        except psutil.Error:
            continue
    began = time.monotonic()
    time.sleep(seconds)
    seen = []
    for process in processes:
        try:
            row = process.as_dict(names)
            used = sum(process.cpu_times()[:2]) - before[process.pid]
            row |= {"rss_bytes": process.memory_info().rss, "cpu_percent": 100 * used / (time.monotonic() - began)}
            row["ports"] = [c.laddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
            seen.append(row)
        except (psutil.Error, KeyError):
            continue
    return seen


async def record_fault(world: World, fault: str, directory: Path) -> dict[str, float]:
    """Injects, waits for the alert, records, clears. Returns fault_at and alert_at. Raises WorldError when no alert
    came within 40 s."""
    assert world.injector is not None
    fault_at = await world.injector.inject(fault)
    try:
        alert_at = await world.until_alert("firing", 40)
        processes = await asyncio.to_thread(look_at_processes)
        await asyncio.sleep(max(0.0, alert_at + AFTER_SECONDS - time.time()))
    finally:
        await world.injector.clear(fault)
    window = {"start": alert_at - BEFORE_SECONDS, "end": alert_at + AFTER_SECONDS, "step": 1.0}
    series = await world.prometheus.get(
        "query_range", query=f'{{job=~".+",__name__!~"{NOT_OURS}"}}', **{k: f"{v:.3f}" for k, v in window.items()}
    )
    expected, agent = EXPECTED[fault], yaml.safe_load(world.agent_configuration())
    meta = {
        "fault": fault,
        "cause": expected.cause,
        "service": expected.service,
        "remedy": expected.remedy,
        "alert": ALERT,
        "entry": "front",
        "fault_at": fault_at,
        "alert_at": alert_at,
        "window": window,
        "topology": agent["topology"],
        "inventory": agent["inventory"],
    }
    await asyncio.to_thread(_write, directory / fault, {"series": series, "host": processes, "meta": meta})
    return {"fault_at": fault_at, "alert_at": alert_at}


def _write(directory: Path, parts: dict[str, Any]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        (directory / f"{name}.json").write_text(json.dumps(part) + "\n")
