"""The log: what was acknowledged comes back, whatever happens; what is damaged is never believed."""

from __future__ import annotations

import asyncio
import math
import os
import random
import re
import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from journal_kit import (
    IO_ERROR,
    NO_SPACE,
    FaultyFiles,
    alert,
    copy_of,
    note,
    read,
    received,
    reopen,
    segments,
    write,
)

from agent.journal import segment as bytes_of
from agent.journal.records import AlertsReceived, Noted, Record
from agent.journal.wal import (
    JournalCorrupt,
    JournalFailed,
    JournalLocked,
    JournalUnavailable,
    Wal,
    verify,
)


def test_records_come_back_in_order(tmp_path: Path) -> None:
    records = [received(alert(f"f{n}"), at=float(n)) if n % 2 else note(n) for n in range(50)]
    stored = write(tmp_path / "j", records)
    assert [s.seq for s in stored] == list(range(1, 51))
    assert read(tmp_path / "j") == stored
    assert [s.record for s in reopen(tmp_path / "j")[0]] == records


def test_modes_are_private(tmp_path: Path) -> None:
    write(tmp_path / "j", [note(1)])
    assert stat.S_IMODE((tmp_path / "j").stat().st_mode) == 0o700
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "j").iterdir()} == {0o600}


def test_documented_format_is_the_format(tmp_path: Path) -> None:
    """The offsets in the module's docstring, read by hand."""
    write(tmp_path / "j", [note(7)])
    data = segments(tmp_path / "j")[0].read_bytes()
    assert data[:8] == b"AMWAL\x00\x00\x01"
    assert int.from_bytes(data[8:16], "little") == 1
    record = data[44:]
    assert record[:4] == b"\xa7rec"
    length = int.from_bytes(record[8:12], "little")
    assert int.from_bytes(record[16:24], "little") == 1  # sequence number
    assert int.from_bytes(record[32:36], "little") == 0  # place
    kind_length = int.from_bytes(record[38:40], "little")
    assert record[56 : 56 + kind_length] == b"noted"
    assert record[56 + kind_length :] == b'{"type":"noted","at":7.0,"incident":"","text":"note 7 "}'
    assert len(record) == 56 + kind_length + length


async def test_one_sync_for_all_that_wait(tmp_path: Path) -> None:
    wal = Wal.open(tmp_path / "j")
    await asyncio.gather(*(wal.append([note(n)]) for n in range(200)))
    assert wal.health().syncs == 1
    assert wal.health().seq == 200
    await wal.close()


async def test_order_of_appends_is_order_of_numbers(tmp_path: Path) -> None:
    seen: list[int] = []
    wal = Wal.open(tmp_path / "j")
    for n in range(100):
        wal.submit([note(n), note(n)], lambda stored: seen.extend(s.seq for s in stored))  # type: ignore[union-attr]
    results = await asyncio.gather(*(wal.append([note(n), note(n)]) for n in range(100)))
    assert seen == list(range(1, 201))
    assert [s.seq for stored in results for s in stored] == list(range(201, 401))
    await wal.close()


async def test_a_cancelled_append_is_durable_or_not_there(tmp_path: Path) -> None:
    wal = Wal.open(tmp_path / "j")
    task = asyncio.create_task(wal.append([note(1)]))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    [second] = await wal.append([note(2)])
    await wal.close()
    assert [s.seq for s in read(tmp_path / "j")] == list(range(1, second.seq + 1))


async def test_rotation_and_reopening(tmp_path: Path) -> None:
    wal = Wal.open(tmp_path / "j", segment_bytes=2_000)
    for n in range(40):
        await wal.append([note(n, 300)])
    assert wal.health().segments > 4
    await wal.close()
    names = [int(p.stem) for p in segments(tmp_path / "j")]
    assert names[0] == 1
    assert [s.record for s in read(tmp_path / "j")] == [note(n, 300) for n in range(40)]
    wal = Wal.open(tmp_path / "j", segment_bytes=2_000)
    [next_one] = await wal.append([note(99)])
    assert next_one.seq == 41
    await wal.close()


# -- torn tails


