"""Hostile values: each is refused, or arrives as one inert argument, verbatim."""

from __future__ import annotations

import json
import sys
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

HOSTILE = {
    "shell": [
        "; reboot",
        "$(reboot)",
        "`reboot`",
        "a && reboot",
        "a | sh",
        "> /etc/passwd",
        "${IFS}",
        "*",
        "~",
        "!!",
        "'\"",
        "a\\",
    ],
    "option": ["-rf", "--help", "-", "--", "-c", "--dsn=x", "-oProxyCommand=reboot"],
    "newline": ["a\nb", "a\r\nb", "\n", "a\n", "\nERROR forged log line", "a\u2028b", "a\x85b"],
    "control": ["a\x00b", "\x1b[2J", "\x07", "a\x7f", "\u202eabc", "a\u200bb"],
    "template": ["{python}", "{service}", "{{7*7}}", "${jndi:ldap://x}", "{0.__class__}", "%(a)s", "%s%n"],
    "path": ["../../etc/passwd", "/etc/passwd", "..", "a/../../b", "file:///etc/passwd"],
    "sql": ["' OR 1=1 --", "'; SELECT pg_sleep(9); --", "\\'", ":'pid'", "$$;$$", "\\! reboot"],
    "promql": ['x"} or vector(1) #', "{__name__=~'.+'}", "1) or (1"],
    "yaml": ["!!python/object:os.system", "a: b", "- x", "&a *a", "# x"],
    "url": ["http://evil@good", "javascript:x", "http://a b", "//evil", "http://good#@evil", "http://[::1"],
    "unicode": ["ｒｅｂｏｏｔ", "ﬁ", "é", "\U0001f4a3", "\ud800", "İ"],
    "size": ["a" * 5000, "A" * 300],
}
VALUES = [pytest.param(v, id=f"{kind}-{i}") for kind, values in HOSTILE.items() for i, v in enumerate(values)]

# A complete inventory and proposal for every shipped action; the tests spoil one value at a time.
INVENTORY = {
    "supervisord_url": "unix:///run/supervisor.sock",
    "supervisord_program": "shop:worker",
    "systemd_unit": "worker.service",
    "pg_dsn": "postgresql://shop@127.0.0.1:5432/shop",
    "flags_url": "http://127.0.0.1:9101/flags",
    "scale_url": "http://127.0.0.1:9102/pool",
    "workers_max": "16",
    "log_root": "/var/log/shop",
    "listen_port": "9101",
}
PROPOSED: dict[str, Any] = {"pid": 4242, "start": 1.7e9, "pgid": 4242, "flag": "live", "value": "off"}
TARGETS: dict[str, dict[str, Any]] = {
    "service.restart.supervisord": {"pid": 12, "start": 1700000000},
    "service.restart.systemd": {"invocation": "0" * 32},
    "process.terminate_group": {"members": "4242:99"},
    "postgres.terminate_blockers": {"pid": 12, "backend_start": "2026-01-02T03:04:05.000006Z"},
    "postgres.terminate_idle_in_transaction": {"pid": 12, "backend_start": "2026-01-02T03:04:05.000006Z"},
    "disk.free_logs": {"root_id": "1:2"},
    "feature_flag.set": {"previous": "on"},
    "workers.scale": {"previous": 2, "wanted": 4},
    "diagnostic.capture": {},
}
CATALOG = load_catalog()


async def plan_for(
    definition: ActionDefinition, entry: Any, proposed: Any, target: Any, service: str = "svc"
) -> Plan | Declined:
    async def run(argv: tuple[str, ...], limits: Limits, secrets: Any) -> Any:
        return done(stdout=json.dumps([{"identity": "x=1", "params": target}]))

    proposal = Proposal(action=definition.name, service=service, params=proposed)
    return await guard.consider(proposal, CATALOG, context(inventory={service: entry}, targets=(), values={}), run)


@pytest.mark.parametrize("name", sorted(TARGETS))
async def test_the_clean_values_make_a_plan(name: str) -> None:
    definition = CATALOG.get(name)
    assert definition is not None
    made = await plan_for(definition, INVENTORY, PROPOSED, TARGETS[name])
    assert isinstance(made, Plan), made


@pytest.mark.parametrize("value", VALUES)
async def test_every_parameter_of_every_shipped_action_refuses_or_carries_it_verbatim(value: str) -> None:
    """Also as text where a number belongs: nothing is converted."""
    tried = 0
    for definition in CATALOG:
        clean = await plan_for(definition, INVENTORY, PROPOSED, TARGETS[definition.name])
        assert isinstance(clean, Plan)
        for parameter in definition.parameters.values():
            sources: dict[str, Any] = {
                "inventory": dict(INVENTORY), "proposal": dict(PROPOSED), "target": dict(TARGETS[definition.name])
            }  # fmt: skip
            service = "svc"
            if parameter.origin == "plan":
                if parameter.name != "service":
                    continue  # numbers and lists that we make ourselves
                service = value
            else:
                sources[parameter.origin][parameter.source_key] = value
            made = await plan_for(definition, sources["inventory"], sources["proposal"], sources["target"], service)
            tried += 1
            if isinstance(made, Declined):
                assert made.reason in (Refusal.BAD_PARAMETERS, Refusal.RESOLVE_FAILED), made
                assert "\n" not in made.detail
                continue
            assert value.isprintable()
            for argv, plain in zip(everything(made.steps[0]), everything(clean.steps[0]), strict=True):
                assert len(argv) == len(plain)
                for element, original in zip(argv, plain, strict=True):
                    # Either untouched, or the value stands whole where the clean value stood.
                    assert element == original or element.endswith(value), (definition.name, element)
                    assert element.partition("=")[0] == original.partition("=")[0]
    assert tried > 20


def everything(step: Step) -> list[tuple[str, ...]]:
    return [step.argv, step.check, step.undo]


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
    hostile = [v for values in HOSTILE.values() for v in values if v.isprintable()]
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
