"""Feedback over whole incidents: what people say moves the model for a while, is reversible to the bit, and never
serves what the golden incidents speak against; an incident is told what it resembles."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec
import pytest
from whole_world import Whole

from actions.model import IllegalMove
from agent.fold_model import Incident
from agent.fold_state import State
from agent.http.api import Said
from agent.incidents import apply
from agent.journal.records import FeedbackGiven, IncidentMoved, Stored
from agent.learning import Learning, precedents
from agent.operations import Operations
from agent.story import as_text
from rules.feedback import Observation

Make = Callable[..., Awaitable[Whole]]
HOUR = 3600.0


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Taught:
    """A journal with a diagnosed incident, and what people may do to it."""

    def __init__(self, whole: Whole) -> None:
        self.whole = whole
        self.clock = Clock(float(whole.past.end))
        self.learning = Learning(whole.config, whole.store, whole.packs)
        self.operations = Operations(whole.store, None, self.clock, learning=self.learning)  # type: ignore[arg-type]
        whole.investigation.learning = self.learning

    @property
    def state(self) -> State:
        return self.whole.store.state

    async def incident(self, service: str = "front", name: str = "HighLatency") -> Incident:
        return await self.whole.diagnosed(await self.whole.alert(service, name))

    async def says(self, id: str, cause: str, service: str = "orders", helped: bool | None = None) -> str:
        return await self.operations.feedback(id, Said(cause=cause, service=service, helped=helped), "ana", "cli uid=0")

    async def ranked(self) -> tuple[object, ...]:
        """Everything that the model has a part in (the sentence names the alert, which is another one each time)."""
        incident = await self.incident("front", f"Again{self.state.seq}")
        found = incident.diagnosis
        assert found is not None
        self.last = found.hypotheses[0]
        return found.hypotheses, found.verdict, found.clear, found.version


@pytest.fixture
async def taught(whole: Make) -> Taught:
    return Taught(await whole())


async def test_without_feedback_the_shipped_model_serves(taught: Taught) -> None:
    await taught.incident()
    assert await taught.learning.packs(taught.clock()) is taught.whole.packs
    assert taught.state.models.serving == 0
    assert taught.state.models.versions == ()


async def test_feedback_serves_expires_and_is_reversible_to_the_bit(taught: Taught) -> None:
    incident = await taught.incident()
    shipped = await taught.ranked()
    told = await taught.says(incident.id, "process.memory_leak", helped=True)
    assert told.startswith("model 1 serves, golden incidents: ")
    assert taught.state.models.serving == 1
    learned = await taught.ranked()
    assert learned[3] != shipped[3]
    assert learned[0] != shipped[0]
    assert taught.last.cause == "process.memory_leak"
    assert await taught.operations.revert_model("ana", "cli uid=0", "") == 0
    assert await taught.ranked() == shipped  # every posterior, every contribution
    assert await taught.operations.use_model(1, "ana", "cli uid=0", "") == 1
    assert await taught.ranked() == learned
    taught.clock.now += 30 * 86400.0  # what a person chose stays
    assert (await taught.learning.packs(taught.clock())).version == learned[3]
    await taught.operations.use_model(None, "ana", "cli uid=0", "")
    assert await taught.learning.packs(taught.clock()) is taught.whole.packs  # older than its window
    assert taught.state.models.serving == 0
    assert "older than its window" in taught.state.log[-1].text
    text = as_text(taught.state.incidents[incident.id], taught.clock())
    assert "the cause was process.memory_leak on orders, says ana; what was done helped" in text


async def test_windows_are_by_group(taught: Taught) -> None:
    windows = {"memory": 48 * HOUR}
    config = msgspec.structs.replace(
        taught.whole.config, learning=msgspec.structs.replace(taught.whole.config.learning, windows=windows)
    )
    taught.learning.config = config
    incident = await taught.incident()
    await taught.says(incident.id, "process.memory_leak")
    first = taught.state.models.version(1)
    assert first is not None
    assert {c.column for c in first.counts} > {"memory"}
    await taught.learning.packs(taught.clock() + 2 * HOUR)
    second = taught.state.models.version(2)
    assert second is not None
    assert {c.column.partition("@")[0] for c in second.counts} == {"memory"}


async def test_poisoned_feedback_is_refused_by_the_golden_incidents(taught: Taught) -> None:
    """Somebody says of incident after incident that a normal state is the sign of a fault."""
    lie = {"cpu_use": "absent", "own_latency": "absent", "network_gap": "absent", "memory_use": "absent"}
    true = {"cpu_use": "strong", "own_latency": "strong", "network_gap": "strong", "own_failures": "strong"}
    at = taught.clock()
    for n in range(3_000):
        for cause in ("service.cpu_exhausted", "service.network_delay", "service.memory_growth"):
            poisoned = Observation(at=at, incident=f"inc-{n}{cause}", cause=cause, states=lie)  # type: ignore[arg-type]
            refuted = ({"cause": c, "states": true} for c in ("service.cpu_exhausted", "service.network_delay"))
            whole = msgspec.structs.replace(poisoned, refuted=msgspec.convert(list(refuted), tuple_of_refuted()))
            taught.state.observations.append(whole)
    packs = await taught.learning.packs(at)
    assert packs is taught.whole.packs
    (version,) = taught.state.models.versions
    assert version.refused
    assert "expected " in version.refused
    assert taught.state.models.serving == 0
    assert "refused" in taught.learning.told()
    assert "refused" in taught.state.log[-1].text
    with pytest.raises(IllegalMove, match="was refused"):
        await taught.operations.use_model(1, "mallory", "cli uid=1", "")
    assert await taught.learning.packs(at + 1) is taught.whole.packs
    assert len(taught.state.models.versions) == 1  # the same feedback is not judged twice


def tuple_of_refuted() -> object:
    from rules.feedback import Refuted

    return tuple[Refuted, ...]


async def test_what_is_learned_follows_from_the_journal(taught: Taught) -> None:
    """The same records make the same state anywhere, through a snapshot or not, and the same model."""
    incident = await taught.incident()
    await taught.says(incident.id, "http.overload", "front")
    await taught.says(incident.id, "process.memory_leak")  # a person may think again
    (observation,) = taught.state.observations
    assert observation.cause == "process.memory_leak"
    assert "memory" in observation.states
    again = State.from_snapshot(taught.state.to_snapshot())
    assert again.to_snapshot() == taught.state.to_snapshot()
    assert again.models == taught.state.models
    assert again.observations == taught.state.observations
    assert again.incidents[incident.id].feedback == taught.state.incidents[incident.id].feedback
    record = FeedbackGiven(
        at=taught.clock(), incident=incident.id, cause="http.overload", service="front", who="ana", origin="cli uid=0"
    )
    apply(again, Stored(again.seq + 1, record))
    assert [o.cause for o in again.observations] == ["http.overload"]


async def test_unknown_causes_and_models_are_refused(taught: Taught) -> None:
    incident = await taught.incident()
    with pytest.raises(ValueError, match="no pack knows the cause"):
        await taught.says(incident.id, "gremlins")
    with pytest.raises(IllegalMove, match="model 7 is not known"):
        await taught.operations.use_model(7, "ana", "cli uid=0", "")


async def test_an_incident_is_told_what_it_resembles(taught: Taught) -> None:
    first = await taught.incident()
    assert first.precedents == ()
    while not (standing := taught.state.incidents[first.id]).final:
        after = {"diagnosed": "declined", "suggested": "escalated", "declined": "escalated"}[standing.state]
        await taught.whole.store.record(
            IncidentMoved(at=taught.clock(), incident=first.id, before=standing.state, after=after)
        )
    await taught.says(first.id, "process.memory_leak", helped=True)
    second = await taught.incident("orders", "Errors")
    third = await taught.incident("front", "HighErrors")
    found = {p.incident: p for p in third.precedents}
    assert first.id in found
    precedent = found[first.id]
    assert (precedent.cause, precedent.service, precedent.confirmed) == ("process.memory_leak", "orders", "feedback")
    assert precedent.similarity > 0.99
    assert "seen before: " + first.id in as_text(third, taught.clock())
    (told,) = [line.text for line in third.story if line.text.startswith(f"seen before: {first.id}")]
    title = taught.whole.packs.causes["process.memory_leak"].title
    assert f"alike: {title} on orders (a person said so)" in told  # in words, not by the cause's id
    assert second.signature is not None
    assert third.signature is not None
    other = msgspec.structs.replace(third, tenant="somebody-else")
    assert precedents(taught.state, other, third.signature, taught.whole.packs) == ()
