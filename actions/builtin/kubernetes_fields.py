"""What the field-changing Kubernetes actions change: how each reads its value from an object, and how it writes it.

Used by `actions.builtin.kubernetes`. Every such action is the same dance (read, compare, dry-run, patch, read again);
what differs is a pair of functions over plain documents. A value is text, so that it can stand in a plan: a number, a
quantity, `min..max`, true or false, the name of a revision, `set:...` or `absent`. Nothing here speaks to anybody but
through the `Api` it is handed, and nothing here decides whether to act.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from actions.builtin.kubernetes_api import WORKLOADS, Api, Document, Name, Refused

RESTARTED = "kubectl.kubernetes.io/restartedAt"  # what kubectl sets, so that its own tools show it
REVISION = "deployment.kubernetes.io/revision"
HASH_LABEL = "pod-template-hash"
ABSENT, SET = "absent", "set:"
_SUFFIXES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


class Wish(Protocol):
    """What the proposal asked for; absent options are None or empty."""

    stamp: str
    replicas: int | None
    change: int | None
    most: int
    container: str
    resource: str
    limit: str
    percent: int | None
    minimum: int | None
    maximum: int | None
    key: str
    text: str


@dataclass(frozen=True, slots=True)
class Field:
    """One action. `kinds` it works on; `climb`: from a pod to its workload. `wanted(api, name, item, wish)` gives (key,
    value); `read` the present value; `body` the patch that sets one. Where the value is a spec, `spec` is true: a new
    generation then means that somebody has changed the object meanwhile."""

    kinds: frozenset[str]
    wanted: Callable[[Api, Name, Document, Wish], tuple[str, str]]
    read: Callable[[Api, Name, Document, str], str]
    body: Callable[[Api, Name, Document, str, str], Document]
    climb: bool = True
    spec: bool = True
    same: Callable[[str, str], bool] = operator.eq  # two spellings of one value


def quantity(text: str) -> float:
    """A Kubernetes quantity as a number (bytes, cores). Raises ValueError."""
    for suffix, factor in _BINARY.items():
        if text.endswith(suffix):
            return float(text.removesuffix(suffix)) * factor
    if text.endswith("m"):
        return float(text[:-1]) / 1000
    suffix = text[-1:] if text[-1:] in _SUFFIXES else ""
    return float(text.removesuffix(suffix)) * _SUFFIXES[suffix]


def _grown(present: str, percent: int, resource: str) -> str:
    """The present quantity times percent/100: whole mebibytes or millicores."""
    value = quantity(present) * percent / 100
    return f"{max(1, round(value / 2**20))}Mi" if resource == "memory" else f"{max(1, round(value * 1000))}m"


# -- restart


def _restart_wanted(_: Api, name: Name, item: Document, wish: Wish) -> tuple[str, str]:
    if item["spec"].get("paused"):
        raise Refused(f"{name} is paused: a restart would not be rolled out")
    return "restart", wish.stamp


def _restart_read(_: Api, __: Name, item: Document, ___: str) -> str:
    found: str = (item["spec"]["template"]["metadata"].get("annotations") or {}).get(RESTARTED, "none")
    return found


def _restart_body(_: Api, __: Name, ___: Document, ____: str, value: str) -> Document:
    return {"spec": {"template": {"metadata": {"annotations": {RESTARTED: value}}}}}


# -- roll back


def _revisions(api: Api, name: Name, item: Document) -> list[tuple[int, str, Document]]:
    """(revision, name of its object, pod template) of the workload's history, oldest first."""
    kind = "replicaset" if name.kind == "deployment" else "controllerrevision"
    uid, found = item["metadata"]["uid"], []
    for past in api.list(kind, name.namespace):
        if not any(r.get("uid") == uid for r in past["metadata"].get("ownerReferences") or []):
            continue
        if kind == "replicaset":
            number = int((past["metadata"].get("annotations") or {}).get(REVISION, 0))
            template = _without_hash(past["spec"]["template"])
        else:
            number = int(past["revision"])
            template = {k: v for k, v in past["data"]["spec"]["template"].items() if k != "$patch"}
        found.append((number, past["metadata"]["name"], template))
    return sorted(found, key=lambda r: r[:2])


def _without_hash(template: Document) -> Document:
    metadata = dict(template["metadata"])
    metadata["labels"] = {k: v for k, v in (metadata.get("labels") or {}).items() if k != HASH_LABEL}
    return {**template, "metadata": metadata}


