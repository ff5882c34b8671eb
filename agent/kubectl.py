"""`kubectl alertmedic`: incidents and decisions from where kubectl works.

An entry point of its own (`kubectl-alertmedic` on PATH is a plug-in of kubectl). Without `--url` it lets kubectl
forward a port of 127.0.0.1 to the agent's service, so that nothing has to be exposed and the cluster's own rights
decide who gets there; the decision itself is made by the agent's API with a bearer token, whose name goes into the
journal. It decides nothing, stores nothing, and never prints the token.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import re
import select
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

TIMEOUT_SECONDS = 30.0
FORWARD_SECONDS = 20.0
FORWARDING = re.compile(r"Forwarding from 127\.0\.0\.1:(\d+)")
TOKEN = "ALERTMEDIC_TOKEN"  # noqa: S105 - the name of a variable


class PluginError(Exception):
    """What a person can mend, in words."""


@contextlib.contextmanager
def forwarded(kubectl: str, namespace: str, service: str, port: int) -> Iterator[str]:
    """The URL of a port that kubectl forwards to the service, for the time of the block. Raises PluginError."""
    where = ["--namespace", namespace] if namespace else []
    command = [kubectl, "port-forward", *where, "--address", "127.0.0.1", f"service/{service}", f":{port}"]
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except OSError as error:
        raise PluginError(f"{kubectl} cannot be started: {error.strerror}; hint: --kubectl, or --url") from error
    try:
        yield f"http://127.0.0.1:{_port(process)}"
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def _port(process: subprocess.Popen[bytes]) -> int:
    """The port that kubectl says it listens on."""
    assert process.stdout is not None
    assert process.stderr is not None
    said, deadline = b"", time.monotonic() + FORWARD_SECONDS
    while (left := deadline - time.monotonic()) > 0:
        ready, _, _ = select.select([process.stdout], [], [], left)
        chunk = os.read(process.stdout.fileno(), 4096) if ready else b""
        if not chunk:
            break
        said += chunk
        if found := FORWARDING.search(said.decode(errors="replace")):
            return int(found[1])
    process.terminate()
    why = " ".join(process.stderr.read(2000).decode(errors="replace").split())
    raise PluginError(f"kubectl did not forward a port: {why or 'no answer in time'}")


def call(url: str, method: str, path: str, token: str, body: Any = None, ca_file: str = "") -> Any:
    """The decoded answer. Raises PluginError with the agent's own reason."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise PluginError(f"--url: {url} is no http or https URL")
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        context = ssl.create_default_context(cafile=ca_file or None)
        connection = http.client.HTTPSConnection(parts.hostname, parts.port, timeout=TIMEOUT_SECONDS, context=context)
    else:
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=TIMEOUT_SECONDS)
    headers = {"Accept": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    sent = None if body is None else json.dumps(body)
    if sent is not None:
        headers["Content-Type"] = "application/json"
    try:
        connection.request(method, parts.path.rstrip("/") + path, sent, headers)
        answer = connection.getresponse()
        decoded = json.loads(answer.read() or b"null")
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise PluginError(f"{method} {path}: no usable answer: {error or type(error).__name__}") from error
    finally:
        connection.close()
    if answer.status != 200:
        fault = decoded.get("error", {}) if isinstance(decoded, dict) else {}
        hint = f"; hint: {fault['hint']}" if fault.get("hint") else ""
        raise PluginError(f"{method} {path}: {answer.status} {fault.get('reason', '')}{hint}")
    return decoded


def run(args: argparse.Namespace, url: str) -> Any:
    """What the command asks the agent for."""

    def ask(method: str, path: str, body: Any = None) -> Any:
        return call(url, method, f"/api/v1{path}", args.token, body, args.ca_file)

    if args.command in ("pause", "resume"):
        return ask("POST", f"/{args.command}", {"note": args.note})
    if args.command == "incidents" and not args.incident:
        return ask("GET", "/incidents")
    at = f"/incidents/{quote(args.incident, safe='')}"
    seen = ask("GET", at)
    if args.command == "incidents":
        return seen
    digest = args.digest or (seen.get("plan") or {}).get("digest", "")
    return ask("POST", f"{at}/{args.command}", {"digest": digest, "note": args.note})


def shown(command: str, answer: Any) -> str:
    """The answer for people; whole documents stay JSON."""
    listed = answer.get("incidents") if isinstance(answer, dict) else None
    if command != "incidents" or not isinstance(listed, list):
        return json.dumps(answer, indent=1)
    rows = [(str(i["id"]), str(i["state"]), ", ".join(map(str, i.get("services") or []))) for i in listed]
    widths = [max((len(row[n]) for row in rows), default=0) for n in range(2)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows) or "no incidents"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="kubectl alertmedic", allow_abbrev=False, description="Incidents and decisions of AlertMedic."
    )
    parser.add_argument("-n", "--namespace", default="", help="of the release; default: kubectl's")
    parser.add_argument("--service", default="alertmedic")
    parser.add_argument("--port", type=int, default=9095)
    parser.add_argument("--url", default="", help="of the agent, instead of a forwarded port")
    parser.add_argument("--ca-file", default="", help="authority of that URL's certificate")
    parser.add_argument("--kubectl", default="kubectl")
    parser.add_argument("--token-file", type=Path, help=f"bearer token; default: ${TOKEN}")
    parser.add_argument("--json", action="store_true")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser("incidents", help="list them, or show one").add_argument("incident", nargs="?", default="")
    for name in ("approve", "reject"):
        one = commands.add_parser(name, help=f"{name} the plan that waits")
        one.add_argument("incident")
        one.add_argument("--digest", default="", help="of the plan you saw; default: of the one that waits now")
        one.add_argument("--note", default="")
    for name in ("pause", "resume"):
        commands.add_parser(name, help=f"{name} all actions").add_argument("--note", default="")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """0 done, 1 refused or unreachable, 2 wrong usage."""
    args = _arguments(argv)
    try:
        args.token = args.token_file.read_text().strip() if args.token_file else os.environ.get(TOKEN, "")
        with contextlib.ExitStack() as stack:
            url = args.url or stack.enter_context(forwarded(args.kubectl, args.namespace, args.service, args.port))
            answer = run(args, url)
    except (PluginError, OSError) as error:
        sys.stderr.write(f"kubectl alertmedic: {error}\n")
        return 1
    sys.stdout.write((json.dumps(answer) if args.json else shown(args.command, answer)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
