"""Segments and records as bytes: framing, reading with every check, and telling a torn tail from damage.

The format is described in `wal`. Used by `wal`, `snapshot` and `check`. Reads files, writes none.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import msgspec

from agent.journal.files import JournalCorrupt
from agent.journal.records import KINDS, VERSIONS, AlertsReceived, PayloadReceived, Record, Stored

SEGMENT_MAGIC = b"AMWAL\x00\x00\x01"
RECORD_MAGIC = b"\xa7rec"
NO_CHAIN = bytes(16)
SECTOR = 512
MAX_BODY = 64 << 20
MAX_KIND = 0xFFFF  # bytes of a kind's name: the width of its length

_SEGMENT = struct.Struct("<8sQd16sI")  # magic, first seq, created, chain before it, CRC of those
_MIDDLE = struct.Struct("<IIQdIHH")  # body length, CRC of kind and body, seq, time, place, version, kind length
_CRC = struct.Struct("<I")
SEGMENT_HEADER = _SEGMENT.size
RECORD_HEADER = 4 + 4 + _MIDDLE.size + 16


class Encoded(NamedTuple):
    """A record's kind (with its CRC, version) and body, ready to be framed."""

    kind: bytes
    kind_crc: int
    version: int
    body: bytes


class Frame(NamedTuple):
    seq: int
    at: float
    place: int
    version: int
    kind: str
    body: bytes
    chain: bytes
    offset: int
    end: int


_WRITTEN = {t: (name.encode(), crc32(name.encode()), VERSIONS[name]) for name, t in KINDS.items()}
_encode = msgspec.json.Encoder().encode
_DECODERS: dict[str, msgspec.json.Decoder[Any]] = {name: msgspec.json.Decoder(t) for name, t in KINDS.items()}


def encode(record: Record) -> Encoded:
    """Raises ValueError for a record that could not be read back (a NaN, more than 64 MiB)."""
    kind, kind_crc, version = _WRITTEN[type(record)]
    body = _encode(record)
    if len(body) > MAX_BODY:
        raise ValueError(f"append to journal: a record of {len(body)} bytes, at most {MAX_BODY} are possible")
    if not _finite(record, body):
        try:
            _DECODERS[kind.decode()].decode(body)
        except msgspec.MsgspecError as error:
            raise ValueError(f"append to journal: {kind.decode()} could not be read back: {error}") from error
    return Encoded(kind, kind_crc, version, body)


def _finite(record: Record, body: bytes) -> bool:
    """Surely without NaN and infinity, of which JSON makes a null that a reader would refuse for ever after? Alerts are
    asked themselves: they are the many, and searching their text takes longer than everything else here."""
    if isinstance(record, PayloadReceived):
        return isfinite(record.at)
    if isinstance(record, AlertsReceived):
        return isfinite(sum([a.starts_at + (a.ends_at or 0.0) for a in record.alerts], record.at))
    return b"null" not in body


def decode(frame: Frame, path: Path) -> Stored:
    """Raises JournalCorrupt for a body that is not of its kind's shape."""
    try:
        return Stored(frame.seq, _DECODERS[frame.kind].decode(frame.body))
    except msgspec.MsgspecError as error:
        raise JournalCorrupt(path, frame.offset, f"record {frame.seq} ({frame.kind}): {error}") from error


def segment_name(first_seq: int) -> str:
    return f"{first_seq:020d}.wal"


def segment_header(first_seq: int, created: float, chain: bytes) -> bytes:
    body = _SEGMENT.pack(SEGMENT_MAGIC, first_seq, created, chain, 0)[:-4]
    return body + _CRC.pack(crc32(body))


def frame(encoded: Encoded, seq: int, at: float, place: int, chain: bytes) -> tuple[bytes, bytes]:
    """(header and kind, chain after it); the body follows on disk as it is."""
    kind, kind_crc, version, body = encoded
    middle = _MIDDLE.pack(len(body), crc32(body, kind_crc), seq, at, place, version, len(kind))
    digest = blake2b(chain + middle + kind, digest_size=16)
    digest.update(body)
    chain = digest.digest()
    sealed = middle + chain
    return RECORD_MAGIC + _CRC.pack(crc32(sealed)) + sealed + kind, chain


def parse(data: bytes, offset: int = 0) -> tuple[Frame | None, str]:
    """The record at `offset` of `data`, or why there is none. Checks both CRCs, not the chain."""
    header = data[offset : offset + RECORD_HEADER]
    if len(header) < RECORD_HEADER:
        return None, "incomplete header"
    if header[:4] != RECORD_MAGIC:
        return None, "no record begins here"
    if _CRC.unpack_from(header, 4)[0] != crc32(header[8:]):
        return None, "header CRC mismatch"
    length, body_crc, seq, at, place, version, kind_length = _MIDDLE.unpack_from(header, 8)
    start = offset + RECORD_HEADER
    kind = data[start : start + kind_length]
    end = start + kind_length + length
    if len(data) < end:
        return None, "incomplete body"
    body = data[start + kind_length : end]
    if crc32(body, crc32(kind)) != body_crc:
        return None, "body CRC mismatch"
    return Frame(seq, at, place, version, kind.decode("utf-8", "replace"), body, header[-16:], offset, end), ""


@dataclass(frozen=True, slots=True)
class Damage:
    """Where reading stopped before the end of the file. `torn`: an unfinished write, which nobody was told about."""

    offset: int
    reason: str
    torn: bool


