"""Evidence from real Prometheus and VictoriaMetrics, checked against an independent client; and from broken servers."""

from __future__ import annotations

import asyncio
import math
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from prometheus_api_client import PrometheusConnect
from sources_world import STEP, Dataset, Fake, Query, Server, answering, in_millis, line, one, request_of

from agent.sources.prometheus import Prometheus, PrometheusSource, QueryError
from rules.model import SeriesId


def by_the_other_client(
    url: str, query: str, grid: np.ndarray[Any, Any], step: float
) -> dict[Any, np.ndarray[Any, Any]]:
    """The same query by prometheus-api-client, laid on our grid by its timestamps."""
    client = PrometheusConnect(url=url, timeout=20)
    try:
        result = client.custom_query_range(
            query, datetime.fromtimestamp(grid[0], UTC), datetime.fromtimestamp(grid[-1], UTC), str(step)
        )
    finally:
        client.close()
    rows = {}
    for item in result:
        row = np.full(len(grid), math.nan)
        for at, value in item["values"]:
            (index,) = np.nonzero(grid == at)
            row[index] = float(value) if math.isfinite(float(value)) else math.nan
        labels = {k: v for k, v in item["metric"].items() if k != "__name__"}
        rows[frozenset(labels.items())] = row
    return rows


QUERIES = [
    "requests_total{$scope}",
    "sum by ($service) (rate(requests_total{$scope}[$rate]))",
    "sum by ($service, route) (increase(requests_total{$scope}[5m]))",
    "gappy{$scope}",
    "special{$scope}",
    "1 / (gappy{$scope} - 30)",
    "single{$scope}",
    "wide",
    'strange{n=~".*7"}',
    "absent_metric{$scope}",
    '{__name__=~"gappy|single", $scope}',
]


