"""Bad input, one case a class: each gets its status, reason and path, and nothing good is lost beside or after it."""

from __future__ import annotations

import asyncio
import gzip
import json
from base64 import b64encode
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import ClientSession
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from intake_world import JSON, REMOVED, Decisions, HeldStore, Port, alert, body, payload
from test_intake_payload import json_values, mutated

from agent.http.auth import Credential, Guard
from agent.http.server import Options, build_app, serve
from agent.intake import Intake

MOST = 100_000
GUARD = Guard(
    [
        Credential("webhook token", "s3cret"),
        Credential("second token", "other"),
        Credential("reader", "read-only", scopes=("read",)),
        Credential("team", "team-token", tenants=("team-*",)),
        Credential("grafana", "pass:word", user="grafana"),
    ]
)
OPTIONS = Options(max_body_bytes=MOST, read_seconds=0.3)
GOOD = [alert(101), alert(102)]


# -- one alert of a payload. Sent between two good ones: 200, and it alone is quarantined.


@dataclass(frozen=True)
class BadAlertCase:
    name: str
    bad: Any  # the alert, or its JSON text
    path: str
    reason: str


def raw_alert(before: str, after: str) -> str:
    """A good alert's JSON with one text replaced."""
    written = json.dumps(alert(7), ensure_ascii=False)
    assert before in written
    return written.replace(before, after)


