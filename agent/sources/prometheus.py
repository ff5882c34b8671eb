"""Evidence from Prometheus, or what speaks its HTTP API (VictoriaMetrics, Thanos, Mimir).

Called by `agent.sources.gather` (`fetch`), by `agent.verify` (`query_range`), by `agent.topology`
(`query_instant`) and on start to reconcile (`alerts_firing`, `rules`). Exists because evidence must come back as
matrices on one grid within one deadline, whatever the server does. It never raises for a query of `fetch`: what
went wrong is `Evidence(missing=reason)`. It never retries, never follows a redirect (credentials stay with the
configured server) and never blocks the loop on parsing a large answer.

Values are float64. A sample of NaN, +Inf or -Inf becomes NaN, which is "no sample" everywhere here: one infinite ratio
(something divided by zero) would otherwise swallow every mean and scale that findings are made of; how many were
infinite is a warning. Native histograms are left out, with a warning.

Points lie at `start + i * step`, `start` being a multiple of the step. Times go over the wire in milliseconds, which is
the precision of Prometheus. API: https://prometheus.io/docs/prometheus/latest/querying/api/
"""

from __future__ import annotations

import asyncio
import errno
import re
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

import aiohttp
import orjson
import yarl

from agent.dependency import Dependency, DependencyOpen
from agent.sources import EvidenceRequest, Query, SourceError, bounded
from agent.sources.matrix import (
    MAX_POINTS,
    Answered,
    Bounds,
    Grid,
    MalformedError,
    RefusedError,
    Sample,
    envelope,
    error_text,
    frame_of,
    samples_of,
)
from agent.sources.promql import LABEL_NAME, TemplateError, duration, label_name, render
from rules.model import Evidence, Frame

__all__ = ["MAX_POINTS", "FiringAlert", "Prometheus", "PrometheusSource", "QueryError", "Rule", "Sample", "render"]

MIB = 1024 * 1024
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
THREAD_BYTES = 256 * 1024  # larger answers are parsed in a thread
KEEPALIVE_SECONDS = 5.0  # less than what proxies keep idle connections: a POST on one just closed would fail
ERROR_BYTES = 16 * 1024  # how much of an error's body is read
TENANT = re.compile(r"[A-Za-z0-9!._*'()-]{1,150}")  # what Mimir and Cortex take; without | (which would join tenants)

Secret = str | Callable[[], str]
T = TypeVar("T")


class QueryError(SourceError):
    """One query failed; the text is what becomes `missing`: `http 422: execution: ...`, `connection refused:
    host:9090`."""


