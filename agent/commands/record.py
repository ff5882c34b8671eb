"""`record`: an incident's evidence, asked for again and kept as a recording.

Called by `agent.cli`. Exists so that an incident can be replayed, learned from, and kept as a golden incident. It asks
what the live diagnosis asked, over the window that it looked at, through the same code; it never writes to the journal
and never speaks to the service.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from agent.commands.look import find, read
from agent.commands.output import CommandError, Exit, emit_json, say
from agent.sources import EvidenceRequest, Source, SourceError

if TYPE_CHECKING:
    from agent.config import Config
    from agent.fold_model import Incident
    from agent.fold_state import State
    from rules.model import Diagnosis, Evidence, Situation
    from rules.packs import PackSet

FRESH_SECONDS = 60.0  # so old a look may be for what the host says now to be what it said then


class _Past:
    """Stands for a source that only knows the present."""

    name = "host"

    async def fetch(self, request: EvidenceRequest, deadline_seconds: float) -> tuple[Evidence, ...]:
        raise SourceError("the host only knows its present, and the incident is past")


def record(
    config: Config,
    state_dir: Path,
    wanted: str,
    out: Path | None,
    *,
    up_to_now: bool,
    expect: str,
    as_json: bool,
    clock: Callable[[], float] = time.time,
) -> Exit:
    """Writes the recording into `out` (default: a directory named by the incident). `expect` (`CAUSE@SERVICE`) makes a
    golden incident of it."""
    from agent.engines import EngineError, diagnosed, engine_for
    from agent.packs import load_packs
    from agent.sources.recorded import read_recording, write_recording

    if not config.prometheus.url:
        raise CommandError("record: no Prometheus is configured", "set prometheus.url, or ALERTMEDIC_PROMETHEUS__URL")
    cause, at, service = expect.rpartition("@")
    if expect and not (cause and at and service):
        raise CommandError(f"record: --expect {expect!r} is not CAUSE@SERVICE", "", Exit.USAGE)
    state = read(state_dir)
    incident = find(state, wanted)
    directory = out if out is not None else Path(incident.id)
    packs = load_packs(config.packs.dirs, config.packs.disable, config.packs.model)
    now = clock()
    until = now if up_to_now or not incident.evidence_at else incident.evidence_at
    situation = asyncio.run(_look(config, packs, incident, state, until, now))
    try:
        write_recording(directory, situation)
    except (FileExistsError, ValueError) as error:
        raise CommandError(str(error), "give another directory by --out") from error
    if expect:
        place = {"service": service, "cause": cause}
        golden = {"verdict": "ranked", "ranking": [place]}
        (directory / "expected.json").write_bytes(msgspec.json.encode(golden) + b"\n")
    try:
        with engine_for(config.packs.engine, packs) as engine:
            diagnosis = diagnosed(read_recording(directory), packs, engine=engine)
    except EngineError as error:
        raise CommandError(str(error), f"set packs.engine: builtin; the recording is in {directory}") from error
    _tell(directory, situation, diagnosis, incident, as_json=as_json)
    return Exit.OK


async def _look(
    config: Config, packs: PackSet, incident: Incident, state: State, until: float, now: float
) -> Situation:
    from agent.app import prometheus_of
    from agent.expressions import Expressions, rules_of
    from agent.situation import Situations
    from agent.sources.host import HostSource
    from agent.sources.prometheus import PrometheusSource
    from agent.systems import SystemsSeen
    from agent.topology import Discovery, load_topology

    host: Source = HostSource(config.inventory_strings) if now - until <= FRESH_SECONDS else _Past()
    async with PrometheusSource(prometheus_of(config)) as prometheus:
        discover = Discovery(prometheus).topology if config.topology.service_graph else None
        situations = Situations(
            config,
            packs,
            [host, prometheus],
            load_topology(config),
            discover,
            clock=lambda: until,
            expressions=Expressions(rules_of(prometheus)),
            systems=SystemsSeen(prometheus, at=until),
        )
        return await situations.of(incident, state)


def _tell(directory: Path, situation: Situation, diagnosis: Diagnosis, incident: Incident, *, as_json: bool) -> None:
    series = sum(len(e.frame.ids) for e in situation.evidence)
    same = None if incident.diagnosis is None else _places(incident.diagnosis) == _places(diagnosis)
    if as_json:
        answer: dict[str, Any] = {
            "recording": str(directory),
            "incident": incident.id,
            "series": series,
            "missing": situation.missing(),
            "same_ranking": same,
            "diagnosis": msgspec.to_builtins(diagnosis),
        }
        emit_json(answer)
        return
    say(f"{directory}: {series} series of {incident.id}")
    for name, reason in sorted(situation.missing().items()):
        say(f"  missing: {name}: {reason}")
    say(f"  {diagnosis.sentence}")
    if same is not None:
        say("  the ranking is that of the live diagnosis" if same else "  the live diagnosis ranked otherwise")


def _places(diagnosis: Diagnosis) -> list[tuple[str, str]]:
    return [(h.cause, h.service) for h in diagnosis.hypotheses]