ALERTS = [
    BadAlertCase("alert is a string", '"x"', "", "expected object, got string"),
    BadAlertCase("alert is null", "null", "", "expected object, got null"),
    BadAlertCase("alert is an array", "[]", "", "expected object, got array"),
    BadAlertCase("status missing", alert(7, status=REMOVED), ".status", "missing"),
    BadAlertCase("status is a number", alert(7, status=1), ".status", "expected string, got number"),
    BadAlertCase("status is another word", alert(7, status="pending"), ".status", '"firing" or "resolved"'),
    BadAlertCase("status in capitals", alert(7, status="Firing"), ".status", "'Firing'"),
    BadAlertCase("labels missing", alert(7, labels=REMOVED), ".labels", "missing"),
    BadAlertCase("labels is null", alert(7, labels=None), ".labels", "expected object, got null"),
    BadAlertCase("labels is an array", alert(7, labels=["a"]), ".labels", "expected object, got array"),
    BadAlertCase("labels is a string", alert(7, labels="a=b"), ".labels", "expected object, got string"),
    BadAlertCase("no labels", alert(7, labels={}), ".labels", "no labels"),
    BadAlertCase("label is a number", alert(7, labels={"severity": 3}), ".labels.severity", "got number"),
    BadAlertCase("label is a boolean", alert(7, labels={"page": True}), ".labels.page", "got boolean"),
    BadAlertCase("label is null", alert(7, labels={"a": None}), ".labels.a", "got null"),
    BadAlertCase("label is an object", alert(7, labels={"a b": {}}), '.labels["a b"]', "got object"),
    BadAlertCase("label without a name", alert(7, labels={"": "x"}), '.labels[""]', "empty name"),
    BadAlertCase("too many labels", alert(7, labels={f"l{n}": "" for n in range(257)}), ".labels", "257 entries"),
    BadAlertCase(
        "label value too long", alert(7, labels={"a": "x" * 65_537}), ".labels.a", "65537 bytes, at most 65536"
    ),
    BadAlertCase("label name too long", alert(7, labels={"n" * 2049: ""}), ".labels", "2049 bytes"),
    BadAlertCase("label twice", raw_alert('"instance"', '"alertname"'), ".labels.alertname", "twice"),
    BadAlertCase("label with NUL", raw_alert("i7", r"i\u0000"), ".labels.instance", "NUL"),
    BadAlertCase("label name with NUL", raw_alert("instance", r"\u0000"), ".labels", "NUL"),
    BadAlertCase("label with an unpaired surrogate", raw_alert("i7", r"\ud83d"), ".labels.instance", "surrogate"),
    BadAlertCase("annotations is an array", alert(7, annotations=[]), ".annotations", "expected object, got array"),
    BadAlertCase("annotation is a number", alert(7, annotations={"v": 1.5}), ".annotations.v", "got number"),
    BadAlertCase("startsAt missing", alert(7, startsAt=REMOVED), ".startsAt", "missing"),
    BadAlertCase("startsAt is unix time", alert(7, startsAt=1795168310), ".startsAt", "expected string, got number"),
    BadAlertCase("startsAt is no time", alert(7, startsAt="yesterday"), ".startsAt", "RFC 3339"),
    BadAlertCase("startsAt without zone", alert(7, startsAt="2026-11-20T09:51:50"), ".startsAt", "RFC 3339"),
    BadAlertCase("startsAt is a date", alert(7, startsAt="2026-11-20"), ".startsAt", "RFC 3339"),
    BadAlertCase("startsAt in month 13", alert(7, startsAt="2026-13-20T09:51:50Z"), ".startsAt", "not a time"),
    BadAlertCase("ten fractional digits", alert(7, startsAt="2026-11-20T09:51:50.0123456789Z"), ".startsAt", "nine"),
    BadAlertCase("startsAt is the zero time", alert(7, startsAt="0001-01-01T00:00:00Z"), ".startsAt", "zero time"),
    BadAlertCase("startsAt before 1970", alert(7, startsAt="1969-12-31T23:59:59Z"), ".startsAt", "1970"),
    BadAlertCase("endsAt is no time", alert(7, endsAt="soon"), ".endsAt", "RFC 3339"),
    BadAlertCase("endsAt is a number", alert(7, endsAt=0), ".endsAt", "expected string, got number"),
    BadAlertCase("resolved without endsAt", alert(7, status="resolved", endsAt=REMOVED), ".endsAt", "missing"),
    BadAlertCase("resolved at the zero time", alert(7, status="resolved"), ".endsAt", "zero time"),
    BadAlertCase("fingerprint missing", alert(7, fingerprint=REMOVED), ".fingerprint", "missing"),
    BadAlertCase("fingerprint is a number", alert(7, fingerprint=12), ".fingerprint", "expected string, got number"),
    BadAlertCase("fingerprint is empty", alert(7, fingerprint=""), ".fingerprint", "empty"),
    BadAlertCase("fingerprint too long", alert(7, fingerprint="f" * 257), ".fingerprint", "257 bytes"),
    BadAlertCase(
        "generatorURL is an object", alert(7, generatorURL={}), ".generatorURL", "expected string, got object"
    ),
    BadAlertCase("field twice", raw_alert('"startsAt"', '"status": "firing", "startsAt"'), ".status", "twice"),
]


def among_good(bad: Any) -> bytes:
    written = json.dumps(payload(GOOD[0], "@bad", GOOD[1]))
    return written.replace('"@bad"', bad if isinstance(bad, str) else json.dumps(bad)).encode()


@pytest.mark.parametrize("case", ALERTS, ids=lambda c: c.name)
async def test_a_bad_alert_is_quarantined_and_the_good_ones_are_kept(case: BadAlertCase, held: HeldStore) -> None:
    intake = Intake(held)  # type: ignore[arg-type]
    done = await intake.receive("default", among_good(case.bad))
    assert (done.accepted, done.duplicates) == (2, 0)
    (named,) = done.quarantined
    assert named.index == 1
    assert named.path.startswith("$.alerts[1]" + case.path)
    assert case.reason in named.reason
    assert [a.fingerprint for r in held.received for a in r.alerts] == [a["fingerprint"] for a in GOOD]
    (kept,) = held.quarantined
    assert (kept.index, kept.path, kept.reason) == (1, named.path, named.reason)


# -- the body as a whole: 400, quarantined whole


@dataclass(frozen=True)
class BadBodyCase:
    name: str
    body: bytes
    path: str
    reason: str


