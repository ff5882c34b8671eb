"""What a run gives the program and what it says afterwards, on any host, in whatever mode it offers."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec
import pytest
from sandbox_traces import UNHELD, alive, remains, until

import sandbox
from sandbox import Limits, RunResult, run

pytestmark = pytest.mark.usefixtures("each_mode")
ROOMY = Limits(timeout_seconds=60, memory_bytes=512 << 20)
PYTHON = [sys.executable, "-I", "-S", "-c"]


def sh(script: str) -> list[str]:
    return ["/bin/sh", "-c", script]


async def test_result_of_a_program_that_works() -> None:
    result = await run(["echo", "hello"], ROOMY)
    assert result.ok
    assert (result.exit_code, result.signal, result.stdout, result.stderr, result.error) == (0, None, "hello\n", "", "")
    assert result.cpu_seconds is not None
    assert not remains(result.leaf)


async def test_exit_status_and_signal_are_told_apart() -> None:
    assert (await run(sh("exit 7"), ROOMY)).exit_code == 7
    killed = await run(sh("kill -USR1 $$"), ROOMY)
    assert (killed.exit_code, killed.signal) == (None, signal.SIGUSR1)
    assert not killed.ok


async def test_environment_is_scrubbed(monkeypatch: pytest.MonkeyPatch, each_mode: sandbox.Capability) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "s3cret")
    result = await run(["env"], ROOMY)
    seen = dict(line.split("=", 1) for line in result.stdout.splitlines())
    shells = {"PWD", "OLDPWD", "SHLVL", "_"}  # what one or the other /bin/sh adds
    cookie = set() if each_mode.root else {"ALERTMEDIC_RUN"}
    assert set(seen) - shells == {"PATH", "LANG", "HOME", "TMPDIR"} | cookie
    assert seen["HOME"] == seen["TMPDIR"] == seen["PWD"]


async def test_given_environment_is_added_verbatim() -> None:
    given_env = {"PGPASSWORD": "a b\n$(id) `id` ' \" \\ é", "PATH": "/bin:/usr/bin", "EMPTY": ""}
    result = await run([*PYTHON, "import json, os; print(json.dumps(dict(os.environ)))"], ROOMY, env=given_env)
    seen = json.loads(result.stdout)
    assert {name: seen[name] for name in given_env} == given_env


@pytest.mark.parametrize("name", ["A-B", "1A", "", "LD_PRELOAD", "BASH_ENV", "OPTIND", "BASH_FUNC_x%%", "A=B", "A\0"])
async def test_environment_that_would_act_on_the_launcher_is_refused(name: str) -> None:
    result = await run(["true"], ROOMY, env={name: "x"})
    assert "environment variable" in result.error
    assert result.exit_code is None


async def test_descriptors_are_closed(tmp_path: Path) -> None:
    with (tmp_path / "secret").open("w") as f:
        os.set_inheritable(f.fileno(), True)
        result = await run([*PYTHON, "import os; print(sorted(map(int, os.listdir('/proc/self/fd'))))"], ROOMY)
    assert result.stdout == "[0, 1, 2, 3]\n", result  # 3 is the directory that is being listed


async def test_no_new_privileges() -> None:
    result = await run(["cat", "/proc/self/status"], ROOMY)
    assert re.search(r"^NoNewPrivs:\s+1$", result.stdout, re.M)
    assert re.search(r"^NoNewPrivs:\s+0$", Path("/proc/self/status").read_text(), re.M), "it stays in the sandbox"


async def test_standard_input() -> None:
    assert (await run(["cat"], ROOMY, stdin=b"")).stdout == ""
    data = b"line\n" * 100_000
    result = await run(["wc", "-c"], ROOMY, stdin=data)
    assert int(result.stdout) == len(data)


async def test_output_is_bounded_and_never_blocks_the_program() -> None:
    limits = Limits(output_bytes=1000, timeout_seconds=60)
    script = "head -c 3000000 /dev/zero | tr '\\0' o; head -c 2000000 /dev/zero | tr '\\0' e >&2; echo end"
    result = await run(sh(script), limits)
    assert result.exit_code == 0
    assert (result.stdout, result.stdout_dropped) == ("o" * 1000, 3_000_000 + 4 - 1000)
    assert (result.stderr, result.stderr_dropped) == ("e" * 1000, 2_000_000 - 1000)


async def test_output_of_no_bytes_is_still_counted() -> None:
    result = await run(sh("echo 12345; echo 123 >&2"), Limits(output_bytes=0))
    assert (result.stdout, result.stdout_dropped, result.stderr, result.stderr_dropped) == ("", 6, "", 4)


async def test_output_that_is_no_text_becomes_text() -> None:
    result = await run(["printf", r"\377ok"], ROOMY)
    assert result.stdout == "\N{REPLACEMENT CHARACTER}ok"


async def test_working_directory_is_private_and_gone_afterwards() -> None:
    result = await run(sh("pwd; stat -c '%a %u' .; mkdir -p a/b; chmod 0 a/b; echo x > file; ls -d $HOME"), ROOMY)
    where, mode, home = result.stdout.splitlines()
    assert mode == f"700 {os.geteuid()}"
    assert home == where
    assert where.startswith(tempfile.gettempdir())
    assert not Path(where).exists()


async def test_rlimits() -> None:
    result = await run(["cat", "/proc/self/limits"], Limits(open_files=33, file_bytes=512 * 7))
    found = {line[:26].strip(): line[26:].split()[:2] for line in result.stdout.splitlines()}
    assert found["Max core file size"][1] in ("0", "1"), "less than any dump"
    assert found["Max open files"] == ["33", "33"]
    assert found["Max file size"] == ["3584", "3584"]
    too_big = await run(["dd", "if=/dev/zero", "of=file", "bs=8192", "count=1"], Limits(file_bytes=4096))
    assert not too_big.ok
    assert "File too large" in too_big.stderr or too_big.signal == signal.SIGXFSZ


async def test_timeout_kills_grandchildren() -> None:
    script = "sleep 1000 & echo $!; setsid sleep 1000 & echo $!; (sleep 1000 & echo $!) & wait"
    result = await run(sh(script), Limits(timeout_seconds=1.0))
    assert result.timed_out
    assert result.signal == signal.SIGKILL
    assert not result.ok
    pids = [int(p) for p in result.stdout.split()]
    assert len(pids) == 3
    assert not [p for p in pids if alive(p)]
    assert not remains(result.leaf)


DAEMON = """
import os, sys
ready, tell = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        os.write(tell, b"x")
        null = os.open("/dev/null", os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        import time
        time.sleep(1000)
    os._exit(0)
os.read(ready, 1)
"""


async def test_nothing_outlives_a_normal_exit_not_even_a_daemon() -> None:
    result = await run([*PYTHON, DAEMON], ROOMY)
    assert result.exit_code == 0, result
    assert not alive(int(result.stdout))


async def test_a_background_process_that_holds_the_pipes_does_not_hold_the_result() -> None:
    result = await run(sh("sleep 1000 & echo $!"), Limits(timeout_seconds=300))
    assert result.exit_code == 0
    assert not result.timed_out
    assert not alive(int(result.stdout))


async def test_cancellation_kills_the_tree_and_is_raised_again(tmp_path: Path) -> None:
    said = tmp_path / "pids"
    task = asyncio.create_task(run(sh(f"sleep 1000 & setsid sleep 1000 & echo $$ $! > {said}; wait"), ROOMY))
    await until(lambda: said.exists() and len(said.read_text().split()) == 2)
    before = [int(p) for p in said.read_text().split()]
    assert all(map(alive, before))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not [p for p in before if alive(p)]


async def test_cancellation_at_any_moment_leaves_nothing(each_mode: sandbox.Capability) -> None:
    for moment in range(0, 24, 1 if each_mode.root else 3):
        leaf = sandbox.leaf_name() or f"run-cancel{os.getpid()}-{moment}"
        task = asyncio.create_task(run(["sleep", "1000"], ROOMY, leaf=leaf))
        for _ in range(moment):
            await asyncio.sleep(0.0005)
        task.cancel()
        task.cancel()  # twice: nobody's impatience may leave half of a sandbox behind
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not remains(leaf), f"cancelled after {moment} rounds"


async def test_many_at_once() -> None:
    results = await asyncio.gather(*(run(["echo", str(i)], ROOMY) for i in range(30)))
    assert [int(r.stdout) for r in results] == list(range(30))
    leaves = [r.leaf for r in results if r.leaf]
    assert len(set(leaves)) == len(leaves)


async def test_program_that_is_not_there(tmp_path: Path) -> None:
    script, broken, text = tmp_path / "plain", tmp_path / "broken", tmp_path / "text"
    script.write_text("echo I was interpreted\n")
    broken.write_text("#!/no/such/interpreter\n")
    text.write_text("#!/bin/sh\n")
    for path in (script, broken):
        path.chmod(0o755)
    expected = {
        "no-such-program-at-all": "no such program",
        "/no/such/program": "No such file",
        "relative/program": "absolute path",
        str(script): "neither an ELF program nor a script",  # a shell's exec would run it as a shell script
        str(broken): "not found|required file",
        str(text): "Permission denied|cannot execute",
        str(tmp_path): "directory",
    }
    for program, words in expected.items():
        result = await run([program, "x"], ROOMY)
        assert re.search(words, result.error), (program, result)
        assert result.exit_code is None
        assert not result.ok
        assert not remains(result.leaf)


async def test_failure_to_start_is_not_confused_with_the_programs_own_127() -> None:
    own = await run(sh("echo 'deadbeefdeadbeef: 1: exec: /x: not found' >&2; exit 127"), ROOMY)
    assert (own.exit_code, own.error) == (127, "")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "argv is empty"),
        (["echo", "a\0b"], "NUL"),
        (["echo", "\ud800"], "cannot be encoded"),
        (["echo", "x" * 10_000_000], "too long"),
    ],
)
async def test_argv_that_no_program_can_be_given(argv: list[str], words: str) -> None:
    result = await run(argv, ROOMY)
    assert words in result.error
    assert result.exit_code is None


@pytest.mark.parametrize(
    "limits",
    [
        Limits(timeout_seconds=math.nan),
        Limits(timeout_seconds=math.inf),
        Limits(timeout_seconds=0),
        Limits(pids=0),
        Limits(memory_bytes=-1),
        Limits(output_bytes=-1),
        Limits(cpu_period_us=0),
    ],
)
async def test_limits_that_limit_nothing_are_refused(limits: Limits) -> None:
    result = await run(["true"], limits)
    assert "limits out of range" in result.error


async def test_unknown_user_and_bad_leaf_are_errors() -> None:
    assert "no such user" in (await run(["true"], ROOMY, user="nobody-of-that-name")).error
    assert "no such user" in (await run(["true"], ROOMY, user="4294967290123")).error
    for leaf in ("../x", "a/b", ".", "cgroup.procs", "x" * 65, "a b"):
        assert "cannot be the name of a leaf" in (await run(["true"], ROOMY, leaf=leaf)).error


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("user", ["nobody", "65534"])
async def test_runs_as_another_user(user: str) -> None:
    script = "id -u; id -G; echo x > $HOME/file && stat -c %u . file; grep -E '^(NoNewPrivs|CapEff)' /proc/self/status"
    result = await run(sh(script), ROOMY, user=user)
    assert result.exit_code == 0, result
    lines = result.stdout.split("\n")
    assert lines[:4] == ["65534", "65534", "65534", "65534"]
    assert "NoNewPrivs:\t1" in lines
    assert "CapEff:\t0000000000000000" in lines


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_failure_to_start_as_another_user(tmp_path: Path) -> None:
    program = tmp_path / "mine"
    program.write_text("#!/bin/sh\nexit 0\n")
    program.chmod(0o700)
    result = await run([str(program)], ROOMY, user="nobody")
    assert re.search("Permission denied|cannot execute|not found", result.error), result
    assert result.exit_code is None


async def test_required_refuses_before_anything_is_made(tmp_path: Path) -> None:
    sandbox.use(UNHELD)
    with pytest.raises(sandbox.SandboxUnavailable, match="the test wants none"):
        await run(["touch", str(tmp_path / "ran")], ROOMY, protection="required", leaf="run-required")
    assert not remains("run-required")
    assert not (tmp_path / "ran").exists()


async def test_results_and_limits_are_json() -> None:
    limits = Limits(io=("8:0 wbps=1048576",), pids=3)
    assert msgspec.json.decode(msgspec.json.encode(limits), type=Limits) == limits
    result = await run(sh("echo out; echo err >&2; exit 3"), ROOMY)
    assert msgspec.json.decode(msgspec.json.encode(result), type=RunResult) == result


async def test_every_result_says_what_enforced_the_limits(each_mode: sandbox.Capability) -> None:
    assert (await run(["true"], ROOMY)).enforced_by is each_mode.enforced_by
    assert (await run(["/no/such"], ROOMY)).enforced_by is each_mode.enforced_by


CLOSED = """
import asyncio, os, sandbox, sys
results = os.dup(1)
for fd in (0, 1, 2):
    os.close(fd)
result = asyncio.run(sandbox.run(["/bin/sh", "-c", "cat; echo out; echo err >&2"], sandbox.Limits(), stdin=b"in "))
os.write(results, repr((result.stdout, result.stderr, result.error)).encode())
"""


def test_an_agent_without_standard_descriptors() -> None:
    done = subprocess.run([sys.executable, "-c", CLOSED], stdout=subprocess.PIPE, timeout=60)
    assert done.stdout == repr(("in out\n", "err\n", "")).encode()
