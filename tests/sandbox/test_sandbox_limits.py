"""Limits that the kernel enforces. Run on a cgroup v2 host, else inside tools/cgroup-vm by test_sandbox_vm.py."""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from sandbox_traces import HERE, alive, remains, until

import sandbox
from sandbox import EnforcedBy, Limits, cgroup, kill_leaf, leaf_name, run

pytestmark = pytest.mark.cgroup
MIB = 1 << 20
FULL = 100_000  # a whole CPU: these programs have other limits to meet
PYTHON = [sys.executable, "-I", "-S", "-c"]
HOG = "b = []\nwhile True:\n b.append(bytearray(1 << 20))"


def held_by_the_kernel(result: sandbox.RunResult) -> None:
    assert result.enforced_by is EnforcedBy.CGROUP2
    assert result.error == ""
    assert not remains(result.leaf)


async def test_memory_limit_kills_and_says_so() -> None:
    result = await run([*PYTHON, HOG], Limits(memory_bytes=32 * MIB, cpu_quota_us=FULL, timeout_seconds=120))
    held_by_the_kernel(result)
    assert result.oom_killed
    assert result.signal == 9
    assert not result.timed_out
    assert not result.ok
    assert result.memory_peak_bytes is not None
    assert 16 * MIB < result.memory_peak_bytes <= 32 * MIB


async def test_memory_limit_takes_the_whole_group() -> None:
    hog = "b = []\nwhile True:\n b.append(bytearray(1 << 20))"
    waiting = (
        "import subprocess, sys; subprocess.run([sys.executable, '-I', '-S', '-c', sys.argv[1]]); print('survived')"
    )
    result = await run([*PYTHON, waiting, hog], Limits(memory_bytes=64 * MIB, timeout_seconds=120))
    held_by_the_kernel(result)
    assert result.oom_killed
    assert result.signal == 9, "the innocent parent goes with the hog: half a job is worse than none"
    assert "survived" not in result.stdout


async def test_memory_within_the_limit_is_no_trouble() -> None:
    result = await run(
        [*PYTHON, "b = bytearray(20 << 20); print('fits')"],
        Limits(memory_bytes=96 * MIB, cpu_quota_us=FULL, timeout_seconds=60),
    )
    held_by_the_kernel(result)
    assert (result.stdout, result.oom_killed) == ("fits\n", False)
    assert result.memory_peak_bytes is not None
    assert 20 * MIB < result.memory_peak_bytes < 96 * MIB


async def test_an_agent_exempt_from_the_oom_killer_does_not_exempt_the_program() -> None:
    mine = Path("/proc/self/oom_score_adj")
    before = mine.read_text()
    try:
        mine.write_text("-1000")
    except PermissionError:
        pytest.skip("needs CAP_SYS_RESOURCE")
    try:
        result = await run([*PYTHON, HOG], Limits(memory_bytes=32 * MIB, cpu_quota_us=FULL, timeout_seconds=120))
    finally:
        mine.write_text(before)
    held_by_the_kernel(result)
    assert result.oom_killed


async def test_pids_limit_refuses_forks() -> None:
    script = """
import os, time
made = 0
try:
    while True:
        if os.fork() == 0:
            time.sleep(1000)
        made += 1
except BlockingIOError:
    print(made)
"""
    result = await run([*PYTHON, script], Limits(pids=7, cpu_quota_us=FULL, timeout_seconds=120))
    held_by_the_kernel(result)
    assert result.stdout == "6\n"
    assert result.pids_refused is not None
    assert result.pids_refused >= 1


async def test_fork_bomb_is_held_and_gone() -> None:
    leaf = leaf_name()
    refused = "while read -r _ refused < $0; do [ $refused = 0 ] || exit 7; done"  # all of it built into the shell
    # The shell that looks forks once, before anybody else can: it is not the one that is refused.
    bomb = ["/bin/sh", "-c", f"b() {{ b | b & }}; b & {refused}", f"{HERE.root}/{leaf}/pids.events"]
    result = await run(bomb, Limits(pids=20, cpu_quota_us=FULL, timeout_seconds=120), leaf=leaf)
    held_by_the_kernel(result)
    assert result.exit_code == 7
    assert result.pids_refused
    assert not remains(leaf)


