"""Has it recovered? Re-reads the very series that justified an action, until they are good or the deadline is over.

`actions.runner` asks after a step (`SeriesVerifier.verify`), `agent.investigate` when Alertmanager says "resolved".
What counts as recovered is decided in `rules.verify`; this module only fetches. It never acts, and missing data is
never recovery.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import msgspec

from actions.model import Plan, Step, StepState
from agent.config import Config
from agent.fold_model import Incident
from agent.situation import Situations
from agent.sources import SourceError
from agent.sources.matrix import Sample
from agent.sources.promql import TemplateError, duration_of, render
from agent.store import Store
from agent.telemetry import Telemetry
from rules.packs import PackSet
from rules.verify import Justification, Verdict, judge

HOST_SIGNALS = ("host.processes",)  # where watched facts come from


class InstantQuery(Protocol):
    """`PrometheusSource.query_instant`."""

    async def __call__(self, query: str, *, tenant: str = "") -> tuple[tuple[Sample, ...], tuple[str, ...]]: ...


@dataclass(slots=True)
class SeriesVerifier:
    """Looks every `verify.poll_seconds` at the series; at most until the deadline."""

    config: Config
    packs: PackSet
    situations: Situations
    store: Store
    telemetry: Telemetry
    clock: Callable[[], float] = time.time
    ask: InstantQuery | None = None  # Prometheus, where there is one: for the queries that actions bring themselves

    async def look(self, incident: Incident, since: float) -> Verdict:
        """One look. `since`: samples before it do not count (they are from before the action, or before the claim)."""
        justification = incident.justification
        if justification is None:
            return Verdict(recovered=False, text="nothing was written down that recovery could be judged by")
        return await self.judged(incident, justification, since)

    async def verify(self, plan: Plan, step: Step) -> tuple[bool | None, str]:
        """For the runner: (recovered, sentence); None when nobody can tell. Waits for the series, `plan.verify_seconds`
        at most. Samples from before the newest step ended do not count."""
        begun = self.clock()
        allowed = min(plan.verify_seconds, self.config.verify.deadline_seconds)
        while True:
            incident = self.store.state.incident(plan.incident)
            if incident is None or incident.justification is None:
                return None, "nothing was written down that recovery could be judged by"
            verdict = await self.judged(incident, incident.justification, _ended(incident, begun))
            if verdict.recovered and plan.verify_query:
                verdict = await self._own(plan, incident, verdict)
            if verdict.recovered:
                self.telemetry.observe("verification", self.clock() - begun)
                return True, verdict.text
            left = begun + allowed - self.clock()
            if left <= 0:
                self.telemetry.observe("verification", self.clock() - begun)
                unseen = all(check.state == "missing" for check in verdict.checked)
                text = f"after {step.action}, {allowed:g} s later: {verdict.text}"
                return (None if unseen else False), text
            await asyncio.sleep(min(self.config.verify.poll_seconds, left))

    async def _own(self, plan: Plan, incident: Incident, verdict: Verdict) -> Verdict:
        """The action's own query, asked once the series are good: it must answer with something. Whatever keeps it from
        being answered is no recovery."""
        about = self.config.prometheus
        if self.ask is None:
            return msgspec.structs.replace(verdict, recovered=False, text="no Prometheus to ask the action's own query")
        try:
            query = render(
                plan.verify_query, about.service_label, [plan.service], duration_of(about.rate_window_seconds)
            )
            samples, _ = await self.ask(query, tenant=incident.tenant)
        except (TemplateError, SourceError) as error:
            return msgspec.structs.replace(verdict, recovered=False, text=f"the action's own query: {error}")
        if samples:
            return verdict
        text = f"the series are good, but {plan.verify_query} does not hold yet"
        return msgspec.structs.replace(verdict, recovered=False, text=text)

    async def judged(self, incident: Incident, justification: Justification, since: float) -> Verdict:
        names = {watched.metric for watched in justification.series}
        if justification.facts:
            names.update(HOST_SIGNALS)
        step = self.config.prometheus.step_seconds
        now = await self.situations.since(incident, names, since - step)
        asked = msgspec.structs.replace(justification, samples=self.config.verify.samples)
        return judge(asked, now, self.packs, since=since)


def _ended(incident: Incident, otherwise: float) -> float:
    """When the newest step of the plan had run."""
    ran = [move.at for step in incident.steps for move in step.moves if move.after is StepState.RAN]
    return max(ran, default=otherwise)
