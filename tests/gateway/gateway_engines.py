"""Engines for the other channel: a good one, and every way of being bad. A setting names them `gateway_engines:hang`;
they run in the channel's process."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import msgspec

from rules.diagnose import diagnose
from rules.model import Diagnosis, Hypothesis


def good(situation: Any, packs: Any) -> Any:
    return diagnose(situation, packs)


def other(situation: Any, packs: Any) -> Any:
    """Sound, and of another opinion."""
    made = Hypothesis(cause="x.other", service="elsewhere", fault="cpu", title="t", posterior=0.9, confidence=0.9)
    return Diagnosis(verdict="ranked", hypotheses=(made,), candidates=1, sentence="it is elsewhere", version="other-1")


def hang(situation: Any, packs: Any) -> Any:
    while True:
        time.sleep(60)


def spin(situation: Any, packs: Any) -> Any:
    while True:
        pass


def crash(situation: Any, packs: Any) -> Any:
    os._exit(17)


def fail(situation: Any, packs: Any) -> Any:
    raise KeyError("a bug")


def allocate(situation: Any, packs: Any) -> Any:
    """Without bound; what it was given is kept, so that nothing saves it."""
    kept = []
    while True:
        kept.append(bytearray(16 * 1024 * 1024))


def chatter(situation: Any, packs: Any) -> Any:
    """Writes to what it takes for standard output."""
    print("noise" * 1000)
    os.write(1, b"\x00\x00\x00\x01x" * 100)
    sys.stdout.flush()
    return diagnose(situation, packs)


def nonsense(situation: Any, packs: Any) -> Any:
    return ["not", "a", "diagnosis"]


def impossible(situation: Any, packs: Any) -> Any:
    made = diagnose(situation, packs)
    return msgspec.structs.replace(
        made, verdict="ranked", hypotheses=tuple(msgspec.structs.replace(h, posterior=7.0) for h in made.hypotheses)
    )


def every_other(situation: Any, packs: Any) -> Any:
    """Answers once, then dies."""
    global _turn
    _turn += 1
    return crash(situation, packs) if _turn % 2 == 0 else good(situation, packs)


_turn = 0


def moody(situation: Any, packs: Any) -> Any:
    """Good, then each of the above in turn."""
    global _turn
    _turn += 1
    ways = (good, other, fail, nonsense, impossible, chatter, crash, hang)
    return ways[(_turn + os.getpid()) % len(ways)](situation, packs)
