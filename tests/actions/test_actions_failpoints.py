"""kill -9 at every failpoint of guard and runner, with real processes: nothing is done twice, and the plan ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import sandbox

HERE = Path(__file__).parent
FORWARD = [
    "guard_after_plan",
    "runner_before_intent",
    "runner_after_intent",
    "runner_after_run",
    "runner_before_result",
    "runner_after_result",
    "runner_before_verify",
    "runner_after_verify",
    "sandbox_before_spawn",
    "sandbox_after_spawn",
    "sandbox_after_exit",
    "sandbox_before_cleanup",
]
BACKWARD = ["runner_before_undo", "runner_after_undo_intent", "runner_after_undo", "sandbox_after_spawn:2"]


def start(directory: Path, verdict: str, failpoint: str = "") -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "ALERTMEDIC_FAILPOINT": failpoint,
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent / "worlds")]),
    }
    victim = [sys.executable, str(HERE / "actions_victim.py"), str(directory), verdict]
    return subprocess.run(victim, env=environment, capture_output=True, text=True, timeout=60, check=False)


def lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.parametrize(
    ("failpoint", "verdict"), [*((f, "helps") for f in FORWARD), *((f, "fails") for f in [*FORWARD, *BACKWARD])]
)
def test_a_kill_neither_loses_nor_repeats(tmp_path: Path, failpoint: str, verdict: str) -> None:
    killed = start(tmp_path, verdict, failpoint)
    assert killed.returncode == -signal.SIGKILL, killed
    again = start(tmp_path, verdict)
    assert again.returncode == 0, again.stderr
    result, state = again.stdout.split()
    effects, undone = lines(tmp_path / "effects"), lines(tmp_path / "undone")
    assert effects <= 1
    assert undone <= effects
    if result == "handed_over":
        # Only honest where the host cannot tell whether the old run is alive.
        assert sandbox.current().root is None
        return
    assert (result, effects, undone) == (("verified", 1, 0) if verdict == "helps" else ("undone", 1, 1))
    assert state == result
    third = start(tmp_path, verdict)  # an ended plan stays ended
    assert (third.stdout, lines(tmp_path / "effects")) == (again.stdout, effects)
