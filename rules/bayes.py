"""Naive Bayes over a few decorrelated evidence groups, compiled to a matrix of log-odds.

Called by `rules.diagnose`. Every candidate c is weighed against one background hypothesis, "something we have no name
for", whose log-odds are 0 by definition:

    s_c = log(prior_c) + rules_c + symptom + sum over c's groups g of log(P(state_g | c) / P(state_g | something else))
    P(c | evidence) = exp(s_c) / (1 + sum over all candidates k of exp(s_k))

so the posteriors sum to less than 1 and the rest belongs to the background. Evidence that a cause does not mention is
as likely under it as under the background: its ratio is 1. Missing evidence contributes exactly 0. Nothing here knows
where states come from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from rules.model import FloatArray
from rules.packs import STATES, Cause, State

MISSING = len(STATES)  # index of "nobody can say": its weights are all exactly 0
STATE_INDEX: dict[State | None, int] = {**{s: i for i, s in enumerate(STATES)}, None: MISSING}
MAX_RULE_NATS = 2.0  # what rules may add for one candidate; they see the same series as the groups
RULE_SUPPORT = 0.38  # nats that the first fired rule adds to the combined confidence
RULE_DECAY = 2.0 / 3.0  # what each further rule is worth of the one before
SYMPTOM_ABSENT = math.log(0.1)  # a fault under which the entry service is entirely well is a tenth as likely


@dataclass(frozen=True)
class Model:
    """`weights[cause, column, state]` are log ratios, (causes, columns, len(STATES) + 1); a column is (group, at)."""

    causes: tuple[str, ...]
    columns: tuple[tuple[str, str], ...]
    prior: FloatArray
    weights: NDArray[np.float64]
    needs: NDArray[np.bool_]  # (causes, columns): the defining evidence

    @classmethod
    def compile(cls, causes: Mapping[str, Cause]) -> Model:
        names = tuple(sorted(causes))
        columns = tuple(sorted({(line.group, line.at) for c in causes.values() for line in c.evidence}))
        at = {column: i for i, column in enumerate(columns)}
        weights = np.zeros((len(names), len(columns), len(STATES) + 1))
        for i, name in enumerate(names):
            for line in causes[name].evidence:
                for state, (given, otherwise) in line.states.items():
                    weights[i, at[line.group, line.at], STATE_INDEX[state]] = math.log(given / otherwise)
        needs = np.zeros((len(names), len(columns)), dtype=bool)
        for i, name in enumerate(names):
            for line in causes[name].evidence:
                needs[i, at[line.group, line.at]] = line.column in causes[name].needs
        prior = np.array([math.log(causes[name].prior / (1.0 - causes[name].prior)) for name in names])
        return cls(names, columns, prior, weights, needs)

    @cached_property
    def _flat(self) -> tuple[FloatArray, NDArray[np.intp]]:
        """The weights in one row, and where in it each (cause, column) begins: one gather is several times faster than
        indexing by three arrays."""
        causes, columns, states = self.weights.shape
        starts = np.arange(causes * columns, dtype=np.intp).reshape(causes, columns) * states
        return np.ascontiguousarray(self.weights).ravel(), starts

    def contributions(self, rows: Sequence[int] | NDArray[np.intp], states: NDArray[np.intp]) -> FloatArray:
        """Log ratios, (candidates, columns). `rows`: the causes' indices; `states`: (candidates, columns) indices."""
        flat, starts = self._flat
        at = starts.take(np.asarray(rows, dtype=np.intp), axis=0)
        at += states
        return flat.take(at, mode="clip")  # all are within: told so, numpy need not look


def posteriors(log_odds: FloatArray) -> FloatArray:
    """Of every candidate against all others and the background (log-odds 0); they sum to less than 1. Summed in order
    of size, so that the order of candidates changes no bit."""
    if log_odds.shape[0] == 0:
        return log_odds
    top = max(0.0, float(log_odds.max()))
    mass = np.exp(log_odds - top)
    return np.asarray(mass / (math.exp(-top) + np.sort(mass).sum()), dtype=np.float64)


def combined_confidence(posterior: float, rules: int) -> float:
    """Posterior odds times exp(0.38 * (1 + 2/3 + 4/9 + ...)), one term a fired rule: the first rule that describes the
    situation is worth odds of 1.46, each further one two thirds (in log-odds) of the one before, since rules look at
    the same trouble. A posterior of .82 with three rules gives .91, one of .65 with one rule .73."""
    gain = RULE_SUPPORT * (1.0 - RULE_DECAY**rules) / (1.0 - RULE_DECAY)
    raised = posterior * math.exp(gain)
    return raised / (raised + (1.0 - posterior))
