"""The fold of feedback and models: what people said, and which model serves.

Called by `agent.incidents` only. Pure: what it makes depends on the records alone. What feedback says of evidence is
taken from the signature that the look left, so that nothing has to be asked again.
"""

from __future__ import annotations

import msgspec

from actions.model import IllegalMove
from agent import fold_story as story
from agent.fold_model import MAX_MODELS, MAX_PAST, Changes, Given, Incident, Models, ModelVersion
from agent.fold_state import MAX_OBSERVATIONS, State
from agent.journal.records import FeedbackGiven, ModelChosen, ModelMade
from rules.feedback import Observation, Refuted
from rules.packs import STATES
from rules.packs import State as EvidenceState


def feedback(state: State, seq: int, record: FeedbackGiven) -> Changes:
    """The newest word on an incident stands in the place of an earlier one."""
    if record.incident not in state.incidents:
        return Changes()
    incident = state.touch(record.incident, record.at, seq)
    incident.feedback = Given(
        at=record.at,
        cause=record.cause,
        service=record.service,
        helped=record.helped,
        who=record.who,
        origin=record.origin,
        note=record.note,
    )
    state.observations = [o for o in state.observations if o.incident != record.incident]
    state.observations.append(_observation(incident, record))
    del state.observations[:-MAX_OBSERVATIONS]
    incident.tell(record.at, story.feedback_given(record), "feedback_given")
    return Changes((incident.id,))


def _observation(incident: Incident, record: FeedbackGiven) -> Observation:
    others = incident.diagnosis.hypotheses if incident.diagnosis is not None else ()
    refuted = (
        Refuted(cause=h.cause, states=_states(incident, h.cause, h.service))
        for h in others
        if (h.cause, h.service) != (record.cause, record.service)
    )
    return Observation(
        at=record.at,
        incident=incident.id,
        cause=record.cause,
        states=_states(incident, record.cause, record.service),
        refuted=tuple(r for r in refuted if r.states),
    )


def _states(incident: Incident, cause: str, service: str) -> dict[str, EvidenceState]:
    """What the node showed, as far as the look left it; else what the hypothesis rested on."""
    if incident.signature is not None and (states := incident.signature.states_of(service)):
        return states
    known: dict[str, EvidenceState] = {s: s for s in STATES}
    for hypothesis in incident.diagnosis.hypotheses if incident.diagnosis is not None else ():
        if (hypothesis.cause, hypothesis.service) == (cause, service):
            return {c.evidence: known[c.state] for c in hypothesis.contributions if c.state in known}
    return {}


def made(state: State, record: ModelMade) -> None:
    models = state.models
    version = ModelVersion(
        number=record.number,
        at=record.at,
        counts=record.counts,
        incidents=record.incidents,
        golden=record.golden,
        refused=record.refused,
    )
    models = msgspec.structs.replace(models, versions=(*models.versions, version), last=record.number)
    if not record.refused and not models.pinned:
        models = _serves(models, record.number, pinned=False)
    state.models = _bounded(models)
    state.tell(record.at, story.model_made(record), "model_made")


def chosen(state: State, record: ModelChosen) -> None:
    state.models = _serves(state.models, record.number, pinned=record.pinned)
    state.tell(record.at, story.model_chosen(record), "model_chosen")


def check(state: State, record: ModelMade | ModelChosen) -> None:
    """Raises IllegalMove for a number that is not the next one, or a model that may not serve."""
    models = state.models
    if isinstance(record, ModelMade):
        if record.number != models.last + 1:
            raise IllegalMove(f"model {record.number} after {models.last}: another one was made meanwhile")
        return
    version = models.version(record.number)
    if record.number and version is None:
        raise IllegalMove(f"model {record.number} is not known; hint: `alertmedic model list`")
    if version is not None and version.refused:
        raise IllegalMove(f"model {record.number} was refused: {story.plain(version.refused)}")


def _serves(models: Models, number: int, *, pinned: bool) -> Models:
    earlier = models.earlier if number == models.serving else (*models.earlier, models.serving)[-MAX_PAST:]
    return msgspec.structs.replace(models, serving=number, pinned=pinned, earlier=earlier)


def _bounded(models: Models) -> Models:
    """The newest versions, the one that serves, and those that served before as far as they are kept."""
    kept = {v.number for v in models.versions[-MAX_MODELS:]} | {models.serving}
    versions = tuple(v for v in models.versions if v.number in kept)
    numbers = {0, *(v.number for v in versions)}
    return msgspec.structs.replace(models, versions=versions, earlier=tuple(n for n in models.earlier if n in numbers))
