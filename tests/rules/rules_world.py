"""A synthetic shop: the situations of the demo and their near misses, as the sources would deliver them.

`Shop` holds normal series (with noise) of front, orders, worker, postgres and their host, one sample a second; a fault
is a function that changes what happens after it strikes. Nothing here knows packs: only names of signals.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby

import numpy as np

from rules.model import Alert, Evidence, Fact, Frame, SeriesId, Situation, Topology

START = 1_700_000_000.0
NORMAL = 80
ABNORMAL = 16
ONSET = START + NORMAL

EDGES = (
    ("front", "orders"),
    ("orders", "postgres"),
    ("orders", "payments"),
    ("orders", "worker"),
    ("worker", "postgres"),
    *((s, "node-1") for s in ("front", "orders", "worker", "postgres")),
)
KINDS = {
    "front": "http",
    "orders": "http",
    "worker": "worker",
    "postgres": "postgres",
    "payments": "external",
    "node-1": "host",
}
ALERT = Alert(
    tenant="default",
    fingerprint="f1",
    status="firing",
    labels={"alertname": "ShopCheckoutDegraded", "service": "front"},
    starts_at=ONSET + 10,
    digest="d1",
)

Values = dict[SeriesId, np.ndarray]


def sid(metric: str, service: str, **labels: str) -> SeriesId:
    return SeriesId.of(metric, {"service": service, **labels})


def process(
    pid: int, service: str = "", *, name: str = "python", cpu: float = 5.0, status: str = "sleeping", **more: object
) -> Fact:
    start = float(more.pop("start", START - 3600.0))  # type: ignore[arg-type]
    attributes: dict[str, str | float | bool] = {
        "pid": pid,
        "start": start,
        "pgid": pid,
        "name": name,
        "status": status,
        "cpu_percent": cpu,
        "cpus": "0,1",
        "rss_bytes": 5e7,
        "threads": 4,
        "fds": 20,
        "user": "root",
    }
    attributes.update(more)  # type: ignore[arg-type]
    return Fact("host.process", f"pid={pid},start={start}", service, attributes)


def listener(port: int, service: str, present: bool = True, pid: int = 0) -> Fact:
    return Fact("host.listener", f"port={port}", service, {"present": present, "pid": pid})


@dataclass
class Shop:
    """Series and facts under construction. `strike` is when a fault takes effect; `after` masks the samples since."""

    seed: int = 1
    strike: float = ONSET + 3
    normal: int = NORMAL
    abnormal: int = ABNORMAL
    noise: float = 0.04
    series: Values = field(default_factory=dict)
    facts: list[Fact] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.times = ONSET + np.arange(-self.normal, self.abnormal, dtype=np.float64)
        self.after = self.times >= self.strike
        self._services()
        self._database_and_host()
        self._host_facts()

    def put(self, metric: str, service: str, level: float, jitter: float | None = None, **labels: str) -> None:
        spread = (self.noise if jitter is None else jitter) * abs(level)
        self.series[sid(metric, service, **labels)] = level + self.rng.normal(0, spread, self.times.shape[0])

    def shift(self, metric: str, service: str, level: float, **labels: str) -> None:
        """From the strike on the series holds `level` (with its usual noise)."""
        noise = 1.0 + self.rng.normal(0, self.noise, int(self.after.sum()))
        self.series[sid(metric, service, **labels)][self.after] = level * noise

    def ramp(self, metric: str, service: str, rate: float, top: float = np.inf, **labels: str) -> None:
        """From the strike on the series grows by `rate` a second, up to `top`."""
        row = self.series[sid(metric, service, **labels)]
        row[self.after] = np.minimum(row[self.after] + rate * (self.times[self.after] - self.strike), top)

    def silence(self, service: str, keep: tuple[str, ...] = ("up", "scrape_seconds")) -> None:
        """No sample of that service's own series any more, as when scrapes fail."""
        for series, row in self.series.items():
            if series.service == service and series.metric not in keep:
                row[self.after] = np.nan

    def _services(self) -> None:
        for service, rate, latency in (("front", 24.0, 0.12), ("orders", 34.0, 0.05)):
            self.put("http_request_rate", service, rate)
            self.put("http_error_ratio", service, 0.0)
            self.put("http_latency_p95", service, latency, 0.08)
            self.put("http_latency_mean", service, latency / 2, 0.06)
        for service, cpu in (("front", 0.12), ("orders", 0.3), ("worker", 0.08)):
            self.put("up", service, 1.0, 0.0)
            self.put("scrape_seconds", service, 0.012, 0.2)
            self.put("process_cpu_cores", service, cpu, 0.06)
            self.put("process_memory_bytes", service, 6e7, 0.005)
            self.put("process_fds_used_ratio", service, 0.02)
            self.put("process_restarts", service, 0.0)
        for service, p95 in (("orders", 0.04), ("payments", 0.03), ("postgres", 0.006)):
            caller = "front" if service == "orders" else "orders"
            prefix = "db_client" if service == "postgres" else "http_client"
            self.put(f"{prefix}_latency_p95", caller, p95, 0.1, server_address=service)
            self.put(f"{prefix}_error_ratio", caller, 0.0, server_address=service)
        self.put("db_client_operation_rate", "orders", 60.0, server_address="postgres")
        self.put("process_memory_used_ratio", "orders", 0.12, 0.01)
        self.put("process_address_space_used_ratio", "orders", 0.55, 0.005)
        self.put("feature_flag_enabled", "orders", 0.0, flag="live_recommendations")
        self.put("feature_flag_enabled", "orders", 1.0, 0.0, flag="gift_wrapping")
        self.put("queue_depth", "orders", 0.4, 0.5, queue="jobs")
        self.put("queue_oldest_age_seconds", "orders", 0.04, 0.5, queue="jobs")
        self.put("worker_jobs_rate", "worker", 10.0)
        self.put("worker_failed_jobs_rate", "worker", 0.0)
        self.put("worker_busy_ratio", "worker", 0.5, 0.15)

    def _database_and_host(self) -> None:
        self.put("pg_up", "postgres", 1.0, 0.0)
        self.put("pg_idle_in_transaction_seconds", "postgres", 0.0)
        self.put("pg_active_transaction_seconds", "postgres", 0.0)
        self.put("pg_active_sessions", "postgres", 1.0, 0.2)
        self.put("pg_blocking_locks", "postgres", 0.0)
        self.put("pg_connections_used_ratio", "postgres", 0.17, 0.03)
        self.put("host_cpu_busy_ratio", "node-1", 0.4, 0.06)
        self.put("host_cpu_busiest_core_ratio", "node-1", 0.5, 0.06)
        self.put("host_cpu_waiting_ratio", "node-1", 0.05, 0.3)
        self.put("host_memory_available_ratio", "node-1", 0.6, 0.005)
        self.put("host_disk_used_ratio", "node-1", 0.5, 0.001, mountpoint="/")
        self.series[sid("builds_seen", "orders")] = np.ones(self.times.shape[0])
        for metric in ("db_pool_used_ratio", "db_pool_waiting"):
            self.series[sid(metric, "orders")] = np.zeros(self.times.shape[0])
        for metric, service, level in (("host_io_waiting_ratio", "node-1", 0.01), ("cache_miss_ratio", "orders", 0.0)):
            self.series[sid(metric, service)] = np.full(self.times.shape[0], level)
        for metric, level in (("db_client_latency_p95", 0.005), ("db_client_error_ratio", 0.0)):
            self.series[sid(metric, "worker", server_address="postgres")] = np.full(self.times.shape[0], level)
        self.series[sid("call_connection_error_ratio", "orders", server_address="payments")] = np.zeros(
            self.times.shape[0]
        )

    def _host_facts(self) -> None:
        self.facts = [
            process(101, "front", cpu=12.0),
            process(102, "orders", cpu=30.0, cpus="1"),
            process(103, "worker", cpu=8.0),
            process(104, "postgres", name="postgres", cpu=6.0),
            process(900, name="prometheus", cpu=9.0),
            process(901, name="alertmedic", cpu=20.0, self=True),
            *(listener(9100 + i, s, pid=100 + i) for i, s in enumerate(("front", "orders", "worker", "postgres"), 1)),
            Fact("host.cpu", "host", "", {"percent": 40.0, "count": 2, "load1": 0.9}),
            Fact("host.pressure", "io", "", {"resource": "io", "some_avg10": 0.8}),
        ]

    def drop_facts(self, kind: str, service: str) -> None:
        self.facts = [f for f in self.facts if not (f.kind == kind and f.service == service)]

    def slow_front(self, seconds: float = 2.0, errors: float = 0.4) -> None:
        """The symptom that every fault of the demo has in common."""
        self.shift("http_latency_p95", "front", seconds)
        self.shift("http_latency_mean", "front", seconds / 3)
        self.shift("http_error_ratio", "front", errors)

    def evidence(self) -> tuple[Evidence, ...]:
        ordered = sorted(self.series, key=lambda s: (s.metric, s.labels))
        found = [
            Evidence(
                name=metric, source="prometheus", frame=Frame(self.times, ids, np.vstack([self.series[s] for s in ids]))
            )
            for metric, group in groupby(ordered, key=lambda s: s.metric)
            for ids in (tuple(group),)
        ]
        return (*found, Evidence(name="host.processes", source="host", facts=tuple(self.facts)))

    def situation(self) -> Situation:
        return Situation(
            alerts=(ALERT,),
            entry="front",
            onset=ONSET,
            until=float(self.times[-1]),
            evidence=self.evidence(),
            topology=Topology(EDGES, KINDS),
        )