def test_torn_at_every_byte_of_the_last_record(tmp_path: Path) -> None:
    records = [note(1), received(alert("f1"), alert("f2")), note(3)]
    stored = write(tmp_path / "j", records)
    path = segments(tmp_path / "j")[0]
    whole = path.read_bytes()
    reader = bytes_of.SegmentReader(path, last=True)
    last = [f.offset for f in reader.frames()][-1]
    for cut in range(last + 1, len(whole)):
        torn = copy_of(tmp_path / "j", "torn")
        segments(torn)[0].write_bytes(whole[:cut])
        assert read(torn) == stored[:2]
        found, said = reopen(torn)
        assert found == stored[:2]
        assert f"{cut - last} bytes from {last}" in said
        [kept] = torn.glob("*.torn")
        assert kept.read_bytes() == whole[last:cut]
        assert reopen(torn) == (stored[:2], "")


@pytest.mark.parametrize("lost_sectors", [1, 2, 5])
def test_sectors_never_written_are_a_torn_tail(tmp_path: Path, lost_sectors: int) -> None:
    """After a power cut a file may have its new length and zeros where data should be, even before good data."""
    first = write(tmp_path / "j", [note(1)])
    before = segments(tmp_path / "j")[0].stat().st_size
    write(tmp_path / "j", [note(n, 900) for n in range(2, 8)], each=False)
    path = segments(tmp_path / "j")[0]
    data = bytearray(path.read_bytes())
    begin = (before // 512 + 1) * 512
    data[begin : begin + 512 * lost_sectors] = bytes(512 * lost_sectors)
    path.write_bytes(data)
    found, said = reopen(tmp_path / "j")
    assert found[:1] == first
    assert said
    assert [s.seq for s in found] == list(range(1, len(found) + 1))
    assert len(found) < 7


def test_zeros_alone_behind_the_last_record_are_torn(tmp_path: Path) -> None:
    stored = write(tmp_path / "j", [note(1), note(2)])
    with segments(tmp_path / "j")[0].open("ab") as file:
        file.write(bytes(5000))
    found, said = reopen(tmp_path / "j")
    assert found == stored
    assert "5000 bytes" in said


def test_a_torn_write_before_a_later_write_is_damage(tmp_path: Path) -> None:
    """The later write was begun when the earlier was durable: zeros there are lost data, not an unfinished write."""
    write(tmp_path / "j", [note(1, 3000), note(2)])
    path = segments(tmp_path / "j")[0]
    data = bytearray(path.read_bytes())
    data[1024:2048] = bytes(1024)
    path.write_bytes(data)
    with pytest.raises(JournalCorrupt, match="at byte 44"):
        reopen(tmp_path / "j")


# -- damage


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_byte_is_noticed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    base = tmp_path_factory.getbasetemp() / "any-changed-byte"
    if not base.exists():
        write(base, [note(n, 40) for n in range(6)])
    whole = segments(base)[0].read_bytes()
    position = data.draw(st.integers(0, len(whole) - 1))
    change = data.draw(st.integers(1, 255))
    damaged = copy_of(base, "damaged")
    segments(damaged)[0].write_bytes(whole[:position] + bytes([whole[position] ^ change]) + whole[position + 1 :])
    with pytest.raises(JournalCorrupt):
        Wal.open(damaged)
    assert not verify(damaged).ok


def test_a_rewritten_record_breaks_the_chain(tmp_path: Path) -> None:
    """Somebody who fixes both CRCs after changing a record is still noticed at the next record."""
    write(tmp_path / "j", [note(1), note(2), note(3)])
    path = segments(tmp_path / "j")[0]
    reader = bytes_of.SegmentReader(path, last=True)
    frames = list(reader.frames())
    forged, _ = bytes_of.frame(bytes_of.encode(note(7)), 2, frames[1].at, 0, frames[0].chain)
    body = bytes_of.encode(note(7)).body
    data = path.read_bytes()
    path.write_bytes(data[: frames[1].offset] + forged + body + data[frames[1].end :])
    with pytest.raises(JournalCorrupt, match="record 3 breaks the hash chain"):
        reopen(tmp_path / "j")


def test_removed_records_are_missed(tmp_path: Path) -> None:
    write(tmp_path / "j", [note(1), note(2), note(3)])
    path = segments(tmp_path / "j")[0]
    frames = list(bytes_of.SegmentReader(path, last=True).frames())
    data = path.read_bytes()
    path.write_bytes(data[: frames[1].offset] + data[frames[2].offset :])
    with pytest.raises(JournalCorrupt, match="record 3 where 2 belongs"):
        reopen(tmp_path / "j")


def test_a_missing_segment_is_missed(tmp_path: Path) -> None:
    write(tmp_path / "j", [note(n, 400) for n in range(20)], segment_bytes=1_000)
    segments(tmp_path / "j")[3].unlink()
    with pytest.raises(JournalCorrupt, match="a segment is missing"):
        reopen(tmp_path / "j")


@pytest.mark.parametrize("what", ["kind", "version"])
def test_what_a_newer_version_wrote_is_refused(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    newer = ("noted_v9", 1) if what == "kind" else ("noted", 2)
    with monkeypatch.context() as patch:
        kind = newer[0].encode()
        patch.setitem(bytes_of._WRITTEN, Noted, (kind, bytes_of.crc32(kind), newer[1]))
        write(tmp_path / "j", [note(1)])
    with pytest.raises(JournalCorrupt, match="newer alertmedic") as caught:
        reopen(tmp_path / "j")
    assert caught.value.newer


def test_a_body_of_another_shape_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(bytes_of, "_encode", lambda record: b'{"type":"noted","at":"soon"}')
        write(tmp_path / "j", [note(1)])
    with pytest.raises(JournalCorrupt, match="noted"):
        read(tmp_path / "j")
    assert not verify(tmp_path / "j").ok


async def test_what_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    wal = Wal.open(tmp_path / "j")
    bad: list[Record] = [
        Noted(at=math.nan, incident="", text=""),
        received(alert(starts_at=math.inf)),
        AlertsReceived(at=math.nan, tenant="", receiver="", group_key="", alerts=()),
    ]
    for record in bad:
        with pytest.raises(ValueError, match="could not be read back"):
            await wal.append([record])
    await wal.append([Noted(at=1.0, incident="", text="null and void")])
    await wal.close()
    assert len(read(tmp_path / "j")) == 1


# -- disks that fail


@pytest.mark.parametrize("code", [NO_SPACE, IO_ERROR])
async def test_failed_write_is_rolled_back_and_later_ones_work(tmp_path: Path, code: int) -> None:
    files = FaultyFiles()
    wal = Wal.open(tmp_path / "j", files=files)
    await wal.append([note(1)])
    size = segments(tmp_path / "j")[0].stat().st_size
    files.short, files.writes = [30], [0, code]  # 30 bytes get there, then the error
    outcomes = await asyncio.gather(*(wal.append([note(n)]) for n in (2, 3)), return_exceptions=True)
    assert [type(o) for o in outcomes] == [JournalUnavailable] * 2
    assert segments(tmp_path / "j")[0].stat().st_size == size
    assert os.strerror(code) in wal.health().unavailable
    [stored] = await wal.append([note(4)])
    assert stored.seq == 2
    assert wal.health().unavailable == ""
    await wal.close()
    assert [s.record for s in read(tmp_path / "j")] == [note(1), note(4)]


async def test_exactly_those_waiting_are_refused(tmp_path: Path) -> None:
    """What gathers behind a failing write is tried on its own."""
    files = FaultyFiles()
    wal = Wal.open(tmp_path / "j", files=files)
    files.writes = [NO_SPACE]
    first = asyncio.create_task(wal.append([note(1)]))
    await asyncio.sleep(0)
    await asyncio.sleep(0)  # the first write is on its way
    second = asyncio.create_task(wal.append([note(2)]))
    with pytest.raises(JournalUnavailable):
        await first
    assert [s.seq for s in await second] == [1]
    await wal.close()


async def test_short_writes_are_continued(tmp_path: Path) -> None:
    files = FaultyFiles()
    wal = Wal.open(tmp_path / "j", files=files)
    files.short = [1, 50, 7]
    await asyncio.gather(*(wal.append([note(n, 100)]) for n in range(10)))
    await wal.close()
    assert [s.record for s in read(tmp_path / "j")] == [note(n, 100) for n in range(10)]


async def test_more_buffers_than_one_call_takes(tmp_path: Path) -> None:
    wal = Wal.open(tmp_path / "j")
    await wal.append([note(n) for n in range(1500)])
    await wal.close()
    assert len(read(tmp_path / "j")) == 1500


async def test_failed_sync_is_fatal_and_never_retried(tmp_path: Path) -> None:
    files, fatal = FaultyFiles(), []
    wal = Wal.open(tmp_path / "j", files=files, on_fatal=fatal.append)
    await wal.append([note(1)])
    files.syncs, files.calls = [IO_ERROR], []
    first = asyncio.create_task(wal.append([note(2)]))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    second = asyncio.create_task(wal.append([note(3)]))
    for task in (first, second):
        with pytest.raises(JournalFailed):
            await task
    with pytest.raises(JournalFailed):
        await wal.append([note(4)])
    assert files.calls == ["write", "sync"]
    assert len(fatal) == 1
    await wal.close()


async def test_failed_roll_back_is_fatal(tmp_path: Path) -> None:
    files, fatal = FaultyFiles(), []
    wal = Wal.open(tmp_path / "j", files=files, on_fatal=fatal.append)
    files.writes, files.truncates = [NO_SPACE], [IO_ERROR]
    with pytest.raises(JournalFailed, match="roll back"):
        await wal.append([note(1)])
    assert len(fatal) == 1
    await wal.close()


async def test_no_space_for_a_new_segment(tmp_path: Path) -> None:
    files = FaultyFiles()
    wal = Wal.open(tmp_path / "j", files=files, segment_bytes=500)
    await wal.append([note(1, 600)])
    files.writes = [NO_SPACE]
    with pytest.raises(JournalUnavailable):
        await wal.append([note(2)])
    assert not list((tmp_path / "j").glob("*.tmp"))
    [stored] = await wal.append([note(3)])
    assert stored.seq == 2
    assert len(segments(tmp_path / "j")) == 2
    await wal.close()
    assert [s.record for s in read(tmp_path / "j")] == [note(1, 600), note(3)]


async def test_backlog_is_bounded(tmp_path: Path) -> None:
    wal = Wal.open(tmp_path / "j", backlog_bytes=10_000)
    outcomes = await asyncio.gather(*(wal.append([note(n, 3000)]) for n in range(5)), return_exceptions=True)
    assert [isinstance(o, JournalUnavailable) for o in outcomes] == [False, False, False, True, True]
    assert await wal.append([note(9, 20_000)])  # larger than the bound, alone: it may pass
    assert wal.health().backlog_bytes == 0
    await wal.close()


def test_a_failed_sync_ends_the_process(tmp_path: Path) -> None:
    """The default: one line on stderr, status 70, nothing acknowledged."""
    import subprocess
    import sys

    program = (
        "import asyncio, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\n"
        "from journal_kit import FaultyFiles, IO_ERROR, note\n"
        "from agent.journal.wal import Wal\n"
        "async def main():\n"
        "    files = FaultyFiles()\n"
        f"    wal = Wal.open(Path({str(tmp_path / 'j')!r}), files=files)\n"
        "    files.syncs = [IO_ERROR]\n"
        "    await wal.append([note(1)])\n"
        "    print('acknowledged')\n"
        "asyncio.run(main())\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 70
    assert ended.stdout == ""
    assert re.fullmatch(r"alertmedic: fatal: sync .*: Input/output error; hint: .*\n", ended.stderr)


# -- lock and readers


async def test_one_writer(tmp_path: Path) -> None:
    wal = Wal.open(tmp_path / "j")
    with pytest.raises(JournalLocked, match=f"process {os.getpid()} holds it"):
        Wal.open(tmp_path / "j")
    await wal.close()
    await Wal.open(tmp_path / "j").close()


async def test_closed_and_read_only_refuse(tmp_path: Path) -> None:
    wal = Wal.open(tmp_path / "j")
    await wal.close()
    await wal.close()
    for other in (wal, Wal.open(tmp_path / "j", read_only=True)):
        with pytest.raises(JournalUnavailable):
            await other.append([note(1)])


async def test_reading_while_it_is_written(tmp_path: Path) -> None:
    """A reader sees some prefix, at any time, over rotations and pruning."""
    wal = Wal.open(tmp_path / "j", segment_bytes=5_000)
    running = True

    async def writing() -> None:
        rng = random.Random(1)
        for turn in range(60):
            await asyncio.gather(*(wal.append([note(n, rng.randrange(600))]) for n in range(10)))
            if turn % 10 == 9:
                await asyncio.to_thread(wal.snapshot, wal.seq, b"{}")
                await asyncio.to_thread(wal.prune)

    def look() -> list[int]:
        ends = []
        while running:
            reader = Wal.open(tmp_path / "j", read_only=True)
            ends.append(reader.seq)
        return ends

    looking = asyncio.create_task(asyncio.to_thread(look))
    await writing()
    running = False
    ends = await looking
    assert ends == sorted(ends)
    assert len(ends) > 3
    await wal.close()


def test_a_journal_that_is_not_there_reads_empty(tmp_path: Path) -> None:
    assert read(tmp_path / "none") == []
    assert not (tmp_path / "none").exists()


# -- snapshots, pruning, the anchor


async def _grown(directory: Path, snapshots: int) -> Wal:
    wal = Wal.open(directory, segment_bytes=1_500)
    for n in range(snapshots):
        for m in range(12):
            await wal.append([note(n * 12 + m, 300)])
        wal.snapshot(wal.seq, b"state after %d" % wal.seq)
        wal.prune()
    return wal


async def test_pruning_keeps_what_the_older_snapshot_needs(tmp_path: Path) -> None:
    wal = await _grown(tmp_path / "j", 4)
    await wal.append([note(100)])
    await wal.close()
    assert [int(p.stem) for p in sorted((tmp_path / "j").glob("*.snap"))] == [36, 48]
    assert int(segments(tmp_path / "j")[0].stem) > 1
    report = verify(tmp_path / "j")
    assert report.ok
    assert 0 < report.anchor < report.first_seq <= 37
    reader = Wal.open(tmp_path / "j", read_only=True)
    assert reader.latest_snapshot() == (48, b"state after 48")
    assert [s.seq for s in reader.replay()] == [49]
    newest = sorted((tmp_path / "j").glob("*.snap"))[-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    wal = Wal.open(tmp_path / "j")
    assert wal.latest_snapshot() == (36, b"state after 36")
    assert [s.seq for s in wal.replay()] == list(range(37, 50))
    assert newest.with_suffix(".snap.broken").exists()
    wal.abandon()


async def test_without_any_good_snapshot_a_pruned_journal_refuses(tmp_path: Path) -> None:
    await (await _grown(tmp_path / "j", 4)).close()
    for path in (tmp_path / "j").glob("*.snap"):
        path.write_bytes(b"\0" + path.read_bytes()[1:])
    with pytest.raises(JournalCorrupt, match="no usable snapshot"):
        Wal.open(tmp_path / "j")


async def test_broken_snapshots_of_a_whole_journal_cost_only_time(tmp_path: Path) -> None:
    await (await _grown(tmp_path / "j", 1)).close()
    [path] = (tmp_path / "j").glob("*.snap")
    path.write_bytes(b"")
    assert len(read(tmp_path / "j")) == 12
    assert len(reopen(tmp_path / "j")[0]) == 12


async def test_the_anchor_notices_a_replaced_beginning(tmp_path: Path) -> None:
    """After pruning, the first remaining segment must still be the one that followed."""
    await (await _grown(tmp_path / "j", 4)).close()
    await (await _grown(tmp_path / "other", 4)).close()
    ours, theirs = segments(tmp_path / "j"), segments(tmp_path / "other")
    assert [p.name for p in ours] == [p.name for p in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        mine.write_bytes(other.read_bytes())
    with pytest.raises(JournalCorrupt, match="does not continue the hash chain"):
        reopen(tmp_path / "j")


async def test_a_journal_shorter_than_its_snapshot_refuses(tmp_path: Path) -> None:
    await (await _grown(tmp_path / "j", 2)).close()
    segments(tmp_path / "j")[-1].unlink()
    with pytest.raises(JournalCorrupt, match="the journal ends at"):
        reopen(tmp_path / "j")


async def test_a_snapshot_of_another_journal_refuses(tmp_path: Path) -> None:
    await (await _grown(tmp_path / "j", 1)).close()
    await (await _grown(tmp_path / "other", 1)).close()
    [mine], [other] = (tmp_path / "j").glob("*.snap"), (tmp_path / "other").glob("*.snap")
    mine.write_bytes(other.read_bytes())
    with pytest.raises(JournalCorrupt, match="not the one that the snapshot was made of"):
        reopen(tmp_path / "j")


async def test_a_snapshot_that_finds_no_space_leaves_nothing(tmp_path: Path) -> None:
    files = FaultyFiles()
    wal = Wal.open(tmp_path / "j", files=files)
    await wal.append([note(1)])
    files.writes = [NO_SPACE]
    with pytest.raises(JournalUnavailable):
        wal.snapshot(1, b"x" * 100)
    assert not [p for p in (tmp_path / "j").iterdir() if "snap" in p.name]
    wal.snapshot(1, b"x" * 100)
    assert wal.latest_snapshot() == (1, b"x" * 100)
    await wal.close()


async def test_snapshot_of_what_is_not_durable_is_refused(tmp_path: Path) -> None:
    wal = Wal.open(tmp_path / "j")
    with pytest.raises(ValueError, match="record 1 is not in the journal"):
        wal.snapshot(1, b"")
    await wal.close()


# -- any history


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_history_of_appends_and_crashes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Appends in writes of any size, crashes that tear the unfinished write anywhere, reopenings: what comes back is
    what was acknowledged, then at most whole records of the unfinished write, and the numbers have no gaps."""
    directory = tmp_path_factory.mktemp("history") / "j"
    expected: list[Record] = []
    counter = iter(range(10_000))
    for _ in range(data.draw(st.integers(1, 4), label="lives")):
        options = {"segment_bytes": data.draw(st.sampled_from([300, 2_000, 1 << 20]), label="segment_bytes")}
        for _ in range(data.draw(st.integers(0, 4), label="writes")):
            batch = [note(next(counter), data.draw(st.integers(0, 700))) for _ in range(data.draw(st.integers(1, 4)))]
            write(directory, batch, each=False, **options)
            expected += batch
        acknowledged = {p.name: p.stat().st_size for p in segments(directory)} if directory.exists() else {}
        unfinished = [note(next(counter), data.draw(st.integers(0, 700))) for _ in range(data.draw(st.integers(0, 3)))]
        if unfinished:
            write(directory, unfinished, each=False, **options)
            last = segments(directory)[-1]
            least = acknowledged.get(last.name, bytes_of.SEGMENT_HEADER)
            with last.open("r+b") as file:
                file.truncate(data.draw(st.integers(least, last.stat().st_size), label="torn at"))
        if directory.exists():
            found = [s.record for s in reopen(directory)[0]]
            assert found[: len(expected)] == expected
            assert found[len(expected) :] == unfinished[: len(found) - len(expected)]
            expected = found
            assert [s.seq for s in read(directory)] == list(range(1, len(found) + 1))
            assert verify(directory).ok


@pytest.mark.parametrize("spare", [0, 1, 4])
def test_the_largest_record_can_be_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spare: int) -> None:
    """The bound is one of the body; the kind stands before it."""
    monkeypatch.setattr(bytes_of, "MAX_BODY", 4096)
    text = "x" * (4096 - spare - len(bytes_of.encode(Noted(at=1.0, incident="", text="")).body))
    write(tmp_path / "j", [Noted(at=1.0, incident="", text=text)])
    assert [s.record for s in reopen(tmp_path / "j")[0]] == [Noted(at=1.0, incident="", text=text)]
    with pytest.raises(ValueError, match="4097 bytes"):
        bytes_of.encode(Noted(at=1.0, incident="", text=text + "x" * (spare + 1)))


async def test_no_descriptor_for_a_new_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of descriptors at the one moment: refused, the thread lives, and the next append goes on."""
    wal = Wal.open(tmp_path / "j", segment_bytes=200)
    await wal.append([note(1)])
    await wal.append([note(2)])
    real, refusals = os.open, [OSError(24, "Too many open files")]

    def scarce(path: str | Path, flags: int, mode: int = 0o777, **more: int | None) -> int:
        if str(path).endswith(".wal") and refusals:
            raise refusals.pop()
        return real(path, flags, mode, **more)

    monkeypatch.setattr(os, "open", scarce)
    answers = [await asyncio.gather(wal.append([note(n)]), return_exceptions=True) for n in range(3, 6)]
    refused = [a for (a,) in answers if isinstance(a, JournalUnavailable)]
    assert [("Too many open files" in str(a)) for a in refused] == [True]
    await asyncio.wait_for(wal.append([note(9)]), 10)
    await wal.close()
    assert not refusals
    assert [s.seq for s in read(tmp_path / "j")] == list(range(1, len(read(tmp_path / "j")) + 1))
