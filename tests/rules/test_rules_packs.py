"""Packs: the shipped ones are sound, broken ones are refused with every fault and its place."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.lint import promql_fault
from agent.packs import load_packs, read_pack
from rules.packs import STATES, VOCABULARY, Fault, Pack, PackError, PackSet, parse_pack

DOCS = Path(__file__).parents[2] / "docs" / "packs.md"
CATALOGUE = {
    "kubernetes.capture",
    "kubernetes.cordon",
    "kubernetes.evict_pod",
    "kubernetes.hpa_bounds",
    "kubernetes.rollout_undo",
    "kubernetes.set_resources",
    "diagnostic.heap_profile",
    "haproxy.drain_server",
    "haproxy.raise_maxconn",
    "nginx.drain_upstream",
    "nginx.raise_backlog",
    "nginx.reload",
    "pgbouncer.resize_pool",
    "postgres.cancel_long_queries",
    "postgres.deadlock_report",
    "rabbitmq.replay_dead_letters",
    "redis.kill_clients",
    "redis.raise_maxclients",
    "registry.drain_instance",
    "service.restart",
    "process.terminate_group",
    "postgres.terminate_blockers",
    "postgres.terminate_idle_in_transaction",
    "disk.free_logs",
    "feature_flag.set",
    "workers.scale",
    "diagnostic.capture",
    "kubernetes.diagnose",
}

# Signals that only recordings bring: the names that public data sets have, for what the packs know.
RECORDED = {
    "latency_avg_seconds",
    "latency_p50_seconds",
    "server_latency_p90_seconds",
    "availability_avg_percent",
    "requests_sum",
    "requests_per_second",
    "workload_operations_per_second",
    "cpu_usage_millicores",
    "memory_usage_mebibytes",
    "syscall_reads",
    "syscall_writes",
    "edge_source_latency_p50_seconds",
    "edge_destination_latency_p50_seconds",
}

GOOD: dict[str, Any] = {
    "pack": "mine",
    "version": 1,
    "queries": {"lag_seconds": "max by ($service) (lag_seconds{$scope})"},
    "signals": {"lag_seconds": {"kind": "age", "bad": "up", "floor": 1, "group": "lag"}},
    "groups": {"lag": {"title": "replication lag"}},
    "causes": {
        "mine.lagging": {
            "title": "lagging",
            "fault": "lag",
            "kinds": ["postgres"],
            "prior": 0.02,
            "needs": ["lag"],
            "evidence": [{"group": "lag", "states": {"strong": [0.9, 0.02], "absent": [0.05, 0.9]}}],
            "sentence": "{service} lags.",
            "proposals": [{"action": "service.restart", "params": {"service": {"from": "candidate.service"}}}],
        }
    },
    "rules": {
        "mine.lags": {
            "title": "it lags",
            "when": [{"match": "finding", "where": {"signal": "lag_seconds", "state": "bad", "service": "$s"}}],
            "then": {"support": "mine.lagging", "service": "$s"},
        }
    },
}


def broken(*path: str | int, value: Any = None, delete: bool = False) -> dict[str, Any]:
    data = copy.deepcopy(GOOD)
    at: Any = data
    for key in path[:-1]:
        at = at[key]
    if delete:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return data


CAUSE = ("causes", "mine.lagging")
RULE = ("rules", "mine.lags")


@pytest.mark.parametrize(
    ("data", "where", "reason"),
    [
        (None, "(top level)", "expected a mapping"),
        ([], "(top level)", "expected a mapping"),
        (broken("colour", value=1), "colour", "unknown key"),
        (broken("pack", delete=True), "pack", "missing"),
        (broken("version", value="1"), "version", "int"),
        (broken("queries", value=[]), "queries", "object"),
        (broken("queries", "Bad-Name", value="up{$scope}"), "queries.Bad-Name", "lower case"),
        (broken("queries", "lag_seconds", value="lag"), "queries.lag_seconds", "lacks $scope"),
        (broken("queries", "lag_seconds", value="x{$scope} + $evil"), "queries.lag_seconds", "unknown variable $evil"),
        (broken("signals", "lag_seconds", "flor", value=1), "signals.lag_seconds.flor", "unknown key"),
        (broken("signals", "lag_seconds", "kind", value="speed"), "signals.lag_seconds.kind", "Invalid enum"),
        (broken("signals", "lag_seconds", "floor", value=0), "signals.lag_seconds.floor", "positive"),
        (broken("signals", "lag_seconds", "floor", value=float("nan")), "signals.lag_seconds.floor", "positive"),
        (broken("signals", "lag_seconds", "kind", value="saturation"), "signals.lag_seconds.limit", "needs its limit"),
        (broken("groups", "lag", "facts", value={"kind": 3}), "groups.lag.facts.kind", "str"),
        (broken("groups", "lag", "facts", value={"kind": "a"}), "groups.lag.facts.evidence", "missing"),
        (broken(*CAUSE, "prior", value=1.0), "causes.mine.lagging.prior", "between 0 and 1"),
        (broken(*CAUSE, "kinds", value=[]), "causes.mine.lagging.kinds", "no node kind"),
        (broken(*CAUSE, "needs", value=["other"]), "causes.mine.lagging.needs.0", "no evidence of this cause"),
        (broken(*CAUSE, "needs", value=[]), "causes.mine.lagging.needs", "no defining evidence"),
        (broken(*CAUSE, "sentence", value="{secret}"), "causes.mine.lagging.sentence", "unknown word {secret}"),
        (broken(*CAUSE, "sentence", value="{service.__class__}"), "causes.mine.lagging.sentence", "unknown word"),
        (broken(*CAUSE, "evidence", 0, "at", value="moon"), "causes.mine.lagging.evidence.0.at", "Invalid enum"),
        (
            broken(*CAUSE, "evidence", 0, "states", value={"strong": [0.9, 0.1], "absent": [0.2, 0.1]}),
            "causes.mine.lagging.evidence.0.states",
            "sum to 1.1",
        ),
        (
            broken(*CAUSE, "evidence", 0, "states", "strong", value=[1.0, 0.0]),
            "causes.mine.lagging.evidence.0.states.strong",
            "strictly between",
        ),
        (
            broken(*CAUSE, "evidence", 0, "states", "missing", value=[0.1, 0.1]),
            "causes.mine.lagging.evidence.0.states",
            "missing",
        ),
        (
            broken(*CAUSE, "evidence", value=GOOD["causes"]["mine.lagging"]["evidence"] * 2),
            "causes.mine.lagging.evidence.1",
            "comes twice",
        ),
        (
            broken(*CAUSE, "proposals", 0, "using", value="nothing"),
            "causes.mine.lagging.proposals.0.using",
            "no evidence of this cause",
        ),
        (
            broken(*CAUSE, "proposals", 0, "params", "pid", value={"from": "fact.pid"}),
            "causes.mine.lagging.proposals.0.params.pid.from",
            "needs `using`",
        ),
        (
            broken(*CAUSE, "proposals", 0, "params", "pid", value={"from": "os.environ"}),
            "causes.mine.lagging.proposals.0.params.pid.from",
            "cannot refer",
        ),
        (
            broken(*CAUSE, "proposals", 0, "params", "pid", value={"eval": "1"}),
            "causes.mine.lagging.proposals.0.params.pid.eval",
            "unknown key",
        ),
        (
            broken(*CAUSE, "proposals", 0, "params", "pid", value=[1]),
            "causes.mine.lagging.proposals.0.params.pid",
            "array",
        ),
        (broken(*RULE, "when", value=[]), "rules.mine.lags.when", "always fire"),
        (broken(*RULE, "when", 0, "where", "colour", value=1), "rules.mine.lags.when.0.where.colour", "finding has"),
        (broken(*RULE, "when", 0, "match", value="log"), "rules.mine.lags.when.0.match", "Invalid enum"),
        (broken(*RULE, "then", "prune", value="x"), "rules.mine.lags.then", "exactly one"),
        (broken(*RULE, "then", "service", value="$other"), "rules.mine.lags.then.service", "bound by no condition"),
        (broken(*RULE, "then", "weight", value=9), "rules.mine.lags.then.weight", "between 0 and 3"),
    ],
)
def test_one_fault_is_named_with_its_path(data: Any, where: str, reason: str) -> None:
    with pytest.raises(PackError) as refused:
        parse_pack(data, "mine.yaml")
    told = [str(f) for f in refused.value.faults]
    assert any(t.startswith(f"{where}: ") and reason in t for t in told), told
    assert str(refused.value).startswith("mine.yaml: ")


def test_every_fault_is_reported_at_once() -> None:
    data = broken("colour", value=1)
    data["signals"]["lag_seconds"]["kind"] = "speed"
    data["causes"]["mine.lagging"]["prior"] = "often"
    data["rules"]["mine.lags"]["when"][0]["match"] = "log"
    del data["groups"]["lag"]["title"]
    with pytest.raises(PackError) as refused:
        parse_pack(data, "mine.yaml")
    assert len(refused.value.faults) == 5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (broken("signals", "lag_seconds", "group", value="nowhere"), "unknown group nowhere"),
        (broken("queries", "other", value="up{$scope}"), "no signal says"),
        (broken(*RULE, "then", "support", value="mine.other"), "unknown cause mine.other"),
        (broken(*RULE, "when", 0, "where", "signal", value="latency"), "unknown signal latency"),
        (broken(*CAUSE, "evidence", 0, "group", value="disks"), "no evidence of this cause"),
    ],
)
def test_references_lead_somewhere(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(PackError, match=reason):
        PackSet.of([parse_pack(change, "mine.yaml")])


def test_an_id_belongs_to_one_pack() -> None:
    other = parse_pack({**copy.deepcopy(GOOD), "pack": "other"}, "other.yaml")
    with pytest.raises(PackError, match="already defined by pack mine"):
        PackSet.of([parse_pack(GOOD, "mine.yaml"), other])


@settings(max_examples=150, deadline=None)
@given(
    data=st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4)),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(st.one_of(st.sampled_from([*GOOD, "when", "where"]), st.integers()), inner, max_size=4),
        ),
        max_leaves=20,
    ),
    at=st.sampled_from([*GOOD]),
)
def test_any_document_is_a_pack_or_refused(data: Any, at: str) -> None:
    for document in (data, {**copy.deepcopy(GOOD), at: data}):
        faults: tuple[Fault, ...] = ()
        try:
            found: Pack | None = parse_pack(document, "x.yaml")
        except PackError as error:
            found, faults = None, error.faults
        assert isinstance(found, Pack) != bool(faults)


class TestLoading:
    def test_faults_have_lines(self, tmp_path: Path) -> None:
        (tmp_path / "mine.yaml").write_text(
            "pack: mine\nversion: 1\nsignals:\n  lag:\n    kind: age\n    bad: sideways\n    floor: 1\n    group: lag\n"
        )
        with pytest.raises(PackError, match=r"mine\.yaml\.signals\.lag\.bad: line 6: Invalid enum value 'sideways'"):
            load_packs([tmp_path])

    def test_two_broken_files_are_both_reported(self, tmp_path: Path) -> None:
        (tmp_path / "a.yaml").write_text("pack: a\n")
        (tmp_path / "b.yaml").write_text("pack: [b\n")
        with pytest.raises(PackError) as refused:
            load_packs([tmp_path])
        assert {str(f.path[0]).rsplit("/", 1)[-1] for f in refused.value.faults} == {"a.yaml", "b.yaml"}

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("pack: a\npack: b\n", "line 2.*comes twice"),
            ("pack: !!python/object/apply:os.system ['true']\n", "no valid YAML"),
            ("\tpack: a\n", "no valid YAML"),
            ("pack: a\n---\npack: b\n", "no valid YAML"),
            ("", "expected a mapping"),
            ("a: &a [*a]", r"aliases \(\*a\) are not allowed"),
            ("a: &a x\nb: [*a, *a]\n", "line 2: aliases"),
            ("[" * 5000, "nested deeper"),
            ("pack: a\x00b\n", "no valid YAML"),
        ],
    )
    def test_what_is_no_pack_at_all(self, text: str, reason: str) -> None:
        with pytest.raises(PackError, match=reason):
            read_pack(text, "mine.yaml")

    def test_a_directory_of_ones_own(self, tmp_path: Path) -> None:
        import yaml

        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(GOOD))
        (tmp_path / "notes.txt").write_text("not a pack")
        found = load_packs([tmp_path])
        assert "mine.lagging" in found.causes
        assert "lag_seconds" in {q.name for q in found.queries()}
        assert "mine/1" in found.version

    def test_a_disabled_pack_asks_and_proposes_nothing(self) -> None:
        found = load_packs(disable=["postgres", "http"])
        assert not any(name.startswith(("postgres.", "http.")) for name in (*found.causes, *found.rules))
        assert not any(q.name.startswith(("pg_", "http_")) for q in found.queries())

    def test_disabling_what_does_not_exist_is_an_error(self) -> None:
        with pytest.raises(PackError, match="there is no such pack"):
            load_packs(disable=["postgers"])

    def test_a_missing_directory_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(OSError, match="nowhere"):
            load_packs([tmp_path / "nowhere"])


class TestShipped:
    def test_their_shape_needs_no_check_at_start(self) -> None:
        for path in sorted((Path(__file__).parents[2] / "rules" / "packs").glob("*.yaml")):
            text = path.read_text("utf-8")
            assert read_pack(text, path.name) == read_pack(text, path.name, checked=True)

    def test_every_query_is_promql(self, packs: PackSet) -> None:
        for query in packs.queries():
            if query.source != "prometheus":
                assert (query.name, query.query) in (("host.processes", ""), ("kubernetes.objects", ""))
                continue
            assert promql_fault(query.query) == "", query.name

    def test_every_signal_is_asked_for_and_every_group_is_used(self, packs: PackSet) -> None:
        asked = {name for name, signal in packs.signals.items() if signal.derive is None} - RECORDED
        asked -= {name for pack in packs.packs if pack.fallback for name in pack.signals}  # by rules.anyalert
        assert {*asked, "host.processes", "kubernetes.objects"} == {q.name for q in packs.queries()}
        derivations = [s.derive for s in packs.signals.values() if s.derive is not None]
        sources = {n for d in derivations for n in (*d.of, *d.traffic, d.minus)} - {""}
        used = {line.group for c in packs.causes.values() for line in c.evidence}
        used |= {s.group for s in packs.signals.values() if packs.groups[s.group].symptom}
        used |= {packs.signals[name].group for name in sources}
        idle = set(packs.groups) - used
        assert idle <= {"restarted", "job_errors", "log_missing"}

    def test_proposals_are_of_the_catalogue(self, packs: PackSet) -> None:
        assert {p.action for c in packs.causes.values() for p in c.proposals} <= CATALOGUE

    def test_every_rule_can_fire(self, packs: PackSet) -> None:
        """A rule's cause fits some node, its states and groups exist: no rule waits for what never comes."""
        for name, rule in packs.rules.items():
            for pattern in rule.when:
                states = pattern.where.get("state", "bad")
                for state in states if isinstance(states, list) else [states]:
                    assert state in (*STATES, "bad"), name
                groups = pattern.where.get("group", [])
                for group in groups if isinstance(groups, list) else [groups]:
                    assert group in packs.groups, name

    def test_no_two_causes_copy_each_others_evidence(self, packs: PackSet) -> None:
        seen: dict[object, str] = {}
        for name, cause in packs.causes.items():
            key = (cause.kinds, tuple(sorted((line.column, str(line.states)) for line in cause.evidence)))
            assert key not in seen, (name, seen.get(key))
            seen[key] = name

    def test_the_documentation_lists_what_there_is(self, packs: PackSet) -> None:
        """Packs for alerts are listed by alert and cause, all others by signal and group."""
        text = DOCS.read_text("utf-8")
        listed = (DOCS.parent / "alerts.md").read_text("utf-8")
        for pack in packs.packs:
            for name in (*pack.signals, *pack.groups) if not (pack.alerts or pack.fallback) else ():
                assert f"`{name}`" in text, name
            for name in (*pack.alerts, *pack.causes) if pack.alerts or pack.fallback else ():
                assert f"`{name}`" in listed or pack.alerts[name].metrics, name
        for name in VOCABULARY:
            assert f"`{{{name}}}`" in text, name
        for name, cause in ((n, c) for p in packs.packs if not (p.alerts or p.fallback) for n, c in p.causes.items()):
            assert cause.runbook == f"docs/packs.md#{name.replace('.', '')}"
            assert f"### {name}\n" in text, name