def cpu_neighbour(shop: Shop) -> None:
    shop.slow_front(2.2, 0.2)
    shop.shift("http_latency_p95", "orders", 0.9)
    shop.shift("http_client_latency_p95", "front", 1.0, server_address="orders")
    shop.shift("http_client_latency_p95", "orders", 0.4, server_address="payments")
    shop.shift("db_client_latency_p95", "orders", 0.3, server_address="postgres")
    shop.shift("process_cpu_cores", "orders", 0.22)
    shop.shift("scrape_seconds", "orders", 0.4)
    shop.shift("host_cpu_busy_ratio", "node-1", 0.75)
    shop.shift("host_cpu_busiest_core_ratio", "node-1", 1.0)
    shop.shift("host_cpu_waiting_ratio", "node-1", 1.6)
    for pid in (700, 701):
        shop.facts.append(process(pid, name="sh", cpu=42.0, status="running", start=shop.strike, pgid=700, cpus="1"))


def memory_leak(shop: Shop) -> None:
    shop.slow_front(0.2, 0.5)
    shop.shift("http_error_ratio", "orders", 0.5)
    shop.shift("http_client_error_ratio", "front", 0.5, server_address="orders")
    shop.ramp("process_memory_bytes", "orders", 4e7, 4.2e8)
    shop.ramp("process_memory_used_ratio", "orders", 0.08, 0.8)
    shop.ramp("process_address_space_used_ratio", "orders", 0.08, 0.99)


