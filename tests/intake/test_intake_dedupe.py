"""What is recorded: once, durably, in order; over re-sends and restarts, at the same time, and when the disk fails."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from intake_world import HeldStore, Port, alert, body, payload, payload_bodies

from agent.alerts import PayloadError
from agent.http.server import Options
from agent.intake import (
    RECORDED_PER_REQUEST,
    REMEMBERED_PER_TENANT,
    REMEMBERED_TENANTS,
    Accepted,
    Intake,
    NothingGoodError,
    OverloadedError,
)
from agent.journal.wal import JournalUnavailable
from agent.store import Store

BODIES = payload_bodies()
ROOT = Path(__file__).parent.parent.parent
ENDED = "2026-11-20T09:55:00Z"


def taking(store: Any, **bounds: Any) -> Intake:
    return Intake(store, **bounds)


async def test_every_captured_payload_twice_in_a_row(start: Any, open_store: Callable[[], Store]) -> None:
    """Some share alerts, so what the first brings depends on the ones before; the second never brings anything."""
    store = open_store()
    port: Port = await start(store)
    for name, sent in BODIES.items():
        count = len(json.loads(sent)["alerts"])
        status, answer = await port.post(sent)
        assert (status, answer["accepted"] + answer["duplicates"]) == (200, count), name
        seq = store.state.seq
        assert await port.post(sent) == (200, {"accepted": 0, "duplicates": count, "quarantined": []}), name
        assert store.state.seq == seq, name


@pytest.mark.parametrize("name", BODIES)
async def test_a_payload_again_after_a_restart_is_known(name: str, open_store: Callable[[], Store]) -> None:
    store = open_store()
    first = await taking(store).receive("default", BODIES[name])
    await store.close()
    store = open_store()
    seq = store.state.seq
    again = await taking(store).receive("default", BODIES[name])
    assert (again.accepted, again.duplicates) == (0, first.accepted)
    assert store.state.seq == seq


async def test_one_record_a_request_with_what_the_payload_said(held: HeldStore) -> None:
    intake = Intake(held, clock=lambda: 1234.5)  # type: ignore[arg-type]
    await intake.receive("team", BODIES["truncated_max_alerts3_of10"], "00-" + "a" * 32 + "-" + "b" * 16 + "-01")
    (record,) = held.received
    sent = json.loads(BODIES["truncated_max_alerts3_of10"])
    assert (record.at, record.tenant, record.receiver, record.truncated) == (1234.5, "team", "trunc", 7)
    assert (record.group_key, record.group_labels, record.external_url) == (
        sent["groupKey"],
        sent["groupLabels"],
        sent["externalURL"],
    )
    assert record.traceparent.startswith("00-aaaa")
    assert record.source == "webhook"
    assert len(record.alerts) == 3


async def test_only_what_is_new_is_recorded(held: HeldStore) -> None:
    """firing_group3_added is firing_group2 with one more alert."""
    intake = taking(held)
    await intake.receive("default", BODIES["firing_group2"])
    assert await intake.receive("default", BODIES["firing_group3_added"]) == Accepted(1, 2)
    assert [len(r.alerts) for r in held.received] == [2, 1]


async def test_firing_resolved_firing_is_three_records(held: HeldStore) -> None:
    intake = taking(held)
    firing, resolved = body(alert()), body(alert(status="resolved", endsAt=ENDED))
    for sent in (firing, firing, resolved, resolved, firing, firing):
        await intake.receive("default", sent)
    assert [r.alerts[0].status for r in held.received] == ["firing", "resolved", "firing"]


async def test_tenants_do_not_meet(held: HeldStore) -> None:
    intake = taking(held)
    assert await intake.receive("a", body()) == Accepted(1, 0)
    assert await intake.receive("b", body()) == Accepted(1, 0)
    assert await intake.receive("a", body()) == Accepted(0, 1)


async def test_twice_in_one_payload(held: HeldStore) -> None:
    intake = taking(held)
    resolved = alert(status="resolved", endsAt=ENDED)
    assert await intake.receive("default", body(alert(), alert(), resolved, resolved)) == Accepted(2, 2)
    assert [a.status for a in held.received[0].alerts] == ["firing", "resolved"]
    assert await intake.receive("default", body(resolved)) == Accepted(0, 1)


async def test_fifty_at_once_are_recorded_once_and_answered_after_it_is_durable(start: Any, held: HeldStore) -> None:
    port: Port = await start(held)
    held.hold()
    asking = [asyncio.create_task(port.post(BODIES["ten_alerts"])) for _ in range(50)]
    await held.appended(1)
    while port.intake.requests < 50:  # all are in, none may be answered
        await asyncio.sleep(0)
    done, _ = await asyncio.wait(asking, timeout=0.2)
    assert not done
    held.release()
    answers = await asyncio.gather(*asking)
    assert [status for status, _ in answers] == [200] * 50
    assert sorted(a["accepted"] for _, a in answers) == [0] * 49 + [10]
    assert sorted(a["duplicates"] for _, a in answers) == [0] + [10] * 49
    assert len(held.received) == held.appends == 1


async def test_a_change_back_while_both_are_under_way(held: HeldStore) -> None:
    """firing, resolved and firing again before anything is durable: three records, in that order."""
    intake = taking(held)
    held.hold()
    firing, resolved = body(alert()), body(alert(status="resolved", endsAt=ENDED))
    asking = [asyncio.create_task(intake.receive("default", b)) for b in (firing, resolved, firing, firing)]
    await asyncio.sleep(0.05)
    held.release()
    assert [d.accepted for d in await asyncio.gather(*asking)] == [1, 1, 1, 0]
    assert [r.alerts[0].status for r in held.received] == ["firing", "resolved", "firing"]
    assert await intake.receive("default", firing) == Accepted(0, 1)


async def test_a_failed_append_fails_those_who_wait_for_it_and_is_forgotten(held: HeldStore) -> None:
    intake = taking(held)
    held.hold()
    held.failing = "No space left on device"
    asking = [asyncio.create_task(intake.receive("default", body())) for _ in range(3)]
    await held.appended(1)
    held.release()
    outcomes = await asyncio.gather(*asking, return_exceptions=True)
    assert all(isinstance(o, JournalUnavailable) and "No space" in str(o) for o in outcomes)
    held.failing = ""
    assert await intake.receive("default", body()) == Accepted(1, 0)


async def test_a_cancelled_request_leaves_nobody_waiting_for_ever(held: HeldStore) -> None:
    intake = taking(held)
    held.hold()
    first = asyncio.create_task(intake.receive("default", body()))
    await held.appended(1)
    second = asyncio.create_task(intake.receive("default", body()))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(JournalUnavailable, match="interrupted"):
        await second
    held.release()
    assert await intake.receive("default", body()) == Accepted(1, 0)


async def test_a_waiting_duplicate_may_be_cancelled(held: HeldStore) -> None:
    intake = taking(held)
    held.hold()
    first, second, third = (asyncio.create_task(intake.receive("default", body())) for _ in range(3))
    await held.appended(1)
    await asyncio.sleep(0)
    second.cancel()
    held.release()
    assert [(await first), (await third)] == [Accepted(1, 0), Accepted(0, 1)]


# -- 503


async def test_an_unavailable_journal_is_503_with_retry_after(start: Any, held: HeldStore) -> None:
    port: Port = await start(held, Options(retry_seconds=7))
    held.failing = "append: No space left on device"
    for sent in (body(), b"{"):  # a bad body, too: its 400 would promise that it is kept
        async with port.session.post(
            port.url + "/webhook", data=sent, headers={"Content-Type": "application/json"}
        ) as answer:
            assert (answer.status, answer.headers["Retry-After"]) == (503, "7")
            assert "No space left" in (await answer.json())["error"]["reason"]
    held.failing = ""
    assert (await port.post(body()))[1]["accepted"] == 1


async def test_too_many_requests_or_bytes_are_503_and_the_rest_goes_on(start: Any, held: HeldStore) -> None:
    port: Port = await start(held, max_requests=3, max_bytes=1_000_000)
    held.hold()
    asking = [asyncio.create_task(port.post(body(alert(n)))) for n in range(3)]
    while port.intake.requests < 3:
        await asyncio.sleep(0)
    status, answer = await port.post(body(alert(3)))
    assert (status, "3 webhook requests" in answer["error"]["reason"]) == (503, True)
    held.release()
    assert [s for s, _ in await asyncio.gather(*asking)] == [200] * 3
    assert (await port.post(body(alert(3))))[0] == 200
    assert (port.intake.requests, port.intake.bytes) == (0, 0)


async def test_bytes_in_flight_are_bounded(held: HeldStore) -> None:
    intake = taking(held, max_bytes=1000)
    intake.enter(5000)  # a single body always fits an idle service
    with pytest.raises(OverloadedError, match="5000 bytes"):
        intake.enter(1)
    intake.leave(5000)
    intake.enter(600)
    with pytest.raises(OverloadedError):
        intake.hold(500)
    intake.leave(600)
    assert (intake.requests, intake.bytes) == (0, 0)


# -- quarantine


async def test_a_bad_body_is_recorded_once_however_often_it_comes(open_store: Callable[[], Store]) -> None:
    store = open_store()
    intake = taking(store)
    mixed = body(alert(0), alert(1, status="odd"))
    for _ in range(3):
        with pytest.raises(PayloadError):
            await intake.receive("default", b'{"version":')
        assert (await intake.receive("default", mixed)).quarantined[0].path == "$.alerts[1].status"
    assert [q.path for q in store.state.quarantined] == ["$", "$.alerts[1].status"]
    assert store.state.quarantined[0].head == '{"version":'
    await store.close()
    store = open_store()
    with pytest.raises(PayloadError):
        await taking(store).receive("default", b'{"version":')
    assert (await taking(store).receive("default", mixed)) == Accepted(0, 1, ((await _named(mixed)),))
    assert len(store.state.quarantined) == 2
    with pytest.raises(PayloadError):
        await taking(store).receive("other", b'{"version":')
    assert len(store.state.quarantined) == 3


async def _named(sent: bytes) -> Any:
    return (await taking(HeldStore()).receive("default", sent)).quarantined[0]


async def test_the_same_bad_alert_in_a_growing_group_is_recorded_once(held: HeldStore) -> None:
    intake = taking(held)
    bad = alert(9, labels=[])
    with pytest.raises(NothingGoodError) as refused:
        await intake.receive("default", body(bad))
    assert refused.value.quarantined[0].index == 0
    for group in ([alert(0), bad], [alert(0), alert(1), bad]):
        await intake.receive("default", body(*group))
    assert len(held.quarantined) == 1


async def test_a_bad_body_waits_for_its_record_too(held: HeldStore) -> None:
    intake = taking(held)
    held.hold()
    asking = [asyncio.create_task(intake.receive("default", b"[")) for _ in range(5)]
    await held.appended(1)
    done, _ = await asyncio.wait(asking, timeout=0.1)
    assert not done
    held.release()
    outcomes = await asyncio.gather(*asking, return_exceptions=True)
    assert all(isinstance(o, PayloadError) for o in outcomes)
    assert len(held.quarantined) == 1


async def test_many_bad_alerts_share_a_record_and_are_all_named(held: HeldStore) -> None:
    intake = taking(held)
    many = [alert(n, status="odd") for n in range(RECORDED_PER_REQUEST + 50)]
    done = await intake.receive("default", body(alert(), *many))
    assert len(done.quarantined) == RECORDED_PER_REQUEST + 50
    assert len(held.quarantined) == RECORDED_PER_REQUEST + 1
    assert held.quarantined[-1].reason.startswith("50 more alerts")
    appends = held.appends
    await intake.receive("default", body(alert(), *many))
    assert held.appends == appends


async def test_what_is_remembered_of_quarantine_is_bounded(held: HeldStore) -> None:
    intake = taking(held)
    for n in range(REMEMBERED_PER_TENANT + 30):
        with pytest.raises(PayloadError):
            await intake.receive("noisy", b"%d" % n)
    for n in range(REMEMBERED_TENANTS + 30):
        with pytest.raises(PayloadError):
            await intake.receive(f"t{n}", b"[")
    assert len(intake._remembered) == REMEMBERED_TENANTS
    assert max(map(len, intake._remembered.values())) <= REMEMBERED_PER_TENANT
    assert intake._keeping == {}


# -- law


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["firing", "resolved"]), st.booleans()), max_size=12))
@settings(max_examples=60, deadline=None)
def test_recorded_is_exactly_each_change_of_state(sent: list[tuple[int, str, bool]]) -> None:
    """Sent one after the other or all at once, what is recorded of each alert is its states without repetitions."""

    async def run(together: bool) -> list[list[str]]:
        held = HeldStore()
        intake = taking(held)
        if together:
            held.hold()
        asking = []
        for n, status, twice in sent:
            one = alert(n, status=status, **({"endsAt": ENDED} if status == "resolved" else {}))
            made = json.dumps(payload(*[one] * (2 if twice else 1))).encode()
            asking.append(asyncio.create_task(intake.receive("default", made)))
            if not together:
                await asking[-1]
            await asyncio.sleep(0)
        held.release()
        await asyncio.gather(*asking)
        assert intake._pending == {}
        return [[a.status for r in held.received for a in r.alerts if a.fingerprint == f"{n:016x}"] for n in range(3)]

    expected: list[list[str]] = [[], [], []]
    for n, status, _ in sent:
        if expected[n][-1:] != [status]:
            expected[n].append(status)
    assert asyncio.run(run(together=False)) == expected
    assert asyncio.run(run(together=True)) == expected


# -- killed


SERVICE = """
import asyncio, sys
from pathlib import Path
from agent.http.server import build_app, serve
from agent.intake import Intake
from agent.store import Store

