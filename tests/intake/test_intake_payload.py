"""The parser: captured payloads, Grafana's variant, laws over arbitrary alerts."""

from __future__ import annotations

import hashlib
import json
import math
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from intake_world import REMOVED, alert, body, payload, payload_bodies

from agent import alerts as module
from agent.alerts import (
    DEFAULT_BOUNDS,
    HEAD_BYTES,
    Bounds,
    Payload,
    PayloadError,
    UsualPayload,
    alert_digest,
    check_tenant,
    parse_payload,
    parse_time,
    usual_alerts,
    usual_payload,
)

BODIES = payload_bodies()
GRAFANA = {
    "receiver": "grafana-default",
    "status": "firing",
    "orgId": 1,
    "alerts": [
        {
            "status": "firing",
            "labels": {"alertname": "High", "grafana_folder": "shop"},
            "annotations": {"summary": "B=22"},
            "startsAt": "2026-11-20T09:31:50.846+01:00",
            "endsAt": "0001-01-01T00:00:00Z",
            "generatorURL": "https://grafana/alerting/grafana/1/view",
            "fingerprint": "57c6d9296de2ad39",
            "silenceURL": "https://grafana/alerting/silence/new",
            "dashboardURL": "https://grafana/d/1",
            "panelURL": "https://grafana/d/1?viewPanel=2",
            "imageURL": "https://grafana/i.png",
            "values": {"B": 22.0, "C": 1},
            "valueString": "[ var='B' labels={} value=22 ]",
        }
    ],
    "groupLabels": {"alertname": "High"},
    "commonLabels": {"alertname": "High", "grafana_folder": "shop"},
    "commonAnnotations": {},
    "externalURL": "https://grafana/",
    "version": "1",
    "groupKey": '{}:{alertname="High"}',
    "truncatedAlerts": 0,
    "title": "[FIRING:1] High",
    "state": "alerting",
    "message": "**Firing**",
}


def parse(data: bytes, bounds: Bounds = DEFAULT_BOUNDS) -> Payload:
    return parse_payload(data, "t", bounds)


@pytest.mark.parametrize("name", BODIES)
def test_captured_payloads_are_read_whole(name: str) -> None:
    """Against an independent reading by the standard decoder."""
    sent = json.loads(BODIES[name])
    read = parse(BODIES[name])
    assert read.bad == ()
    assert (read.version, read.variant, read.receiver) == ("4", "alertmanager", sent["receiver"])
    assert (read.group_key, read.group_labels) == (sent["groupKey"], sent["groupLabels"])
    assert (read.external_url, read.truncated) == (sent["externalURL"], sent["truncatedAlerts"])
    assert len(read.alerts) == len(sent["alerts"])
    for got, was in zip(read.alerts, sent["alerts"], strict=True):
        assert (got.fingerprint, got.status) == (was["fingerprint"], was["status"])
        assert (got.labels, got.annotations, got.generator_url) == (
            was["labels"],
            was["annotations"],
            was["generatorURL"],
        )
        assert (got.ends_at is None) == (was["status"] == "firing")
        assert got.tenant == "t"


def test_grafana_variant_and_its_zone() -> None:
    read = parse(json.dumps(GRAFANA).encode())
    assert (read.variant, read.bad, len(read.alerts)) == ("grafana", (), 1)
    assert read.alerts[0].starts_at == parse_time("2026-11-20T08:31:50.846Z")


def test_unknown_fields_everywhere_are_accepted() -> None:
    extra = {"a": [1, {"b": None}], "c": {"d": {"e": "f"}}}
    read = parse(body(alert(x=extra, notification="1"), notification_reason="new", more=extra))
    assert len(read.alerts) == 1
    assert read.bad == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1970-01-01T00:00:00Z", 0.0),
        ("2026-11-20T09:51:50.5Z", 1795168310.5),
        ("2026-11-20T09:51:50.846908475Z", 1795168310.846908),
        ("2026-11-20T10:51:50.846908475+01:00", 1795168310.846908),
        ("2026-11-20T04:21:50.5-05:30", 1795168310.5),
    ],
)
def test_times(text: str, expected: float) -> None:
    assert math.isclose(parse_time(text), expected, abs_tol=1e-6, rel_tol=0)


