"""Learns the tables of the naive Bayes model from recorded incidents, offline. Called by `alertmedic learn`.

Exists so that the shipped `rules/model.json` is made by an independent library and not by the code that uses it: pgmpy
(extra `learn`; imported here alone, and only when called) estimates every table under the Dirichlet prior that
`rules.learn` states, and its exact inference must agree with the compiled scorer to 1e-9 on the learned model before
anything is written. The service reads plain JSON and never imports pgmpy.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np

from agent.evaluate import Case, read_truth
from agent.sources.recorded import read_recording
from rules.bayes import MISSING, STATE_INDEX, Model, posteriors
from rules.diagnose import observe
from rules.learn import Counts, LearnedModel, Table, applied, count, learned, shown
from rules.packs import Cause, PackSet, State

AGREES = 1e-9
CHECKS = 20  # random pieces of evidence
CHECKED_CANDIDATES = 6
_REST = "rest"  # a state that a pack's table does not list
_ELSE = "something else"


class LearnError(RuntimeError):
    """Nothing was learned: pgmpy is not installed, no incident has a cause, or the two scorers disagree."""


def learn(
    cases: Sequence[Case], packs: PackSet, version: str, progress: Callable[[Case], None] = lambda _: None
) -> LearnedModel:
    """The model of all cases: all of them are learned from, so give licensed ones. Raises LearnError and
    RecordingError."""
    _library()
    counts: Counts = Counts()
    fault_free = 0
    for case in cases:
        truth = read_truth(case.directory)
        counts.update(count(observe(read_recording(case.directory), packs), truth.service, truth.fault))
        fault_free += truth.service is None
        progress(case)
    causes = shown(counts)
    if not causes:
        raise LearnError("learn: no recording has a fault that some cause of the packs is about")
    model = learned(packs, counts, causes, version, len(cases), fault_free, estimate=estimated)
    difference = disagreement(applied(packs, model), sorted(causes))
    if not difference <= AGREES:
        raise LearnError(f"learn: the compiled scorer and exact inference differ by {difference:.3g}, nothing written")
    return model


def estimated(seen: Table, given: Mapping[State, float], otherwise: Mapping[State, float]) -> Table:
    """One table by pgmpy: the network cause -> column, its Dirichlet prior and the counts as weighted data."""
    library = _library()
    states, sides = list(seen), ["cause", "else"]
    rows = [(side, state, seen[state][i]) for state in states for i, side in enumerate(sides)]
    prior = [[given[s], otherwise[s]] for s in states]
    estimator = library.Estimator(
        state_names={"is": sides, "column": states},
        prior_type="dirichlet",
        pseudo_counts={"is": [[1.0], [1.0]], "column": prior},
    )
    with _unwarned():
        network = library.Network([("is", "column")]).fit(
            library.DataFrame([row[:2] for row in rows], columns=["is", "column"]),
            estimator=estimator,
            sample_weight=[row[2] for row in rows],
        )
    table = network.get_cpds("column")
    at = {name: i for i, name in enumerate(table.state_names["column"])}
    side = {name: i for i, name in enumerate(table.state_names["is"])}
    values = np.asarray(table.get_values())
    return {s: (float(values[at[s], side["cause"]]), float(values[at[s], side["else"]])) for s in states}


def network_of(causes: Sequence[Cause]) -> Any:
    """The scorer's model as a Bayesian network: one variable "what is wrong" (every candidate, or something else), and
    below it one variable for every column of every candidate, `number|column`, which is distributed as the candidate's
    table says if it is the one, and as it says of something else otherwise."""
    library = _library()
    odds = [1.0, *(cause.prior / (1.0 - cause.prior) for cause in causes)]
    names = [_ELSE, *map(str, range(len(causes)))]
    share = [[o / sum(odds)] for o in odds]
    network = library.Network()
    network.add_node("wrong")
    network.add_cpds(library.Table("wrong", len(names), share, state_names={"wrong": names}))
    for i, cause in enumerate(causes):
        for line in cause.evidence:
            variable, states = f"{i}|{line.column}", [*line.states]
            rows = [[line.states[s][1]] * len(names) for s in states]
            for row, s in zip(rows, states, strict=True):
                row[i + 1] = line.states[s][0]
            rest = [max(1.0 - sum(row[k] for row in rows), 0.0) for k in range(len(names))]
            network.add_edge("wrong", variable)
            network.add_cpds(
                library.Table(
                    variable,
                    len(states) + 1,
                    [*rows, rest],
                    evidence=["wrong"],
                    evidence_card=[len(names)],
                    state_names={variable: [*states, _REST], "wrong": names},
                )
            )
    return network


def exact(causes: Sequence[Cause], states: Sequence[Mapping[str, State]]) -> list[float]:
    """P(candidate | evidence) of every candidate by pgmpy's variable elimination. `states`: by candidate and column;
    what is not in it is missing."""
    network = network_of(causes)
    evidence = {f"{i}|{column}": state for i, of in enumerate(states) for column, state in of.items()}
    with _unwarned():
        answer = _library().Elimination(network).query(["wrong"], evidence=evidence, show_progress=False)
    at = {name: k for k, name in enumerate(answer.state_names["wrong"])}
    values = np.asarray(answer.values)
    return [float(values[at[str(i)]]) for i in range(len(causes))]


def compiled(model: Model, names: Sequence[str], states: Sequence[Mapping[str, State]]) -> list[float]:
    """The same by the scorer that the service uses."""
    rows = [model.causes.index(name) for name in names]
    column = {group if at == "self" else f"{group}@{at}": j for j, (group, at) in enumerate(model.columns)}
    index = np.full((len(rows), len(model.columns)), MISSING, dtype=np.intp)
    for i, of in enumerate(states):
        for name, state in of.items():
            index[i, column[name]] = STATE_INDEX[state]
    log_odds = model.prior[rows] + model.contributions(rows, index).sum(axis=1)
    return [float(p) for p in posteriors(log_odds)]


@contextmanager
def _unwarned() -> Iterator[None]:
    """Without pandas' and pgmpy's announcements of what will change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@lru_cache(maxsize=1)
