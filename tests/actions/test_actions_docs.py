"""docs/actions.md against the code it describes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from actions.catalog import load_catalog, parse_action
from actions.model import Refusal

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "actions.md").read_text()
TABLES = TEXT + (DOCS / "kubernetes.md").read_text()
# "connection" in a row of the Kubernetes table; the text below it names these keys.
CONNECTION = {"kubernetes_api", "kubernetes_token_file", "kubernetes_ca_file", "kubernetes_namespaces"}


def test_the_table_lists_every_shipped_action_with_its_inventory() -> None:
    found = re.finditer(r"^\| `([a-z0-9_.]+)` \|.*$", TABLES, re.MULTILINE)
    rows = {m[1]: m[0] for m in found if m[0].count("|") == 6}
    catalog = load_catalog()
    assert set(rows) == {d.name for d in catalog}
    for d in catalog:
        row = rows[d.name]
        for p in d.parameters.values():
            if p.origin == "inventory":
                known = p.source_key in CONNECTION and "connection" in row
                assert known or f"`{p.source_key}`" in row, (d.name, p.name)
        assert (d.risk.auto == "never") == row.rstrip().endswith("yes |")
        assert bool(d.undo) == (" none |" not in row and "nothing to undo" not in row)


def test_the_keys_of_a_kubernetes_connection_are_named() -> None:
    assert all(f"`{key}`" in TABLES for key in CONNECTION)


@pytest.mark.parametrize("refusal", list(Refusal))
def test_every_refusal_is_explained(refusal: Refusal) -> None:
    assert f"`{refusal}`" in TEXT


def test_the_example_is_a_valid_action() -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    (data,) = yaml.safe_load(example)["actions"]
    assert parse_action(data, "docs").name == "cache.clear"
