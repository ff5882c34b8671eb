"""verify says what is wrong; repair loses as little as can be, says what, and keeps copies."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from journal_kit import copy_of, note, read, reopen, segments, write

from agent.journal import segment as bytes_of
from agent.journal.records import Noted
from agent.journal.wal import JournalCorrupt, JournalLocked, Wal, repair, verify


def spoil(path: Path, record: int) -> None:
    """Change a byte in the middle of that record's body."""
    frames = {f.seq: f for f in bytes_of.SegmentReader(path, last=True).frames()}
    data = bytearray(path.read_bytes())
    data[frames[record].end - 5] ^= 1
    path.write_bytes(data)


def grown(directory: Path, snapshots: tuple[int, ...] = (), count: int = 30) -> list[bytes]:
    async def run() -> None:
        wal = Wal.open(directory, segment_bytes=1_500)
        for n in range(1, count + 1):
            await wal.append([note(n, 300)])
            if n in snapshots:
                wal.snapshot(n, b"state %d" % n)
                wal.prune()
        await wal.close()

    asyncio.run(run())
    return [p.read_bytes() for p in segments(directory)]


def test_a_good_journal(tmp_path: Path) -> None:
    grown(tmp_path / "j", (10, 20))
    before = {p.name: p.read_bytes() for p in (tmp_path / "j").iterdir()}
    report = verify(tmp_path / "j")
    assert report.ok
    assert report.last_seq == 30
    assert report.snapshots == (10, 20)
    assert report.lost is None
    assert {p.name: p.read_bytes() for p in (tmp_path / "j").iterdir()} == before
    assert repair(tmp_path / "j", truncate=True).done == []
    assert len(read(tmp_path / "j")) == 10


def test_no_journal(tmp_path: Path) -> None:
    assert not verify(tmp_path / "none").ok
    assert not repair(tmp_path / "none").ok


def test_torn_tail_needs_no_leave(tmp_path: Path) -> None:
    write(tmp_path / "j", [note(1), note(2)])
    path = segments(tmp_path / "j")[0]
    path.write_bytes(path.read_bytes()[:-3])
    report = verify(tmp_path / "j")
    assert report.ok
    assert "after record 1" in report.torn
    assert "after record 1" in repair(tmp_path / "j").done[0]
    assert verify(tmp_path / "j").torn == ""
    assert list((tmp_path / "j").glob("*.torn"))


def test_truncating_at_the_damage(tmp_path: Path) -> None:
    grown(tmp_path / "j")
    spoil(segments(tmp_path / "j")[1], int(segments(tmp_path / "j")[1].stem) + 1)
    bad = int(segments(tmp_path / "j")[1].stem) + 1
    report = verify(tmp_path / "j")
    assert not report.ok
    assert report.last_seq == bad - 1
    assert report.lost is not None
    assert (report.lost.oldest, report.lost.newest, report.lost.readable) == (bad, 30, 30 - bad)
    assert report.lost.kinds == (("noted", 30 - bad),)
    names = {p.name for p in (tmp_path / "j").iterdir()}
    untold = repair(tmp_path / "j")  # not told to truncate
    assert untold.lost == report.lost
    assert untold.done == []
    assert {p.name for p in (tmp_path / "j").iterdir()} == names
    told = repair(tmp_path / "j", truncate=True)
    assert told.ok
    assert told.lost == report.lost
    assert len(told.copies) == len(list((tmp_path / "j").glob("*.lost")))
    assert [s.seq for s in reopen(tmp_path / "j")[0]] == list(range(1, bad))
    assert any("truncating would lose" in line for line in report.lines())
    assert any(line.startswith("lost: ") for line in told.lines())


def test_damage_that_a_snapshot_covers_loses_no_effect(tmp_path: Path) -> None:
    grown(tmp_path / "j", (20,))
    spoil(segments(tmp_path / "j")[0], 2)
    report = repair(tmp_path / "j", truncate=True)
    assert report.ok
    assert report.lost is not None
    assert report.lost.newest == report.lost.oldest - 1
    assert "no record's effect" in report.lost.sentence()
    wal = Wal.open(tmp_path / "j")
    assert wal.latest_snapshot() == (20, b"state 20")
    assert [s.seq for s in wal.replay()] == list(range(21, 31))
    wal.abandon()


def test_damage_before_the_snapshot_in_the_last_segment(tmp_path: Path) -> None:
    async def run() -> None:
        wal = Wal.open(tmp_path / "j")
        for n in range(1, 11):
            await wal.append([note(n)])
        wal.snapshot(8, b"state 8")
        await wal.close()

    asyncio.run(run())
    spoil(segments(tmp_path / "j")[0], 5)
    report = repair(tmp_path / "j", truncate=True)
    assert report.ok
    assert report.lost is not None
    assert (report.lost.oldest, report.lost.newest, report.lost.readable) == (9, 10, 2)
    assert report.lost.text_only == (1, 8)
    wal = Wal.open(tmp_path / "j")
    assert wal.latest_snapshot() == (8, b"state 8")
    assert list(wal.replay()) == []
    assert [s.seq for s in asyncio.run(wal.append([note(11)]))] == [9]
    wal.abandon()
    assert verify(tmp_path / "j").ok


@pytest.mark.parametrize("victim", ["first", "middle", "last", "anchor", "snapshot"])
def test_missing_and_broken_files(tmp_path: Path, victim: str) -> None:
    grown(tmp_path / "j", (10, 20))
    files = segments(tmp_path / "j")
    match victim:
        case "anchor":
            (tmp_path / "j" / "anchor").write_text("{}")
        case "snapshot":
            for path in (tmp_path / "j").glob("*.snap"):
                path.write_bytes(b"?")
        case _:
            files[{"first": 0, "middle": len(files) // 2, "last": -1}[victim]].unlink()
    if victim == "last":  # nothing says that there was more: only a snapshot or a chain value kept elsewhere could
        assert verify(tmp_path / "j").ok
        return
    assert not verify(tmp_path / "j").ok
    with pytest.raises(JournalCorrupt):
        Wal.open(tmp_path / "j")
    report = repair(tmp_path / "j", truncate=True)
    if victim == "snapshot":  # pruned and no snapshot: what is gone is gone, and repair does not pretend
        assert not report.ok
        assert report.done == []
        return
    assert report.ok
    wal = Wal.open(tmp_path / "j")
    assert wal.latest_snapshot() == (20, b"state 20")
    wal.abandon()


def test_repairing_twice_is_repairing_once(tmp_path: Path) -> None:
    grown(tmp_path / "j")
    spoil(segments(tmp_path / "j")[2], int(segments(tmp_path / "j")[2].stem))
    repair(tmp_path / "j", truncate=True)
    again = repair(copy_of(tmp_path / "j"), truncate=True)
    assert again.ok
    assert again.done == []


def test_a_newer_version_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(bytes_of._WRITTEN, Noted, (b"noted_v9", bytes_of.crc32(b"noted_v9"), 1))
        write(tmp_path / "j", [note(1)])
    report = repair(tmp_path / "j", truncate=True)
    assert not report.ok
    assert report.lost is None
    assert report.done == []
    assert "newer alertmedic" in report.problems[0]


async def test_repair_waits_for_nobody(tmp_path: Path) -> None:
    wal = Wal.open(tmp_path / "j")
    with pytest.raises(JournalLocked):
        repair(tmp_path / "j")
    assert verify(tmp_path / "j").ok
    await wal.close()
