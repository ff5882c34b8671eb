"""The journal and the state it makes (public signatures; the body follows in the next commits)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from agent.incidents import Changes, State
from agent.journal.records import Record, Stored
from agent.journal.wal import JournalFailed, WalHealth

Listener = Callable[[Stored, Changes], None]


class Store:
    state: State

    @classmethod
    def open(
        cls,
        state_dir: Path,
        *,
        segment_bytes: int = 64 << 20,
        backlog_bytes: int = 64 << 20,
        snapshot_bytes: int = 64 << 20,
        on_fatal: Callable[[JournalFailed], None] | None = None,
    ) -> Store:
        """Journal in `state_dir`/journal: latest snapshot, then what follows."""
        raise NotImplementedError

    async def record(self, *records: Record) -> list[Stored]:
        """Durable, applied in order, listeners told; then returns. Raises JournalUnavailable, JournalFailed, IllegalMove."""
        raise NotImplementedError

    def subscribe(self, callback: Listener) -> Callable[[], None]:
        """`callback(stored, changes)` on the loop after each record is applied; the result unsubscribes. Must not block or raise."""
        raise NotImplementedError

    def health(self) -> WalHealth:
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError


def read_state(state_dir: Path) -> State:
    """Read-only, with the service running or stopped. An empty State when there is no journal."""
    raise NotImplementedError
