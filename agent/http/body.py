"""Bodies of requests: read within bounds of size and time, unpacked within the same bound.

Called by `agent.http.server` and `agent.http.api` after authentication. Exists so that every way in which a body can be
wrong (too large, too slow, cut off, packed badly, of another type) has one place and one answer. Never parses JSON.
"""

from __future__ import annotations

import asyncio
import zlib
from typing import Final

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

JSON: Final = "application/json"
_UTF8: Final = ("utf-8", "utf8", "us-ascii")


class RequestError(Exception):
    """A request that is refused: the status to answer with, the reason, the bad field and what to do. `close`: the
    connection cannot go on, because the rest of the body would be taken for the next request."""

    def __init__(
        self, status: int, reason: str, path: str = "", hint: str = "", *, allow: str = "", close: bool = False
    ) -> None:
        super().__init__(reason)
        self.status = status
        self.path = path
        self.hint = hint
        self.allow = allow
        self.close = close


async def read_body(request: web.BaseRequest, most: int, seconds: float) -> bytes:
    """The body as sent. RequestError 413 beyond `most` bytes, 408 after `seconds`, 400 when it is cut off."""
    if (request.content_length or 0) > most:
        raise too_large(most)
    if "Expect" in request.headers:  # only now, so that a refused sender need not send it
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    content = request.content
    if content.is_eof() and content.exception() is None:  # all of it came with the head
        body = content.read_nowait(-1)
        if len(body) > most:
            raise too_large(most)
        return body
    parts: list[bytes] = []
    got = 0
    try:
        async with asyncio.timeout(seconds):
            while part := await content.readany():
                got += len(part)
                if got > most:
                    raise too_large(most)
                parts.append(part)
    except TimeoutError:
        raise RequestError(408, f"the body did not arrive within {seconds:g} s", close=True) from None
    except (web.RequestPayloadError, HttpProcessingError, ConnectionError) as error:
        raise RequestError(400, f"the body was cut off or malformed: {error}", close=True) from error
    return b"".join(parts)


def encoding(request: web.BaseRequest) -> str:
    """`identity` or `gzip`; RequestError 415 for any other."""
    named = request.headers.get("Content-Encoding", "identity").lower()
    if named not in ("identity", "gzip"):
        raise RequestError(415, f"content encoding {named[:40]!r}", "Content-Encoding", "send plain JSON or gzip")
    return named


def check_type(value: str) -> None:
    """RequestError 415 unless the content type is JSON in UTF-8."""
    if value == JSON:
        return
    kind, _, parameters = value.partition(";")
    if kind.strip().lower() != JSON:
        raise RequestError(415, f"content type {value[:80]!r}", "Content-Type", f"send {JSON}")
    for parameter in parameters.split(";"):
        name, _, text = parameter.partition("=")
        if name.strip().lower() == "charset" and text.strip().strip('"').lower() not in _UTF8:
            raise RequestError(415, f"charset {text.strip()[:40]!r}", "Content-Type", "send UTF-8")


def unpack(packed: bytes, most: int) -> bytes:
    """One gzip member of at most `most` bytes when unpacked; RequestError 413 beyond, 400 when malformed."""
    unpacking = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    try:
        body = unpacking.decompress(packed, most + 1)
    except zlib.error as error:
        raise RequestError(400, f"malformed gzip: {error}", "Content-Encoding") from error
    if len(body) > most:
        raise too_large(most)
    if not unpacking.eof or unpacking.unused_data:
        what = "bytes after the end" if unpacking.eof else "cut off"
        raise RequestError(400, f"malformed gzip: {what}", "Content-Encoding")
    return body


def too_large(most: int) -> RequestError:
    return RequestError(
        413, f"the body is over {most} bytes", hint="raise intake.max_body_bytes, or set max_alerts in the receiver"
    )
