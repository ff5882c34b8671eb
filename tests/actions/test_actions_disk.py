"""Freeing real directories: what goes, what stays, and that no link leads out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from actions_world import Proposal, builtin, context, in_sandbox, policy

from actions import guard
from actions.builtin.free_logs import LIVE, ROTATED
from actions.catalog import load_catalog
from actions.model import Declined, Plan, Refusal
from actions.policy import AutonomyPolicy, ProtectedPolicy
from sandbox.model import RunResult

OLD = time.time() - 7200


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A directory whose whole path has no link in it."""
    made = tmp_path.resolve() / "logs"
    made.mkdir()
    return made


def log(path: Path, size: int = 50_000, modified: float = OLD) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    os.utime(path, (modified, modified))
    return path


async def free(root: Path | str, *more: str, operation: str = "run", goal: int = 0) -> RunResult:
    return await builtin("free_logs", operation, f"--root={root}", f"--goal-percent={goal}", *more)


def report(result: RunResult) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(result.stdout)
    return document


LIVE_NAMES = "a.log a.out a.err"
ROTATED_NAMES = (
    "a.log.1 a.log.12.gz a.log-20260101 a.log-20260101.gz a.log.2026-01-01_10.zst a.log.old a.log.gz a.out.3 b\n.log.1"
)
OTHER_NAMES = "a.db a.log.lock log .log a.log.conf a.txt a.sql.gz data.1 wal.000001 a.log.1.bak"


def test_which_names_are_logs() -> None:
    for name in LIVE_NAMES.split(" "):
        assert LIVE.fullmatch(name)
        assert not ROTATED.fullmatch(name)
    for name in ROTATED_NAMES.split(" "):
        assert ROTATED.fullmatch(name)
    for name in OTHER_NAMES.split(" "):
        assert not LIVE.fullmatch(name)
        assert not ROTATED.fullmatch(name)


async def test_old_rotated_files_go_and_everything_else_stays(root: Path) -> None:
    gone = [log(root / "a.log.1"), log(root / "deep" / "er" / "b.log.2.gz")]
    kept = [
        log(root / "a.log"),
        log(root / "young.log.1", modified=time.time()),
        log(root / "data.db"),
        log(root / "archive.tar.gz"),
    ]
    result = await free(root)
    assert result.ok, result
    assert report(result)["files"] == 2
    assert report(result)["freed_bytes"] >= 100_000
    assert not any(p.exists() for p in gone)
    assert all(p.exists() for p in kept)
    assert (await free(root, operation="check")).exit_code == 0  # nothing is left that could go


async def test_the_oldest_go_first_and_bounds_hold(root: Path) -> None:
    files = [log(root / f"a.log.{i}", modified=OLD - i * 100) for i in range(5)]
    result = await free(root, "--max-files=2")
    assert [d["file"] for d in report(result)["done"]] == ["a.log.4", "a.log.3"]
    result = await free(root, "--max-bytes=1")
    assert [d["file"] for d in report(result)["done"]] == ["a.log.2"]
    assert [f.exists() for f in files] == [True, True, False, False, False]


async def test_nothing_goes_when_the_disk_is_below_the_goal(root: Path) -> None:
    kept = log(root / "a.log.1")
    used = shutil.disk_usage(root)
    if used.used / used.total > 0.95:
        pytest.skip("this disk is really full")
    assert (await free(root, goal=99)).ok
    assert kept.exists()


async def test_links_are_not_followed(root: Path, tmp_path: Path) -> None:
    outside = log(tmp_path / "outside" / "precious.log.1")
    root.joinpath("link.log.1").symlink_to(outside)
    root.joinpath("directory").symlink_to(outside.parent)
    os.link(outside, root / "hard.log.1")
    assert (await free(root)).exit_code == 93  # nothing at all that may go
    assert outside.exists()
    assert (root / "hard.log.1").exists()
    assert (root / "link.log.1").is_symlink()


async def test_a_link_anywhere_on_the_way_is_refused(root: Path, tmp_path: Path) -> None:
    kept = log(root / "sub" / "a.log.1")
    way = tmp_path.resolve() / "way"
    way.symlink_to(root)
    for path in (way, way / "sub"):
        result = await free(path)
        assert result.exit_code == 1, result
    assert kept.exists()


@pytest.mark.parametrize(
    "path", ["/", "/etc", "/var", "/home", "relative", "/var/log/../../etc", "//etc", "/usr/", "/proc", "/tmp/./x"]
)
async def test_roots_that_are_none(path: str) -> None:
    result = await free(path)
    assert result.exit_code == 93, result
    assert "may not be a root" in result.stderr


async def test_a_protected_path_is_refused(root: Path) -> None:
    kept = log(root / "a.log.1")
    for glob in (str(root), str(root.parent), f"{root.parent}/*"):
        assert (await free(root, f"--protected-paths=/srv,{glob}")).exit_code == 93
    assert kept.exists()


async def test_a_protected_place_within_the_root_is_left_out(root: Path) -> None:
    kept, gone = log(root / "audit" / "deep" / "a.log.1"), log(root / "other" / "a.log.1")
    assert (await free(root, f"--protected-paths={root}/audit")).ok
    assert kept.exists()
    assert not gone.exists()


