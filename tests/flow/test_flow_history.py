"""A peak that recurs, in a real Prometheus that holds today, yesterday and last week."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agent.app import prometheus_of
from agent.config import Config, Prometheus, Topology
from agent.history import Archive
from agent.packs import load_packs
from agent.situation import Situations
from agent.sources.prometheus import PrometheusSource
from agent.sources.recorded import read_recording, write_recording
from agent.topology import load_topology
from bench import backfill
from rules.diagnose import diagnose
from rules.model import Alert, Situation

DAY = 86400
SHOPS = ("calm", "ill")  # both have the peak; `ill` has a true fault today besides
DURATION = "http_server_request_duration_seconds"


@pytest.fixture(scope="module")
def onset() -> int:
    return int(time.time()) // 60 * 60 - 2 * 3600 - 1200


@pytest.fixture(scope="module")
def server(onset: int, tmp_path_factory: pytest.TempPathFactory, program: Callable[[str, str], str]) -> Iterator[str]:
    where = tmp_path_factory.mktemp("history")
    data = backfill.blocks(program("promtool", "prometheus"), where, _lines(onset))
    process, url = backfill.serve(program("prometheus", "prometheus"), where, data)
    try:
        yield url
    finally:
        process.kill()
        process.wait()


def _lines(onset: int) -> Iterator[str]:
    """In each shop `front` calls `orders` and `stock`. Every day at this time there are five times the
    requests, and orders takes far longer; today stock of the shop `ill` is slow as well, by itself."""
    samples: dict[str, list[str]] = {}
    for ago in (7, 1, 0):
        rng = random.Random(ago)
        begin = onset - ago * DAY
        for shop in SHOPS:
            fault = shop == "ill" and ago == 0
            for part in ("front", "orders", "stock"):
                _of_service(samples, f"{shop}-{part}", part, (begin, fault), rng)
    for name in sorted(samples):
        yield from samples[name]


def _of_service(
    samples: dict[str, list[str]], service: str, part: str, day: tuple[int, bool], rng: random.Random
) -> None:
    begin, fault = day
    totals = dict.fromkeys(("200", "sum", *map(str, backfill.BUCKETS), "+Inf"), 0.0)
    for at in range(begin - 3600, begin + 900, backfill.STEP):
        peak = at >= begin
        requests = (700.0 if peak else 150.0) * rng.uniform(0.97, 1.03)
        orders, stock = 0.4 if peak else 0.05, 1.2 if peak and fault else 0.05
        mean = {"front": 0.02 + orders + stock, "orders": orders, "stock": stock}[part] * rng.uniform(0.97, 1.03)
        totals["200"] += requests
        totals["sum"] += requests * mean
        for le in backfill.BUCKETS:
            totals[str(le)] += requests * min(1.0, le / (2 * mean))
        totals["+Inf"] += requests
        values = {f'{DURATION}_count{{service="{service}",http_response_status_code="200"}}': totals["200"]}
        values[f'{DURATION}_sum{{service="{service}"}}'] = totals["sum"]
        for le in (*map(str, backfill.BUCKETS), "+Inf"):
            values[f'{DURATION}_bucket{{service="{service}",le="{le}"}}'] = totals[le]
        values[f'up{{service="{service}"}}'] = 1.0
        for name, value in values.items():
            samples.setdefault(name, []).append(f"{name} {value!r} {at}\n")


async def _look(url: str, onset: int, shop: str, where: Path, **changes: object) -> Situation:
    edges = {f"{s}-front": (f"{s}-orders", f"{s}-stock") for s in SHOPS}
    prometheus = Prometheus(url=url, step_seconds=15.0, **changes)  # type: ignore[arg-type]
    config = Config(state_dir=where, prometheus=prometheus, topology=Topology(edges=edges))
    labels = {"alertname": "HighLatency", "service": f"{shop}-front"}
    alert = Alert(
        tenant="default", fingerprint="f", status="firing", labels=labels, starts_at=onset + 120.0, digest="d"
    )
    async with PrometheusSource(prometheus_of(config)) as source:
        situations = Situations(config, load_packs(), [source], load_topology(config), clock=lambda: onset + 840.0)
        return await situations.around([alert])


async def test_a_recurring_peak_is_no_cause_and_a_fault_beside_it_is(server: str, onset: int, tmp_path: Path) -> None:
    packs = load_packs()
    calm = await _look(server, onset, "calm", tmp_path)
    assert [h.offset for h in calm.history] == [DAY, 7 * DAY]
    assert not any(name == "history" for name in calm.missing())
    without = diagnose(replace(calm, history=()), packs)
    assert (without.verdict, without.hypotheses[0].service) == ("ranked", "calm-orders"), without.sentence
    diagnosis = diagnose(calm, packs)
    assert diagnosis.verdict == "insufficient_evidence", diagnosis.sentence
    assert not [h for h in diagnosis.hypotheses if h.service == "calm-orders"], diagnosis.sentence

    ill = await _look(server, onset, "ill", tmp_path)
    diagnosis = diagnose(ill, packs)
    assert diagnosis.hypotheses[0].service == "ill-stock", diagnosis.sentence
    assert diagnosis.verdict == "ranked"
    assert not [h for h in diagnosis.hypotheses if h.service == "ill-orders"], diagnosis.sentence

    write_recording(tmp_path / "recording", ill)
    again = read_recording(tmp_path / "recording")
    assert [h.offset for h in again.history] == [DAY, 7 * DAY]
    assert diagnose(again, packs) == diagnosis


async def test_it_costs_one_query_where_there_is_nothing(server: str, onset: int, tmp_path: Path) -> None:
    off = await _look(server, onset, "calm", tmp_path, history_seconds=())
    assert off.history == ()
    young = await _look(server, onset, "calm", tmp_path, history_seconds=(3 * DAY, 5 * DAY))
    assert young.history == ()
    assert [e.query for e in young.evidence] == [e.query for e in off.evidence]
    part = await _look(server, onset, "calm", tmp_path, history_seconds=(DAY, 3 * DAY))
    assert [h.offset for h in part.history] == [DAY]
    assert sum(len(h.evidence) for h in part.history) < len(part.evidence)


async def test_a_server_that_is_gone_costs_nothing_more(tmp_path: Path) -> None:
    async with PrometheusSource(prometheus_of(Config(prometheus=Prometheus(url="http://127.0.0.1:9")))) as source:
        archive = Archive.of([source], (DAY,))
        assert archive is not None
        assert await archive.reaches(1e9, "", 2.0) == ()