def _same(a: Any, b: Any) -> bool:
    """Equal but for empty and null members, which the server writes or leaves out as it likes."""
    return bool(_pruned(a) == _pruned(b))


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: p for k, v in value.items() if (p := _pruned(v)) not in (None, {}, [])}
    return [_pruned(v) for v in value] if isinstance(value, list) else value


def _undo_read(api: Api, name: Name, item: Document, _: str) -> str:
    """The name of the revision whose template the workload has now."""
    found = [r for r in _revisions(api, name, item) if _same(r[2], item["spec"]["template"])]
    return found[-1][1] if found else ABSENT


def _undo_wanted(api: Api, name: Name, item: Document, _: Wish) -> tuple[str, str]:
    history = _revisions(api, name, item)
    current = [r for r in history if _same(r[2], item["spec"]["template"])]
    if not current:
        raise Refused(f"{name}: the template it has now is in no revision yet; its controller has not seen it")
    before = [r for r in history if r[0] < current[-1][0] and not _same(r[2], current[-1][2])]
    if not before:
        raise Refused(f"{name}: there is no revision before {current[-1][1]}")
    return "revision", before[-1][1]


def _undo_body(api: Api, name: Name, item: Document, _: str, value: str) -> Document:
    for _number, revision, template in _revisions(api, name, item):
        if revision == value:
            return {"spec": {"template": {"$patch": "replace", **template}}}
    raise Refused(f"{name}: the revision {value} is not kept any more")


# -- number of replicas


def _scale_wanted(_: Api, name: Name, item: Document, wish: Wish) -> tuple[str, str]:
    present = int(item["spec"].get("replicas", 1))
    if (wish.replicas is None) == (wish.change is None):
        raise Refused(f"{name}: exactly one of replicas and change is asked for")
    wanted = wish.replicas if wish.replicas is not None else present + (wish.change or 0)
    if not 1 <= wanted <= wish.most:
        raise Refused(f"{name}: {wanted} replicas are not within 1 to {wish.most}")
    return "replicas", str(wanted)


def _scale_read(_: Api, __: Name, item: Document, ___: str) -> str:
    return str(item["spec"].get("replicas", 1))


def _scale_body(_: Api, __: Name, ___: Document, ____: str, value: str) -> Document:
    return {"spec": {"replicas": int(value)}}


# -- limits of a container


def _resources_wanted(_: Api, name: Name, item: Document, wish: Wish) -> tuple[str, str]:
    containers = [c["name"] for c in item["spec"]["template"]["spec"]["containers"]]
    container = wish.container or (containers[0] if len(containers) == 1 else "")
    if container not in containers:
        raise Refused(f"{name}: say which container: {', '.join(containers)}")
    key = f"{container}:{wish.resource}"
    present = _resources_read(_, name, item, key)
    if (wish.percent is None) == (not wish.limit):
        raise Refused(f"{name}: exactly one of limit and percent is asked for")
    if wish.percent is not None:
        if present == ABSENT:
            raise Refused(f"{name}: {container} has no {wish.resource} limit to take {wish.percent} % of")
        return key, SET + _grown(present.removeprefix(SET), wish.percent, wish.resource)
    wanted = quantity(wish.limit)
    if present != ABSENT and not quantity(present.removeprefix(SET)) / 4 <= wanted <= 4 * quantity(present[4:]):
        raise Refused(f"{name}: {wish.limit} is more than four times away from {present.removeprefix(SET)}")
    return key, SET + wish.limit


def _resources_read(_: Api, name: Name, item: Document, key: str) -> str:
    container, resource = key.split(":")
    for found in item["spec"]["template"]["spec"]["containers"]:
        if found["name"] == container:
            limit = (found.get("resources") or {}).get("limits", {}).get(resource)
            return ABSENT if limit is None else SET + str(limit)
    raise Refused(f"{name} has no container {container} any more")


def _same_quantity(a: str, b: str) -> bool:
    """The server writes 1024Mi as 1Gi."""
    return a == b or (ABSENT not in (a, b) and quantity(a.removeprefix(SET)) == quantity(b.removeprefix(SET)))


def _resources_body(_: Api, __: Name, ___: Document, key: str, value: str) -> Document:
    container, resource = key.split(":")
    limit = None if value == ABSENT else value.removeprefix(SET)
    wanted = {"name": container, "resources": {"limits": {resource: limit}}}
    return {"spec": {"template": {"spec": {"containers": [wanted]}}}}


# -- bounds of an autoscaler


