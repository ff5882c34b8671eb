"""What `alertmedic journal verify` and `repair` do: look at everything, say what is wrong, and cut only when told to.

Used by the command line. `verify` never changes a byte and may run beside the service. `repair` takes the lock, and
keeps a copy of whatever it takes away; without `truncate` it does only what opening would do (torn tail, leftovers) and
says what truncating would lose.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from agent.journal.directory import Opened, create_segment, cut_tail, numbered, open_directory, read_directory
from agent.journal.files import Files, JournalCorrupt, Lock
from agent.journal.segment import SEGMENT_HEADER, SegmentReader, decode, find_frames
from agent.journal.snapshot import Anchor, read_anchor, read_snapshot, write_anchor


@dataclass(frozen=True, slots=True)
class Lost:
    """What is (or would be) gone. The effect of records `oldest` to `newest` is lost; `newest` None: nothing readable
    says how far they went. `readable` of them can still be read in the copies. Of `text_only` (first, last) a snapshot
    keeps the effect, only the records themselves leave the journal."""

    oldest: int
    newest: int | None
    readable: int = 0
    kinds: tuple[tuple[str, int], ...] = ()
    from_at: float | None = None  # times of the readable ones, unix seconds
    to_at: float | None = None
    text_only: tuple[int, int] | None = None

    def sentence(self) -> str:
        kinds = ", ".join(f"{n} {kind}" for kind, n in self.kinds)
        if self.newest is None:
            text = f"records from {self.oldest} on, if there were any: none of them can be read"
        elif self.newest < self.oldest:
            text = "no record's effect"
        else:
            text = (
                f"records {self.oldest} to {self.newest}, of which {self.readable} can be read in the copies ({kinds})"
            )
        if self.text_only is not None:
            text += f"; of records {self.text_only[0]} to {self.text_only[1]} a snapshot keeps the effect"
        return text


@dataclass(slots=True)
class Report:
    """The state of a journal's directory."""

    directory: Path
    ok: bool = True  # opens; a torn tail and leftovers do not count against it
    first_seq: int = 0
    last_seq: int = 0
    records: int = 0
    segments: int = 0
    snapshots: tuple[int, ...] = ()  # usable ones
    anchor: int = 0
    chain: str = ""  # newest value; keep it elsewhere to notice a rewritten journal
    torn: str = ""
    problems: list[str] = field(default_factory=list)
    lost: Lost | None = None
    done: list[str] = field(default_factory=list)  # what repair did
    copies: list[Path] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For people, one fact a line."""
        if not self.ok and not self.directory.is_dir():  # nothing is damaged, and there is nothing else to say
            return self.problems
        said = [
            f"{self.directory}: {'ok' if self.ok else 'DAMAGED'}",
            f"records {self.first_seq} to {self.last_seq} in {self.segments} segments, after the anchor {self.anchor}",
            f"snapshots after record {', '.join(map(str, self.snapshots)) or 'none'}",
            f"hash chain {self.chain}",
        ]
        if self.torn:
            said.append(f"torn tail (an unfinished write that nobody was told about): {self.torn}")
        said += [f"problem: {p}" for p in self.problems]
        if self.lost is not None:
            said.append(f"{'lost' if self.done else 'truncating would lose'}: {self.lost.sentence()}")
        said += [f"done: {d}" for d in self.done]
        return said + [f"copy: {c}" for c in self.copies]


def verify(directory: Path) -> Report:
    """Check every segment from the anchor on, every record's shape, every snapshot, and how they fit together."""
    report = Report(directory)
    if not directory.is_dir():
        report.ok = False
        report.problems.append(f"verify {directory}: there is no journal; hint: is the state directory right?")
        return report
    try:
        opened = read_directory(directory)
        _describe(report, opened)
        for segment in opened.segments:
            for found in SegmentReader(segment.path, last=True).frames():
                decode(found, segment.path)
    except JournalCorrupt as error:
        _blame(report, error)
        _foresee(report, error)
    return report


