"""Builds every object from the configuration, runs the service, drains it: the only wiring.

Called by `agent.cli` (`alertmedic serve`). Order of the start: sandbox probed, journal (replayed), then the port, then
actions and packs read and the investigations; ready is told once alerts can be made durable. Order of the end: no
new webhooks, no new investigations, running steps may finish within a grace period, then the journal is closed. It
decides nothing about incidents.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import resource
import shutil
import signal
import ssl
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import sandbox
from actions.catalog import Catalog, load_catalog
from actions.model import BreakerState
from agent import __version__, log
from agent.config import Config, ConfigError
from agent.config_checks import unknown_inventory
from agent.downstream import Downstream
from agent.engines import engine_of
from agent.expressions import Expressions, rules_of
from agent.gateway.gateway import Gateway
from agent.http.auth import Credential, Guard
from agent.http.gateway_api import GatewayApi
from agent.http.server import Options, Serving, build_app
from agent.http.server import serve as serve_http
from agent.incidents import Changes, IncidentState
from agent.intake import Accepted, Intake
from agent.investigate import Investigation
from agent.journal.records import AgentStarted, FoldPolicy, Noted, Stored
from agent.journal.wal import JournalError
from agent.learning import Learning
from agent.operations import Operations
from agent.packs import load_packs
from agent.reconcile import ReconcileError, reconcile
from agent.remediation import Remediation
from agent.schedule import Schedule
from agent.situation import Situations
from agent.sources import Source
from agent.sources.host import HostSource
from agent.sources.kubernetes import KubernetesSource
from agent.sources.kubernetes_cache import Cache, Connection
from agent.sources.prometheus import Prometheus, PrometheusSource
from agent.store import Store
from agent.systems import SystemsSeen
from agent.telemetry import Telemetry
from agent.topology import Discovery, load_topology
from agent.verify import SeriesVerifier
from rules.packs import PackSet

if TYPE_CHECKING:
    from agent.tracing import Tracing

logger = logging.getLogger("alertmedic.app")
RECONCILE_SECONDS = 30.0
NO_PACKS = PackSet(())  # until they are read
DRAIN_SECONDS = 0.1  # between two looks at what still runs
SWEEP_SECONDS = 10.0
RETRY_SECONDS = 5.0
LOW_DISK_BYTES = 64 * 1024 * 1024


async def serve(config: Config, ready: Callable[[str], None] | None = None) -> int:
    """Runs until SIGTERM or SIGINT. Returns the exit code. `ready(address)` is called once the port listens."""
    log.configure(config.log.format, config.log.level)
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    sandbox.shield()
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # every connection takes one; the sandbox sets its own
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with running(config) as app:
        address = "{}:{}".format(*app.serving.addresses[0])
        logger.info(
            "alertmedic %s listens on %s; state %s; sandbox %s; autonomy %s",
            __version__,
            address,
            config.state_dir,
            sandbox.current().enforced_by,
            config.autonomy.default,
        )
        if ready is not None:
            ready(address)
        await stop.wait()
        logger.info("draining")
    return 0


@contextlib.asynccontextmanager
async def running(config: Config) -> AsyncIterator[App]:
    """The whole service, for the time of the block."""
    sandbox.use(sandbox.probe(config.sandbox.parent, config.sandbox.total))
    sandbox.absent_layers()  # found out now, by trying: health then only reads it
    for leaf in await sandbox.sweep(SWEEP_SECONDS):
        logger.warning("ended %s: a run of an agent that is dead", leaf)
    topology = load_topology(config)
    config.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    telemetry = Telemetry(__version__, _tracing(config) if config.otlp.endpoint else None)
    store = Store.open(
        config.state_dir,
        segment_bytes=config.journal.segment_bytes,
        backlog_bytes=config.journal.backlog_bytes,
        snapshot_bytes=config.journal.snapshot_bytes,
    )
    try:
        async with contextlib.AsyncExitStack() as stack:
            downstream = Downstream(store)
            sources: list[Source] = [HostSource(config.inventory_strings)]
            if config.kubernetes.enabled and config.kubernetes.evidence:
                cache = Cache(_api_server(config), config.kubernetes.namespaces, nodes=config.kubernetes.nodes)
                sources.append(KubernetesSource(await stack.enter_async_context(cache)))
            discover = ask = systems = None
            expressions = Expressions()
            if config.prometheus.url:
                prometheus = await stack.enter_async_context(
                    PrometheusSource(prometheus_of(config), breaker=downstream.prometheus)
                )
                sources.append(prometheus)
                ask = prometheus.query_instant
                systems = SystemsSeen(prometheus)
                expressions = Expressions(rules_of(prometheus))
                if config.topology.service_graph:
                    discover = Discovery(prometheus).topology
            situations = Situations(
                *(config, NO_PACKS, sources, topology, discover),
                expressions=expressions,
                discovery=downstream.topology,
                systems=systems,
            )
            verifier = SeriesVerifier(config, NO_PACKS, situations, store, telemetry, ask=ask)
            remediation = Remediation(config, Catalog(()), store, verifier, telemetry)
            learning = Learning(config, store, NO_PACKS)
            gateway = Gateway(config, store, situations, telemetry)
            app = App(config, store, telemetry, remediation, gateway, downstream, learning)
            investigation = app.investigation = Investigation(
                *(config, NO_PACKS, store, situations, remediation, verifier, telemetry, app.wake),
                shadow=gateway.shadow,
                first=gateway.first,
                learning=learning,
            )

            def primary(packs: PackSet) -> None:
                situations.packs = verifier.packs = investigation.packs = packs
                learning.rebase(packs)
                investigation.engine = engine_of(config.packs.engine, packs)
                if investigation.engine is not None:
                    stack.callback(investigation.engine.close)

            gateway.on_primary = primary
            await app.listen(topology.edges)
            try:
                # Alerts are safe before anybody can say what they mean: reading what is known keeps no sender waiting.
                if telemetry.tracing is None:
                    telemetry.tracing = await asyncio.to_thread(_tracing, config)
                remediation.use(await asyncio.to_thread(_catalog, config))
                packs = await asyncio.to_thread(load_packs, config.packs.dirs, config.packs.disable, config.packs.model)
                primary(packs)
                await gateway.start(packs)
                calm_collector()
                app.begin()
                yield app
            finally:
                await app.stop()
    finally:
        await store.close()
        if telemetry.tracing is not None:
            await asyncio.to_thread(telemetry.tracing.close, config.otlp.timeout_seconds)


def _catalog(config: Config) -> Catalog:
    """The actions that are on. Raises CatalogError; ConfigError for an inventory with keys that none takes."""
    more = any(entry.more for entry in config.inventory.values())
    if more and (unknown := unknown_inventory(config, load_catalog(config.actions.dirs))):
        raise ConfigError(tuple(unknown))
    return load_catalog(config.actions.dirs, config.actions.disable)


def _tracing(config: Config) -> Tracing:
    """Spans sent nowhere are first made once alerts are taken: OpenTelemetry's SDK takes 15 ms to import. Raises
    TracingError where they are to be sent, and the exporter is not installed."""
    from agent.tracing import Tracing, otlp_exporter

    otlp = config.otlp
    exporter = otlp_exporter(otlp.endpoint, otlp.timeout_seconds) if otlp.endpoint else None
    return Tracing(__version__, exporter, max_spans=otlp.max_spans)


def prometheus_of(config: Config) -> Prometheus:
    """The configured server, as its client wants it (also for commands that ask it themselves)."""
    section = config.prometheus
    basic, tls = section.basic, section.tls
    return Prometheus(
        url=section.url,
        service_label=section.service_label,
        rate=f"{max(1, round(section.rate_window_seconds))}s",
        timeout_seconds=section.timeout_seconds,
        concurrency=section.concurrency,
        bearer=section.bearer_token_file.current if section.bearer_token_file else "",
        username=basic.username if basic else "",
        password=basic.password_file.current if basic else "",
        ca_file=tls.ca_file,
        cert_file=tls.cert_file,
        key_file=tls.key_file,
        server_name=tls.server_name,
        insecure_skip_verify=tls.insecure_skip_verify,
        tenant_header=section.tenant_header,
        tenant=section.tenant,
        parameters=dict(section.parameters),
    )


def _api_server(config: Config) -> Connection:
    section = config.kubernetes
    return Connection(
        url=section.api,
        token_file=section.token_file,
        ca_file=section.ca_file,
        timeout_seconds=section.timeout_seconds,
        max_objects=section.max_objects,
    )


def _guard(config: Config) -> Guard:
    bearer = [Credential(t.name, t.token_file.value, "", t.tenants, t.scopes) for t in config.auth.bearer]
    basic = [Credential(u.name, u.password_file.value, u.name, u.tenants, u.scopes) for u in config.auth.basic]
    return Guard([*bearer, *basic])


def _listen_tls(config: Config) -> ssl.SSLContext | None:
    tls = config.listen_tls
    if tls.cert_file is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    names = ", ".join(str(file) for file in (tls.cert_file, tls.key_file, tls.client_ca_file) if file is not None)
    try:
        context.load_cert_chain(str(tls.cert_file), str(tls.key_file) if tls.key_file else None)
        if tls.client_ca_file is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(str(tls.client_ca_file))
    except OSError as error:  # which names no file
        hint = "PEM files that this user may read, the key belonging to the first certificate"
        raise OSError(f"listen_tls: {names}: {error.strerror or error}; hint: {hint}") from error
    return context


@dataclass(slots=True)
class _Seen:
    """How a source last answered, for the body of /-/ready."""

    text: str = "not asked yet"


class App:
    """The running service: the port, the schedule's workers, timers. `running` makes and ends it."""

    investigation: Investigation
    serving: Serving

    def __init__(
        self,
        config: Config,
        store: Store,
        telemetry: Telemetry,
        remediation: Remediation,
        gateway: Gateway,
        downstream: Downstream | None = None,
        learning: Learning | None = None,
    ) -> None:
        self.config, self.store, self.telemetry = config, store, telemetry
        self._remediation, self._downstream = remediation, downstream or Downstream(store)
        self._gateway, self._learning = gateway, learning
        self.intake = Intake(
            store, max_requests=config.intake.max_requests, max_bytes=config.intake.max_bytes_in_flight
        )
        self.schedule = Schedule(config.intake.max_waiting, lambda tenant: [i.id for i in store.state.waiting(tenant)])
        self._tasks: list[asyncio.Task[None]] = []
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._draining = False
        self._alertmanager = _Seen("not configured")

    async def listen(self, edges: tuple[tuple[str, str], ...]) -> None:
        """Journals the start and opens the port."""
        await self.store.record(self._started(edges))
        self.store.subscribe(self._on_record)
        self.telemetry.on_scrape(self._sample)
        options = Options(
            guard=_guard(self.config),
            max_body_bytes=self.config.intake.max_body_bytes,
            on_webhook=self._on_webhook,
        )
        operations = Operations(
            self.store,
            self._downstream.beside(self._remediation.runner),
            policy=self.config.guard_policy,
            on_refused=self.telemetry.refused,
            learning=self._learning,
        )
        web = build_app(
            self.intake,
            self.store,
            operations,
            health=self.health,
            metrics=self.telemetry.render,
            options=options,
            more=lambda o: GatewayApi(self._gateway, o.guard, o.read_seconds).routes(),
        )
        self.serving = await serve_http(
            web,
            self.config.listen_host,
            self.config.listen_port,
            socket_path=self.config.control_socket,
            tls=_listen_tls(self.config),
        )

    def begin(self) -> None:
        """Lets the investigations begin, first those that the journal holds."""
        for incident in self.store.state.active():
            self._offer(incident.id)
        workers = self.config.investigate.concurrency
        self._tasks = [asyncio.create_task(self._work(), name=f"investigate {n}") for n in range(workers)]
        self._tasks.append(asyncio.create_task(self._retry_journal(), name="retry journal"))
        if self.config.alertmanager.url and self.config.alertmanager.reconcile:
            self._tasks.append(asyncio.create_task(self._reconcile(), name="reconcile"))

    async def stop(self) -> None:
        """Drains: 503 for webhooks, no new plan; a running step may finish within the grace period."""
        self._draining = True
        self.serving.drain()
        for timer in self._timers.values():
            timer.cancel()
        await _cancelled(self._tasks)
        await self._effects_ended()
        await _cancelled(list(self.investigation.acting.values()))
        await self._downstream.close()
        await self.serving.close()
        await self._gateway.close()

    async def _effects_ended(self) -> None:
        """Waits until no step's effect is under way, at most the grace period. A verification is not waited for: the
        next start goes on with it."""
        until = time.monotonic() + self.config.shutdown_seconds
        while time.monotonic() < until:
            acting = self.investigation.acting
            running = [acting[i.id] for i in self.store.state.active() if i.unsettled and i.id in acting]
            if not running:
                return
            await asyncio.wait(running, timeout=DRAIN_SECONDS, return_when=asyncio.FIRST_COMPLETED)

    def _started(self, edges: tuple[tuple[str, str], ...]) -> AgentStarted:
        config = self.config
        return AgentStarted(
            at=time.time(),
            version=__version__,
            pid=os.getpid(),
            sandbox=sandbox.current().enforced_by,
            autonomy=config.autonomy.default,
            policy=FoldPolicy(
                merge_seconds=config.merge.window_seconds,
                reopen_seconds=config.merge.reopen_seconds,
                service_label=config.service_labels[0],
                neighbours=edges,
                closed_seconds=config.journal.keep_days * 86400.0,
                closed=config.journal.keep_incidents,
            ),
        )

    # -- investigations

    def _on_record(self, stored: Stored, changes: Changes) -> None:
        for _ in changes.opened:
            self.telemetry.incident_opened()
        for id in changes.incidents:
            self._offer(id)

    def _offer(self, id: str) -> None:
        if (timer := self._timers.pop(id, None)) is not None:
            timer.cancel()
        incident = self.store.state.incident(id)
        if incident is None or incident.final or self._draining:
            return
        # Only what is open is fetched from the journal when the queue has room; the others must not wait for that.
        self.schedule.offer(incident.tenant, id, begun=incident.state is not IncidentState.OPEN)

    def wake(self, id: str, at: float) -> None:
        """Look at the incident at that time (unix seconds), or earlier when something changes it."""
        if (timer := self._timers.pop(id, None)) is not None:
            timer.cancel()
        if self._draining:
            return
        delay = max(0.0, at - time.time())
        self._timers[id] = asyncio.get_running_loop().call_later(delay, self._offer, id)

    async def _work(self) -> None:
        """One slot: takes an incident, lets it go as far as it can, sets its alarm clock."""
        while True:
            id = await self.schedule.take()
            try:
                wake = await self.investigation.advance(id)
                if wake is not None:
                    self.wake(id, wake)
            except JournalError as error:
                logger.error("incident %s waits: %s", id, error)
                self.wake(id, time.time() + RETRY_SECONDS)
            finally:
                self.schedule.done(id)

    async def _retry_journal(self) -> None:
        """While the journal is unavailable, tries it now and then: whoever sends alerts only to what is ready would
        never find out that it is writable again."""
        while True:
            await asyncio.sleep(RETRY_SECONDS)
            if (problem := self.store.health().unavailable) == "":
                continue
            text = f"the journal takes records again, after: {problem}"[:500]
            with contextlib.suppress(JournalError):  # it is on the health page already
                await self.store.record(Noted(at=time.time(), incident="", text=text))

    async def _reconcile(self) -> None:
        """Until Alertmanager has answered once."""
        while True:
            try:
                new, gone = await reconcile(
                    self.config.alertmanager, self.store, self.intake, time.time(), self._downstream.alertmanager
                )
            except (ReconcileError, JournalError) as error:
                if self._alertmanager.text != str(error):
                    logger.warning("%s", error)
                self._alertmanager.text = str(error)
                await asyncio.sleep(RECONCILE_SECONDS)
                continue
            self._alertmanager.text = "reconciled"
            logger.info("reconciled with Alertmanager: %d new alerts, %d no longer there", new, gone)
            return

    # -- what it says of itself

    def _on_webhook(self, status: int, seconds: float, accepted: Accepted | None) -> None:
        self.telemetry.webhook_request(status)
        self.telemetry.observe("intake", seconds)
        if accepted is not None:
            self.telemetry.alerts(
                accepted=accepted.accepted,
                duplicates=accepted.duplicates,
                quarantined=len(accepted.quarantined),
            )

    def health(self) -> dict[str, object]:
        """The body of /-/ready. Ready is told while alerts can be made durable; the rest is for people."""
        journal = self.store.health()
        disk = _disk(self.config.state_dir)
        capability = sandbox.current()
        return {
            "ready": not journal.unavailable and not self.store.stopped,
            "draining": self._draining,
            "version": __version__,
            "disk": disk,
            "journal": {
                "seq": journal.seq,
                "bytes": journal.bytes,
                "segments": journal.segments,
                "lag_bytes": journal.backlog_bytes,
                "lag_seconds": journal.lag_seconds,
                "unavailable": journal.unavailable or self.store.stopped,
                "torn": journal.torn,
            },
            "fold": dict(zip(("behind_records", "behind_seconds"), self.store.behind, strict=True)),
            "queue": {
                "waiting": self.schedule.depth(),
                "watermark": self.schedule.watermark,
                "limit_per_tenant": self.config.intake.max_waiting,
                "acting": len(self.investigation.acting),
            },
            "sources": {
                "prometheus": self.config.prometheus.url or "not configured",
                "topology": self.investigation.situations.topology_state,
                "alertmanager": self._alertmanager.text if self.config.alertmanager.url else "not configured",
            },
            "sandbox": {
                "enforced_by": capability.enforced_by,
                "reason": capability.reason,
                "layers": sandbox.host_layers(),
                "absent_layers": sandbox.absent_layers(),
            },
            "paused": self.store.state.is_paused,
        }

    def _sample(self) -> None:
        state, journal = self.store.state, self.store.health()
        by_state = dict.fromkeys((s.value for s in IncidentState), 0)
        for incident in state.incidents.values():
            by_state[incident.state.value] += 1
        self.telemetry.set_incidents(by_state)
        self.telemetry.set_queue(self.schedule.depths(), self.schedule.watermark)
        breakers = [move.after for move in state.breakers.values()]
        self.telemetry.set_breakers({s: breakers.count(s) for s in BreakerState})
        self.telemetry.set_paused(state.is_paused)
        self.telemetry.set_sandbox(sandbox.current().enforced_by)
        self.telemetry.set_journal(
            lag_bytes=journal.backlog_bytes,
            size_bytes=journal.bytes,
            segments=journal.segments,
            last_fsync_seconds=journal.sync_seconds,
        )
        self.telemetry.set_fold(*self.store.behind)


def _disk(directory: Path) -> dict[str, object]:
    """What is free there, for people: whether the journal can be written is what the journal says."""
    try:
        usage = shutil.disk_usage(directory)
    except OSError as error:
        return {"problem": f"{directory}: {error.strerror or error}"}
    return {"free_bytes": usage.free, "total_bytes": usage.total, "low": usage.free < LOW_DISK_BYTES}


def calm_collector() -> None:
    """Looks for reference cycles less often. What was made at the start stays; alerts and incidents are many small
    objects that live long and form no cycles, and scanning them was a quarter of a webhook's CPU (`make bench`)."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


async def _cancelled(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
