"""Checks of the configuration across keys: what each value alone cannot show.

Called by `agent.config.load` after every single value is sound. Each function adds faults to the document, at the line
of the key that has to change; none raises, none looks outside the configuration. `unknown_inventory` is for those who
have read the catalogue as well; `agent.config.placed` tells where what it finds stands.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from datetime import datetime
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlsplit

from actions.catalog import SHELLS, Catalog
from agent.strict import Document, Fault

if TYPE_CHECKING:
    from agent.config import ClientTls, Config, MaintenanceWindow

MAX_POINTS = 11_000  # Prometheus refuses a range query with more points a series
MAX_DIAGNOSTICS = 4096  # characters; they are one element of an argument list


def check(config: Config, document: Document) -> None:
    """Adds every fault found between keys to `document`."""
    _sources(config, document)
    _listening(config, document)
    _service_graph(config, document)
    _inventory(config, document)
    _diagnostics(config, document)
    _limits(config, document)
    _protected(config, document)
    for i, window in enumerate(config.guard.maintenance):
        _maintenance(window, f"guard.maintenance[{i}]", document)


def _sources(config: Config, document: Document) -> None:
    prometheus = config.prometheus
    for name, source in (("prometheus", prometheus), ("alertmanager", config.alertmanager)):
        if source.basic is not None and source.bearer_token_file is not None:
            document.fault(
                f"{name}.bearer_token_file", "both a bearer token and basic auth are set", "keep one of them"
            )
        _client_tls(source.tls, f"{name}.tls", source.url, document)
        if not source.url:
            for key in ("bearer_token_file", "basic"):
                if getattr(source, key) is not None:
                    document.fault(f"{name}.{key}", f"{name}.url is not set", "set it, or remove the credentials")
    if prometheus.step_seconds > prometheus.window_seconds:
        hint = f"window_seconds is {prometheus.window_seconds:g}"
        document.fault("prometheus.step_seconds", "the step is longer than the window", hint)
    elif prometheus.window_seconds / prometheus.step_seconds > MAX_POINTS:
        hint = f"Prometheus gives at most {MAX_POINTS} points: widen step_seconds or narrow window_seconds"
        document.fault("prometheus.window_seconds", "the window has too many steps", hint)
    if prometheus.tenant and not prometheus.tenant_header:
        document.fault(
            "prometheus.tenant", "tenant without tenant_header", "set tenant_header, for example X-Scope-OrgID"
        )
    if any(not c.isprintable() for c in prometheus.tenant):
        document.fault("prometheus.tenant", "the tenant has a control character", "it becomes a header's value")


def _client_tls(tls: ClientTls, key: str, url: str, document: Document) -> None:
    if (tls.cert_file is None) != (tls.key_file is None):
        given, absent = ("cert_file", "key_file") if tls.key_file is None else ("key_file", "cert_file")
        document.fault(f"{key}.{given}", f"{given} without {absent}", "a client certificate needs both")
    used = tls.ca_file or tls.cert_file or tls.server_name or tls.insecure_skip_verify
    if used and not url.startswith("https:"):
        document.fault(key, "TLS settings without an https URL", "write the url with https")
    if tls.insecure_skip_verify and (tls.ca_file or tls.server_name):
        document.fault(
            f"{key}.insecure_skip_verify", "verification is off, yet ca_file or server_name is set", "keep one"
        )


def _listening(config: Config, document: Document) -> None:
    tls = config.listen_tls
    if (tls.cert_file is None) != (tls.key_file is None):
        given, absent = ("cert_file", "key_file") if tls.key_file is None else ("key_file", "cert_file")
        document.fault(f"listen_tls.{given}", f"{given} without {absent}", "serving TLS needs both")
    if tls.client_ca_file is not None and tls.cert_file is None:
        document.fault("listen_tls.client_ca_file", "client_ca_file without cert_file", "client certificates need TLS")
    _unique([u.name for u in config.auth.basic], "auth.basic[{}].name", "user", document)
    for i, user in enumerate(config.auth.basic):
        if ":" in user.name:
            document.fault(
                f"auth.basic[{i}].name", "a user name with a colon", "basic auth parts name and password by it"
            )
    _unique([t.name for t in config.auth.bearer], "auth.bearer[{}].name", "token", document)
    _unique([t.token_file.value for t in config.auth.bearer], "auth.bearer[{}].token_file", "", document)
    if config.intake.max_body_bytes > config.intake.max_bytes_in_flight:
        hint = f"max_body_bytes is {config.intake.max_body_bytes}"
        document.fault("intake.max_bytes_in_flight", "smaller than one body may be", hint)


def _unique(values: Iterable[str], key: str, noun: str, document: Document) -> None:
    seen: dict[str, int] = {}
    for i, value in enumerate(values):
        if value in seen:
            what = f'{noun} "{value}" is there twice' if noun else "the same secret is there twice"
            document.fault(key.format(i), what, f"entry [{seen[value]}] has it already")
        seen.setdefault(value, i)


def _service_graph(config: Config, document: Document) -> None:
    topology = config.topology
    for caller, callees in topology.edges.items():
        key = f"topology.edges.{caller}"
        for i, callee in enumerate(callees):
            if callee == caller:
                document.fault(f"{key}[{i}]", f'"{caller}" calls itself', "remove the edge")
            elif callee in callees[:i]:
                document.fault(f"{key}[{i}]", f'"{callee}" is there twice', "remove one")
            elif topology.kinds and callee not in topology.kinds:
                document.fault(f"{key}[{i}]", f'"{callee}" has no kind', "add it to topology.kinds, or mend its name")
        if topology.kinds and caller not in topology.kinds:
            document.fault(key, f'"{caller}" has no kind', "add it to topology.kinds, or mend its name")
    if topology.file is not None and (topology.edges or topology.kinds):
        document.fault("topology.file", "both a file and edges or kinds are set", "keep the graph in one place")
    if topology.service_graph and not config.prometheus.url:
        document.fault("topology.service_graph", "prometheus.url is not set", "service graphs are read from Prometheus")


def _inventory(config: Config, document: Document) -> None:
    for service, entry in config.inventory.items():
        key = f"inventory.{service}"
        if bool(entry.supervisord_url) != bool(entry.supervisord_program):
            given = "supervisord_url" if entry.supervisord_url else "supervisord_program"
            document.fault(f"{key}.{given}", f"{given} alone", "give supervisord_url and supervisord_program")
        if entry.supervisord_url and not entry.supervisord_url.startswith(("http://", "unix:///")):
            hint = "write http://127.0.0.1:9001 or unix:///run/supervisor.sock"
            document.fault(f"{key}.supervisord_url", "neither http nor unix URL", hint)
        if entry.listen_port and int(entry.listen_port) > 65535:
            document.fault(f"{key}.listen_port", f"{entry.listen_port} is no port", "ports end at 65535")
        if entry.scale_url and not entry.workers_max:
            document.fault(f"{key}.scale_url", "scale_url without workers_max", "say how far it may be scaled")
        if entry.log_root and not entry.log_root.startswith("/"):
            document.fault(f"{key}.log_root", "not an absolute path", "files under it may be removed: name it fully")
        elif entry.log_root.rstrip("/") in ("", "/var", "/home", "/etc", "/usr") and entry.log_root:
            document.fault(
                f"{key}.log_root", f"{entry.log_root} is no log directory", "name the service's own directory"
            )
        for name in entry.more:
            if name.startswith("kubernetes_"):
                document.fault(f"{key}.{name}", "not a service's own", "the connection is that of `kubernetes`")
        if problem := _dsn_problem(entry.pg_dsn):
            document.fault(f"{key}.pg_dsn", *problem)


def unknown_inventory(config: Config, catalog: Catalog) -> list[Fault]:
    """Keys of the inventory that no action of the catalogue takes: with a typing error an action would never be
    considered. `catalog`: also what is switched off."""
    known = {p.source_key for d in catalog for p in d.parameters.values() if p.origin == "inventory"}
    faults = []
    for service, entry in config.inventory.items():
        for name in sorted(entry.more.keys() - known):
            near = difflib.get_close_matches(name, sorted(known | set(entry.__struct_fields__) - {"more"}), 1, 0.6)
            hint = f'did you mean "{near[0]}"?' if near else "docs/actions.md names the keys of each action"
            faults.append(Fault("inventory", 0, f"inventory.{service}.{name}", "no action takes this key", hint))
    return faults


def _diagnostics(config: Config, document: Document) -> None:
    for name, argv in config.kubernetes.diagnostics.items():
        program = argv[0].rsplit("/", 1)[-1] if argv else ""
        if not argv:
            document.fault(f"kubernetes.diagnostics.{name}", "empty", "write the program and its arguments as a list")
        elif program in SHELLS:
            hint = "name the program itself"
            document.fault(f"kubernetes.diagnostics.{name}", f"{program} would parse what it is given", hint)
    if len(config.kubernetes.reach.get("kubernetes_diagnostics", "")) > MAX_DIAGNOSTICS:
        hint = "shorten them, or remove some"
        document.fault("kubernetes.diagnostics", f"more than {MAX_DIAGNOSTICS} characters as JSON", hint)


def _dsn_problem(dsn: str) -> tuple[str, str] | None:
    """Against a libpq URI. A password in it would be printed with plans, so it may not be there."""
    if not dsn:
        return None
    form = "write a URI: postgresql://user@host:5432/database"
    try:
        parts = urlsplit(dsn)
        password = parts.password
    except ValueError:
        return "not a PostgreSQL URI", form
    if parts.scheme not in ("postgresql", "postgres"):
        return "not a PostgreSQL URI", form
    if password is not None or any(name == "password" for name, _ in parse_qsl(parts.query)):
        return "the URI holds a password", "put it in a password file (~/.pgpass of the sandbox user)"
    return None


def _limits(config: Config, document: Document) -> None:
    if config.breaker.max_open_seconds < config.breaker.open_seconds:
        hint = f"open_seconds is {config.breaker.open_seconds:g}"
        document.fault("breaker.max_open_seconds", "shorter than the first opening", hint)
    if config.verify.poll_seconds > config.verify.deadline_seconds:
        hint = f"deadline_seconds is {config.verify.deadline_seconds:g}"
        document.fault("verify.poll_seconds", "longer than the deadline", hint)
    elif config.verify.samples * config.verify.poll_seconds > config.verify.deadline_seconds:
        hint = "samples times poll_seconds must fit into deadline_seconds"
        document.fault("verify.samples", "so many samples never come before the deadline", hint)
    elif (
        config.prometheus.url
        and config.verify.samples * config.prometheus.step_seconds > config.verify.deadline_seconds
    ):
        hint = "verify.samples times prometheus.step_seconds must fit into it"
        document.fault("verify.deadline_seconds", "no recovery can be seen by then", hint)
    if config.sandbox.parent and not config.sandbox.parent.startswith("/"):
        document.fault("sandbox.parent", "not an absolute path", "name a directory under /sys/fs/cgroup")
    if config.sandbox.allow_unenforced_auto and config.sandbox.protection == "required":
        what = "protection is required, so nothing runs unenforced"
        document.fault("sandbox.allow_unenforced_auto", what, "set it to false, or protection to automatic")
    if not config.service_labels:
        document.fault("service_labels", "no label would name an alert's service", "list at least one, for example job")


def _protected(config: Config, document: Document) -> None:
    """These reach an action as one list with commas: half a pattern would protect something else."""
    protected = config.guard.protected
    for name in ("processes", "users", "paths"):
        for i, glob in enumerate(getattr(protected, name)):
            if "," in glob:
                document.fault(f"guard.protected.{name}[{i}]", f'"{glob}" has a comma', "write ? for it")


def _maintenance(window: MaintenanceWindow, key: str, document: Document) -> None:
    absolute, weekly = bool(window.start or window.end), bool(window.from_time or window.to_time or window.days)
    if absolute == weekly:
        what = "neither absolute nor weekly" if not absolute else "both absolute and weekly"
        document.fault(key, what, "give start and end, or from_time and to_time (and days)")
    elif absolute and not (window.start and window.end):
        document.fault(key, "start or end is absent", "give both")
    elif absolute and datetime.fromisoformat(window.end) <= datetime.fromisoformat(window.start):
        document.fault(f"{key}.end", "the end is not after the start", "exchange them")
    elif weekly and (window.from_time is None or window.to_time is None):
        document.fault(key, "from_time or to_time is absent", "give both")
    elif weekly and window.from_time == window.to_time:
        document.fault(f"{key}.to_time", "the window has no length", "for whole days write 00:00 to 23:59")