def _library() -> SimpleNamespace:
    """What of pgmpy is used. Raises LearnError if it is not there."""
    try:
        with _unwarned():
            from pandas import DataFrame
            from pgmpy.factors.discrete import TabularCPD
            from pgmpy.inference import VariableElimination
            from pgmpy.models import DiscreteBayesianNetwork
            from pgmpy.parameter_estimator import DiscreteBayesianEstimator
    except ImportError as error:
        raise LearnError("learn: pgmpy is not installed; install the extra: pip install 'alertmedic[learn]'") from error
    return SimpleNamespace(
        DataFrame=DataFrame,
        Table=TabularCPD,
        Elimination=VariableElimination,
        Network=DiscreteBayesianNetwork,
        Estimator=DiscreteBayesianEstimator,
    )


def disagreement(packs: PackSet, names: Collection[str], seed: int = 0) -> float:
    """The largest difference between both scorers on random evidence, some of it missing."""
    model, rng, worst = Model.compile(packs.causes), random.Random(seed), 0.0  # noqa: S311 - evidence, no secret
    for _ in range(CHECKS):
        chosen = [rng.choice(sorted(names)) for _ in range(rng.randint(1, CHECKED_CANDIDATES))]
        causes = [packs.causes[name] for name in chosen]
        states = [
            {line.column: rng.choice(list(line.states)) for line in cause.evidence if rng.random() < 0.8}
            for cause in causes
        ]
        pairs = zip(exact(causes, states), compiled(model, chosen, states), strict=True)
        worst = max(worst, *(abs(a - b) for a, b in pairs))
    return worst