def blocking_session(shop: Shop) -> None:
    shop.slow_front(2.9, 0.42)
    shop.shift("http_latency_p95", "orders", 2.0)
    shop.shift("http_error_ratio", "orders", 0.4)
    shop.shift("http_client_latency_p95", "front", 2.0, server_address="orders")
    shop.shift("http_client_error_ratio", "front", 0.4, server_address="orders")
    shop.shift("db_client_latency_p95", "orders", 2.0, server_address="postgres")
    shop.shift("db_client_error_ratio", "orders", 0.3, server_address="postgres")
    shop.shift("db_client_operation_rate", "orders", 30.0, server_address="postgres")
    shop.ramp("pg_idle_in_transaction_seconds", "postgres", 1.0)
    shop.ramp("pg_active_transaction_seconds", "postgres", 1.0, 2.0)
    shop.shift("pg_active_sessions", "postgres", 13.0)
    shop.shift("pg_blocking_locks", "postgres", 1.0)
    shop.shift("worker_jobs_rate", "worker", 0.01)
    shop.shift("worker_busy_ratio", "worker", 1.0)
    shop.ramp("queue_depth", "orders", 1.0, queue="jobs")
    shop.ramp("queue_oldest_age_seconds", "orders", 1.0, 3.0, queue="jobs")


def blocked_without_completions(shop: Shop) -> None:
    """The same, but no operation and no checkout ends at all: histograms have no new samples."""
    blocking_session(shop)
    for metric in ("db_client_latency_p95", "db_client_error_ratio"):
        for client in ("orders", "worker"):
            shop.series[sid(metric, client, server_address="postgres")][shop.after] = np.nan
    shop.series[sid("http_latency_p95", "orders")][shop.after] = np.nan
    shop.shift("db_client_operation_rate", "orders", 0.0, server_address="postgres")
    shop.shift("http_request_rate", "orders", 3.0)


def _backlog(shop: Shop) -> None:
    shop.slow_front(2.3, 0.42)
    shop.ramp("queue_depth", "orders", 10.0, queue="jobs")
    shop.ramp("queue_oldest_age_seconds", "orders", 1.0, queue="jobs")