def _bounds_wanted(_: Api, name: Name, item: Document, wish: Wish) -> tuple[str, str]:
    low, high = _bounds(_bounds_read(_, name, item, ""))
    if wish.maximum is not None and wish.change is not None:
        raise Refused(f"{name}: at most one of max_replicas and change is asked for")
    low = wish.minimum if wish.minimum is not None else low
    high = wish.maximum if wish.maximum is not None else high + (wish.change or 0)
    if not 1 <= low <= high <= wish.most:
        raise Refused(f"{name}: {low}..{high} replicas are not within 1..{wish.most}")
    return "bounds", f"{low}..{high}"


def _bounds(value: str) -> tuple[int, int]:
    low, _, high = value.partition("..")
    return int(low), int(high)


def _bounds_read(_: Api, __: Name, item: Document, ___: str) -> str:
    return f"{item['spec'].get('minReplicas', 1)}..{item['spec']['maxReplicas']}"


def _bounds_body(_: Api, __: Name, ___: Document, ____: str, value: str) -> Document:
    low, high = _bounds(value)
    return {"spec": {"minReplicas": low, "maxReplicas": high}}


# -- switches


def _switch(path: str) -> tuple[Callable[..., str], Callable[..., Document]]:
    def read(_: Api, __: Name, item: Document, ___: str) -> str:
        return str(bool(item["spec"].get(path))).lower()

    def body(_: Api, __: Name, ___: Document, ____: str, value: str) -> Document:
        return {"spec": {path: value == "true"}}

    return read, body


def _always(key: str, value: str) -> Callable[[Api, Name, Document, Wish], tuple[str, str]]:
    return lambda *_: (key, value)


# -- a key of a ConfigMap, an annotation


def _config_read(_: Api, name: Name, item: Document, key: str) -> str:
    if item.get("immutable"):
        raise Refused(f"{name} is immutable")
    return _printable(name, key, (item.get("data") or {}).get(key))


def _annotation_read(_: Api, name: Name, item: Document, key: str) -> str:
    return _printable(name, key, (item["metadata"].get("annotations") or {}).get(key))


def _printable(name: Name, key: str, value: str | None) -> str:
    """A value that cannot stand in a plan cannot be put back from there either."""
    if value is None:
        return ABSENT
    if not value.isprintable() or len(value) > 200:
        raise Refused(f"{name}: the value of {key} is not one short line, so it could not be put back")
    return SET + value


def _text_wanted(_: Api, __: Name, ___: Document, wish: Wish) -> tuple[str, str]:
    return wish.key, SET + wish.text


def _annotation_wanted(_: Api, name: Name, __: Document, wish: Wish) -> tuple[str, str]:
    if wish.key.split("/")[0].endswith(("kubernetes.io", "k8s.io")):
        raise Refused(f"{name}: annotations of Kubernetes itself are not set: {wish.key}")
    return wish.key, SET + wish.text


def _value(value: str) -> str | None:
    return None if value == ABSENT else value.removeprefix(SET)


def _config_body(_: Api, __: Name, ___: Document, key: str, value: str) -> Document:
    return {"data": {key: _value(value)}}


def _annotation_body(_: Api, __: Name, ___: Document, key: str, value: str) -> Document:
    return {"metadata": {"annotations": {key: _value(value)}}}


_suspend_read, _suspend_body = _switch("suspend")
_cordon_read, _cordon_body = _switch("unschedulable")
_NODE = frozenset({"node"})

FIELDS: dict[str, Field] = {
    "rollout_restart": Field(WORKLOADS, _restart_wanted, _restart_read, _restart_body),
    "rollout_undo": Field(WORKLOADS, _undo_wanted, _undo_read, _undo_body),
    "scale": Field(frozenset({"deployment", "statefulset"}), _scale_wanted, _scale_read, _scale_body),
    "set_resources": Field(WORKLOADS, _resources_wanted, _resources_read, _resources_body, same=_same_quantity),
    "annotate": Field(WORKLOADS, _annotation_wanted, _annotation_read, _annotation_body, spec=False),
    "hpa_bounds": Field(frozenset({"autoscaler"}), _bounds_wanted, _bounds_read, _bounds_body, climb=False, spec=False),
    "suspend_cronjob": Field(
        frozenset({"cronjob"}), _always("suspend", "true"), _suspend_read, _suspend_body, climb=False
    ),
    "set_config": Field(frozenset({"configmap"}), _text_wanted, _config_read, _config_body, climb=False, spec=False),
    "cordon": Field(_NODE, _always("cordon", "true"), _cordon_read, _cordon_body, climb=False, spec=False),
    "uncordon": Field(_NODE, _always("cordon", "false"), _cordon_read, _cordon_body, climb=False, spec=False),
}
