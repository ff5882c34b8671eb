"""Fixtures of the sandbox's tests: what holds a run here, and looking at what a run left behind."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sandbox_traces import HERE, TABLE, UNHELD

import sandbox
from sandbox import direct
from sandbox.cgroup import Leaf


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests of real limits run where there are some: here, or inside tools/cgroup-vm (test_sandbox_vm.py)."""
    if item.get_closest_marker("cgroup") is None or HERE.enforced_by.limits_enforced:
        return
    if os.environ.get("CGROUP_VM"):
        pytest.fail(f"inside the machine limits must be enforced: {HERE.reason}")
    pytest.skip("no enforced limits on this host: test_sandbox_vm.py runs this inside tools/cgroup-vm")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What contained each attack."""
    for attack, mode, by, layers in TABLE:
        terminalreporter.write_line(f"contained  {attack:62}  {mode:13}  by {by}  [{layers}]")


@pytest.fixture(autouse=True)
def held() -> Iterator[sandbox.Capability]:
    """What this host can do, whatever a test before has set."""
    sandbox.use(HERE)
    yield HERE
    sandbox.use(HERE)


@pytest.fixture(params=["native", "shell", "rlimits"])
def each_mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> sandbox.Capability:
    """The test runs with what this host offers, with that where programs are started by the shell script, and with
    nothing but rlimits."""
    capability = UNHELD if request.param == "rlimits" else HERE
    if request.param == "shell":
        monkeypatch.setattr(direct, "unavailable", lambda: "the test took it away")
    sandbox.use(capability)
    return capability


@pytest.fixture
def rlimits_only() -> sandbox.Capability:
    sandbox.use(UNHELD)
    return UNHELD


@pytest.fixture
def node() -> Path:
    """The cgroup that holds the leaves; skips on hosts without any cgroup v2 tree."""
    if HERE.root is None:
        pytest.skip(f"no cgroup v2 tree: {HERE.reason}")
    return HERE.root


@pytest.fixture
def new_leaf(node: Path) -> Iterator[Callable[[str], Leaf]]:
    """Leaves made by a test itself, as if by an agent that has crashed; removed whatever the test did."""
    made: list[Leaf] = []

    def make(name: str) -> Leaf:
        made.append(Leaf.create(node, name))
        return made[-1]

    yield make
    for leaf in made:
        if leaf.path.exists():
            leaf.kill(5.0)
            leaf.remove()
