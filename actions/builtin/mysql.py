"""Ends MariaDB sessions and statements that harm others, and reports deadlocks. Actions `mysql.*`.

Runs as `python -I -m actions.builtin.mysql resolve|run|check --mode blockers|idle|long` or `run --mode report`, through
the mariadb client (the server's own, so that its protocol and authentication plugins are the right ones). The only
values in a statement are whole numbers and times that have been parsed; all else is compared here. The password comes
from MYSQL_PWD.

A session is identified by its connection id with the start of its transaction (or, for statements, with its query id,
which is never given twice). Identity and harm are looked at again in the very compound statement that ends it. Never
touched: root, system and replication threads, dumps, and our own user. Needs PROCESS and CONNECTION ADMIN.

What it reads (information_schema.INNODB_LOCK_WAITS, PROCESSLIST.QUERY_ID) is MariaDB's; MySQL 8 has other tables.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from actions.builtin import DONE, FAILED
from actions.builtin.program import (
    Refused,
    execute,
    find,
    nothing_to_do,
    options,
    say,
    shorten,
    tool,
    wait_for,
)

# InnoDB renews what it shows of transactions only when nobody has looked for 0.1 s.
CACHED_SECONDS = 0.12
TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2}")
# What no action may end, as a condition on `p` (PROCESSLIST).
MAY = """p.ID <> CONNECTION_ID() AND p.USER NOT IN ('root', 'mysql', 'mariadb.sys', 'mysql.sys', 'mysql.session',
 'system user', 'event_scheduler') AND p.USER <> SUBSTRING_INDEX(USER(), '@', 1)
 AND p.COMMAND IN ('Query', 'Sleep', 'Execute') AND COALESCE(p.INFO, '') NOT LIKE '%SQL_NO_CACHE%'"""
BLOCKS = """EXISTS (SELECT 1 FROM information_schema.INNODB_LOCK_WAITS w WHERE w.blocking_trx_id = t.trx_id)
 AND t.trx_state <> 'LOCK WAIT'"""
SESSIONS = "information_schema.PROCESSLIST p JOIN information_schema.INNODB_TRX t ON t.trx_mysql_thread_id = p.ID"
IDLE = "p.COMMAND = 'Sleep'"
STARTED = "DATE_FORMAT(t.trx_started, '%Y-%m-%d %H:%i:%s')"
FIELDS = "'id', p.ID, 'user', p.USER, 'command', p.COMMAND, 'seconds', ROUND(p.TIME_MS / 1000)"


def ask(url: str, statement: str) -> list[str]:
    """The rows that the server answers with, one text each. Raises Trouble."""
    parts = urlsplit(url)
    if parts.scheme != "mysql" or not parts.username or parts.password is not None:
        raise ValueError(f"{url} is not mysql://user@host:port or mysql://user@/?socket=/path")
    argv = [find("mariadb", "mysql"), "--no-defaults", "--batch", "--raw", "--skip-column-names", "--connect-timeout=5"]
    argv.append(f"--user={unquote(parts.username)}")
    if socket := parse_qs(parts.query).get("socket"):
        argv += ["--protocol=socket", f"--socket={socket[0]}"]
    else:
        argv += ["--protocol=tcp", f"--host={parts.hostname or ''}", f"--port={parts.port or 3306}"]
    text = tool(argv, keep=("MYSQL_PWD",), stdin=f"SET SESSION max_statement_time = 5;\n{statement}\n", seconds=12.0)
    return text.splitlines()


def harm(args: argparse.Namespace) -> tuple[str, str]:
    """Where to look, and the condition for a session that does the harm of this mode."""
    idle, active = float(args.idle_seconds), float(args.active_seconds)
    if args.mode == "blockers":
        since = f"(({IDLE} AND p.TIME_MS >= {idle * 1000:.0f}) OR p.TIME_MS >= {active * 1000:.0f})"
        return SESSIONS, f"{MAY} AND {BLOCKS} AND {since}"
    if args.mode == "idle":
        return SESSIONS, f"{MAY} AND {IDLE} AND p.TIME_MS >= {idle * 1000:.0f}"
    where = f"{MAY} AND p.COMMAND IN ('Query', 'Execute') AND p.TIME_MS >= {active * 1000:.0f}"
    # What changes data is not ended half-way by itself: rolling it back may take longer than letting it end.
    return "information_schema.PROCESSLIST p", f"{where} AND p.INFO REGEXP '^[[:space:]]*(select|with|show)'"


def resolve(args: argparse.Namespace) -> int:
    table, where = harm(args)
    key = "p.QUERY_ID" if args.mode == "long" else STARTED
    what = f"JSON_OBJECT({FIELDS}, 'key', {key})"
    rows = ask(args.url, f"SELECT {what} FROM {table} WHERE {where} ORDER BY p.TIME_MS DESC;")  # noqa: S608 - constants
    if not rows:
        return nothing_to_do()
    found = []
    for session in map(json.loads, rows):
        note = f"session {session['id']} of {session['user']}, {session['command']} for {session['seconds']} s"
        params = {"id": session["id"], "key": str(session["key"])}
        found.append({"identity": f"id={session['id']},key={session['key']}", "params": params, "note": shorten(note)})
    say(found)
    return DONE


def identity(args: argparse.Namespace) -> tuple[str, str, str]:
    """The table, the condition for exactly the planned session or statement, and what ends it."""
    if args.mode == "long":
        query = int(args.key)
        same = f"p.ID = {int(args.id)} AND p.QUERY_ID = {query} AND p.COMMAND <> 'Sleep'"
        return "information_schema.PROCESSLIST p", same, f"QUERY ID {query}"
    if not TIME.fullmatch(args.key):
        raise ValueError("the start of a transaction is written like 2026-01-02 03:04:05")
    return SESSIONS, f"p.ID = {int(args.id)} AND {STARTED} = '{args.key}'", f"CONNECTION {int(args.id)}"


def there(args: argparse.Namespace) -> bool:
    table, same, _ = identity(args)
    return ask(args.url, f"SELECT COUNT(*) FROM {table} WHERE {same};") != ["0"]  # noqa: S608 - numbers and a time


def run(args: argparse.Namespace) -> int:
    _, where = harm(args)
    table, same, kill = identity(args)
    block = (  # whole numbers and a parsed time, everything else is constant
        f"DELIMITER //\nBEGIN NOT ATOMIC IF EXISTS (SELECT 1 FROM {table} WHERE {same} AND {where}) "  # noqa: S608
        f"THEN KILL {kill}; SELECT 'ended'; END IF; END//"
    )
    if ask(args.url, block) != ["ended"]:
        raise Refused(f"session {args.id} is gone, has changed, does no harm any more, or is protected")
    ended = wait_for(lambda: not there(args), args.seconds, CACHED_SECONDS)
    say({"id": args.id, "key": args.key, "ended": ended})
    return DONE if ended else FAILED


def check(args: argparse.Namespace) -> int:
    """It has happened when no session has this id and transaction, or no statement this query id, any more."""
    left = there(args)
    say({"id": args.id, "left": left})
    return FAILED if left else DONE


def report(args: argparse.Namespace) -> int:
    status = ask(args.url, "SHOW ENGINE INNODB STATUS;")
    latest: list[str] = []
    inside = False
    for line in status:
        if line.startswith("LATEST DETECTED DEADLOCK"):
            inside = True
        elif inside and line.startswith("TRANSACTIONS"):
            break
        elif inside and not set(line) <= {"-"}:
            latest.append(shorten(line, 200))
    waits = ask(
        args.url,
        "SELECT JSON_OBJECT('waiting', r.trx_mysql_thread_id, 'blocked_by', b.trx_mysql_thread_id, 'seconds', "
        "TIMESTAMPDIFF(SECOND, r.trx_wait_started, NOW())) FROM information_schema.INNODB_LOCK_WAITS w "
        "JOIN information_schema.INNODB_TRX r ON r.trx_id = w.requesting_trx_id "
        "JOIN information_schema.INNODB_TRX b ON b.trx_id = w.blocking_trx_id LIMIT 50;",
    )
    counter = ask(args.url, "SELECT COUNT FROM information_schema.INNODB_METRICS WHERE NAME = 'lock_deadlocks';")
    document: dict[str, Any] = {"waits": [json.loads(w) for w in waits], "latest_deadlock": latest[:120]}
    if counter and counter[0].isdecimal():
        document["deadlocks"] = int(counter[0])
    say(document)
    return DONE


def main() -> int:
    parser = options("resolve", "run", "check")
    parser.add_argument("--mode", choices=("blockers", "idle", "long", "report"), required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--id", type=int, default=0)
    parser.add_argument("--key", default="")
    parser.add_argument("--idle-seconds", type=float, default=2.0)
    parser.add_argument("--active-seconds", type=float, default=30.0)
    parser.add_argument("--seconds", type=float, default=5.0, help="for it to end")

    def act(args: argparse.Namespace) -> int:
        return report(args) if args.mode == "report" else run(args)

    return execute(parser, {"resolve": resolve, "run": act, "check": check})


if __name__ == "__main__":
    sys.exit(main())
