"""A symptom at a service, and its cause in a system that it depends on: Redis, RabbitMQ, a proxy, a registry.

For each cause that is reached along a path: `front` calls `app`, `app` uses one system of each kind, each on a host.
The alert is the user's own and reads `app`'s latency. Of all series of the systems, as their exporters name them, only
what defines the cause goes wrong; every other system is there and well. Each scenario has names of its own in one real
Prometheus.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

from anyalert_world import AFTER, BEFORE, MARGIN, STEP, packs, recipes

from rules.model import Alert, Topology

Row = tuple[str, dict[str, str], list[tuple[float, float]]]
BUCKETS = (("0.1", 0.9, 0.2), ("1", 0.99, 0.3), ("5", 1.0, 1.0), ("+Inf", 1.0, 1.0))  # le, shares before and after
# Whose the runtime is: `app` itself, its pool included.
OWN = frozenset({"pool", "runtime"})


def entries() -> dict[str, tuple[str, ...]]:
    """Causes by pack entry, of those that are reached along a path."""
    return {key: entry.causes for key, entry in sorted(packs().alerts.items()) if entry.reached_by}


@dataclass(frozen=True)
class Depends:
    """`cause` of the system `entry`, seen at `app`; no cause: everything below is well."""

    name: str
    entry: str
    cause: str
    at: float

    def node(self, what: str) -> str:
        return f"{what}-{self.name}"

    @property
    def culprit(self) -> str:
        if self.entry not in OWN and _of_host(self.cause):
            return self.node("host")
        return self.node("app" if self.entry in OWN else self.entry)

    @property
    def until(self) -> float:
        return self.at + AFTER

    @property
    def topology(self) -> Topology:
        app, host = self.node("app"), self.node("host")
        systems = [self.node(key) for key in entries() if key not in OWN]
        edges = {(self.node("front"), app), *((app, s) for s in systems), *((s, host) for s in (app, *systems))}
        return Topology(edges=tuple(sorted(edges)), kinds={host: "host", app: "http", self.node("front"): "http"})

    @property
    def alert(self) -> Alert:
        buckets = f'http_server_request_duration_seconds_bucket{{service="{self.node("app")}"}}'
        expression = f"histogram_quantile(0.95, sum by (service, le) (rate({buckets}[5m]))) > 0.5"
        return Alert(
            tenant="",
            fingerprint=self.name,
            status="firing",
            labels={"alertname": "CheckoutSlow", "severity": "page", "service": self.node("app")},
            starts_at=self.at,
            generator_url=f"http://p:9090/graph?{urlencode({'g0.expr': expression})}",
            digest=self.name,
        )

    def series(self) -> Iterator[Row]:
        times = [float(t) for t in range(int(self.at - MARGIN - BEFORE), int(self.until) + STEP, STEP)]
        for name, slow in (("front", True), ("app", True)):
            yield from self._latency(self.node(name), times, slow)
        known = packs()
        wrong = broken(self.cause) if self.cause else frozenset()
        for key, causes in entries().items():
            service = self.node("app" if key in OWN else key)
            for metric in known.alerts[key].reached_by[:1]:
                yield metric, {"service": service, "instance": f"{service}:1", "mark": "1"}, [(t, 1.0) for t in times]
            groups = known.groups_of(causes)
            for signal in sorted(n for n, s in known.signals.items() if s.group in groups and n in recipes()):
                group = known.signals[signal].group
                first = min(n for n, s in known.signals.items() if s.group == group and n in recipes())
                leads = group in wrong and signal == first and key == self.entry
                for metric, fixed, calm, faulty, kind in recipes()[signal]:
                    owner = self.node("host") if metric.startswith("node_") else service
                    labels = {"service": owner, "instance": f"{owner}:1", "job": key, "case": signal}
                    labels |= {k: v.removeprefix("~") for k, v in fixed.items()}
                    yield (
                        metric,
                        labels,
                        _samples(times, self.at - MARGIN, calm, faulty if leads else calm, kind, leads),
                    )

    def _latency(self, service: str, times: list[float], slow: bool) -> Iterator[Row]:
        for le, before, after in BUCKETS:
            yield (
                "http_server_request_duration_seconds_bucket",
                {"service": service, "le": le},
                self._count(times, before, after if slow else before),
            )
        yield "http_server_request_duration_seconds_count", {"service": service}, self._count(times, 1.0, 1.0)

    def _count(self, times: list[float], before: float, after: float) -> list[tuple[float, float]]:
        total, found = 0.0, []
        for i, t in enumerate(times):
            total += 20.0 * STEP * (1 + 0.02 * ((i * 7) % 5 - 2)) * (after if t >= self.at - MARGIN else before)
            found.append((t, total))
        return found


def _of_host(cause: str) -> bool:
    """Whether what defines it is counted by the host's kernel for all of its services, and no rule says for which."""
    needs = packs().causes[cause].needs
    counted = [n for n, s in packs().signals.items() if s.group in needs and n in recipes()]
    helped = any(rule.then.support == cause for rule in packs().rules.values())
    return not helped and all(recipes()[n][0][0].startswith("node_") for n in counted)


def broken(cause: str) -> frozenset[str]:
    """The groups that go wrong with a cause: what defines it, and what it usually does besides."""
    known = packs().causes[cause]
    usual = {line.group for line in known.evidence if line.at == "self" and _speaks(line.states.get("strong"))}
    return frozenset(known.needs) | usual


def _speaks(strong: tuple[float, float] | None) -> bool:
    return strong is not None and strong[0] > strong[1]


def depending(full: bool, at: float) -> list[Depends]:
    """Two causes of each kind of system, or, in full, every one; and one incident with nothing wrong below."""
    found = [Depends("well", "redis", "", at)]
    for key, causes in entries().items():
        found += [Depends(f"{key}-{i}", key, cause, at) for i, cause in enumerate(causes if full else causes[:2])]
    return found


def _samples(
    times: list[float], fault: float, calm: float, faulty: float, kind: str, wrong: bool
) -> list[tuple[float, float]]:
    found, total = [], 0.0
    for i, t in enumerate(times):
        now = faulty if t >= fault else calm
        if kind == "c":
            total += now * STEP
            found.append((t, total))
        elif kind == "r":
            found.append((t, calm + (faulty * max(0.0, t - fault) if wrong else 0.0)))
        else:
            found.append((t, now * (1 + (0.002 * ((i * 7) % 5 - 2) if now > 10 else 0.0))))
    return found


def backfill(promtool: str, directory: Path, scenarios: Iterable[Depends]) -> Path:
    """Blocks of a data directory that Prometheus starts on."""
    blocks: dict[str, list[str]] = {}
    for scenario in scenarios:
        for metric, labels, samples in scenario.series():
            inner = ",".join(f'{k}="{v}"' for k, v in sorted(labels.items()))
            blocks.setdefault(metric, []).extend(f"{metric}{{{inner}}} {v:.10g} {t:.0f}\n" for t, v in samples)
    text, data = directory / "series.txt", directory / "data"
    with text.open("w") as file:
        for metric in sorted(blocks):
            file.write(f"# TYPE {metric} unknown\n")
            file.writelines(blocks[metric])
        file.write("# EOF\n")
    done = subprocess.run(
        [promtool, "tsdb", "create-blocks-from", "openmetrics", str(text), str(data)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return data