@pytest.mark.parametrize("server", ["prometheus", "victoria"])
@pytest.mark.parametrize("step", [15.0, 30.0, 7.0])
async def test_our_matrices_equal_those_of_the_independent_client(
    server: str, step: float, dataset: Dataset, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue(server).url
    queries = [Query(f"q{i}", query) for i, query in enumerate(QUERIES)]
    services = ("front", "orders", "worker")
    # VictoriaMetrics moves the window of longer answers to multiples of the step, unless told not to use its cache.
    async with PrometheusSource(Prometheus(url=url, parameters={"nocache": "1"})) as source:
        asked = request_of(*queries, start=dataset.begin - 100, end=dataset.end + 100, step=step, services=services)
        answers = await source.fetch(asked, 30.0)
    compared = 0
    for evidence in answers:
        assert evidence.missing is None, (evidence.query, evidence.missing)
        grid = (
            evidence.frame.times if evidence.frame.ids else np.arange(dataset.begin // step * step, dataset.end, step)
        )
        theirs = await asyncio.to_thread(by_the_other_client, url, evidence.query, grid, step)
        if "__name__" in evidence.query:  # ours lays the two metrics over each other
            assert len(evidence.frame.ids) == 1
            continue
        ours = dict(zip(evidence.frame.ids, evidence.frame.values, strict=True))
        assert {frozenset(i.labels) for i in ours} == set(theirs)
        for series, row in ours.items():
            assert series.metric == evidence.name
            np.testing.assert_array_equal(row, theirs[frozenset(series.labels)], evidence.query)
            compared += int(np.count_nonzero(~np.isnan(row)))
    assert compared > 3000


async def test_values_lie_where_they_were_written(prometheus: Server, dataset: Dataset) -> None:
    async with PrometheusSource(Prometheus(url=prometheus.url)) as source:
        asked = {"start": dataset.begin, "end": dataset.end, "step": STEP}
        gappy = await one(source, "gappy", **asked)
        single = await one(source, "single", **asked)
        special = await one(source, "special", **asked)
    assert gappy.frame.times.tolist() == [dataset.begin + i * STEP for i in range(241)]
    row = gappy.frame.values[0]
    assert row[:80].tolist() == list(range(80))
    assert np.isnan(row[100:160]).all()  # the gap but for Prometheus' look-back of five minutes
    assert row[160:].tolist() == list(range(160, 241))
    at = np.nonzero(~np.isnan(single.frame.values[0]))[0]
    assert at[0] == 600 // STEP
    assert set(single.frame.values[0][at]) == {42.0}
    assert set(special.frame.values[0][~np.isnan(special.frame.values[0])]) == {1.5}
    assert any("120 samples were infinite" in w for w in special.warnings)
    assert gappy.warnings == ()


async def test_a_wide_window_widens_the_step_and_says_so(prometheus: Server, dataset: Dataset) -> None:
    async with PrometheusSource(Prometheus(url=prometheus.url)) as source:
        evidence = await one(source, "gappy", start=dataset.end - 30 * 86400, end=dataset.end, step=15)
    assert evidence.missing is None
    assert len(evidence.frame.times) <= 11_000
    assert np.unique(np.diff(evidence.frame.times)).tolist() == [240.0]
    assert any("step widened from 15 s to 240 s" in w for w in evidence.warnings)
    assert np.count_nonzero(~np.isnan(evidence.frame.values)) > 5


async def test_the_largest_window_that_fits_is_answered(prometheus: Server, dataset: Dataset) -> None:
    async with PrometheusSource(Prometheus(url=prometheus.url)) as source:
        evidence = await one(source, "gappy", start=dataset.begin, end=dataset.begin + 10_999, step=1)
    assert evidence.missing is None
    assert len(evidence.frame.times) == 11_000
    assert evidence.warnings == ()


async def test_more_series_than_allowed_are_left_out_and_said(prometheus: Server, dataset: Dataset) -> None:
    asked = {"start": dataset.begin + 1800, "end": dataset.begin + 1900, "step": 50}
    async with PrometheusSource(Prometheus(url=prometheus.url, max_series=100)) as source:
        bounded = await one(source, "wide", **asked)
    async with PrometheusSource(Prometheus(url=prometheus.url, max_cells=30)) as source:
        cells = await one(source, "wide", **asked)
    assert [i.service for i in bounded.frame.ids] == [f"s{i:04d}" for i in range(100)]
    assert bounded.partial == "600 series, only the first 100 are kept: narrow the query"
    assert len(cells.frame.ids) == 30 // len(cells.frame.times)


async def test_an_answer_that_is_too_large_is_not_read(prometheus: Server, dataset: Dataset) -> None:
    async with PrometheusSource(Prometheus(url=prometheus.url, max_bytes=10_000)) as source:
        evidence = await one(source, "wide", start=dataset.begin, end=dataset.end, step=15)
    assert evidence.missing == "answer too large: more than 10000 bytes; narrow the query or widen the step"


async def test_labels_are_renamed_to_the_canonical_ones(prometheus: Server, dataset: Dataset) -> None:
    at = {"start": dataset.begin, "end": dataset.begin + 60, "step": 30}
    async with PrometheusSource(Prometheus(url=prometheus.url, service_label="app")) as source:
        evidence = await one(source, "new_name{$scope}", services=("shop",), **at)
        both = await one(source, '{__name__=~"old_name|new_name"}', **at)
    assert evidence.frame.ids == (SeriesId.of("signal", {"service": "shop", "exported_service": "front"}),)
    assert len(both.frame.ids) == 1
    assert any("1 series had the same name" in w for w in both.warnings)


ERRORS = [
    ("sum(", "http 400: bad_data: "),
    ("rate(gappy)", "http 400: bad_data: "),
    ("label_replace(gappy, 'a', '$1', 'b', '(')", "http 422: execution: "),
    ('{__name__=~"gappy|single|special"} + on() group_left() {__name__=~"gappy|single"}', "http 422: execution: "),
]


@pytest.mark.parametrize(("query", "reason"), ERRORS)
async def test_prometheus_own_words_are_the_reason(
    prometheus: Server, dataset: Dataset, query: str, reason: str
) -> None:
    async with PrometheusSource(Prometheus(url=prometheus.url)) as source:
        evidence = await one(source, query, start=dataset.begin, end=dataset.end)
    assert evidence.missing is not None
    assert evidence.missing.startswith(reason)
    assert len(evidence.missing) <= 300
    assert evidence.frame.ids == ()


async def test_victoria_metrics_words_are_the_reason(victoria: Server) -> None:
    async with PrometheusSource(Prometheus(url=victoria.url)) as source:
        evidence = await one(source, "sum(")
    assert evidence.missing is not None
    assert evidence.missing.startswith("http 422: 422: ")


async def test_a_query_that_cannot_be_filled_is_missing_and_the_others_are_not(prometheus: Server) -> None:
    async with PrometheusSource(Prometheus(url=prometheus.url)) as source:
        asked = request_of(Query("a", "up{$services}"), Query("b", "vector(1)"), Query("c", "up{$scope}"), services=())
        a, b, c = await source.fetch(asked, 20.0)
    assert a.missing == "unknown variable $services: a query knows $service, $scope, $alert(...) and $rate"
    assert b.missing is None
    assert b.frame.values[0].tolist() == [1.0] * 121
    assert c.missing is not None
    assert c.missing.startswith("no services in scope")


# -- the other questions


async def test_instant_queries(prometheus: Server, dataset: Dataset) -> None:
    async with PrometheusSource(Prometheus(url=prometheus.url)) as source:
        samples, warnings = await source.query_instant('special{service="front"}', at=dataset.begin + STEP)
        (scalar,), _ = await source.query_instant("scalar(vector(2))")
        with pytest.raises(QueryError, match="expected a vector"):
            await source.query_instant("gappy[5m]", at=dataset.begin + 300)
        with pytest.raises(QueryError, match="http 400: bad_data"):
            await source.query_instant("sum(")
    assert [(s.labels["service"], s.time, s.value) for s in samples] == [("front", dataset.begin + STEP, math.inf)]
    assert warnings == ()
    assert (scalar.labels, scalar.value) == ({}, 2.0)


async def test_an_instant_answer_is_bounded(prometheus: Server, dataset: Dataset) -> None:
    async with PrometheusSource(Prometheus(url=prometheus.url, max_series=10)) as source:
        with pytest.raises(QueryError, match="600 samples, at most 10"):
            await source.query_instant("wide", at=dataset.begin + 1800)


async def test_range_queries_by_hand(prometheus: Server, dataset: Dataset) -> None:
    async with PrometheusSource(Prometheus(url=prometheus.url)) as source:
        frame, warnings = await source.query_range("gappy", (dataset.begin, dataset.begin + 60, 30))
    assert frame.ids == (SeriesId.of("gappy", {"service": "front"}),)
    assert frame.values.tolist() == [[0.0, 2.0, 4.0]]
    assert warnings == ()


async def test_series_and_label_values(prometheus: Server, dataset: Dataset) -> None:
    window = (dataset.begin, dataset.end)
    async with PrometheusSource(Prometheus(url=prometheus.url)) as source:
        series = await source.series(['gappy{service="front"}', "single"], window)
        names = await source.label_values("service", ["strange"])
        with pytest.raises(QueryError, match="not a label name"):
            await source.label_values("../../admin")
    assert sorted(s["__name__"] for s in series) == ["gappy", "single"]
    assert set(names) == set(dataset.names)


async def test_rules_and_firing_alerts(prometheus: Server) -> None:
    async with PrometheusSource(Prometheus(url=prometheus.url)) as source:
        rules = await source.rules()
        async with asyncio.timeout(20):
            while not (alerts := await source.alerts_firing()):
                await asyncio.sleep(0.05)
    assert [(r.name, r.query, r.seconds, r.group) for r in rules] == [
        ("AlwaysFiring", "vector(1) > 0", 0.0, "shop"),
        ("NeverFiring", "vector(1) > 2", 300.0, "shop"),
    ]
    assert rules[0].labels == {"severity": "page", "service": "front"}
    (alert,) = alerts
    assert alert.labels == {"alertname": "AlwaysFiring", "severity": "page", "service": "front"}
    assert alert.annotations == {"summary": "it is 1"}


@pytest.mark.parametrize("body", ["{}", '{"status":"success"}', '{"status":"success","data":{"groups":[{"rules":1}]}}'])
async def test_other_questions_raise_for_answers_of_another_shape(fake: Fake, body: str) -> None:
    fake.answer = answering(body)
    async with PrometheusSource(Prometheus(url=fake.url)) as source:
        for ask in (source.rules(), source.alerts_firing(), source.label_values("a"), source.series(["a"], (0, 1))):
            with pytest.raises(QueryError):
                await ask


def test_data_for_the_second_store_is_in_milliseconds() -> None:
    assert in_millis(line("a", {"b": "c d"}, 1, 60)) == 'a{b="c d"} 1 60000\n'
