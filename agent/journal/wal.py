"""The local write-ahead log: what happened, durable before anybody is told.

`agent.store` opens it, appends to it and replays it; `alertmedic journal verify|repair` look at it. It knows records
only as kinds with a version; what they mean is the fold's affair. It never acknowledges what is not synced, never
retries a failed sync, and never skips what it cannot read.

Byte format, version 1 (little-endian; all CRCs are CRC-32 as in zlib; all digests BLAKE2b of 16 bytes)

    directory (0700)
      lock                     flock of the one writer; its pid as text
      <first seq, 20 digits>.wal    segments; sequence numbers begin at 1 and have no gaps
      <seq, 20 digits>.snap    snapshots: everything up to and with record seq; the newest two are kept
      anchor                   JSON {"anchor":{"seq","chain"},"crc32"}: the segments begin after record seq
      *.tmp                    unfinished; removed at the next opening
      *.torn *.broken *.lost   copies kept by opening and repair; never read again

    segment                    header, then records until the end of the file
      header  8  magic "AMWAL" 00 00 01
              8  u64  first sequence number
              8  f64  time of creation, unix seconds
             16       chain value before the first record
              4  u32  CRC of the 40 bytes before

    record
              4       magic A7 "rec"
              4  u32  CRC of the following 48 bytes
              4  u32  length of the body, at most 64 MiB
              4  u32  CRC of kind and body
              8  u64  sequence number
              8  f64  time of the append, unix seconds
              4  u32  place: how many records of the same write come before this one
              2  u16  version of the kind
              2  u16  length of the kind
             16       chain = BLAKE2b(chain before, the 32 bytes from "length of the body" on, kind, body)
                      kind, UTF-8
                      body, JSON of the record

    snapshot  8  magic "AMSNAP" 00 01;  u64 seq;  u64 length of the body;  16 chain after record seq;
              u32 CRC of the body;  u32 CRC of the 44 bytes before;  body

The chain makes changes show (every later record would have to be written anew); without a key it cannot stop somebody
who rewrites everything, so `verify` prints its newest value for keeping elsewhere. The anchor is written before pruned
segments are unlinked, so the remaining ones can always be checked from it.

Group commit. Appends of one turn of the event loop form one write, framed on the loop; a thread does one pwritev and
one fdatasync for it, while the next write gathers. The loop never waits for the disk.

Failures. Write (ENOSPC, EIO, ...): the file is cut back to its last durable length, those who wait for that write get
JournalUnavailable, the next append tries anew. Sync, or the cutting back: JournalFailed, `on_fatal` (by default one
line on stderr and exit status 70), nothing is acknowledged any more.

A torn tail (`segment.is_torn`) of the last segment was never acknowledged: it is copied to `*.torn` and cut off.
Anything else that does not check refuses to open (JournalCorrupt).
"""

from __future__ import annotations

import asyncio
import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from agent.journal.check import Report, repair, verify
from agent.journal.directory import Opened, SegmentFile, create_segment, open_directory, read_directory
from agent.journal.files import (
    Files,
    JournalCorrupt,
    JournalError,
    JournalFailed,
    JournalLocked,
    JournalUnavailable,
    Lock,
    hint_for,
    write_all,
)
from agent.journal.records import Record, Stored
from agent.journal.segment import (
    SEGMENT_HEADER,
    SegmentReader,
    chain_at,
    decode,
    encode,
    frame,
)
from agent.journal.snapshot import Anchor, read_snapshot, write_anchor, write_snapshot
from sandbox.failpoint import failpoint

__all__ = [
    "Files",
    "JournalCorrupt",
    "JournalError",
    "JournalFailed",
    "JournalLocked",
    "JournalUnavailable",
    "Report",
    "Wal",
    "WalHealth",
    "repair",
    "verify",
]

T = TypeVar("T")
MIB = 1 << 20
MAX_WRITE = 8 * MIB  # bytes of one write: bounds how long its waiters wait, not how much they may append
EXIT_FATAL = 70  # EX_SOFTWARE


