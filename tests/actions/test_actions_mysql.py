"""Sessions and statements of a real MariaDB."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from actions_servers import carry_out, checked, directory, do, one_step, plan_for, refused, running, until, with_option
from actions_world import builtin

from actions.model import Plan, Refusal

SECRETS = {"MYSQL_PWD": "s3cret"}


@dataclass
class Maria:
    socket: Path
    client: str
    open: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def entry(self) -> dict[str, str]:
        return {"mysql_url": f"mysql://medic@/?socket={self.socket}"}

    def argv(self, user: str) -> list[str]:
        return [self.client, "--no-defaults", "-N", "-B", f"--socket={self.socket}", f"--user={user}", "shop"]

    def query(self, sql: str, user: str = "root") -> str:
        argv = self.argv(user)
        return subprocess.run(argv, input=sql, capture_output=True, text=True, timeout=20, check=True).stdout.strip()

    def session(self, sql: str, user: str = "app") -> subprocess.Popen[str]:
        """A client that has sent these statements and keeps its session."""
        process = subprocess.Popen(
            [*self.argv(user), "--unbuffered", "--force"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.open.append(process)
        assert process.stdin is not None
        process.stdin.write(sql + ";\n")
        process.stdin.flush()
        return process

    def close(self) -> None:
        numbers = self.query(
            "SELECT ID FROM information_schema.PROCESSLIST WHERE ID <> CONNECTION_ID() AND DB = 'shop'"
        )
        for number in numbers.split():
            subprocess.run([*self.argv("root"), "-e", f"KILL {number}"], capture_output=True, check=False)
        for process in self.open:
            process.kill()
            process.communicate()
        self.open.clear()
        until(lambda: self.count("ID <> CONNECTION_ID() AND DB = 'shop'") == 0)

    def count(self, where: str, table: str = "PROCESSLIST") -> int:
        return int(self.query(f"SELECT COUNT(*) FROM information_schema.{table} WHERE {where}"))


@pytest.fixture(scope="module")
def mariadb(program: Callable[..., str]) -> Iterator[Maria]:
    server = program("mariadbd", "mariadb-server-core")
    client = program("mariadb", "mariadb-client-core")
    install = program("mariadb-install-db", "mariadb-server-core")
    with directory("maria") as home:
        made = Maria(home / "s", client)
        common = [f"--datadir={home}/data", "--user=root", "--innodb-buffer-pool-size=16M", "--innodb-log-file-size=8M"]
        subprocess.run(
            [install, "--no-defaults", *common, "--auth-root-authentication-method=normal", "--skip-test-db"],
            check=True, capture_output=True, timeout=120,
        )  # fmt: skip
        argv = [server, "--no-defaults", *common, f"--socket={made.socket}", "--skip-networking",
                "--innodb-flush-log-at-trx-commit=0", "--innodb-lock-wait-timeout=50"]  # fmt: skip
        ping = [client, "--no-defaults", f"--socket={made.socket}", "-uroot", "-e", "SELECT 1"]
        ready = lambda: subprocess.run(ping, capture_output=True, check=False).returncode == 0  # noqa: E731
        with running(argv, ready, log=home / "log", seconds=60):
            subprocess.run([*ping[:-1], "CREATE DATABASE shop"], check=True)
            made.query(
                "CREATE TABLE things (id INT PRIMARY KEY, n INT) ENGINE=InnoDB; INSERT INTO things VALUES (1,0),(2,0);"
                "CREATE USER app@localhost; GRANT ALL ON shop.* TO app@localhost;"
                "CREATE USER medic@localhost IDENTIFIED BY 's3cret';"
                "GRANT PROCESS, CONNECTION ADMIN ON *.* TO medic@localhost; GRANT SELECT ON shop.* TO medic@localhost"
            )
            yield made


@pytest.fixture
def maria(mariadb: Maria) -> Iterator[Maria]:
    yield mariadb
    mariadb.close()


def transactions(maria: Maria, where: str, number: int) -> None:
    """Waits for so many transactions. InnoDB renews what it shows of them only when nobody has looked for 0.1 s."""
    until(lambda: (time.sleep(0.12), maria.count(where, "INNODB_TRX"))[1] == number)


def lock(maria: Maria, user: str = "app") -> None:
    maria.session("BEGIN; UPDATE things SET n = n + 1 WHERE id = 1", user)
    transactions(maria, "trx_rows_modified > 0", 1)
    time.sleep(0.12)


def wait(maria: Maria) -> subprocess.Popen[str]:
    waiting = maria.session("UPDATE things SET n = n + 1 WHERE id = 1; SELECT 'through'")
    transactions(maria, "trx_state = 'LOCK WAIT'", 1)
    time.sleep(0.12)
    return waiting


async def test_the_session_that_others_wait_for_is_ended(maria: Maria) -> None:
    lock(maria)
    waiting = wait(maria)
    made = await plan_for("mysql.kill_blockers", maria.entry, SECRETS, idle_seconds=0)
    assert isinstance(made, Plan), made
    step = made.steps[0]
    assert "s3cret" not in repr(made)
    assert await checked(step, SECRETS) == 1
    assert await carry_out(made, secrets=SECRETS) == "verified"
    assert waiting.stdout is not None
    assert waiting.stdout.readline() == "through\n"
    assert await checked(step, SECRETS) == 0
    assert (await do(step.argv, step, SECRETS)).exit_code == 93


@pytest.mark.parametrize("changed", [{"key": "2001-02-03 04:05:06"}, {"id": 999999}], ids=["transaction", "session"])
async def test_another_transaction_or_session_is_refused(maria: Maria, changed: dict[str, Any]) -> None:
    lock(maria)
    wait(maria)
    step = await one_step("mysql.kill_blockers", maria.entry, SECRETS, idle_seconds=0)
    result = await do(with_option(step.argv, **changed), step, SECRETS)
    assert result.exit_code == 93, result
    transactions(maria, "trx_state = 'RUNNING'", 1)


async def test_root_is_never_touched(maria: Maria) -> None:
    lock(maria, "root")
    wait(maria)
    answer = await refused("mysql.kill_blockers", maria.entry, SECRETS, idle_seconds=0)
    assert answer.reason is Refusal.EMPTY_TARGET
    number = maria.query("SELECT trx_mysql_thread_id FROM information_schema.INNODB_TRX WHERE trx_state = 'RUNNING'")
    began = maria.query("SELECT trx_started FROM information_schema.INNODB_TRX WHERE trx_state = 'RUNNING'")
    url = maria.entry["mysql_url"]
    for mode in ("blockers", "idle"):
        options = (f"--mode={mode}", f"--url={url}", "--idle-seconds=0", f"--id={number}", f"--key={began[:19]}")
        assert (await builtin("mysql", "run", *options, secrets=SECRETS)).exit_code == 93
    transactions(maria, "trx_state = 'RUNNING'", 1)


async def test_idle_in_transaction_is_ended_by_age_and_only_while_idle(maria: Maria) -> None:
    lock(maria)
    young = await refused("mysql.kill_idle_in_transaction", maria.entry, SECRETS, idle_seconds=3600)
    assert young.reason is Refusal.EMPTY_TARGET
    step = await one_step("mysql.kill_idle_in_transaction", maria.entry, SECRETS, idle_seconds=0)
    holder = maria.open[0]
    assert holder.stdin is not None
    holder.stdin.write("COMMIT; BEGIN; UPDATE things SET n = 1 WHERE id = 2; SELECT SLEEP(30);\n")
    holder.stdin.flush()
    until(lambda: maria.count("INFO LIKE 'SELECT SLEEP%' AND USER = 'app'") == 1)
    assert (await do(step.argv, step, SECRETS)).exit_code == 93
    assert maria.count("INFO LIKE 'SELECT SLEEP%' AND USER = 'app'") == 1
    maria.close()
    lock(maria)
    step = await one_step("mysql.kill_idle_in_transaction", maria.entry, SECRETS, idle_seconds=0)
    assert (await do(step.argv, step, SECRETS)).ok
    transactions(maria, "1 = 1", 0)


async def test_a_long_query_is_ended_and_its_session_stays(maria: Maria) -> None:
    maria.session("SELECT SLEEP(60)")
    until(lambda: maria.count("INFO LIKE 'SELECT SLEEP%' AND USER = 'app' AND TIME_MS > 1000") == 1)
    step = await one_step("mysql.kill_long_queries", maria.entry, SECRETS, active_seconds=1)
    assert await checked(step, SECRETS) == 1
    assert (await do(with_option(step.argv, key="999999999"), step, SECRETS)).exit_code == 93
    assert (await do(step.argv, step, SECRETS)).ok
    assert await checked(step, SECRETS) == 0
    assert maria.count(f"ID = {step.params['id']} AND COMMAND = 'Sleep'") == 1


def deadlock(maria: Maria) -> bool:
    """Two sessions that wait for each other; whether InnoDB has seen it. It may miss one when it is very busy: then
    both time out."""
    ends = [
        maria.session(
            f"SET innodb_lock_wait_timeout = 2; BEGIN; UPDATE things SET n = 1 WHERE id = {i}; SELECT 'locked'"
        )
        for i in (1, 2)
    ]
    for end, other in zip(ends, (2, 1), strict=True):
        assert end.stdin is not None
        assert end.stdout is not None
        assert end.stdout.readline() == "locked\n"
        end.stdin.write(f"UPDATE things SET n = 2 WHERE id = {other}; SELECT 'over';\n")
        end.stdin.flush()
    for end in ends:
        assert end.stdout is not None
        assert end.stdout.readline() == "over\n"
    seen = "DEADLOCK" in maria.query("SHOW ENGINE INNODB STATUS")
    maria.close()
    return seen


async def test_a_deadlock_is_reported(maria: Maria) -> None:
    assert any(deadlock(maria) for _ in range(10))
    step = await one_step("mysql.deadlock_report", maria.entry, SECRETS)
    result = await do(step.argv, step, SECRETS)
    assert result.ok, result
    report = json.loads(result.stdout)
    assert any("UPDATE things" in line for line in report["latest_deadlock"])
    assert report["deadlocks"] >= 1


async def test_a_server_that_is_gone_or_a_wrong_password(maria: Maria, tmp_path: Path) -> None:
    gone = {"mysql_url": f"mysql://medic@/?socket={tmp_path}/none"}
    assert (await refused("mysql.kill_blockers", gone, SECRETS)).reason is Refusal.RESOLVE_FAILED
    answer = await refused("mysql.kill_blockers", maria.entry, {"MYSQL_PWD": "guess"})
    assert answer.reason is Refusal.RESOLVE_FAILED
    assert "Access denied" in answer.detail
    url = f"--url={gone['mysql_url']}"
    check = await builtin("mysql", "check", "--mode=idle", url, "--id=1", "--key=2026-01-02 03:04:05")
    assert check.exit_code == 94


@pytest.mark.parametrize("key", ["' OR 1=1 --", "2026-01-02 03:04:05'; KILL 1; --", "", "x\n//\nKILL 1"])
async def test_hostile_keys_reach_no_statement(maria: Maria, key: str) -> None:
    for mode in ("idle", "long"):
        options = (f"--mode={mode}", f"--url={maria.entry['mysql_url']}", "--id=1", f"--key={key}")
        result = await builtin("mysql", "run", *options, secrets=SECRETS)
        assert result.exit_code == 1
        assert "ended with" not in result.stderr  # refused by us, not by the server
