"""Snapshots and the anchor: what bounds recovery time and disk, and what keeps the hash chain checkable after pruning.

Used by `wal` and `check`. A snapshot is one opaque body that stands for all records up to `seq`; the anchor says after
which record (and with which chain) the remaining segments begin. Both appear whole or not at all. Never decides what is
pruned.
"""

from __future__ import annotations

import struct
from pathlib import Path
from zlib import crc32

import msgspec

from agent.journal.files import Files, JournalCorrupt, publish, write_file
from agent.journal.segment import NO_CHAIN
from sandbox.failpoint import failpoint

MAGIC = b"AMSNAP\x00\x01"
ANCHOR = "anchor"
_HEADER = struct.Struct("<8sQQ16sII")  # magic, seq, body length, chain after seq, CRC of the body, CRC of those


class Anchor(msgspec.Struct, frozen=True):
    """The remaining segments begin after record `seq`, whose chain value was `chain` (hex)."""

    seq: int = 0
    chain: str = NO_CHAIN.hex()


def snapshot_name(seq: int) -> str:
    return f"{seq:020d}.snap"


def write_snapshot(files: Files, directory: Path, seq: int, chain: bytes, body: bytes) -> Path:
    """tmp, sync, rename, sync of the directory. Raises JournalUnavailable or JournalFailed."""
    head = _HEADER.pack(MAGIC, seq, len(body), chain, crc32(body), 0)[:-4]
    temporary = directory / (snapshot_name(seq) + ".tmp")
    target = directory / snapshot_name(seq)
    write_file(files, temporary, [head + struct.pack("<I", crc32(head)), body])
    failpoint("wal_snapshot_written")
    publish(files, temporary, target)
    failpoint("wal_snapshot_renamed")
    return target


def read_snapshot(path: Path) -> tuple[int, bytes, bytes]:
    """(seq, chain, body). Raises JournalCorrupt, OSError."""
    data = path.read_bytes()
    if len(data) < _HEADER.size:
        raise JournalCorrupt(path, 0, "incomplete snapshot header")
    magic, seq, length, chain, body_crc, crc = _HEADER.unpack_from(data)
    if magic != MAGIC or crc32(data[: _HEADER.size - 4]) != crc:
        raise JournalCorrupt(path, 0, "snapshot header CRC mismatch, or another format version")
    body = data[_HEADER.size :]
    if path.name != snapshot_name(seq) or len(body) != length or crc32(body) != body_crc:
        raise JournalCorrupt(path, _HEADER.size, "snapshot body CRC mismatch")
    return seq, chain, body


def write_anchor(files: Files, directory: Path, anchor: Anchor) -> None:
    body = msgspec.json.encode(anchor)
    text = msgspec.json.encode({"anchor": msgspec.Raw(body), "crc32": crc32(body)}) + b"\n"
    temporary = directory / (ANCHOR + ".tmp")
    write_file(files, temporary, [text])
    publish(files, temporary, directory / ANCHOR)


class _AnchorFile(msgspec.Struct):
    anchor: msgspec.Raw
    crc32: int


def read_anchor(directory: Path) -> Anchor:
    """Where the segments begin; record 1 when nothing was ever pruned. Raises JournalCorrupt."""
    path = directory / ANCHOR
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return Anchor()
    try:
        file = msgspec.json.decode(data, type=_AnchorFile)
        if crc32(bytes(file.anchor)) != file.crc32:
            raise JournalCorrupt(path, None, "anchor CRC mismatch")
        return msgspec.json.decode(file.anchor, type=Anchor)
    except msgspec.MsgspecError as error:
        raise JournalCorrupt(path, None, f"anchor cannot be read: {error}") from error