async def main():
    store = Store.open(Path(sys.argv[1]))
    app = build_app(Intake(store), store, None, health=dict, metrics=lambda: (b"", ""))
    serving = await serve(app, "127.0.0.1", 0)
    print(serving.addresses[0][1], flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("failpoint", "recorded"),
    [
        ("intake_before_parse", False),
        ("intake_before_record", False),
        ("intake_after_record", True),
        ("intake_before_response", True),
    ],
)
async def test_killed_at_every_failpoint_nothing_acknowledged_is_lost(
    failpoint: str, recorded: bool, tmp_path: Path, start: Any
) -> None:
    """The first payload is acknowledged, the second meets SIGKILL; after the restart both are sent again."""
    state = tmp_path / "state"
    environment = {**os.environ, "ALERTMEDIC_FAILPOINT": failpoint + ":2", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVICE, str(state)], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        url = f"http://127.0.0.1:{process.stdout.readline().strip()}/webhook"
        headers = {"Content-Type": "application/json"}
        async with aiohttp.ClientSession(headers=headers) as session:
            async with session.post(url, data=body(alert(1))) as answer:
                assert answer.status == 200
            with pytest.raises(aiohttp.ClientError):
                await session.post(url, data=body(alert(2)))
        assert await asyncio.to_thread(process.wait, 10) == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    store = Store.open(state)
    try:
        port: Port = await start(store)
        known = {fingerprint for _, fingerprint in store.state.digests}
        assert known == ({f"{1:016x}", f"{2:016x}"} if recorded else {f"{1:016x}"})
        assert (await port.post(body(alert(1))))[1]["duplicates"] == 1
        assert (await port.post(body(alert(2))))[1]["duplicates"] == int(recorded)
    finally:
        await port.serving.close()
        await store.close()
