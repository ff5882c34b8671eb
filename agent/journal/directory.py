"""Opening a journal's directory: every segment checked from the anchor on, torn tail cut, leftovers removed.

Used by `wal` and `check`. The rule: what cannot have been acknowledged is put aside and reported; whatever else does
not fit together raises JournalCorrupt, and nothing is changed then.
"""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from agent.journal.files import Files, JournalCorrupt, publish, write_file
from agent.journal.segment import SEGMENT_HEADER, SegmentReader, segment_header, segment_name
from agent.journal.snapshot import Anchor, read_anchor, read_snapshot, snapshot_name
from sandbox.failpoint import failpoint

_TWENTY_DIGITS = re.compile("[0-9]{20}")
READ_ATTEMPTS = 5  # of a reader beside a writer that rotates, prunes and rolls back


@dataclass(slots=True)
class SegmentFile:
    path: Path
    first_seq: int
    last_seq: int
    size: int
    chain: bytes  # before its first record


@dataclass(slots=True)
class Opened:
    """A directory that checked. `seq` and `chain` are those of the last good record."""

    directory: Path
    anchor: Anchor
    segments: list[SegmentFile] = field(default_factory=list)
    snapshots: list[int] = field(default_factory=list)  # good ones, ascending
    seq: int = 0
    chain: bytes = b""
    torn: str = ""
    torn_at: int | None = None  # offset in the last segment
    broken: list[Path] = field(default_factory=list)  # snapshots that did not check

    def snapshot_path(self, seq: int) -> Path:
        return self.directory / snapshot_name(seq)

    def replayable(self, after: int) -> list[SegmentFile]:
        return [s for s in self.segments if s.last_seq > after]


def numbered(directory: Path, suffix: str) -> list[Path]:
    """Files named by 20 digits and `suffix`, ascending."""
    return sorted(p for p in directory.iterdir() if p.suffix == suffix and _TWENTY_DIGITS.fullmatch(p.stem))


def create_segment(files: Files, directory: Path, first_seq: int, chain: bytes) -> Path:
    """Appears whole and durable, or not at all. Raises JournalUnavailable, JournalFailed."""
    path = directory / segment_name(first_seq)
    temporary = path.with_suffix(".wal.tmp")
    write_file(files, temporary, [segment_header(first_seq, time.time(), chain)])
    publish(files, temporary, path)
    failpoint("wal_segment_created")
    return path


def inspect(directory: Path) -> Opened:
    """Read and check everything, change nothing. Raises JournalCorrupt, OSError."""
    opened = Opened(directory, read_anchor(directory))
    chains = _read_snapshots(opened)
    opened.seq, opened.chain = opened.anchor.seq, bytes.fromhex(opened.anchor.chain)
    paths = numbered(directory, ".wal")
    while len(paths) > 1 and int(paths[1].stem) <= opened.anchor.seq + 1:
        paths.pop(0)  # left over from a pruning that a crash cut short
    for path in paths:
        _check_segment(opened, path, chains, last=path is paths[-1])
    if not paths and (opened.anchor.seq or opened.snapshots):
        raise JournalCorrupt(directory, None, "there is a snapshot or an anchor but no segment: files are missing")
    if opened.snapshots and opened.snapshots[-1] > opened.seq:
        raise JournalCorrupt(
            directory / snapshot_name(opened.snapshots[-1]),
            None,
            f"the snapshot stands for {opened.snapshots[-1]} records, the journal ends at {opened.seq}",
        )
    reachable = [seq for seq in opened.snapshots if seq >= opened.anchor.seq]
    if opened.anchor.seq and not reachable:
        raise JournalCorrupt(
            opened.broken[-1] if opened.broken else directory,
            None,
            f"no usable snapshot, and records up to {opened.anchor.seq} were pruned",
        )
    opened.snapshots = reachable
    return opened


