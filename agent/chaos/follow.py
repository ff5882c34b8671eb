"""One run: breaks the shop as the scenario says, watches from outside until it is over, and puts it right again.

Used by `agent.chaos.run`. It looks with the outside probes, at Prometheus' alerts and at the agent's public API, and
never helps anybody: what the arm does is the arm's. Whatever happens, what was injected is cleared before it returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import aiohttp

from agent.chaos.arms import WITH_AGENT, Doings
from agent.chaos.measure import CAP_SECONDS, Run
from agent.chaos.scenario import Scenario
from agent.chaos.workload import CannotInjectError, Workload
from agent.demo.children import WorldError
from agent.demo.probe import Checkout, degraded_at, recovered_at
from agent.demo.report import FINAL_STATES, UNTOUCHED_STEPS

POLL_SECONDS = 0.25
QUIET_SECONDS, PATIENCE_SECONDS = 8.0, 120.0
CONFIRM_SECONDS = 5.0  # a recovery must last
AFTERWARDS_SECONDS = 45.0  # for an agent to close its incidents once the shop is fine
KILL_WITHIN_SECONDS = 6.0  # an alert is usually followed by a recovery within this time
CONTROL_SECONDS = 20.0  # to watch on after the last event of a scenario in which nothing gets worse
_Touched = tuple[str, str]
_Ranking = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Job:
    """One run to be made. `kill_agent`: kill -9 it at a random moment of the run, whatever it is doing."""

    scenario: Scenario
    arm: str
    repetition: int
    seed: int
    kill_agent: bool = False

    @property
    def key(self) -> str:
        return f"{self.scenario.name}/{self.arm}/{self.repetition}{'/killed' if self.kill_agent else ''}"


@dataclass
class Follower:
    """What was seen of one run so far. Times are unix seconds."""

    world: Workload
    job: Job
    doings: Doings
    known: frozenset[str]
    began: float = 0.0
    last_event: float = 0.0
    ended: float = math.inf  # what is put right afterwards is no part of the run
    alerts: dict[str, float] = field(default_factory=dict)
    acknowledged: float | None = None
    diagnosed: float | None = None
    acted: float | None = None
    alerted: asyncio.Event = field(default_factory=asyncio.Event)
    killed: float | None = None
    impossible: str = ""  # why a fault could not be injected at all
    incidents: list[dict[str, Any]] = field(default_factory=list)
    rankings: Rankings = field(default_factory=lambda: Rankings())

    async def until_over(self, timeline: asyncio.Task[None]) -> None:
        """Polls until the shop has recovered for good (and the agent has closed its incidents), or the cap."""
        fine_since: float | None = None
        while True:
            self.world.check()
            if timeline.done():
                timeline.result()
            for look in (self._look_at_alerts, self._look_at_agent):  # one that hangs hides nothing of the other
                with contextlib.suppress(aiohttp.ClientError, TimeoutError, ValueError):
                    await look()
            now = time.time()
            if now > self.began + CAP_SECONDS + AFTERWARDS_SECONDS:
                return
            over = timeline.done() and self._over(now)
            fine_since = (fine_since or now) if over else None
            if fine_since is not None and (self._closed() or now > fine_since + AFTERWARDS_SECONDS):
                return
            await asyncio.sleep(POLL_SECONDS)

    def _over(self, now: float) -> bool:
        """Whether nothing more is to be measured of the shop."""
        probes = self.world.probe.since(self.began)
        if now > self.began + CAP_SECONDS:
            return True
        if degraded_at(probes) is None:
            return now > self.last_event + CONTROL_SECONDS
        at = recovered_at(probes)
        return at is not None and at > self.last_event and now > at + CONFIRM_SECONDS

    def _closed(self) -> bool:
        return self.job.arm not in WITH_AGENT or all(i["state"] in FINAL_STATES for i in self.incidents)

    async def _look_at_alerts(self) -> None:
        for name, since in (await self.world.alerts()).items():
            if since >= self.began - 1.0:
                self.alerts.setdefault(name, time.time())
                self.alerted.set()

    async def _look_at_agent(self) -> None:
        if self.job.arm in WITH_AGENT:
            found = await self.world.agent_incidents()
            self.incidents = sorted((i for i in found if i["id"] not in self.known), key=lambda i: i["opened_at"])
            self.rankings.see(self.incidents)
            now = time.time()
            if self.incidents:
                self.acknowledged = self.acknowledged or now
            if any(_ranked(i) for i in self.incidents):
                self.diagnosed = self.diagnosed or now
            if any(_touched(i) for i in self.incidents):
                self.acted = self.acted or now

    def run(self, seconds: float) -> Run:
        """All of it as one record."""
        scenario = self.job.scenario
        probes = [probe for probe in self.world.probe.since(self.began) if probe.at <= self.ended]
        touched = [t for i in self.incidents for t in _touched(i)]
        done = [(what, where) for at, what, where in self.doings.done if at >= self.began and what != "approval"]
        acted_at = min(
            [at for at, what, _ in self.doings.done if at >= self.began and what != "approval"], default=None
        )
        top = self.rankings.judged(self.incidents)
        rank = next((n for n, (c, s) in enumerate(top, 1) if scenario.truth.names(c, s)), None)
        recovered = self._recovered(probes)
        acts = touched or done
        return Run(
            scenario=scenario.name,
            kind=scenario.kind,
            healed_by=scenario.healed_by,
            arm=self.job.arm,
            repetition=self.job.repetition,
            seed=self.job.seed,
            at=self.began,
            killed_agent=self.job.kill_agent,
            killed_at=self._after(self.killed),
            degraded=self._after(degraded_at(probes)),
            alert=self._after(min(self.alerts.values(), default=None)),
            acknowledged=self._after(self.acknowledged or min(self.doings.acknowledged, default=None)),
            diagnosed=self._after(self.diagnosed),
            acted=self._after(self.acted if self.job.arm in WITH_AGENT else acted_at),
            recovered=self._after(recovered),
            top=tuple(f"{cause}@{service}" for cause, service in top),
            truth=tuple(f"{cause}@{scenario.truth.service}" for cause in scenario.truth.causes),
            rank=rank,
            answer=next((i["verdict"] or "" for i in self.incidents), ""),
            actions=tuple(f"{action}@{service}" for action, service in acts),
            wrong=tuple(f"{a}@{s}" for a, s in touched if not scenario.control and not scenario.truth.allows(a, s)),
            needless=tuple(f"{a}@{s}" for a, s in acts if scenario.control),
            undone=sum(_states(i).count("undone") for i in self.incidents),
            attempts=len(touched),
            collateral=self._collateral(),
            outcome=",".join(dict.fromkeys(i["state"] for i in self.incidents)),
            void=self._void(probes),
            seconds=round(seconds, 1),
            story=tuple(f"{line['at']} {line['text']}" for i in self.incidents for line in i["story"])[:80],
        )

    def _recovered(self, probes: Sequence[Checkout]) -> float | None:
        """Of the shop as a whole: None while a later probe is bad again."""
        at = recovered_at(probes)
        return at if at is not None and degraded_at(probes) is not None else None

    def _after(self, at: float | None) -> float | None:
        return None if at is None else round(at - self.began, 3)

    def _collateral(self) -> float:
        """The share of bad probes among the innocent ones."""
        if "browse" not in self.job.scenario.innocent:
            return 0.0
        probes = self.world.browse.since(self.began)
        return round(sum(not p.good for p in probes) / len(probes), 4) if probes else 0.0

    def _void(self, probes: Sequence[Checkout]) -> str:
        """Which expectation of the scenario about the world did not come true, in words; or what could not be done."""
        if self.impossible:
            return self.impossible
        for event in self.job.scenario.timeline:
            if event.expect is None:
                continue
            first, last = self.began + event.between[0], self.began + event.between[1]
            within = [p for p in probes if first <= p.at <= last]
            alert = any(first <= at <= last for at in self.alerts.values())
            seen = {
                "degraded": degraded_at(within) is not None,
                "fine": degraded_at(within) is None,
                "alert": alert,
                "no_alert": not alert,
            }[event.expect]
            if not seen and not (event.expect == "alert" and self._healed_before(last)):
                return f"expected within {event.between[0]:g} to {event.between[1]:g} s: {event.expect}"
        return ""

    def _healed_before(self, at: float) -> bool:
        """Whether the arm mended it before an alert had to come: the fault was real, and over too early for one."""
        recovered = self._recovered(self.world.probe.since(self.began))
        return recovered is not None and recovered < at


async def follow(world: Workload, job: Job, doings: Doings) -> Run:
    """Makes the run. Raises WorldError when the world breaks in a way that no scenario asked for."""
    started = time.monotonic()
    await world.quiet(QUIET_SECONDS, PATIENCE_SECONDS)
    known: frozenset[str] = frozenset()
    if job.arm in WITH_AGENT:
        known = frozenset(i["id"] for i in await world.agent_incidents())
    follower = Follower(world, job, doings, known, began=time.time())
    injected: list[str] = []
    killing = asyncio.ensure_future(_kill_sometime(follower))
    timeline = asyncio.ensure_future(_play(world, follower, injected))
    try:
        await follower.until_over(timeline)
    finally:
        timeline.cancel()
        if follower.killed is None:
            killing.cancel()  # begun, it goes on until the agent is back: the next run needs one
        _, ended = await asyncio.gather(timeline, killing, return_exceptions=True)
        follower.ended = time.time()
        await _clear(world, injected)
    if isinstance(ended, Exception):
        raise ended
    return follower.run(time.monotonic() - started)


async def _kill_sometime(follower: Follower) -> None:
    """kill -9 of the agent at a moment between the first alert and the usual recovery, which the seed decides."""
    job = follower.job
    if not job.kill_agent or job.arm not in WITH_AGENT:
        return
    await follower.alerted.wait()
    await asyncio.sleep(random.Random(job.seed).uniform(0.0, KILL_WITHIN_SECONDS))  # noqa: S311 - a moment, no secret
    follower.killed = time.time()
    await follower.world.kill_agent()


async def _play(world: Workload, follower: Follower, injected: list[str]) -> None:
    """The scenario's injections and clearings at their times, which count from the first injection."""
    begun, first = time.monotonic(), True
    events = sorted((e for e in follower.job.scenario.timeline if e.at is not None), key=lambda e: e.at or 0.0)
    for event in events:
        await asyncio.sleep(max(0.0, begun + (event.at or 0.0) - time.monotonic()))
        if event.inject is not None:
            injected.append(event.inject)
            try:
                at = await world.inject(event.inject, event.settings)
            except CannotInjectError as error:
                follower.impossible = str(error)
                return
            if first:
                follower.began, begun, first = at, time.monotonic() - max(0.0, time.time() - at), False
        elif event.clear is not None:
            await world.clear(event.clear)
        # What ends by itself ends later than it begins.
        follower.last_event = max(follower.last_event, time.time() + event.settings.get("seconds", 0.0))


