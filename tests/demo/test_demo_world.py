"""The demo world without the agent: it opens, each fault really hurts its customers, and each clean-up really helps."""

from __future__ import annotations

import json
import random
from pathlib import Path

import psutil
import pytest

from agent.demo import settings
from agent.demo.children import WorldError
from agent.demo.probe import degraded_at, recovered_at
from agent.demo.report import EXPECTED
from agent.demo.world import World, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

SEED = 5
ALWAYS = random.Random(SEED).sample(sorted(set(EXPECTED) - {"memory_leak"}), 2)
SHOWN = {  # what Prometheus shows within seconds of the alert while the fault lasts, and no longer when it is mended
    # Browsing touches the CPU and nothing else that a fault breaks alone; how busy the host is, others decide as well.
    "cpu_hog": "histogram_quantile(0.95, sum by (le) "
    '(rate(http_server_request_duration_seconds_bucket{service="orders",http_route="/products"}[5s]))) > 0.5',
    "memory_leak": "process_virtual_memory_bytes / process_memory_limit_bytes > 0.97",
    "db_lock": 'sum(pg_locks_count{mode="accessexclusivelock"}) > 0 '
    'and on() max(pg_stat_activity_max_tx_duration{state="idle in transaction"}) > 2',
    "worker_crash": 'queue_oldest_age_seconds > 3 and on() up{service="worker"} == 0',
    "worker_stuck": 'queue_oldest_age_seconds > 3 and on() up{service="worker"} == 0',
    "payments_slow": "histogram_quantile(0.95, sum by (le) "
    '(rate(http_client_request_duration_seconds_bucket{server_address="payments"}[5s]))) > 1',
    "bad_flag": 'feature_flag_enabled{flag="live_recommendations"} == 1',
    "pool_exhausted": "queue_depth > 10 and on() worker_busy >= on() worker_pool_size",
}
SERIES = {
    "front": {"http_server_request_duration_seconds_bucket", "http_client_request_duration_seconds_bucket"},
    "orders": {
        "http_server_request_duration_seconds_bucket",
        "http_client_request_duration_seconds_bucket",
        "db_client_operation_duration_seconds_bucket",
        "queue_depth",
        "queue_oldest_age_seconds",
        "feature_flag_enabled",
        "process_memory_limit_bytes",
    },
    "worker": {"worker_jobs_total", "worker_pool_size", "worker_busy"},
    "postgres": {"pg_up", "pg_stat_activity_count", "pg_locks_count", "pg_settings_max_connections"},
    "node-1": {"node_cpu_seconds_total", "node_load1", "node_memory_MemAvailable_bytes"},
}
PROCESS = {"process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds", "process_max_fds", "up"}


async def test_prometheus_sees_the_shop_under_standard_names(world: World) -> None:
    async def complete() -> bool:
        return await world.prometheus.query("worker_jobs_total > 5") != {}

    await until("jobs are done", complete, 20)
    for service, names in SERIES.items():
        found = await world.prometheus.query(f'group by (__name__) ({{service="{service}"}})')
        seen = {json.loads(labels)["__name__"] for labels in found}
        missing = names | (PROCESS if service in ("front", "orders", "worker") else {"up"}) - seen
        assert names | PROCESS & missing <= seen, f"{service}: {sorted(missing - seen)} missing"


async def test_the_injector_shares_nothing_with_the_agent(world: World) -> None:
    injector = psutil.Process(world.children["injector"].pid)
    told, agent = injector.environ(), world.agent_environment()
    assert not set(told) & set(agent)
    assert not set(told.values()) & set(agent.values())
    place = world.place("agent")
    assert not [f.path for f in injector.open_files() if Path(f.path).is_relative_to(place)]
    assert not Path(injector.cwd()).is_relative_to(place)
    readable_by_the_agent = [
        world.agent_configuration(),
        settings.alert_rules(),
        settings.alertmanager(world.ports),
        json.dumps(injector.cmdline()),
        json.dumps(await world.prometheus.get("rules")),
        json.dumps(await world.prometheus.get("targets")),
    ]
    for text in readable_by_the_agent:
        assert not [fault for fault in EXPECTED if fault in text]
    for hidden in (world.ports.payments, world.ports.supervisor):
        assert f":{hidden}" not in world.agent_configuration()


@pytest.mark.parametrize(
    "fault", [pytest.param(f, marks=[] if f in ALWAYS else pytest.mark.full) for f in sorted(EXPECTED)]
)
async def test_a_fault_degrades_the_shop_and_its_clean_up_mends_it(world: World, fault: str) -> None:
    assert world.injector is not None
    await world.settle(quiet_seconds=3)
    fault_at = await world.injector.inject(fault)
    try:
        await world.until_alert("firing", 45)
        assert degraded_at(world.probe.since(fault_at)) is not None
        assert world.probe.indicator(fault_at) < 0.9

        async def shown() -> bool:
            return await world.prometheus.query(SHOWN[fault]) != {}

        await until(f"{fault} shows in its series", shown, 15)
        await until("Alertmanager has the alert", lambda: alertmanager_has_it(world), 10)
    finally:
        await world.injector.clear(fault)

    async def recovered() -> bool:
        return recovered_at(world.probe.since(fault_at)) is not None

    await until(f"the shop recovers from {fault}", recovered, 30)
    await world.until_alert("inactive", 40)
    assert await world.prometheus.query(SHOWN[fault]) == {}


@pytest.mark.parametrize("late", ["firing", "pending"])
async def test_an_alert_during_the_quiet_time_starts_it_anew(
    world: World, monkeypatch: pytest.MonkeyPatch, late: str
) -> None:
    """Otherwise the next fault would be credited with an alert that it did not raise."""
    states = iter(["inactive", late, late, "inactive", "inactive"])

    async def alert_state() -> str:
        return next(states)

    monkeypatch.setattr(world.prometheus, "alert_state", alert_state)
    monkeypatch.setattr(world.probe, "steady", lambda seconds: True)
    await world.settle(quiet_seconds=0.01)
    assert list(states) == []


async def alertmanager_has_it(world: World) -> bool:
    """One alert, whose labels say where it hurts and not why."""
    async with world.session.get(world.ports.url("alertmanager") + "/api/v2/alerts") as answer:
        alerts = await answer.json()
    assert all(a["labels"] == {"alertname": settings.ALERT, "service": "front", "severity": "critical"} for a in alerts)
    return len(alerts) == 1


async def test_a_dead_part_is_told_with_its_last_words(programs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "DATABASE_ROLES", "CREATE ROLE nobody_can_spell_this LOGINN;")
    before = set(psutil.Process().children())
    with pytest.raises(WorldError, match=r'could not be set up: unrecognized role option "loginn"'):
        async with World.running():
            pytest.fail("a world without its database roles must not open")
    assert set(psutil.Process().children()) <= before
