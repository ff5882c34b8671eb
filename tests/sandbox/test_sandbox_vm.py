"""Runs the tests of real limits inside user-mode-linux, in one boot, where this host cannot enforce limits itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from sandbox_traces import HERE

ROOT = Path(__file__).parents[2]


def missing() -> str:
    """Why the machine cannot be had here, and what to do about it."""
    if os.geteuid() != 0:
        return "needs root to boot tools/cgroup-vm"
    absent = [p for p in ("linux.uml", "unshare", "setpriv", "perl", "stty") if not shutil.which(p)]
    return f"{', '.join(absent)} not found: apt-get install user-mode-linux util-linux perl-base" if absent else ""


@pytest.mark.skipif(bool(os.environ.get("CGROUP_VM")), reason="inside the machine already")
@pytest.mark.skipif(HERE.enforced_by.limits_enforced, reason="this host enforces limits: the tests run here")
@pytest.mark.parametrize(
    ("which", "least"),
    [("cgroup and not full", 22), pytest.param("cgroup and full", 25, marks=pytest.mark.full)],
    ids=["part", "rest"],
)
def test_limits_hold_inside_user_mode_linux(which: str, least: int, tmp_path: Path) -> None:
    if why := missing():
        if os.environ.get("CI") == "true":
            pytest.fail(why)
        pytest.skip(why)
    report = tmp_path / "report.xml"
    tests = ["-m", "pytest", "-m", which, "tests/sandbox", f"--junitxml={report}", "-p", "no:cacheprovider"]
    command = [str(ROOT / "tools/cgroup-vm"), "--timeout", "300", "--rw", str(tmp_path), "--", sys.executable, *tests]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=400)
    output = f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
    assert done.returncode == 0, output
    suite = ET.parse(report).getroot()[0]
    ran = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    assert ran["tests"] - ran["skipped"] >= least, output
    print(*(line for line in done.stdout.splitlines() if line.startswith("contained")), sep="\n")
    assert ran["failures"] == ran["errors"] == 0, output
    skipped = [case.attrib["name"] for case in suite if case.find("skipped") is not None]
    assert set(skipped) <= {"test_an_unprivileged_agent_in_a_tree_chowned_to_it"}, output
