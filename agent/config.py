"""The configuration: its shape, its defaults, and how it is loaded.

Called by `agent.cli` (and through it by everything: `agent.app` gets one `Config`). Exists so that every module is
handed checked values and no module reads the environment or a configuration file of its own. It never prints a secret,
never guesses what a wrong value was meant to be, and never loads half a file: `load` gives a whole `Config` or raises
`ConfigError` with every fault found.

Seconds are floats, sizes are bytes, ratios are fractions. Relative paths count from the directory of the file that
names them. Every key is described in docs/configuration.md; a test compares names and defaults.

A mapping of the file is a struct here: its fields are its keys; what has no default is required.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta, Struct

from actions import policy
from actions.breaker import BreakerPolicy
from agent.config_checks import check
from agent.strict import ConfigError, Document, Fault, kind, variables
from agent.strict_kinds import Secret
from sandbox.model import Protection, Totals

__all__ = ["Config", "ConfigError", "Fault", "Secret", "default_state_dir", "load"]

MIB = 1024 * 1024
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")

Seconds = Annotated[float, Meta(gt=0, le=31 * 86400)]
SecondsOrZero = Annotated[float, Meta(ge=0, le=31 * 86400)]
Offset = Annotated[float, Meta(ge=3600, le=31 * 86400)]
Count = Annotated[int, Meta(ge=1, le=1_000_000_000)]
Bytes = Annotated[int, Meta(ge=1024, le=2**50), kind("bytes")]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Url = Annotated[str, kind("url")]
Glob = Annotated[str, Meta(min_length=1, max_length=256), kind("glob")]
LabelName = Annotated[str, Meta(pattern=r"^[a-zA-Z_][a-zA-Z0-9_]*\Z", max_length=128)]
Name = Annotated[str, Meta(min_length=1, max_length=256)]
Tenant = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9._-]{1,64}\Z")]
HeaderName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9-]*\Z", max_length=128)]
File = Annotated[Path, kind("file")]
Directory = Annotated[Path, kind("directory")]
TimeOfDay = Annotated[str, Meta(pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]\Z")]
Scope = Literal["webhook", "read", "approve"]
ServiceKind = Literal["http", "worker", "postgres", "host", "external"]


def default_state_dir(environ: Mapping[str, str] | None = None) -> Path:
    """$XDG_STATE_HOME/alertmedic, and ~/.local/state/alertmedic where that is not set (XDG Base Directory)."""
    env = os.environ if environ is None else environ
    base = env.get("XDG_STATE_HOME", "")
    if base and Path(base).is_absolute():
        return Path(base) / "alertmedic"
    home = env.get("HOME", "")
    return (Path(home) if home else Path.home()) / ".local" / "state" / "alertmedic"


class BearerToken(Struct, frozen=True, kw_only=True):
    name: Name  # who it is, in the journal
    token_file: Secret
    tenants: tuple[Glob, ...] = ("*",)
    scopes: tuple[Scope, ...] = ("webhook", "read")


class BasicUser(Struct, frozen=True, kw_only=True):
    name: Name
    password_file: Secret
    tenants: tuple[Glob, ...] = ("*",)
    scopes: tuple[Scope, ...] = ("webhook", "read")


class Auth(Struct, frozen=True, kw_only=True):
    """Who may call the HTTP port. Nobody configured: this machine may post and read, nobody may approve there (the
    control socket in the state directory stays: whoever can open that file is the operator)."""

    bearer: tuple[BearerToken, ...] = ()
    basic: tuple[BasicUser, ...] = ()

    @property
    def required(self) -> bool:
        return bool(self.bearer or self.basic)


class ListenTls(Struct, frozen=True, kw_only=True):
    cert_file: File | None = None
    key_file: File | None = None
    client_ca_file: File | None = None


class Intake(Struct, frozen=True, kw_only=True):
    max_body_bytes: Bytes = 8 * MIB
    max_waiting: Count = 1024  # incidents of one tenant that may await diagnosis in memory
    max_requests: Count = 256  # webhook requests handled at once; more get 503
    max_bytes_in_flight: Bytes = 64 * MIB  # bodies held at once; more get 503


class Journal(Struct, frozen=True, kw_only=True):
    segment_bytes: Bytes = 64 * MIB
    backlog_bytes: Bytes = 64 * MIB  # waiting to be durable; more is answered 503
    snapshot_bytes: Bytes = 64 * MIB  # journalled since the last snapshot; then the next one is made
    keep_incidents: Count = 2_000  # closed incidents kept, at most
    keep_days: Annotated[float, Meta(gt=0, le=3650)] = 30.0  # how long closed incidents are kept


class BasicAuth(Struct, frozen=True, kw_only=True):
    username: Name
    password_file: Secret


class ClientTls(Struct, frozen=True, kw_only=True):
    ca_file: File | None = None
    cert_file: File | None = None
    key_file: File | None = None
    server_name: str = ""
    insecure_skip_verify: bool = False


class Prometheus(Struct, frozen=True, kw_only=True):
    url: Url = ""
    timeout_seconds: Seconds = 15.0
    step_seconds: Seconds = 30.0
    window_seconds: Seconds = 3600.0
    rate_seconds: Seconds | None = None  # None: four steps, at least 60 s
    concurrency: Annotated[int, Meta(ge=1, le=256)] = 8
    onset_margin_seconds: SecondsOrZero = 60.0
    service_label: LabelName = "service"
    bearer_token_file: Secret | None = None
    basic: BasicAuth | None = None
    tls: ClientTls = ClientTls()
    tenant_header: HeaderName = ""
    tenant: str = ""  # "": the tenant of the alert
    parameters: Mapping[Name, str] = {}  # sent along with every query, `nocache: "1"`
    # How long before an incident the same time is looked at again, where the store reaches back: a day, a week.
    history_seconds: Annotated[tuple[Offset, ...], Meta(max_length=4)] = (86400.0, 604800.0)

    @property
    def rate_window_seconds(self) -> float:
        return self.rate_seconds if self.rate_seconds is not None else max(60.0, 4 * self.step_seconds)


class Alertmanager(Struct, frozen=True, kw_only=True):
    url: Url = ""
    timeout_seconds: Seconds = 10.0
    reconcile: bool = True  # on start, ask which alerts fire (only with a url)
    tenant: Tenant = "default"  # the tenant that reconciled alerts belong to
    receivers: Mapping[Glob, Tenant] = {}  # those that send to us, and as which tenant; none: all, as `tenant`
    bearer_token_file: Secret | None = None
    basic: BasicAuth | None = None
    tls: ClientTls = ClientTls()


class Topology(Struct, frozen=True, kw_only=True):
    file: File | None = None
    edges: Mapping[Name, tuple[Name, ...]] = {}
    kinds: Mapping[Name, ServiceKind] = {}
    service_graph: bool = False  # also ask Prometheus for traces_service_graph_* series

    @property
    def edge_pairs(self) -> tuple[tuple[str, str], ...]:
        return tuple((caller, callee) for caller, callees in self.edges.items() for callee in callees)


class Packs(Struct, frozen=True, kw_only=True):
    dirs: tuple[Directory, ...] = ()
    disable: tuple[Name, ...] = ()  # names of packs
    engine: Literal["builtin", "durable"] = "builtin"  # which engine runs the rules
    model: File | None = None  # learned tables (`alertmedic learn`) in the place of the shipped ones


class Actions(Struct, frozen=True, kw_only=True):
    dirs: tuple[Directory, ...] = ()
    disable: tuple[Glob, ...] = ()  # action names


LogFile = Annotated[str, Meta(pattern=r"^/[^\x00-\x1f]*\Z", max_length=4096)]


InventoryKey = Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_]*\Z", max_length=64)]


class InventoryEntry(Struct, frozen=True, kw_only=True):
    """What actions and the host source may know of one service. "" means not told."""

    host: str = ""  # "" and local: this machine
    listen_port: Annotated[str, Meta(pattern=r"^([1-9][0-9]{0,4})?\Z")] = ""
    supervisord_url: str = ""  # http://... or unix:///path
    supervisord_program: str = ""
    systemd_unit: str = ""
    pg_dsn: str = ""
    http_admin: Url = ""
    flags_url: Url = ""
    scale_url: Url = ""
    workers_max: Annotated[str, Meta(pattern=r"^([1-9][0-9]{0,5})?\Z")] = ""
    log_root: str = ""
    logs: Annotated[tuple[LogFile, ...], Meta(max_length=5)] = ()
    kubernetes_workload: Annotated[
        str, Meta(pattern=r"^((deployment|statefulset|daemonset)/[a-z0-9-]{1,63}/[a-z0-9.-]{1,253})?\Z")
    ] = ""
    # What further actions take, shipped or one's own: the catalogue knows the keys, and `check-config` compares.
    more: Mapping[InventoryKey, Annotated[str, Meta(max_length=1024)]] = {}
    __rest__: ClassVar[str] = "more"

    def strings(self) -> dict[str, str]:
        """The keys that are told, as actions take them."""
        known = {n: value for n, value in msgspec.structs.asdict(self).items() if value and isinstance(value, str)}
        return {**{n: value for n, value in self.more.items() if value}, **known}


class RemoteHost(Struct, frozen=True, kw_only=True):
    """A machine that steps may run on, by `alertmedic sandbox run` there through the OpenSSH client."""

    address: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9.:-]*\Z", max_length=255)]
    port: Annotated[int, Meta(ge=1, le=65535)] = 22
    user: Annotated[str, Meta(pattern=r"^([a-z_][a-z0-9_-]*)?\Z", max_length=32)] = ""
    identity_file: File | None = None
    known_hosts: File | None = None  # none: those of the agent's user
    command: Annotated[str, Meta(pattern=r"^[\w./@:=+-]+( [\w./@:=+-]+)*\Z")] = "alertmedic sandbox run"
    connect_seconds: Seconds = 10.0


class AutonomyRule(policy.AutonomyRule, frozen=True, kw_only=True):
    """Globs that must all match (fnmatch, case-sensitive), and the autonomy then granted. The first match counts."""

    action: Glob = "*"
    service: Glob = "*"
    alert: Glob = "*"
    cause: Glob = "*"
    tenant: Glob = "*"
    environment: Glob = "*"


class AutonomyPolicy(policy.AutonomyPolicy, frozen=True, kw_only=True):
    rules: tuple[AutonomyRule, ...] = ()


class MaintenanceWindow(policy.MaintenanceWindow, frozen=True, kw_only=True):
    """No action starts in it. Absolute (`start`, `end`: RFC 3339) or weekly (`days`, `from_time`, `to_time`: UTC; an
    end before the start means the next day)."""

    services: tuple[Glob, ...] = ("*",)
    start: Annotated[str, kind("rfc3339")] = ""
    end: Annotated[str, kind("rfc3339")] = ""
    from_time: TimeOfDay | None = None
    to_time: TimeOfDay | None = None


class GroupPolicy(policy.GroupPolicy, frozen=True, kw_only=True):
    """Services that stand in for each other: what may be acted on at once, and what must stay well."""

    services: tuple[Glob, ...]


class Protected(policy.ProtectedPolicy, frozen=True, kw_only=True):
    """What no action may touch, whatever else allows it (as the agent, pid 1, kernel threads and supervisors)."""

    services: tuple[Glob, ...] = ()
    targets: tuple[Glob, ...] = ()
    processes: tuple[Glob, ...] = ()
    users: tuple[Glob, ...] = ()
    paths: tuple[Glob, ...] = ()


class Guard(Struct, frozen=True, kw_only=True):
    """`actions.policy.GuardPolicy` without what has a section of its own; a test compares names and defaults."""

    min_posterior: Fraction = 0.6
    min_margin: Fraction = 0.2
    stale_evidence_seconds: Seconds = 300.0
    cooldown_seconds: SecondsOrZero = 900.0  # between two plans of one action on one target
    actions_per_hour: Count = 10  # over everything
    actions_per_action_per_hour: Count = 6
    actions_per_target_per_hour: Count = 3
    max_targets: Count = 1  # of one plan; the action's own bound counts too
    max_steps_at_once: Count = 8
    max_services_at_once: Count = 1
    max_actions_per_service: Count = 1
    groups: Mapping[Name, GroupPolicy] = {}
    approval_ttl_seconds: Seconds = 1800.0
    approve_suggestions: bool = True
    storm: policy.StormPolicy = policy.StormPolicy()
    maintenance: tuple[MaintenanceWindow, ...] = ()
    protected: Protected = Protected()


class Sandbox(Struct, frozen=True, kw_only=True):
    protection: Protection = "automatic"
    allow_unenforced_auto: bool = False
    user: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]*\Z", max_length=64)] = ""
    parent: str = ""  # cgroup v2 directory under which leaves are made; "": found by itself
    total: Totals = Totals()


DiagnosticName = Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_]*\Z", max_length=63)]
Word = Annotated[str, Meta(pattern=r"^[^\x00-\x1f\x7f]+\Z", max_length=256)]


class Kubernetes(Struct, frozen=True, kw_only=True):
    """The API server that evidence comes from and actions go to. The defaults are what a pod finds in itself."""

    enabled: bool = False
    api: Url = "https://kubernetes.default.svc"
    token_file: Path = SERVICE_ACCOUNT / "token"  # read again for every request: it rotates
    ca_file: Path = SERVICE_ACCOUNT / "ca.crt"
    evidence: bool = True
    namespaces: tuple[Name, ...] = ()  # looked at and acted in; none named: every one
    nodes: bool = False  # look at nodes too; they are cluster-wide objects
    timeout_seconds: Seconds = 10.0
    max_objects: Count = 50_000  # of one kind that are kept in memory; more: this kind is reported as missing
    # What kubernetes.diagnose may run in a container, by name: argument lists.
    diagnostics: Mapping[DiagnosticName, tuple[Word, ...]] = {}

    @property
    def reach(self) -> dict[str, str]:
        """What the actions need to speak to the API server, as inventory keys."""
        found = {
            "kubernetes_api": self.api,
            "kubernetes_token_file": str(self.token_file),
            "kubernetes_ca_file": str(self.ca_file),
        }
        if self.diagnostics:
            found["kubernetes_diagnostics"] = json.dumps(self.diagnostics)
        return found | ({"kubernetes_namespaces": ",".join(self.namespaces)} if self.namespaces else {})

    def covers(self, subject: str) -> bool:
        """Whether that is the name of a Kubernetes object (`kind/namespace/name`, `node/name`) that may be acted on."""
        kind, *rest = subject.split("/")
        if kind in ("node", "instance"):  # an address may be a node's
            return len(rest) == 1
        return len(rest) == 2 and all(rest) and (not self.namespaces or rest[0] in self.namespaces)


class Merge(Struct, frozen=True, kw_only=True):
    window_seconds: SecondsOrZero = 300.0
    reopen_seconds: SecondsOrZero = 900.0


class Verify(Struct, frozen=True, kw_only=True):
    deadline_seconds: Seconds = 300.0
    poll_seconds: Seconds = 15.0
    samples: Annotated[int, Meta(ge=1, le=1000)] = 3  # good samples in a row


class Investigate(Struct, frozen=True, kw_only=True):
    concurrency: Annotated[int, Meta(ge=1, le=256)] = 4
    rounds: Annotated[int, Meta(ge=1, le=100)] = 3  # looks at the evidence while it is insufficient
    round_seconds: Seconds = 30.0
    recordings: Directory | None = None  # every look is kept here as a recording
    max_queries: Annotated[int, Meta(ge=1, le=10_000)] = 400  # of one look; what is over is missing evidence
    max_series: Annotated[int, Meta(ge=1, le=1_000_000)] = 20_000
    max_samples: Annotated[int, Meta(ge=1, le=100_000_000)] = 8_000_000  # series times points


class Learning(Struct, frozen=True, kw_only=True):
    """Learning from what people say an incident's cause was (`alertmedic feedback`)."""

    enabled: bool = True
    window_seconds: Seconds = 3600.0  # for how long feedback counts
    windows: Mapping[Name, Seconds] = {}  # by evidence group, where its signals are slower


