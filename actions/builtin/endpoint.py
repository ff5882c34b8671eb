"""Calls one endpoint that the inventory declares. Actions `http.call` and `cache.clear.http`.

Runs as `python -I -m actions.builtin.endpoint run|check`. The address comes from the inventory only; no redirect is
followed. The request carries an Idempotency-Key that is the same whenever the same plan is carried out again, and a
JSON body that says who asks and why. Whether it has happened is asked of a second address, to which the key is
appended: `{"done": true}` or `{"done": false}`; where there is none, nobody can tell.
"""

from __future__ import annotations

import argparse
import hashlib
import sys

from actions.builtin import CANNOT_TELL, DONE, FAILED
from actions.builtin.http_json import HttpError, below, call
from actions.builtin.program import Refused, Trouble, execute, options, say, shorten

REFUSING = (409, 412, 423)


def key_of(args: argparse.Namespace) -> str:
    """The idempotency key: the same for the same incident, service, address and time of planning."""
    text = "\0".join((args.incident, args.service, args.url, args.method, args.planned_at))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def run(args: argparse.Namespace) -> int:
    key = key_of(args)
    body = {"service": args.service, "incident": args.incident, "idempotency_key": key}
    try:
        answer = call(args.method, args.url, body, {"Idempotency-Key": key})
    except HttpError as error:
        if error.status in REFUSING:
            raise Refused(str(error)) from error
        raise Trouble(str(error)) from error
    say({"key": key, "answer": {shorten(str(k), 60): shorten(str(v), 200) for k, v in list(answer.items())[:20]}})
    return DONE


def check(args: argparse.Namespace) -> int:
    if not args.check_url:
        say({"done": None})
        return CANNOT_TELL
    try:
        done = call("GET", below(args.check_url, key_of(args))).get("done")
    except HttpError as error:
        raise Trouble(str(error)) from error
    say({"done": done})
    return {True: DONE, False: FAILED}.get(done if isinstance(done, bool) else None, CANNOT_TELL)  # type: ignore[arg-type]


def main() -> int:
    parser = options("run", "check")
    parser.add_argument("--url", required=True)
    parser.add_argument("--method", choices=("POST", "PUT", "DELETE"), default="POST")
    parser.add_argument("--service", required=True)
    parser.add_argument("--incident", required=True)
    parser.add_argument("--planned-at", required=True)
    parser.add_argument("--check-url", default="")
    return execute(parser, {"run": run, "check": check})


if __name__ == "__main__":
    sys.exit(main())
