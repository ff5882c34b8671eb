"""Has it recovered? Asked by `agent.verify` after an action, answered by the very series that justified the action.

`justification_of` writes down, before anything is done, which series spoke for the hypothesis and what would count as
recovery; it is journalled with the plan. `judge` compares fresh evidence with it. Missing data is never recovery.
Nothing here reads a clock or the network.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from rules.model import Hypothesis, Situation
from rules.packs import PackSet


class WatchedSeries(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One series that must come back within `threshold`. `direction` is where the bad side lies."""

    metric: str
    labels: tuple[tuple[str, str], ...] = ()
    role: Literal["symptom", "support"]
    direction: Literal["up", "down"]
    baseline: float
    scale: float
    level: float | None = None  # held during the abnormal window; None: the series had gone silent
    threshold: float


class WatchedFact(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One fact that must no longer be seen as bad (the process is gone or calm, the listener is back)."""

    kind: str
    subject: str
    service: str = ""
    group: str


class Justification(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What spoke for one hypothesis, and therefore what must change. Plain data, fit for the journal."""

    entry: str
    service: str
    cause: str
    onset: float
    series: tuple[WatchedSeries, ...] = ()
    facts: tuple[WatchedFact, ...] = ()
    samples: int = 3  # so many last samples must be within bounds


class Check(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One watched thing as it is now."""

    subject: str  # the series in Prometheus notation, or `kind subject`
    role: Literal["symptom", "support"]
    state: Literal["within", "beyond", "missing"]
    value: float | None = None
    threshold: float | None = None


class Verdict(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`recovered` only if every check is `within` and there was something to check."""

    recovered: bool
    text: str
    checked: tuple[Check, ...] = ()


def justification_of(situation: Situation, hypothesis: Hypothesis, packs: PackSet) -> Justification:
    """The symptom series of the entry service and the hypothesis' supporting series and facts, with their bounds."""
    raise NotImplementedError


def judge(justification: Justification, now: Situation, packs: PackSet, since: float = 0.0) -> Verdict:
    """Whether all that justified the action is back within bounds. `now.onset` is not used; only samples later than
    `since` (the end of the action) count."""
    raise NotImplementedError
