"""Filling evidence queries: the only place where text that others control gets into PromQL.

Called by `agent.sources.prometheus` (and by `agent.topology` for matchers). Exists because service names come from
labels, which anybody may set: a value reaches a query only regex-escaped and then string-escaped, a name only if
it is an identifier, a duration only if it is one. It never evaluates anything and knows four variables, no more.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

from rules.features import host_name
from rules.subjects import bindings_of, values_of

LABEL_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
DURATION = re.compile(r"(?=[0-9])(?:[0-9]+y)?(?:[0-9]+w)?(?:[0-9]+d)?(?:[0-9]+h)?(?:[0-9]+m)?(?:[0-9]+s)?(?:[0-9]+ms)?")
VARIABLE = re.compile(r"\$([a-zA-Z_][a-zA-Z0-9_]*)(?:(?<=\$alert)\(([^()]*)\))?")  # `$1` of label_replace is not ours
RE2_SPECIAL = frozenset(r"\.+*?()|[]{}^$")  # what Go's regexp.QuoteMeta escapes
MAX_SERVICES = 2_000
MAX_SCOPE_BYTES = 256 * 1024


class TemplateError(ValueError):
    """A query that cannot be filled: unknown variable, bad label name, bad duration, a service without a name."""


def regex_literal(value: str) -> str:
    """An RE2 expression that matches `value` and nothing else (as Go's regexp.QuoteMeta)."""
    return "".join("\\" + c if c in RE2_SPECIAL else c for c in value)


def string_literal(value: str) -> str:
    """`value` as a double-quoted PromQL string.

    PromQL takes Go's escapes. Control characters are escaped because a raw newline ends the string, and U+FFFD because
    Prometheus' lexer takes it for a decoding error. Raises TemplateError for lone surrogates (not valid UTF-8, so no
    label holds them).
    """
    out = ['"']
    for c in value:
        code = ord(c)
        if c in '"\\':
            out.append("\\" + c)
        elif code < 0x20 or 0x7F <= code < 0xA0 or code in (0x2028, 0x2029, 0xFEFF, 0xFFFD):
            out.append(f"\\u{code:04x}")
        elif 0xD800 <= code < 0xE000:
            raise TemplateError("label value: it is not valid UTF-8 (lone surrogate), no series can have it")
        else:
            out.append(c)
    out.append('"')
    return "".join(out)


def label_name(name: str) -> str:
    """`name` if it is a Prometheus label name that may be matched, else TemplateError."""
    if not LABEL_NAME.fullmatch(name) or name.startswith("__"):
        raise TemplateError(
            f"label name {name!r:.100}: expected letters, digits and _ not beginning with a digit or __"
        )
    return name


def duration(text: str) -> str:
    """`text` if it is a positive Prometheus duration (`1m`, `1h30m`, `500ms`), else TemplateError."""
    if not DURATION.fullmatch(text) or not any(c in "123456789" for c in text):
        raise TemplateError(f"duration {text!r:.100}: expected something like 30s, 1m or 1h30m")
    return text


def duration_of(seconds: float) -> str:
    """Seconds as a Prometheus duration, to the millisecond: `60s`, `1500ms`."""
    millis = max(1, round(seconds * 1000))
    return f"{millis // 1000}s" if millis % 1000 == 0 else f"{millis}ms"


def matcher(label: str, values: Sequence[str]) -> str:
    """A complete matcher for exactly these label values: `service=~"front|orders"`.

    Raises TemplateError for no values (it would match everything or nothing, neither is meant), for an empty one
    (it would match every series without the label) and for more than MAX_SERVICES or MAX_SCOPE_BYTES.
    """
    return _matcher(label, tuple(sorted(set(values))))


@lru_cache(maxsize=16)  # a look asks dozens of queries about the same services
def _matcher(label: str, wanted: tuple[str, ...]) -> str:
    if not wanted:
        raise TemplateError("no services in scope: the alert names none and the topology has none")
    if "" in wanted:
        raise TemplateError("a service without a name is in scope: it would select every series without the label")
    if len(wanted) > MAX_SERVICES:
        raise TemplateError(f"{len(wanted)} services in scope, at most {MAX_SERVICES} fit into one query")
    text = f"{label_name(label)}=~{string_literal('|'.join(regex_literal(v) for v in wanted))}"
    if len(text) * 4 > MAX_SCOPE_BYTES and len(text.encode()) > MAX_SCOPE_BYTES:
        raise TemplateError(f"the names of {len(wanted)} services in scope exceed {MAX_SCOPE_BYTES} bytes")
    return text


def alert_matchers(items: str, alerts: Sequence[Mapping[str, str]]) -> str:
    """`$alert(items)` as matchers over what the alerts' labels say, joined by commas; nothing where all items are
    optional and none is there. Raises TemplateError for a label that no alert has, and for items that are none."""
    try:
        bindings = bindings_of(items)
    except ValueError as error:
        raise TemplateError(str(error)) from error
    texts: list[str] = []
    for binding in bindings:
        values = values_of(binding, alerts)
        if not values and not binding.optional:
            raise TemplateError(f"the alert has no label {' or '.join(binding.sources)}")
        if not values:
            continue
        if binding.how:
            pattern = "|".join(_alternative(binding.how, value) for value in values)
            texts.append(f"{label_name(binding.label)}=~{string_literal(pattern)}")
        elif len(values) == 1:
            texts.append(f"{label_name(binding.label)}={string_literal(values[0])}")
        else:
            texts.append(matcher(binding.label, values))
    text = ",".join(texts)
    if len(text) * 4 > MAX_SCOPE_BYTES and len(text.encode()) > MAX_SCOPE_BYTES:
        raise TemplateError(f"the labels of {len(alerts)} alerts exceed {MAX_SCOPE_BYTES} bytes")
    return text


def _alternative(how: str, value: str) -> str:
    """What one value allows, as an RE2 expression (see `rules.subjects`)."""
    if how == "@":
        return f"{regex_literal(host_name(value))}(:[0-9]+)?"
    return f"{regex_literal(value)}-.+" if how == "*" else f"{regex_literal(value)}|"


def render(
    query: str, service_label: str, services: Sequence[str], rate: str, alerts: Sequence[Mapping[str, str]] = ()
) -> str:
    """The query with `$service` (the label's name), `$scope` (a complete matcher), `$alert(...)` (matchers made of the
    labels of `alerts`) and `$rate` (a duration) filled in.

    One pass: what was filled in is not looked at again. Raises TemplateError.
    """

    def fill(match: re.Match[str]) -> str:
        name, items = match.groups()
        if name == "service":
            return label_name(service_label)
        if name == "scope":
            return matcher(service_label, services)
        if name == "rate":
            return duration(rate)
        if name == "alert" and items is not None:
            return alert_matchers(items, alerts)
        raise TemplateError(f"unknown variable ${name:.100}: a query knows $service, $scope, $alert(...) and $rate")

    return VARIABLE.sub(fill, query)
