"""The journal and the state it makes: the one place where facts enter the service.

Everybody who has a fact to tell calls `record`, or `append` and `enlist` for alerts from outside; everybody who wants
to know reads `state` or subscribes. A record is durable before it is applied, is applied exactly once in order of its
sequence number, and only then are listeners told. `record` returns when it is applied. `append` and `enlist` do, too,
unless more than SMALL_BYTES wait to be applied: then these are applied by turns of the loop. A turn in which more
webhooks have come leaves what waits alone, so that a burst is acknowledged before it is folded, unless it has waited
for LATE_SECONDS, or more than BEHIND_BYTES wait; beyond that as much is applied as arrives. `open` rebuilds the state
from the latest snapshot and what follows it. Never decides anything about alerts or incidents (that is the fold's),
never drops or reorders a record.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec

from agent.alerts import UsualPayload
from agent.incidents import Changes, FrozenState, State, StateError, apply, check
from agent.journal.files import Files, JournalCorrupt, JournalError, JournalFailed, JournalUnavailable
from agent.journal.records import (
    AlertQuarantined,
    AlertsReceived,
    ApprovalGiven,
    Diagnosed,
    FeedbackGiven,
    IncidentMoved,
    Noted,
    PayloadReceived,
    PlanConfirmed,
    PlanDeclined,
    PlanMade,
    Record,
    StepRecorded,
    Stored,
)
from agent.journal.wal import MIB, Wal, WalHealth, exit_process, settle
from sandbox.failpoint import failpoint

Listener = Callable[[Stored, Changes], None]
CLOSING_SNAPSHOT = 1 * MIB  # less journal than this replays quickly enough as it is
SMALL_BYTES = 128 * 1024  # of webhooks that are applied before they are acknowledged,
FEW = 4  # if no more than these still wait for the disk
TURN_BYTES = 32 * 1024  # of webhooks that are applied in a turn of the loop: a quarter of a millisecond
BEHIND_BYTES = 4 * MIB  # of webhooks that are durable and not yet applied; they are held decoded
STORM_SHARE = 4  # so many times the journal gathers for a snapshot, while webhooks come without a pause
LATE_SECONDS = 0.25  # what has waited so long to be applied waits no more for a turn without webhooks


class StateBehind(RuntimeError):  # noqa: N818
    """A durable record could not be applied: a bug; nothing more is recorded."""


def journal_directory(state_dir: Path) -> Path:
    return state_dir / "journal"


class Store:
    """One writer's view. Use from one event loop.

    `snapshot_bytes`: a snapshot is made in the background whenever so much journal has gathered since the last one (in
    a storm STORM_SHARE times as much); with two snapshots kept, the disk holds about three times that plus one segment.
    """

    def __init__(self, wal: Wal, state: State, snapshot_bytes: int) -> None:
        self._wal = wal
        self._state = state
        # durable, not yet applied; in order of sequence number, with what the body says, size and time
        self._pending: deque[tuple[Stored, UsualPayload | None, int, float]] = deque()
        self._pending_bytes = 0
        self._turn_scheduled = False
        self._came = False  # a webhook, since the last turn
        self._applying = False  # stays True when an application raised: the state is then behind the journal for good
        self._listeners: list[Listener] = []
        self._moving: dict[str, asyncio.Event] = {}  # incidents with a record under way
        self._snapshot_bytes = snapshot_bytes
        self._snapshot_due = snapshot_bytes
        self._snapshotting: asyncio.Task[None] | None = None
        self._closed = False
        self.snapshot_problem = ""  # why the last snapshot could not be made, "" when it could

    @classmethod
    def open(
        cls,
        state_dir: Path,
        *,
        segment_bytes: int = 64 * MIB,
        backlog_bytes: int = 64 * MIB,
        snapshot_bytes: int = 64 * MIB,
        on_fatal: Callable[[JournalFailed], None] = exit_process,
        files: Files | None = None,
    ) -> Store:
        """Journal in `state_dir`/journal: latest snapshot, then what follows. It reads everything, so call it before
        the loop has anything else to do. Raises JournalCorrupt, JournalLocked, JournalUnavailable, JournalFailed and
        OSError."""
        wal = Wal.open(
            journal_directory(state_dir),
            segment_bytes=segment_bytes,
            backlog_bytes=backlog_bytes,
            on_fatal=on_fatal,
            files=files,
        )
        try:
            return cls(wal, _rebuild(wal), snapshot_bytes)
        except JournalCorrupt:
            wal.abandon()
            raise

    @property
    def state(self) -> State:
        """After the newest applied record. Only the fold changes it; look things up again after an `await`."""
        return self._state

    # -- recording

    async def record(self, *records: Record) -> list[Stored]:
        """Make the records durable together, apply them, tell listeners; then return them with their numbers.

        Refused before anything is written: IllegalMove or UnknownIncident for what the fold would not take (a bug of
        the caller, or news it has not seen: look at the state again), ValueError for what could not be read back.
        Refused by the disk: JournalUnavailable, JournalFailed. Cancelling the caller does not take a record back.
        """
        self._check_going()
        names = sorted({id for record in records if (id := incident_of(record))})
        if not names:
            for record in records:
                check(self._state, record)
            return await self._applied(await self._logged(records))
        # One at a time per incident: a check against the state holds only while nothing else moves that incident.
        while waiting := [self._moving[id] for id in names if id in self._moving]:
            await waiting[0].wait()
        checked = self._checked(records)
        done = asyncio.Event()
        self._moving.update(dict.fromkeys(names, done))
        return await asyncio.shield(self._move(checked, names, done))

    async def _move(self, records: list[Record], names: list[str], done: asyncio.Event) -> list[Stored]:
        try:
            return await self._applied(await self._logged(records))
        finally:
            for id in names:
                del self._moving[id]
            done.set()

    def _checked(self, records: Sequence[Record]) -> list[Record]:
        """The records as they will be written, each checked against the state that the ones before it will make."""
        seen = self._state.seq
        checked = [
            msgspec.structs.replace(r, seen=seen) if isinstance(r, IncidentMoved) and not r.seen else r for r in records
        ]
        if len(checked) == 1:
            check(self._state, checked[0])
            return checked
        trial = self._state.trial({id for r in checked if (id := incident_of(r))})
        for record in checked:
            check(trial, record)
            apply(trial, Stored(trial.seq + 1, record))
        return checked

    async def append(self, *records: AlertsReceived | PayloadReceived | AlertQuarantined) -> int:
        """The same for what came from outside, which needs no check. Returns the newest sequence number when it is
        durable; it is applied by then, or in one of the next turns of the loop (`state.seq` tells)."""
        self._check_going()
        self._came = True
        stored = await self._logged(records)
        if self._pending_bytes <= SMALL_BYTES:
            self._apply_up_to(stored[-1].seq)
        return stored[-1].seq

    def enlist(self, record: PayloadReceived, sent: UsualPayload, done: Callable[[int | JournalError], None]) -> None:
        """`append` for who does not wait: `done` is called on the loop, later, with the sequence number, or with why it
        is not recorded. `sent` is what the body says. Raises like `append` for what is refused at once."""
        self._check_going()
        self._came = True
        self._wal.submit((record,), partial(self._enlisted, sent, done))

    def _enlisted(
        self, sent: UsualPayload, done: Callable[[int | JournalError], None], result: list[Stored] | JournalError
    ) -> None:
        if isinstance(result, JournalError):
            done(result)
            return
        self._durable(result, sent)
        seq = result[0].seq
        try:
            if self._pending_bytes <= SMALL_BYTES and self._wal.waiting < FEW and not self._applying:
                self._apply_up_to(seq)
        finally:  # durable it is, whatever the fold or a listener made of it; the loop reports that
            done(seq)

    async def _logged(self, records: Sequence[Record]) -> list[Stored]:
        """Make the records durable; afterwards they are in `_pending`, whatever becomes of the caller."""
        if not records:
            return []
        future: asyncio.Future[list[Stored]] = asyncio.get_running_loop().create_future()

        def done(result: list[Stored] | JournalError) -> None:
            if not isinstance(result, JournalError):
                self._durable(result)
            settle(future, result)

        self._wal.submit(records, done)
        return await future

    def _check_going(self) -> None:
        if self._applying:
            raise StateBehind(
                f"record: the state stopped at {self._state.seq} while the journal went on; hint: an earlier record "
                "could not be applied, see the first error; a restart shows it again"
            )

    async def _applied(self, stored: list[Stored]) -> list[Stored]:
        """Returns when these, which are durable, are applied too. A long queue before them is left to the turns."""
        while stored and self._pending_bytes > SMALL_BYTES and self._state.seq < stored[-1].seq:
            self._check_going()
            await asyncio.sleep(0)
        if stored:
            self._apply_up_to(stored[-1].seq)
        return stored

    def _durable(self, stored: Sequence[Stored], sent: UsualPayload | None = None) -> None:
        """Called in order of sequence number. The callers of `record` and `append`, who wake next, apply these; what is
        left (because it is too much, or its caller was cancelled) is applied by turns."""
        now = time.monotonic()
        for item in stored:
            size = len(item.record.body) if isinstance(item.record, PayloadReceived) else 1024
            self._pending.append((item, sent, size, now))
            self._pending_bytes += size
        if not self._turn_scheduled:
            self._turn_scheduled = True
            loop = asyncio.get_running_loop()
            loop.call_soon(loop.call_soon, self._turn)

    def _turn(self) -> None:
        self._turn_scheduled = False
        came, self._came = self._came, False
        share = 0 if came and self.behind[1] < LATE_SECONDS else TURN_BYTES
        self._apply_bytes(max(share, self._pending_bytes - BEHIND_BYTES))
        if self._pending and not self._applying:
            self._turn_scheduled = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _apply_up_to(self, seq: int) -> None:
        while self._pending and self._pending[0][0].seq <= seq:
            self._apply_next()

    def _apply_bytes(self, size: int) -> None:
        left = self._pending_bytes - size
        while self._pending and self._pending_bytes > left and not self._applying:
            self._apply_next()

    def _apply_next(self) -> None:
        """Apply the next durable record. An exception is a bug of the fold or of a listener; it comes out of `record`,
        or the loop reports it, and after one of the fold no record is taken any more."""
        failpoint("store_before_apply")
        item, sent, size, _ = self._pending.popleft()
        self._pending_bytes -= size
        self._applying = True
        changes = apply(self._state, item, sent)
        self._applying = False
        for listener in self._listeners:
            listener(item, changes)
        gathered = self._wal.bytes_since_snapshot
        if gathered >= self._snapshot_due and self._snapshotting is None and not self._closed:
            if gathered < STORM_SHARE * self._snapshot_due and not self._wal.idle:
                return  # encoding the state would take a storm the time in which it is acknowledged
            self._snapshotting = asyncio.get_running_loop().create_task(self._snapshot(self._state.freeze()))

    def subscribe(self, callback: Listener) -> Callable[[], None]:
        """`callback(stored, changes)` on the loop after each record is applied, in order; the result unsubscribes. It
        must neither block nor raise: what it raises comes out of somebody's `record`."""
        self._listeners.append(callback)
        return lambda: self._listeners.remove(callback)

    # -- snapshots

    async def snapshot(self) -> None:
        """Make a snapshot of this moment and prune. Raises JournalUnavailable, JournalFailed, JournalCorrupt."""
        if self._snapshotting is not None:
            await asyncio.shield(self._snapshotting)
        self._snapshotting = asyncio.get_running_loop().create_task(self._snapshot(self._state.freeze()))
        await asyncio.shield(self._snapshotting)
        if self.snapshot_problem:
            raise JournalUnavailable(self.snapshot_problem)

    async def _snapshot(self, frozen: FrozenState) -> None:
        """Encode and write off the loop. A full disk is no reason to stop: the journal goes on without, and it is tried
        again when a quarter more has gathered; `snapshot_problem` and the health page say so meanwhile."""
        try:
            body = await asyncio.to_thread(frozen.encode)
            self._state.thaw()
            await asyncio.to_thread(self._wal.snapshot, frozen.seq, body)
            await asyncio.to_thread(self._wal.prune)
            self.snapshot_problem = ""
            self._snapshot_due = self._snapshot_bytes
        except (JournalUnavailable, JournalCorrupt, OSError) as error:
            self.snapshot_problem = str(error)
            self._snapshot_due = self._wal.bytes_since_snapshot + self._snapshot_bytes // 4
        finally:
            self._state.thaw()
            self._snapshotting = None

    # -- the rest

    @property
    def stopped(self) -> str:
        """Why no record is taken any more until a restart (see StateBehind); "" while they are."""
        return f"the state stopped at record {self._state.seq}: it could not be applied" if self._applying else ""

    def health(self) -> WalHealth:
        return self._wal.health()

    @property
    def behind(self) -> tuple[int, float]:
        """What is durable and not yet applied: how many records, and for how many seconds the oldest of them is."""
        return len(self._pending), time.monotonic() - self._pending[0][3] if self._pending else 0.0

    async def close(self) -> None:
        """What was recorded becomes durable and is applied; a snapshot makes the next start quick. Idempotent."""
        if self._closed:
            return
        self._closed = True
        await self._wal.drain()
        self._apply_bytes(self._pending_bytes)
        if self._snapshotting is not None:
            await asyncio.shield(self._snapshotting)
        if self._wal.bytes_since_snapshot >= CLOSING_SNAPSHOT and not self._applying and not self._wal.failed:
            await self._snapshot(self._state.freeze())
        await self._wal.close()


