"""docs/webhook.md says what the code does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from intake_world import REMOVED, Decisions, HeldStore, alert, body, payload

from agent.alerts import DEFAULT_BOUNDS, MAX_DEPTH, REQUIRED_ALERT, REQUIRED_PAYLOAD, PayloadError, parse_payload
from agent.http.auth import ALL_SCOPES
from agent.http.server import Options, build_app
from agent.intake import RECORDED_PER_REQUEST, Intake

TEXT = (Path(__file__).parent.parent.parent / "docs" / "webhook.md").read_text()


def rows(heading: str) -> Iterator[list[str]]:
    """The cells of the first table under a heading."""
    after = TEXT.split(heading, 1)[1]
    table = re.search(r"\n\|[^\n]*\n\|[-|]+\n((?:\|.*\n)+)", after)
    assert table is not None, heading
    for line in table[1].splitlines():
        yield [cell.strip().strip("`") for cell in line.strip("|").split("|")]


def test_required_fields() -> None:
    told = [(row[0], row[1]) for row in rows("### Required fields (tested)")]
    assert told == [
        *(("payload", name) for name in REQUIRED_PAYLOAD),
        *(("alert", name) for name in REQUIRED_ALERT),
        ("resolved alert", "endsAt"),
    ]


def test_required_is_what_cannot_be_left_out_and_nothing_else() -> None:
    whole = payload()
    for name in whole:
        if name in REQUIRED_PAYLOAD:
            with pytest.raises(PayloadError, match=rf"^\$\.{name}: missing$"):
                parse_payload(body(**{name: REMOVED}), "t")
        else:
            assert len(parse_payload(body(**{name: REMOVED}), "t").alerts) == 1
    for state, ends_at in (("firing", "0001-01-01T00:00:00Z"), ("resolved", "2026-11-20T10:00:00Z")):
        good = alert(status=state, endsAt=ends_at)
        left_out = {name: parse_payload(body({k: v for k, v in good.items() if k != name}), "t").bad for name in good}
        assert {name for name, bad in left_out.items() if bad} == {
            *REQUIRED_ALERT,
            *(["endsAt"] if state == "resolved" else []),
        }
        assert all(bad[0].path == f"$.alerts[0].{name}" for name, bad in left_out.items() if bad)


def test_bounds() -> None:
    told = {row[0]: int(re.findall(r"\d+", row[1])[0]) for row in rows("### Bounds (tested)")}
    options = Options()
    assert list(told.values()) == [
        options.max_body_bytes,
        options.read_seconds,
        DEFAULT_BOUNDS.alerts,
        DEFAULT_BOUNDS.labels,
        DEFAULT_BOUNDS.name_bytes,
        DEFAULT_BOUNDS.value_bytes,
        DEFAULT_BOUNDS.fingerprint_bytes,
        MAX_DEPTH,
    ]
    assert f"at most {RECORDED_PER_REQUEST} bad alerts" in TEXT


def test_scopes() -> None:
    assert {row[0] for row in rows("## Authentication")} == ALL_SCOPES


async def test_paths() -> None:
    store = HeldStore()
    app = build_app(Intake(store), store, Decisions(), health=dict, metrics=lambda: (b"", ""))  # type: ignore[arg-type]
    told = {row[0]: row[1] for row in rows("## Other paths (tested)")}
    assert told == {path: ", ".join(methods) for path, methods in app.routes.items()}
