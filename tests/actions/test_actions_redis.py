"""Clients, limits and keys of a real Redis with a password."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from actions_servers import carry_out, checked, directory, do, one_step, plan_for, refused, running, until, with_option
from actions_world import builtin

from actions.model import Refusal

SECRETS = {"REDISCLI_AUTH": "s3cret"}


@dataclass
class Redis:
    socket: Path
    cli: str

    @property
    def entry(self) -> dict[str, str]:
        return {"redis_url": f"unix://{self.socket}", "redis_maxclients_max": "400", "redis_cache_prefix": "cache:"}

    def ask(self, *words: str) -> str:
        argv = [self.cli, "-s", str(self.socket), "-a", "s3cret", "--no-auth-warning", "-e", *words]
        return subprocess.run(argv, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    def client(self, *commands: str) -> socket.socket:
        """A connection that has sent these commands and read their answers."""
        s = socket.socket(socket.AF_UNIX)
        s.settimeout(10)
        s.connect(str(self.socket))
        for command in ("AUTH s3cret", *commands):
            s.sendall(command.encode() + b"\r\n")
            s.recv(4096)
        return s


@pytest.fixture(scope="module")
def redis(program: Callable[..., str]) -> Iterator[Redis]:
    server, cli = program("redis-server"), program("redis-cli", "redis-tools")
    with directory("redis") as home:
        made = Redis(home / "s", cli)
        argv = [server, "--port", "0", "--unixsocket", made.socket, "--dir", home, "--save", "",
                "--requirepass", "s3cret",
                "--maxclients", "100"]  # fmt: skip
        with running(argv, lambda: made.ask("PING") == "PONG", log=home / "log"):
            yield made


def idle_for(redis: Redis, seconds: int) -> None:
    """Waits until some plain client has been idle for so long."""
    until(lambda: any(f"idle={seconds}" in line for line in redis.ask("CLIENT", "LIST").splitlines()))


async def test_idle_clients_are_closed_and_nobody_else(redis: Redis) -> None:
    idle = [redis.client("CLIENT SETNAME app") for _ in range(3)]
    others = [redis.client("SUBSCRIBE news"), redis.client("MULTI"), redis.client("CLIENT SETNAME sentinel-1")]
    blocked = redis.client()
    blocked.sendall(b"BLPOP nothing 60\r\n")
    try:
        idle_for(redis, 1)
        step = await one_step("redis.kill_clients", redis.entry, SECRETS, idle_seconds=1)
        assert await checked(step, SECRETS) == 1
        assert "s3cret" not in repr(step)
        result = await do(step.argv, step, SECRETS)
        assert result.ok, result
        assert json.loads(result.stdout)["closed"] == 3
        assert [s.recv(10) for s in idle] == [b"", b"", b""]
        assert redis.ask("CLIENT", "LIST").count("\n") >= len(others) + 1  # they, the blocked one, and ourselves
        assert await checked(step, SECRETS) == 0
        assert (await do(step.argv, step, SECRETS)).exit_code == 93  # once more: they are gone
    finally:
        for s in (*idle, *others, blocked):
            s.close()


async def test_a_client_that_works_again_and_another_server_are_left_alone(redis: Redis) -> None:
    with redis.client() as one:
        idle_for(redis, 1)
        step = await one_step("redis.kill_clients", redis.entry, SECRETS, idle_seconds=1)
        assert (await do(with_option(step.argv, server="0" * 40), step, SECRETS)).exit_code == 93
        one.sendall(b"PING\r\n")
        assert one.recv(10) == b"+PONG\r\n"
        assert (await do(step.argv, step, SECRETS)).exit_code == 93
        one.sendall(b"PING\r\n")
        assert one.recv(10) == b"+PONG\r\n"


async def test_without_idle_clients_there_is_nothing_to_do(redis: Redis) -> None:
    assert (await refused("redis.kill_clients", redis.entry, SECRETS)).reason is Refusal.EMPTY_TARGET


async def test_a_wrong_password_plans_nothing(redis: Redis) -> None:
    answer = await refused("redis.kill_clients", redis.entry, {"REDISCLI_AUTH": "guess"})
    assert answer.reason is Refusal.RESOLVE_FAILED
    assert "guess" not in answer.detail


async def test_maxclients_is_raised_and_set_back(redis: Redis) -> None:
    made = await plan_for("redis.raise_maxclients", redis.entry, SECRETS)
    assert await carry_out(made, verdict=False, secrets=SECRETS) == "undone"
    assert redis.ask("CONFIG", "GET", "maxclients").split() == ["maxclients", "100"]
    step = made.steps[0]
    assert await checked(step, SECRETS) == 1
    assert await carry_out(made, secrets=SECRETS) == "verified"
    assert redis.ask("CONFIG", "GET", "maxclients").split()[1] == "200"
    assert await checked(step, SECRETS) == 0
    redis.ask("CONFIG", "SET", "maxclients", "150")  # somebody else decides otherwise
    assert await checked(step, SECRETS) == 94
    assert (await do(step.undo, step, SECRETS)).exit_code == 93
    assert (await do(step.argv, step, SECRETS)).exit_code == 93
    assert redis.ask("CONFIG", "GET", "maxclients").split()[1] == "150"
    redis.ask("CONFIG", "SET", "maxclients", "100")


async def test_the_keys_of_the_prefix_go_and_all_others_stay(redis: Redis) -> None:
    redis.ask("EVAL", "for i = 1, 1200 do redis.call('SET', 'cache:' .. i, i) end", "0")
    for name in ("cach", "cached", "CACHE:1", "x:cache:1"):
        redis.ask("SET", name, "keep")
    made = await plan_for("redis.clear_prefix", redis.entry, SECRETS)
    assert made.autonomy == "approve"  # never by itself
    step = made.steps[0]
    assert await checked(step, SECRETS) == 1
    assert await carry_out(made, secrets=SECRETS) == "verified"
    assert await checked(step, SECRETS) == 0
    assert redis.ask("DBSIZE") == "4"
    assert (await refused("redis.clear_prefix", redis.entry, SECRETS)).reason is Refusal.EMPTY_TARGET
    assert (await do(with_option(step.argv, server="0" * 40), step, SECRETS)).exit_code == 93


@pytest.mark.parametrize("prefix", ["cac*", "[c]ache:", "?ache:", "\\cache:", "'] or true --"])
async def test_a_prefix_is_no_pattern(redis: Redis, prefix: str) -> None:
    """Given directly, past the parameters that would refuse it."""
    redis.ask("SET", "cache:1", "keep")
    server = next(line for line in redis.ask("INFO", "server").splitlines() if line.startswith("run_id")).split(":")[1]
    url = redis.entry["redis_url"]
    result = await builtin("redis", "run", "--mode=prefix", f"--url={url}", f"--prefix={prefix}", f"--server={server}",
                           secrets=SECRETS)  # fmt: skip
    assert json.loads(result.stdout) == {"removed": 0}
    assert redis.ask("GET", "cache:1") == "keep"


async def test_a_server_that_is_gone_cannot_be_checked(tmp_path: Path) -> None:
    url = f"--url=unix://{tmp_path}/none"
    assert (await builtin("redis", "check", "--mode=prefix", url, "--prefix=cache:")).exit_code == 94
    assert (await builtin("redis", "run", "--mode=prefix", url, "--prefix=cache:")).exit_code == 1
