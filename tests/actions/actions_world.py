"""Shared by the tests of remediation: a ledger in memory, a scripted sandbox, contexts and plans."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from effect_world import Crash as Crash

import sandbox
from actions.catalog import ActionDefinition, load_catalog, parse_action
from actions.gates import GuardContext, Target
from actions.model import Autonomy, BreakerMoved, ParamValue, Plan, Step, StepMoved, StepState, check_move
from actions.policy import AutonomyPolicy, GuardPolicy
from sandbox.model import EnforcedBy, Limits, Needs, Protection, RunResult

NOW = 1_700_000_000.0


@dataclass
class Clock:
    now: float = NOW

    def __call__(self) -> float:
        return self.now


@dataclass
class MemoryLedger:
    """Keeps records, insists on the table, and may crash before or after any of its writes."""

    moves: list[StepMoved] = field(default_factory=list)
    breakers: list[BreakerMoved] = field(default_factory=list)
    states: dict[int, StepState] = field(default_factory=dict)
    fail: Exception | None = None

    async def record_step(self, move: StepMoved) -> None:
        await asyncio.sleep(0)
        if self.fail is not None:
            raise self.fail
        assert self.states.get(move.step, StepState.PLANNED) is move.before
        check_move(move.before, move.after)
        # What the journal does to every record: nothing may be lost on the way.
        assert msgspec.json.decode(msgspec.json.encode(move), type=StepMoved) == move
        self.states[move.step] = move.after
        self.moves.append(move)

    async def record_breaker(self, move: BreakerMoved) -> None:
        await asyncio.sleep(0)
        if self.fail is not None:
            raise self.fail
        self.breakers.append(move)

    def path(self, step: int) -> str:
        """`planned intent ran verified` of one step."""
        return " ".join(["planned", *(m.after for m in self.moves if m.step == step)])


@dataclass
class ScriptedSandbox:
    """Answers each program (argv[0]) with the results it was given, the last one for ever. Keeps what was asked."""

    answers: dict[str, list[RunResult | BaseException]] = field(default_factory=dict)
    ran: list[tuple[str, ...]] = field(default_factory=list)
    environments: list[Mapping[str, str] | None] = field(default_factory=list)
    killed: list[str] = field(default_factory=list)
    leaves: int = 0
    kills: bool = True

    async def run(
        self,
        argv: Sequence[str],
        limits: Limits,
        *,
        env: Mapping[str, str] | None = None,
        user: str = "",
        stdin: bytes = b"",
        protection: Protection = "automatic",
        leaf: str = "",
        **_: object,
    ) -> RunResult:
        await asyncio.sleep(0)
        self.ran.append(tuple(argv))
        self.environments.append(env)
        script = self.answers.get(argv[0], [done()])
        answer = script.pop(0) if len(script) > 1 else script[0]
        if isinstance(answer, BaseException):
            raise answer
        return answer

    async def kill_leaf(self, leaf: str, deadline_seconds: float) -> bool:
        await asyncio.sleep(0)
        self.killed.append(leaf)
        return self.kills

    def leaf_name(self) -> str:
        self.leaves += 1
        return f"run-{self.leaves}"

    def programs(self) -> list[str]:
        return [argv[0] for argv in self.ran]


@dataclass
class ScriptedVerifier:
    answers: list[tuple[bool | None, str] | Exception] = field(default_factory=lambda: [(True, "recovered")])
    asked: list[str] = field(default_factory=list)

    async def verify(self, plan: Plan, step: Step) -> tuple[bool | None, str]:
        await asyncio.sleep(0)
        self.asked.append(step.action)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def done(code: int = 0, **more: Any) -> RunResult:
    return RunResult(exit_code=code, seconds=0.1, **more)


def step(name: str = "a", **more: Any) -> Step:
    """A step whose programs are called do-NAME, check-NAME and undo-NAME."""
    values: dict[str, Any] = {
        "action": f"test.{name}",
        "version": 1,
        "target": f"service={name}",
        "argv": (f"do-{name}",),
        "check": (f"check-{name}",),
        "undo": (f"undo-{name}",),
    }
    return Step(**(values | more))


def plan(*steps: Step, **more: Any) -> Plan:
    values: dict[str, Any] = {
        "id": "plan-test",
        "incident": "inc-test",
        "service": "worker",
        "cause": "process.stuck",
        "steps": steps or (step(),),
        "autonomy": "auto",
        "made_at": NOW,
        "expires_at": NOW + 600,
        "verify_seconds": 5.0,
    }
    return Plan(**(values | more))


class Proposal(msgspec.Struct, frozen=True, kw_only=True):
    action: str = "test.restart"
    service: str = "worker"
    params: dict[str, ParamValue] = {}
    reason: str = "because"
    autonomy_cap: Autonomy = "auto"


def action_data(**more: Any) -> dict[str, Any]:
    """A valid definition as plain data."""
    data: dict[str, Any] = {
        "name": "test.restart",
        "description": "For tests.",
        "target": "service={service}",
        "parameters": {"service": {"from": "plan", "pattern": ".+"}},
        "argv": ["/bin/true", "--service={service}"],
        "check": ["/bin/true"],
        "undo": "none",
        "idempotent": False,
        "risk": {"reversible": False, "blast_radius": "service", "changes": "runtime", "auto": "allowed"},
    }
    merged = data | more
    return {k: v for k, v in merged.items() if v is not ...}


def definition(**more: Any) -> ActionDefinition:
    return parse_action(action_data(**more), "test")


def context(**more: Any) -> GuardContext:
    """One in which nothing objects."""
    values: dict[str, Any] = {
        "now": NOW,
        "incident": "inc-test",
        "cause": "process.stuck",
        "posterior": 0.9,
        "margin": 0.5,
        "firing": True,
        "evidence_at": NOW - 5,
        "verifiable": True,
        "policy": policy(),
        "inventory": {"worker": {}},
        "enforced_by": EnforcedBy.CGROUP2,
        "targets": (Target(identity="service=worker"),),
        "values": {"service": "worker"},
    }
    return GuardContext(**(values | more))


def policy(**more: Any) -> GuardPolicy:
    return GuardPolicy(**({"autonomy": AutonomyPolicy(default="auto")} | more))


async def in_sandbox(
    argv: tuple[str, ...], limits: Limits, secrets: Mapping[str, str] | None = None, needs: Needs | None = None
) -> RunResult:
    """Runs for real, as the agent does."""
    env = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", **secrets} if secrets else None
    return await sandbox.run(argv, limits, env=env, needs=needs)


async def builtin(module: str, *arguments: str, secrets: Mapping[str, str] | None = None) -> RunResult:
    """One of the shipped programs, within the default limits of a step and with the needs of its first action."""
    limits, name = Limits(timeout_seconds=60.0), f"actions.builtin.{module}"
    needs = next(d.needs for d in load_catalog() if name in d.argv)
    return await in_sandbox((sys.executable, "-I", "-m", name, *arguments), limits, secrets, needs)
