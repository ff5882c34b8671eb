"""Which incident an alert belongs to: the merging policy, and the fold of `AlertsReceived`.

Called by `agent.incidents.apply` alone. Pure: windows count by the records' own times, and their lengths are journalled
(`FoldPolicy` in `AgentStarted`), so that yesterday's records make yesterday's incidents whatever is configured today.

What an alert joins (`Merge`), first match wins; windows count by the records' times:

1. the live incident that already has this (tenant, fingerprint);
2. the incident that another alert of the same record just joined, if the sender gave a group key;
3. a live incident with the same tenant and group key, within `merge_seconds` of its last alert;
4. a closed incident with the same fingerprint, or the same group key, within `reopen_seconds`: it reopens;
5. a live incident with the same alertname and service, then with the same service, then with a neighbouring one,
   within `merge_seconds` of its last alert;
6. none: it opens a new incident.

A resolved alert is matched by (tenant, fingerprint) alone, since its startsAt may differ; it moves no incident, because
it is a claim: the incident's task records the move to verifying. One that no incident knows is noted in the log.
"""

from __future__ import annotations

from typing import TypeVar

from agent import fold_story as story
from agent.fold_model import MAX_ALERTS, Changes, Current, Incident, incident_id
from agent.fold_state import State, symptom_value
from agent.journal.records import AlertsReceived
from rules.model import Alert

T = TypeVar("T")
MAX_NAMES = 100  # group keys, symptoms and services of one incident
_NO_ALERTS: dict[str, Alert] = {}
_NO_FRESH: dict[str, int] = {}
_NO_TOLD: list[tuple[Alert, str]] = []