@given(st.datetimes(min_value=datetime(1970, 1, 2)), st.integers(0, 999))
def test_times_agree_with_datetime(at: datetime, nanos: int) -> None:
    text = at.isoformat(timespec="microseconds") + f"{nanos:03d}Z"
    assert math.isclose(parse_time(text), at.replace(tzinfo=UTC).timestamp(), abs_tol=2e-6, rel_tol=0)


def test_firing_alert_has_no_end_whatever_the_sender_predicts() -> None:
    plain, predicted = parse(body(alert(), alert(endsAt="2030-01-01T00:00:00Z"))).alerts
    assert predicted.ends_at is None
    assert predicted.digest == plain.digest


@pytest.mark.parametrize("missing", [REMOVED, None])
def test_optional_fields_may_be_absent_or_null(missing: Any) -> None:
    bare = alert(annotations=missing, generatorURL=missing, endsAt=missing)
    read = parse(body(bare, groupLabels=missing, externalURL=missing, truncatedAlerts=missing))
    assert (len(read.alerts), read.bad) == (1, ())
    assert read.group_labels == {}
    assert (read.external_url, read.truncated) == ("", 0)


def test_one_bad_alert_leaves_the_others_and_is_named() -> None:
    read = parse(body(alert(0), alert(1, labels={"severity": 3}), "no alert", alert(2)))
    assert [a.fingerprint for a in read.alerts] == [f"{0:016x}", f"{2:016x}"]
    assert [(b.index, b.path, b.reason) for b in read.bad] == [
        (1, "$.alerts[1].labels.severity", "expected string, got number"),
        (2, "$.alerts[2]", "expected object, got string"),
    ]
    assert '"severity":3' in read.bad[0].head


def test_alerts_beyond_the_bound_are_named_not_dropped() -> None:
    read = parse(body(*(alert(n) for n in range(7))), Bounds(alerts=4))
    assert len(read.alerts) == 4
    assert [(b.index, b.path) for b in read.bad] == [(4, "$.alerts[4:]")]
    assert "3 alerts" in read.bad[0].reason


def test_head_is_bounded_and_digest_is_of_the_whole() -> None:
    long = "x" * (2 * HEAD_BYTES)
    one, two = parse(body(alert(status="odd", x=long + "1"), alert(status="odd", x=long + "2"))).bad
    assert len(one.head) == HEAD_BYTES
    assert one.head == two.head
    assert one.digest != two.digest
    assert parse(body(alert(status="odd", x=long + "1"))).bad[0].digest == one.digest


@pytest.mark.parametrize(
    ("bounds", "changes", "path"),
    [
        (Bounds(labels=3), {"labels": {f"l{n}": "v" for n in range(4)}}, ".labels"),
        (Bounds(labels=3), {"annotations": {f"l{n}": "v" for n in range(4)}}, ".annotations"),
        (Bounds(value_bytes=100), {"labels": {"a": "ё" * 51}}, ".labels.a"),
        (Bounds(value_bytes=100), {"annotations": {"a": "x" * 101}}, ".annotations.a"),
        (Bounds(value_bytes=100), {"generatorURL": "x" * 101}, ".generatorURL"),
        (Bounds(name_bytes=10), {"labels": {"n" * 11: "v"}, "annotations": {}}, ".labels.nnnnnnnnnnn (name)"),
        (Bounds(fingerprint_bytes=10), {"fingerprint": "f" * 11}, ".fingerprint"),
    ],
)
def test_bounds_of_an_alert(bounds: Bounds, changes: dict[str, Any], path: str) -> None:
    read = parse(body(alert(**changes)), bounds)
    assert [b.path for b in read.bad] == ["$.alerts[0]" + path]


