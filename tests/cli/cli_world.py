"""A state directory with incidents in it, and the command as a process."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from actions.model import BreakerMoved, BreakerState, Plan, Refusal, Step, StepMoved, StepState
from agent import cli
from agent.incidents import IncidentState
from agent.journal.records import (
    AlertQuarantined,
    AlertsReceived,
    BreakerRecorded,
    Diagnosed,
    IncidentMoved,
    Noted,
    PlanDeclined,
    PlanMade,
    StepRecorded,
)
from agent.store import Store
from rules.model import Alert, Contribution, Diagnosis, Hypothesis, Proposal
from sandbox.model import EnforcedBy, RunResult

NASTY = "red\x1b[31m alert\x07\r\u202e"


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass(frozen=True)
class Service:
    port: int
    process: subprocess.Popen[bytes]
    state_dir: Path

    def get(self, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("ALERTMEDIC_")}
    return kept | {"TERM": "dumb", "PYTHONWARNINGS": "default"} | more


def process(*arguments: str | Path, **env: str) -> Done:
    """Runs the command as people do, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "agent", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment(**env),
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert "ResourceWarning" not in done.stderr, done.stderr
    return Done(done.returncode, done.stdout, done.stderr)


def alertmedic(*arguments: str | Path, **env: str) -> Done:
    """The same in this process, for tests to which the difference (half a second) does not matter."""
    out, err = io.StringIO(), io.StringIO()
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(environment(**env))
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = cli.main([*map(str, arguments)])
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else 1
    finally:
        os.environ.clear()
        os.environ.update(before)
    return Done(code, out.getvalue(), err.getvalue())


def alert(name: str, tenant: str = "default", **labels: str) -> Alert:
    return Alert(
        tenant=tenant,
        fingerprint=name.lower(),
        status="firing",
        labels={"alertname": name, "service": "front", **labels},
        annotations={"summary": f"{name} is slow {NASTY}"},
        starts_at=time.time() - 100.0,
        digest=f"digest-{name}",
    )


def diagnosis(argv_service: str = "worker") -> Diagnosis:
    best = Hypothesis(
        cause="process.stuck",
        service=argv_service,
        fault="hang",
        title="the process hangs",
        posterior=0.91,
        confidence=0.88,
        path=("front", "orders", argv_service),
        rules=("process.stuck.queue",),
        contributions=(
            Contribution(
                evidence="queue",
                state="strong",
                log_odds=2.3,
                text="the queue grows",
                series=('queue_depth{queue="x"}',),
            ),
            Contribution(evidence="cpu", state="absent", log_odds=-0.4, text="no CPU change"),
        ),
        proposals=(Proposal(action="service.restart", service=argv_service, reason="it hangs"),),
        sentence="The worker has stopped taking jobs.",
    )
    second = Hypothesis(
        cause="host.cpu_neighbour", service="node-1", fault="cpu", title="a neighbour", posterior=0.05, confidence=0.1
    )
    return Diagnosis(
        verdict="ranked",
        hypotheses=(best, second),
        candidates=7,
        missing={"db_connections": "timeout after 15 s"},
        sentence="Most likely the worker hangs.",
    )


def waiting_plan(incident: str, now: float, argv: tuple[str, ...]) -> Plan:
    step = Step(
        action="service.restart.supervisord",
        version=1,
        target="service=worker",
        argv=argv,
        check=("/bin/true",),
        params={"service": "worker"},
    )
    return Plan(
        id="plan-abcdefghijkl",
        incident=incident,
        service="worker",
        cause="process.stuck",
        steps=(step,),
        autonomy="approve",
        made_at=now,
        expires_at=now + 3600.0,
        reason="the worker hangs",
        notes=("limits not enforced (rlimits only)",),
    )


def _moved(incident: str, before: IncidentState, after: IncidentState, at: float, reason: str = "") -> IncidentMoved:
    return IncidentMoved(at=at, incident=incident, before=before, after=after, reason=reason)


async def open_incident(store: Store, name: str, at: float, tenant: str = "default", **labels: str) -> str:
    before = set(store.state.incidents)
    await store.record(
        AlertsReceived(
            at=at,
            tenant=tenant,
            receiver="alertmedic",
            group_key=f'{{}}:{{alertname="{name}"}}',
            alerts=(alert(name, tenant, **labels),),
        )
    )
    (made,) = set(store.state.incidents) - before
    return made


