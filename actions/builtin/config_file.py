"""Changing one place of a server's configuration file so that it can be put back exactly.

Used by `actions.builtin.nginx` and `actions.builtin.haproxy`. A change replaces one stretch of text; the digest of the
file before and after is planned, so the change is made only to the file that was looked at, and undone only where the
file is still as we left it. The file is replaced as a whole (written beside it, synced, renamed), with its mode and
owner; a link is not followed, a file with several names is refused.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from actions.builtin.program import Refused

MAX_BYTES = 1024 * 1024


def read(path: str) -> str:
    """The file's text. Raises Refused for what is no plain file of one name, and OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as file:
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode) or info.st_nlink != 1:
            raise Refused(f"{path} is no plain file of one name")
        body = file.read(MAX_BYTES + 1)
    if len(body) > MAX_BYTES:
        raise Refused(f"{path} is longer than {MAX_BYTES} bytes")
    return body.decode("utf-8")


def digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def replace(path: str, text: str, planned: str) -> None:
    """Puts `text` in the place of the file, if that is still the one with the digest `planned`. Raises Refused."""
    if digest(read(path)) != planned:
        raise Refused(f"{path} has been changed since the plan was made")
    here = Path(path)
    info = here.lstat()
    beside = here.with_name(f".{here.name}.alertmedic")
    # What a killed run left would stop every later one, undoing included; only one plan acts on a target at a time.
    beside.unlink(missing_ok=True)
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(text.encode())
            file.flush()
            os.fchmod(file.fileno(), stat.S_IMODE(info.st_mode))
            if (info.st_uid, info.st_gid) != (os.geteuid(), os.getegid()):
                os.fchown(file.fileno(), info.st_uid, info.st_gid)
            os.fsync(file.fileno())
        beside.rename(here)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    directory = os.open(here.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
