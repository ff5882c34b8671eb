"""Makes a pool of workers larger or smaller through the service's own API. Actions `workers.scale*`.

Runs as `python -I -m actions.builtin.workers resolve|run|check --url URL`. `GET URL` answers a JSON object whose `size`
(or `workers`) is the present number; `PUT` sends the same key with the wanted number, and `expected` with the old one.
The wanted number is the present one times the factor: with a factor above 1 at least one more and at most the
inventory's `workers_max`, with one below 1 at least one less and at least the inventory's `workers_min`. The
present number is read again right before it is changed: where it is no longer the planned one, nothing is done. Undoing
is the same with the numbers exchanged.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from typing import Any

from actions.builtin import CANNOT_TELL, DONE, FAILED, NOTHING_DONE, crashed
from actions.builtin.http_json import HttpError, call


def size_of(document: dict[str, Any]) -> tuple[str, int]:
    """The key that holds the number, and the number. Raises HttpError."""
    for key in ("size", "workers"):
        value = document.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return key, value
    raise HttpError("the pool's document has neither `size` nor `workers`")


def resolve(url: str, factor: float, most: int, least: int) -> int:
    _, now = size_of(call("GET", url))
    if factor >= 1:
        wanted = max(now, min(most, max(now + 1, math.ceil(now * factor))))
        note = f"{now} workers, wanted are {wanted}, at most {most}"
    else:
        wanted = min(now, max(least, min(now - 1, math.ceil(now * factor))))
        note = f"{now} workers, wanted are {wanted}, at least {least}"
    if wanted == now:
        _say([])
        return DONE
    _say([{"identity": f"pool={url}", "params": {"previous": now, "wanted": wanted}, "note": note}])
    return DONE


def run(url: str, wanted: int, expected: int) -> int:
    key, now = size_of(call("GET", url))
    if now != expected:
        _say({"refused": f"the pool has {now} workers, planned were {expected}"})
        return NOTHING_DONE
    try:
        call("PUT", url, {key: wanted, "expected": expected})
    except HttpError as error:
        if error.status in (409, 412):  # the API compares `expected` itself: somebody was faster
            _say({"refused": str(error)})
            return NOTHING_DONE
        raise
    _, after = size_of(call("GET", url))
    _say({"before": now, "after": after})
    return DONE if after == wanted else FAILED


def check(url: str, wanted: int, expected: int) -> int:
    """It has happened when the pool has the wanted size, it has not when it still has the old one."""
    _, now = size_of(call("GET", url))
    _say({"now": now})
    if now == wanted:
        return DONE
    return FAILED if now == expected else CANNOT_TELL


def _say(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("operation", choices=("resolve", "run", "check"))
    parser.add_argument("--url", required=True)
    parser.add_argument("--factor", type=float, default=2.0)
    parser.add_argument("--max", type=int, default=0)
    parser.add_argument("--min", type=int, default=1)
    parser.add_argument("--wanted", type=int, default=-1)
    parser.add_argument("--expected", type=int, default=-1)
    args = parser.parse_args(argv)
    try:
        if args.operation == "resolve":
            return resolve(args.url, args.factor, args.max, args.min)
        act = run if args.operation == "run" else check
        return act(args.url, args.wanted, args.expected)
    except (HttpError, ValueError) as error:
        sys.stderr.write(f"workers: {args.operation} {args.url}: {error}\n")
        return CANNOT_TELL if args.operation == "check" else FAILED


if __name__ == "__main__":
    sys.excepthook = crashed
    sys.exit(main())
