"""A bad file per mistake, faults together, the environment, and laws that hold for any text at all."""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path

import msgspec
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from schema_walk import keys

from actions.policy import GuardPolicy
from agent.config import (
    Config,
    ConfigError,
    Fault,
    Guard,
    default_state_dir,
    environment_variables,
    load,
    load_document,
)
from agent.strict import MAX_BYTES, Document

DATA = Path(__file__).parent / "data"
BAD = sorted(DATA.glob("*.yaml"))


def faults_of(file: Path, environ: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        load(file, environ or {})
    return [str(f) for f in raised.value.faults]


def attempt(body: bytes, environ: dict[str, str] | None = None) -> Config | tuple[Fault, ...]:
    """The configuration, or its faults; anything else that is raised is a failure of the test."""
    try:
        return parse(body, environ)
    except ConfigError as error:
        return error.faults


def parse(text: str | bytes, environ: dict[str, str] | None = None) -> Config:
    body = text.encode() if isinstance(text, str) else text
    return load_document(Document("alertmedic.yaml", DATA), body, environ or {})


@pytest.mark.parametrize("file", BAD, ids=lambda f: f.stem)
def test_each_mistake_is_reported_at_its_line(file: Path) -> None:
    head = file.read_bytes().split(b"\n")[0].decode()
    where, _, text = head.removeprefix("# expect: ").partition(" | ")
    line, key = where.split(" ")
    with pytest.raises(ConfigError) as raised:
        load(file, {})
    (fault,) = raised.value.faults
    assert (fault.file, fault.line, fault.key) == (str(file), int(line), "" if key == "-" else key)
    assert text in str(fault)
    assert "hunter2" not in str(raised.value)


def test_every_fault_of_a_file_is_listed_in_order(tmp_path: Path) -> None:
    file = tmp_path / "alertmedic.yaml"
    file.write_text(
        "listen: nowhere\nguard: {min_posterior: 2, nonsense: 1}\nprometheus:\n  url: gopher://x\n"
        "  step_seconds: fast\nauth:\n  basic:\n    - {name: am, password_file: absent}\nlog: {level: loud}\n"
    )
    found = faults_of(file, {"ALERTMEDIC_LOG__FORMAT": "xml", "ALERTMEDIC_NO_SUCH": "1"})
    places = [f.split(": ")[0].removeprefix(str(file)) for f in found]
    assert places == [":1", ":2", ":2", ":4", ":5", ":8", ":9", "ALERTMEDIC_LOG__FORMAT", "ALERTMEDIC_NO_SUCH"]


def test_cross_checks_are_listed_together_too() -> None:
    with pytest.raises(ConfigError) as raised:
        parse("verify: {deadline_seconds: 5, poll_seconds: 9}\nsandbox: {parent: x}\nservice_labels: []\n")
    assert [f.key for f in raised.value.faults] == ["verify.poll_seconds", "sandbox.parent", "service_labels"]


def test_without_a_file_everything_has_a_careful_default(tmp_path: Path) -> None:
    config = load(environ={"HOME": str(tmp_path)})
    assert config == msgspec.structs.replace(Config(), state_dir=tmp_path / ".local/state/alertmedic")
    assert (config.listen_host, config.listen_port) == ("127.0.0.1", 9095)
    assert config.autonomy.default == "suggest"
    assert not config.sandbox.allow_unenforced_auto
    assert config.prometheus.rate_window_seconds == 120.0


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "---\n", "null\n", "guard:\nlog: {}\ninventory:\npacks: {dirs: }\n"]
)
def test_empty_files_and_sections_are_defaults(text: str) -> None:
    assert parse(text) == parse("{}")


