"""The layers under a program: what is taken from it natively, on any host, and what a result says of it."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sandbox
from sandbox import Layer, Limits, Needs, direct, execution, hardening, namespaces, run, syscalls
from sandbox.hardening import Profile

ROOMY = Limits(timeout_seconds=60, memory_bytes=512 << 20)
PYTHON = [sys.executable, "-I", "-S", "-c"]
ALONE = Needs(network="none", processes="own", write=())
needs_filter = pytest.mark.skipif(bool(syscalls.unavailable()), reason=syscalls.unavailable() or "-")
needs_namespaces = pytest.mark.skipif(bool(namespaces.unavailable()), reason=namespaces.unavailable() or "-")


def judged(code: bytes, number: int, *arguments: int, arch: int | None = None) -> int:
    """What the kernel would answer: the filter on one call, by the rules of bpf(4)."""
    machine = list(syscalls._ARCHITECTURES.values())[list(syscalls._ARCHITECTURES).index(os.uname().machine)]
    given_arguments = [a & (2**64 - 1) for a in (*arguments, 0, 0, 0, 0, 0, 0)][:6]
    data = struct.pack("<IIQ6Q", number, machine if arch is None else arch, 0, *given_arguments)
    at, value = 0, 0
    while True:
        what, true, false, k = struct.unpack_from("<HBBI", code, 8 * at)
        at += 1
        if what == 0x20:
            (value,) = struct.unpack_from("<I", data, k)
        elif what == 0x06:
            return int(k)
        else:
            holds = {0x15: value == k, 0x35: value >= k, 0x45: bool(value & k)}[what]
            at += true if holds else false


ALLOW = 0x7FFF0000


def refusal(number: int) -> int:
    return 0x00050000 | number


@needs_filter
@given(st.integers(0, 600), st.lists(st.integers(0, 2**64 - 1), max_size=6), st.sampled_from(["none", "local", "any"]))
def test_the_filter_always_answers_and_denies_what_is_listed(number: int, arguments: list[int], sockets: str) -> None:
    column = list(syscalls._ARCHITECTURES).index(os.uname().machine)
    answer = judged(syscalls.program(syscalls.Filter(sockets, protect=1234)), number, *arguments)
    if number in {numbers[column] for numbers in (syscalls._DENIED | syscalls._TRACING).values()}:
        assert answer == refusal(errno.EPERM)
    else:
        assert answer == ALLOW or answer >> 16 == 5
    assert judged(syscalls.program(syscalls.Filter()), number, arch=0x40000003) == 0x80000000, "another architecture"


@needs_filter
def test_arguments_are_judged() -> None:
    column = list(syscalls._ARCHITECTURES).index(os.uname().machine)
    code = syscalls.program(syscalls.Filter("local", protect=1234))
    kill, socket, clone, ioctl = (
        n[column] for n in (syscalls._KILL, syscalls._SOCKET, syscalls._CLONE, syscalls._IOCTL)
    )
    assert judged(code, kill, 1235, 9) == judged(code, kill, 0, 9) == ALLOW
    assert {judged(code, kill, p, 9) for p in (1234, -1, -1234)} == {refusal(errno.EPERM)}
    assert judged(code, kill, 1234 | 7 << 32, 9) == refusal(errno.EPERM), "the kernel reads 32 bits"
    assert [judged(code, socket, family) == ALLOW for family in (1, 2, 10, 16, 17)] == [True] * 3 + [False] * 2
    assert judged(code, clone, 17) == judged(code, clone, 0x003D0F00) == ALLOW, "fork and pthread_create"
    assert judged(code, clone, 0x10000000 | 17) == refusal(errno.EPERM)
    assert judged(code, ioctl, 0, 0x5401) == ALLOW
    assert judged(code, ioctl, 0, 0x5412) == refusal(errno.EPERM)
    assert judged(syscalls.program(syscalls.Filter("none")), socket, 1) == refusal(errno.EACCES)
    tracing = syscalls._TRACING["process_vm_readv"][column]
    assert judged(syscalls.program(syscalls.Filter(tracing=True)), tracing) == ALLOW


@needs_filter
async def test_a_program_is_filtered_and_says_so() -> None:
    result = await run(["grep", "-E", "^(Seccomp|NoNewPrivs):", "/proc/self/status"], ROOMY)
    assert result.stdout.split() == ["NoNewPrivs:", "1", "Seccomp:", "2"]
    assert {Layer.SECCOMP, Layer.NO_NEW_PRIVS, Layer.RLIMITS} <= set(result.layers)
    assert Layer.NAMESPACES not in result.layers


@needs_filter
async def test_the_agent_itself_keeps_its_rights() -> None:
    await run(["true"], ROOMY)
    lines = Path("/proc/thread-self/status").read_text().splitlines()
    assert "Seccomp:\t0" in lines
    assert "NoNewPrivs:\t0" in lines


@needs_namespaces
async def test_a_program_that_needs_little_sees_little() -> None:
    script = "ls /proc | grep -c '^[0-9]'; ls -A /tmp | wc -l; grep -c : /proc/net/dev; touch /etc/x || echo read-only"
    result = await run(["/bin/sh", "-c", script], ROOMY, needs=ALONE)
    processes, _, devices, touched = result.stdout.split()
    assert int(processes) <= 5
    assert (devices, touched) == ("1", "read-only"), "only lo"
    assert {Layer.NAMESPACES, Layer.NO_NETWORK, Layer.SECCOMP} <= set(result.layers)


@needs_namespaces
async def test_the_working_directory_in_memory_has_a_bound() -> None:
    script = "df -B1 --output=size . | tail -1; echo kept > file && cat file; pwd"
    result = await run(["/bin/sh", "-c", script], Limits(file_bytes=8 << 20, timeout_seconds=60), needs=ALONE)
    size, kept, where = result.stdout.split()
    assert (int(size), kept) == (8 << 20, "kept")
    assert not Path(where).exists()


@needs_namespaces
async def test_a_declared_path_can_be_written_and_no_other(tmp_path: Path) -> None:
    allowed, other = tmp_path / "allowed", tmp_path / "other"
    for path in (allowed, other):
        path.mkdir()
    needs = Needs(processes="own", write=(str(allowed),))
    result = await run(["/bin/sh", "-c", f"touch {allowed}/file; touch {other}/file"], ROOMY, needs=needs)
    assert [p.name for p in allowed.iterdir()] == ["file"], result
    assert not list(other.iterdir())


@needs_namespaces
@pytest.mark.parametrize(
    ("argv", "exit_code", "error"),
    [
        (["/bin/sh", "-c", "exit 7"], 7, ""),
        (["/bin/sh", "-c", "echo 'bwrap: no such thing' >&2; exit 1"], 1, ""),
        (["/no/such/program"], None, "No such file"),
    ],
)
async def test_behind_bubblewrap_failures_are_told_apart(argv: list[str], exit_code: int | None, error: str) -> None:
    result = await run(argv, ROOMY, needs=ALONE)
    assert result.exit_code == exit_code
    assert error in result.error
    assert bool(result.error) == bool(error)


@needs_namespaces
async def test_what_cannot_be_isolated_is_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    required = Needs(network="none", isolation="required")
    assert (await run(["true"], ROOMY, needs=required)).ok
    monkeypatch.setattr(namespaces, "unavailable", lambda: "the test took it away")
    with pytest.raises(sandbox.SandboxUnavailable, match="the test took it away"):
        await run(["true"], ROOMY, needs=required)
    without = await run(["true"], ROOMY, needs=Needs(network="none"))
    assert without.ok
    assert Layer.NAMESPACES not in without.layers
    with pytest.raises(sandbox.SandboxUnavailable, match="isolation is required"):
        await run(["true"], ROOMY, needs=Needs(isolation="required"))


@needs_filter
async def test_without_namespaces_no_network_means_no_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespaces, "unavailable", lambda: "the test took it away")
    script = "import socket\ntry: socket.socket()\nexcept PermissionError: print('refused')"
    result = await run([*PYTHON, script], ROOMY, needs=Needs(network="none"))
    assert (result.stdout, Layer.NO_NETWORK in result.layers) == ("refused\n", True)


@pytest.mark.parametrize("path", ["relative", "/a/../b", "/no/such/path/here"])
async def test_paths_that_cannot_be_given(path: str) -> None:
    assert "needs.write" in (await run(["true"], ROOMY, needs=Needs(write=(path,)))).error


@pytest.mark.parametrize("needs", [Needs(), pytest.param(ALONE, marks=needs_namespaces)], ids=["open", "alone"])
async def test_a_secret_comes_by_descriptor_and_never_back(needs: Needs) -> None:
    value = "s3cret wörd\nof two lines"
    script = (
        "import os; v = os.read(int(os.environ['TOKEN_FD']), 99).decode(); "
        "print(len(v), v in str(os.environ), open('/proc/self/cmdline').read().count(v), oct(os.fstat(int("
        "os.environ['TOKEN_FD'])).st_mode & 0o777)); print('it is', v)"
    )
    result = await run([*PYTHON, script], ROOMY, secrets={"TOKEN": value}, needs=needs)
    assert result.stdout == f"{len(value)} False 0 0o600\nit is [secret]\n", result


async def test_values_of_the_environment_are_redacted_on_request() -> None:
    result = await run(
        ["/bin/sh", "-c", "echo $P; echo $P >&2"], ROOMY, env={"P": "hunter22"}, redact=["hunter22", "x"]
    )
    assert (result.stdout, result.stderr) == ("[secret]\n", "[secret]\n")


@given(st.binary(max_size=60), st.binary(min_size=4, max_size=20), st.integers(0, 80), st.binary(max_size=60))
def test_nothing_of_a_secret_stays_in_cut_output(before: bytes, secret: bytes, bound: int, after: bytes) -> None:
    read, write = os.pipe()
    try:
        os.write(write, before + secret + after + b"\0")
        output = execution._Output(bound)
        output.take(read)
    finally:
        os.close(read)
        os.close(write)
    shown = output.without([secret], bound)
    if secret not in execution.REDACTED:
        assert secret not in shown.replace(execution.REDACTED, b"")
    assert len(shown) <= bound + len(execution.REDACTED)


def test_layers_name_what_holds() -> None:
    held = hardening.layers(Profile(namespaced=True, network="none"), leaf=True, limited=True, changed_user=True)
    assert held[:4] == (Layer.CGROUP, Layer.NAMESPACES, Layer.NO_NETWORK, Layer.USER)
    assert Layer.CGROUP_KILL in hardening.layers(Profile(), leaf=True, limited=False, changed_user=False)


def test_absent_layers_give_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syscalls.platform, "machine", lambda: "riscv64")
    assert sandbox.absent_layers()["seccomp"] == "no table of system calls for riscv64"


needs_direct = pytest.mark.skipif(bool(direct.unavailable()), reason=direct.unavailable() or "-")


@needs_direct
def test_the_machine_code_is_what_its_comment_says(tmp_path: Path, program: Callable[..., str]) -> None:
    """Assembled from the comment above it, byte for byte."""
    source = Path(direct.__file__).read_text()
    comment = source[source.index("# int64 start(") : source.index("_CODE = ")]
    lines = [".intel_syntax noprefix"]
    for line in comment.splitlines()[1:]:
        statements = line.removeprefix("#").split("   ")[0 if line.startswith("# ") and line[2] != " " else 1]
        lines += [part.strip() for part in statements.replace(": ", ":;").split(";") if part.strip()]
    lines = [line for line in lines if not line.startswith("The child never")]
    (tmp_path / "code.s").write_text("\n".join(lines) + "\n")
    assemble = [program("as", "binutils"), str(tmp_path / "code.s"), "-o", str(tmp_path / "code.o")]
    done = subprocess.run(assemble, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    copy = [program("objcopy", "binutils"), "-O", "binary", "-j", ".text", tmp_path / "code.o", tmp_path / "code"]
    subprocess.run(copy, check=True)
    assert (tmp_path / "code").read_bytes() == direct._CODE


@needs_direct
def test_a_call_that_fails_is_named_and_leaves_no_child() -> None:
    bad = [direct.Call("chdir", (direct.text("/no/such/directory"),)), direct.execute(["/bin/true"], {})]
    before = psutil.Process().children()  # other tests' servers
    with pytest.raises(direct.Failed, match=r"chdir: No such file") as caught:
        direct.start(bad, None)
    assert (caught.value.call, caught.value.number) == ("chdir", errno.ENOENT)
    assert set(psutil.Process().children()) <= set(before)
    forgiving = [direct.Call("chdir", (direct.text("/no/such/directory"),), direct.MAY_FAIL)]
    execute = direct.execute(["/bin/sh", "-c", "exit $X"], {"X": "7"})
    pid, pidfd = direct.start([*forgiving, direct.unmask(), execute], None)
    os.close(pidfd)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


@needs_direct
async def test_many_threads_start_programs_while_signals_arrive() -> None:
    """A signal handler that ran in a child on our stack would break us: none does."""
    seen = 0

    def count(*_: object) -> None:
        nonlocal seen
        seen += 1

    before = signal.signal(signal.SIGALRM, count)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        results = await asyncio.gather(*(run(["/bin/sh", "-c", f"echo {i}"], ROOMY) for i in range(100)))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert [r.stdout for r in results] == [f"{i}\n" for i in range(100)]
    assert seen > 0