class Candidate(Struct, frozen=True, kw_only=True):
    """The other diagnosis channel. Nothing is inherited from `packs`."""

    dirs: tuple[Directory, ...] = ()
    disable: tuple[Name, ...] = ()
    model: File | None = None
    engine: Annotated[str, Meta(pattern=r"^([A-Za-z_][\w.]*:[A-Za-z_]\w*)?\Z")] = ""  # module:function; it never acts
    url: Url = ""  # an external endpoint instead of all that; it never acts


class Gateway(Struct, frozen=True, kw_only=True):
    candidate: Candidate | None = None
    recordings: Directory | None = None  # below which a request may name recordings
    budget_seconds: Annotated[float, Meta(gt=0, le=60)] = 0.2  # for both channels' answers; the primary goes first
    memory_bytes: Bytes = 1024 * MIB  # address space of its process
    percent: Annotated[float, Meta(ge=0, le=100)] = 100.0  # of live incidents that it looks at too, by hash of the id
    tenants: tuple[Glob, ...] = ("*",)
    teams: tuple[Glob, ...] = ("*",)
    team_label: LabelName = "team"
    min_judged: Count = 20  # comparisons, before it can be promoted
    notify_url: Url = ""  # gets a POST for every difference
    concurrency: Annotated[int, Meta(ge=1, le=256)] = 4  # requests at a time; more get 503


