"""What a sandboxed program cannot get back: privileges, system calls, capabilities, the view of the host.

Called by `sandbox.launcher` for each start and by health reports. The cheap layers (no_new_privs, the seccomp filter,
the capability bounding set) are system calls that the new process makes before its program begins (`calls`). Where the
launcher cannot have it do that, the *thread* that starts it gives them up for ever, and the process inherits that
(`lock_down`); hence one pool of threads for each `Profile`. Which layers there are is found out by doing it, and said
in every result.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sandbox import direct, namespaces, syscalls
from sandbox.model import Layer, Needs

MAX_RUNS = 64
_PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 4, 24, 38  # prctl(2)
_CAP_SYS_PTRACE = 19
# What root may do here and no action needs (linux/capability.h): left are those over files, ownership, leases (by which
# a file that somebody writes to is not removed), signals, ports, users and network settings.
_DROPPED = {
    "dac_read_search": 2, "setpcap": 8, "linux_immutable": 9, "net_raw": 13, "ipc_lock": 14, "ipc_owner": 15,
    "sys_module": 16, "sys_rawio": 17, "sys_chroot": 18, "sys_ptrace": _CAP_SYS_PTRACE, "sys_pacct": 20,
    "sys_admin": 21, "sys_boot": 22, "sys_resource": 24, "sys_time": 25, "sys_tty_config": 26, "mknod": 27,
    "audit_write": 29, "audit_control": 30, "setfcap": 31, "mac_override": 32, "mac_admin": 33,
    "syslog": 34, "wake_alarm": 35, "block_suspend": 36, "audit_read": 37, "perfmon": 38, "bpf": 39,
    "checkpoint_restore": 40,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Profile:
    """What a starting thread gives up. `namespaced`: bubblewrap installs the filter, after it has made its namespaces
    with the very calls that the filter forbids."""

    network: str = "any"
    inspect: bool = False
    namespaced: bool = False
    own_processes: bool = False
    locked: bool = False  # by the shell: the thread itself gives up what its children must not have

    @property
    def filter(self) -> syscalls.Filter:
        sockets = {"none": "none", "loopback": "local", "any": "any"}[self.network]
        if self.namespaced and self.network == "none":
            sockets = "any"  # a network namespace of its own reaches nothing, and a local socket pair is harmless
        protect = 0 if self.namespaced and self.own_processes else os.getpid()
        return syscalls.Filter(sockets, self.inspect, protect)


def profile_for(needs: Needs) -> Profile:
    """The namespace layer is taken where the needs leave something to hold back and it works here."""
    namespaced = needs.restricted and not namespaces.unavailable()
    return Profile(needs.network, needs.inspect, namespaced, needs.processes == "own", bool(direct.unavailable()))


@functools.cache
def threads(profile: Profile) -> ThreadPoolExecutor:
    """Where everything of a run that blocks is done, a thread for each run; further runs wait for their turn. These
    threads have given up what `profile` says, for ever, and must therefore serve nothing else."""
    return ThreadPoolExecutor(max_workers=MAX_RUNS, thread_name_prefix="sandbox")


_thread = threading.local()


def lock_down(profile: Profile) -> None:
    """Makes this thread, and what it will start, give up what `profile` says. OSError if the kernel refuses."""
    if getattr(_thread, "profile", None) == profile:
        return
    if _libc().prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"no_new_privs cannot be set: {os.strerror(ctypes.get_errno())}")
    if not profile.namespaced:
        for number in dropped(profile):
            _libc().prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)  # EINVAL: a kernel that does not have it; EPERM: not ours
        if not syscalls.unavailable():
            syscalls.install(filter_code(profile))
    _thread.profile = profile


@functools.cache
def filter_code(profile: Profile) -> bytes:
    return syscalls.program(profile.filter)


def dropped(profile: Profile) -> list[int]:
    """The capabilities that leave the bounding set: a program that root starts gets what is left (capabilities(7))."""
    if os.geteuid() != 0 or profile.namespaced:
        return []
    return [number for number in _DROPPED.values() if not (profile.inspect and number == _CAP_SYS_PTRACE)]


def calls(profile: Profile) -> tuple[list[direct.Call], list[direct.Call]]:
    """What a program's process itself does to give all that up (`sandbox.direct`): before and after it has become
    another user."""
    before = [direct.Call("prctl", (_PR_SET_NO_NEW_PRIVS, 1))]
    before += [direct.Call("prctl", (_PR_CAPBSET_DROP, number), direct.MAY_FAIL) for number in dropped(profile)]
    after = []
    if not profile.namespaced and not syscalls.unavailable():
        after.append(direct.Call("prctl", (22, 2, syscalls.prepared(filter_code(profile)))))  # PR_SET_SECCOMP, filter
    return before, after


def layers(profile: Profile, *, leaf: bool, limited: bool, changed_user: bool) -> tuple[Layer, ...]:
    """What holds a run of this profile, outermost first."""
    held = []
    if leaf:
        held.append(Layer.CGROUP if limited else Layer.CGROUP_KILL)
    if profile.namespaced:
        held.append(Layer.NAMESPACES)
    if profile.network == "none" and (profile.namespaced or not syscalls.unavailable()):
        held.append(Layer.NO_NETWORK)
    if changed_user:
        held.append(Layer.USER)
    if changed_user or profile.namespaced or os.geteuid() != 0 or _bounding_set_can_shrink():
        held.append(Layer.CAPABILITIES)
    if not syscalls.unavailable():
        held.append(Layer.SECCOMP)
    return (*held, Layer.NO_NEW_PRIVS, Layer.RLIMITS)


@functools.cache
def _bounding_set_can_shrink() -> bool:
    """CAP_SETPCAP in our effective set."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> 8 & 1)
    return False


def present() -> list[str]:
    """The layers that this host gives to a run that asks for them, beside its cgroup."""
    missing = absent()
    offered = [Layer.NAMESPACES, Layer.NO_NETWORK, Layer.USER, Layer.CAPABILITIES, Layer.SECCOMP]
    return [layer.value for layer in (*offered, Layer.NO_NEW_PRIVS, Layer.RLIMITS) if layer.value not in missing]


def absent() -> dict[str, str]:
    """The layers that this host does not give, each with the reason and what to do about it."""
    reasons = {Layer.SECCOMP: syscalls.unavailable(), Layer.NAMESPACES: namespaces.unavailable()}
    if os.geteuid() == 0 and not _bounding_set_can_shrink():
        reasons[Layer.CAPABILITIES] = "CAP_SETPCAP is missing: the bounding set cannot be reduced"
    if os.geteuid() != 0:
        reasons[Layer.USER] = "only an agent that runs as root can run steps as another user"
    if reasons[Layer.SECCOMP] and reasons[Layer.NAMESPACES]:
        reasons[Layer.NO_NETWORK] = "neither namespaces nor seccomp"
    return {layer.value: reason for layer, reason in reasons.items() if reason}


def shield() -> None:
    """Keeps this process's memory and environment from others of its user: no core dump, no tracing, closed
    /proc/PID/{mem,environ,maps}. For the service's own process, once, at its start."""
    _libc().prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
