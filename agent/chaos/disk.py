"""Small disks of the world's own: files that hold a file system, mounted where nobody outside of the world sees them.

Used by `agent.chaos.world`. Only by the first process of a PID namespace (`agent.chaos.isolation`): with it end all
others, and with the last of them its mounts, so that a kill -9 unmounts them and frees the loop devices. Elsewhere
there are no small disks.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from agent.demo.children import bare_environment, run_to_end

PIECE_BYTES = 256 * 1024


def obstacle() -> str:
    """Why there can be no small disks here; "" where there can."""
    if os.geteuid() != 0:
        return "only root may mount"
    if os.getpid() != 1:
        return "a mount would outlive the world, which has no namespaces of its own"
    path = bare_environment()["PATH"]
    missing = [program for program in ("mkfs.ext4", "mount", "umount") if shutil.which(program, path=path) is None]
    return f"{', '.join(missing)} not found: apt-get install e2fsprogs mount" if missing else ""


async def mount(image: Path, at: Path, megabytes: int) -> None:
    """A new ext4 of that size at `at`. Raises WorldError."""
    with image.open("xb") as file:
        file.truncate(megabytes * 1024 * 1024)
    await run_to_end("e2fsprogs", "mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal", str(image))
    await run_to_end("mount", "mount", "-o", "loop,nodev,nosuid,noexec", str(image), str(at))


async def unmount(at: Path) -> None:
    """At once for everybody who looks, and for good when the last file on it is closed. Raises WorldError."""
    await run_to_end("mount", "umount", "--lazy", str(at))


def fill(file: Path, most: int | None = None) -> int:
    """Writes the file until it has `most` bytes or the disk is full, to the last byte; how many were written. Raises
    OSError for everything but a full disk."""
    written, piece, settled = 0, PIECE_BYTES, False
    with file.open("ab", buffering=0) as out:
        while (piece or not settled) and (most is None or written < most):
            try:
                if not piece:  # blocks that were only reserved may come free once all is on the disk
                    piece, settled = PIECE_BYTES, True
                    os.fsync(out.fileno())
                written += out.write(b"\0" * piece)
                settled = False
            except OSError as e:
                if e.errno != errno.ENOSPC:
                    raise
                piece //= 2
    return written
