"""The demo world: builds the shop, its monitoring, its customers, the injector and the agent, and takes them down
again.

Used by the demo's driver and by its tests: `async with World.running(...) as world`. Everything runs on ephemeral
ports of the loopback, with its data in a fresh temporary directory. The agent's directory and environment are its
own: what it shares with the injector is nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Self

import aiohttp
import asyncpg

from agent.demo import settings
from agent.demo.children import (
    Child,
    Command,
    WorldError,
    bare_environment,
    free_ports,
    path_of,
    start,
    unprivileged_user,
)
from agent.demo.probe import Probe
from agent.demo.settings import Ports

SCHEMA = Path(__file__).parent / "shop" / "schema.sql"
NODE_COLLECTORS = (
    "cpu",
    "loadavg",
    "meminfo",
    "filesystem",
    "pressure",
    "diskstats",
    "netdev",
    "stat",
    "vmstat",
    "schedstat",
    "uname",
)
GO_ENVIRONMENT = {"GOMAXPROCS": "1"}  # the Go programs leave the second CPU alone


async def until(what: str, check: Callable[[], Awaitable[bool]], seconds: float, child: Child | None = None) -> None:
    """Polls until `check` says yes. Raises WorldError at the deadline, or as soon as `child` has died."""
    deadline, last = time.monotonic() + seconds, "not so"
    while True:
        if child is not None:
            child.check()
        try:
            if await check():
                return
            last = "not so"
        except (OSError, TimeoutError, aiohttp.ClientError, asyncpg.PostgresError, ValueError) as error:
            last = f"{type(error).__name__}: {error}"
        if time.monotonic() > deadline:
            hint = f"; its last words:\n{child.tail()}" if child is not None else ""
            raise WorldError(f"{what}: not within {seconds:.0f} s ({last}){hint}")
        await asyncio.sleep(0.1)


def fresh_directory() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="shop-"))
    directory.chmod(0o711)  # PostgreSQL's user must be able to walk through
    return directory


class Prometheus:
    """Questions to the world's Prometheus, over its HTTP API."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self.url, self._session = url, session

    async def get(self, path: str, **params: str) -> Any:
        async with self._session.get(f"{self.url}/api/v1/{path}", params=params) as answer:
            document = await answer.json()
            if document.get("status") != "success":
                raise ValueError(f"prometheus: {path}: {document.get('error', answer.status)}")
            return document["data"]

    async def all_targets_up(self) -> bool:
        targets = (await self.get("targets", state="active"))["activeTargets"]
        return bool(targets) and all(t["health"] == "up" for t in targets)

    async def alert_state(self) -> str:
        """`firing`, `pending` or `inactive`: the shop's one alert."""
        alerts = (await self.get("alerts"))["alerts"]
        states = {a["state"] for a in alerts if a["labels"].get("alertname") == settings.ALERT}
        return "firing" if "firing" in states else "pending" if states else "inactive"

    async def query(self, expression: str) -> dict[str, float]:
        """An instant vector: `{labels as JSON: value}`."""
        result = (await self.get("query", query=expression))["result"]
        return {json.dumps(s["metric"], sort_keys=True): float(s["value"][1]) for s in result}


