"""Compares what the journal holds to be firing with what Alertmanager does: on start, since an alert that fired or
resolved while the agent was down is never sent again.

Called by `agent.app` once after the start, and again while Alertmanager does not answer. What is new goes through
`agent.intake` like a webhook; an alert that Alertmanager no longer holds is recorded as "resolved", which is a claim
that the series have to confirm. It never closes an incident.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Any

import aiohttp
import orjson
import yarl

from agent.alerts import PayloadError, alert_digest, parse_payload, parse_time
from agent.config import Alertmanager
from agent.dependency import Dependency, DependencyOpen
from agent.fold_state import State
from agent.intake import Intake
from agent.journal.records import AlertsReceived
from agent.sources.prometheus import client_tls
from agent.store import Store
from rules.model import Alert

MAX_BYTES = 64 * 1024 * 1024
API_TIME_SECONDS = 0.001  # the API cuts times to milliseconds
ZERO_TIME = "0001-01-01T00:00:00Z"
EVERY = "*"
Routes = Mapping[str, str]  # receiver (glob) -> tenant


class ReconcileError(Exception):
    """Alertmanager did not answer, or not with alerts. The text says what to look at."""


async def reconcile(
    config: Alertmanager,
    store: Store,
    intake: Intake,
    now: float,
    dependency: Dependency[list[Mapping[str, Any]]] | None = None,
) -> tuple[int, int]:
    """Asks once, through the breaker `dependency`; without an answer the journal's own state stands.

    Returns (alerts that were new, alerts that are claimed to have resolved). Raises ReconcileError, and JournalError
    when nothing can be recorded."""
    routes = config.receivers or {EVERY: config.tenant}
    before = {tenant: _firing(store.state, tenant, routes) for tenant in routes.values()}
    try:
        held = await (dependency.call(lambda: _held(config)) if dependency is not None else _held(config))
    except DependencyOpen as error:
        raise ReconcileError(f"reconcile with {config.url}: {error}") from error
    new, gone, problems = 0, 0, list[str]()
    for tenant, known in before.items():
        firing = {str(entry.get("fingerprint", "")): entry for entry in _routed(held, tenant, routes)}
        # What is silenced or inhibited would not be sent, so it is no news; but it is held, so it has not resolved.
        sent = [entry for entry in firing.values() if _state(entry) == "active"]
        fresh = [entry for entry in sent if not _is_known(store.state, tenant, entry)]
        for body, name in _bodies(fresh, tenant, routes, config.url):
            try:
                accepted = await intake.take(parse_payload(body, tenant), source="reconcile")
            except PayloadError as error:  # it is in quarantine; the others count all the same
                problems.append(f"alert {name!r:.100}: {error}")
                continue
            new += accepted.accepted
        # What changed while Alertmanager was asked is newer than its answer, which says nothing about it.
        after = _firing(store.state, tenant, routes)
        claimed = [a for fingerprint, a in known.items() if fingerprint not in firing and after.get(fingerprint) == a]
        if claimed:
            await store.record(_claims(claimed, tenant, config.url, now))
        gone += len(claimed)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ReconcileError(f"reconcile with {config.url}: {problems[0]}{more}; the others were taken")
    return new, gone


def _routed(held: list[Mapping[str, Any]], tenant: str, routes: Routes) -> list[Mapping[str, Any]]:
    return [entry for entry in held if _receiver(entry, tenant, routes) is not None]


def _receiver(entry: Mapping[str, Any], tenant: str, routes: Routes) -> str | None:
    """The receiver by which Alertmanager sends this alert to us for that tenant; None: by none."""
    receivers = entry.get("receivers")
    names = [str(r.get("name", "")) for r in receivers if isinstance(r, dict)] if isinstance(receivers, list) else []
    return next((name for name in names or [""] if _ours(name, tenant, routes)), None)


def _ours(receiver: str, tenant: str, routes: Routes) -> bool:
    """Whether the first pattern that fits says so."""
    return next((to for pattern, to in routes.items() if fnmatchcase(receiver, pattern)), None) == tenant


def _state(entry: Mapping[str, Any]) -> str:
    status = entry.get("status")
    return str(status.get("state", "")) if isinstance(status, dict) else ""


def _is_known(state: State, tenant: str, entry: Mapping[str, Any]) -> bool:
    """Whether the journal holds it to be firing already. A closed incident (escalated, or healed a moment ago) has an
    alert that still fires: that is no news, although the API spells its times in another way than the webhook does."""
    fingerprint = str(entry.get("fingerprint", ""))
    current = state.current(tenant, fingerprint)
    incident = state.incident(current.incident) if current is not None and current.status == "firing" else None
    alert = incident.alerts.get(fingerprint) if incident is not None else None
    if incident is None or alert is None:
        return False
    if not incident.final:
        return True
    try:
        started = parse_time(str(entry.get("startsAt", "")))
    except ValueError:
        return False
    return abs(started - alert.starts_at) < API_TIME_SECONDS


def _firing(state: State, tenant: str, routes: Routes) -> dict[str, Alert]:
    """What the tenant's live incidents that those receivers opened hold to be firing, by fingerprint."""
    ours = (i for i in state.active() if i.tenant == tenant and _ours(i.receiver, tenant, routes))
    return {alert.fingerprint: alert for incident in ours for alert in incident.firing}


