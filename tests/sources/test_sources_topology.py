"""The graph: from files with every fault named, from metrics of a real server, merged."""

from __future__ import annotations

import time
import urllib.request
from pathlib import Path

import promql_parser
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sources_world import Server, line, port

from agent.config import Config, load
from agent.sources.prometheus import Prometheus, PrometheusSource, Sample
from agent.topology import (
    EDGE_QUERIES,
    Discovery,
    TopologyError,
    edges_of,
    load_topology,
    merge,
    read_topology,
    resolve,
)
from rules.model import Topology

GOOD = """
edges:
  front: [orders, node-1]
  orders: [postgres, payments, node-1]
kinds: {front: http, orders: http, postgres: postgres, payments: external, node-1: host}
"""
EDGES = (
    ("front", "node-1"),
    ("front", "orders"),
    ("orders", "node-1"),
    ("orders", "payments"),
    ("orders", "postgres"),
)


def test_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(GOOD)
    topology = read_topology(tmp_path / "t.yaml")
    assert topology.edges == EDGES
    assert topology.kinds["payments"] == "external"
    assert topology.paths_from("front")["postgres"] == ("front", "orders", "postgres")


def test_kinds_are_optional(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("edges: {a: [b]}")
    assert read_topology(tmp_path / "t.yaml") == Topology((("a", "b"),), {})


FAULTS = {
    "unknown key": ("edge: {a: [b]}", 1, "edge"),
    "misspelt kind": ("edges: {a: [b]}\nkinds:\n  a: http\n  b: htpp", 4, "kinds.b"),
    "no kind": ("edges:\n  a: [b]\nkinds: {a: http}", 2, "edges.a[0]"),
    "caller without kind": ("edges:\n  a: [b]\nkinds: {b: http}", 2, "edges.a"),
    "calls itself": ("edges:\n  a: [a]", 2, "edges.a[0]"),
    "twice": ("edges:\n  a: [b, c, b]", 2, "edges.a[2]"),
    "key twice": ("edges:\n  a: [b]\n  a: [c]", 3, "edges.a"),
    "a list of pairs": ("edges:\n- [a, b]", 1, "edges"),
    "a callee that is no word": ("edges:\n  a: [[b]]", 2, "edges.a[0]"),
    "an empty name": ("edges:\n  a: ['']", 2, "edges.a[0]"),
    "an alias": ("edges:\n  a: &x [b]\n  c: *x", 3, ""),
    "a tag": ("edges: !!python/object/apply:os.system ['true']", 1, ""),
    "no YAML": ("edges: {a: [b}", 1, ""),
    "not UTF-8": (b"edges: {a: [\xff]}", 1, ""),
    "too many": ("edges: {a: [" + ", ".join(f"s{i}" for i in range(5001)) + "]}", 1, "edges"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_told_with_file_line_and_key(tmp_path: Path, name: str) -> None:
    body, row, key = FAULTS[name]
    path = tmp_path / "t.yaml"
    path.write_bytes(body.encode() if isinstance(body, str) else body)
    with pytest.raises(TopologyError) as refused:
        read_topology(path)
    places = [(f.file, f.line, f.key) for f in refused.value.faults]
    assert (str(path), row, key) in places, refused.value


def test_every_fault_is_told(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("edges:\n  a: [a, b, b]\nkinds: {a: http, b: http, c: nothing}\nmore: 1")
    with pytest.raises(TopologyError) as refused:
        read_topology(tmp_path / "t.yaml")
    assert len(refused.value.faults) >= 2


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TopologyError, match="No such file"):
        read_topology(tmp_path / "none.yaml")


def test_the_configured_graph(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(GOOD)
    (tmp_path / "file.yaml").write_text("topology: {file: t.yaml}")
    (tmp_path / "inline.yaml").write_text("topology:\n" + "".join(f"  {row}\n" for row in GOOD.split("\n")))

    def configured(name: str) -> Config:
        return load(tmp_path / name, {})

    assert load_topology(configured("file.yaml")) == load_topology(configured("inline.yaml"))
    assert load_topology(tmp_path / "t.yaml").edges == EDGES


NAME = st.sampled_from("abcdef")
GRAPH = st.builds(
    Topology, st.lists(st.tuples(NAME, NAME)).map(tuple), st.dictionaries(NAME, st.sampled_from(["http", "host"]))
)


@given(st.lists(GRAPH, max_size=4))
def test_merging_keeps_every_edge_and_the_first_kind(graphs: list[Topology]) -> None:
    merged = merge(graphs)
    assert set(merged.edges) == {edge for graph in graphs for edge in graph.edges}
    assert len(set(merged.edges)) == len(merged.edges)
    for name in {name for graph in graphs for name in graph.kinds}:
        assert merged.kinds[name] == next(graph.kinds[name] for graph in graphs if name in graph.kinds)


def test_merging_is_bounded() -> None:
    assert len(merge([Topology(tuple((f"a{i}", "b") for i in range(6000)))]).edges) == 5000


KNOWN = frozenset({"orders", "pay:ments", "a.b"})
ADDRESSES = [
    ("orders", "orders"),
    ("orders:8080", "orders"),
    ("orders.shop.svc.cluster.local", "orders"),
    ("orders.shop:80", "orders"),
    ("a.b", "a.b"),
    ("a.b:1", "a.b"),
    ("pay:ments", "pay:ments"),
    ("api.stripe.com:443", "api.stripe.com"),
    ("10.0.0.7:80", "10.0.0.7"),
    ("[2001:db8::1]:80", "2001:db8::1"),
    ("2001:db8::1", "2001:db8::1"),
    ("127.0.0.1:80", ""),
    ("[::1]:80", ""),
    ("localhost:80", ""),
    ("", ""),
]


@pytest.mark.parametrize(("address", "service"), ADDRESSES)
def test_addresses_mean_services(address: str, service: str) -> None:
    assert resolve(address, KNOWN) == service


async def test_the_graph_of_metrics(victoria: Server) -> None:
    now = time.time()
    rows = [
        ("up", {"app": "front"}),
        ("up", {"app": "orders"}),
        ("traces_service_graph_request_total", {"client": "front", "server": "orders"}),
        ("traces_service_graph_request_total", {"client": "orders", "server": "s3", "connection_type": "virtual_node"}),
        ("traces_service_graph_request_total", {"client": "orders", "server": ""}),
        ("http_client_request_duration_seconds_count", {"app": "front", "server_address": "orders:80", "code": "200"}),
        ("http_client_request_duration_seconds_count", {"app": "orders", "server_address": "pay.example:443"}),
        ("http_client_request_duration_seconds_count", {"app": "orders", "server_address": "localhost"}),
        (
            "db_client_operation_duration_seconds_count",
            {"app": "orders", "server_address": "db-1", "db_system_name": "postgresql"},
        ),
    ]
    body = "".join(line(metric, labels, 1, int((now - 60) * 1000)) + "\n" for metric, labels in rows)
    request = urllib.request.Request(f"{victoria.url}/api/v1/import/prometheus", data=body.encode(), method="POST")
    urllib.request.urlopen(request, timeout=20).close()
    urllib.request.urlopen(f"{victoria.url}/internal/force_flush", timeout=20).close()
    async with PrometheusSource(Prometheus(url=victoria.url, service_label="app")) as source:
        discovery = Discovery(source)
        topology = await discovery.topology(20.0)
    assert discovery.problems == ()
    assert topology.edges == (
        ("front", "orders"),
        ("orders", "db-1"),
        ("orders", "pay.example"),
        ("orders", "s3"),
    )
    assert topology.kinds == {"db-1": "postgres", "pay.example": "external", "s3": "external"}


async def test_a_server_that_is_down_gives_an_empty_graph_and_says_why() -> None:
    async with PrometheusSource(Prometheus(url=f"http://127.0.0.1:{port()}")) as source:
        discovery = Discovery(source)
        assert await discovery.topology(5.0) == Topology()
    assert discovery.problems
    assert all("connection refused" in problem for problem in discovery.problems)


async def test_the_queries_are_accepted_by_a_real_prometheus(prometheus: Server) -> None:
    async with PrometheusSource(Prometheus(url=prometheus.url)) as source:
        discovery = Discovery(source)
        assert await discovery.topology(20.0) == Topology()
    assert discovery.problems == ()


@pytest.mark.parametrize(
    ("metric", "labels", "edge"),
    [
        (
            "istio_requests_total",
            {"source_canonical_service": "front", "destination_canonical_service": "cart"},
            ("front", "cart"),
        ),
        ("response_total", {"deployment": "front", "dst_service": "cart.shop.svc.cluster.local"}, ("front", "cart")),
    ],
)
def test_a_mesh_tells_both_ends(metric: str, labels: dict[str, str], edge: tuple[str, str]) -> None:
    (query,) = (q for q in EDGE_QUERIES if f"({metric}" in q.query)
    promql_parser.parse(query.query)
    found = edges_of(query, [Sample(labels, 0.0, 1.0)], "service", frozenset({"front", "cart"}))
    assert found.edges == (edge,)