class UnreachableError(QueryError):
    """The server did not answer, or did so with a failure of its own: what its circuit breaker counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prometheus:
    """Where the server is, how to speak to it, and how much to take from it.

    `bearer` and `password` may be functions, asked at each request, so that a rotated token is picked up. `tenant`
    is sent in `tenant_header` (`X-Scope-OrgID` for Mimir); "" means the tenant of the request. `parameters` go
    along with every query (`{"nocache": "1"}`, Thanos' `dedup`).
    """

    url: str
    service_label: str = "service"
    rate: str = "1m"
    timeout_seconds: float = 15.0  # where the caller gives no deadline
    concurrency: int = 8
    bearer: Secret = field(default="", repr=False)
    username: str = ""
    password: Secret = field(default="", repr=False)
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    server_name: str = ""
    insecure_skip_verify: bool = False
    tenant_header: str = ""
    tenant: str = ""
    max_bytes: int = 64 * MIB  # of one answer, decompressed
    max_series: int = 5_000  # of one query
    max_cells: int = 1_000_000  # series times points of one query: 8 MB
    parameters: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rule:
    """An alerting rule as the server has it. `seconds` is its `for`."""

    name: str
    query: str
    seconds: float
    labels: Mapping[str, str]
    group: str
    file: str


@dataclass(frozen=True, slots=True)
class FiringAlert:
    """An alert that the server itself holds to be firing. `active_at` as sent (RFC 3339)."""

    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    active_at: str
    value: str


class PrometheusSource:
    """One server. Use as `async with`, or call `close`. Safe for any number of tasks of one loop; at most
    `config.concurrency` requests are under way at once, the others wait (which counts against their deadline)."""

    name = "prometheus"

    def __init__(self, config: Prometheus, name: str = "prometheus", breaker: Dependency[Any] | None = None) -> None:
        """Raises ValueError for a configuration that cannot work, OSError for certificate files that cannot be read."""
        url = yarl.URL(config.url)
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError(f"prometheus url {config.url!r:.200}: expected http://host:port or https://host:port")
        if url.user or url.password:
            raise ValueError(
                "prometheus url: credentials do not belong there (they would show in logs): use basic auth"
            )
        if url.query_string or url.fragment:
            raise ValueError(f"prometheus url {config.url!r:.200}: it must end with the path, without ? or #")
        label_name(config.service_label)
        duration(config.rate)
        self.name = name
        self.config = config
        self.breaker = breaker
        self._base = url
        self._tls = client_tls(config) if url.scheme == "https" else None
        self._slots = asyncio.Semaphore(config.concurrency)
        self._session: aiohttp.ClientSession | None = None
        self._closed = False

    async def __aenter__(self) -> PrometheusSource:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections, for good. What is under way fails with `missing`."""
        self._closed = True
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def fetch(self, request: EvidenceRequest, deadline_seconds: float) -> tuple[Evidence, ...]:
        """One Evidence a query, in order: each query goes out once, over all services. Raises nothing of its own."""
        due = asyncio.get_running_loop().time() + deadline_seconds
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._evidence(query, request, due)) for query in request.queries]
        return tuple(task.result() for task in tasks)

    async def _evidence(self, query: Query, request: EvidenceRequest, due: float) -> Evidence:
        loop = asyncio.get_running_loop()
        began = loop.time()
        text = query.query
        try:
            scope = request.scopes.get(query.name, request.services)
            text = render(query.query, self.config.service_label, scope, self.config.rate, request.alerts)
            grid = Grid.over(request.start, request.end, request.step)
            answer = await self._range(text, grid, query.name, due, request.tenant)
        except (TemplateError, QueryError) as error:
            failed = bounded(str(error))
            return Evidence(query.name, self.name, missing=failed, query=text, seconds=loop.time() - began)
        return Evidence(
            query.name,
            self.name,
            answer.frame,
            warnings=answer.warnings,
            query=text,
            seconds=loop.time() - began,
            partial=answer.partial,
        )

    async def query_range(
        self,
        query: str,
        window: tuple[float, float, float],
        *,
        name: str = "",
        tenant: str = "",
        deadline_seconds: float | None = None,
    ) -> tuple[Frame, tuple[str, ...]]:
        """A PromQL expression over `window` = (start, end, step) seconds: a frame and the warnings.

        Every series gets the metric `name` (default: its own name, or `value` where it has none). Raises QueryError."""
        grid = Grid.over(*window)
        answer = await self._range(query, grid, name, self._due(deadline_seconds), tenant)
        return answer.frame, (*answer.warnings, *([answer.partial] if answer.partial else []))

    async def _range(self, query: str, grid: Grid, name: str, due: float, tenant: str) -> Answered:
        form = {
            "query": query,
            "start": f"{grid.start_ms / 1000:.3f}",
            "end": f"{grid.end_ms / 1000:.3f}",
            "step": f"{grid.step_ms / 1000:.3f}",
        }
        bounds = Bounds(self.config.max_series, self.config.max_cells)

        def decode(body: bytes) -> Answered:
            data, warnings = envelope(body)
            return frame_of(data, (*grid.warnings, *warnings), grid, name, self.config.service_label, bounds)

        return await self._ask("query_range", form, due, tenant, decode)

    async def query_instant(
        self, query: str, *, at: float | None = None, tenant: str = "", deadline_seconds: float | None = None
    ) -> tuple[tuple[Sample, ...], tuple[str, ...]]:
        """A PromQL expression at one time (default: the server's now): its samples and the warnings. Raises
        QueryError, also for an expression that gives a matrix or a string, and for more than `max_series` samples."""
        form = {"query": query} | ({} if at is None else {"time": f"{at:.3f}"})

        def decode(body: bytes) -> tuple[tuple[Sample, ...], tuple[str, ...]]:
            data, warnings = envelope(body)
            return samples_of(data, self.config.max_series), warnings

        return await self._ask("query", form, self._due(deadline_seconds), tenant, decode)

    async def series(
        self,
        match: Sequence[str],
        window: tuple[float, float],
        *,
        tenant: str = "",
        deadline_seconds: float | None = None,
    ) -> tuple[Mapping[str, str], ...]:
        """The label sets of the series that any of the selectors matches within `window` = (start, end). Raises
        QueryError."""
        form = [("start", f"{window[0]:.3f}"), ("end", f"{window[1]:.3f}"), *(("match[]", m) for m in match)]
        return await self._ask("series", form, self._due(deadline_seconds), tenant, _label_sets)

    async def label_values(
        self, label: str, match: Sequence[str] = (), *, tenant: str = "", deadline_seconds: float | None = None
    ) -> tuple[str, ...]:
        """The values of one label (`__name__`: the metrics), of all series or of those that the selectors match.
        Raises QueryError."""
        if not LABEL_NAME.fullmatch(label):
            raise QueryError(f"label values: {label!r:.100} is not a label name")
        form = [("match[]", m) for m in match]
        return await self._ask(f"label/{label}/values", form, self._due(deadline_seconds), tenant, _strings, get=True)

    async def rules(self, *, tenant: str = "", deadline_seconds: float | None = None) -> tuple[Rule, ...]:
        """The alerting rules that the server evaluates. Raises QueryError."""
        return await self._ask("rules", [("type", "alert")], self._due(deadline_seconds), tenant, _rules, get=True)

    async def alerts_firing(
        self, *, tenant: str = "", deadline_seconds: float | None = None
    ) -> tuple[FiringAlert, ...]:
        """The alerts that the server holds to be firing now; pending ones are left out. Raises QueryError."""
        return await self._ask("alerts", [], self._due(deadline_seconds), tenant, _firing, get=True)

    def _due(self, deadline_seconds: float | None) -> float:
        seconds = self.config.timeout_seconds if deadline_seconds is None else deadline_seconds
        return asyncio.get_running_loop().time() + seconds

    async def _ask(
        self,
        path: str,
        form: Mapping[str, str] | Sequence[tuple[str, str]],
        due: float,
        tenant: str,
        decode: Callable[[bytes], T],
        get: bool = False,
    ) -> T:
        """`_asked` behind the breaker, if there is one: while it is open nothing goes out, and that is a QueryError
        like any other. How long evidence takes does not count, it has a deadline; what the server refuses is an answer,
        not a failure."""
        breaker = self.breaker
        if breaker is None:
            return await self._asked(path, form, due, tenant, decode, get)

        async def ask() -> Any:
            return await self._asked(path, form, due, tenant, decode, get)

        try:
            async with asyncio.timeout_at(due):  # a probe may be waited for
                answer: T = await breaker.call(
                    ask, timed=False, fails=lambda error: isinstance(error, UnreachableError)
                )
                return answer
        except DependencyOpen as error:
            raise QueryError(str(error)) from error
        except TimeoutError as error:
            raise UnreachableError("timeout, while the server was being probed") from error

    async def _asked(
        self,
        path: str,
        form: Mapping[str, str] | Sequence[tuple[str, str]],
        due: float,
        tenant: str,
        decode: Callable[[bytes], T],
        get: bool = False,
    ) -> T:
        """One request and its decoded answer. Raises QueryError for everything that can go wrong; cancellation
        passes."""
        seconds = due - asyncio.get_running_loop().time()
        pairs = list(form.items()) if isinstance(form, Mapping) else list(form)
        try:
            async with asyncio.timeout_at(due), self._slots:
                body = await self._body(path, [*pairs, *self.config.parameters.items()], due, tenant, get)
                if len(body) < THREAD_BYTES:
                    return decode(body)
                return await asyncio.to_thread(decode, body)
        except RefusedError as error:
            raise QueryError(str(error)) from error
        except MalformedError as error:
            raise QueryError(f"{path}: {error}; is {self._base.host} a Prometheus?") from error
        except TimeoutError as error:
            raise UnreachableError(f"timeout after {max(0.0, round(seconds, 1)):g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise UnreachableError(_reason(error)) from error
        except (ValueError, TypeError) as error:  # TypeError: a shape nobody documents
            raise QueryError(_reason(error)) from error

    async def _body(self, path: str, form: list[tuple[str, str]], due: float, tenant: str, get: bool) -> bytes:
        remaining = max(0.001, due - asyncio.get_running_loop().time())
        if path.startswith("query"):  # the server gives up a little earlier, so that its own words arrive
            form = [*form, ("timeout", f"{max(0.001, remaining - min(0.5, remaining / 10)):.3f}")]
        url = self._base.joinpath("api", "v1", *path.split("/"))
        options: dict[str, Any] = {"params": form} if get else {"data": form}
        if self.config.server_name and self._tls is not None:
            options["server_hostname"] = self.config.server_name
        session = self._open()
        async with session.request(
            "GET" if get else "POST",
            url,
            headers=self._headers(tenant),
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(total=remaining, sock_connect=remaining, sock_read=remaining),
            **options,
        ) as response:
            if response.status != 200:
                # 503 is Prometheus' word for a query that it gave up on: that is about the query.
                down = response.status in (500, 502, 504)
                text = _refused(response.status, await response.content.read(ERROR_BYTES), response.reason)
                raise UnreachableError(text) if down else QueryError(text)
            return await _read(response, self.config.max_bytes)

    def _open(self) -> aiohttp.ClientSession:
        if self._closed:
            raise QueryError(f"the source {self.name} is closed")
        if self._session is None:
            # No limit of its own: the slots bound requests, and waiting for one is under the caller's deadline.
            connector = aiohttp.TCPConnector(limit=0, ssl=self._tls or True, keepalive_timeout=KEEPALIVE_SECONDS)
            self._session = aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=self.config.timeout_seconds),
            )
        return self._session

    def _headers(self, tenant: str) -> dict[str, str]:
        headers = {"Accept": "application/json", "User-Agent": "alertmedic"}
        if self._base.host in LOOPBACK:  # what never leaves the machine is not worth packing
            headers["Accept-Encoding"] = "identity"
        config = self.config
        if bearer := _secret(config.bearer):
            headers["Authorization"] = f"Bearer {bearer}"
        elif config.username:
            headers["Authorization"] = aiohttp.BasicAuth(config.username, _secret(config.password), "utf-8").encode()
        if config.tenant_header and (whose := config.tenant or tenant):
            if not TENANT.fullmatch(whose):
                raise QueryError(
                    f"tenant {whose!r:.100} cannot be sent in {config.tenant_header}: at most 150 of {TENANT.pattern}"
                )
            headers[config.tenant_header] = whose
        return headers


