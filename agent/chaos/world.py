"""The world of the chaos harness: the demo's shop with more symptom alerts, and network links that can be disturbed.

Used by `agent.chaos.run` and its tests: `async with ChaosWorld.running(...) as world`. It adds to `agent.demo.world`
what scenarios need and changes nothing of what the agent is told, but for what arms of the comparison ask: `autonomy`.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import yaml

from agent.demo import settings
from agent.demo.children import Child, Command, WorldError, bare_environment, free_ports
from agent.demo.probe import Probe
from agent.demo.world import World

BROWSE_SLOW_SECONDS = 0.4
LATE_SECONDS = 4
LINKS = ("database", "payments")
HARNESS_FAULTS = frozenset(
    {"agent_kill", "prometheus_frozen", "alertmanager_frozen"}
)  # the injector must not know them


def symptom_rules() -> list[dict[str, Any]]:
    """Alerts beside the demo's: each a symptom with several causes, at `for` 2 s like the demo's."""
    series = "http_server_request_duration_seconds"
    where, window = 'service="front",http_route="/"', settings.RATE_WINDOW
    slow = f"histogram_quantile(0.95, sum by (service, le) (rate({series}_bucket{{{where}}}[{window}])))"
    failed = f'sum by (service) (rate({series}_count{{{where},http_response_status_code=~"5.."}}[{window}]))'
    every = f"sum by (service) (rate({series}_count{{{where}}}[{window}]))"
    database = "db_client_operation_duration_seconds_count"
    db_failed = f'sum by (service) (rate({database}{{error_type!=""}}[{window}]))'
    db_every = f"sum by (service) (rate({database}[{window}]))"
    rules = {
        "ShopBrowseDegraded": (
            f"({slow} > {BROWSE_SLOW_SECONDS}) or ({failed} / {every} > {settings.MAX_ERROR_RATIO})",
            "The catalogue is slow or fails",
        ),
        "ShopOrdersLate": (
            f"max by (service) (queue_oldest_age_seconds) > {LATE_SECONDS}",
            "Orders wait too long for their confirmation",
        ),
        "ShopDatabaseErrors": (f"{db_failed} / {db_every} > 0.2", "Database operations fail"),
    }
    return [
        {
            "alert": name,
            "expr": expression,
            "for": "2s",
            "labels": {"severity": "warning"},
            "annotations": {"summary": summary},
        }
        for name, (expression, summary) in rules.items()
    ]


class ChaosWorld(World):
    """The shop behind its links. `autonomy` is what the agent's configuration grants ("auto" or "approve")."""

    injector_module = "agent.chaos.faults"

    def __init__(self, directory: Path, session: aiohttp.ClientSession, seed: int) -> None:
        super().__init__(directory, session, seed)
        free = iter(free_ports(2 * len(LINKS)))
        self.links = {name: (next(free), next(free)) for name in LINKS}  # name: (port of the link, of its control)
        # Who only looks: what breaks the checkout alone must not break this, and no remedy may either.
        self.browse = Probe(self.ports.url("front") + "/", "GET", None)
        self.autonomy = "auto"
        self.keeps_looks = False  # whether the agent writes a recording of every look

    @property
    def state_dir(self) -> Path:
        """The agent's state: its journal is in it."""
        return self.place("agent") / "state"

    @property
    def looks(self) -> Path:
        return self.place("agent") / "looks"

    async def _start_supervisor(self) -> None:
        behind = {"database": self.ports.postgres, "payments": self.ports.payments}
        for name, (listen, control) in self.links.items():
            ports = ("--listen", str(listen), "--to", str(behind[name]), "--control", str(control))
            argv = (sys.executable, "-m", "agent.chaos.proxy", *ports)
            await self._start(f"link-{name}", Command(argv, bare_environment()))
        await super()._start_supervisor()

    def supervisor_configuration(self, place: Path) -> str:
        database = self.ports.database("shop").replace(f":{self.ports.postgres}/", f":{self.links['database'][0]}/")
        payments = f"http://127.0.0.1:{self.links['payments'][0]}"
        return settings.supervisor(self.ports, place, self.orders_cpu, database, payments)

    def told_to_the_injector(self) -> dict[str, Any]:
        links = {name: f"http://127.0.0.1:{control}" for name, (_, control) in self.links.items()}
        return super().told_to_the_injector() | {"links": links}

    def alert_rules(self) -> str:
        document = yaml.safe_load(super().alert_rules())
        document["groups"][0]["rules"] += symptom_rules()
        return yaml.safe_dump(document, sort_keys=False, width=1000)

    def agent_configuration(self) -> str:
        document = yaml.safe_load(super().agent_configuration())
        document["autonomy"] = {"default": self.autonomy}
        if self.keeps_looks:
            document["investigate"]["recordings"] = str(self.looks)
        return yaml.safe_dump(document, sort_keys=False)

    async def alerts(self) -> dict[str, float]:
        """The alerts that fire, with the time since when (unix seconds)."""
        found = (await self.prometheus.get("alerts"))["alerts"]
        return {
            a["labels"]["alertname"]: datetime.fromisoformat(a["activeAt"]).timestamp()
            for a in found
            if a["state"] == "firing"
        }

    async def quiet(self, seconds: float, patience: float) -> None:
        """Waits until no alert fires or is pending and both probes have been fine for `seconds`. Raises WorldError."""
        deadline, since = time.monotonic() + patience, time.monotonic()
        while True:
            self.check()
            fine = self.probe.steady(seconds) and self.browse.steady(seconds)
            try:
                fine = fine and not (await self.prometheus.get("alerts"))["alerts"]
            except (aiohttp.ClientError, TimeoutError, ValueError):
                fine = False
            if not fine:
                since = time.monotonic()
            if time.monotonic() - since >= seconds:
                return
            if time.monotonic() > deadline:
                raise WorldError(f"the shop is not fine for {seconds:.0f} s within {patience:.0f} s")
            await asyncio.sleep(0.25)

    # -- the agent and its monitoring, disturbed by the harness itself -------------------------------------------------

    async def inject(self, fault: str, settings: Mapping[str, float]) -> float:
        """When it broke, in unix seconds. Raises WorldError."""
        if fault == "agent_kill":
            await self.kill_agent()
        elif fault in HARNESS_FAULTS:
            self._signal(self.children[fault.removesuffix("_frozen")], signal.SIGSTOP)
        else:
            assert self.injector is not None
            return await self.injector.inject(fault, settings)
        return time.time()

    async def clear(self, fault: str) -> None:
        """May be called again, and of what has ended by itself. Raises WorldError."""
        if fault not in HARNESS_FAULTS:
            assert self.injector is not None
            await self.injector.clear(fault)
        elif fault != "agent_kill":
            self._signal(self.children[fault.removesuffix("_frozen")], signal.SIGCONT)

    async def kill_agent(self) -> None:
        """kill -9, and then a supervisor's restart: the same command over the same state. Where no agent runs, nothing
        happens."""
        child = self.children.pop("agent", None)  # out of the list meanwhile: that it has died is no surprise
        if child is None:
            return
        child.process.kill()
        await child.process.wait()
        await self.start_agent()

    async def end_child(self, name: str) -> None:
        child = self.children.pop(name, None)
        if child is not None:
            await child.end()

    @staticmethod
    def _signal(child: Child, number: signal.Signals) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(child.pid)
            for one in (process, *process.children(recursive=True)):
                one.send_signal(number)
