"""docs/configuration.md names every key with its default and nothing else; docs/metrics.md every metric likewise."""

from __future__ import annotations

import re
from pathlib import Path

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


def test_every_example_of_the_documentation_loads(tmp_path: Path) -> None:
    for name in ("token", "password"):
        (tmp_path / name).write_text("x" + name)
    blocks = re.findall(r"```yaml\n(.*?)```", (DOCS / "configuration.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        load_document(Document("example", tmp_path), block.encode(), {})


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
