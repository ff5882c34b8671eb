"""The store: durable, then applied once and in order, then told; and the same state after any restart."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
from journal_kit import IO_ERROR, NO_SPACE, FaultyFiles, alert, copy_of, moved, note, plan, received, segments, step

from actions.model import IllegalMove
from agent import store as store_module
from agent.alerts import decode_usual
from agent.fold_state import State
from agent.incidents import Changes, UnknownIncident
from agent.journal.records import Noted, PayloadReceived, Stored
from agent.journal.wal import JournalCorrupt, JournalError, JournalFailed, JournalUnavailable, Wal, verify
from agent.store import StateBehind, Store, read_state


async def test_recorded_is_durable_applied_and_told(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    told: list[tuple[int, Changes]] = []
    leave = store.subscribe(lambda stored, changes: told.append((stored.seq, changes)))
    [first] = await store.record(received(alert()))
    [incident] = store.state.active()
    assert told == [(1, Changes((incident.id,), opened=(incident.id,)))]
    assert first.seq == store.state.seq == 1
    crashed = copy_of(tmp_path)  # what a crash right now would leave
    leave()
    await store.record(note(2))
    assert len(told) == 1
    assert read_state(crashed).seq == 1
    await store.close()


async def test_many_at_once_are_applied_in_order(tmp_path: Path) -> None:
    store = Store.open(tmp_path, segment_bytes=3_000, snapshot_bytes=9_000)
    order: list[int] = []
    store.subscribe(lambda stored, _: order.append(stored.seq))
    rng = random.Random(3)

    async def one(n: int) -> None:
        for m in range(4):
            await store.record(*(received(alert(f"f{n}-{m}"), at=float(n)) for _ in range(rng.randrange(1, 3))))
            assert store.state.current_digest("default", f"f{n}-{m}")

    await asyncio.gather(*(one(n) for n in range(40)))
    assert order == list(range(1, store.state.seq + 1))
    whole = store.state.to_snapshot()
    assert read_state(tmp_path).to_snapshot() == whole
    await store.close()
    assert read_state(tmp_path).to_snapshot() == whole
    again = Store.open(tmp_path)
    assert again.state.to_snapshot() == whole
    await again.close()


async def test_a_cancelled_caller_takes_nothing_back(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    await store.record(received(alert("f1")))
    [incident] = store.state.active()
    tasks = [
        asyncio.create_task(store.record(received(alert("f2")))),
        asyncio.create_task(store.record(moved(incident.id, "open", "investigating"))),
    ]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    assert [type(o) for o in await asyncio.gather(*tasks, return_exceptions=True)] == [asyncio.CancelledError] * 2
    await store.close()
    assert store.state.seq == 3
    assert store.state.incidents[incident.id].state == "investigating"
    assert read_state(tmp_path).to_snapshot() == store.state.to_snapshot()


async def test_illegal_moves_never_become_durable(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    await store.record(received(alert()))
    [incident] = store.state.active()
    id = incident.id
    for bad in (
        [moved(id, "open", "resolved")],
        [moved(id, "open", "investigating"), moved(id, "open", "investigating")],
        [plan(id), step(id, "planned", "ran")],
    ):
        with pytest.raises(IllegalMove):
            await store.record(*bad)
    with pytest.raises(UnknownIncident):
        await store.record(Noted(at=1.0, incident="inc-none", text=""))
    assert store.health().seq == 1
    await store.record(moved(id, "open", "investigating"), moved(id, "investigating", "diagnosed"), plan(id))
    assert store.state.incidents[id].plan_state == "granted"
    await store.close()


async def test_two_who_move_the_same_incident_at_once(tmp_path: Path) -> None:
    """The second is checked against what the first made of it, so that the journal stays replayable."""
    store = Store.open(tmp_path)
    await store.record(received(alert()))
    [incident] = store.state.active()
    moves = [store.record(moved(incident.id, "open", "investigating")) for _ in range(5)]
    outcomes = await asyncio.gather(*moves, return_exceptions=True)
    assert sorted(type(o).__name__ for o in outcomes) == ["IllegalMove"] * 4 + ["list"]
    assert read_state(tmp_path).seq == 2
    await store.close()


async def test_the_closing_says_what_it_had_seen(tmp_path: Path) -> None:
    """A firing alert on its way to the disk while the incident is being resolved reopens it."""
    store = Store.open(tmp_path)
    await store.record(received(alert("f1")))
    [incident] = store.state.active()
    id = incident.id
    await store.record(moved(id, "open", "verifying"))
    await asyncio.gather(store.record(received(alert("f2"))), store.record(moved(id, "verifying", "resolved")))
    assert store.state.incidents[id].state == "open"
    assert store.state.incidents[id].reopened == 1
    await store.close()


async def test_a_bug_in_the_fold_is_loud_and_final(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(tmp_path)

    def broken(state: object, stored: Stored, sent: object) -> Changes:
        raise ZeroDivisionError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "apply", broken)
        with pytest.raises(ZeroDivisionError):
            await store.record(note(1))
    for _ in range(2):
        with pytest.raises(StateBehind, match="the state stopped at 0"):
            await store.record(note(2))
    await store.close()
    assert read_state(tmp_path).seq == 1


async def test_a_listener_that_raises_is_heard(tmp_path: Path) -> None:
    store = Store.open(tmp_path)

    def bad(stored: Stored, changes: Changes) -> None:
        raise RuntimeError("a bug in a listener")

    leave = store.subscribe(bad)
    with pytest.raises(RuntimeError, match="a bug in a listener"):
        await store.record(note(1))
    leave()
    await store.record(note(2))
    assert store.state.seq == 2
    await store.close()


async def test_refused_by_the_disk_is_not_applied(tmp_path: Path) -> None:
    files, fatal = FaultyFiles(), []
    store = Store.open(tmp_path, files=files, on_fatal=fatal.append)
    files.writes = [NO_SPACE]
    with pytest.raises(JournalUnavailable):
        await store.record(received(alert("f1")))
    assert store.state.current_digest("default", "f1") is None
    await store.record(received(alert("f1")))
    [incident] = store.state.active()
    files.writes = [NO_SPACE]
    with pytest.raises(JournalUnavailable):
        await store.record(moved(incident.id, "open", "investigating"))
    await store.record(moved(incident.id, "open", "investigating"))
    files.syncs = [IO_ERROR]
    with pytest.raises(JournalFailed):
        await store.record(received(alert("f2")))
    with pytest.raises(JournalFailed):
        await store.record(received(alert("f3")))
    assert store.state.seq == 2
    assert len(fatal) == 1
    await store.close()


async def test_snapshots_bound_disk_and_replay(tmp_path: Path) -> None:
    """While records keep coming, over many snapshots: the directory stays small and the state stays the same."""
    store = Store.open(tmp_path, segment_bytes=20_000, snapshot_bytes=40_000)
    sizes = []
    for n in range(150):
        await asyncio.gather(
            *(store.record(received(alert(f"f{n % 20}", starts_at=float(m)), at=float(n))) for m in range(10))
        )
        sizes.append(store.health().bytes)
    assert max(sizes) < 300_000 < store.state.seq * 250
    await store.close()
    assert store.snapshot_problem == ""
    report = verify(tmp_path / "journal")
    assert report.ok
    assert len(report.snapshots) == 2
    assert report.first_seq > 1
    state = store.state.to_snapshot()
    assert read_state(tmp_path).to_snapshot() == state
    newest = sorted((tmp_path / "journal").glob("*.snap"))[-1]
    newest.write_bytes(newest.read_bytes()[:-10])
    assert read_state(tmp_path).to_snapshot() == state


async def test_a_record_that_does_not_fit_refuses_to_open(tmp_path: Path) -> None:
    """Written by a program that thought otherwise: say which record, do not guess."""
    store = Store.open(tmp_path)
    await store._wal.append([moved("inc-none", "open", "investigating")])
    store._wal.abandon()
    with pytest.raises(JournalCorrupt, match=r"record 1 \(IncidentMoved\) cannot be applied"):
        Store.open(tmp_path)
    with pytest.raises(JournalCorrupt):
        read_state(tmp_path)


async def test_read_state_beside_the_service_and_without(tmp_path: Path) -> None:
    assert read_state(tmp_path / "none").seq == 0
    store = Store.open(tmp_path)
    await store.record(received(alert()))
    assert read_state(tmp_path).seq == 1
    with segments(tmp_path / "journal")[0].open("ab") as file:
        file.write(b"\xa7rec\x00\x00")  # a write that has just begun
    assert read_state(tmp_path).seq == 1
    store._wal.abandon()
    assert read_state(tmp_path).seq == 1


# -- a storm: acknowledged first, folded after


def body_of(n: int) -> PayloadReceived:
    """A webhook of some 10 KB, with one alert."""
    sent = {
        "version": "4",
        "receiver": "r",
        "status": "firing",
        "groupKey": f"g{n % 7}",
        "groupLabels": {},
        "commonLabels": {},
        "commonAnnotations": {},
        "externalURL": "",
        "truncatedAlerts": 0,
        "alerts": [
            {
                "status": "firing",
                "labels": {"alertname": "A", "service": f"s{n % 5}"},
                "annotations": {"text": "x" * 10_000},
                "startsAt": "2026-11-20T09:51:50Z",
                "endsAt": "0001-01-01T00:00:00Z",
                "generatorURL": "",
                "fingerprint": f"f{n}",
            }
        ],
    }
    return PayloadReceived(at=float(n), tenant="default", body=msgspec.Raw(json.dumps(sent).encode()))


async def test_a_storm_is_acknowledged_before_it_is_folded(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    at_ack: list[int] = []

    async def one(n: int) -> None:
        await store.append(body_of(n))
        at_ack.append(store.state.seq)

    await asyncio.gather(*(one(n) for n in range(100)))
    assert max(at_ack) < 100  # not all of it was folded when the last was acknowledged
    assert store.behind[0] == 100 - store.state.seq > 0
    frozen = store.state.freeze()  # a snapshot now is of what is applied
    assert State.from_snapshot(frozen.encode()).seq == store.state.seq == frozen.seq
    [told] = await store.record(note(200))  # waits for its turn
    assert told.seq == store.state.seq == 101
    assert store.behind == (0, 0.0)
    whole = store.state.to_snapshot()
    await store.close()
    assert read_state(tmp_path).to_snapshot() == whole


def enlisted(store: Store, n: int, told: list[tuple[int, int]]) -> None:
    """`body_of(n)` by the way without a task; what `done` is told, and how far the state was then."""
    record = body_of(n)

    def done(result: int | JournalError) -> None:
        assert isinstance(result, int)
        told.append((result, store.state.seq))

    store.enlist(record, decode_usual(record.body), done)


async def all_told(told: list[Any], count: int) -> None:
    async with asyncio.timeout(20):
        while len(told) < count:
            await asyncio.sleep(0)


async def test_alone_it_is_folded_before_it_is_acknowledged_in_a_storm_afterwards(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    told: list[tuple[int, int]] = []
    for n in range(3):
        enlisted(store, n, told)
        await all_told(told, n + 1)
    assert told == [(1, 1), (2, 2), (3, 3)]
    for n in range(3, 103):
        enlisted(store, n, told)
    await all_told(told, 103)
    assert [seq for seq, _ in told] == list(range(1, 104))
    assert told[-1][1] < 103
    async with asyncio.timeout(20):
        while store.behind[0]:  # nothing comes any more: the turns fold it
            await asyncio.sleep(0)
    whole = store.state.to_snapshot()
    assert read_state(tmp_path).to_snapshot() == whole  # decoded anew it says the same
    await store.close()


async def test_webhooks_without_a_pause_do_not_keep_the_fold_waiting(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    told: list[tuple[int, int]] = []
    count = 0
    async with asyncio.timeout(30):
        while store.state.seq < 50:
            if count - len(told) < 20:
                enlisted(store, count, told)
                count += 1
            await asyncio.sleep(0)
    assert store.behind[1] < 10 * store_module.LATE_SECONDS
    await store.close()
    assert store.state.seq == count == len(told)


async def test_one_whose_answer_raises_keeps_nobody_waiting(tmp_path: Path) -> None:
    reported: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context["exception"]))
    store = Store.open(tmp_path)
    told: list[tuple[int, int]] = []
    enlisted(store, 0, told)
    store.enlist(body_of(1), decode_usual(body_of(1).body), lambda result: 1 / 0)
    enlisted(store, 2, told)
    await all_told(told, 2)
    assert [seq for seq, _ in told] == [1, 3]
    assert [type(e) for e in reported] == [ZeroDivisionError]
    await store.close()
    assert store.state.seq == 3


async def test_a_refusal_of_the_disk_reaches_who_has_no_task(tmp_path: Path) -> None:
    files = FaultyFiles()
    store = Store.open(tmp_path, files=files)
    told: list[Any] = []
    files.writes = [NO_SPACE]
    record = body_of(1)
    store.enlist(record, decode_usual(record.body), told.append)
    await all_told(told, 1)
    assert isinstance(told[0], JournalUnavailable)
    assert store.behind == (0, 0.0)
    await store.close()
    with pytest.raises(JournalUnavailable):
        store.enlist(record, decode_usual(record.body), told.append)
    assert len(told) == 1


async def test_a_storm_waits_longer_for_its_snapshot_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is ever idle here: 300 KB would do for a snapshot, four times as much has to."""
    monkeypatch.setattr(Wal, "idle", False)
    store = Store.open(tmp_path, snapshot_bytes=300_000)
    written = []
    for n in range(200):
        await store.append(body_of(n))
        written.append(store.health().bytes)
        if store._snapshotting is not None:
            break
    assert 4 * 300_000 <= written[-1] < 5 * 300_000
    monkeypatch.undo()
    await store.append(body_of(201))
    await store.close()
    assert store.snapshot_problem == ""


