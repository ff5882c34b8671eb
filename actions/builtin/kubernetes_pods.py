"""Evicts a pod, drains a node, captures what a pod says. Actions `kubernetes.evict_pod`, `.drain` and `.capture`.

Runs as `python -I -m actions.builtin.kubernetes_pods resolve|run|check|undo evict|drain|capture --object ...`. Pods go
through the eviction API alone, which keeps disruption budgets, and each by its uid. A drain evicts nothing of a daemon
set, no static pod, and refuses as a whole where a pod has no controller that would make it anew or is the agent's own;
it begins by cordoning and ends when every pod is gone or its time is over, and undoing it uncordons: what was evicted
stays where its controllers have put it.
"""

from __future__ import annotations

import argparse
import sys
import time

from actions.builtin import CANNOT_TELL, DONE, FAILED, NOTHING_DONE, crashed
from actions.builtin.kubernetes import connect, connection_options, guarded, say
from actions.builtin.kubernetes_api import Api, ApiError, Document, Name, Refused, is_own, log_path, owner

POLL_SECONDS = 1.0
MIRROR = "kubernetes.io/config.mirror"
ENDED = ("Succeeded", "Failed")
MAX_EVENTS = 30
LOG_BYTES = 24 * 1024


# -- one pod


def evict_resolve(api: Api, name: Name, args: argparse.Namespace) -> int:
    pod = api.get(name)
    _evictable(name, pod)
    try:
        api.evict(name, pod["metadata"]["uid"], dry_run=True)
        tried = "the server would accept it"
    except ApiError as error:
        if error.status not in (401, 403, 429):
            raise
        tried = f"the server refuses it now: {error}"
    node = pod["spec"].get("nodeName", "no node")
    note = f"{name} on {node}, {pod['status'].get('phase', 'unknown')}; {tried}"
    say([{"identity": str(name), "params": {"object": str(name), "uid": pod["metadata"]["uid"]}, "note": note}])
    return DONE


def _evictable(name: Name, pod: Document) -> None:
    if MIRROR in (pod["metadata"].get("annotations") or {}):
        raise Refused(f"{name} is a static pod: its node makes it anew whatever the API server says")
    if pod["metadata"].get("deletionTimestamp"):
        raise Refused(f"{name} is being deleted already")
    if owner(pod) is None:
        raise Refused(f"{name} has no controller that would make it anew")


def evict_run(api: Api, name: Name, args: argparse.Namespace) -> int:
    """Done when the pod with this uid is gone or going; a disruption budget in the way means that nothing was done."""
    try:
        pod = api.get(name)
        if pod["metadata"]["uid"] != args.uid:
            raise Refused(f"{name} has been made anew: uid {pod['metadata']['uid']}, planned {args.uid}")
        _evictable(name, pod)
        api.evict(name, args.uid)
    except ApiError as error:
        if error.status == 404:
            raise Refused(f"{name} is gone already") from error
        if error.status:
            raise Refused(str(error)) from error  # 409: another pod of that name; 429: its budget
        time.sleep(POLL_SECONDS)
        going = _going(api, name, args.uid)
        say({"object": str(name), "evicted": going, "answer": str(error)})
        return DONE if going else FAILED
    say({"object": str(name), "uid": args.uid, "evicted": True})
    return DONE


def evict_check(api: Api, name: Name, args: argparse.Namespace) -> int:
    going = _going(api, name, args.uid)
    say({"object": str(name), "gone_or_going": going})
    return DONE if going else FAILED


def _going(api: Api, name: Name, uid: str) -> bool:
    try:
        pod = api.get(name)
    except ApiError as error:
        if error.status == 404:
            return True
        raise
    return pod["metadata"]["uid"] != uid or bool(pod["metadata"].get("deletionTimestamp"))


# -- a node


