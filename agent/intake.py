"""From the bytes of a webhook to durable records: what is new is recorded, what is known is counted, nothing is lost.

Called by `agent.http.server` for every webhook (and by reconciliation with alerts it fetched itself). Exists so that
one page holds the promise behind a 200: every alert of the request is on disk, is known already, or is quarantined on
disk and named in the answer. It never answers before that, never drops silently, and knows nothing of incidents.

A duplicate is an alert whose digest equals the *current* digest of its (tenant, fingerprint): firing(t0), resolved(t0),
firing(t0) is recorded three times. "Current" includes appends under way: a re-send that arrives meanwhile is a
duplicate too, but its answer waits for that append, since its 200 makes the same promise.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal, NamedTuple, TypeVar

import msgspec

from agent.alerts import (
    DEFAULT_BOUNDS,
    HEAD_BYTES,
    BadAlert,
    Bounds,
    Payload,
    PayloadError,
    UsualAlert,
    UsualPayload,
    body_digest,
    decode_usual,
    parse_payload,
    usual_digest,
    usual_payload,
)
from agent.journal.records import AlertQuarantined, AlertsReceived, PayloadReceived
from agent.journal.wal import JournalError, JournalUnavailable
from agent.store import Store
from rules.model import Alert
from sandbox.failpoint import failpoint

RECORDED_PER_REQUEST: Final = 100  # bad alerts of one request that get a record each; the rest share one
REMEMBERED_PER_TENANT: Final = 200
REMEMBERED_TENANTS: Final = 200

Source = Literal["webhook", "reconcile"]
_Key = tuple[str, str]
_Sent = TypeVar("_Sent", Alert, UsualAlert)


class OverloadedError(Exception):
    """Too much is being handled already: answer 503 and let the sender come again."""


@dataclass(frozen=True, slots=True)
class Quarantined:
    """One alert of the request that was not understood; `index` counts from 0."""

    index: int
    path: str
    reason: str


class Accepted(NamedTuple):
    """What became of a request's alerts. `accepted` are durable now, `duplicates` were before."""

    accepted: int
    duplicates: int
    quarantined: tuple[Quarantined, ...] = ()


class NothingGoodError(PayloadError):
    """No alert of the payload could be understood; they are quarantined. `path` and `reason` are the first one's."""

    def __init__(self, quarantined: tuple[Quarantined, ...]) -> None:
        super().__init__(quarantined[0].reason, quarantined[0].path)
        self.quarantined = quarantined


class _Append:
    """One request's records on their way to the disk."""

    __slots__ = (
        "_alerts",
        "_body",
        "_done",
        "_states",
        "after",
        "digests",
        "failure",
        "finished",
        "keys",
        "overtaken",
        "places",
        "seq",
    )

    def __init__(self, alerts: Sequence[Alert] = (), body: bytes = b"", keys: list[_Key] | None = None) -> None:
        self._alerts = alerts
        self._body = body  # instead of `alerts`
        self._states: list[str] = []
        self._done: asyncio.Event | None = None  # as soon as anybody waits
        self.seq = 0  # of its newest record, once that is durable
        self.keys: list[_Key] = keys or []  # alerts, by (tenant, fingerprint)
        self.places: dict[_Key, int] | None = None  # where among the request's alerts; None: as in `keys`
        self.overtaken = False  # a later request took over some of the keys
        self.digests: list[_Key] = []  # quarantine records, by (tenant, digest)
        self.after: set[_Append] = set()  # appends that this request's duplicates rest on
        self.failure = ""
        self.finished = False

    def finish(self) -> None:
        self.finished = True
        if self._done is not None:
            self._done.set()

    async def wait(self) -> None:
        """Returns when it is finished, durable or not."""
        if not self.finished:
            if self._done is None:
                self._done = asyncio.Event()
            await self._done.wait()

    def state(self, key: _Key) -> str:
        """Digest of the request's newest alert with that key. Nearly nobody asks: it has to come again meanwhile."""
        if not self._states:
            usual = decode_usual(self._body).alerts if self._body else ()
            self._states = [usual_digest(entry) for entry in usual] or [alert.digest for alert in self._alerts]
        return self._states[self.keys.index(key) if self.places is None else self.places[key]]


