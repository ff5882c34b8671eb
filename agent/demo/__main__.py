"""`python -m agent.demo`: builds the world, starts the agent in it, breaks the shop in random order, and reports.

Called by `make demo`. Exit status: 0 when every fault was diagnosed rightly and healed (and the one without a safe
remedy escalated, untouched); 1 when not, or when the world broke; 2 when a program is missing or the command line is
wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import signal
import sys
from pathlib import Path

import psutil
from rich.console import Console

from agent.demo.children import WorldError, adopt_orphans, end_descendants, missing_programs
from agent.demo.drive import demonstrate, record

DEFAULT_FAULTS = ("cpu_hog", "memory_leak", "db_lock", "worker_crash", "worker_stuck", "payments_slow")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    from agent.demo.report import EXPECTED

    parser = argparse.ArgumentParser(prog="python -m agent.demo", description="the demo world", allow_abbrev=False)
    parser.add_argument("--seed", type=int, help="repeats the order of the faults")
    parser.add_argument("--faults", default=",".join(DEFAULT_FAULTS), help=f"out of {', '.join(EXPECTED)}")
    parser.add_argument("--report", type=Path, default=Path("build/demo-report.json"))
    parser.add_argument("--record", type=Path, metavar="DIR", help="no agent: record every fault's series into DIR")
    parser.add_argument("--keep", action="store_true", help="keep the world's directory: logs, data, configuration")
    args = parser.parse_args(argv)
    args.faults = [name.strip() for name in args.faults.split(",") if name.strip()]
    if wrong := [name for name in args.faults if name not in EXPECTED]:
        parser.error(f"no such fault: {', '.join(wrong)}; there are {', '.join(EXPECTED)}")
    if args.seed is None:
        args.seed = random.SystemRandom().randrange(10_000)
    return args


async def run(args: argparse.Namespace, console: Console) -> bool:
    """Whether everything went as it should."""
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a driver in the background starts with it ignored
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    order = list(args.faults)
    random.Random(args.seed).shuffle(order)  # noqa: S311 - an order, no secret
    if args.record is not None:
        await record(console, order, args.seed, args.record)
        return True
    return await demonstrate(console, order, args.seed, args.report, args.keep)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    terminal = sys.stdout.isatty()
    console = Console(highlight=False, soft_wrap=not terminal, width=None if terminal else 150)
    if missing := missing_programs():
        for sentence in missing:
            console.print(sentence, style="red", markup=False)
        return 2
    adopt_orphans()
    try:
        return 0 if asyncio.run(run(args, console)) else 1
    except WorldError as error:
        console.print(f"demo: {error}", style="red", markup=False)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print("demo: interrupted; everything has been taken down", style="yellow")
        return 130
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            end_descendants(psutil.Process().children(recursive=True))


if __name__ == "__main__":
    sys.exit(main())
