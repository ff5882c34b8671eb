"""Who is calling, and what they may do: bearer tokens and basic auth on TCP, peer credentials on the Unix socket.

Called by every handler of `agent.http.server` before it touches a request's body. Exists so that one page answers "who
may do what". It never reads a file or a clock, never logs or returns a secret, and compares secrets in constant time.

Nobody configured: callers from this machine may post alerts and read; callers from elsewhere may do nothing, and nobody
may approve, pause or reset over TCP. That needs a configured credential with the scope `approve`, or the Unix socket
(file mode 0600), where the kernel says who calls.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import socket
import struct
from asyncio import Transport
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from ipaddress import ip_address
from typing import Any, Final, Literal, Protocol
from urllib.parse import urlsplit

Scope = Literal["webhook", "read", "approve"]
ALL_SCOPES: Final[frozenset[Scope]] = frozenset(("webhook", "read", "approve"))
CHALLENGE: Final = 'Bearer realm="alertmedic", Basic realm="alertmedic", charset="UTF-8"'
_PEER = struct.Struct("3i")  # struct ucred: pid, uid, gid


class AccessError(Exception):
    """The request is refused: 401 when other credentials could help, 403 when none can."""

    def __init__(self, status: Literal[401, 403], reason: str, hint: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Credential:
    """One bearer token (`user` is "") or one user with a password. `tenants` are shell patterns."""

    name: str  # shown in the journal as who approved; never the secret
    secret: str = field(repr=False)
    user: str = ""
    tenants: tuple[str, ...] = ("*",)
    scopes: tuple[Scope, ...] = ("webhook", "read")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who was let in. `origin` goes into the journal: "cli uid=0", "http 10.0.0.4"."""

    name: str
    origin: str
    scopes: frozenset[Scope]
    tenants: tuple[str, ...] = ("*",)

    def sees(self, tenant: str) -> bool:
        return self.tenants == ("*",) or any(fnmatchcase(tenant, pattern) for pattern in self.tenants)

    @property
    def sees_all(self) -> bool:
        return "*" in self.tenants


class Asking(Protocol):
    """What is asked of a request: aiohttp's, or one that `agent.http.front` has read."""

    @property
    def method(self) -> str: ...

    @property
    def headers(self) -> Mapping[str, str]: ...

    @property
    def transport(self) -> Transport | None: ...

    def get_extra_info(self, name: str, default: Any = None) -> Any: ...


class Guard:
    """Checks requests against the configured credentials; built once, asked for every request."""

    def __init__(self, credentials: Iterable[Credential] = ()) -> None:
        self._known: list[tuple[bytes, Credential]] = []
        for credential in credentials:
            if not credential.secret:
                raise ValueError(f"auth: the secret of {credential.name!r} is empty; give it a token or password")
            secret = f"{credential.user}:{credential.secret}" if credential.user else credential.secret
            self._known.append((_digest(bool(credential.user), secret.encode()), credential))

    @property
    def configured(self) -> bool:
        return bool(self._known)

    def admit(self, request: Asking, scope: Scope) -> Caller:
        """Who calls, if they may use `scope`; raises AccessError. Looks at the connection and the headers only."""
        transport = request.transport
        peer = transport.get_extra_info("peername") if transport is not None else None
        if not isinstance(peer, tuple):
            return self._local(request)
        header = request.headers.get("Authorization")
        if not self._known:
            return self._anonymous(request, str(peer[0]), scope)
        if header is None:
            raise AccessError(401, "authentication required", "send Authorization: Bearer or Basic")
        credential = self._find(header)
        if credential is None:
            raise AccessError(401, "unknown token, user or password", "compare with auth in the configuration")
        if scope not in credential.scopes:
            raise AccessError(403, f"{credential.name} lacks the scope {scope!r}", "add it to the credential's scopes")
        return Caller(credential.name, f"http {peer[0]}", frozenset(credential.scopes), credential.tenants)

    def _find(self, header: str) -> Credential | None:
        kind, _, given = header.partition(" ")
        given = given.strip()
        if kind.lower() == "bearer":
            digest = _digest(False, given.encode("utf-8", "surrogateescape"))
        elif kind.lower() == "basic":
            try:
                digest = _digest(True, base64.b64decode(given, validate=True))
            except (binascii.Error, ValueError):
                return None
        else:
            return None
        found = None
        for known, credential in self._known:  # every one is compared, so that the time tells nothing
            if hmac.compare_digest(known, digest) and found is None:
                found = credential
        return found

    def _anonymous(self, request: Asking, address: str, scope: Scope) -> Caller:
        if scope == "approve":
            raise AccessError(
                403,
                "no authentication is configured, so nothing may be approved, rejected, paused or reset over TCP",
                "use the alertmedic command on this machine, or configure `auth` with the scope approve",
            )
        if not _loopback(address):
            raise AccessError(
                403, f"no authentication is configured and {address} is not this machine", "configure `auth`"
            )
        if "Origin" in request.headers and request.method != "GET":
            # A web page in somebody's browser on this machine could otherwise post alerts.
            raise AccessError(403, "a web page may not post here without authentication", "configure `auth`")
        if scope == "read" and not _own_name(request.headers.get("Host", "")):
            # DNS rebinding: a page whose own name has come to mean this machine could read everything, without Origin.
            raise AccessError(
                403, "no authentication is configured and the Host is not this machine's", "use 127.0.0.1"
            )
        return _anonymous(address)

    def _local(self, request: Asking) -> Caller:
        uid = peer_uid(request)
        if uid is None or uid not in (0, os.geteuid()):
            raise AccessError(403, "the peer of the Unix socket is neither root nor the service's user", "use its user")
        return Caller(f"uid={uid}", f"cli uid={uid}", ALL_SCOPES)


def peer_uid(request: Asking) -> int | None:
    """The user at the other end of a Unix socket (SO_PEERCRED), None when the kernel does not say."""
    connection: socket.socket | None = request.get_extra_info("socket")
    if connection is None or connection.family != socket.AF_UNIX:
        return None
    try:
        _, uid, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    except OSError:
        return None
    return int(uid)


@lru_cache(maxsize=1024)
def _anonymous(address: str) -> Caller:
    return Caller("anonymous", f"http {address}", frozenset(("webhook", "read")))


def _digest(basic: bool, secret: bytes) -> bytes:
    """Equal lengths whatever the secret's, so that comparing tells not even that."""
    return hashlib.sha256((b"basic:" if basic else b"bearer:") + secret).digest()


@lru_cache(maxsize=1024)
def _own_name(host: str) -> bool:
    """An address, localhost or the name of this machine, with or without a port."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        if name == "localhost" or name.endswith(".localhost") or name == socket.gethostname().lower():
            return True
        return bool(ip_address(name.partition("%")[0]))
    except ValueError:
        return False


@lru_cache(maxsize=1024)
def _loopback(address: str) -> bool:
    try:
        parsed = ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_loopback
