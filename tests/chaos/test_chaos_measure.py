"""The arithmetic of the comparison, against figures computed by hand, and its laws."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from chaos_runs import run
from hypothesis import given
from hypothesis import strategies as st

from agent.chaos.measure import (
    CAP_SECONDS,
    bootstrap,
    mean,
    paired_difference,
    percentile,
    reduction,
    restricted_mean,
    share,
)
from agent.chaos.page import page
from agent.chaos.report import metrics, summary

METRIC = re.compile(r"\b(?:mttr_|recovery_(?:attempts|duration)|rollback_)\w*")


def test_what_never_recovers_counts_with_the_cap_and_what_was_never_broken_with_nothing() -> None:
    assert run(recovered=None).time() == CAP_SECONDS
    assert run(recovered=500.0).time() == CAP_SECONDS
    assert not run(recovered=500.0).healed
    assert run(degraded=None, recovered=None).time() == 0.0
    runs = [run("a", recovered=10.0), run("a", recovered=20.0), run("b", recovered=None)]
    assert restricted_mean(runs).value == pytest.approx((10 + 20 + 120) / 3)


def test_the_reduction_compares_pairs_only() -> None:
    ours = [
        run("a", "auto", 1, recovered=10.0),
        run("b", "auto", 1, recovered=20.0),
        run("c", "auto", 1, recovered=5.0),
    ]
    theirs = [run("a", "liveness", 1, recovered=None), run("b", "liveness", 1, recovered=80.0)]
    assert reduction(ours, theirs).value == pytest.approx(1 - 30 / 200)
    assert reduction(ours, theirs).cases == 2
    # only b was healed by both
    assert paired_difference(ours, theirs).value == pytest.approx(60.0)
    assert paired_difference(ours, theirs).cases == 1
    assert reduction(ours, []).cases == 0
    assert math.isnan(reduction(ours, []).value)


def test_intervals_hold_the_estimate_and_are_repeatable() -> None:
    groups = {"a": [1.0, 2.0], "b": [8.0, 9.0], "c": [4.0]}
    one, two = bootstrap(groups, mean), bootstrap(groups, mean)
    assert one == two
    assert one.low <= one.value <= one.high
    assert one.low < one.high
    assert bootstrap({"a": [3.0, 3.0], "b": [3.0]}, mean).low == 3.0


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0.01, 1.0))
def test_a_percentile_is_one_of_the_values_with_enough_of_them_below(values: list[float], part: float) -> None:
    found = percentile(values, part)
    assert found in values
    assert sum(v <= found for v in values) >= part * len(values) - 1e-9


def test_wilson_interval_by_hand() -> None:
    found = share(9, 10)  # (0.9 + 1.92/10 +- 1.96 * sqrt(...)) / (1 + 3.84/10)
    assert (found["low"], found["high"]) == (pytest.approx(0.5958, abs=1e-3), pytest.approx(0.9821, abs=1e-3))
    assert share(0, 0)["share"] is None


def test_the_summary_counts_misses_and_leaves_out_void_runs() -> None:
    runs = [
        run("a"),
        run("a", "liveness", recovered=None, rank=None, top=()),
        run("b", rank=2, top=("x@y", "z@w"), wrong=("service.restart@y",), actions=("service.restart@y",)),
        run(
            "c",
            healed_by="itself",
            kind="control",
            degraded=None,
            recovered=None,
            needless=("workers.scale@w",),
            rank=None,
        ),
        run("d", void="expected within 0 to 20 s: degraded", recovered=None),
    ]
    told = summary(runs)
    assert told["void"] == 1
    auto = told["arms"]["auto"]
    assert (auto["wrong_actions"], auto["needless_actions"], auto["controls"]) == (1, 1, 1)
    assert (auto["top1"]["hits"], auto["top1"]["of"]) == (1, 2)
    assert auto["top3"]["hits"] == 2
    assert {m["scenario"] for m in told["misses"]} == {"b", "c"}
    assert told["against"]["auto/liveness"]["reduction"]["value"] == pytest.approx(1 - 12 / 120)
    assert told["arms"]["liveness"]["restricted_mean_seconds"]["value"] == CAP_SECONDS


def test_runs_with_a_killed_agent_are_told_apart_from_the_comparison() -> None:
    runs = [
        run("a"),
        run("a", "liveness", recovered=80.0, rank=None, top=()),
        run("a", recovered=60.0, killed_agent=True, killed_at=5.5),
        run("b", recovered=None, killed_agent=True, killed_at=7.0, repeated=("x on y: took effect 2 times",)),
        run("c", killed_agent=True, killed_at=None),
    ]
    told = summary(runs)
    assert told["arms"]["auto"]["runs"] == 1
    assert told["against"]["auto/liveness"]["reduction_healable"]["value"] == pytest.approx(1 - 12 / 80)
    killed = told["killed_agent"]
    assert (killed["runs"], killed["killed"], killed["before_diagnosis"], killed["before_recovery"]) == (3, 2, 1, 2)
    assert (killed["healed_of_healable"]["hits"], killed["repeated"]) == (2, 1)
    aims = {aim["what"]: aim["met"] for aim in told["aims"]}
    assert aims["less time out of bounds than liveness, healable faults"] is True
    assert aims["less time out of bounds than command, healable faults"] is None
    assert aims["steps done twice"] is True
    assert aims["steps done twice, the agent killed"] is False
    assert [m["scenario"] for m in told["misses"]] == ["b"]


def test_every_way_to_fall_short_is_told_in_words() -> None:
    runs = [
        run("cause", rank=2, top=("x@y", "z@w")),
        run("silent", rank=None, top=(), answer="insufficient_evidence"),
        run("wrong", wrong=("service.restart@y",), actions=("service.restart@y",)),
        run("unhealed", recovered=None, outcome="escalated"),
        run("needless", healed_by="itself", degraded=None, recovered=None, needless=("workers.scale@w",), rank=None),
        run("twice", repeated=("x on y: took effect 2 times",)),
        run("fine"),
    ]
    told = {m["scenario"]: "; ".join(m["why"]) for m in summary(runs)["misses"]}
    assert set(told) == {r.scenario for r in runs} - {"fine"}
    assert "at place 2: first was x@y" in told["cause"]
    assert "insufficient_evidence" in told["silent"]
    assert "service.restart@y was wrong" in told["wrong"]
    assert "not healed within 120 s: it did nothing, and ended escalated" in told["unhealed"]
    assert "workers.scale@w was needless" in told["needless"]
    assert "took effect 2 times" in told["twice"]
    text = page(runs)
    assert all(why in text for why in told.values())


def test_the_page_tells_everything_and_runs_nothing_of_what_it_was_told() -> None:
    text = page([run("a", rank=2, top=("<script>alert(1)</script>@x",), story=("<img src=x onerror=y>",))])
    assert "<script" not in text
    assert "<img" not in text
    assert "&lt;script&gt;" in text


def test_metrics_have_the_names_that_the_board_asks_for() -> None:
    board = json.loads((Path(__file__).parents[2] / "docs" / "grafana" / "chaos.json").read_text())
    asked = {name for panel in board["panels"] for t in panel["targets"] for name in METRIC.findall(t["expr"])}
    text = metrics([run("a", attempts=1), run("a", repetition=2, recovered=40.0, attempts=1, undone=1)]).decode()
    assert 'mttr_p95{inject_type="lock",recovery_strategy="auto",scenario="a"} 40.0' in text
    assert 'recovery_attempts_total{status="recovered"} 2.0' in text
    assert "recovery_duration_seconds_bucket" in text
    assert "rollback_success_rate 1.0" in text
    assert asked
    assert all(f"\n{name}{{" in text or f"\n{name} " in text for name in asked)
