"""The alerts of kube-prometheus, simulated causes for them, and one real Prometheus that holds all of it.

An alert's payload is made from its rule: the labels that its expression keeps, that its annotations name and that the
rule adds. A simulated cause is a set of raw series (`recipes.json`: for each signal of a pack the series behind it, as
they are usually and as they are under the fault); of all that the alert's packs look at, only what defines the cause
goes wrong. What leaks goes on growing (kind `r`), since what is merely higher than before is no leak. Every scenario
has labels of its own, so that one server holds thousands of them.
"""

from __future__ import annotations

import json
import math
import re
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import yaml

from agent.packs import load_packs
from rules.expression import read
from rules.model import Alert
from rules.packs import AlertEntry, PackSet
from rules.subjects import ENTITIES, entry_of

RULES = Path(__file__).parent.parent / "data" / "kube-prometheus"
STEP = 60
MARGIN = 60.0
BEFORE = 75 * 60  # of data before the fault
AFTER = 12 * 60  # from the alert to the look
LABEL = re.compile(r"\$labels\.([a-zA-Z_][a-zA-Z0-9_]*)")


@dataclass
class Server:
    url: str
    process: subprocess.Popen[bytes]


@dataclass(frozen=True)
class RuleOf:
    """One alerting rule. `hold` is its `for` in seconds."""

    group: str
    name: str
    severity: str
    expression: str
    hold: float
    labels: dict[str, str]
    annotations: dict[str, str]

    @property
    def id(self) -> str:
        return f"{self.group}/{self.name}/{self.severity}/{self.hold:g}"


@lru_cache
def rules() -> tuple[RuleOf, ...]:
    found = []
    for path in sorted(RULES.glob("*.yaml")):
        for group in yaml.safe_load(path.read_text())["spec"]["groups"]:
            for rule in group["rules"]:
                if "alert" in rule:
                    labels = rule.get("labels", {})
                    more = (labels.get("severity", ""), rule["expr"], _seconds(rule.get("for", "0s")), labels)
                    found.append(RuleOf(group["name"], rule["alert"], *more, rule["annotations"]))
    return tuple(found)


@lru_cache
def systems() -> tuple[RuleOf, ...]:
    """An alert that nobody knows by name for each pack entry that goes by metrics."""
    found = []
    for key, known in sorted(packs().alerts.items()):
        if known.metrics:
            expression = f"{known.metrics[0].replace('*', 'something')} > 1"
            found.append(RuleOf("custom", f"Custom_{key}", "page", expression, 0.0, {"severity": "page"}, {}))
    return tuple(found)


def rule_file() -> dict[str, Any]:
    """The alerting rules as Prometheus' own rule file; recording rules would only cost evaluations."""
    groups = []
    for path in sorted(RULES.glob("*.yaml")):
        for group in yaml.safe_load(path.read_text())["spec"]["groups"]:
            kept = [rule for rule in group["rules"] if "alert" in rule]
            if kept:
                groups.append({"name": f"{path.stem}.{group['name']}", "rules": kept, "interval": "1h"})
    return {"groups": groups}


def _seconds(text: str) -> float:
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    return float(sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)([smhd])", text)))


@lru_cache
def packs() -> PackSet:
    return load_packs((), ("service",))


@lru_cache
def recipes() -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = json.loads((Path(__file__).parent / "recipes.json").read_text())
    return found


def label_names(rule: RuleOf) -> set[str]:
    """The labels that a firing alert of the rule has, besides those that the rule adds."""
    expression = read(rule.expression)
    names = {name for text in rule.annotations.values() for name in LABEL.findall(text)}
    top = _below(expression.tree)
    if type(top).__name__ == "AggregateExpr":
        modifier = top.modifier
        names |= set(modifier.labels) if modifier is not None and str(modifier.type).endswith("By") else set()
    elif type(top).__name__ == "Call" and top.func.name == "absent":
        names |= {"job"}
    elif expression.metrics:
        names |= {"job", "instance"}
    if rule.group == "custom":
        names |= {"namespace", "pod"}
    known = entry_of({"alertname": rule.name}, expression.metrics, packs().alerts)
    kind = known.subject if known is not None else ""
    if kind and kind not in ("alert", "cluster"):
        names |= set(ENTITIES[kind])
    return names - {"alertname", "severity", "short", "long", "value"} | {"cluster"}


