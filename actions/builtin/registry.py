"""Puts one instance of a service into maintenance in a service registry. Action `registry.drain_instance`.

Runs as `python -I -m actions.builtin.registry resolve|run|check|undo`. Speaks the agent API of Consul: an instance in
maintenance fails its health check, so that nobody is sent to it; it goes on running. Refused when too few other
instances of the service are passing. Undoing takes it out of maintenance. A token comes from CONSUL_HTTP_TOKEN.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any
from urllib.parse import quote

from actions.builtin import DONE, FAILED, secret
from actions.builtin.http_json import HttpError, request
from actions.builtin.program import Refused, Trouble, execute, nothing_to_do, options, say, target


def ask(args: argparse.Namespace, method: str, path: str) -> Any:
    token = secret("CONSUL_HTTP_TOKEN")
    try:
        return request(method, args.url.rstrip("/") + path, headers={"X-Consul-Token": token} if token else {})
    except HttpError as error:
        raise Trouble(str(error)) from error


def maintained(args: argparse.Namespace) -> bool:
    return f"_service_maintenance:{args.id}" in ask(args, "GET", "/v1/agent/checks")


def service_of(args: argparse.Namespace) -> str:
    services = ask(args, "GET", "/v1/agent/services")
    if args.id not in services:
        raise Refused(f"the registry's agent knows no instance {args.id}")
    return str(services[args.id]["Service"])


def enough(args: argparse.Namespace) -> str:
    """How many others are passing, in words. Raises Refused when they are too few."""
    name = service_of(args)
    everyone = ask(args, "GET", f"/v1/health/service/{quote(name, safe='')}")
    passing = ask(args, "GET", f"/v1/health/service/{quote(name, safe='')}?passing=true")
    others = [e for e in passing if e["Service"]["ID"] != args.id]
    if not others or len(others) * 100 < args.keep_percent * len(everyone):
        raise Refused(f"only {len(others)} of {len(everyone)} instances of {name} would be left")
    return f"{len(others)} other instance(s) of {name} are passing"


def switch(args: argparse.Namespace, enable: bool) -> int:
    path = f"/v1/agent/service/maintenance/{quote(args.id, safe='')}?enable={'true' if enable else 'false'}"
    ask(args, "PUT", path + ("&reason=alertmedic" if enable else ""))
    now = maintained(args)
    say({"instance": args.id, "maintenance": now})
    return DONE if now is enable else FAILED


def resolve(args: argparse.Namespace) -> int:
    if maintained(args):
        return nothing_to_do()
    return target(f"instance={args.id}", enough(args))


def run(args: argparse.Namespace) -> int:
    if maintained(args):
        raise Refused(f"{args.id} is in maintenance already")
    enough(args)
    return switch(args, True)


def undo(args: argparse.Namespace) -> int:
    if not maintained(args):
        raise Refused(f"{args.id} is not in maintenance any more")
    return switch(args, False)


def check(args: argparse.Namespace) -> int:
    now = maintained(args)
    say({"instance": args.id, "maintenance": now})
    return DONE if now else FAILED


def main() -> int:
    parser = options("resolve", "run", "check", "undo")
    parser.add_argument("--url", required=True)
    parser.add_argument("--id", required=True)
    parser.add_argument("--keep-percent", type=float, default=50.0)
    return execute(parser, {"resolve": resolve, "run": run, "check": check, "undo": undo})


if __name__ == "__main__":
    sys.exit(main())
