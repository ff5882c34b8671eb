"""A process that plans, runs and recovers one step, and that a failpoint may kill. Run by test_actions_failpoints.py.

`python actions_victim.py DIR helps|fails`: the first start makes the plan and runs it, later starts recover it from the
ledger, a file of JSON lines that is synced after every record. The step appends a line to DIR/effects, its undo to
DIR/undone; both are anything but idempotent. The last line printed is the outcome.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import msgspec
from actions_world import NOW, Proposal, context

import sandbox
from actions import guard
from actions.catalog import Catalog, parse_action
from actions.model import BreakerMoved, Plan, Step, StepMoved
from actions.runner import Runner
from sandbox.model import Limits, RunResult

APPEND = "import sys; open(sys.argv[1], 'a').write('once\\n')"
LINES = "import os, sys; sys.exit(0 if os.path.exists(sys.argv[1]) and not os.path.exists(sys.argv[2]) else 1)"


class FileLedger:
    def __init__(self, directory: Path) -> None:
        self.path = directory / "ledger"

    def _append(self, kind: str, record: object) -> None:
        with self.path.open("ab") as file:
            file.write(msgspec.json.encode([kind, record]) + b"\n")
            file.flush()
            os.fsync(file.fileno())

    async def record_step(self, move: StepMoved) -> None:
        self._append("step", move)

    async def record_breaker(self, move: BreakerMoved) -> None:
        self._append("breaker", move)

    def record_plan(self, plan: Plan) -> None:
        self._append("plan", plan)

    def read(self) -> tuple[Plan | None, list[StepMoved], list[BreakerMoved]]:
        plan: Plan | None = None
        moves: list[StepMoved] = []
        breakers: list[BreakerMoved] = []
        for line in self.path.read_bytes().splitlines() if self.path.exists() else []:
            kind, raw = msgspec.json.decode(line, type=tuple[str, msgspec.Raw])
            if kind == "plan":
                plan = msgspec.json.decode(raw, type=Plan)
            elif kind == "step":
                moves.append(msgspec.json.decode(raw, type=StepMoved))
            else:
                breakers.append(msgspec.json.decode(raw, type=BreakerMoved))
        return plan, moves, breakers


class Verifier:
    def __init__(self, helps: bool) -> None:
        self.helps = helps

    async def verify(self, plan: Plan, step: Step) -> tuple[bool, str]:
        return self.helps, "seen"


async def make_plan(directory: Path) -> Plan:
    data = {
        "name": "test.append",
        "description": "For tests.",
        "target": "service=worker",
        "argv": ["/bin/true"],
        "check": ["/bin/true"],
        "undo": "none",
        "idempotent": False,
        "risk": {"reversible": False, "blast_radius": "service", "changes": "runtime", "auto": "allowed"},
    }

    async def run(*_: object) -> RunResult:
        raise AssertionError("nothing to look up")

    catalog = Catalog([parse_action(data, "victim")])
    made = await guard.consider(Proposal(action="test.append"), catalog, context(targets=()), run)
    assert isinstance(made, Plan), made
    effects, undone = str(directory / "effects"), str(directory / "undone")
    python = (sys.executable, "-I", "-S", "-c")
    step = msgspec.structs.replace(
        made.steps[0],
        argv=(*python, APPEND, effects),
        check=(*python, LINES, effects, undone),
        undo=(*python, APPEND, undone),
        limits=Limits(timeout_seconds=30.0),
    )
    return msgspec.structs.replace(made, steps=(step,))


async def main(directory: Path, helps: bool) -> None:
    ledger = FileLedger(directory)
    plan, moves, breakers = ledger.read()
    if plan is None:
        plan = await make_plan(directory)
        ledger.record_plan(plan)
    runner = Runner(ledger, sandbox, Verifier(helps), lambda: NOW, None, breakers)
    if moves:
        outcome = await runner.recover(plan, moves, asyncio.Event())
    else:
        outcome = await runner.run(plan, asyncio.Event())
    print(outcome.result, *outcome.states)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2] == "helps"))
