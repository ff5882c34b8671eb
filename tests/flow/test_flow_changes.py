"""What was changed before an incident: told by people and pipelines, and by the metrics of a real Prometheus."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.app import prometheus_of
from agent.config import Config, Prometheus, Topology
from agent.fold_changes import ChangeTold
from agent.fold_model import Incident
from agent.fold_state import State
from agent.packs import load_packs
from agent.situation import Situations
from agent.sources.prometheus import PrometheusSource
from agent.topology import load_topology
from bench import backfill
from bench.live import _incident
from rules.diagnose import diagnose
from rules.model import Diagnosis, Situation


@pytest.fixture(scope="module")
def past() -> backfill.Past:
    return backfill.past(2)


@pytest.fixture(scope="module")
def server(
    past: backfill.Past, tmp_path_factory: pytest.TempPathFactory, program: Callable[[str, str], str]
) -> Iterator[str]:
    where = tmp_path_factory.mktemp("changes")
    text = itertools.chain(backfill.lines(past), _versions(past))
    data = backfill.blocks(program("promtool", "prometheus"), where, text)
    process, url = backfill.serve(program("prometheus", "prometheus"), where, data)
    try:
        yield url
    finally:
        process.kill()
        process.wait()


def _versions(past: backfill.Past) -> Iterator[str]:
    """orders gets version 2 ten minutes before the onset, instance by instance; payments is rolled out (by its replica
    sets) an hour before, and again after the onset; a gap in what extra-000 exposes is no change."""
    deployed = past.onset - 600
    for instance, at in (("a", deployed), ("b", deployed + 60)):
        for version, begin, end in (("1", past.begin, at), ("2", at, past.end + 1)):
            labels = f'service="orders",instance="{instance}",version="{version}"'
            for t in range(begin, end, backfill.STEP):
                yield f"app_build_info{{{labels}}} 1 {t}\n"
    for t in past.times:
        if not past.onset - 1800 < t < past.onset - 900:
            yield f'app_build_info{{service="extra-000",instance="c",version="9"}} 1 {t}\n'
    begun = (("payments-1", past.begin - 86400), ("payments-2", past.onset - 2400))
    for name, _ in begun:
        for t in past.times:
            owner = f'owner_kind="Deployment",owner_name="payments",namespace="shop",replicaset="{name}"'
            yield f"kube_replicaset_owner{{{owner}}} 1 {t}\n"
    for name, at in begun:
        for t in past.times:
            yield f'kube_replicaset_created{{namespace="shop",replicaset="{name}"}} {at} {t}\n'
    for t in past.times:
        yield f'process_start_time_seconds{{service="front"}} {past.onset - 7000} {t}\n'


async def look(url: str, past: backfill.Past, where: Path, *told: ChangeTold) -> Situation:
    edges = {k: tuple(v) for k, v in backfill.EDGES.items()} | {"payments": ("extra-000", "extra-001")}
    prometheus = Prometheus(url=url, step_seconds=15.0)
    config = Config(state_dir=where, prometheus=prometheus, topology=Topology(edges=edges))
    state = State()
    state.changes += told
    incident: Incident = _incident(past)
    async with PrometheusSource(prometheus_of(config)) as source:
        situations = Situations(config, load_packs(), [source], load_topology(config), clock=lambda: float(past.end))
        return await situations.of(incident, state)


def told(past: backfill.Past, service: str, before: float, **more: str) -> ChangeTold:
    fields = {"tenant": "default", "kind": "commit", "id": "4711", "who": "ci", "origin": "http 127.0.0.1", **more}
    when = past.onset - before
    return ChangeTold(at=when, service=service, when=when, **fields)  # type: ignore[arg-type]


def ranked(situation: Situation) -> tuple[Diagnosis, list[tuple[str, str]]]:
    diagnosis = diagnose(situation, load_packs(), limit=10)
    return diagnosis, [(h.cause, h.service) for h in diagnosis.hypotheses]


async def test_metrics_tell_of_versions_and_rollouts(server: str, past: backfill.Past, tmp_path: Path) -> None:
    situation = await look(server, past, tmp_path)
    deploys = {(f.service, f.subject): f for f in situation.facts("change.deploy")}
    assert set(deploys) == {("orders", "2"), ("payments", "rollout")}
    first = deploys["orders", "2"]
    assert abs(float(first.attributes["time"]) - (past.onset - 600)) <= 60
    assert first.attributes["previous"] == "1"
    assert deploys["payments", "rollout"].attributes["time"] == past.onset - 2400
    assert [f.service for f in situation.facts("change.restart")] == ["front"]
    diagnosis, places = ranked(situation)
    assert ("service.bad_deployment", "orders") in places
    assert re.fullmatch(r"deploy 2 of orders (9|10|11) min before the onset \(1 before\)", diagnosis.changes[0])
    assert "changes" not in diagnosis.missing


async def test_what_was_told_counts_before_the_onset_and_at_its_service(
    server: str, past: backfill.Past, tmp_path: Path
) -> None:
    bare, _ = ranked(await look(server, past, tmp_path))
    diagnosis, places = ranked(await look(server, past, tmp_path, told(past, "orders", 300, text="new pool")))
    assert ("service.bad_commit", "orders") in places
    assert any("commit 4711 of orders" in text and "new pool" in text for text in diagnosis.changes)
    for other in (
        told(past, "orders", -400),  # after the onset
        told(past, "orders", 100_000),  # long ago
        told(past, "orders", 300, tenant="another"),
    ):
        found, places = ranked(await look(server, past, tmp_path, other))
        assert ("service.bad_commit", "orders") not in places
        assert found.changes == bare.changes
    _, places = ranked(await look(server, past, tmp_path, told(past, "extra-001", 300)))
    assert places[0] != ("service.bad_commit", "extra-001")  # a change where nothing is wrong is not why
