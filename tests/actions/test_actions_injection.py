"""Hostile values: each is refused, or arrives as one inert argument, verbatim."""

from __future__ import annotations

import json
import random
import re
import re._parser as regex
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from actions_world import Proposal, action_data, context, done, policy
from hypothesis import given
from hypothesis import strategies as st

import sandbox
from actions import guard
from actions.catalog import ActionDefinition, load_catalog, parse_action
from actions.gates import Target
from actions.model import Declined, Plan, Refusal, Step
from actions.parameters import Parameter, ParameterError, as_text, render
from sandbox.model import Limits

DATA = Path(__file__).parents[1] / "data" / "injection.json"
CORPUS: dict[str, list[str]] = {
    kind: [v if isinstance(v, str) else v[0] * v[1] for v in values]
    for kind, values in json.loads(DATA.read_text()).items()
}
ALL = [value for values in CORPUS.values() for value in values]
CATALOG = load_catalog()
ACTIONS = sorted(d.name for d in CATALOG)
CODES = {0, 1, 2, 93, 94}  # done, failed, bad usage, refused, cannot tell


def test_the_corpus_is_large_enough() -> None:
    assert len(CORPUS) >= 12
    assert len(set(ALL)) == len(ALL) >= 200
    assert all(len(values) >= 15 for values in CORPUS.values())


@cache
def text_for(pattern: str) -> str:
    """The simplest text that the pattern allows: each choice its first, each repetition its fewest."""
    text = "".join(map(_simplest, regex.parse(pattern)))
    assert re.fullmatch(pattern, text), f"{pattern}: {text!r} is none; the sampler below lacks something"
    return text or "x"


def _simplest(node: Any) -> str:
    kind, value = str(node[0]), node[1]
    if kind == "LITERAL":
        return chr(value)
    if kind in ("ANY", "NOT_LITERAL", "CATEGORY"):
        return "x"
    if kind == "IN":
        if str(value[0][0]) == "NEGATE":
            return "x"
        first = value[0]
        return chr(first[1][0]) if str(first[0]) == "RANGE" else chr(first[1]) if str(first[0]) == "LITERAL" else "x"
    if kind in ("MAX_REPEAT", "MIN_REPEAT"):
        return "".join(map(_simplest, value[2])) * value[0]
    if kind == "SUBPATTERN":
        return "".join(map(_simplest, value[3]))
    if kind == "BRANCH":
        return "".join(map(_simplest, value[1][0]))
    return ""  # assertions


def sample(parameter: Parameter) -> Any:
    """A value that the parameter allows, found from its definition alone."""
    if parameter.default is not None:
        return parameter.default
    if parameter.enum:
        return parameter.enum[0]
    if parameter.type == "bool":
        return True
    if parameter.type in ("int", "number"):
        low = 1 if parameter.min is None else parameter.min
        value: Any = max(low, 1) if parameter.max is None else min(max(low, 1), parameter.max)
        value = int(value) if parameter.type == "int" else value
        return str(value) if parameter.origin == "inventory" else value
    return text_for(parameter.pattern)


def sources_of(definition: ActionDefinition) -> dict[str, dict[str, Any]]:
    """A complete inventory, proposal and target."""
    found: dict[str, dict[str, Any]] = {"inventory": {}, "proposal": {}, "target": {}}
    for parameter in definition.parameters.values():
        if parameter.origin != "plan":
            found[parameter.origin][parameter.source_key] = sample(parameter)
    return found


async def plan_for(definition: ActionDefinition, sources: dict[str, Any], service: str = "svc") -> Plan | Declined:
    async def run(argv: tuple[str, ...], limits: Limits, secrets: Any, needs: Any) -> Any:
        return done(stdout=json.dumps([{"identity": "x=1", "params": sources["target"]}]))

    proposal = Proposal(action=definition.name, service=service, params=sources["proposal"])
    world = context(inventory={service: sources["inventory"]}, targets=(), values={})
    return await guard.consider(proposal, CATALOG, world, run)