def _read_snapshots(opened: Opened) -> dict[int, bytes]:
    """Good snapshots into `opened`; their chain values by sequence number."""
    chains = {}
    for path in numbered(opened.directory, ".snap"):
        try:
            seq, chain, _ = read_snapshot(path)
        except JournalCorrupt:
            opened.broken.append(path)  # told by `verify`; the previous one takes its place
            continue
        opened.snapshots.append(seq)
        chains[seq] = chain
    return chains


def _check_segment(opened: Opened, path: Path, chains: dict[int, bytes], *, last: bool) -> None:
    reader = SegmentReader(path, last=last)
    if reader.first_seq != opened.seq + 1:
        raise JournalCorrupt(
            path, 0, f"it begins with record {reader.first_seq}, {opened.seq + 1} was expected: a segment is missing"
        )
    if reader.chain != opened.chain:
        raise JournalCorrupt(path, 0, "its header does not continue the hash chain of what comes before it")
    for found in reader.frames():
        known = chains.get(found.seq)
        if known is not None and known != found.chain:
            raise JournalCorrupt(path, found.offset, f"record {found.seq} is not the one that the snapshot was made of")
    damage = reader.damage
    if damage is not None:
        if not damage.torn:
            raise JournalCorrupt(path, damage.offset, damage.reason)
        opened.torn_at = damage.offset
        lost = path.stat().st_size - damage.offset
        opened.torn = f"{path.name}: {lost} bytes from {damage.offset} on ({damage.reason}) after record {reader.seq}"
    opened.seq, opened.chain = reader.seq, reader.chain
    opened.segments.append(SegmentFile(path, reader.first_seq, reader.seq, reader.offset, reader.start_chain))


def _look(directory: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times: equal before and after, nobody wrote in between."""
    seen = []
    with suppress(FileNotFoundError):
        for entry in os.scandir(directory):
            found = entry.stat()
            seen.append((entry.name, found.st_size, found.st_mtime_ns))
    return sorted(seen)


def read_directory(directory: Path) -> Opened:
    """`inspect` beside a writer that may be rotating, pruning or rolling back meanwhile. A journal that is not there is
    an empty one. Raises JournalCorrupt when it does not check several times in a row."""
    for attempt in range(READ_ATTEMPTS):
        before = _look(directory)
        try:
            return inspect(directory)
        except FileNotFoundError:
            if not directory.exists():
                return Opened(directory, Anchor())
        except JournalCorrupt:
            if attempt == READ_ATTEMPTS - 1 or _look(directory) == before:
                raise
        time.sleep(0.02 * (attempt + 1))
    raise JournalCorrupt(directory, None, "its files kept disappearing while they were read")


def open_directory(directory: Path, files: Files) -> Opened:
    """`inspect`, then put it in order for a writer: first segment, torn tail, leftovers. The caller holds the lock."""
    opened = inspect(directory)
    kept = {segment.path for segment in opened.segments}
    for path in [*directory.glob("*.tmp"), *(p for p in numbered(directory, ".wal") if p not in kept)]:
        path.unlink()
    for path in opened.broken:
        path.rename(path.with_suffix(".snap.broken"))
    for path in numbered(directory, ".snap"):
        if int(path.stem) not in opened.snapshots:
            path.unlink()  # older than the anchor: the records behind it are gone
    if not opened.segments:
        path = create_segment(files, directory, 1, opened.chain)
        opened.segments.append(SegmentFile(path, 1, 0, SEGMENT_HEADER, opened.chain))
    if opened.torn_at is not None:
        cut_tail(files, opened.segments[-1].path, opened.torn_at, "torn")
    return opened


def cut_tail(files: Files, path: Path, offset: int, suffix: str) -> Path:
    """Keep what follows `offset` in a copy beside the segment, durably, then cut it off. The copy's path."""
    with path.open("r+b") as file:
        file.seek(offset)
        rest = file.read()
        copy = path.with_name(f"{path.name}.{offset}.{suffix}")
        temporary = copy.with_name(copy.name + ".tmp")
        write_file(files, temporary, [rest])
        publish(files, temporary, copy)
        files.truncate(file.fileno(), offset)
        files.sync(file.fileno())
    return copy
