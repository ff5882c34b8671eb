"""Diagnosis over a live Prometheus, against the same queries sent concurrently, decoded and aligned, and nothing else.

Ours is what an incident waits for: the situation (topology, alert expression, every query of the packs, one grid) and
its ranking. The reference is a plain client: one aiohttp session, every query at once, orjson, one row a series on the
same grid. Both ask a real Prometheus over back-filled series, in turn; the ratio is the median over the turns of ours
divided by the reference's.

Over loopback the agent asks for answers that are not packed, which a client by default does not; `ratio_unpacked` is
against a reference that does so too.

    python -m bench.live
"""

from __future__ import annotations

import asyncio
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import orjson

from agent.app import prometheus_of
from agent.config import Config, Prometheus, Topology
from agent.expressions import Expressions, rules_of
from agent.fold_model import Incident
from agent.fold_state import State
from agent.packs import load_packs
from agent.situation import Situations
from agent.sources.prometheus import PrometheusSource
from agent.topology import load_topology
from bench import backfill
from rules.diagnose import diagnose
from rules.model import Alert, Diagnosis, Situation

EXTRA = 40  # services beside the three of the shop


def bench(runs: int = 15) -> dict[str, Any]:
    """`{"ours_ms", "reference_ms", "unpacked_ms", "ratio", "ratio_unpacked", "queries", "series", "points"}`, medians;
    or why it was not measured."""
    promtool, prometheus = shutil.which("promtool"), shutil.which("prometheus")
    if promtool is None or prometheus is None:
        return {"not_measured": "it needs prometheus and promtool (Debian: apt-get install prometheus)"}
    with tempfile.TemporaryDirectory(prefix="alertmedic-bench-") as name:
        where, past = Path(name), backfill.past(EXTRA)
        process, url = backfill.serve(prometheus, where, backfill.blocks(promtool, where, backfill.lines(past)))
        try:
            return asyncio.run(_measure(url, past, where, runs))
        finally:
            process.kill()
            process.wait()


async def _measure(url: str, past: backfill.Past, where: Path, runs: int) -> dict[str, Any]:
    edges = {**backfill.EDGES, "payments": [s for s in past.services if s.startswith("extra")]}
    topology = Topology(edges={k: tuple(v) for k, v in edges.items()}, kinds=dict.fromkeys(past.services, "http"))  # type: ignore[arg-type]
    config = Config(state_dir=where, prometheus=Prometheus(url=url, step_seconds=15.0), topology=topology)
    packs = load_packs()
    incident = _incident(past)
    async with PrometheusSource(prometheus_of(config)) as source, aiohttp.ClientSession() as session:
        situations = Situations(
            config,
            packs,
            [source],
            load_topology(config),
            clock=lambda: float(past.end),
            expressions=Expressions(rules_of(source)),
        )

        async def ours() -> tuple[Situation, Diagnosis]:
            situation = await situations.of(incident, State())
            return situation, await asyncio.to_thread(diagnose, situation, packs)

        situation, diagnosis = await ours()
        assert diagnosis.hypotheses[0].service == "orders", diagnosis.sentence
        asked = [e.query for e in situation.evidence if e.source == "prometheus" and e.missing is None]
        grid = next(e.frame.times for e in situation.evidence if e.frame.ids)
        series = sum(len(e.frame.ids) for e in situation.evidence)
        found = await _reference(session, url, asked, grid)
        assert found == series, f"the reference found {found} series, the agent {series}"
        own, plain, unpacked = [], [], []
        for _ in range(runs):
            begun = time.perf_counter()
            await ours()
            own.append(time.perf_counter() - begun)
            for encoding, taken in (("", plain), ("identity", unpacked)):
                begun = time.perf_counter()
                await _reference(session, url, asked, grid, encoding)
                taken.append(time.perf_counter() - begun)
    return {
        "ours_ms": round(statistics.median(own) * 1000, 1),
        "reference_ms": round(statistics.median(plain) * 1000, 1),
        "unpacked_ms": round(statistics.median(unpacked) * 1000, 1),
        "ratio": round(statistics.median(a / b for a, b in zip(own, plain, strict=True)), 3),
        "ratio_unpacked": round(statistics.median(a / b for a, b in zip(own, unpacked, strict=True)), 3),
        "queries": len(asked),
        "series": series,
        "points": int(grid.shape[0]),
    }


async def _reference(
    session: aiohttp.ClientSession, url: str, queries: Sequence[str], grid: Any, encoding: str = ""
) -> int:
    """All at once, each decoded and aligned; how many series came. `encoding`: what it accepts, "" for the default."""
    headers = {"Accept-Encoding": encoding} if encoding else {}
    start, end, step = float(grid[0]), float(grid[-1]), float(grid[1] - grid[0])

    async def one(query: str) -> int:
        form = {"query": query, "start": str(start), "end": str(end), "step": str(step)}
        async with session.post(f"{url}/api/v1/query_range", data=form, headers=headers) as response:
            answer = orjson.loads(await response.read())
        result = answer["data"]["result"]
        values = np.full((len(result), grid.shape[0]), np.nan)
        for row, item in enumerate(result):
            samples = item["values"]
            at = np.asarray([sample[0] for sample in samples])
            values[row, np.rint((at - start) / step).astype(np.intp)] = [float(sample[1]) for sample in samples]
        return len(result)

    return sum(await asyncio.gather(*(one(query) for query in queries)))


def _incident(past: backfill.Past) -> Incident:
    at = float(past.onset + 120)
    alert = Alert(
        tenant="default",
        fingerprint="f",
        status="firing",
        labels={"alertname": "HighLatency", "service": "front"},
        starts_at=at,
        digest="d",
    )
    return Incident(
        id="inc-bench",
        tenant="default",
        key="k",
        opened_at=at,
        opened_seq=1,
        updated_at=at,
        updated_seq=1,
        last_alert_at=at,
        services=["front"],
        entry="front",
        alerts={"f": alert},
    )


if __name__ == "__main__":
    print(json.dumps(bench(int(sys.argv[1]) if len(sys.argv) > 1 else 15), indent=2))
