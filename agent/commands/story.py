"""`story ID`: an incident's story, and its whole audit trail as JSON.

Reads files only, with the service running or stopped. The export holds what the story is told from: the incident as
folded, every record of it that the journal still has (with sequence number and kind), the moves of the breakers that
guard its steps, the snapshots taken before them (each checked against its CRC), and what checking the journal's hash
chain says now. A step's output is in the record of its result.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.commands import look
from agent.commands.output import CommandError, Exit, emit_json, say

if TYPE_CHECKING:
    from agent.fold_model import Incident
    from agent.journal.records import Stored
    from agent.journal.wal import Wal


def story(state_dir: Path, wanted: str, *, as_json: bool, output: bool = False) -> Exit:
    """Tells the story of one incident, or what its steps printed; as JSON, all that it is told from. FAULT if the
    journal does not check."""
    incident = look.find(look.read(state_dir), wanted)
    if output and not as_json:
        return _printed(state_dir, incident)
    if not as_json:
        return look.tell(incident)
    exported = export(state_dir, incident)
    emit_json(exported)
    return Exit.OK if exported["journal"]["ok"] else Exit.FAULT


def _printed(state_dir: Path, incident: Incident) -> Exit:
    """Every output that the journal still has, of earlier plans too, oldest first."""
    import sys

    from agent.captured import size, whole
    from agent.journal.records import PlanMade, StepRecorded
    from agent.log import printable
    from agent.story import clock_time

    names: dict[tuple[str, int], str] = {}
    found = False
    for stored in _of(incident, _journal(state_dir).kept()):
        record = stored.record
        if isinstance(record, PlanMade):
            names |= {(record.plan.id, i): f"{s.action} on {s.target}" for i, s in enumerate(record.plan.steps)}
        if not isinstance(record, StepRecorded) or (result := record.move.result) is None:
            continue
        step = names.get((record.move.plan, record.move.step), f"step {record.move.step}")
        for name, text in (("stdout", result.stdout), ("stderr", result.stderr)):
            if text:
                found = True
                say(printable(f"== {clock_time(record.move.at)} {step}: {name}, {size(text)} bytes"))
                sys.stdout.write(whole(text))
    if not found:
        say(f"no step of {incident.id} has printed anything that the journal still has")
    return Exit.OK


def _journal(state_dir: Path) -> Wal:
    from agent.journal.wal import Wal
    from agent.store import journal_directory

    directory = journal_directory(state_dir)
    if not directory.is_dir():
        raise CommandError(f"story: no journal in {state_dir}", "check --state-dir")
    return Wal.open(directory, read_only=True)


def export(state_dir: Path, incident: Incident) -> dict[str, Any]:
    """`{incident, records, complete, snapshots, journal}`. `complete`: no record of the incident has been pruned."""
    from agent.http.render import incident_json, plain
    from agent.journal.check import verify
    from agent.store import journal_directory

    wal = _journal(state_dir)
    kept = list(_of(incident, wal.kept()))
    report = verify(journal_directory(state_dir))
    names = {move.snapshot for view in incident.steps for move in view.moves if move.snapshot}
    names |= {name for stored in kept if (name := _snapshot(stored))}
    return {
        "incident": incident_json(incident),
        "records": [{"seq": s.seq, "kind": _kind(s), "record": plain(s.record)} for s in kept],
        "complete": bool(kept) and kept[0].seq <= incident.opened_seq,
        "snapshots": {name: _read(state_dir / "snapshots" / name) for name in sorted(names)},
        "journal": {"ok": report.ok, "chain": wal.chain, "seq": wal.seq, "report": report.lines()},
    }


def _of(incident: Incident, records: Iterator[Stored]) -> Iterator[Stored]:
    """The records about the incident. Alerts are those it holds, from its opening on."""
    from actions.breaker import keys_of
    from agent.journal.records import AlertsReceived, BreakerRecorded, PlanMade
    from agent.store import incident_of

    keys: set[str] = set()
    for stored in records:
        record = stored.record
        match record:
            case AlertsReceived():
                mine = record.tenant == incident.tenant and stored.seq >= incident.opened_seq
                if mine and any(alert.fingerprint in incident.alerts for alert in record.alerts):
                    yield stored
            case BreakerRecorded():
                if record.move.key in keys:
                    yield stored
            case _:
                if incident_of(record) == incident.id:
                    yield stored
                if isinstance(record, PlanMade) and record.plan.incident == incident.id:
                    keys.update(key for step in record.plan.steps for key in keys_of(step.action, step.target))


def _kind(stored: Stored) -> str:
    tag = type(stored.record).__struct_config__.tag
    return str(tag)


def _snapshot(stored: Stored) -> str:
    from agent.journal.records import StepRecorded

    return stored.record.move.snapshot if isinstance(stored.record, StepRecorded) else ""


def _read(path: Path) -> dict[str, Any]:
    from agent.snapshot import SnapshotError, read

    try:
        return {"checked": True, "content": read(path)}
    except FileNotFoundError:
        return {"checked": False, "problem": "it is gone: snapshots are removed by age, number and size"}
    except (SnapshotError, OSError, ValueError) as error:
        return {"checked": False, "problem": str(error)}
