"""Scenarios: what is broken when, what must be seen of it from outside, and what would be the right thing to do.

Read by `agent.chaos.run` and by tests from YAML files (`scenarios/*.yaml` are the shipped ones), strictly: every fault
of a file is reported with its line and key. A scenario is a timeline:

    scenarios:
      db_lock:
        title: somebody at a prompt holds a lock and goes to lunch
        kind: lock
        healed_by: action
        truth: {service: postgres, causes: [postgres.blocking_session], actions: [postgres.terminate_blockers]}
        alerts: [ShopCheckoutDegraded]
        timeline:
          - {at: 0, inject: db_lock}
          - {between: [0, 20], expect: degraded}

Times are seconds after the first injection. `expect` is about the world, not about the agent: where it does not come
true the run proves nothing and is reported as void, never as a success. What the agent should have made of it is
`truth` and `healed_by`; the agent never sees a scenario.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from agent.strict import ConfigError, Document

HealedBy = Literal["action", "approval", "itself", "nobody", "nothing_wrong"]
Expectation = Literal["degraded", "alert", "fine", "no_alert"]
Name = Annotated[str, msgspec.Meta(pattern=r"\A[a-z][a-z0-9_]{0,63}\Z")]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=600)]
SHIPPED = Path(__file__).parent / "scenarios"
MAX_FILE_BYTES = 1024 * 1024


class Truth(msgspec.Struct, frozen=True, kw_only=True):
    """What is really wrong. `causes` are the cause ids that name it rightly (packs differ in how fine they are),
    `actions` those that put it right; at `service`, or at one of `at` where a cause may be told at another place."""

    service: str = ""
    at: tuple[str, ...] = ()
    causes: tuple[str, ...] = ()
    actions: tuple[str, ...] = ()

    def names(self, cause: str, service: str) -> bool:
        return cause in self.causes and service in (self.service, *self.at)

    def allows(self, action: str, service: str) -> bool:
        return action in self.actions and service in (self.service, *self.at)


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something done at a time, or something that has to be seen between two."""

    at: Seconds | None = None
    inject: Name | None = None
    clear: Name | None = None
    settings: Mapping[Name, float] = {}
    between: tuple[Seconds, ...] = ()
    expect: Expectation | None = None


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that can go wrong (or seem to). `quick` scenarios are in the short run."""

    title: str
    kind: Name
    healed_by: HealedBy
    truth: Truth = Truth()
    alerts: tuple[str, ...] = ()
    innocent: tuple[str, ...] = ()  # probes that must stay good throughout: what suffers of them is collateral damage
    quick: bool = False
    exclusive: bool = False  # it burns the machine's CPU, memory or disks: no other world may run beside it
    timeline: tuple[Event, ...]
    name: str = ""

    @property
    def control(self) -> bool:
        """Whether every action would be needless."""
        return self.healed_by in ("itself", "nothing_wrong")

    @property
    def faults(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(e.inject for e in self.timeline if e.inject is not None))

    @property
    def sets_clock(self) -> bool:
        """Whether its world has to run a program under libfaketime."""
        return "clock_skew" in self.faults


class _File(msgspec.Struct, frozen=True, kw_only=True):
    scenarios: Mapping[Name, Scenario]


class ScenarioError(ConfigError):
    """A scenario file is not usable. `faults` holds all of its faults, each with file, line and key."""


def load_scenarios(
    files: tuple[Path, ...] | None = None, known_faults: frozenset[str] | None = None
) -> dict[str, Scenario]:
    """Scenarios by name, in the order of the files. `known_faults`: what can be injected; unknown names are faults of
    the file. Raises ScenarioError, OSError."""
    found: dict[str, Scenario] = {}
    for file in sorted(SHIPPED.glob("*.yaml")) if files is None else files:
        for name, scenario in _load(file, known_faults).items():
            if name in found:
                document = Document(str(file), file.parent)
                document.fault(f"scenarios.{name}", "there is a scenario of this name in another file")
                raise ScenarioError(tuple(document.faults))
            found[name] = scenario
    return found


def _load(file: Path, known_faults: frozenset[str] | None) -> dict[str, Scenario]:
    document = Document(str(file), file.parent)
    body = file.read_bytes()
    if len(body) > MAX_FILE_BYTES:
        raise OSError(f"scenarios: {file} has {len(body)} bytes, at most {MAX_FILE_BYTES} are read")
    document.read(body)
    built = document.build(_File)
    if built is not None:
        for name, scenario in built.scenarios.items():
            for key, what in _problems(scenario, known_faults):
                document.fault(f"scenarios.{name}.{key}" if key else f"scenarios.{name}", what)
    if document.faults or built is None:
        raise ScenarioError(tuple(document.faults))
    return {name: msgspec.structs.replace(scenario, name=name) for name, scenario in built.scenarios.items()}


def _problems(scenario: Scenario, known_faults: frozenset[str] | None) -> list[tuple[str, str]]:
    """What is wrong with a scenario beyond its types, with the key where it is."""
    found: list[tuple[str, str]] = []
    if scenario.healed_by in ("action", "approval") and not scenario.truth.actions:
        found.append(("truth.actions", f"healed by {scenario.healed_by}, and no action is named"))
    if scenario.healed_by != "nothing_wrong" and not scenario.control and not scenario.truth.causes:
        found.append(("truth.causes", "no cause is named"))
    injected = {e.inject for e in scenario.timeline if e.inject is not None}
    if scenario.healed_by != "nothing_wrong" and not injected:
        found.append(("timeline", "nothing is injected"))
    for number, event in enumerate(scenario.timeline):
        found += [(f"timeline[{number}]", problem) for problem in _event_problems(event, injected, known_faults)]
    return found


def _event_problems(event: Event, injected: set[str], known_faults: frozenset[str] | None) -> list[str]:
    found: list[str] = []
    done = [name for name in (event.inject, event.clear) if name is not None]
    if len(done) + (event.expect is not None) != 1:
        return ["needs exactly one of inject, clear and expect"]
    if event.expect is None and (event.at is None or event.between):
        found.append(f"{'inject' if event.inject else 'clear'} needs `at`, and no `between`")
    if event.expect is not None and (event.at is not None or len(event.between) != 2):
        found.append("expect needs `between: [from, to]`, and no `at`")
    if len(event.between) == 2 and event.between[0] > event.between[1]:
        found.append("between begins after it ends")
    if event.clear is not None and event.clear not in injected:
        found.append(f"{event.clear} is cleared and never injected")
    if event.settings and event.inject is None:
        found.append("settings belong to inject")
    if known_faults is not None and event.inject is not None and event.inject not in known_faults:
        found.append(f"no such fault: {event.inject}; there are {', '.join(sorted(known_faults))}")
    return found