@pytest.mark.parametrize("name", ACTIONS)
async def test_every_parameter_refuses_or_carries_each_hostile_value_verbatim(name: str) -> None:
    """Also as text where a number belongs: nothing is converted. Parameters are found from the definitions."""
    definition = CATALOG.get(name)
    assert definition is not None
    clean = await plan_for(definition, sources_of(definition))
    assert isinstance(clean, Plan), clean
    hurried = random.Random(name)
    for parameter in definition.parameters.values():
        if parameter.origin == "plan" and parameter.name != "service":
            continue  # numbers and lists that we make ourselves
        for value in ALL:
            try:
                parameter.check(value)
            except ParameterError as error:
                assert str(error).isprintable()  # noqa: PT017 - most are refused
                assert len(str(error)) < 400  # noqa: PT017
                if hurried.random() > 0.1:  # the whole way for some of the refused, and for all that are let in
                    continue
            sources, service = sources_of(definition), "svc"
            if parameter.origin == "plan":
                service = value
            else:
                sources[parameter.origin][parameter.source_key] = value
            made = await plan_for(definition, sources, service)
            if isinstance(made, Declined):
                assert made.reason in (Refusal.BAD_PARAMETERS, Refusal.RESOLVE_FAILED), (value, made)
                assert "\n" not in made.detail
                continue
            assert value.isprintable()
            for argv, plain in zip(everything(made.steps[0]), everything(clean.steps[0]), strict=True):
                assert len(argv) == len(plain)
                for element, original in zip(argv, plain, strict=True):
                    # Either untouched, or the value stands whole where the clean value stood.
                    known = parameter.origin == "inventory" and parameter.type != "string"
                    assert element == original or element.endswith(value) or known, (parameter.name, element)
                    assert element.partition("=")[0] == original.partition("=")[0]


def everything(step: Step) -> list[tuple[str, ...]]:
    return [step.argv, step.check, step.undo]


# Programs that would act on files and processes of this very host are not given free values.
LOCAL = ("disk.", "process.", "diagnostic.")