def text(before: str, after: str) -> bytes:
    written = body().decode()
    assert before in written
    return written.replace(before, after).encode()


BODIES = [
    BadBodyCase("empty", b"", "$", "empty body"),
    BadBodyCase("white space", b" \n\t ", "$", "empty body"),
    BadBodyCase("not JSON", b"alert: yes", "$", "malformed JSON"),
    BadBodyCase("cut off", body()[:-20], "$", "malformed JSON"),
    BadBodyCase("more behind the end", body() + b"{}", "$", "Extra data"),
    BadBodyCase("trailing comma", body()[:-1] + b",}", "$", "malformed JSON"),
    BadBodyCase("single quotes", body().replace(b'"', b"'"), "$", "malformed JSON"),
    BadBodyCase("unescaped control character", text("i0", "i\n"), "$", "control character"),
    BadBodyCase("bad escape", text("i0", r"\x41"), "$", "escape"),
    BadBodyCase("NaN", text('"truncatedAlerts": 0', '"truncatedAlerts": NaN'), "$", "NaN"),
    BadBodyCase("Infinity", text('"truncatedAlerts": 0', '"x": -Infinity'), "$", "Infinity"),
    BadBodyCase(
        "number of 5000 digits", text('"truncatedAlerts": 0', '"truncatedAlerts": ' + "9" * 5000), "$", "digits"
    ),
    BadBodyCase("byte order mark", b"\xef\xbb\xbf" + body(), "$", "byte order mark"),
    BadBodyCase("UTF-16", body().decode().encode("utf-16"), "$", "not UTF-8"),
    BadBodyCase("Latin-1", text("i0", "@").replace(b"@", b"\xe9"), "$", "not UTF-8"),
    BadBodyCase("surrogate encoded as UTF-8", text("i0", "@").replace(b"@", b"\xed\xa0\x80"), "$", "not UTF-8"),
    BadBodyCase("nested 300 deep", text('"truncatedAlerts": 0', '"x": ' + "[" * 300 + "]" * 300), "$", "nested"),
    BadBodyCase("nested 40000 deep", b"[" * 40_000, "$", "nested"),
    BadBodyCase("an array", b"[]", "$", "expected object, got array"),
    BadBodyCase("a string", b'"firing"', "$", "expected object, got string"),
    BadBodyCase("null", b"null", "$", "expected object, got null"),
    BadBodyCase("Alertmanager's own API format", json.dumps([alert()]).encode(), "$", "expected object, got array"),
    BadBodyCase("version missing", body(version=REMOVED), "$.version", "missing"),
    BadBodyCase("version is a number", body(version=4), "$.version", "expected string, got number"),
    BadBodyCase("another version", body(version="3"), "$.version", "'3' is not supported"),
    BadBodyCase("receiver missing", body(receiver=REMOVED), "$.receiver", "missing"),
    BadBodyCase("receiver is an object", body(receiver={}), "$.receiver", "expected string, got object"),
    BadBodyCase("status missing", body(status=REMOVED), "$.status", "missing"),
    BadBodyCase("status is another word", body(status="ok"), "$.status", "'ok'"),
    BadBodyCase("groupKey missing", body(groupKey=REMOVED), "$.groupKey", "missing"),
    BadBodyCase("groupKey is null", body(groupKey=None), "$.groupKey", "expected string, got null"),
    BadBodyCase("groupLabels is an array", body(groupLabels=[]), "$.groupLabels", "expected object, got array"),
    BadBodyCase(
        "group label is a number", body(groupLabels={"a": 1}), "$.groupLabels.a", "expected string, got number"
    ),
    BadBodyCase("externalURL is a number", body(externalURL=1), "$.externalURL", "expected string, got number"),
    BadBodyCase("truncatedAlerts is a string", body(truncatedAlerts="7"), "$.truncatedAlerts", "expected whole number"),
    BadBodyCase("truncatedAlerts is a fraction", body(truncatedAlerts=1.5), "$.truncatedAlerts", "whole number"),
    BadBodyCase("truncatedAlerts is a boolean", body(truncatedAlerts=True), "$.truncatedAlerts", "got boolean"),
    BadBodyCase("truncatedAlerts is negative", body(truncatedAlerts=-1), "$.truncatedAlerts", "0 to"),
    BadBodyCase("alerts missing", body(alerts=REMOVED), "$.alerts", "missing"),
    BadBodyCase("alerts is an object", body(alerts={}), "$.alerts", "expected array, got object"),
    BadBodyCase("alerts is null", body(alerts=None), "$.alerts", "expected array, got null"),
    BadBodyCase("no alerts", body(alerts=[]), "$.alerts", "no alerts"),
    BadBodyCase("no alert is good", body(alert(status=1), 2), "$.alerts[0].status", "expected string, got number"),
    BadBodyCase("alerts twice", text('"version"', '"alerts": [], "version"'), "$.alerts", "twice"),
    BadBodyCase("groupKey too long", body(groupKey="k" * 70_000), "$.groupKey", "70000 bytes"),
]


