"""Scenario files: the shipped ones are sound and wide enough; every mistake is named with its line and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.chaos.arms import COMMANDS
from agent.chaos.faults import FAULTS, known
from agent.chaos.scenario import ScenarioError, load_scenarios
from agent.chaos.world import HARNESS_FAULTS, symptom_rules
from agent.demo.settings import ALERT

ALL = known() | HARNESS_FAULTS


def test_the_shipped_scenarios_are_many_and_of_many_kinds() -> None:
    scenarios = load_scenarios(None, ALL)
    broken = [s for s in scenarios.values() if not s.control]
    assert len(broken) >= 20
    assert len({s.kind for s in broken}) >= 12
    assert sum(s.control for s in scenarios.values()) >= 5
    assert {s.healed_by for s in scenarios.values()} >= {"action", "approval", "nobody", "itself", "nothing_wrong"}
    assert [s for s in scenarios.values() if s.quick]


def test_every_symptom_alert_has_a_command_in_the_command_arm() -> None:
    assert set(COMMANDS) == {ALERT, *(rule["alert"] for rule in symptom_rules())}


def test_no_fault_is_shipped_that_no_scenario_uses() -> None:
    used = {name for s in load_scenarios(None, ALL).values() for name in s.faults}
    assert set(FAULTS) - used <= {"front_crash", "front_stuck", "db_refused"}  # for users' own scenarios


GOOD = """
scenarios:
  lock:
    title: a lock
    kind: lock
    healed_by: action
    truth: {service: postgres, causes: [postgres.blocking_session], actions: [postgres.terminate_blockers]}
    timeline:
      - {at: 0, inject: db_lock}
      - {between: [0, 20], expect: degraded}
"""

MISTAKES = {
    "unknown key": ("    title: a lock", "    titel: a lock", "titel"),
    "unknown fault": ("inject: db_lock", "inject: earthquake", "no such fault: earthquake"),
    "unknown expectation": ("expect: degraded", "expect: rain", "scenarios.lock.timeline[1].expect"),
    "no cause": ("causes: [postgres.blocking_session], ", "", "truth.causes"),
    "no action": (", actions: [postgres.terminate_blockers]", "", "truth.actions"),
    "two things in one event": ("{at: 0, inject: db_lock}", "{at: 0, inject: db_lock, clear: db_lock}", "exactly one"),
    "inject without a time": ("{at: 0, inject: db_lock}", "{inject: db_lock}", "needs `at`"),
    "expect without an interval": ("{between: [0, 20], expect: degraded}", "{at: 3, expect: degraded}", "between"),
    "interval backwards": ("[0, 20]", "[20, 0]", "begins after it ends"),
    "cleared, never injected": ("{between: [0, 20], expect: degraded}", "{at: 9, clear: cpu_hog}", "never injected"),
    "negative time": ("{at: 0, inject", "{at: -1, inject", "scenarios.lock.timeline[0].at"),
    "healed by magic": ("healed_by: action", "healed_by: magic", "healed_by"),
    "not YAML": ("    kind: lock", "    kind: [lock", "YAML"),
    "nothing injected": ("      - {at: 0, inject: db_lock}\n", "", "nothing is injected"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_with_file_and_line(mistake: str, tmp_path: Path) -> None:
    good, bad, word = MISTAKES[mistake]
    assert good in GOOD
    file = tmp_path / "mine.yaml"
    file.write_text(GOOD.replace(good, bad))
    with pytest.raises(ScenarioError) as caught:
        load_scenarios((file,), ALL)
    assert any(word in str(fault) and fault.line > 0 and fault.file == str(file) for fault in caught.value.faults)


def test_two_files_cannot_define_one_scenario(tmp_path: Path) -> None:
    for name in ("one.yaml", "two.yaml"):
        (tmp_path / name).write_text(GOOD)
    with pytest.raises(ScenarioError, match="another file"):
        load_scenarios((tmp_path / "one.yaml", tmp_path / "two.yaml"), ALL)
