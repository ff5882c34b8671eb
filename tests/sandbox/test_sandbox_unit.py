"""deploy/alertmedic.service, as far as it can be checked without systemd as the first process."""

from __future__ import annotations

import configparser
import subprocess
from collections.abc import Callable
from pathlib import Path

UNIT = Path(__file__).parents[2] / "deploy" / "alertmedic.service"


def test_systemd_takes_the_unit_without_a_word(program: Callable[..., str], tmp_path: Path) -> None:
    text = UNIT.read_text().replace("/usr/local/bin/alertmedic", "/bin/true")  # verify wants the program to be there
    (tmp_path / UNIT.name).write_text(text)
    command = [program("systemd-analyze", "systemd"), "verify", "--man=no", str(tmp_path / UNIT.name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    ours = [line for line in (done.stdout + done.stderr).splitlines() if UNIT.stem in line]
    assert (done.returncode, ours) == (0, []), done
    (tmp_path / UNIT.name).write_text(text.replace("Delegate=", "Delegat="))
    wrong = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "Delegat" in wrong.stderr, "a typing error would be found"


def test_the_unit_delegates_what_limits_need_and_forbids_nothing_that_steps_do() -> None:
    unit = configparser.ConfigParser(strict=True)
    unit.optionxform = str  # type: ignore[method-assign, assignment]
    unit.read_string(UNIT.read_text())
    service = unit["Service"]
    assert {"cpu", "memory", "pids"} <= set(service["Delegate"].split())
    assert service["User"] != "root"
    assert service["NoNewPrivileges"] == "yes"
    assert service["KillMode"] == "mixed", "the agent ends its steps itself, and what is left dies with it"
    # The namespace layer mounts and unshares; the direct start needs executable memory and clone3 into a cgroup.
    hindering = {"RestrictNamespaces", "MemoryDenyWriteExecute", "ProtectControlGroups", "ProtectKernelTunables"}
    assert not hindering & set(service)
