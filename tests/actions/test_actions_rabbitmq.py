"""Dead letters of a real RabbitMQ."""

from __future__ import annotations

import os
import re
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pika
import pytest
from actions_servers import (
    carry_out,
    checked,
    directory,
    do,
    free_port,
    listens,
    plan_for,
    refused,
    running,
    with_option,
)
from actions_started import wait_until

from actions.model import Plan, Refusal
from agent.packs import load_packs

RABBITMQ = next(pack for pack in load_packs().packs if pack.pack == "rabbitmq")
SECRETS = {"RABBITMQ_PASSWORD": "guest"}


@dataclass
class Rabbit:
    port: int
    channel: Any
    metrics: str = ""  # where its own exporter answers

    @property
    def entry(self) -> dict[str, str]:
        return {"rabbitmq_url": f"amqp://guest@127.0.0.1:{self.port}", "dead_letter_queue": "dead"}

    def depth(self, queue: str) -> int:
        return int(self.channel.queue_declare(queue, passive=True).method.message_count)

    def die(self, *bodies: bytes, queue: str = "orders") -> None:
        """Sends messages to a queue and rejects each, so that the broker moves them to `dead`."""
        for body in bodies:
            self.channel.basic_publish("", queue, body, pika.BasicProperties(message_id=body.decode(), delivery_mode=2))
            method, _, _ = self.channel.basic_get(queue)
            self.channel.basic_nack(method.delivery_tag, requeue=False)
        while self.depth("dead") < len(bodies):
            self.channel.connection.process_data_events(0.02)

    def drain(self, queue: str) -> list[bytes]:
        found = []
        while (got := self.channel.basic_get(queue, auto_ack=True))[0] is not None:
            found.append(got[2])
        return found


@pytest.fixture(scope="module")
def broker(program: Callable[..., str]) -> Iterator[Rabbit]:
    program("rabbitmq-server")
    server = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")  # the one on PATH changes the user
    with directory("rabbit") as home:
        port, dist, epmd, exporter = free_port(), free_port(), free_port(), free_port()
        (home / "conf").write_text(
            f"listeners.tcp.1 = 127.0.0.1:{port}\ndisk_free_limit.absolute = 1MB\ncollect_statistics_interval = 200\n"
            f"prometheus.tcp.ip = 127.0.0.1\nprometheus.tcp.port = {exporter}\n"
        )
        env = {
            "HOME": str(home), "RABBITMQ_NODENAME": f"am{os.getpid()}@localhost",
            "RABBITMQ_MNESIA_BASE": f"{home}/db",
            "RABBITMQ_LOG_BASE": f"{home}/log", "RABBITMQ_CONFIG_FILE": f"{home}/conf",
            "RABBITMQ_PID_FILE": f"{home}/pid",
            "RABBITMQ_DIST_PORT": str(dist), "ERL_EPMD_PORT": str(epmd),
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{home}/plugins",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 1:1 +sbwt none",
        }  # fmt: skip
        (home / "plugins").write_text("[rabbitmq_prometheus].\n")
        try:
            with running([server], lambda: listens(port), env=env, log=home / "out", seconds=90):
                connection = pika.BlockingConnection(pika.ConnectionParameters("127.0.0.1", port))
                channel = connection.channel()
                channel.queue_declare("dead", durable=True)
                dying = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": "dead"}
                for queue in ("orders", "gone"):
                    channel.queue_declare(queue, durable=True, arguments=dying)
                yield Rabbit(port, channel, f"http://127.0.0.1:{exporter}/metrics/per-object")
                connection.close()
        finally:
            subprocess.run(["epmd", "-port", str(epmd), "-kill"], capture_output=True, check=False)


@pytest.fixture
def rabbit(broker: Rabbit) -> Rabbit:
    for queue in ("orders", "dead"):
        broker.channel.queue_purge(queue)
    return broker


