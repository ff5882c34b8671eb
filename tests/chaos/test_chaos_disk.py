"""Small disks are really full, and end with the world that mounted them; what cannot be injected here is void."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from agent.chaos import disk
from agent.chaos import follow as following
from agent.chaos.arms import Doings
from agent.chaos.faults import known
from agent.chaos.follow import Job, follow
from agent.chaos.isolation import enclosed, obstacle
from agent.chaos.scenario import load_scenarios
from agent.chaos.workload import CannotInjectError
from agent.chaos.world import HARNESS_FAULTS
from agent.demo.probe import Probe

IN_A_WORLD = """
import asyncio, sys
from pathlib import Path
from agent.chaos import disk

async def main():
    place = Path(sys.argv[1])
    print(disk.obstacle(), flush=True)
    at = place / "small"
    at.mkdir()
    await disk.mount(place / "image", at, 8)
    first = disk.fill(at / "one", 1024 * 1024)
    rest = disk.fill(at / "two")
    print(first, rest, disk.fill(at / "three"), flush=True)
    (at / "one").unlink()
    print(disk.fill(at / "three"), flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def backing_files() -> set[str]:
    """Of all loop devices of this machine."""
    found = set()
    for file in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            found.add(file.read_text().strip())
        except OSError:  # it is being taken down
            continue
    return found


def test_a_small_disk_is_full_to_the_last_byte_and_ends_with_its_world(
    tmp_path: Path, program: Callable[[str, str], str]
) -> None:
    if os.geteuid() != 0 or obstacle():
        pytest.skip(f"worlds of their own need root and namespaces: {obstacle()}")
    program("mkfs.ext4", "e2fsprogs")
    child = subprocess.Popen(
        enclosed((sys.executable, "-c", IN_A_WORLD, str(tmp_path))),
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline().strip() == ""
        first, rest, after = map(int, child.stdout.readline().split())
        assert first == 1024 * 1024
        assert 4 * 1024 * 1024 < rest < 8 * 1024 * 1024
        assert after == 0
        assert int(child.stdout.readline()) > 0
        assert str(tmp_path / "image") in backing_files()
        assert not list((tmp_path / "small").iterdir())  # it is not mounted where we are
    finally:
        child.kill()
        child.wait()
    deadline = time.monotonic() + 20
    while str(tmp_path / "image") in backing_files() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert str(tmp_path / "image") not in backing_files()


def test_without_a_world_of_its_own_nothing_is_mounted() -> None:
    assert disk.obstacle()


class Unable:
    """A workload in which nothing can be injected."""

    def __init__(self) -> None:
        self.probe, self.browse = Probe("http://127.0.0.1:9/"), Probe("http://127.0.0.1:9/")
        self.cleared: list[str] = []

    def check(self) -> None: ...
    async def quiet(self, seconds: float, patience: float) -> None: ...
    async def kill_agent(self) -> None: ...

    async def alerts(self) -> dict[str, float]:
        return {}

    async def agent_incidents(self) -> list[dict[str, Any]]:
        return []

    async def inject(self, fault: str, settings: Mapping[str, float]) -> float:
        raise CannotInjectError(f"{fault} cannot be made here")

    async def clear(self, fault: str) -> None:
        self.cleared.append(fault)


async def test_what_cannot_be_injected_is_void_and_the_next_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "CONTROL_SECONDS", 0.0)
    scenario = load_scenarios(None, known() | HARNESS_FAULTS)["disk_full"]
    workload = Unable()
    run = await follow(workload, Job(scenario, "nothing", 1, 1), Doings())
    assert run.void == "disk_full cannot be made here"
    assert workload.cleared == ["disk_full"]
