"""What to ask about an alert nobody wrote a pack for, and what its parts tell.

`questions` is called by `agent.situation` for the alert that an incident begins with; `with_parts` by `rules.diagnose`
for every situation. The signals that the answers are, and the causes that they speak for, are those of the pack
`alert`, which is a fallback: what a specific pack explains stays with it.

From the alert's own expression, bound to the alert's labels (each equal or absent, so that a selector which lacks a
label is not lost): what is compared, by itself and as a part of its threshold; numerator and denominator of a ratio;
the same for its siblings; its parts, series by series, without aggregation. From its labels alone: whether its
targets answer, restarts, rollouts and versions, requests, and the saturation of its host.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rules.drilldown import POWER, Drilldown, drill
from rules.expression import (
    Expression,
    ExpressionError,
    difference,
    division_of,
    has_alternatives,
    innermost,
    is_absence,
    rendered,
    walk,
)
from rules.model import Evidence, Fact, FloatArray, Frame, Situation
from rules.packs import EvidenceQuery
from rules.seasons import aligned, pasts_of

PARTS, PARTS_TOTAL, PEERS = "alert_parts", "alert_parts_total", "alert_peers"
PARTS_OF_ALERT = frozenset({PARTS, PARTS_TOTAL, PEERS})
DRILLDOWN = "alert.drilldown"  # evidence and kind of fact
SEASON = 0.2  # of the change that an earlier day must have had for it to count
MAX_BOUND = 16  # labels of an alert that queries are bound by
WIDE = frozenset({"job", "namespace", "cluster", "service", "app", "env", "environment", "region", "tenant"})
_OWN = frozenset({"alertname", "severity", "alertgroup", "prometheus", "prometheus_replica", "monitor", "replica"})
_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_TARGET = ("job", "instance", "namespace", "pod", "service")
# What a label is about, by the words in its name.
_ABOUT: tuple[tuple[str, frozenset[str]], ...] = (
    ("version", frozenset({"version", "image", "build", "release", "revision", "commit", "tag", "branch"})),
    ("hardware", frozenset({"model", "batch", "sku", "hardware", "firmware", "vendor", "chip", "generation"})),
    (
        "zone",
        frozenset({"zone", "region", "rack", "segment", "subnet", "vlan", "network", "switch", "datacenter", "dc"}),
    ),
    (
        "instance",
        frozenset({"instance", "pod", "node", "host", "hostname", "container", "server", "replica", "target"}),
    ),
)


def questions(
    labels: Mapping[str, str], expression: Expression, rule_labels: Collection[str]
) -> tuple[EvidenceQuery, ...]:
    """The correlated queries of one alert, as templates over its labels. What an expression does not have (a ratio, a
    threshold, siblings) is not asked."""
    bound = [n for n in sorted(labels) if _NAME.fullmatch(n) and not n.startswith("__") and n not in _OWN]
    bound = [n for n in bound if n not in rule_labels and labels[n]][:MAX_BOUND]
    found: dict[str, str] = {}
    try:
        found |= _of_expression(expression, _bind(bound))
        narrow = [n for n in bound if n not in WIDE]
        if narrow and not is_absence(expression.tree):
            found[PEERS] = rendered(expression.comparison.left, _bind([n for n in bound if n in WIDE]))
    except ExpressionError:
        found = {}  # what cannot be written back cannot be asked; the labels still can
    found |= _of_labels([n for n in _TARGET if n in bound], bound)
    return tuple(EvidenceQuery(name=name, query=query) for name, query in sorted(found.items()))


def _bind(names: Collection[str]) -> str:
    return f"$alert({', '.join(f'{name}|?' for name in names)})" if names else ""


def _of_expression(expression: Expression, more: str) -> dict[str, str]:
    comparison = expression.comparison
    left = rendered(comparison.left, more)
    high, low = comparison.op in (">", ">="), comparison.op in ("<", "<=")
    if comparison.op == "==" and comparison.threshold is not None:
        high, low = comparison.threshold > 0, comparison.threshold <= 0
    high = high or is_absence(expression.tree)
    found: dict[str, str] = {}
    if comparison.op and comparison.threshold is None and comparison.node is not None:
        found["alert_value"] = difference(comparison.node, more)
    else:
        found["alert_value_high" if high else "alert_value_low" if low else "alert_value"] = left
    one = not has_alternatives(expression.tree)
    if one and comparison.threshold and comparison.threshold > 0 and comparison.op not in ("==", "!="):
        found["alert_used_high" if high else "alert_used_low"] = f"({left}) / {comparison.threshold!r}"
    ratio = division_of(comparison.left)
    if ratio is not None:
        found["alert_numerator"], found["alert_denominator"] = (rendered(part, more) for part in ratio)
    parts = innermost(ratio[0] if ratio is not None else comparison.left)
    if not is_absence(expression.tree):
        found[PARTS] = rendered(_instant(parts), more)
        if ratio is not None:
            whole = _instant(innermost(ratio[1]))
            apart = sorted(_matched(parts) - _matched(whole))  # by these the numerator is a part of the denominator
            text = rendered(whole, more)
            found[PARTS_TOTAL] = f"sum without ({', '.join(apart)}) ({text})" if apart else text
    return found


def _matched(node: Any) -> set[str]:
    """The labels that the selectors below a node match."""
    selectors = (n for n in walk(node) if type(n).__name__ == "VectorSelector")
    return {m.name for selector in selectors for m in selector.matchers.matchers} - {"__name__"}


def _instant(node: Any) -> Any:
    """A range selector, whose function took something else besides, as the selector itself."""
    return node.vector_selector if type(node).__name__ == "MatrixSelector" else node


def _of_labels(target: list[str], bound: Collection[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    if target:
        where = f"$alert({', '.join(target)})"  # exactly: what lacks these labels is no target of the alert's
        by = ", ".join(target)
        requests = '__name__=~"(.+_)?(requests?|handled|calls)_total|http_server_request_duration_seconds_count"'
        found |= {
            "alert_up": f"min by ({by}) (up{{{where}}})",
            "alert_scrape_seconds": f"max by ({by}) (scrape_duration_seconds{{{where}}})",
            "alert_restarts": f"max by ({by}) (changes(process_start_time_seconds{{{where}}}[15m]))",
            "alert_versions": f'count by (version) ({{__name__=~".+_build_info",{where}}})',
            "alert_traffic": f"sum by (job) (rate({{{requests},{where}}}[$rate]))",
        }
    if "namespace" in bound:
        generation = '__name__=~"kube_(deployment|statefulset|daemonset)_metadata_generation"'
        found |= {
            "alert_container_restarts": "max by (namespace, pod) (increase("
            "kube_pod_container_status_restarts_total{$alert(namespace, pod?)}[10m]))",
            "alert_rollouts": f"max by (namespace) (changes({{{generation},$alert(namespace)}}[30m]))",
        }
    if "instance" in bound or "node" in bound:
        host = "$alert(instance=node/instance@)"
        idle = f'avg by (instance) (rate(node_cpu_seconds_total{{mode="idle",{host}}}[$rate]))'
        memory = f"node_memory_MemAvailable_bytes{{{host}}} / node_memory_MemTotal_bytes{{{host}}}"
        disk = f"rate(node_disk_io_time_seconds_total{{{host}}}[$rate])"
        found |= {
            "alert_host_cpu": f"1 - {idle}",
            "alert_host_memory": f"1 - min by (instance) ({memory})",
            "alert_host_disk": f"max by (instance, device) ({disk})",
        }
    return found


def with_parts(situation: Situation) -> Situation:
    """The situation and what its parts and siblings tell: a fact `alert.drilldown` for the label values that explain
    the change, or for all series having changed alike."""
    frames = _by_name(situation)
    days = [(past, _by_name(past)) for past in pasts_of(situation)]
    facts: list[Fact] = []
    for name in (PARTS, PEERS):
        if name in frames:
            whole = PARTS_TOTAL if name == PARTS else ""
            facts += _facts(name, _drilled(frames[name], frames.get(whole), situation, name, days), situation.entry)
    if not frames.keys() & {PARTS, PEERS}:
        return situation
    found = Evidence(DRILLDOWN, "derived", facts=tuple(facts[:2]))
    return replace(situation, evidence=(*situation.evidence, found))


def _by_name(situation: Situation) -> dict[str, Frame]:
    return {e.name: e.frame for e in situation.evidence if e.missing is None and e.frame.ids}


def _drilled(
    frame: Frame,
    total: Frame | None,
    situation: Situation,
    name: str,
    days: Sequence[tuple[Situation, Mapping[str, Frame]]],
) -> Drilldown:
    """What explains the change beyond what the same time of an earlier day had as well. Where that was two thirds of
    it, nothing is left to explain."""
    labels = [dict(series.labels) for series in frame.ids]
    before, after = _before_and_after(labels, frame, total, situation)
    change = float(np.abs(after - before).sum())
    left, base = change, before
    for past, frames in days:
        then = aligned(frame.ids, [frames[name]]) if name in frames else None
        if then is None:
            continue
        was, came = _before_and_after(labels, then, None if total is None else frames.get(PARTS_TOTAL), past)
        rest = float(np.abs(after - before - (came - was)).sum())
        if float(np.abs(came - was).sum()) >= SEASON * change and rest < left:
            left, base = rest, before + (came - was)
    if left <= (1.0 - POWER) * change:
        return Drilldown(None, 0.0, len(labels))
    return drill(labels, base, after)


def _before_and_after(
    labels: list[dict[str, str]], frame: Frame, total: Frame | None, situation: Situation
) -> tuple[FloatArray, FloatArray]:
    before, after = _levels(frame, situation)
    return (before if total is None else _expected(labels, before, after, total, situation)), after


def _levels(frame: Frame, situation: Situation) -> tuple[FloatArray, FloatArray]:
    """Mean before the onset (its last sixth, as far back as there are samples, and quiet windows left out) and after it
    (its first third left out)."""
    times = frame.times
    seen = times[np.isfinite(frame.values).any(axis=0)]
    begin = float(seen[0] if seen.size else times[0])
    normal = times < situation.onset - (situation.onset - begin) / 6.0
    for start, end in situation.quiet:
        normal &= ~((times >= start) & (times <= end))
    later = (times >= situation.onset + (situation.until - situation.onset) / 3.0) & (times <= situation.until)
    return _mean(frame.values[:, normal]), _mean(frame.values[:, later])


def _mean(values: FloatArray) -> FloatArray:
    """Mean of the finite samples of each row, 0 where there is none."""
    finite = np.isfinite(values)
    count = np.maximum(finite.sum(axis=1), 1)
    return np.asarray(np.where(finite, values, 0.0).sum(axis=1) / count, dtype=np.float64)


def _expected(
    labels: list[dict[str, str]], before: FloatArray, after: FloatArray, total: Frame, situation: Situation
) -> FloatArray:
    """What each numerator would be now at its former ratio, so that a part which only got more traffic explains
    nothing. A numerator belongs to the denominator that agrees with it on all labels which that one has."""
    totals_before, totals_after = _levels(total, situation)
    whole_before, whole = float(before.sum()), float(totals_before.sum())
    overall = whole_before / whole if whole > 0 else 0.0
    names = sorted({name for series in total.ids for name, _ in series.labels} & {n for of in labels for n in of})
    at: dict[tuple[str, ...], list[int]] = {}
    for j, series in enumerate(total.ids):
        at.setdefault(tuple(series.label(name) for name in names), []).append(j)
    expected = before.copy()
    for i, of in enumerate(labels):
        rows = at.get(tuple(of.get(name, "") for name in names), [])
        was, now = float(totals_before[rows].sum()), float(totals_after[rows].sum())
        if rows:
            expected[i] = now * (before[i] / was if was > 0 else overall)
    return expected


def _facts(name: str, found: Drilldown, entry: str) -> list[Fact]:
    of = "its siblings" if name == PEERS else "its parts"
    if found.even:
        attributes: dict[str, str | float | bool] = {"about": "all", "alike": found.alike, "of": float(found.of)}
        return [Fact(DRILLDOWN, f"all of {of}", entry, attributes)]
    best = found.best
    if best is None:
        return []
    attributes = {
        "about": about([name for name, _ in (*best.labels, *best.also)]),
        "explains": round(best.power, 4),
        "fit": round(best.fit, 4),
        "series": float(best.series),
        "of": float(best.of),
    }
    return [Fact(DRILLDOWN, ", ".join(f"{k} {v}" for k, v in best.labels), entry, attributes)]


def about(names: list[str]) -> str:
    """What kind of thing the label names single out: version, hardware, zone, instance, or `part` for any other."""
    words = {word for name in names for word in re.split(r"[_\W]+", name.lower())} | {name.lower() for name in names}
    return next((kind for kind, known in _ABOUT if words & known), "part")
