"""docs/configuration.md names every key with its default and nothing else; docs/metrics.md every metric likewise."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import yaml
from prometheus_client.parser import text_string_to_metric_families
from schema_walk import keys

from agent.config import load_document
from agent.strict import Document
from agent.telemetry import Telemetry

DOCS = Path(__file__).parents[2] / "docs"


def test_every_key_is_documented_with_its_default() -> None:
    rows = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \| (.+) \|$", (DOCS / "configuration.md").read_text(), re.MULTILINE)
    documented = {key: default for key, default, _ in rows}
    assert len(documented) == len(rows), "a key is documented twice"
    assert documented == dict(keys())
    assert all(len(text) > 8 for _, _, text in rows)


# docs/actions.md shows a file of actions, which tests/actions reads.
PAGES = [DOCS.parent / "README.md", *sorted(set(DOCS.glob("*.md")) - {DOCS / "actions.md"})]
TOP = {key.split(".")[0] for key, _ in keys()}


def test_every_example_of_the_documentation_loads(tmp_path: Path) -> None:
    """Every YAML block whose keys are those of a configuration, on every page; all of docs/configuration.md. The
    directories that one names are there."""
    for name in ("token", "password"):
        (tmp_path / name).write_text("x" + name)
    found = set()
    for page in PAGES:
        for block in re.findall(r"```yaml\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
            if page.name == "configuration.md" or set(yaml.safe_load(block)) <= TOP:
                here = re.sub(r"/(?:etc|var/lib)/alertmedic/[a-z-]+(?=\]?$)", str(tmp_path), block, flags=re.MULTILINE)
                load_document(Document(f"example of {page.name}", tmp_path), here.encode(), {})
                found.add(page.name)
    assert found >= {"README.md", "configuration.md", "gateway.md", "kubernetes.md"}


def test_alertmanager_takes_every_example_of_its_configuration(program: Callable[..., str], tmp_path: Path) -> None:
    """Blocks with `receivers`, by amtool; one without a `route` gets one."""
    amtool = program("amtool", "prometheus-alertmanager")
    blocks = [b for page in PAGES for b in re.findall(r"```yaml\n(.*?)```", page.read_text("utf-8"), re.DOTALL)]
    examples = [data for data in map(yaml.safe_load, blocks) if "receivers" in data]
    assert len(examples) >= 2
    for data in examples:
        file = tmp_path / "alertmanager.yaml"
        file.write_text(yaml.safe_dump({"route": {"receiver": "alertmedic"}, **data}))
        done = subprocess.run([amtool, "check-config", str(file)], capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_metric_is_documented_with_its_type_and_labels() -> None:
    text = (DOCS / "metrics.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| ([^|]*) \| (.+) \|$", text, re.MULTILINE)
    documented = {(name, kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels, _ in rows}
    telemetry = Telemetry("1.2.3")
    registered = set()
    for collector in list(telemetry.registry._collector_to_names):
        for family in collector.describe() if hasattr(collector, "describe") else ():
            if family.name.startswith("alertmedic_"):
                suffix = "_total" if family.type == "counter" else ""
                registered.add((family.name + suffix, family.type, tuple(getattr(collector, "_labelnames", ()))))
    assert documented == registered
    families = {f.name for f in text_string_to_metric_families(telemetry.render()[0].decode())}
    assert {"process_resident_memory_bytes", "python_gc_collections"} <= families
