"""Changes one field of one Kubernetes object, and puts it back. Actions `kubernetes.*`, `service.restart.kubernetes`.

Runs as `python -I -m actions.builtin.kubernetes resolve|run|check ACTION --object KIND/NAMESPACE/NAME ...`; undoing is
`run` with the values exchanged. `resolve` reads the object, works out the value and tries the change on the server
without keeping it (`dryRun=All`), so that the plan says what admission and the service account would say. `run` reads
again, compares uid, generation and the present value with what was planned, and patches with the resourceVersion it
has just read: whatever anybody else changed in between, however late, is a conflict and not overwritten. What it has
changed is labelled `alertmedic.io/incident` and annotated with action and old value. Actions on pods and drains are in
`kubernetes_pods`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from actions.builtin import CANNOT_TELL, DONE, FAILED, NOTHING_DONE, crashed
from actions.builtin.kubernetes_api import Api, ApiError, Document, Name, Refused, workload
from actions.builtin.kubernetes_fields import FIELDS, Field

CONFLICTS = 3  # in a row, each after reading again; more: somebody writes faster than we do
TELLS_NOTHING_DONE = frozenset({400, 401, 403, 404, 405, 409, 410, 413, 415, 422, 429})
SETTLE_SECONDS = 1.0


def resolve(api: Api, field: Field, args: argparse.Namespace) -> int:
    name = Name.parse(args.object)
    if field.climb:
        name, item = workload(api, name)
    else:
        item = api.get(name)
    if name.kind not in field.kinds:
        raise Refused(f"{name}: a {name.kind} cannot be changed like that, only {', '.join(sorted(field.kinds))}")
    key, value = field.wanted(api, name, item, args)
    present = field.read(api, name, item, key)
    if field.same(present, value):
        say([])
        return DONE
    params: Document = {
        "object": str(name),
        "uid": item["metadata"]["uid"],
        "generation": int(item["metadata"].get("generation", 0)) if field.spec else 0,
        "key": key,
        "value": value,
        "expected": present,
    }
    note = f"{name}: {key} {present} -> {value}; {_tried(api, field, name, item, params, args)}"
    say([{"identity": str(name), "params": params, "note": note}])
    return DONE


def _tried(api: Api, field: Field, name: Name, item: Document, params: Document, args: argparse.Namespace) -> str:
    """What the server says to the change without keeping it. That the account may not change it is for the person who
    reads the plan; a change that is invalid is no plan."""
    try:
        api.patch(name, _body(api, field, name, item, params["key"], params["value"], args), dry_run=True)
    except ApiError as error:
        if error.status in (401, 403):
            return f"the server refuses it to this account: {error}"
        raise
    return "the server would accept it"


def run(api: Api, field: Field, args: argparse.Namespace) -> int:
    """Done when the object holds the value, whoever wrote it last."""
    name = Name.parse(args.object)
    for _ in range(CONFLICTS):
        item = api.get(name)
        present = _planned(api, field, name, item, args)
        if present is None:
            say({"object": str(name), "key": args.key, "value": args.value, "changed": False})
            return DONE
        body = _body(api, field, name, item, args.key, args.value, args)
        try:
            after = api.patch(name, body)
        except ApiError as error:
            if error.status == 409:
                continue
            if error.status in TELLS_NOTHING_DONE:
                raise Refused(str(error)) from error
            return _lost(api, field, name, args, error)
        held = field.same(field.read(api, name, after, args.key), args.value)
        say({"object": str(name), "key": args.key, "before": present, "value": args.value, "changed": held,
             "resource_version": after["metadata"]["resourceVersion"]})  # fmt: skip
        return DONE if held else FAILED
    raise Refused(f"{name}: changed by somebody else {CONFLICTS} times while we tried")


def _planned(api: Api, field: Field, name: Name, item: Document, args: argparse.Namespace) -> str | None:
    """The present value, if the object is the planned one and holds the planned value; None if it holds the new value
    already. Raises Refused when it is neither."""
    if item["metadata"]["uid"] != args.uid:
        raise Refused(f"{name} has been made anew: uid {item['metadata']['uid']}, planned {args.uid}")
    if item["metadata"].get("deletionTimestamp"):
        raise Refused(f"{name} is being deleted")
    present = field.read(api, name, item, args.key)
    if field.same(present, args.value):
        return None
    if not field.same(present, args.expected):
        raise Refused(f"{name}: {args.key} is {present}, planned was {args.expected}")
    generation = int(item["metadata"].get("generation", 0))
    if args.generation and generation != args.generation:
        raise Refused(f"{name}: somebody has changed it: generation {generation}, planned {args.generation}")
    return present


def _lost(api: Api, field: Field, name: Name, args: argparse.Namespace, error: ApiError) -> int:
    """No answer, or a server error: looks whether the change is there."""
    time.sleep(SETTLE_SECONDS)
    item = api.get(name)
    held = item["metadata"]["uid"] == args.uid and field.same(field.read(api, name, item, args.key), args.value)
    say({"object": str(name), "key": args.key, "value": args.value, "changed": held, "answer": str(error)})
    return DONE if held else FAILED


def check(api: Api, field: Field, args: argparse.Namespace) -> int:
    """It has happened when the planned object holds the new value, it has not when it still holds the old one."""
    name = Name.parse(args.object)
    item = api.get(name)
    if item["metadata"]["uid"] != args.uid:
        say({"object": str(name), "uid": item["metadata"]["uid"]})
        return CANNOT_TELL
    present = field.read(api, name, item, args.key)
    say({"object": str(name), "key": args.key, "now": present})
    if field.same(present, args.value):
        return DONE
    return FAILED if field.same(present, args.expected) else CANNOT_TELL


def _body(
    api: Api, field: Field, name: Name, item: Document, key: str, value: str, args: argparse.Namespace
) -> Document:
    """The patch: the field, our marks, and the resourceVersion that it is based on."""
    body = field.body(api, name, item, key, value)
    metadata = body.setdefault("metadata", {})
    metadata["resourceVersion"] = item["metadata"]["resourceVersion"]
    metadata["uid"] = item["metadata"]["uid"]
    metadata.setdefault("labels", {})["alertmedic.io/incident"] = args.incident
    annotations = metadata.setdefault("annotations", {})
    annotations["alertmedic.io/action"] = args.action
    annotations["alertmedic.io/before"] = f"{key}={field.read(api, name, item, key)}"
    return body


def say(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")


def connection_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--api", required=True)
    parser.add_argument("--token-file", required=True)
    parser.add_argument("--ca-file", required=True)
    parser.add_argument("--namespaces", default="", help="with commas; none: every one but the system's")
    parser.add_argument("--object", required=True)
    parser.add_argument("--incident", required=True)
    parser.add_argument("--uid", default="")


def connect(args: argparse.Namespace) -> Api:
    return Api(args.api, args.token_file, args.ca_file, tuple(n for n in args.namespaces.split(",") if n))


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("operation", choices=("resolve", "run", "check"))
    parser.add_argument("action", choices=sorted(FIELDS))
    connection_options(parser)
    parser.add_argument("--generation", type=int, default=0)
    parser.add_argument("--key", default="")
    parser.add_argument("--value", default="")
    parser.add_argument("--expected", default="")
    wish = parser.add_argument_group("what `resolve` works the value out from")
    wish.add_argument("--planned-at", type=float, default=0.0)
    wish.add_argument("--replicas", type=int)
    wish.add_argument("--change", type=int)
    wish.add_argument("--most", type=int, default=20)
    wish.add_argument("--container", default="")
    wish.add_argument("--resource", choices=("memory", "cpu"), default="memory")
    wish.add_argument("--limit", default="")
    wish.add_argument("--percent", type=int)
    wish.add_argument("--minimum", type=int)
    wish.add_argument("--maximum", type=int)
    wish.add_argument("--text", default="")
    args = parser.parse_args(argv)
    args.stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(args.planned_at))
    return args


def guarded(operation: str, what: str, work: Any) -> int:
    """The exit code of `work()`: refusals and errors in words, and never a 1 that a check does not mean."""
    try:
        return int(work())
    except Refused as refusal:
        sys.stderr.write(f"kubernetes: {what}: {refusal}\n")
        return CANNOT_TELL if operation == "check" else NOTHING_DONE
    except (ApiError, OSError, ValueError, KeyError) as error:
        sys.stderr.write(f"kubernetes: {operation} {what}: {type(error).__name__}: {error}\n")
        return CANNOT_TELL if operation == "check" else FAILED


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    operation = {"resolve": resolve, "run": run, "check": check}[args.operation]
    return guarded(args.operation, args.action, lambda: operation(connect(args), FIELDS[args.action], args))


if __name__ == "__main__":
    sys.excepthook = crashed
    sys.exit(main())
