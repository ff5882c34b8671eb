"""Hostile names of services and instances in every evidence query of every pack: one inert string, nothing else."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import promql_parser
import pytest

from agent.packs import load_packs
from agent.sources import promql

CORPUS = json.loads((Path(__file__).parents[1] / "data" / "injection.json").read_text())
ALL = [v if isinstance(v, str) else v[0] * v[1] for values in CORPUS.values() for v in values]
QUERIES = sorted({query for pack in load_packs().packs for query in pack.queries.values()})
LABELS = {"alertname": "A", "service": "svc", "instance": "svc:9", "job": "j", "severity": "page"}
STRING = re.compile(r'"(?:\\.|[^"\\])*"')


def shape(text: str) -> str:
    """The parsed query without what its strings hold."""
    return STRING.sub('""', "".join(promql_parser.parse(text).prettify().split()))


def labels_of(query: str, value: str) -> tuple[dict[str, str], ...]:
    """An alert that has every label the query asks for, each with this value."""
    asked = {name for items in re.findall(r"\$alert\(([^()]*)\)", query) for name in re.findall(r"[a-zA-Z_]\w*", items)}
    return ({**LABELS, **dict.fromkeys(asked, value)},)


def try_all(values: list[str]) -> int:
    parsed = 0
    for query in QUERIES:
        plain = shape(promql.render(query, "service", ["svc"], "1m", labels_of(query, "svc")))
        for value in values:
            try:
                text = promql.render(query, "service", [value], "1m", labels_of(query, value))
            except promql.TemplateError:
                # No series can have it, or it would be a query of a quarter of a megabyte.
                assert any(0xD800 <= ord(c) < 0xE000 for c in value) or len(value) > 50_000, (query, value)
                continue
            assert shape(text) == plain, (query, value)
            parsed += 1
    return parsed


def test_queries_keep_their_shape_whatever_a_service_is_called() -> None:
    values = [random.Random(kind).choice(strings) for kind, strings in CORPUS.items() if kind != "oversized"]
    assert try_all([*values, *CORPUS["promql"][:6]]) > 10 * len(QUERIES)


@pytest.mark.full
def test_queries_keep_their_shape_for_the_whole_corpus() -> None:
    assert try_all(ALL) > 300 * len(QUERIES)


@pytest.mark.parametrize("value", [v for v in ALL if len(v) < 50_000], ids=lambda v: ascii(v)[:30])
def test_a_matcher_holds_exactly_the_value(value: str) -> None:
    """What the parser reads back out of the matcher is the value, as a regular expression that matches only it."""
    try:
        text = promql.matcher("service", [value])
    except promql.TemplateError:
        assert any(0xD800 <= ord(c) < 0xE000 for c in value)
        return
    (found,) = promql_parser.parse(f"up{{{text}}}").matchers.matchers
    assert re.fullmatch(found.value, value)
    assert found.value.replace("\\", "") == value.replace("\\", "")
