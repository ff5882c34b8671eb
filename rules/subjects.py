"""What an alert is about, by its own labels, and how a query is bound to them.

An alert carries the identity of what is in trouble: a pod, a node, a scrape target, a queue. That entity is a node of
the incident's graph like a service is, named `kind/value/...` (`pod/shop/orders-0`), so that series and candidates can
live on it. `rules.packs` checks the names, `rules.features` and `rules.engine` place series on nodes, `agent.sources`
fills `$alert(...)`. Labels are data here: nothing is rendered or evaluated.

`$alert(namespace, pod?, pod=deployment*?)` in a query becomes matchers, one an item:

    namespace         label `namespace` of the alert; an alert without it makes the query missing, with that reason
    pod?              the same, but left out where the alert has no such label
    node=instance     label `node` of the series equals label `instance` of the alert
    pod=deployment*   label `pod` begins with the alert's `deployment` and a dash
    instance=node@    label `instance` is the alert's `node`, with or without a port; a port of the alert's is ignored
    pod|              label `pod` is the alert's, or the series has no such label
    instance=node/instance   the first of these labels that the alert has
    instance?!node    left out where the alert has a label `node`
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol, TypeVar

from rules.model import Situation

EXPRESSION_FACT = "alert.expression"
SUBJECT = "subject"
# Entity kind -> the labels that name one. Most specific first: that is how an alert's subject is found.
ENTITIES: dict[str, tuple[str, ...]] = {
    "pod": ("namespace", "pod"),
    "persistentvolumeclaim": ("namespace", "persistentvolumeclaim"),
    "persistentvolume": ("persistentvolume",),
    "deployment": ("namespace", "deployment"),
    "statefulset": ("namespace", "statefulset"),
    "daemonset": ("namespace", "daemonset"),
    "kubejob": ("namespace", "job_name"),
    "autoscaler": ("namespace", "horizontalpodautoscaler"),
    "disruptionbudget": ("namespace", "poddisruptionbudget"),
    "quota": ("namespace", "resourcequota"),
    "queue": ("queue",),
    "node": ("node",),
    "instance": ("instance",),
    "target": ("job",),
    "service": ("service",),
    "namespace": ("namespace",),
    "cluster": ("cluster",),
    "alert": ("alertname",),
}
_ITEM = re.compile(
    r"([a-zA-Z_][a-zA-Z0-9_]*)(?:=([a-zA-Z_][a-zA-Z0-9_/]*))?([*@|]?)(\??)(?:!([a-zA-Z_][a-zA-Z0-9_]*))?"
)


@dataclass(frozen=True, slots=True)
class Binding:
    """One item of `$alert(...)`: series label `label` is matched with the first of the alert's labels `sources` that it
    has: `how` is "" (equal), `*` (begins with it and a dash), `@` (the same host, any port) or `|` (equal or absent).
    An alert that has the label `unless` does not count."""

    label: str
    sources: tuple[str, ...]
    how: str
    optional: bool
    unless: str


def bindings_of(items: str) -> tuple[Binding, ...]:
    """The items between the parentheses of `$alert(...)`. Raises ValueError, with the item that is wrong."""
    found = []
    for item in (part.strip() for part in items.split(",")):
        match = _ITEM.fullmatch(item)
        if match is None or item.startswith("__"):
            raise ValueError(f"$alert: {item!r:.80} is no label, nor label=label, each with one of * @ | and ?")
        label, sources, how, question, unless = match.groups()
        names = tuple(name for name in (sources or label).split("/") if name)
        found.append(Binding(label, names, how, question == "?", unless or ""))
    return tuple(found)


def fault_of(items: str) -> str | None:
    """What is wrong with `(...)` after `$alert`, None if nothing is."""
    if not items:
        return "$alert needs labels in parentheses: $alert(namespace, pod?)"
    try:
        bindings_of(items[1:-1])
    except ValueError as error:
        return str(error)
    return None


def node_name(kind: str, labels: Mapping[str, str]) -> str:
    """The node that these labels name, as an entity of that kind; "" if one of its labels is not there."""
    values = [labels.get(name, "") for name in ENTITIES[kind]]
    return "/".join((kind, *values)) if all(values) else ""


def kind_of(node: str) -> str:
    """The entity kind of a node's name; "" for a service, whose name has no such form."""
    kind, slash, _ = node.partition("/")
    return kind if slash and kind in ENTITIES else ""


def subject_of(labels: Mapping[str, str], kind: str = "") -> str:
    """The node that an alert is about: as an entity of `kind`, or else the most specific one that its labels name;
    `alert/` without a name at the very least."""
    wanted = (kind, *ENTITIES) if kind else tuple(ENTITIES)
    return next((name for entity in wanted if (name := node_name(entity, labels))), "alert/")


def values_of(binding: Binding, alerts: Sequence[Mapping[str, str]]) -> tuple[str, ...]:
    """The alerts' values of the binding's label, each once, sorted; empty ones are no values."""
    values = {
        next((value for source in binding.sources if (value := labels.get(source, ""))), "")
        for labels in alerts
        if not labels.get(binding.unless)
    }
    return tuple(sorted(values - {""}))


class Entry(Protocol):
    """What matching needs of `rules.packs.AlertEntry`."""

    @property
    def causes(self) -> tuple[str, ...]: ...
    @property
    def subject(self) -> str: ...
    @property
    def metrics(self) -> tuple[str, ...]: ...


E = TypeVar("E", bound=Entry)


def entry_of(labels: Mapping[str, str], metrics: Sequence[str], entries: Mapping[str, E]) -> E | None:
    """The pack entry that knows this alert: by name and severity, by name, or else the first (by its key) whose globs
    match one of the `metrics` that the alert's expression reads."""
    name, severity = labels.get("alertname", ""), labels.get("severity", "")
    found = entries.get(f"{name}/{severity}") or entries.get(name)
    if found is not None:
        return found
    for key in sorted(entries):
        if any(fnmatchcase(metric, glob) for glob in entries[key].metrics for metric in metrics):
            return entries[key]
    return None


def metrics_read(situation: Situation) -> tuple[str, ...]:
    """The metrics that the expressions of the situation's alerts read (facts `alert.expression`)."""
    texts = (str(fact.attributes.get("metrics", "")) for fact in situation.facts(EXPRESSION_FACT))
    return tuple(sorted({metric for text in texts for metric in text.split() if metric}))


def causes_named(situation: Situation, entries: Mapping[str, E]) -> frozenset[str]:
    """The causes that the pack entries of the situation's alerts name."""
    metrics = metrics_read(situation)
    known = (entry_of(alert.labels, metrics, entries) for alert in situation.alerts)
    return frozenset(cause for entry in known if entry is not None for cause in entry.causes)
