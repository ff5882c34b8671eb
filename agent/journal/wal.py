"""The local write-ahead log (public signatures; the body follows in the next commits)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.journal.records import Record, Stored


class JournalError(Exception):
    """Base. `str()` is a sentence with the operation, the object and a hint."""


class JournalUnavailable(JournalError):  # noqa: N818
    """Not recorded, nothing half-written, may work later: answer 503."""


class JournalFailed(JournalError):  # noqa: N818
    """A failed fsync or roll-back: fatal."""


class JournalCorrupt(JournalError):  # noqa: N818
    """Refuses to open."""


class JournalLocked(JournalError):  # noqa: N818
    """Another process holds it."""


@dataclass(frozen=True, slots=True)
class WalHealth:
    seq: int  # newest durable record
    bytes: int
    segments: int
    backlog_bytes: int  # waiting to become durable
    lag_seconds: float  # how long the oldest waiting append has waited
    sync_seconds: float  # duration of the last fdatasync
    snapshot_seq: int
    unavailable: str  # why the last write failed, "" when it did not
    torn: str  # what was cut off at opening, "" for nothing


class Wal:
    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        segment_bytes: int = 64 << 20,
        backlog_bytes: int = 64 << 20,
        read_only: bool = False,
        on_durable: Callable[[Sequence[Stored]], None] | None = None,
        on_fatal: Callable[[JournalFailed], None] | None = None,
    ) -> Wal:
        raise NotImplementedError

    async def append(self, records: Sequence[Record]) -> list[Stored]:
        raise NotImplementedError

    def replay(self) -> Iterator[Stored]:
        raise NotImplementedError

    def snapshot(self, seq: int, body: bytes) -> None:
        raise NotImplementedError

    def latest_snapshot(self) -> tuple[int, bytes] | None:
        raise NotImplementedError

    def prune(self) -> int:
        raise NotImplementedError

    def health(self) -> WalHealth:
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError
