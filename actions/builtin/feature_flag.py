"""Switches a feature flag through the service's own API. Action `feature_flag.set`.

Runs as `python -I -m actions.builtin.feature_flag resolve|run|check --url URL --flag NAME --value V`. `GET URL/NAME`
answers a JSON object whose `enabled` (true or false) or `value` (text) is the flag; `PUT` sends the same key with the
new value, and `expected` with the old one. The value is read again right before it is set: where it is no longer the
planned one, somebody else has switched it and nothing is done. Undoing is the same with the values exchanged.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from actions.builtin import CANNOT_TELL, DONE, FAILED, NOTHING_DONE, crashed
from actions.builtin.http_json import HttpError, below, call

ON, OFF = ("on", "true"), ("off", "false")


def value_of(document: dict[str, Any]) -> tuple[str, str]:
    """The key that holds the flag and its value as text (on and off for booleans). Raises HttpError."""
    for key in ("enabled", "value"):
        value = document.get(key)
        if isinstance(value, bool):
            return key, "on" if value else "off"
        if isinstance(value, str) and value.isprintable():
            return key, value
    raise HttpError("the flag's document has neither `enabled` nor `value`")


def same(a: str, b: str) -> bool:
    return a == b or (a in ON and b in ON) or (a in OFF and b in OFF)


def encoded(key: str, value: str, sample: Any) -> Any:
    """The value as the API spells it: a boolean where it answered with one. Raises HttpError."""
    if not isinstance(sample, bool):
        return value
    if value not in ON + OFF:
        raise HttpError(f"the flag is on or off, {key} cannot be {value}")
    return value in ON


def resolve(url: str, flag: str, value: str) -> int:
    document = call("GET", below(url, flag))
    key, now = value_of(document)
    encoded(key, value, document[key])
    if same(now, value):
        _say([])
        return DONE
    note = f"flag {flag} is {now}, wanted is {value}"
    _say([{"identity": f"flag={below(url, flag)}", "params": {"previous": now}, "note": note}])
    return DONE


def run(url: str, flag: str, value: str, expected: str) -> int:
    document = call("GET", below(url, flag))
    key, now = value_of(document)
    if not same(now, expected):
        _say({"refused": f"flag {flag} is {now}, planned was {expected}"})
        return NOTHING_DONE
    body = {key: encoded(key, value, document[key]), "expected": encoded(key, expected, document[key])}
    try:
        call("PUT", below(url, flag), body)
    except HttpError as error:
        if error.status in (409, 412):  # the API compares `expected` itself: somebody was faster
            _say({"refused": str(error)})
            return NOTHING_DONE
        raise
    _, after = value_of(call("GET", below(url, flag)))
    _say({"flag": flag, "before": now, "after": after})
    return DONE if same(after, value) else FAILED


def check(url: str, flag: str, value: str, expected: str) -> int:
    """It has happened when the flag has the wanted value, it has not when it still has the old one."""
    _, now = value_of(call("GET", below(url, flag)))
    _say({"flag": flag, "now": now})
    if same(now, value):
        return DONE
    return FAILED if same(now, expected) else CANNOT_TELL


def _say(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("operation", choices=("resolve", "run", "check"))
    parser.add_argument("--url", required=True)
    parser.add_argument("--flag", required=True)
    parser.add_argument("--value", required=True)
    parser.add_argument("--expected", default="")
    args = parser.parse_args(argv)
    try:
        if args.operation == "resolve":
            return resolve(args.url, args.flag, args.value)
        act = run if args.operation == "run" else check
        return act(args.url, args.flag, args.value, args.expected)
    except (HttpError, ValueError) as error:
        sys.stderr.write(f"feature_flag: {args.operation} {args.flag}: {error}\n")
        return CANNOT_TELL if args.operation == "check" else FAILED


if __name__ == "__main__":
    sys.excepthook = crashed
    sys.exit(main())
