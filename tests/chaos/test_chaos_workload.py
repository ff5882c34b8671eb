"""A workload of the user's own: its file, its commands, and what a killed harness leaves behind."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import aiohttp
import pytest

from agent.chaos.scenario import ScenarioError
from agent.chaos.workload import CommandFault, ProbeAt, UserWorkload, WorkloadFile, load_workload
from agent.demo.children import WorldError

GOOD = """
workload:
  probe: {url: "http://127.0.0.1:1/", good_seconds: 0.5}
  prometheus: http://127.0.0.1:2
  agent: http://127.0.0.1:3
  faults:
    gone: {inject: [rm, thing], clear: [touch, thing]}
"""
MISTAKES = {
    "no faults": ("  faults:\n    gone: {inject: [rm, thing], clear: [touch, thing]}\n", "", "faults"),
    "no way back": (", clear: [touch, thing]", "", "clear"),
    "nothing to run": ("inject: [rm, thing]", "inject: []", "argument list"),
    "a shell line": ("inject: [rm, thing]", 'inject: "rm thing"', "inject"),
    "no address": ('"http://127.0.0.1:1/"', '"shop"', "probe.url"),
    "body that is no JSON": ("good_seconds: 0.5}", 'good_seconds: 0.5, body: "{"}', "no JSON"),
    "patience of zero": ("good_seconds: 0.5", "good_seconds: 0", "good_seconds"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_with_its_line(mistake: str, tmp_path: Path) -> None:
    good, bad, word = MISTAKES[mistake]
    assert good in GOOD
    file = tmp_path / "mine.yaml"
    file.write_text(GOOD.replace(good, bad))
    with pytest.raises(ScenarioError) as caught:
        load_workload(file)
    assert any(word in str(fault) for fault in caught.value.faults)


def workload(tmp_path: Path, session: aiohttp.ClientSession, **faults: CommandFault) -> UserWorkload:
    url = "http://127.0.0.1:1/"
    told = WorkloadFile(probe=ProbeAt(url=url), prometheus=url, agent=url, faults=faults)
    return UserWorkload(told, session, tmp_path / "active.json")


def touching(path: Path) -> tuple[str, ...]:
    return (sys.executable, "-c", "import pathlib, sys; pathlib.Path(sys.argv[1]).touch()", str(path))


async def test_commands_get_their_arguments_as_they_stand(tmp_path: Path) -> None:
    odd = tmp_path / "a $(touch pwned); b"
    async with aiohttp.ClientSession() as session:
        mine = workload(tmp_path, session, odd=CommandFault(inject=touching(odd), clear=("rm", "-f", "--", str(odd))))
        await mine.inject("odd", {})
        assert odd.exists()
        await mine.clear("odd")
    assert {p.name for p in tmp_path.iterdir()} == {"active.json"}


async def test_what_was_injected_is_written_down_first_and_cleared_by_the_next_run(tmp_path: Path) -> None:
    mark, active = tmp_path / "mended", tmp_path / "active.json"
    look = (sys.executable, "-c", "import json, sys; sys.exit(json.load(open(sys.argv[1])) != ['broken'])", str(active))
    async with aiohttp.ClientSession() as session:
        killed = workload(tmp_path, session, broken=CommandFault(inject=look, clear=touching(mark)))
        await killed.inject("broken", {})  # the command itself saw its name in the file
        assert not mark.exists()
        after = workload(tmp_path, session, broken=CommandFault(inject=look, clear=touching(mark)))
        await after.clear_left_behind()
    assert mark.exists()
    assert json.loads(active.read_text()) == []


async def test_a_command_that_fails_says_what_it_said_and_keeps_the_others_from_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "mended"
    wrong = (sys.executable, "-c", "import sys; sys.exit('no such thing')")
    async with aiohttp.ClientSession() as session:
        mine = workload(
            tmp_path,
            session,
            good=CommandFault(inject=("true",), clear=touching(mark)),
            bad=CommandFault(inject=("true",), clear=wrong),
        )
        await mine.inject("good", {})
        await mine.inject("bad", {})
        with pytest.raises(WorldError, match="no such thing"):
            await mine.clear_left_behind()
        assert mark.exists()
        with pytest.raises(WorldError, match="no such fault"):
            await mine.inject("unheard", {})
        absent = workload(tmp_path, session, x=CommandFault(inject=("/no/such/program",), clear=("true",)))
        with pytest.raises(WorldError, match="cannot be started"):
            await absent.inject("x", {})
