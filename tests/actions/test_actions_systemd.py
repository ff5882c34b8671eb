"""What we ask of systemctl and what we make of its answers.

systemd is not pid 1 where these tests run, so `systemctl` is a stand-in that keeps the state of one unit in a file. Our
side is what is tested: arguments, identity, exit codes. That the real systemd answers so is not tested here.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from actions_world import Proposal, context

from actions import guard
from actions.builtin import systemd
from actions.catalog import load_catalog
from actions.model import Declined, Plan, Refusal
from sandbox.model import Limits, Needs, RunResult

STAND_IN = """#!{python}
import json, sys, pathlib
state_file, calls = pathlib.Path({state!r}), pathlib.Path({calls!r})
with calls.open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
state = json.loads(state_file.read_text())
if sys.argv[1] == "restart":
    if state.get("fails"):
        sys.exit("Job for worker.service failed.")
    state["InvocationID"] = "b" * 32
    state["ActiveState"] = "active"
    state_file.write_text(json.dumps(state))
else:
    print("\\n".join(f"{{k}}={{v}}" for k, v in state.items()))
"""


@pytest.fixture
def unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file with the unit's state; `calls` beside it has every call."""
    import sys

    state = tmp_path / "state.json"
    set_state(state)
    program = tmp_path / "bin" / "systemctl"
    program.parent.mkdir()
    program.write_text(STAND_IN.format(python=sys.executable, state=str(state), calls=str(tmp_path / "calls")))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return state


def set_state(path: Path, **more: object) -> None:
    state = {"Id": "worker.service", "LoadState": "loaded", "ActiveState": "active", "SubState": "running"}
    path.write_text(json.dumps(state | {"MainPID": "77", "InvocationID": "a" * 32, "RefuseManualStop": "no"} | more))


def calls(unit: Path) -> list[list[str]]:
    return [json.loads(line) for line in (unit.parent / "calls").read_text().splitlines()]


def test_a_restart_is_bound_to_the_invocation(unit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--unit=worker.service", f"--invocation={'a' * 32}"]
    assert systemd.main(["resolve", "--unit=worker.service"]) == 0
    (target,) = json.loads(capsys.readouterr().out)
    assert target["params"] == {"invocation": "a" * 32}
    assert systemd.main(["check", *arguments]) == 1
    assert systemd.main(["run", *arguments]) == 0
    assert systemd.main(["check", *arguments]) == 0
    assert systemd.main(["run", *arguments]) == 93
    assert [c for c in calls(unit) if c[0] == "restart"] == [["restart", "--", "worker.service"]]


def test_a_restart_that_fails_is_a_failure(unit: Path) -> None:
    set_state(unit, fails=1, ActiveState="failed")
    arguments = ["--unit=worker.service", f"--invocation={'a' * 32}"]
    assert systemd.main(["run", *arguments]) == 1
    assert systemd.main(["check", *arguments]) == 1


def test_a_unit_in_between_cannot_be_judged(unit: Path) -> None:
    set_state(unit, ActiveState="deactivating")
    arguments = ["--unit=worker.service", f"--invocation={'a' * 32}", "--seconds=0.2"]
    assert systemd.main(["check", *arguments]) == 94


def test_an_unknown_unit_plans_nothing(unit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_state(unit, LoadState="not-found")
    assert systemd.main(["resolve", "--unit=worker.service"]) == 1
    assert "not-found" in capsys.readouterr().err


def test_a_unit_that_refuses_to_be_stopped_is_no_target(unit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_state(unit, RefuseManualStop="yes")
    assert systemd.main(["resolve", "--unit=worker.service"]) == 0
    assert json.loads(capsys.readouterr().out) == []


NEVER = "sshd ssh systemd-journald dbus -x alertmedic init.scope ../x"


@pytest.mark.parametrize("name", [*(f"{n}.service" for n in NEVER.split()), "a b.service", "worker", "worker.socket"])
async def test_units_that_are_never_restarted(name: str) -> None:
    async def run(*_: object) -> RunResult:
        raise AssertionError("nothing may run")

    world = context(inventory={"worker": {"systemd_unit": name}}, targets=(), values={})
    answer = await guard.consider(Proposal(action="service.restart"), load_catalog(), world, run)
    assert isinstance(answer, Declined)
    assert answer.reason is Refusal.BAD_PARAMETERS


async def test_the_plan_names_unit_and_invocation() -> None:
    async def run(argv: tuple[str, ...], limits: Limits, secrets: object, needs: Needs) -> RunResult:
        target = {"identity": "unit=w@1.service", "params": {"invocation": "none"}}
        return RunResult(exit_code=0, stdout=json.dumps([target]))

    world = context(inventory={"worker": {"systemd_unit": "w@1.service"}}, targets=(), values={})
    made = await guard.consider(Proposal(action="service.restart"), load_catalog(), world, run)
    assert isinstance(made, Plan)
    assert made.steps[0].argv[-3:] == ("--unit=w@1.service", "--invocation=none", "--seconds=90")