def _below(tree: Any) -> Any:
    """The node whose labels the result has."""
    kind = type(tree).__name__
    if kind == "ParenExpr":
        return _below(tree.expr)
    if kind == "BinaryExpr":
        return _below(tree.rhs if type(tree.lhs).__name__ == "NumberLiteral" else tree.lhs)
    return tree


def labels_of(rule: RuleOf, scenario: str) -> dict[str, str]:
    """Labels of a firing alert, with values that no other scenario has."""
    labels = {name: f"{name.replace('_', '-')}-{scenario}" for name in label_names(rule)}
    if "instance" in labels:
        labels["instance"] = f"10.9.{scenario}:9100"
    if "job" in labels:
        jobs = re.findall(r'job="([^"]+)"', rule.expression)
        labels["job"] = jobs[0] if jobs else labels["job"]
        if "kube-state-metrics" in labels["job"] and "instance" in labels:
            labels["instance"] = "state-metrics:8080"
    return labels | rule.labels | {"alertname": rule.name}


def alert_of(rule: RuleOf, scenario: str, starts_at: float) -> Alert:
    labels = labels_of(rule, scenario)
    return Alert(
        tenant="",
        fingerprint=f"{rule.id}-{scenario}",
        status="firing",
        labels=labels,
        annotations={k: LABEL.sub(lambda m: labels.get(m[1], ""), v) for k, v in rule.annotations.items()},
        starts_at=starts_at,
        generator_url=f"http://p/graph?{urlencode({'g0.expr': rule.expression})}" if rule in systems() else "",
        digest=scenario,
    )


def entry(rule: RuleOf) -> AlertEntry:
    metrics = read(rule.expression).metrics
    found = entry_of({"alertname": rule.name, "severity": rule.severity}, metrics, packs().alerts)
    assert found is not None, f"no pack knows {rule.name}"
    return found


