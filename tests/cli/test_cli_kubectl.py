"""`kubectl alertmedic` against a real running service; kubectl is a stand-in that forwards a port as kubectl does."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_world import Done, Service, awaiting_approval, environment

from agent.store import Store, read_state

KUBECTL = """#!{python}
import asyncio, sys
assert sys.argv[1:-2] == ["port-forward", "--namespace", "ops", "--address", "127.0.0.1"], sys.argv
assert sys.argv[-2:] == ["service/alertmedic", ":9095"], sys.argv

async def pump(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()

async def serve(reader, writer):
    there, back = await asyncio.open_connection("127.0.0.1", {port})
    await asyncio.gather(pump(reader, back), pump(there, writer))

async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print("Forwarding from 127.0.0.1:%d -> 9095" % server.sockets[0].getsockname()[1], flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def plugin(*arguments: str | Path, **env: str) -> Done:
    done = subprocess.run(
        [sys.executable, "-m", "agent.kubectl", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment(**env),
    )
    assert "Traceback" not in done.stderr, done.stderr
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def world(tmp_path: Path, serving: Callable[..., Service]) -> tuple[Service, str, Path]:
    """A service with a plan that waits, its incident, and a kubectl that leads to it."""

    async def write() -> str:
        store = Store.open(tmp_path / "state")
        made = await awaiting_approval(store)
        await store.close()
        return made

    id = asyncio.run(write())
    for name in ("on-call", "viewer"):
        (tmp_path / name).write_text(f"token-{name}\n")
    bearer = "".join(
        f"\n    - {{name: {n}, token_file: {tmp_path / n}, scopes: {s}}}"
        for n, s in (("on-call", "[read, approve]"), ("viewer", "[read]"))
    )
    (tmp_path / "config.yaml").write_text(f"auth:\n  bearer:{bearer}\n")
    service = serving(tmp_path / "state", "--config", str(tmp_path / "config.yaml"))
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(KUBECTL.format(python=sys.executable, port=service.port))
    kubectl.chmod(0o755)
    return service, id, kubectl


def test_incidents_are_listed_and_a_plan_approved(world: tuple[Service, str, Path], tmp_path: Path) -> None:
    service, id, kubectl = world
    through = ("-n", "ops", "--kubectl", kubectl)
    listed = plugin(*through, "--token-file", tmp_path / "viewer", "incidents")
    assert listed.code == 0, listed.err
    assert id in listed.out
    refused = plugin(*through, "--token-file", tmp_path / "viewer", "approve", id)
    assert refused.code == 1
    assert "lacks the scope 'approve'" in refused.err
    done = plugin(*through, "--token-file", tmp_path / "on-call", "--json", "approve", id, "--note", "from here")
    assert done.code == 0, done.err
    assert json.loads(done.out)["outcome"] == "approved"
    assert service.stop() == 0
    (given,) = read_state(service.state_dir).incidents[id].approvals
    assert (given.note, given.counted) == ("from here", True)
    assert "on-call" in given.who, "the token's name is in the journal"


def test_a_url_needs_no_kubectl(world: tuple[Service, str, Path]) -> None:
    service, id, _ = world
    url = ("--url", f"http://127.0.0.1:{service.port}", "--kubectl", "/none")
    shown = plugin(*url, "incidents", id, ALERTMEDIC_TOKEN="token-viewer")
    assert shown.code == 0, shown.err
    assert json.loads(shown.out)["id"] == id
    assert plugin(*url, "pause", ALERTMEDIC_TOKEN="token-on-call").code == 0
    assert "401" in plugin(*url, "incidents", ALERTMEDIC_TOKEN="guess").err


def test_what_kubectl_says_is_passed_on(tmp_path: Path) -> None:
    kubectl = tmp_path / "kubectl"
    kubectl.write_text("#!/bin/sh\necho 'services \"alertmedic\" not found' >&2\nexit 1\n")
    kubectl.chmod(0o755)
    done = plugin("--kubectl", kubectl, "incidents")
    assert done.code == 1
    assert 'services "alertmedic" not found' in done.err
    assert plugin("--kubectl", "/none", "incidents").code == 1