def hostile_commands(definition: ActionDefinition, value: str, operations: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The action's own programs with the value in every text that is no address, past the parameters that would
    refuse it. Addresses lead nowhere."""
    values: dict[str, Any] = {}
    for p in definition.parameters.values():
        address = p.origin == "inventory" and p.pattern and ("/" in text_for(p.pattern) or "://" in p.pattern)
        if p.type == "string" and not p.enum and not address:
            values[p.name] = value
        elif address:
            values[p.name] = text_for(p.pattern)
        else:
            values[p.name] = 1 if p.type in ("int", "number") else sample(p)
    found = []
    for operation in operations:
        template = getattr(definition, operation)
        if template:
            found.append(render(template, values, definition.parameters, {"python": sys.executable}))
    return found


async def run_hostile(name: str, values: list[str], operations: tuple[str, ...], canary: Path) -> int:
    definition = CATALOG.get(name)
    assert definition is not None
    ran = 0
    for value in values:
        text = value.replace("CANARY", str(canary)).replace("\0", "")
        try:
            commands = hostile_commands(definition, text, operations)
            for argv in commands:
                argv[-1].encode()
        except (ParameterError, UnicodeEncodeError):
            continue  # it would be read as an option, or no argument can hold it
        for argv in commands:
            if sum(map(len, argv)) > 100_000:
                continue
            result = await sandbox.run(argv, Limits(timeout_seconds=30.0))
            assert result.exit_code in CODES, (argv, result)
            assert "Traceback" not in result.stderr, (argv, result.stderr)
            ran += 1
    assert not canary.exists()
    return ran


REMOTE = [name for name in ACTIONS if not name.startswith(LOCAL)]


@pytest.mark.parametrize("name", REMOTE)
async def test_the_programs_themselves_execute_nothing(name: str, tmp_path: Path) -> None:
    """One value of two classes each, seeded; one of every class through every operation in the full run."""
    chosen = random.Random(name).sample(sorted(CORPUS), 2)
    values = [random.Random(name + kind).choice(CORPUS[kind]) for kind in chosen]
    await run_hostile(name, values, ("argv",), tmp_path / "canary")


@pytest.mark.full
@pytest.mark.parametrize("name", REMOTE)
async def test_the_programs_themselves_execute_nothing_of_any_class(name: str, tmp_path: Path) -> None:
    values = [random.Random(kind + name).choice(strings) for kind, strings in CORPUS.items()]
    assert await run_hostile(name, values, ("resolve", "argv", "check", "undo"), tmp_path / "canary") >= 5


ANY_TEXT = Parameter(name="x", origin="proposal", pattern=r"(?s).*", max_length=4096)


@given(st.text(max_size=200))
def test_even_a_parameter_that_allows_everything_makes_one_inert_element(value: str) -> None:
    try:
        checked = ANY_TEXT.check(value)
    except ParameterError:
        assert not value or not value.isprintable()
        return
    parameters = {"x": ANY_TEXT}
    assert render(("p", "--x={x}", "end"), {"x": checked}, parameters, {}) == ("p", f"--x={value}", "end")
    if value.startswith("-"):
        with pytest.raises(ParameterError, match="option"):
            render(("p", "{x}"), {"x": checked}, parameters, {})
    else:
        assert render(("p", "{x}"), {"x": checked}, parameters, {}) == ("p", value)


@given(st.one_of(st.none(), st.binary(), st.lists(st.integers()), st.dictionaries(st.text(), st.text())))
def test_only_plain_values_are_values(value: object) -> None:
    for parameter in (
        ANY_TEXT,
        Parameter(name="x", origin="proposal", type="int"),
        Parameter(name="x", origin="proposal", type="number"),
        Parameter(name="x", origin="proposal", type="bool"),
    ):
        with pytest.raises(ParameterError):
            parameter.check(value)


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        ("int", 7, "7"),
        ("int", 7.0, "7"),
        ("int", True, None),
        ("int", 7.5, None),
        ("int", "7", None),
        ("int", float("inf"), None),
        ("int", 1e300, None),
        ("number", 1700000000.12, "1700000000.12"),
        ("number", float("nan"), None),
        ("number", float("-inf"), None),
        ("number", False, None),
        ("bool", True, "true"),
        ("bool", 1, None),
        ("bool", "true", None),
    ],
)
def test_numbers_and_booleans_have_one_spelling(kind: Any, value: Any, text: str | None) -> None:
    parameter = Parameter(name="x", origin="proposal", type=kind)
    if text is None:
        with pytest.raises(ParameterError):
            parameter.check(value)
    else:
        assert as_text(parameter.check(value)) == text


@pytest.mark.parametrize(
    ("kind", "value", "good"),
    [
        ("int", "12", True),
        ("int", " 12", False),
        ("int", "1_2", False),
        ("int", "٣", False),
        ("int", "0x1", False),
        ("number", "1.5", True),
        ("number", "1e9", False),
        ("number", "nan", False),
        ("bool", "true", True),
        ("bool", "yes", False),
    ],
)
def test_inventory_text_becomes_a_number_only_in_plain_digits(kind: Any, value: str, good: bool) -> None:
    parameter = Parameter(name="x", origin="inventory", type=kind)
    if good:
        assert not isinstance(parameter.check(value), str)
    else:
        with pytest.raises(ParameterError):
            parameter.check(value)


def test_a_value_with_a_placeholder_in_it_is_not_rendered_again() -> None:
    parameters = {"x": ANY_TEXT, "y": ANY_TEXT}
    rendered = render(
        ("p", "{x}", "{y}"), {"x": "{y}{python}", "y": "secret"}, parameters, {"python": "/usr/bin/python"}
    )
    assert rendered == ("p", "{y}{python}", "secret")


async def test_what_arrives_in_the_sandbox_is_what_was_planned() -> None:
    """Through the real sandbox: the program prints its arguments, and they are the hostile values themselves."""
    data = action_data(
        parameters={"x": {"from": "proposal", "pattern": "(?s).+", "max_length": 4096}},
        target="service=x",
        argv=["{python}", "-I", "-m", "json.tool", "--x={x}"],
        check=["/bin/true"],
    )
    definition = parse_action(data, "test")
    hostile = [v for v in ALL if v.isprintable() and len(v) <= 4096]
    shown = "import json, sys; print(json.dumps(sys.argv[1:]))"
    steps = [guard.make_step(definition, {"x": v}, Target(identity="service=x")) for v in hostile]
    arguments = [s.argv[-1] for s in steps if isinstance(s, Step)]
    result = await sandbox.run([sys.executable, "-I", "-c", shown, *arguments], Limits(timeout_seconds=30.0))
    assert result.ok, result
    assert json.loads(result.stdout) == [f"--x={v}" for v in hostile]


def test_secrets_are_not_parameters() -> None:
    made = guard.decide(
        Proposal(),
        parse_action(action_data(environment=[{"name": "TOKEN"}]), "test"),
        context(secrets={"TOKEN": "hunter2"}, policy=policy()),
    )
    assert isinstance(made, Plan)
    assert "hunter2" not in repr(made)
    assert made.steps[0].environment == ("TOKEN",)