@dataclass(frozen=True)
class Scenario:
    """One simulated cause of one alert."""

    name: str
    rule: RuleOf
    cause: str
    starts_at: float

    @property
    def fault_at(self) -> float:
        return self.starts_at - self.rule.hold - MARGIN

    @property
    def until(self) -> float:
        return self.starts_at + AFTER

    @property
    def alert(self) -> Alert:
        return alert_of(self.rule, self.name, self.starts_at)

    def series(self) -> Iterator[tuple[str, dict[str, str], list[tuple[float, float]]]]:
        """(metric, labels, samples) of everything that the causes of the alert look at."""
        known = packs()
        broken = known.causes[self.cause].needs
        looked_at = {line.group for name in entry(self.rule).causes for line in known.causes[name].evidence}
        for name, signal in sorted(known.signals.items()):
            if signal.group in looked_at and name in recipes():
                wrong = signal.group in broken and self._leads(name, signal.group)
                for metric, fixed, calm, faulty, kind in recipes()[name]:
                    labels = self._labels(metric, fixed) | {"case": name}
                    yield metric, labels, self._samples(calm, faulty if wrong else calm, kind, wrong)

    def _leads(self, name: str, group: str) -> bool:
        """Whether the signal is the first of its group: one of them is enough to break."""
        return name == min(n for n, s in packs().signals.items() if s.group == group and n in recipes())

    def _labels(self, metric: str, fixed: dict[str, str]) -> dict[str, str]:
        alert = self.alert.labels
        labels = {k: v for k, v in alert.items() if k not in ("alertname", "severity")}
        labels.setdefault("namespace", f"namespace-{self.name}")
        labels.setdefault("node", f"node-{self.name}")
        for owner in ("deployment", "statefulset", "daemonset", "job_name", "horizontalpodautoscaler"):
            if owner in alert:
                labels.setdefault("pod", f"{alert[owner]}-x1")
        if "poddisruptionbudget" in alert:
            labels.setdefault("pod", f"{alert['poddisruptionbudget']}-x1")
        labels.setdefault("pod", f"pod-{self.name}")
        labels.setdefault("instance", f"10.9.{self.name}:9100")
        if metric.startswith("node_") or fixed.get("job") in ("node-exporter", "kubelet"):
            labels["instance"] = alert.get("node", labels["instance"])
        for name, value in fixed.items():  # `~x`: any value will do, x if the alert has none
            if not value.startswith("~"):
                labels[name] = value
            else:
                labels.setdefault(name, value[1:])
        return labels

    def _samples(self, calm: Any, faulty: Any, kind: str, wrong: bool) -> list[tuple[float, float]]:
        start = math.floor((self.fault_at - BEFORE) / STEP) * STEP
        times = [float(t) for t in range(start, int(self.until) + STEP, STEP)]
        found: list[tuple[float, float]] = []
        total = 0.0
        for i, t in enumerate(times):
            after = t >= self.fault_at
            if kind == "c":  # a counter, by its rate
                total += (faulty if after else calm) * STEP
                found.append((t, total))
            elif kind == "s":  # a time of start that changes every four minutes while the fault lasts
                since = max(0.0, t - self.fault_at) if wrong else 0.0
                found.append((t, calm + 240.0 * math.ceil(since / 240.0)))
            elif kind == "s1":  # a generation that changes again and again
                since = max(0.0, t - self.fault_at) if wrong else 0.0
                found.append((t, calm + math.ceil(since / 900.0)))
            elif kind == "r":  # a level that goes on by so much a second
                found.append((t, calm + (faulty * max(0.0, t - self.fault_at) if wrong else 0.0)))
            elif kind == "n":  # a time of creation that is the fault's
                found.append((t, self.fault_at if wrong and after else calm))
            elif kind == "m":  # a time of change that stops
                found.append((t, self.fault_at if wrong and after else t))
            elif (value := faulty if after else calm) is not None:
                jitter = 0.002 * value * ((i * 7) % 5 - 2)
                found.append((t, value + (jitter if value > 10 else 0.0)))
        return found