def test_a_full_file_is_taken_as_written() -> None:
    config = parse(
        """
listen: "[::1]:9095"
state_dir: state
environment: production
service_labels: [service, app]
auth:
  bearer: [{name: am, token_file: secret.txt, tenants: ["team-*"], scopes: [webhook]}]
intake: {max_body_bytes: 2 MiB}
prometheus:
  url: https://prometheus.example:9090/prefix
  rate_seconds: 45
  basic: {username: am, password_file: secret.txt}
  tls: {server_name: other}
  tenant_header: X-Scope-OrgID
  parameters: {nocache: 1}
topology:
  edges: {front: [orders, node-1], orders: [node-1]}
  kinds: {front: http, orders: http, node-1: host}
inventory:
  orders: {listen_port: 9101, host: no}
autonomy:
  default: observe
  rules:
    - {action: "service.restart*", service: worker, autonomy: auto}
    - {alert: "*Slow", autonomy: approve}
guard:
  min_posterior: 8.5e-1
  maintenance:
    - {name: nightly, days: [sat, sun], from_time: "22:00", to_time: "02:00"}
    - {start: "2026-01-01T00:00:00Z", end: "2026-01-01T06:00:00+01:00"}
sandbox: {allow_unenforced_auto: true}
"""
    )
    assert (config.listen_host, config.listen_port) == ("::1", 9095)
    assert config.state_dir == DATA / "state"
    (token,) = config.auth.bearer
    assert (token.token_file.value, token.tenants, token.scopes) == ("hunter2", ("team-*",), ("webhook",))
    assert config.intake.max_body_bytes == 2 * 2**20
    assert config.prometheus.rate_window_seconds == 45.0
    assert config.prometheus.parameters == {"nocache": "1"}
    assert config.topology.edge_pairs == (("front", "orders"), ("front", "node-1"), ("orders", "node-1"))
    assert config.inventory_strings == {"orders": {"listen_port": "9101", "host": "no"}}
    policy = config.guard_policy
    assert [r.autonomy for r in policy.autonomy.rules] == ["auto", "approve"]
    assert policy.min_posterior == 0.85
    assert policy.allow_unenforced_auto
    assert [w.name for w in policy.maintenance] == ["nightly", ""]


def test_the_guard_section_is_the_guards_policy() -> None:
    """No limit of the guard may be out of the configuration's reach, and no default may differ."""
    apart = {"autonomy", "protection", "allow_unenforced_auto", "breaker"}
    assert set(Guard.__struct_fields__) | apart == set(GuardPolicy.__struct_fields__)
    ours, theirs = msgspec.to_builtins(Config().guard_policy), msgspec.to_builtins(GuardPolicy())
    assert ours == theirs


def test_a_secret_is_never_printed(tmp_path: Path) -> None:
    config = parse('prometheus: {url: "http://p:1", bearer_token_file: secret.txt}\n')
    secret = config.prometheus.bearer_token_file
    assert secret is not None
    assert secret.value == "hunter2"
    for shown in (repr(config), str(config), f"{secret}", repr(secret), str([secret])):
        assert "hunter2" not in shown
    for write in (msgspec.json.encode, msgspec.to_builtins, pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError):
            write(secret)


