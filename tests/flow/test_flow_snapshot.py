"""What is kept right before a step: real processes, sockets, limits, logs; whole or not at all, bounded, pruned."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actions.model import Plan, Step
from agent import snapshot
from agent.snapshot import FaultSnapshots, SnapshotError, masked, read

NOW = 1_800_000_000.0
SERVICE = """
import resource, socket, subprocess, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (77, 77))
s = socket.create_server(("127.0.0.1", int(sys.argv[1])))
child = subprocess.Popen(["sleep", "600"])
print("ready", flush=True)
child.wait()
"""


def plan(**params: Any) -> Plan:
    step = Step(
        action="service.restart", version=1, target="program=front", argv=("true",), undo=("undo", "it"), params=params
    )
    return Plan(
        id="plan-a", incident="inc-a", service="front", cause="c", steps=(step,), autonomy="auto", made_at=NOW,
        expires_at=NOW + 900,
    )  # fmt: skip


@pytest.fixture
def port() -> Iterator[int]:
    """A service with a child, a listening socket and limits of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number: int = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-c", SERVICE, str(number)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield number
    for child in subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split():
        os.kill(int(child), 9)
    process.kill()
    process.wait()


async def test_the_service_as_it_was_before_the_step(port: int, tmp_path: Path) -> None:
    log = tmp_path / "front.log"
    log.write_text(
        "".join(f"line {n}\n" for n in range(100)) + "login password=hunter2 Authorization: Bearer abc.def\n"
    )
    missing = tmp_path / "no.log"
    link = tmp_path / "link.log"
    link.symlink_to("/etc/passwd")

    async def series(_: Plan) -> dict[str, Any]:
        return {"series": {"up": [(NOW, 1.0)]}}

    kept = FaultSnapshots(
        tmp_path / "snapshots",
        {"front": {"listen_port": str(port)}},
        lambda: NOW,
        logs={"front": (str(log), str(missing), str(link))},
        evidence=series,
    )
    name = await kept.take(plan(), 0)
    body = read(tmp_path / "snapshots" / name)
    assert (body["incident"], body["digest"]) == ("inc-a", plan().digest)
    assert body["undo"]["argv"] == ["undo", "it"]
    parent, child = body["processes"]
    assert parent["limits"]["nofile"] == [77, 77]
    assert parent["sockets"] == 1
    assert parent["fds"] >= 4
    assert (child["ppid"], child["name"]) == (parent["pid"], "sleep")
    assert set(body["cgroups"]) == {parent["cgroup"], child["cgroup"]}
    lines = body["logs"][str(log)]["lines"]
    assert (lines[-2], lines[-1]) == ("line 99", "login password=*** Authorization: Bearer ***")
    assert "missing" in body["logs"][str(missing)]
    assert "missing" in body["logs"][str(link)]  # no link is followed
    assert body["evidence"]["series"] == {"up": [[NOW, 1.0]]}
    assert (tmp_path / "snapshots" / name).stat().st_mode & 0o077 == 0


async def test_evidence_that_does_not_come_is_said_and_does_not_hold_the_step_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "EVIDENCE_SECONDS", 0.01)

    async def never(_: Plan) -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    kept = FaultSnapshots(tmp_path, {}, lambda: NOW, evidence=never)
    assert "TimeoutError" in read(tmp_path / await kept.take(plan(), 0))["evidence"]["missing"]


async def test_a_snapshot_is_bounded_and_keeps_what_undoing_needs(tmp_path: Path) -> None:
    async def much(_: Plan) -> dict[str, Any]:
        return {"series": "x" * snapshot.MAX_BYTES}

    kept = FaultSnapshots(tmp_path, {}, lambda: NOW, evidence=much)
    path = tmp_path / await kept.take(plan(pid=os.getpid()), 0)
    assert path.stat().st_size <= snapshot.MAX_BYTES + 9
    body = read(path)
    assert "too large" in body["evidence"]["missing"]
    assert body["undo"]["params"] == {"pid": os.getpid()}
    assert body["processes"]


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_no_changed_or_cut_file_is_taken_for_a_snapshot(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("kept")
    path = directory / asyncio.run(FaultSnapshots(directory, {}, lambda: NOW).take(plan(), 0))
    whole = path.read_bytes()
    at = data.draw(st.integers(0, 2**20)) % len(whole)  # the host's load makes the length another each time
    changed = whole[:at] if data.draw(st.booleans()) else whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    path.write_bytes(changed)
    with pytest.raises(SnapshotError):
        read(path)


async def test_a_whole_file_of_another_step_is_not_the_one_that_the_journal_names(tmp_path: Path) -> None:
    kept = FaultSnapshots(tmp_path, {}, lambda: NOW)
    one = await kept.take(plan(), 0)
    other = await kept.take(plan(pid=1), 0)
    assert one != other
    (tmp_path / one).write_bytes((tmp_path / other).read_bytes())
    with pytest.raises(SnapshotError, match="replaced"):
        read(tmp_path / one)


async def test_the_oldest_go_by_age_number_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    kept = FaultSnapshots(tmp_path, {}, lambda: now, keep_seconds=1000.0)
    for n in range(6):
        path = tmp_path / f"plan-{n}.snap"
        path.write_bytes(b"x" * 100)
        os.utime(path, (now - n, now - n))
    old = tmp_path / "old.snap"
    old.touch()
    os.utime(old, (now - 2000, now - 2000))
    left = tmp_path / "crashed.part"
    left.touch()
    os.utime(left, (now - 2000, now - 2000))
    assert kept.prune() == 2
    monkeypatch.setattr(snapshot, "KEPT", 4)
    assert kept.prune() == 2
    monkeypatch.setattr(snapshot, "KEPT_BYTES", 250)
    assert kept.prune() == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan-0.snap", "plan-1.snap"]


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("password=hunter2 next", "password=*** next"),
        ('{"token": "abc", "n": 1}', '{"token": "***", "n": 1}'),
        ("postgres://ann:s3cret@db/x", "postgres://ann:***@db/x"),
        ("nothing to hide", "nothing to hide"),
    ],
)
def test_what_reads_like_a_secret_is_masked(line: str, shown: str) -> None:
    assert masked(line) == shown