def openmetrics(scenarios: Iterable[Scenario], any_at: float) -> Iterator[str]:
    """All series as OpenMetrics text for promtool."""
    blocks: dict[str, list[str]] = {}
    for rows in (*(s.series() for s in scenarios), *(case.series(any_at) for case in ANY)):
        for metric, labels, samples in rows:
            inner = ",".join(f'{k}="{_escaped(v)}"' for k, v in sorted(labels.items()))
            lines = blocks.setdefault(metric, [])
            lines += [f"{metric}{{{inner}}} {value:.10g} {t:.0f}\n" for t, value in samples]
    for metric in sorted(blocks):
        yield f"# TYPE {metric} unknown\n"
        yield from blocks[metric]
    yield "# EOF\n"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def backfill(promtool: str, directory: Path, scenarios: Iterable[Scenario], any_at: float) -> Path:
    """Blocks of a data directory that Prometheus starts on."""
    text, data = directory / "series.txt", directory / "data"
    with text.open("w") as file:
        file.writelines(openmetrics(scenarios, any_at))
    done = subprocess.run(
        [promtool, "tsdb", "create-blocks-from", "openmetrics", str(text), str(data)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return data


def start(binary: str, where: Path, data: Path) -> Server:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    (where / "rules.yml").write_text(json.dumps(rule_file()))
    (where / "prometheus.yml").write_text("global: {evaluation_interval: 1h}\nrule_files: [rules.yml]\n")
    argv = [
        binary,
        f"--config.file={where / 'prometheus.yml'}",
        f"--storage.tsdb.path={data}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--storage.tsdb.retention.time=30d",
        "--query.max-concurrency=8",
    ]
    with (where / "log").open("wb") as out:
        process = subprocess.Popen(argv, stdout=out, stderr=out)
    server = Server(f"http://127.0.0.1:{port}", process)
    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None, (where / "log").read_text()[-2000:]
        assert time.monotonic() < deadline, "Prometheus did not become ready"
        try:
            with urllib.request.urlopen(f"{server.url}/-/ready", timeout=5) as answer:
                if answer.status == 200:
                    return server
        except OSError:
            time.sleep(0.1)


# -- alerts that no pack knows

Level = tuple[float | None, float | None, str]  # before, under the fault, kind as in the recipes


@dataclass(frozen=True)
class AnyCase:
    """An alert by its expression, and series under it. `missing` are names of evidence that must be said to lack."""

    name: str
    expression: str
    labels: dict[str, str]
    rows: tuple[tuple[str, dict[str, str], Level], ...]
    cause: str
    says: str = ""
    missing: tuple[str, ...] = ()

    def alert(self, starts_at: float) -> Alert:
        url = f"http://p:9090/graph?{urlencode({'g0.expr': self.expression, 'g0.tab': '1'})}"
        labels = {"alertname": f"Unknown_{self.name}", "severity": "page", **self.labels}
        return Alert(
            tenant="",
            fingerprint=self.name,
            status="firing",
            labels=labels,
            starts_at=starts_at,
            generator_url=url,
            digest=self.name,
        )

    def until(self, starts_at: float) -> float:
        return starts_at + 2.5 * AFTER

    def series(self, starts_at: float) -> Iterator[tuple[str, dict[str, str], list[tuple[float, float]]]]:
        fault = starts_at - MARGIN
        start = math.floor((fault - BEFORE) / STEP) * STEP
        for n, (metric, labels, (calm, faulty, kind)) in enumerate(self.rows):
            found: list[tuple[float, float]] = []
            total = 0.0
            for i, t in enumerate(range(start, int(self.until(starts_at)) + STEP, STEP)):
                after = t >= fault
                now = faulty if after else calm
                if kind == "s":
                    found.append((t, (calm or 0.0) + (240.0 * math.ceil((t - fault + 1) / 240.0) if after else 0.0)))
                elif now is None:
                    continue
                elif kind == "c":
                    total += now * STEP * (1 + 0.02 * ((i * 7 + n) % 5 - 2))
                    found.append((t, total))
                else:
                    found.append((t, now * (1 + (0.02 if kind == "w" else 0.002) * ((i * 7 + n) % 5 - 2))))
            yield metric, labels, found


def _ratio(job: str, bad: Callable[[int, str], bool]) -> tuple[tuple[str, dict[str, str], Level], ...]:
    rows = []
    for i in range(8):
        version, zone = ("v2" if i % 4 == 0 else "v1"), f"z{i // 3}"
        labels = {"job": job, "pod": f"p{i}", "version": version, "zone": zone}
        rows.append(("reqs_total", {**labels, "code": "200"}, (20.0, 20.0, "c")))
        rows.append(("reqs_total", {**labels, "code": "500"}, (0.05, 9.0 if bad(i, version) else 0.05, "c")))
    return tuple(rows)


def _share(job: str) -> str:
    bad = f'sum by (job) (rate(reqs_total{{job="{job}",code=~"5.."}}[5m]))'
    return f'{bad} / sum by (job) (rate(reqs_total{{job="{job}"}}[5m])) > 0.05'


def _jobs(job: str, levels: Callable[[int], Level]) -> tuple[tuple[str, dict[str, str], Level], ...]:
    return tuple(("stuck_jobs", {"job": job, "instance": f"10.8.{job[1:]}.{i}:80"}, levels(i)) for i in range(7))


def _one(job: str) -> dict[str, str]:
    return {"job": job, "instance": f"10.8.{job[1:]}.0:80"}


ANY: tuple[AnyCase, ...] = (
    AnyCase(
        "one_instance", 'sum by (job) (stuck_jobs{job="j1"}) > 30', {"job": "j1"},
        _jobs("j1", lambda i: (2.0, 60.0 if i == 3 else 2.0, "g")), "alert.one_instance", "instance 10.8.1.3:80",
    ),
    AnyCase(
        "one_version", _share("j2"), {"job": "j2"}, _ratio("j2", lambda i, v: v == "v2"), "alert.one_version",
    "v2"), AnyCase("one_zone", _share("j3"), {"job": "j3"}, _ratio("j3", lambda i, v: i // 3 == 1), "alert.one_zone",
    "zone z1"), AnyCase(
        "shared", 'sum by (job) (stuck_jobs{job="j4"}) > 30', {"job": "j4"},
        _jobs("j4", lambda i: (2.0, 9.0, "g")), "alert.shared", "share",
    ),
    AnyCase(
        "siblings", 'stuck_jobs{job="j5"} > 30', _one("j5"),
        _jobs("j5", lambda i: (2.0, 60.0 if i == 0 else 2.0, "g")), "alert.one_instance", "10.8.5.0:80",
    ),
    AnyCase(
        "target_down", 'stuck_jobs{job="j6"} > 30', _one("j6"),
        (("stuck_jobs", _one("j6"), (2.0, 60.0, "g")), ("up", _one("j6"), (1.0, 0.0, "g"))), "alert.target_down", "",
    ),
    AnyCase(
        "demand", 'sum by (job) (rate(demo_requests_total{job="j7"}[5m])) > 100', {"job": "j7"},
        (("demo_requests_total", _one("j7"), (20.0, 200.0, "c")), ("up", _one("j7"), (1.0, 1.0, "g"))),
        "alert.demand_rose", "",
    ),
    AnyCase(
        "restarted", 'stuck_jobs{job="j8"} > 30', _one("j8"),
        (("stuck_jobs", _one("j8"), (2.0, 60.0, "g")), ("up", _one("j8"), (1.0, 1.0, "g")),
         ("process_start_time_seconds", _one("j8"), (1e6, 1e6, "s"))), "alert.restarted", "",
    ),
    AnyCase(
        "host", 'stuck_jobs{job="j9"} > 30', _one("j9"),
        (("stuck_jobs", _one("j9"), (2.0, 60.0, "g")), ("up", _one("j9"), (1.0, 1.0, "g")),
         ("node_cpu_seconds_total", {"mode": "idle", "cpu": "0", "instance": "10.8.9.0:9100"}, (0.8, 0.01, "c"))),
        "alert.host_saturated", "",
    ),
    AnyCase(
        "new_version", 'stuck_jobs{job="j10"} > 30', _one("j10"),
        (("stuck_jobs", _one("j10"), (2.0, 60.0, "g")), ("up", _one("j10"), (1.0, 1.0, "g")),
         ("demo_build_info", {**_one("j10"), "version": "1.0"}, (1.0, None, "g")),
         ("demo_build_info", {**_one("j10"), "version": "1.1"}, (None, 1.0, "g"))), "alert.changed", "",
    ),
    AnyCase(
        "silent", 'stuck_jobs{job="j11"} < 1', _one("j11"),
        (("stuck_jobs", _one("j11"), (5.0, None, "g")), ("up", _one("j11"), (1.0, 1.0, "g"))), "alert.fell_silent", "",
    ),
    AnyCase(
        "threshold", 'stuck_jobs{job="j12"} > 30', _one("j12"),
        (("stuck_jobs", _one("j12"), (30.1, 30.4, "w")), ("up", _one("j12"), (1.0, 1.0, "g"))),
        "alert.threshold_near", "",
    ),
    AnyCase("nothing", "never_exposed > 1", {"job": "j13", "instance": "10.8.13.0:80"}, (), ""),
    AnyCase("no_labels", "sum(never_exposed) > 1", {}, (), ""),
    AnyCase("unreadable", "sum(((", _one("j14"), (("up", _one("j14"), (1.0, 0.0, "g")),), "alert.target_down", "",
            ("alert.expression",)),
    AnyCase("hostile", 'x{a="$scope"} > 1', {"job": 'a"} or up{x="', "instance": "\\$alert(a)`"}, (), ""),
)  # fmt: skip