class Merge:
    """Folds one `AlertsReceived`."""

    def __init__(self, state: State, seq: int, record: AlertsReceived) -> None:
        self.state = state
        self.seq = seq
        self.record = record
        self.group: Incident | None = None  # what this record's alerts join
        self.how: dict[str, str] = {}  # incident -> what the alerts did to it
        self.alerts: dict[str, list[tuple[Alert, str]]] = {}  # incident -> (alert, service)
        self.indexed: set[tuple[str, str, str]] = set()  # (incident, alertname, service)
        self.opened: list[str] = []
        self.reopened: list[str] = []

    def run(self) -> Changes:
        """The hot path: what consecutive alerts of one incident share is looked up once."""
        record, state, seq = self.record, self.state, self.seq
        at, tenant, label, digests = record.at, record.tenant, state.policy.service_label, state.digests
        if at > state.now:
            state.now = at
        current: Incident | None = None  # the previous alert's, whose containers these are:
        id, alerts, fresh, told = "", _NO_ALERTS, _NO_FRESH, _NO_TOLD
        indexed = self.indexed
        indexed_name: str | None = None
        indexed_service: str | None = None
        for alert in record.alerts:
            labels, fingerprint, status = alert.labels, alert.fingerprint, alert.status
            service = labels.get(label, "")
            key = (tenant, fingerprint)
            # popped and set again it is the newest, so that forgetting goes from the front
            known = digests.pop(key, None)
            incident: Incident | None
            firing = status == "firing"
            if not firing:
                incident = self._resolved(alert, service, known)
            elif known is None and self.group is not None:
                incident = self.group  # most follow the first one of their group; what they would do to it is done
            else:
                incident = self._firing(alert, service, known)
            if incident is None:
                digests[key] = Current(alert.digest, status, at, "")
                continue
            if incident is not current:
                current, id, alerts, fresh = incident, incident.id, incident.alerts, incident.fresh
                told = self.alerts.setdefault(id, [])
                indexed_name = indexed_service = None
            if firing:
                name = labels.get("alertname", "")
                if name != indexed_name or service != indexed_service:
                    indexed_name, indexed_service = name, service
                    if (id, name, service) not in indexed:
                        indexed.add((id, name, service))
                        self._index(incident, name, service)
                if len(fresh) < MAX_ALERTS or fingerprint in fresh:
                    fresh[fingerprint] = seq
            digests[key] = Current(alert.digest, status, at, id)
            if len(alerts) < MAX_ALERTS or fingerprint in alerts:
                alerts[fingerprint] = alert
            else:
                incident.alerts_dropped += 1
            told.append((alert, service))
        return self._told()

    def _told(self) -> Changes:
        record = self.record
        left_out = record.truncated
        for id, alerts in self.alerts.items():
            truncated, left_out = left_out, 0  # told once, of the record as a whole
            incident = self.state.incidents[id]
            incident.truncated += truncated
            text = story.alerts_received(alerts, self.how.get(id, ""), truncated)
            incident.tell(record.at, text, "alerts_received")
        return Changes(tuple(self.alerts), tuple(self.opened), tuple(self.reopened))

    def _resolved(self, alert: Alert, service: str, known: Current | None) -> Incident | None:
        if known is None or known.incident not in self.state.incidents:
            self.state.tell(self.record.at, story.resolved_unknown(alert, service), "alerts_received")
            return None
        return self.state.touch(known.incident, self.record.at, self.seq)

    def _firing(self, alert: Alert, service: str, known: Current | None) -> Incident:
        own = self.state.incidents.get(known.incident) if known is not None else None
        if own is not None and not own.final:
            incident = self.state.touch(own.id, self.record.at, self.seq)
        else:
            incident = self.group or self._join(alert, service, own)
            if self.record.group_key:  # a sender that groups says that these belong together
                self.group = incident
        if self.record.at > incident.last_alert_at:
            incident.last_alert_at = self.record.at
        incident.last_firing_seq = self.seq
        return incident

    def _key(self, name: str, service: str) -> str:
        return self.record.group_key or f"{name}/{service}"

    def _join(self, alert: Alert, service: str, own: Incident | None) -> Incident:
        """What an alert that belongs to no live incident joins; opens or reopens one where it must."""
        state, tenant, at = self.state, self.record.tenant, self.record.at
        key = self._key(alert.name, service)
        same_group = state.incidents.get(state.index.get(("group", tenant, key), ""))
        if same_group is not None and self._mergeable(same_group):
            return self._joined(same_group, "")
        for closed in (own, same_group):
            if closed is None or closed.closed_at is None or at - closed.closed_at > state.policy.reopen_seconds:
                continue
            incident = state.touch(closed.id, at, self.seq)
            state.reopen(incident)
            self.reopened.append(incident.id)
            self.how[incident.id] = "it reopens the incident"
            return incident
        symptom = state.index.get(("symptom", tenant, symptom_value(alert.name, service)), "") if service else ""
        candidates = [(symptom, "joined: the same alert on the same service")]
        if service:
            candidates.append((state.index.get(("service", tenant, service), ""), "joined: the same service"))
            for other in self._neighbours(service):
                beside = state.index.get(("service", tenant, other), "")
                candidates.append((beside, f"joined: {story.plain(other, 80)} is a neighbour"))
        for id, how in candidates:
            found = state.incidents.get(id)
            if found is not None and self._mergeable(found):
                return self._joined(found, how)
        return self._open(key, service)

    def _mergeable(self, incident: Incident) -> bool:
        return not incident.final and self.record.at - incident.last_alert_at <= self.state.policy.merge_seconds

    def _neighbours(self, service: str) -> list[str]:
        pairs = self.state.policy.neighbours
        return sorted({b for a, b in pairs if a == service} | {a for a, b in pairs if b == service})

    def _joined(self, incident: Incident, how: str) -> Incident:
        if how:
            self.how[incident.id] = how
        return self.state.touch(incident.id, self.record.at, self.seq)

    def _open(self, key: str, service: str) -> Incident:
        record = self.record
        incident = Incident(
            id=incident_id(record.tenant, key, self.seq),
            tenant=record.tenant,
            key=key,
            opened_at=record.at,
            began_at=record.at,
            opened_seq=self.seq,
            updated_at=record.at,
            updated_seq=self.seq,
            entry=service,
            last_alert_at=record.at,
            receiver=record.receiver,
            external_url=record.external_url,
            traceparent=record.traceparent,
        )
        self.state.incidents[incident.id] = incident
        self.state.live[incident.id] = None
        self.opened.append(incident.id)
        self.how[incident.id] = "it opens the incident"
        return incident

    def _index(self, incident: Incident, name: str, service: str) -> None:
        """What the incident may be found by from now on. A name over the bound is not indexed: it would never leave."""
        index, tenant, id = self.state.index, incident.tenant, incident.id
        key = self._key(name, service)
        at = ("group", tenant, key)
        if index.get(at) != id and _named(incident.keys, key):
            index[at] = id
        if not service:
            return
        if not incident.entry:
            incident.entry = service
        at = ("symptom", tenant, symptom_value(name, service))
        if index.get(at) != id and _named(incident.symptoms, (name, service)):
            index[at] = id
        at = ("service", tenant, service)
        if index.get(at) != id and _named(incident.services, service):
            index[at] = id


def _named(names: list[T], name: T) -> bool:
    """Add `name` unless the list is full; is it there?"""
    if name in names:
        return True
    if len(names) >= MAX_NAMES:
        return False
    names.append(name)
    return True
