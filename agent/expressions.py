"""Where an alert's expression comes from: its generatorURL, or else the server's own list of rules.

Called by `agent.situation` before evidence is gathered. Exists apart because both places are foreign: a URL that
anybody who can send an alert writes, and a list that may be large, late or not there. A generatorURL is only taken
apart, never fetched. It raises nothing: an alert without an expression says why (`Told.missing`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import parse_qs, urlsplit

from agent.sources import bounded
from agent.sources.prometheus import PrometheusSource, QueryError, Rule
from rules.expression import MAX_TEXT, ExpressionError, read
from rules.model import Alert

RULES_SECONDS = 60.0  # how long a list of rules is believed
RULES_DEADLINE = 3.0  # evidence is more important than the list
MAX_URL = 4 * MAX_TEXT
MAX_HOLD = 6 * 3600.0  # an onset is not sought further back than this, whatever `for` says

RuleList = Callable[[str, float], Awaitable[tuple[Rule, ...]]]


@dataclass(frozen=True, slots=True)
class Told:
    """What is known of one alert's rule: `expression` ("" with `missing`, the reason), its `for` in seconds and the
    labels that the rule itself adds."""

    expression: str = ""
    hold_seconds: float = 0.0
    rule_labels: frozenset[str] = frozenset()
    missing: str | None = None


def rules_of(prometheus: PrometheusSource) -> RuleList:
    """The server's own list of alerting rules."""

    async def listed(tenant: str, deadline_seconds: float) -> tuple[Rule, ...]:
        return await prometheus.rules(tenant=tenant, deadline_seconds=deadline_seconds)

    return listed


@dataclass(slots=True)
class Expressions:
    """Finds expressions. `rules` lists a tenant's alerting rules within a deadline and raises QueryError; None: there
    is no server to ask."""

    rules: RuleList | None = None
    clock: Callable[[], float] = time.time
    _known: dict[str, tuple[float, tuple[Rule, ...], str | None]] = field(default_factory=dict, init=False)

    async def of(self, alerts: Sequence[Alert], tenant: str, deadline_seconds: float) -> dict[str, Told]:
        """Per fingerprint what is known of the alert's rule. Raises nothing."""
        rules, reason = await self._rules(tenant, min(RULES_DEADLINE, deadline_seconds))
        return {alert.fingerprint: _told(alert, rules, reason) for alert in alerts}

    async def _rules(self, tenant: str, deadline_seconds: float) -> tuple[tuple[Rule, ...], str | None]:
        if self.rules is None:
            return (), "no Prometheus is configured"
        now = self.clock()
        until, rules, reason = self._known.get(tenant, (0.0, (), None))
        if now >= until:
            try:
                async with asyncio.timeout(deadline_seconds):
                    rules, reason = await self.rules(tenant, deadline_seconds), None
            except (QueryError, TimeoutError) as error:
                rules, reason = (), bounded(str(error)) or f"timeout after {deadline_seconds:g} s"
            if len(self._known) >= 1000:  # tenants come from outside
                self._known.clear()
            self._known[tenant] = (now + (RULES_SECONDS if reason is None else 5.0), rules, reason)
        return rules, reason


def _told(alert: Alert, rules: Sequence[Rule], reason: str | None) -> Told:
    """The generatorURL's expression, else that of the rule with the alert's name and labels (the one with the most
    labels in common, of equals the first)."""
    text = expression_in(alert.generator_url)
    fitting = [rule for rule in rules if rule.name == alert.name and _agrees(rule.labels, alert.labels)]
    fitting.sort(key=lambda rule: (not _same(rule.query, text), -len(rule.labels)))
    rule = fitting[0] if fitting else None
    if not text and rule is not None:
        text = rule.query
    hold = min(max(rule.seconds, 0.0), MAX_HOLD) if rule is not None else 0.0
    labels = frozenset(rule.labels) if rule is not None else frozenset()
    if text:
        return Told(text, hold, labels)
    why = f"the list of rules: {reason}" if reason else "the server has no rule of that name"
    return Told(missing=f"the generatorURL holds no expression, and {why}")


def expression_in(url: str) -> str:
    """`g0.expr` of a Prometheus' generatorURL; `expr` or the first query of what others send; "" if none."""
    if not url or len(url) > MAX_URL:
        return ""
    try:
        parts = urlsplit(url)
        fields = parse_qs(parts.query, max_num_fields=100) | parse_qs(parts.fragment.lstrip("/?"), max_num_fields=100)
    except ValueError:
        return ""
    return next((fields[name][0].strip() for name in ("g0.expr", "expr") if fields.get(name)), "")


def _agrees(rule: Mapping[str, str], alert: Mapping[str, str]) -> bool:
    """Whether the alert may come from a rule with these labels; templated ones may have become anything."""
    return all("{{" in value or alert.get(name) == value for name, value in rule.items())


def _same(query: str, text: str) -> bool:
    """Whether two texts are the same expression: Prometheus prints in the URL what it has parsed."""
    try:
        return bool(text) and (query == text or str(read(query).tree) == str(read(text).tree))
    except ExpressionError:
        return False
