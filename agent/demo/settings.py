"""The configuration files of the demo world: Prometheus, its one alert, Alertmanager, the supervisor, and the agent.

Used by `agent.demo.world`. Exists so that everything that is configured can be read on one page: in particular that
the alert says nothing about causes, and what the agent is told and allowed. Pure: text from ports and paths.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ALERT = "ShopCheckoutDegraded"
SLOW_SECONDS = 0.75
MAX_ERROR_RATIO = 0.1
RATE_WINDOW = "6s"
ORDERS_MEMORY_BYTES = 512 * 1024 * 1024
DATABASE_ROLES = """
CREATE ROLE shop LOGIN;
CREATE ROLE analyst LOGIN;
CREATE ROLE alertmedic LOGIN IN ROLE pg_monitor, pg_signal_backend;
CREATE ROLE exporter LOGIN IN ROLE pg_monitor;
"""


@dataclass(frozen=True)
class Ports:
    """Where everybody listens on the loopback."""

    front: int
    orders: int
    worker: int
    payments: int
    postgres: int
    node_exporter: int
    postgres_exporter: int
    prometheus: int
    alertmanager: int
    supervisor: int
    agent: int

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{getattr(self, name)}"

    def database(self, role: str, name: str = "shop") -> str:
        """The PostgreSQL URI for a role. The loopback needs no TLS, and looking for certificates needs a home."""
        return f"postgresql://{role}@127.0.0.1:{self.postgres}/{name}?sslmode=disable"


def prometheus(ports: Ports, rules: Path) -> str:
    """prometheus.yml: 1 s scrapes and evaluations; the `service` label comes from here."""

    def job(name: str, *targets: tuple[str, int]) -> dict[str, Any]:
        static = [{"targets": [f"127.0.0.1:{port}"], "labels": {"service": service}} for service, port in targets]
        return {"job_name": name, "static_configs": static}

    return yaml.safe_dump(
        {
            "global": {"scrape_interval": "1s", "scrape_timeout": "900ms", "evaluation_interval": "1s"},
            "rule_files": [str(rules)],
            "alerting": {
                "alertmanagers": [{"static_configs": [{"targets": [f"127.0.0.1:{ports.alertmanager}"]}]}],
            },
            "scrape_configs": [
                job("shop", ("front", ports.front), ("orders", ports.orders), ("worker", ports.worker)),
                job("postgres", ("postgres", ports.postgres_exporter)),
                job("node", ("node-1", ports.node_exporter)),
            ],
        },
        sort_keys=False,
    )


def alert_rules() -> str:
    """The one alert: customers' checkouts are slow or fail. A symptom; which of its many causes, it cannot say."""
    series = "http_server_request_duration_seconds"
    where = 'service="front",http_route="/checkout"'
    buckets = f"sum by (service, le) (rate({series}_bucket{{{where}}}[{RATE_WINDOW}]))"
    slow = f"histogram_quantile(0.95, {buckets}) > {SLOW_SECONDS}"
    failed = f'sum by (service) (rate({series}_count{{{where},http_response_status_code=~"5.."}}[{RATE_WINDOW}]))'
    every = f"sum by (service) (rate({series}_count{{{where}}}[{RATE_WINDOW}]))"
    rule = {
        "alert": ALERT,
        "expr": f"({slow}) or ({failed} / {every} > {MAX_ERROR_RATIO})",
        "for": "2s",
        "labels": {"severity": "critical"},
        "annotations": {"summary": "Checkouts at the front are slow or fail"},
    }
    return yaml.safe_dump(
        {"groups": [{"name": "shop", "interval": "1s", "rules": [rule]}]}, sort_keys=False, width=1000
    )


def alertmanager(ports: Ports) -> str:
    """alertmanager.yml: one receiver, the agent."""
    return yaml.safe_dump(
        {
            "route": {
                "receiver": "alertmedic",
                "group_by": ["alertname", "service"],
                "group_wait": "0s",
                "group_interval": "1s",
                "repeat_interval": "1h",
            },
            "receivers": [
                {
                    "name": "alertmedic",
                    "webhook_configs": [{"url": f"{ports.url('agent')}/webhook", "send_resolved": True}],
                }
            ],
        },
        sort_keys=False,
    )