def _to_evict(api: Api, node: str) -> list[tuple[Name, Document]]:
    """The pods of the node that a drain has to move. Raises Refused where one of them must not be."""
    found = []
    for pod in api.list("pod", "", fieldSelector=f"spec.nodeName={node}"):
        name = Name("pod", pod["metadata"]["namespace"], pod["metadata"]["name"])
        if pod["status"].get("phase") in ENDED or MIRROR in (pod["metadata"].get("annotations") or {}):
            continue
        above = owner(pod)
        if above is not None and above[0] == "daemonset":
            continue
        if is_own(name):
            raise Refused(f"the node {node} runs the agent itself ({name})")
        if api.namespaces and name.namespace not in api.namespaces:
            raise Refused(f"{name} would have to move, and its namespace is not one of {', '.join(api.namespaces)}")
        if above is None and not pod["metadata"].get("ownerReferences"):
            raise Refused(f"{name} has no controller that would make it anew")
        found.append((name, pod))
    return found


def drain_resolve(api: Api, name: Name, args: argparse.Namespace) -> int:
    node, pods = api.get(name), _to_evict(api, name.name)
    cordoned = bool(node["spec"].get("unschedulable"))
    if cordoned and not pods:
        say([])
        return DONE
    if len(pods) > args.max_pods:
        raise Refused(f"{len(pods)} pods would have to move, at most {args.max_pods} may")
    names = ", ".join(f"{n.namespace}/{n.name}" for n, _ in pods[:5]) + (", ..." if len(pods) > 5 else "")
    params = {"object": str(name), "uid": node["metadata"]["uid"], "cordoned": str(cordoned).lower()}
    say([{"identity": str(name), "params": params, "note": f"{len(pods)} pods would move: {names or 'none'}"}])
    return DONE


def drain_run(api: Api, name: Name, args: argparse.Namespace) -> int:
    deadline = time.monotonic() + args.seconds
    pods = _to_evict(api, name.name)
    if len(pods) > args.max_pods:
        raise Refused(f"{len(pods)} pods would have to move by now, at most {args.max_pods} may")
    _cordon(api, name, args, True)
    try:
        return _empty(api, name, pods, deadline)
    except Refused as refusal:  # the node is cordoned by now, so this is no "nothing was done"
        say({"node": name.name, "stopped": str(refusal)})
        return FAILED


def _empty(api: Api, name: Name, pods: list[tuple[Name, Document]], deadline: float) -> int:
    """Evicts until nothing is left or the time is over; a budget in the way is waited for."""
    waits: dict[str, str] = {}
    moved: set[str] = set()
    while pods:
        for pod, item in pods:
            uid = item["metadata"]["uid"]
            if uid in moved or item["metadata"].get("deletionTimestamp"):
                continue
            if problem := _try_evict(api, pod, uid):
                waits[str(pod)] = problem
            else:
                waits.pop(str(pod), None)
                moved.add(uid)
        if time.monotonic() >= deadline:
            break
        time.sleep(POLL_SECONDS)
        pods = _to_evict(api, name.name)
    left = sorted(str(pod) for pod, _ in pods)
    say({"node": name.name, "evicted": len(moved), "left": left[:10], "waits": dict(list(waits.items())[:5])})
    return DONE if not left else FAILED


def _try_evict(api: Api, pod: Name, uid: str) -> str:
    """Why it is not evicted yet; "" when it is."""
    try:
        api.evict(pod, uid)
    except ApiError as error:
        if error.status == 404:
            return ""
        if error.status == 429:
            return str(error)
        raise
    return ""


def _cordon(api: Api, name: Name, args: argparse.Namespace, unschedulable: bool) -> None:
    for attempt in range(3):
        node = api.get(name)
        if node["metadata"]["uid"] != args.uid:
            raise Refused(f"{name} has been made anew")
        if bool(node["spec"].get("unschedulable")) is unschedulable:
            return
        metadata = {
            "resourceVersion": node["metadata"]["resourceVersion"],
            "labels": {"alertmedic.io/incident": args.incident},
            "annotations": {"alertmedic.io/action": "drain"},
        }
        try:
            api.patch(name, {"metadata": metadata, "spec": {"unschedulable": unschedulable}})
            return
        except ApiError as error:
            if error.status != 409 or attempt == 2:
                raise


