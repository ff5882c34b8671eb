"""The world of the crash and end-to-end tests: a real Prometheus over services that can be broken one by one, and
agents that can be killed. Each test has a service of its own, so that tests do not spoil each other's baselines."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PACK = """
pack: crash_test
version: 1
description: Services of the crash tests
queries:
  probe_error_ratio: probe_error_ratio{$scope}
  probe_broken: probe_broken{$scope}
signals:
  probe_error_ratio: {kind: error_ratio, bad: up, floor: 0.01, group: probe_errors, unit: ratio}
  probe_broken: {kind: level, bad: up, floor: 0.05, group: probe_state}
groups:
  probe_errors: {title: errors seen by the probe, symptom: true}
  probe_state: {title: state of the part}
causes:
  probe.broken:
    title: a part is broken
    fault: crash
    kinds: [http]
    prior: 0.2
    needs: [probe_state]
    evidence:
      - group: probe_state
        states: {strong: [0.95, 0.01], weak: [0.03, 0.04], absent: [0.02, 0.95]}
      - group: probe_errors
        states: {strong: [0.9, 0.3], weak: [0.05, 0.1], absent: [0.05, 0.6]}
    sentence: A part of {service} is broken.
    proposals:
      - action: crash_test.replace
        reason: The part is broken.
"""
ACTION = """
actions:
  - name: crash_test.replace
    description: Replaces the part; doing it twice would be one too many
    where: host
    idempotent: false
    parameters:
      service: {from: plan, pattern: "[a-z0-9_-]+"}
      incident: {from: plan, pattern: "[a-z0-9-]+"}
      directory: {from: inventory, key: log_root, pattern: "/.*"}
      url: {from: inventory, key: http_admin, pattern: "http://.*"}
    target: service={service}
    argv: [@do@]
    check: [@check@]
    undo: [@undo@]
    verify_seconds: 20
    limits: {timeout_seconds: 20, cpu_percent: 100}
    risk: {reversible: true, blast_radius: service, changes: runtime, auto: allowed}
"""


def until(what: Callable[[], Any], why: str, seconds: float = 45.0) -> Any:
    """Polls until `what()` is true and returns it; fails with `why` after `seconds`."""
    due = time.monotonic() + seconds
    while time.monotonic() < due:
        if found := what():
            return found
        threading.Event().wait(0.05)
    raise AssertionError(f"not within {seconds:g} s: {why}")


class Services:
    """An exporter whose services can be broken by a test and healed by an action."""

    def __init__(self, names: list[str]) -> None:
        self.broken = dict.fromkeys(names, 0)
        services = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                lines = []
                for name, value in services.broken.items():
                    lines.append(f'probe_broken{{service="{name}"}} {value}\n')
                    lines.append(f'probe_error_ratio{{service="{name}"}} {0.4 * value}\n')
                self.reply("".join(lines).encode())

            def do_POST(self) -> None:
                services.broken[self.path.rpartition("/")[2]] = 0
                self.reply(b"")

            def reply(self, body: bytes) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def start_prometheus(
    program: str, directory: Path, target: str, port: int, alertmanager: str = ""
) -> subprocess.Popen[bytes]:
    """Scrapes `target` four times a second; with an Alertmanager, `ProbeFails` fires for every broken service."""
    config = directory / "prometheus.yml"
    alerting = ""
    if alertmanager:
        rules = directory / "rules.yml"
        rules.write_text(
            "groups: [{name: probe, interval: 500ms, rules: [{alert: ProbeFails, expr: 'probe_error_ratio > 0.1'}]}]\n"
        )
        alerting = f"rule_files: ['{rules}']\n"
        alerting += f"alerting: {{alertmanagers: [{{static_configs: [{{targets: ['{alertmanager}']}}]}}]}}\n"
    config.write_text(
        "global: {scrape_interval: 250ms, scrape_timeout: 250ms, evaluation_interval: 1s}\n"
        f"scrape_configs: [{{job_name: crash, honor_labels: true, static_configs: [{{targets: ['{target}']}}]}}]\n"
        + alerting
    )
    return subprocess.Popen(
        [
            program,
            f"--config.file={config}",
            f"--storage.tsdb.path={directory / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--log.level=error",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def start_alertmanager(program: str, directory: Path, port: int, webhook: str) -> subprocess.Popen[bytes]:
    """Sends every alert to `webhook` at once."""
    config = directory / "alertmanager.yml"
    config.write_text(
        "route: {receiver: alertmedic, group_by: [alertname, service], group_wait: 100ms, group_interval: 1s}\n"
        f"receivers: [{{name: alertmedic, webhook_configs: [{{url: '{webhook}', send_resolved: true}}]}}]\n"
    )
    return subprocess.Popen(
        [
            program,
            f"--config.file={config}",
            f"--storage.path={directory / 'alertmanager'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--cluster.listen-address=",
            "--log.level=error",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def query(url: str, promql: str) -> list[Any]:
    """The instant vector; empty while the server does not answer."""
    try:
        with urllib.request.urlopen(f"{url}/api/v1/query?query={urllib.request.quote(promql)}", timeout=5) as answer:  # type: ignore[attr-defined]
            result: list[Any] = json.load(answer)["data"]["result"]
            return result
    except OSError:
        return []


@dataclass
class Agent:
    """One state directory, and the service over it, which may be started and killed several times."""

    directory: Path
    service: str
    prometheus: str
    services: Services
    autonomy: str = "auto"
    extra: str = ""
    port: int = 0
    verify_seconds: float = 10.0
    process: subprocess.Popen[str] | None = None
    address: tuple[str, int] = ("", 0)
    acknowledged: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("packs", "actions"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        (self.directory / "packs" / "crash.yaml").write_text(PACK)
        named = "".join(f', --{name}, "{{{name}}}"' for name in ("directory", "url", "service", "incident"))
        action = ACTION
        for what in ("do", "check", "undo"):
            action = action.replace(f"@{what}@", f'"{{python}}", "{HERE / "effect.py"}", {what}{named}')
        (self.directory / "actions" / "crash.yaml").write_text(action)
        (self.directory / "alertmedic.yaml").write_text(
            f"""
