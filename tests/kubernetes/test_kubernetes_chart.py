"""The chart: lint, golden files, schemas of Kubernetes, pod security, RBAC, and what its schema refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import promql_parser
import pytest
import yaml
from chart import CHART, ROOT, SETS, helm, helms, kinds, objects, rendered, run, template, values_of

from actions.catalog import load_catalog
from agent import config
from agent.telemetry import Telemetry

GOLDEN = Path(__file__).parent / "golden"
ALL = ["default", *SETS]
CUSTOM = {"ServiceMonitor", "PrometheusRule", "AlertmanagerConfig", "HTTPRoute"}
VERSIONS = ("1.28", "1.34")
READ = {"get", "list", "watch"}

# What each action may add in a namespace: group -> resource -> verbs. Independent of the chart, to be compared with it.
WORKLOADS = {"deployments": {"get", "patch"}, "statefulsets": {"get", "patch"}, "daemonsets": {"get", "patch"}}
CHANGE = {"": {"pods": {"get"}}, "apps": {"replicasets": {"get"}, **WORKLOADS}}
UNDO = {
    "": {"pods": {"get"}},
    "apps": {"replicasets": {"get", "list"}, "controllerrevisions": {"get", "list"}, **WORKLOADS},
}
NODE = {"": {"nodes": {"get", "patch"}}}
GRANTS: dict[str, dict[str, dict[str, set[str]]]] = {
    "rolloutRestart": CHANGE,
    "rolloutUndo": UNDO,
    "scale": CHANGE,
    "setResources": CHANGE,
    "annotate": CHANGE,
    "evictPod": {"": {"pods": {"get"}, "pods/eviction": {"create"}}},
    "hpaBounds": {"autoscaling": {"horizontalpodautoscalers": {"get", "patch"}}},
    "suspendCronjob": {"batch": {"cronjobs": {"get", "patch"}}},
    "setConfig": {"": {"configmaps": {"get", "patch"}}},
    "capture": {"": {"pods": {"get"}, "pods/log": {"get"}, "events": {"list"}}},
    "diagnose": {"": {"pods": {"get"}, "pods/exec": {"get", "create"}}},
    "cordon": NODE,
    "drain": {"": {"nodes": {"get", "patch"}, "pods": {"get", "list"}, "pods/eviction": {"create"}}},
}


def granted(roles: list[dict[str, Any]]) -> dict[str, dict[str, set[str]]]:
    found: dict[str, dict[str, set[str]]] = {}
    for role in roles:
        for rule in role["rules"]:
            for group in rule["apiGroups"]:
                for resource in rule["resources"]:
                    found.setdefault(group, {}).setdefault(resource, set()).update(rule["verbs"])
    return found


def pods(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [o["spec"]["template"]["spec"] for o in kinds(items, "StatefulSet")] + [
        o["spec"] for o in kinds(items, "Pod")
    ]


def test_there_are_enough_value_sets() -> None:
    assert len(ALL) >= 8


@pytest.mark.parametrize("name", ALL)
def test_it_lints_strictly(name: str) -> None:
    done = run(helm(), "lint", "--strict", str(CHART), *values_of(name))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ALL)
def test_it_renders_what_the_golden_file_says(name: str) -> None:
    file = GOLDEN / f"{name}.yaml"
    if not file.exists():  # written once, by deleting the old one; then reviewed like any other change
        file.write_text(rendered(name))
        pytest.fail(f"{file} did not exist and was written: look at it")
    assert rendered(name) == file.read_text()


def test_every_golden_file_has_its_value_set() -> None:
    assert sorted(p.stem for p in GOLDEN.glob("*.yaml")) == sorted(ALL)


def test_an_old_helm_renders_the_same() -> None:
    if len(helms()) < 2:
        pytest.skip("only one helm is installed")
    for name in ("default", "actions"):
        assert template(helms()[-1], *values_of(name)) == rendered(name)


@pytest.mark.parametrize("name", ALL)
def test_every_manifest_is_valid_against_the_schemas_of_kubernetes(name: str) -> None:
    for item in objects(rendered(name)):
        if item["kind"] in CUSTOM:
            continue
        for version in VERSIONS:
            kubernetes_validate.validate(item, version, strict=True)


def test_custom_resources_have_their_shape() -> None:
    items = {o["kind"]: o for o in objects(rendered("operator")) + objects(rendered("gateway"))}
    monitor = items["ServiceMonitor"]
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    services = kinds(objects(rendered("operator")), "Service")
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    assert [s["metadata"]["name"] for s in services if wanted <= s["metadata"]["labels"].items()] == [
        "alertmedic-headless"  # each agent is scraped once, whichever services lead to it
    ]
    assert monitor["spec"]["endpoints"][0]["port"] in {p["name"] for s in services for p in s["spec"]["ports"]}
    receiver = items["AlertmanagerConfig"]["spec"]
    assert receiver["route"]["receiver"] == receiver["receivers"][0]["name"]
    assert receiver["receivers"][0]["webhookConfigs"][0]["url"] == "http://alertmedic.ops.svc:9095/webhook"
    route = items["HTTPRoute"]["spec"]
    assert route["rules"][0]["backendRefs"] == [{"name": "medic", "port": 80}]
    for kind in CUSTOM:
        assert items[kind]["metadata"]["namespace"] == "ops"


@pytest.mark.parametrize("name", ALL)
def test_pods_keep_to_the_restricted_standard(name: str) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted"""
    for spec in pods(objects(rendered(name))):
        assert not any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC"))
        pod = spec["securityContext"]
        assert pod["runAsNonRoot"] is True
        assert pod["runAsUser"] > 0
        assert pod["seccompProfile"]["type"] in ("RuntimeDefault", "Localhost")
        for volume in spec.get("volumes", []):
            allowed = {"configMap", "emptyDir", "projected", "secret", "persistentVolumeClaim", "downwardAPI", "csi"}
            assert set(volume) - {"name"} <= allowed, volume
        for container in spec["containers"] + spec.get("initContainers", []):
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert context.get("privileged") is not True
            assert context["readOnlyRootFilesystem"] is True
            assert "hostPort" not in json.dumps(container.get("ports", []))
            assert container["resources"]["limits"]["memory"]


