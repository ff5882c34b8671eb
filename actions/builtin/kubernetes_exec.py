"""Runs one of the operator's diagnostics in a container and brings out what it says. Action `kubernetes.diagnose`.

Runs as `python -I -m actions.builtin.kubernetes_exec resolve|run --object pod/NAMESPACE/NAME ...`. What may run is an
argument list of `kubernetes.diagnostics` in the configuration; an alert or a rule can only name one. The pod is bound
by uid and the container by the id of its present start, read before and after: exec itself takes no precondition, so
an output during which either changed is handed over as nobody's. The stream is `pods/exec` over WebSocket,
v5.channel.k8s.io or v4 (KEP-4006): each binary message begins with its channel, and the one on the error channel is a
Status that tells the exit. Nothing is written to standard input, no terminal is asked for. aiohttp is imported where a
stream begins and only there: a look-up does without. It never ends what it has started, which the API has no way to
do: a program whose time is over loses its reader.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from actions.builtin import DONE, FAILED, crashed
from actions.builtin.kubernetes import connect, connection_options, guarded, say
from actions.builtin.kubernetes_api import Api, ApiError, Document, Name, Refused, exec_path

if TYPE_CHECKING:
    import aiohttp

PROTOCOLS = ("v5.channel.k8s.io", "v4.channel.k8s.io")  # the server takes the first that it knows
STDOUT, STDERR, STATUS = 1, 2, 3
KEPT = {STDOUT: 128 * 1024, STDERR: 8 * 1024, STATUS: 16 * 1024}  # bytes, from the beginning
MAX_READ = 16 * 1024 * 1024  # of everything; a program that says more is left
MAX_MESSAGE = 1024 * 1024
MAX_DOCUMENT = 180 * 1024  # below the sandbox's bound, so that the document stays whole
CONNECT_SECONDS = 10.0
GOODBYE_SECONDS = 1.0
NEEDED = "its role needs get and create on pods/exec: kubernetes.actions.diagnose in the chart"
UPGRADE_WANTED = "pgrade request required"  # says a server that would have let the stream begin


@dataclass
class Stream:
    """What one exec has brought. `trouble`: why it ended before the server told the exit; "" when it did tell."""

    kept: dict[int, bytearray] = field(default_factory=lambda: {channel: bytearray() for channel in KEPT})
    size: dict[int, int] = field(default_factory=lambda: dict.fromkeys(KEPT, 0))
    protocol: str = ""
    trouble: str = ""

    def take(self, message: bytes) -> None:
        """One binary message: a byte that says the channel, then data."""
        if len(message) < 2 or message[0] not in KEPT:
            return  # an empty one opens a channel; 255 closes one
        channel, data = message[0], message[1:]
        self.size[channel] += len(data)
        self.kept[channel] += data[: max(0, KEPT[channel] - len(self.kept[channel]))]

    @property
    def too_much(self) -> bool:
        return sum(self.size.values()) > MAX_READ

    def exit_code(self) -> int:
        """By the Status of the error channel. Raises ApiError with the server's words where the program did not run."""
        try:
            status = json.loads(self.kept[STATUS])
        except ValueError:
            status = None
        if not isinstance(status, dict):
            raise ApiError(f"the server's word on how it ended is no Status: {bytes(self.kept[STATUS][:200])!r}")
        if status.get("status") == "Success":
            return 0
        if status.get("reason") == "NonZeroExitCode":
            for cause in (status.get("details") or {}).get("causes") or []:
                code = str(cause.get("message", ""))
                if cause.get("reason") == "ExitCode" and code.isdecimal():
                    return int(code)
        raise ApiError(" ".join(str(status.get("message") or status).split())[:600])


def _query(container: str, argv: list[str]) -> list[tuple[str, str]]:
    asked = [("container", container), ("stdout", "true"), ("stderr", "true")]
    return asked + [("command", word) for word in argv]


