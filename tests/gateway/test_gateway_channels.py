"""Whatever the other channel does, the primary's answer is there, and what happened is said."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from gateway_world import FAULT, RECORDINGS, Open, ask

from agent.config import Candidate
from agent.gateway.channel import BACKOFF_SECONDS, Answer, Frozen, ProcessChannel
from agent.gateway.gateway import Gateway, GatewayError, Request, confined, freeze, share
from agent.sources.recorded import RecordingError, read_recording
from rules.diagnose import diagnose

NAMES = sorted(p.name for p in RECORDINGS.iterdir() if p.is_dir())


def process(gateway: Gateway) -> ProcessChannel:
    assert isinstance(gateway.b, ProcessChannel)
    return gateway.b


async def test_the_same_packs_agree_in_everything(open_gateway: Open) -> None:
    gateway = await open_gateway()
    for name in NAMES:
        found = await ask(gateway, recording=name)
        assert found.a.diagnosis == found.b.diagnosis == diagnose(read_recording(RECORDINGS / name), gateway.packs)
        assert (found.agreed, found.differences, found.recorded) == (True, (), False)
        assert found.a.short.version == found.b.short.version == gateway.packs.version
    assert gateway.state.compared == 0  # agreement is no news


async def test_a_difference_is_answered_recorded_and_told(open_gateway: Open) -> None:
    told: list[Any] = []
    server, url = await _serving(lambda body: told.append(body) or (200, b""))
    try:
        gateway = await open_gateway("other", notify_url=url)
        found = await ask(gateway, "trace-1")
        assert (found.agreed, found.recorded, found.b.short.cause) == (False, True, "x.other")
        assert found.differences[0].startswith("first cause: ")
        record = gateway.state.comparisons["trace-1"].record
        assert (record.a, record.b, record.evidence) == (found.a.short, found.b.short, found.evidence)
        await asyncio.gather(*gateway._tasks)
        assert json.loads(told[0])["trace"] == "trace-1"
    finally:
        await server.cleanup()


@pytest.mark.parametrize(
    ("engine", "status", "reason"),
    [
        ("hang", "late", "no answer within"),
        ("spin", "late", "no answer within"),
        ("crash", "crashed", "exit status 17"),
        ("fail", "crashed", "KeyError: 'a bug'"),
        ("allocate", "crashed", "out of the memory that a diagnosis may take"),
        ("nonsense", "invalid", "no diagnosis"),
        ("impossible", "invalid", "no number from 0 to 1"),
        ("chatter", "ok", ""),
    ],
)
async def test_b_misbehaves(engine: str, status: str, reason: str, open_gateway: Open) -> None:
    budget = 1.0 if status == "late" else 60.0
    gateway = await open_gateway(engine, budget_seconds=budget, memory_bytes=768 * 1024 * 1024)
    alone = diagnose(read_recording(RECORDINGS / FAULT), gateway.packs)
    for turn in range(3):
        found = await ask(gateway, f"t{turn}")
        assert found.a.diagnosis == alone
        if turn == 0:
            assert found.b.short.status == status, found.b.short
            assert reason in found.b.short.reason
        assert found.b.short.status in {status, "busy", "unavailable"}
        assert found.agreed is (True if status == "ok" else None)


async def test_a_dead_one_is_started_again(open_gateway: Open) -> None:
    gateway = await open_gateway("good")
    assert (await ask(gateway)).b.short.status == "ok"
    process(gateway)._process.kill()  # type: ignore[union-attr]
    assert (await ask(gateway)).b.short.status == "crashed"
    assert await process(gateway).ready()
    assert (await ask(gateway)).b.short.status == "ok"


async def test_one_that_dies_again_and_again_is_started_ever_less_often(
    open_gateway: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that answers in between: what counts are the failures of the last minutes."""
    starts = 0
    begin = ProcessChannel._started

    async def counted(self: ProcessChannel) -> None:
        nonlocal starts
        starts += 1
        await begin(self)

    monkeypatch.setattr(ProcessChannel, "_started", counted)
    gateway = await open_gateway("every_other", budget_seconds=60.0)
    said = []
    for _ in range(3):
        await process(gateway).ready()  # whatever its wait
        said += [(await ask(gateway)).b.short.status, (await ask(gateway)).b.short.status]
        await process(gateway).rest()
    assert said == ["ok", "crashed"] * 3
    assert starts == 3
    waits = process(gateway)._not_before - time.monotonic()
    assert BACKOFF_SECONDS[1] < waits <= BACKOFF_SECONDS[2]
    before = starts
    for _ in range(20):
        assert (await ask(gateway)).b.short.status == "unavailable"
    assert starts == before