listen: 127.0.0.1:{self.port}
state_dir: {self.directory / "state"}
prometheus:
  url: {self.prometheus}
  step_seconds: 0.5
  window_seconds: 20
  rate_seconds: 2
  onset_margin_seconds: 1
topology:
  edges: {{}}
  kinds: {{{self.service}: http}}
packs: {{dirs: [{self.directory / "packs"}]}}
actions: {{dirs: [{self.directory / "actions"}]}}
inventory:
  {self.service}: {{log_root: {self.directory}, http_admin: "{self.services.url}"}}
autonomy: {{default: {self.autonomy}}}
guard: {{cooldown_seconds: 0, actions_per_target_per_hour: 1000, actions_per_action_per_hour: 1000}}
sandbox: {{allow_unenforced_auto: true}}
verify: {{deadline_seconds: {self.verify_seconds}, poll_seconds: 0.3}}
investigate: {{rounds: 3, round_seconds: 1}}
{self.extra}
"""
        )

    @property
    def log(self) -> Path:
        return self.directory / "log"

    def start(self, failpoint: str = "") -> None:
        """Starts the service and waits until it is ready, or until the failpoint killed it."""
        environment = {**os.environ, "ALERTMEDIC_FAILPOINT": failpoint}
        begun = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "agent", "serve", "--config", str(self.directory / "alertmedic.yaml")],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
                text=True,
            )

        def listening() -> bool:
            text = self.log.read_text()[begun:]
            if found := re.search(r"listens on ([0-9.]+):([0-9]+)", text):
                self.address = (found[1], int(found[2]))
                return True
            return self.dead

        until(listening, f"the agent starts: {self.log}")
        if self.dead and not failpoint:
            raise AssertionError(f"the agent ended at its start:\n{self.log.read_text()[begun:]}")

    @property
    def dead(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def request(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """(status, JSON); (0, None) when there was no answer, because the agent died."""
        connection = http.client.HTTPConnection(*self.address, timeout=20)
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read() or b"null")
        except (OSError, http.client.HTTPException):
            return 0, None
        finally:
            connection.close()

    def alert(self, name: str, status: str = "firing") -> int:
        """Posts one alert; remembers it when it was acknowledged."""
        body = self.payload(name, status)
        code, _ = self.request("POST", "/webhook", body)
        if code == 200:
            self.acknowledged.append(body["alerts"][0]["fingerprint"])
        return code

    def payload(self, name: str, status: str = "firing") -> dict[str, Any]:
        """A webhook body with one alert of the service, as it is at this moment."""
        fingerprint = hashlib.md5(f"{self.service}{name}".encode(), usedforsecurity=False).hexdigest()[:16]
        now = datetime.now(UTC).isoformat()
        return {
            "version": "4",
            "status": status,
            "receiver": "crash",
            "groupKey": f'{{}}:{{service="{self.service}"}}',
            "groupLabels": {"service": self.service},
            "commonLabels": {},
            "commonAnnotations": {},
            "externalURL": "http://alertmanager",
            "truncatedAlerts": 0,
            "alerts": [
                {
                    "status": status,
                    "labels": {"alertname": name, "service": self.service},
                    "annotations": {},
                    "startsAt": now,
                    "endsAt": now if status == "resolved" else "0001-01-01T00:00:00Z",
                    "generatorURL": "",
                    "fingerprint": fingerprint,
                }
            ],
        }

    def command(self, *argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "agent", *argv, "--config", str(self.directory / "alertmedic.yaml")],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def incidents(self) -> list[dict[str, Any]]:
        """What the API says of a running service; of a stopped one, what the command line reads from its journal."""
        if not self.dead:
            status, answer = self.request("GET", "/api/v1/incidents?limit=1000")
            if status == 200:
                running: list[dict[str, Any]] = answer["incidents"]
                return running
        done = self.command("incidents", "--json")
        assert done.returncode == 0, done.stderr
        stopped: list[dict[str, Any]] = json.loads(done.stdout)["incidents"]
        return stopped

    def lines(self, name: str) -> list[str]:
        path = self.directory / name
        return path.read_text().splitlines() if path.exists() else []


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port
