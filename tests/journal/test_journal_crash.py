"""kill -9 at every failpoint of the log and the store: what was acknowledged is there after the restart."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from agent.journal.wal import verify
from agent.store import Store, read_state

FAILPOINTS = [
    "wal_before_write",
    "wal_after_write",
    "wal_before_sync",
    "wal_after_sync",
    "wal_before_ack",
    "wal_segment_created",
    "wal_snapshot_written",
    "wal_snapshot_renamed",
    "wal_pruned",
    "store_before_apply",
]
WRITER = Path(__file__).with_name("journal_writer.py")


def run(state_dir: Path, failpoint: str, first: int, count: int) -> tuple[list[int], int]:
    """Numbers of the records that the writer saw acknowledged, and how it ended."""
    done = subprocess.run(
        [sys.executable, str(WRITER), str(state_dir), str(first), str(count)],
        env={**os.environ, "ALERTMEDIC_FAILPOINT": failpoint},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return [int(line) for line in done.stdout.split()], done.returncode


@pytest.mark.parametrize("passage", [2, *(pytest.param(n, marks=pytest.mark.full) for n in (1, 4))])
@pytest.mark.parametrize("failpoint", FAILPOINTS)
def test_killed_at(tmp_path: Path, failpoint: str, passage: int) -> None:
    acknowledged, status = run(tmp_path, f"{failpoint}:{passage}", 0, 120)
    assert status == -signal.SIGKILL, f"{failpoint} was not passed {passage} times"
    first = set(acknowledged)
    acknowledged, status = run(tmp_path, "", 2_000, 30)
    assert status == 0
    assert len(acknowledged) == 30
    first |= set(acknowledged)
    assert verify(tmp_path / "journal").ok
    state = read_state(tmp_path)
    known = {int(fingerprint) for _, fingerprint in state.digests}
    assert first <= known
    store = Store.open(tmp_path)
    assert store.state.to_snapshot() == state.to_snapshot()
    store._wal.abandon()


def test_every_failpoint_of_these_modules_is_killed_at() -> None:
    root = Path(__file__).parents[2] / "agent"
    text = "".join(p.read_text() for p in [*(root / "journal").glob("*.py"), root / "store.py"])
    named = {line.split('"')[1] for line in text.splitlines() if line.strip().startswith('failpoint("')}
    assert named == set(FAILPOINTS)
