"""What the other diagnosis channel costs the primary: A's time with B in every mood, against A alone, interleaved.

`bench(seconds)` keeps one gateway per mood over the same recordings (tests/data/golden) and asks them in turn, each
with A alone right before or right after it, so that whatever else the machine does meets both alike. A's time is that
of its diagnosis, from being asked to having it; the whole evaluation takes as long as A or B's budget. A ratio of 1
means that B costs A nothing. B runs when a mood's turn begins, whatever it did before: what its back-off saves A is no
part of these figures.

    python -m bench.gateway [SECONDS]
"""

from __future__ import annotations

import asyncio
import json
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
AT_A_TIME = 4  # evaluations of one mood, before it is the next one's turn


class Taken(NamedTuple):
    """Seconds of A, of the whole evaluation, and what B's answer was."""

    a: float
    whole: float
    status: str


def bench(seconds: float = 30.0) -> dict[str, Any]:
    """Per mood: evaluations, medians of A's and of the whole time (ms), what B's answers were, and A's ratio to A
    alone: the median over its turns of the ratio of medians of one turn, over all evaluations (`a_to_alone`) and over
    those at which B was at work (`a_to_alone_at_work`: not unavailable). That of A alone says how far the machine lets
    such a ratio be believed."""
    sys.path.insert(0, str(ENGINES))  # the channels' processes look for their engines there
    with tempfile.TemporaryDirectory(prefix="bench-gateway-") as directory:
        return asyncio.run(_bench(Path(directory), seconds))


async def _bench(directory: Path, seconds: float) -> dict[str, Any]:
    from agent.gateway.gateway import Gateway
    from agent.store import Store

    stores = {mood: Store.open(directory / mood) for mood in MOODS}
    gateways: dict[str, Gateway] = {mood: await _gateway(stores[mood], mood) for mood in MOODS}
    names = sorted(p.name for p in RECORDINGS.iterdir() if p.is_dir())
    taken: dict[str, list[tuple[list[Taken], list[Taken]]]] = {mood: [] for mood in MOODS}
    try:
        for mood in MOODS:
            await _turn(gateways[mood], names[:1])  # warm
        until, turn = time.monotonic() + seconds, 0
        while time.monotonic() < until or turn < 2:
            some = [names[(turn * AT_A_TIME + n) % len(names)] for n in range(AT_A_TIME)]
            for mood in MOODS:
                if turn % 2:
                    alone = await _turn(gateways[ALONE], some)
                with_b = await _turn(gateways[mood], some)
                if not turn % 2:
                    alone = await _turn(gateways[ALONE], some)
                taken[mood].append((alone, with_b))
            turn += 1
    finally:
        for gateway in gateways.values():
            await gateway.close()
        for store in stores.values():
            await store.close()
    result: dict[str, Any] = {"rounds": turn}
    for mood, turns in taken.items():
        every = [one for _, with_b in turns for one in with_b]
        result[mood] = {
            "evaluations": len(every),
            "a_ms": statistics.median(one.a for one in every) * 1e3,
            "whole_ms": statistics.median(one.whole for one in every) * 1e3,
            "a_to_alone": _ratio(turns, lambda _: True),
            "a_to_alone_at_work": _ratio(turns, lambda one: one.status not in ("unavailable", "off")),
            "b": dict(Counter(one.status for one in every)),
        }
    return result


def _ratio(turns: list[tuple[list[Taken], list[Taken]]], counts: Callable[[Taken], bool]) -> float | None:
    """The median over the turns of A's ratio to A alone, over the evaluations that count; each against the same
    recording, so that those of one turn are alike."""
    found = []
    for alone, with_b in turns:
        pairs = [(one.a, other.a) for one, other in zip(with_b, alone, strict=True) if counts(one)]
        if pairs:
            found.append(statistics.median(a for a, _ in pairs) / statistics.median(b for _, b in pairs))
    return statistics.median(found) if found else None


async def _gateway(store: Any, mood: str) -> Any:
    import msgspec

    from agent.config import Candidate, Config
    from agent.gateway.gateway import Gateway
    from agent.packs import load_packs
    from agent.telemetry import Telemetry

    candidate = None if mood == ALONE else Candidate(engine=f"gateway_engines:{mood}")
    section = msgspec.structs.replace(Config().gateway, recordings=RECORDINGS, candidate=candidate)
    config = msgspec.structs.replace(Config(), gateway=section)
    made = Gateway(config, store, None, Telemetry("bench"))  # type: ignore[arg-type]
    await made.start(load_packs())
    return made


async def _turn(gateway: Any, names: list[str]) -> list[Taken]:
    """One evaluation of each. Before, B is there; afterwards it is at rest: it costs the next mood nothing."""
    from agent.gateway.channel import ProcessChannel
    from agent.gateway.gateway import Request

    taken = []
    if isinstance(gateway.b, ProcessChannel):
        await gateway.b.ready(READY_SECONDS)  # an overloaded host leaves nothing to the idle class
    for name in names:
        begin = time.perf_counter()
        found = await gateway.evaluate(Request(trace_id="bench", recording=name))
        taken.append(Taken(found.a.seconds, time.perf_counter() - begin, found.b.short.status))
    if isinstance(gateway.b, ProcessChannel):
        await gateway.b.rest()
    return taken


if __name__ == "__main__":
    print(json.dumps(bench(float(sys.argv[1]) if len(sys.argv) > 1 else 30.0), indent=2))
