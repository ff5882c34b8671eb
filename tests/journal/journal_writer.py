"""A process for the crash tests: records alerts, several at a time, and prints each number once it is acknowledged."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from journal_kit import alert, received

from agent.store import Store


async def main(state_dir: Path, first: int, count: int) -> None:
    store = Store.open(state_dir, segment_bytes=4_000, snapshot_bytes=6_000)

    async def one(n: int) -> None:
        await store.record(received(alert(str(n)), at=float(n), group=f"g{n % 3}"))
        os.write(1, f"{n}\n".encode())

    for start in range(first, first + count, 3):
        await asyncio.gather(*(one(n) for n in range(start, start + 3)))
        if start % 30 == 27:
            await store.snapshot()
    await store.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