async def test_one_that_hangs_is_ended_and_its_process_is_gone(open_gateway: Open) -> None:
    gateway = await open_gateway("hang", budget_seconds=1.0)
    hanging = process(gateway)._process
    assert hanging is not None
    assert (await ask(gateway)).b.short.status == "late"
    assert (await ask(gateway)).b.short.status == "busy"
    await hanging.wait()
    assert not Path(f"/proc/{hanging.pid}").exists()
    await asyncio.gather(*process(gateway)._ending)
    assert "hung" in process(gateway).problem


def _state(pid: int) -> str:
    """Of a process: `T` when it is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


async def test_b_is_stopped_while_a_is_at_work(open_gateway: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """At an earlier question as ever; and nothing is made ready for it before A has answered."""
    gateway = await open_gateway("spin", budget_seconds=5.0)
    running = process(gateway)._process
    assert running is not None
    seen: list[str] = []
    diagnosed, frozen = gateway._diagnosed, freeze

    def looking(*of: Any) -> Answer:
        until = time.monotonic() + 10.0
        while _state(running.pid) != "T" and time.monotonic() < until:
            time.sleep(0.001)
        found = diagnosed(*of)
        seen.append(_state(running.pid))
        return found

    def freezing(*of: Any) -> Frozen:
        seen.append("frozen")
        return frozen(*of)

    monkeypatch.setattr(gateway, "_diagnosed", looking)
    monkeypatch.setattr("agent.gateway.gateway.freeze", freezing)
    with gateway.first():  # so that it is at the first question yet when the second is asked
        assert [(await ask(gateway)).b.short.status for _ in range(2)] == ["late", "busy"]
    assert seen == ["T", "frozen"] * 2
    await process(gateway).rest()
    assert not Path(f"/proc/{running.pid}").exists()


HOLDING = """
import asyncio, signal
from agent.gateway.channel import ProcessChannel
from agent.gateway.worker import Setting

async def main():
    channel = ProcessChannel(Setting(memory_bytes=1 << 30))
    assert await channel.ready(60.0)
    channel.hold()
    print(channel._process.pid, flush=True)
    signal.pause()

