"""Ends PostgreSQL sessions and statements that harm others, and reports deadlocks. Actions `postgres.*`.

Runs as `python -I -m actions.builtin.postgres resolve|run|check --mode blockers|idle|long` or `run --mode report`. The
statements are in the .sql files beside this module; values reach them as psql variables (`:'name'`), which psql quotes
as literals. A session's identity is its pid with backend_start, a statement's also query_start, compared in the very
statement that ends it. Never touched: superusers, replication, backups, anything but client backends, and our own
sessions.

Needs a role that is a member of pg_monitor and pg_signal_backend (or owns the sessions). Passwords come from PGPASSFILE
or PGPASSWORD, never from the URI.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from actions.builtin import CANNOT_TELL, DONE, FAILED, NOTHING_DONE, crashed, secret

CONNECT_SECONDS = "5"
PSQL_SECONDS = 12.0
POLL_SECONDS = 0.1
HERE = Path(__file__).parent
DEBIAN = Path("/usr/lib/postgresql")


class PsqlError(Exception):
    """psql could not connect, or the server refused the statement."""


def psql_program() -> str:
    """The newest psql that Debian installed (its wrapper on PATH starts perl first), else the one on PATH."""
    versions = sorted(DEBIAN.glob("*/bin/psql"), key=lambda p: [int(n) for n in p.parts[4].split(".") if n.isdecimal()])
    found = str(versions[-1]) if versions else shutil.which("psql", path=os.environ.get("PATH", os.defpath))
    if found is None:
        raise PsqlError("psql is not installed (Debian: apt-get install postgresql-client)")
    return found


def ask(dsn: str, statement: str, variables: dict[str, str]) -> str:
    """What the .sql file prints, unaligned and without headers. Raises PsqlError."""
    argv = [psql_program(), "-X", "-q", "-A", "-t", "-w", "-v", "ON_ERROR_STOP=1"]
    for name, value in variables.items():
        argv += ["-v", f"{name}={value}"]
    argv += ["-f", str(HERE / f"postgres_{statement}.sql"), "--dbname", dsn]
    keep = {k: v for k, v in os.environ.items() if k in ("PGPASSFILE", "PGSSLROOTCERT", "PATH", "LANG")}
    if password := secret("PGPASSWORD"):
        keep["PGPASSWORD"] = password
    env = {**keep, "PGCONNECT_TIMEOUT": CONNECT_SECONDS, "PGAPPNAME": "alertmedic", "HOME": "/nonexistent"}
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=PSQL_SECONDS, env=env, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PsqlError(str(error)) from error
    if done.returncode != 0:
        raise PsqlError(" ".join(done.stderr.split()) or f"psql ended with {done.returncode}")
    return done.stdout.strip()


def resolve(args: argparse.Namespace) -> int:
    variables = {"idle_seconds": str(args.idle_seconds), "active_seconds": str(args.active_seconds)}
    sessions = json.loads(ask(args.dsn, args.mode, variables))
    _say([_target(s) for s in sessions])
    return DONE


def _target(session: dict[str, Any]) -> dict[str, Any]:
    note = f"session {session['pid']} of {session['user']}, {session['state']} for {session['seconds']} s"
    if session["waiters"]:
        note += f"; {session['waiters']} wait for it, up to {session['waited']} s"
    identity = f"pid={session['pid']},backend_start={session['backend_start']}"
    params = {"pid": session["pid"], "backend_start": session["backend_start"]}
    if query_start := session.get("query_start"):
        identity += f",query_start={query_start}"
        params["query_start"] = query_start
    return {"identity": identity, "params": params, "note": note}


def run(args: argparse.Namespace) -> int:
    if args.mode == "report":
        _say(json.loads(ask(args.dsn, "deadlocks", {})))
        return DONE
    if args.mode == "long":
        return cancel(args)
    identity = {"pid": str(args.pid), "backend_start": args.backend_start}
    answer = ask(args.dsn, "terminate", {**identity, "mode": args.mode})
    if not answer:
        _say({"refused": f"session {args.pid} is gone, has changed, does no harm any more, or is protected"})
        return NOTHING_DONE
    deadline = time.monotonic() + args.seconds
    while (exists := ask(args.dsn, "exists", identity)) == "t" and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    _say({"pid": args.pid, "backend_start": args.backend_start, "signalled": answer == "t", "ended": exists == "f"})
    return DONE if exists == "f" else FAILED


def cancel(args: argparse.Namespace) -> int:
    """Cancels the planned statement; its session stays."""
    same = _statement(args)
    answer = ask(args.dsn, "cancel", {**same, "active_seconds": str(args.active_seconds)})
    if not answer:
        _say({"refused": f"the statement of session {args.pid} has ended, has changed, or is protected"})
        return NOTHING_DONE
    deadline = time.monotonic() + args.seconds
    while (runs := ask(args.dsn, "runs", same)) == "t" and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    _say({"pid": args.pid, "query_start": args.query_start, "signalled": answer == "t", "ended": runs == "f"})
    return DONE if runs == "f" else FAILED


def _statement(args: argparse.Namespace) -> dict[str, str]:
    return {"pid": str(args.pid), "backend_start": args.backend_start, "query_start": args.query_start}


def check(args: argparse.Namespace) -> int:
    """It has happened when no session has this pid and backend_start any more, or runs this statement."""
    if args.mode == "long":
        runs = ask(args.dsn, "runs", _statement(args))
        _say({"pid": args.pid, "runs": runs == "t"})
        return {"t": FAILED, "f": DONE}.get(runs, CANNOT_TELL)
    exists = ask(args.dsn, "exists", {"pid": str(args.pid), "backend_start": args.backend_start})
    _say({"pid": args.pid, "exists": exists == "t"})
    return {"t": FAILED, "f": DONE}.get(exists, CANNOT_TELL)


def _say(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("operation", choices=("resolve", "run", "check"))
    parser.add_argument("--mode", choices=("blockers", "idle", "long", "report"), default="blockers")
    parser.add_argument("--dsn", required=True)
    parser.add_argument("--pid", type=int, default=0)
    parser.add_argument("--backend-start", default="")
    parser.add_argument("--query-start", default="")
    parser.add_argument("--idle-seconds", type=float, default=2.0)
    parser.add_argument("--active-seconds", type=float, default=30.0)
    parser.add_argument("--seconds", type=float, default=5.0, help="for the session to end")
    args = parser.parse_args(argv)
    try:
        return {"resolve": resolve, "run": run, "check": check}[args.operation](args)
    except (PsqlError, ValueError, KeyError) as error:
        sys.stderr.write(f"postgres: {args.operation}: {error}\n")
        return CANNOT_TELL if args.operation == "check" else FAILED


if __name__ == "__main__":
    sys.excepthook = crashed
    sys.exit(main())
