"""`check-config`, `packs`, `actions`, `metrics`, `version`, usage errors, and what starting costs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cli_world import alertmedic, environment, process

BAD = """\
listen: nowhere
gaurd: {}
prometheus:
  url: gopher://x
  basic: {username: a}
auth:
  basic: [{name: am, password_file: secret.txt, tenants: ["[a"]}]
"""


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    (tmp_path / "secret.txt").write_text("hunter2\n")
    file = tmp_path / "bad.yaml"
    file.write_text(BAD)
    return file


def test_all_faults_are_listed_with_file_line_and_key(bad: Path) -> None:
    done = process("check-config", bad)
    assert done.code == 1
    lines = done.out.splitlines()
    assert [line.removeprefix(f"{bad}:").split(": ")[:2] for line in lines] == [
        ["1", "listen"],
        ["2", "gaurd"],
        ["4", "prometheus.url"],
        ["5", "prometheus.basic.password_file"],
        ["7", "auth.basic[0].tenants[0]"],
    ]


def test_the_same_as_json(bad: Path) -> None:
    done = alertmedic("check-config", bad, "--json")
    assert done.code == 1
    assert not done.json["ok"]
    assert [(f["line"], f["key"]) for f in done.json["faults"]][:2] == [(1, "listen"), (2, "gaurd")]
    assert all(f["what"] and f["hint"] for f in done.json["faults"])


def test_a_good_one_is_shown_without_its_secrets(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("hunter2\n")
    file = tmp_path / "good.yaml"
    file.write_text(
        "prometheus: {url: 'http://p:9090', bearer_token_file: secret.txt}\n"
        "auth: {basic: [{name: am, password_file: secret.txt}]}\n"
    )
    assert "in order" in alertmedic("check-config", file).out
    shown = alertmedic("check-config", file, "--show")
    assert shown.code == 0
    assert "hunter2" not in shown.out
    values = yaml.safe_load(shown.out)
    assert values["prometheus"]["bearer_token_file"] == str(tmp_path / "secret.txt")
    assert values["guard"]["min_posterior"] == 0.6
    as_json = alertmedic("check-config", file, "--show", "--json")
    assert "hunter2" not in as_json.out
    assert as_json.json["config"] == values
    again = tmp_path / "again.yaml"
    again.write_text(shown.out)
    assert alertmedic("check-config", again, "--show").out == shown.out, "what is shown is a configuration"


def test_faults_of_what_the_configuration_names_are_listed_too(tmp_path: Path) -> None:
    for name in ("packs", "actions"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.yaml").write_text("nonsense: 1\n")
    (tmp_path / "graph.yaml").write_text("edges: {a: [a]}\n")
    file = tmp_path / "c.yaml"
    file.write_text("packs: {dirs: [packs]}\nactions: {dirs: [actions]}\ntopology: {file: graph.yaml}\n")
    done = alertmedic("check-config", file, "--json")
    assert done.code == 1
    assert {"packs", "actions", str(tmp_path / "graph.yaml")} <= {f["file"] for f in done.json["faults"]}


def test_the_environment_and_options_are_checked() -> None:
    assert process("check-config").code == 0
    done = process("check-config", ALERTMEDIC_GUARD__MIN_POSTERIOR="7")
    assert done.code == 1
    assert "ALERTMEDIC_GUARD__MIN_POSTERIOR: guard.min_posterior: 7" in done.out
    refused = process("serve", "--listen", "nowhere")
    assert refused.code == 1
    assert "--listen: listen:" in refused.err
    assert process("check-config", "/no/such/file.yaml").code == 1
    assert process("incidents", "--config", "/no/such/file.yaml").code == 1


def test_packs() -> None:
    listed = alertmedic("packs", "list", "--json").json
    assert "postgres.blocking_session" in {c["cause"] for c in listed["causes"]}
    assert "postgres.blocking_session" in alertmedic("packs", "list").out
    assert alertmedic("packs", "lint").code == 0
    assert "log_flow" in alertmedic("packs", "show", "service.throws").out
    assert alertmedic("packs", "show", "postgres", "--json").json["pack"] == "postgres"
    assert alertmedic("packs", "show", "no.such").code == 1
    assert alertmedic("packs", "schema").json["title"] == "AlertMedic rule pack"


def test_packs_are_tested_on_golden_incidents(tmp_path: Path) -> None:
    done = alertmedic("packs", "test", "--json")
    assert done.code == 0
    assert done.json["ok"] is True
    assert all(g["passed"] for g in done.json["golden"])
    golden = Path(__file__).parents[2] / "rules" / "golden" / "onlineboutique-no-fault"
    shutil.copytree(golden, tmp_path / "golden" / "mine")
    (tmp_path / "golden" / "mine" / "expected.json").write_text('{"verdict": "ranked", "ranking": [{"service": "x"}]}')
    done = alertmedic("packs", "test", tmp_path)
    assert done.code == 1
    assert "failed  mine: expected ranked, got insufficient_evidence" in done.out


def test_faults_of_packs_and_actions(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("nonsense: 1\n")
    for group in ("packs", "actions"):
        done = alertmedic(group, "lint", tmp_path, "--json")
        assert done.code == 1
        assert done.json["faults"]
        assert alertmedic(group, "lint", tmp_path).code == 1
        assert alertmedic(group, "lint", tmp_path / "absent").code == 1


def test_actions_list_and_show() -> None:
    listed = alertmedic("actions", "list", "--json", ALERTMEDIC_INVENTORY="{db: {systemd_unit: db.service}}").json[
        "actions"
    ]
    (restart,) = [a for a in listed if a["name"] == "service.restart.systemd"]
    assert restart["services"] == ["db"]
    shown = alertmedic("actions", "show", "service.restart.systemd", "--json").json["actions"]
    assert shown[0]["name"] == "service.restart.systemd"
    variants = {a["name"] for a in alertmedic("actions", "show", "service.restart", "--json").json["actions"]}
    assert {"service.restart.supervisord", "service.restart.systemd", "service.restart.s6"} <= variants
    assert "systemd" in alertmedic("actions", "show", "service.restart.systemd").out
    assert alertmedic("actions", "show", "no.such").code == 1


def test_a_dry_run_prints_the_exact_argv_and_executes_nothing() -> None:
    inventory = "{db: {systemd_unit: alertmedic-test-absent.service}}"
    done = alertmedic(
        "actions", "dry-run", "service.restart", "--service", "db", "--json", ALERTMEDIC_INVENTORY=inventory
    )
    if done.code == 0:
        (step,) = done.json["steps"]
        assert "alertmedic-test-absent.service" in " ".join(step["argv"])
    else:  # the look-up of its identity failed, since there is no systemd or no such unit
        assert "nothing was executed" in done.err
    nowhere = alertmedic("actions", "dry-run", "service.restart", "--service", "unknown")
    assert nowhere.code == 1
    assert "no_inventory" in nowhere.err
    assert alertmedic("actions", "dry-run", "service.restart", "--service", "db", "--param", "x").code in (1, 2)
    mistyped = alertmedic(
        "actions", "dry-run", "service.restart", "--service", "db", "--param", "nam=x", ALERTMEDIC_INVENTORY=inventory
    )
    assert mistyped.code == 1
    assert "service.restart.systemd has no parameter nam; from a proposal it takes: none" in mistyped.err


def test_a_dry_run_of_an_action_without_look_up() -> None:
    inventory = '{orders: {flags_url: "http://127.0.0.1:1/flags"}}'
    done = alertmedic(
        "actions",
        "dry-run",
        "feature_flag.set",
        "--service",
        "orders",
        "--param",
        "flag=new_checkout",
        "--param",
        "value=off",
        ALERTMEDIC_INVENTORY=inventory,
    )
    text = done.out + done.err
    assert "nothing was executed" in text
    assert "new_checkout" in text or "feature_flag.set" in text


ACTION = """
actions:
  - name: test.try
    description: For a test.
    parameters: {word: {from: proposal, pattern: '[a-z$(); ]+'}}
    target: "word={word}"
    argv: ["{python}", "-m", no_such_module, "{word}"]
    dry_run: ["{python}", "-m", json.tool, "--help"]
    undo: none
    idempotent: true
    risk: {reversible: false, blast_radius: none, changes: runtime, auto: allowed}
