"""Restarting a service through a real s6-supervise."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from actions_servers import carry_out, checked, directory, do, one_step, plan_for, refused, running, until, with_option

from actions.model import Plan, Refusal


@pytest.fixture(scope="module")
def service(program: Callable[..., str]) -> Iterator[Path]:
    supervise = program("s6-supervise", "s6")
    with directory("s6") as home:
        made = home / "worker"
        made.mkdir()
        run = made / "run"
        run.write_text("#!/bin/sh\nexec sleep 600\n")
        run.chmod(0o755)
        with running([supervise, made], lambda: pid(made) > 0, log=home / "log"):
            yield made
            subprocess.run(["s6-svc", "-dx", made], check=True)


def pid(service: Path) -> int:
    done = subprocess.run(["s6-svstat", "-o", "pid", service], capture_output=True, text=True, check=True)
    return int(done.stdout)


async def test_a_restart_replaces_the_process_and_outlives_the_sandbox(service: Path) -> None:
    entry = {"s6_service": str(service)}
    old = pid(service)
    made = await plan_for("service.restart", entry)
    assert isinstance(made, Plan), made
    step = made.steps[0]
    assert step.action == "service.restart.s6"
    assert await checked(step) == 1
    assert await carry_out(made) == "verified"
    new = pid(service)
    assert new not in (old, -1)
    os.kill(new, 0)
    assert await checked(step) == 0
    assert (await do(step.argv, step)).exit_code == 93  # the same plan does not restart twice
    assert pid(service) == new


async def test_a_service_that_crashed_is_started_and_one_that_shall_be_down_stays_down(service: Path) -> None:
    entry = {"s6_service": str(service)}
    step = await one_step("service.restart.s6", entry)
    subprocess.run(["s6-svc", "-wD", "-d", service], check=True)
    answer = await refused("service.restart.s6", entry)
    assert answer.reason is Refusal.PROTECTED_TARGET
    assert (await do(step.argv, step)).exit_code == 93
    assert await checked(step) == 1
    assert pid(service) == -1
    subprocess.run(["s6-svc", "-wu", "-u", service], check=True)
    until(lambda: pid(service) > 0)


async def test_another_identity_and_an_absent_service(service: Path, tmp_path: Path) -> None:
    step = await one_step("service.restart.s6", {"s6_service": str(service)})
    before = pid(service)
    assert (await do(with_option(step.argv, process="1:2"), step)).exit_code == 93
    assert pid(service) == before
    gone = await refused("service.restart.s6", {"s6_service": str(tmp_path)})
    assert gone.reason is Refusal.RESOLVE_FAILED
    assert (await do(with_option(step.check, service=tmp_path), step)).exit_code == 94
