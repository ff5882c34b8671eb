"""Webhook bodies of Alertmanager (payload version 4) and Grafana (version 1) become alerts.

Called by `agent.intake` with the bytes of one request. Exists so that nothing behind it ever meets a value that was not
checked: types, sizes, times and text are right or the alert is a `BadAlert` that names the field. One bad alert never
spoils the others; a body that is wrong as a whole raises `PayloadError`. Pure: no clock, no file, no network.

The required fields are REQUIRED_PAYLOAD and REQUIRED_ALERT; docs/webhook.md lists them and a test compares. Unknown
fields are accepted, since every release of Alertmanager adds some. Decoding is strict about what JSON leaves open: a
repeated name in an object, an unpaired surrogate and NUL are reported, never resolved by guessing.

Nearly every body is as Alertmanager writes it. `usual_payload` decodes it into typed structs that hold the bounds; what
is left to check are the times, and names that are repeated: then there are more quotation marks than the strings which
were decoded have. Such a body is journalled as it came, and `usual_alerts` makes the alerts of it when it is folded.
Whatever is unusual in any way is read by `parse_payload`, field by field, and only that knows reasons; a test compares.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from hashlib import blake2b
from typing import Annotated, Any, Final, Literal, cast

import msgspec
import orjson
from msgspec import Meta

from rules.model import Alert, AlertStatus

Variant = Literal["alertmanager", "grafana"]

REQUIRED_PAYLOAD: Final = ("version", "receiver", "status", "groupKey", "alerts")
REQUIRED_ALERT: Final = ("status", "labels", "startsAt", "fingerprint")  # and endsAt, when resolved
VARIANTS: Final[dict[str, Variant]] = {"4": "alertmanager", "1": "grafana"}
HEAD_BYTES: Final = 4096
MAX_DEPTH: Final = 200  # of arrays and objects; what orjson can write is a little more

_TENANT = re.compile(r"[a-zA-Z0-9._-]{1,64}")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.(\d+))?(?:Z|[+-]\d\d:\d\d)", re.ASCII)
_ESCAPE = re.compile(rb"\\(?:u0000|u0022|.)", re.DOTALL)
_PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_ZERO_TEXT = "0001-01-01T00:00:00Z"  # Go's zero time
_ZERO_TIME = -62135596800.0
_LATEST = 253402300800.0  # 10000-01-01T00:00:00Z
_state_encoder = msgspec.json.Encoder(order="deterministic")
_encode_state, _encode_state_into = _state_encoder.encode, _state_encoder.encode_into


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one payload may hold. Bytes are those of UTF-8."""

    alerts: int = 10_000
    labels: int = 256  # of one alert; annotations likewise
    name_bytes: int = 2048
    value_bytes: int = 65_536  # a label's or annotation's value, groupKey, URLs
    fingerprint_bytes: int = 256
    time_bytes: int = 256


DEFAULT_BOUNDS: Final = Bounds()


