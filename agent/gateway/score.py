"""Comparing two diagnoses, and keeping score of which channel is right: pure arithmetic, no clock, no file.

Called by `agent.gateway` and by the fold (`agent.fold_gateway`). The statistics are those of paired answers: what both
channels get right or wrong says nothing about which is better, so only the pairs that one of them alone got right count
(McNemar 1947, in its exact binomial form). Looking at the score after every case would make such a p-value worthless;
the decision rests on a likelihood ratio that may be looked at whenever one likes (Ville's inequality).
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from rules.model import Diagnosis

POSTERIOR_DIFFERS = 0.1
ALPHA = 0.05  # chance of ever naming a channel better that is not
SHOWN = 3  # hypotheses whose order is compared
Right = Literal["both", "a", "b", "neither"]
Decision = Literal["a", "b", "undecided"]


class Answered(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A channel's answer in short. `status` is `ok`, or why there is none: late, crashed, invalid, busy, off,
    unavailable. `cause` and `service` are those of the first hypothesis of a ranked answer, else ""."""

    status: str
    version: str = ""
    verdict: str = ""
    cause: str = ""
    service: str = ""
    posterior: float = 0.0
    reason: str = ""


def answered(diagnosis: Diagnosis) -> Answered:
    first = diagnosis.hypotheses[0] if diagnosis.verdict == "ranked" and diagnosis.hypotheses else None
    return Answered(
        status="ok",
        version=diagnosis.version,
        verdict=diagnosis.verdict,
        cause=first.cause if first else "",
        service=first.service if first else "",
        posterior=first.posterior if first else 0.0,
        reason=diagnosis.sentence[:500],
    )


def agree(a: Answered, b: Answered) -> bool:
    """The same verdict and, where there is one, the same first (cause, service)."""
    return b.status == a.status == "ok" and (a.verdict, a.cause, a.service) == (b.verdict, b.cause, b.service)


def differences(a: Diagnosis, b: Diagnosis) -> tuple[str, ...]:
    """Sentences about what differs; none: the channels say the same. Versions may differ, that is the point."""
    one, two = answered(a), answered(b)
    found: list[str] = []
    if one.verdict != two.verdict:
        found.append(f"verdict: {one.verdict} against {two.verdict}")
    if (one.cause, one.service) != (two.cause, two.service):
        found.append(f"first cause: {_named(one)} against {_named(two)}")
    elif abs(one.posterior - two.posterior) > POSTERIOR_DIFFERS:
        found.append(f"posterior: {one.posterior:.2f} against {two.posterior:.2f}")
    orders = [[(h.cause, h.service) for h in d.hypotheses[1:SHOWN]] for d in (a, b)]
    if orders[0] != orders[1]:
        found.append("the causes that follow, or their order")
    proposed = [d.best.proposals if d.best is not None else () for d in (a, b)]
    if [(p.action, p.params) for p in proposed[0]] != [(p.action, p.params) for p in proposed[1]]:
        found.append("what is proposed")
    return tuple(found)


def _named(answer: Answered) -> str:
    return f"{answer.cause} on {answer.service}" if answer.cause else "none"


def sound(diagnosis: Diagnosis) -> str:
    """Why an answer that came from outside is nonsense, "" when it is not."""
    posteriors = [h.posterior for h in diagnosis.hypotheses]
    numbers = [*posteriors, *(h.confidence for h in diagnosis.hypotheses)]
    if not all(math.isfinite(n) and 0 <= n <= 1 for n in numbers):
        return "a posterior or confidence is no number from 0 to 1"
    if math.fsum(posteriors) > 1 + 1e-6:
        return f"posteriors sum to {math.fsum(posteriors):.3f}"
    # The first is the likeliest; those after it stand by what else speaks for their service.
    if diagnosis.clear and posteriors and posteriors[0] < max(posteriors):
        return "hypotheses are not in order"
    if diagnosis.verdict == "ranked" and not diagnosis.hypotheses:
        return "ranked, without a hypothesis"
    if any(not h.cause or len(h.cause) > 256 or len(h.service) > 1024 for h in diagnosis.hypotheses):
        return "a hypothesis without a cause, or with a name that is too long"
    return ""


class Board(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Judged pairs of one pair of versions: how often both, one alone, or neither was right."""

    a_version: str = ""
    b_version: str = ""
    both: int = 0
    a_only: int = 0
    b_only: int = 0
    neither: int = 0

    @property
    def judged(self) -> int:
        return self.both + self.a_only + self.b_only + self.neither


def right(truth: tuple[str, str], a: Answered, b: Answered) -> Right:
    """`truth` is (cause, service). No answer is a wrong answer."""
    good = [x.status == "ok" and (x.cause, x.service) == truth for x in (a, b)]
    if good[0]:
        return "both" if good[1] else "a"
    return "b" if good[1] else "neither"


def mcnemar(a_only: int, b_only: int) -> float:
    """Exact two-sided p-value of "neither channel is better": twice the tail of Binomial(n, 1/2), at most 1."""
    n = a_only + b_only
    tail = sum(math.comb(n, k) for k in range(min(a_only, b_only) + 1))
    return min(1.0, float(2 * tail / 2**n))


def evidence_ratio(a_only: int, b_only: int) -> float:
    """How much likelier the discordant pairs are when one channel is better by an unknown amount (uniform prior on its
    share p) than when p = 1/2: 2^n / ((n+1) C(n, b)). Under the latter it ever reaches 1/alpha with chance alpha at
    most (Ville 1939), however often one looks."""
    n = a_only + b_only
    return 2.0**n / ((n + 1) * math.comb(n, b_only)) if n < 1000 else math.exp(_log_ratio(n, b_only))


def _log_ratio(n: int, k: int) -> float:
    log_choose = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return min(700.0, n * math.log(2) - math.log(n + 1) - log_choose)


def decision(board: Board, alpha: float = ALPHA) -> Decision:
    """Which channel is better, as far as can be said already."""
    if evidence_ratio(board.a_only, board.b_only) < 1 / alpha:
        return "undecided"
    return "a" if board.a_only > board.b_only else "b"


def interval(board: Board, z: float = 1.959964) -> tuple[float, float, float]:
    """(difference in accuracy of B against A, lower, upper bound), 95 %: Agresti and Min 2005, half an observation
    added to each cell, cut to [-1, 1]. The difference itself is (b_only - a_only) / n, 0 without pairs."""
    n = board.judged
    if not n:
        return 0.0, -1.0, 1.0
    b, c, m = board.a_only + 0.5, board.b_only + 0.5, n + 2
    centre = (c - b) / m
    half = z * math.sqrt((b + c) - (c - b) ** 2 / m) / m
    return (board.b_only - board.a_only) / n, max(-1.0, centre - half), min(1.0, centre + half)
