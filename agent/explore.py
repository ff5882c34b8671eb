"""Looking around in a Prometheus by hand: names, labels, values, samples.

Called by `agent.cli` for `alertmedic metrics`. Exists for people who write packs and want to see what there is.
Served by prometheus-api-client (the extra `explore`), which is imported only here and only when asked: it is slow,
retries what should not be retried and has no timeout of its own, so it gets one each time and its retries are
switched off. The service never uses it. It returns plain data; how that is shown is the command's business.

Times are unix seconds; the library rounds them to whole ones.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from agent.sources import bounded
from agent.sources.prometheus import Prometheus

LOOKBACK_SECONDS = 3600.0  # how old series may be that names and labels are told of


class ExploreError(Exception):
    """The question could not be answered. The text names the operation and a hint."""


class Explorer:
    """One server, seen through prometheus-api-client. Use as `with`. Every request ends after `config.timeout_seconds`.

    Raises ExploreError if the extra is not installed."""

    def __init__(self, config: Prometheus) -> None:
        try:
            client = importlib.import_module("prometheus_api_client.prometheus_connect")
            self._requests = importlib.import_module("requests")
            retry = importlib.import_module("urllib3.util").Retry(total=0)
        except ImportError as error:
            raise ExploreError(
                f"alertmedic metrics needs the extra `explore` ({error}): pip install 'alertmedic[explore]'"
            ) from error
        self._failures: tuple[type[Exception], ...] = (
            client.PrometheusApiClientException,
            self._requests.exceptions.RequestException,
            OSError,
            ValueError,
            KeyError,
            TypeError,
        )
        self._client = client.PrometheusConnect(
            url=config.url.rstrip("/"),
            headers=_headers(config),
            auth=(config.username, _text(config.password)) if config.username else None,
            retry=retry,
            session=self._session(config),
            timeout=config.timeout_seconds,
        )

    def _session(self, config: Prometheus) -> Any:
        session = self._requests.Session()
        session.trust_env = False  # no proxy and no .netrc that the configuration does not name
        session.verify = not config.insecure_skip_verify
        if config.ca_file and not config.insecure_skip_verify:
            session.verify = str(config.ca_file)
        if config.cert_file:
            session.cert = (str(config.cert_file), str(config.key_file)) if config.key_file else str(config.cert_file)
        return session

    def __enter__(self) -> Explorer:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        try:
            yield
        except self._failures as error:
            raise ExploreError(f"{what}: {bounded(f'{type(error).__name__}: {error}')}") from error

    def list_metrics(self, match: Sequence[str] = (), *, now: float) -> list[str]:
        """The names of all metrics, or of those that the selectors match within the last hour. Sorted."""
        return self.values_of("__name__", match, now=now)

    def labels_of(self, metric: str, *, now: float) -> dict[str, list[str]]:
        """The labels of one metric (or selector) within the last hour, each with its values. Sorted."""
        with self._asking(f"labels of {metric!r:.100}"):
            series = self._client.get_series(_time(now - LOOKBACK_SECONDS), _time(now), params={"match[]": [metric]})
            found: dict[str, set[str]] = {}
            for labels in series:
                for name, value in labels.items():
                    found.setdefault(str(name), set()).add(str(value))
        found.pop("__name__", None)
        return {name: sorted(found[name]) for name in sorted(found)}

    def values_of(self, label: str, match: Sequence[str] = (), *, now: float) -> list[str]:
        """The values of one label, of all series or of those that the selectors match within the last hour. Sorted."""
        with self._asking(f"values of {label!r:.100}"):
            window = {"start": now - LOOKBACK_SECONDS, "end": now}
            params = {"match[]": list(match), **window} if match else {}
            return sorted(map(str, self._client.get_label_values(label, params=params)))

    def samples(self, query: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
        """A PromQL expression over a window: `[{"metric": {label: value}, "values": [[time, value or None], ...]}]`.

        NaN and infinities are None, since JSON has no word for them."""
        with self._asking(f"query {query!r:.100}"):
            result = self._client.custom_query_range(query, _time(start), _time(end), f"{step:g}")
            return [
                {"metric": dict(item["metric"]), "values": [[float(t), _number(v)] for t, v in item["values"]]}
                for item in result
            ]

    def latest(self, query: str, *, at: float | None = None) -> list[dict[str, Any]]:
        """A PromQL expression at one time (default: now): `[{"metric": {label: value}, "value": [time, value]}]`."""
        with self._asking(f"query {query!r:.100}"):
            result = self._client.custom_query(query, params={} if at is None else {"time": at})
            return [
                {"metric": dict(item["metric"]), "value": [float(item["value"][0]), _number(item["value"][1])]}
                for item in result
            ]


def _headers(config: Prometheus) -> dict[str, str]:
    headers = {"User-Agent": "alertmedic"}
    if bearer := _text(config.bearer):
        headers["Authorization"] = f"Bearer {bearer}"
    if config.tenant_header and config.tenant:
        headers[config.tenant_header] = config.tenant
    return headers


def _text(secret: Any) -> str:
    return secret if isinstance(secret, str) else str(secret())


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _number(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None