def test_exactly_at_the_bounds_is_good() -> None:
    bounds = Bounds(labels=3, value_bytes=200, name_bytes=10)
    good = alert(labels={"n" * 10: "x" * 200, "b": "ё" * 100, "c": ""}, annotations={})
    assert len(parse(body(good), bounds).alerts) == 1


# -- laws

text = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=12)
labels = st.dictionaries(text.filter(bool), text, min_size=1, max_size=5)


@st.composite
def good_alert(draw: st.DrawFn) -> dict[str, Any]:
    resolved = draw(st.booleans())
    made = alert(
        labels=draw(labels),
        annotations=draw(st.dictionaries(text.filter(bool), text, max_size=3)),
        fingerprint=draw(text.filter(bool)),
        status="resolved" if resolved else "firing",
        startsAt=draw(st.sampled_from(["2026-11-20T09:51:50Z", "2026-11-20T09:51:50.123456789+03:00"])),
        endsAt="2026-11-20T09:52:50.1Z" if resolved else "0001-01-01T00:00:00Z",
        generatorURL=draw(text),
    )
    for name in draw(st.sets(st.sampled_from(["annotations", "generatorURL"]))):
        del made[name]
    if draw(st.booleans()):
        made["extra"] = draw(text)
    return made


@given(good_alert(), st.booleans(), st.sampled_from([None, 1]))
def test_any_good_alert_is_read_as_sent(sent: dict[str, Any], ascii_only: bool, indent: int | None) -> None:
    """However the JSON is written: escapes, raw UTF-8, white space."""
    raw = json.dumps(payload(sent), ensure_ascii=ascii_only, indent=indent).encode()
    (read,) = parse(raw).alerts
    assert read.labels == sent["labels"]
    assert read.annotations == sent.get("annotations", {})
    assert (read.fingerprint, read.status) == (sent["fingerprint"], sent["status"])


@given(good_alert(), good_alert())
def test_digest_names_the_state(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Equal exactly when status, times, labels and annotations are, in whatever order they come."""

    def state(of: dict[str, Any]) -> Any:
        return of["status"], of["startsAt"], of["endsAt"], of["labels"], of.get("annotations", {})

    first, second = parse(body(one, two)).alerts
    assert (first.digest == second.digest) == (state(one) == state(two))
    turned = {**one, "labels": dict(reversed(one["labels"].items()))}
    assert parse(body(turned)).alerts[0].digest == first.digest


def test_digest_is_stable_over_releases() -> None:
    """It is in the journal: another function would make every known alert new."""
    digest = alert_digest("firing", "2026-11-20T09:51:50Z", "", {"b": "2", "a": "ё"}, {"s": ""})
    written = '["firing","2026-11-20T09:51:50Z","",{"a":"ё","b":"2"},{"s":""}]'
    assert digest == hashlib.blake2b(written.encode(), digest_size=16).hexdigest()


def _repeat(raw: str, name: str, value: str) -> str:
    """The same object with `name` once more, somewhere."""
    return raw.replace("{", "{" + json.dumps(name) + ":" + value + ",", 1)


@given(good_alert(), st.sampled_from(["status", "labels", "fingerprint", "startsAt"]), st.booleans())
def test_a_repeated_name_is_found_however_it_is_written(sent: dict[str, Any], name: str, ascii_only: bool) -> None:
    doubled = _repeat(json.dumps(sent, ensure_ascii=ascii_only), name, json.dumps(sent[name], ensure_ascii=ascii_only))
    raw = json.dumps(payload("@"), ensure_ascii=ascii_only).replace('"@"', doubled).encode()
    read = parse(raw)
    assert [(b.path, b.reason) for b in read.bad] == [
        (f"$.alerts[0].{name}", "the name occurs twice in its object"),
    ]


@pytest.mark.parametrize("written", [r"\u0022", r"\"", r"\\\"", r"\\", r"\u005c\u0022", r"\u0022\u0022"])
def test_quotation_marks_in_text_hide_no_repeated_name(written: str) -> None:
    """Each way of writing one, beside a repeated name and without."""
    good = body().replace(b'"s"', f'"{written}"'.encode())
    assert parse(good).alerts[0].annotations == {"summary": json.loads(f'"{written}"')}
    for other in (written, written.replace(r"\u0022", r"\""), "x"):
        doubled = good.replace(b'"summary"', f'"summary": "{other}", "summary"'.encode())
        assert [b.path for b in parse(doubled).bad] == ["$.alerts[0].annotations.summary"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += _places(inner, (*path, key))
    return found


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid payload with some of its values replaced or removed, and sometimes cut or overwritten as bytes."""
    document = json.loads(json.dumps(draw(st.sampled_from([payload(alert(0), alert(1)), GRAFANA]))))
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(_places(document)))
        at = document
        try:
            for key in place[:-1]:
                at = at[key]
            if draw(st.booleans()):
                at[place[-1]] = draw(json_values)
            else:
                del at[place[-1]]
        except (KeyError, IndexError, TypeError):
            continue
        if not document:
            break
    raw = bytearray(json.dumps(document, ensure_ascii=draw(st.booleans())).encode())
    for _ in range(draw(st.integers(0, 2))):
        raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
    return bytes(raw)