class Otlp(Struct, frozen=True, kw_only=True):
    endpoint: Url = ""
    timeout_seconds: Seconds = 5.0
    max_spans: Annotated[int, Meta(ge=16, le=1_000_000)] = 2048  # that wait to be sent; more are dropped and counted


class Log(Struct, frozen=True, kw_only=True):
    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "info"


class Config(Struct, frozen=True, kw_only=True):
    """Everything. `Config()` is what runs where nothing is configured."""

    listen: Annotated[str, kind("hostport")] = "127.0.0.1:9095"
    listen_tls: ListenTls = ListenTls()
    state_dir: Path = msgspec.field(default_factory=default_state_dir)
    environment: Annotated[str, Meta(max_length=128)] = ""
    shutdown_seconds: Seconds = 30.0  # that a step under way gets when the agent is told to stop
    service_labels: tuple[LabelName, ...] = ("service", "job", "app")
    auth: Auth = Auth()
    intake: Intake = Intake()
    journal: Journal = Journal()
    prometheus: Prometheus = Prometheus()
    alertmanager: Alertmanager = Alertmanager()
    topology: Topology = Topology()
    packs: Packs = Packs()
    actions: Actions = Actions()
    inventory: Mapping[Name, InventoryEntry] = {}
    hosts: Mapping[Name, RemoteHost] = {}
    autonomy: AutonomyPolicy = AutonomyPolicy()
    guard: Guard = Guard()
    breaker: BreakerPolicy = BreakerPolicy()
    sandbox: Sandbox = Sandbox()
    kubernetes: Kubernetes = Kubernetes()
    merge: Merge = Merge()
    verify: Verify = Verify()
    investigate: Investigate = Investigate()
    learning: Learning = Learning()
    gateway: Gateway = Gateway()
    otlp: Otlp = Otlp()
    log: Log = Log()

    @property
    def listen_host(self) -> str:
        return self.listen.rpartition(":")[0].strip("[]")

    @property
    def listen_port(self) -> int:
        return int(self.listen.rpartition(":")[2])

    @property
    def control_socket(self) -> Path:
        return self.state_dir / "control.sock"

    @property
    def guard_policy(self) -> policy.GuardPolicy:
        """What `actions.guard` takes: the guard's section together with autonomy, breaker and sandbox."""
        own = {name: getattr(self.guard, name) for name in self.guard.__struct_fields__}
        return policy.GuardPolicy(
            autonomy=self.autonomy,
            breaker=self.breaker,
            protection=self.sandbox.protection,
            allow_unenforced_auto=self.sandbox.allow_unenforced_auto,
            **own,
        )

    @property
    def recovery_seconds(self) -> float:
        """How long it takes until series can show that an action helped: the rate window must have left the trouble
        behind, and then come as many samples as are asked for, on the grid of the queries."""
        window = self.prometheus.rate_seconds or 4 * self.prometheus.step_seconds
        return window + (self.verify.samples + 1) * self.prometheus.step_seconds

    @property
    def inventory_strings(self) -> dict[str, dict[str, str]]:
        return {service: entry.strings() for service, entry in self.inventory.items()}

    def inventory_with(self, subjects: Iterable[str] = ()) -> dict[str, dict[str, str]]:
        """The inventory as actions take it. With an API server configured, every entry says how to reach it, and those
        of `subjects` that are Kubernetes objects in the configured namespaces (`deployment/shop/cart`, `node/a`) have
        an entry without being listed."""
        entries = self.inventory_strings
        if not self.kubernetes.enabled:
            return entries
        reach = self.kubernetes.reach
        found = {service: {**reach, **entry} for service, entry in entries.items()}
        for subject in subjects:
            if subject not in found and self.kubernetes.covers(subject):
                found[subject] = dict(reach)
        return found


