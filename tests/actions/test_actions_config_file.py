"""One place of a configuration file is changed whole or not at all, whatever an earlier run left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from actions.builtin.config_file import digest, read, replace
from actions.builtin.program import Refused


def test_what_a_killed_run_left_stops_no_later_one(tmp_path: Path) -> None:
    conf, left = tmp_path / "server.conf", tmp_path / ".server.conf.alertmedic"
    conf.write_text("backlog 511\n")
    conf.chmod(0o640)
    left.write_text("half of a fi")
    replace(str(conf), "backlog 2048\n", digest(read(str(conf))))
    assert (conf.read_text(), conf.stat().st_mode & 0o777, left.exists()) == ("backlog 2048\n", 0o640, False)


def test_a_link_in_its_place_is_removed_and_never_written_through(tmp_path: Path) -> None:
    conf, victim = tmp_path / "server.conf", tmp_path / "victim"
    conf.write_text("a\n")
    victim.write_text("untouched\n")
    (tmp_path / ".server.conf.alertmedic").symlink_to(victim)
    replace(str(conf), "b\n", digest("a\n"))
    assert (conf.read_text(), victim.read_text()) == ("b\n", "untouched\n")


def test_a_file_that_was_changed_meanwhile_stays(tmp_path: Path) -> None:
    conf = tmp_path / "server.conf"
    conf.write_text("somebody's edit\n")
    with pytest.raises(Refused, match="changed since"):
        replace(str(conf), "ours\n", digest("before\n"))
    assert conf.read_text() == "somebody's edit\n"
