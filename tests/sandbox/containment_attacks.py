"""The attacks: one of each class, what runs it, and what must be true afterwards.

Each is a program that tries something and prints what came of it. "user": as nobody, with all the host in view, as an
action without `needs` runs under `sandbox.user`; "root": the same as root; "isolated": as nobody, needing nothing of
the host; "isolated-root": that as root. `refused` lists the lines that must all be printed; `check` looks further.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sandbox import Limits, RunResult

MIB = 1 << 20
ROOMY = Limits(cpu_quota_us=100_000, timeout_seconds=60)
ALONE = {"network": "none", "processes": "own", "write": []}
MODES: dict[str, dict[str, Any]] = {
    "user": {"user": "nobody"},
    "root": {},
    "isolated": {"user": "nobody", "needs": ALONE},
    "isolated-root": {"needs": ALONE},
    "no-network": {"user": "nobody", "needs": {"network": "none", "write": ["/"]}},
}

PRELUDE = """
import ctypes, errno, os, signal, socket, sys, time
libc = ctypes.CDLL(None, use_errno=True)
agent, agent_port, scratch = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
def say(what, number): print(what, errno.errorcode.get(number, "DONE") if number else "DONE", flush=True)
def call(what, number, *arguments):
    ctypes.set_errno(0)
    say(what, ctypes.get_errno() if libc.syscall(number, *arguments) < 0 else 0)
def attempt(what, action):
    try: action()
    except OSError as x: say(what, x.errno)
    else: say(what, 0)
"""


@dataclass(frozen=True)
class World:
    """What a check may look at: the test's scratch directory (writable by nobody) and the agent's memory before."""

    scratch: Path
    agent_memory: int
    agent_memory_after: int


@dataclass(frozen=True)
class Attack:
    name: str
    mode: str
    script: str  # Python behind PRELUDE, or a shell's behind "sh:"
    by: str  # what contains it
    refused: tuple[str, ...] = ()
    limits: Limits = ROOMY
    check: Callable[[RunResult, World], object] = lambda _result, _world: None
    secrets: dict[str, str] = field(default_factory=dict)


def _timed_out(result: RunResult, _: World) -> None:
    assert result.timed_out
    assert result.signal == 9 or result.exit_code == 137


def _oom(result: RunResult, _: World) -> None:
    assert result.oom_killed
    assert (result.memory_peak_bytes or 0) <= 32 * MIB


def _bounded_output(result: RunResult, world: World) -> None:
    _timed_out(result, world)
    assert len(result.stdout) == 64 * 1024
    assert result.stdout_dropped > MIB
    assert world.agent_memory_after - world.agent_memory < 16 * MIB


def _pids(result: RunResult, _: World) -> None:
    assert result.pids_refused


def _throttled(result: RunResult, _: World) -> None:
    assert result.timed_out
    assert result.cpu_seconds is not None
    assert result.cpu_seconds <= 4 * 0.25 * 1.5


def _victim_unharmed(_: RunResult, world: World) -> None:
    assert (world.scratch / "victim" / "precious").read_text() == "still here"


def _no_core(_: RunResult, world: World) -> None:
    assert not list(world.scratch.glob("core*"))


def _nothing_on_disk(result: RunResult, world: World) -> None:
    written = int(result.stdout.split()[1])
    assert 8 * MIB <= written <= 16 * MIB
    assert not list(world.scratch.glob("flood*"))


def _redacted(result: RunResult, _: World) -> None:
    assert "correct horse battery" not in result.stdout + result.stderr
    assert "[secret]" in result.stdout


def _numbers() -> dict[str, int]:
    from sandbox import syscalls

    column = list(syscalls._ARCHITECTURES).index(syscalls.platform.machine())
    every = syscalls._DENIED | syscalls._TRACING | syscalls._AT_PROCESS
    every |= {"clone": syscalls._CLONE, "clone3": syscalls._CLONE3}
    return {name: numbers[column] for name, numbers in every.items() if numbers[column] is not None}


N = _numbers()

ATTACKS = [
    Attack(
        "new session (setsid)", "user", "sh:setsid sleep 1001 & sleep 0.2", "cgroup",
        check=lambda r, _: None,
    ),
    Attack(
        "daemon by double fork, descriptors closed, environment cleared", "user",
        """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.chdir("/")
        for fd in range(3): os.close(fd)
        os.execve("/bin/sleep", ["sleep", "1002"], {})
    os._exit(0)
