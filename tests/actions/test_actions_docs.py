"""docs/actions.md against the code it describes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from actions.catalog import load_catalog, parse_action
from actions.model import Refusal

TEXT = (Path(__file__).parents[2] / "docs" / "actions.md").read_text()


def test_the_table_lists_every_shipped_action_with_its_inventory() -> None:
    rows = {m[1]: m[0] for m in re.finditer(r"^\| `([a-z0-9_.]+)` \|.*$", TEXT, re.MULTILINE) if m[0].count("|") == 6}
    catalog = load_catalog()
    assert set(rows) == {d.name for d in catalog}
    for d in catalog:
        row = rows[d.name]
        for p in d.parameters.values():
            assert p.origin != "inventory" or f"`{p.source_key}`" in row, (d.name, p.name)
        assert (d.risk.auto == "never") == row.rstrip().endswith("yes |")
        assert bool(d.undo) == (" none |" not in row and "nothing to undo" not in row)


@pytest.mark.parametrize("refusal", list(Refusal))
def test_every_refusal_is_explained(refusal: Refusal) -> None:
    assert f"`{refusal}`" in TEXT


def test_the_example_is_a_valid_action() -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    (data,) = yaml.safe_load(example)["actions"]
    assert parse_action(data, "docs").name == "cache.clear"
