"""The verdict needs as many good samples as the configuration asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flow_world import JUSTIFIED, NOW, open_world

from actions.model import Plan
from agent.config import Config, Verify
from agent.fold_model import Incident
from agent.sources.matrix import Sample
from agent.sources.prometheus import QueryError
from agent.verify import SeriesVerifier
from rules.model import Evidence, Frame, SeriesId, Situation, Topology
from rules.packs import PackSet
from rules.verify import Verdict


class Good:
    """Situations with four good samples of the watched series."""

    async def since(self, incident: Incident, names: set[str], start: float) -> Situation:
        times = NOW + np.arange(1.0, 5.0)
        frame = Frame(times=times, ids=(SeriesId("m", ()),), values=np.zeros((1, 4)))
        evidence = Evidence(name="m", source="prometheus", frame=frame)
        return Situation(
            alerts=(), entry="front", onset=start, until=NOW + 10, evidence=(evidence,), topology=Topology()
        )


@pytest.mark.parametrize(("samples", "recovered"), [(4, True), (5, False)])
async def test_as_many_good_samples_as_configured(tmp_path: Path, samples: int, recovered: bool) -> None:
    world = await open_world(tmp_path)
    try:
        id = await world.alert()
        config = Config(verify=Verify(samples=samples))
        verifier = SeriesVerifier(config, PackSet.of(()), Good(), world.store, world.telemetry)  # type: ignore[arg-type]
        verdict = await verifier.judged(world.incident(id), JUSTIFIED, NOW)
        assert verdict.recovered is recovered
    finally:
        await world.store.close()


@pytest.mark.parametrize(
    ("answer", "recovered", "words"),
    [
        ((Sample(labels={}, time=NOW, value=1.0),), True, ""),
        ((), False, "does not hold yet"),
        (QueryError("no answer"), False, "no answer"),
        (None, False, "no Prometheus"),
    ],
    ids=["holds", "does not hold", "cannot be asked", "nobody to ask"],
)
async def test_an_action_may_ask_a_query_of_its_own_besides(
    tmp_path: Path, answer: Any, recovered: bool, words: str
) -> None:
    asked: list[str] = []

    async def ask(query: str, *, tenant: str = "") -> tuple[tuple[Sample, ...], tuple[str, ...]]:
        asked.append(query)
        if isinstance(answer, Exception):
            raise answer
        return answer, ()

    world = await open_world(tmp_path)
    try:
        incident = world.incident(await world.alert())
        verifier = SeriesVerifier(
            Config(), PackSet.of(()), Good(), world.store, world.telemetry, ask=None if answer is None else ask  # type: ignore[arg-type]
        )  # fmt: skip
        plan = Plan(
            id="plan-x", incident=incident.id, service='fr"ont', cause="c", steps=(), autonomy="auto", made_at=NOW,
            expires_at=NOW + 60, verify_query="min(up{$scope}) == 1",
        )  # fmt: skip
        verdict = await verifier._own(plan, incident, Verdict(recovered=True, text="good"))
        assert verdict.recovered is recovered
        assert words in verdict.text
        assert asked == ([] if answer is None else ['min(up{service=~"fr\\"ont"}) == 1'])
    finally:
        await world.store.close()
