"""A long life in a short time: is the service the same at the end as it was at the beginning?

Runs `alertmedic serve` beside a real Prometheus and lets happen to it what a weekend brings: alerts of two tenants that
fire, are sent again, resolve, flap and are forgotten, bodies that make no sense, clients that hang up, a Prometheus
that hangs, and SIGKILL. At the end it says what grew, stayed open, does not add up, was lost or doubled
(docs/chaos.md). Journal and incidents are kept small, so that snapshots and pruning happen all the time.

    python -m bench.soak [--minutes 10] [--every 1.0] [--directory DIR]

Prints one JSON object: figures, and `faults`, a list of sentences. Exit code 0 without faults, 1 with some, 2 when the
world broke (no Prometheus, the service ended by itself). DIR keeps the service's log and every segment there ever was.
An incident a second takes about a tenth of a CPU.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import psutil
from prometheus_client.parser import text_string_to_metric_families

from agent.demo.children import Child, Command, WorldError, bare_environment, free_ports, path_of, start
from agent.fold_model import FINAL
from agent.journal.records import AlertsReceived, PayloadReceived
from agent.journal.segment import SegmentReader, decode

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("Errors", "Latency", "Down", "Saturated")
PATHS = ("/webhook", "/webhook/team-b")
SERVICES = [(path, f"service-{n}") for path in PATHS for n in range(40)]
BAD = (b"{not json", b'{"version":"4","receiver":"r","status":"firing","groupKey":"g","alerts":[{}]}')
READ = ("/metrics", "/-/ready", "/api/v1/incidents?limit=50", "/api/v1/quarantine", "/nowhere")
CUT = (b"POST /webhook HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{", b"GET /metrics HTTP/1.1\r\n\r\n")
KEEP_INCIDENTS, SEGMENT_BYTES = 60, 256 * 1024
SETTLE_SECONDS = 75.0  # more than an incident of this configuration takes after its last alert
PROMETHEUS = """
global: {scrape_interval: 5s}
scrape_configs: [{job_name: service-0, static_configs: [{targets: ["AGENT"]}]}]
"""
CONFIG = f"""
listen: AGENT
state_dir: state
journal: {{segment_bytes: {SEGMENT_BYTES}, snapshot_bytes: {SEGMENT_BYTES}, keep_incidents: {KEEP_INCIDENTS}}}
prometheus: {{url: "http://PROMETHEUS", timeout_seconds: 5, step_seconds: 5, window_seconds: 300, history_seconds: []}}
merge: {{window_seconds: 10, reopen_seconds: 20}}
verify: {{deadline_seconds: 30, poll_seconds: 5}}
investigate: {{rounds: 2, round_seconds: 10}}
"""
# What may be left over at the end. Growth is that of private memory over the last two thirds of the last life.
GROWTH_BYTES_PER_INCIDENT = 16384
GROWTH_INCIDENTS = 500  # fewer cannot tell growth from warming up
MORE_DESCRIPTORS = 10
MOST_SEGMENTS = 12
LOG_LINES_PER_INCIDENT = 4


class Soak:
    """One run. `life` counts what was answered, and `samples` are taken, since the service's last start."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.rng = directory, random.Random(1)
        self.addresses = dict(zip(("AGENT", "PROMETHEUS"), (f"127.0.0.1:{p}" for p in free_ports(2)), strict=True))
        self.url = f"http://{self.addresses['AGENT']}"
        self.life, self.samples = Counter[str](), list[dict[str, float]]()
        self.begun = self.states = 0
        self.acknowledged: set[str] = set()  # states of alerts, by the number in their annotation
        self.faults: list[str] = []
        self.groups: set[asyncio.Task[None]] = set()
        self.quiet = list(SERVICES)

    async def start(self, name: str, config: str, *argv: str) -> Child:
        """A child with that configuration file, in which addresses stand for their names."""
        for address in self.addresses:
            config = config.replace(address, self.addresses[address])
        (self.directory / f"{name}.yml").write_text(config)
        environment = {**bare_environment(), "PYTHONPATH": str(ROOT)}
        return await start(name, Command(argv, environment), self.directory / f"{name}.log")

    async def start_service(self) -> None:
        self.life, self.samples = Counter[str](), []
        argv = (sys.executable, "-m", "agent", "serve", "--config", "service.yml")
        self.service = await self.start("service", CONFIG, *argv)
        while (await self.ask("GET", "/-/ready"))[0] != 200:
            self.service.check()
            await asyncio.sleep(0.1)

    async def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Status and body of the answer; status 0: none came."""
        headers = {"Content-Type": "application/json"} if body is not None else {}
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with self.http.request(method, self.url + path, data=body, headers=headers) as answer:
                return answer.status, await answer.read()
        return 0, b""

    # -- what is sent

    async def post(self, path: str, body: bytes) -> bool:
        """Sends a webhook once. Was it acknowledged?"""
        life = self.life
        status, answer = await self.ask("POST", path, body)
        told = orjson.loads(answer) if status in (200, 400) else {}
        quarantined = len(told.get("quarantined", "1" if status == 400 else ""))
        life.update(accepted=told.get("accepted", 0), duplicate=told.get("duplicates", 0), quarantined=quarantined)
        return status == 200

    async def send(self, path: str, alerts: list[dict[str, Any]]) -> None:
        """As Alertmanager does: until it is acknowledged."""
        key = f"{{}}:{{service={alerts[0]['labels']['service']}}}"
        body = orjson.dumps({"version": "4", "receiver": "r", "status": "firing", "groupKey": key, "alerts": alerts})
        while not await self.post(path, body):
            await asyncio.sleep(1)
        self.acknowledged.update(alert["annotations"]["state"] for alert in alerts)

    def alert(self, service: str, name: str, began: float, ended: float | None = None) -> dict[str, Any]:
        self.states += 1
        return {
            "status": "firing" if ended is None else "resolved",
            "labels": {"alertname": name, "service": service},
            "annotations": {"state": str(self.states), "summary": "x" * self.rng.randrange(400)},
            "startsAt": _rfc3339(began),
            "endsAt": _rfc3339(ended) if ended is not None else "0001-01-01T00:00:00Z",
            "fingerprint": f"{service}/{name}",
        }

    async def group(self, path: str, service: str) -> None:
        """A group of alerts fires, again and again if it flaps, is sent again, resolves; a few never do."""
        rng = self.rng
        names = rng.sample(NAMES, rng.choice([1, 1, 2, 3]))
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            began = time.time()
            firing = [self.alert(service, name, began) for name in names]
            for _ in range(rng.choice([1, 3, 5])):
                await self.send(path, firing)
                await asyncio.sleep(rng.uniform(1, 5))
            if rng.random() < 0.04:
                break
            resolved = [self.alert(service, name, began, time.time()) for name in names]
            await self.send(path, resolved)
            await asyncio.sleep(rng.uniform(1, 3))
            await self.send(path, resolved)
        self.quiet.append((path, service))

    async def alerts(self, every: float, until: float) -> None:
        """One group of alerts at a time about a service: what is sent late must not look like news."""
        while time.monotonic() < until:
            self.rng.shuffle(self.quiet)
            self.begun += 1
            self.groups.add(group := asyncio.create_task(self.group(*self.quiet.pop())))
            group.add_done_callback(self.groups.discard)
            await asyncio.sleep(every * self.rng.uniform(0.5, 1.5))

    async def callers(self, until: float) -> None:
        """Those who read, those who send what makes no sense, and those who hang up in the middle."""
        while time.monotonic() < until:
            await asyncio.sleep(self.rng.uniform(2, 6))
            await self.ask("GET", self.rng.choice(READ))
            await self.post(self.rng.choice(PATHS), self.rng.choice(BAD))
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection(*self.addresses["AGENT"].split(":"))
                writer.write(self.rng.choice(CUT))
                await writer.drain()
                writer.transport.abort()

    async def troubles(self, seconds: float) -> None:
        """Four times Prometheus hangs for a while; after the first two the service is killed amid its work."""
        for turn in range(4):
            await asyncio.sleep(seconds / 12)
            self.prometheus.process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(min(40.0, seconds / 24))
            self.prometheus.process.send_signal(signal.SIGCONT)
            await asyncio.sleep(seconds / 12)
            if turn < 2:
                self.service.process.kill()
                await self.service.process.wait()
                await self.start_service()

    # -- what is looked at

    async def metrics(self) -> dict[tuple[str, str], float]:
        """By name and the value of its last label; "" if it has none."""
        _, text = await self.ask("GET", "/metrics")
        families = text_string_to_metric_families(text.decode())
        return {(s.name, ["", *s.labels.values()][-1]): s.value for family in families for s in family.samples}

    async def watch(self) -> None:
        """A sample every ten seconds, and a hard link to every segment, which pruning cannot take away."""
        for turn in range(sys.maxsize):
            for segment in (self.directory / "state" / "journal").glob("*.wal"):
                with contextlib.suppress(FileExistsError, FileNotFoundError):
                    os.link(segment, self.directory / "segments" / segment.name)
            if turn % 20 == 0 and (counted := await self.metrics()):
                self.sample(counted)
            await asyncio.sleep(0.5)

    def sample(self, counted: dict[tuple[str, str], float]) -> None:
        states = {state: value for (name, state), value in counted.items() if name == "alertmedic_incidents"}
        process = psutil.Process(self.service.pid)
        with contextlib.suppress(psutil.Error), process.oneshot():
            self.samples.append(
                {
                    "opened": counted["alertmedic_incidents_opened_total", ""],
                    "closed": sum(states.pop(str(state)) for state in FINAL),
                    "open": sum(states.values()),
                    "segments": counted["alertmedic_journal_segments", ""],
                    "private_bytes": process.memory_full_info().uss,
                    "descriptors": process.num_fds(),
                    "threads": process.num_threads(),
                    "children": len(process.children()),
                }
            )

    def growth(self) -> float | None:
        """Private memory in bytes an incident opened, by least squares; None where too few were to tell."""
        late = [s for s in self.samples[len(self.samples) // 3 :] if s["closed"] == KEEP_INCIDENTS]
        opened = [sample["opened"] for sample in late]
        if not late or opened[-1] - opened[0] < GROWTH_INCIDENTS:
            return None
        return statistics.linear_regression(opened, [sample["private_bytes"] for sample in late]).slope

    def check_journal(self) -> int:
        """Every acknowledged state of an alert is there once, and no record is missing. The number of records."""
        found, last = Counter[str](), 0
        for path in sorted((self.directory / "segments").iterdir()):
            for frame in SegmentReader(path, last=True).frames():
                if frame.seq != last + 1:
                    self.faults.append(f"journal: record {frame.seq} comes after {last}")
                last, record = frame.seq, decode(frame, path).record
                if isinstance(record, PayloadReceived):
                    alerts = enumerate(orjson.loads(bytes(record.body))["alerts"])
                    found.update(alert["annotations"]["state"] for n, alert in alerts if n not in record.known)
                elif isinstance(record, AlertsReceived):
                    found.update(alert.annotations["state"] for alert in record.alerts)
        lost = sum(not found[state] for state in self.acknowledged)
        doubled = sum(times > 1 for times in found.values())
        if lost or doubled:
            self.faults.append(f"journal: {lost} acknowledged states are lost, {doubled} are doubled")
        return last

    async def check(self) -> dict[str, Any]:
        """The figures; what is wrong is added to `faults`."""
        first, last, counted = self.samples[len(self.samples) // 3], self.samples[-1], await self.metrics()
        for result in ("accepted", "duplicate", "quarantined"):
            value = counted["alertmedic_alerts_total", result]
            if value != self.life[result]:
                self.faults.append(f"{self.life[result]} alerts were answered as {result}, the metric is {value:g}")
        growth, records = self.growth(), self.check_journal()
        lines = (self.directory / "service.log").read_bytes().count(b"\n")
        for what, value, most in (
            ("incidents still open", last["open"], 0),
            ("closed incidents kept", last["closed"], KEEP_INCIDENTS),
            ("bytes of memory more with each incident", growth or 0, GROWTH_BYTES_PER_INCIDENT),
            ("descriptors", last["descriptors"], first["descriptors"] + MORE_DESCRIPTORS),
            ("children", last["children"], 0),
            ("segments", max(sample["segments"] for sample in self.samples), MOST_SEGMENTS),
            ("lines of log", lines, 100 + LOG_LINES_PER_INCIDENT * self.begun),
        ):
            if value > most:
                self.faults.append(f"{what}: {value:g}, at most {most:g}")
        return {
            "faults": self.faults,
            "growth_bytes_per_incident": growth,
            "groups": self.begun,
            "acknowledged_states": len(self.acknowledged),
            "records": records,
            "log_lines": lines,
            "after_a_third_of_the_last_life": first,
            "at_the_end": last,
        }

    async def run(self, minutes: float, every: float) -> dict[str, Any]:
        """Lets it live for that long, and settle. Raises WorldError when something ends by itself."""
        (self.directory / "segments").mkdir()
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as self.http:
            listen = f"--web.listen-address={self.addresses['PROMETHEUS']}"
            argv = (path_of("prometheus"), "--config.file=prometheus.yml", "--storage.tsdb.path=tsdb", listen)
            self.prometheus = await self.start("prometheus", PROMETHEUS, *argv)
            try:
                await self.start_service()
                watching = asyncio.create_task(self.watch())
                until = time.monotonic() + minutes * 60
                await asyncio.gather(self.alerts(every, until), self.callers(until), self.troubles(minutes * 60))
                await asyncio.gather(*self.groups)
                await asyncio.sleep(SETTLE_SECONDS)
                self.service.check()
                watching.cancel()
                self.sample(await self.metrics())
                return await self.check()
            finally:
                await self.service.end()
                await self.prometheus.end()


def _rfc3339(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description="A long life in a short time.")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--every", type=float, default=1.0, metavar="SECONDS", help="between two groups of alerts")
    parser.add_argument("--directory", type=Path)
    given = parser.parse_args()
    directory: Path = given.directory or Path(tempfile.mkdtemp(prefix="alertmedic-soak-"))
    directory.mkdir(parents=True, exist_ok=True)
    try:
        figures = asyncio.run(Soak(directory).run(given.minutes, given.every))
    except WorldError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps({"directory": str(directory), **figures}, indent=2))
    return 1 if figures["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
