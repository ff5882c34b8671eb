"""Which services are a Redis, a RabbitMQ, a proxy: by the metrics that only such a thing has.

Asked by `agent.situation` before it asks for evidence. Exists because the packs of these systems are large, and most
services are none of them: what a service cannot have is not asked for. One query over the whole server, believed for
some minutes. It never raises: who cannot be asked has nothing, and is asked again soon.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Final

from agent.sources.prometheus import PrometheusSource, QueryError

BELIEVED_SECONDS: Final = 300.0
AGAIN_SECONDS: Final = 5.0  # after a failure
LOOKBACK: Final = "10m"  # a system that is down now is what is looked for

Systems = Callable[[Collection[str], float], Awaitable[Mapping[str, frozenset[str]]]]


class SystemsSeen:
    """Call it with names of metrics and a deadline in seconds: service -> those of the metrics that it has."""

    def __init__(
        self, source: PrometheusSource, clock: Callable[[], float] = time.monotonic, at: float | None = None
    ) -> None:
        """`at`: the moment to look at, in unix seconds; None: the server's now."""
        self._source = source
        self._at = at
        self._clock = clock
        self._known: Mapping[str, frozenset[str]] = {}
        self._of: frozenset[str] = frozenset()
        self._until = 0.0

    async def __call__(self, metrics: Collection[str], deadline_seconds: float) -> Mapping[str, frozenset[str]]:
        wanted = frozenset(metrics)
        if self._clock() >= self._until or wanted != self._of:
            await self._ask(wanted, deadline_seconds)
        return self._known

    async def _ask(self, wanted: frozenset[str], deadline_seconds: float) -> None:
        label = self._source.config.service_label
        # Names of metrics, checked when the packs were read: nothing in them needs escaping.
        query = " or ".join(
            f'label_replace(group by ({label}) (last_over_time({name}[{LOOKBACK}])), "metric", "{name}", "", "")'
            for name in sorted(wanted)
        )
        self._of = wanted
        if not query:
            self._known, self._until = {}, self._clock() + BELIEVED_SECONDS
            return
        try:
            samples, _ = await self._source.query_instant(query, at=self._at, deadline_seconds=deadline_seconds)
        except QueryError:  # the evidence itself will say that the server does not answer
            self._until = self._clock() + AGAIN_SECONDS
            return
        found: dict[str, set[str]] = {}
        for sample in samples:
            if service := sample.labels.get(label, ""):
                found.setdefault(service, set()).add(sample.labels.get("metric", ""))
        self._known = {service: frozenset(names) for service, names in found.items()}
        self._until = self._clock() + BELIEVED_SECONDS
