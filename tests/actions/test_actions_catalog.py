"""Definitions: the shipped ones, and one test per way of getting one wrong."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from actions_world import action_data, definition

import sandbox
from actions.catalog import Catalog, CatalogError, load_catalog, parse_action
from actions.model import Declined, Refusal
from sandbox.model import MIB, Limits

SHIPPED = {
    "alertmanager.silence",
    "cache.clear.http",
    "certificate.reload",
    "diagnostic.capture",
    "diagnostic.cpu_profile",
    "diagnostic.heap_profile",
    "diagnostic.log_capture",
    "disk.clean_by_age",
    "disk.free_logs",
    "disk.rotate_log",
    "dns.flush.dnsmasq",
    "dns.flush.unbound",
    "feature_flag.set",
    "haproxy.drain_server",
    "haproxy.raise_maxconn",
    "haproxy.reload",
    "http.call",
    "mysql.deadlock_report",
    "mysql.kill_blockers",
    "mysql.kill_idle_in_transaction",
    "mysql.kill_long_queries",
    "nginx.drain_upstream",
    "nginx.raise_backlog",
    "nginx.reload",
    "pgbouncer.resize_pool",
    "postgres.cancel_long_queries",
    "postgres.deadlock_report",
    "postgres.terminate_blockers",
    "postgres.terminate_idle_in_transaction",
    "process.terminate_group",
    "rabbitmq.replay_dead_letters",
    "redis.clear_prefix",
    "redis.kill_clients",
    "redis.raise_maxclients",
    "registry.drain_instance",
    "route.withdraw.bird",
    "route.withdraw.frr",
    "service.restart.s6",
    "service.restart.supervisord",
    "service.restart.systemd",
    "workers.scale",
    "workers.scale_down",
    "kubernetes.rollout_restart",
    "service.restart.kubernetes",
    "kubernetes.rollout_undo",
    "kubernetes.scale",
    "kubernetes.set_resources",
    "kubernetes.hpa_bounds",
    "kubernetes.suspend_cronjob",
    "kubernetes.set_config",
    "kubernetes.annotate",
    "kubernetes.cordon",
    "kubernetes.uncordon",
    "kubernetes.drain",
    "kubernetes.evict_pod",
    "kubernetes.capture",
    "kubernetes.diagnose",
}


def test_the_shipped_catalogue_is_what_packs_may_propose() -> None:
    catalog = load_catalog()
    assert {d.name for d in catalog} == SHIPPED
    assert [d.name for d in catalog.variants("service.restart")] == [
        "service.restart.kubernetes",
        "service.restart.supervisord",
        "service.restart.systemd",
        "service.restart.s6",
    ]
    for d in catalog:
        assert d.description.endswith(".")
        assert d.limits.timeout_seconds <= 120
        assert d.limits.memory_bytes <= 128 * MIB
        assert d.limits.pids <= 10


def test_what_cannot_be_undone_and_lasts_is_never_automatic() -> None:
    for d in load_catalog():
        if d.risk.changes == "persistent" and not d.undo:
            assert d.risk.auto == "never", d.name


def test_the_first_variant_with_a_complete_inventory_is_taken() -> None:
    catalog = load_catalog()

    def choose(entry: dict[str, str] | None) -> str:
        chosen = catalog.choose("service.restart", entry)
        return str(chosen.reason) if isinstance(chosen, Declined) else chosen.name

    both = {"supervisord_url": "unix:///s", "supervisord_program": "w", "systemd_unit": "w.service"}
    assert choose(both) == "service.restart.supervisord"
    assert choose({"supervisord_url": "unix:///s", "systemd_unit": "w.service"}) == "service.restart.systemd"
    assert choose({"supervisord_url": "unix:///s"}) == "no_inventory"
    assert choose({}) == "no_inventory"
    assert choose(None) == "no_inventory"
    lacking = catalog.choose("service.restart", {"supervisord_url": "unix:///s"})
    assert isinstance(lacking, Declined)
    assert "supervisord_program" in lacking.detail
    assert "systemd_unit" in lacking.detail
    unknown = catalog.choose("service.explode", {})
    assert isinstance(unknown, Declined)
    assert unknown.reason is Refusal.UNKNOWN_ACTION


def test_limits_have_units() -> None:
    limits = definition(
        limits={"memory": "64MiB", "cpu_percent": 50, "pids": 4, "timeout_seconds": 3, "output": "8KiB", "swap": 0}
    ).limits
    assert limits == Limits(
        memory_bytes=64 * MIB, cpu_quota_us=50_000, pids=4, timeout_seconds=3.0, output_bytes=8192, swap_bytes=0
    )


PARAMETER: dict[str, Any] = {"service": {"from": "plan", "pattern": ".+"}}
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("no name", {"name": ...}, "name: is absent"),
    ("name with a space", {"name": "a b"}, 'name: "a b" does not match'),
    ("name of a wrong type", {"name": 7}, "name: expected text, not int"),
    ("unknown key", {"sudo": True}, "sudo: is no key"),
    ("no description", {"description": ...}, "description: is absent"),
    ("version zero", {"version": 0}, "version: 0 is not within"),
    ("version true", {"version": True}, "version: expected a whole number, not bool"),
    ("where", {"where": "cloud"}, 'where: "cloud" is none of host, network'),
    ("no argv", {"argv": ...}, "argv: is absent"),
    ("empty argv", {"argv": []}, "argv: is empty"),
    ("argv as one text", {"argv": "rm -rf /"}, "argv: expected a list of texts, not str"),
    ("argv with a number", {"argv": ["/bin/sleep", 5]}, "argv: every element must be a text"),
    ("argv with an empty element", {"argv": ["/bin/true", ""]}, "argv: every element must be a text"),
    ("shell", {"argv": ["/bin/sh", "-c", "true", "{service}"]}, "argv[0]: /bin/sh would parse"),
    ("shell by env", {"argv": ["/usr/bin/env", "bash", "{service}"]}, "argv[0]: /usr/bin/env would parse"),
    ("python -c", {"argv": ["{python}", "-Ic", "print(1)", "{service}"]}, "argv: python -c evaluates"),
    ("named python -c", {"argv": ["/usr/bin/python3.11", "-I", "-c", "1", "{service}"]}, "argv: python -c evaluates"),
    ("a shell elsewhere", {"argv": ["ssh", "db7", "{service}"]}, "argv[0]: ssh would parse"),
    ("program from a parameter", {"argv": ["{service}"]}, "argv[0]: the program may not come"),
    ("undeclared placeholder", {"argv": ["/bin/true", "{host}", "{service}"]}, "argv: {host} is no parameter"),
    ("undeclared in check", {"check": ["/bin/true", "{host}"]}, "check: {host} is no parameter"),
    ("undeclared in undo", {"undo": ["/bin/true", "{host}"]}, "undo: {host} is no parameter"),
    ("format language", {"argv": ["/bin/true", "{service!r}"]}, "argv[1]: a brace that belongs to no"),
    ("attribute", {"argv": ["/bin/true", "{service.__class__}"]}, "argv[1]: a brace that belongs to no"),
    ("lonely brace", {"argv": ["/bin/true", "{service} }"]}, "argv[1]: a brace that belongs to no"),
    ("no undo", {"undo": ...}, "undo: is absent"),
    ("empty undo", {"undo": []}, "undo: is empty: write `undo: none`"),
    ("undo nothing", {"undo": "nothing"}, "undo: expected a list of texts"),
    ("no idempotent", {"idempotent": ...}, "idempotent: is absent"),
    ("idempotent maybe", {"idempotent": "maybe"}, "idempotent: expected true or false"),
    ("no check", {"check": ...}, "check: is absent: after a crash"),
    ("no risk", {"risk": ...}, "risk: is absent"),
    (
        "risk without auto",
        {"risk": {"reversible": False, "blast_radius": "service", "changes": "runtime"}},
        "risk.auto: is absent",
    ),
    (
        "risk with an unknown key",
        {"risk": {"reversible": False, "blast_radius": "service", "changes": "runtime", "auto": "never", "fun": 1}},
        "risk.fun: is no key",
    ),
    (
        "lasting change, no undo, automatic",
        {"risk": {"reversible": False, "blast_radius": "service", "changes": "persistent", "auto": "allowed"}},
        "risk.auto: it changes what lasts",
    ),
    (
        "reversible without undo",
        {"risk": {"reversible": True, "blast_radius": "service", "changes": "runtime", "auto": "allowed"}},
        "risk.reversible: is true, but undo is none",
    ),
    ("read-only that changes", {"read_only": True}, "read_only: a read-only action changes nothing"),
    ("limit of a wrong kind", {"limits": {"memory": "lots"}}, 'limits.memory: "lots" is no size'),
    ("limit too small", {"limits": {"memory": "1B"}}, "limits.memory: 1 bytes is not within"),
    ("unknown limit", {"limits": {"disk": 1}}, "limits.disk: is no key"),
    ("no time limit", {"limits": {"timeout_seconds": 0}}, "limits.timeout_seconds: 0 is not within"),
    ("endless time", {"limits": {"timeout_seconds": float("nan")}}, "limits.timeout_seconds: nan is not within"),
    ("secret with a value", {"environment": [{"name": "T", "value": "x"}]}, "environment[0].value: is no key"),
    ("secret in lower case", {"environment": [{"name": "token"}]}, 'environment[0].name: "token" does not match'),
    ("user root;", {"user": "root;"}, 'user: "root;" does not match'),
    ("verify", {"verify": "never"}, 'verify: "never" is none of each, last'),
    ("parameters as a list", {"parameters": ["service"]}, "parameters: expected a mapping"),
    ("parameter without origin", {"parameters": {"service": {"pattern": ".+"}}}, "parameters.service.from: is absent"),
    (
        "parameter from nowhere",
        {"parameters": {"service": {"from": "labels", "pattern": ".+"}}},
        'parameters.service.from: "labels" is none of',
    ),
    ("text without pattern", {"parameters": {"service": {"from": "plan"}}}, "parameters.service.pattern: is absent"),
    (
        "pattern that is none",
        {"parameters": {"service": {"from": "plan", "pattern": "("}}},
        "parameters.service.pattern: no regular expression",
    ),
    (
        "number with a pattern",
        {
            "parameters": PARAMETER | {"n": {"from": "plan", "type": "int", "pattern": "1"}},
            "argv": ["/bin/true", "{n}{service}"],
        },
        "parameters.n.pattern: a int has no pattern",
    ),
    (
        "default against its own pattern",
        {"parameters": {"service": {"from": "plan", "pattern": "a+", "default": "b"}}},
        "parameters.service.default: service: 'b' does not match",
    ),
    (
        "unused parameter",
        {"parameters": PARAMETER | {"x": {"from": "plan", "pattern": "."}}},
        "parameters.x: is used nowhere",
    ),
    (
        "reserved parameter",
        {"parameters": PARAMETER | {"python": {"from": "plan", "pattern": "."}}},
        "parameters.python: not a possible",
    ),
    ("no target", {"target": ...}, "target: exactly one of"),
    ("target and resolve", {"resolve": ["/bin/true"]}, "target: exactly one of"),
    (
        "target parameter without resolve",
        {
            "parameters": PARAMETER | {"pid": {"from": "target", "type": "int"}},
            "argv": ["/bin/true", "{pid}", "{service}"],
        },
        "resolve: is absent, but a parameter comes from the target",
    ),
    (
        "target parameter before the target is known",
        {
            "parameters": PARAMETER | {"pid": {"from": "target", "type": "int"}},
            "target": ...,
            "resolve": ["/bin/true", "{pid}"],
        },
        "resolve: {pid} is known only when the target has been resolved",
    ),
    (
        "automatic on something else than the cause",
        {
            "risk": {
                "reversible": False,
                "blast_radius": "service",
                "changes": "runtime",
                "acts_on": "other",
                "auto": "allowed",
            }
        },
        "risk.auto: it acts on something else than the cause",
    ),
    ("dry run of a wrong kind", {"dry_run": "nothing"}, "dry_run: expected a list of texts"),
    ("empty dry run", {"dry_run": []}, "dry_run: is empty"),
    ("undeclared in the dry run", {"dry_run": ["/bin/true", "{host}"]}, "dry_run: {host} is no parameter"),
    ("query for everything", {"verify_query": "up == 1"}, "verify_query: lacks $scope"),
    ("query with a variable of its own", {"verify_query": "up{$scope} == $x"}, "verify_query: $x is none of"),
    ("empty name", {"name": ""}, 'name: "" does not match'),
    ("precondition without words", {"preconditions": [{"argv": ["/bin/true"]}]}, "preconditions[0].text: is absent"),
]


@pytest.mark.parametrize(("change", "fault"), [pytest.param(c, f, id=n) for n, c, f in WRONG])
def test_a_fault_is_named_with_its_key(change: dict[str, Any], fault: str) -> None:
    with pytest.raises(CatalogError) as caught:
        parse_action(action_data(**change), "here")
    assert any(f.startswith(f"here.{fault}") for f in caught.value.faults), caught.value.faults


def test_all_faults_are_reported_at_once() -> None:
    with pytest.raises(CatalogError) as caught:
        parse_action(action_data(name=1, argv=[], limits={"x": 1}, risk={}), "here")
    keys = {re.split(r"[ :]", f)[0] for f in caught.value.faults}
    assert {"here.name", "here.argv", "here.limits.x", "here.risk.auto", "here.risk.changes"} <= keys


@pytest.mark.parametrize("data", [None, [], "x", 7, {1: 2}])
def test_what_is_no_mapping_is_no_action(data: object) -> None:
    with pytest.raises(CatalogError, match="expected a mapping"):
        parse_action(data, "here")


def write(directory: Path, name: str, *actions: dict[str, Any]) -> None:
    directory.joinpath(name).write_text(yaml.safe_dump({"actions": list(actions)}))


def test_own_directories_add_and_replace(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", action_data(), action_data(name="workers.scale", description="Ours."))
    catalog = load_catalog([tmp_path])
    assert len(catalog) == len(SHIPPED) + 1
    replaced = catalog.get("workers.scale")
    assert replaced is not None
    assert replaced.description == "Ours."
    assert catalog.get("test.restart") is not None


def test_actions_can_be_disabled_by_glob() -> None:
    names = {d.name for d in load_catalog(disable=["postgres.*", "disk.free_logs"])}
    assert names == {n for n in SHIPPED if not n.startswith("postgres.") and n != "disk.free_logs"}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("actions: [", "no valid YAML"),
        ("a: 1", "expected one key, `actions`"),
        ("actions: 7", "expected one key, `actions`"),
        ("actions:\n  - name: x\n    name: y\n", 'the key "name" is there twice'),
        ("actions: !!python/object/apply:os.system ['true']", "no valid YAML"),
        ("- 1", "expected one key, `actions`"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, text: str, fault: str) -> None:
    tmp_path.joinpath("bad.yaml").write_text(text)
    with pytest.raises(CatalogError) as caught:
        load_catalog([tmp_path])
    assert fault in caught.value.faults[0]
    assert "bad.yaml" in caught.value.faults[0]


def test_faults_of_all_files_are_reported(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", action_data(undo=[]))
    write(tmp_path, "b.yaml", action_data(name="x.y", argv=[]))
    write(tmp_path, "c.yaml", action_data(name="z.z"), action_data(name="z.z"), action_data(name="service.restart"))
    tmp_path.joinpath("d.yaml").write_bytes(b"\xff")
    with pytest.raises(CatalogError) as caught:
        load_catalog([tmp_path, tmp_path / "absent"])
    text = str(caught.value)
    for part in (
        "a.yaml: actions[0].undo",
        "b.yaml: actions[0].argv",
        "z.z is defined in",
        "d.yaml",
        "no such directory",
    ):
        assert part in text
    assert "service.restart is the name of a family" in text


def test_a_catalogue_knows_its_actions_by_name() -> None:
    catalog = Catalog([definition()])
    assert catalog.get("test.restart") == definition()
    assert catalog.get("test") is None
    assert not isinstance(catalog.choose("test.restart", {}), Declined)


NEEDY = {
    "name": "some.thing",
    "description": "x",
    "parameters": {},
    "target": "it",
    "argv": ["true"],
    "undo": "none",
    "idempotent": True,
    "risk": {"reversible": False, "blast_radius": "none", "changes": "nothing", "auto": "never"},
}


def test_what_a_program_needs_and_how_its_secrets_come() -> None:
    declared = {"network": "none", "processes": "own", "write": ["/var/log"], "isolation": "required"}
    secrets = [{"name": "TOKEN", "by": "descriptor"}, {"name": "PLAIN"}]
    action = parse_action({**NEEDY, "needs": declared, "environment": secrets}, "here")
    assert action.needs.restricted
    assert (action.needs.network, action.needs.write) == ("none", ("/var/log",))
    assert [s.by for s in action.environment] == ["descriptor", "environment"]
    assert not parse_action(NEEDY, "here").needs.restricted, "nothing declared: everything may be needed"


@pytest.mark.parametrize(
    ("needs", "words"),
    [
        ({"network": "some"}, "needs.network"),
        ({"write": ["relative"]}, "needs.write"),
        ({"write": ["/a/../b"]}, "needs.write"),
        ({"isolation": "required"}, "leave nothing to isolate"),
        ({"netwrok": "none"}, "needs.netwrok"),
    ],
)
def test_needs_that_make_no_sense(needs: dict[str, object], words: str) -> None:
    with pytest.raises(CatalogError, match=words):
        parse_action({**NEEDY, "needs": needs}, "here")


PLACES = {"PGPASSFILE", "SUPERVISORD_USERNAME"}  # where a secret is, or whose it is: no secrets themselves


def test_shipped_secrets_come_by_descriptor_to_programs_that_know() -> None:
    for action in load_catalog():
        for secret in action.environment:
            assert (secret.by == "descriptor") == (secret.name not in PLACES), (action.name, secret)
            for argv in (action.argv, action.check, action.undo, action.resolve, action.dry_run):
                assert not argv or (argv[0] == "{python}" and "actions.builtin" in " ".join(argv)), (action.name, argv)


@pytest.mark.parametrize("by", ["descriptor", "environment"])
async def test_a_shipped_program_reads_its_secret(by: str) -> None:
    script = "import os; from actions.builtin import secret; print(secret('TOKEN') == 'a b', 'a b' in str(os.environ))"
    given: dict[str, Any] = {"secrets": {"TOKEN": "a b"}} if by == "descriptor" else {"env": {"TOKEN": "a b"}}
    result = await sandbox.run([sys.executable, "-I", "-c", script], Limits(timeout_seconds=60), **given)
    assert result.stdout.split() == ["True", str(by == "environment")], result