async def _clear(world: Workload, injected: Sequence[str]) -> None:
    """Clears everything, the newest first; one failure keeps no other from being cleared."""
    failures: list[str] = []
    for name in reversed(list(dict.fromkeys(injected))):
        try:
            await world.clear(name)
        except WorldError as error:
            failures.append(f"{name}: {error}")
    if failures:
        raise WorldError(f"not cleared: {'; '.join(failures)}")


# -- what the agent's API tells ----------------------------------------------------------------------------------------


def _ranked(incident: dict[str, Any]) -> bool:
    return incident["verdict"] == "ranked" and bool(incident["hypotheses"])


def _touched(incident: dict[str, Any]) -> list[_Touched]:
    """(action, service) of everything that was run against the world, in order; nothing read-only."""
    touched: list[_Touched] = []
    for past in incident["past_plans"]:
        for action, state in zip(past["actions"], past["states"], strict=False):
            if state not in UNTOUCHED_STEPS and not action.startswith("diagnostic."):
                touched.append((action, past["service"]))
    plan = incident["plan"]
    for step in plan["steps"] if plan else ():
        if step["state"] not in UNTOUCHED_STEPS and not step["read_only"]:
            touched.append((step["action"], plan["service"]))
    return touched


def _states(incident: dict[str, Any]) -> list[str]:
    return [step["state"] for step in (incident["plan"] or {"steps": ()})["steps"]]


