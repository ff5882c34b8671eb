"""Starting a program with nothing in between: cloned into its cgroup, prepared by a list of system calls, executed.

Called by `sandbox.launcher`. Python can start a child fast (vfork) or prepare it (fork: 27 ms with a 500 MB parent). It
cannot clone into a cgroup at all; a process that moves itself there instead makes the kernel wait for every CPU, 10 ms
and more on a machine where that happens rarely. So the child is made by 144 bytes of machine code: clone3(2) with
CLONE_VM, CLONE_VFORK, CLONE_PIDFD and CLONE_INTO_CGROUP; in the child, which borrows our memory while this thread
waits, one system call after the other from a list that was made before; the last is execve. Whatever fails is written
where the parent finds it, so nothing has to be guessed from an exit code or a message. Never used where the code cannot
be: other processors than x86_64, policies against executable memory; there `sandbox.launcher` takes its shell script.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import platform
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# int64 start(struct clone_args *rdi, size_t rsi, struct call *rdx, int64 out[2] rcx); Intel syntax:
#   push rbx; push r12; push r13; push r14; mov r12,rdx; mov r13,rcx
#   mov eax,435; syscall                          clone3
#   test rax,rax; jz child; pop r14; pop r13; pop r12; pop rbx; ret
# child: xor r14d,r14d; xor ebx,ebx               r14: the last result, rbx: number of the call
# again: mov rax,[r12]; mov rdi,[r12+8]; mov rsi,[r12+16]; mov rdx,[r12+24]
#   mov r10,[r12+32]; mov r8,[r12+40]; mov r9,[r12+48]
#   test byte ptr [r12+56],1; jz call; mov rdi,r14
# call: syscall; mov r14,rax; test rax,rax; jns next; test byte ptr [r12+56],2; jnz next
#   mov [r13],rax; mov [r13+8],rbx; mov eax,231; mov edi,125; syscall              exit_group(125)
# next: add r12,64; inc rbx; jmp again
# The child never touches the stack, which is the parent's.
_CODE = bytes.fromhex(
    "534154415541564989d44989cdb8b30100000f054885c07408415e415d415c5bc34531f631db498b0424498b7c2408498b742410498b5424184d"
    "8b5424204d8b4424284d8b4c243041f64424380174034c89f70f054989c64885c0791c41f64424380275144989450049895d08b8e7000000bf7d"
    "0000000f054983c44048ffc3eba4"
)
_CLONE_VM, _CLONE_PIDFD, _CLONE_VFORK = 0x100, 0x1000, 0x4000
_CLONE_CLEAR_SIGHAND, _CLONE_INTO_CGROUP = 0x100000000, 0x200000000
RESULT_FIRST, MAY_FAIL = 1, 2  # flags of a call: its first argument is the last result; its failure does not matter


@dataclass(frozen=True, slots=True)
class Call:
    """One system call of the child. Arguments are numbers or ctypes objects, whose address is passed."""

    name: str
    arguments: tuple[Any, ...] = ()
    flags: int = 0


class Failed(Exception):  # noqa: N818
    """A call of the child failed, so the program was not started."""

    def __init__(self, call: str, number: int) -> None:
        super().__init__(f"{call}: {os.strerror(number)}")
        self.call, self.number = call, number


NUMBERS = {
    "write": 1, "open": 2, "rt_sigaction": 13, "rt_sigprocmask": 14, "execve": 59, "fcntl": 72, "chdir": 80,
    "umask": 95, "setsid": 112, "setgroups": 116, "setresuid": 117, "setresgid": 119, "prctl": 157, "dup3": 292,
    "prlimit64": 302, "close_range": 436,
}  # fmt: skip


class _CloneArguments(ctypes.Structure):
    """struct clone_args of linux/sched.h."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in ("flags", "pidfd", "child_tid", "parent_tid", "exit_signal", "stack", "stack_size", "tls",
                     "set_tid", "set_tid_size", "cgroup")
    )  # fmt: skip


@functools.cache
def unavailable() -> str:
    """Why programs cannot be started like this here; "" if they can. Found out by doing it once."""
    if platform.machine() != "x86_64" or ctypes.sizeof(ctypes.c_void_p) != 8:
        return f"no code for {platform.machine()}"
    try:
        pid, pidfd = start([execute(["/bin/true"], {})], None)
    except (OSError, Failed) as x:
        return str(x)
    os.close(pidfd)
    _, status = os.waitpid(pid, 0)
    return "" if status == 0 else f"/bin/true ended with status {status}"


def start(calls: Sequence[Call], cgroup: int | None) -> tuple[int, int]:
    """A child in the cgroup of that descriptor that makes these calls: its process id and a pidfd. Returns when its
    execve has succeeded. Raises Failed when a call has not, OSError when there is no child."""
    code = _function()
    pidfd, out = ctypes.c_int(-1), (ctypes.c_int64 * 2)()
    flags = _CLONE_VM | _CLONE_VFORK | _CLONE_PIDFD | _CLONE_CLEAR_SIGHAND
    arguments = _CloneArguments(flags=flags, pidfd=ctypes.addressof(pidfd), exit_signal=signal.SIGCHLD)
    if cgroup is not None:
        arguments.flags |= _CLONE_INTO_CGROUP
        arguments.cgroup = cgroup
    table = (ctypes.c_uint64 * (8 * len(calls)))()
    for at, call in enumerate(calls):
        given = [_value(a) for a in call.arguments]
        table[8 * at : 8 * at + 8] = [NUMBERS[call.name], *given, *[0] * (6 - len(given)), call.flags]
    # No signal may be handled in the child, whose stack is ours.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        where = [ctypes.addressof(thing) for thing in (arguments, table, out)]
        pid = code(where[0], ctypes.sizeof(arguments), where[1], where[2])
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if pid < 0:
        raise OSError(-pid, f"clone3: {os.strerror(-pid)}")
    if out[0]:
        os.close(pidfd.value)
        os.waitpid(pid, 0)
        raise Failed(calls[out[1]].name, -out[0])
    return pid, pidfd.value


def execute(argv: Sequence[str], env: dict[str, str]) -> Call:
    """The last call of every list; before it comes `unmask`."""
    words = [os.fsencode(a) for a in argv]
    pairs = [os.fsencode(f"{name}={value}") for name, value in env.items()]
    return Call("execve", (text(argv[0]), _strings(words), _strings(pairs)))


def unmask() -> Call:
    """Ends the blocking of signals that `start` begins, so that they reach the program as any other."""
    return Call("rt_sigprocmask", (2, ctypes.c_uint64(0), 0, 8))  # SIG_SETMASK


def text(value: str) -> Any:
    return ctypes.create_string_buffer(os.fsencode(value))


def _strings(values: list[bytes]) -> Any:
    return (ctypes.c_char_p * (len(values) + 1))(*values, None)


def _value(argument: Any) -> int:
    return argument & (2**64 - 1) if isinstance(argument, int) else ctypes.addressof(argument)


_kept: list[mmap.mmap] = []  # the code's memory, for as long as the process lives


@functools.cache
def _function() -> Any:
    """The code in memory of its own: written, then made executable and read-only."""
    memory = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    memory.write(_CODE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if libc.mprotect(address, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_EXEC) != 0:
        raise OSError(ctypes.get_errno(), f"executable memory: {os.strerror(ctypes.get_errno())}")
    kind = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p)
    _kept.append(memory)
    return kind(address)