async def test_dead_letters_go_back_to_their_queue_in_a_bounded_batch(rabbit: Rabbit) -> None:
    rabbit.die(b"one", b"two", b"three")
    made = await plan_for("rabbitmq.replay_dead_letters", rabbit.entry, SECRETS, batch=2)
    assert isinstance(made, Plan), made
    assert made.autonomy == "approve"
    step = made.steps[0]
    assert await checked(step, SECRETS) == 1
    assert await carry_out(made, secrets=SECRETS) == "verified"
    assert rabbit.depth("dead") == 1
    assert await checked(step, SECRETS) == 94  # some are gone: nobody can tell by whom
    method, properties, body = rabbit.channel.basic_get("orders")
    assert (body, properties.message_id, properties.delivery_mode) == (b"one", "one", 2)
    assert properties.headers["x-alertmedic-replays"] == 1
    rabbit.channel.basic_ack(method.delivery_tag)
    assert (await do(step.argv, step, SECRETS)).ok
    assert await checked(step, SECRETS) == 0
    assert rabbit.drain("orders") == [b"two", b"three"]
    assert (await refused("rabbitmq.replay_dead_letters", rabbit.entry, SECRETS)).reason is Refusal.EMPTY_TARGET
    assert (await do(step.argv, step, SECRETS)).exit_code == 93


async def test_what_died_again_and_what_has_no_origin_stays(rabbit: Rabbit) -> None:
    rabbit.die(b"poison")
    made = await plan_for("rabbitmq.replay_dead_letters", rabbit.entry, SECRETS)
    assert await carry_out(made, secrets=SECRETS) == "verified"
    method, _, _ = rabbit.channel.basic_get("orders")
    rabbit.channel.basic_nack(method.delivery_tag, requeue=False)  # it dies once more
    rabbit.channel.basic_publish("", "dead", b"by hand")
    while rabbit.depth("dead") < 2:
        rabbit.channel.connection.process_data_events(0.02)
    step = made.steps[0]
    assert (await do(step.argv, step, SECRETS)).exit_code == 93
    assert sorted(rabbit.drain("dead")) == [b"by hand", b"poison"]
    assert rabbit.depth("orders") == 0


async def test_a_message_whose_queue_is_gone_is_not_lost(rabbit: Rabbit) -> None:
    rabbit.die(b"homeless", queue="gone")
    rabbit.channel.queue_delete("gone")
    made = await plan_for("rabbitmq.replay_dead_letters", rabbit.entry, SECRETS)
    assert isinstance(made, Plan)
    assert (await do(made.steps[0].argv, made.steps[0], SECRETS)).exit_code == 93
    assert rabbit.drain("dead") == [b"homeless"]


async def test_a_wrong_password_or_queue_plans_nothing(rabbit: Rabbit) -> None:
    rabbit.die(b"one")
    answer = await refused("rabbitmq.replay_dead_letters", rabbit.entry, {"RABBITMQ_PASSWORD": "guess"})
    assert answer.reason is Refusal.RESOLVE_FAILED
    other = rabbit.entry | {"dead_letter_queue": "absent"}
    assert (await refused("rabbitmq.replay_dead_letters", other, SECRETS)).reason is Refusal.RESOLVE_FAILED
    made = await plan_for("rabbitmq.replay_dead_letters", rabbit.entry, SECRETS)
    gone = with_option(made.steps[0].check, url=f"amqp://guest@127.0.0.1:{free_port()}")
    assert (await do(gone, made.steps[0], SECRETS)).exit_code == 94


def test_what_the_packs_read_is_what_its_own_exporter_says(rabbit: Rabbit) -> None:
    """Each signal has a name that the broker exports, once there is a queue with something of everything; but for
    peers that cannot be reached, which only newer versions tell."""
    rabbit.channel.basic_publish("", "orders", b"again")
    method, _, _ = rabbit.channel.basic_get("orders")
    rabbit.channel.basic_nack(method.delivery_tag, requeue=True)
    rabbit.channel.basic_get("orders")
    queries = {n: q for n, q in RABBITMQ.queries.items() if "rabbitmq_" in q.replace("rabbitmq.*", "")}
    del queries["rabbitmq_unreachable_peers"]
    unknown = dict(queries)

    def all_known() -> bool:
        rabbit.channel.connection.process_data_events(0)
        with urllib.request.urlopen(rabbit.metrics, timeout=10) as answer:
            names = set(re.findall(r"(?m)^(rabbitmq_[a-z_]+)", answer.read().decode()))
        for name in list(unknown):
            if names & set(re.findall(r"rabbitmq_[a-z_]+(?={)", queries[name])):
                del unknown[name]
        return not unknown and any(mark in names for mark in RABBITMQ.alerts["rabbitmq"].reached_by)

    wait_until(all_known)
    assert len(queries) >= 8
