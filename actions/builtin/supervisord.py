"""Restarts a program through its own supervisord, by XML-RPC. Action `service.restart.supervisord`.

Runs as `python -I -m actions.builtin.supervisord resolve|run|check`. supervisord stays the parent of what it starts, so
nothing of the service ends with our sandbox. The program's identity is its name with pid and start time; where those
have changed since the plan, somebody else has restarted it and nothing is done. A program that does not run (crashed,
or stopped by a restart of ours that was interrupted) is started.

Never configures, adds or removes programs. Credentials come from SUPERVISORD_USERNAME and SUPERVISORD_PASSWORD.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import socket
import sys
import time
import xmlrpc.client
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from actions.builtin import CANNOT_TELL, DONE, FAILED, NOTHING_DONE, crashed, secret

CALL_SECONDS = 5.0
POLL_SECONDS = 0.05
RUNNING, STOPPED_STATES = "RUNNING", ("STOPPED", "EXITED", "FATAL", "UNKNOWN")
ALIVE_STATES = ("STARTING", "RUNNING", "STOPPING")
NOT_RUNNING_FAULT, ALREADY_STARTED_FAULT = 70, 60
SPAWN_ERROR_FAULT = 50  # also for a program that was gone before the call returned; supervisord tries it again


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=CALL_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(CALL_SECONDS)
        self.sock.connect(self._path)


class _Transport(xmlrpc.client.Transport):
    """XML-RPC over a unix or TCP socket, with a timeout on every call."""

    def __init__(self, connect: Callable[[], http.client.HTTPConnection]) -> None:
        super().__init__(headers=_authorization())
        self._connect = connect

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        return self._connect()


def _authorization() -> list[tuple[str, str]]:
    user = secret("SUPERVISORD_USERNAME")
    if not user:
        return []
    pair = f"{user}:{secret('SUPERVISORD_PASSWORD')}".encode()
    return [("Authorization", "Basic " + base64.b64encode(pair).decode())]


def connect(url: str) -> Any:
    """The `supervisor` namespace of the server at `unix:///path` or `http://host:port`. Raises ValueError."""
    parts = urlsplit(url)
    if parts.scheme == "unix" and parts.path.startswith("/") and not parts.netloc:
        transport = _Transport(lambda: _UnixConnection(parts.path))
    elif parts.scheme == "http" and parts.hostname:
        host, port = parts.hostname, parts.port or 9001
        transport = _Transport(lambda: http.client.HTTPConnection(host, port, timeout=CALL_SECONDS))
    else:
        raise ValueError(f"{url} is neither unix:///path nor http://host:port")
    return xmlrpc.client.ServerProxy("http://localhost/RPC2", transport=transport).supervisor


def settle(supervisor: Any, program: str, wanted: tuple[str, ...], deadline: float) -> dict[str, Any]:
    """The program's information once its state is one of `wanted`, or at the deadline (monotonic)."""
    while True:
        info: dict[str, Any] = supervisor.getProcessInfo(program)
        if info["statename"] in wanted or time.monotonic() >= deadline:
            return info
        time.sleep(POLL_SECONDS)


def resolve(supervisor: Any, program: str) -> int:
    info = supervisor.getProcessInfo(program)
    note = f"{program} is {info['statename']}" + (f" (pid {info['pid']})" if info["pid"] else "")
    target = {
        "identity": f"program={program}",
        "params": {"pid": int(info["pid"]), "start": int(info["start"])},
        "note": note,
    }
    _say([target])
    return DONE


def run(supervisor: Any, program: str, pid: int, start: int, seconds: float) -> int:
    deadline = time.monotonic() + seconds
    before = supervisor.getProcessInfo(program)
    if before["statename"] in ALIVE_STATES and (before["pid"], before["start"]) != (pid, start):
        _say({"refused": f"{program} runs as pid {before['pid']} now, planned was pid {pid}"})
        return NOTHING_DONE
    if before["statename"] not in STOPPED_STATES:
        _call(lambda: supervisor.stopProcess(program, False), (NOT_RUNNING_FAULT,))
        stopped = settle(supervisor, program, STOPPED_STATES, deadline)
        if stopped["statename"] not in STOPPED_STATES:
            _say({"failed": f"{program} did not stop: {stopped['statename']}"})
            return FAILED
    _call(lambda: supervisor.startProcess(program, False), (ALREADY_STARTED_FAULT, SPAWN_ERROR_FAULT))
    after = settle(supervisor, program, (RUNNING, "FATAL", "EXITED"), deadline)
    _say({"program": program, "before": _brief(before), "after": _brief(after)})
    return DONE if after["statename"] == RUNNING else FAILED


def check(supervisor: Any, program: str, pid: int, start: int, seconds: float) -> int:
    """It has happened when the program runs as another process than planned."""
    info = settle(supervisor, program, (RUNNING, *STOPPED_STATES), time.monotonic() + seconds)
    _say({"program": program, "now": _brief(info)})
    if info["statename"] == RUNNING:
        return DONE if (info["pid"], info["start"]) != (pid, start) else FAILED
    return FAILED if info["statename"] in STOPPED_STATES else CANNOT_TELL


def _call(call: Callable[[], Any], borne: tuple[int, ...]) -> None:
    try:
        call()
    except xmlrpc.client.Fault as fault:
        if fault.faultCode not in borne:
            raise


def _brief(info: dict[str, Any]) -> dict[str, Any]:
    return {key: info[key] for key in ("statename", "pid", "start", "exitstatus")}


def _say(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("operation", choices=("resolve", "run", "check"))
    parser.add_argument("--url", required=True)
    parser.add_argument("--program", required=True)
    parser.add_argument("--pid", type=int, default=-1)
    parser.add_argument("--start", type=int, default=-1)
    parser.add_argument("--seconds", type=float, default=30.0, help="for the program to stop and start")
    args = parser.parse_args(argv)
    try:
        supervisor = connect(args.url)
        if args.operation == "resolve":
            return resolve(supervisor, args.program)
        if args.operation == "check":
            return check(supervisor, args.program, args.pid, args.start, min(args.seconds, 10.0))
        return run(supervisor, args.program, args.pid, args.start, args.seconds)
    except (OSError, ValueError, http.client.HTTPException, xmlrpc.client.Error) as error:
        sys.stderr.write(f"supervisord at {args.url}: {args.operation} {args.program}: {error}\n")
        return CANNOT_TELL if args.operation == "check" else FAILED


if __name__ == "__main__":
    sys.excepthook = crashed
    sys.exit(main())
