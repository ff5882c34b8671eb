"""Records, faulty files and reopened copies for the journal's tests."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from actions.model import Plan, Step, StepMoved, StepState
from agent.journal.files import Files
from agent.journal.records import (
    AlertsReceived,
    IncidentMoved,
    Noted,
    PlanMade,
    Record,
    StepRecorded,
    Stored,
)
from agent.journal.wal import Wal
from rules.model import Alert, AlertStatus


def alert(
    fingerprint: str = "f1",
    status: AlertStatus = "firing",
    *,
    name: str = "HighLatency",
    service: str = "front",
    starts_at: float = 100.0,
    tenant: str = "default",
) -> Alert:
    labels = {"alertname": name} | ({"service": service} if service else {})
    return Alert(
        tenant=tenant,
        fingerprint=fingerprint,
        status=status,
        labels=labels,
        starts_at=starts_at,
        ends_at=starts_at + 60.0 if status == "resolved" else None,
        digest=f"{fingerprint}/{status}/{starts_at}",
    )


def received(*alerts: Alert, at: float = 100.0, group: str = "g", tenant: str = "default") -> AlertsReceived:
    return AlertsReceived(at=at, tenant=tenant, receiver="alertmedic", group_key=group, alerts=alerts)


def moved(incident: str, before: str, after: str, at: float = 110.0, **more: object) -> IncidentMoved:
    return IncidentMoved(at=at, incident=incident, before=before, after=after, **more)  # type: ignore[arg-type]


def note(n: int, size: int = 0) -> Noted:
    return Noted(at=float(n), incident="", text=f"note {n} " + "x" * size)


def plan(incident: str, id: str = "p1", autonomy: str = "auto", steps: int = 1, expires_at: float = 1e3) -> PlanMade:
    made = Plan(
        id=id,
        incident=incident,
        service="worker",
        cause="process.crashed",
        steps=tuple(
            Step(action="service.restart.supervisord", version=1, target=f"service=worker-{n}", argv=("true", str(n)))
            for n in range(steps)
        ),
        autonomy=autonomy,  # type: ignore[arg-type]
        made_at=100.0,
        expires_at=expires_at,
    )
    return PlanMade(at=100.0, plan=made)


def step(incident: str, before: str, after: str, at: float = 120.0, plan: str = "p1", n: int = 0) -> StepRecorded:
    states = {"before": StepState(before), "after": StepState(after)}
    return StepRecorded(move=StepMoved(incident=incident, plan=plan, step=n, at=at, **states))


def write(directory: Path, records: Sequence[Record], *, each: bool = True, **options: int) -> list[Stored]:
    """Append (each in a write of its own, or all in one) and close."""

    async def run() -> list[Stored]:
        wal = Wal.open(directory, files=Unsynced(), **options)
        stored: list[Stored] = []
        for part in [[r] for r in records] if each else [list(records)]:
            stored += await wal.append(part)
        await wal.close()
        return stored

    return asyncio.run(run())


def read(directory: Path) -> list[Stored]:
    """What a reader without lock finds."""
    return list(Wal.open(directory, read_only=True).replay())


def reopen(directory: Path) -> tuple[list[Stored], str]:
    """What a writer finds, and what it cut off."""
    wal = Wal.open(directory, files=Unsynced())
    try:
        return list(wal.replay()), wal.health().torn
    finally:
        wal.abandon()


def copy_of(directory: Path, name: str = "copy") -> Path:
    """The directory as a crash at this moment would leave it."""
    target = directory.parent / f"{directory.name}-{name}"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(directory, target)
    return target


def segments(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.wal"))


class FaultyFiles(Files):
    """Fails where it is told to. Each list holds errno values (0: goes well) for the calls to come."""

    def __init__(self) -> None:
        self.writes: list[int] = []
        self.syncs: list[int] = []
        self.truncates: list[int] = []
        self.short: list[int] = []  # write at most so many bytes
        self.calls: list[str] = []
        self.gate: object = None

    def _fail(self, plan: list[int], what: str) -> None:
        self.calls.append(what)
        code = plan.pop(0) if plan else 0
        if code:
            raise OSError(code, os.strerror(code))

    def write(self, fd: int, buffers: Sequence[bytes], offset: int) -> int:
        if self.short:
            limit = self.short.pop(0)
            done = super().write(fd, [b"".join(buffers)[:limit]], offset)
            self._fail(self.writes[1:2], "write")
            return done
        self._fail(self.writes, "write")
        return super().write(fd, buffers, offset)

    def sync(self, fd: int) -> None:
        self._fail(self.syncs, "sync")
        super().sync(fd)

    def truncate(self, fd: int, size: int) -> None:
        self._fail(self.truncates, "truncate")
        super().truncate(fd, size)


class Unsynced(Files):
    """For tests of bytes, not of disks: nothing here outlives a power cut, and no test can cut the power."""

    def sync(self, fd: int) -> None:
        pass

    def sync_directory(self, directory: Path) -> None:
        pass


NO_SPACE = errno.ENOSPC
IO_ERROR = errno.EIO
