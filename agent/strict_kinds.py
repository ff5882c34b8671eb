"""Checks of single configuration values that a range or a pattern cannot say: URLs, addresses, globs, files, secrets.

Called by `agent.strict` only. Each check answers with (what is wrong, hint) or None; none of them raises, prints a
secret's content, or opens anything but the regular file that was named.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

MAX_SECRET_BYTES = 64 * 1024
Problem = tuple[str, str]


class Secret:
    """A secret and the file it was read from. Printing it in any way shows the path only; `value` is the content
    without the trailing line end. Not a dataclass: serialisers look into those, and would write the value out."""

    __slots__ = ("path", "value")

    def __init__(self, path: Path, value: str) -> None:
        self.path = path
        self.value = value

    def current(self) -> str:
        """What the file holds now, so that a rotated secret is picked up; while it is unreadable, what it held."""
        now = read_secret(self.path)
        return self.value if isinstance(now, str) else now.value

    def __repr__(self) -> str:
        return f"<secret from {self.path}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret is not copied or pickled; name its file instead")


def read_secret(path: Path) -> Secret | str:
    """The file's content as a Secret, or what is wrong with the file."""
    try:
        # Non-blocking, so that naming a FIFO is a fault instead of a wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return f"{path} is no regular file"
            body = os.read(descriptor, MAX_SECRET_BYTES + 1)
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:
        return f"cannot read {path}: {_reason(error)}"
    if len(body) > MAX_SECRET_BYTES:
        return f"{path} has more than {MAX_SECRET_BYTES} bytes"
    try:
        text = body.decode().rstrip("\r\n")
    except UnicodeDecodeError:
        return f"{path} is not UTF-8"
    if not text:
        return f"{path} is empty"
    if any(ord(c) < 32 or ord(c) == 127 for c in text):
        return f"{path} has a control character or several lines"
    return Secret(path, text)


def expand_path(text: str, base: Path) -> Path:
    """`~` and paths relative to `base` (the directory of the naming file) made absolute; no link is followed."""
    return Path(os.path.normpath(base / Path(os.path.expanduser(text))))  # noqa: PTH111 - Path.expanduser raises


def wrong(check: str, value: Any) -> Problem | None:
    """What the named check says against the value."""
    return _CHECKS[check](value)


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def _url(value: str) -> Problem | None:
    if not value:
        return None
    hint = "write it like http://prometheus:9090"
    if not value.isascii() or any(ord(c) <= 32 or ord(c) == 127 for c in value):
        return "the URL has a space, a control or a non-ASCII character", hint
    try:
        parts = urlsplit(value)
        host, user, port = parts.hostname, parts.username, parts.port
    except ValueError as error:
        return f"not a URL: {error}", hint
    if parts.scheme not in ("http", "https"):
        return "not an http or https URL", hint
    if user is not None:
        return "the URL holds a user name or password", "use basic with password_file: this URL is printed"
    if not host or port == 0:
        return "the URL has no host or a bad port", hint
    if parts.query or parts.fragment:
        return "the URL has a query or fragment", "only the path is used as prefix"
    return None


def _hostport(value: str) -> Problem | None:
    host, colon, port = value.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or len(port) > 5 or int(port) > 65535:
        return f'"{value[:80]}" is not HOST:PORT', "write it like 127.0.0.1:9095, 0.0.0.0:9095 or [::1]:9095"
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        return f'"{value[:80]}" is not HOST:PORT', "put an IPv6 address in brackets: [::1]:9095"
    if any(ord(c) <= 32 or ord(c) >= 127 or c in "/@#?" for c in host):
        return f'"{value[:80]}" is not HOST:PORT', "the host has a character that no host name has"
    return None


def _glob(value: str) -> Problem | None:
    """fnmatch takes an unclosed bracket literally, which is never what was meant."""
    at = 0
    while (at := value.find("[", at)) >= 0:
        begin = at + 2 if value[at + 1 : at + 2] == "!" else at + 1
        end = value.find("]", begin + 1)
        if end < 0:
            return f'the pattern "{value[:80]}" has an unclosed [', "close it, or write [[] for the character itself"
        at = end + 1
    if any(ord(c) < 32 for c in value):
        return "the pattern has a control character", "patterns match printed names"
    return None


def _file(value: Path) -> Problem | None:
    try:
        if not value.is_file():
            return f"no file {value}", "relative paths count from the configuration file"
        if not os.access(value, os.R_OK):
            return f"{value} cannot be read", "check its owner and mode"
    except (OSError, ValueError) as error:
        return f"{value}: {_reason(error)}", "check the path"
    return None


def _directory(value: Path) -> Problem | None:
    try:
        if not value.is_dir():
            return f"no directory {value}", "relative paths count from the configuration file"
        if not os.access(value, os.R_OK | os.X_OK):
            return f"{value} cannot be read", "check its owner and mode"
    except (OSError, ValueError) as error:
        return f"{value}: {_reason(error)}", "check the path"
    return None


def _rfc3339(value: str) -> Problem | None:
    if not value:
        return None
    try:
        zoned = datetime.fromisoformat(value).tzinfo is not None
    except ValueError:
        zoned = False
    if not zoned or "T" not in value:
        return f'"{value[:80]}" is not a time', "write RFC 3339 with a zone: 2026-01-31T22:00:00Z"
    return None


_CHECKS: dict[str, Callable[[Any], Problem | None]] = {
    "url": _url,
    "hostport": _hostport,
    "glob": _glob,
    "file": _file,
    "directory": _directory,
    "rfc3339": _rfc3339,
    "bytes": lambda value: None,
}