def worker_crashed(shop: Shop) -> None:
    _backlog(shop)
    shop.silence("worker")
    shop.series[sid("up", "worker")][shop.after] = 0.0
    shop.series[sid("scrape_seconds", "worker")][shop.after] = 0.0005
    shop.drop_facts("host.process", "worker")
    shop.drop_facts("host.listener", "worker")
    shop.facts.append(listener(9103, "worker", present=False))


def worker_stopped(shop: Shop) -> None:
    _backlog(shop)
    shop.silence("worker")
    shop.series[sid("up", "worker")][shop.after] = 0.0
    shop.series[sid("scrape_seconds", "worker")][shop.after] = 0.9
    shop.drop_facts("host.process", "worker")
    shop.facts.append(process(103, "worker", cpu=0.0, status="stopped"))


def worker_deadlocked(shop: Shop) -> None:
    """It still answers scrapes, but no job is done."""
    _backlog(shop)
    shop.shift("worker_jobs_rate", "worker", 0.0)
    shop.shift("process_cpu_cores", "worker", 0.005)


def payments_slow(shop: Shop) -> None:
    shop.slow_front(2.4, 0.0)
    shop.shift("http_latency_p95", "orders", 1.7)
    shop.shift("http_client_latency_p95", "front", 1.7, server_address="orders")
    shop.shift("http_client_latency_p95", "orders", 1.65, server_address="payments")


def payments_failing(shop: Shop) -> None:
    """The payment provider answers most calls with errors, as fast as ever."""
    shop.shift("http_error_ratio", "front", 0.4)
    shop.shift("http_error_ratio", "orders", 0.45)
    shop.shift("http_client_error_ratio", "front", 0.45, server_address="orders")
    shop.shift("http_client_error_ratio", "orders", 0.8, server_address="payments")


def bad_flag(shop: Shop) -> None:
    shop.slow_front(2.6, 0.3)
    shop.series[sid("feature_flag_enabled", "orders", flag="live_recommendations")][shop.after] = 1.0
    shop.shift("http_latency_p95", "orders", 2.2)
    shop.shift("http_client_latency_p95", "front", 2.2, server_address="orders")
    shop.shift("http_client_latency_p95", "orders", 0.2, server_address="payments")
    shop.shift("db_client_latency_p95", "orders", 0.05, server_address="postgres")
    shop.shift("db_client_operation_rate", "orders", 1400.0, server_address="postgres")
    shop.shift("process_cpu_cores", "orders", 0.97)
    shop.shift("pg_active_sessions", "postgres", 4.0)
    shop.shift("host_cpu_busy_ratio", "node-1", 0.85)
    shop.shift("host_cpu_busiest_core_ratio", "node-1", 1.0)
    shop.shift("host_cpu_waiting_ratio", "node-1", 0.4)
    shop.drop_facts("host.process", "orders")
    shop.facts.append(process(102, "orders", cpu=97.0, status="running", cpus="1"))


def pool_exhausted(shop: Shop) -> None:
    shop.slow_front(2.3, 0.3)
    shop.shift("http_request_rate", "front", 40.0)
    shop.shift("http_request_rate", "orders", 75.0)
    shop.shift("http_client_latency_p95", "front", 0.06, server_address="orders")
    shop.shift("process_cpu_cores", "orders", 0.5)
    shop.shift("process_cpu_cores", "front", 0.2)
    shop.shift("worker_busy_ratio", "worker", 1.0)
    shop.series[sid("worker_busy_ratio", "worker")][shop.after] = 1.0
    shop.shift("worker_jobs_rate", "worker", 19.0)
    shop.ramp("queue_depth", "orders", 6.0, 45.0, queue="jobs")
    shop.ramp("queue_oldest_age_seconds", "orders", 0.6, 2.0, queue="jobs")
    shop.shift("host_cpu_busy_ratio", "node-1", 0.55)


def orders_busy(shop: Shop) -> None:
    """Near miss of the neighbour: orders itself uses the CPU, and nothing says why."""
    shop.slow_front(2.0, 0.2)
    shop.shift("http_latency_p95", "orders", 1.2)
    shop.shift("http_client_latency_p95", "front", 1.2, server_address="orders")
    shop.shift("process_cpu_cores", "orders", 0.98)
    shop.shift("host_cpu_busy_ratio", "node-1", 0.72)
    shop.shift("host_cpu_busiest_core_ratio", "node-1", 1.0)
    shop.drop_facts("host.process", "orders")
    shop.facts.append(process(102, "orders", cpu=98.0, status="running", cpus="1"))


