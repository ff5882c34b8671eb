"""A disk that is really full, and a file that may really not grow: refused, rolled back, working again."""

from __future__ import annotations

import asyncio
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from journal_kit import alert, note, read, received

from agent.journal.records import PauseSet
from agent.journal.wal import JournalUnavailable, Wal, verify
from agent.store import Store, read_state


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 1 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=0700", "tmpfs", str(mount)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        message = f"cannot mount a tmpfs: {done.stderr.strip()}; run the tests as root (with CAP_SYS_ADMIN)"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    try:
        yield mount
    finally:
        # Lazily: a test that failed may still have files open there, and the mount must not outlive it.
        subprocess.run(["umount", "-l", str(mount)], check=True)


async def test_full_disk(small_disk: Path) -> None:
    wal = Wal.open(small_disk / "j", segment_bytes=200_000)
    acknowledged = 0

    async def fill() -> None:
        nonlocal acknowledged
        while True:
            await wal.append([note(acknowledged, 8_000)])
            acknowledged += 1

    with pytest.raises(JournalUnavailable, match="No space left on device"):
        await fill()
    assert 50 < acknowledged < 200
    assert verify(small_disk / "j").torn == ""
    with pytest.raises(JournalUnavailable):
        await wal.append([note(0, 8_000)])
    assert not list((small_disk / "j").glob("*.tmp"))
    await wal.close()
    assert len(read(small_disk / "j")) == acknowledged


async def test_space_that_comes_back(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(700_000))
    store = Store.open(small_disk)
    kept = refused = 0
    for n in range(100):
        try:
            await store.record(received(alert(f"f{n}", name="A" * 8_000), at=float(n)))
            kept += 1
        except JournalUnavailable:
            refused += 1
            ballast.unlink(missing_ok=True)
    assert refused == 1
    assert kept == 99
    assert store.state.seq == 99
    await store.close()
    assert read_state(small_disk).seq == 99
    assert sum(i.state == "open" for i in read_state(small_disk).active()) >= 1


async def test_full_disk_stops_no_snapshotless_store(small_disk: Path) -> None:
    """No room for a snapshot: the store says so and goes on."""
    store = Store.open(small_disk)  # no snapshot of its own accord while the disk is being filled
    for n in range(60):
        await store.record(received(alert(f"f{n}", name="A" * 4_000), at=float(n)))
    ballast = small_disk / "ballast"
    with ballast.open("wb") as file:
        size = os.statvfs(small_disk)
        file.write(bytes(max(0, size.f_bavail * size.f_frsize - 16_384)))
    with pytest.raises(JournalUnavailable, match="No space left"):
        await store.snapshot()
    assert store.snapshot_problem
    await store.record(PauseSet(at=1.0, paused=True, who="me"))
    ballast.unlink()
    await store.snapshot()
    assert store.snapshot_problem == ""
    await store.close()


async def test_file_size_limit(tmp_path: Path) -> None:
    """RLIMIT_FSIZE: EFBIG in the middle of a write, without any privilege."""
    wal = Wal.open(tmp_path / "j")
    await wal.append([note(1)])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        outcomes = await asyncio.gather(*(wal.append([note(n, 1000)]) for n in range(9)), return_exceptions=True)
        assert all(isinstance(o, JournalUnavailable) for o in outcomes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    [stored] = await wal.append([note(2, 10_000)])
    assert stored.seq == 2
    await wal.close()
    assert [s.record for s in read(tmp_path / "j")] == [note(1), note(2, 10_000)]
