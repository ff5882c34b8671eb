"""`packs lint` and `packs test`: each kind of fault with file, line and key; golden incidents that do not come out."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_rules_packs import CAUSE, GOOD, RULE, broken

from actions.catalog import load_catalog
from agent import golden
from agent.lint import LintFault, lint
from agent.packs import load_packs
from agent.sources.recorded import RecordingError
from rules.packs import PackSet

DOCS = Path(__file__).parents[2] / "docs"
ACTIONS = {d.name for d in load_catalog()} | {d.family for d in load_catalog()}
EXTRA = "mine.other"


def write(directory: Path, data: Any, name: str = "mine.yaml") -> Path:
    file = directory / name
    file.write_text(yaml.safe_dump(data, sort_keys=False))
    return file


def faults_of(directory: Path, data: Any) -> list[LintFault]:
    write(directory, data)
    return list(lint([directory], (), ACTIONS))


def twin() -> dict[str, Any]:
    data = copy.deepcopy(GOOD)
    data["causes"][EXTRA] = {**copy.deepcopy(GOOD["causes"]["mine.lagging"]), "title": "another", "kinds": ["http"]}
    return data


def with_rule(*when: dict[str, Any], service: str = "$s") -> dict[str, Any]:
    return broken(
        *RULE,
        value={
            **GOOD["rules"]["mine.lags"],
            "when": list(when),
            "then": {"support": "mine.lagging", "service": service},
        },
    )


def finding(**where: Any) -> dict[str, Any]:
    return {"match": "finding", "where": {"service": "$s", **where}}


def test_the_shipped_packs_are_in_order() -> None:
    assert lint((), (), ACTIONS) == ()


def test_a_sound_pack_is_in_order(tmp_path: Path) -> None:
    assert faults_of(tmp_path, GOOD) == []


NOTHING_AGAINST = [{"group": "lag", "states": {"strong": [0.9, 0.02]}}]


@pytest.mark.parametrize(
    ("data", "key", "reason"),
    [
        (broken("colour", value=1), "colour", "unknown key"),
        (broken("queries", "lag_seconds", value="max by ($service) (x{$scope}"), "queries.lag_seconds", "no PromQL"),
        (broken("queries", "lag_seconds", value="x{$scope} +"), "queries.lag_seconds", "no PromQL"),
        (broken("signals", "lag_seconds", "group", value="nowhere"), "signals.lag_seconds.group", "unknown group"),
        (broken(*CAUSE, "proposals", 0, "action", value="rm.rf"), "proposals.0.action", "unknown action rm.rf"),
        (broken(*CAUSE, "proposals", value=[]), "causes.mine.lagging", "proposes nothing"),
        (broken(*CAUSE, "no_remedy", value="none"), "causes.mine.lagging.no_remedy", "and proposes one"),
        (broken(*CAUSE, "evidence", value=NOTHING_AGAINST), "causes.mine.lagging.evidence", "nothing speaks against"),
        (twin(), f"causes.{EXTRA}.evidence", "copy of the evidence of mine.lagging"),
        (with_rule(finding(signal="lag_seconds", state="broken")), "when.0.where.state", "no state broken"),
        (with_rule(finding(signal="lag_seconds", state="silent")), "when.0.where.state", "never silent"),
        (with_rule(finding(signal="lag_seconds", harm="latr")), "when.0.where.harm", "no harm 'latr'"),
        (with_rule(finding(group="nothing", state="bad")), "when.0.where.group", "no signal is of group nothing"),
        (with_rule(finding(signal="lag_seconds", group="cpu")), "when.0.where.group", "no signal lag_seconds"),
        (with_rule(finding(group="lag", peer="$p")), "when.0.where.peer", "describes calls"),
        (
            with_rule({"match": "fact", "where": {"kind": "moon.phase", "service": "$s"}}),
            "when.0.where.kind",
            "nothing brings facts of kind moon.phase",
        ),
        (
            with_rule({"match": "fact", "where": {"kind": "host.process", "service": "$s", "cpu": {">": 9, "<": 3}}}),
            "when.0.where.cpu",
            "no number is",
        ),
        (with_rule({"match": "node", "where": {"service": "$s", "kind": "toaster"}}), "when.0.where.kind", "no node"),
        (
            with_rule(finding(group="lag"), {"match": "node", "where": {"service": "$s", "kind": "host"}}),
            "rules.mine.lags.then",
            "no cause of a host",
        ),
    ],
)  # fmt: skip
def test_each_fault_has_file_line_and_key(tmp_path: Path, data: Any, key: str, reason: str) -> None:
    found = faults_of(tmp_path, data)
    matching = [f for f in found if key in f.key and reason in f.reason]
    assert matching, found
    lines = (tmp_path / "mine.yaml").read_text().splitlines()
    for fault in matching:
        assert fault.file == str(tmp_path / "mine.yaml")
        last = [part for part in fault.key.split(".") if not part.isdigit()][-1]
        assert last in lines[fault.line - 1] or fault.key.count(".") < 2, (fault, lines[fault.line - 1])
        assert str(fault).startswith(f"{fault.file}:{fault.line}: ")


def test_faults_of_several_files_come_together(tmp_path: Path) -> None:
    write(tmp_path, broken("colour", value=1), "a.yaml")
    (tmp_path / "b.yaml").write_text("pack: [b\n")
    (tmp_path / "c.yaml").write_bytes(b"pack: \xff\n")
    found = lint([tmp_path], (), ACTIONS)
    assert found
    (tmp_path / "c.yaml").unlink()
    assert {Path(f.file).name for f in lint([tmp_path], (), ACTIONS)} == {"a.yaml", "b.yaml"}


def test_references_that_lead_nowhere_are_told_beside_faults_of_shape(tmp_path: Path) -> None:
    """One run: an unknown key, a value out of bounds, a reference to no group, no remedy and a query that is no PromQL,
    in one file; and in another one a reference to a signal whose own entry is broken, which is no fault of its own."""
    data = broken("colour", value=1)
    data["signals"]["lag_seconds"]["flor"] = 2
    data["groups"]["other"] = {"title": "other"}
    data["queries"]["lag_seconds"] = "max by ($service) (x{$scope}"
    data["causes"]["mine.lagging"]["proposals"] = []
    data["causes"]["mine.lagging"]["prior"] = 2
    data["causes"]["mine.lagging"]["evidence"].append({"group": "nowhere", "states": {"strong": [0.5, 0.6]}})
    write(tmp_path, data, "a.yaml")
    rule = {**GOOD["rules"]["mine.lags"], "then": {"support": "mine.lagging", "service": "$s"}}
    more = {"pack": "more", "version": 1, "rules": {"more.lags": rule}}
    write(tmp_path, more, "b.yaml")
    assert {(Path(f.file).name, f.key) for f in lint([tmp_path], (), ACTIONS)} == {
        ("a.yaml", "colour"),
        ("a.yaml", "queries.lag_seconds"),
        ("a.yaml", "signals.lag_seconds.flor"),
        ("a.yaml", "causes.mine.lagging"),
        ("a.yaml", "causes.mine.lagging.prior"),
        ("a.yaml", "causes.mine.lagging.evidence.1.group"),
    }


def test_every_complete_pack_of_the_documentation_is_in_order(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (DOCS / "packs.md").read_text("utf-8"), re.DOTALL)
    packs = [block for block in blocks if "pack" in yaml.safe_load(block)]
    assert packs
    for i, block in enumerate(packs):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "pack.yaml").write_text(block)
        assert lint([tmp_path / str(i)], (), ACTIONS) == ()


class TestGolden:
    def test_the_shipped_ones_come_out_as_expected(self) -> None:
        outcomes = golden.judge_all([golden.shipped()], load_packs())
        assert len(outcomes) >= 9
        assert [o for o in outcomes if o.fault] == []

    def test_they_are_licensed_and_hold_no_answer(self) -> None:
        where = golden.shipped()
        told = (where / "ATTRIBUTION.md").read_text("utf-8")
        for directory in golden.find([where]):
            assert not (directory / "truth.json").exists()
            assert directory.name.split("-")[0] in told
        assert not list(where.glob("*sock*"))

    @pytest.mark.parametrize(
        ("expected", "said"),
        [
            ({"verdict": "insufficient_evidence"}, "expected insufficient_evidence, got ranked"),
            ({"verdict": "ranked", "ranking": [{"service": "frontend"}]}, "expected anything on frontend in place 1"),
            (
                {"verdict": "ranked", "ranking": [{"service": "cartservice", "fault": "memory"}]},
                "expected memory on cartservice in place 1, got service.cpu_exhausted on cartservice",
            ),
            ({"verdict": "ranked", "ranking": []}, "at least a first place"),
            ({"verdict": "maybe"}, "Invalid enum value"),
            ({"verdict": "ranked", "rank": []}, "unknown field"),
        ],
    )
    def test_what_differs_is_said(self, tmp_path: Path, packs: PackSet, expected: dict[str, Any], said: str) -> None:
        shutil.copytree(golden.shipped() / "onlineboutique-cpu", tmp_path / "mine")
        (tmp_path / "mine" / "expected.json").write_text(json.dumps(expected))
        (outcome,) = golden.judge_all([tmp_path], packs)
        assert said in outcome.fault

    def test_a_broken_recording_is_a_fault_of_its_own(self, tmp_path: Path, packs: PackSet) -> None:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "expected.json").write_text('{"verdict": "insufficient_evidence"}')
        (outcome,) = golden.judge_all([tmp_path], packs)
        assert "alert.json" in outcome.fault
        with pytest.raises(RecordingError):
            golden.read(tmp_path / "mine")
