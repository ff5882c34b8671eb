"""The verdict needs as many good samples as the configuration asks for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from flow_world import JUSTIFIED, NOW, open_world

from agent.config import Config, Verify
from agent.fold_model import Incident
from agent.verify import SeriesVerifier
from rules.model import Evidence, Frame, SeriesId, Situation, Topology
from rules.packs import PackSet


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
