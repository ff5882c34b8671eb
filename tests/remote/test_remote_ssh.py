"""Steps on another host, through a real sshd."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec
import pytest
from ssh_world import ROOT, Sshd

from agent.remote import Executors, RemoteLost
from agent.remote_protocol import BadRequest, Run, line, read_request
from sandbox import EnforcedBy, Limits, Needs, RunResult

LIMITS = Limits(timeout_seconds=30, memory_bytes=512 << 20)


@pytest.fixture(scope="module")
def sshd(program: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    server = Sshd(tmp_path_factory.mktemp("sshd"), program("sshd", "openssh-server"), port)
    program("ssh", "openssh-client")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def there(sshd: Sshd) -> Executors:
    return Executors({"web-1": sshd.host()})


async def test_a_step_runs_there_within_its_limits(there: Executors) -> None:
    hostile = ["$(touch pwned)", "; id", "a b\n'\"", "-x", "é", "", "`id`", "*"]
    script = "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ.get('EXTRA'), os.getcwd()]))"
    result = await there.run(
        [sys.executable, "-c", script, *hostile], LIMITS, env={"EXTRA": "x y"}, host="web-1", leaf=there.leaf_name("x")
    )
    assert result.error == "", result
    arguments, extra, directory = json.loads(result.stdout)
    assert (arguments, extra) == (hostile, "x y")
    assert "/alertmedic-remote-" in directory
    assert result.layers
    late = await there.run(["sleep", "60"], Limits(timeout_seconds=0.5), host="web-1")
    assert (late.timed_out, late.signal) == (True, 9)


async def test_secrets_travel_by_descriptor_and_do_not_come_back(there: Executors) -> None:
    result = await there.run(
        ["/bin/sh", "-c", "cat /dev/fd/$TOKEN_FD; env"], LIMITS, secrets={"TOKEN": "hush-hush"}, host="web-1"
    )
    assert result.stdout.startswith("[secret]")
    assert "hush" not in result.stdout


async def test_the_host_says_what_holds_steps_there(there: Executors) -> None:
    assert there.enforced_by("web-1") is EnforcedBy.RLIMITS, "nothing is taken for enforced before it was asked"
    found = await there.probe("web-1")
    assert "no-new-privs" in found.layers
    await there.learn_enforcement("web-1")
    assert there.enforced_by("web-1") is found.enforced_by


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"port": 1}, "Connection refused"),
        ({"identity_file": "stranger"}, "Permission denied"),
        ({"known_hosts": "nobody"}, "Host key verification failed"),
    ],
)
async def test_what_never_said_hello_never_ran(sshd: Sshd, changes: dict[str, object], words: str) -> None:
    (sshd.directory / "nobody").touch()
    paths: Mapping[str, object] = {k: sshd.directory / v if isinstance(v, str) else v for k, v in changes.items()}
    executors = Executors({"web-1": sshd.host(**paths)})
    result = await executors.run(["true"], LIMITS, host="web-1")
    assert result.exit_code is None
    assert words in result.error
    assert await executors.kill_leaf(executors.leaf_name("web-1"), 1.0, "web-1") is False


async def test_a_host_that_is_not_configured_is_refused(there: Executors) -> None:
    assert "no such host is configured" in (await there.run(["true"], LIMITS, host="web-9")).error


async def test_the_key_can_do_nothing_else(sshd: Sshd, there: Executors) -> None:
    """ForceCommand: whatever the client names, `alertmedic sandbox run` is what runs."""
    other = Executors({"web-1": sshd.host(command="touch /tmp/forced-otherwise")})
    assert (await other.run(["echo", "still in the sandbox"], LIMITS, host="web-1")).stdout == "still in the sandbox\n"
    assert not Path("/tmp/forced-otherwise").exists()


def _has_leaves() -> bool:
    import sandbox

    return sandbox.current().root is not None


@pytest.mark.skipif(not _has_leaves(), reason="no cgroup v2 tree here")
async def test_a_lost_connection_is_unknown_and_a_new_one_makes_certain(
    sshd: Sshd, there: Executors, tmp_path: Path
) -> None:
    leaf, mark = there.leaf_name("web-1"), tmp_path / "mark"
    step = asyncio.create_task(
        there.run(
            ["/bin/sh", "-c", f"echo $$ > {mark}; exec sleep 300"], Limits(timeout_seconds=300), host="web-1", leaf=leaf
        )
    )
    await _until(lambda: mark.exists() and mark.read_text().endswith("\n"))
    sshd.cut()
    with pytest.raises(RemoteLost):
        await step
    pid = int(mark.read_text())
    assert Path(f"/proc/{pid}").exists(), "the connection is gone, the step is not"
    assert await there.kill_leaf(leaf, 10.0, "web-1") is True
    await _until(lambda: not Path(f"/proc/{pid}").exists())
    again = await there.run(["true"], LIMITS, host="web-1", leaf=leaf)
    assert "begun or forbidden" in again.error, "a name is good for one run"


@pytest.mark.skipif(not _has_leaves(), reason="no cgroup v2 tree here")
async def test_a_killed_run_that_had_not_begun_never_begins(there: Executors, tmp_path: Path) -> None:
    leaf = there.leaf_name("web-1")
    assert await there.kill_leaf(leaf, 5.0, "web-1") is True
    result = await there.run(["touch", str(tmp_path / "ran")], LIMITS, host="web-1", leaf=leaf)
    assert "begun or forbidden" in result.error
    assert not (tmp_path / "ran").exists()


async def test_many_hosts_in_batches_until_one_fails(there: Executors) -> None:
    running: set[str] = set()
    most = 0

    async def do(host: str) -> RunResult:
        nonlocal most
        running.add(host)
        most = max(most, len(running))
        await asyncio.sleep(0)
        running.discard(host)
        if host == "h4":
            raise RemoteLost("h4: lost")
        return RunResult(exit_code=1 if host == "h3" else 0)

    results = await there.on_many([f"h{i}" for i in range(8)], do, batch=2)
    assert [r.ok for r in results[:4]] == [True, True, True, False]
    assert [r.problem for r in results[4:]] == ["not begun: an earlier batch failed"] * 4
    assert most == 2
    lost = await there.on_many(["h4", "h5", "h6"], do, batch=2)
    assert [r.problem for r in lost] == ["h4: lost", "", "not begun: an earlier batch failed"]
    with pytest.raises(ValueError, match="batch of 0"):
        await there.on_many(["h1"], do, batch=0)


def test_the_command_runs_on_configured_hosts(sshd: Sshd, tmp_path: Path) -> None:
    entry = sshd.host()
    host = {k: str(v) if isinstance(v, Path) else v for k, v in msgspec.structs.asdict(entry).items()}
    (tmp_path / "config.yaml").write_text(json.dumps({"hosts": {"a": host, "b": {**host, "port": 1}, "c": host}}))
    command = [sys.executable, "-m", "agent", "sandbox", "on", "--config", str(tmp_path / "config.yaml")]
    command += ["--host", "a", "--host", "b", "--host", "c", "--", "echo", "-n", "hi"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    a, b, c = msgspec.json.decode("[" + done.stdout.replace("}\n{", "},{") + "]")
    assert done.returncode == 1
    assert a["result"]["stdout"] == "hi"
    assert "cannot be reached" in b["problem"]
    assert c == {"host": "c", "problem": "not begun: an earlier batch failed", "result": None}


GOOD = {"do": "run", "argv": ["true"], "leaf": "remote-" + "0" * 24}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shell": True}, "shell"),
        ({"limits": {"memory": 5}}, "limits.memory"),
        ({"needs": {"netwrok": "none"}}, "needs.netwrok"),
        ({"leaf": "../../etc"}, "leaf"),
        ({"leaf": "run-1-2-3-abc"}, "leaf"),
        ({"argv": "true"}, "argv"),
        ({"do": "eval"}, "eval"),
    ],
)
def test_a_request_with_anything_unknown_is_refused(change: dict[str, object], words: str) -> None:
    assert read_request(json.dumps(GOOD).encode()).leaf == GOOD["leaf"]
    with pytest.raises(BadRequest, match=words):
        read_request(json.dumps({**GOOD, **change}).encode())


def test_requests_round_trip() -> None:
    request = Run(argv=("a", "b"), leaf="remote-" + "a" * 24, needs=Needs(network="none"), secrets={"X": "y"})
    assert read_request(line(request)) == request


def alertmedic(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "agent", "sandbox", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, cwd=ROOT, timeout=60)


def test_the_command_line_runs_and_probes() -> None:
    done = alertmedic("run", "--limits", '{"timeout_seconds": 30}', "--", "/bin/sh", "-c", "echo $0", "a b")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["stdout"] == "a b\n"
    assert alertmedic("run", "--", "false").returncode == 1
    wrong = alertmedic("run", "--limits", '{"memory": 1}', "--", "true")
    assert (wrong.returncode, b"memory: no such key" in wrong.stderr) == (2, True)
    probed = alertmedic("probe", "--json")
    found = json.loads(probed.stdout)
    assert found["enforced_by"] in [e.value for e in EnforcedBy]
    assert probed.returncode == (0 if found["enforced_by"] == "cgroup2" else 1)
    assert bool(found.get("reason")) == bool(probed.returncode)
    text = alertmedic("probe").stdout.decode()
    assert text.startswith("limits: ")


def test_a_request_on_standard_input(tmp_path: Path) -> None:
    request = {**GOOD, "leaf": "remote-" + os.urandom(12).hex(), "argv": ["echo", "hello"]}
    done = alertmedic("run", stdin=json.dumps(request).encode() + b"\n")
    hello, answer = (json.loads(text) for text in done.stdout.splitlines())
    assert hello["protocol"] == 1
    assert answer["stdout"] == "hello\n"
    refused = alertmedic("run", stdin=b'{"do": "run", "argv": ["true"], "surprise": 1}\n')
    assert refused.returncode == 1
    assert "surprise" in json.loads(refused.stdout.splitlines()[1])["refused"]


async def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