@dataclass
class Rankings:
    """The rankings that the agent told while it was watched: (cause, service), best first. It may look again after it
    has acted, at a world that its own action changed: what counts is the ranking that its first action rests on."""

    told: dict[str, list[_Ranking]] = field(default_factory=dict)  # by incident, each that differs from the last
    acted_on: dict[str, _Ranking] = field(default_factory=dict)  # by incident, in the order of the first actions

    def see(self, incidents: Sequence[dict[str, Any]]) -> None:
        """What the agent's API tells now. Seen often, so that no ranking comes and goes unseen."""
        for incident in incidents:
            id, told = incident["id"], self.told.setdefault(incident["id"], [])
            ranking = tuple((h["cause"], h["service"]) for h in incident["hypotheses"]) if _ranked(incident) else ()
            if ranking and ranking not in told[-1:]:
                told.append(ranking)
            if id not in self.acted_on and (first := _first_plan(incident)) is not None:
                rests_on = (r for r in reversed(told) if r[0][0] == first["cause"])
                # A plan whose ranking nobody saw tells the cause that it is for, and where it acts.
                self.acted_on[id] = next(rests_on, ((first["cause"], first["service"]),))

    def judged(self, incidents: Sequence[dict[str, Any]]) -> _Ranking:
        """What the run is judged by: the ranking that the first action rests on; where nothing was done, the one that
        people were handed (the first incident's that was escalated with any), or else the first incident's that has
        any; () without."""
        if self.acted_on:
            return next(iter(self.acted_on.values()))
        ranked = [i for i in incidents if _ranked(i)]
        handed = next((i for i in ranked if i["state"] == "escalated"), None) or next(iter(ranked), None)
        return () if handed is None else tuple((h["cause"], h["service"]) for h in handed["hypotheses"])


def _first_plan(incident: dict[str, Any]) -> dict[str, Any] | None:
    """The first plan of which anything was run against the world."""
    bare = {**incident, "past_plans": [], "plan": None}
    for past in incident["past_plans"]:
        if _touched({**bare, "past_plans": [past]}):
            return cast("dict[str, Any]", past)
    return incident["plan"] if _touched({**bare, "plan": incident["plan"]}) else None
