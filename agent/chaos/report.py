"""What the runs say: a summary for programs, a page for people, gauges for Prometheus.

Called by `alertmedic chaos report` and at the end of `chaos run`. It judges nothing anew: what was right in a run was
decided when it was made (`agent.chaos.follow`). Runs whose world did not do what the scenario says ("void") count
nowhere but in their own list, and every miss is listed with its story.
"""

from __future__ import annotations

import html
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
COLOURS = {"nothing": "#9aa0a6", "liveness": "#c58af9", "command": "#f29900", "auto": "#1a7f37", "approve": "#1967d2"}
STAGES = ("degraded", "alert", "acknowledged", "diagnosed", "acted", "recovered")
WIDTH, ROW = 900, 22
WRONG = "wrong or needless"


def counting(runs: Sequence[Run]) -> list[Run]:
    """Runs that prove something."""
    return [r for r in runs if not r.void]


def harmful(run: Run) -> tuple[str, ...]:
    """What an agent's arm did that it should not have done."""
    return (*run.wrong, *run.needless)


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything that is claimed, with counts and intervals; null where there is nothing to estimate from."""
    kept = counting(runs)
    arms = {arm: [r for r in kept if r.arm == arm] for arm in dict.fromkeys(r.arm for r in runs)}
    return {
        "cap_seconds": CAP_SECONDS,
        "runs": len(runs),
        "void": len(runs) - len(kept),
        "killed_agent": sum(r.killed_agent for r in runs),
        "first_at": rfc3339(min(r.at for r in runs)) if runs else None,
        "last_at": rfc3339(max(r.at for r in runs)) if runs else None,
        "arms": {arm: _arm(of) for arm, of in arms.items()},
        "against": {
            f"{ours}/{other}": _against(arms[ours], arms[other])
            for ours in OURS
            for other in ("nothing", "liveness", "command")
            if ours in arms and other in arms
        },
        "scenarios": {name: _scenario(name, kept) for name in dict.fromkeys(r.scenario for r in kept)},
        "misses": [_miss(r) for r in kept if _missed(r)],
        "voids": [
            {"scenario": r.scenario, "arm": r.arm, "repetition": r.repetition, "why": r.void} for r in _void(runs)
        ],
    }


def _void(runs: Sequence[Run]) -> list[Run]:
    return [r for r in runs if r.void]


def _broken(runs: Sequence[Run]) -> list[Run]:
    """Runs in which something was broken that does not mend itself within moments."""
    return [r for r in runs if r.healed_by not in ("itself", "nothing_wrong")]


def _arm(runs: Sequence[Run]) -> dict[str, Any]:
    broken = _broken(runs)
    healable = [r for r in broken if r.healed_by == "action"]
    named = [r for r in broken if r.arm in OURS]
    return {
        "runs": len(runs),
        "restricted_mean_seconds": restricted_mean(broken).plain(),
        "restricted_mean_seconds_healable": restricted_mean(healable).plain(),
        "recovered": share(sum(r.healed for r in broken), len(broken)),
        "healed_of_healable": share(sum(r.healed for r in healable), len(healable)),
        "top1": share(sum(r.rank == 1 for r in named), len(named)),
        "top3": share(sum(r.rank is not None and r.rank <= 3 for r in named), len(named)),
        "wrong_actions": sum(len(r.wrong) for r in runs),
        "needless_actions": sum(len(r.needless) for r in runs),
        "controls": len(runs) - len(broken),
        "collateral": round(mean([r.collateral for r in runs]), 4) if runs else None,
        "undone": sum(r.undone for r in runs),
        "stages": {stage: _stage([t for r in broken if (t := getattr(r, stage)) is not None]) for stage in STAGES},
    }


def _stage(times: Sequence[float]) -> dict[str, Any]:
    return {"mean": _rounded(mean(times)), "p95": _rounded(percentile(times, 0.95)), "of": len(times)}


def _against(ours: Sequence[Run], theirs: Sequence[Run]) -> dict[str, Any]:
    a, b = _broken(ours), _broken(theirs)
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


def _missed(run: Run) -> bool:
    """Whether the agent fell short in this run: a wrong or needless action, the wrong cause, or nothing healed."""
    if run.arm not in OURS:
        return False
    if harmful(run):
        return True
    if run.healed_by in ("itself", "nothing_wrong"):
        return False
    return run.rank != 1 or (run.healed_by == "action" and not run.healed)


def _miss(run: Run) -> dict[str, Any]:
    return {
        "scenario": run.scenario,
        "arm": run.arm,
        "repetition": run.repetition,
        "answer": run.answer,
        "top": list(run.top),
        "actions": list(run.actions),
        WRONG.replace(" ", "_"): list(harmful(run)),
        "recovered": run.recovered,
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
    for key in dict.fromkeys((r.scenario, r.kind, r.arm) for r in _broken(kept)):
        mine = [r for r in _broken(kept) if (r.scenario, r.kind, r.arm) == key]
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


# -- the page ----------------------------------------------------------------------------------------------------------

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:960px;margin:2em auto;padding:0 1em;color:#1f2328}
table{border-collapse:collapse;margin:1em 0;width:100%}td,th{padding:.3em .6em;border-bottom:1px solid #d0d7de;
text-align:right}td:first-child,th:first-child{text-align:left}.bad{color:#b42318;font-weight:600}
pre{background:#f6f8fa;padding:.8em;overflow:auto;font-size:12px}svg{max-width:100%}summary{cursor:pointer}
"""


