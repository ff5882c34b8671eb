"""Actions written as Python classes: read without being executed, run in the sandbox."""

from __future__ import annotations

from pathlib import Path

import pytest
from actions_servers import do
from actions_world import NOW, MemoryLedger, Proposal, ScriptedVerifier, context, in_sandbox

import sandbox
from actions import guard
from actions.catalog import CatalogError, load_catalog
from actions.model import Declined, Plan, Refusal
from actions.runner import Runner

SOURCE = '''
from pathlib import Path

from actions.builtin.python_action import Action, Refused

Path("{marker}").write_text("executed")


class Switch(Action):
    """Turns a switch that is a file."""

    name = "test.switch"
    parameters = {{
        "path": {{"from": "inventory", "key": "switch", "pattern": "/.+"}},
        "wanted": {{"from": "proposal", "type": "int", "min": 0, "max": 9}},
        "note": {{"from": "proposal", "pattern": ".+", "required": False}},
        "previous": {{"from": "target", "type": "int"}},
    }}
    idempotent = False
    risk = {{"reversible": True, "blast_radius": "service", "changes": "runtime", "auto": "allowed"}}
    _private = object()

    def resolve(self, path, wanted):
        now = int(Path(path).read_text())
        return [] if now == wanted else [{{"identity": "switch", "params": {{"previous": now}}, "note": "one"}}]

    def run(self, path, wanted, previous, note="none"):
        assert isinstance(wanted, int)
        if int(Path(path).read_text()) != previous:
            raise Refused("somebody else turned it")
        Path(path).write_text(str(wanted))
        return {{"note": note}}

    def check(self, path, wanted):
        return int(Path(path).read_text()) == wanted

    def undo(self, path, previous):
        Path(path).write_text(str(previous))
        return "turned back"


class NoAction:
    name = "test.ignored"
'''


@pytest.fixture
def switch(tmp_path: Path) -> Path:
    made = tmp_path / "switch"
    made.write_text("3")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "switch.py").write_text(SOURCE.format(marker=tmp_path / "marker"))
    return made


async def plan_for(switch: Path, **params: object) -> Plan | Declined:
    world = context(inventory={"svc": {"switch": str(switch)}}, targets=(), values={})
    proposal = Proposal(action="test.switch", service="svc", params={"wanted": 7, **params})  # type: ignore[dict-item]
    return await guard.consider(proposal, load_catalog([switch.parent / "mine"]), world, in_sandbox)


async def outcome(made: Plan, helps: bool) -> str:
    import asyncio

    runner = Runner(MemoryLedger(), sandbox, ScriptedVerifier([(helps, "seen")]), lambda: NOW)
    return str((await runner.run(made, asyncio.Event())).result)


async def test_reading_a_class_executes_nothing_and_running_it_does(switch: Path) -> None:
    marker = switch.with_name("marker")
    (definition,) = [d for d in load_catalog([switch.parent / "mine"]) if d.name.startswith("test.")]
    assert definition.description == "Turns a switch that is a file."
    assert not marker.exists()
    made = await plan_for(switch, note="$(touch /tmp/x) {path}")
    assert isinstance(made, Plan), made
    assert marker.exists()  # the look-up ran, in the sandbox
    step = made.steps[0]
    assert (await do(step.check, step)).exit_code == 1
    assert await outcome(made, helps=False) == "undone"
    assert switch.read_text() == "3"
    assert await outcome(made, helps=True) == "verified"
    assert switch.read_text() == "7"
    assert (await do(step.check, step)).exit_code == 0
    refused = await do(step.argv, step)
    assert refused.exit_code == 93
    assert "somebody else" in refused.stdout
    nothing = await plan_for(switch)
    assert isinstance(nothing, Declined)
    assert nothing.reason is Refusal.EMPTY_TARGET


async def test_a_file_that_was_changed_after_the_plan_is_refused(switch: Path) -> None:
    made = await plan_for(switch)
    assert isinstance(made, Plan)
    file = switch.parent / "mine" / "switch.py"
    file.write_text(file.read_text() + "\n# changed\n")
    assert (await do(made.steps[0].argv, made.steps[0])).exit_code == 93
    assert (await do(made.steps[0].check, made.steps[0])).exit_code == 94
    assert switch.read_text() == "3"


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("    idempotent = False\n", "", "idempotent: is absent"),
        ("    idempotent = False\n", "    idempotent = bool(0)\n", "Switch.idempotent: must be a literal"),
        ("    idempotent = False\n", "    idempotent = False\n    run = ['/bin/sh']\n", "Switch.run: is a method"),
        ("def run(self, path,", "def run(self, path, other,", "takes other, no parameter"),
        ("def run(", "def walk(", "has no method run"),
        ("def check(", "def chek(", "check: is absent"),
        ("def undo(", "def undone(", "undo: is absent"),
        ("class Switch", "class class", "no valid Python"),
        ('"type": "int", "min"', '"type": "integer", "min"', "parameters.wanted.type"),
    ],
)
def test_a_fault_is_named(switch: Path, old: str, new: str, fault: str) -> None:
    file = switch.parent / "mine" / "switch.py"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(CatalogError) as caught:
        load_catalog([switch.parent / "mine"])
    assert any(fault in f for f in caught.value.faults), caught.value.faults