# In characters, which are at most four bytes each.
_Name = Annotated[str, Meta(min_length=1, max_length=DEFAULT_BOUNDS.name_bytes // 4)]
_Value = Annotated[str, Meta(max_length=DEFAULT_BOUNDS.value_bytes // 4)]
_Time = Annotated[str, Meta(max_length=DEFAULT_BOUNDS.time_bytes // 4)]
_Strings = Annotated[dict[_Name, _Value], Meta(max_length=DEFAULT_BOUNDS.labels)]
_Labels = Annotated[dict[_Name, _Value], Meta(min_length=1, max_length=DEFAULT_BOUNDS.labels)]


class UsualAlert(msgspec.Struct, gc=False):
    """An alert with every field that Alertmanager writes."""

    status: AlertStatus
    labels: _Labels
    annotations: _Strings
    startsAt: _Time  # noqa: N815
    endsAt: _Time  # noqa: N815
    generatorURL: _Value  # noqa: N815
    fingerprint: Annotated[str, Meta(min_length=1, max_length=DEFAULT_BOUNDS.fingerprint_bytes // 4)]


class UsualPayload(msgspec.Struct, gc=False):
    """A body with every field that Alertmanager writes, within DEFAULT_BOUNDS. Journals hold bodies that were, so the
    bounds here may be widened, never narrowed."""

    version: Literal["4", "1"]
    receiver: _Value
    status: AlertStatus
    groupKey: _Value  # noqa: N815
    groupLabels: _Strings  # noqa: N815
    commonLabels: dict[str, str]  # noqa: N815
    commonAnnotations: dict[str, str]  # noqa: N815
    externalURL: _Value  # noqa: N815
    truncatedAlerts: Annotated[int, Meta(ge=0, lt=2**31)]  # noqa: N815
    alerts: Annotated[list[UsualAlert], Meta(min_length=1, max_length=DEFAULT_BOUNDS.alerts)]


_PAYLOAD_STRINGS: Final = 10 + 5  # names and values that are strings
_ALERT_STRINGS: Final = 7 + 5
decode_usual = msgspec.json.Decoder(UsualPayload).decode


class PayloadError(ValueError):
    """The body as a whole cannot be used. `status` is the HTTP status to answer with."""

    def __init__(self, reason: str, path: str = "$", *, status: int = 400) -> None:
        super().__init__(f"{path}: {reason}")
        self.status = status
        self.reason = reason
        self.path = path
        self.kept = False  # whether the body is in quarantine


class _FieldError(Exception):
    """A field that is not as it must be: `path` is relative to the object being read."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(reason)
        self.path = path
        self.reason = reason


@dataclass(frozen=True, slots=True)
class BadAlert:
    """One alert that could not be understood. `head` is at most HEAD_BYTES of it as JSON, `digest` is of the whole: the
    same bad alert sent again has the same digest."""

    index: int
    path: str
    reason: str
    head: str
    digest: str


@dataclass(frozen=True, slots=True)
class Payload:
    """A body that is right as a whole. `alerts` are good; `bad` lists the others by index."""

    tenant: str
    alerts: tuple[Alert, ...]
    bad: tuple[BadAlert, ...]
    receiver: str
    group_key: str
    group_labels: dict[str, str]
    external_url: str
    truncated: int
    version: str
    variant: Variant


def parse_payload(body: bytes, tenant: str, bounds: Bounds = DEFAULT_BOUNDS) -> Payload:
    """Reads one webhook body.

    Raises PayloadError when the body as a whole is wrong, or holds no alert at all. A payload whose alerts are all bad
    is returned: that is for the caller to refuse, who has to keep them.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return _payload(_decode_exactly(body), tenant, bounds, odd=True)
    if _repeats(body, document):
        return _payload(_decode_exactly(body), tenant, bounds, odd=True)
    return _payload(document, tenant, bounds, odd=b"\\u0000" in body)


def _repeats(body: bytes, document: Any) -> bool:
    """May a name be repeated? Then it is gone from what was decoded, with its quotation marks. The count compares
    nothing else, as long as every one within a string is escaped in both texts in the same way, so not as \\u0022."""
    if b"\\u0022" in body:
        return True
    try:
        return body.count(b'"') != orjson.dumps(document).count(b'"')
    except orjson.JSONEncodeError as error:  # what was read from JSON can fail to be written for its depth only
        raise PayloadError("nested too deeply") from error


def check_tenant(tenant: str) -> str:
    """The tenant's name, or PayloadError 400."""
    if _TENANT.fullmatch(tenant) is None:
        raise PayloadError(f"tenant {tenant[:80]!r}: 1 to 64 of a-z A-Z 0-9 . _ -", "/webhook/{tenant}")
    return tenant


@lru_cache(maxsize=4096)
def parse_time(text: str) -> float:
    """RFC 3339 with up to nine fractional digits and a zone, as unix seconds (to the microsecond: a float can hold no
    more). Raises ValueError with the reason."""
    matched = _TIME.fullmatch(text)
    if matched is None:
        raise ValueError(f"{text[:64]!r} is not an RFC 3339 time such as 2026-11-20T09:51:50.846Z")
    if len(matched[1] or "") > 9:
        raise ValueError(f"{text[:64]!r} has more than nine fractional digits")
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError as error:
        raise ValueError(f"{text[:64]!r} is not a time: {error}") from error


def alert_digest(status: str, starts_at: str, ends_at: str, labels: dict[str, str], annotations: dict[str, str]) -> str:
    """Names an alert's exact state, over the strings as sent (`ends_at` is "" while firing). 32 hexadecimal digits."""
    return body_digest(_encode_state((status, starts_at, ends_at, labels, annotations)))


def body_digest(body: bytes) -> str:
    return blake2b(body, digest_size=16).hexdigest()


class _Repeated(dict[str, Any]):
    """An object in which a name occurred twice."""

    name = ""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) == len(pairs):
        return made
    repeated = _Repeated(made)
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            repeated.name = name
            break
        seen.add(name)
    return repeated


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _decode_exactly(body: bytes) -> Any:
    """Slower than orjson: says where and why a body is malformed, marks repeated names, keeps unpaired surrogates."""
    if not body.strip(b" \t\r\n"):
        raise PayloadError("empty body")
    if body.startswith(b"\xef\xbb\xbf"):
        raise PayloadError("malformed JSON: starts with a byte order mark")
    try:
        document = json.loads(body.decode(), object_pairs_hook=_object, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise PayloadError(f"not UTF-8: byte {error.start}: {error.reason}") from error
    except RecursionError as error:
        raise PayloadError("nested too deeply") from error
    except ValueError as error:
        raise PayloadError(f"malformed JSON: {error}") from error
    _check_depth(document)
    return document


def _check_depth(document: Any) -> None:
    level = [document]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise PayloadError("nested too deeply")


def usual_payload(body: bytes) -> UsualPayload | None:
    """A body whose alerts are all good, just as Alertmanager writes it; None when anything is unusual, and then
    `parse_payload` decides. A fifth of its price: this is the hot path."""
    try:
        sent = decode_usual(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    strings = 2 * (len(sent.groupLabels) + len(sent.commonLabels) + len(sent.commonAnnotations)) + _PAYLOAD_STRINGS
    strings += _ALERT_STRINGS * len(sent.alerts)
    before = ""
    try:
        for entry in sent.alerts:
            strings += 2 * (len(entry.labels) + len(entry.annotations))
            if (starts_at := entry.startsAt) != before:  # many of a group began together
                if not 0 <= parse_time(starts_at) < _LATEST:
                    return None
                before = starts_at
            if entry.endsAt != _ZERO_TEXT if entry.status == "firing" else not 0 <= parse_time(entry.endsAt) < _LATEST:
                return None
    except ValueError:
        return None
    escapes = _ESCAPE.findall(body) if b"\\" in body else []
    if b"\\u0000" in escapes:
        return None
    # Names that are unknown here (every release adds some) have quotation marks too: then the slower count decides.
    if body.count(b'"') - escapes.count(b'\\"') != 2 * strings:
        try:
            body.decode()  # also the fields that were skipped are text
            if _repeats(body, orjson.loads(body)):
                return None
        except ValueError:
            return None
    return sent


def usual_digest(entry: UsualAlert) -> str:
    """`alert_digest` of it."""
    ends_at = entry.endsAt if entry.status == "resolved" else ""
    state = _encode_state((entry.status, entry.startsAt, ends_at, entry.labels, entry.annotations))
    return blake2b(state, digest_size=16).hexdigest()


def usual_alerts(entries: Iterable[UsualAlert], tenant: str) -> tuple[Alert, ...]:
    """The alerts that `parse_payload` would make of them."""
    made = []
    text = bytearray(1024)  # reused: the encoder would find a new one for each
    for entry in entries:
        status, labels, annotations, starts_at = entry.status, entry.labels, entry.annotations, entry.startsAt
        ends_at = entry.endsAt if status == "resolved" else ""
        _encode_state_into((status, starts_at, ends_at, labels, annotations), text)
        made.append(
            Alert(
                tenant=tenant,
                fingerprint=entry.fingerprint,
                status=status,
                labels=labels,
                annotations=annotations,
                starts_at=parse_time(starts_at),
                ends_at=parse_time(ends_at) if ends_at else None,
                generator_url=entry.generatorURL,
                digest=blake2b(text, digest_size=16).hexdigest(),
            )
        )
    return tuple(made)


def _payload(document: Any, tenant: str, bounds: Bounds, *, odd: bool) -> Payload:
    """`odd`: strings may hold surrogates or NUL, so look into each one."""
    try:
        if not isinstance(document, dict):
            raise _FieldError("", f"expected object, got {_kind(document)}")
        _no_repeats(document, "")
        version = _string(document, "version", bounds.value_bytes, odd)
        if version not in VARIANTS:
            raise _FieldError(
                ".version", f'{version[:64]!r} is not supported, expected "4" (Alertmanager) or "1" (Grafana)'
            )
        _status(document)
        receiver = _string(document, "receiver", bounds.value_bytes, odd)
        group_key = _string(document, "groupKey", bounds.value_bytes, odd)
        group_labels = _strings(document, "groupLabels", bounds, odd, required=False)
        external_url = _string(document, "externalURL", bounds.value_bytes, odd, required=False)
        truncated = document.get("truncatedAlerts")
        if truncated is None:
            truncated = 0
        elif type(truncated) is not int:
            raise _FieldError(".truncatedAlerts", f"expected whole number, got {_kind(truncated)}")
        elif not 0 <= truncated < 2**31:
            raise _FieldError(".truncatedAlerts", "expected 0 to 2147483647")
        entries = document.get("alerts", _MISSING)
        if type(entries) is not list:
            raise _FieldError(".alerts", _expected("array", entries))
        if not entries:
            raise _FieldError(".alerts", "no alerts")
    except _FieldError as wrong:
        raise PayloadError(wrong.reason, "$" + wrong.path) from None
    alerts, bad = _alerts(entries, tenant, bounds, odd)
    return Payload(
        tenant=tenant,
        alerts=tuple(alerts),
        bad=tuple(bad),
        receiver=receiver,
        group_key=group_key,
        group_labels=group_labels,
        external_url=external_url,
        truncated=truncated,
        version=version,
        variant=VARIANTS[version],
    )


def _alerts(entries: list[Any], tenant: str, bounds: Bounds, odd: bool) -> tuple[list[Alert], list[BadAlert]]:
    alerts: list[Alert] = []
    bad: list[BadAlert] = []
    for index, entry in enumerate(entries[: bounds.alerts]):
        try:
            alerts.append(_alert(entry, tenant, bounds, odd))
        except _FieldError as wrong:
            bad.append(_bad(index, f"$.alerts[{index}]{wrong.path}", wrong.reason, entry))
    if len(entries) > bounds.alerts:
        beyond = entries[bounds.alerts :]
        reason = f"{len(beyond)} alerts beyond the bound of {bounds.alerts} a payload were not read"
        bad.append(_bad(bounds.alerts, f"$.alerts[{bounds.alerts}:]", reason, beyond))
    return alerts, bad


def _bad(index: int, path: str, reason: str, entry: Any) -> BadAlert:
    try:
        text = orjson.dumps(entry, option=orjson.OPT_SORT_KEYS)
    except orjson.JSONEncodeError:  # surrogates, or integers of more than 64 bits
        text = json.dumps(entry, sort_keys=True, separators=(",", ":")).encode()
    return BadAlert(index, path, reason, text[:HEAD_BYTES].decode(errors="ignore"), body_digest(text))


def _alert(entry: Any, tenant: str, bounds: Bounds, odd: bool) -> Alert:
    if not isinstance(entry, dict):
        raise _FieldError("", f"expected object, got {_kind(entry)}")
    if odd:
        _no_repeats(entry, "")
    status = _status(entry)
    labels = _strings(entry, "labels", bounds, odd)
    if not labels:
        raise _FieldError(".labels", "no labels")
    annotations = _strings(entry, "annotations", bounds, odd, required=False)
    starts_text = _string(entry, "startsAt", bounds.time_bytes, odd)
    starts_at = _time(starts_text, ".startsAt")
    if starts_at is None:
        raise _FieldError(".startsAt", "the zero time")
    ends_text = ""
    ends_at = None
    if status == "resolved" or entry.get("endsAt") is not None:
        # A firing alert has no end, whatever a sender predicts: a moving endsAt must not make each re-send a new state.
        sent = _string(entry, "endsAt", bounds.time_bytes, odd)
        end = _time(sent, ".endsAt")
        if status == "resolved":
            if end is None:
                raise _FieldError(".endsAt", "the zero time in a resolved alert")
            ends_text, ends_at = sent, end
    fingerprint = _string(entry, "fingerprint", bounds.fingerprint_bytes, odd)
    if not fingerprint:
        raise _FieldError(".fingerprint", "empty")
    return Alert(
        tenant=tenant,
        fingerprint=fingerprint,
        status=status,
        labels=labels,
        annotations=annotations,
        starts_at=starts_at,
        ends_at=ends_at,
        generator_url=_string(entry, "generatorURL", bounds.value_bytes, odd, required=False),
        digest=alert_digest(status, starts_text, ends_text, labels, annotations),
    )


_MISSING: Final = object()


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, (int, float)):
        return "number"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list) else "object"


def _expected(wanted: str, value: Any) -> str:
    return "missing" if value is _MISSING else f"expected {wanted}, got {_kind(value)}"


def _step(name: str) -> str:
    """One name as a step of a JSON path, bounded and printable."""
    return f".{name}" if _PLAIN_KEY.fullmatch(name) else f"[{json.dumps(name[:128])}]"


def _no_repeats(value: dict[str, Any], path: str) -> None:
    if isinstance(value, _Repeated):
        raise _FieldError(path + _step(value.name), "the name occurs twice in its object")


def _status(of: dict[str, Any]) -> AlertStatus:
    value = of.get("status", _MISSING)
    if value == "firing" or value == "resolved":
        return cast(AlertStatus, value)
    if type(value) is not str:
        raise _FieldError(".status", _expected("string", value))
    raise _FieldError(".status", f'{value[:64]!r}: expected "firing" or "resolved"')


def _string(of: dict[str, Any], name: str, most: int, odd: bool, *, required: bool = True) -> str:
    value = of.get(name, _MISSING)
    if type(value) is not str:
        if not required and (value is _MISSING or value is None):
            return ""
        raise _FieldError("." + name, _expected("string", value))
    if odd or 4 * len(value) > most:
        _check_text(value, most, "." + name)
    return value


def _strings(of: dict[str, Any], name: str, bounds: Bounds, odd: bool, *, required: bool = True) -> dict[str, str]:
    """An object of strings, by name. The joined lengths tell cheaply that no single one can be over its bound."""
    value = of.get(name, _MISSING)
    if not isinstance(value, dict):
        if not required and (value is _MISSING or value is None):
            return {}
        raise _FieldError("." + name, _expected("object", value))
    if len(value) > bounds.labels:
        raise _FieldError("." + name, f"{len(value)} entries, at most {bounds.labels}")
    try:
        size = len("".join(value.values()))
    except TypeError:
        key, wrong = next((k, v) for k, v in value.items() if type(v) is not str)
        raise _FieldError(f".{name}{_step(key)}", _expected("string", wrong)) from None
    if odd or 4 * size > bounds.value_bytes or "" in value or 4 * len("".join(value)) > bounds.name_bytes:
        _no_repeats(value, "." + name)
        for key, text in value.items():
            if not key:
                raise _FieldError(f".{name}{_step(key)}", "empty name")
            _check_text(key, bounds.name_bytes, f".{name}{_step(key)} (name)")
            _check_text(text, bounds.value_bytes, f".{name}{_step(key)}")
    return value


def _check_text(text: str, most: int, path: str) -> None:
    if "\0" in text:
        raise _FieldError(path, "holds the character NUL (U+0000)")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise _FieldError(path, f"unpaired surrogate at character {error.start}: not Unicode text") from None
    if size > most:
        raise _FieldError(path, f"{size} bytes, at most {most}")


def _time(text: str, path: str) -> float | None:
    """Unix seconds, None for Go's zero time."""
    try:
        at = parse_time(text)
    except ValueError as error:
        raise _FieldError(path, str(error)) from None
    if at == _ZERO_TIME:
        return None
    if not 0 <= at < _LATEST:
        raise _FieldError(path, f"{text!r}: expected a time from 1970 to 9999")
    return at
