"""`metrics`: what the Prometheus behind the agent holds, for people who write packs.

Through `agent.explore` (prometheus-api-client, the extra `explore`), which is another client than the service's own.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from agent.commands.output import CommandError, Exit, emit_json, say, table

if TYPE_CHECKING:
    from agent.config import Config
    from agent.explore import Explorer


def names(config: Config, url: str, pattern: str, limit: int, *, as_json: bool) -> Exit:
    """Names of metrics that have had samples within the last hour."""
    found = _ask(config, url, lambda e: e.list_metrics(now=time.time()))
    chosen = [name for name in found if pattern.lower() in name.lower()]
    shown = chosen[:limit] if limit else chosen
    if as_json:
        emit_json({"names": shown, "total": len(chosen)})
    else:
        for name in shown:
            say(name)
    return Exit.OK


def labels(config: Config, url: str, metric: str, limit: int, *, as_json: bool) -> Exit:
    """The labels of one metric, with their values."""
    found = _ask(config, url, lambda e: e.labels_of(metric, now=time.time()))
    shown = {name: values[:limit] if limit else values for name, values in found.items()}
    if as_json:
        emit_json({"metric": metric, "labels": shown})
        return Exit.OK
    rows = [("label", "values", "which")]
    rows += [(name, str(len(found[name])), ", ".join(values)) for name, values in shown.items()]
    table(rows, empty=f"{metric} has had no series within the last hour")
    return Exit.OK


def samples(config: Config, url: str, query: str, limit: int, *, as_json: bool) -> Exit:
    """What an expression gives now."""
    found = _ask(config, url, lambda e: e.latest(query))
    shown = found[:limit] if limit else found
    if as_json:
        emit_json({"query": query, "samples": shown, "total": len(found)})
        return Exit.OK
    rows = [("series", "value")]
    for sample in shown:
        inner = ",".join(f'{k}="{v}"' for k, v in sorted(sample["metric"].items()) if k != "__name__")
        value = sample["value"][1]
        rows.append((f"{sample['metric'].get('__name__', '')}{{{inner}}}", "NaN" if value is None else f"{value:.10g}"))
    table(rows, empty="no series")
    return Exit.OK


def _ask(config: Config, url: str, question: Any) -> Any:
    from agent.explore import ExploreError, Explorer
    from agent.sources.prometheus import Prometheus

    section = config.prometheus
    if not (url or section.url):
        raise CommandError("metrics: no server", "set prometheus.url, or give --url", Exit.USAGE)
    # Credentials belong to the configured server; another one named by --url does not get them.
    basic, bearer = (section.basic, section.bearer_token_file) if not url else (None, None)
    server = Prometheus(
        url=url or section.url,
        timeout_seconds=section.timeout_seconds,
        bearer=bearer.current if bearer else "",
        username=basic.username if basic else "",
        password=basic.password_file.current if basic else "",
        ca_file=section.tls.ca_file,
        cert_file=section.tls.cert_file,
        key_file=section.tls.key_file,
        insecure_skip_verify=section.tls.insecure_skip_verify,
        tenant_header=section.tenant_header,
        tenant=section.tenant,
    )
    try:
        explorer: Explorer
        with Explorer(server) as explorer:
            return question(explorer)
    except ExploreError as error:
        raise CommandError(str(error), "check prometheus.url, or --url", Exit.UNREACHABLE) from error