@pytest.fixture
async def port(start: Any, held: HeldStore) -> Port:
    made: Port = await start(held, OPTIONS)
    return made


@pytest.fixture
async def guarded(start: Any, held: HeldStore) -> Port:
    made: Port = await start(held, Options(guard=GUARD, max_body_bytes=MOST, read_seconds=0.3))
    return made


async def good_afterwards(port: Port, headers: dict[str, str] | None = None) -> None:
    status, answer = await port.post(body(alert(900)), headers={**JSON, **(headers or {})})
    assert (status, answer["accepted"] + answer["duplicates"]) == (200, 1)
    assert "0" * 13 + f"{900:x}" in {a.fingerprint for r in port.store.received for a in r.alerts}


@pytest.mark.parametrize("case", BODIES, ids=lambda c: c.name)
async def test_a_bad_body_is_refused_with_reason_and_path(case: BadBodyCase, port: Port) -> None:
    status, answer = await port.post(case.body)
    assert status == 400
    assert set(answer["error"]) == {"reason", "path", "hint"}
    assert answer["error"]["path"] == case.path
    assert case.reason in answer["error"]["reason"]
    assert port.store.quarantined
    await good_afterwards(port)


# -- the request: refused before the body counts; nothing is quarantined


@dataclass(frozen=True)
class BadRequestCase:
    name: str
    status: int
    reason: str
    data: bytes = field(default_factory=body)
    path: str = "/webhook"
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=lambda: dict(JSON))
    answered: dict[str, str] = field(default_factory=dict)


def basic(user: str, password: str) -> str:
    return "Basic " + b64encode(f"{user}:{password}".encode()).decode()


