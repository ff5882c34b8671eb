"""`incidents` and the other looking commands, over a journal written by the Store; the service stopped and running."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
from cli_world import (
    Service,
    alertmedic,
    awaiting_approval,
    breaker_and_quarantine,
    environment,
    healed,
    open_incident,
    process,
)

from agent.store import Store

Written = tuple[Path, str, str, str]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """(state directory, healed incident, another tenant's open incident, a third)."""
    state_dir = tmp_path_factory.mktemp("state")

    async def write() -> tuple[str, str, str]:
        store = Store.open(state_dir)
        try:
            done = await healed(store)
            other = await open_incident(store, "DiskFull", 1_700_000_000.0, tenant="team-b", service="db")
            third = await open_incident(store, "QueueGrows", 1_700_000_100.0, service="queue")
            await breaker_and_quarantine(store)
        finally:
            await store.close()
        return done, other, third

    return (state_dir, *asyncio.run(write()))


def test_the_list_as_json_has_the_documented_shape(written: Written) -> None:
    state_dir, done, other, third = written
    listed = process("incidents", "--json", "--state-dir", state_dir)
    assert listed.code == 0
    assert listed.out.isascii()
    incidents = listed.json["incidents"]
    assert [i["id"] for i in incidents] == [third, other, done]
    found = incidents[-1]
    assert {"id", "state", "tenant", "opened_at", "alerts", "hypotheses", "plan", "story"} <= set(found)
    assert datetime.fromisoformat(found["opened_at"]).tzinfo is not None
    assert found["state"] == "resolved"
    (alert,) = found["alerts"]
    assert {"fingerprint", "labels", "status", "starts_at"} <= set(alert)
    assert found["hypotheses"][0]["cause"] == "process.stuck"
    assert found["plan"]["steps"][0]["argv"] == ["/bin/echo", "it is done", "a b"]
    assert found["story"]


def test_filters(written: Written) -> None:
    state_dir, done, other, _ = written

    def ids(*arguments: str) -> list[str]:
        return [
            i["id"] for i in alertmedic("incidents", "--json", "--state-dir", state_dir, *arguments).json["incidents"]
        ]

    assert ids("--tenant", "team-b") == [other]
    assert ids("--state", "resolved") == [done]
    assert len(ids("--state", "resolved", "--state", "open")) == 3
    assert len(ids("--limit", "2")) == 2
    assert ids("--tenant", "nobody") == []


def test_the_list_for_people(written: Written) -> None:
    state_dir, done, *_ = written
    listed = alertmedic("incidents", "--state-dir", state_dir)
    header, *rows = listed.out.splitlines()
    assert header.split() == ["id", "state", "tenant", "opened", "age", "alerts", "cause"]
    assert len(rows) == 3
    (row,) = [r for r in rows if done in r]
    assert "resolved" in row
    assert "process.stuck worker 91%" in row


def test_the_story_of_one_tells_everything_and_escapes_what_others_wrote(written: Written) -> None:
    state_dir, done, *_ = written
    told = process("incidents", done, "--state-dir", state_dir)
    assert told.code == 0
    for text in (
        "for     +2.30  queue is strong: the queue grows",
        "against -0.40  cpu is absent: no CPU change",
        "path: front -> orders -> worker",
        "missing: db_connections: timeout after 15 s",
        "posterior 91.0%",
        "run    /bin/echo 'it is done' 'a b'",
        "undo   none",
        "declined: service.restart.systemd: no_inventory (no unit)",
        "limits enforced by cgroup2-kill+rlimits (not enforced by cgroup v2)",
        "exit code 0, in 0.21 s, 0.02 s CPU, 9 MiB peak",
        "ran -> verified: latency_p95_seconds back at 0.1 s",
        "the series are back in bounds",
        "resolved (the series are back)",
    ):
        assert text in told.out, text
    assert all(line.isprintable() for line in told.out.splitlines())
    assert r"\x1b[31m" in told.out
    positions = [
        told.out.index(f"\n{title}\n")
        for title in ("Timeline", "Alerts", "Evidence", "Hypotheses", "Plan", "Steps", "Verification", "Outcome")
    ]
    assert positions == sorted(positions)


def test_the_story_on_a_terminal_is_the_same_and_obeys_nothing(written: Written) -> None:
    state_dir, done, *_ = written
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "agent", "incidents", done, "--state-dir", str(state_dir)],
        stdout=theirs,
        env=environment(TERM="xterm-256color", COLUMNS="220"),
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the other end was closed
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    assert process.wait(60) == 0
    text = shown.decode()
    assert "the queue grows" in text
    assert "\x1b[1m" in text or "\x1b[1;" in text, "colours on a terminal"
    assert "\x07" not in text
    assert "\u202e" not in text
    assert "\x1b[31m alert" not in text