def disk_full(shop: Shop) -> None:
    shop.slow_front(0.2, 0.9)
    shop.shift("http_error_ratio", "orders", 0.9)
    shop.series[sid("host_disk_used_ratio", "node-1", mountpoint="/")][shop.after] = 0.995


def bad_build(shop: Shop) -> None:
    """A release fails for some products: too few requests a sample to tell by counting whose failures they are."""
    shop.slow_front(0.12, 0.27)
    shop.shift("http_error_ratio", "orders", 0.2)
    shop.shift("http_client_error_ratio", "front", 0.21, server_address="orders")
    shop.series[sid("builds_seen", "orders")][shop.after] = 2.0


def slow_orders(shop: Shop) -> None:
    shop.slow_front(2.4, 0.3)
    shop.shift("http_latency_p95", "orders", 2.1)
    shop.shift("http_latency_mean", "orders", 1.2)
    shop.shift("http_client_latency_p95", "front", 2.2, server_address="orders")


def disk_slow(shop: Shop) -> None:
    """Receipts wait for a disk; so do the threads that sign, and less is computed."""
    slow_orders(shop)
    shop.shift("process_cpu_cores", "orders", 0.12)
    shop.shift("host_io_waiting_ratio", "node-1", 0.97)
    shop.drop_facts("host.pressure", "")
    shop.facts.append(Fact("host.pressure", "io", "", {"resource": "io", "some_avg10": 55.0}))


def cache_stampede(shop: Shop) -> None:
    """Every checkout computes what one had computed for all: the database is at work, and everybody waits for it."""
    slow_orders(shop)
    shop.shift("cache_miss_ratio", "orders", 0.98)
    shop.shift("db_client_latency_p95", "orders", 1.1, server_address="postgres")
    shop.shift("db_client_operation_rate", "orders", 68.0, server_address="postgres")
    shop.shift("pg_active_sessions", "postgres", 11.0)
    shop.shift("host_cpu_busy_ratio", "node-1", 0.95)
    shop.shift("host_cpu_busiest_core_ratio", "node-1", 1.0)


def database_late(shop: Shop) -> None:
    """The network to the database delays: each connection is in use for longer, until none is free. Nothing leaks."""
    shop.slow_front(1.4, 0.1)
    shop.shift("http_latency_p95", "orders", 1.2)
    shop.shift("http_latency_mean", "orders", 0.7)
    shop.shift("http_client_latency_p95", "front", 1.3, server_address="orders")
    shop.shift("db_client_latency_p95", "orders", 0.9, server_address="postgres")
    shop.series[sid("db_pool_used_ratio", "orders")][shop.after] = 1.0
    shop.series[sid("db_pool_waiting", "orders")][shop.after] = 22.0


def database_later(shop: Shop) -> None:
    """The same, seconds later: who waits for a connection gives up; the other client is still answered, late."""
    shop.slow_front(2.9, 0.6)
    shop.shift("http_latency_p95", "orders", 2.9)
    shop.shift("http_latency_mean", "orders", 2.0)
    shop.shift("http_error_ratio", "orders", 0.5)
    shop.shift("http_client_latency_p95", "front", 2.9, server_address="orders")
    shop.shift("http_client_error_ratio", "front", 0.5, server_address="orders")
    shop.shift("db_client_error_ratio", "orders", 0.6, server_address="postgres")
    shop.shift("db_client_latency_p95", "orders", 2.4, server_address="postgres")
    shop.shift("db_client_operation_rate", "orders", 28.0, server_address="postgres")
    shop.shift("db_client_latency_p95", "worker", 0.9, server_address="postgres")
    shop.shift("process_cpu_cores", "orders", 0.1)
    shop.shift("host_cpu_busy_ratio", "node-1", 0.2)
    shop.shift("worker_jobs_rate", "worker", 1.0)
    shop.series[sid("db_pool_used_ratio", "orders")][shop.after] = 1.0
    shop.series[sid("db_pool_waiting", "orders")][shop.after] = 57.0


