"""Runs made by hand, for tests of what is computed from them."""

from __future__ import annotations

from typing import Any

from agent.chaos.measure import Run


def run(scenario: str = "db_lock", arm: str = "auto", repetition: int = 1, **more: Any) -> Run:
    usual: dict[str, Any] = {
        "kind": "lock",
        "healed_by": "action",
        "seed": 1,
        "at": 1_700_000_000.0,
        "degraded": 1.0,
        "alert": 5.0,
        "diagnosed": 6.0,
        "recovered": 12.0,
        "rank": 1,
        "top": ("postgres.blocking_session@postgres",),
    }
    return Run(scenario=scenario, arm=arm, repetition=repetition, **(usual | more))
