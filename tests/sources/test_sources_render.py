"""Filling queries: what others control reaches PromQL as data only."""

from __future__ import annotations

import asyncio
import re

import promql_parser
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sources_world import Dataset, Server

from agent.sources.prometheus import Prometheus, PrometheusSource, render
from agent.sources.promql import TemplateError, duration, duration_of, matcher, regex_literal

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)


def parsed_scope(query: str) -> tuple[str, str]:
    selector = promql_parser.parse(query)
    (found,) = selector.matchers.matchers
    return found.name, found.value


@given(st.lists(NAMES, min_size=1, max_size=8))
def test_any_service_names_give_one_matcher_that_means_them(names: list[str]) -> None:
    name, pattern = parsed_scope(render("up{$scope}", "service", names, "1m"))
    assert name == "service"
    # RE2's literal escapes are Python's too: each name matches, its neighbours do not.
    regex = re.compile(pattern)
    for service in names:
        assert regex.fullmatch(service)
        for other in (service + "x", "x" + service, service[:-1]):
            assert bool(regex.fullmatch(other)) == (other in names)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_real_prometheus_selects_exactly_the_named_series(
    prometheus: Server, dataset: Dataset, data: st.DataObject
) -> None:
    chosen = data.draw(st.lists(st.sampled_from(dataset.names), min_size=1, max_size=40, unique=True))
    unknown = data.draw(st.lists(NAMES, max_size=3))
    query = render("strange{$scope}", "service", [*chosen, *unknown], "1m")
    promql_parser.parse(query)
    assert asyncio.run(selected(prometheus.url, query, dataset)) == {*chosen, *unknown} & set(dataset.names)


@pytest.mark.parametrize("server", ["prometheus", "victoria"])
async def test_each_strange_name_alone_selects_its_own_series(
    server: str, dataset: Dataset, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue(server).url
    async with PrometheusSource(Prometheus(url=url)) as source:

        async def one(name: str) -> set[str]:
            samples, _ = await source.query_instant(
                render("strange{$scope}", "service", [name], "1m"), at=dataset.begin + 1800
            )
            return {s.labels["service"] for s in samples}

        found = await asyncio.gather(*(one(name) for name in dataset.names))
    assert [(n, f) for n, f in zip(dataset.names, found, strict=True) if f != {n}] == []


async def selected(url: str, query: str, dataset: Dataset) -> set[str]:
    async with PrometheusSource(Prometheus(url=url)) as source:
        samples, _ = await source.query_instant(query, at=dataset.begin + 1800)
        return {s.labels["service"] for s in samples}


def test_the_three_variables() -> None:
    text = render('sum by ($service) (rate(x{$scope,job="a"}[$rate]))', "app_name", ["b", "a.c"], "1m30s")
    assert text == r'sum by (app_name) (rate(x{app_name=~"a\\.c|b",job="a"}[1m30s]))'


def test_what_is_filled_in_is_not_filled_again() -> None:
    assert render("x{$scope}", "service", ["$rate"], "1m") == 'x{service=~"\\\\$rate"}'


def test_label_replace_keeps_its_groups() -> None:
    query = 'label_replace(up, "a", "$1", "b", "(.*)$")'
    assert render(query, "service", ["x"], "1m") == query


@pytest.mark.parametrize("query", ["up{$services}", "rate(x[$rate_interval])", "$x", "up{$Scope}"])
def test_an_unknown_variable_is_an_error(query: str) -> None:
    with pytest.raises(TemplateError, match="unknown variable"):
        render(query, "service", ["a"], "1m")


@pytest.mark.parametrize("label", ["", "a-b", "0a", "a b", '"', "__name__", "é", "a\n"])
def test_a_bad_label_name_is_an_error(label: str) -> None:
    with pytest.raises(TemplateError, match="label name"):
        render("x{$scope}", label, ["a"], "1m")


@pytest.mark.parametrize("rate", ["", "1", "m", "1m]", "-1m", "0s", "0h0m", "1s1m", "1.5m", " 1m", "1m\n"])
def test_a_bad_rate_is_an_error(rate: str) -> None:
    with pytest.raises(TemplateError, match="duration"):
        render("x[$rate]", "service", ["a"], rate)


@pytest.mark.parametrize(
    ("services", "why"), [([], "no services"), (["a", ""], "without a name"), (["\ud800"], "UTF-8")]
)
def test_services_that_cannot_be_selected_are_an_error(services: list[str], why: str) -> None:
    with pytest.raises(TemplateError, match=why):
        render("x{$scope}", "service", services, "1m")


def test_a_scope_is_bounded() -> None:
    with pytest.raises(TemplateError, match="at most"):
        matcher("service", [str(i) for i in range(3000)])
    with pytest.raises(TemplateError, match="exceed"):
        matcher("service", [str(i) + "x" * 1000 for i in range(1000)])


@given(st.floats(min_value=0.001, max_value=31 * 86400))
def test_seconds_become_a_duration_that_is_accepted(seconds: float) -> None:
    promql_parser.parse(f"rate(x[{duration(duration_of(seconds))}])")


def test_regex_literal_escapes_what_gos_quotemeta_escapes() -> None:
    assert regex_literal("\\.+*?()|[]{}^$ -_/#") == r"\\\.\+\*\?\(\)\|\[\]\{\}\^\$ -_/#"