def drain_check(api: Api, name: Name, args: argparse.Namespace) -> int:
    node = api.get(name)
    if node["metadata"]["uid"] != args.uid:
        return CANNOT_TELL
    cordoned, left = bool(node["spec"].get("unschedulable")), len(_to_evict(api, name.name))
    say({"node": name.name, "cordoned": cordoned, "left": left})
    if cordoned and not left:
        return DONE
    return FAILED if not cordoned or args.cordoned == "true" else CANNOT_TELL


def drain_undo(api: Api, name: Name, args: argparse.Namespace) -> int:
    """Uncordons, unless the node had been cordoned before."""
    if args.cordoned != "true":
        _cordon(api, name, args, False)
    say({"node": name.name, "uncordoned": args.cordoned != "true"})
    return DONE


# -- what a pod says


def capture_resolve(api: Api, name: Name, args: argparse.Namespace) -> int:
    pod = api.get(name)
    containers = [c["name"] for c in pod["spec"]["containers"]]
    states = {s["name"]: s for s in pod["status"].get("containerStatuses") or []}
    restarted = sorted(containers, key=lambda c: -int(states.get(c, {}).get("restartCount", 0)))
    container = args.container or restarted[0]
    if container not in containers:
        raise Refused(f"{name} has no container {container}, only {', '.join(containers)}")
    params = {"object": str(name), "uid": pod["metadata"]["uid"], "container": container}
    say([{"identity": str(name), "params": params, "note": f"container {container}"}])
    return DONE


def capture_run(api: Api, name: Name, args: argparse.Namespace) -> int:
    pod = api.get(name)
    if pod["metadata"]["uid"] != args.uid:
        raise Refused(f"{name} has been made anew")
    states = [s for s in pod["status"].get("containerStatuses") or [] if s["name"] == args.container]
    happened = api.list("event", name.namespace, fieldSelector=f"involvedObject.uid={args.uid}")
    events = [{k: e.get(k) for k in ("type", "reason", "message", "count", "lastTimestamp")} for e in happened][
        -MAX_EVENTS:
    ]
    answer: Document = {
        "pod": str(name),
        "node": pod["spec"].get("nodeName"),
        "phase": pod["status"].get("phase"),
        "conditions": pod["status"].get("conditions") or [],
        "container": states[0] if states else None,
        "events": events,
    }
    for key, previous in (("log_before", "true"), ("log", "false")):
        query = {"container": args.container, "previous": previous, "limitBytes": str(LOG_BYTES), "tailLines": "200"}
        try:
            answer[key] = api.text(log_path(name), query)[-LOG_BYTES:]
        except ApiError as error:  # no container before this one, or a node that does not answer
            answer[key] = None
            answer[f"{key}_missing"] = str(error)
    say(answer)
    return DONE


OPERATIONS = {
    "evict": {"resolve": evict_resolve, "run": evict_run, "check": evict_check},
    "drain": {"resolve": drain_resolve, "run": drain_run, "check": drain_check, "undo": drain_undo},
    "capture": {"resolve": capture_resolve, "run": capture_run},
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("operation", choices=("resolve", "run", "check", "undo"))
    parser.add_argument("action", choices=sorted(OPERATIONS))
    connection_options(parser)
    parser.add_argument("--max-pods", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--cordoned", choices=("true", "false"), default="false")
    parser.add_argument("--container", default="")
    args = parser.parse_args(argv)
    operation = OPERATIONS[args.action].get(args.operation)
    if operation is None:
        sys.stderr.write(f"kubernetes: {args.action} has no {args.operation}\n")
        return NOTHING_DONE
    return guarded(args.operation, args.action, lambda: operation(connect(args), Name.parse(args.object), args))


if __name__ == "__main__":
    sys.excepthook = crashed
    sys.exit(main())
