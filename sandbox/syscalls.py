"""The seccomp filter: which system calls no sandboxed program may make.

Called by `sandbox.hardening`. A remedy restarts, signals, queries, removes files; it never traces a process, mounts,
loads a module, makes a namespace or reads another process's memory. Those calls fail with EPERM here, so that a program
that was talked into something has far less of the kernel to work with. A deny list and no allow list: an action may be
any program, and one that dies of a call nobody thought of heals nothing.

The filter is classic BPF (seccomp(2), Documentation/userspace-api/seccomp_filter.rst), put together here since the one
thing a library adds, names to numbers, is the table below. The kernel caches which calls it lets through without a
look at their arguments, so that a filtered program runs as fast as another. Never installs anything by itself.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from dataclasses import dataclass
from typing import Final

_ARCHITECTURES: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # linux/audit.h
_X32_BIT = 0x40000000  # the other ABI of the same architecture: the same calls by other numbers

# name: (x86_64, aarch64); None: not there. From the kernel's syscall_64.tbl and asm-generic/unistd.h.
_TRACING: Final = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "process_madvise": (440, 440),
}  # fmt: skip
_DENIED: Final = {
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428),
    "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432),
    "fspick": (433, 433), "mount_setattr": (442, 442), "unshare": (272, 97), "setns": (308, 268),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "reboot": (169, 142), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264), "fanotify_init": (300, 262),
    "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89), "quotactl": (179, 60), "quotactl_fd": (443, 443),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171),
    "sethostname": (170, 161), "setdomainname": (171, 162), "syslog": (103, 116), "vhangup": (153, 58),
    "lookup_dcookie": (212, 18), "nfsservctl": (180, 42), "move_pages": (279, 239), "migrate_pages": (256, 238),
    "iopl": (172, None), "ioperm": (173, None), "modify_ldt": (154, None), "uselib": (134, None),
}  # fmt: skip
_CLONE, _CLONE3 = (56, 220), (435, 435)
_IOCTL, _SOCKET = (16, 29), (41, 198)
# Calls whose first argument is a process: the agent may not be it.
_AT_PROCESS: Final = {
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_open": (434, 434), "prlimit64": (302, 261), "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "sched_setattr": (314, 274), "setpgid": (109, 154),
}  # fmt: skip
_KILL = _AT_PROCESS["kill"]
# CLONE_NEWTIME NEWNS NEWCGROUP NEWUTS NEWIPC NEWUSER NEWPID NEWNET (sched.h); the first shares its bit with the exit
# signal of clone, which is 128 for nobody.
_NEW_NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
_TERMINAL = (0x5412, 0x541C, 0x5423)  # TIOCSTI types into it, TIOCLINUX pastes into it, TIOCSETD changes its protocol
_LOCAL_FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6

_LOAD, _JUMP_EQUAL, _JUMP_ATLEAST, _JUMP_ANY, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data; both architectures are little-endian


@dataclass(frozen=True, slots=True)
class Filter:
    """What the calls are judged by. `sockets`: "none", "local" (Unix and IP, no raw, packet or netlink ones) or "any";
    `tracing`: may look into other processes, as profilers must; `protect`: a process that may be neither signalled nor
    tuned, 0 where its number means another (a PID namespace)."""

    sockets: str = "any"
    tracing: bool = False
    protect: int = 0


def unavailable() -> str:
    """Why there can be no filter on this machine; "" if there can."""
    if platform.machine() not in _ARCHITECTURES:
        return f"no table of system calls for {platform.machine()}"
    if not any(line.startswith("Seccomp:") for line in _status()):
        return "this kernel has no seccomp"
    return ""


def _status() -> list[str]:
    try:
        with open("/proc/self/status") as status:  # noqa: PTH123
            return status.readlines()
    except OSError:
        return []


def program(what: Filter) -> bytes:
    """The filter as an array of struct sock_filter, as bwrap's --seccomp and seccomp(2) take it."""
    machine = platform.machine()
    column = list(_ARCHITECTURES).index(machine)
    code = [_step(_LOAD, _ARCH), *_unless_equal(_ARCHITECTURES[machine], _KILL_PROCESS), _step(_LOAD, _NUMBER)]
    if machine == "x86_64":
        code += [_step(_JUMP_ATLEAST, _X32_BIT, 0, 1), _refuse(errno.EPERM)]
    denied = _DENIED if what.tracing else _DENIED | _TRACING
    for numbers in denied.values():
        if (number := numbers[column]) is not None:
            code += [_step(_JUMP_EQUAL, number, 0, 1), _refuse(errno.EPERM)]
    code += [_step(_JUMP_EQUAL, _CLONE3[column], 0, 1), _refuse(errno.ENOSYS)]  # flags in memory: libc takes clone then
    flags = [_step(_JUMP_ANY, _NEW_NAMESPACES, 0, 1), _refuse(errno.EPERM)]
    code += _when(_CLONE[column], 0, flags)
    code += _when(_IOCTL[column], 1, _refused(_TERMINAL))
    if what.sockets == "none":
        code += [_step(_JUMP_EQUAL, _SOCKET[column], 0, 1), _refuse(errno.EACCES)]
    elif what.sockets == "local":
        known = [_step(_JUMP_EQUAL, family, len(_LOCAL_FAMILIES) - i, 0) for i, family in enumerate(_LOCAL_FAMILIES)]
        code += _when(_SOCKET[column], 0, [*known, _refuse(errno.EAFNOSUPPORT)])
    if what.protect:
        everyone = (0xFFFFFFFF, -what.protect & 0xFFFFFFFF)  # kill(-1): all there are; kill(-pid): its group
        code += _when(_KILL[column], 0, _refused((what.protect, *everyone)))
        for name, numbers in _AT_PROCESS.items():
            if name != "kill":
                code += _when(numbers[column], 0, _refused((what.protect,)))
    return b"".join([*code, _step(_RETURN, _ALLOW)])


class _Program(ctypes.Structure):
    """struct sock_fprog of linux/filter.h."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def prepared(code: bytes) -> ctypes.Structure:
    """The filter as prctl(2) takes it by address."""
    return _Program(len(code) // 8, code)


def install(code: bytes) -> None:
    """Puts the filter on this thread and all that it will start, for ever. no_new_privs must be set. OSError if not."""
    libc = ctypes.CDLL(None, use_errno=True)
    given = prepared(code)
    if libc.prctl(22, 2, ctypes.byref(given), 0, 0) != 0:  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER: this thread alone
        number = ctypes.get_errno()
        raise OSError(number, f"seccomp filter not taken: {os.strerror(number)}")


def _step(code: int, k: int, true: int = 0, false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, true, false, k)


def _refuse(number: int) -> bytes:
    return _step(_RETURN, _ERRNO | number)


def _unless_equal(value: int, answer: int) -> list[bytes]:
    return [_step(_JUMP_EQUAL, value, 1, 0), _step(_RETURN, answer)]


def _refused(values: tuple[int, ...]) -> list[bytes]:
    return [step for value in values for step in (_step(_JUMP_EQUAL, value, 0, 1), _refuse(errno.EPERM))]


def _when(number: int, argument: int, judge: list[bytes]) -> list[bytes]:
    """For this call: its argument (the low 32 bits, all that the kernel reads of an int) is judged; else let through.
    The number is loaded again behind it for the calls that come after, which is why it ends with a return."""
    body = [_step(_LOAD, _ARGUMENTS + 8 * argument), *judge, _step(_RETURN, _ALLOW)]
    return [_step(_JUMP_EQUAL, number, 0, len(body)), *body]
