"""The compiled log-odds matrix against Bayes' rule written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rules.bayes import MISSING, STATE_INDEX, Model, combined_confidence, posteriors
from rules.packs import STATES, PackSet


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_the_matrix_equals_bayes_written_out(packs: PackSet, data: st.DataObject) -> None:
    """Joint probabilities multiplied by hand, cause against background, then normalised over all."""
    model = Model.compile(packs.causes)
    rows = data.draw(st.lists(st.integers(0, len(model.causes) - 1), min_size=1, max_size=6))
    index = data.draw(
        st.lists(st.lists(st.integers(0, MISSING), min_size=len(model.columns), max_size=len(model.columns)),
                 min_size=len(rows), max_size=len(rows))
    )  # fmt: skip
    states = np.array(index, dtype=np.intp)
    log_odds = model.prior[rows] + model.contributions(rows, states).sum(axis=1)
    odds = []
    for row, chosen in zip(rows, index, strict=True):
        cause = packs.causes[model.causes[row]]
        ratio = cause.prior / (1 - cause.prior)
        for line in cause.evidence:
            state = chosen[model.columns.index((line.group, line.at))]
            if state != MISSING and STATES[state] in line.states:
                given_cause, otherwise = line.states[STATES[state]]
                ratio *= given_cause / otherwise
        odds.append(ratio)
    expected = [o / (1 + math.fsum(odds)) for o in odds]
    np.testing.assert_allclose(posteriors(log_odds), expected, rtol=1e-9)


def test_missing_evidence_weighs_exactly_nothing(packs: PackSet) -> None:
    model = Model.compile(packs.causes)
    states = np.full((len(model.causes), len(model.columns)), MISSING, dtype=np.intp)
    assert not model.contributions(range(len(model.causes)), states).any()
    assert not model.weights[:, :, MISSING].any()


@given(st.lists(st.floats(-800, 800), max_size=20))
def test_posteriors_leave_something_for_the_unknown(log_odds: list[float]) -> None:
    found = posteriors(np.array(log_odds))
    assert found.sum() <= 1 + 1e-12
    assert (found >= 0).all()
    order = np.argsort(log_odds, kind="stable")
    assert (np.diff(found[order]) >= 0).all()


def test_every_state_has_its_column() -> None:
    assert sorted(STATE_INDEX.values()) == list(range(MISSING + 1))
    assert STATE_INDEX[None] == MISSING


def test_stronger_is_never_weaker(packs: PackSet) -> None:
    """In the shipped packs a strong finding says at least as much as a weak one, and in the same direction; silence of
    evidence cannot be better than its presence."""
    for name, cause in packs.causes.items():
        for line in cause.evidence:
            ratio = {state: given / otherwise for state, (given, otherwise) in line.states.items()}
            if ratio.get("strong", 1) > 1:
                assert ratio.get("weak", 1) <= ratio["strong"], (name, line.column)
                assert ratio.get("absent", 1) <= 1 or line.column == "listener", (name, line.column)
            if ratio.get("strong", 1) < 1:
                assert ratio["strong"] <= ratio.get("weak", 1) + 1e-9, (name, line.column)


@pytest.mark.parametrize(("posterior", "rules", "expected"), [(0.82, 3, 0.91), (0.65, 1, 0.73), (0.5, 0, 0.5)])
def test_confidence_combines_rules_and_bayes(posterior: float, rules: int, expected: float) -> None:
    assert combined_confidence(posterior, rules) == pytest.approx(expected, abs=0.005)


@given(st.floats(0, 1), st.integers(0, 50))
def test_confidence_is_a_probability_that_rules_raise(posterior: float, rules: int) -> None:
    found = combined_confidence(posterior, rules)
    assert posterior - 1e-12 <= found <= 1
    assert combined_confidence(posterior, rules + 1) >= found - 1e-12
