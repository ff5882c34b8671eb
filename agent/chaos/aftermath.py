"""What a run left in the agent's directory: its journal, judged for anything done twice, and a recording of its look.

Called by `agent.chaos.block` after each run of an arm with the agent. It reads the agent's files as any outsider may
(the journal read-only) and never speaks to the agent. The truth is written beside a recording's copy, which lies where
no agent looks.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from actions.model import Plan, StepMoved, StepState
from agent.chaos.measure import Run
from agent.chaos.scenario import Scenario
from agent.journal.records import Diagnosed, PlanMade, Record, StepRecorded
from agent.journal.wal import Wal
from agent.packs import load_packs
from agent.store import journal_directory

UNTOLD = frozenset({"cmdline", "user", "device"})  # attributes of facts that name people, paths and machines
CHECKED = "its check says that it has not happened"


def records_since(state_dir: Path, at: float) -> list[Record]:
    """The journal's records of a run that began at `at`."""
    kept = Wal.open(journal_directory(state_dir), read_only=True).kept()
    return [record for stored in kept if _time(record := stored.record) >= at]


def _time(record: Record) -> float:
    match record:
        case StepRecorded(move=move):
            return move.at
        case PlanMade(plan=plan):
            return plan.made_at
        case Diagnosed(at=at):
            return at
    return 0.0  # of no interest here


def done_twice(records: Iterable[Record]) -> tuple[str, ...]:
    """Every step of an action that is neither idempotent nor read-only and was executed twice, in words: begun again
    though it had taken effect or nobody had looked whether it had; or taken effect twice on one target, in whatever
    plan."""
    plans: dict[str, Plan] = {}
    executions: dict[tuple[str, int], list[list[StepMoved]]] = {}
    for record in records:
        if isinstance(record, PlanMade):
            plans[record.plan.id] = record.plan
        elif isinstance(record, StepRecorded):
            mine = executions.setdefault((record.move.plan, record.move.step), [])
            if record.move.after is StepState.INTENT:
                mine.append([])
            if mine:
                mine[-1].append(record.move)
    found: list[str] = []
    effects: dict[tuple[str, str], int] = {}
    for (plan, number), mine in executions.items():
        step = plans[plan].steps[number]
        if step.idempotent or step.read_only:
            continue
        what = f"{step.action} on {step.target}"
        found += [f"{what}: begun again, {why}" for before in mine[:-1] if (why := _not_to_be_repeated(before))]
        key = step.action, step.target
        effects[key] = effects.get(key, 0) + sum(_took_effect(moves) for moves in mine)
    found += [f"{action} on {target}: took effect {n} times" for (action, target), n in effects.items() if n > 1]
    return tuple(found)


def _took_effect(moves: Sequence[StepMoved]) -> bool:
    return any(m.after is StepState.RAN for m in moves) and not any(m.after is StepState.UNDONE for m in moves)


def _not_to_be_repeated(moves: Sequence[StepMoved]) -> str:
    """Why an execution that went so must not be followed by another one; "" where it may."""
    if _took_effect(moves):
        return "though it had taken effect"
    last = moves[-1]
    looked = last.before is StepState.UNKNOWN and last.after is StepState.PLANNED and last.reason == CHECKED
    return "" if looked or last.after is StepState.UNDONE else "though nobody had looked whether it had happened"


# -- recordings --------------------------------------------------------------------------------------------------------


def keep_recording(run: Run, scenario: Scenario, records: Iterable[Record], looks: Path, out: Path) -> Path | None:
    """Copies the look on which the agent acted (else its last that ranked anything, else its last) from `looks` into a
    directory below `out`, with its truth; None where there was no look. Facts lose what names a machine or a person.

    With a truth that the diagnosis found, the recording is a golden incident too (`expected.json`)."""
    told = [r for r in records if isinstance(r, Diagnosed)]
    if not told:
        return None
    begun = min(
        (r.move.at for r in records if isinstance(r, StepRecorded) and r.move.after is StepState.INTENT), default=None
    )
    ranked = [r for r in told if r.diagnosis.verdict == "ranked" and (begun is None or r.at <= begun)]
    chosen = (ranked or told)[-1]
    for look in sorted(looks.glob(f"{chosen.incident}-*")):
        meta = json.loads((look / "situation.json").read_bytes())
        if meta["until"] == chosen.evidence_at:
            place = out / run.arm / f"{run.scenario.replace('_', '-')}-{run.repetition}"
            shutil.rmtree(place, ignore_errors=True)  # of a run that did not come to its end
            shutil.copytree(look, place)
            without_names(place)
            _write_truth(place, run, scenario, chosen)
            return place
    return None


def without_names(place: Path) -> None:
    """Takes names of programs that serve nothing, command lines, users, devices and the machine's name out of a
    recording."""
    _rewrite(place / "facts.json", _nameless_facts)
    _rewrite(place / "alert.json", _nameless_payload)


def _rewrite(path: Path, change: Callable[[Any], None]) -> None:
    if path.exists():
        document = json.loads(path.read_bytes())
        change(document)
        path.write_bytes(msgspec.json.encode(document) + b"\n")


def _nameless_facts(facts: list[dict[str, Any]]) -> None:
    numbers: dict[str, str] = {}
    for fact in facts:
        attributes = {k: v for k, v in fact["attributes"].items() if k not in UNTOLD}
        if fact["kind"] == "host.process" and not fact["service"] and "name" in attributes:
            name = str(attributes["name"])
            attributes["name"] = numbers.setdefault(name, f"process-{len(numbers) + 1}")
        fact["attributes"] = attributes


def _nameless_payload(payload: dict[str, Any]) -> None:
    payload["externalURL"] = ""
    for alert in payload["alerts"]:
        if alert.get("generatorURL"):
            alert["generatorURL"] = urlsplit(alert["generatorURL"])._replace(netloc="prometheus").geturl()


def _write_truth(place: Path, run: Run, scenario: Scenario, told: Diagnosed) -> None:
    faults = {name: cause.fault for pack in load_packs().packs for name, cause in pack.causes.items()}
    truth = scenario.truth
    fault = next((faults[name] for name in truth.causes if name in faults), "none")
    extra = {"scenario": run.scenario, "kind": run.kind, "causes": list(truth.causes), "made_by": run.made_by}
    body: dict[str, Any] = {"service": None if scenario.control else truth.service, "fault": fault, "metrics": []}
    body["extra"] = extra
    (place / "truth.json").write_bytes(msgspec.json.encode(body) + b"\n")
    first = told.diagnosis.hypotheses[0] if told.diagnosis.hypotheses else None
    if not scenario.control and first is not None and truth.names(first.cause, first.service):
        expected = {"verdict": "ranked", "ranking": [{"service": first.service, "cause": first.cause}]}
        (place / "expected.json").write_bytes(msgspec.json.encode(expected) + b"\n")