class Intake:
    """One per service. Bounded: `max_requests` webhooks and `max_bytes` of bodies at once (see `enter`)."""

    def __init__(
        self,
        store: Store,
        *,
        max_requests: int = 256,
        max_bytes: int = 64 * 1024 * 1024,
        bounds: Bounds = DEFAULT_BOUNDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._bounds = bounds
        self._clock = clock
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self.requests = 0  # being handled
        self.bytes = 0  # of bodies being held
        self._pending: dict[_Key, _Append] = {}  # which request brings the newest state under way
        self._finished: deque[_Append] = deque()  # durable and perhaps not yet applied
        self._keeping: dict[_Key, _Append] = {}  # quarantine records under way, by (tenant, digest)
        # tenant -> digests of quarantined bodies, both least recently met first
        self._remembered: OrderedDict[str, OrderedDict[str, None]] = OrderedDict()
        for record in store.state.quarantined:
            self._remember(record.tenant, record.digest)

    # -- admission

    def enter(self, size: int) -> None:
        """One more request with a body of `size` bytes (0: not known yet, see `hold`). Raises OverloadedError, else
        `leave` undoes it. The bounds make 503 come before memory runs out."""
        if self.requests >= self._max_requests:
            raise OverloadedError(f"{self.requests} webhook requests are being handled already")
        self.hold(size)
        self.requests += 1

    def hold(self, size: int) -> None:
        """`size` more bytes of a request that has entered. A single body always fits an idle service."""
        if self.bytes + size > self._max_bytes and self.bytes:
            raise OverloadedError(f"{self.bytes} bytes of webhook bodies are being handled already")
        self.bytes += size

    def leave(self, size: int) -> None:
        """The request is answered; `size` is all that was entered and held for it."""
        self.requests -= 1
        self.bytes -= size

    # -- intake

    async def receive(self, tenant: str, body: bytes, traceparent: str = "") -> Accepted:
        """One webhook. Returns when everything in it is durable.

        Raises PayloadError after the body was quarantined (NothingGoodError when it was well formed but no alert was
        good), JournalUnavailable when nothing could be promised. `tenant` is checked by the caller.
        """
        failpoint("intake_before_parse")
        usual = usual_payload(body) if self._bounds is DEFAULT_BOUNDS else None
        if usual is None:
            return await self._take_other(body, tenant, traceparent)
        return await self._take_usual(usual, body, tenant, traceparent)

    def begin(
        self, tenant: str, body: bytes, traceparent: str, done: Callable[[Accepted | JournalError], None]
    ) -> Awaitable[Accepted] | None:
        """`receive` without a task for the usual webhook, whose alerts are all new: None, and `done` is called on the
        loop when everything in it is durable, or why it is not. Any other webhook is to be awaited; then `done` is not
        called. Raises JournalUnavailable for what is refused at once."""
        failpoint("intake_before_parse")
        usual = usual_payload(body) if self._bounds is DEFAULT_BOUNDS else None
        if usual is None:
            return self._take_other(body, tenant, traceparent)
        keys = [(tenant, alert.fingerprint) for alert in usual.alerts]
        append = _Append(body=body, keys=keys)
        if not self._all_new(append):
            return self._take_usual(usual, body, tenant, traceparent)
        record = PayloadReceived(at=self._clock(), tenant=tenant, traceparent=traceparent, body=msgspec.Raw(body))
        failpoint("intake_before_record")
        append.failure = "the request that was recording it was interrupted"
        try:
            self._store.enlist(record, usual, partial(self._recorded, append, Accepted(len(keys), 0), done))
            append.failure = ""
        except JournalError as error:
            append.failure = str(error)
            raise
        finally:
            if append.failure:
                self._finish(append)
        return None

    def _recorded(
        self,
        append: _Append,
        accepted: Accepted,
        done: Callable[[Accepted | JournalError], None],
        result: int | JournalError,
    ) -> None:
        if isinstance(result, JournalError):
            append.failure = str(result)
            self._finish(append)
            done(result)
            return
        append.seq = result
        self._finish(append)
        failpoint("intake_after_record")
        done(accepted)

    def _all_new(self, append: _Append) -> bool:
        """Is nothing known of any of its alerts? Then all are from now on under way in it."""
        self._forget_applied()
        keys, pending = append.keys, self._pending
        places = dict.fromkeys(keys, append)
        known = self._store.state.digests.keys()
        if len(places) < len(keys) or not (pending.keys().isdisjoint(places) and known.isdisjoint(places)):
            return False
        pending.update(places)
        return True

    async def _take_other(self, body: bytes, tenant: str, traceparent: str) -> Accepted:
        try:
            payload = parse_payload(body, tenant, self._bounds)
        except PayloadError as error:
            head = body[:HEAD_BYTES].decode(errors="replace")
            record = self._bad_record(tenant, body_digest(body), error.path, error.reason, head)
            await self._commit(_Append(), [record])
            error.kept = True
            raise
        return await self.take(payload, traceparent=traceparent)

    async def take(self, payload: Payload, *, traceparent: str = "", source: Source = "webhook") -> Accepted:
        """A payload that was parsed already; for the rest like `receive`."""
        tenant = payload.tenant
        append = _Append(payload.alerts)
        known = self._known(payload.alerts, tenant, append, _digest)
        fresh = [alert for n, alert in enumerate(payload.alerts) if n not in known]
        records: list[AlertsReceived] = []
        if fresh:
            records.append(
                AlertsReceived(
                    at=self._clock(),
                    tenant=tenant,
                    receiver=payload.receiver,
                    group_key=payload.group_key,
                    group_labels=payload.group_labels,
                    external_url=payload.external_url,
                    alerts=tuple(fresh),
                    truncated=payload.truncated,
                    traceparent=traceparent,
                    source=source,
                )
            )
        if not payload.bad:
            await self._commit(append, (), records)
            return Accepted(len(fresh), len(payload.alerts) - len(fresh))
        await self._commit(append, self._bad_records(tenant, payload.bad), records)
        quarantined = tuple(Quarantined(b.index, b.path, b.reason) for b in payload.bad)
        if not payload.alerts:
            raise NothingGoodError(quarantined)
        return Accepted(len(fresh), len(payload.alerts) - len(fresh), quarantined)

    async def _take_usual(self, usual: UsualPayload, body: bytes, tenant: str, traceparent: str) -> Accepted:
        append = _Append(body=body)
        known = self._known(usual.alerts, tenant, append, usual_digest)
        count = len(usual.alerts)
        del usual  # what waits for the disk is the body alone
        if len(known) == count:
            await self._commit(append, ())
        else:
            record = PayloadReceived(
                at=self._clock(), tenant=tenant, traceparent=traceparent, known=known, body=msgspec.Raw(body)
            )
            await self._commit(append, (), (record,))
        return Accepted(count - len(known), len(known))

    def _known(
        self, alerts: Sequence[_Sent], tenant: str, append: _Append, digest: Callable[[_Sent], str]
    ) -> tuple[int, ...]:
        """Indexes of the alerts that are recorded or under way; the others are from now on under way in `append`."""
        self._forget_applied()
        pending, keys = self._pending, append.keys
        places = append.places = {}
        current = self._store.state.digests.get
        known: list[int] = []
        for index, alert in enumerate(alerts):
            key = (tenant, alert.fingerprint)
            if (other := pending.get(key)) is not None:
                if other.state(key) == digest(alert):
                    append.after.add(other)
                    known.append(index)
                    continue
                other.overtaken = True
            elif (recorded := current(key)) is not None and recorded.digest == digest(alert):
                known.append(index)
                continue
            pending[key] = append
            places[key] = index
            keys.append(key)
        return tuple(known)

    async def _commit(
        self,
        append: _Append,
        bad: Sequence[AlertQuarantined],
        received: Sequence[AlertsReceived | PayloadReceived] = (),
    ) -> None:
        """Records what is new and waits until that, and whatever `append` comes after, is durable."""
        records: list[AlertsReceived | PayloadReceived | AlertQuarantined] = [
            *received,
            *(record for record in bad if self._quarantine(record, append)),
        ]
        append.after.discard(append)
        if records:
            failpoint("intake_before_record")
            append.failure = "the request that was recording it was interrupted"
            try:
                append.seq = await self._store.append(*records)
                append.failure = ""
            except JournalError as error:
                append.failure = str(error)
                raise
            finally:
                self._finish(append)
            failpoint("intake_after_record")
        for other in append.after:
            await other.wait()
            if other.failure:
                raise JournalUnavailable(f"the same alert's earlier request was not recorded: {other.failure}")

    def _finish(self, append: _Append) -> None:
        if append.failure:
            self._forget(append)
        else:
            self._finished.append(append)
            self._forget_applied()
        for tenant, digest in append.digests:
            del self._keeping[tenant, digest]
            if not append.failure:
                self._remember(tenant, digest)
        append.finish()

    def _forget_applied(self) -> None:
        """What is applied is under way no more: the state knows it."""
        applied, finished = self._store.state.seq, self._finished
        while finished and finished[0].seq <= applied:
            self._forget(finished.popleft())

    def _forget(self, append: _Append) -> None:
        pending = self._pending
        if not append.overtaken:
            for _ in map(pending.pop, append.keys):
                pass
            return
        for key in append.keys:
            if pending.get(key) is append:
                del pending[key]

    # -- quarantine

    def _quarantine(self, record: AlertQuarantined, append: _Append) -> bool:
        """Whether this has to be recorded: a sender repeats a bad body every few minutes, one record is enough."""
        key = (record.tenant, record.digest)
        if record.digest in self._remembered.get(record.tenant, ()):
            self._remember(*key)
            return False
        if key in self._keeping:
            append.after.add(self._keeping[key])
            return False
        self._keeping[key] = append
        append.digests.append(key)
        return True

    def _remember(self, tenant: str, digest: str) -> None:
        digests = self._remembered.setdefault(tenant, OrderedDict())
        self._remembered.move_to_end(tenant)
        digests[digest] = None
        digests.move_to_end(digest)
        if len(digests) > REMEMBERED_PER_TENANT:
            digests.popitem(last=False)
        if len(self._remembered) > REMEMBERED_TENANTS:
            self._remembered.popitem(last=False)

    def _bad_records(self, tenant: str, bad: Sequence[BadAlert]) -> list[AlertQuarantined]:
        """A record each for the first ones; a payload full of bad alerts must not fill the journal."""
        records = [
            self._bad_record(tenant, b.digest, b.path, b.reason, b.head, b.index) for b in bad[:RECORDED_PER_REQUEST]
        ]
        rest = bad[RECORDED_PER_REQUEST:]
        if rest:
            digest = body_digest("".join(b.digest for b in rest).encode())
            reason = f"{len(rest)} more alerts of one payload; the first at {rest[0].path}: {rest[0].reason}"
            records.append(self._bad_record(tenant, digest, "$.alerts", reason, rest[0].head))
        return records

    def _bad_record(
        self, tenant: str, digest: str, path: str, reason: str, head: str, index: int | None = None
    ) -> AlertQuarantined:
        return AlertQuarantined(
            at=self._clock(), tenant=tenant, digest=digest, path=path, reason=reason, index=index, head=head
        )


def _digest(alert: Alert) -> str:
    return alert.digest
