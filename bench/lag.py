"""How long the event loop is held up while a thousand planned steps are carried out at once.

`bench(steps)` opens a real store in a directory on the real disk, journals that many incidents, each with a plan of one
step that was granted `auto`, and then lets all of them go in the same turn of the loop, as the service's own tasks do:
`Remediation.run`, so every step passes the guard's gates at the moment of acting, its fault snapshot, breaker, intent,
the sandbox (/bin/true in its own leaf, `guard.max_steps_at_once` at a time), result, and verification. Only the
verifier is a stand-in that says yes at once: there is no Prometheus to wait for. Meanwhile a task sleeps 5 ms over and
over and notes by how much each sleep was longer; a /-/healthy request would wait as long. The same is noted beforehand
while nothing runs (`idle`) and while the same number of bare `/bin/true` are spawned with asyncio, as many at a time
(`bare_spawns`): on a busy machine those say how much of the lag is the machine's.

    python -m bench.lag [STEPS]
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import sandbox
from actions.catalog import Catalog, parse_action
from actions.gates import Target
from actions.guard import make_step
from actions.model import Declined, Plan, Step
from actions.policy import AutonomyPolicy
from agent.app import calm_collector
from agent.config import Config, Guard, InventoryEntry, Sandbox
from agent.fold_model import Incident
from agent.journal.records import AgentStarted, AlertsReceived, FoldPolicy, IncidentMoved, PlanMade
from agent.remediation import Remediation
from agent.situation import Situations
from agent.store import Store
from agent.telemetry import Telemetry
from agent.verify import SeriesVerifier
from rules.model import Alert, Topology
from rules.packs import PackSet

STEPS = 1000
EVERY_SECONDS = 0.005
IDLE_SECONDS = 2.0
AT_ONCE = Guard().max_steps_at_once
AIM_MS = 50.0
ACTION = {
    "name": "bench.nothing",
    "description": "Does nothing, in a sandbox.",
    "target": "service={service}",
    "parameters": {"service": {"from": "plan", "pattern": "[a-z0-9-]+"}},
    "argv": ["/bin/true", "{service}"],
    "check": ["/bin/false"],
    "undo": "none",
    "idempotent": True,
    "risk": {"reversible": False, "blast_radius": "service", "changes": "runtime", "auto": "allowed"},
}


class Recovered(SeriesVerifier):
    async def verify(self, plan: Plan, step: Step) -> tuple[bool | None, str]:
        return True, "not asked"


async def measured(work: Callable[[], Awaitable[None]]) -> dict[str, float]:
    """Percentiles of the loop's lag in milliseconds while `work` goes on, and how long it took in seconds."""
    lags: list[float] = []

    async def watch() -> None:
        while True:
            due = time.perf_counter() + EVERY_SECONDS
            await asyncio.sleep(EVERY_SECONDS)
            lags.append(max(0.0, time.perf_counter() - due))

    watching = asyncio.create_task(watch())
    await asyncio.sleep(0)
    began, cpu = time.perf_counter(), time.process_time()
    await work()
    took, used = time.perf_counter() - began, time.process_time() - cpu
    await asyncio.sleep(2 * EVERY_SECONDS)  # the last hold-up is noted after it
    watching.cancel()
    cuts = statistics.quantiles(lags, n=1000)
    return {
        "samples": len(lags),
        "p50_ms": round(cuts[499] * 1000, 2),
        "p99_ms": round(cuts[989] * 1000, 2),
        "max_ms": round(max(lags) * 1000, 2),
        "seconds": round(took, 2),
        "cpu_seconds": round(used, 2),
    }


async def _spawns(count: int) -> None:
    slots = asyncio.Semaphore(AT_ONCE)

    async def one() -> None:
        async with slots:
            process = await asyncio.create_subprocess_exec("/bin/true")
            await process.wait()

    await asyncio.gather(*(one() for _ in range(count)))


def _config(directory: Path, steps: int) -> Config:
    many = max(steps, 1) * 2
    return Config(
        state_dir=directory,
        inventory={f"service-{n}": InventoryEntry() for n in range(steps)},
        autonomy=AutonomyPolicy(default="auto"),
        guard=Guard(
            actions_per_hour=many,
            actions_per_action_per_hour=many,
            max_services_at_once=many,
            storm=Guard().storm.__class__(incidents=many),
        ),
        sandbox=Sandbox(allow_unenforced_auto=True),
    )