def test_a_rotated_secret_is_picked_up_and_a_vanished_one_is_remembered(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("one\n")
    config = parse(f'prometheus: {{url: "http://p:1", bearer_token_file: {file}}}\n')
    secret = config.prometheus.bearer_token_file
    assert secret is not None
    file.write_text("two\n")
    assert secret.current() == "two"
    file.unlink()
    assert secret.current() == "one"


def test_a_fifo_as_secret_is_a_fault_and_no_wait(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(ConfigError, match="no regular file"):
        parse(f'prometheus: {{url: "http://p:1", bearer_token_file: {fifo}}}\n')


def test_files_that_cannot_be_read_are_a_fault(tmp_path: Path) -> None:
    assert "cannot read it" in faults_of(tmp_path / "absent.yaml")[0]
    assert "cannot read it" in faults_of(tmp_path)[0]
    with pytest.raises(ConfigError, match="at most"):
        parse(b"#" * (MAX_BYTES + 1))


def test_state_dir_follows_xdg_and_home() -> None:
    assert default_state_dir({"XDG_STATE_HOME": "/x", "HOME": "/h"}) == Path("/x/alertmedic")
    assert default_state_dir({"XDG_STATE_HOME": "relative", "HOME": "/h"}) == Path("/h/.local/state/alertmedic")
    assert load(environ={"ALERTMEDIC_STATE_DIR": "/s", "HOME": "/h"}).state_dir == Path("/s")
    assert parse("state_dir: /f\n", {"HOME": "/h"}).state_dir == Path("/f")


def test_the_environment_overrides_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("listen: 127.0.0.1:1\nprometheus:\n  url: http://file:9090\n  timeout_seconds: 3\n")
    config = load(
        environ={
            "ALERTMEDIC_CONFIG": str(file),
            "ALERTMEDIC_LISTEN": "127.0.0.1:2",
            "ALERTMEDIC_PROMETHEUS_URL": "http://env:9090",
            "ALERTMEDIC_GUARD__STORM__INCIDENTS": "7",
            "ALERTMEDIC_SERVICE_LABELS": "a, b",
            "ALERTMEDIC_PACKS__DISABLE": "[x.*, y]",
            "ALERTMEDIC_INVENTORY": "{orders: {listen_port: 9101}}",
            "ALERTMEDIC_TOPOLOGY__EDGES": "{front: [orders]}",
            "ALERTMEDIC_SANDBOX_ALLOW_UNENFORCED_AUTO": "true",
            "ALERTMEDIC_ENVIRONMENT": "[prod]",
            "ALERTMEDIC_PROMETHEUS__BASIC__USERNAME": "u",
            "ALERTMEDIC_PROMETHEUS__BASIC__PASSWORD_FILE": str(DATA / "secret.txt"),
        }
    )
    assert config.listen == "127.0.0.1:2"
    assert (config.prometheus.url, config.prometheus.timeout_seconds) == ("http://env:9090", 3.0)
    assert config.guard.storm.incidents == 7
    assert config.service_labels == ("a", "b")
    assert config.packs.disable == ("x.*", "y")
    assert config.inventory_strings == {"orders": {"listen_port": "9101"}}
    assert config.topology.edge_pairs == (("front", "orders"),)
    assert config.sandbox.allow_unenforced_auto
    assert config.environment == "[prod]"
    assert config.prometheus.basic is not None
    assert config.prometheus.basic.password_file.value == "hunter2"


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("ALERTMEDIC_LISTN", "x", "did you mean ALERTMEDIC_LISTEN?"),
        ("ALERTMEDIC_VERIFY__SAMPLES", "many", "verify.samples"),
        ("ALERTMEDIC_PACKS__DISABLE", "[x", "not YAML"),
        ("ALERTMEDIC_INVENTORY", "orders", "where a mapping is expected"),
        ("ALERTMEDIC_INVENTORY", "{orders: {Port: 1}}", "inventory.orders.Port"),
        ("ALERTMEDIC_PACKS__DIRS", "/no/such/dir", "no directory"),
        ("ALERTMEDIC_PROMETHEUS__URL", "", ""),
    ],
)
def test_faults_of_the_environment_name_the_variable(name: str, value: str, text: str) -> None:
    if not text:
        assert load(environ={name: value, "HOME": "/h"}).prometheus.url == ""
        return
    with pytest.raises(ConfigError) as raised:
        load(environ={name: value})
    (fault,) = raised.value.faults
    assert fault.file == name
    assert text in str(fault)


def test_one_key_set_twice_by_the_environment_is_a_fault() -> None:
    with pytest.raises(ConfigError, match="sets the same key"):
        load(environ={"ALERTMEDIC_LOG_LEVEL": "info", "ALERTMEDIC_LOG__LEVEL": "info"})


def test_variables_of_kubernetes_and_of_tests_are_no_configuration() -> None:
    load(
        environ={
            "ALERTMEDIC_SERVICE_HOST": "10.0.0.1",
            "ALERTMEDIC_SERVICE_PORT": "9095",
            "ALERTMEDIC_SERVICE_PORT_HTTP": "9095",
            "ALERTMEDIC_PORT": "tcp://10.0.0.1:9095",
            "ALERTMEDIC_PORT_9095_TCP_ADDR": "10.0.0.1",
            "ALERTMEDIC_FAILPOINT": "wal_before_sync",
            "OTHER": "x",
        }
    )


