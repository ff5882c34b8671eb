"""What the runs say: a summary for programs, gauges for Prometheus. `agent.chaos.page` shows it to people.

Called by `alertmedic chaos report` and at the end of `chaos run`. It judges nothing anew: what was right in a run was
decided when it was made (`agent.chaos.follow`, `agent.chaos.aftermath`). Runs whose world did not do what the scenario
says ("void") count nowhere but in their own list; runs in which the agent was killed are no part of the comparison and
are told apart from it. Every miss is listed with its story.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from agent.chaos.measure import (
    CAP_SECONDS,
    Run,
    mean,
    paired_difference,
    percentile,
    reduction,
    restricted_mean,
    share,
)
from agent.demo.report import rfc3339

OURS = ("auto", "approve")
STAGES = ("degraded", "alert", "acknowledged", "diagnosed", "acted", "recovered")
REFERENCES = ("nothing", "liveness", "command")
# What the figures are held against; fixed beforehand.
LEAST_REDUCTION, LEAST_TOP1, LEAST_HEALED = 0.68, 0.95, 0.95


def counting(runs: Sequence[Run]) -> list[Run]:
    """Runs that prove something."""
    return [r for r in runs if not r.void]


def harmful(run: Run) -> tuple[str, ...]:
    """What an agent's arm did that it should not have done."""
    return (*run.wrong, *run.needless)


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything that is claimed, with counts and intervals; null where there is nothing to estimate from."""
    every = counting(runs)
    kept, killed = [r for r in every if not r.killed_agent], [r for r in every if r.killed_agent]
    arms = {arm: [r for r in kept if r.arm == arm] for arm in dict.fromkeys(r.arm for r in kept)}
    against = {
        f"{ours}/{other}": _against(arms[ours], arms[other])
        for ours in OURS
        for other in REFERENCES
        if ours in arms and other in arms
    }
    told = {arm: _arm(of) for arm, of in arms.items()}
    return {
        "cap_seconds": CAP_SECONDS,
        "runs": len(runs),
        "void": len(runs) - len(every),
        "made_by": sorted({r.made_by for r in runs if r.made_by}),
        "first_at": rfc3339(min(r.at for r in runs)) if runs else None,
        "last_at": rfc3339(max(r.at for r in runs)) if runs else None,
        "aims": _aims(told, against, killed),
        "arms": told,
        "against": against,
        "scenarios": {name: _scenario(name, kept) for name in dict.fromkeys(r.scenario for r in kept)},
        "killed_agent": _killed(killed),
        "misses": [_miss(r) for r in every if _missed(r)],
        "voids": [
            {"scenario": r.scenario, "arm": r.arm, "repetition": r.repetition, "why": r.void} for r in _void(runs)
        ],
    }


def _aims(arms: Mapping[str, Any], against: Mapping[str, Any], killed: Sequence[Run]) -> list[dict[str, Any]]:
    """What is claimed of `auto`, each with what was found: a number, and whether it is enough (None: not measured)."""
    found: list[dict[str, Any]] = []

    def aim(what: str, value: float | None, least: float | None = None, of: str = "") -> None:
        met = None if value is None else value == 0 if least is None else value >= least
        found.append({"what": what, "found": value, "least": least, "of": of, "met": met})

    for other in ("liveness", "command"):
        value = against.get(f"auto/{other}", {}).get("reduction_healable", {})
        low, high = (value.get(k) for k in ("low", "high"))
        interval = "" if low is None or high is None else f"{low:.0%} to {high:.0%}"
        aim(f"less time out of bounds than {other}, healable faults", value.get("value"), LEAST_REDUCTION, interval)
    auto = arms.get("auto")
    if auto is not None:
        for what, key, least in (
            ("the true cause first", "top1", LEAST_TOP1),
            ("healed of the healable", "healed_of_healable", LEAST_HEALED),
        ):
            aim(what, auto[key]["share"], least, f"{auto[key]['hits']} of {auto[key]['of']}")
        aim("wrong or needless actions", auto["wrong_actions"] + auto["needless_actions"])
        aim("steps done twice", auto["repeated"])
    told = _killed(killed)
    if told["runs"]:
        healed = told["healed_of_healable"]
        aim("healed, the agent killed", healed["share"], LEAST_HEALED, f"{healed['hits']} of {healed['of']}")
        aim("steps done twice, the agent killed", told["repeated"])
    return found


def _killed(runs: Sequence[Run]) -> dict[str, Any]:
    """The runs in which the agent was killed at a random moment."""
    healable = [r for r in runs if r.healed_by == "action"]
    return {
        "runs": len(runs),
        "killed": sum(r.killed_at is not None for r in runs),
        "before_diagnosis": sum(
            r.killed_at is not None and (r.diagnosed is None or r.killed_at < r.diagnosed) for r in runs
        ),
        "before_recovery": sum(
            r.killed_at is not None and (r.recovered is None or r.killed_at < r.recovered) for r in runs
        ),
        "healed_of_healable": share(sum(r.healed for r in healable), len(healable)),
        "repeated": sum(len(r.repeated) for r in runs),
        "wrong_or_needless": sum(len(harmful(r)) for r in runs),
        "each": [
            {
                "scenario": r.scenario,
                "repetition": r.repetition,
                "killed_at": r.killed_at,
                "diagnosed": r.diagnosed,
                "acted": r.acted,
                "recovered": r.recovered,
                "actions": list(r.actions),
                "repeated": list(r.repeated),
            }
            for r in runs
        ],
    }


def _void(runs: Sequence[Run]) -> list[Run]:
    return [r for r in runs if r.void]


def broken(runs: Sequence[Run]) -> list[Run]:
    """Runs in which something was broken that does not mend itself within moments."""
    return [r for r in runs if r.healed_by not in ("itself", "nothing_wrong")]


def _arm(runs: Sequence[Run]) -> dict[str, Any]:
    faulty = broken(runs)
    healable = [r for r in faulty if r.healed_by == "action"]
    named = [r for r in faulty if r.arm in OURS]
    return {
        "runs": len(runs),
        "restricted_mean_seconds": restricted_mean(faulty).plain(),
        "restricted_mean_seconds_healable": restricted_mean(healable).plain(),
        "recovered": share(sum(r.healed for r in faulty), len(faulty)),
        "healed_of_healable": share(sum(r.healed for r in healable), len(healable)),
        "top1": share(sum(r.rank == 1 for r in named), len(named)),
        "top3": share(sum(r.rank is not None and r.rank <= 3 for r in named), len(named)),
        "wrong_actions": sum(len(r.wrong) for r in runs),
        "needless_actions": sum(len(r.needless) for r in runs),
        "controls": len(runs) - len(faulty),
        "collateral": round(mean([r.collateral for r in runs]), 4) if runs else None,
        "undone": sum(r.undone for r in runs),
        "repeated": sum(len(r.repeated) for r in runs),
        "stages": {stage: _stage([t for r in faulty if (t := getattr(r, stage)) is not None]) for stage in STAGES},
    }


def _stage(times: Sequence[float]) -> dict[str, Any]:
    return {"mean": _rounded(mean(times)), "p95": _rounded(percentile(times, 0.95)), "of": len(times)}


def _against(ours: Sequence[Run], theirs: Sequence[Run]) -> dict[str, Any]:
    a, b = broken(ours), broken(theirs)
    healable = [r for r in a if r.healed_by == "action"]
    return {
        "reduction": reduction(a, b).plain(),
        "reduction_healable": reduction(healable, b).plain(),
        "paired_difference_seconds": paired_difference(a, b).plain(),
    }


def _scenario(name: str, runs: Sequence[Run]) -> dict[str, Any]:
    of = [r for r in runs if r.scenario == name]
    return {
        "kind": of[0].kind,
        "healed_by": of[0].healed_by,
        "arms": {
            arm: {
                "seconds": [round(r.time(), 1) for r in mine],
                "mean": _rounded(mean([r.time() for r in mine])),
                "recovered": sum(r.healed for r in mine),
                "of": len(mine),
                "tops": sorted({r.top[0] for r in mine if r.top}),
                "actions": sorted({a for r in mine for a in r.actions}),
            }
            for arm in dict.fromkeys(r.arm for r in of)
            if (mine := [r for r in of if r.arm == arm])
        },
    }


def _faults(run: Run) -> list[str]:
    """In what the agent fell short in this run, in words."""
    if run.arm not in OURS:
        return []
    found = [f"{what} {'was wrong' if what in run.wrong else 'was needless'}" for what in harmful(run)]
    found += [f"done twice: {what}" for what in run.repeated]
    if run.healed_by in ("itself", "nothing_wrong"):
        return found
    if run.rank != 1:
        place = "nowhere" if run.rank is None else f"at place {run.rank}"
        first = f"first was {run.top[0]}" if run.top else f"no cause was named ({run.answer or 'no diagnosis'})"
        found.append(f"the true cause stood {place}: {first}")
    if run.healed_by == "action" and not run.healed:
        did = f"it did {', '.join(run.actions)}" if run.actions else "it did nothing"
        found.append(f"not healed within {CAP_SECONDS:g} s: {did}, and ended {run.outcome or 'without an incident'}")
    return found


def _missed(run: Run) -> bool:
    return bool(_faults(run))


def _miss(run: Run) -> dict[str, Any]:
    stages = {stage: getattr(run, stage) for stage in STAGES}
    return {
        "scenario": run.scenario,
        "arm": run.arm,
        "repetition": run.repetition,
        "killed_at": run.killed_at,
        "why": _faults(run),
        "truth": list(run.truth),
        "answer": run.answer,
        "top": list(run.top),
        "actions": list(run.actions),
        "wrong_or_needless": list(harmful(run)),
        "stages": stages,
        "outcome": run.outcome,
        "story": list(run.story),
    }


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 2)


def metrics(runs: Sequence[Run]) -> bytes:
    """The same as a Prometheus text file (for a textfile collector): one family a measure."""
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

    registry = CollectorRegistry()
    labels = ("scenario", "inject_type", "recovery_strategy")
    p95 = Gauge("mttr_p95", "95th percentile of seconds out of bounds, at most the cap", labels, registry=registry)
    attempts = Counter("recovery_attempts", "Actions begun, by what became of the run", ("status",), registry=registry)
    buckets = (1, 2, 5, 10, 15, 20, 30, 45, 60, 90, CAP_SECONDS)
    duration = Histogram(
        "recovery_duration_seconds", "Seconds from fault to recovery", labels, buckets=buckets, registry=registry
    )
    undone = Gauge("rollback_success_rate", "Undone steps that ended undone", registry=registry)
    kept = counting(runs)
    for key in dict.fromkeys((r.scenario, r.kind, r.arm) for r in broken(kept)):
        mine = [r for r in broken(kept) if (r.scenario, r.kind, r.arm) == key]
        p95.labels(*key).set(percentile([r.time() for r in mine], 0.95))
        for run in mine:
            if run.recovered is not None:
                duration.labels(*key).observe(run.recovered)
    for run in kept:
        if run.attempts:
            attempts.labels("recovered" if run.healed else "not_recovered").inc(run.attempts)
    failed = sum("undo_failed" in line for r in kept for line in r.story)
    total = failed + sum(r.undone for r in kept)
    undone.set(1.0 - failed / total if total else math.nan)
    return generate_latest(registry)