@dataclass(frozen=True, slots=True)
class WalHealth:
    """One look at the journal. Durations in seconds."""

    seq: int  # newest durable record
    bytes: int  # of all segments
    segments: int
    backlog_bytes: int  # waiting to become durable
    backlog_limit: int
    lag_seconds: float  # how long the oldest waiting append has waited
    sync_seconds: float  # duration of the last fdatasync
    syncs: int
    snapshot_seq: int
    unavailable: str  # why the last write failed, "" when it did not
    torn: str  # what was cut off at opening, "" for nothing


Done = Callable[["list[Stored] | JournalError"], None]


class _Waiter:
    __slots__ = ("done", "encoded", "records", "since", "size")

    def __init__(self, records: Sequence[Record], done: Done) -> None:
        self.records = records
        self.encoded = [encode(record) for record in records]
        self.size = sum([len(e.body) for e in self.encoded])
        self.done = done
        self.since = time.monotonic()


class _Write:
    """One write: what the thread puts on disk, and what becomes of the chain when it has."""

    __slots__ = ("buffers", "chain", "chain_before", "first_seq", "last_seq", "waiters")

    def __init__(self, seq: int, chain: bytes) -> None:
        self.waiters: list[_Waiter] = []
        self.buffers: list[bytes] = []
        self.first_seq = seq + 1
        self.last_seq = seq
        self.chain_before = self.chain = chain

    def add(self, waiter: _Waiter, at: float) -> None:
        self.waiters.append(waiter)
        for encoded in waiter.encoded:
            self.last_seq += 1
            place = self.last_seq - self.first_seq
            header, self.chain = frame(encoded, self.last_seq, at, place, self.chain)
            self.buffers += (header, encoded.body)


def settle(future: asyncio.Future[T], result: T | JournalError) -> None:
    """For who awaits `future`, unless he was cancelled; the records are durable all the same."""
    if future.done():
        return
    if isinstance(result, JournalError):
        future.set_exception(result)
    else:
        future.set_result(result)


def exit_process(error: JournalFailed) -> None:
    """The default `on_fatal`: whatever was acknowledged is durable; stop before anything else is."""
    sys.stderr.write(f"alertmedic: fatal: {error}\n")
    sys.stderr.flush()
    os._exit(EXIT_FATAL)


