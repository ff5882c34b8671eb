"""Decisions: through the running service's socket, into a stopped service's journal, and when neither can be had."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_world import Service, alertmedic, awaiting_approval, breaker_and_quarantine, process

from agent.commands.decide import call
from agent.commands.output import CommandError, Exit
from agent.incidents import Incident, State
from agent.store import Store, read_state


def prepare(state_dir: Path) -> tuple[str, str]:
    """(incident, digest of the plan that waits)."""

    async def write() -> tuple[str, str]:
        store = Store.open(state_dir)
        id = await awaiting_approval(store)
        await breaker_and_quarantine(store)
        digest = store.state.incidents[id].plan_digest
        await store.close()
        return id, digest

    return asyncio.run(write())


def incident(state_dir: Path, id: str) -> Incident:
    return read_state(state_dir).incidents[id]


@pytest.mark.parametrize("decision", ["approve", "reject"])
def test_a_stopped_service_finds_the_decision_in_its_journal(tmp_path: Path, decision: str) -> None:
    id, digest = prepare(tmp_path)
    done = process(decision, id, "--note", "go on", "--state-dir", tmp_path)
    assert done.code == 0, done.err
    assert "/bin/echo 'it is done' 'a b'" in done.out
    after = incident(tmp_path, id)
    (given,) = after.approvals
    assert (given.decision, given.digest, given.note, given.counted) == (decision, digest, "go on", True)
    assert given.origin.startswith("cli uid=")
    assert given.who
    assert after.plan_state == ("approved" if decision == "approve" else "rejected")
    again = process(decision, id, "--state-dir", tmp_path)
    assert again.code == 0
    assert "recorded before" in again.out
    assert len(incident(tmp_path, id).approvals) == 1


def test_only_the_digest_that_waits_is_approved(tmp_path: Path) -> None:
    id, digest = prepare(tmp_path)
    stale = alertmedic("approve", id, "--digest", "0" * 32, "--state-dir", tmp_path)
    assert stale.code == 1
    assert "digest" in stale.err
    assert incident(tmp_path, id).approvals == []
    told = alertmedic("approve", id, "--digest", digest, "--json", "--state-dir", tmp_path)
    assert told.code == 0
    assert told.json["outcome"] == "approved"
    assert told.json["plan_steps"] == [["/bin/echo", "it is done", "a b"]]


def test_a_suggestion_is_approved_through_the_service_that_knows_the_policy(
    tmp_path: Path, serving: Callable[..., Service]
) -> None:
    async def write() -> str:
        store = Store.open(tmp_path)
        id = await awaiting_approval(store, suggested=True)
        await store.close()
        return id

    id = asyncio.run(write())
    stopped = process("approve", id, "--state-dir", tmp_path)
    assert stopped.code == 1
    assert "start the service" in stopped.err
    assert incident(tmp_path, id).plan_state == "suggested"
    service = serving(tmp_path)
    done = process("approve", id, "--json", "--state-dir", tmp_path)
    assert done.code == 0, done.err
    assert done.json["outcome"] == "approved"
    again = process("approve", id, "--digest", incident(tmp_path, id).approvals[0].asked, "--state-dir", tmp_path)
    assert again.code == 0
    assert "recorded before" in again.out
    after = incident(tmp_path, id)
    assert after.plan is not None
    assert after.plan.autonomy == "approve"
    assert [a.counted for a in after.approvals] == [True]
    assert service.stop() == 0


def test_what_cannot_be_decided_is_said(tmp_path: Path) -> None:
    prepare(tmp_path)
    unknown = alertmedic("approve", "inc-aaaaaaaaaaaa", "--state-dir", tmp_path)
    assert unknown.code == 1
    assert "no such incident" in unknown.err
    nowhere = alertmedic("approve", "inc-aaaaaaaaaaaa", "--state-dir", tmp_path / "absent")
    assert nowhere.code == 1
    assert "no journal" in nowhere.err
    assert not (tmp_path / "absent").exists()
    assert alertmedic("approve").code == 2


def test_pause_resume_and_reset_of_a_stopped_service(tmp_path: Path) -> None:
    prepare(tmp_path)
    assert alertmedic("pause", "--note", "deploying", "--json", "--state-dir", tmp_path).json == {"paused": True}
    assert read_state(tmp_path).is_paused
    assert "may start again" in alertmedic("resume", "--state-dir", tmp_path).out
    assert not read_state(tmp_path).is_paused
    assert alertmedic("breakers", "reset", "no.such", "--state-dir", tmp_path).code == 1
    assert alertmedic("breakers", "reset", "--state-dir", tmp_path).code == 2
    assert alertmedic("breakers", "reset", "service.restart.supervisord", "--state-dir", tmp_path).code == 0
    (breaker,) = alertmedic("breakers", "--json", "--state-dir", tmp_path).json["breakers"]
    assert breaker["state"] == "closed"


def test_a_running_service_decides_through_its_socket(tmp_path: Path, serving: Callable[..., Service]) -> None:
    id, digest = prepare(tmp_path)
    service = serving(tmp_path)
    stale = process("reject", id, "--digest", "0" * 32, "--state-dir", tmp_path)
    assert stale.code == 1
    assert "digest" in stale.err
    assert process("approve", "inc-aaaaaaaaaaaa", "--state-dir", tmp_path).code == 1
    done = process("reject", id, "--note", "no", "--state-dir", tmp_path)
    assert done.code == 0, done.err
    assert "rejected" in done.out
    (given,) = incident(tmp_path, id).approvals
    assert (given.decision, given.digest, given.note) == ("reject", digest, "no")
    assert "uid=" in given.who
    assert process("pause", "--state-dir", tmp_path).code == 0
    assert read_state(tmp_path).is_paused
    assert json.loads(service.get("/api/v1/breakers")[1])["breakers"][0]["state"] == "open"
    assert process("breakers", "reset", "service.restart.supervisord", "--state-dir", tmp_path).code == 0
    assert process("breakers", "reset", "no.such", "--state-dir", tmp_path).code == 1
    assert json.loads(service.get("/api/v1/breakers")[1])["breakers"][0]["state"] == "closed"
    assert service.stop() == 0


def test_a_journal_in_use_without_a_socket_records_nothing(tmp_path: Path) -> None:
    id, _ = prepare(tmp_path)

    async def hold() -> tuple[int, str]:
        store = Store.open(tmp_path)  # as a service that is starting, or stuck
        done = await asyncio.to_thread(process, "approve", id, "--state-dir", tmp_path)
        await store.close()
        return done.code, done.err

    code, err = asyncio.run(hold())
    assert code == 3
    assert "in use" in err
    assert incident(tmp_path, id).approvals == []


def test_a_socket_left_behind_is_no_service(tmp_path: Path) -> None:
    id, _ = prepare(tmp_path)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "control.sock"))
    assert alertmedic("approve", id, "--state-dir", tmp_path).code == 0


def _answering(path: Path, reply: bytes | None) -> threading.Thread:
    """A service that answers one request with `reply`, or (None) never."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(1)

    def answer() -> None:
        with listener:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                if reply is not None:
                    connection.sendall(reply)
                else:
                    connection.recv(65536)  # until the other side gives up

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n{{{",
        b"HTTP/1.1 200 OK\r\nContent-Length: 300\r\n\r\n{}",
        None,
    ],
)
def test_a_service_that_gives_no_usable_answer_is_unreachable(tmp_path: Path, reply: bytes | None) -> None:
    thread = _answering(tmp_path / "s", reply)
    with pytest.raises(CommandError) as raised:
        call(tmp_path / "s", "GET", "/", timeout=0.2 if reply is None else 30.0)
    assert raised.value.code is Exit.UNREACHABLE
    thread.join(30.0)
    assert not thread.is_alive()


def test_nobody_listening_is_none(tmp_path: Path) -> None:
    assert call(tmp_path / "absent", "GET", "/") is None
    assert isinstance(read_state(tmp_path), State)
