"""Finding out what the host offers: the texts of /proc, and honest reasons for "not enforced"."""

from __future__ import annotations

from pathlib import Path

import pytest

import sandbox
from sandbox import EnforcedBy, Limits, cgroup

UNIFIED = "29 23 0:26 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate"
HYBRID = """\
30 25 0:26 / /sys/fs/cgroup ro,nosuid shared:9 - tmpfs tmpfs ro,mode=755
31 30 0:27 / /sys/fs/cgroup/unified rw,nosuid shared:10 - cgroup2 cgroup2 rw
32 30 0:28 / /sys/fs/cgroup/memory rw,nosuid shared:11 - cgroup cgroup rw,memory
"""
CONTAINER = "612 603 0:26 / /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw,nsdelegate"
HOST_NAMESPACE = "612 603 0:26 /docker/abc /sys/fs/cgroup ro - cgroup2 cgroup rw"
ODD_PLACE = r"612 603 0:26 / /mnt/with\040space rw - cgroup2 cgroup rw"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (UNIFIED, [cgroup.Mount(Path("/sys/fs/cgroup"), "/", True)]),
        (HYBRID, [cgroup.Mount(Path("/sys/fs/cgroup/unified"), "/", True)]),
        (CONTAINER, [cgroup.Mount(Path("/sys/fs/cgroup"), "/", False)]),
        (HOST_NAMESPACE, [cgroup.Mount(Path("/sys/fs/cgroup"), "/docker/abc", False)]),
        (ODD_PLACE, [cgroup.Mount(Path("/mnt/with space"), "/", True)]),
        ("32 30 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory", []),
        ("", []),
    ],
)
def test_mounts(text: str, expected: list[cgroup.Mount]) -> None:
    assert cgroup.mounts(text) == expected


def test_own_cgroup() -> None:
    assert (
        cgroup.own_cgroup("12:memory:/x\n0::/system.slice/alertmedic.service\n") == "/system.slice/alertmedic.service"
    )
    assert cgroup.own_cgroup("0::/x/y (deleted)\n") == "/x/y"
    assert cgroup.own_cgroup("12:memory:/x\n") == "/"


def test_a_cgroup_is_found_in_the_mount_that_shows_it() -> None:
    whole = cgroup.Mount(Path("/sys/fs/cgroup"), "/", True)
    part = cgroup.Mount(Path("/sys/fs/cgroup"), "/docker/abc", True)
    assert whole.holding("/a/b") == Path("/sys/fs/cgroup/a/b")
    assert whole.holding("/") == Path("/sys/fs/cgroup")
    assert part.holding("/docker/abc/x") == Path("/sys/fs/cgroup/x")
    assert part.holding("/docker/abc") == Path("/sys/fs/cgroup")
    assert part.holding("/docker/abcdef") is None


@pytest.mark.parametrize("parent", ["/tmp", "/no/such/directory", "/sys/fs/cgroup/no-such-cgroup-here", "relative"])
def test_a_parent_that_is_no_cgroup_is_said_so(parent: str) -> None:
    found = sandbox.probe(parent)
    assert found.enforced_by is EnforcedBy.RLIMITS
    assert found.root is None
    assert parent in found.reason
    assert "mount a writable cgroup v2 hierarchy" in found.reason


def test_here(held: sandbox.Capability) -> None:
    assert held.enforced_by.limits_enforced == (held.reason == "")
    assert (held.root is None) == (held.enforced_by is EnforcedBy.RLIMITS)
    if held.root is not None:
        left = [p.name for p in held.root.iterdir() if p.is_dir() and p.name.startswith("probe-")]
        assert not left
        assert held.enforced_by.limits_enforced == ({"cpu", "memory", "pids"} <= held.controllers)


async def test_hybrid_host_kills_by_cgroup_and_says_that_limits_do_not_hold(held: sandbox.Capability) -> None:
    if held.enforced_by is not EnforcedBy.CGROUP2_KILL:
        pytest.skip("no hybrid host")
    assert "limits are not enforced" in held.reason
    assert "boot with" in held.reason
    with pytest.raises(sandbox.SandboxUnavailable, match="limits are not enforced"):
        await sandbox.run(["true"], Limits(), protection="required")


def test_io_limits_need_one_controller_more() -> None:
    root = Path("/sys/fs/cgroup/alertmedic")
    full = sandbox.Capability(EnforcedBy.CGROUP2, root, frozenset({"cpu", "memory", "pids"}))
    assert full.holding(Limits()) is full
    less = full.holding(Limits(io=("8:0 wbps=1",)))
    assert less.enforced_by is EnforcedBy.CGROUP2_KILL
    assert "io controller" in less.reason
