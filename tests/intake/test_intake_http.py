"""The port: who is let in, bodies in every legal form, health, metrics, the API, draining."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
from base64 import b64encode
from typing import Any

import pytest
from intake_world import JSON, HeldStore, Port, alert, body, payload_bodies

from actions.model import BreakerMoved, BreakerState, Plan, Step, plan_digest
from agent.fold_model import Incident, IncidentState, StepView, StoryLine
from agent.http.api import ApprovalAnswer
from agent.http.auth import Credential, Guard, _loopback
from agent.http.front import usual_request
from agent.http.render import incident_json, plain, rfc3339
from agent.http.server import Options, traceparent
from agent.intake import Accepted
from agent.journal.records import BreakerRecorded
from rules.model import Contribution, Diagnosis, Hypothesis, Proposal

ALL = ("webhook", "read", "approve")
GUARD = Guard(
    [
        Credential("admin", "admin-token", scopes=ALL),
        Credential("am", "am-token"),
        Credential("am2", "am-token-2", scopes=("webhook",)),
        Credential("team", "team-token", tenants=("team-*",), scopes=ALL),
        Credential("grafana", "pass:wörd", user="grafana"),
    ]
)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.fixture
async def port(start: Any, held: HeldStore) -> Port:
    made: Port = await start(held)
    return made


@pytest.fixture
async def guarded(start: Any, held: HeldStore) -> Port:
    made: Port = await start(held, Options(guard=GUARD))
    return made


# -- legal bodies


@pytest.mark.parametrize(
    "kind",
    ["application/json", "Application/JSON", "application/json; charset=utf-8", 'application/json;charset="UTF-8"'],
)
async def test_content_types(port: Port, kind: str) -> None:
    assert (await port.post(body(), headers={"Content-Type": kind}))[0] == 200


async def test_gzip(port: Port) -> None:
    packed = gzip.compress(payload_bodies()["big_500_alerts"])
    assert len(packed) < 300_000
    status, answer = await port.post(packed, headers={**JSON, "Content-Encoding": "gzip"})
    assert (status, answer["accepted"]) == (200, 500)
    assert (port.intake.requests, port.intake.bytes) == (0, 0)


async def test_a_megabyte_in_chunks(port: Port) -> None:
    sent = payload_bodies()["big_500_alerts"]

    async def pieces() -> Any:
        for at in range(0, len(sent), 70_000):
            yield sent[at : at + 70_000]

    async with port.session.post(port.url + "/webhook", data=pieces(), headers=JSON) as answer:
        assert (answer.status, (await answer.json())["accepted"]) == (200, 500)


async def test_expect_continue_is_answered_before_the_body(port: Port) -> None:
    sent = body()
    reader, writer = await asyncio.open_connection(*port.address)
    writer.write(
        b"POST /webhook HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(sent)
    )
    async with asyncio.timeout(10):
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(sent)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK\r\n")
    writer.close()


async def test_one_connection_serves_many_requests_also_pipelined(port: Port) -> None:
    def request(n: int) -> bytes:
        sent = body(alert(n))
        return (
            b"POST /webhook HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(sent), sent)
        )

    reader, writer = await asyncio.open_connection(*port.address)
    expected = b'{"accepted":1,"duplicates":0,"quarantined":[]}'
    async with asyncio.timeout(10):
        for n in range(3):
            writer.write(request(n))
            await reader.readuntil(b"\r\n\r\n")
            assert await reader.readexactly(len(expected)) == expected
        writer.write(b"".join(request(n) for n in range(3, 9)))
        for _ in range(3, 9):
            await reader.readuntil(b"\r\n\r\n")
            assert await reader.readexactly(len(expected)) == expected
    writer.close()


@pytest.mark.parametrize("line", [b"HTTP/1.0", b"HTTP/1.1\r\nConnection: close"])
async def test_a_connection_is_closed_when_asked(port: Port, line: bytes) -> None:
    sent = body()
    reader, writer = await asyncio.open_connection(*port.address)
    writer.write(
        b"POST /webhook %b\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
        % (line, len(sent), sent)
    )
    async with asyncio.timeout(10):
        whole = await reader.read()
    assert b" 200 " in whole.splitlines()[0]
    assert whole.endswith(b'{"accepted":1,"duplicates":0,"quarantined":[]}')
    writer.close()


async def test_a_caller_who_left_does_not_undo_the_record(port: Port) -> None:
    port.store.hold()
    sent = body()
    _, writer = await asyncio.open_connection(*port.address)
    writer.write(
        b"POST /webhook HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
        % (len(sent), sent)
    )
    await port.store.appended(1)
    writer.close()
    await writer.wait_closed()
    port.store.release()
    assert (await port.post(sent))[1]["duplicates"] == 1


@pytest.mark.parametrize("path", ["/webhook", "/webhook?x=1", "/webhook/default", "/webhook/team-a"])
async def test_tenants_by_path(port: Port, path: str) -> None:
    assert (await port.post(body(), path))[0] == 200
    assert port.store.received[0].tenant == ("team-a" if "team" in path else "default")


async def test_the_observer_is_told(start: Any, held: HeldStore) -> None:
    told: list[tuple[int, Accepted | None]] = []
    port: Port = await start(held, Options(on_webhook=lambda status, seconds, done: told.append((status, done))))
    await port.post(body())
    await port.post(b"[")
    await port.post(body(alert(startsAt="never")))
    await port.post(body(), path="/webhook/no%20tenant")
    statuses, done = zip(*told, strict=True)
    assert statuses == (200, 400, 400, 400)
    assert done[0] == Accepted(1, 0)
    assert [[q.path for q in d.quarantined] if d else None for d in done[1:]] == [["$"], ["$.alerts[0].startsAt"], None]


@pytest.mark.parametrize(
    "sent", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"GET /\x00 HTTP/1.1\r\nHost: x\r\n\r\n"]
)
async def test_what_is_no_http_fills_no_log(port: Port, sent: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG"):
        assert (await port.raw(sent)).startswith(b"HTTP/1.0 400 ")
    assert [r for r in caplog.records if r.levelname not in ("DEBUG",) or r.exc_info] == []


PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([PARENT], PARENT),
        ([PARENT.replace("00-", "cc-", 1) + "-more"], PARENT),
        ([], ""),
        ([PARENT, PARENT], ""),
        ([PARENT + "-more"], ""),
        ([PARENT.replace("00-", "ff-", 1)], ""),
        ([PARENT.upper()], ""),
        ([PARENT.replace("4bf92f3577b34da6a3ce929d0e0e4736", "0" * 32)], ""),
        ([PARENT.replace("00f067aa0ba902b7", "0" * 16)], ""),
        ([PARENT[:-1]], ""),
        (["garbage"], ""),
    ],
)
def test_traceparent(values: list[str], expected: str) -> None:
    assert traceparent(values) == expected


async def test_traceparent_reaches_the_record(port: Port) -> None:
    await port.post(body(alert(1)), headers={**JSON, "traceparent": PARENT})
    await port.post(body(alert(2)), headers={**JSON, "traceparent": "nonsense"})
    assert [r.traceparent for r in port.store.received] == [PARENT, ""]


# -- who


@pytest.mark.parametrize(
    "header",
    [
        "Bearer am-token",
        "bearer am-token",
        "Bearer am-token-2",
        "Basic " + b64encode("grafana:pass:wörd".encode()).decode(),
    ],
)
async def test_each_credential_is_let_in(guarded: Port, header: str) -> None:
    assert (await guarded.post(body(), headers={**JSON, "Authorization": header}))[0] == 200


async def test_a_token_bound_to_tenants(guarded: Port) -> None:
    headers = {**JSON, **bearer("team-token")}
    assert (await guarded.post(body(), "/webhook/team-a", headers))[0] == 200
    assert (await guarded.post(body(), "/webhook/other", headers))[0] == 403
    await guarded.post(body(), "/webhook/other", {**JSON, **bearer("admin-token")})

    async def tenants(token: str) -> list[str]:
        _, answer = await guarded.get("/api/v1/incidents", bearer(token))
        return [i["tenant"] for i in answer["incidents"]]

    assert await tenants("team-token") == ["team-a"]
    assert sorted(await tenants("admin-token")) == ["other", "team-a"]
    other = next(i for i in guarded.store.state.incidents.values() if i.tenant == "other")
    assert (await guarded.get(f"/api/v1/incidents/{other.id}", bearer("team-token")))[0] == 404
    assert (await guarded.get("/api/v1/breakers", bearer("team-token")))[0] == 403
    for path in ("/api/v1/pause", "/api/v1/resume", "/api/v1/breakers/reset"):
        assert (await guarded.post(b'{"key":"a|b"}', path, bearer("team-token")))[0] == 403
    decide = f"/api/v1/incidents/{other.id}/approve"
    assert (await guarded.post(b'{"digest":"d"}', decide, bearer("team-token")))[0] == 404
    assert guarded.decisions.asked == []


@pytest.mark.parametrize("path", ["/metrics", "/api/v1/incidents", "/api/v1/quarantine", "/api/v1/breakers"])
async def test_reading_needs_the_scope_read(guarded: Port, path: str) -> None:
    assert (await guarded.get(path))[0] == 401
    assert (await guarded.get(path, bearer("am2")))[0] == 401
    assert (await guarded.get(path, bearer("am-token-2")))[0] == 403
    async with guarded.session.get(guarded.url + path, headers=bearer("am-token")) as answer:
        assert answer.status == 200


@pytest.mark.parametrize("path", ["pause", "resume", "breakers/reset", "incidents/x/approve", "incidents/x/reject"])
async def test_deciding_over_tcp_fails_closed(port: Port, guarded: Port, path: str) -> None:
    status, answer = await port.post(b"{}", "/api/v1/" + path)
    assert (status, "no authentication is configured" in answer["error"]["reason"]) == (403, True)
    assert "`auth`" in answer["error"]["hint"]
    assert (await guarded.post(b"{}", "/api/v1/" + path))[0] == 401
    assert (await guarded.post(b"{}", "/api/v1/" + path, bearer("am-token")))[0] == 403
    assert port.decisions.asked == guarded.decisions.asked == []


async def test_a_web_page_may_not_post_without_authentication(port: Port) -> None:
    status, answer = await port.post(body(), headers={**JSON, "Origin": "https://evil.example"})
    assert (status, port.store.appends) == (403, 0)
    assert "web page" in answer["error"]["reason"]


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("10.0.0.4", False),
        ("::ffff:10.0.0.4", False),
        ("fe80::1%eth0", False),
        ("", False),
        ("nonsense", False),
    ],
)
def test_what_counts_as_this_machine(address: str, expected: bool) -> None:
    assert _loopback(address) is expected


async def test_callers_from_elsewhere_need_credentials(start: Any, held: HeldStore, monkeypatch: Any) -> None:
    port: Port = await start(held)
    monkeypatch.setattr("agent.http.auth._loopback", lambda address: False)
    for status, answer in (await port.post(body()), await port.get("/api/v1/incidents")):
        assert (status, "not this machine" in answer["error"]["reason"]) == (403, True)
    assert (await port.get("/-/healthy"))[0] == 200


def test_an_empty_secret_is_refused() -> None:
    with pytest.raises(ValueError, match="'am' is empty"):
        Guard([Credential("am", "")])


def test_secrets_are_not_shown() -> None:
    assert "s3cret" not in repr(Credential("am", "s3cret"))


# -- health, metrics


async def test_health(port: Port) -> None:
    assert await port.get("/-/healthy") == (200, {"status": "ok"})
    assert await port.get("/-/ready") == (200, {"ready": True, "sandbox": "cgroup2", "draining": False})
    port.health = {"ready": False, "disk": "full"}
    status, answer = await port.get("/-/ready")
    assert (status, answer["disk"]) == (503, "full")
    port.health = {}  # what does not say that it is ready is not
    assert (await port.get("/-/ready"))[0] == 503


async def test_draining(port: Port) -> None:
    port.serving.drain()
    status, answer = await port.get("/-/ready")
    assert (status, answer["ready"], answer["draining"]) == (503, False, True)
    assert (await port.post(body()))[0] == 503
    assert (await port.get("/-/healthy"))[0] == 200


async def test_closing_waits_for_requests_under_way(start: Any, held: HeldStore) -> None:
    port: Port = await start(held)
    held.hold()
    asking = asyncio.create_task(port.post(body()))
    await held.appended(1)
    closing = asyncio.create_task(port.serving.close())
    await asyncio.sleep(0.05)
    held.release()
    assert (await asking)[0] == 200
    await closing


async def test_metrics(port: Port) -> None:
    async with port.session.get(port.url + "/metrics") as answer:
        assert (await answer.text(), answer.headers["Content-Type"]) == ("up 1\n", "text/plain; version=0.0.4")
    async with port.session.head(port.url + "/metrics") as answer:
        assert (answer.status, await answer.read()) == (200, b"")


# -- API


async def test_incidents_are_listed_filtered_and_shown(port: Port) -> None:
    for n, tenant in enumerate(["a", "b", "a"]):
        await port.post(body(alert(n, labels={"alertname": f"A{n}"}), groupKey=f"g{n}"), f"/webhook/{tenant}")
    _, answer = await port.get("/api/v1/incidents")
    listed = answer["incidents"]
    assert [i["tenant"] for i in listed] == ["a", "b", "a"]
    assert [i["alerts"][0]["labels"]["alertname"] for i in listed] == ["A2", "A1", "A0"]
    first = listed[0]
    needed = {"id", "state", "tenant", "opened_at", "alerts", "hypotheses", "plan", "story"}
    assert needed <= set(first)
    assert {"fingerprint", "labels", "status", "starts_at"} <= set(first["alerts"][0])
    assert first["alerts"][0]["starts_at"] == "2026-11-20T09:51:50.846Z"
    assert (first["state"], first["plan"], first["hypotheses"]) == ("open", None, [])
    assert [i["id"] for i in (await port.get("/api/v1/incidents?limit=2"))[1]["incidents"]] == [
        i["id"] for i in listed[:2]
    ]
    assert len((await port.get("/api/v1/incidents?tenant=a&state=open"))[1]["incidents"]) == 2
    assert (await port.get("/api/v1/incidents?state=resolved"))[1]["incidents"] == []
    assert await port.get(f"/api/v1/incidents/{first['id']}") == (200, first)


@pytest.mark.parametrize(
    ("query", "path"),
    [
        ("state=odd", "state"),
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("limit=x", "limit"),
        ("limit=%D9%A3", "limit"),
        ("tenants=a", "tenants"),
        ("limit=1&limit=2", "limit"),
    ],
)
async def test_bad_queries(port: Port, query: str, path: str) -> None:
    status, answer = await port.get("/api/v1/incidents?" + query)
    assert (status, answer["error"]["path"]) == (400, path)


async def test_unknown_incident_and_methods(port: Port) -> None:
    assert (await port.get("/api/v1/incidents/inc-nothing"))[0] == 404
    async with port.session.delete(port.url + "/api/v1/incidents/inc-x") as answer:
        assert (answer.status, answer.headers["Allow"]) == (405, "GET")
    async with port.session.get(port.url + "/api/v1/pause") as answer:
        assert (answer.status, answer.headers["Allow"]) == (405, "POST")


async def test_quarantine_is_listed(port: Port) -> None:
    await port.post(b"[", "/webhook/a")
    await port.post(body(alert(), alert(1, status=3)), "/webhook/b")
    _, answer = await port.get("/api/v1/quarantine")
    assert [(q["tenant"], q["path"], q["index"]) for q in answer["quarantine"]] == [
        ("b", "$.alerts[1].status", 1),
        ("a", "$", None),
    ]
    assert (answer["total"], answer["quarantine"][1]["head"]) == (2, "[")
    assert [q["tenant"] for q in (await port.get("/api/v1/quarantine?tenant=a"))[1]["quarantine"]] == ["a"]


async def test_breakers_are_listed_and_reset(guarded: Port) -> None:
    move = BreakerMoved(
        key="a|b", before=BreakerState.CLOSED, after=BreakerState.OPEN, at=10.0, open_until=70.0, opened_count=1
    )
    await guarded.store.record(BreakerRecorded(move=move))
    _, answer = await guarded.get("/api/v1/breakers", bearer("am-token"))
    assert answer["breakers"] == [
        {
            "key": "a|b",
            "state": "open",
            "since": "1970-01-01T00:00:10.000Z",
            "open_until": "1970-01-01T00:01:10.000Z",
            "opened_count": 1,
            "reason": "",
        }
    ]
    reset = "/api/v1/breakers/reset"
    assert (await guarded.post(b'{"key":"a|b","note":"n"}', reset, bearer("admin-token")))[0] == 200
    assert (await guarded.post(b'{"key":"c"}', reset, bearer("admin-token")))[0] == 404
    assert guarded.decisions.asked[0] == ("reset", "a|b", "admin", "http 127.0.0.1", "n")


async def test_pause_and_resume(guarded: Port) -> None:
    assert (await guarded.post(b'{"note":"lunch"}', "/api/v1/pause", bearer("admin-token")))[1] == {"paused": True}
    assert (await guarded.post(b"", "/api/v1/resume", bearer("admin-token")))[1] == {"paused": False}
    assert guarded.decisions.asked == [
        ("pause", True, "admin", "http 127.0.0.1", "lunch"),
        ("pause", False, "admin", "http 127.0.0.1", ""),
    ]


async def decidable(port: Port) -> str:
    await port.post(body(), headers={**JSON, **bearer("admin-token")})
    (id,) = port.store.state.incidents
    return str(id)


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        ("approved", 200),
        ("rejected", 200),
        ("unknown_incident", 404),
        ("nothing_waiting", 409),
        ("stale_digest", 409),
        ("expired", 409),
        ("refused", 409),
    ],
)
async def test_decisions_and_their_answers(guarded: Port, outcome: Any, status: int) -> None:
    id = await decidable(guarded)
    guarded.decisions.answer = ApprovalAnswer(outcome=outcome, incident=id, plan="p", detail="because")
    for verb in ("approve", "reject"):
        sent = b'{"digest":"abc","note":"go"}'
        got, answer = await guarded.post(sent, f"/api/v1/incidents/{id}/{verb}", bearer("admin-token"))
        assert got == status
        if status == 200:
            assert answer == {"outcome": outcome, "incident": id, "plan": "p", "detail": "because"}
        else:
            assert (answer["error"]["reason"], answer["error"]["path"]) == ("because", outcome)
    assert guarded.decisions.asked == [
        (verb, id, "abc", "admin", "http 127.0.0.1", "go") for verb in ("approve", "reject")
    ]


@pytest.mark.parametrize(
    ("sent", "status", "path"),
    [
        (b"", 400, "$"),
        (b"{}", 400, "$"),
        (b"[]", 400, "$"),
        (b"{", 400, "$"),
        (b'{"digest":1}', 400, "$.digest"),
        (b'{"digest":"a","notes":"typo"}', 400, "$"),
        (b'{"digest":"a","who":"somebody else"}', 400, "$.who"),
        (b'{"digest":"a","note":"' + b"x" * 5000 + b'"}', 400, "$.note"),
        (b'{"digest":"\xff"}', 400, "$"),
        (b" " * 70_000, 413, ""),
    ],
)
async def test_bad_decisions_decide_nothing(guarded: Port, sent: bytes, status: int, path: str) -> None:
    id = await decidable(guarded)
    got, answer = await guarded.post(sent, f"/api/v1/incidents/{id}/approve", bearer("admin-token"))
    assert (got, answer["error"]["path"]) == (status, path)
    assert guarded.decisions.asked == []


# -- rendering


def test_rendering_shows_every_field_and_rfc3339() -> None:
    step = Step(action="a", version=1, target="service=x", argv=("true",))
    plan = Plan(
        id="p",
        incident="inc-a",
        service="x",
        cause="c",
        steps=(step,),
        autonomy="approve",
        made_at=5.0,
        expires_at=65.5,
    )
    hypothesis = Hypothesis(
        cause="c",
        service="x",
        fault="cpu",
        title="t",
        posterior=0.9,
        confidence=0.8,
        contributions=(Contribution(evidence="e", state="strong", log_odds=1.5, text="why"),),
        proposals=(Proposal(action="a", service="x"),),
    )
    incident = Incident(
        id="inc-a",
        tenant="t",
        key="k",
        state=IncidentState.AWAITING_APPROVAL,
        opened_at=1.0,
        opened_seq=1,
        updated_at=2.0,
        updated_seq=2,
        last_alert_at=1.0,
        diagnosis=Diagnosis(verdict="ranked", hypotheses=(hypothesis,), missing={"m": "timeout"}),
        plan=plan,
        plan_digest=plan.digest,
        plan_state="waiting",
        steps=[StepView()],
        story=[StoryLine(1.0, "alert", "alerts_received")],
    )
    shown = json.loads(json.dumps(incident_json(incident)))
    assert shown["opened_at"] == "1970-01-01T00:00:01.000Z"
    assert shown["closed_at"] is None
    assert shown["plan"]["expires_at"] == "1970-01-01T00:01:05.500Z"
    assert (shown["plan"]["digest"], shown["plan"]["state"]) == (
        plan_digest(incident.plan.id, "inc-a", (step,)),
        "waiting",
    )
    assert (shown["plan"]["steps"][0]["state"], shown["plan"]["steps"][0]["argv"]) == ("planned", ["true"])
    assert set(shown["hypotheses"][0]) == set(Hypothesis.__struct_fields__)
    assert shown["hypotheses"][0]["contributions"][0]["series"] == []
    assert (shown["verdict"], shown["missing"]) == ("ranked", {"m": "timeout"})
    assert shown["story"] == [{"at": "1970-01-01T00:00:01.000Z", "kind": "alerts_received", "text": "alert"}]


def test_times_are_utc() -> None:
    assert rfc3339(1795168310.846908) == "2026-11-20T09:51:50.846Z"
    assert plain({"a": (1, IncidentState.OPEN)}) == {"a": [1, "open"]}


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:9095", 200),
        ("[::1]:9095", 200),
        ("localhost", 200),
        ("api.localhost:1", 200),
        (socket.gethostname(), 200),
        ("evil.example:9095", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("[", 403),
        ("", 403),
    ],
)
async def test_a_page_whose_name_came_to_mean_this_machine_reads_nothing(port: Port, host: str, status: int) -> None:
    """DNS rebinding: the browser is on this machine, and the page's own name leads here."""
    reader, writer = await asyncio.open_connection(*port.serving.addresses[0])
    writer.write(f"GET /api/v1/incidents HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    assert int((await reader.read()).split()[1]) == status
    writer.close()


# -- the usual request, straight from the socket


def _usual(sent: bytes, path: str = "/webhook", more: str = "") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{more}"
    return head.encode() + b"Content-Length: %d\r\n\r\n%b" % (len(sent), sent)


async def _answers(address: tuple[str, int], *writes: bytes, count: int) -> list[tuple[int, dict[str, Any]]]:
    """Writes one after the other, each seen by itself; then the answers, in the order in which they come."""
    reader, writer = await asyncio.open_connection(*address)
    try:
        for data in writes:
            writer.write(data)
            await writer.drain()
            await asyncio.sleep(0.01)
        found = []
        for _ in range(count):
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
            size = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            found.append((int(head.split()[1]), json.loads(await reader.readexactly(size))))
        return found
    finally:
        writer.close()


@pytest.mark.parametrize("pieces", [1, 2, 7])
async def test_requests_in_any_pieces_are_answered_in_order(port: Port, pieces: int) -> None:
    """Several in one write, or one in several; new, known, bad, of another tenant, and one that aiohttp has to read."""
    sent = b"".join(
        [
            _usual(body(alert(1))),
            _usual(body(alert(1), alert(2))),
            _usual(b"{"),
            _usual(body(alert(1)), "/webhook/team"),
            _usual(body(alert(3)), more="X-Unusual: yes\r\n"),
            _usual(body(alert(4))),
        ]
    )
    size = -(-len(sent) // pieces)
    answers = await _answers(port.address, *(sent[at : at + size] for at in range(0, len(sent), size)), count=6)
    assert [status for status, _ in answers] == [200, 200, 400, 200, 200, 200]
    assert [a.get("accepted") for _, a in answers] == [1, 1, None, 1, 1, 1]
    assert answers[1][1]["duplicates"] == 1


@pytest.mark.parametrize(
    ("line", "headers"),
    [
        ("POST /webhook HTTP/1.1", "Host: x|Content-Type: application/json|Content-Length: 2|Content-Length: 2"),
        ("POST /webhook HTTP/1.1", "Host: x|Content-Type: application/json|Content-Length: +2"),
        ("POST /webhook HTTP/1.1", "Host: x|Content-Type: application/json|Transfer-Encoding: chunked"),
        ("POST /webhook HTTP/1.1", "Host: x| Content-Type: application/json|Content-Length: 2"),
        ("POST /webhook HTTP/1.1", "Host: x|Content-Type : application/json|Content-Length: 2"),
        ("POST /webhook HTTP/1.1", "Host: x|Content-Type: application/json|Content-Length: 65537"),
        ("POST /webhook HTTP/1.1", "Host: x|Content-Type: text/plain|Content-Length: 2"),
        ("POST /webhook HTTP/1.1", "Host: x|Content-Type: application/json|Origin: http://x|Content-Length: 2"),
        ("POST /webhook HTTP/1.1", "Content-Type: application/json|Content-Length: 2"),
        ("POST /webhook HTTP/1.0", "Host: x|Content-Type: application/json|Content-Length: 2"),
        ("POST /webhook/a%2fb HTTP/1.1", "Host: x|Content-Type: application/json|Content-Length: 2"),
        ("GET /webhook HTTP/1.1", "Host: x|Content-Type: application/json|Content-Length: 2"),
    ],
)
def test_a_head_that_deviates_is_left_to_aiohttp(line: str, headers: str) -> None:
    transport: Any = None
    assert usual_request(f"{line}|{headers}".replace("|", "\r\n").encode(), transport) is None
    usual = "POST /webhook HTTP/1.1|Host: x|Content-Type: application/json|Content-Length: 2".replace("|", "\r\n")
    assert usual_request(usual.encode(), transport) is not None


async def test_draining_waits_for_the_usual_request_too(start: Any, held: HeldStore) -> None:
    port: Port = await start(held)
    held.hold()
    asking = asyncio.create_task(_answers(port.address, _usual(body()), count=1))
    await held.appended(1)
    closing = asyncio.create_task(port.serving.close())
    await asyncio.sleep(0)
    held.release()
    assert (await asking)[0][0] == 200
    await closing