def page(runs: Sequence[Run]) -> str:
    """One HTML file that needs nothing else: tables, the share still broken over time, every scenario, every miss."""
    told = summary(runs)
    kept = _broken(counting(runs))
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Time to recovery</title>",
        f"<style>{_STYLE}</style><h1>Time to recovery</h1>",
        f"<p>{told['runs']} runs ({told['void']} void) from {_text(told['first_at'])} to {_text(told['last_at'])}; "
        f"restricted means with a cap of {CAP_SECONDS:g} s; intervals are 95 % bootstrap intervals over scenarios.</p>",
        _arms_table(told["arms"]),
        _against_table(told["against"]),
        "<h2>Share of faults still hurting, by seconds after the fault</h2>",
        _curves(kept),
        "<h2>Every scenario</h2><p>One mark a run: seconds out of bounds.</p>",
        _dots(kept),
        f"<h2>Misses ({len(told['misses'])})</h2>",
        *(_miss_html(m) for m in told["misses"]),
    ]
    if told["voids"]:
        rows = "".join(
            f"<tr><td>{_text(v['scenario'])}<td>{_text(v['arm'])}<td>{_text(v['why'])}" for v in told["voids"]
        )
        parts.append(f"<h2>Void runs</h2><table><tr><th>scenario<th>arm<th>why{rows}</table>")
    return "\n".join(parts) + "</html>\n"


def _text(value: object) -> str:
    return html.escape(str(value))


def _interval(value: Mapping[str, Any], unit: str = "", scale: float = 1.0) -> str:
    if value["value"] is None:
        return "-"
    low, mid, high = (f"{value[k] * scale:.1f}" for k in ("low", "value", "high"))
    return f"{mid}{unit} ({low} to {high})"


def _share(value: Mapping[str, Any]) -> str:
    return "-" if not value["of"] else f"{value['hits']} of {value['of']}"


def _arms_table(arms: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{_text(name)}<td>{_interval(a['restricted_mean_seconds'], ' s')}"
        f"<td>{_interval(a['restricted_mean_seconds_healable'], ' s')}<td>{_share(a['healed_of_healable'])}"
        f"<td>{_share(a['top1'])}<td>{_share(a['top3'])}<td>{a['wrong_actions']}<td>{a['needless_actions']}"
        f"<td>{(a['collateral'] or 0) * 100:.1f} %"
        for name, a in arms.items()
    )
    head = "arm<th>mean, all<th>mean, healable<th>healed<th>top 1<th>top 3<th>wrong<th>needless<th>collateral"
    return f"<table><tr><th>{head}{rows}</table>"


