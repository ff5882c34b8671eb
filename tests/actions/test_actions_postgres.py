"""Ending sessions of a real PostgreSQL."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from actions_started import Cluster, wait_until
from actions_world import Proposal, builtin, context, in_sandbox, policy

from actions import guard
from actions.catalog import load_catalog
from actions.model import Declined, Plan, Refusal, Step


@dataclass
class Session:
    """A psql that keeps its session open and takes statements one by one."""

    process: subprocess.Popen[str]
    name: str

    def say(self, sql: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(sql + ";\n")
        self.process.stdin.flush()


@pytest.fixture
def session(cluster: Cluster) -> Iterator[Callable[..., Session]]:
    opened: list[Session] = []

    def start(sql: str, *, role: str = "app", name: str = "") -> Session:
        name = name or f"session{len(opened)}"
        process = subprocess.Popen(
            cluster.command(role, name),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        made = Session(process, name)
        opened.append(made)
        made.say(sql)
        return made

    yield start
    for one in opened:
        one.process.kill()
        one.process.wait(10)
        if one.process.stdin is not None:
            one.process.stdin.close()
    wait_until(
        lambda: cluster.query("SELECT count(*) FROM pg_stat_activity WHERE application_name ~ '^session'") == "0"
    )


def state(cluster: Cluster, name: str) -> str:
    what = "state || ' ' || coalesce(wait_event_type, '')"
    return cluster.query(f"SELECT {what} FROM pg_stat_activity WHERE application_name = '{name}'")


def open_transaction(cluster: Cluster, session: Callable[..., Session], row: int = 1, **more: Any) -> Session:
    made = session(f"BEGIN; UPDATE things SET n = n + 1 WHERE id = {row}", **more)
    wait_until(lambda: state(cluster, made.name).startswith("idle in transaction"))
    return made


def waiter(cluster: Cluster, session: Callable[..., Session], row: int = 1, before: str = "") -> Session:
    made = session(f"{before}UPDATE things SET n = n + 1 WHERE id = {row}")
    wait_until(lambda: state(cluster, made.name) == "active Lock")
    return made


async def plan_for(cluster: Cluster, action: str, **params: Any) -> Plan | Declined:
    world = context(
        inventory={"postgres": {"pg_dsn": cluster.dsn()}}, targets=(), values={}, policy=policy(max_targets=5)
    )
    proposal = Proposal(action=action, service="postgres", params={"idle_seconds": 0, **params})
    return await guard.consider(proposal, load_catalog(), world, in_sandbox)


async def one_step(cluster: Cluster, action: str = "postgres.terminate_blockers", **params: Any) -> Step:
    made = await plan_for(cluster, action, **params)
    assert isinstance(made, Plan), made
    assert len(made.steps) == 1, made.notes
    return made.steps[0]


async def test_the_session_that_holds_the_lock_is_ended_and_the_waiters_go_on(cluster: Cluster, session: Any) -> None:
    holder = open_transaction(cluster, session)
    waiting = [waiter(cluster, session), waiter(cluster, session)]
    made = await plan_for(cluster, "postgres.terminate_blockers")
    assert isinstance(made, Plan), made
    (step,) = made.steps
    assert "idle in transaction" in made.notes[0]
    assert "2 wait for it" in made.notes[0]
    assert (await in_sandbox(step.check, step.limits)).exit_code == 1
    result = await in_sandbox(step.argv, step.limits)
    assert result.ok, result
    assert json.loads(result.stdout)["ended"] is True
    assert state(cluster, holder.name) == ""
    assert (await in_sandbox(step.check, step.limits)).exit_code == 0
    for one in waiting:
        wait_until(lambda one=one: state(cluster, one.name) == "idle Client")  # type: ignore[misc]
    # Once more: the session is gone, so nothing is done.
    assert (await in_sandbox(step.argv, step.limits)).exit_code == 93


async def test_of_a_chain_only_the_head_is_ended(cluster: Cluster, session: Any) -> None:
    head = open_transaction(cluster, session, row=1)
    middle = waiter(cluster, session, row=1, before="BEGIN; UPDATE things SET n = 0 WHERE id = 2; ")
    tail = waiter(cluster, session, row=2)
    step = await one_step(cluster)
    assert step.params["pid"] == int(
        cluster.query(f"SELECT pid FROM pg_stat_activity WHERE application_name = '{head.name}'")
    )
    assert (await in_sandbox(step.argv, step.limits)).ok
    wait_until(lambda: state(cluster, middle.name).startswith("idle in transaction"))
    assert state(cluster, tail.name) == "active Lock"


@pytest.mark.parametrize(
    "changed", [{"--backend-start": "2001-02-03T04:05:06.000007Z"}, {"--pid": "999999"}], ids=["reused pid", "gone pid"]
)
async def test_another_identity_is_refused(cluster: Cluster, session: Any, changed: dict[str, str]) -> None:
    holder = open_transaction(cluster, session)
    waiter(cluster, session)
    step = await one_step(cluster)
    argv = tuple(f"{k}={changed[k]}" if (k := a.partition("=")[0]) in changed else a for a in step.argv)
    assert argv != step.argv
    result = await in_sandbox(argv, step.limits)
    assert result.exit_code == 93
    assert state(cluster, holder.name).startswith("idle in transaction")


async def test_a_session_that_blocks_nobody_any_more_is_left_alone(cluster: Cluster, session: Any) -> None:
    holder = open_transaction(cluster, session)
    waiter(cluster, session)
    step = await one_step(cluster)
    holder.say("COMMIT; BEGIN; SELECT 1")
    wait_until(lambda: cluster.query("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'") == "0")
    result = await in_sandbox(step.argv, step.limits)
    assert result.exit_code == 93
    assert state(cluster, holder.name) != ""


@pytest.mark.parametrize(
    ("role", "name"),
    [("postgres", "session-super"), ("app", "pg_dump"), ("app", "alertmedic"), ("app", "pgBackRest [backup]")],
)
async def test_superusers_backups_and_ourselves_are_never_touched(
    cluster: Cluster, session: Any, role: str, name: str
) -> None:
    holder = open_transaction(cluster, session, role=role, name=name)
    waiter(cluster, session)
    for action in ("postgres.terminate_blockers", "postgres.terminate_idle_in_transaction"):
        answer = await plan_for(cluster, action)
        assert isinstance(answer, Declined), answer
        assert answer.reason is Refusal.EMPTY_TARGET
    # Not even when a plan names it: the statement that ends looks again.
    row = cluster.query(
        "SELECT pid, to_char(backend_start AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"') "
        f"FROM pg_stat_activity WHERE application_name = '{name}' AND pid <> pg_backend_pid()"
    )
    pid, started = row.split("|")
    for mode in ("blockers", "idle"):
        arguments = (f"--mode={mode}", f"--dsn={cluster.dsn()}", f"--pid={pid}", f"--backend-start={started}")
        assert (await builtin("postgres", "run", *arguments)).exit_code == 93
    holder.process.kill()
    wait_until(lambda: cluster.query(f"SELECT count(*) FROM pg_stat_activity WHERE pid = {pid}") == "0")


async def test_replication_is_never_touched(cluster: Cluster) -> None:
    cluster.query("CREATE ROLE replica LOGIN REPLICATION")
    dsn = f"postgresql://replica@/postgres?host={cluster.socket_dir}&replication=database&application_name=session-r"
    stream = subprocess.Popen(
        [str(cluster.bin / "psql"), "-X", "-q", "-d", dsn], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    try:
        assert stream.stdin is not None
        stream.stdin.write("BEGIN;\n")
        stream.stdin.flush()
        wait_until(lambda: cluster.query("SELECT count(*) FROM pg_stat_activity WHERE usename = 'replica'") == "1")
        wait_until(lambda: state(cluster, "session-r").startswith("idle in transaction"))
        answer = await plan_for(cluster, "postgres.terminate_idle_in_transaction")
        assert isinstance(answer, Declined)
        assert answer.reason is Refusal.EMPTY_TARGET
    finally:
        stream.kill()
        stream.wait(10)
        assert stream.stdin is not None
        stream.stdin.close()


async def test_idle_in_transaction_is_ended_by_age(cluster: Cluster, session: Any) -> None:
    idle = open_transaction(cluster, session)
    young = await plan_for(cluster, "postgres.terminate_idle_in_transaction", idle_seconds=3600)
    assert isinstance(young, Declined)
    step = await one_step(cluster, "postgres.terminate_idle_in_transaction")
    assert (await in_sandbox(step.argv, step.limits)).ok
    assert state(cluster, idle.name) == ""


async def test_a_session_that_works_again_is_not_idle(cluster: Cluster, session: Any) -> None:
    idle = open_transaction(cluster, session)
    step = await one_step(cluster, "postgres.terminate_idle_in_transaction")
    idle.say("COMMIT")
    wait_until(lambda: state(cluster, idle.name) == "idle Client")
    assert (await in_sandbox(step.argv, step.limits)).exit_code == 93
    assert state(cluster, idle.name) == "idle Client"


async def test_a_role_without_the_right_fails_and_says_so(cluster: Cluster, session: Any) -> None:
    cluster.query("CREATE ROLE poor LOGIN; GRANT pg_monitor TO poor")
    holder = open_transaction(cluster, session)
    waiter(cluster, session)
    step = await one_step(cluster)
    argv = tuple(a.replace("medic@", "poor@") for a in step.argv)
    result = await in_sandbox(argv, step.limits)
    assert result.exit_code == 1
    assert "permission denied" in result.stderr or "must be" in result.stderr
    assert state(cluster, holder.name).startswith("idle in transaction")


async def test_hostile_values_are_literals(cluster: Cluster) -> None:
    """The Python side would refuse these; psql gets them directly to show that its quoting holds too."""
    for value in ("'; DROP TABLE things; --", "\\! touch /tmp/owned", "x' OR 't'='t", ":'pid'", "$$"):
        result = await builtin(
            "postgres", "run", f"--dsn={cluster.dsn('postgres')}", "--pid=1", f"--backend-start={value}"
        )
        assert result.exit_code == 1
        assert "invalid input syntax" in result.stderr, result.stderr
    assert cluster.query("SELECT count(*) FROM things") == "2"


async def test_a_server_that_is_gone_plans_nothing_and_cannot_be_checked(tmp_path: Any) -> None:
    dsn = f"postgresql://medic@/postgres?host={tmp_path}"
    gone = await builtin("postgres", "resolve", f"--dsn={dsn}")
    assert gone.exit_code == 1
    assert "No such file" in gone.stderr
    check = await builtin("postgres", "check", f"--dsn={dsn}", "--pid=1", "--backend-start=2026-01-01T00:00:00Z")
    assert check.exit_code == 94