os.wait()
""", "cgroup",
    ),
    Attack(
        "process that forks away from every kill", "user",
        """
if os.fork() == 0:
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        if os.fork(): os._exit(0)
time.sleep(0.5)
""", "cgroup",
    ),
    Attack(
        "ignoring every signal", "user",
        """
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: time.sleep(1)
""", "cgroup", limits=Limits(timeout_seconds=3, cpu_quota_us=100_000), check=_timed_out,
    ),
    Attack("fork bomb", "user", "sh:b() { b | b & }; b; wait; sleep 1", "cgroup", check=_pids,
           limits=Limits(pids=16, cpu_quota_us=100_000, timeout_seconds=10)),
    Attack(
        "memory bomb", "user", "b = []\nwhile True: b.append(bytearray(1 << 20))", "cgroup",
        limits=Limits(memory_bytes=32 * MIB, cpu_quota_us=100_000, timeout_seconds=60), check=_oom,
    ),
    Attack(
        "CPU burn with many threads", "user",
        "import threading\ndef burn():\n while True: pass\n[threading.Thread(target=burn).start() for _ in range(8)]",
        "cgroup", limits=Limits(timeout_seconds=4), check=_throttled,
    ),
    Attack("output flood", "user", "sh:yes 'all work and no play'", "agent's bounded reading", check=_bounded_output,
           limits=Limits(timeout_seconds=3, cpu_quota_us=50_000)),
    Attack(
        "disk flood by many files", "isolated",
        """
written = 0
try:
    for i in range(1000):
        for place in (".", scratch):
            try: f = open(f"{place}/flood{i}", "wb")
            except OSError: continue
            with f: written += f.write(bytes(1 << 20))
except OSError as x: print("written", written, errno.errorcode[x.errno])
""", "namespaces (working directory in memory)", check=_nothing_on_disk,
        limits=Limits(file_bytes=16 * MIB, memory_bytes=128 * MIB, cpu_quota_us=100_000, timeout_seconds=60),
    ),
    Attack(
        "one file that never ends", "user",
        """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
big = os.open("big", os.O_CREAT | os.O_WRONLY)
attempt("write", lambda: [os.write(big, bytes(1 << 20)) for _ in range(9)])
""", "rlimits", refused=("write EFBIG",), limits=Limits(file_bytes=4 * MIB, cpu_quota_us=100_000, timeout_seconds=60),
    ),
    Attack("descriptor exhaustion", "user", 'attempt("open", lambda: [os.open("/", 0) for _ in range(5000)])',
           "rlimits", refused=("open EMFILE",)),
    Attack(
        "raising its own limits", "root",
        """
import resource
def raised(kind, value):
    try: resource.setrlimit(kind, value)
    except (ValueError, OSError): say("raise", errno.EPERM)
    else: say("raise", 0)
raised(resource.RLIMIT_NOFILE, (9999, 9999))
""", "capabilities", refused=("raise EPERM",),
    ),
    Attack(
        "signals to the agent", "root",
        f"""
attempt("kill", lambda: os.kill(agent, 9))
attempt("everyone", lambda: os.kill(-1, 9))
attempt("group", lambda: os.killpg(agent, 9))
call("tkill", {N["tkill"]}, agent, 9)
call("tgkill", {N["tgkill"]}, agent, agent, 9)
attempt("pidfd", lambda: os.pidfd_open(agent))
""", "seccomp",
        refused=("kill EPERM", "everyone EPERM", "group EPERM", "tkill EPERM", "tgkill EPERM", "pidfd EPERM"),
    ),
    Attack("tracing the agent", "root", f'call("ptrace", {N["ptrace"]}, 16, agent, 0, 0)', "seccomp",
           refused=("ptrace EPERM",)),
    Attack(
        "memory of the agent by /proc/PID/mem", "root",
        'for name in ("mem", "maps"): attempt(name, lambda: open(f"/proc/{agent}/{name}", "rb").read(1))',
        "capabilities, agent not dumpable", refused=("mem EACCES", "maps EACCES"),
    ),
    Attack(
        "memory of the agent by process_vm_readv", "root",
        f'call("readv", {N["process_vm_readv"]}, agent, 0, 0, 0, 0, 0)\n'
        f'call("writev", {N["process_vm_writev"]}, agent, 0, 0, 0, 0, 0)',
        "seccomp", refused=("readv EPERM", "writev EPERM"),
    ),
    Attack(
        "environment of the agent", "root",
        """
