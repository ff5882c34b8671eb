"""Every alert of kube-prometheus: its packs' queries are accepted by a real Prometheus, it has causes and a proposal or
a reason for none, and simulated causes are told apart."""

from __future__ import annotations

from collections import Counter

import pytest
from anyalert_world import STEP, Scenario, Server, alert_of, entry, labels_of, packs, recipes, rules, systems

from agent.config import Config
from agent.config import Prometheus as Section
from agent.expressions import Expressions, Told, rules_of
from agent.situation import Situations
from agent.sources.prometheus import Prometheus, PrometheusSource
from rules.diagnose import diagnose
from rules.model import Diagnosis, Situation, Topology
from rules.subjects import subject_of

RULES = rules()
UNBOUND = "the alert has no label "  # missing evidence by design: such a query is not asked


def source(url: str) -> PrometheusSource:
    return PrometheusSource(Prometheus(url=url, rate=f"{4 * STEP}s", timeout_seconds=60.0, concurrency=4))


def situations(source: PrometheusSource, until: float) -> Situations:
    config = Config(prometheus=Section(url=source.config.url, step_seconds=float(STEP), timeout_seconds=60.0))
    listed = Expressions(rules_of(source))
    return Situations(config, packs(), [source], Topology(), None, clock=lambda: until, expressions=listed)


async def looked(source: PrometheusSource, scenario: Scenario, known: Expressions | None = None) -> Situation:
    made = situations(source, scenario.until)
    made.expressions = known or made.expressions
    return await made.around((scenario.alert,))


def test_there_are_139_rules_and_a_pack_knows_each() -> None:
    assert len(RULES) == 139
    assert len({rule.name for rule in RULES}) == 125
    for rule in RULES:
        found = entry(rule)
        known = packs()
        assert found.causes
        for name in found.causes:
            cause = known.causes[name]
            assert bool(cause.proposals) != bool(cause.no_remedy), name
            assert any(given < other for line in cause.evidence for given, other in line.states.values()), name
            asked = {q.name for q in known.asked([name])}
            needed = {n for n, s in known.signals.items() if s.group in cause.needs}
            assert needed, name
            assert needed <= asked, name


def test_every_signal_of_an_alert_has_its_series() -> None:
    """So that the simulation below leaves nothing out, but for calls into a service, which no alert's labels tell."""
    known = packs()
    causes = {c for rule in (*RULES, *systems()) for c in entry(rule).causes}
    named = {line.group for c in causes for line in known.causes[c].evidence if line.at != "inbound"}
    assert {n for n, s in known.signals.items() if s.group in named and s.derive is None} <= set(recipes())


async def test_every_query_of_every_alert_is_accepted(prometheus: Server) -> None:
    """Each with the labels of a firing alert, over the alert's own window; refusals come as missing evidence."""
    refused: dict[str, str] = {}
    asked = 0
    async with source(prometheus.url) as client:
        listed = Expressions(rules_of(client))
        for i, rule in enumerate((*RULES, *systems())):
            made = situations(client, 1e9)
            made.expressions = listed
            situation = await made.around((alert_of(rule, f"q{i}", 1e9 - 600),))
            asked += len(situation.evidence)
            refused |= {
                f"{rule.name} {name}": reason
                for name, reason in situation.missing().items()
                if not reason.startswith(UNBOUND)
            }
            assert diagnose(situation, packs()).verdict == "insufficient_evidence" or rule.severity == "none"
    assert refused == {}
    assert asked > 5 * len(RULES)


async def test_simulated_causes_come_first(prometheus: Server, simulated: list[Scenario]) -> None:
    """For each of at least 40 alerts at least two causes, each in series of a real Prometheus: each is the first
    answer, so that different causes of one alert give different answers."""
    wrong: list[str] = []
    right: Counter[str] = Counter()
    async with source(prometheus.url) as client:
        listed = Expressions(rules_of(client))
        for scenario in simulated:
            diagnosis = diagnose(await looked(client, scenario, listed), packs())
            first = diagnosis.hypotheses[0].cause if diagnosis.hypotheses else "nothing"
            if diagnosis.verdict == "ranked" and first == scenario.cause:
                right[scenario.rule.id] += 1
            else:
                wrong.append(f"{scenario.rule.name}: {scenario.cause}: {told(diagnosis)}")
    assert wrong == [], "\n".join(wrong)
    assert sum(1 for n in right.values() if n >= 2) >= 40


@pytest.mark.full
async def test_every_cause_of_every_alert_comes_first(prometheus: Server, simulated: list[Scenario]) -> None:
    """The same for all of them; that this run has the full volume is the point."""
    assert len(simulated) > 350
    async with source(prometheus.url) as client:
        listed = Expressions(rules_of(client))
        missing = [
            reason
            for scenario in simulated[::7]
            for reason in (await looked(client, scenario, listed)).missing().values()
            if not reason.startswith(UNBOUND)
        ]
    assert missing == []


def told(diagnosis: Diagnosis) -> str:
    places = ", ".join(f"{h.cause}@{h.service} {h.posterior:.2f}" for h in diagnosis.hypotheses)
    return f"{diagnosis.verdict}: {places}; {diagnosis.missing}"


def test_subjects() -> None:
    def subject(name: str) -> str:
        rule = next(r for r in RULES if r.name == name)
        return subject_of(labels_of(rule, "s"), entry(rule).subject)

    assert subject("KubePodCrashLooping") == "pod/namespace-s/pod-s"
    assert subject("KubeNodeNotReady") == "node/node-s"
    assert subject("NodeCPUHighUsage") == "instance/10.9.s:9100"
    assert subject("KubeAPIDown") == "target/apiserver"


def test_a_service_of_the_topology_is_where_an_incident_begins() -> None:
    """Whatever a pack says the alert is about: what calls it and what it calls is known."""
    rule = next(r for r in RULES if r.name == "TargetDown")
    alert = alert_of(rule, "s", 0.0)
    told = {alert.fingerprint: Told(expression=rule.expression)}
    alone = Situations(Config(), packs(), [], Topology())
    among = Situations(Config(), packs(), [], Topology(kinds={alert.labels["job"]: "http"}))
    assert alone.entry([alert], told) == f"target/{alert.labels['job']}"
    assert among.entry([alert], told) == alert.labels["job"]
