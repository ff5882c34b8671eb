"""What the faults rest on: certificates that really expire, clocks that really differ, releases that really fail."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import make_mocked_request

from agent.chaos import certificates, releases
from agent.chaos.certificates import Certificates
from agent.chaos.inner_faults import ClockSkew
from agent.chaos.names import Server
from agent.chaos.outer_faults import Certificate
from agent.chaos.world import FAKETIME
from agent.demo.children import free_ports
from agent.demo.faults import InjectionError, Shop
from agent.demo.shop import payments
from agent.demo.shop.cache import Cache
from agent.demo.shop.metrics import Callee, CallError, metrics_text
from agent.demo.shop.resolver import Resolver
from agent.demo.shop.weaknesses import Weaknesses

NAME = "payments.shop.test"
BARE = dict.fromkeys(("front", "orders", "worker", "payments", "database", "supervisor"), "")


@contextlib.asynccontextmanager
async def provider(place: Path) -> AsyncIterator[tuple[Shop, Callee]]:
    """The payment provider over TLS, found by its name at a name server: what the injector and the shop see of it."""
    made: Certificates = await certificates.make(place, NAME)
    http, tls = free_ports(2)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(lambda: Server({NAME: "127.0.0.1"}), local_addr=("127.0.0.1", 0))
    serving = asyncio.ensure_future(payments.serve(http, tls, str(made.valid)))
    resolver = Resolver(f"127.0.0.1:{transport.get_extra_info('sockname')[1]}")
    context = ssl.create_default_context(cafile=made.authority)
    callee = Callee("payments", f"https://{NAME}:{tls}", 5, context, resolver)
    shown = {n: str(getattr(made, n)) for n in ("valid", "renewed", "expired")}
    try:
        while not serving.done():
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", tls)
                writer.close()
                break
            await asyncio.sleep(0.01)
        yield Shop(**BARE | {"cpu": 0, "payments": f"http://127.0.0.1:{http}", "certificates": shown}), callee
    finally:
        await callee.close()
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        transport.close()


async def pay(callee: Callee, signed_at: float | None = None) -> Any:
    return await callee.call("POST", "/authorise", {"amount": 1, "signed_at": signed_at or time.time()})


async def test_an_expired_certificate_is_refused_and_another_valid_one_is_not(
    tmp_path: Path, program: Callable[[str, str], str]
) -> None:
    program("openssl", "openssl")
    async with provider(tmp_path) as (shop, callee):
        assert (await pay(callee))["authorised"]
        renewed = Certificate(shop, seconds=0, name="renewed")
        await renewed.inject()
        assert (await pay(callee))["authorised"]
        expired = Certificate(shop, seconds=0)
        await expired.inject()
        with pytest.raises(CallError, match="expired"):
            await pay(callee)
        assert 'error_type="ClientConnectorCertificateError"' in metrics_text()
        await expired.clear()
        await expired.clear()
        assert (await pay(callee))["authorised"]


async def test_the_provider_refuses_signatures_from_another_time(
    tmp_path: Path, program: Callable[[str, str], str]
) -> None:
    program("openssl", "openssl")
    async with provider(tmp_path) as (_, callee):
        for wrong in (600.0, -600.0):
            with pytest.raises(CallError, match="403"):
                await pay(callee, time.time() + wrong)


async def test_the_clock_of_one_process_is_wrong_and_its_timers_are_not(
    tmp_path: Path, program: Callable[[str, str], str]
) -> None:
    program("faketime", "faketime")
    library = next(str(found) for found in sorted(Path("/usr/lib").glob(FAKETIME)))
    clock = tmp_path / "offset"
    environment = os.environ | {
        "LD_PRELOAD": library,
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }

    def difference() -> tuple[float, float]:
        """Seconds by which the process' clocks are ahead of ours: the time, the timer."""
        said = subprocess.run(
            [sys.executable, "-c", "import time; print(time.time(), time.monotonic())"],
            env=environment,
            capture_output=True,
            check=True,
            text=True,
        ).stdout.split()
        return float(said[0]) - time.time(), float(said[1]) - time.monotonic()

    fault = ClockSkew(Shop(**BARE | {"cpu": 0, "clock": str(clock)}), ahead=600)
    await fault.inject()
    ahead, timer = difference()
    assert 500 < ahead < 700
    assert abs(timer) < 100
    await fault.clear()
    await fault.clear()
    assert abs(difference()[0]) < 100


async def test_without_the_library_a_skew_is_no_success() -> None:
    with pytest.raises(InjectionError, match="apt-get install faketime"):
        await ClockSkew(Shop(**BARE | {"cpu": 0})).inject()


class Pool:
    """As much of a pool as `Weaknesses` measures."""

    def get_size(self) -> int:
        return 4

    def get_idle_size(self) -> int:
        return 3

    def get_max_size(self) -> int:
        return 12


def test_only_the_bad_release_fails_and_only_for_some_products(tmp_path: Path) -> None:
    directory = tmp_path / "releases"
    releases.write(directory)
    assert releases.current(directory) == releases.FIRST
    for version, failing in ((releases.HARMLESS, 0), (releases.BAD, 20), (releases.FIRST, 0)):
        releases.switch(directory, version)
        shop = Weaknesses(Pool(), directory / releases.CURRENT)
        failed = 0
        for product in range(1, 41):
            try:
                assert shop.total(product, 500) == 500
            except KeyError:
                failed += 1
        assert failed == failing
        assert f'build_info{{version="{version}"}} 1.0' in metrics_text()


def test_an_audit_and_receipts_lock_each_other_for_good() -> None:
    shop, entered = Weaknesses(Pool()), threading.Event()

    def receipts() -> None:
        while True:
            shop.enter_receipt()
            entered.set()

    signer = threading.Thread(target=receipts, daemon=True)
    signer.start()
    assert entered.wait(5)
    auditor = threading.Thread(target=shop._audit, daemon=True)
    auditor.start()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        entered.clear()
        if not entered.wait(0.5):
            break
    assert auditor.is_alive()
    assert not entered.wait(0.5)
    assert shop._ledger.locked()
    assert shop._prices.locked()


async def test_while_a_cache_holds_nothing_everybody_computes() -> None:
    computed, go = 0, asyncio.Event()

    async def compute() -> str:
        nonlocal computed
        computed += 1
        mine = computed
        await go.wait()
        return f"value {mine}"

    cache = Cache("tested", compute)
    asking = [asyncio.ensure_future(cache.get()) for _ in range(3)]
    while computed < 3:
        await asyncio.sleep(0)
    go.set()
    assert sorted(await asyncio.gather(*asking)) == ["value 1", "value 2", "value 3"]
    assert (await cache.get(), computed) == ("value 3", 3)
    assert 'cache_gets_total{cache="tested",result="miss"} 3.0' in metrics_text()
    assert 'cache_gets_total{cache="tested",result="hit"} 1.0' in metrics_text()


async def test_what_was_computed_before_an_invalidation_is_not_kept() -> None:
    begun, go = asyncio.Event(), asyncio.Event()

    async def compute() -> int:
        begun.set()
        await go.wait()
        return 1

    cache = Cache("invalidated", compute)
    asking = asyncio.ensure_future(cache.get())
    await begun.wait()
    begun.clear()
    await cache.invalidate(make_mocked_request("DELETE", "/caches/invalidated"))
    go.set()
    assert await asking == 1
    assert not begun.is_set()
    assert await cache.get() == 1
    assert begun.is_set()  # it was computed again
