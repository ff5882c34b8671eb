"""What a deploy pipeline or a person said was changed: the record, how long it is kept, and the facts made of it.

Recorded by `agent.operations` (`POST /api/v1/changes`, `alertmedic change add`), folded by `agent.incidents`, handed to
diagnosis by `agent.situation`. Exists because most incidents follow a change, and metrics do not tell of every one. It
never decides anything: a change is evidence (`change.*` facts), as the changes of a recording are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

from rules.model import Fact

ChangeKind = Literal["release", "deploy", "commit", "flag"]
MAX_CHANGES = 1_000  # the newest told
KEPT_SECONDS = 7 * 86400.0
BEFORE_SECONDS = 86400.0  # before an onset: older ones are no evidence
PER_HOUR = 600  # of one tenant; more is refused
AHEAD_SECONDS = 300.0  # by which a sender's clock may be ahead


class ChangeTold(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="change_told"):
    """One change. `when` it was made; `id` names it (a version, a commit, a flag), so that it counts once however often
    it is told."""

    at: float
    tenant: str
    kind: ChangeKind
    service: str
    id: str
    when: float
    text: str = ""
    who: str
    origin: str

    @property
    def key(self) -> tuple[str, str, str, str, float]:
        return (self.tenant, self.kind, self.service, self.id, self.when)


def keep(changes: list[ChangeTold], record: ChangeTold, now: float) -> None:
    """Adds it, and forgets what is past its time."""
    changes.append(record)
    old = now - KEPT_SECONDS
    changes[:] = [c for c in changes if max(c.when, c.at) >= old][-MAX_CHANGES:]


def facts(changes: Iterable[ChangeTold], tenant: str, onset: float, until: float) -> tuple[Fact, ...]:
    """The tenant's changes from a day before the onset to the end of the look, as facts of kind `change.KIND`."""
    return tuple(
        _fact(change)
        for change in changes
        if change.tenant == tenant and onset - BEFORE_SECONDS <= change.when <= until
    )


def _fact(change: ChangeTold) -> Fact:
    attributes: dict[str, str | float | bool] = {"time": change.when, "told_by": change.who}
    if change.text:
        attributes["text"] = change.text
    return Fact(f"change.{change.kind}", change.id, change.service, attributes)
