"""Requests with small JSON documents, for the shipped actions that speak to a service's own admin API.

Used by the programs beside it that speak HTTP. http.client only: it follows no redirect and reads
no proxy from the environment, so the address in the inventory is the one that is spoken to. ALERTMEDIC_HTTP_TOKEN,
where set, is sent as a bearer token.
"""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlsplit

from actions.builtin import secret

TIMEOUT_SECONDS = 5.0
MAX_BODY = 1024 * 1024


class HttpError(Exception):
    """The address did not answer as it should. `status` is 0 where there was no answer, so nobody knows what it did."""

    def __init__(self, what: str, status: int = 0) -> None:
        super().__init__(what)
        self.status = status


def call(
    method: str, url: str, body: dict[str, Any] | None = None, headers: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The JSON object that the URL answers with. Raises HttpError for everything but 2xx with an object."""
    answer = request(method, url, body, headers)
    if not isinstance(answer, dict):
        raise HttpError(f"{method} {url}: the answer is no JSON object of at most {MAX_BODY} bytes")
    return answer


def request(method: str, url: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Any:
    """What the URL answers with, None for an empty answer. Raises HttpError for everything but 2xx with JSON."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise HttpError(f"{url} is no http or https URL without credentials")
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        context = ssl.create_default_context()
        connection = http.client.HTTPSConnection(parts.hostname, parts.port, timeout=TIMEOUT_SECONDS, context=context)
    else:
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=TIMEOUT_SECONDS)
    sent = {"Accept": "application/json", "User-Agent": "alertmedic", **(headers or {})}
    if token := secret("ALERTMEDIC_HTTP_TOKEN"):
        sent["Authorization"] = f"Bearer {token}"
    encoded = None if body is None else json.dumps(body)
    if encoded is not None:
        sent["Content-Type"] = "application/json"
    try:
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request(method, target, encoded, sent)
        response = connection.getresponse()
        text = response.read(MAX_BODY + 1)
    except (OSError, http.client.HTTPException) as error:
        raise HttpError(f"{method} {url}: {error or type(error).__name__}") from error
    finally:
        connection.close()
    if not 200 <= response.status < 300:
        detail = text[:200].decode(errors="replace")
        raise HttpError(f"{method} {url}: {response.status} {detail}", response.status)
    if not text.strip():
        return None
    try:
        if len(text) > MAX_BODY:
            raise ValueError("too long")
        return json.loads(text)
    except ValueError:
        raise HttpError(f"{method} {url}: the answer is no JSON of at most {MAX_BODY} bytes") from None


def below(url: str, name: str) -> str:
    """The URL of `name` below `url`; the name is one path segment, whatever it holds."""
    return f"{url.rstrip('/')}/{quote(name, safe='')}"