async def test_cpu_limit_throttles() -> None:
    result = await run([*PYTHON, "while True: pass"], Limits(cpu_quota_us=20_000, timeout_seconds=5))
    held_by_the_kernel(result)
    assert result.timed_out
    assert result.cpu_seconds is not None
    assert result.cpu_seconds <= 5 * 0.20 * 1.25
    assert result.cpu_seconds > 0.2, "it did run"


async def test_double_forked_daemon_dies_with_the_leaf() -> None:
    script = """
import os, time
ready, tell = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        os.write(tell, b"x")
        for fd in (0, 1, 2):
            os.close(fd)
        os.execve("/bin/sleep", ["sleep", "1000"], {})
    os._exit(0)
os.read(ready, 1)
"""
    result = await run([*PYTHON, script], Limits(cpu_quota_us=FULL, timeout_seconds=60))
    held_by_the_kernel(result)
    assert result.exit_code == 0
    assert not alive(int(result.stdout))


@pytest.mark.parametrize("user", ["", "nobody"])
async def test_limits_are_in_place_at_the_first_instruction(user: str) -> None:
    leaf = leaf_name()
    files = ["memory.max", "memory.swap.max", "memory.oom.group", "pids.max", "cpu.max"]
    assert HERE.root is not None
    paths = [str(HERE.root / leaf / f) for f in files]
    limits = Limits(memory_bytes=64 * MIB, pids=5, cpu_quota_us=30_000, cpu_period_us=50_000, timeout_seconds=60)
    result = await run(["grep", "-s", "", "/proc/self/cgroup", *paths], limits, leaf=leaf, user=user)
    held_by_the_kernel(result)
    seen = {name.rpartition("/")[2]: value for name, _, value in (s.partition(":") for s in result.stdout.splitlines())}
    assert seen.pop("cgroup").endswith(f"/alertmedic/{leaf}")
    if "memory.swap.max" in seen:  # a kernel without swap has none
        assert seen.pop("memory.swap.max") == "0"
    assert seen == {"memory.max": str(64 * MIB), "memory.oom.group": "1", "pids.max": "5", "cpu.max": "30000 50000"}


def disk() -> str:
    """MAJOR:MINOR of a disk that io.max may name: the machine's scratch disk, else the first whole one there is."""
    device = os.environ.get("CGROUP_VM_DISK", "")
    if device and stat.S_ISBLK(Path(device).stat().st_mode):
        number = Path(device).stat().st_rdev
        return f"{os.major(number)}:{os.minor(number)}"
    for entry in sorted(Path("/sys/block").iterdir()):
        if (entry / "device").exists():
            return (entry / "dev").read_text().strip()
    pytest.skip("no disk that io.max could name")


async def test_io_limit_is_written() -> None:
    leaf = leaf_name()
    assert HERE.root is not None
    which = disk()
    limits = Limits(io=(f"{which} wbps=1048576 riops=100",), timeout_seconds=60)
    result = await run(["cat", str(HERE.root / leaf / "io.max")], limits, leaf=leaf)
    held_by_the_kernel(result)
    assert result.stdout.split() == [which, "rbps=max", "wbps=1048576", "riops=100", "wiops=max"]


async def test_io_limit_that_the_kernel_refuses_starts_nothing(tmp_path: Path) -> None:
    result = await run(["touch", str(tmp_path / "ran")], Limits(io=("999:999 wbps=1",)))
    assert "io.max" in result.error
    assert "999:999" in result.error
    assert not (tmp_path / "ran").exists()
    assert not remains(result.leaf)


async def test_required_is_content_here() -> None:
    result = await run(["true"], Limits(timeout_seconds=60), protection="required")
    held_by_the_kernel(result)
    assert result.ok


async def test_timeout_and_cancellation_leave_nothing(tmp_path: Path) -> None:
    late = await run(["/bin/sh", "-c", "sleep 1000 & setsid sleep 1000 & wait"], Limits(timeout_seconds=1))
    held_by_the_kernel(late)
    assert late.timed_out
    leaf = leaf_name()
    script = f"echo $$ > {tmp_path}/pid; while :; do :; done"  # throttled, when it is to die
    task = asyncio.create_task(run(["/bin/sh", "-c", script], Limits(cpu_quota_us=5_000), leaf=leaf))
    await until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("\n"))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not remains(leaf)
    assert not alive(int((tmp_path / "pid").read_text()))