@pytest.mark.parametrize("name", ALL)
def test_rbac_has_no_wildcard_no_secret_and_no_escalation(name: str) -> None:
    for role in kinds(objects(rendered(name)), "Role", "ClusterRole"):
        for rule in role["rules"]:
            assert "nonResourceURLs" not in rule
            every = [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
            assert not any("*" in word for word in every), role["metadata"]["name"]
            assert not {"secrets", "serviceaccounts", "pods/attach"} & set(rule["resources"])
            assert "pods/exec" not in rule["resources"] or name == "diagnose"
            assert not {"bind", "escalate", "impersonate", "delete", "deletecollection", "update"} & set(rule["verbs"])


def test_by_default_it_reads_its_own_namespace_and_nothing_else() -> None:
    items = objects(rendered("default"))
    assert not kinds(items, "ClusterRole", "ClusterRoleBinding")
    roles = kinds(items, "Role")
    assert [r["metadata"]["namespace"] for r in roles] == ["ops"]
    for resources in granted(roles).values():
        for verbs in resources.values():
            assert verbs <= READ


def test_without_the_api_server_there_is_no_role_and_no_token() -> None:
    items = objects(rendered("minimal"))
    assert not kinds(items, "Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding")
    assert pods(items)[0]["automountServiceAccountToken"] is False


@pytest.mark.parametrize("action", sorted(GRANTS))
def test_an_action_adds_exactly_what_it_needs(action: str) -> None:
    names = "kubernetes.setConfigNames={flags}" if action == "setConfig" else "kubernetes.setConfigNames=null"
    text = template(helm(), "--set", f"kubernetes.evidence=false,kubernetes.actions.{action}=true,{names}",
                    "--set", "kubernetes.namespaces={shop},kubernetes.diagnostics.dump={jcmd}")  # fmt: skip
    items = objects(text)
    assert granted(kinds(items, "Role", "ClusterRole")) == GRANTS[action]
    on_nodes = action in ("cordon", "drain")
    assert [r["metadata"].get("namespace") for r in kinds(items, "Role")] == ([] if on_nodes else ["shop"])
    assert len(kinds(items, "ClusterRole")) == on_nodes
    for binding in kinds(items, "RoleBinding", "ClusterRoleBinding"):
        assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "alertmedic", "namespace": "ops"}]
    if action == "setConfig":
        (role,) = kinds(items, "Role")
        assert role["rules"][0]["resourceNames"] == ["flags"]