async def test_another_directory_of_the_same_name_is_refused(root: Path) -> None:
    info = root.stat()
    identity = f"--root-id={info.st_dev}:{info.st_ino}"
    root.rename(root.parent / "moved")
    kept = log(root / "a.log.1")
    assert (await free(root, identity)).exit_code == 93
    assert kept.exists()
    assert (await free(root.parent / "moved", identity, operation="check")).exit_code == 0


async def test_a_file_that_somebody_writes_to_stays(root: Path) -> None:
    busy, idle = log(root / "busy.log.1"), log(root / "idle.log.1")
    with busy.open("ab"), idle.open("rb"):
        result = await free(root)
    assert result.ok
    assert [k["why"] for k in report(result)["kept"]] == ["somebody may be writing to it"]
    assert busy.exists()
    assert not idle.exists()


async def test_a_live_log_is_emptied_only_when_asked_and_its_end_is_kept(root: Path) -> None:
    live = root / "a.log"
    with live.open("ab") as writer:
        writer.write(b"line\n" * 100_000 + b"the last line\n")
        writer.flush()
        assert (await free(root)).exit_code == 93
        assert live.stat().st_size > 400_000
        result = await free(root, "--truncate=yes")
        assert result.ok, result
        assert report(result)["done"][0]["how"] == "truncated"
        writer.write(b"and on\n")
    assert live.read_bytes() == b"and on\n"
    (tail,) = root.glob("a.log.*")
    assert tail.read_bytes().endswith(b"the last line\n")
    assert tail.stat().st_size == 64 * 1024


async def test_names_that_are_no_text_do_no_harm(root: Path) -> None:
    odd = os.fsencode(root) + b"/\xff\n.log.1"
    with open(odd, "wb") as file:  # noqa: PTH123 - bytes
        file.write(b"x" * 10_000)
    os.utime(odd, (OLD, OLD))
    result = await free(root)
    assert result.ok, result
    assert not os.path.exists(odd)  # noqa: PTH110 - bytes
    assert report(result)["files"] == 1


async def test_another_file_system_is_not_entered(root: Path) -> None:
    inner = root / "mounted"
    inner.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "none", inner], check=False).returncode:
        pytest.skip("needs the right to mount (run as root)")
    try:
        kept, gone = log(inner / "a.log.1"), log(root / "a.log.1")
        assert (await free(root)).ok
        assert kept.exists()
        assert not gone.exists()
    finally:
        subprocess.run(["umount", inner], check=True)


async def test_a_file_that_is_mounted_from_elsewhere_stays(root: Path, tmp_path: Path) -> None:
    outside, place, gone = log(tmp_path / "precious"), log(root / "a.log", 0), log(root / "b.log.1")
    mount = ["mount", "--bind", outside, place]
    if os.geteuid() != 0 or subprocess.run(mount, check=False).returncode:
        pytest.skip("needs the right to mount (run as root)")
    try:
        outside.write_bytes(b"x" * 500_000)
        assert (await free(root, "--truncate=yes")).ok
        assert outside.stat().st_size == 500_000
        assert not gone.exists()
    finally:
        subprocess.run(["umount", place], check=True)


async def test_a_really_full_disk_is_freed_to_its_goal(root: Path) -> None:
    if (
        os.geteuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", root], check=False).returncode
    ):
        pytest.skip("needs the right to mount (run as root)")
    try:
        for i in range(15):
            log(root / f"a.log.{i}", size=256 * 1024, modified=OLD + i)
        before = report(await free(root, operation="check", goal=50))
        assert before["used_percent"] > 90
        result = await free(root, goal=50)
        assert result.ok
        assert 40 < report(result)["used_percent"]["after"] < 50
        assert report(await free(root, operation="check", goal=50))["used_percent"] < 50
    finally:
        subprocess.run(["umount", root], check=True)


async def test_the_plan_waits_for_a_person_and_names_the_directory(root: Path) -> None:
    log(root / "a.log.1")
    world = context(inventory={"front": {"log_root": str(root)}}, targets=(), values={})
    proposal = Proposal(action="disk.free_logs", service="front", params={"goal_percent": 0})
    made = await guard.consider(proposal, load_catalog(), world, in_sandbox)
    assert isinstance(made, Plan), made
    assert (made.autonomy, made.demoted_by) == ("approve", (Refusal.NOT_AUTO,))
    assert made.steps[0].target == f"root={root}"
    assert f"--root-id={root.stat().st_dev}:{root.stat().st_ino}" in made.steps[0].argv
    assert "1 log file(s)" in made.notes[1]
    protected = policy(autonomy=AutonomyPolicy(default="auto"), protected=ProtectedPolicy(paths=(f"{root.parent}*",)))
    answer = await guard.consider(
        proposal,
        load_catalog(),
        context(inventory=world.inventory, targets=(), values={}, policy=protected),
        in_sandbox,
    )
    assert isinstance(answer, Declined)
    assert answer.reason is Refusal.PROTECTED_TARGET