async def awaiting_approval(
    store: Store, argv: tuple[str, ...] = ("/bin/echo", "it is done", "a b"), *, suggested: bool = False
) -> str:
    """An incident whose plan waits for a person, or is only suggested to one."""
    now = time.time()
    id = await open_incident(store, "FrontSlow", now - 60.0, evil=NASTY)
    state = IncidentState
    after = state.SUGGESTED if suggested else state.AWAITING_APPROVAL
    plan = waiting_plan(id, now, argv)
    if suggested:
        plan = msgspec.structs.replace(plan, autonomy="suggest")
    await store.record(
        _moved(id, state.OPEN, state.INVESTIGATING, now - 59.0),
        Noted(at=now - 58.5, incident=id, text=f"Prometheus said {NASTY}"),
        Diagnosed(
            at=now - 58.0,
            incident=id,
            diagnosis=diagnosis(),
            evidence_seconds=0.8,
            diagnosis_seconds=0.004,
            evidence_at=now - 58.5,
        ),
        _moved(id, state.INVESTIGATING, state.DIAGNOSED, now - 57.9),
        PlanDeclined(
            at=now - 57.8, incident=id, action="service.restart.systemd", refusal=Refusal.NO_INVENTORY, detail="no unit"
        ),
        PlanMade(at=now - 57.7, plan=plan),
        _moved(id, state.DIAGNOSED, after, now - 57.6, "a person must agree"),
    )
    return id


async def healed(store: Store) -> str:
    """An incident that went the whole way."""
    id = await awaiting_approval(store)
    incident = store.state.incidents[id]
    assert incident.plan is not None
    now, state, step = time.time(), IncidentState, StepState
    await store.record(
        Noted(at=now - 50.0, incident=id, text="approved by hand"),
        _moved(id, state.AWAITING_APPROVAL, state.DECLINED, now - 49.0, "somebody else takes it"),
        _moved(id, state.DECLINED, state.INVESTIGATING, now - 48.0, "again"),
        Diagnosed(at=now - 47.0, incident=id, diagnosis=diagnosis()),
        _moved(id, state.INVESTIGATING, state.DIAGNOSED, now - 46.0),
    )
    plan = Plan(
        id="plan-zyxwvutsrqpo",
        incident=id,
        service="worker",
        cause="process.stuck",
        steps=incident.plan.steps,
        autonomy="auto",
        made_at=now - 45.0,
        expires_at=now + 60.0,
    )
    await store.record(PlanMade(at=now - 45.0, plan=plan), _moved(id, state.DIAGNOSED, state.ACTING, now - 44.0))
    result = RunResult(
        exit_code=0,
        stdout=f"restarted {NASTY}\nfine\n",
        seconds=0.21,
        cpu_seconds=0.02,
        memory_peak_bytes=9 << 20,
        enforced_by=EnforcedBy.CGROUP2_KILL,
    )

    def move(before: StepState, after: StepState, at: float, reason: str = "", ran: bool = False) -> StepRecorded:
        return StepRecorded(
            move=StepMoved(
                incident=id,
                plan=plan.id,
                step=0,
                before=before,
                after=after,
                at=at,
                reason=reason,
                result=result if ran else None,
            )
        )

    await store.record(move(step.PLANNED, step.INTENT, now - 43.0))
    await store.record(move(step.INTENT, step.RAN, now - 42.0, ran=True))
    await store.record(_moved(id, state.ACTING, state.VERIFYING, now - 41.0))
    await store.record(move(step.RAN, step.VERIFIED, now - 30.0, "latency_p95_seconds back at 0.1 s"))
    await store.record(_moved(id, state.VERIFYING, state.RESOLVED, now - 29.0, "the series are back"))
    return id


async def breaker_and_quarantine(store: Store) -> None:
    now = time.time()
    await store.record(
        BreakerRecorded(
            move=BreakerMoved(
                key="service.restart.supervisord",
                before=BreakerState.CLOSED,
                after=BreakerState.OPEN,
                at=now,
                reason="3 failures in a row",
                open_until=now + 900.0,
                opened_count=1,
                consecutive=3,
            )
        ),
        AlertQuarantined(
            at=now,
            tenant="default",
            digest="d" * 32,
            path="$.alerts[1].startsAt",
            reason="not a time",
            index=1,
            head=f'{{"x": "{NASTY}"}}',
        ),
    )
