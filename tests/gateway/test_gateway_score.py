"""Consensus and scoreboard against cases that were computed by hand."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from agent.fold_gateway import ChannelMoved, GatewayCompared, GatewayJudged, GatewayState
from agent.fold_state import State
from agent.gateway.score import (
    Answered,
    Board,
    agree,
    answered,
    decision,
    differences,
    evidence_ratio,
    interval,
    mcnemar,
    right,
    sound,
)
from agent.incidents import apply
from agent.journal.records import Record, Stored
from rules.model import Diagnosis, Hypothesis, Proposal


def hypothesis(cause: str, service: str, posterior: float, *proposals: Proposal) -> Hypothesis:
    return Hypothesis(
        cause=cause,
        service=service,
        fault="cpu",
        title="t",
        posterior=posterior,
        confidence=posterior,
        proposals=proposals,
    )


def diagnosis(*hypotheses: Hypothesis, **more: Any) -> Diagnosis:
    return Diagnosis(**{"verdict": "ranked", "hypotheses": hypotheses, "version": "1", **more})


ONE = diagnosis(hypothesis("a.x", "s", 0.8), hypothesis("b.y", "t", 0.1))


@pytest.mark.parametrize(
    ("other", "same", "found"),
    [
        (diagnosis(hypothesis("a.x", "s", 0.8), hypothesis("b.y", "t", 0.1), version="2"), True, ()),
        (diagnosis(hypothesis("a.x", "s", 0.71), hypothesis("b.y", "t", 0.1)), True, ()),
        (
            diagnosis(hypothesis("a.x", "s", 0.6), hypothesis("b.y", "t", 0.1)),
            True,
            ("posterior: 0.80 against 0.60",),
        ),
        (
            diagnosis(hypothesis("a.x", "t", 0.8), hypothesis("b.y", "t", 0.1)),
            False,
            ("first cause: a.x on s against a.x on t",),
        ),
        (
            diagnosis(hypothesis("a.x", "s", 0.8), hypothesis("c.z", "t", 0.1)),
            True,
            ("the causes that follow, or their order",),
        ),
        (
            diagnosis(hypothesis("a.x", "s", 0.8), hypothesis("b.y", "t", 0.1), verdict="insufficient_evidence"),
            False,
            ("verdict: ranked against insufficient_evidence", "first cause: a.x on s against none"),
        ),
        (
            diagnosis(hypothesis("a.x", "s", 0.8, Proposal(action="act", service="s")), hypothesis("b.y", "t", 0.1)),
            True,
            ("what is proposed",),
        ),
    ],
)
def test_consensus(other: Diagnosis, same: bool, found: tuple[str, ...]) -> None:
    assert agree(answered(ONE), answered(other)) is same
    assert differences(ONE, other) == found
    assert bool(differences(other, ONE)) == bool(found)


def test_two_that_find_nothing_agree() -> None:
    calm = diagnosis(verdict="insufficient_evidence")
    assert agree(answered(calm), answered(diagnosis(hypothesis("a", "b", 0.2), verdict="insufficient_evidence")))
    assert not agree(answered(calm), Answered(status="late"))


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (diagnosis(hypothesis("a", "s", math.nan)), "no number"),
        (diagnosis(hypothesis("a", "s", 1.5)), "no number"),
        (diagnosis(hypothesis("a", "s", 0.7), hypothesis("b", "s", 0.6)), "sum to 1.300"),
        (diagnosis(hypothesis("a", "s", 0.2), hypothesis("b", "s", 0.6)), "not in order"),
        (diagnosis(), "without a hypothesis"),
        (diagnosis(hypothesis("", "s", 0.7)), "without a cause"),
    ],
)
def test_nonsense_is_seen(wrong: Diagnosis, why: str) -> None:
    assert why in sound(wrong)
    assert sound(ONE) == ""
    # Those after the first stand by their service.
    assert sound(diagnosis(hypothesis("a", "s", 0.9), hypothesis("b", "t", 0.01), hypothesis("c", "u", 0.05))) == ""


@pytest.mark.parametrize(
    ("a_only", "b_only", "p"),
    [
        (0, 0, 1.0),
        (1, 1, 1.0),
        (0, 5, 0.0625),  # 2 * 1/32
        (1, 5, 0.21875),  # 2 * (1 + 6) / 64
        (0, 10, 2 / 1024),
        (2, 10, 2 * (1 + 12 + 66) / 4096),
    ],
)
def test_mcnemar(a_only: int, b_only: int, p: float) -> None:
    assert mcnemar(a_only, b_only) == pytest.approx(p)
    assert mcnemar(b_only, a_only) == pytest.approx(p)


@pytest.mark.parametrize(
    ("a_only", "b_only", "ratio"),
    [
        (0, 0, 1.0),
        (0, 1, 1.0),  # 2 / (2 * 1)
        (0, 7, 16.0),  # 128 / 8
        (0, 8, 256 / 9),
        (1, 9, 1024 / (11 * 10)),
        (2, 2, 16 / (5 * 6)),
    ],
)
def test_evidence_ratio(a_only: int, b_only: int, ratio: float) -> None:
    assert evidence_ratio(a_only, b_only) == pytest.approx(ratio)


def test_when_to_stop() -> None:
    assert decision(Board(b_only=7, both=1000)) == "undecided"  # 16 is less than 1 / 0.05
    assert decision(Board(b_only=8)) == "b"
    assert decision(Board(a_only=8)) == "a"
    assert decision(Board(a_only=500, b_only=500)) == "undecided"
    assert decision(Board(a_only=400, b_only=700)) == "b"  # the large numbers go by logarithms
    assert evidence_ratio(400, 599) == pytest.approx(2.0**999 / (1000 * math.comb(999, 400)), rel=1e-9)
    assert evidence_ratio(400, 600) == pytest.approx(
        math.exp(1000 * math.log(2) - math.log(1001 * math.comb(1000, 400)))
    )


def test_equal_channels_are_seldom_told_apart_however_often_one_looks() -> None:
    rng, wrong = random.Random(5), 0
    for _ in range(400):
        a = b = 0
        for _ in range(200):
            a, b = (a + 1, b) if rng.random() < 0.5 else (a, b + 1)
            if decision(Board(a_only=a, b_only=b)) != "undecided":
                wrong += 1
                break
    assert wrong / 400 <= 0.05


def test_interval() -> None:
    """Agresti and Min 2005: (c - b) / (n + 2) +- z sqrt((b + c) - (c - b)^2 / (n + 2)) / (n + 2), with 1/2 added."""
    assert interval(Board()) == (0.0, -1.0, 1.0)
    difference, low, high = interval(Board(both=70, a_only=5, b_only=15, neither=10))
    assert difference == pytest.approx(0.1)
    assert (low, high) == pytest.approx((0.012064, 0.184015), abs=1e-6)  # 10/102 -+ 1.959964 sqrt(21 - 100/102)/102


def test_who_was_right() -> None:
    good, bad = Answered(status="ok", cause="c", service="s"), Answered(status="ok", cause="d", service="s")
    late = Answered(status="late")
    truth = ("c", "s")
    assert [right(truth, a, b) for a, b in ((good, good), (good, late), (bad, good), (bad, late))] == [
        "both",
        "a",
        "b",
        "neither",
    ]
    assert right(("", ""), Answered(status="ok"), bad) == "a"  # there was no fault, and A said so


def compared(trace: str, a: str, b: str, *, b_version: str = "2", incident: str = "") -> GatewayCompared:
    return GatewayCompared(
        at=1.0,
        trace=trace,
        incident=incident,
        evidence="e",
        a=Answered(status="ok", version="1", cause=a, service="s"),
        b=Answered(status="ok", version=b_version, cause=b, service="s"),
        differences=("first cause",) if a != b else (),
    )


def fold(*records: Record) -> GatewayState:
    state = State()
    for seq, record in enumerate(records, 1):
        apply(state, Stored(seq, record))
    assert State.from_snapshot(state.to_snapshot()).gateway == state.gateway
    return state.gateway


def judged(trace: str, cause: str) -> GatewayJudged:
    return GatewayJudged(at=2.0, trace=trace, cause=cause, service="s", who="w")


def test_the_score_is_folded_from_the_journal() -> None:
    records: list[Record] = [
        compared("1", "x", "y"),
        compared("2", "x", "x"),
        compared("3", "x", "y"),
        compared("4", "x", "y"),
    ]
    records += [
        judged("1", "x"),
        judged("2", "x"),
        judged("3", "y"),
        judged("4", "z"),
        judged("4", "x"),
        judged("5", "x"),
    ]
    state = fold(*records)
    assert state.board == Board(a_version="1", b_version="2", both=1, a_only=1, b_only=1, neither=1)
    assert (state.compared, state.differed) == (4, 3)
    # Another version starts anew; so does a move.
    assert fold(*records, compared("6", "x", "y", b_version="3"), judged("6", "y")).board == Board(
        a_version="1", b_version="3", b_only=1
    )
    move = ChannelMoved(at=3.0, before="stable", after="candidate", version="2", reason="r", who="w")
    after = fold(*records, move)
    assert (after.primary, after.promoted_version, after.board, after.comparisons) == ("candidate", "2", Board(), {})