def repair(directory: Path, *, truncate: bool = False, files: Files | None = None) -> Report:
    """Put right what can be put right without loss; with `truncate`, also what cannot, keeping copies of what goes.

    What remains, best first: everything from a whole segment on that a good snapshot reaches; the newest good snapshot
    alone; the records before the damage. A journal written by a newer version is left alone. Raises JournalLocked while
    the service runs, JournalUnavailable (no space for the copies), JournalFailed, OSError.
    """
    files = files or Files()
    if not directory.is_dir():
        return verify(directory)
    lock = Lock(directory)
    try:
        before = verify(directory)
        if before.ok:
            opened = open_directory(directory, files)
            before.done += [f"cut off the torn tail of {before.torn}"] if opened.torn else []
            return before
        if before.lost is None or not truncate:
            return before
        damage = _survey(directory)
        done, copies = _cut(damage, files)
        open_directory(directory, files)
        after = verify(directory)
        after.problems = [f"was: {p}" for p in before.problems] + after.problems
        after.lost, after.done, after.copies = damage.lost, done, copies
        return after
    finally:
        lock.release()


def _describe(report: Report, opened: Opened) -> None:
    report.first_seq = opened.segments[0].first_seq if opened.segments else opened.anchor.seq + 1
    report.last_seq = opened.seq
    report.records = report.last_seq - report.first_seq + 1
    report.segments = len(opened.segments)
    report.snapshots = tuple(opened.snapshots)
    report.anchor = opened.anchor.seq
    report.chain = opened.chain.hex()
    report.torn = opened.torn
    report.problems += [f"{p.name}: a snapshot that does not check; the one before it is used" for p in opened.broken]


def _blame(report: Report, error: JournalCorrupt) -> None:
    report.ok = False
    where = "" if error.offset is None else f" at byte {error.offset}"
    report.problems.append(f"{error.path.name}{where}: {error.reason}; hint: {error.hint}")


def _foresee(report: Report, error: JournalCorrupt) -> None:
    """Say how much is good and what truncating would lose."""
    damage = _survey(report.directory)
    report.first_seq, report.last_seq = damage.first_seq, damage.seq
    report.records = max(0, damage.seq - damage.first_seq + 1)
    report.segments, report.chain = len(damage.good), damage.chain.hex()
    report.snapshots, report.anchor = tuple(seq for seq, _ in damage.snapshots), damage.anchor.seq
    if not error.newer and damage.way != "none":
        report.lost = damage.lost


@dataclass(slots=True)
class _Damage:
    """A damaged directory: what can be believed, what cannot, and the best way out."""

    directory: Path
    anchor: Anchor
    good: list[Path] = field(default_factory=list)  # whole segments
    bad: list[Path] = field(default_factory=list)  # the damaged one first
    offset: int = 0  # of the first bad byte in bad[0]; 0: the whole file
    first_seq: int = 1
    seq: int = 0  # last good record before the damage
    chain: bytes = b""
    snapshots: list[tuple[int, bytes]] = field(default_factory=list)  # good ones, ascending: (seq, chain)
    way: Literal["resume", "snapshot", "truncate", "none"] = "none"
    resume_at: int = 0  # for "resume": index in `bad` of the first segment to keep
    lost: Lost | None = None


def _survey(directory: Path) -> _Damage:
    paths = numbered(directory, ".wal")
    damage = _Damage(directory, _believable_anchor(directory, paths))
    for path in numbered(directory, ".snap"):
        with suppress(JournalCorrupt):
            seq, chain, _ = read_snapshot(path)
            damage.snapshots.append((seq, chain))
    while len(paths) > 1 and int(paths[1].stem) <= damage.anchor.seq + 1:
        paths.pop(0)
    damage.first_seq = damage.anchor.seq + 1
    run = _Run(damage.anchor.seq, bytes.fromhex(damage.anchor.chain)).read(paths)
    damage.good, damage.bad = paths[: run.whole], paths[run.whole :]
    damage.seq, damage.chain, damage.offset = run.seq, run.chain, run.offset
    _choose(damage)
    damage.lost = _lost(damage)
    return damage


def _believable_anchor(directory: Path, paths: list[Path]) -> Anchor:
    """The anchor, or what the first segment's header says when the anchor itself is damaged."""
    with suppress(JournalCorrupt):
        return read_anchor(directory)
    for path in paths[:1]:
        with suppress(JournalCorrupt):
            first = SegmentReader(path, last=False)
            return Anchor(first.first_seq - 1, first.chain.hex())
    return Anchor()