async def _planned(store: Store, catalog: Catalog, steps: int) -> list[Incident]:
    """Incidents whose plans may begin, as the journal has them."""
    now = time.time()
    started = AgentStarted(at=now, version="bench", pid=os.getpid(), sandbox="", autonomy="auto", policy=FoldPolicy())
    await store.record(started)
    definition = catalog.get("bench.nothing")
    assert definition is not None

    async def one(n: int) -> Incident:
        service = f"service-{n}"
        labels = {"alertname": "Bench", "service": service}
        alert = Alert(
            tenant="default", fingerprint=f"{n:016x}", status="firing", labels=labels, starts_at=now, digest=str(n)
        )
        received = AlertsReceived(at=now, tenant="default", receiver="r", group_key=service, alerts=(alert,))
        await store.record(received)
        current = store.state.current("default", alert.fingerprint)
        assert current is not None
        step = make_step(definition, {"service": service}, Target(identity=f"service={service}"))
        assert not isinstance(step, Declined), step
        plan = Plan(
            id=f"plan-{n}",
            incident=current.incident,
            service=service,
            cause="bench",
            steps=(step,),
            autonomy="auto",
            made_at=now,
            expires_at=now + 3600,
        )
        way = ["open", "investigating", "diagnosed", "acting"]
        moves = [IncidentMoved(at=now, incident=plan.incident, before=a, after=b) for a, b in itertools.pairwise(way)]
        await store.record(*moves[:2], PlanMade(at=now, plan=plan), moves[2])
        incident = store.state.incident(plan.incident)
        assert incident is not None
        return incident

    return list(await asyncio.gather(*(one(n) for n in range(steps))))


async def _bench(steps: int, directory: Path) -> dict[str, Any]:
    held = await asyncio.to_thread(sandbox.probe)
    sandbox.use(held)
    config, catalog = _config(directory, steps), Catalog([parse_action(ACTION, "bench")])
    store, telemetry = Store.open(directory), Telemetry("bench")
    situations = Situations(config, PackSet.of(()), (), Topology())
    verifier = Recovered(config, PackSet.of(()), situations, store, telemetry)
    remediation = Remediation(config, catalog, store, verifier, telemetry)
    try:
        incidents = await _planned(store, catalog, steps)
        calm_collector()
        results: list[str] = []

        async def all_at_once() -> None:
            outcomes = await asyncio.gather(*(remediation.run(i, asyncio.Event()) for i in incidents))
            results.extend(outcome.result for outcome in outcomes)

        idle = await measured(lambda: asyncio.sleep(IDLE_SECONDS))
        bare = await measured(lambda: _spawns(steps))
        ours = await measured(all_at_once)
        if results.count("verified") != steps:
            raise RuntimeError(f"bench: {steps - results.count('verified')} of {steps} plans were not carried out")
        return {
            "steps": steps,
            "enforced_by": held.enforced_by.value,
            "idle": idle,
            "bare_spawns": bare,
            "planned_steps": ours,
            "p99_to_bare_spawns": round(ours["p99_ms"] / max(0.01, bare["p99_ms"]), 2),
            "p99_above_idle_ms": round(ours["p99_ms"] - idle["p99_ms"], 2),
            "records": store.state.seq,
            "load": round(os.getloadavg()[0], 1),
            "aim_p99_ms": AIM_MS,
            "within_aim": ours["p99_ms"] < AIM_MS,
        }
    finally:
        await store.close()


def bench(steps: int = STEPS) -> dict[str, Any]:
    """Lag of the loop in milliseconds: idle, under bare spawns, and under `steps` planned steps at once."""
    with tempfile.TemporaryDirectory(prefix="alertmedic-bench-") as directory:
        return asyncio.run(_bench(steps, Path(directory)))


if __name__ == "__main__":
    print(json.dumps(bench(int(sys.argv[1]) if len(sys.argv) > 1 else STEPS), indent=2))
