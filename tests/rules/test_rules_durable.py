"""durable-rules in its child process: equal to the built-in matcher on everything, and its death survived."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rules_world import FAULTS, golden
from test_rules_engine import RECORDS, RULES

from agent import engines
from agent.engines import EngineError, engine_of, matched
from agent.engines import durable as durable_engine
from rules.diagnose import conclude, diagnose, observe
from rules.engine import Fired, Matcher, Record, records_of
from rules.packs import Outcome, PackSet, Pattern, Rule


@pytest.fixture(scope="module")
def installed() -> None:
    """Skips where durable-rules could not be built, unless CI says that everything must be there."""
    import importlib.util

    if importlib.util.find_spec("durable") is None:
        message = "durable-rules is not installed: requirements-durable.lock (gcc, python3-dev, Python 3.12 or older)"
        if os.environ.get("CI") == "true" and sys.version_info < (3, 13):
            pytest.fail(message)
        pytest.skip(message)


@pytest.fixture(scope="module")
def shipped(installed: None) -> Iterator[durable_engine.Durable]:
    from agent.packs import load_packs

    engine = durable_engine.Durable(load_packs().rules)
    yield engine
    engine.close()


def equal(rules: dict[str, Rule], situations: list[dict[str, list[Record]]]) -> None:
    engine, matcher = durable_engine.Durable(rules), Matcher(rules)
    try:
        for records in situations:
            assert set(engine.match(records)) == set(matcher.match(records))
    finally:
        engine.close()


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(rules=st.lists(RULES, min_size=1, max_size=5), situations=st.lists(RECORDS, min_size=1, max_size=6))
def test_it_equals_the_built_in_matcher(
    installed: None, rules: list[Rule], situations: list[dict[str, list[Record]]]
) -> None:
    equal({f"r{i}": rule for i, rule in enumerate(rules)}, situations)


@pytest.mark.full
@settings(max_examples=1500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(rules=st.lists(RULES, min_size=1, max_size=8), situations=st.lists(RECORDS, min_size=1, max_size=10))
def test_it_equals_the_built_in_matcher_at_full_volume(
    installed: None, rules: list[Rule], situations: list[dict[str, list[Record]]]
) -> None:
    equal({f"r{i}": rule for i, rule in enumerate(rules)}, situations)


@pytest.mark.parametrize("fault", FAULTS)
def test_it_diagnoses_alike(shipped: durable_engine.Durable, packs: PackSet, fault: str) -> None:
    situation = golden(fault)
    observer = observe(situation, packs)
    records = records_of(observer.graph, observer.findings, observer.facts())
    assert shipped.match(records) == Matcher(packs.rules).match(records)
    assert conclude(matched(observer, shipped)) == diagnose(situation, packs)


def test_recordings_are_diagnosed_and_evaluated_by_it(
    shipped: durable_engine.Durable, packs: PackSet, tmp_path: Path
) -> None:
    from agent import evaluate
    from agent.crossval import cross_validate
    from agent.engines import diagnosed
    from agent.golden import shipped as golden_incidents
    from agent.sources.recorded import read_recording

    asked = []

    class Watched:
        def match(self, records: Mapping[str, Sequence[Record]]) -> tuple[Fired, ...]:
            asked.append(records)
            return shipped.match(records)

        def close(self) -> None: ...

    cases = [path.parent for path in sorted(golden_incidents().glob("*/alert.json"))][:4]
    for n, case in enumerate(cases, 1):
        situation = read_recording(case)
        assert diagnosed(situation, packs, engine=Watched()) == diagnose(situation, packs)
        assert len(asked) == n
    for case in cases[:2]:
        shutil.copytree(case, tmp_path / case.name)
        truth = {"service": "orders", "fault": "latency", "metrics": [], "extra": {}}
        (tmp_path / case.name / "truth.json").write_text(json.dumps(truth))
    evaluated = evaluate.find_cases([tmp_path])
    by_both = [[s.ranking for s in evaluate.evaluate(evaluated, packs, engine=engine)] for engine in (Watched(), None)]
    assert by_both[0] == by_both[1]
    crossed = [
        cross_validate(evaluated, packs, engine=engine)["service"]["calibration"] for engine in (Watched(), None)
    ]
    assert crossed[0] == crossed[1]
    assert len(asked) == len(cases) + 2 * len(evaluated)
    engine = Watched()
    engine.match = _failing  # type: ignore[method-assign]
    without = diagnosed(read_recording(cases[0]), packs, engine=engine)
    assert "no answer" in without.missing["rules"]


def _failing(records: Mapping[str, Sequence[Record]]) -> tuple[Fired, ...]:
    raise EngineError("no answer")


def test_the_commands_run_the_configured_engine(installed: None, tmp_path: Path) -> None:
    from agent.golden import shipped as golden_incidents

    case = next(path.parent for path in sorted(golden_incidents().glob("*/alert.json")))
    answers = []
    for engine in ("builtin", "durable"):
        environment = {**os.environ, "ALERTMEDIC_PACKS__ENGINE": engine}
        command = [sys.executable, "-m", "agent", "diagnose", str(case), "--json"]
        done = subprocess.run(command, env=environment, capture_output=True, timeout=60, check=True)
        answers.append(done.stdout)
    assert answers[0] == answers[1]


def test_golden_incidents_are_judged_by_the_engine(shipped: durable_engine.Durable, packs: PackSet) -> None:
    from agent import golden as golden_incidents

    directory = golden_incidents.find([golden_incidents.shipped()])[0]
    incident = golden_incidents.read(directory)
    assert golden_incidents.judge(incident, packs, shipped).fault == ""
    silent = SilentEngine()
    assert golden_incidents.judge(incident, packs, silent).fault == "the rules were not run: no answer"


class SilentEngine:
    def match(self, records: Mapping[str, Sequence[Record]]) -> tuple[Fired, ...]:
        raise EngineError("no answer")

    def close(self) -> None: ...


@pytest.mark.parametrize("engine", ["builtin", "durable"])
def test_packs_test_runs_the_configured_engine(installed: None, tmp_path: Path, engine: str) -> None:
    """Where the engine's child cannot be started, only the built-in engine passes."""
    code = (
        "import sys, pathlib; from agent.engines import durable; durable.CHILD = pathlib.Path(sys.argv.pop(1)); "
        "from agent.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    child, environment = tmp_path / "child.py", {**os.environ, "ALERTMEDIC_PACKS__ENGINE": engine}
    child.write_text("import sys; sys.exit(3)")
    passed = []
    for script in (durable_engine.CHILD, child):
        command = [sys.executable, "-c", code, str(script), "packs", "test", "--json"]
        done = subprocess.run(command, env=environment, capture_output=True, timeout=120, check=False)
        answer = json.loads(done.stdout)
        passed.append((done.returncode == 0, answer["ok"], all(g["passed"] for g in answer["golden"])))
    assert passed == [(True,) * 3, (engine == "builtin",) * 3]


PAIR = Rule(
    title="the same record at both places",
    when=(
        Pattern(match="finding", where={"a": "$u"}),
        Pattern(match="finding", where={"a": "$u", "b": "$v"}),
        Pattern(match="edge", where={"a": "$v", "b": "$v"}),
    ),
    then=Outcome(service="$v", support="c"),
)


def test_a_record_may_stand_at_several_places(installed: None) -> None:
    records: dict[str, list[Record]] = {
        "finding": [{"a": 1, "b": "x"}, {"a": True, "b": None}, {"a": "1", "b": "y"}],  # type: ignore[dict-item]
        "edge": [{"a": "x", "b": "x"}, {"a": "x", "b": "y"}, {"a": "y", "b": "y"}],
    }
    equal({"pair": PAIR}, [records, {}, records])


NASTY = ["", "a b", "$m", "m_0", '"', "\\", "\x00", "\ud7ff", "😀", "é" * 3000, "1e-07", "null", "{}", "sid"]


def test_no_text_from_outside_reaches_it(installed: None) -> None:
    """Values are tokens to it, whatever they are: strings that break its parser, numbers that it refuses."""
    values = [*NASTY, 1e-07, 1e308, -5e-324, 2**60, 2**60 + 1, 0, 1, 0.5]
    records: dict[str, list[Record]] = {
        "finding": [{"a": v, "b": "x"} for v in values],
        "edge": [{"a": "x", "b": "x"}],
    }
    equal({"pair": PAIR}, [records])


def test_many_rules_and_records(installed: None) -> None:
    """More patterns than one fact may have properties."""
    rules = {
        f"r{n}": Rule(
            title="t",
            when=(Pattern(match="finding", where={"a": {">=": n / 1000}, "b": "$v"}),),
            then=Outcome(service="$v", support="c"),
        )
        for n in range(600)
    }
    equal(rules, [{"finding": [{"a": 0.3, "b": f"s{n}"} for n in range(5)]}])


class TestItsDeath:
    def test_a_crash_is_missing_evidence_and_the_next_look_has_another_child(
        self, shipped: durable_engine.Durable, packs: PackSet
    ) -> None:
        situation = golden("worker_crashed")
        conclude(matched(observe(situation, packs), shipped))
        pid = shipped.pid
        assert pid is not None
        os.kill(pid, signal.SIGSEGV)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        shipped._child.poll = lambda: None  # type: ignore[union-attr, method-assign]  # it dies after we looked
        diagnosis = conclude(matched(observe(situation, packs), shipped))
        assert "durable-rules: its process was ended by signal" in diagnosis.missing["rules"]
        assert "rules (durable-rules" in diagnosis.sentence
        assert all(not h.rules for h in diagnosis.hypotheses)
        assert diagnosis.hypotheses[0].service == FAULTS["worker_crashed"][2]
        again = conclude(matched(observe(situation, packs), shipped))
        assert again == diagnose(situation, packs)
        assert shipped.pid not in (None, pid)

    @pytest.mark.parametrize(
        ("script", "said"),
        [
            ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "signal 11"),
            ("import sys; sys.exit(3)", "ended with 3"),
            ("import time; time.sleep(60)", "took more than 1 s"),
            ("import sys; sys.stdout.write('nonsense' * 9); sys.stdout.flush(); sys.stdin.read()", "answered nonsense"),
            (
                "import sys; sys.stdout.buffer.write(b'\\0\\0\\0\\2{}' * 9); sys.stdout.flush(); sys.stdin.read()",
                "an answer that is none",
            ),
        ],
    )
    def test_whatever_it_does_it_is_survived(
        self, installed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, said: str
    ) -> None:
        child = tmp_path / "child.py"
        child.write_text(script)
        child.chmod(child.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(durable_engine, "CHILD", child)
        engine = durable_engine.Durable({"pair": PAIR}, seconds=1.0)
        for _ in range(2):
            with pytest.raises(EngineError, match=said):
                engine.match({"finding": [{"a": 1, "b": "x"}]})
        engine.close()
        assert engine.pid is None

    def test_without_the_package_it_is_an_error_that_says_what_to_do(
        self, packs: PackSet, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert engine_of("builtin", packs) is None
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(EngineError, match=r"install alertmedic\[durable\].*or set packs.engine: builtin"):
            engine_of("durable", packs)

    def test_too_much_is_refused(self, installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(durable_engine, "MAX_FACTS", 3)
        engine = durable_engine.Durable({"pair": PAIR})
        with pytest.raises(EngineError, match="facts, at most 3"):
            engine.match({"finding": [{"a": n, "b": "x"} for n in range(4)]})
        assert engines.RULES == "rules"
        engine.close()