def database_unreachable(shop: Shop) -> None:
    """Nothing passes to the database, which is up and idle; its client's calls time out, and it calls nobody else."""
    shop.slow_front(3.0, 0.9)
    shop.shift("http_latency_p95", "orders", 3.0)
    shop.shift("http_latency_mean", "orders", 2.1)
    shop.shift("http_error_ratio", "orders", 0.8)
    shop.shift("http_client_latency_p95", "front", 3.0, server_address="orders")
    shop.shift("http_client_error_ratio", "front", 0.8, server_address="orders")
    shop.shift("db_client_error_ratio", "orders", 1.0, server_address="postgres")
    shop.shift("db_client_latency_p95", "orders", 2.4, server_address="postgres")
    shop.shift("db_client_error_ratio", "worker", 1.0, server_address="postgres")
    shop.shift("db_client_latency_p95", "worker", 2.4, server_address="postgres")
    shop.shift("db_client_operation_rate", "orders", 4.0, server_address="postgres")
    shop.shift("process_cpu_cores", "orders", 0.04)
    shop.shift("worker_jobs_rate", "worker", 0.1)


def connections_leaked(shop: Shop) -> None:
    """Exports keep all connections; before the first of the others gives up waiting."""
    shop.slow_front(2.6, 0.2)
    shop.shift("http_latency_p95", "orders", 2.2)
    shop.shift("http_client_latency_p95", "front", 2.3, server_address="orders")
    shop.shift("db_client_operation_rate", "orders", 30.0, server_address="postgres")
    shop.series[sid("db_pool_used_ratio", "orders")][shop.after] = 1.0
    shop.series[sid("db_pool_waiting", "orders")][shop.after] = 56.0


def database_down(shop: Shop) -> None:
    shop.slow_front(0.1, 0.95)
    shop.shift("http_error_ratio", "orders", 0.95)
    for client in ("orders", "worker"):
        shop.shift("db_client_error_ratio", client, 1.0, server_address="postgres")
    shop.silence("postgres", keep=("pg_up",))
    shop.series[sid("pg_up", "postgres")][shop.after] = 0.0
    shop.drop_facts("host.process", "postgres")
    shop.drop_facts("host.listener", "postgres")
    shop.facts.append(listener(9104, "postgres", present=False))


FaultFn = Callable[[Shop], None]
# fault -> the right (cause, service)
FAULTS: Mapping[str, tuple[FaultFn, str, str]] = {
    "cpu_neighbour": (cpu_neighbour, "host.cpu_neighbour", "node-1"),
    "memory_leak": (memory_leak, "process.memory_leak", "orders"),
    "blocking_session": (blocking_session, "postgres.blocking_session", "postgres"),
    "blocked_without_completions": (blocked_without_completions, "postgres.blocking_session", "postgres"),
    "worker_crashed": (worker_crashed, "process.crashed", "worker"),
    "worker_stopped": (worker_stopped, "process.stuck", "worker"),
    "worker_deadlocked": (worker_deadlocked, "process.stuck", "worker"),
    "payments_slow": (payments_slow, "http.dependency_slow", "payments"),
    "payments_failing": (payments_failing, "http.dependency_failing", "payments"),
    "bad_flag": (bad_flag, "http.bad_flag", "orders"),
    "pool_exhausted": (pool_exhausted, "worker.pool_exhausted", "worker"),
    "orders_busy": (orders_busy, "process.cpu_saturation", "orders"),
    "disk_full": (disk_full, "host.disk_full", "node-1"),
    "bad_build": (bad_build, "service.bad_release", "orders"),
    "database_late": (database_late, "postgres.network_delay", "postgres"),
    "database_later": (database_later, "postgres.network_delay", "postgres"),
    "database_unreachable": (database_unreachable, "postgres.unreachable", "postgres"),
    "connections_leaked": (connections_leaked, "program.connections_leaked", "orders"),
    "disk_slow": (disk_slow, "host.io_stalled", "node-1"),
    "cache_stampede": (cache_stampede, "program.cache_stampede", "orders"),
    "database_down": (database_down, "postgres.down", "postgres"),
}


def golden(fault: str, **shop: float) -> Situation:
    """The situation of one fault; `shop` overrides `Shop`'s fields."""
    world = Shop(**shop)  # type: ignore[arg-type]
    FAULTS[fault][0](world)
    return world.situation()


def quiet(seed: int = 1) -> Situation:
    """An alert, but nothing at all is wrong (or not any more)."""
    return Shop(seed=seed).situation()


def without(situation: Situation, keep: Callable[[Evidence], bool], reason: str = "timeout after 15 s") -> Situation:
    """The same situation where every evidence that `keep` refuses did not arrive."""
    return replace(
        situation,
        evidence=tuple(
            e if keep(e) else Evidence(name=e.name, source=e.source, missing=reason) for e in situation.evidence
        ),
    )
