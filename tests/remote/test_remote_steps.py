"""From a proposal about a service elsewhere to a step that runs there, by the real guard, runner and sshd."""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from ssh_world import Sshd

import sandbox
from actions import guard
from actions.catalog import Catalog, parse_action
from actions.gates import GuardContext
from actions.model import Autonomy, BreakerMoved, Declined, ParamValue, Plan, Refusal, Step, StepMoved
from actions.policy import AutonomyPolicy, GuardPolicy
from actions.runner import Runner, RunnerSettings
from agent.remote import Executors
from agent.remote_protocol import PYTHON_THERE
from sandbox import EnforcedBy, Limits, RunResult
from sandbox.model import Needs

NOW = 1_700_000_000.0
LIMITS = Limits(timeout_seconds=60, memory_bytes=512 << 20)


class Proposal(msgspec.Struct, frozen=True, kw_only=True):
    action: str = "test.there"
    service: str = "shop"
    params: dict[str, ParamValue] = {}
    reason: str = "because"
    autonomy_cap: Autonomy = "auto"


ACTION = {
    "name": "test.there",
    "description": "For tests.",
    "where": "host",
    "parameters": {"process": {"from": "target", "pattern": "[a-z]+"}},
    "resolve": ["{python}", "look"],
    "argv": ["{python}", "act", "{process}"],
    "check": ["/bin/true"],
    "undo": "none",
    "idempotent": False,
    "risk": {"reversible": False, "blast_radius": "process", "changes": "runtime", "auto": "allowed"},
}


class Ledger:
    def __init__(self) -> None:
        self.moves: list[StepMoved] = []

    async def record_step(self, move: StepMoved) -> None:
        self.moves.append(move)

    async def record_breaker(self, move: BreakerMoved) -> None:
        pass


class Recovered:
    async def verify(self, plan: Plan, step: Step) -> tuple[bool | None, str]:
        return True, "recovered"


def context(**more: Any) -> GuardContext:
    values: dict[str, Any] = {
        "now": NOW,
        "incident": "inc",
        "cause": "process.stuck",
        "posterior": 0.9,
        "margin": 0.5,
        "firing": True,
        "evidence_at": NOW - 5,
        "verifiable": True,
        "policy": GuardPolicy(autonomy=AutonomyPolicy(default="auto")),
        "inventory": {"shop": {"host": "web-1"}},
        "enforced_by": EnforcedBy.CGROUP2,
    }
    return GuardContext(**(values | more))


@pytest.fixture(scope="module")
def sshd(program: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    server = Sshd(tmp_path_factory.mktemp("sshd"), program("sshd", "openssh-server"), port)
    server.start()
    yield server
    server.stop()


async def test_a_service_elsewhere_is_looked_at_and_acted_on_there() -> None:
    catalog = Catalog([parse_action(ACTION, "test")])
    asked: list[tuple[str, str]] = []

    def reader(host: str = "") -> guard.SandboxRun:
        async def read(argv: tuple[str, ...], limits: Limits, secrets: Mapping[str, str], _: Needs) -> RunResult:
            asked.append((host, argv[1]))
            line = '[{"identity": "pid=1,start=2", "params": {"process": "worker"}}]\n'
            return RunResult(exit_code=0, stdout=line)

        return read

    refused = await guard.consider(Proposal(), catalog, context(), reader(), reader)
    assert isinstance(refused, Declined)
    assert (refused.reason, asked) == (Refusal.NOT_LOCAL, [])
    assert "hosts.web-1" in refused.detail
    plan = await guard.consider(Proposal(), catalog, context(remote_hosts=frozenset({"web-1"})), reader(), reader)
    assert isinstance(plan, Plan), plan
    assert asked == [("web-1", "look")]
    assert [s.host for s in plan.steps] == ["web-1"]
    here = msgspec.structs.replace(plan, steps=(msgspec.structs.replace(plan.steps[0], host=""),))
    assert here.digest != plan.digest, "an approval is for one host"


@pytest.mark.skipif(sandbox.current().root is None, reason="no cgroup v2 tree here")
@pytest.mark.parametrize("happened", [True, False])
async def test_after_a_lost_connection_the_check_decides(sshd: Sshd, tmp_path: Path, happened: bool) -> None:
    """The connection is cut while the step runs. Over a new one the old run is ended, then its check is asked."""
    begun, effect = tmp_path / "begun", tmp_path / "effect"
    act = f"echo x >> {begun}; {'touch ' + str(effect) + ';' if happened else ''} exec sleep 300"
    step = Step(
        action="test.there",
        version=1,
        target="it",
        argv=("/bin/sh", "-c", act),
        check=(sys.executable, "-c", f"import pathlib, sys; sys.exit(0 if pathlib.Path('{effect}').exists() else 1)"),
        limits=msgspec.structs.replace(LIMITS, timeout_seconds=300),
        host="web-1",
    )
    plan = Plan(
        id="p",
        incident="i",
        service="shop",
        cause="c",
        steps=(step,),
        autonomy="auto",
        made_at=NOW,
        expires_at=NOW + 600,
    )
    ledger = Ledger()
    settings = RunnerSettings(max_attempts=1)
    runner = Runner(ledger, Executors({"web-1": sshd.host()}), Recovered(), lambda: NOW, settings)
    running = asyncio.create_task(runner.run(plan, asyncio.Event()))
    deadline = time.monotonic() + 20
    while not begun.exists() or (happened and not effect.exists()):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    sshd.cut()
    outcome = await running
    after = [str(move.after) for move in ledger.moves]
    assert after[:2] == ["intent", "unknown"]
    assert outcome.result == ("verified" if happened else "handed_over"), outcome
    assert begun.read_text() == "x\n", "never a second time"
    assert ledger.moves[0].leaf.startswith("remote-")


async def test_the_interpreter_is_the_other_hosts_own(sshd: Sshd) -> None:
    result = await Executors({"web-1": sshd.host()}).run(
        [sys.executable, "-c", "import sys, actions; print(sys.argv)"], LIMITS, host="web-1"
    )
    assert result.ok, result
    assert PYTHON_THERE == "alertmedic-python"