@dataclass(slots=True)
class _Run:
    """As many segments as follow each other without fault, from a record number and chain value on."""

    seq: int
    chain: bytes
    whole: int = 0  # segments that are good to their end
    offset: int = 0  # where the good part of the next one ends

    def read(self, paths: list[Path]) -> _Run:
        for path in paths:
            self.offset = 0
            with suppress(JournalCorrupt):
                reader = SegmentReader(path, last=path is paths[-1])
                if (reader.first_seq, reader.chain) == (self.seq + 1, self.chain):
                    self.offset = SEGMENT_HEADER
                    for found in reader.frames():
                        decode(found, path)
                        self.seq, self.chain, self.offset = found.seq, found.chain, found.end
                    if reader.damage is None or reader.damage.torn:
                        self.whole, self.offset = self.whole + 1, 0
                        continue
            break
        return self


def _choose(damage: _Damage) -> None:
    newest = damage.snapshots[-1][0] if damage.snapshots else 0
    for n, path in enumerate(damage.bad):
        if (n == 0 and damage.offset) or int(path.stem) > newest + 1:
            continue
        with suppress(JournalCorrupt):
            reader = SegmentReader(path, last=False)
            run = _Run(reader.first_seq - 1, reader.chain).read(damage.bad[n:])
            if n + run.whole == len(damage.bad) and run.seq >= newest:
                damage.way, damage.resume_at = "resume", n
                return
    if newest > damage.seq:
        damage.way = "snapshot"
    elif damage.anchor.seq == 0 or newest >= damage.anchor.seq:
        damage.way = "truncate"


def _lost(damage: _Damage) -> Lost:
    """Read what can be read of what goes."""
    newest_snapshot = damage.snapshots[-1][0] if damage.snapshots else 0
    if not damage.bad and damage.way == "truncate":  # the anchor alone is damaged
        return Lost(oldest=damage.seq + 1, newest=damage.seq)
    going = [(path, damage.offset if n == 0 else 0) for n, path in enumerate(damage.bad)]
    keep = damage.seq
    text_only = None
    if damage.way == "resume":
        resumed = int(damage.bad[damage.resume_at].stem)
        return Lost(oldest=resumed, newest=resumed - 1, text_only=(damage.first_seq, resumed - 1))
    if damage.way == "snapshot":
        keep = newest_snapshot
        text_only = (damage.first_seq, newest_snapshot)
    found = [f for path, offset in going for f in find_frames(path.read_bytes(), offset) if f.seq > keep]
    return Lost(
        oldest=keep + 1,
        newest=max((f.seq for f in found), default=None),
        readable=len(found),
        kinds=tuple(sorted(Counter(f.kind for f in found).items())),
        from_at=min((f.at for f in found), default=None),
        to_at=max((f.at for f in found), default=None),
        text_only=text_only,
    )


def _cut(damage: _Damage, files: Files) -> tuple[list[str], list[Path]]:
    """Take the chosen way. Copies first, then the anchor: a crash in between leaves something to repair again."""
    directory, done, copies = damage.directory, [], []
    anchor = damage.anchor
    match damage.way:
        case "resume":
            going = damage.good + damage.bad[: damage.resume_at]
            reader = SegmentReader(damage.bad[damage.resume_at], last=False)
            anchor = Anchor(reader.first_seq - 1, reader.chain.hex())
            done.append(f"the journal now begins with record {reader.first_seq}, after its snapshot")
        case "snapshot":
            going = damage.good + damage.bad
            seq, chain = damage.snapshots[-1]
            anchor = Anchor(seq, chain.hex())
            done.append(f"the journal now begins after the snapshot of record {seq}")
        case _:
            going = damage.bad
            if damage.offset:
                copies.append(cut_tail(files, damage.bad[0], damage.offset, "lost"))
                going = damage.bad[1:]
            done.append(f"the journal now ends with record {damage.seq}" if damage.bad else "wrote the anchor anew")
    for path in going:
        copies.append(path.rename(path.with_name(path.name + ".lost")))
    files.sync_directory(directory)
    if anchor != Anchor() or (directory / "anchor").exists():
        write_anchor(files, directory, anchor)
    if not numbered(directory, ".wal"):
        last, chain = (anchor.seq, bytes.fromhex(anchor.chain))
        create_segment(files, directory, last + 1, chain)
    return done, copies