class Injection:
    """The driver's end of the injector's pipe."""

    def __init__(self, child: Child) -> None:
        self._child = child

    async def inject(self, fault: str, settings: Mapping[str, float] | None = None) -> float:
        """When it broke, in unix seconds."""
        return float((await self._ask({"inject": fault, "settings": dict(settings or {})}))["at"])

    async def clear(self, fault: str) -> None:
        await self._ask({"clear": fault})

    async def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        send, receive = self._child.process.stdin, self._child.process.stdout
        assert send is not None
        assert receive is not None
        send.write(json.dumps(request).encode() + b"\n")
        await send.drain()
        try:
            line = await asyncio.wait_for(receive.readline(), 45)
        except TimeoutError as e:
            raise WorldError(f"injector: no answer to {request} within 45 s\n{self._child.tail()}") from e
        if not line:
            raise WorldError(f"injector: it has died over {request}\n{self._child.tail()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorldError(f"injector: {answer['error']}")
        return answer


class World:
    """Everything that runs. Made by `World.running`, which also takes it down; `agent.chaos.world` has a larger one."""

    injector_module = "agent.demo.faults"

    def __init__(self, directory: Path, session: aiohttp.ClientSession, seed: int) -> None:
        self.directory, self.session, self.seed = directory, session, seed
        self.ports = Ports(*free_ports(11))
        self.orders_cpu = max(os.sched_getaffinity(0))
        self.children: dict[str, Child] = {}
        self.prometheus = Prometheus(self.ports.url("prometheus"), session)
        self.probe = Probe(self.ports.url("front") + "/checkout")
        self.injector: Injection | None = None

    @classmethod
    @contextlib.asynccontextmanager
    async def running(cls, seed: int = 1, keep: bool = False, cpu: int | None = None) -> AsyncIterator[Self]:
        """A world whose shop is open and whose Prometheus sees every target; without the agent. It ends with the
        context; `keep` leaves its directory (logs, data) behind; `cpu` is the one that `orders` is pinned to."""
        directory = fresh_directory()
        try:
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
                world = cls(directory, session, seed)
                world.orders_cpu = world.orders_cpu if cpu is None else cpu
                try:
                    await world._build()
                    async with world.probe.probing():
                        yield world
                finally:
                    await world._end()
        finally:
            if not keep:
                await asyncio.to_thread(shutil.rmtree, directory, True)

    def place(self, name: str) -> Path:
        """A part's own directory."""
        path = self.directory / name
        path.mkdir(exist_ok=True)
        return path

    def check(self) -> None:
        """Raises WorldError when a part of the world that should run has died."""
        for child in self.children.values():
            child.check()

    async def _start(self, name: str, command: Command) -> Child:
        child = await start(name, command, self.place(name) / f"{name}.out")
        self.children[name] = child
        return child

    async def _build(self) -> None:
        await self._start_postgres()
        payments = ("-m", "agent.demo.shop.payments", "--port", str(self.ports.payments), *self.payments_options())
        await self._start("payments", Command((sys.executable, *payments), bare_environment()))
        await self._start_supervisor()
        await asyncio.gather(self._start_exporters(), self._start_monitoring())
        load = ("-m", "agent.demo.shop.load", "--front", self.ports.url("front"), "--seed", str(self.seed))
        await self._start("load", Command((sys.executable, *load), bare_environment()))
        await self._start_injector()
        await until("Prometheus sees every target", self.prometheus.all_targets_up, 45)

    async def _start_postgres(self) -> None:
        user, data = unprivileged_user(), self.place("postgres") / "data"
        if user is not None:
            os.chown(data.parent, user.pw_uid, user.pw_gid)
        initdb = (
            path_of("initdb"),
            "-D",
            str(data),
            "-U",
            "postgres",
            "-A",
            "trust",
            "-E",
            "UTF8",
            "--no-locale",
            "-N",
        )
        child = await start("initdb", Command(initdb, bare_environment(), user), self.place("postgres") / "initdb.out")
        if await child.process.wait() != 0:
            raise WorldError(f"initdb failed:\n{child.tail()}")
        options = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.ports.postgres),
            "unix_socket_directories": "",
            "fsync": "off",  # the demo's data may be lost with the machine
            "max_connections": "60",
            "shared_buffers": "32MB",
        }
        argv = [path_of("postgres"), "-D", str(data)]
        for key, value in options.items():
            argv += ["-c", f"{key}={value}"]
        child = await self._start("postgres", Command(tuple(argv), bare_environment(), user, signal.SIGINT))

        async def answers() -> bool:
            await self.execute("postgres", "SELECT 1")
            return True

        await until("PostgreSQL answers", answers, 15, child)
        try:
            await self.execute("postgres", settings.DATABASE_ROLES)
            await self.execute("postgres", "CREATE DATABASE shop OWNER shop")
            await self.execute("shop", SCHEMA.read_text(), role="shop")
            await self.execute("shop", "GRANT ALL ON ALL TABLES IN SCHEMA public TO analyst", role="shop")
        except (OSError, asyncpg.PostgresError) as error:
            raise WorldError(f"the shop's database could not be set up: {error}\n{child.tail()}") from error

    async def execute(self, database: str, statements: str, role: str = "postgres") -> None:
        connection = await asyncpg.connect(self.ports.database(role, database), timeout=3)
        try:
            await connection.execute(statements)
        finally:
            await connection.close()

    async def _start_supervisor(self) -> None:
        place = self.place("supervisor")
        config = place / "supervisord.conf"
        config.write_text(self.supervisor_configuration(place))
        argv = (sys.executable, "-m", "supervisor.supervisord", "-n", "-c", str(config))
        # Only root may give the injector's CPU hog the priority that makes it hurt; else the shop's is lowered instead.
        polite = os.geteuid() != 0
        child = await self._start("supervisor", Command(argv, bare_environment(), polite=polite))
        for part in ("orders", "worker", "front"):
            url = self.ports.url(part) + "/healthz"

            async def healthy(url: str = url) -> bool:
                async with self.session.get(url) as answer:
                    return answer.status == 200

            await until(f"{part} is open", healthy, 45, child)

    async def _start_exporters(self) -> None:
        env = bare_environment() | GO_ENVIRONMENT
        node = [path_of("node_exporter"), f"--web.listen-address=127.0.0.1:{self.ports.node_exporter}"]
        node += ["--collector.disable-defaults", *(f"--collector.{name}" for name in NODE_COLLECTORS)]
        await self._start("node_exporter", Command(tuple(node), env))
        postgres = (path_of("postgres_exporter"), f"--web.listen-address=127.0.0.1:{self.ports.postgres_exporter}")
        dsn = self.ports.database("exporter")
        await self._start("postgres_exporter", Command(postgres, env | {"DATA_SOURCE_NAME": dsn}))

    async def _start_monitoring(self) -> None:
        place, env = self.place("prometheus"), bare_environment() | GO_ENVIRONMENT
        (place / "alerts.yml").write_text(self.alert_rules())
        (place / "prometheus.yml").write_text(settings.prometheus(self.ports, place / "alerts.yml"))
        argv: tuple[str, ...] = (
            path_of("prometheus"),
            f"--config.file={place}/prometheus.yml",
            f"--storage.tsdb.path={place}/data",
            f"--web.listen-address=127.0.0.1:{self.ports.prometheus}",
            "--log.level=warn",
        )
        prometheus = await self._start("prometheus", Command(argv, env))
        place = self.place("alertmanager")
        (place / "alertmanager.yml").write_text(settings.alertmanager(self.ports))
        argv = (
            path_of("alertmanager"),
            f"--config.file={place}/alertmanager.yml",
            f"--storage.path={place}/data",
            f"--web.listen-address=127.0.0.1:{self.ports.alertmanager}",
            "--cluster.listen-address=",
            "--log.level=warn",
        )
        alertmanager = await self._start("alertmanager", Command(argv, env))
        for name, child in (("prometheus", prometheus), ("alertmanager", alertmanager)):
            await self._until_ready(name, child)

    async def _until_ready(self, name: str, child: Child) -> None:
        async def ready() -> bool:
            async with self.session.get(self.ports.url(name) + "/-/ready") as answer:
                return answer.status == 200

        await until(f"{name} is ready", ready, 20, child)

    async def _start_injector(self) -> None:
        argv = (sys.executable, "-m", self.injector_module)
        child = await self._start("injector", Command(argv, {"PYTHONUNBUFFERED": "1"}, pipes=True))
        assert child.process.stdin is not None
        child.process.stdin.write(json.dumps({"shop": self.told_to_the_injector()}).encode() + b"\n")
        self.injector = Injection(child)

    async def until_alert(self, state: str, seconds: float) -> float:
        """Waits until the shop's alert is `firing`, `pending` or `inactive`; when that was seen. Raises WorldError."""

        async def reached() -> bool:
            self.check()
            return await self.prometheus.alert_state() == state

        await until(f"the alert is {state}", reached, seconds)
        return time.time()

    async def settle(self, quiet_seconds: float, seconds: float = 60.0) -> None:
        """Waits until there is no alert, not even a pending one, and the shop has been fine for `quiet_seconds`, both
        at one time: an alert that came up during the wait would be taken for the next fault's. Raises WorldError."""
        deadline = time.monotonic() + seconds
        while True:
            await self.until_alert("inactive", max(0.0, deadline - time.monotonic()))
            await asyncio.sleep(quiet_seconds)
            if self.probe.steady(quiet_seconds) and await self.prometheus.alert_state() == "inactive":
                return
            if time.monotonic() > deadline:
                raise WorldError(f"the shop is not fine for {quiet_seconds:.0f} s within {seconds:.0f} s")

    def told_to_the_injector(self) -> dict[str, Any]:
        """The fields of `agent.demo.faults.Shop`: all that the injector knows of the world."""
        shop = {name: self.ports.url(name) for name in ("front", "orders", "worker", "payments", "supervisor")}
        return shop | {"database": self.ports.database("analyst"), "cpu": self.orders_cpu}

    def payments_options(self) -> tuple[str, ...]:
        return ()

    def supervisor_configuration(self, place: Path) -> str:
        return settings.supervisor(self.ports, place, self.orders_cpu)

    def alert_rules(self) -> str:
        return settings.alert_rules()

    def agent_configuration(self) -> str:
        return settings.agent(self.ports, self.place("supervisor"), self.place("agent") / "state")

    def agent_environment(self) -> dict[str, str]:
        return bare_environment() | {"HOME": str(self.place("agent"))}

    async def start_agent(self) -> Child:
        """The installed command, with a configuration file and an environment of its own; returns when it is ready."""
        place = self.place("agent")
        config = place / "alertmedic.yaml"
        config.write_text(self.agent_configuration())
        command = Path(sys.executable).with_name("alertmedic")
        program = (str(command),) if command.exists() else (sys.executable, "-m", "agent")
        serve = Command((*program, "serve", "--config", str(config)), self.agent_environment())
        child = await self._start("agent", serve)
        await self._until_ready("agent", child)
        return child

    async def agent_incidents(self) -> list[dict[str, Any]]:
        """What the agent's public API tells, as it tells it."""
        async with self.session.get(self.ports.url("agent") + "/api/v1/incidents?limit=100") as answer:
            answer.raise_for_status()
            return list((await answer.json())["incidents"])

    async def _end(self) -> None:
        """Ends every part, the newest first: the injector mends the shop while there is still a shop."""
        order = sorted(self.children.values(), key=lambda c: c.name != "injector")
        for child in [c for c in order if c.name == "injector"]:
            if child.process.stdin is not None:
                child.process.stdin.close()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(child.process.wait(), 12)
            await child.end()
        rest = [c for c in self.children.values() if c.name != "injector"]
        first = [c for c in rest if c.name != "postgres"]
        await asyncio.gather(*(c.end() for c in first))
        await asyncio.gather(*(c.end() for c in rest if c.name == "postgres"))