def test_every_action_of_the_chart_is_in_the_table() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert set(values["kubernetes"]["actions"]) == set(GRANTS)
    assert not any(values["kubernetes"]["actions"].values()), "read-only as it comes"


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ("replicas=2", "replicas"),
        ("replicas=0", "replicas"),
        ("image.tagg=1", "tagg"),
        ("kubernetes.actions.root=true", "root"),
        ("kubernetes.actions.setConfig=true", "setConfigNames"),
        ("kubernetes.actions.diagnose=true", "diagnostics"),
        ("kubernetes.diagnostics.dump=jcmd 1 Thread.print", "diagnostics"),
        ("kubernetes.diagnostics.Dump={jcmd}", "diagnostics"),
        ("kubernetes.clusterWide=true,kubernetes.namespaces={shop}", "namespaces"),
        ("sandbox.mode=off", "mode"),
        ("sandbox.mode=required", "writableCgroup"),
        ("sandbox.writableCgroup=privileged", "writableCgroup"),
        ("sandbox.writableCgroup=runtimeClass", "runtimeClassName"),
        ("terminationGracePeriodSeconds=30", "terminationGracePeriodSeconds"),
        ("auth.tokens[0].scopes={root}", "scopes"),
        ("persistence.size=big", "size"),
        ("secretEnv[0].name=PGPASSWORD,secretEnv[0].value=hunter2", "secretEnv"),
        ("gateway.enabled=true", "parentRefs"),
        ("gateway.parentRefs[0].namespace=gateways", "parentRefs"),
        ("gateway.hostnames={https://medic.example.com}", "hostnames"),
        ("image.digest=sha256:12", "digest"),
        ("serviceMonitor.labels.release=two words", "labels"),
    ],
)
def test_what_makes_no_sense_is_refused(values: str, word: str) -> None:
    done = run(helm(), "template", "x", str(CHART), "--kube-version", "1.34.0", "--set", values)
    assert done.returncode != 0
    assert word in done.stderr