class Wal:
    """The log of one directory. One writer; appends from one event loop. `open` makes it."""

    def __init__(self, opened: Opened, lock: Lock | None, options: _Options) -> None:
        self.directory = opened.directory
        self._opened = opened
        self._lock = lock
        self._options = options
        self._files = options.files
        self._segments = opened.segments
        self._segments_lock = threading.Lock()  # the list: the thread rotates, a snapshot prunes
        self._seq, self._chain = opened.seq, opened.chain
        self._snapshot_seq = opened.snapshots[-1] if opened.snapshots else 0
        self._torn = opened.torn
        self._pending: deque[_Waiter] = deque()
        self._writing: _Write | None = None
        self._scheduled = False
        self._settled: deque[tuple[_Waiter, int | JournalError]] = deque()  # to be told: first number, or why not
        self._backlog = 0
        self.failed: JournalFailed | None = None
        self._written = sum(s.size for s in opened.replayable(self._snapshot_seq))  # an upper bound
        self._written_before_snapshot = 0
        self._unavailable = ""
        self._closing = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._sync_seconds, self._syncs = 0.0, 0
        self._queue: queue.SimpleQueue[tuple[_Write, asyncio.AbstractEventLoop] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._fd = -1
        if lock is not None:
            self._fd = os.open(self._segments[-1].path, os.O_WRONLY | os.O_CLOEXEC)
            self._offset = self._segments[-1].size

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        segment_bytes: int = 64 * MIB,
        backlog_bytes: int = 64 * MIB,
        read_only: bool = False,
        on_fatal: Callable[[JournalFailed], None] = exit_process,
        files: Files | None = None,
    ) -> Wal:
        """Check everything that is there, cut off a torn tail, take the lock. `read_only` takes no lock, changes
        nothing and tolerates a tail that is growing.

        `on_fatal` is called in the thread that met the failure. Raises JournalCorrupt, JournalLocked,
        JournalUnavailable (no space for a first segment), JournalFailed, and OSError for a directory that cannot be
        made or read.
        """
        options = _Options(segment_bytes, backlog_bytes, on_fatal, files or Files())
        if read_only:
            return cls(read_directory(directory), None, options)
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o700)
        lock = Lock(directory)
        try:
            return cls(open_directory(directory, options.files), lock, options)
        except (JournalError, OSError):
            lock.release()
            raise

    # -- appending

    async def append(self, records: Sequence[Record]) -> list[Stored]:
        """Returns when the records are durable, with their sequence numbers.

        They are in one write, in order, but not atomic over a crash: a crash may keep the first of several. Raises
        JournalUnavailable (backlog full, write failed and was rolled back: nothing of them stays), JournalFailed, and
        ValueError for a record that could not be read back.
        """
        if not records:
            return []
        future: asyncio.Future[list[Stored]] = asyncio.get_running_loop().create_future()
        self.submit(records, partial(settle, future))
        return await future

    def submit(self, records: Sequence[Record], done: Done) -> None:
        """`append` without waiting: `done` is called on the loop, later, with the stored records or with the error of
        the disk. All are called in order of sequence number, also for a caller that has gone. Raises like `append` for
        what is refused at once; then `done` is not called."""
        if self.failed is not None:
            raise self.failed
        if self._lock is None or self._closing:
            raise JournalUnavailable(f"append to {self.directory}: it is closed or read-only")
        waiter = _Waiter(records, done)
        if self._backlog + waiter.size > self._options.backlog_bytes and self._backlog:
            raise JournalUnavailable(
                f"append to {self.directory}: {self._backlog} bytes wait to become durable (at most "
                f"{self._options.backlog_bytes}); hint: the disk is slower than the alerts, see `lag_seconds`"
            )
        self._pending.append(waiter)
        self._backlog += waiter.size
        if self._writing is None and not self._scheduled:
            # Not at once: what else arrives in this turn of the loop shares the sync.
            self._idle.clear()
            self._scheduled = True
            loop = asyncio.get_running_loop()
            loop.call_soon(self._dispatch, loop)

    def _dispatch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Hand what waits to the thread, as one write, unless one is under way."""
        self._scheduled = False
        if self._writing is not None or not self._pending:
            return
        write, at, size = _Write(self._seq, self._chain), time.time(), 0
        while self._pending and (not size or size + self._pending[0].size <= MAX_WRITE):
            waiter = self._pending.popleft()
            write.add(waiter, at)
            size += waiter.size
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="journal", daemon=True)
            self._thread.start()
        self._writing = write
        self._queue.put((write, loop))

    def _finish(self, write: _Write, error: JournalError | None, loop: asyncio.AbstractEventLoop) -> None:
        """On the loop: the write is durable, or is not there at all."""
        self._writing = None
        if error is None:
            self._seq, self._chain = write.last_seq, write.chain
            self._unavailable = ""
            self._written += sum(map(len, write.buffers))
            failpoint("wal_before_ack")
        elif isinstance(error, JournalFailed):
            self.failed = error
        else:
            self._unavailable = str(error)
        seq = write.first_seq
        for waiter in write.waiters:
            self._settled.append((waiter, seq if error is None else error))
            self._backlog -= waiter.size
            seq += len(waiter.records)
        if self.failed is not None:
            self._settled.extend((waiter, self.failed) for waiter in self._pending)
            self._backlog -= sum(waiter.size for waiter in self._pending)
            self._pending.clear()
        else:
            self._dispatch(loop)
        self._tell(loop)

    def _tell(self, loop: asyncio.AbstractEventLoop) -> None:
        """Tell everybody what became of his records. Who raises (the loop reports that) keeps nobody else waiting."""
        settled = self._settled
        try:
            while settled:
                waiter, first = settled.popleft()
                if isinstance(first, int):
                    waiter.done([Stored(n, record) for n, record in enumerate(waiter.records, first)])
                else:
                    waiter.done(first)
        finally:
            if settled:
                loop.call_soon(self._tell, loop)
            elif self.idle:
                self._idle.set()

    # -- the thread

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            write, loop = item
            error = self._write(write)
            if isinstance(error, JournalFailed):
                self._options.on_fatal(error)
            if loop.is_closed():
                return
            loop.call_soon_threadsafe(self._finish, write, error, loop)

    def _write(self, write: _Write) -> JournalError | None:
        try:
            if self._offset >= self._options.segment_bytes:
                self._rotate(write.first_seq, write.chain_before)
        except JournalError as error:
            return error
        failpoint("wal_before_write")
        try:
            end = write_all(self._files, self._fd, write.buffers, self._offset)
        except OSError as error:
            return self._roll_back(error)
        failpoint("wal_after_write")
        failpoint("wal_before_sync")
        started = time.perf_counter()
        try:
            self._files.sync(self._fd)
        except OSError as error:
            return JournalFailed(f"sync {self._segments[-1].path}: {error.strerror}; {hint_for(error)}")
        self._sync_seconds = time.perf_counter() - started
        self._syncs += 1
        failpoint("wal_after_sync")
        self._offset = end
        segment = self._segments[-1]
        segment.size, segment.last_seq = end, write.last_seq
        return None

    def _roll_back(self, error: OSError) -> JournalError:
        path = self._segments[-1].path
        try:
            self._files.truncate(self._fd, self._offset)
        except OSError as second:
            why = f"after {error.strerror}: {second.strerror}"
            return JournalFailed(f"roll back {path} to {self._offset} bytes {why}; {hint_for(second)}")
        return JournalUnavailable(f"write {path}: {error.strerror}, nothing was kept; {hint_for(error)}")

    def _rotate(self, first_seq: int, chain: bytes) -> None:
        """A new segment, durable under its name before the first record goes into it."""
        path = create_segment(self._files, self.directory, first_seq, chain)
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        except OSError as error:  # out of descriptors: the old segment stays open, the next append tries anew
            raise JournalUnavailable(f"open {path}: {error.strerror}; {hint_for(error)}") from error
        os.close(self._fd)
        self._fd = fd
        self._offset = SEGMENT_HEADER
        with self._segments_lock:
            self._segments.append(SegmentFile(path, first_seq, first_seq - 1, SEGMENT_HEADER, chain))

    # -- replay, snapshots, pruning

    def replay(self) -> Iterator[Stored]:
        """What was durable at opening and follows the latest snapshot, in order. Raises JournalCorrupt."""
        after = self._opened.snapshots[-1] if self._opened.snapshots else 0
        for segment in self._opened.replayable(after):
            reader = SegmentReader(segment.path, last=False)
            for found in reader.frames():
                if found.seq > self._opened.seq:
                    return
                if found.seq > after:
                    yield decode(found, segment.path)

    def kept(self) -> Iterator[Stored]:
        """Every record whose segment has not been pruned, oldest first, also those that a snapshot covers: what an
        audit reads. Raises JournalCorrupt."""
        for segment in self._opened.replayable(0):
            for found in SegmentReader(segment.path, last=False).frames():
                if found.seq > self._opened.seq:
                    return
                yield decode(found, segment.path)

    def latest_snapshot(self) -> tuple[int, bytes] | None:
        """(seq, body) of the newest snapshot that checked at opening."""
        if not self._opened.snapshots:
            return None
        seq, _, body = read_snapshot(self._opened.snapshot_path(self._opened.snapshots[-1]))
        return seq, body

    def snapshot(self, seq: int, body: bytes) -> None:
        """Keep `body` as standing for all records up to `seq`, which must be durable. Blocks (call it in a thread); one
        at a time. Raises JournalUnavailable (no space; nothing stays) and JournalFailed."""
        with self._segments_lock:
            holder = next((s for s in reversed(self._segments) if s.first_seq <= seq + 1), None)
        if holder is None or seq > self._seq:
            raise ValueError(f"snapshot of {self.directory}: record {seq} is not in the journal")
        chain, written = chain_at(holder.path, seq), self._written
        with self._fatal():
            write_snapshot(self._files, self.directory, seq, chain, body)
        self._written_before_snapshot = written
        if seq not in self._opened.snapshots:
            self._opened.snapshots.append(seq)
        self._snapshot_seq = seq

    def prune(self) -> int:
        """Remove snapshots but the newest two, and the segments that even the older of them does not need. Returns how
        many segments went. Blocks. With fewer than two good snapshots nothing goes."""
        snapshots = self._opened.snapshots
        if len(snapshots) < 2:
            return 0
        older = snapshots[-2]
        read_snapshot(self._opened.snapshot_path(older))  # the way back must be good before the way there is cut
        for seq in snapshots[:-2]:
            self._opened.snapshot_path(seq).unlink(missing_ok=True)
        del snapshots[:-2]
        with self._segments_lock:
            # The last segment stays; one goes when its successor begins no later than the first record still needed.
            count = sum(1 for s in self._segments[1:] if s.first_seq <= older + 1)
            gone, first = self._segments[:count], self._segments[count]
        if not gone:
            return 0
        with self._fatal():
            write_anchor(self._files, self.directory, Anchor(first.first_seq - 1, first.chain.hex()))
        for segment in gone:
            segment.path.unlink(missing_ok=True)
            failpoint("wal_pruned")
        with self._segments_lock:
            del self._segments[:count]
        return count

    # -- the rest

    @property
    def waiting(self) -> int:
        """How many appends have not been told what became of them."""
        writing = len(self._writing.waiters) if self._writing is not None else 0
        return writing + len(self._pending) + len(self._settled)

    @property
    def idle(self) -> bool:
        return self._writing is None and not self._pending and not self._settled

    @property
    def seq(self) -> int:
        """Newest durable record."""
        return self._seq

    @property
    def bytes_since_snapshot(self) -> int:
        """How much journal a restart would have to replay, about."""
        return self._written - self._written_before_snapshot

    @property
    def chain(self) -> str:
        """Newest chain value, hex."""
        return self._chain.hex()

    def health(self) -> WalHealth:
        waiters = self._writing.waiters if self._writing is not None else self._pending
        with self._segments_lock:
            size, count = sum(s.size for s in self._segments), len(self._segments)
        return WalHealth(
            seq=self._seq,
            bytes=size,
            segments=count,
            backlog_bytes=self._backlog,
            backlog_limit=self._options.backlog_bytes,
            lag_seconds=time.monotonic() - waiters[0].since if waiters else 0.0,
            sync_seconds=self._sync_seconds,
            syncs=self._syncs,
            snapshot_seq=self._snapshot_seq,
            unavailable=self._unavailable,
            torn=self._torn,
        )

    async def close(self) -> None:
        """What was appended becomes durable first. Then the lock is free. Idempotent."""
        if self._closing:
            return
        self._closing = True
        await self._idle.wait()
        if self._thread is not None:
            self._queue.put(None)
            await asyncio.to_thread(self._thread.join)
        self._release()

    async def drain(self) -> None:
        """Returns when nothing waits to become durable."""
        await self._idle.wait()

    def abandon(self) -> None:
        """Let go of files and lock at once, as the death of the process would; for an opening that fails later on."""
        self._closing = True
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._fd)
            self._lock.release()
            self._lock = None

    @contextmanager
    def _fatal(self) -> Iterator[None]:
        """A JournalFailed inside ends the process (or whatever `on_fatal` does), then goes on to the caller."""
        try:
            yield
        except JournalFailed as error:
            self.failed = error
            self._options.on_fatal(error)
            raise


@dataclass(frozen=True, slots=True)
class _Options:
    segment_bytes: int
    backlog_bytes: int
    on_fatal: Callable[[JournalFailed], None]
    files: Files
