"""What a sandboxed run is given and what it reports. Used by `sandbox.run`, `actions.runner` and the records."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

import msgspec

MIB = 1024 * 1024

Protection = Literal["required", "automatic"]


class EnforcedBy(StrEnum):
    """What held the process in its limits. Written into every result, health and metrics; never guessed."""

    CGROUP2 = "cgroup2"  # memory, cpu and pids limits by cgroup v2, tree kill by cgroup.kill
    CGROUP2_KILL = "cgroup2-kill+rlimits"  # a v2 leaf without controllers: cgroup.kill, rlimits
    RLIMITS = "rlimits"  # no v2 leaf: rlimits, process-tree kill by psutil

    @property
    def limits_enforced(self) -> bool:
        return self is EnforcedBy.CGROUP2


class Layer(StrEnum):
    """One thing that holds a run. A result lists those that did, and health those that could."""

    CGROUP = "cgroup"  # limits and tree kill
    CGROUP_KILL = "cgroup-kill"  # tree kill only
    NAMESPACES = "namespaces"  # read-only root, private /tmp, /dev and /proc
    NO_NETWORK = "no-network"
    USER = "user"  # another user than the agent's
    CAPABILITIES = "capabilities"
    SECCOMP = "seccomp"
    NO_NEW_PRIVS = "no-new-privs"
    RLIMITS = "rlimits"


class Needs(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a program must have of the host. The default is all of it, for an action that signals a service or talks to
    a server; whatever is given up is taken away by namespaces where they work, the network also without them.
    `isolation: required` refuses to run without the namespace layer."""

    network: Literal["none", "loopback", "any"] = "any"  # loopback: the host's, but Unix and IP sockets only
    processes: Literal["own", "host"] = "host"  # own: sees and signals what it started, nothing else
    write: tuple[str, ...] = ("/",)  # beside its private directory; () for nothing
    inspect: bool = False  # looks into other processes, as a profiler does
    isolation: Literal["automatic", "required"] = "automatic"

    @property
    def restricted(self) -> bool:
        return self.network == "none" or self.processes == "own" or "/" not in self.write


class Limits(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Limits of one run. Defaults are those of docs/architecture.md (25 % of a CPU, 128 MiB, 10 pids)."""

    cpu_quota_us: int = 25_000
    cpu_period_us: int = 100_000
    memory_bytes: int = 128 * MIB
    swap_bytes: int = 0
    pids: int = 10
    io: tuple[str, ...] = ()  # io.max lines, "8:0 wbps=1048576"
    timeout_seconds: float = 10.0
    output_bytes: int = 64 * 1024  # of stdout and of stderr, each; the rest is counted and dropped
    open_files: int = 64
    file_bytes: int = 64 * MIB  # RLIMIT_FSIZE


class Totals(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Limits of all runs together, on the cgroup above their leaves. 0: none."""

    cpu_percent: Annotated[int, msgspec.Meta(ge=0, le=100_000)] = 100  # of one CPU
    memory_bytes: Annotated[int, msgspec.Meta(ge=0, le=2**50)] = 1024 * MIB
    pids: Annotated[int, msgspec.Meta(ge=0, le=4_194_304)] = 512


class RunResult(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of one run. `exit_code` is None when a signal ended it (then `signal` says which)."""

    exit_code: int | None
    signal: int | None = None
    timed_out: bool = False
    oom_killed: bool = False
    stdout: str = ""
    stderr: str = ""
    stdout_dropped: int = 0  # bytes beyond the bound
    stderr_dropped: int = 0
    seconds: float = 0.0
    cpu_seconds: float | None = None
    memory_peak_bytes: int | None = None
    pids_refused: int | None = None  # pids.events max
    enforced_by: EnforcedBy = EnforcedBy.RLIMITS
    layers: tuple[Layer, ...] = ()  # what held it, outermost first
    leaf: str = ""
    error: str = ""  # why the program could not be started at all (exit_code and signal: None), or be cleaned up after

    @property
    def ok(self) -> bool:
        return self.exit_code == 0 and not self.timed_out and not self.oom_killed and not self.error