@pytest.mark.parametrize("name", [n for n in ALL if n != "packs"])
def test_the_agent_takes_the_configuration(name: str, tmp_path: Path) -> None:
    for item in kinds(objects(rendered(name)), "ConfigMap"):
        if text := item["data"].get("alertmedic.yaml"):
            break
    else:
        pytest.fail("no configuration")
    for path in re.findall(r"(?:_file|cert_file|key_file): (\S+)", text):
        file = tmp_path / path.removeprefix("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("token-" + file.name)
    (tmp_path / "alertmedic.yaml").write_text(text.replace("/etc/alertmedic/", f"{tmp_path}/etc/alertmedic/"))
    loaded = config.load(tmp_path / "alertmedic.yaml", {})
    assert loaded.listen == "0.0.0.0:9095"
    assert loaded.autonomy.default == ("approve" if name == "actions" else "suggest")
    scopes = {s for token in loaded.auth.bearer for s in token.scopes}
    assert "approve" not in scopes or name == "ingress"


def test_a_restart_is_asked_for_only_by_what_a_restart_mends() -> None:
    (spec,) = (o["spec"]["template"]["spec"] for o in kinds(objects(rendered("default")), "StatefulSet"))
    (container,) = spec["containers"]
    paths = {p: container[f"{p}Probe"]["httpGet"]["path"] for p in ("startup", "liveness", "readiness")}
    assert paths == {"startup": "/-/healthy", "liveness": "/-/healthy", "readiness": "/-/ready"}
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 600
    # A step under way may end, whatever it is; then there is time to close the port (10 s) and the journal.
    longest = max(d.limits.timeout_seconds for d in load_catalog())
    text = next(o["data"]["alertmedic.yaml"] for o in kinds(objects(rendered("default")), "ConfigMap"))
    shutdown = yaml.safe_load(text)["shutdown_seconds"]
    assert longest <= shutdown <= spec["terminationGracePeriodSeconds"] - 30


def test_a_changed_configuration_restarts_the_pod() -> None:
    def checksum(*arguments: str) -> str:
        (item,) = kinds(objects(template(helm(), *arguments)), "StatefulSet")
        annotation: str = item["spec"]["template"]["metadata"]["annotations"]["checksum/config"]
        return annotation

    assert checksum() == checksum("--set", "service.port=80") != checksum("--set", "config.log.level=debug")


def test_the_alerts_about_the_agent_are_rules_of_prometheus(program: Callable[[str], str], tmp_path: Path) -> None:
    rules = CHART / "files" / "rules.yaml"
    done = subprocess.run(
        [program("promtool"), "check", "rules", str(rules)], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (rule,) = kinds(objects(rendered("operator")), "PrometheusRule")
    assert rule["spec"] == yaml.safe_load(rules.read_text())


def exported() -> set[str]:
    names = {name for found in Telemetry("1").registry._collector_to_names.values() for name in found}
    return names | {"process_start_time_seconds", "process_resident_memory_bytes", "process_cpu_seconds_total"}


def test_dashboard_and_alerts_ask_for_metrics_that_exist() -> None:
    dashboard = json.loads((CHART / "files" / "dashboard.json").read_text())
    asked = [t["expr"] for p in dashboard["panels"] for t in p["targets"]]
    rules = yaml.safe_load((CHART / "files" / "rules.yaml").read_text())
    asked += [r["expr"] for g in rules["groups"] for r in g["rules"]]
    known = exported()
    for expression in asked:
        promql_parser.parse(expression.replace("$namespace", ".*"))
        for name in re.findall(r"\b((?:alertmedic|process)_\w+)", expression):
            assert name in known, f"{name} is exported by nobody: {expression}"


def test_the_readme_is_current() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "chart-readme"), "--check"], timeout=30, check=False)
    assert done.returncode == 0, "run tools/chart-readme"


def test_every_value_is_described() -> None:
    rows = re.findall(r"^\| `([^`]+)` \| `(.+)` \| (.*) \|$", (CHART / "README.md").read_text(), re.MULTILINE)
    assert len(rows) > 60
    for key, _, text in rows:
        assert text, f"values.yaml: {key} has no comment"


def test_the_example_renders_and_its_url_is_the_service() -> None:
    items = objects(template(helm(), "-f", str(CHART / "examples" / "kube-prometheus-stack.yaml")))
    assert {"ServiceMonitor", "PrometheusRule"} <= {o["kind"] for o in items}
    stack = yaml.safe_load((CHART / "examples" / "stack-values.yaml").read_text())
    receivers = {r["name"]: r for r in stack["alertmanager"]["config"]["receivers"]}
    route = stack["alertmanager"]["config"]["route"]["routes"][0]
    assert receivers[route["receiver"]]["webhook_configs"][0]["url"].endswith(":9095/webhook")


def test_plain_manifests_are_the_charts(tmp_path: Path) -> None:
    helm()
    done = subprocess.run([ROOT / "tools" / "render-manifests", tmp_path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for file in tmp_path.glob("*.yaml"):
        items = objects(file.read_text())
        assert kinds(items, "StatefulSet")
        assert not kinds(items, "Pod"), "a test hook is nothing to apply"
    assert len(list(tmp_path.glob("*.yaml"))) == 4
