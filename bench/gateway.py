"""What the other diagnosis channel costs the primary: A's time with B in every mood, against A alone, interleaved.

`bench(seconds)` keeps one gateway per mood over the same recordings (tests/data/golden) and asks them in turn, each
with A alone (the same code, no candidate configured) right before or right after it, so that whatever else the machine
does meets both alike. Of A are taken the time of its diagnosis, and the time from the request, whose recording is yet
to be read, until its answer is there. A ratio of 1 means that B costs A nothing; the aim is AIM. B runs when a mood's
turn begins, whatever it did before: what its back-off saves A is no part of these figures. Evaluations begin at an even
pace, with B and alone: waiting for B leaves the caches of the CPU to others, and A alone has to begin as cold.

    python -m bench.gateway [SECONDS]
"""

from __future__ import annotations

import asyncio
import json
import math
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ENGINES = ROOT / "tests" / "gateway"
RECORDINGS = ROOT / "tests" / "data" / "golden"
ALONE = "alone"
MOODS = (ALONE, "good", "hang", "spin", "crash", "allocate", "nonsense")
READY_SECONDS = 5.0
AT_A_TIME = 8  # evaluations of one mood, before it is the next one's turn
AIM = 1.10  # A's time with B, at most, as a multiple of A's alone
PAUSE_SECONDS = 0.2  # before each turn: who waited for B's start must not be compared with who came right after work
PACE_SECONDS = 0.25  # from one evaluation's begin to the next one's; the budget is 0.2
CONFIDENCE = 0.95  # of an interval


class Taken(NamedTuple):
    """Seconds of A's diagnosis, of CPU for it, until A's answer, of the whole evaluation, and what B's answer was."""

    a: float
    cpu: float
    ready: float
    whole: float
    status: str


def bench(seconds: float = 30.0) -> dict[str, Any]:
    """Per mood: evaluations, medians of A's diagnosis, of the time until A's answer and of the whole (ms), what B's
    answers were, and A's ratios to A alone (`_ratio`):

    * `a_to_alone`: of the diagnosis; `aim` is `met` or `missed` where its interval lies on one side of AIM;
    * `a_to_alone_at_work`: the same, where B was at work (not unavailable);
    * `cpu_to_alone`: of its thread's CPU time: waiting for a CPU or the interpreter costs none of it;
    * `ready_to_alone`: of the time until the answer.

    Those of A alone say how far the machine lets such a ratio be believed."""
    sys.path.insert(0, str(ENGINES))  # the channels' processes look for their engines there
    with tempfile.TemporaryDirectory(prefix="bench-gateway-") as directory:
        return asyncio.run(_bench(Path(directory), seconds))


async def _bench(directory: Path, seconds: float) -> dict[str, Any]:
    from agent.store import Store

    stores = {mood: Store.open(directory / mood) for mood in MOODS}
    gateways: dict[str, Any] = {mood: await _gateway(stores[mood], mood) for mood in MOODS}
    names = sorted(p.name for p in RECORDINGS.iterdir() if p.is_dir())
    taken: dict[str, list[tuple[list[Taken], list[Taken]]]] = {mood: [] for mood in MOODS}
    try:
        for mood in MOODS:
            await _turn(gateways[mood], names[:1], gateways[ALONE])  # warm
        until, turn = time.monotonic() + seconds, 0
        while time.monotonic() < until or turn < 2:
            some = [names[(turn * AT_A_TIME + n) % len(names)] for n in range(AT_A_TIME)]
            for mood in MOODS:
                if turn % 2:
                    alone = await _turn(gateways[ALONE], some, gateways[ALONE])
                with_b = await _turn(gateways[mood], some, gateways[ALONE])
                if not turn % 2:
                    alone = await _turn(gateways[ALONE], some, gateways[ALONE])
                taken[mood].append((alone, with_b))
            turn += 1
    finally:
        for gateway in gateways.values():
            await gateway.close()
        for store in stores.values():
            await store.close()
    result: dict[str, Any] = {"rounds": turn, "aim": AIM}
    for mood, turns in taken.items():
        every = [one for _, with_b in turns for one in with_b]
        result[mood] = {
            "evaluations": len(every),
            "a_ms": statistics.median(one.a for one in every) * 1e3,
            "ready_ms": statistics.median(one.ready for one in every) * 1e3,
            "whole_ms": statistics.median(one.whole for one in every) * 1e3,
            "a_to_alone": (a := _ratio(turns, lambda one: one.a)),
            "a_to_alone_at_work": _ratio(turns, lambda one: one.a, without=("unavailable", "off")),
            "cpu_to_alone": _ratio(turns, lambda one: one.cpu),
            "ready_to_alone": _ratio(turns, lambda one: one.ready),
            "aim": _aim(a),
            "b": dict(Counter(one.status for one in every)),
        }
    return result