attempt("environ", lambda: open(f"/proc/{agent}/environ").read())
if any("agents-own" in value for value in os.environ.values()): print("LEAKED")
print("own", sorted(set(os.environ) - {"PATH", "LANG", "HOME", "TMPDIR", "PWD", "OLDPWD", "LC_CTYPE"}))
""", "scrubbed environment, capabilities", refused=("environ EACCES", "own []"),
    ),
    Attack(
        "move to another cgroup", "user",
        """
mine = open("/proc/self/cgroup").read().strip().partition("0::")[2].split("\\n")[0]
root = "/sys/fs/cgroup"
for what, place in (("top", root), ("parent", root + os.path.dirname(mine)), ("session", root + "/session")):
    attempt(what, lambda: open(place + "/cgroup.procs", "w").write("0"))
""", "user", refused=("top EACCES", "parent EACCES", "session EACCES"),
    ),
    Attack(
        "move to another cgroup as root, and raising its memory limit", "isolated-root",
        """
for directory, _, files in os.walk("/sys/fs/cgroup"):
    for name in files:
        if name in ("cgroup.procs", "memory.max", "pids.max", "cgroup.subtree_control"):
            try: open(os.path.join(directory, name), "w").write("0")
            except OSError as x: found = x.errno
            else: print("WRITTEN", directory, name)
say("cgroupfs", found)
""", "namespaces (read-only cgroup tree)", refused=("cgroupfs EROFS",),
    ),
    Attack(
        "new namespaces", "root",
        f"""
call("unshare", {N["unshare"]}, 0x10000000)
call("setns", {N["setns"]}, 0, 0)
call("clone", {N["clone"]}, 0x10000000 | 17, 0, 0, 0, 0)
call("clone3", {N["clone3"]}, 0, 0)
""", "seccomp", refused=("unshare EPERM", "setns EPERM", "clone EPERM", "clone3 ENOSYS"),
    ),
    Attack(
        "mounting", "root",
        f'call("mount", {N["mount"]}, b"x", b"/mnt", b"tmpfs", 0, 0)\ncall("fsopen", {N["fsopen"]}, b"tmpfs", 0)\n'
        f'call("chroot", {N["chroot"]}, b"/tmp")\ncall("pivot", {N["pivot_root"]}, b"/", b"/")',
        "seccomp", refused=("mount EPERM", "fsopen EPERM", "chroot EPERM", "pivot EPERM"),
    ),
    Attack(
        "writing to /proc and /sys of the host", "isolated-root",
        """
for what, path in (("core", "/proc/sys/kernel/core_pattern"), ("sysrq", "/proc/sysrq-trigger"), ("etc", "/etc/passwd"),
                   ("hostname", "/proc/sys/kernel/hostname")):
    attempt(what, lambda: open(path, "a").write("x"))
""", "namespaces (read-only root, masked /proc)",
        refused=("core EROFS", "sysrq EROFS", "etc EROFS", "hostname EROFS"),
    ),
    Attack(
        "seeing and signalling the host's processes", "isolated-root",
        """
print("seen", len([p for p in os.listdir("/proc") if p.isdigit()]) <= 4)
attempt("agent", lambda: os.kill(agent, 9))
""", "namespaces (own PID namespace)", refused=("seen True", "agent ESRCH"),
    ),
    Attack(
        "network that was not declared", "isolated",
        """
