"""What the journal asks of the file system: the few calls whose failure has a meaning, and the errors they become.

Used by the rest of this package. `Files` is a class of its own so that tests can make a write run short, a disk full or
a sync fail at a chosen call; the service always uses the real one. Nothing here retries: what a failure means is
decided by the caller, once (a failed write is rolled back, a failed sync is fatal).
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from pathlib import Path

IOV_MAX = 1024  # buffers in one pwritev, Linux


class JournalError(Exception):
    """Base. `str()` is a sentence with the operation, the object and a hint for the operator."""


class JournalUnavailable(JournalError):  # noqa: N818
    """Not recorded and nothing half-written; it may work later. The webhook answers 503, which Alertmanager retries."""


class JournalFailed(JournalError):  # noqa: N818
    """A sync or a roll-back failed: what is on disk is unknown. Fatal; never retried, because a second fsync may report
    success for pages the kernel has already dropped."""


class JournalCorrupt(JournalError):  # noqa: N818
    """The journal refuses to open: what it holds is not what was written (or was written by a newer version)."""

    def __init__(self, path: Path, offset: int | None, reason: str, hint: str = "", *, newer: bool = False) -> None:
        self.path, self.offset, self.reason = path, offset, reason
        self.newer = newer  # not damaged: written by a version that knows more
        where = f"{path}" if offset is None else f"{path} at byte {offset}"
        self.hint = hint or "`alertmedic journal verify` shows more, `alertmedic journal repair` what would be lost"
        super().__init__(f"open journal: {where}: {reason}; hint: {self.hint}")


class JournalLocked(JournalError):  # noqa: N818
    """Another process holds the journal."""


class Files:
    """The real calls. All raise OSError."""

    def write(self, fd: int, buffers: Sequence[bytes], offset: int) -> int:
        """Bytes written, which may be fewer than given."""
        return os.pwritev(fd, buffers, offset)

    def sync(self, fd: int) -> None:
        os.fdatasync(fd)

    def truncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def rename(self, source: Path, target: Path) -> None:
        os.replace(source, target)  # noqa: PTH105

    def sync_directory(self, directory: Path) -> None:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def write_all(files: Files, fd: int, buffers: Sequence[bytes], offset: int) -> int:
    """Write everything at `offset`; the offset after it. Short writes are continued. Raises OSError."""
    at = 0
    while at < len(buffers):
        part = buffers[at : at + IOV_MAX]
        done = files.write(fd, part, offset)
        offset += done
        if done == sum(map(len, part)):
            at += len(part)
            continue
        rest = b"".join(part)[done:]
        while rest:
            done = files.write(fd, [rest], offset)
            offset += done
            rest = rest[done:]
        at += len(part)
    return offset


def write_file(files: Files, path: Path, buffers: Sequence[bytes]) -> None:
    """Create `path` with mode 0600 and make its content durable (not its name). An OSError of a write leaves no file
    and becomes JournalUnavailable, one of the sync JournalFailed."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise JournalUnavailable(f"create {path}: {error.strerror}; {hint_for(error)}") from error
    try:
        try:
            write_all(files, fd, buffers, 0)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise JournalUnavailable(f"write {path}: {error.strerror}; {hint_for(error)}") from error
        try:
            files.sync(fd)
        except OSError as error:
            raise JournalFailed(f"sync {path}: {error.strerror}; {hint_for(error)}") from error
    finally:
        os.close(fd)


def publish(files: Files, path: Path, target: Path) -> None:
    """Give a durable file its name, durably."""
    try:
        files.rename(path, target)
        files.sync_directory(target.parent)
    except OSError as error:
        raise JournalFailed(f"rename {path} to {target.name}: {error.strerror}; {hint_for(error)}") from error


def hint_for(error: OSError) -> str:
    return f"hint: see `df -h` and the kernel's log for that disk (errno {error.errno})"


class Lock:
    """flock on `directory`/lock, which names its holder's pid. Freed by `release` or by the process's death."""

    def __init__(self, directory: Path) -> None:
        path = directory / "lock"
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            pid = os.pread(self._fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(self._fd)
            raise JournalLocked(
                f"lock {path}: process {pid} holds it; hint: is alertmedic running already? Use another state directory"
            ) from error
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        os.close(self._fd)
