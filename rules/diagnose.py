"""From a frozen situation to a ranked, explained diagnosis: the one function `agent.investigate` calls.

Features, rules and Bayes in sequence; pure and deterministic: the same situation gives the same bytes.
"""

from __future__ import annotations

from rules.model import Diagnosis, Situation
from rules.packs import PackSet


def diagnose(situation: Situation, packs: PackSet) -> Diagnosis:
    """The three best explained root causes, or `insufficient_evidence` when none stands clear. Never raises on data:
    NaN, empty, constant or duplicate series and missing evidence are all situations."""
    raise NotImplementedError
