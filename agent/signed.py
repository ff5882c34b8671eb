"""Decisions that travel in a link: minted for a notification, verified when somebody follows it.

`agent.operations.redeem` verifies; whoever notifies mints. Exists so that a person can decide without a credential of
the API, and nothing but what the link says: one decision on one plan (its digest), by one person, until a time, once.
That it was used before is for the caller to say, who has the journal. Pure: key and time are passed in. It holds no
key, sends nothing, and its errors never tell what a right signature would be.

Format: base64url(JSON) "." base64url(HMAC-SHA-256(key, the text before the dot)), RFC 2104 and RFC 4648 section 5,
without padding. The signature is compared in constant time, before anything of the JSON is believed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
from typing import Literal

import msgspec

MAX_LENGTH = 2048
MIN_KEY_BYTES = 32


class LinkError(ValueError):
    """The link decides nothing."""


class Link(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a link says. `expires_at` in unix seconds; `id` is its number, by which the journal knows that it was used;
    `person` is the name that this person's credential has, where there is one: two names are two people."""

    id: str
    incident: str
    digest: str
    decision: Literal["approve", "reject"]
    person: str
    expires_at: float


def mint(
    key: bytes, *, incident: str, digest: str, decision: Literal["approve", "reject"], person: str, expires_at: float
) -> str:
    """A link's token, good for one use until `expires_at`. Raises ValueError for a key under 32 bytes."""
    link = Link(
        id=secrets.token_hex(16), incident=incident, digest=digest, decision=decision, person=person,
        expires_at=expires_at,
    )  # fmt: skip
    body = _encoded(msgspec.json.encode(link))
    return f"{body}.{_encoded(_signature(key, body))}"


def verified(token: str, key: bytes, now: float) -> Link:
    """What the token says, if it was minted with `key` and has not expired. Raises LinkError, ValueError for a key
    under 32 bytes."""
    body, dot, signature = token.partition(".")
    if not dot or len(token) > MAX_LENGTH or not token.isascii():
        raise LinkError("this is no link of ours")
    try:
        given = _decoded(signature)
    except (binascii.Error, ValueError) as error:
        raise LinkError("this is no link of ours") from error
    if not hmac.compare_digest(given, _signature(key, body)) or _encoded(given) != signature:
        raise LinkError("this is no link of ours")
    try:
        link = msgspec.json.decode(_decoded(body), type=Link)
    except (msgspec.MsgspecError, binascii.Error, ValueError) as error:
        raise LinkError("this is no link of ours") from error
    if not now < link.expires_at:
        raise LinkError("the link has expired")
    return link


def _signature(key: bytes, body: str) -> bytes:
    if len(key) < MIN_KEY_BYTES:
        raise ValueError(f"signed links: the key has {len(key)} bytes, at least {MIN_KEY_BYTES} are asked for")
    return hmac.new(key, b"alertmedic link 1\n" + body.encode(), hashlib.sha256).digest()


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decoded(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
