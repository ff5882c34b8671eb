"""Evidence sources: where a diagnosis gets what it looks at.

Called by `agent.investigate` once an incident (and by `agent.verify` with fewer queries). A source answers named
queries within a deadline; `gather` asks all of them at once. This package exists so that everything that can go wrong
out there arrives as `Evidence(missing=reason)`: an incident is diagnosed on what there is, and says what there was
not. It never decides anything, never acts, and never retries (the next look is a new request).

Sources are an explicit list made in `agent.app`: `prometheus.PrometheusSource`, `host.HostSource`,
`recorded.RecordedSource`. This module imports none of them.
"""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from rules.model import Evidence, Frame

TEXT_LIMIT = 300  # characters of a foreign text (an error, a warning) that are kept
STOP_SECONDS = 1.0  # how long a source that is late may take to notice that it was cancelled


class SourceError(Exception):
    """A source could not answer at all. The text names the operation, the object and a hint; it becomes `missing`."""


class Query(Protocol):
    """What a source needs of an evidence query (`rules.packs.EvidenceQuery` is one)."""

    @property
    def name(self) -> str:
        """The canonical signal; the metric name of every series that comes back."""

    @property
    def query(self) -> str:
        """In the source's own language; for Prometheus a PromQL template."""

    @property
    def source(self) -> str:
        """The name of the source that answers it."""


@dataclass(frozen=True, slots=True)
class EvidenceRequest:
    """What is asked of the sources about one incident.

    `start`, `end`: unix seconds, both ends included; `step`: seconds between points. `services` bound `$scope`
    (`scopes` that of single queries, by name), the labels of `alerts` `$alert(...)`; `tenant` is the tenant of the
    incident. Raises ValueError for a window that is not one.
    """

    queries: tuple[Query, ...]
    services: tuple[str, ...]
    start: float
    end: float
    step: float = 30.0
    tenant: str = ""
    alerts: tuple[Mapping[str, str], ...] = ()
    scopes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not all(math.isfinite(x) for x in (self.start, self.end, self.step)):
            raise ValueError(f"evidence request: window {self.start}..{self.end} step {self.step} is not finite")
        if self.end < self.start or self.step <= 0:
            raise ValueError(f"evidence request: window {self.start}..{self.end} step {self.step} is empty")


@dataclass(frozen=True, slots=True)
class Budget:
    """How much one look may take, over all of its queries and in their order. What exceeds it is missing evidence (the
    rest of a query: partial), which the diagnosis names. Time is the deadline of `gather`."""

    queries: int = 400
    series: int = 20_000
    samples: int = 8_000_000  # series times points: 64 MB


UNLIMITED = Budget(sys.maxsize, sys.maxsize, sys.maxsize)


class Source(Protocol):
    """One place to look. `fetch` gives one `Evidence` a query, in any order, and returns within `deadline_seconds` with
    whatever it has by then. It raises nothing but SourceError."""

    @property
    def name(self) -> str: ...

    async def fetch(self, request: EvidenceRequest, deadline_seconds: float) -> tuple[Evidence, ...]: ...


def bounded(text: str, limit: int = TEXT_LIMIT) -> str:
    """A foreign text on one line, without control characters, cut to `limit` characters."""
    clean = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * limit]).split())
    return clean if len(clean) <= limit else clean[: limit - 3] + "..."


async def gather(
    sources: Sequence[Source], request: EvidenceRequest, deadline_seconds: float, budget: Budget = UNLIMITED
) -> tuple[Evidence, ...]:
    """Ask every source at once; one Evidence a query of the request, in its order, within the budget.

    Sources get a slightly shorter deadline than this function keeps, so that one which keeps its own can hand over
    what it has; a source that is later than that, raises SourceError, leaves a query out or does not exist gives
    `Evidence(missing=reason)` for each of its queries. Cancelling this cancels every source. Other exceptions are
    bugs: they propagate, after the other sources were cancelled.
    """
    by_name = {source.name: source for source in sources}
    if len(by_name) != len(sources):
        raise ValueError(f"gather: two sources have the same name: {sorted(s.name for s in sources)}")
    asked: dict[str, tuple[Query, ...]] = {}
    for query in request.queries[: budget.queries]:
        asked[query.source] = (*asked.get(query.source, ()), query)
    inner = deadline_seconds - min(0.5, deadline_seconds / 10)
    tasks = {
        name: asyncio.create_task(by_name[name].fetch(replace(request, queries=queries), inner), name=f"source {name}")
        for name, queries in asked.items()
        if name in by_name
    }
    try:
        if tasks:
            await asyncio.wait(tasks.values(), timeout=deadline_seconds)
        finished = {name for name, task in tasks.items() if task.done()}
        reasons = {name: f"no source named {bounded(name)!r} is configured" for name in asked if name not in by_name}
        reasons |= {name: f"timeout after {deadline_seconds:g} s" for name in tasks if name not in finished}
        answers = {name: _answers(tasks[name], reasons, name) for name in finished}
    finally:
        await _stop([task for task in tasks.values() if not task.done()])
    found = [
        _pick(query, answers.get(query.source, {}), reasons.get(query.source))
        for query in request.queries[: budget.queries]
    ]
    over = f"not asked: a look has at most {budget.queries} queries"
    unasked = (Evidence(q.name, q.source, missing=over, query=q.query) for q in request.queries[budget.queries :])
    return (*_within(found, budget), *unasked)


def _within(found: Sequence[Evidence], budget: Budget) -> list[Evidence]:
    """The evidence as far as series and samples of all of it together stay within the budget."""
    kept: list[Evidence] = []
    series = samples = 0
    for evidence in found:
        frame = evidence.frame
        count, points = len(frame.ids), max(1, frame.times.shape[0])
        room = max(0, min(budget.series - series, (budget.samples - samples) // points))
        if count > room:
            said = f"a look takes at most {budget.series} series and {budget.samples} samples"
            if room == 0:
                missing = f"{count} series left out: {said}"
                evidence = replace(evidence, frame=Frame.empty(), facts=(), missing=missing, partial="")
            else:
                cut = Frame(frame.times, frame.ids[:room], frame.values[:room])
                evidence = replace(evidence, frame=cut, partial=f"{room} of {count} series: {said}")
        series, samples = series + min(count, room), samples + min(count, room) * points
        kept.append(evidence)
    return kept


def _answers(
    task: asyncio.Task[tuple[Evidence, ...]], reasons: dict[str, str], name: str
) -> Mapping[str, list[Evidence]]:
    try:
        evidence = task.result()
    except SourceError as error:
        reasons[name] = bounded(str(error))
        return {}
    answers: dict[str, list[Evidence]] = {}
    for piece in evidence:
        answers.setdefault(piece.name, []).append(piece)
    return answers


def _pick(query: Query, answers: Mapping[str, list[Evidence]], reason: str | None) -> Evidence:
    """The answer to this query; where one name was asked twice, answers come in the order of asking."""
    if waiting := answers.get(query.name):
        return waiting.pop(0)
    return Evidence(
        name=query.name,
        source=query.source,
        missing=reason or f"the source {query.source} gave no answer to this query",
        query=query.query,
    )


async def _stop(tasks: Sequence[asyncio.Task[tuple[Evidence, ...]]]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=STOP_SECONDS)
    for task in tasks:
        if task.done() and not task.cancelled():
            task.exception()  # it was late: what it says now is not waited for
