"""The demo's verdicts: what was expected of the agent for each fault, what it did, and the report of it.

Used by the demo's driver. The table of expectations is here, in the driver's process, where the agent cannot see it.
What the agent did is read from its public API (`GET /api/v1/incidents`); times come from the injector, from
Prometheus and from the outside probe, never from the agent: `diagnosed_at` is when the driver first saw the
diagnosis.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import orjson
from rich.table import Table
from rich.text import Text

from agent.demo.settings import ALERT

Outcome = Literal["healed", "escalated", "failed"]
FINAL_STATES = frozenset({"resolved", "escalated"})
UNTOUCHED_STEPS = frozenset({"planned", "denied", "expired", "cancelled"})  # their intent was never announced


@dataclass(frozen=True)
class Expectation:
    """The cause (and the service that has it) that is right for a fault, and whether there is a safe remedy."""

    cause: str
    service: str
    remedy: bool = True


EXPECTED = {
    "cpu_hog": Expectation("host.cpu_neighbour", "node-1"),
    "memory_leak": Expectation("process.memory_leak", "orders"),
    "db_lock": Expectation("postgres.blocking_session", "postgres"),
    "worker_crash": Expectation("process.crashed", "worker"),
    "worker_stuck": Expectation("process.stuck", "worker"),
    "payments_slow": Expectation("http.dependency_slow", "payments", remedy=False),
    "bad_flag": Expectation("http.bad_flag", "orders"),
    "pool_exhausted": Expectation("worker.pool_exhausted", "worker"),
}


@dataclass(frozen=True)
class Measured:
    """What the driver measured of one fault (unix seconds; None: it has not happened)."""

    fault_at: float
    alert_at: float | None = None
    diagnosed_at: float | None = None
    recovered_at: float | None = None


@dataclass(frozen=True)
class Verdict:
    """One line of the report. Times are RFC 3339, `mttr_seconds` is from the fault to the recovery by the agent."""

    fault: str
    alert: str
    top_cause: str | None
    posterior: float | None
    correct: bool
    action: str | None
    outcome: Outcome
    enforced_by: str | None
    fault_at: str
    alert_at: str | None
    diagnosed_at: str | None
    recovered_at: str | None
    mttr_seconds: float | None
    clear: bool | None = None  # whether that cause stood clear of all others; None: no diagnosis

    @property
    def passed(self) -> bool:
        """The right cause, and healed; or, where there is no safe remedy, escalated without a touch."""
        if EXPECTED[self.fault].remedy:
            return self.correct and self.outcome == "healed"
        return self.correct and self.outcome == "escalated" and self.action is None


def top_hypothesis(incident: dict[str, Any]) -> dict[str, Any] | None:
    """The best hypothesis; None while there is no diagnosis, or where it says that the evidence does not suffice."""
    hypotheses = incident["hypotheses"]
    return hypotheses[0] if incident["verdict"] == "ranked" and hypotheses else None


def touching_steps(incident: dict[str, Any]) -> list[tuple[str, str | None]]:
    """(action, enforced by) of everything that was run against the world: not what was only planned, and nothing
    read-only."""
    touched: list[tuple[str, str | None]] = []
    for past in incident["past_plans"]:
        for action, state in zip(past["actions"], past["states"], strict=False):
            if state not in UNTOUCHED_STEPS and not action.startswith("diagnostic."):
                touched.append((action, None))
    for step in (incident["plan"] or {"steps": ()})["steps"]:
        if step["state"] not in UNTOUCHED_STEPS and not step["read_only"]:
            touched.append((step["action"], (step.get("result") or {}).get("enforced_by")))
    return touched


def judge(fault: str, incidents: Sequence[dict[str, Any]], measured: Measured) -> Verdict:
    """The verdict over all incidents that the agent opened for one fault, oldest first. More than one is fine only as
    long as each is right and no more than one was acted on."""
    expected = EXPECTED[fault]
    tops = [top for incident in incidents if (top := top_hypothesis(incident)) is not None]
    right = [(t["cause"], t["service"]) == (expected.cause, expected.service) for t in tops]
    acted = [(incident, touched) for incident in incidents if (touched := touching_steps(incident))]
    ranked = [incident for incident in incidents if top_hypothesis(incident) is not None]
    shown = acted[0][0] if acted else (ranked[0] if ranked else None)
    top = top_hypothesis(shown) if shown is not None else None
    outcome: Outcome = "failed"
    if len(acted) == 1 and acted[0][0]["state"] == "resolved" and measured.recovered_at is not None:
        outcome = "healed"
    elif not acted and any(incident["state"] == "escalated" for incident in incidents):
        outcome = "escalated"
    action, enforced_by = acted[0][1][-1] if acted else (None, None)
    healed_in = measured.recovered_at - measured.fault_at if outcome == "healed" and measured.recovered_at else None
    return Verdict(
        fault=fault,
        alert=ALERT,
        top_cause=top["cause"] if top else None,
        posterior=round(top["posterior"], 4) if top else None,
        clear=shown["clear"] if shown is not None and top else None,
        correct=bool(right) and all(right),
        action=action,
        outcome=outcome,
        enforced_by=enforced_by,
        fault_at=rfc3339(measured.fault_at),
        alert_at=_optional_time(measured.alert_at),
        diagnosed_at=_optional_time(measured.diagnosed_at),
        recovered_at=_optional_time(measured.recovered_at),
        mttr_seconds=round(healed_in, 2) if healed_in is not None else None,
    )


def rfc3339(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _optional_time(at: float | None) -> str | None:
    return None if at is None else rfc3339(at)


def write(path: Path, verdicts: Iterable[Verdict]) -> None:
    """The report as `{"incidents": [...]}`; whether a cause stood clear shows in the table alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{name: value for name, value in asdict(v).items() if name != "clear"} for v in verdicts]
    path.write_bytes(orjson.dumps({"incidents": rows}, option=orjson.OPT_INDENT_2) + b"\n")


def table(verdicts: Sequence[Verdict], measured: Sequence[Measured]) -> Table:
    """The final table. Seconds count from the fault."""
    shown = Table(title="what was broken, and what the agent made of it", title_justify="left")
    for name in ("fault", "diagnosis", "posterior", "action", "limits", "outcome"):
        shown.add_column(name, overflow="fold")
    for name in ("alert", "diagnosed", "recovered"):
        shown.add_column(name, justify="right")
    shown.add_column("")
    for verdict, times in zip(verdicts, measured, strict=True):

        def after(at: float | None, since: float = times.fault_at) -> str:
            return "-" if at is None else f"{at - since:.1f} s"

        shown.add_row(
            verdict.fault,
            (verdict.top_cause or "none") + (" (not clear)" if verdict.clear is False else ""),
            "-" if verdict.posterior is None else f"{verdict.posterior:.3f}",
            verdict.action or "none",
            verdict.enforced_by or "-",
            verdict.outcome,
            after(times.alert_at),
            after(times.diagnosed_at),
            after(times.recovered_at),
            Text("right", style="green") if verdict.passed else Text("WRONG", style="bold red"),
        )
    return shown