async def test_a_crash_in_a_storm_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    await asyncio.gather(*(store.append(body_of(n)) for n in range(100)))
    assert store.behind[0]
    crashed = copy_of(tmp_path)
    await store.close()  # folds the rest
    assert read_state(crashed).to_snapshot() == store.state.to_snapshot()
    assert store.state.seq == len(store.state.digests) == 100


async def test_what_waits_to_be_folded_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "BEHIND_BYTES", 300_000)
    store = Store.open(tmp_path)
    most = 0

    async def one(n: int) -> None:
        nonlocal most
        for m in range(5):
            await store.append(body_of(100 * n + m))
            most = max(most, store.behind[0])

    await asyncio.gather(*(one(n) for n in range(60)))
    assert most <= 300_000 // 10_000 + 60  # the bound, and what one write brings
    await store.close()
    assert store.state.seq == 300


async def test_a_record_that_cannot_be_folded_in_a_turn_stops_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(tmp_path)
    await asyncio.gather(*(store.append(body_of(n)) for n in range(100)))
    assert store.behind[0]
    reported: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context["exception"]))
    monkeypatch.setattr(store_module, "apply", lambda state, stored, sent: 1 / 0)
    with pytest.raises((StateBehind, ZeroDivisionError)):
        await store.record(note(200))
    assert store.stopped
    with pytest.raises(StateBehind):
        await store.append(body_of(200))
    store._wal.abandon()
