"""Rule engines: who finds out which rules fire.

Called by `agent.app` (`engine_of`), `agent.investigate` (`matched`) and the commands that diagnose or evaluate
recordings (`engine_for`, `diagnosed`). The built-in matcher (`rules.engine`) is the
default and the fastest; durable-rules can stand in for it (`packs.engine: durable`), and tests hold the two equal. An
engine that fails costs the rules of one look, never the look: what is missing is named like any other evidence.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal, Protocol

from rules.diagnose import TOP, conclude, observe
from rules.engine import Fired, Record, records_of
from rules.evidence import Observer
from rules.model import Diagnosis, Evidence, Situation
from rules.packs import PackSet

logger = logging.getLogger("alertmedic.engines")
RULES = "rules"  # the name under which rules are missing


class EngineError(RuntimeError):
    """An engine that cannot be had, or did not answer. The text names it and a hint."""


class Engine(Protocol):
    """Finds every match of every rule, ordered by rule and variables, as `rules.engine.Matcher` does."""

    def match(self, records: Mapping[str, Sequence[Record]]) -> tuple[Fired, ...]:
        """Blocks for a bounded time; raises EngineError."""

    def close(self) -> None: ...


def engine_of(name: Literal["builtin", "durable"], packs: PackSet) -> Engine | None:
    """The configured engine; None for the built-in one, which `rules.diagnose` has itself. Raises EngineError where it
    cannot be had: another one in its place would be a surprise."""
    if name == "builtin":
        return None
    from agent.engines.durable import Durable

    return Durable(packs.rules)


@contextmanager
def engine_for(name: Literal["builtin", "durable"], packs: PackSet) -> Iterator[Engine | None]:
    """`engine_of`, closed in the end. Raises EngineError."""
    engine = engine_of(name, packs)
    try:
        yield engine
    finally:
        if engine is not None:
            engine.close()


def diagnosed(situation: Situation, packs: PackSet, limit: int = TOP, engine: Engine | None = None) -> Diagnosis:
    """`rules.diagnose.diagnose`, its rules run by `engine`."""
    return conclude(matched(observe(situation, packs), engine), limit)


def matched(observer: Observer, engine: Engine | None) -> Observer:
    """The observer with what the engine found. Where it failed no rule fired, and that is missing evidence."""
    if engine is None:
        return observer
    try:
        observer.fired = engine.match(records_of(observer.graph, observer.findings, observer.facts()))
    except EngineError as error:
        logger.warning("%s", error)
        observer.fired = ()
        missing = Evidence(RULES, "engine", missing=str(error))
        observer.situation = replace(observer.situation, evidence=(*observer.situation.evidence, missing))
    return observer
