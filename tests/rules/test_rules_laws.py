"""Laws of diagnosis, over random situations: order, names, missing evidence, sums."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rules_world import FAULTS, ONSET, START, Shop, golden, quiet, sid, without

from rules.diagnose import Candidate, contributions_of, diagnose, observe, weigh
from rules.evidence import Observer
from rules.model import Alert, Evidence, Fact, Frame, SeriesId, Situation, Topology
from rules.packs import PackSet

SETTINGS = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@st.composite
def situations(draw: st.DrawFn) -> Situation:
    """A fault of the shop at some strength of noise, with some of the evidence missing."""
    situation = golden(
        draw(st.sampled_from(sorted(FAULTS))),
        seed=draw(st.integers(0, 50)),
        noise=draw(st.sampled_from([0.02, 0.1, 0.3])),
        strike=ONSET + draw(st.integers(-5, 6)),
    )
    lost = draw(st.sets(st.sampled_from(sorted(e.name for e in situation.evidence)), max_size=12))
    return without(situation, lambda e: e.name not in lost)


def renamed(situation: Situation, names: dict[str, str]) -> Situation:
    def name(service: str) -> str:
        return names.get(service, service)

    def series(s: SeriesId) -> SeriesId:
        labels = {k: name(v) if k in ("service", "server_address") else v for k, v in s.labels}
        return SeriesId.of(s.metric, labels)

    evidence = tuple(
        replace(
            e,
            frame=Frame(e.frame.times, tuple(series(s) for s in e.frame.ids), e.frame.values),
            facts=tuple(replace(f, service=name(f.service)) for f in e.facts),
        )
        for e in situation.evidence
    )
    topology = Topology(
        tuple((name(a), name(b)) for a, b in situation.topology.edges),
        {name(s): kind for s, kind in situation.topology.kinds.items()},
    )
    return replace(situation, entry=name(situation.entry), evidence=evidence, topology=topology)


def shuffled(situation: Situation, seed: int) -> Situation:
    rng = np.random.default_rng(seed)
    evidence = []
    for e in situation.evidence:
        order = rng.permutation(len(e.frame.ids))
        frame = (
            Frame(e.frame.times, tuple(e.frame.ids[i] for i in order), e.frame.values[order]) if len(order) else e.frame
        )
        evidence.append(replace(e, frame=frame, facts=tuple(e.facts[i] for i in rng.permutation(len(e.facts)))))
    edges = tuple(situation.topology.edges[i] for i in rng.permutation(len(situation.topology.edges)))
    kinds = dict(sorted(situation.topology.kinds.items(), key=lambda item: str(rng.random())))
    return replace(
        situation,
        evidence=tuple(evidence[i] for i in rng.permutation(len(evidence))),
        topology=Topology(edges, kinds),
    )


@SETTINGS
@given(situation=situations(), seed=st.integers(0, 1000))
def test_order_changes_nothing(packs: PackSet, situation: Situation, seed: int) -> None:
    first, second = diagnose(situation, packs), diagnose(shuffled(situation, seed), packs)
    assert msgspec.json.encode(first) == msgspec.json.encode(second)


@SETTINGS
@given(situation=situations(), seed=st.integers(0, 1000))
def test_names_of_services_mean_nothing(packs: PackSet, situation: Situation, seed: int) -> None:
    """Consistently renamed, the ranking is the same to the last bit, ties included."""
    rng = np.random.default_rng(seed)
    services = situation.topology.services()
    names = {
        s: f"{chr(97 + int(i))}-{rng.integers(1000)}"
        for s, i in zip(services, rng.permutation(len(services)), strict=True)
    }
    before = weigh(observe(situation, packs))
    after = weigh(observe(renamed(situation, names), packs))
    assert [(c.cause, names[c.service], c.posterior, c.rules) for c in before] == [
        (c.cause, c.service, c.posterior, c.rules) for c in after
    ]


@SETTINGS
@given(situation=situations())
def test_posteriors_and_contributions_add_up(packs: PackSet, situation: Situation) -> None:
    observer = observe(situation, packs)
    candidates = weigh(observer)
    total = math.fsum(c.posterior for c in candidates)
    assert 0 <= total < 1
    for candidate in candidates:
        parts = contributions_of(candidate, observer)
        assert math.fsum(p.log_odds for p in parts) == pytest.approx(candidate.log_odds, abs=1e-9)
        assert all(p.log_odds == 0.0 for p in parts if p.state == "missing")
        if candidate.posterior > 1e-12 and total < 1 - 1e-9:
            against = math.log(candidate.posterior / (1 - total))  # of the background
            assert against == pytest.approx(candidate.log_odds, abs=1e-4)


@SETTINGS
@given(situation=situations())
def test_the_same_situation_gives_the_same_bytes(packs: PackSet, situation: Situation) -> None:
    assert msgspec.json.encode(diagnose(situation, packs)) == msgspec.json.encode(diagnose(situation, packs))


@SETTINGS
@given(situation=situations(), data=st.data())
def test_losing_what_speaks_for_it_never_raises_it(packs: PackSet, situation: Situation, data: st.DataObject) -> None:
    """A signal that contributes only in favour of the best hypothesis: without it, its log-odds are no higher. Which
    moved first is left out: it is read off all that moved together, so that losing one of them can turn it round."""
    observer = observe(situation, packs)
    candidates = weigh(observer)
    if not candidates:
        return
    top = candidates[0]
    parts = [c for c in contributions_of(top, observer) if c.evidence not in ("prior", "rules")]
    favour = {s.split("{")[0] for c in parts if c.log_odds > 0 for s in c.series}
    against = {s.split("{")[0] for c in parts if c.log_odds < 0 for s in c.series}
    for c in parts:  # what decides a group now may hide a signal of the same group that speaks against
        if c.log_odds < 0:
            group = c.evidence.split("@")[0]
            against |= {name for name, signal in packs.signals.items() if signal.group == group}
    for name in sorted(against):  # what is derived from a signal is lost with it
        if (derive := packs.signals[name].derive if name in packs.signals else None) is not None:
            against |= {*derive.of, derive.minus}
    if not favour - against:
        return
    lost = data.draw(st.sampled_from(sorted(favour - against)))
    fewer = observe(without(situation, lambda e: e.name != lost), packs)
    after = {(c.cause, c.service): but_for_order(c, fewer) for c in weigh(fewer)}
    assert after.get((top.cause, top.service), -math.inf) <= but_for_order(top, observer) + 1e-9


def but_for_order(candidate: Candidate, observer: Observer) -> float:
    """Its log-odds without what says which moved first."""
    parts = contributions_of(candidate, observer)
    return math.fsum([candidate.log_odds, *(-c.log_odds for c in parts if c.evidence == "order")])


@SETTINGS
@given(
    fault=st.sampled_from(sorted(FAULTS)),
    extra=st.lists(
        st.tuples(
            st.sampled_from(
                ["http_latency_p95", "process_cpu_cores", "feature_flag_enabled", "host_disk_used_ratio", "queue_depth"]
            ),
            st.sampled_from(["front", "orders", "worker", "node-1"]),
            st.floats(0.0, 0.5),
            st.integers(0, 9),
        ),
        max_size=6,
    ),
)
def test_a_constant_normal_series_changes_no_winner(
    packs: PackSet, fault: str, extra: list[tuple[str, str, float, int]]
) -> None:
    shop = Shop()
    FAULTS[fault][0](shop)
    for metric, service, value, number in extra:
        shop.series[sid(metric, service, instance=str(number))] = np.full(shop.times.shape[0], value)
    best = diagnose(shop.situation(), packs).best
    assert best is not None
    assert (best.cause, best.service) == FAULTS[fault][1:]


@pytest.mark.parametrize("fault", FAULTS)
def test_all_nan_is_insufficient_evidence(packs: PackSet, fault: str) -> None:
    situation = golden(fault)
    evidence = tuple(
        replace(e, frame=Frame(e.frame.times, e.frame.ids, np.full_like(e.frame.values, np.nan)), facts=())
        for e in situation.evidence
    )
    diagnosis = diagnose(replace(situation, evidence=evidence), packs)
    assert diagnosis.verdict == "insufficient_evidence"
    assert diagnosis.candidates == 0


@pytest.mark.parametrize(
    "onset", [START - 100, ONSET, ONSET + 1e6], ids=["no baseline", "usual", "no abnormal samples"]
)
@pytest.mark.parametrize("fault", ["bad_flag", "cpu_neighbour", "worker_crashed"])
def test_a_window_without_one_side(packs: PackSet, fault: str, onset: float) -> None:
    situation = without(replace(golden(fault), onset=onset, until=onset + 20), lambda e: e.source != "host")
    diagnosis = diagnose(situation, packs)
    if onset > ONSET:
        assert diagnosis.verdict == "insufficient_evidence"
    assert math.fsum(h.posterior for h in diagnosis.hypotheses) < 1


HOSTILE = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e308, -1e308, 5e-324, 1.0, -7.5, 1e18]


@st.composite
def hostile(draw: st.DrawFn) -> Situation:
    """Anything a source might deliver: absurd values, empty and ragged grids, duplicates, odd facts."""
    known = ["http_latency_p95", "up", "process_memory_bytes", "host_disk_used_ratio", "http_client_latency_p95"]
    names = draw(st.lists(st.sampled_from([*known, "worker_jobs_rate", "not_known"]), max_size=6))
    evidence = []
    for name in names:
        n, rows = draw(st.integers(0, 30)), draw(st.integers(0, 3))
        times = ONSET + np.arange(n) - draw(st.integers(0, 30))
        values = np.array(draw(st.lists(st.sampled_from(HOSTILE), min_size=n * rows, max_size=n * rows)), dtype=float)
        services = draw(st.lists(st.sampled_from(["front", "orders", "", "\x00?"]), min_size=rows, max_size=rows))
        ids = tuple(SeriesId.of(name, {"service": s, "server_address": "orders:80"}) for s in services)
        evidence.append(Evidence(name=name, source="x", frame=Frame(times, ids, values.reshape(rows, n))))
    value = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=5), st.booleans())
    attributes = st.dictionaries(
        st.sampled_from(["pid", "start", "pgid", "cpu_percent", "cpus", "status", "name"]), value
    )
    facts = tuple(
        Fact(
            draw(st.sampled_from(["host.process", "host.listener", "host.cpu", "x"])),
            str(i),
            draw(st.sampled_from(["", "orders"])),
            a,
        )
        for i, a in enumerate(draw(st.lists(attributes, max_size=4)))
    )
    evidence.append(Evidence(name="host.processes", source="host", facts=facts))
    edges = draw(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("abcd")), max_size=6))
    entry = draw(st.sampled_from(["front", "", "a", "nobody"]))
    until = draw(st.sampled_from([ONSET, ONSET + 20, ONSET - 5]))
    return Situation(
        alerts=(), entry=entry, onset=ONSET, until=until, evidence=tuple(evidence), topology=Topology(tuple(edges))
    )


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(situation=hostile())
def test_no_data_makes_it_raise_or_warn(packs: PackSet, situation: Situation) -> None:
    diagnosis = diagnose(situation, packs, 1000)
    assert all(0 <= h.posterior <= 1 for h in diagnosis.hypotheses)
    mass: dict[str, float] = {}  # services come by what all of their causes have together
    for h in diagnosis.hypotheses:
        mass[h.service] = mass.get(h.service, 0.0) + h.posterior
    assert all(a >= b - 1e-8 for a, b in pairwise(mass.values()))
    msgspec.json.encode(diagnosis)


def test_a_hundred_thousand_series_are_weighed(packs: PackSet) -> None:
    """Series that no pack knows cost nothing; those that one knows are looked at all at once."""
    situation = quiet()
    times = situation.evidence[0].frame.times
    ids = tuple(SeriesId.of("http_latency_p95", {"service": "front", "instance": str(i)}) for i in range(5_000))
    many = tuple(SeriesId.of("unknown_metric", {"service": "front", "n": str(i)}) for i in range(95_000))
    evidence = (
        Evidence(name="http_latency_p95", source="x", frame=Frame(times, ids, np.full((5_000, times.shape[0]), 0.1))),
        Evidence(name="unknown_metric", source="x", frame=Frame(times, many, np.zeros((95_000, times.shape[0])))),
    )
    assert (
        diagnose(replace(situation, evidence=situation.evidence + evidence), packs).verdict == "insufficient_evidence"
    )


@pytest.mark.parametrize("services", [5_000, pytest.param(100_000, marks=pytest.mark.full)])
def test_nothing_grows_faster_than_the_services_do(packs: PackSet, services: int) -> None:
    """A series each: what took each service against every finding would never end."""
    count, onset = services, 1200.0
    times = np.arange(0.0, 1800.0, 60.0)
    values = np.ones((count, times.shape[0]))
    values[: count // 10, times >= onset] = 9.0
    ids = tuple(SeriesId.of("http_latency_p95", {"service": f"s{i}"}) for i in range(count))
    alert = Alert(tenant="t", fingerprint="f", status="firing", labels={"service": "s0"}, starts_at=onset, digest="d")
    evidence = (Evidence("http_latency_p95", "prometheus", Frame(times, ids, values)),)
    diagnosis = diagnose(Situation((alert,), "s0", onset, 1740.0, evidence), packs)
    assert diagnosis.verdict in ("ranked", "insufficient_evidence")
