"""Incidents and their like as plain JSON values, for the API and for the command line's --json: one shape for both.

Pure. Every field of the model is there, whether or not it has its default value, so that a reader needs no defaults;
times become RFC 3339 in UTC. Strings from alerts are passed on as they are: what shows them must escape them.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from enum import Enum
from typing import Any

import msgspec

from actions.model import BreakerMoved
from agent import captured
from agent.fold_changes import ChangeTold
from agent.fold_model import Incident, Models
from agent.journal.records import AlertQuarantined
from sandbox.model import RunResult


def rfc3339(at: float) -> str:
    """Unix seconds as `2026-11-20T09:51:50.846Z`."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def incident_json(incident: Incident) -> dict[str, Any]:
    """`{id, state, tenant, opened_at, alerts, hypotheses, plan, story, ...}`; `plan` is null when there is none, and
    holds its digest (what an approval binds to), its state and where each step stands."""
    diagnosis = incident.diagnosis
    return {
        "id": incident.id,
        "state": incident.state.value,
        "tenant": incident.tenant,
        "opened_at": rfc3339(incident.opened_at),
        "updated_at": rfc3339(incident.updated_at),
        "closed_at": None if incident.closed_at is None else rfc3339(incident.closed_at),
        "reason": incident.reason,
        "refusal": None if incident.refusal is None else incident.refusal.value,
        "entry": incident.entry,
        "services": incident.services,
        "receiver": incident.receiver,
        "external_url": incident.external_url,
        "alerts": [
            {
                "fingerprint": alert.fingerprint,
                "labels": alert.labels,
                "annotations": alert.annotations,
                "status": alert.status,
                "starts_at": rfc3339(alert.starts_at),
                "ends_at": None if alert.ends_at is None else rfc3339(alert.ends_at),
                "generator_url": alert.generator_url,
            }
            for alert in incident.alerts.values()
        ],
        "alerts_dropped": incident.alerts_dropped,
        "truncated": incident.truncated,
        "verdict": None if diagnosis is None else diagnosis.verdict,
        "sentence": "" if diagnosis is None else diagnosis.sentence,
        "owner": "" if diagnosis is None else diagnosis.owner,
        "missing": {} if diagnosis is None else diagnosis.missing,
        "clear": False if diagnosis is None else diagnosis.verdict == "ranked" and diagnosis.clear,
        "model": "" if diagnosis is None else diagnosis.version,
        "changes": [] if diagnosis is None else list(diagnosis.changes),
        "precedents": [plain(p) for p in incident.precedents],
        "feedback": None if incident.feedback is None else plain(incident.feedback),
        "hypotheses": [] if diagnosis is None else [plain(h) for h in diagnosis.hypotheses],
        "plan": _plan(incident),
        "past_plans": [plain(p) for p in incident.past],
        "approvals": [plain(a) for a in incident.approvals],
        "refusals": [plain(r) for r in incident.refusals],
        "rounds": incident.rounds,
        "reopened": incident.reopened,
        "story": [{"at": rfc3339(line.at), "kind": line.kind, "text": line.text} for line in incident.story],
        "story_dropped": incident.story_dropped,
    }


def breaker_json(breaker: BreakerMoved) -> dict[str, Any]:
    """`{key, state, since, open_until, opened_count, reason}`; `open_until` is null unless it is open."""
    return {
        "key": breaker.key,
        "state": breaker.after.value,
        "since": rfc3339(breaker.at),
        "open_until": rfc3339(breaker.open_until) if breaker.open_until else None,
        "opened_count": breaker.opened_count,
        "reason": breaker.reason,
    }


def models_json(models: Models) -> dict[str, Any]:
    """`{serving, pinned, earlier, versions: [{number, at, counts, incidents, golden, refused}]}`; 0 is the shipped
    model."""
    return {
        "serving": models.serving,
        "pinned": models.pinned,
        "earlier": list(models.earlier),
        "versions": [plain(version) for version in models.versions],
    }


def change_json(record: ChangeTold) -> dict[str, Any]:
    """`{at, tenant, kind, service, id, when, text, who, origin}`, times as RFC 3339."""
    return {**plain(record), "when": rfc3339(record.when)}


def quarantine_json(record: AlertQuarantined) -> dict[str, Any]:
    value: dict[str, Any] = plain(record)
    return value


def plain(value: Any) -> Any:
    """Structs as objects with all their fields, enums as their values; `at` and `*_at` as RFC 3339 (0: null)."""
    if isinstance(value, msgspec.Struct):
        return {name: _field(name, getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    return value


def _field(name: str, value: Any) -> Any:
    if isinstance(value, float) and (name == "at" or name.endswith("_at")):
        return rfc3339(value) if value else None
    return plain(value)


def _plan(incident: Incident) -> dict[str, Any] | None:
    if incident.plan is None:
        return None
    shown: dict[str, Any] = plain(incident.plan)
    shown["digest"] = incident.plan_digest or incident.plan.digest
    shown["state"] = incident.plan_state
    for step, view in zip(shown["steps"], incident.steps, strict=False):
        step["state"] = view.state.value
        step["result"] = _result(view.result)
        step["snapshot"] = view.snapshot
    return shown


def _result(result: RunResult | None) -> dict[str, Any] | None:
    """With the heads of long outputs, and how long each is in bytes; `output_json` has the whole."""
    if result is None:
        return None
    shown: dict[str, Any] = plain(result)
    for name in ("stdout", "stderr"):
        text = shown[name]
        shown[name], shown[f"{name}_bytes"] = captured.shortened(text), captured.size(text)
    return shown


def output_json(incident: Incident) -> dict[str, Any]:
    """`{plan, steps: [{action, target, stdout, stderr}]}`: what each step of the current plan printed, whole and as it
    came. Steps that have printed nothing yet are empty."""
    plan = incident.plan
    steps = [] if plan is None else zip(plan.steps, incident.steps, strict=False)
    return {
        "plan": None if plan is None else plan.id,
        "steps": [
            {
                "action": step.action,
                "target": step.target,
                "stdout": view.result.stdout if view.result else "",
                "stderr": view.result.stderr if view.result else "",
            }
            for step, view in steps
        ],
    }