def test_every_scalar_key_has_a_variable() -> None:
    named = set(environment_variables().values())
    for key, _ in keys():
        outer = key.split("[]")[0].split(".NAME")[0]
        assert outer in named or key in {"prometheus.basic", "alertmanager.basic", "gateway.candidate"}, key


NAMES = st.sampled_from(sorted({p for key, _ in keys() for p in key.replace("[]", "").split(".")})) | st.text(
    max_size=6
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12), st.dates(), st.binary(max_size=4)
)
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4), max_leaves=20
)


class TestLaws:
    """Of any document."""

    def check(self, body: bytes) -> None:
        result = attempt(body)
        if isinstance(result, tuple):
            assert result
            for fault in result:
                assert str(fault).isprintable()
                assert 0 <= fault.line <= body.count(b"\n") + body.count(b"\r") + 2
            return
        known = {key.split("[]")[0].split(".")[0] for key, _ in keys()}
        loaded = yaml.safe_load(body) if body.strip() else None
        assert loaded is None or set(loaded) <= known

    @settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.binary(max_size=300))
    @example(b"[" * 50_000)
    @example(b"{a: " * 50_000)
    @example(b"- " * 50_000)
    @example(b"? " * 20_000)
    @example(b"&a [*a]")
    @example(b"a: &a [x]\nb: *a\n")
    @example(b"a: 1\n---\nb: 2\n")
    @example(b"%YAML 1.1\n---\n")
    @example(b"%TAG ! tag:x,2000:\n--- !y {}\n")
    @example(b"\xef\xbb\xbflisten: 127.0.0.1:1\n")
    @example("listen: 127.0.0.1:1\n".encode("utf-16"))
    def test_any_bytes(self, body: bytes) -> None:
        self.check(body)

    @settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(TREES)
    def test_any_tree_of_known_and_unknown_names(self, tree: object) -> None:
        self.check(yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass"))

    @settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.sampled_from([k for k, _ in keys() if "[]" not in k and "NAME" not in k]), SCALARS)
    def test_one_known_key_with_any_value_is_taken_or_reported_at_its_line(self, key: str, value: object) -> None:
        tree: object = value
        for name in reversed(key.split(".")):
            tree = {name: tree}
        body = yaml.safe_dump(tree, default_flow_style=False).encode("utf-8", "surrogatepass")
        result = attempt(body)
        if isinstance(result, tuple):
            for fault in result:
                assert fault.line >= 1
                assert fault.key == "" or fault.key.split(".")[0].split("[")[0] in {key.split(".")[0], "prometheus"}

    @settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.dictionaries(st.sampled_from(sorted(environment_variables())), st.text(max_size=20), max_size=4))
    def test_any_environment(self, environ: dict[str, str]) -> None:
        result = attempt(b"", environ)
        if isinstance(result, tuple):
            assert all(fault.file in environ for fault in result)

    @settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.text(min_size=1, max_size=10))
    def test_an_unknown_key_is_never_loaded(self, name: str) -> None:
        body = yaml.safe_dump({"guard": {name: 1}}).encode("utf-8", "surrogatepass")
        if name in Guard.__struct_fields__:
            return
        with pytest.raises(ConfigError):
            parse(body)


def test_a_secret_file_is_not_held_open() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        parse('prometheus: {url: "http://p:1", bearer_token_file: secret.txt}\n')
        with pytest.raises(ConfigError):
            parse('prometheus: {url: "http://p:1", bearer_token_file: .}\n')
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1


def test_the_secret_of_the_shipped_actions_is_no_unknown_key() -> None:
    """It begins like a key; the service would not start beside it."""
    assert load(None, {"ALERTMEDIC_HTTP_TOKEN": "t"}) == load(None, {})
