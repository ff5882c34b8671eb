"""What the other diagnosis channel costs the primary: A's time with B in every mood, against A alone, interleaved.

`bench(seconds)` keeps one gateway per mood over the same recordings (tests/data/golden) and asks them in turn, so that
whatever else the machine does meets all of them alike. A's time is that of its diagnosis, from being asked to having
it; the whole evaluation takes as long as A or B's budget. A ratio of 1 means that B costs A nothing.

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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ENGINES = ROOT / "tests" / "gateway"
RECORDINGS = ROOT / "tests" / "data" / "golden"
ALONE = "alone"
MOODS = (ALONE, "good", "hang", "spin", "crash", "allocate", "nonsense")
AT_A_TIME = 4  # evaluations of one mood, before it is the next one's turn


def bench(seconds: float = 30.0) -> dict[str, Any]:
    """Per mood: evaluations, medians of A's and of the whole time (ms), what B's answers were, and A's ratio to A
    alone: the median over the rounds of the ratio of medians within one round."""
    sys.path.insert(0, str(ENGINES))  # the channels' processes look for their engines there
    with tempfile.TemporaryDirectory(prefix="bench-gateway-") as directory:
        return asyncio.run(_bench(Path(directory), seconds))


async def _bench(directory: Path, seconds: float) -> dict[str, Any]:
    from agent.gateway.gateway import Gateway
    from agent.store import Store

    stores = {mood: Store.open(directory / mood) for mood in MOODS}
    gateways: dict[str, Gateway] = {mood: await _gateway(stores[mood], mood) for mood in MOODS}
    names = sorted(p.name for p in RECORDINGS.iterdir() if p.is_dir())
    taken: dict[str, list[list[tuple[float, float]]]] = {mood: [] for mood in MOODS}
    said: dict[str, Counter[str]] = {mood: Counter() for mood in MOODS}
    try:
        for mood in MOODS:
            await _turn(gateways[mood], names[:1], said[mood])  # warm
        until, turn = time.monotonic() + seconds, 0
        while time.monotonic() < until or turn < 2:
            some = [names[(turn * AT_A_TIME + n) % len(names)] for n in range(AT_A_TIME)]
            for mood in MOODS if turn % 2 == 0 else MOODS[::-1]:
                taken[mood].append(await _turn(gateways[mood], some, said[mood]))
            turn += 1
    finally:
        for gateway in gateways.values():
            await gateway.close()
        for store in stores.values():
            await store.close()
    alone = [statistics.median(a for a, _ in one) for one in taken[ALONE]]
    result: dict[str, Any] = {"rounds": turn}
    for mood, rounds in taken.items():
        medians = [statistics.median(a for a, _ in one) for one in rounds]
        result[mood] = {
            "evaluations": sum(map(len, rounds)),
            "a_ms": statistics.median(a for one in rounds for a, _ in one) * 1e3,
            "whole_ms": statistics.median(w for one in rounds for _, w in one) * 1e3,
            "a_to_alone": statistics.median(m / a for m, a in zip(medians, alone, strict=True)),
            "b": dict(said[mood]),
        }
    return result


async def _gateway(store: Any, mood: str) -> Any:
    import msgspec

    from agent.config import Candidate, Config
    from agent.gateway.channel import ProcessChannel
    from agent.gateway.gateway import Gateway
    from agent.packs import load_packs
    from agent.telemetry import Telemetry

    candidate = None if mood == ALONE else Candidate(engine=f"gateway_engines:{mood}")
    section = msgspec.structs.replace(Config().gateway, recordings=RECORDINGS, candidate=candidate)
    config = msgspec.structs.replace(Config(), gateway=section)
    made = Gateway(config, store, None, Telemetry("bench"))  # type: ignore[arg-type]
    await made.start(load_packs())
    if isinstance(made.b, ProcessChannel):
        await made.b.ready()
    return made


async def _turn(gateway: Any, names: list[str], said: Counter[str]) -> list[tuple[float, float]]:
    """(A's seconds, the whole evaluation's) of each. Afterwards B is at rest: it costs the next mood nothing."""
    from agent.gateway.channel import ProcessChannel
    from agent.gateway.gateway import Request

    taken = []
    for name in names:
        begin = time.perf_counter()
        found = await gateway.evaluate(Request(trace_id="bench", recording=name))
        taken.append((found.a.seconds, time.perf_counter() - begin))
        said[found.b.short.status] += 1
    if isinstance(gateway.b, ProcessChannel):
        await gateway.b.rest()
    return taken


if __name__ == "__main__":
    print(json.dumps(bench(float(sys.argv[1]) if len(sys.argv) > 1 else 30.0), indent=2))