class TlsFiles(Protocol):
    """What a client's TLS is made of: `Prometheus` here, `agent.config.ClientTls` for Alertmanager."""

    @property
    def ca_file(self) -> Path | None: ...
    @property
    def cert_file(self) -> Path | None: ...
    @property
    def key_file(self) -> Path | None: ...
    @property
    def insecure_skip_verify(self) -> bool: ...


def client_tls(config: TlsFiles) -> ssl.SSLContext:
    """Raises OSError (a file that cannot be read) and ssl.SSLError (a file that is no certificate or key)."""
    context = ssl.create_default_context(cafile=str(config.ca_file) if config.ca_file else None)
    if config.cert_file:
        context.load_cert_chain(str(config.cert_file), str(config.key_file) if config.key_file else None)
    if config.insecure_skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _secret(secret: Secret) -> str:
    return secret if isinstance(secret, str) else secret()


async def _read(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """The body, decompressed. Raises QueryError as soon as it exceeds `limit` bytes."""
    parts: list[bytes] = []
    size = 0
    async for part in response.content.iter_any():
        size += len(part)
        if size > limit:
            raise QueryError(f"answer too large: more than {limit} bytes; narrow the query or widen the step")
        parts.append(part)
    return b"".join(parts)


def _unreachable(error: Exception) -> bool:
    return isinstance(error, UnreachableError)


def _refused(status: int, body: bytes, phrase: str | None) -> str:
    """`http 422: execution: ...` out of an answer that is not 200."""
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        answer = None
    if isinstance(answer, dict) and ("error" in answer or "errorType" in answer):
        text = error_text(answer)
    else:
        text = bounded(body.decode("utf-8", "replace"), 200) or phrase or "no reason given"
    hints = {401: "; check the credentials", 403: "; check the credentials", 404: "; check the url's path"}
    hint = "; redirects are not followed, configure where it leads" if 300 <= status < 400 else hints.get(status, "")
    return f"http {status}: {text}{hint}"


def _reason(error: Exception) -> str:
    """What an exception of the client means to an operator."""
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return f"name not resolved: {error.host}"
    if isinstance(error, aiohttp.ClientSSLError):
        return bounded(f"TLS with {error.host}:{error.port} failed: {error.os_error if error.os_error else error}")
    if isinstance(error, aiohttp.ClientConnectorError):
        what = (
            "connection refused"
            if isinstance(error.os_error, ConnectionRefusedError)
            else f"cannot connect ({error.os_error})"
        )
        return bounded(f"{what}: {error.host}:{error.port}")
    reset = isinstance(error, OSError) and error.errno in (errno.ECONNRESET, errno.EPIPE)
    if reset or isinstance(error, aiohttp.ServerDisconnectedError):
        return "the server closed the connection before it answered"
    if isinstance(error, aiohttp.ClientPayloadError):
        return "the answer was cut off"
    return bounded(f"{type(error).__name__}: {error}")


def _items(data: Any, *keys: str) -> list[Any]:
    """The list at `data[key][key]...`, or MalformedError."""
    for key in keys:
        data = data.get(key) if isinstance(data, dict) else None
    if not isinstance(data, list):
        raise MalformedError(f"the answer has no list data{''.join(f'.{k}' for k in keys)}")
    return data


def _labels(labels: Any) -> Mapping[str, str]:
    if not isinstance(labels, dict) or not all(isinstance(v, str) for v in labels.values()):
        raise MalformedError("labels are not a mapping of strings")
    return labels


def _label_sets(body: bytes) -> tuple[Mapping[str, str], ...]:
    return tuple(_labels(item) for item in _items(envelope(body)[0]))


def _strings(body: bytes) -> tuple[str, ...]:
    return tuple(item for item in _items(envelope(body)[0]) if isinstance(item, str))


def _rules(body: bytes) -> tuple[Rule, ...]:
    rules: list[Rule] = []
    for group in _items(envelope(body)[0], "groups"):
        for rule in _items(group, "rules"):
            if isinstance(rule, dict) and rule.get("type") == "alerting":
                rules.append(
                    Rule(
                        name=str(rule.get("name", "")),
                        query=str(rule.get("query", "")),
                        seconds=float(rule.get("duration") or 0.0),
                        labels=_labels(rule.get("labels") or {}),
                        group=str(group.get("name", "")),
                        file=str(group.get("file", "")),
                    )
                )
    return tuple(rules)


def _firing(body: bytes) -> tuple[FiringAlert, ...]:
    return tuple(
        FiringAlert(
            labels=_labels(item.get("labels") or {}),
            annotations=_labels(item.get("annotations") or {}),
            active_at=str(item.get("activeAt", "")),
            value=str(item.get("value", "")),
        )
        for item in _items(envelope(body)[0], "alerts")
        if isinstance(item, dict) and item.get("state") == "firing"
    )
