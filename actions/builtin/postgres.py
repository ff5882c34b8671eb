"""Ends PostgreSQL sessions that harm others. Action family `postgres.terminate_*`.

Runs as `python -I -m actions.builtin.postgres resolve|run|check --mode blockers|idle`. The statements are in the .sql
files beside this module; values reach them as psql variables (`:'name'`), which psql quotes as literals. A session's
identity is its pid with backend_start, compared in the very statement that ends it. Never touched: superusers,
replication, backups, anything but client backends, and our own sessions.

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

from actions.builtin import CANNOT_TELL, DONE, FAILED, NOTHING_DONE, crashed

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
    keep = {k: v for k, v in os.environ.items() if k in ("PGPASSFILE", "PGPASSWORD", "PGSSLROOTCERT", "PATH", "LANG")}
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
    return {
        "identity": f"pid={session['pid']},backend_start={session['backend_start']}",
        "params": {"pid": session["pid"], "backend_start": session["backend_start"]},
        "note": note,
    }


def run(args: argparse.Namespace) -> int:
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


def check(args: argparse.Namespace) -> int:
    """It has happened when no session has this pid and backend_start any more."""
    exists = ask(args.dsn, "exists", {"pid": str(args.pid), "backend_start": args.backend_start})
    _say({"pid": args.pid, "exists": exists == "t"})
    return {"t": FAILED, "f": DONE}.get(exists, CANNOT_TELL)


def _say(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("operation", choices=("resolve", "run", "check"))
    parser.add_argument("--mode", choices=("blockers", "idle"), default="blockers")
    parser.add_argument("--dsn", required=True)
    parser.add_argument("--pid", type=int, default=0)
    parser.add_argument("--backend-start", default="")
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
