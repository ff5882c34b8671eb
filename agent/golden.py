"""Golden incidents: recordings with the ranking that is expected of them.

Called by `alertmedic packs test` and, before a model that learned from feedback may serve, by `agent.learning`. Exists
so that "no worse than before" means something: a change of packs, likelihoods or code is held against incidents whose
cause is known. A golden incident goes through the code that a live incident goes through; `expected.json` is read only
here, and only compared. Never changes anything.

One directory an incident: a recording (`agent.sources.recorded`) and `expected.json`:

    {"verdict": "ranked", "ranking": [{"service": "orders", "cause": "process.memory_leak"}]}

* verdict: `ranked` or `insufficient_evidence`.
* ranking: the first places, in order; of each its `service` and, where that matters, `cause` or `fault`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Literal

import msgspec

from agent.engines import RULES, Engine, diagnosed
from agent.sources.recorded import RecordingError, read_recording
from rules.diagnose import TOP
from rules.model import Diagnosis, Hypothesis, Situation
from rules.packs import PackSet

EXPECTED = "expected.json"
MAX_EXPECTED_BYTES = 1 << 20
MAX_KEPT = 64  # situations that stay in memory between two runs


class Place(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One place of a ranking. What is "" is not compared."""

    service: str
    cause: str = ""
    fault: str = ""

    def holds(self, hypothesis: Hypothesis) -> bool:
        wanted = ((self.service, hypothesis.service), (self.cause, hypothesis.cause), (self.fault, hypothesis.fault))
        return all(expected in ("", found) for expected, found in wanted)

    def __str__(self) -> str:
        return f"{self.cause or self.fault or 'anything'} on {self.service}"


class Expected(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """expected.json."""

    verdict: Literal["ranked", "insufficient_evidence"]
    ranking: tuple[Place, ...] = ()


@dataclass(frozen=True, slots=True)
class Golden:
    """A golden incident that was read."""

    directory: Path
    expected: Expected
    situation: Situation

    @property
    def name(self) -> str:
        return self.directory.name


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one golden incident; `fault` is "" if it came out as expected."""

    name: str
    directory: Path
    fault: str


def shipped() -> Path:
    """The golden incidents that come with AlertMedic."""
    return Path(str(resources.files("rules"))) / "golden"


def find(directories: Iterable[Path]) -> tuple[Path, ...]:
    """Every golden incident in or under the directories, by path. A directory that does not exist holds none."""
    return tuple(sorted({path.parent for directory in directories for path in directory.glob(f"**/{EXPECTED}")}))


@lru_cache(maxsize=MAX_KEPT)
def read(directory: Path) -> Golden:
    """One golden incident. Raises RecordingError naming the file and what is wrong in it."""
    path = directory / EXPECTED
    try:
        with path.open("rb") as file:
            expected = msgspec.json.decode(file.read(MAX_EXPECTED_BYTES), type=Expected)
    except OSError as error:
        raise RecordingError(f"{path}: {error.strerror or error}") from error
    except msgspec.MsgspecError as error:
        raise RecordingError(f"{path}: {error}; hint: docs/packs.md says what a golden incident is") from error
    if expected.verdict == "ranked" and not expected.ranking:
        raise RecordingError(f"{path}: ranking: a ranked incident has at least a first place")
    return Golden(directory, expected, read_recording(directory))


def judge(golden: Golden, packs: PackSet, engine: Engine | None = None) -> Outcome:
    """Diagnoses the incident, its rules run by `engine` (None: the built-in one), and compares. An engine that did not
    answer is a fault, whatever the ranking without rules is."""
    places = len(golden.expected.ranking)
    diagnosis = diagnosed(golden.situation, packs, max(TOP, places), engine)
    silent = diagnosis.missing.get(RULES, "") if engine is not None else ""
    fault = f"the rules were not run: {silent}" if silent else difference(golden.expected, diagnosis)
    return Outcome(golden.name, golden.directory, fault)


def judge_all(directories: Sequence[Path], packs: PackSet, engine: Engine | None = None) -> tuple[Outcome, ...]:
    """Every golden incident under the directories; one that cannot be read is a fault of its own."""
    outcomes = []
    for directory in find(directories):
        try:
            outcomes.append(judge(read(directory), packs, engine))
        except RecordingError as error:
            outcomes.append(Outcome(directory.name, directory, str(error)))
    return tuple(outcomes)


def difference(expected: Expected, diagnosis: Diagnosis) -> str:
    """What differs from the expectation, in words; "" if nothing does."""
    if diagnosis.verdict != expected.verdict:
        said = f" ({_told(diagnosis.hypotheses[0])} came first)" if diagnosis.hypotheses else ""
        return f"expected {expected.verdict}, got {diagnosis.verdict}{said}"
    for at, place in enumerate(expected.ranking):
        if at >= len(diagnosis.hypotheses):
            return f"expected {place} in place {at + 1}, but there are only {at} hypotheses"
        if not place.holds(diagnosis.hypotheses[at]):
            return f"expected {place} in place {at + 1}, got {_told(diagnosis.hypotheses[at])}"
    return ""


def _told(hypothesis: Hypothesis) -> str:
    return f"{hypothesis.cause} on {hypothesis.service}, {hypothesis.posterior:.0%}"