_ENVIRONMENT_PREFIX = "ALERTMEDIC_"
# Not of the configuration: which file to read, a secret of the shipped actions, and the crash tests' failpoints.
_RESERVED = frozenset({"ALERTMEDIC_CONFIG", "ALERTMEDIC_HTTP_TOKEN", "ALERTMEDIC_FAILPOINT"})
# Kubernetes and Docker links set these in every container beside a service called `alertmedic`.
_SERVICE_LINK = re.compile(
    r"ALERTMEDIC_(SERVICE_(HOST|PORT(_[A-Z0-9_]+)?)|PORT(_[0-9]+_(TCP|UDP)(_(PROTO|PORT|ADDR))?)?)\Z"
)


def environment_variables() -> dict[str, str]:
    """Every variable that is understood -> the dotted key it sets. Two underscores part a section from its key; where
    no two keys would share the name, one underscore does too."""
    names: dict[str, str] = {}
    short: dict[str, list[str]] = {}
    for path, _ in variables(Config):
        names[_ENVIRONMENT_PREFIX + "__".join(path).upper()] = ".".join(path)
        short.setdefault(_ENVIRONMENT_PREFIX + "_".join(path).upper(), []).append(".".join(path))
    return names | {name: keys[0] for name, keys in short.items() if len(keys) == 1 and name not in names}