def _ratio(
    turns: list[tuple[list[Taken], list[Taken]]], of: Callable[[Taken], float], without: tuple[str, ...] = ()
) -> dict[str, float] | None:
    """`{"median", "low", "high"}` of the ratios of one evaluation to that of the same recording alone. The interval is
    that of the median by order statistics (the sign test turned round): it assumes nothing of how times are
    distributed. Evaluations whose B is `without` do not count; fewer than six have no interval, and give None."""
    found = sorted(
        of(one) / of(other)
        for alone, with_b in turns
        for one, other in zip(with_b, alone, strict=True)
        if one.status not in without
    )
    count, tail, below = len(found), 0.0, 0
    while below < count and (tail := tail + math.comb(count, below) / 2**count) <= (1 - CONFIDENCE) / 2:
        below += 1
    if below == 0:
        return None
    return {"median": statistics.median(found), "low": found[below - 1], "high": found[count - below]}


def _aim(ratio: dict[str, float] | None) -> str:
    if ratio is None or ratio["low"] <= AIM < ratio["high"]:
        return "undecided"
    return "met" if ratio["high"] <= AIM else "missed"


async def _gateway(store: Any, mood: str) -> Any:
    import msgspec

    from agent.config import Candidate, Config
    from agent.gateway.gateway import Gateway
    from agent.packs import load_packs
    from agent.telemetry import Telemetry

    candidate = None if mood == ALONE else Candidate(engine=f"gateway_engines:{mood}")
    section = msgspec.structs.replace(Config().gateway, recordings=RECORDINGS, candidate=candidate)
    config = msgspec.structs.replace(Config(), gateway=section)

    class Stamped(Gateway):
        """Knows when A's last answer was there."""

        ready = cpu = 0.0

        def _diagnosed(self, situation: Any, diagnosis: Any) -> Any:
            begin = time.thread_time()
            try:
                return super()._diagnosed(situation, diagnosis)
            finally:
                self.ready, self.cpu = time.perf_counter(), time.thread_time() - begin

    made = Stamped(config, store, None, Telemetry("bench"))  # type: ignore[arg-type]
    await made.start(load_packs())
    return made


async def _turn(gateway: Any, names: list[str], alone: Any) -> list[Taken]:
    """One evaluation of each. Before, B is there, and as many without it warm what its start, or a wait, left cold, so
    that every turn begins alike; afterwards B is at rest: it costs the next mood nothing."""
    from agent.gateway.channel import ProcessChannel
    from agent.gateway.gateway import Request

    taken = []
    if isinstance(gateway.b, ProcessChannel):
        await gateway.b.ready(READY_SECONDS)  # an overloaded host leaves nothing to the idle class
    await asyncio.sleep(PAUSE_SECONDS)
    for name in names:
        await alone.evaluate(Request(trace_id="warm", recording=name))
    for name in names:
        begin = time.perf_counter()
        found = await gateway.evaluate(Request(trace_id="bench", recording=name))
        whole = time.perf_counter() - begin
        taken.append(Taken(found.a.seconds, gateway.cpu, gateway.ready - begin, whole, found.b.short.status))
        await asyncio.sleep(max(0.0, PACE_SECONDS - whole))
    if isinstance(gateway.b, ProcessChannel):
        await gateway.b.rest()
    return taken


if __name__ == "__main__":
    print(json.dumps(bench(float(sys.argv[1]) if len(sys.argv) > 1 else 30.0), indent=2))