async def test_kill_leaf_of_a_program_under_limits() -> None:
    assert HERE.root is not None
    leaf = cgroup.Leaf.create(HERE.root, leaf_name())
    leaf.limit(Limits(cpu_quota_us=5_000), HERE.controllers)
    process = subprocess.Popen(["/bin/sh", "-c", 'echo 0 > "$1"; while :; do :; done', "sh", str(leaf.procs)])
    try:
        await until(leaf.populated)
        assert await kill_leaf(leaf.path.name, 10.0) is True
        assert process.wait(10) == -9
        assert not remains(leaf.path.name)
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def tree() -> Iterator[Path]:
    """A cgroup as a unit with Delegate=yes or a container has it; removed with all that is in it."""
    mount = next(m.point for m in cgroup.mounts(Path("/proc/self/mountinfo").read_text()))
    path = mount / f"delegated-{os.getpid()}"
    path.mkdir()
    yield path
    leaf = cgroup.Leaf.at(path)
    leaf.kill(10.0)
    leaf.remove()


PROBING = """
import asyncio, sandbox, sys
found = sandbox.probe(*sys.argv[1:])
sandbox.use(found)
result = asyncio.run(sandbox.run(["cat", "/proc/self/cgroup"], sandbox.Limits(timeout_seconds=60)))
print(found.enforced_by.value, found.root, result.stdout.strip(), result.error, found.reason, sep="|")
alone = sandbox.Needs(network="none", processes="own", write=())
held = asyncio.run(sandbox.run(["/bin/true"], sandbox.Limits(timeout_seconds=60), needs=alone))
again = sandbox.probe(*sys.argv[1:])
print(again.enforced_by.value, again.root, open("/proc/self/cgroup").read().strip(), "", again.reason, sep="|")
print(held.exit_code, held.error, *held.layers, sep="|")
"""


def inside(tree: Path, wrapper: list[str], *arguments: str, python: str = "", path: str = "") -> list[list[str]]:
    """PROBING, run by a process that is in `tree` from the start; its lines, split."""
    enter = ["/bin/sh", "-c", 'echo 0 > "$1/cgroup.procs" && shift && exec "$@"', "sh", str(tree)]
    env = {**os.environ, "PYTHONPATH": path or str(Path(__file__).parents[2])}
    command = [*enter, *wrapper, python or sys.executable, "-c", PROBING, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, cwd="/")
    assert done.returncode == 0, done.stderr
    return [line.split("|") for line in done.stdout.splitlines()]


def test_a_delegated_tree_is_used_and_its_processes_make_room(tree: Path) -> None:
    os.setxattr(tree, "trusted.delegate", b"1")  # as systemd marks it
    bystander = subprocess.Popen(["/bin/sh", "-c", 'echo 0 > "$1/cgroup.procs"; exec sleep 1000', "sh", str(tree)])
    try:
        first, second, _ = inside(tree, [])
        assert first[:2] == ["cgroup2", f"{tree}/alertmedic"], first
        assert first[2].startswith(f"0::/{tree.name}/alertmedic/run-")
        assert second[:3] == ["cgroup2", f"{tree}/alertmedic", f"0::/{tree.name}/alertmedic-agent"], second
        assert Path(f"/proc/{bystander.pid}/cgroup").read_text() == f"0::/{tree.name}/alertmedic-agent\n"
    finally:
        bystander.kill()
        bystander.wait()


def test_a_named_parent_is_used(tree: Path) -> None:
    found = sandbox.probe(str(tree))
    assert (found.enforced_by, found.root, found.reason) == (EnforcedBy.CGROUP2, tree / "alertmedic", "")