def incident_of(record: Record) -> str:
    """The incident that a record is about, "" for one that is about none or several (alerts)."""
    match record:
        case IncidentMoved() | Diagnosed() | PlanDeclined() | ApprovalGiven() | Noted() | FeedbackGiven():
            return record.incident
        case PlanConfirmed():
            return record.incident
        case PlanMade():
            return record.plan.incident
        case StepRecorded():
            return record.move.incident
        case _:
            return ""


def _rebuild(wal: Wal) -> State:
    """Latest snapshot and what follows it. Raises JournalCorrupt."""
    state = State()
    snapshot = wal.latest_snapshot()
    if snapshot is not None:
        seq, body = snapshot
        try:
            state = State.from_snapshot(body)
        except StateError as error:
            raise JournalCorrupt(wal.directory, None, str(error)) from error
        if state.seq != seq:
            raise JournalCorrupt(wal.directory, None, f"snapshot {seq} holds a state after record {state.seq}")
    for stored in wal.replay():
        try:
            apply(state, stored)
        except (ValueError, LookupError) as error:
            kind = type(stored.record).__name__
            raise JournalCorrupt(
                wal.directory, None, f"record {stored.seq} ({kind}) cannot be applied: {error}"
            ) from error
    return state


def read_state(state_dir: Path) -> State:
    """What the journal says now, with the service running or stopped; an empty State when there is none. Takes no lock
    and changes nothing. Raises JournalCorrupt, OSError."""
    return _rebuild(Wal.open(journal_directory(state_dir), read_only=True))
