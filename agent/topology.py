"""Who calls or depends on whom: from the configuration, from a file, or as metrics tell.

Called by `agent.app` at start (`load_topology`) and by `agent.situation` while incidents are looked at
(`Discovery.topology`). Exists because causes are looked for along the paths of this graph
(`rules.model.Topology.paths_from`). It never guesses a service's name beyond what `resolve` says, and a graph that
cannot be read from metrics is an empty one: what is configured stands anyway.

The file has the two keys of the configuration's `topology` section, read as strictly:

    edges: {front: [orders, node-1], orders: [postgres, payments, node-1]}
    kinds: {front: http, orders: http, postgres: postgres, payments: external, node-1: host}
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from agent.config import Config, Name, ServiceKind
from agent.sources.matrix import Sample
from agent.sources.prometheus import PrometheusSource, QueryError
from agent.sources.promql import render
from agent.strict import ConfigError, Document
from rules.model import Topology

MAX_FILE_BYTES = 1024 * 1024
MAX_EDGES = 5_000  # of a graph; the rest, in order of name, is left out of a discovered one and a fault of a file


class TopologyError(ConfigError):
    """The topology file is not usable. `faults` holds all of them, each with file, line and key."""


class _File(msgspec.Struct, frozen=True, kw_only=True):
    edges: Mapping[Name, tuple[Name, ...]] = {}
    kinds: Mapping[Name, ServiceKind] = {}


@dataclass(frozen=True, slots=True)
class EdgeQuery:
    """A PromQL template whose series are edges: the labels named `caller` and `callee` hold the services, `$service` in
    them and in the query being the configured label. `kind` is a label that tells what the callee is."""

    query: str
    caller: str
    callee: str
    kind: str = ""


SERVICES = "group by ($service) (up)"
# Ten minutes, so that an edge outlives the fault that silences it.
EDGE_QUERIES = (
    EdgeQuery(
        "group by (client, server, connection_type) (last_over_time(traces_service_graph_request_total[10m]))",
        "client",
        "server",
        "connection_type",
    ),
    EdgeQuery(
        "group by ($service, server_address) (last_over_time(http_client_request_duration_seconds_count[10m]))",
        "$service",
        "server_address",
    ),
    EdgeQuery(
        "group by ($service, server_address, db_system_name)"
        " (last_over_time(db_client_operation_duration_seconds_count[10m]))",
        "$service",
        "server_address",
        "db_system_name",
    ),
    # Service meshes on Kubernetes: Istio and Linkerd tell both ends of every call.
    EdgeQuery(
        "group by (source_canonical_service, destination_canonical_service) (last_over_time(istio_requests_total"
        '{source_canonical_service!="unknown", destination_canonical_service!="unknown"}[10m]))',
        "source_canonical_service",
        "destination_canonical_service",
    ),
    EdgeQuery(
        "group by (deployment, dst_service)"
        ' (last_over_time(response_total{direction="outbound", dst_service!=""}[10m]))',
        "deployment",
        "dst_service",
    ),
)
# What OpenTelemetry's db.system.name and the service graph's connection_type mean here, if the callee is not scraped.
KINDS = {"postgresql": "postgres", "virtual_node": "external"}


def load_topology(config: Config | Path) -> Topology:
    """The configured graph: of `topology.file`, or else of `topology.edges` and `topology.kinds`. A path is that file.

    Raises TopologyError with every fault of the file."""
    if isinstance(config, Path):
        return read_topology(config)
    section = config.topology
    if section.file is not None:
        return read_topology(section.file)
    return Topology(edges=tuple(sorted(set(section.edge_pairs))), kinds=dict(section.kinds))


def read_topology(path: Path) -> Topology:
    """The graph of a file. Raises TopologyError with every fault, each with file, line and key."""
    document = Document(str(path), path.parent)
    try:
        with path.open("rb") as file:
            body = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        document.fault(
            "", f"cannot be read: {error.strerror or error}", "name a readable YAML file with edges and kinds"
        )
        raise TopologyError(tuple(document.faults)) from error
    document.read(body)
    graph = document.build(_File)
    if graph is not None:
        _check(graph, document)
    if graph is None or document.faults:
        raise TopologyError(tuple(sorted(document.faults, key=lambda fault: fault.line)))
    edges = {(caller, callee) for caller, callees in graph.edges.items() for callee in callees}
    return Topology(edges=tuple(sorted(edges)), kinds=dict(graph.kinds))


def _check(graph: _File, document: Document) -> None:
    for caller, callees in graph.edges.items():
        key = f"edges.{caller}"
        if graph.kinds and caller not in graph.kinds:
            document.fault(key, f'"{caller}" has no kind', "add it to kinds, or mend its name")
        for i, callee in enumerate(callees):
            if callee == caller:
                document.fault(f"{key}[{i}]", f'"{caller}" calls itself', "remove the edge")
            elif callee in callees[:i]:
                document.fault(f"{key}[{i}]", f'"{callee}" is there twice', "remove one")
            elif graph.kinds and callee not in graph.kinds:
                document.fault(f"{key}[{i}]", f'"{callee}" has no kind', "add it to kinds, or mend its name")
    edges = sum(map(len, graph.edges.values()))
    if edges > MAX_EDGES:
        document.fault("edges", f"{edges} edges", f"at most {MAX_EDGES} are taken")


def merge(topologies: Iterable[Topology]) -> Topology:
    """All edges of all graphs, at most MAX_EDGES; of two kinds for one service the first counts."""
    edges: set[tuple[str, str]] = set()
    kinds: dict[str, str] = {}
    for topology in topologies:
        edges |= set(topology.edges)
        kinds = {**topology.kinds, **kinds}
    kept = tuple(sorted(edges)[:MAX_EDGES])
    return Topology(edges=kept, kinds=kinds)


class Discovery:
    """Reads the graph from metrics: service graphs of traces (Tempo's and the OpenTelemetry collector's
    `traces_service_graph_request_total`), and the addresses that HTTP and database clients call (OpenTelemetry's
    `server.address`), Istio's and Linkerd's request counters. `problems` says what the last reading lacked."""

    def __init__(self, source: PrometheusSource, queries: tuple[EdgeQuery, ...] = EDGE_QUERIES) -> None:
        self._source = source
        self._queries = queries
        self.problems: tuple[str, ...] = ()

    async def topology(self, deadline_seconds: float) -> Topology:
        """The graph as of now. What could not be read is left out, and in `problems`; nothing is raised."""
        label = self._source.config.service_label
        problems: list[str] = []

        async def ask(query: str) -> tuple[Sample, ...]:
            try:
                samples, warnings = await self._source.query_instant(
                    render(query, label, (), self._source.config.rate), deadline_seconds=deadline_seconds
                )
            except QueryError as error:
                problems.append(f"topology: {error}")
                return ()
            problems.extend(warnings)
            return samples

        # One after the other, under one deadline each: this is background work and must not crowd out evidence.
        scraped = {sample.labels.get(label, "") for sample in await ask(SERVICES)} - {""}
        found = [(query, await ask(query.query)) for query in self._queries]
        self.problems = tuple(problems)
        callers = {s.labels.get(q.caller.replace("$service", label), "") for q, samples in found for s in samples}
        known = frozenset(scraped | callers - {""})
        return merge(edges_of(query, samples, label, known) for query, samples in found)


def edges_of(query: EdgeQuery, samples: Iterable[Sample], service_label: str, known: frozenset[str]) -> Topology:
    """The edges that the answer to `query` tells. A callee that is none of the `known` services gets a kind."""
    edges: set[tuple[str, str]] = set()
    kinds: dict[str, str] = {}
    for sample in samples:
        caller = sample.labels.get(query.caller.replace("$service", service_label), "")
        callee = resolve(sample.labels.get(query.callee.replace("$service", service_label), ""), known)
        if not caller or not callee or caller == callee:
            continue
        edges.add((caller, callee))
        if callee not in known:
            kinds.setdefault(callee, KINDS.get(sample.labels.get(query.kind, ""), "external"))
    return Topology(edges=tuple(sorted(edges)), kinds=kinds)


def resolve(address: str, known: frozenset[str]) -> str:
    """The service that an address means: a known service of that name, else of its host name, else of the first part
    of that (`orders.shop.svc.cluster.local`), else the host name itself. "" for a loopback address: it means a
    different service on every host."""
    if address in known:
        return address
    host = address
    if address.startswith("["):
        host = address[1:].partition("]")[0]
    elif address.count(":") == 1:
        host = address.partition(":")[0]
    if host in known:
        return host
    try:
        return "" if ipaddress.ip_address(host).is_loopback else host
    except ValueError:
        first = host.partition(".")[0]
        if first in known:
            return first
        return "" if host == "localhost" else host