def _claims(gone: list[Alert], tenant: str, url: str, now: float) -> AlertsReceived:
    ended = datetime.fromtimestamp(now, UTC).isoformat()
    return AlertsReceived(
        at=now,
        tenant=tenant,
        receiver="",
        group_key="",
        external_url=url,
        source="reconcile",
        alerts=tuple(
            Alert(
                tenant=tenant,
                fingerprint=alert.fingerprint,
                status="resolved",
                labels=alert.labels,
                annotations=alert.annotations,
                starts_at=alert.starts_at,
                ends_at=now,
                generator_url=alert.generator_url,
                digest=alert_digest("resolved", "", ended, alert.labels, alert.annotations),
            )
            for alert in gone
        ),
    )


def _bodies(entries: list[Mapping[str, Any]], tenant: str, routes: Routes, url: str) -> Iterator[tuple[bytes, str]]:
    """Entries of the v2 API as webhooks, one for each receiver and alertname, with the latter."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in entries:
        labels = entry.get("labels")
        name = str(labels.get("alertname", "")) if isinstance(labels, dict) else ""
        alert = {
            "status": "firing",
            "labels": labels,
            "annotations": entry.get("annotations") or {},
            "startsAt": entry.get("startsAt"),
            "endsAt": ZERO_TIME,
            "generatorURL": entry.get("generatorURL", ""),
            "fingerprint": entry.get("fingerprint"),
        }
        groups.setdefault((_receiver(entry, tenant, routes) or "", name), []).append(alert)
    for (receiver, name), alerts in groups.items():
        body = {
            "version": "4",
            "groupKey": f'reconcile:{{alertname="{name}"}}',
            "status": "firing",
            "receiver": receiver,
            "groupLabels": {},
            "commonLabels": {},
            "commonAnnotations": {},
            "externalURL": url,
            "truncatedAlerts": 0,
            "alerts": alerts,
        }
        yield orjson.dumps(body), name


async def _held(config: Alertmanager) -> list[Mapping[str, Any]]:
    """The alerts that Alertmanager holds, also those that a silence or an inhibition keeps from being sent."""
    url = yarl.URL(config.url) / "api/v2/alerts"
    query = {"active": "true", "silenced": "true", "inhibited": "true", "unprocessed": "true"}
    headers: dict[str, str] = {}
    if config.bearer_token_file is not None:
        headers["Authorization"] = f"Bearer {config.bearer_token_file.current()}"
    elif config.basic is not None:
        auth = aiohttp.BasicAuth(config.basic.username, config.basic.password_file.current(), "utf-8")
        headers["Authorization"] = auth.encode()
    timeout = aiohttp.ClientTimeout(total=config.timeout_seconds)
    try:
        connector = aiohttp.TCPConnector(ssl=client_tls(config.tls) if url.scheme == "https" else True)
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session,
            session.get(
                url, params=query, allow_redirects=False, server_hostname=config.tls.server_name or None
            ) as response,
        ):
            if response.status != 200:
                raise ReconcileError(f"reconcile with {config.url}: HTTP {response.status}; is it an Alertmanager?")
            body = await response.content.read(MAX_BYTES + 1)
            while len(body) <= MAX_BYTES and not response.content.at_eof():
                body += await response.content.read(MAX_BYTES + 1 - len(body))
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        reason = str(error) or type(error).__name__
        raise ReconcileError(f"reconcile with {config.url}: no answer: {reason}; it is asked again") from error
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ReconcileError(f"reconcile with {config.url}: no JSON: {error}") from error
    if not isinstance(answer, list) or not all(isinstance(entry, dict) for entry in answer):
        raise ReconcileError(f"reconcile with {config.url}: expected a list of alerts")
    return answer
