"""Makes pgbouncer's pools larger while it runs, through its admin console. Action `pgbouncer.resize_pool`.

Runs as `python -I -m actions.builtin.pgbouncer resolve|run|check --dsn DSN`. `SET` changes the running process only: a
restart or RELOAD brings back what the configuration file says. The old value is looked at again before it is changed;
undoing is the same with the numbers exchanged. A database that sets its own pool_size is not changed by this.

The role has to be one of admin_users. Passwords come from PGPASSFILE or PGPASSWORD.
"""

from __future__ import annotations

import argparse
import csv
import sys

from actions.builtin import CANNOT_TELL, DONE, FAILED
from actions.builtin.postgres import PsqlError, psql_program
from actions.builtin.program import Refused, Trouble, execute, nothing_to_do, options, say, target, tool

SETTINGS = ("default_pool_size", "reserve_pool_size", "max_client_conn")


def ask(dsn: str, command: str) -> list[dict[str, str]]:
    """The rows of the answer. Raises Trouble."""
    try:
        program = psql_program()
    except PsqlError as error:
        raise Trouble(str(error)) from error
    argv = [program, "-X", "-q", "-w", "--csv", "-v", "ON_ERROR_STOP=1", "-c", command, "--dbname", dsn]
    more = {"PGCONNECT_TIMEOUT": "5", "PGAPPNAME": "alertmedic", "HOME": "/nonexistent"}
    text = tool(argv, keep=("PGPASSFILE", "PGPASSWORD", "PGSSLROOTCERT"), more=more, seconds=12.0)
    return list(csv.DictReader(text.splitlines()))


def value_of(args: argparse.Namespace) -> int:
    for row in ask(args.dsn, "SHOW CONFIG"):
        if row["key"] == args.setting:
            return int(row["value"])
    raise Trouble(f"pgbouncer has no setting {args.setting}")


def resolve(args: argparse.Namespace) -> int:
    now = value_of(args)
    wanted = min(args.max, max(now + 1, int(now * args.factor)))
    if wanted <= now:
        return nothing_to_do()
    waiting = sum(int(row["cl_waiting"]) for row in ask(args.dsn, "SHOW POOLS"))
    note = f"{args.setting} is {now}, wanted is {wanted}, at most {args.max}; {waiting} clients wait"
    return target(f"pgbouncer={args.setting}", note, previous=now, wanted=wanted)


def run(args: argparse.Namespace) -> int:
    now = value_of(args)
    if now != args.previous:
        raise Refused(f"{args.setting} is {now} now, planned was {args.previous}")
    ask(args.dsn, f"SET {args.setting} = {args.wanted}")  # a name of SETTINGS and a whole number
    after = value_of(args)
    say({"setting": args.setting, "before": now, "after": after})
    return DONE if after == args.wanted else FAILED


def check(args: argparse.Namespace) -> int:
    now = value_of(args)
    say({"setting": args.setting, "now": now})
    return {args.wanted: DONE, args.previous: FAILED}.get(now, CANNOT_TELL)


def main() -> int:
    parser = options("resolve", "run", "check")
    parser.add_argument("--dsn", required=True)
    parser.add_argument("--setting", choices=SETTINGS, default="default_pool_size")
    parser.add_argument("--factor", type=float, default=2.0)
    parser.add_argument("--max", type=int, default=0)
    parser.add_argument("--previous", type=int, default=-1)
    parser.add_argument("--wanted", type=int, default=-1)
    return execute(parser, {"resolve": resolve, "run": run, "check": check})


if __name__ == "__main__":
    sys.exit(main())
