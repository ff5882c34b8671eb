"""The downstream calls of the running service, and the breakers of both kinds under one roof.

Made by `agent.app`. Exists so that moves of a dependency's breaker are journalled without anybody waiting for it, and
so that people list and reset breakers of actions and of dependencies alike. A move that the journal does not take is
lost for the next start only: the breaker itself has moved.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from typing import Any

from actions.breaker import Breaker
from actions.model import BreakerMoved, BreakerState
from actions.runner import Runner
from agent.dependency import Dependency
from agent.journal.files import JournalError
from agent.journal.records import BreakerRecorded
from agent.store import Store
from rules.model import Topology

logger = logging.getLogger("alertmedic.downstream")


class Downstream:
    """`prometheus`: evidence (its slowness does not count). `alertmanager`: reconciliation. `topology`: discovery, of
    which the last good answer is kept, marked stale."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._writing: set[asyncio.Task[None]] = set()
        self.prometheus = Dependency[Any]("prometheus", self._journal)
        self.alertmanager = Dependency[list[Mapping[str, Any]]]("alertmanager", self._journal)
        self.topology = Dependency[Topology]("topology", self._journal)
        self.every: dict[str, Dependency[Any]] = {d.key: d for d in (self.prometheus, self.alertmanager, self.topology)}
        for key, dependency in self.every.items():
            if (known := store.state.breakers.get(key)) is not None:
                dependency.restore(known)

    def _journal(self, move: BreakerMoved) -> None:
        # Once as it goes and once as it comes back: the probes between them would fill the log of a weekend.
        if move.before is BreakerState.CLOSED and move.after is BreakerState.OPEN:
            logger.warning("%s is not asked until it answers again: %s", move.key, move.reason)
        elif move.before is not BreakerState.CLOSED and move.after is BreakerState.CLOSED:
            logger.info("%s is asked again: %s", move.key, move.reason)
        task = asyncio.get_running_loop().create_task(self._written(move), name=f"journal {move.key}")
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)

    async def _written(self, move: BreakerMoved) -> None:
        with contextlib.suppress(JournalError):
            await self._store.record(BreakerRecorded(move=move))

    async def close(self) -> None:
        """What is being journalled is."""
        await asyncio.gather(*self._writing, return_exceptions=True)

    def beside(self, runner: Runner) -> AllBreakers:
        return AllBreakers(runner, self)


class AllBreakers:
    """What `agent.operations` needs of whoever holds breakers."""

    def __init__(self, runner: Runner, downstream: Downstream) -> None:
        self._runner, self._downstream = runner, downstream

    @property
    def breakers(self) -> Mapping[str, Breaker]:
        return {**self._runner.breakers, **{k: d.breaker for k, d in self._downstream.every.items()}}

    async def reset_breaker(self, key: str, reason: str = "reset by a person") -> None:
        dependency = self._downstream.every.get(key)
        if dependency is None:
            await self._runner.reset_breaker(key, reason)
            return
        await self._downstream._store.record(BreakerRecorded(move=dependency.reset(reason)))
