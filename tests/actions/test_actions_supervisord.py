"""Restarting programs through a real supervisord."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from actions_started import Supervised, wait_until
from actions_world import MemoryLedger, Proposal, ScriptedVerifier, builtin, context, in_sandbox

import sandbox
from actions import guard
from actions.catalog import load_catalog
from actions.model import Declined, Plan, Refusal, StepMoved, StepState
from actions.runner import Runner


def entry(supervised: Supervised, program: str) -> dict[str, str]:
    return {"supervisord_url": supervised.url, "supervisord_program": program}


async def plan_restart(supervised: Supervised, program: str) -> Plan | Declined:
    world = context(inventory={"worker": entry(supervised, program)}, targets=(), values={})
    return await guard.consider(Proposal(action="service.restart"), load_catalog(), world, in_sandbox)


async def info(supervised: Supervised, program: str) -> dict[str, Any]:
    result = await builtin("supervisord", "resolve", f"--url={supervised.url}", f"--program={program}")
    assert result.ok, result
    params: dict[str, Any] = json.loads(result.stdout)[0]["params"]
    return params


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("program", ["shop:sleeper", "shop:stuck"])
async def test_a_restart_replaces_the_process_and_outlives_the_sandbox(supervised: Supervised, program: str) -> None:
    made = await plan_restart(supervised, program)
    assert isinstance(made, Plan), made
    old = made.steps[0].params["pid"]
    ledger = MemoryLedger()
    runner = Runner(ledger, sandbox, ScriptedVerifier(), lambda: made.made_at)
    outcome = await runner.run(made, asyncio.Event())
    assert outcome.result == "verified", ledger.moves
    new = await info(supervised, program)
    assert new["pid"] != old
    assert alive(new["pid"])
    assert not alive(int(old))
    assert (
        Path(f"/proc/{new['pid']}/stat").read_text().split()[3]
        == (supervised.directory / "supervisord.pid").read_text().strip()
    )


async def test_the_check_tells_before_from_after(supervised: Supervised) -> None:
    made = await plan_restart(supervised, "shop:sleeper")
    assert isinstance(made, Plan)
    step = made.steps[0]
    assert (await in_sandbox(step.check, step.limits)).exit_code == 1
    assert (await in_sandbox(step.argv, step.limits)).exit_code == 0
    assert (await in_sandbox(step.check, step.limits)).exit_code == 0


async def test_the_same_plan_does_not_restart_twice(supervised: Supervised) -> None:
    made = await plan_restart(supervised, "shop:sleeper")
    assert isinstance(made, Plan)
    step = made.steps[0]
    assert (await in_sandbox(step.argv, step.limits)).ok
    between = await info(supervised, "shop:sleeper")
    again = await in_sandbox(step.argv, step.limits)
    assert again.exit_code == 93
    assert "refused" in again.stdout
    assert await info(supervised, "shop:sleeper") == between


async def test_a_restart_that_was_cut_off_between_stop_and_start_is_finished(supervised: Supervised) -> None:
    made = await plan_restart(supervised, "shop:sleeper")
    assert isinstance(made, Plan)
    supervised.ctl("stop", "shop:sleeper")  # as far as the interrupted run came
    move = StepMoved(
        incident=made.incident, plan=made.id, step=0, before=StepState.PLANNED, after=StepState.INTENT, at=made.made_at,
        leaf=sandbox.leaf_name(),
    )  # fmt: skip
    ledger = MemoryLedger(states={0: StepState.INTENT})
    runner = Runner(ledger, sandbox, ScriptedVerifier(), lambda: made.made_at)
    outcome = await runner.recover(made, [move], asyncio.Event())
    if sandbox.current().root is None:
        assert outcome.result == "handed_over"
        return
    assert ledger.path(0) == "planned unknown planned intent ran verified"
    assert outcome.result == "verified"
    assert alive((await info(supervised, "shop:sleeper"))["pid"])


async def test_a_program_that_does_not_run_is_started(supervised: Supervised) -> None:
    supervised.ctl("stop", "shop:sleeper")
    made = await plan_restart(supervised, "shop:sleeper")
    assert isinstance(made, Plan)
    assert made.steps[0].params["pid"] == 0
    assert (await in_sandbox(made.steps[0].argv, made.steps[0].limits)).ok
    assert alive((await info(supervised, "shop:sleeper"))["pid"])


async def test_a_program_that_cannot_start_is_a_failure(supervised: Supervised) -> None:
    made = await plan_restart(supervised, "broken")
    assert isinstance(made, Plan)
    result = await in_sandbox(made.steps[0].argv, made.steps[0].limits)
    assert result.exit_code == 1
    assert json.loads(result.stdout)["after"]["statename"] == "FATAL"
    assert (await in_sandbox(made.steps[0].check, made.steps[0].limits)).exit_code == 1


@pytest.mark.parametrize("program", ["absent", "shop:absent", "shop:*"])
async def test_an_unknown_program_plans_nothing(supervised: Supervised, program: str) -> None:
    answer = await plan_restart(supervised, program)
    assert isinstance(answer, Declined)
    assert answer.reason in (Refusal.RESOLVE_FAILED, Refusal.BAD_PARAMETERS)


async def test_a_supervisor_that_is_gone_plans_nothing_and_cannot_be_checked(tmp_path: Path) -> None:
    url = f"unix://{tmp_path}/none"
    gone = await builtin("supervisord", "run", f"--url={url}", "--program=x", "--pid=1", "--start=1")
    assert gone.exit_code == 1
    assert url in gone.stderr
    check = await builtin("supervisord", "check", f"--url={url}", "--program=x", "--pid=1", "--start=1")
    assert check.exit_code == 94


async def test_over_tcp_with_a_password(program: Any, free_port: Any, tmp_path: Path) -> None:
    port = free_port()
    directory = Path(tempfile.mkdtemp(prefix="am-sv-", dir="/tmp"))
    config = directory / "c.conf"
    config.write_text(
        f"[supervisord]\nnodaemon=true\nlogfile={directory}/log\npidfile={directory}/pid\nminfds=128\nminprocs=20\n"
        f"[inet_http_server]\nport=127.0.0.1:{port}\nusername=ann\npassword=s3cret\n"
        "[rpcinterface:supervisor]\n"
        "supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface\n"
        "[program:sleeper]\ncommand=/bin/sleep 600\nstartsecs=0\n"
    )
    server = subprocess.Popen(
        [Path(sys.executable).parent / "supervisord", "-n", "-c", config],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        arguments = ("resolve", f"--url=http://127.0.0.1:{port}", "--program=sleeper")
        wait_until(lambda: (directory / "pid").exists())
        secrets = {"SUPERVISORD_USERNAME": "ann", "SUPERVISORD_PASSWORD": "s3cret"}
        result = await builtin("supervisord", *arguments, secrets=secrets)
        for _ in range(50):
            if result.ok:
                break
            result = await builtin("supervisord", *arguments, secrets=secrets)
        assert result.ok, result
        denied = await builtin("supervisord", *arguments)
        assert denied.exit_code == 1
        assert "401" in denied.stderr
    finally:
        server.terminate()
        server.wait(20)
        shutil.rmtree(directory, ignore_errors=True)