def load(
    file: Path | None = None, environ: Mapping[str, str] | None = None, options: Mapping[str, str] | None = None
) -> Config:
    """The configuration of `file` (none: $ALERTMEDIC_CONFIG, else defaults), overridden by `environ` (default: the
    process'), overridden by `options` of the command line (key -> text). Raises ConfigError with every fault, and for a
    file that cannot be read."""
    env = os.environ if environ is None else environ
    return load_document(*_opened(file, env), env, options)


def placed(
    found: Iterable[Fault],
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    options: Mapping[str, str] | None = None,
) -> tuple[Fault, ...]:
    """What others found wrong with values of the configuration that `load` made of the same: at the file and line of
    each key. Reads it again, which nobody does who finds nothing."""
    env = os.environ if environ is None else environ
    document, body = _opened(file, env)
    load_document(document, body, env, options)
    for fault in found:
        document.fault(fault.key, fault.what, fault.hint)
    return tuple(document.faults)


def _opened(file: Path | None, environ: Mapping[str, str]) -> tuple[Document, bytes]:
    if file is None and environ.get("ALERTMEDIC_CONFIG"):
        file = Path(environ["ALERTMEDIC_CONFIG"])
    if file is None:
        return Document(), b""
    try:
        return Document(str(file), file.absolute().parent), file.read_bytes()
    except (OSError, ValueError) as error:
        what = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError((Fault(str(file), 0, "", f"cannot read it: {what}", "check path and mode"),)) from error


