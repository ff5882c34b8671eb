"""Puts dead letters back into the queue that they came from. Action `rabbitmq.replay_dead_letters`.

Runs as `python -I -m actions.builtin.rabbitmq resolve|run|check`. Over AMQP with pika: the management API can only take
a message out or leave it, and one taken out is lost if we die then. Here a message is published first, to its queue by
name and as mandatory, and only when the broker has confirmed it, the dead letter is acknowledged. So none is lost; one
may be there twice if we die between the two. A batch is bounded. A message that was replayed as often as allowed
(header x-alertmedic-replays), or whose origin nobody knows, stays where it is.

The password comes from RABBITMQ_PASSWORD.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any
from urllib.parse import unquote, urlsplit

from actions.builtin import CANNOT_TELL, DONE, FAILED, secret
from actions.builtin.program import Operation, Refused, Trouble, execute, nothing_to_do, options, say, target

HEADER = "x-alertmedic-replays"
SOCKET_SECONDS = 5.0


def connect(url: str) -> Any:
    """A channel with publisher confirms. Raises ValueError, OSError and the client's errors."""
    import pika

    parts = urlsplit(url)
    if parts.scheme not in ("amqp", "amqps") or not parts.hostname or parts.password is not None:
        raise ValueError(f"{url} is not amqp://user@host:port/vhost without a password")
    tls = None
    if parts.scheme == "amqps":
        import ssl

        tls = pika.SSLOptions(ssl.create_default_context(), parts.hostname)
    parameters = pika.ConnectionParameters(
        host=parts.hostname,
        port=parts.port or (5671 if tls else 5672),
        virtual_host=unquote(parts.path.lstrip("/")) or "/",
        credentials=pika.PlainCredentials(unquote(parts.username or "guest"), secret("RABBITMQ_PASSWORD")),
        ssl_options=tls,
        socket_timeout=SOCKET_SECONDS,
        blocked_connection_timeout=SOCKET_SECONDS,
        stack_timeout=2 * SOCKET_SECONDS,
        connection_attempts=1,
    )
    channel = pika.BlockingConnection(parameters).channel()
    channel.confirm_delivery()
    return channel


def depth(channel: Any, queue: str) -> int:
    """Messages that are ready. An error of the client when there is no such queue."""
    return int(channel.queue_declare(queue, passive=True).method.message_count)


def origin(headers: dict[str, Any]) -> str:
    """The queue in which the message died last, "" when it does not say."""
    deaths = headers.get("x-death")
    last = deaths[0] if isinstance(deaths, list) and deaths else {}
    queue = last.get("queue") if isinstance(last, dict) else ""
    return queue if isinstance(queue, str) else ""


def resolve(args: argparse.Namespace) -> int:
    waiting = depth(connect(args.url), args.queue)
    if not waiting:
        return nothing_to_do()
    note = f"{waiting} dead letters in {args.queue}, at most {args.batch} are replayed"
    return target(f"rabbitmq={args.queue}", note, waiting=waiting)


def run(args: argparse.Namespace) -> int:
    import pika

    channel = connect(args.url)
    replayed: dict[str, int] = {}
    kept = 0
    for _ in range(min(args.batch, depth(channel, args.queue))):
        method, properties, body = channel.basic_get(args.queue, auto_ack=False)
        if method is None:
            break
        headers = dict(properties.headers or {})
        queue, before = origin(headers), headers.get(HEADER, 0)
        before = before if isinstance(before, int) else args.replays
        if not queue or queue == args.queue or before >= args.replays:
            kept += 1  # not acknowledged: it goes back when the channel is closed
            continue
        properties.headers = {**headers, HEADER: before + 1}
        try:
            channel.basic_publish("", queue, body, properties, mandatory=True)
        except (pika.exceptions.UnroutableError, pika.exceptions.NackError):
            kept += 1
            continue
        channel.basic_ack(method.delivery_tag)
        replayed[queue] = replayed.get(queue, 0) + 1
    channel.connection.close()
    if not replayed:
        raise Refused(f"no dead letter of {args.queue} may be replayed ({kept} looked at)")
    say({"replayed": replayed, "kept": kept})
    return DONE


def check(args: argparse.Namespace) -> int:
    """It has not happened when as many wait as were planned with, it has when none waits; else nobody can tell."""
    waiting = depth(connect(args.url), args.queue)
    say({"waiting": waiting})
    if waiting == 0:
        return DONE
    return FAILED if waiting == args.waiting else CANNOT_TELL


def telling(operation: Operation) -> Operation:
    """The operation, with the client's errors as Trouble."""

    def act(args: argparse.Namespace) -> int:
        try:
            import pika
        except ImportError:
            raise Trouble("pika is not installed: pip install 'alertmedic[rabbitmq]'") from None
        try:
            return operation(args)
        except pika.exceptions.AMQPError as error:
            raise Trouble(f"{type(error).__name__} {error}") from error

    return act


def main() -> int:
    parser = options("resolve", "run", "check")
    parser.add_argument("--url", required=True)
    parser.add_argument("--queue", required=True)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--replays", type=int, default=1)
    parser.add_argument("--waiting", type=int, default=-1)

    return execute(parser, {"resolve": telling(resolve), "run": telling(run), "check": telling(check)})


if __name__ == "__main__":
    sys.exit(main())