async def test_all_runs_together_have_limits_too(tree: Path) -> None:
    """Four programs, each well within its own limit, that together want more than there is for all."""
    totals = sandbox.Totals(memory_bytes=48 * MIB, pids=9, cpu_percent=50)
    found = sandbox.probe(str(tree), totals)
    assert [(tree / "alertmedic" / f).read_text().strip() for f in ("memory.max", "pids.max", "cpu.max")] == [
        str(48 * MIB),
        "9",
        "50000 100000",
    ]
    sandbox.use(found)
    hold = "b = bytearray(24 << 20); import time; time.sleep(1)"
    limits = Limits(memory_bytes=64 * MIB, cpu_quota_us=FULL, timeout_seconds=60)
    results = await asyncio.gather(*(run([*PYTHON, hold], limits) for _ in range(4)))
    assert any(r.oom_killed for r in results), results
    assert all(r.memory_peak_bytes is not None and r.memory_peak_bytes < 48 * MIB for r in results)


def test_a_container_with_its_own_cgroup_namespace(tree: Path) -> None:
    """A pod with a writable cgroup: its namespace's root is not the real one, and its processes are in it."""
    remount = 'umount /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup && exec "$@"'
    first, second, _ = inside(tree, ["unshare", "--cgroup", "--mount", "/bin/sh", "-c", remount, "sh"])
    assert first[:2] == ["cgroup2", "/sys/fs/cgroup/alertmedic"], first
    assert first[2].startswith("0::/alertmedic/run-")
    assert second[:3] == ["cgroup2", "/sys/fs/cgroup/alertmedic", "0::/alertmedic-agent"], second


def test_a_container_with_a_read_only_cgroup_says_what_to_do(tree: Path) -> None:
    remount = 'umount /sys/fs/cgroup && mount -t cgroup2 -o ro none /sys/fs/cgroup && exec "$@"'
    first, *_ = inside(tree, ["unshare", "--cgroup", "--mount", "/bin/sh", "-c", remount, "sh"])
    assert first[:2] == ["rlimits", "None"], first
    assert "Read-only file system" in first[4]
    assert "Delegate=yes" in first[4]
    assert "cgroup_writable" in first[4]


@pytest.fixture
def everybodys() -> Iterator[tuple[str, str]]:
    """A Python that user nobody can run, and a directory with all it needs: the tests' own may be root's alone."""
    directory = Path(f"/var/tmp/everybodys-{os.getpid()}")
    directory.mkdir()
    shutil.copytree(Path(sandbox.__file__).parent, directory / "sandbox")
    site = Path(msgspec.__file__).parents[1]
    for name in ("msgspec", "cgroupspy", "psutil"):
        shutil.copytree(site / name, directory / name)
    subprocess.run(["chmod", "-R", "a+rX", str(directory)], check=True)
    yield "/usr/bin/python3", str(directory)
    shutil.rmtree(directory)


def test_an_unprivileged_agent_in_a_tree_chowned_to_it(tree: Path, everybodys: tuple[str, str]) -> None:
    """What systemd does for a unit with `User=` and `Delegate=`, and what a pod's image has to."""
    python, path = everybodys
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"]
    trial = [*nobody, "env", f"PYTHONPATH={path}", python, "-c", "import sandbox"]
    if (done := subprocess.run(trial, capture_output=True, text=True, cwd="/")).returncode != 0:
        pytest.skip(f"{python} cannot run the sandbox as user nobody: {done.stderr[-300:]}")
    for file in (tree, *(tree / n for n in ("cgroup.procs", "cgroup.threads", "cgroup.subtree_control"))):
        shutil.chown(file, 65534, 65534)
    first, second, held = inside(tree, nobody, python=python, path=path)
    assert first[:2] == ["cgroup2", f"{tree}/alertmedic"], first
    assert first[2].startswith(f"0::/{tree.name}/alertmedic/run-"), first
    assert second[:3] == ["cgroup2", f"{tree}/alertmedic", f"0::/{tree.name}/alertmedic-agent"], second
    assert held[:2] == ["0", ""], held
    assert {"cgroup", "namespaces", "seccomp"} <= set(held[2:]), held


def test_a_tree_without_the_cpu_controller_is_not_called_enforced(tree: Path) -> None:
    (tree / "cgroup.subtree_control").write_text("+memory +pids")
    (tree / "part").mkdir()
    found = sandbox.probe(str(tree / "part"))
    assert found.enforced_by is EnforcedBy.CGROUP2_KILL
    assert found.controllers == {"memory", "pids"}
    assert "controllers cpu are not available" in found.reason
    assert "Delegate=yes" in found.reason