def supervisor(
    ports: Ports,
    directory: Path,
    orders_cpu: int,
    database: str = "",
    payments: str = "",
    orders_more: Mapping[str, str] | None = None,
    orders_environment: Mapping[str, str] | None = None,
) -> str:
    """supervisord.conf: the shop's own three processes. Crashed ones are restarted, and given up after a few tries.
    `database` and `payments` are where the shop finds them, if not at their own ports; `orders_more` are further
    options of `orders`."""
    python = sys.executable
    shop = f"{python} -m agent.demo.shop"
    database = database or ports.database("shop")
    payments = payments or ports.url("payments")
    commands = {
        "front": f"{shop}.front --port {ports.front} --orders {ports.url('orders')}",
        "orders": (
            f"{shop}.orders --port {ports.orders} --database {database} --payments {payments}"
            f" --memory {ORDERS_MEMORY_BYTES} --cpu {orders_cpu}"
            + "".join(f" --{name} {value}" for name, value in (orders_more or {}).items())
        ),
        "worker": f"{shop}.worker --port {ports.worker} --database {database}",
    }
    lines = [
        "[supervisord]",
        f"logfile={directory}/supervisord.log",
        f"pidfile={directory}/supervisord.pid",
        f"childlogdir={directory}",
        "nodaemon=true",
        'environment=MALLOC_ARENA_MAX="1"',
        "[unix_http_server]",
        f"file={directory}/supervisor.sock",
        "[inet_http_server]",
        f"port=127.0.0.1:{ports.supervisor}",
        "[rpcinterface:supervisor]",
        "supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface",
        "[supervisorctl]",
        f"serverurl=unix://{directory}/supervisor.sock",
    ]
    for name, command in commands.items():
        lines += [
            f"[program:{name}]",
            f"command={command}",
            f"directory={directory}",
            "autorestart=true",
            "startsecs=1",
            "startretries=1",
            "stopwaitsecs=2",
            "stopasgroup=true",
            "killasgroup=true",
            f"stdout_logfile={directory}/{name}.log",
            "redirect_stderr=true",
        ]
        if name == "orders" and orders_environment:
            lines.append("environment=" + ",".join(f'{key}="{value}"' for key, value in orders_environment.items()))
    return "\n".join(lines) + "\n"


def agent(ports: Ports, shop: Path, state: Path) -> str:
    """The agent's alertmedic.yaml. The times are short because the demo's are; the two settings that a production would
    think twice about, autonomy `auto` and `allow_unenforced_auto`, are here for everybody to see."""
    supervisor_url = f"unix://{shop}/supervisor.sock"

    def program(name: str) -> dict[str, str]:
        return {
            "host": "local",
            "listen_port": str(getattr(ports, name)),
            "supervisord_url": supervisor_url,
            "supervisord_program": name,
        }

    return yaml.safe_dump(
        {
            "listen": f"127.0.0.1:{ports.agent}",
            "state_dir": str(state),
            "environment": "demo",
            "prometheus": {
                "url": ports.url("prometheus"),
                "timeout_seconds": 5,
                "step_seconds": 1,
                "rate_seconds": 5,
                "window_seconds": 90,
                "onset_margin_seconds": 6,
            },
            "alertmanager": {"url": ports.url("alertmanager")},
            "topology": {
                "edges": {
                    "front": ["orders", "node-1"],
                    "orders": ["postgres", "payments", "worker", "node-1"],
                    "worker": ["postgres", "node-1"],
                    "postgres": ["node-1"],
                },
                "kinds": {
                    "front": "http",
                    "orders": "http",
                    "worker": "worker",
                    "postgres": "postgres",
                    "payments": "external",
                    "node-1": "host",
                },
            },
            "inventory": {
                "front": program("front"),
                "orders": program("orders") | {"flags_url": f"{ports.url('orders')}/flags"},
                "worker": program("worker") | {"scale_url": f"{ports.url('worker')}/pool", "workers_max": "12"},
                "postgres": {
                    "host": "local",
                    "listen_port": str(ports.postgres),
                    "pg_dsn": f"postgresql://alertmedic@127.0.0.1:{ports.postgres}/shop",
                },
                "node-1": {"host": "local"},
            },
            "autonomy": {"default": "auto"},
            "sandbox": {"allow_unenforced_auto": True},
            "guard": {
                "cooldown_seconds": 5,
                "actions_per_hour": 60,
                "actions_per_target_per_hour": 20,
                "stale_evidence_seconds": 30,
            },
            "merge": {"window_seconds": 5, "reopen_seconds": 0},
            "verify": {"deadline_seconds": 30, "poll_seconds": 1, "samples": 3},
            "investigate": {"rounds": 8, "round_seconds": 2},
        },
        sort_keys=False,
    )
