"""`journal verify`, `repair`, `dump`: the journal's files, below what the service makes of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from agent.commands.output import CommandError, Exit, emit_json, emit_json_line, say

if TYPE_CHECKING:
    from agent.journal.check import Report


def verify(state_dir: Path, *, as_json: bool) -> Exit:
    """Checks everything and changes nothing; may run beside the service."""
    from agent.journal.check import verify as check
    from agent.store import journal_directory

    return _report(check(journal_directory(state_dir)), as_json=as_json)


def repair(state_dir: Path, *, truncate: bool, as_json: bool) -> Exit:
    """Without `truncate` only what opening would do; says what truncating would lose."""
    from agent.journal.check import repair as mend
    from agent.store import journal_directory

    directory = journal_directory(state_dir)
    if not directory.is_dir():
        raise CommandError(f"journal repair: no journal in {state_dir}", "check --state-dir")
    return _report(mend(directory, truncate=truncate), as_json=as_json)


def dump(state_dir: Path, *, after: int) -> Exit:
    """Every record that is still there, one JSON object a line: `{"seq", "record": {"type", ...}}`."""
    import msgspec

    from agent.journal.wal import Wal
    from agent.store import journal_directory

    directory = journal_directory(state_dir)
    if not directory.is_dir():
        raise CommandError(f"journal dump: no journal in {state_dir}", "check --state-dir")
    for stored in Wal.open(directory, read_only=True).kept():
        if stored.seq > after:
            emit_json_line(msgspec.json.decode(msgspec.json.encode(stored)))
    return Exit.OK


def _report(report: Report, *, as_json: bool) -> Exit:
    if as_json:
        emit_json(dataclasses.asdict(report))
    else:
        for line in report.lines():
            say(line)
    return Exit.OK if report.ok else Exit.FAULT
