"""A disk is slow for the processes that are told, also for those that they start later, and for nobody else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.chaos import throttle
from agent.chaos.isolation import enclosed, obstacle

WRITES = 20
IN_A_WORLD = f"""
import asyncio, os, select, subprocess, sys
from pathlib import Path
from agent.chaos import disk
from agent.chaos.throttle import PREFIX, Throttle, hierarchy

WRITER = '''
import os, sys
with open(sys.argv[1], "ab", buffering=0) as file:
    for _ in range({WRITES}):
        file.write(b"x" * 4096)
        os.fsync(file.fileno())
print("done", flush=True)
'''

def starter(file):
    "A shell that starts the writer once it is told to, and stays."
    command = 'read line; "$0" -c "$1" "$2"; read line'
    return subprocess.Popen(
        ["/bin/sh", "-c", command, sys.executable, WRITER, str(file)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )

def tell(process):
    process.stdin.write("go\\n")
    process.stdin.flush()

def cgroups(process):
    return Path(f"/proc/{{process.pid}}/cgroup").read_text()

async def main():
    at = Path(sys.argv[1]) / "small"
    at.mkdir()
    await disk.mount(Path(sys.argv[1]) / "image", at, 8)
    (hierarchy().root / f"{{PREFIX}}abandoned").mkdir(exist_ok=True)
    slow, usual = starter(at / "slow"), starter(at / "usual")
    home = cgroups(slow)
    bound = Throttle.of(at, slow.pid, 1)
    moved = cgroups(slow) != home and cgroups(usual) == home
    tell(slow)
    tell(usual)
    first = usual.stdout.readline().strip()
    late = not select.select([slow.stdout], [], [], 0)[0]
    bound.end()
    then = slow.stdout.readline().strip()
    left = [found.name for found in hierarchy().root.glob(f"{{PREFIX}}*")]
    print(moved, first, late, then, cgroups(slow) == home, bound.cgroup.name in left, f"{{PREFIX}}abandoned" in left)
    slow.kill()
    usual.kill()

asyncio.run(main())
"""


def test_only_who_is_told_waits_for_the_disk(tmp_path: Path, program: Callable[[str, str], str]) -> None:
    if os.geteuid() != 0 or obstacle() or throttle.obstacle():
        pytest.skip(f"needs root, namespaces and a cgroup for disks: {obstacle() or throttle.obstacle()}")
    program("mkfs.ext4", "e2fsprogs")
    told = subprocess.run(
        enclosed((sys.executable, "-c", IN_A_WORLD, str(tmp_path))),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    ).stdout.split()
    assert told == ["True", "done", "True", "done", "True", "False", "False"]


def test_where_no_cgroup_bounds_a_disk_the_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = throttle.Hierarchy(tmp_path / "none", "blkio", "x", "")
    v2 = throttle.Hierarchy(tmp_path, "", "io.max", "")
    (tmp_path / "cgroup.subtree_control").write_text("cpu memory pids\n")
    monkeypatch.setattr(throttle, "V1", nowhere)
    monkeypatch.setattr(throttle, "V2", (v2,))
    assert "subtree_control" in throttle.obstacle()
    with pytest.raises(OSError, match="only root"):
        throttle.Throttle.of(tmp_path, os.getpid(), 1)
    (tmp_path / "cgroup.subtree_control").write_text("cpu io memory pids\n")
    assert throttle.obstacle() == ""
    assert throttle.hierarchy() == v2