REQUESTS = [
    BadRequestCase("GET", 405, "GET is not allowed", method="GET", answered={"Allow": "POST"}),
    BadRequestCase("PUT", 405, "PUT is not allowed", method="PUT", answered={"Allow": "POST"}),
    BadRequestCase("DELETE of a tenant", 405, "DELETE", path="/webhook/t", method="DELETE", answered={"Allow": "POST"}),
    BadRequestCase("unknown path", 404, "no such path", path="/webhooks"),
    BadRequestCase("two tenants", 404, "no such path", path="/webhook/a/b"),
    BadRequestCase("empty tenant", 404, "no such path", path="/webhook/"),
    BadRequestCase("tenant with a space", 400, "tenant 'a b'", path="/webhook/a%20b"),
    BadRequestCase("tenant with other letters", 400, "tenant", path="/webhook/%D1%91"),
    BadRequestCase("tenant of 65 characters", 400, "tenant", path="/webhook/" + "t" * 65),
    BadRequestCase("no content type", 415, "content type", headers={"Content-Type": ""}),
    BadRequestCase("plain text", 415, "content type 'text/plain'", headers={"Content-Type": "text/plain"}),
    BadRequestCase("a form", 415, "content type", headers={"Content-Type": "application/x-www-form-urlencoded"}),
    BadRequestCase("another JSON", 415, "content type", headers={"Content-Type": "application/jsonp"}),
    BadRequestCase("another charset", 415, "charset", headers={"Content-Type": "application/json; charset=latin-1"}),
    BadRequestCase("brotli", 415, "content encoding 'br'", headers={**JSON, "Content-Encoding": "br"}),
    BadRequestCase("packed twice", 415, "content encoding", headers={**JSON, "Content-Encoding": "gzip, gzip"}),
    BadRequestCase("gzip that is none", 400, "malformed gzip", headers={**JSON, "Content-Encoding": "gzip"}),
    BadRequestCase(
        "gzip cut off",
        400,
        "malformed gzip: cut off",
        data=gzip.compress(body())[:-9],
        headers={**JSON, "Content-Encoding": "gzip"},
    ),
    BadRequestCase(
        "gzip with more behind",
        400,
        "malformed gzip: bytes after",
        data=gzip.compress(body()) + b"x",
        headers={**JSON, "Content-Encoding": "gzip"},
    ),
    BadRequestCase(
        "gzip with a wrong checksum",
        400,
        "malformed gzip",
        data=gzip.compress(body())[:-8] + b"\0" * 8,
        headers={**JSON, "Content-Encoding": "gzip"},
    ),
    BadRequestCase(
        "gzip bomb",
        413,
        f"over {MOST} bytes",
        data=gzip.compress(b" " * 50_000_000),
        headers={**JSON, "Content-Encoding": "gzip"},
    ),
    BadRequestCase("too large by its length", 413, f"over {MOST} bytes", data=b" " * (MOST + 1)),
]


async def ask(port: Port, case: BadRequestCase) -> tuple[int, Any, Any]:
    async with port.session.request(
        case.method, port.url + case.path, data=case.data, headers=case.headers, skip_auto_headers=("Content-Type",)
    ) as answer:
        return answer.status, await answer.json(), answer.headers


@pytest.mark.parametrize("case", REQUESTS, ids=lambda c: c.name)
async def test_a_bad_request_is_refused_in_json(case: BadRequestCase, port: Port) -> None:
    status, answer, headers = await ask(port, case)
    assert status == case.status
    assert set(answer["error"]) == {"reason", "path", "hint"}
    assert case.reason in answer["error"]["reason"]
    assert {name: headers[name] for name in case.answered} == case.answered
    assert port.store.appends == 0
    await good_afterwards(port)


HEAD = b"POST /webhook HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


async def test_too_large_while_streaming_in_chunks(port: Port) -> None:
    chunk = b"2710\r\n" + b" " * 10_000 + b"\r\n"
    answer = await port.raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *([chunk] * 11))
    assert b" 413 " in answer.splitlines()[0]
    await good_afterwards(port)


async def test_a_body_that_comes_too_slowly(port: Port) -> None:
    answer = await port.raw(HEAD + b"Content-Length: 500\r\n\r\n", b"{")
    assert b" 408 " in answer.splitlines()[0]
    assert b"did not arrive within 0.3 s" in answer
    assert b"connection: close" in answer.lower()
    assert port.intake.requests == port.intake.bytes == 0
    await good_afterwards(port)


async def test_a_body_that_is_cut_off(port: Port) -> None:
    """The sender is gone before the end: nobody to answer, nothing recorded, nothing held."""
    with pytest.raises((EOFError, ConnectionError)):
        await port.raw(HEAD + b"Content-Length: 500\r\n\r\n" + body()[:100], end=True)
    assert port.store.appends == 0
    await good_afterwards(port)
    assert port.intake.requests == port.intake.bytes == 0