def objection(api: Api, name: Name, container: str, argv: list[str]) -> ApiError | None:
    """Why the server would not let this exec begin. Asked without an upgrade, so that nothing reaches the node."""
    try:
        api.text(exec_path(name), _query(container, argv))
    except ApiError as error:
        if error.status == 403:
            return ApiError(f"{error} ({NEEDED})", 403)
        return None if error.status == 400 and UPGRADE_WANTED in str(error) else error
    return None


async def stream(
    api: Api, name: Name, container: str, argv: list[str], seconds: float, protocols: tuple[str, ...] = PROTOCOLS
) -> Stream:
    """Runs it and reads to its end, at most `seconds`. What had come when it broke off is kept. Raises ApiError where
    it did not begin."""
    import aiohttp

    url, headers, context = api.upgrade(exec_path(name), _query(container, argv))
    found = Stream()
    watched = aiohttp.TraceConfig()
    watched.on_request_redirect.append(_no_redirect)
    async with aiohttp.ClientSession(trust_env=False, trace_configs=[watched]) as session:
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                socket = await session.ws_connect(
                    url,
                    headers=headers,
                    ssl=context,
                    protocols=protocols,
                    max_msg_size=MAX_MESSAGE,
                    timeout=aiohttp.ClientWSTimeout(ws_close=GOODBYE_SECONDS),
                )
        except aiohttp.WSServerHandshakeError as error:
            why = await asyncio.to_thread(objection, api, name, container, argv)
            raise why or ApiError(f"exec in {name}: {error.status} {error.message}", error.status) from error
        except (aiohttp.ClientError, OSError) as error:  # TimeoutError is one
            raise ApiError(f"exec in {name}: {error or type(error).__name__}") from error
        try:
            found.protocol = socket.protocol or ""
            if found.protocol not in protocols:
                raise ApiError(f"exec in {name}: the server speaks none of {', '.join(protocols)}")
            await _read(socket, found, seconds)
        finally:
            await socket.close()
    return found


async def _no_redirect(*_: object) -> None:
    raise ApiError("exec: the server answers with a redirect, which is not followed")


async def _read(socket: aiohttp.ClientWebSocketResponse, found: Stream, seconds: float) -> None:
    import aiohttp

    try:
        async with asyncio.timeout(seconds):
            async for message in socket:
                if message.type is aiohttp.WSMsgType.BINARY:
                    found.take(message.data)
                elif message.type is aiohttp.WSMsgType.ERROR:
                    break
                if found.too_much:
                    found.trouble = f"more than {MAX_READ} bytes came; the rest was not waited for"
                    return
    except TimeoutError:
        found.trouble = f"no end after {seconds:g} s; it may still run in the container"
        return
    except (aiohttp.ClientError, OSError) as error:
        found.trouble = f"the connection broke: {error or type(error).__name__}"
        return
    if not found.size[STATUS]:
        why = socket.exception() or f"close code {socket.close_code}"
        found.trouble = f"the connection ended before the server told how the program ended ({why})"


# -- which container


def running(name: Name, pod: Document, wanted: str) -> tuple[str, str]:
    """(name, id of the present start) of the container. Raises Refused where none runs, or it is not said which."""
    if pod["metadata"].get("deletionTimestamp"):
        raise Refused(f"{name} is being deleted")
    containers = [c["name"] for c in pod["spec"]["containers"]]
    if wanted and wanted not in containers:
        raise Refused(f"{name} has no container {wanted}, only {', '.join(containers)}")
    if not wanted and len(containers) > 1:
        raise Refused(f"{name} has several containers: name one of {', '.join(containers)}")
    container = wanted or containers[0]
    for state in (pod.get("status") or {}).get("containerStatuses") or []:
        if state["name"] == container and "running" in (state.get("state") or {}) and state.get("containerID"):
            return container, state["containerID"]
    raise Refused(f"{name}: container {container} does not run")


