"""Every attack of containment_attacks.py against a real agent's sandbox under real limits, its health asked throughout.

Contained means: the attack says that it was refused (or its victim is whole), nothing of it is left, the agent is the
same process as before, and no health request failed. `make test` takes a seeded handful, `make test-full` all.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from containment_attacks import ATTACKS, MODES, PRELUDE, Attack, World
from containment_world import Agent, Prober
from sandbox_traces import TABLE, remains

pytestmark = [
    pytest.mark.cgroup,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to start attacks as root and as others"),
]
QUICK = 7
quick = {a.name for a in random.Random(os.environ.get("SEED", "1")).sample(ATTACKS, QUICK)}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory that everybody may write to, with a victim that nobody may."""
    path = Path("/var/tmp", f"containment-{os.getpid()}")  # reachable for nobody, whoever the tests run as
    (path / "victim").mkdir(parents=True)
    (path / "victim" / "precious").write_text("still here")
    path.chmod(0o1777)
    shutil.copy("/usr/bin/test", path / "suid-test")
    (path / "suid-test").chmod(0o4755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    running = Agent(tmp_path_factory.mktemp("agent"))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def prober(agent: Agent) -> Iterator[Prober]:
    asking = Prober(agent.address)
    asking.start()
    yield asking
    asking.stop()
    assert asking.failures == []


@pytest.fixture(scope="module")
def interpreter() -> str:
    """A Python that user nobody can run."""
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    for path in ("/usr/bin/python3", "/usr/local/bin/python3"):
        if Path(path).exists() and subprocess.run([*nobody, path, "-c", ""], capture_output=True).returncode == 0:
            return path
    pytest.skip("no Python that user nobody can run (Debian: apt-get install python3)")


def _marked(attack: Attack) -> Any:
    return pytest.param(attack, id=attack.name, marks=[] if attack.name in quick else [pytest.mark.full])


@pytest.mark.parametrize("attack", [_marked(a) for a in ATTACKS])
def test_contained(attack: Attack, agent: Agent, prober: Prober, scratch: Path, interpreter: str) -> None:
    if attack.script.startswith("sh:"):
        argv = ["/bin/sh", "-c", attack.script.removeprefix("sh:"), "sh", scratch.name]
    else:
        argv = [interpreter, "-I", "-S", "-c", PRELUDE + attack.script, str(agent.pid), str(agent.port), str(scratch)]
    request = {"argv": argv, "limits": msgspec.to_builtins(attack.limits), "secrets": attack.secrets}
    memory = agent.memory_bytes()
    result = agent.attack({**request, **MODES[attack.mode]})
    prober.one_more()
    assert result.error == "", result
    said = result.stdout.splitlines()
    assert not (missing := [line for line in attack.refused if line not in said]), (missing, result)
    attack.check(result, World(scratch, memory, agent.memory_bytes()))
    assert not remains(result.leaf)
    assert not _left(scratch.name)
    assert agent.process.poll() is None
    assert prober.failures == []
    TABLE.append((attack.name, attack.mode, attack.by, ", ".join(result.layers)))


CONTROLS = [
    "new namespaces",
    "kernel keyring",
    "making a device",
    "raising its own limits",
    "memory of the agent by /proc/PID/mem",
    "memory of the agent by process_vm_readv",
    "environment of the agent",
    "set-user-ID program",
    "typing into a terminal (TIOCSTI)",
    "bpf, perf, userfaultfd, io_uring",
    "network that was not declared",
]


@pytest.mark.full
@pytest.mark.parametrize("name", CONTROLS)
def test_without_the_sandbox_it_would_have_worked(name: str, agent: Agent, scratch: Path, interpreter: str) -> None:
    """The same program, started as any other: not all of it is refused. So it is the sandbox that refuses."""
    (attack,) = (a for a in ATTACKS if a.name == name)
    argv = [interpreter, "-I", "-S", "-c", PRELUDE + attack.script, str(agent.pid), str(agent.port), str(scratch)]
    if MODES[attack.mode].get("user"):
        argv = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *argv]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, cwd=scratch)
    said = done.stdout.splitlines()
    assert done.returncode == 0, done
    assert [line for line in attack.refused if line not in said], done


def _left(marker: str) -> list[str]:
    """Processes of an attack that are still alive: all of them carry the scratch directory in their command line, but
    for those that a daemon has become."""
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        try:
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # gone meanwhile
        if marker in line or "sleep 1001" in line or "sleep 1002" in line:
            found.append(line)
    return found
