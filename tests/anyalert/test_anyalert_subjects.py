"""What an alert is about, and queries bound to its labels: nothing that a label holds gets past its quotes."""

from __future__ import annotations

import promql_parser
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.sources.promql import TemplateError, render
from rules.packs import PackError, parse_pack
from rules.subjects import ENTITIES, entry_of, kind_of, node_name, subject_of

VALUES = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20)


def filled(query: str, *alerts: dict[str, str]) -> str:
    return render(query, "service", (), "1m", alerts)


def matchers(query: str) -> list[tuple[str, str, str]]:
    parsed = promql_parser.parse(query)
    return [(m.name, str(m.op).removeprefix("MatchOp."), m.value) for m in parsed.matchers.matchers]


@given(VALUES)
def test_a_value_is_matched_as_it_is_and_nothing_else(value: str) -> None:
    assert matchers(filled("up{$alert(pod)}", {"pod": value})) == [("pod", "Equal", value)]


@given(VALUES, VALUES)
def test_values_of_several_alerts_are_alternatives_that_are_quoted(one: str, two: str) -> None:
    (found,) = matchers(filled("up{$alert(pod?)}", {"pod": one}, {"pod": two}, {"node": "n"}))
    assert found[:2] == (("pod", "Equal") if one == two else ("pod", "Re"))


def test_items() -> None:
    alert = {"namespace": "shop", "deployment": "or.ders", "instance": "10.0.0.1:9100"}
    assert filled("up{$alert(namespace, pod?)}", alert) == 'up{namespace="shop"}'
    assert filled('up{job="x",$alert(pod?)}', alert) == 'up{job="x",}'
    assert filled("up{$alert(node=instance)}", alert) == 'up{node="10.0.0.1:9100"}'
    assert filled("up{$alert(pod=deployment*)}", alert) == r'up{pod=~"or\\.ders-.+"}'
    assert filled("up{$alert(namespace|)}", alert) == 'up{namespace=~"shop|"}'
    assert filled("up{$alert(instance=instance@)}", alert) == r'up{instance=~"10\\.0\\.0\\.1(:[0-9]+)?"}'
    assert filled("up{$alert(node@?)}", {"node": "n1"}) == 'up{node=~"n1(:[0-9]+)?"}'
    with pytest.raises(TemplateError, match="no label pod"):
        filled("up{$alert(namespace, pod)}", alert)
    for wrong in ("$alert", "$alert()", "$alert(a b)", "$alert(__name__)", "$alert(a=)"):
        with pytest.raises(TemplateError):
            filled(f"up{{{wrong}}}", alert)


@given(st.dictionaries(st.sampled_from(sorted({n for names in ENTITIES.values() for n in names})), VALUES))
def test_every_alert_has_a_subject(labels: dict[str, str]) -> None:
    subject = subject_of(labels)
    assert kind_of(subject) in ENTITIES
    for kind in ENTITIES:
        named = node_name(kind, labels)
        assert (named != "") == all(labels.get(label) for label in ENTITIES[kind])
        assert not named or subject_of(labels, kind) == named


def test_the_most_specific_label_is_the_subject() -> None:
    assert subject_of({"namespace": "shop", "pod": "orders-0", "node": "n1"}) == "pod/shop/orders-0"
    assert subject_of({"pod": "orders-0", "instance": "a:1", "job": "j"}) == "instance/a:1"
    assert subject_of({"alertname": "Odd", "severity": "page"}) == "alert/Odd"
    assert [kind_of("orders"), kind_of("unknown/orders")] == ["", ""]


def test_names_come_before_metrics() -> None:
    text = {
        "pack": "p",
        "version": 1,
        "alerts": {
            "Named": {"causes": ["a"]},
            "Named/critical": {"causes": ["b"]},
            "family": {"causes": ["c"], "metrics": ["redis_*"]},
        },
    }
    entries = parse_pack(text, "p").alerts

    def causes(name: str, severity: str = "", metrics: tuple[str, ...] = ()) -> tuple[str, ...]:
        entry = entry_of({"alertname": name, "severity": severity}, metrics, entries)
        return entry.causes if entry is not None else ()

    assert causes("Named", "warning", ("redis_up",)) == ("a",)
    assert causes("Named", "critical") == ("b",)
    assert causes("Other", metrics=("up", "redis_up")) == ("c",)
    assert causes("Other", metrics=("up",)) == ()


def test_a_wrong_binding_is_a_fault_of_the_pack() -> None:
    for query in ("up{$alert(a b)}", "up{$alert}", "up{job='x'}"):
        with pytest.raises(PackError, match=r"queries\.q"):
            parse_pack({"pack": "p", "version": 1, "queries": {"q": query}}, "p")