class TestDerived:
    @pytest.mark.parametrize(
        ("derive", "said"),
        [
            ({"kind": "own", "of": ["lag_seconds"]}, "derive.traffic: own cannot be computed without it"),
            ({"kind": "share"}, "derive.of: share cannot be computed without it"),
            ({"kind": "difference", "of": ["lag_seconds"]}, "derive.minus"),
            ({"kind": "calls", "traffic": ["lag_seconds"]}, "peer: calls need the label"),
            ({"kind": "own", "of": ["lag_seconds"], "traffic": ["lag_seconds"], "full": 0}, "derive.full"),
            ({"kind": "trend", "of": ["lag_seconds", "lag_seconds"]}, "derive.of: a trend follows one signal"),
            ({"kind": "guess"}, "derive.kind"),
        ],
    )
    def test_what_cannot_be_computed_is_refused(self, derive: dict[str, Any], said: str) -> None:
        data = copy.deepcopy(GOOD)
        data["signals"]["made"] = {"kind": "level", "bad": "up", "floor": 1, "group": "lag", "derive": derive}
        with pytest.raises(PackError, match=said):
            parse_pack(data, "mine.yaml")

    def test_ingredients_must_exist_and_nothing_asks_for_what_is_derived(self) -> None:
        data = copy.deepcopy(GOOD)
        data["signals"]["made"] = {
            "kind": "level",
            "bad": "up",
            "floor": 1,
            "group": "lag",
            "derive": {"kind": "share", "of": ["nothing"]},
        }
        data["queries"]["made"] = "made{$scope}"
        with pytest.raises(PackError) as caught:
            PackSet.of([parse_pack(data, "mine.yaml")])
        assert "unknown signal nothing" in str(caught.value)
        assert "is derived from other signals" in str(caught.value)
