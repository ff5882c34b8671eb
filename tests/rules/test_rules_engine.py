"""The matcher against a brute-force reading of the same rules, and the call graph."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rules.engine import Fired, Matcher, Record, graph_of, holds
from rules.features import host_name
from rules.model import Evidence, Fact, Situation, Topology
from rules.packs import Outcome, PackSet, Pattern, Rule

KINDS = ["finding", "edge", "node", "fact"]
FIELDS = ["a", "b", "c"]
VALUES = st.one_of(st.sampled_from(["x", "y", "z"]), st.integers(0, 3), st.booleans())
CONDITIONS = st.one_of(
    VALUES,
    st.sampled_from(["$u", "$v", "$w"]),
    st.lists(VALUES, min_size=1, max_size=2),
    st.dictionaries(st.sampled_from([">=", ">", "<=", "<"]), st.integers(0, 3), min_size=1, max_size=2),
)
PATTERNS = st.builds(
    Pattern, match=st.sampled_from(KINDS[:2]), where=st.dictionaries(st.sampled_from(FIELDS), CONDITIONS, min_size=1)
)
RULES = st.builds(
    Rule,
    title=st.just("t"),
    when=st.lists(PATTERNS, min_size=1, max_size=3).map(tuple),
    then=st.just(Outcome(service="s", support="c")),
)
RECORDS = st.dictionaries(
    st.sampled_from(KINDS[:2]),
    st.lists(st.dictionaries(st.sampled_from(FIELDS), VALUES), max_size=5),
)


def brute_force(rule: Rule, name: str, records: dict[str, list[Record]]) -> set[Fired]:
    """Every combination of records, one a pattern, in which all tests hold and all variables agree."""
    found = set()
    for chosen in product(*(records.get(p.match, []) for p in rule.when)):
        binding: dict[str, object] = {}
        fits = True
        for pattern, record in zip(rule.when, chosen, strict=True):
            for field, condition in pattern.where.items():
                value = record.get(field)
                if isinstance(condition, str) and condition.startswith("$"):
                    fits = fits and value is not None and binding.setdefault(condition, value) == value
                else:
                    fits = fits and holds(condition, value)
        if fits:
            found.add(Fired(name, tuple(sorted(binding.items()))))  # type: ignore[arg-type]
    return found


@settings(max_examples=300, deadline=None)
@given(rules=st.lists(RULES, min_size=1, max_size=4), records=RECORDS)
def test_the_indexed_matcher_equals_brute_force(rules: list[Rule], records: dict[str, list[Record]]) -> None:
    named = {f"r{i}": rule for i, rule in enumerate(rules)}
    expected = set().union(*(brute_force(rule, name, records) for name, rule in named.items()))
    assert set(Matcher(named).match(records)) == expected


@settings(max_examples=100, deadline=None)
@given(rule=RULES, records=RECORDS, data=st.data())
def test_fewer_records_never_fire_more(rule: Rule, records: dict[str, list[Record]], data: st.DataObject) -> None:
    """Rules are monotone: missing evidence cannot fire one."""
    matcher = Matcher({"r": rule})
    fewer = {k: [r for r in v if data.draw(st.booleans())] for k, v in records.items()}
    assert set(matcher.match(fewer)) <= set(matcher.match(records))


def test_an_upstreams_errors_join_with_its_downstreams_latency() -> None:
    rule = Rule(
        title="errors upstream, latency downstream",
        when=(
            Pattern(match="finding", where={"signal": "errors", "state": "bad", "service": "$up"}),
            Pattern(match="edge", where={"caller": "$up", "callee": "$down"}),
            Pattern(match="finding", where={"signal": "p95", "state": "bad", "service": "$down"}),
        ),
        then=Outcome(service="$down", support="cause"),
    )
    records: dict[str, list[Record]] = {
        "finding": [
            {"signal": "errors", "state": "strong", "service": "a"},
            {"signal": "p95", "state": "weak", "service": "b"},
            {"signal": "p95", "state": "absent", "service": "c"},
            {"signal": "p95", "state": "strong", "service": "d"},
        ],
        "edge": [{"caller": "a", "callee": "b"}, {"caller": "a", "callee": "c"}, {"caller": "c", "callee": "d"}],
    }
    (fired,) = Matcher({"r": rule}).match(records)
    assert fired.value("$down") == "b"


@pytest.mark.parametrize(
    ("condition", "value", "expected"),
    [
        (False, None, True),
        (True, None, False),
        ("", None, False),
        (1, True, False),
        (True, 1, False),
        (1, 1.0, True),
        ([1, "x"], "x", True),
        ({">=": 2, "<": 5}, 2, True),
        ({">=": 2, "<": 5}, 5, False),
        ({">=": 0}, "7", False),
        ({">=": 0}, True, False),
        ({">=": 0}, float("nan"), False),
    ],
)
def test_conditions(condition: object, value: object, expected: bool) -> None:
    assert holds(condition, value) is expected  # type: ignore[arg-type]


def test_many_matches_are_bounded() -> None:
    when = tuple(Pattern(match="edge", where={"caller": f"$a{i}", "callee": f"$b{i}"}) for i in range(4))
    rule = Rule(title="t", when=when, then=Outcome(service="s", support="c"))
    edges: list[Record] = [{"caller": f"s{i}", "callee": f"t{i}"} for i in range(40)]
    assert len(Matcher({"r": rule}).match({"edge": edges})) == 10_000


def situation(topology: Topology, entry: str, facts: tuple[Fact, ...] = ()) -> Situation:
    evidence = (Evidence(name="host.processes", source="host", facts=facts),)
    return Situation(alerts=(), entry=entry, onset=0.0, until=1.0, evidence=evidence, topology=topology)


def test_only_what_the_entry_reaches(packs: PackSet) -> None:
    topology = Topology((("a", "b"), ("b", "c"), ("x", "a"), ("x", "y")), {"c": "external"})
    graph = graph_of(situation(topology, "a"), packs, ())
    assert dict(graph.paths) == {"a": ("a",), "b": ("a", "b"), "c": ("a", "b", "c")}
    assert graph.kind("c") == "external"


def test_cycles_end(packs: PackSet) -> None:
    graph = graph_of(situation(Topology((("a", "b"), ("b", "a"), ("b", "b"))), "a"), packs, ())
    assert set(graph.paths) == {"a", "b"}


def test_this_machine_is_the_host_under_the_services_that_own_processes_here(packs: PackSet) -> None:
    topology = Topology((("a", "h1"), ("b", "h2"), ("a", "b")), {"h1": "host", "h2": "host"})
    mine = Fact("host.process", "pid=1,start=1", "b", {"pid": 1})
    assert graph_of(situation(topology, "a", (mine,)), packs, ()).host == "h2"
    nobody = Fact("host.process", "pid=1,start=1", "", {"pid": 1})
    assert graph_of(situation(topology, "a", (nobody,)), packs, ()).host == ""
    assert graph_of(situation(topology, "a"), packs, ()).host == ""


def test_a_topology_without_hosts_gets_this_machine(packs: PackSet) -> None:
    fact = Fact("host.process", "pid=1,start=1", "", {"pid": 1})
    graph = graph_of(situation(Topology((("a", "b"),)), "a", (fact,)), packs, ())
    assert graph.host == "host"
    assert graph.paths["host"] == ("a", "host")


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("payments", "payments"),
        ("payments:8080", "payments"),
        ("http://payments:8080/v1", "payments"),
        ("https://payments.example.org/", "payments.example.org"),
        ("10.0.0.1:5432", "10.0.0.1"),
        ("[::1]:80", "[::1]:80"),
        ("", ""),
    ],
)
def test_names_in_addresses(address: str, name: str) -> None:
    assert host_name(address) == name
