"""`alertmedic story`: every decision and effect of an incident from the journal, and whether the journal checks."""

from __future__ import annotations

import asyncio
from pathlib import Path

from cli_world import alertmedic, healed

from agent.journal.records import KINDS
from agent.store import Store, journal_directory


def prepare(state_dir: Path) -> str:
    async def write() -> str:
        store = Store.open(state_dir)
        id = await healed(store)
        await store.snapshot()  # what a snapshot covers is part of the trail all the same
        await store.close()
        return id

    return asyncio.run(write())


def test_the_export_has_every_record_of_the_incident_and_the_chain(tmp_path: Path) -> None:
    id = prepare(tmp_path)
    told = alertmedic("story", id[:8], "--json", "--state-dir", tmp_path)
    assert told.code == 0, told.err
    export = told.json
    assert export["incident"]["id"] == id
    assert export["complete"]
    kinds = [record["kind"] for record in export["records"]]
    assert {"alerts_received", "diagnosed", "plan_made", "step_recorded", "incident_moved"} <= set(kinds) <= set(KINDS)
    seqs = [record["seq"] for record in export["records"]]
    assert seqs == sorted(seqs)
    moves = [r["record"]["move"] for r in export["records"] if r["kind"] == "step_recorded"]
    assert [m["after"] for m in moves] == ["intent", "ran", "verified"]
    assert moves[1]["result"]["exit_code"] == 0
    assert export["journal"]["ok"]
    assert len(export["journal"]["chain"]) == 32
    plain = alertmedic("story", id, "--state-dir", tmp_path)
    assert plain.code == 0
    assert "Timeline" in plain.out


def test_a_journal_that_is_not_there_is_not_called_damaged(tmp_path: Path) -> None:
    nowhere = alertmedic("journal", "verify", "--state-dir", tmp_path)
    assert nowhere.code == 1
    assert "there is no journal; hint: is the state directory right?" in nowhere.out + nowhere.err
    assert "DAMAGED" not in nowhere.out + nowhere.err


def test_a_journal_that_was_tampered_with_is_told(tmp_path: Path) -> None:
    id = prepare(tmp_path)
    segment = min(journal_directory(tmp_path).glob("*.wal"))
    body = bytearray(segment.read_bytes())
    at = body.index(b"incident_moved")
    body[at] ^= 1
    segment.write_bytes(body)
    assert alertmedic("journal", "verify", "--state-dir", tmp_path).code == 1
    assert alertmedic("story", id, "--json", "--state-dir", tmp_path).code == 1


def test_an_unknown_incident_is_a_fault(tmp_path: Path) -> None:
    prepare(tmp_path)
    assert alertmedic("story", "inc-nothing", "--state-dir", tmp_path).code == 1