def _same(name: Name, pod: Document, args: argparse.Namespace) -> None:
    if pod["metadata"]["uid"] != args.uid:
        raise Refused(f"{name} has been made anew: uid {pod['metadata']['uid']}, planned {args.uid}")
    _, start = running(name, pod, args.container)
    if start != args.start:
        raise Refused(f"{name}: container {args.container} has been started anew: {start}, planned {args.start}")


def command_of(text: str) -> list[str]:
    """An argument list as JSON. Raises ValueError."""
    argv = json.loads(text)
    if not isinstance(argv, list) or not argv or not all(isinstance(word, str) and word for word in argv):
        raise ValueError(f"{text!r:.200} is no argument list")
    return argv


# -- operations


def resolve(api: Api, args: argparse.Namespace) -> int:
    name = Name.parse(args.object)
    known = json.loads(args.diagnostics)
    if args.diagnostic not in known:
        raise Refused(f"kubernetes.diagnostics has no {args.diagnostic!r:.80}, only {', '.join(sorted(known))}")
    argv = command_of(json.dumps(known[args.diagnostic]))
    pod = api.get(name)
    container, start = running(name, pod, args.container)
    why = objection(api, name, container, argv)
    if why is not None and why.status not in (401, 403):
        raise why
    tried = "the server would accept it" if why is None else f"the server refuses it to this account: {why}"
    params = {
        "object": str(name),
        "uid": pod["metadata"]["uid"],
        "container": container,
        "start": start,
        "command": json.dumps(argv),
    }
    node = pod["spec"].get("nodeName", "no node")
    note = f"{tried}; would run {params['command']} in container {container} on {node}"
    say([{"identity": str(name), "params": params, "note": note}])
    return DONE


def run(api: Api, args: argparse.Namespace) -> int:
    """Done when the program ended with 0 in the planned container. What it said is printed whatever became of it."""
    name, argv = Name.parse(args.object), command_of(args.command)
    try:
        _same(name, api.get(name), args)
        found = asyncio.run(stream(api, name, args.container, argv, args.seconds))
    except ApiError as error:
        if 400 <= error.status < 500:  # the pod is gone, or the handshake was answered with no: nothing has begun
            raise Refused(str(error)) from error
        raise
    answer: Document = {"pod": str(name), "container": args.container, "command": argv, "protocol": found.protocol}
    try:
        _same(name, api.get(name), args)
    except (Refused, ApiError) as change:
        answer["not_certain_whose"] = str(change)
    if found.trouble:
        answer["broke_off"] = found.trouble
    else:
        try:
            answer["exit_code"] = found.exit_code()
        except ApiError as error:
            answer["did_not_run"] = str(error)
    say(bounded(answer, found))
    return DONE if answer.get("exit_code") == 0 and "not_certain_whose" not in answer else FAILED


def bounded(answer: Document, found: Stream, limit: int = MAX_DOCUMENT) -> Document:
    """The answer with both outputs, as JSON of at most `limit` bytes; `NAME_left_out` counts the bytes that are not in
    it."""
    share = 1.0
    while True:
        document = dict(answer)
        for key, channel in (("stderr", STDERR), ("stdout", STDOUT)):
            data = bytes(found.kept[channel][: int(len(found.kept[channel]) * share)])
            document[key] = data.decode(errors="replace")
            if left := found.size[channel] - len(data):
                document[f"{key}_left_out"] = left
        if len(json.dumps(document)) <= limit:
            return document
        share *= 0.8


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("operation", choices=("resolve", "run"))
    connection_options(parser)
    parser.add_argument("--container", default="")
    parser.add_argument("--diagnostics", default="{}", help="resolve: JSON, name -> argument list")
    parser.add_argument("--diagnostic", default="")
    parser.add_argument("--start", default="")
    parser.add_argument("--command", default="[]", help="run: the argument list, JSON")
    parser.add_argument("--seconds", type=float, default=30.0)
    args = parser.parse_args(argv)
    operation = {"resolve": resolve, "run": run}[args.operation]
    return guarded(args.operation, "diagnose", lambda: operation(connect(args), args))


if __name__ == "__main__":
    sys.excepthook = crashed
    sys.exit(main())