def test_an_id_may_be_shortened_when_looking(written: Written) -> None:
    state_dir, done, *_ = written
    assert alertmedic("incidents", done[:10], "--json", "--state-dir", state_dir).json["incidents"][0]["id"] == done
    ambiguous = alertmedic("incidents", "inc-", "--state-dir", state_dir)
    assert (ambiguous.code, ambiguous.out) == (1, "")
    assert "3 incidents begin with" in ambiguous.err
    unknown = alertmedic("incidents", "inc-\x1b[31m", "--state-dir", state_dir)
    assert unknown.code == 1
    assert "no incident" in unknown.err
    assert "\x1b" not in unknown.err


def test_without_a_journal_there_is_nothing_to_list_and_nothing_is_made(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    assert process("incidents", "--json", "--state-dir", absent).json == {"incidents": []}
    assert "no incidents in" in process("incidents", "--state-dir", absent).out
    assert not absent.exists()


def test_the_state_directory_comes_from_the_environment_or_the_file(written: Written, tmp_path: Path) -> None:
    state_dir, *_ = written
    assert len(alertmedic("incidents", "--json", ALERTMEDIC_STATE_DIR=str(state_dir)).json["incidents"]) == 3
    file = tmp_path / "c.yaml"
    file.write_text(f"state_dir: {state_dir}\n")
    assert len(alertmedic("incidents", "--json", "--config", file).json["incidents"]) == 3
    assert len(alertmedic("incidents", "--json", ALERTMEDIC_CONFIG=str(file)).json["incidents"]) == 3


def test_breakers_and_quarantine(written: Written) -> None:
    state_dir, *_ = written
    (breaker,) = alertmedic("breakers", "--json", "--state-dir", state_dir).json["breakers"]
    assert (breaker["key"], breaker["state"]) == ("service.restart.supervisord", "open")
    assert "3 failures in a row" in alertmedic("breakers", "--state-dir", state_dir).out
    kept = alertmedic("quarantine", "--json", "--state-dir", state_dir).json
    assert kept["total"] == 1
    assert kept["quarantined"][0]["path"] == "$.alerts[1].startsAt"
    shown = alertmedic("quarantine", "--state-dir", state_dir).out
    assert "alerts[1]" in shown
    assert "\x1b" not in shown


def test_the_journal_is_verified_and_dumped(written: Written, tmp_path: Path) -> None:
    state_dir, *_ = written
    assert alertmedic("journal", "verify", "--state-dir", state_dir).code == 0
    assert alertmedic("journal", "verify", "--json", "--state-dir", state_dir).json["ok"]
    lines = [json.loads(line) for line in alertmedic("journal", "dump", "--state-dir", state_dir).out.splitlines()]
    assert [line["seq"] for line in lines] == list(range(1, len(lines) + 1))
    assert lines[0]["record"]["type"] == "alerts_received"
    later = alertmedic("journal", "dump", "--after", "3", "--state-dir", state_dir).out.splitlines()
    assert len(later) == len(lines) - 3
    absent = alertmedic("journal", "verify", "--state-dir", tmp_path / "absent")
    assert absent.code == 1
    assert alertmedic("journal", "dump", "--state-dir", tmp_path / "absent").code == 1
    assert alertmedic("journal", "repair", "--state-dir", tmp_path / "absent").code == 1


def test_a_damaged_journal_is_a_message_and_not_a_traceback(tmp_path: Path) -> None:
    async def write() -> None:
        store = Store.open(tmp_path)
        for n in range(5):
            await open_incident(store, f"Alert{n}", 1_700_000_000.0 + 10_000 * n)
        await store.close()

    asyncio.run(write())
    (segment,) = (tmp_path / "journal").glob("*.wal")
    body = bytearray(segment.read_bytes())
    body[len(body) // 2] ^= 0xFF
    segment.write_bytes(body)
    listed = process("incidents", "--state-dir", tmp_path)
    assert (listed.code, listed.out) == (1, "")
    assert "journal" in listed.err
    assert process("journal", "verify", "--state-dir", tmp_path).code == 1
    assert process("pause", "--state-dir", tmp_path).code == 1


def test_a_closed_pipe_is_no_error(written: Written) -> None:
    state_dir, *_ = written
    command = f"{sys.executable} -m agent journal dump --state-dir {state_dir} | head -c 1"
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, env=environment(), timeout=60, check=False)
    assert done.stdout == b"{"
    assert done.stderr == b""


def test_the_same_while_the_service_runs(tmp_path: Path, serving: Callable[..., Service]) -> None:
    async def write() -> str:
        store = Store.open(tmp_path)
        id = await awaiting_approval(store)
        await store.close()
        return id

    id = asyncio.run(write())
    service = serving(tmp_path)
    (listed,) = process("incidents", "--json", "--state-dir", tmp_path).json["incidents"]
    assert listed["id"] == id
    assert json.loads(service.get(f"/api/v1/incidents/{id}")[1])["id"] == id
    assert "Hypotheses" in process("incidents", id, "--state-dir", tmp_path).out
    assert process("journal", "verify", "--state-dir", tmp_path).code == 0
    assert process("journal", "repair", "--state-dir", tmp_path).code == 3
    status, body = service.get("/metrics")
    assert status == 200
    assert b"alertmedic_build_info" in body
    assert service.stop() == 0