"""


def test_an_action_of_your_own_is_tried_by_its_own_dry_run(tmp_path: Path) -> None:
    tmp_path.joinpath("a.yaml").write_text(ACTION)
    more = {"ALERTMEDIC_ACTIONS_DIRS": f"[{tmp_path}]", "ALERTMEDIC_INVENTORY": "{x: {}}"}
    base = ("actions", "dry-run", "test.try", "--service", "x", "--param", "word=a $(b); c")
    done = alertmedic(*base, **more)
    assert done.code == 0, done.err
    assert "no_such_module 'a $(b); c'" in done.out
    assert "says   usage:" in done.out
    shown = alertmedic(*base, "--json", **more).json
    assert shown["dry_run"][0].startswith("usage:")
    tmp_path.joinpath("a.yaml").write_text(ACTION.replace('json.tool, "--help"', "no_such_module"))
    failed = alertmedic(*base, **more)
    assert failed.code == 1
    assert "the dry run of test.try" in failed.err
    tmp_path.joinpath("a.yaml").write_text(ACTION + "    verify_query: 'sum(up{$scope'\n")
    lint = alertmedic("actions", "lint", str(tmp_path))
    assert lint.code != 0
    assert "verify_query" in lint.out
    assert alertmedic("actions", "schema").json["title"] == "AlertMedic actions"


def test_a_dry_run_tells_what_the_look_up_notes(tmp_path: Path) -> None:
    tmp_path.joinpath("targets.json").write_text(
        '[{"identity": "word=a", "note": "a server\\u001b[31m would take it"}]'
    )
    action = ACTION.replace(
        'target: "word={word}"', f'resolve: ["{{python}}", -m, json.tool, "{tmp_path}/targets.json"]'
    )
    tmp_path.joinpath("a.yaml").write_text(action)
    more = {"ALERTMEDIC_ACTIONS_DIRS": f"[{tmp_path}]", "ALERTMEDIC_INVENTORY": "{x: {}}"}
    base = ("actions", "dry-run", "test.try", "--service", "x", "--param", "word=a")
    done = alertmedic(*base, **more)
    assert done.code == 0, done.err
    told = "a server\N{REPLACEMENT CHARACTER}[31m would take it"
    assert f"  note   {told}\n" in done.out
    assert alertmedic(*base, "--json", **more).json["notes"] == [told]


def test_metrics_without_a_server_or_with_a_dead_one() -> None:
    assert alertmedic("metrics", "names").code == 2
    dead = alertmedic("metrics", "names", "--url", "http://127.0.0.1:1")
    assert dead.code == 3
    assert "127.0.0.1" in dead.err


def test_version_and_usage() -> None:
    assert process("version").out == process("--version").out
    assert process("version", "--json").json["version"]
    for wrong in (
        ["nonsense"],
        [],
        ["incidents", "--nonsense"],
        ["journal"],
        ["approve"],
        ["incidents", "--limit", "-1"],
    ):
        assert process(*wrong).code == 2, wrong
    assert process("incidents", "--js").code == 2, "an option is not guessed from its beginning"


def test_a_failed_start_is_a_message() -> None:
    done = process("serve", "--listen", "192.0.2.1:1", "--state-dir", "/proc/alertmedic")
    assert done.code == 1
    assert done.err.count("\n") <= 3
    assert "Traceback" not in done.err


def test_serving_imports_nothing_that_only_people_need() -> None:
    code = "import agent.cli, agent.app, sys, json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=120, check=True
    )
    loaded = {name.split(".")[0] for name in json.loads(done.stdout)}
    assert not loaded & {
        "rich",
        "pandas",
        "matplotlib",
        "prometheus_api_client",
        "requests",
        "asyncpg",
        "psycopg",
        "pgmpy",
    }
    assert "opentelemetry.exporter.otlp" not in json.loads(done.stdout)


def test_the_command_line_itself_imports_next_to_nothing() -> None:
    code = "import agent.cli, sys, json; agent.cli.parser(); print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=120, check=True
    )
    loaded = {name.split(".")[0] for name in json.loads(done.stdout)}
    assert not loaded & {"aiohttp", "numpy", "msgspec", "yaml", "rich", "opentelemetry", "prometheus_client"}


def test_programs_that_a_step_would_not_see_are_faults(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "actions:\n- {name: mine.look, version: 1, description: Looks., where: host, target: x, idempotent: true,\n"
        "   argv: [/usr/bin/python3, /tmp/a.py, /run/a], check: [/run/b/c], undo: none, read_only: true,\n"
        "   needs: {network: none, write: [/run/b]},\n"
        "   risk: {reversible: true, blast_radius: none, changes: nothing, auto: allowed}}\n"
    )
    done = alertmedic("actions", "lint", tmp_path)
    assert done.code == 1
    told = [line.split("does not see ")[1] for line in done.out.splitlines()]
    assert told == ["/tmp/a.py: put it elsewhere", "/run/a: put it elsewhere"]


def test_the_inventory_takes_what_the_actions_take(tmp_path: Path) -> None:
    """Every key of docs/actions.md and those of one's own actions; no typing errors, which `serve` refuses as well."""
    (tmp_path / "actions").mkdir()
    (tmp_path / "actions" / "mine.yaml").write_text(
        "actions:\n- {name: mine.look, version: 1, description: Looks., where: host, target: 'm={f}',\n"
        "   idempotent: true, argv: [/bin/cat, '{f}'],\n"
        "   parameters: {f: {from: inventory, key: mine_file, pattern: '/[a-z/]+'}}, undo: none, read_only: true,\n"
        "   risk: {reversible: true, blast_radius: none, changes: nothing, auto: allowed}}\n"
    )
    file = tmp_path / "a.yaml"
    text = (
        "actions: {dirs: [actions]}\ninventory:\n"
        "  cache: {redis_url: 'redis://127.0.0.1:6379/0', redis_maxclients_max: 5000}\n"
        "  shop: {mine_file: /run/shop, listen_port: 80}\n"
    )
    file.write_text(text)
    done = alertmedic("check-config", file)
    assert (done.code, done.out) == (0, f"{file}: in order\n")
    shown = alertmedic("check-config", "--show", file)
    assert "redis_maxclients_max: '5000'" in shown.out
    assert "more:" not in shown.out
    listed = json.loads(alertmedic("actions", "list", "--json", "--config", file).out)["actions"]
    assert {a["name"] for a in listed if "shop" in a["services"]} >= {"mine.look"}
    file.write_text(text + "  db: {Bad: z, pg_dsn: [1]}\n")
    told = {line.split(": ")[1] for line in alertmedic("check-config", file).out.splitlines()}
    assert told == {"inventory.db.Bad", "inventory.db.pg_dsn"}
    file.write_text(text + "  db: {redis_ulr: x}\n")
    for command in ("check-config",), ("serve", "--listen", "127.0.0.1:0", "--config"):
        refused = alertmedic(*command, file, "--state-dir", tmp_path / "state")
        assert refused.code == 1
        assert f"{file}:5: inventory.db.redis_ulr: no action takes this key" in refused.out + refused.err
        assert 'did you mean "redis_url"?' in refused.out + refused.err


def test_inventory_that_no_action_could_take_is_a_fault(tmp_path: Path) -> None:
    """Better now than when it is needed."""
    file = tmp_path / "a.yaml"
    file.write_text(
        "inventory:\n  db: {systemd_unit: postgresql}\n  web: {flags_url: 'http://[::1]:8080/flags'}\n"
        "  fine: {systemd_unit: fine.service, flags_url: 'http://127.0.0.1:8080/flags', listen_port: '80'}\n"
    )
    done = alertmedic("check-config", file)
    assert done.code == 1
    places = [tuple(line.split(": ")[:2]) for line in done.out.splitlines()]
    assert places == [(f"{file}:2", "inventory.db.systemd_unit"), (f"{file}:3", "inventory.web.flags_url")]
    assert "service.restart.systemd cannot take it" in done.out