@given(st.binary(max_size=64) | json_values.map(lambda v: json.dumps(v).encode()) | mutated())
@settings(max_examples=300)
def test_any_body_gives_a_payload_or_a_reason(raw: bytes) -> None:
    refused: PayloadError | None = None
    try:
        read = parse(raw)
    except PayloadError as error:
        refused = error
    if refused is not None:
        assert refused.status == 400
        assert refused.reason
        assert refused.path.startswith("$")
        return
    assert read.alerts or read.bad
    assert all(b.reason and b.path.startswith(f"$.alerts[{b.index}") for b in read.bad)
    json.dumps([b.head for b in read.bad]).encode()


@given(
    st.lists(good_alert(), min_size=1, max_size=3).map(lambda alerts: json.dumps(payload(*alerts)).encode()) | mutated()
)
@settings(max_examples=300)
def test_the_usual_lane_gives_what_the_careful_one_gives(raw: bytes) -> None:
    """Whatever it takes. Strict where the other is: a body it takes is never one that the other finds fault with."""
    usual = usual_payload(raw)
    if usual is not None:
        _same(usual, raw)


def _same(usual: UsualPayload, raw: bytes) -> None:
    careful = module._payload(module._decode_exactly(raw), "t", DEFAULT_BOUNDS, odd=True)
    assert careful.bad == ()
    assert usual_alerts(usual.alerts, "t") == careful.alerts
    assert (usual.receiver, usual.groupKey, usual.groupLabels, usual.externalURL, usual.truncatedAlerts) == (
        careful.receiver,
        careful.group_key,
        careful.group_labels,
        careful.external_url,
        careful.truncated,
    )


@pytest.mark.parametrize("name", BODIES)
def test_what_alertmanager_sends_takes_the_usual_lane(name: str) -> None:
    raw = BODIES[name]
    more = json.dumps({**json.loads(raw), "notification_reason": "first"}).encode()  # a field that is not known yet
    for sent in (raw, more):
        usual = usual_payload(sent)
        assert usual is not None
        _same(usual, sent)


@pytest.mark.parametrize("tenant", ["default", "a", "A.b_c-9", "x" * 64])
def test_good_tenants(tenant: str) -> None:
    assert check_tenant(tenant) == tenant


@pytest.mark.parametrize("tenant", ["", "x" * 65, "a/b", "a b", "ё", "a\n", "*"])
def test_bad_tenants(tenant: str) -> None:
    with pytest.raises(PayloadError, match="tenant"):
        check_tenant(tenant)