asyncio.run(main())
"""


async def test_a_stopped_b_does_not_outlive_an_agent_that_was_killed() -> None:
    """kill -9 of the service while A is at work: nobody is left to let B go on, or to end it."""
    service = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HOLDING, cwd=Path(__file__).parents[2], stdout=asyncio.subprocess.PIPE
    )
    assert service.stdout is not None
    pid = int(await service.stdout.readline())
    async with asyncio.timeout(30):
        while _state(pid) != "T":
            await asyncio.sleep(0.01)
        service.kill()
        await service.wait()
        while Path(f"/proc/{pid}").exists() and _state(pid) != "Z":  # nobody may be there to fetch it
            await asyncio.sleep(0.01)


async def test_being_held_is_no_hanging(open_gateway: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.gateway.channel.GRACE_SECONDS", 0.01)
    gateway = await open_gateway("good")
    running = process(gateway)._process
    assert running is not None
    with gateway.first():
        assert (await ask(gateway, timeout_ms=500)).b.short.status == "late"
        await asyncio.wait(process(gateway)._ending, timeout=0.1)
        assert process(gateway)._process is running
        assert process(gateway)._ending
        monkeypatch.setattr("agent.gateway.channel.GRACE_SECONDS", 60.0)
        assert (await ask(gateway)).b.short.status == "busy"
    await process(gateway).rest()


async def test_it_is_not_started_while_a_is_at_work(open_gateway: Open) -> None:
    gateway = await open_gateway("good")
    process(gateway)._process.kill()  # type: ignore[union-attr]
    assert (await ask(gateway)).b.short.status == "crashed"
    with gateway.first():
        assert not await process(gateway).ready(0.05)
        assert process(gateway)._begun is None
    assert await process(gateway).ready()
    assert (await ask(gateway)).b.short.status == "ok"


async def test_what_a_takes_of_the_budget_is_gone(open_gateway: Open) -> None:
    gateway = await open_gateway("good")
    found = await ask(gateway, timeout_ms=0.001)
    assert (found.b.short.status, found.b.short.reason) == ("late", "the primary took the whole budget")
    assert found.a.diagnosis == diagnose(read_recording(RECORDINGS / FAULT), gateway.packs)
    assert (await ask(gateway)).b.short.status == "ok"  # it was not asked: it is not busy


async def test_limits_of_the_process(open_gateway: Open) -> None:
    gateway = await open_gateway("good", memory_bytes=900 * 1024 * 1024)
    running = process(gateway)._process
    assert running is not None
    limits = Path(f"/proc/{running.pid}/limits").read_text()
    assert any(line.startswith("Max address space") and "943718400" in line for line in limits.splitlines())
    assert Path(f"/proc/{running.pid}/oom_score_adj").read_text().strip() == "1000"
    assert os.sched_getscheduler(running.pid) == os.SCHED_IDLE
    # A group of its own would have a share of its own, in which the idle class is the only one.
    assert os.getsid(running.pid) == os.getsid(0)
    assert os.getpgid(running.pid) == running.pid != os.getpgid(0)
    assert (await ask(gateway)).b.short.status == "ok"
    names = Path(f"/proc/{running.pid}/environ").read_bytes().split(b"\0")
    assert {n.partition(b"=")[0] for n in names if n} <= {
        *(b"PATH", b"PYTHONPATH", b"OPENBLAS_NUM_THREADS", b"OMP_NUM_THREADS", b"LC_CTYPE")
    }


async def test_packs_that_cannot_be_read_are_said(open_gateway: Open, tmp_path: Path) -> None:
    (tmp_path / "packs").mkdir()
    (tmp_path / "packs" / "x.yaml").write_text("pack: [")
    gateway = await open_gateway(candidate=Candidate(dirs=(tmp_path / "packs",)))
    found = await ask(gateway)
    assert found.b.short.status == "unavailable"
    assert "x.yaml" in found.b.short.reason


async def test_without_a_candidate_or_with_its_flag_off(open_gateway: Open) -> None:
    gateway = await open_gateway("other")
    found = await ask(gateway, feature_flags={"candidate": False})
    assert (found.b.short.status, found.agreed) == ("off", None)
    gateway = await open_gateway(candidate=None)
    assert (await ask(gateway)).b.short.status == "off"


async def _serving(answer: Any) -> tuple[web.ServerRunner, str]:
    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        got = answer(await request.read())
        if isinstance(got, Exception):
            raise got
        if got is None:
            await asyncio.Event().wait()
        return web.Response(status=got[0], body=got[1])

    runner = web.ServerRunner(web.Server(handle), shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return runner, "http://{}:{}/".format(*runner.addresses[0][:2])


async def test_an_endpoint_elsewhere(open_gateway: Open) -> None:
    seen: list[Any] = []
    replies: list[Any] = []

    def answer(body: bytes) -> Any:
        seen.append(json.loads(body))
        return replies.pop(0)

    server, url = await _serving(answer)
    try:
        gateway = await open_gateway(candidate=Candidate(url=url), budget_seconds=2.0)
        ranked = '{"verdict":"ranked","hypotheses":[%s],"version":"7"}'
        one = '{"cause":"c","service":"s","fault":"f","title":"t","posterior":0.9,"confidence":0.9}'
        replies[:] = [
            (200, f'{{"diagnosis":{ranked % one}}}'.encode()),
            (200, b"<html>"),
            (500, b""),
            (200, f'{{"diagnosis":{ranked % ""}}}'.encode()),
            (302, b""),
        ]
        found = [await ask(gateway, f"t{n}", feature_flags={"x": True}) for n in range(5)]
        assert [f.b.short.status for f in found] == ["ok", "invalid", "crashed", "invalid", "crashed"]
        assert (found[0].b.short.version, found[0].recorded) == ("7", True)
        assert seen[0]["flags"] == {"x": True}
        assert len(seen[0]["evidence"]) == len(read_recording(RECORDINGS / FAULT).evidence)
        replies[:] = [None]
        assert (await ask(gateway, timeout_ms=1000)).b.short.status == "late"
        with pytest.raises(GatewayError, match="only advises"):
            await gateway.promote("w", "", force=True)
    finally:
        await server.cleanup()
    assert (await ask(gateway)).b.short.status == "crashed"  # nobody listens any more


# -- what may be asked


@pytest.mark.parametrize(
    "name",
    ["../golden", "..", ".", "/etc", f"{RECORDINGS}/../payloads", "none", "a\0b", "x" * 5000, f"{FAULT}/alert.json"],
)
async def test_recordings_are_confined(name: str, open_gateway: Open) -> None:
    gateway = await open_gateway(candidate=None)
    with pytest.raises(GatewayError) as refused:
        await ask(gateway, recording=name)
    assert refused.value.status == 404


def test_no_link_leads_out(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "good").mkdir(parents=True)
    outside.mkdir()
    (outside / "alert.json").write_text("{}")
    (root / "link").symlink_to(outside)
    (root / "half").mkdir()
    (root / "half" / "alert.json").symlink_to(outside / "alert.json")
    (root / "loop").symlink_to(root / "loop")
    assert confined(root, "good") == (root / "good").resolve()
    for name in ("link", "half", "loop"):
        with pytest.raises(RecordingError, match="not below"):
            confined(root, name)


@pytest.mark.parametrize(
    ("request_", "path"),
    [
        (Request(trace_id="", recording="r"), "$.trace_id"),
        (Request(trace_id="a\nb", recording="r"), "$.trace_id"),
        (Request(trace_id="t"), "$"),
        (Request(trace_id="t", recording="r", incident="i"), "$"),
        (Request(trace_id="t", recording="r", timeout_ms=-1), "$.timeout_ms"),
        (Request(trace_id="t", recording="r", timeout_ms=1e6), "$.timeout_ms"),
        (Request(trace_id="t", incident="i"), "$.incident"),
    ],
)
async def test_bad_requests(request_: Request, path: str, open_gateway: Open) -> None:
    gateway = await open_gateway(candidate=None)
    with pytest.raises(GatewayError) as refused:
        await gateway.evaluate(request_)
    assert refused.value.path == path


async def test_evaluations_at_a_time_are_bounded(open_gateway: Open) -> None:
    gateway = await open_gateway(candidate=None, concurrency=2)
    asked = await asyncio.gather(*(ask(gateway, f"t{n}") for n in range(5)), return_exceptions=True)
    assert Counter(getattr(a, "status", 200) for a in asked) == {200: 2, 503: 3}


def test_a_share_is_stable_and_even() -> None:
    assert share("inc-abc") == pytest.approx(55.04267818760127, abs=1e-6)  # or a restart would pick others
    inside = sum(share(f"inc-{n}") < 10 for n in range(10_000))
    assert 900 < inside < 1100


async def _many(gateway: Gateway, count: int) -> Counter[str]:
    """Evaluations whose other channel is in every mood: each must bring the primary's answer, the right one. A
    busy other channel is left a moment, as between real requests: it works while no primary does, and without one a
    single hang would last as long as the test."""
    expected = {name: diagnose(read_recording(RECORDINGS / name), gateway.packs) for name in NAMES[:2]}
    seen: Counter[str] = Counter()

    async def some(worker: int) -> None:
        for n in range(worker, count, 3):
            name = NAMES[n % 2]
            found = await ask(gateway, f"t{n}", recording=name, timeout_ms=30.0)
            assert found.a.diagnosis == expected[name]
            seen[found.b.short.status] += 1
            if found.b.short.status == "busy":
                await asyncio.sleep(0.005)

    await asyncio.gather(*(some(worker) for worker in range(3)))
    return seen


async def test_no_answer_is_lost(open_gateway: Open) -> None:
    seen = await _many(await open_gateway("moody"), 60)
    assert seen.total() == 60


@pytest.mark.full
async def test_no_answer_is_lost_in_ten_thousand(open_gateway: Open) -> None:
    seen = await _many(await open_gateway("moody"), 10_000)
    assert seen.total() == 10_000
    assert {"crashed", "unavailable"} <= set(seen)
