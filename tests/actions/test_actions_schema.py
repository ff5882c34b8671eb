"""The published JSON Schema of actions says of structure what the loader says."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from actions_world import action_data
from test_actions_catalog import WRONG

from actions.catalog import CatalogError, parse_action
from actions.schema import actions_schema

ROOT = Path(__file__).parents[2]
CHECKER = jsonschema.Draft202012Validator(actions_schema())
# What takes a second key, or the meaning of a text, to tell: only the loader says these.
BEYOND = (
    "would parse what", "evaluates text", "may not come from a parameter", "is no parameter of", "belongs to no",
    "after a crash", "it must be `never`", "so it must be", "but undo is none", "a read-only action", "is not within",
    "is used nowhere", "exactly one of", "is absent, but a parameter", "known only when", "no regular expression",
    ".default: service: ", "lacks $scope", "is none of $", "$x is none of",
    "leave nothing to isolate",
)  # fmt: skip


def accepts(action: object) -> bool:
    return bool(CHECKER.is_valid({"actions": [action]}))


def refusals(action: object) -> list[str]:
    try:
        parse_action(action, "here")
    except CatalogError as error:
        return list(error.faults)
    return []


def agree(action: object) -> None:
    faults = refusals(action)
    structural = [f for f in faults if not any(words in f for words in BEYOND)]
    if structural:
        assert not accepts(action), structural
    elif not faults:
        assert accepts(action), [e.message for e in CHECKER.iter_errors({"actions": [action]})]


def test_the_published_file_is_what_the_loader_checks_with() -> None:
    published = json.loads((ROOT / "docs" / "schemas" / "actions.schema.json").read_text("utf-8"))
    assert published == actions_schema(), "run: alertmedic actions schema > docs/schemas/actions.schema.json"
    jsonschema.Draft202012Validator.check_schema(published)


@pytest.mark.parametrize("path", sorted((ROOT / "actions" / "packs").glob("*.yaml")), ids=lambda p: p.name)
def test_it_accepts_every_shipped_action(path: Path) -> None:
    CHECKER.validate(yaml.safe_load(path.read_text("utf-8")))


@pytest.mark.parametrize(("change", "fault"), [pytest.param(c, f, id=n) for n, c, f in WRONG])
def test_both_refuse_the_same_mistakes(change: dict[str, Any], fault: str) -> None:
    action = action_data(**change)
    assert refusals(action)
    agree(action)


OTHERS: list[Any] = [
    None, True, 0, -1, 7, 2.5, 10**9, "", "none", "resolve", "text", "a b", [], ["/bin/true"], [""], [1], {}, {"a": 1},
    "128MiB", "/abs", ["/a", "b"], ["/a/../b"],
]  # fmt: skip


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    if isinstance(data, dict):
        for key, value in data.items():
            found += places(value, (*path, key))
    return found


def everything() -> dict[str, Any]:
    """An action that uses every key."""
    return action_data(
        family="test", version=2, where="network", max_targets=3, verify="each", verify_query="up{$scope} == 1",
        verify_seconds=5, read_only=False, user="nobody", dry_run=["/bin/true", "{service}"],
        preconditions=[{"text": "it is there", "argv": ["/bin/true"]}],
        limits={"cpu_percent": 5, "memory": "64MiB", "swap": 0, "pids": 4, "timeout_seconds": 3, "output": "8KiB",
                "open_files": 32, "file_size": "1MiB"},
        needs={"network": "none", "processes": "own", "write": ["/tmp/x"], "inspect": False, "isolation": "automatic"},
        environment=[{"name": "T", "required": False, "by": "descriptor"}],
        parameters={
            "service": {"from": "plan", "type": "string", "description": "d", "required": True, "pattern": ".+",
                        "enum": ["a"], "max_length": 9, "leading_dash": False, "key": "service", "default": "a"},
            "n": {"from": "proposal", "type": "int", "min": 1, "max": 5},
        },
        argv=["/bin/true", "{service}", "{n}"],
    )  # fmt: skip


def test_both_accept_an_action_that_uses_every_key() -> None:
    action = everything()
    assert refusals(action) == []
    assert accepts(action)
    assert set(CHECKER.schema["$defs"]["Action"]["properties"]) == {*action, "resolve"}


@pytest.mark.parametrize("path", places(everything()), ids=lambda p: ".".join(map(str, p)))
def test_both_judge_every_value_in_every_place_alike(path: tuple[Any, ...]) -> None:
    for value in [*OTHERS, ...]:
        action = copy.deepcopy(everything())
        at = action
        for key in path[:-1]:
            at = at[key]
        if value is ...:
            del at[path[-1]]
        else:
            at[path[-1]] = value
        agree(action)


def test_both_judge_random_mixtures_alike() -> None:
    dice = random.Random(11)
    spots = places(everything())
    for _ in range(600):
        action = everything()
        for path in dice.sample(spots, 2):
            at: Any = action
            for key in path[:-1]:
                at = at.get(key) if isinstance(at, dict) else None
            if isinstance(at, dict):
                at[path[-1]] = copy.deepcopy(dice.choice(OTHERS))
        agree(action)
