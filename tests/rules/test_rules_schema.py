"""The published JSON Schema of packs says of structure what the loader says."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rules_packs import CAUSE, GOOD, RULE, broken

from rules.packs import PackError, parse_pack
from rules.schema import pack_schema

ROOT = Path(__file__).parents[2]
CHECKER = jsonschema.Draft202012Validator(pack_schema())
# What takes a second place of the pack, or the meaning of a text, to tell: only the loader says these.
BEYOND = (
    "sum to",
    "comes twice",
    "no evidence of this cause",
    "needs `using`",
    "unknown word",
    "bound by no condition",
    " has [",
    "cannot be computed",
    "calls need the label",
)


def accepts(data: object) -> bool:
    return bool(CHECKER.is_valid(data))


def refusals(data: object) -> list[str]:
    try:
        parse_pack(data, "x.yaml")
    except PackError as error:
        return [f.reason for f in error.faults]
    return []


def test_the_published_file_is_what_the_types_say() -> None:
    published = json.loads((ROOT / "docs" / "schemas" / "pack.schema.json").read_text("utf-8"))
    assert published == pack_schema(), "run: alertmedic packs schema > docs/schemas/pack.schema.json"
    jsonschema.Draft202012Validator.check_schema(published)


@pytest.mark.parametrize("path", sorted((ROOT / "rules" / "packs").glob("*.yaml")), ids=lambda p: p.name)
def test_it_accepts_every_shipped_pack(path: Path) -> None:
    CHECKER.validate(yaml.safe_load(path.read_text("utf-8")))


STRUCTURE: list[Any] = [
    None,
    [],
    "pack",
    broken("colour", value=1),
    broken("pack", delete=True),
    broken("pack", value=3),
    broken("version", value="1"),
    broken("version", value=True),
    broken("queries", value=[]),
    broken("queries", "Bad-Name", value="up{$scope}"),
    broken("queries", "lag_seconds", value="lag"),
    broken("queries", "lag_seconds", value="x{$scope} + $evil"),
    broken("queries", "lag_seconds", value="x{$scope} + $scoped"),
    broken("queries", "lag_seconds", value=["x{$scope}"]),
    broken("signals", "lag_seconds", "flor", value=1),
    broken("signals", "lag_seconds", "kind", value="speed"),
    broken("signals", "lag_seconds", "floor", value=0),
    broken("signals", "lag_seconds", "floor", delete=True),
    broken("signals", "lag_seconds", "kind", value="saturation"),
    broken("signals", "lag_seconds", "growth", value="yes"),
    broken("signals", "lag_seconds", "derive", value={"kind": "guess"}),
    broken("signals", "lag_seconds", "derive", value={"kind": "share", "of": ["lag_seconds"], "full": 0}),
    broken("groups", "lag", "facts", value={"kind": 3}),
    broken("groups", "lag", "facts", value={"kind": "a"}),
    broken("groups", "lag", "facts", value={"kind": "a", "evidence": "e", "where": {"x": {"=": 1}}}),
    broken("groups", "lag", "facts", value={"kind": "a", "evidence": "e", "owner": "nobody"}),
    broken(*CAUSE, "prior", value=1.0),
    broken(*CAUSE, "prior", value=0),
    broken(*CAUSE, "prior", value="often"),
    broken(*CAUSE, "kinds", value=[]),
    broken(*CAUSE, "kinds", value="postgres"),
    broken(*CAUSE, "needs", value=[]),
    broken(*CAUSE, "evidence", 0, "at", value="moon"),
    broken(*CAUSE, "evidence", 0, "states", "strong", value=[1.0, 0.5]),
    broken(*CAUSE, "evidence", 0, "states", "strong", value=[0.1]),
    broken(*CAUSE, "evidence", 0, "states", "strong", value=[0.1, 0.1, 0.1]),
    broken(*CAUSE, "evidence", 0, "states", "missing", value=[0.1, 0.1]),
    broken(*CAUSE, "proposals", 0, "params", "pid", value={"from": "os.environ"}),
    broken(*CAUSE, "proposals", 0, "params", "pid", value={"eval": "1"}),
    broken(*CAUSE, "proposals", 0, "params", "pid", value=[1]),
    broken(*CAUSE, "proposals", 0, "autonomy_cap", value="always"),
    broken(*RULE, "when", value=[]),
    broken(*RULE, "when", 0, "match", value="log"),
    broken(*RULE, "when", 0, "where", value="state"),
    broken(*RULE, "then", "prune", value="x"),
    broken(*RULE, "then", "support", delete=True),
    broken(*RULE, "then", "weight", value=9),
    broken(*RULE, "then", "weight", value=0),
]
GOOD_ONES: list[dict[str, Any]] = [
    GOOD,
    {"pack": "empty", "version": 1},
    broken("description", value="words"),
    broken("signals", "lag_seconds", "limit", value=5),
    broken("signals", "lag_seconds", "limit", value=None),
    broken("signals", "lag_seconds", "silent", value="strong"),
    broken("groups", "lag", "facts", value={"kind": "a", "evidence": "e", "where": {"x": [1, "b", True]}}),
    broken("groups", "lag", "facts", value={"kind": "a", "evidence": "e", "strong": {"x": {">=": 1, "<": 5.5}}}),
    broken(*CAUSE, "no_remedy", value="it is not ours"),
    broken(*CAUSE, "proposals", 0, "params", "n", value=3.5),
    broken(*CAUSE, "proposals", 0, "params", "n", value=False),
    broken(*RULE, "then", "weight", value=3),
    broken("queries", "lag_seconds", value='label_replace(x{$scope}, "a", "$1", "b", "(.*)")'),
]


@pytest.mark.parametrize("data", STRUCTURE, ids=range(len(STRUCTURE)))
def test_what_the_schema_refuses_the_loader_refuses(data: Any) -> None:
    assert not accepts(data)
    assert refusals(data)


@pytest.mark.parametrize("data", GOOD_ONES, ids=range(len(GOOD_ONES)))
def test_what_the_schema_accepts_the_loader_accepts(data: Any) -> None:
    assert refusals(data) == []
    CHECKER.validate(data)


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.floats(-2, 2).filter(lambda x: not math.isnan(x) and not x.is_integer()),
    st.sampled_from(["up", "rate", "lag", "$s", "strong", "self", "{service}", "up{$scope}", "Bad", ""]),
)
PLACES: list[tuple[str | int, ...]] = [
    ("version",),
    ("queries", "lag_seconds"),
    ("signals", "lag_seconds"),
    *(("signals", "lag_seconds", key) for key in ("kind", "bad", "floor", "group", "limit", "silent", "derive", "x")),
    *(("groups", "lag", key) for key in ("title", "symptom", "facts", "x")),
    *((*CAUSE, key) for key in ("prior", "kinds", "needs", "evidence", "sentence", "proposals", "no_remedy", "x")),
    *((*CAUSE, "evidence", 0, key) for key in ("at", "states", "x")),
    (*CAUSE, "evidence", 0, "states", "strong"),
    *((*CAUSE, "proposals", 0, key) for key in ("action", "params", "using", "autonomy_cap")),
    *((*RULE, key) for key in ("title", "when", "then")),
    *((*RULE, "when", 0, key) for key in ("match", "where")),
    *((*RULE, "then", key) for key in ("support", "prune", "weight", "service")),
]


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    place=st.sampled_from(PLACES),
    value=st.recursive(
        LEAVES,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(st.sampled_from(["lag_seconds", "kind", "strong", "from", ">=", "x"]), inner, max_size=3),
        ),
        max_leaves=6,
    ),
)
def test_both_say_the_same_of_any_value_anywhere(place: tuple[str | int, ...], value: Any) -> None:
    data = copy.deepcopy(broken(*place, value=value))
    reasons = refusals(data)
    if not reasons:
        CHECKER.validate(data)
    elif accepts(data):
        assert all(any(words in reason for words in BEYOND) for reason in reasons), reasons
