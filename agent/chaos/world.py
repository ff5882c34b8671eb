"""The world of the chaos harness: the demo's shop with more symptom alerts, and network links that can be disturbed.

Used by `agent.chaos.run` and its tests: `async with ChaosWorld.running(...) as world`. It adds to `agent.demo.world`
what scenarios need and changes nothing of what the agent is told, but for what arms of the comparison ask (`autonomy`)
and for bounds that many faults in a row would reach (`SHARED_WORLD`).
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

from agent.chaos import certificates, disk, releases, throttle
from agent.chaos.certificates import Certificates
from agent.chaos.disk import fill
from agent.chaos.workload import CannotInjectError
from agent.demo import settings
from agent.demo.children import Child, Command, WorldError, bare_environment, free_ports
from agent.demo.probe import Probe
from agent.demo.world import World

BROWSE_SLOW_SECONDS = 0.4
LATE_SECONDS = 4
LINKS = ("database", "payments")
PAYMENTS_NAME = "payments.shop.test"
FAKETIME = "*/faketime/libfaketime.so.1"  # below /usr/lib; Debian: faketime
# The injector must not know them.
HARNESS_FAULTS = frozenset({"agent_kill", "prometheus_frozen", "alertmanager_frozen", "journal_full", "sandbox_gone"})
NEEDS_DISK = {"disk_full": "spool", "disk_slow": "spool", "journal_full": "journal"}
# Bounds by which the guard tells an ordinary day from a storm are meant for faults that are days apart. Here they are
# half a minute apart, and a run must not depend on those before it in its world.
SHARED_WORLD = {"storm": {"incidents": 200}, "actions_per_action_per_hour": 60}
# A queue that is served again takes its time; the demo, which has no such fault, gives up after half of it.
VERIFY_SECONDS = 60
TREND_HOURS = 40000  # what is kept in the cache of `orders` takes half a second of CPU to compute
SMALL_DISKS = {"spool": 48, "journal": 64}  # MB: the shop's receipts and logs; the agent's journal


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
    sets_clock = False  # whether `orders` runs under libfaketime

    def __init__(self, directory: Path, session: aiohttp.ClientSession, seed: int) -> None:
        super().__init__(directory, session, seed)
        free = iter(free_ports(2 * len(LINKS) + 3))
        self.links = {name: (next(free), next(free)) for name in LINKS}  # name: (port of the link, of its control)
        # Who only looks: what breaks the checkout alone must not break this, and no remedy may either.
        self.browse = Probe(self.ports.url("front") + "/", "GET", None)
        self.autonomy = "auto"
        self.keeps_looks = False  # whether the agent writes a recording of every look
        self.names_port, self.names_control, self.payments_tls = next(free), next(free), next(free)
        self.certificates: Certificates | None = None
        self.clock = self.place("clock") / "offset"
        self.enforceable = True
        self.disks: dict[str, Path] = {}  # small ones, by what they are for
        self.no_disks = ""  # why there are none
        faketime = sorted(Path("/usr/lib").glob(FAKETIME)) if self.sets_clock else ()
        self.faketime = next(map(str, faketime), "")

    @property
    def state_dir(self) -> Path:
        """The agent's state: its journal is in it."""
        return self.place("journal") / "state"

    @property
    def looks(self) -> Path:
        return self.place("agent") / "looks"

    async def _build(self) -> None:
        self.certificates = await certificates.make(self.place("certificates"), PAYMENTS_NAME)
        releases.write(self.place("releases"))
        self.clock.write_text("+0\n")
        await self._mount_disks()
        (self.place("spool") / "log").mkdir()
        ports = ("--listen", str(self.names_port), "--control", str(self.names_control))
        argv = (sys.executable, "-m", "agent.chaos.names", *ports, f"{PAYMENTS_NAME}=127.0.0.1")
        await self._start("names", Command(argv, bare_environment()))
        await super()._build()

    async def _mount_disks(self) -> None:
        """Small disks, or the reason why there are none."""
        self.no_disks = disk.obstacle()
        for name, megabytes in SMALL_DISKS.items() if not self.no_disks else ():
            at = self.place(name)
            try:
                await disk.mount(self.directory / f"{name}.img", at, megabytes)
            except WorldError as error:  # a container's root may not mount
                self.no_disks = str(error)
                return
            self.disks[name] = at

    def payments_options(self) -> tuple[str, ...]:
        assert self.certificates is not None
        return ("--tls-port", str(self.payments_tls), "--certificate", str(self.certificates.valid))

    async def _start_supervisor(self) -> None:
        behind = {"database": self.ports.postgres, "payments": self.payments_tls}
        for name, (listen, control) in self.links.items():
            ports = ("--listen", str(listen), "--to", str(behind[name]), "--control", str(control))
            argv = (sys.executable, "-m", "agent.chaos.proxy", *ports)
            await self._start(f"link-{name}", Command(argv, bare_environment()))
        await super()._start_supervisor()

    def supervisor_configuration(self, place: Path) -> str:
        database = self.ports.database("shop").replace(f":{self.ports.postgres}/", f":{self.links['database'][0]}/")
        payments = f"https://{PAYMENTS_NAME}:{self.links['payments'][0]}"
        assert self.certificates is not None
        more = {
            "release": str(self.place("releases") / releases.CURRENT),
            "ca": str(self.certificates.authority),
            "resolver": f"127.0.0.1:{self.names_port}",
            "spool": str(self.place("spool")),
            "trends": str(TREND_HOURS),
        }
        return settings.supervisor(
            self.ports, place, self.orders_cpu, database, payments, more, self._orders_environment()
        )

    def _orders_environment(self) -> dict[str, str]:
        """A clock that can be wrong, where the library for it is installed: this process' only, and not its timers."""
        if not self.faketime:
            return {}
        return {
            "LD_PRELOAD": self.faketime,
            "FAKETIME_TIMESTAMP_FILE": str(self.clock),
            "FAKETIME_CACHE_DURATION": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "MALLOC_ARENA_MAX": "1",
        }

    def told_to_the_injector(self) -> dict[str, Any]:
        links = {name: f"http://127.0.0.1:{control}" for name, (_, control) in self.links.items()}
        assert self.certificates is not None
        return super().told_to_the_injector() | {
            "links": links,
            "names": f"http://127.0.0.1:{self.names_control}",
            "certificates": {n: str(getattr(self.certificates, n)) for n in ("valid", "renewed", "expired")},
            "releases": str(self.place("releases")),
            "clock": str(self.clock) if self.faketime else "",
            "spool": str(self.disks.get("spool", "")),
        }

    def alert_rules(self) -> str:
        document = yaml.safe_load(super().alert_rules())
        document["groups"][0]["rules"] += symptom_rules()
        return yaml.safe_dump(document, sort_keys=False, width=1000)

    def agent_configuration(self) -> str:
        document = yaml.safe_load(super().agent_configuration())
        document["autonomy"] = {"default": self.autonomy}
        document["guard"] |= SHARED_WORLD
        document["verify"]["deadline_seconds"] = VERIFY_SECONDS
        if self.keeps_looks:
            self.looks.mkdir(exist_ok=True)
            document["investigate"]["recordings"] = str(self.looks)
        document["inventory"]["node-1"]["log_root"] = str(self.place("spool") / "log")
        if not self.enforceable:
            document["sandbox"] = {"protection": "required", "parent": "/sys/fs/cgroup/not-delegated"}
        document["state_dir"] = str(self.state_dir)
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
        """When it broke, in unix seconds. Raises CannotInjectError where this machine lacks something, WorldError."""
        if lacking := self._lacking(fault):
            raise CannotInjectError(f"{fault} cannot be made here: {lacking}")
        if fault == "agent_kill":
            await self.kill_agent()
        elif fault == "sandbox_gone":
            await self._restart_agent(enforceable=False)
        elif fault == "journal_full":
            await asyncio.to_thread(fill, self._journal_filler())  # something else takes the last byte of its disk
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
        elif fault == "sandbox_gone":
            await self._restart_agent(enforceable=True)
        elif fault == "journal_full":
            self._journal_filler().unlink(missing_ok=True)
        elif fault != "agent_kill":
            self._signal(self.children[fault.removesuffix("_frozen")], signal.SIGCONT)

    async def _restart_agent(self, *, enforceable: bool) -> None:
        """The agent is started again by somebody who insists on enforced limits, and who has not delegated the cgroup
        that they need; and later as before."""
        self.enforceable = enforceable
        await self.kill_agent()

    def _journal_filler(self) -> Path:
        return self.place("journal") / "something-else"

    def _lacking(self, fault: str) -> str:
        """What this machine lacks for a fault; "" where it lacks nothing."""
        if fault in NEEDS_DISK and NEEDS_DISK[fault] not in self.disks:
            return f"there is no small disk: {self.no_disks}"
        if fault == "disk_slow" and (why := throttle.obstacle()):
            return why
        if fault == "clock_skew" and not self.sets_clock:
            return "nothing in this world runs under libfaketime"
        if fault == "clock_skew" and not self.faketime:
            return "libfaketime not found: apt-get install faketime"
        return ""

    async def _end(self) -> None:
        await super()._end()
        while self.disks:
            _, at = self.disks.popitem()
            if at.is_mount():  # else an interrupted end has done it
                await disk.unmount(at)

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


class ClockWorld(ChaosWorld):
    """A chaos world with a clock that can be wrong. A world of its own: libfaketime takes `orders` a third of a CPU."""

    sets_clock = True