def _against_table(against: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{_text(pair)}<td>{_interval(a['reduction'], ' %', 100)}"
        f"<td>{_interval(a['reduction_healable'], ' %', 100)}"
        f"<td>{_interval(a['paired_difference_seconds'], ' s')} over {a['paired_difference_seconds']['cases']}"
        for pair, a in against.items()
    )
    head = "arms<th>less time out of bounds<th>the same, healable<th>difference where both healed"
    return f"<table><tr><th>{head}{rows}</table>" if rows else ""


def _curves(runs: Sequence[Run]) -> str:
    """Step curves, one an arm (Kaplan-Meier without other censoring than the cap)."""
    height, left, below = 260, 40, 24

    def x(t: float) -> float:
        return left + (WIDTH - left - 10) * t / CAP_SECONDS

    def y(s: float) -> float:
        return 10 + (height - 10 - below) * (1 - s)

    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img">']
    for tick in range(0, int(CAP_SECONDS) + 1, 20):
        parts.append(f'<text x="{x(tick):.0f}" y="{height - 6}" font-size="11" text-anchor="middle">{tick}</text>')
    for s in (0.0, 0.5, 1.0):
        parts.append(f'<line x1="{left}" x2="{WIDTH - 10}" y1="{y(s):.0f}" y2="{y(s):.0f}" stroke="#d0d7de"/>')
        parts.append(f'<text x="4" y="{y(s) + 4:.0f}" font-size="11">{s * 100:.0f} %</text>')
    for number, arm in enumerate(dict.fromkeys(r.arm for r in runs)):
        mine = [r for r in runs if r.arm == arm]
        ends = sorted(r.time() for r in mine if r.time() < CAP_SECONDS)
        points, at = [(0.0, 1.0)], 1.0
        for n, t in enumerate(ends, 1):
            points += [(t, at), (t, at := 1 - n / len(mine))]
        points.append((CAP_SECONDS, at))
        line = " ".join(f"{x(t):.1f},{y(s):.1f}" for t, s in points)
        colour = COLOURS.get(arm, "#000")
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(
            f'<text x="{WIDTH - 90}" y="{24 + 15 * number}" font-size="12" fill="{colour}">{_text(arm)}</text>'
        )
    return "".join(parts) + "</svg>"


def _dots(runs: Sequence[Run]) -> str:
    names = list(dict.fromkeys(sorted(r.scenario for r in runs)))
    left, height = 210, ROW * (len(names) + 1)

    def x(t: float) -> float:
        return left + (WIDTH - left - 20) * t / CAP_SECONDS

    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img">']
    for number, name in enumerate(names):
        y = ROW * number + 14
        parts.append(f'<line x1="{left}" x2="{WIDTH - 20}" y1="{y}" y2="{y}" stroke="#eaeef2"/>')
        parts.append(f'<text x="0" y="{y + 4}" font-size="12">{_text(name)}</text>')
        for run in (r for r in runs if r.scenario == name):
            shift = (list(COLOURS).index(run.arm) - 2) * 2.5 if run.arm in COLOURS else 0
            parts.append(
                f'<circle cx="{x(run.time()):.1f}" cy="{y + shift:.1f}" r="3.5" fill="{COLOURS.get(run.arm, "#000")}" '
                f'fill-opacity=".75"><title>{_text(run.arm)}: {run.time():.1f} s</title></circle>'
            )
    for t in range(0, int(CAP_SECONDS) + 1, 20):
        parts.append(f'<text x="{x(t):.0f}" y="{height - 4}" font-size="11" text-anchor="middle">{t} s</text>')
    return "".join(parts) + "</svg>"


def _miss_html(miss: Mapping[str, Any]) -> str:
    harm = miss[WRONG.replace(" ", "_")]
    first = (miss["top"] or ["nothing"])[0]
    head = f"{miss['scenario']}, {miss['arm']}, repetition {miss['repetition']}: first was {first}"
    bad = f" <span class=bad>{WRONG}: {_text(', '.join(harm))}</span>" if harm else ""
    story = "\n".join(miss["story"])
    return f"<details><summary>{_text(head)}{bad}</summary><pre>{_text(story)}</pre></details>"