class SegmentReader:
    """Reads one segment with every check. Iterate `frames()`; then `seq`, `chain` and `offset` are those of the last
    good record (of the header when there is none) and `damage` says why it stopped early.

    Raises JournalCorrupt for a header that is not one, and for a kind or version this program does not know.
    """

    def __init__(self, path: Path, *, last: bool) -> None:
        self.path = path
        self.last = last
        self.damage: Damage | None = None
        try:
            with path.open("rb") as file:
                header = file.read(SEGMENT_HEADER)
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise JournalCorrupt(path, 0, f"cannot be read: {error.strerror}") from error
        if len(header) < SEGMENT_HEADER or header[: len(SEGMENT_MAGIC)] != SEGMENT_MAGIC:
            raise JournalCorrupt(path, 0, "no segment header, or one of another format version")
        _, self.first_seq, self.created, self.chain, crc = _SEGMENT.unpack(header)
        if crc32(header[:-4]) != crc:
            raise JournalCorrupt(path, 0, "segment header CRC mismatch")
        if path.name != segment_name(self.first_seq):
            raise JournalCorrupt(path, 0, f"its header says that it begins with record {self.first_seq}")
        self.start_chain = self.chain
        self.seq = self.first_seq - 1
        self.offset = SEGMENT_HEADER

    def frames(self) -> Iterator[Frame]:
        with self.path.open("rb") as file:
            file.seek(SEGMENT_HEADER)
            while True:
                head = file.read(RECORD_HEADER)
                if not head:
                    return
                data = head
                if len(head) == RECORD_HEADER:
                    data += file.read(min(sum(_lengths(head)), MAX_BODY + MAX_KIND))
                found, reason = parse(data)
                if found is None:
                    return self._stop(reason)
                if found.seq != self.seq + 1:
                    return self._damaged(f"record {found.seq} where {self.seq + 1} belongs: records are missing")
                if _chain(self.chain, data) != found.chain:
                    return self._damaged(f"record {found.seq} breaks the hash chain: it, or one before it, was changed")
                self._known(found)
                self.seq, self.chain = found.seq, found.chain
                start, self.offset = self.offset, self.offset + found.end
                yield found._replace(offset=start, end=self.offset)

    def _damaged(self, reason: str) -> None:
        self.damage = Damage(self.offset, reason, torn=False)

    def _known(self, found: Frame) -> None:
        if VERSIONS.get(found.kind) != found.version:
            raise JournalCorrupt(
                self.path,
                self.offset,
                f"record {found.seq} is of kind {found.kind!r}, version {found.version}, unknown to this program",
                "it was written by a newer alertmedic: run that one, or at least the version that wrote the journal",
                newer=True,
            )

    def _stop(self, reason: str) -> None:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            rest = file.read()
        torn = self.last and is_torn(rest, self.offset, self.seq + 1)
        self.damage = Damage(self.offset, reason, torn)


def _chain(before: bytes, data: bytes) -> bytes:
    digest = blake2b(before + data[8 : RECORD_HEADER - 16], digest_size=16)
    digest.update(memoryview(data)[RECORD_HEADER:])
    return digest.digest()


def _lengths(head: bytes) -> tuple[int, int]:
    fields = _MIDDLE.unpack_from(head, 8)
    return fields[0], fields[-1]


def is_torn(rest: bytes, offset: int, expected: int) -> bool:
    """Is `rest`, the last segment from the bad record (which should be number `expected`) on, an unfinished write?

    A crash during a write leaves a record that is cut off, or has sectors that were never written and read as zeros
    (records hold no NUL but in their headers, so a sector of zeros is never theirs). A complete record with wrong bytes
    is damage. So is a record behind it that belongs to a *later* write: that one was begun only after this was durable.
    """
    for later in find_frames(rest, 1):
        if later.seq - later.place > expected:
            return False
    if not RECORD_MAGIC.startswith(rest[:4]) and any(rest[:SECTOR]) and not _zero_sector(rest, offset):
        return False
    found, reason = parse(rest)
    return found is None and (reason.startswith("incomplete") or _zero_sector(rest, offset))


def _zero_sector(rest: bytes, offset: int) -> bool:
    at = 0
    while at < len(rest):
        end = min(len(rest), at + SECTOR - (offset + at) % SECTOR)
        if not any(rest[at:end]):
            return True
        at = end
    return False


def find_frames(data: bytes, start: int = 0) -> Iterator[Frame]:
    """Whole records anywhere in `data`, found by their magic: what can still be read behind damage."""
    at = data.find(RECORD_MAGIC, start)
    while at >= 0:
        found, _ = parse(data, at)
        if found is not None:
            yield found
        at = data.find(RECORD_MAGIC, found.end if found is not None else at + 1)


def chain_at(path: Path, seq: int) -> bytes:
    """The chain after record `seq`, from the headers of the segment that holds it. LookupError if it does not."""
    with path.open("rb") as file:
        header = file.read(SEGMENT_HEADER)
        first, chain = _SEGMENT.unpack(header)[1], _SEGMENT.unpack(header)[3]
        if seq == first - 1:
            return bytes(chain)
        while len(head := file.read(RECORD_HEADER)) == RECORD_HEADER:
            length, _, at, *_, kind_length = _MIDDLE.unpack_from(head, 8)
            if at == seq:
                return head[-16:]
            file.seek(length + kind_length, 1)
    raise LookupError(f"{path} does not hold record {seq}")
