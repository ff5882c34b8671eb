"""One run of the demo: fault after fault, followed from the outside, told live.

Called by `agent.demo.__main__`. It tells the injector what to break, watches with the probe and through Prometheus,
and reads the agent's public API to show and judge what the agent did. It never helps: the agent hears of a fault only
through Alertmanager.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from agent.demo.children import WorldError
from agent.demo.probe import recovered_at
from agent.demo.recording import record_fault
from agent.demo.report import EXPECTED, FINAL_STATES, Measured, Verdict, judge, table, top_hypothesis, write
from agent.demo.world import World

BASELINE_SECONDS = 25.0  # of healthy traffic before the first fault
QUIET_SECONDS = 8.0  # of it between two faults
HEAL_SECONDS = 60.0  # from the fault; who has not healed it by then will not
POLL_SECONDS = 0.25
RECORD_QUIET_SECONDS, RECORD_PATIENCE_SECONDS = 45.0, 400.0  # a recording waits for a quiet machine


class Timeline:
    """Lines on the console: when, how long after the fault, who, what. Text is never taken as markup."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.since: float | None = None

    def say(self, who: str, what: str, style: str = "") -> None:
        after = "" if self.since is None else f"+{time.time() - self.since:.1f} s"
        line = Text(f"{time.strftime('%H:%M:%S')} {after:>8}  ", style="dim")
        line.append(f"{who:<10} ", style="bold cyan")
        line.append(what, style=style)
        self._console.print(line)


class Follower:
    """Follows one fault: what Prometheus, the probe and the agent's API show, until it is over."""

    def __init__(self, world: World, fault: str, fault_at: float, known: set[str], timeline: Timeline) -> None:
        self._world, self._fault, self._known, self._timeline = world, fault, known, timeline
        self.measured = Measured(fault_at)
        self.incidents: list[dict[str, Any]] = []
        self._told: dict[str, int] = {}

    async def until_over(self) -> None:
        """Returns when the agent has closed its incidents and the shop has recovered, or cannot any more (the agent has
        given it to a person, and what is broken does not mend itself); or after `HEAL_SECONDS`."""
        while time.time() < self.measured.fault_at + HEAL_SECONDS:
            self._world.check()
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, ValueError):
                await self._look_at_alert()
                await self._look_at_agent()
            self._look_at_probe()
            if self._agent_is_done() and (self.measured.recovered_at is not None or self._given_up()):
                return
            await asyncio.sleep(POLL_SECONDS)

    def _agent_is_done(self) -> bool:
        return bool(self.incidents) and all(i["state"] in FINAL_STATES for i in self.incidents)

    def _given_up(self) -> bool:
        return EXPECTED[self._fault].remedy and all(i["state"] == "escalated" for i in self.incidents)

    async def _look_at_alert(self) -> None:
        if self.measured.alert_at is None and await self._world.prometheus.alert_state() == "firing":
            self.measured = replace(self.measured, alert_at=time.time())
            self._timeline.say("prometheus", "the alert fires", "yellow")

    def _look_at_probe(self) -> None:
        if self.measured.recovered_at is None:
            recovered = recovered_at(self._world.probe.since(self.measured.fault_at))
            if recovered is not None:
                self.measured = replace(self.measured, recovered_at=recovered)
                self._timeline.say("probe", "checkouts are fine again", "green")

    async def _look_at_agent(self) -> None:
        found = await self._world.agent_incidents()
        self.incidents = sorted((i for i in found if i["id"] not in self._known), key=lambda i: i["opened_at"])
        for incident in self.incidents:
            told = self._told.get(incident["id"], 0)
            for line in incident["story"][told:]:
                self._timeline.say("agent", line["text"])
            self._told[incident["id"]] = len(incident["story"])
        if self.measured.diagnosed_at is None and any(top_hypothesis(i) for i in self.incidents):
            self.measured = replace(self.measured, diagnosed_at=time.time())
            self._tell_hypotheses()

    def _tell_hypotheses(self) -> None:
        incident = next(i for i in self.incidents if top_hypothesis(i))
        for rank, hypothesis in enumerate(incident["hypotheses"], 1):
            self._timeline.say(
                "agent",
                f"  {rank}. {hypothesis['cause']} on {hypothesis['service']}: {hypothesis['posterior']:.3f}",
                "magenta",
            )


async def _one_fault(world: World, fault: str, timeline: Timeline) -> tuple[Verdict, Measured]:
    assert world.injector is not None
    known = {i["id"] for i in await world.agent_incidents()}
    timeline.since = None
    remedy = "" if EXPECTED[fault].remedy else " (there is no safe remedy; it will pass by itself)"
    timeline.say("injector", f"breaks the shop: {fault}{remedy}", "bold")
    fault_at = await world.injector.inject(fault)
    timeline.since = fault_at
    follower = Follower(world, fault, fault_at, known, timeline)
    try:
        await follower.until_over()
    finally:
        await world.injector.clear(fault)
    verdict = judge(fault, follower.incidents, follower.measured)
    diagnosis = "right" if verdict.correct else "WRONG"
    summary = f"{verdict.outcome}, diagnosis {diagnosis}; {world.probe.indicator(fault_at):.0%} of the probes were good"
    timeline.say("verdict", summary, "bold green" if verdict.passed else "bold red")
    return verdict, follower.measured


async def demonstrate(console: Console, order: Sequence[str], seed: int, report: Path, keep: bool) -> bool:
    """The whole run; whether everything was diagnosed rightly and healed. Raises WorldError when the world breaks."""
    began = time.monotonic()
    timeline = Timeline(console)
    timeline.say("world", f"seed {seed} (SEED={seed} repeats the order); building the shop and its monitoring")
    verdicts: list[Verdict] = []
    measured: list[Measured] = []
    try:
        async with World.running(seed, keep) as world:
            timeline.say("world", f"{len(world.children)} processes run; logs are in {world.directory}")
            configuration = Text(world.agent_configuration().rstrip())
            console.print(Panel(configuration, title="the agent's configuration", title_align="left"))
            await world.start_agent()
            timeline.say(
                "agent", f"is ready at {world.ports.url('agent')}; {BASELINE_SECONDS:.0f} s of healthy traffic"
            )
            await asyncio.sleep(BASELINE_SECONDS)
            for fault in order:
                await world.settle(QUIET_SECONDS)
                verdict, times = await _one_fault(world, fault, timeline)
                verdicts.append(verdict)
                measured.append(times)
                write(report, verdicts)
    finally:
        if verdicts:
            console.print(table(verdicts, measured))
    passed = len(verdicts) == len(order) and all(v.passed for v in verdicts)
    timeline.since = None
    timeline.say(
        "report",
        f"{sum(v.passed for v in verdicts)} of {len(order)} right, in {time.monotonic() - began:.0f} s; {report}",
        "bold green" if passed else "bold red",
    )
    return passed


async def record(console: Console, order: Sequence[str], seed: int, directory: Path) -> None:
    """Records every fault without an agent. Raises WorldError when one of them never raised the alert."""
    timeline = Timeline(console)
    failed: list[str] = []
    async with World.running(seed) as world:
        for fault in order:
            timeline.since = None
            await world.settle(RECORD_QUIET_SECONDS, RECORD_PATIENCE_SECONDS)
            timeline.say("record", fault, "bold")
            try:
                times = await record_fault(world, fault, directory)
            except WorldError as error:
                failed.append(f"{fault}: {error}")
                continue
            timeline.say("record", f"{fault}: the alert fired after {times['alert_at'] - times['fault_at']:.1f} s")
    if failed:
        raise WorldError("not recorded: " + "; ".join(failed))