def load_document(
    document: Document, body: bytes, environ: Mapping[str, str], options: Mapping[str, str] | None = None
) -> Config:
    """As `load`, of a text that is already there. Raises ConfigError."""
    document.read(body)
    _override(document, environ)
    for key, text in (options or {}).items():
        name = "--" + key.replace("_", "-")
        document.override(name, tuple(key.split(".")), text, literal=True, base=Path.cwd())
    config = document.build(Config)
    if config is not None:
        check(config, document)
        if not document.given("state_dir"):
            config = msgspec.structs.replace(config, state_dir=default_state_dir(environ))
    if config is None or document.faults:
        raise ConfigError(tuple(sorted(document.faults, key=lambda f: (f.file != document.name, f.file, f.line))))
    return config


def _override(document: Document, environ: Mapping[str, str]) -> None:
    known = environment_variables()
    literals = {".".join(path): literal for path, literal in variables(Config)}
    seen: dict[str, str] = {}
    for name in sorted(environ):
        if not name.startswith(_ENVIRONMENT_PREFIX) or name in _RESERVED or _SERVICE_LINK.match(name):
            continue
        key = known.get(name)
        if key is None:
            near = difflib.get_close_matches(name, list(known), 1, 0.6)
            hint = f"did you mean {near[0]}?" if near else "see docs/configuration.md for the names"
            document.faults.append(Fault(name, 0, "", "unknown variable", hint))
        elif key in seen:
            document.faults.append(Fault(name, 0, key, f"{seen[key]} sets the same key", "keep one of them"))
        else:
            seen[key] = name
            document.override(name, tuple(key.split(".")), environ[name], literal=literals[key], base=Path.cwd())
