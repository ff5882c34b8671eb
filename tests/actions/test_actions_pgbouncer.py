"""Pools of a real pgbouncer in front of a real PostgreSQL; long statements and deadlocks of that PostgreSQL."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from actions_servers import (
    carry_out,
    checked,
    directory,
    do,
    free_port,
    listens,
    one_step,
    plan_for,
    refused,
    running,
    until,
    with_option,
)  # fmt: skip
from actions_started import Cluster

from actions.model import Plan, Refusal


@dataclass
class Bouncer:
    port: int
    psql: str

    @property
    def entry(self) -> dict[str, str]:
        return {"pgbouncer_dsn": f"postgresql://medic@127.0.0.1:{self.port}/pgbouncer", "pool_max": "50"}

    def ask(self, command: str) -> str:
        argv = [self.psql, "-X", "-q", "-A", "-t", "-d", self.entry["pgbouncer_dsn"], "-c", command]
        return subprocess.run(argv, capture_output=True, text=True, timeout=10, check=True).stdout

    def size(self) -> int:
        row = next(line for line in self.ask("SHOW CONFIG").splitlines() if line.startswith("default_pool_size|"))
        return int(row.split("|")[1])


@pytest.fixture(scope="module")
def bouncer(program: Callable[..., str], cluster: Cluster) -> Iterator[Bouncer]:
    binary = program("pgbouncer")
    as_user = ["setpriv", f"--reuid={cluster.user}", f"--regid={cluster.user}", "--clear-groups"]
    with directory("bouncer", cluster.user) as home:
        made = Bouncer(free_port(), str(cluster.bin / "psql"))
        (home / "users").write_text('"medic" ""\n"app" ""\n')
        (home / "ini").write_text(
            f"[databases]\npostgres = host={cluster.socket_dir}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n"
            f"listen_port = {made.port}\nunix_socket_dir =\nauth_type = trust\nauth_file = {home}/users\n"
            f"admin_users = medic\ndefault_pool_size = 10\npidfile = {home}/pid\n"
        )
        for path in (home / "users", home / "ini"):
            if os.geteuid() == 0:
                shutil.chown(path, cluster.user)
        argv = [*(as_user if os.geteuid() == 0 else []), binary, home / "ini"]
        with running(argv, lambda: listens(made.port), log=home / "log"):
            yield made


async def test_a_pool_is_made_larger_and_set_back(bouncer: Bouncer) -> None:
    made = await plan_for("pgbouncer.resize_pool", bouncer.entry, factor=2)
    assert isinstance(made, Plan), made
    step = made.steps[0]
    assert await checked(step) == 1
    assert await carry_out(made, verdict=False) == "undone"
    assert bouncer.size() == 10
    assert await carry_out(made) == "verified"
    assert bouncer.size() == 20
    assert await checked(step) == 0
    bouncer.ask("SET default_pool_size = 33")  # somebody else decides otherwise
    assert await checked(step) == 94
    assert (await do(step.argv, step)).exit_code == 93
    assert (await do(step.undo, step)).exit_code == 93
    assert bouncer.size() == 33
    full = await refused("pgbouncer.resize_pool", bouncer.entry | {"pool_max": "33"})
    assert full.reason is Refusal.EMPTY_TARGET
    bouncer.ask("SET default_pool_size = 10")


async def test_who_is_no_admin_changes_nothing(bouncer: Bouncer) -> None:
    step = await one_step("pgbouncer.resize_pool", bouncer.entry)
    result = await do(tuple(a.replace("medic@", "app@") for a in step.argv), step)
    assert result.exit_code == 1
    assert bouncer.size() == 10


@pytest.fixture
def sleeper(cluster: Cluster) -> Iterator[Callable[[str, str], subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(sql: str, role: str = "app", name: str = "shop") -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*cluster.command(role, name), "-c", sql], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
    cluster.query(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name IN ('shop', 'pg_dump')"
    )


def runs(cluster: Cluster, role: str, name: str = "shop") -> bool:
    return cluster.query(
        "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND now() - query_start > '1.1 s' "
        f"AND usename = '{role}' AND application_name = '{name}'"
    ) == "1"  # fmt: skip


async def test_a_long_statement_is_cancelled(cluster: Cluster, sleeper: Callable[..., subprocess.Popen[str]]) -> None:
    entry = {"pg_dsn": cluster.dsn()}
    process = sleeper("SELECT pg_sleep(60)")
    until(lambda: runs(cluster, "app"))
    young = await refused("postgres.cancel_long_queries", entry, active_seconds=3600)
    assert young.reason is Refusal.EMPTY_TARGET
    made = await plan_for("postgres.cancel_long_queries", entry, active_seconds=1)
    assert isinstance(made, Plan), made
    step = made.steps[0]
    assert await checked(step) == 1
    other = with_option(step.argv, query_start="2001-02-03T04:05:06.000007Z")
    assert (await do(other, step)).exit_code == 93
    assert await carry_out(made) == "verified"
    assert "canceling statement due to user request" in process.communicate(timeout=20)[0]
    assert await checked(step) == 0
    assert (await do(step.argv, step)).exit_code == 93


@pytest.mark.parametrize(("role", "name"), [("postgres", "shop"), ("app", "pg_dump")])
async def test_superusers_and_dumps_are_not_cancelled(
    cluster: Cluster, sleeper: Callable[..., subprocess.Popen[str]], role: str, name: str
) -> None:
    process = sleeper("SELECT pg_sleep(60)", role, name)
    until(lambda: runs(cluster, role, name))
    answer = await refused("postgres.cancel_long_queries", {"pg_dsn": cluster.dsn()}, active_seconds=1)
    assert answer.reason is Refusal.EMPTY_TARGET
    assert process.poll() is None


async def test_waits_and_deadlocks_are_reported(
    cluster: Cluster, sleeper: Callable[..., subprocess.Popen[str]]
) -> None:
    sleeper("BEGIN; UPDATE things SET n = 5 WHERE id = 1; SELECT pg_sleep(60)")
    until(lambda: cluster.query("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'") == "1")
    sleeper("UPDATE things SET n = 6 WHERE id = 1")
    until(lambda: cluster.query("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'") == "1")
    step = await one_step("postgres.deadlock_report", {"pg_dsn": cluster.dsn()})
    result = await do(step.argv, step)
    assert result.ok, result
    report = json.loads(result.stdout)
    assert report["waits"][0]["user"] == "app"
    assert len(report["waits"][0]["blocked_by"]) == 1
    assert "postgres" in {d["database"] for d in report["databases"]}
    assert "UPDATE" not in result.stdout
