"""What this host lets the sandbox enforce, found out by doing it once.

`probe` is called by the service at start (its answer goes into health and metrics) and by the first `run` if nobody
did. It believes no version number and no mount option: it makes a leaf, puts a process in and takes it all away again.
Never says more than it has seen: with one of the controllers missing the limits are not called enforced.
"""

from __future__ import annotations

import errno
import os
import secrets
import subprocess
from dataclasses import dataclass
from pathlib import Path

from sandbox import cgroup, direct
from sandbox.model import EnforcedBy, Limits, Totals

_HELP_MOUNT = (
    "mount a writable cgroup v2 hierarchy: boot with systemd.unified_cgroup_hierarchy=1; under systemd give the unit "
    "Delegate=yes; in a pod use containerd 2.1 or newer with cgroup_writable, or CRI-O's or GKE's setting for it"
)


class SandboxUnavailable(RuntimeError):  # noqa: N818
    """Limits are required and cannot be enforced here. Raised before anything has been started."""


@dataclass(frozen=True, slots=True)
class Capability:
    """What holds a run. `root`: the cgroup under which leaves are made (None without one); `controllers`: those that
    every leaf gets; `reason`: why limits are not enforced and what to do about it, "" when they are."""

    enforced_by: EnforcedBy
    root: Path | None = None
    controllers: frozenset[str] = frozenset()
    reason: str = ""

    def holding(self, limits: Limits) -> Capability:
        """What these particular limits are held by: `io.max` needs one controller more than the others."""
        if limits.io and self.enforced_by.limits_enforced and "io" not in self.controllers:
            reason = f"io limits are asked for and the io controller is not available under {self.root}"
            return Capability(EnforcedBy.CGROUP2_KILL, self.root, self.controllers, reason)
        return self


class _Unusable(Exception):  # noqa: N818
    """A base cgroup that cannot be used, with the reason in words."""


def probe(parent: str = "", totals: Totals | None = None) -> Capability:
    """Finds where leaves can be made and what limits hold there. Blocks for some milliseconds; never raises.

    `parent` is a cgroup directory given to the agent (it must lie in a cgroup v2 mount). Without it, in this order: the
    agent's own cgroup if it is delegated to us (`Delegate=yes`, a container's root, chowned to our user), else the root
    of the hierarchy. In a delegated tree, processes in the way are moved into a leaf of their own (`cgroup.enable`).
    `totals` are written to the node above the leaves; without them it is left as it is.
    """
    try:
        found = cgroup.mounts(Path("/proc/self/mountinfo").read_text())
        own = Path("/proc/self/cgroup").read_text()
    except OSError as x:
        return Capability(EnforcedBy.RLIMITS, reason=f"cgroups cannot be looked up: {x}")
    if not found:
        return Capability(EnforcedBy.RLIMITS, reason=f"no cgroup v2 hierarchy is mounted: {_HELP_MOUNT}")
    reasons = []
    for base, owned in [(Path(parent), True)] if parent else _bases(found, cgroup.own_cgroup(own)):
        try:
            if not any(base.is_relative_to(m.point) for m in found):
                raise _Unusable("it is not in a cgroup v2 mount")
            return _try(base, totals, owned=owned, v1=":memory:" in own)
        except _Unusable as x:
            reasons.append(f"{base}: {x}")
        except OSError as x:
            reasons.append(f"{base}: {x}")
    return Capability(EnforcedBy.RLIMITS, reason=f"{'; '.join(reasons)}: {_HELP_MOUNT}")


def _bases(found: list[cgroup.Mount], own: str) -> list[tuple[Path, bool]]:
    """Cgroups below which a node may be made, best first, and whether all in them is ours to move."""
    bases: list[tuple[Path, bool]] = []
    for mount in found:
        here = mount.holding(own)
        if here is not None:
            # An agent that has made room, or was put into a subgroup (DelegateSubgroup=), finds its tree one above.
            near = [here.parent] if here.name == cgroup.AGENT_LEAF else [here, here.parent]
            bases += [(c, True) for c in near if c.is_relative_to(mount.point) and _delegated(c, mount)]
        bases.append((mount.point, False))
    return bases


def _delegated(directory: Path, mount: cgroup.Mount) -> bool:
    """Is this cgroup, with all that is in it, ours? systemd marks a delegated one by an extended attribute; a container
    has a namespace of its own, whose root is not the real one (only that lacks cgroup.type); or root has chowned it."""
    for name in ("user.delegate", "trusted.delegate"):
        try:
            if os.getxattr(directory, name) == b"1":
                return True
        except OSError:
            continue  # no such attribute, or this kernel has none on cgroups: the other signs decide
    if not (directory / "cgroup.type").exists():
        return False
    if directory == mount.point and mount.root == "/":
        return True
    return os.geteuid() != 0 and directory.stat().st_uid == os.geteuid()


def _enter(trial: cgroup.Leaf) -> str:
    """Starts a process in the leaf, as runs will be. What is in the way, or ""."""
    if direct.unavailable():
        command = ["/bin/sh", "-c", 'echo 0 > "$1"', "probe", str(trial.procs)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=10)
        return done.stderr.strip() or f"exit code {done.returncode}" if done.returncode != 0 else ""
    leaf = os.open(trial.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        pid, pidfd = direct.start([direct.unmask(), direct.execute(["/bin/true"], {})], leaf)
    except (OSError, direct.Failed) as x:
        return str(x)
    finally:
        os.close(leaf)
    os.close(pidfd)
    return "" if os.waitpid(pid, 0)[1] == 0 else "/bin/true failed in it"


def _try(base: Path, totals: Totals | None, *, owned: bool, v1: bool) -> Capability:
    """Makes the node below `base` and a trial leaf in it. _Unusable or OSError: not here."""
    cgroup.enable(base, owned=owned)
    node = cgroup.node_under(base)
    controllers = cgroup.enable(node, owned=False)
    if totals is not None:
        cgroup.limit_node(node, totals)
    trial = cgroup.Leaf.create(node, f"probe-{secrets.token_hex(8)}")
    try:
        if not (trial.path / "cgroup.kill").exists():
            raise _Unusable("the kernel has no cgroup.kill (Linux 5.14 or newer has)")
        trial.limit(Limits(), controllers)
        if refused := _enter(trial):
            raise _Unusable(f"no process can enter a leaf: {refused}")
        if not trial.kill(5.0):
            raise _Unusable("a trial leaf did not become empty")
    except subprocess.SubprocessError as x:
        raise OSError(errno.EIO, f"the trial process failed: {x}", str(trial.path)) from x
    finally:
        trial.remove()
    missing = [c for c in cgroup.NEEDED if c not in controllers]
    if not missing:
        return Capability(EnforcedBy.CGROUP2, node, controllers)
    why = f"limits are not enforced: controllers {', '.join(missing)} are not available to leaves under {node}"
    if v1:
        why += " (cgroup v1 holds them): boot with systemd.unified_cgroup_hierarchy=1 cgroup_no_v1=all"
    else:
        why += ": have them delegated (systemd: Delegate=yes), or name a cgroup that has them as the sandbox's parent"
    return Capability(EnforcedBy.CGROUP2_KILL, node, controllers, why)
