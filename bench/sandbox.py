"""What a sandboxed run costs, against a bare asyncio spawn and against bubblewrap.

`bench(seconds)` starts /bin/true over and over, in turn by each of: `asyncio.create_subprocess_exec` (`bare`), our
`run` with its default limits (`run`), the same as user nobody (`run_as_user`, root only), `bwrap --ro-bind / /`
(`bwrap`) and the same with `--unshare-all` (`bwrap_unshare_all`). Rounds are interleaved, so that a noisy moment hits
all alike; the ratios to `bare` are what means anything on another machine, of the medians and, since a busy machine
is worse for whoever hands over more often, of the fastest tenths. Ours does more than bubblewrap: limits, working
directory, captured output, usage, and the tree is gone when it returns.

    python -m bench.sandbox [SECONDS] [--vm]

`--vm` runs it inside tools/cgroup-vm, where limits are enforced and system calls are slow.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import sandbox

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = "/bin/true"
LEAST_ROUNDS = 20


async def _bare(*prefix: str) -> None:
    process = await asyncio.create_subprocess_exec(*prefix, PROGRAM)
    if await process.wait() != 0:
        raise RuntimeError(f"bench: {' '.join(prefix)} {PROGRAM} exited with {process.returncode}")


async def _ours(user: str = "") -> None:
    result = await sandbox.run([PROGRAM], sandbox.Limits(timeout_seconds=60), user=user)
    if not result.ok:
        raise RuntimeError(f"bench: sandboxed run failed: {result}")


async def _rounds(seconds: float) -> dict[str, list[float]]:
    contestants: dict[str, Callable[[], Awaitable[None]]] = {"bare": _bare, "run": _ours}
    if os.geteuid() == 0:
        contestants["run_as_user"] = lambda: _ours("nobody")
    if shutil.which("bwrap"):
        contestants["bwrap"] = lambda: _bare("bwrap", "--ro-bind", "/", "/")
        contestants["bwrap_unshare_all"] = lambda: _bare("bwrap", "--ro-bind", "/", "/", "--unshare-all")
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for start in contestants.values():
        await start()  # warm: caches, the sandbox's threads
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(taken["bare"]) < LEAST_ROUNDS:
        for name, start in contestants.items():
            began = time.perf_counter()
            await start()
            taken[name].append(time.perf_counter() - began)
    return taken


def bench(seconds: float) -> dict[str, Any]:
    """Medians in milliseconds, ratios to the bare spawn, and whether the aims are met (3 natively, 5 in
    user-mode-linux, and faster than bubblewrap)."""
    held = sandbox.probe()
    sandbox.use(held)
    taken = asyncio.run(_rounds(seconds))
    medians = {name: statistics.median(times) for name, times in taken.items()}
    fastest = {name: statistics.quantiles(times, n=10)[0] for name, times in taken.items()}
    ratios = {name: round(median / medians["bare"], 2) for name, median in medians.items()}
    aim = 5.0 if os.environ.get("CGROUP_VM") else 3.0
    answer: dict[str, Any] = {
        "machine": "user-mode-linux" if os.environ.get("CGROUP_VM") else "native",
        "enforced_by": held.enforced_by.value,
        "rounds": len(taken["bare"]),
        "median_ms": {name: round(median * 1000, 2) for name, median in medians.items()},
        "ratio_to_bare": ratios,
        "ratio_of_fastest_tenth": {name: round(fast / fastest["bare"], 2) for name, fast in fastest.items()},
        "load": round(os.getloadavg()[0], 1),
        "aim": aim,
        "within_aim": ratios["run"] <= aim,
    }
    if "bwrap" in medians:
        answer["faster_than_bwrap"] = medians["run"] < medians["bwrap"]
    else:
        answer["note"] = "bubblewrap not found: not compared (Debian: apt-get install bubblewrap)"
    return answer


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("seconds", nargs="?", type=float, default=5.0, help="how long to measure")
    parser.add_argument("--vm", action="store_true", help="inside tools/cgroup-vm")
    options = parser.parse_args()
    if options.vm:
        again = [sys.executable, "-m", "bench.sandbox", str(options.seconds)]
        return subprocess.run([str(ROOT / "tools/cgroup-vm"), "--", *again], cwd=ROOT).returncode
    print(json.dumps(bench(options.seconds), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
