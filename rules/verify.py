"""Has it recovered? Asked by `agent.verify` after an action, answered by the very series that justified the action.

`justification_of` writes down, before anything is done, which series spoke for the hypothesis and what would count as
recovery; it is journalled with the plan. `judge` compares fresh evidence with it. Missing data is never recovery.
Nothing here reads a clock or the network.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec
import numpy as np

from rules.diagnose import observe
from rules.engine import graph_of
from rules.evidence import Observer
from rules.features import WEAK, Finding
from rules.model import Fact, FloatArray, Hypothesis, SeriesId, Situation
from rules.packs import PackSet, Signal


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
    """`recovered` only if every check is `within` and a series was among them: that a process is gone does not tell
    that anybody is better off."""

    recovered: bool
    text: str
    checked: tuple[Check, ...] = ()


SYMPTOM_LEFT = 0.1  # of a symptom's excess may remain
SUPPORT_LEFT = 0.5  # of a supporting series' excess: the machine has other work too
CLEAR_OF_LIMIT = 0.9  # of its limit is enough for what had reached it: a full disk is well again at 80 %
SAMPLES = 3
_BAD = ("strong", "weak", "silent")


def justification_of(situation: Situation, hypothesis: Hypothesis, packs: PackSet) -> Justification:
    """The symptom series of the entry service and the hypothesis' supporting series and facts, with their bounds.

    Symptoms are the bad or silent series of the symptom groups at the entry service. Supports are what the evidence
    groups with a positive contribution rest on. A bound is `baseline + max(3 scales, share of the excess)` towards the
    bad side, the share being a tenth for symptoms and half for supports.
    """
    observer = observe(situation, packs)
    cause = packs.causes.get(hypothesis.cause)
    series = _symptoms(observer)
    facts: dict[tuple[str, str], WatchedFact] = {}
    for line in cause.evidence if cause is not None else ():
        seen = observer.observe(hypothesis.service, line.group, line.at)
        given = line.states.get(seen.state) if seen.state in _BAD else None
        if given is None or given[0] <= given[1] or not packs.groups[line.group].watch:
            continue
        for finding in seen.findings:
            _watch(series, finding, packs.signals[finding.signal], "support")
        for fact in _together(seen.facts):
            facts[fact.kind, fact.subject] = WatchedFact(
                kind=fact.kind, subject=fact.subject, service=fact.service, group=line.group
            )
    return Justification(
        entry=situation.entry,
        service=hypothesis.service,
        cause=hypothesis.cause,
        onset=situation.onset,
        series=tuple(series[s] for s in sorted(series, key=lambda s: (s.metric, s.labels))),
        facts=tuple(facts[k] for k in sorted(facts)),
        samples=SAMPLES,
    )


def symptoms_of(situation: Situation, packs: PackSet) -> Justification:
    """The bad or silent symptom series of the entry service alone: what recovery means while there is no hypothesis."""
    series = _symptoms(observe(situation, packs))
    return Justification(
        entry=situation.entry,
        service=situation.entry,
        cause="",
        onset=situation.onset,
        series=tuple(series[s] for s in sorted(series, key=lambda s: (s.metric, s.labels))),
        samples=SAMPLES,
    )


def judge(justification: Justification, now: Situation, packs: PackSet, since: float = 0.0) -> Verdict:
    """Whether all that justified the action is back within bounds. `now.onset` is not used; only samples later than
    `since` (the end of the action) count."""
    rows = {s: (f.times, f.values[i]) for e in now.evidence for f in (e.frame,) for i, s in enumerate(f.ids)}
    checks = [
        _check_series(w, rows.get(SeriesId(w.metric, w.labels)), justification.samples, since, now.until)
        for w in justification.series
    ]
    observer = Observer(now, packs, (), graph_of(now, packs, ()))
    checks += [_check_fact(w, observer) for w in justification.facts]
    bad = [c for c in checks if c.state != "within"]
    recovered = bool(justification.series) and not bad
    return Verdict(recovered=recovered, text=_text(checks, bad), checked=tuple(checks))


def _symptoms(observer: Observer) -> dict[SeriesId, WatchedSeries]:
    packs, series = observer.packs, dict[SeriesId, WatchedSeries]()
    for finding in observer.findings:
        if finding.service == observer.graph.entry and packs.groups[finding.group].symptom:
            _watch(series, finding, packs.signals[finding.signal], "symptom")
    return series


def _together(facts: tuple[Fact, ...]) -> tuple[Fact, ...]:
    """The leading fact and what shares its process group: others in the same state are not what the action is for."""
    group = facts[0].attributes.get("pgid") if facts else None
    return tuple(f for i, f in enumerate(facts) if i == 0 or (group is not None and f.attributes.get("pgid") == group))


def _watch(
    watched: dict[SeriesId, WatchedSeries], finding: Finding, signal: Signal, role: Literal["symptom", "support"]
) -> None:
    """Adds a bad or silent series. A series that is a symptom stays one; a series without a baseline has no bounds."""
    if finding.series in watched or not (finding.bad or finding.direction == "silent"):
        return
    if not math.isfinite(finding.baseline) or not math.isfinite(finding.scale):
        if signal.limit is None:
            return
        baseline, scale = signal.limit, 0.0
    else:
        baseline, scale = finding.baseline, finding.scale
    silent = finding.direction == "silent" or not math.isfinite(finding.level)
    down = signal.bad == "down" or (signal.bad == "both" and not silent and finding.level < baseline)
    excess = 0.0 if silent else abs(finding.level - baseline)
    slack = max(WEAK * scale, (SYMPTOM_LEFT if role == "symptom" else SUPPORT_LEFT) * excess)
    bound = baseline - slack if down else baseline + slack
    if role == "support" and signal.kind == "saturation" and signal.limit is not None and not down:
        bound = max(bound, CLEAR_OF_LIMIT * signal.limit)
    watched[finding.series] = WatchedSeries(
        metric=finding.series.metric,
        labels=finding.series.labels,
        role=role,
        direction="down" if down else "up",
        baseline=baseline,
        scale=scale,
        level=None if silent else finding.level,
        threshold=bound,
    )


def _check_series(
    watched: WatchedSeries, row: tuple[FloatArray, FloatArray] | None, samples: int, since: float, until: float
) -> Check:
    """The last `samples` samples after `since`, none of them older than twice as many steps, all within bounds."""
    subject = str(SeriesId(watched.metric, watched.labels))
    fresh = np.empty(0)
    if row is not None:
        times, values = row
        use = (times > since) & (times <= until)
        recent = values[use][-2 * samples :]
        fresh = recent[np.isfinite(recent)][-samples:]
        if recent.shape[0] and not np.isfinite(recent[-samples:]).any():
            fresh = np.empty(0)
    if fresh.shape[0] < samples:
        return Check(subject=subject, role=watched.role, state="missing", threshold=watched.threshold)
    worst = float(fresh.min() if watched.direction == "down" else fresh.max())
    within = worst >= watched.threshold if watched.direction == "down" else worst <= watched.threshold
    return Check(
        subject=subject,
        role=watched.role,
        state="within" if within else "beyond",
        value=worst,
        threshold=watched.threshold,
    )


def _check_fact(watched: WatchedFact, observer: Observer) -> Check:
    """Gone is cured, if the source looked at all; still there is cured once it no longer looks bad. A listener is the
    other way round: it must be seen again."""
    group = observer.packs.groups.get(watched.group)
    subject = f"{watched.kind} {watched.subject}"
    if group is None or group.facts is None or not observer.looked(group.facts.evidence):
        return Check(subject=subject, role="support", state="missing")
    found = [f for f in observer.situation.facts(watched.kind) if f.subject == watched.subject]
    if not found:
        gone_is_cure = watched.kind == "host.process"
        return Check(subject=subject, role="support", state="within" if gone_is_cure else "missing")
    state = observer.fact_state(found[0], group.facts)
    return Check(subject=subject, role="support", state="beyond" if state in ("strong", "weak") else "within")


def _text(checks: list[Check], bad: list[Check]) -> str:
    """One sentence for the story, naming up to three things that are not well."""
    if not bad and not any(c.threshold is not None for c in checks):
        return "Nothing to verify by: no series justified the action, so no series can tell that it helped."
    if not bad:
        return f"All {len(checks)} series and facts that justified the action are back within bounds."
    told = [f"{c.subject} has no samples" if c.state == "missing" else f"{c.subject} is {_shown(c)}" for c in bad[:3]]
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    return f"Not recovered, {len(bad)} of {len(checks)} checks fail: {'; '.join(told)}{more}."


def _shown(check: Check) -> str:
    return "still there" if check.value is None else f"{check.value:.4g}, beyond {check.threshold:.4g}"
