"""Payloads, a store whose disk the test holds still, and a client of a served port."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp

from agent.alerts import UsualPayload
from agent.fold_state import State
from agent.http.api import ApprovalAnswer
from agent.http.server import Serving
from agent.incidents import apply, read_received
from agent.intake import Intake
from agent.journal.records import AlertQuarantined, AlertsReceived, PayloadReceived, Record, Stored
from agent.journal.wal import JournalError, JournalUnavailable

PAYLOADS = Path(__file__).parent.parent / "data" / "payloads"
JSON = {"Content-Type": "application/json"}


def payload_bodies() -> dict[str, bytes]:
    """The captured webhook bodies by name."""
    skip = {"_headers.json", "ten_alerts_api_v2.json"}
    return {p.stem: p.read_bytes() for p in sorted(PAYLOADS.glob("*.json")) if p.name not in skip}


def alert(n: int = 0, **changes: Any) -> dict[str, Any]:
    """A good alert as Alertmanager writes it; `changes` replace fields, None removes one."""
    made = {
        "status": "firing",
        "labels": {"alertname": "A", "instance": f"i{n}"},
        "annotations": {"summary": "s"},
        "startsAt": "2026-11-20T09:51:50.846908475Z",
        "endsAt": "0001-01-01T00:00:00Z",
        "generatorURL": "http://prometheus:9090/graph",
        "fingerprint": f"{n:016x}",
        **changes,
    }
    return {k: v for k, v in made.items() if v is not REMOVED}


def payload(*alerts: Any, **changes: Any) -> dict[str, Any]:
    made = {
        "receiver": "r",
        "status": "firing",
        "alerts": list(alerts) or [alert()],
        "groupLabels": {"alertname": "A"},
        "commonLabels": {"alertname": "A"},
        "commonAnnotations": {},
        "externalURL": "http://am:9093",
        "version": "4",
        "groupKey": '{}:{alertname="A"}',
        "truncatedAlerts": 0,
        **changes,
    }
    return {k: v for k, v in made.items() if v is not REMOVED}


REMOVED = object()


def body(*alerts: Any, **changes: Any) -> bytes:
    return json.dumps(payload(*alerts, **changes)).encode()


class HeldStore:
    """The store's interface over memory. Appends become durable when the test lets them, in order, as the journal does:
    `hold()` stops the disk, `release()` lets everything through, `failing` makes appends fail."""

    def __init__(self) -> None:
        self.state = State()
        self.stored: list[Stored] = []
        self.appends = 0  # calls of record
        self.failing = ""  # why appends fail, "" while they do not
        self._open = asyncio.Event()
        self._open.set()
        self._called = asyncio.Condition()
        self._order = asyncio.Lock()
        self._enlisted: set[asyncio.Task[None]] = set()

    def hold(self) -> None:
        self._open.clear()

    def release(self) -> None:
        self._open.set()

    async def appended(self, count: int) -> None:
        """Returns when `record` has been called that often."""
        async with self._called:
            await asyncio.wait_for(self._called.wait_for(lambda: self.appends >= count), 10)

    async def record(self, *records: Record) -> list[Stored]:
        self.appends += 1
        async with self._order:
            async with self._called:
                self._called.notify_all()
            await self._open.wait()
            if self.failing:
                raise JournalUnavailable(self.failing)
            made = [Stored(len(self.stored) + n + 1, record) for n, record in enumerate(records)]
            for item in made:
                apply(self.state, item)
            self.stored.extend(made)
            return made

    async def append(self, *records: Record) -> int:
        return (await self.record(*records))[-1].seq

    def enlist(self, record: Record, sent: UsualPayload, done: Callable[[int | JournalError], None]) -> None:
        async def run() -> None:
            try:
                seq = await self.append(record)
            except JournalUnavailable as error:
                done(error)
            else:
                done(seq)

        self._enlisted.add(task := asyncio.create_task(run()))
        task.add_done_callback(self._enlisted.discard)

    @property
    def records(self) -> list[Record]:
        return [s.record for s in self.stored]

    @property
    def received(self) -> list[AlertsReceived]:
        """The alerts that were recorded, in whichever form."""
        records = [read_received(r) if isinstance(r, PayloadReceived) else r for r in self.records]
        return [r for r in records if isinstance(r, AlertsReceived)]

    @property
    def quarantined(self) -> list[AlertQuarantined]:
        return [r for r in self.records if isinstance(r, AlertQuarantined)]


class Decisions:
    """Operations that remember what they were asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.answer = ApprovalAnswer(outcome="approved", incident="inc-a", plan="p")
        self.breakers = {"a|b"}

    async def approve(self, incident: str, digest: str, who: str, origin: str, note: str) -> ApprovalAnswer:
        self.asked.append(("approve", incident, digest, who, origin, note))
        return self.answer

    async def reject(self, incident: str, digest: str, who: str, origin: str, note: str) -> ApprovalAnswer:
        self.asked.append(("reject", incident, digest, who, origin, note))
        return self.answer

    async def pause(self, paused: bool, who: str, origin: str, note: str) -> None:
        self.asked.append(("pause", paused, who, origin, note))

    async def reset_breaker(self, key: str, who: str, origin: str, note: str) -> bool:
        self.asked.append(("reset", key, who, origin, note))
        return key in self.breakers


class Port:
    """A served port, its store, and a client."""

    def __init__(self, store: Any, intake: Intake, serving: Serving, session: aiohttp.ClientSession) -> None:
        self.store = store
        self.intake = intake
        self.serving = serving
        self.session = session
        self.decisions = Decisions()
        self.health: dict[str, object] = {"ready": True, "sandbox": "cgroup2"}

    @property
    def address(self) -> tuple[str, int]:
        return self.serving.addresses[0]

    @property
    def url(self) -> str:
        host, port = self.address
        return f"http://{host}:{port}"

    async def post(self, data: bytes, path: str = "/webhook", headers: dict[str, str] | None = None) -> tuple[int, Any]:
        async with self.session.post(
            self.url + path, data=data, headers=JSON if headers is None else headers
        ) as answer:
            return answer.status, await answer.json()

    async def get(self, path: str, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        async with self.session.get(self.url + path, headers=headers) as answer:
            return answer.status, await answer.json()

    async def raw(self, *pieces: bytes, end: bool = False) -> bytes:
        """Sends bytes as they are and reads until the answer is whole or the connection ends."""
        reader, writer = await asyncio.open_connection(*self.address)
        try:
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
            if end:
                writer.write_eof()
            async with asyncio.timeout(20):
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    int(line.split(b":")[1])
                    for line in head.split(b"\r\n")
                    if line.lower().startswith(b"content-length")
                )
                return head + await reader.readexactly(length)
        finally:
            writer.close()