@pytest.mark.parametrize(
    "malformed",
    [
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"Content-Length: 10\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"Content-Length: -1\r\n\r\n",
        b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    ],
)
async def test_malformed_http(port: Port, malformed: bytes) -> None:
    answer = await port.raw(HEAD + malformed)
    assert b" 400 " in answer.splitlines()[0]
    assert port.store.appends == 0
    await good_afterwards(port)


# -- who may


AUTH = [
    BadRequestCase("no credentials", 401, "authentication required"),
    BadRequestCase("unknown token", 401, "unknown", headers={**JSON, "Authorization": "Bearer wrong"}),
    BadRequestCase("empty token", 401, "unknown", headers={**JSON, "Authorization": "Bearer "}),
    BadRequestCase("token cut off", 401, "unknown", headers={**JSON, "Authorization": "Bearer s3cre"}),
    BadRequestCase("another scheme", 401, "unknown", headers={**JSON, "Authorization": "Digest s3cret"}),
    BadRequestCase("wrong password", 401, "unknown", headers={**JSON, "Authorization": basic("grafana", "word")}),
    BadRequestCase("wrong user", 401, "unknown", headers={**JSON, "Authorization": basic("grafan", "pass:word")}),
    BadRequestCase("password as token", 401, "unknown", headers={**JSON, "Authorization": "Bearer grafana:pass:word"}),
    BadRequestCase("token as password", 401, "unknown", headers={**JSON, "Authorization": basic("", "s3cret")}),
    BadRequestCase("basic that is no base64", 401, "unknown", headers={**JSON, "Authorization": "Basic ???"}),
    BadRequestCase("scope read only", 403, "lacks the scope", headers={**JSON, "Authorization": "Bearer read-only"}),
    BadRequestCase("other tenant", 403, "may not post", headers={**JSON, "Authorization": "Bearer team-token"}),
    BadRequestCase("bad body, no credentials", 401, "authentication required", data=b"{"),
    BadRequestCase("bad type, no credentials", 401, "authentication required", headers={"Content-Type": "a/b"}),
]


@pytest.mark.parametrize("case", AUTH, ids=lambda c: c.name)
async def test_callers_who_may_not_are_refused(case: BadRequestCase, guarded: Port) -> None:
    status, answer, headers = await ask(guarded, case)
    assert status == case.status
    assert case.reason in answer["error"]["reason"]
    assert ("WWW-Authenticate" in headers) == (status == 401)
    assert guarded.store.appends == 0
    await good_afterwards(guarded, {"Authorization": "Bearer s3cret"})


async def test_refused_before_the_body_is_sent(guarded: Port) -> None:
    """With a body announced and none sent, the refusal is there at once; so is it for one that is too large."""
    head = HEAD + b"Content-Length: 5000\r\n"
    assert b" 401 " in (await guarded.raw(head + b"\r\n")).splitlines()[0]
    asked = head + b"Expect: 100-continue\r\nAuthorization: Bearer wrong\r\n\r\n"
    assert b" 401 " in (await guarded.raw(asked)).splitlines()[0]


def test_every_case_is_a_class_of_its_own() -> None:
    tables = (ALERTS, BODIES, REQUESTS, AUTH)
    for table in tables:
        assert len({case.name for case in table}) == len(table)  # type: ignore[attr-defined]
    assert sum(map(len, tables)) >= 40


# -- anything at all


@given(st.binary(max_size=200) | json_values.map(lambda v: json.dumps(v).encode()) | mutated())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arbitrary_bodies_never_give_more_than_4xx(raw: bytes) -> None:
    async def post() -> int:
        store: Any = HeldStore()
        app = build_app(Intake(store), store, Decisions(), health=dict, metrics=lambda: (b"", ""))
        serving = await serve(app, "127.0.0.1", 0)
        port = Port(store, app.webhook._intake, serving, ClientSession())
        try:
            return (await port.post(raw))[0]
        finally:
            await port.session.close()
            await serving.close()

    assert asyncio.run(post()) in (200, 400)