attempt("agent", lambda: socket.create_connection(("127.0.0.1", agent_port), 5))
attempt("world", lambda: socket.create_connection(("192.0.2.1", 80), 5))
""", "namespaces (own network namespace)", refused=("agent ECONNREFUSED", "world ENETUNREACH"),
    ),
    Attack(
        "sockets that were not declared, with a view of the host", "no-network",
        'attempt("inet", lambda: socket.create_connection(("127.0.0.1", agent_port), 5))', "namespaces or seccomp",
        check=lambda r, _: "DONE" not in r.stdout or _fail(r),
    ),
    Attack(
        "set-user-ID program", "user",
        'print("effective", os.spawnv(os.P_WAIT, scratch + "/suid-test", ["test", "-w", "/etc/shadow"]))',
        "no-new-privs", refused=("effective 1",),
    ),
    Attack("core dump", "user", 'os.chdir(scratch)\nsignal.signal(11, signal.SIG_DFL)\nos.kill(os.getpid(), 11)',
           "rlimits", check=_no_core),
    Attack(
        "inherited descriptors", "user",
        """
listing = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY)
print("descriptors", sorted({int(n) for n in os.listdir(listing)} - {listing, listing + 1}))
""", "launcher", refused=("descriptors [0, 1, 2]",),
    ),
    Attack(
        "typing into a terminal (TIOCSTI)", "root",
        """
import fcntl, pty
master, slave = pty.openpty()
attempt("sti", lambda: fcntl.ioctl(slave, 0x5412, b"x"))
attempt("linux", lambda: fcntl.ioctl(slave, 0x541c, b"x"))
attempt("tty", lambda: open("/dev/tty"))
""", "seccomp, session of its own", refused=("sti EPERM", "linux EPERM", "tty ENXIO"),
    ),
    Attack(
        "setting the clock", "root",
        f'attempt("clock", lambda: time.clock_settime(0, 0))\ncall("adj", {N["adjtimex"]}, bytes(256))',
        "seccomp, capabilities", refused=("clock EPERM", "adj EPERM"),
    ),
    Attack(
        "kernel keyring", "root",
        f'call("add_key", {N["add_key"]}, b"user", b"x", b"y", 1, -3)\ncall("keyctl", {N["keyctl"]}, 0, -3, 0)',
        "seccomp", refused=("add_key EPERM", "keyctl EPERM"),
    ),
    Attack(
        "kernel modules, kexec, reboot", "root",
        f'call("module", {N["finit_module"]}, 0, b"", 0)\ncall("kexec", {N["kexec_load"]}, 0, 0, 0, 0)\n'
        f'call("reboot", {N["reboot"]}, 0xfee1dead, 672274793, 0, 0)',
        "seccomp", refused=("module EPERM", "kexec EPERM", "reboot EPERM"),
    ),
    Attack(
        "bpf, perf, userfaultfd, io_uring", "root",
        f'call("bpf", {N["bpf"]}, 0, 0, 0)\ncall("perf", {N["perf_event_open"]}, 0, 0, 0, 0, 0)\n'
        f'call("fault", {N["userfaultfd"]}, 0)\ncall("uring", {N["io_uring_setup"]}, 1, 0)',
        "seccomp", refused=("bpf EPERM", "perf EPERM", "fault EPERM", "uring EPERM"),
    ),
    Attack("system calls by their x32 numbers", "root", 'call("x32", 0x40000000 + 39)', "seccomp",
           refused=("x32 EPERM",)),
    Attack("making a device", "root", 'attempt("device", lambda: os.mknod("disk", 0o60600, os.makedev(8, 0)))',
           "capabilities", refused=("device EPERM",)),
    Attack(
        "links in place of its working directory", "user",
        """
here = os.getcwd()
os.symlink(scratch + "/victim", "inside")
os.mkdir("deep"); os.symlink(scratch + "/victim/precious", "deep/file")
os.rename(here, here + "-moved")
os.symlink(scratch + "/victim", here)
os.system("rm -rf " + here + "-moved")
""", "removal that follows no link", check=_victim_unharmed,
    ),
    Attack(
        "printing a secret, and looking for it elsewhere", "user",
        """
value = os.read(int(os.environ["TOKEN_FD"]), 100).decode()
print("read", len(value), value)
everywhere = open("/proc/self/environ").read() + open("/proc/self/cmdline").read()
print("elsewhere", value in everywhere)
""", "descriptor, redaction", refused=("elsewhere False",), secrets={"TOKEN": "correct horse battery"}, check=_redacted,
    ),
]  # fmt: skip


def _fail(result: RunResult) -> None:
    raise AssertionError(result)
