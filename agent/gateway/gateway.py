"""Two diagnosis channels on the same frozen evidence: the primary decides, the other one shows what it would have said.

Made by `agent.app`; asked by `agent.http.gateway_api` for each request and by `agent.investigate` after each look at a
live incident. A, the primary, is diagnosed here, as ever, and first: while it is at work nothing is done for B, neither
here nor in B's process, which is stopped meanwhile (`first`). B, in a process of its own or over HTTP, gets what A
leaves of the budget. A's answer never depends on B: it waits for nothing of it, and an absent, late or broken B is
reported as that. Nothing B says is ever acted on; only `promote` changes who is primary, and a person or a regression
takes that back. All state is in the journal (`agent.fold_gateway`).
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec

from agent.config import Config
from agent.fold_gateway import Channel as ChannelName
from agent.fold_gateway import ChannelMoved, GatewayCompared, GatewayJudged, GatewayState
from agent.fold_model import Incident
from agent.gateway.channel import Answer, Channel, Frozen, HttpChannel, ProcessChannel, none
from agent.gateway.score import agree, answered, decision, differences
from agent.gateway.worker import Setting, version_of
from agent.incidents import Changes
from agent.journal.records import Stored
from agent.journal.wal import JournalError
from agent.packs import load_packs
from agent.situation import Situations
from agent.sources.recorded import RecordingError, read_recording
from agent.store import Store
from agent.telemetry import Telemetry
from rules.diagnose import diagnose
from rules.model import Diagnosis, Situation
from rules.packs import PackError, PackSet

logger = logging.getLogger("alertmedic.gateway")
MAX_SHADOWS: Final = 4  # live comparisons at a time; more are left out and counted
MAX_BUDGET_SECONDS: Final = 60.0
NOTIFY_SECONDS: Final = 5.0


class GatewayError(Exception):
    """What was asked for cannot be done; `status` is the HTTP status for it."""

    def __init__(self, status: int, reason: str, path: str = "", hint: str = "") -> None:
        super().__init__(reason)
        self.status, self.path, self.hint = status, path, hint


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of an evaluation. Exactly one of `recording` (a name under gateway.recordings) and `incident`."""

    trace_id: str
    feature_flags: dict[str, bool] = {}  # `candidate: false` leaves B out; all of them are passed on to an endpoint
    timeout_ms: float = 0.0  # the budget of both; 0: the configured one
    recording: str = ""
    incident: str = ""


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """Both answers to one question. `agreed` is None when there is only A's."""

    trace: str
    evidence: str
    a: Answer
    b: Answer
    agreed: bool | None
    differences: tuple[str, ...]
    recorded: bool = False
    problem: str = ""  # why a difference could not be recorded


class Gateway:
    """One per service, usable from `start` on. `packs` are the primary's, and `on_primary` is told when they change."""

    def __init__(
        self,
        config: Config,
        store: Store,
        situations: Situations,
        telemetry: Telemetry,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._config = config.gateway
        self._stable = _setting(config.packs, config.gateway.memory_bytes)
        self.packs = PackSet(())
        self.version = ""  # of the primary channel
        self._store, self._situations, self._telemetry = store, situations, telemetry
        self.on_primary: Callable[[PackSet], None] = lambda _: None
        self._clock = clock
        self.b: Channel | None = None
        self._started = False
        self._evaluating = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._moving = asyncio.Lock()
        self._leave: Callable[[], None] = lambda: None

    async def start(self, packs: PackSet) -> None:
        """`packs` are the stable channel's. Takes up the roles that the journal tells; a candidate that has changed
        since it was promoted is none."""
        self.packs, state = packs, self.state
        self.version = await asyncio.to_thread(version_of, self._stable, packs.version)
        if state.primary == "candidate":
            promoted = await self._candidate_packs_or_none()
            if promoted is None or promoted[1] != state.promoted_version:
                await self._moved("stable", "the candidate is not configured any more, or was changed", "alertmedic")
            else:
                self._take(*promoted)
        self._open_b()
        self._started = True
        self._leave = self._store.subscribe(self._watch)

    async def close(self) -> None:
        self._leave()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.b is not None:
            await self.b.close()

    @property
    def state(self) -> GatewayState:
        return self._store.state.gateway

    def incident(self, id: str) -> Incident | None:
        return self._store.state.incident(id)

    @property
    def channel_problem(self) -> str:
        """Why B cannot be asked now, "" when it can."""
        if self.b is None:
            return "no candidate is configured"
        return self.b.problem if isinstance(self.b, ProcessChannel) else ""

    # -- asking

    @contextmanager
    def first(self) -> Iterator[None]:
        """While the primary is at work, here or at a live incident, B is stopped. For the loop's thread."""
        held = self.b
        if held is not None:
            held.hold()
        try:
            yield
        finally:
            if held is not None:
                held.release()

    async def evaluate(self, request: Request) -> Evaluation:
        """Raises GatewayError for a request that cannot be answered; never because of B."""
        if not 0 < len(request.trace_id) <= 128 or not request.trace_id.isprintable():
            raise GatewayError(400, "1 to 128 printable characters", "$.trace_id")
        if bool(request.recording) == bool(request.incident):
            raise GatewayError(400, "exactly one of recording and incident", "$")
        budget = request.timeout_ms / 1000 or self._config.budget_seconds
        if not 0 < budget <= MAX_BUDGET_SECONDS:
            raise GatewayError(400, f"0 to {MAX_BUDGET_SECONDS * 1000:.0f}", "$.timeout_ms")
        if not self._started:
            raise GatewayError(503, "packs are being read", hint="ask again")
        if self._evaluating >= self._config.concurrency:
            raise GatewayError(503, f"{self._evaluating} evaluations are under way", hint="ask again")
        self._evaluating += 1
        try:
            situation = await self._evidence(request)
            return await self.compare(situation, request.trace_id, request.feature_flags, budget)
        finally:
            self._evaluating -= 1

    async def compare(
        self,
        situation: Situation,
        trace: str,
        flags: dict[str, bool] | None = None,
        budget: float = 0.0,
        *,
        incident: str = "",
        diagnosis: Diagnosis | None = None,
    ) -> Evaluation:
        """Both channels on one situation, within `budget` seconds or as long as A takes. `diagnosis`: A's, where it was
        made already. Differences, and every look at an incident, are recorded."""
        until = time.monotonic() + (budget or self._config.budget_seconds)
        with self.first():
            a = await asyncio.to_thread(self._diagnosed, situation, diagnosis)
        frozen = await asyncio.to_thread(freeze, situation, trace, flags or {})
        b = await self._ask_b(frozen, max(0.0, until - time.monotonic()))
        same = agree(a.short, b.short)
        found = differences(a.diagnosis, b.diagnosis) if a.diagnosis is not None and b.diagnosis is not None else ()
        self._telemetry.gateway_evaluation(b.short.status, differs=bool(found))
        evaluation = Evaluation(
            trace=trace,
            evidence=frozen.digest,
            a=a,
            b=b,
            agreed=same if b.short.status == "ok" else None,
            differences=found,
        )
        if not found and not (incident and b.short.status != "off"):
            return evaluation
        return await self._recorded(evaluation, incident)

    def _diagnosed(self, situation: Situation, diagnosis: Diagnosis | None) -> Answer:
        begin = time.perf_counter()
        made = diagnosis or diagnose(situation, self.packs)
        # The channel's version: what people's feedback has moved since is on top of it, and no other channel.
        short = msgspec.structs.replace(answered(made), version=self.version)
        return Answer(short=short, diagnosis=made, seconds=time.perf_counter() - begin)

    async def _ask_b(self, frozen: Frozen, budget: float) -> Answer:
        if self.b is None:
            return none("off", "no candidate is configured")
        if frozen.flags.get("candidate") is False:
            return none("off", "the request's feature flag `candidate` is off")
        return await self.b.ask(frozen, budget)

    async def _recorded(self, evaluation: Evaluation, incident: str) -> Evaluation:
        record = GatewayCompared(
            at=self._clock(),
            trace=evaluation.trace,
            incident=incident,
            evidence=evaluation.evidence,
            a=evaluation.a.short,
            b=evaluation.b.short,
            differences=evaluation.differences,
        )
        try:
            await self._store.record(record)
        except JournalError as error:  # the answer is not lost for that
            return msgspec.structs.replace(evaluation, problem=str(error)[:500])
        if evaluation.differences and self._config.notify_url:
            self._spawn(self._notify(record))
        return msgspec.structs.replace(evaluation, recorded=True)

    async def _evidence(self, request: Request) -> Situation:
        if request.incident:
            incident = self._store.state.incident(request.incident)
            if incident is None:
                raise GatewayError(404, f"no incident {request.incident[:64]!r}", "$.incident")
            return await self._situations.of(incident, self._store.state)
        root = self._config.recordings
        if root is None:
            raise GatewayError(404, "no directory of recordings is configured", "$.recording", "gateway.recordings")
        try:
            with self.first():
                return await asyncio.to_thread(lambda: read_recording(confined(root, request.recording)))
        except (RecordingError, OSError) as error:
            raise GatewayError(404, f"no readable recording {request.recording[:200]!r}", "$.recording") from error

    # -- live incidents

    def shadow(self, incident: Incident, situation: Situation, diagnosis: Diagnosis) -> None:
        """Compares a look at a live incident, off to the side. Returns at once."""
        if not self._started or self.b is None or not self.selected(incident):
            return
        if len(self._tasks) >= MAX_SHADOWS:
            self._telemetry.gateway_evaluation("left_out", differs=False)
            return
        trace = f"{incident.id}-{incident.reopened}-{incident.rounds}"
        self._spawn(self._shadow(situation, trace, incident.id, diagnosis))

    async def _shadow(self, situation: Situation, trace: str, incident: str, diagnosis: Diagnosis) -> None:
        await self.compare(situation, trace, incident=incident, diagnosis=diagnosis)

    def selected(self, incident: Incident) -> bool:
        """By tenant, team, and a share of the incidents that is the same after every restart."""
        config = self._config
        if not any(fnmatchcase(incident.tenant, pattern) for pattern in config.tenants):
            return False
        teams = {alert.labels.get(config.team_label, "") for alert in incident.alerts.values()}
        if not any(fnmatchcase(team, pattern) for team in teams for pattern in config.teams):
            return False
        return share(incident.id) < config.percent

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("gateway: %s", error, exc_info=error)

    async def _notify(self, record: GatewayCompared) -> None:
        timeout = aiohttp.ClientTimeout(total=NOTIFY_SECONDS)
        headers = {"Content-Type": "application/json"}
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.post(
                    self._config.notify_url, data=msgspec.json.encode(record), headers=headers, allow_redirects=False
                ) as answer,
            ):
                if answer.status >= 300:
                    logger.warning("gateway.notify_url %s: HTTP %d", self._config.notify_url, answer.status)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            logger.warning("gateway.notify_url %s: %s", self._config.notify_url, str(error) or type(error).__name__)

    # -- judging, and who is primary

    async def judge(self, trace: str, cause: str, service: str, who: str) -> None:
        """A person's word on a recorded comparison. Raises GatewayError, JournalError."""
        if trace not in self.state.comparisons:
            raise GatewayError(
                404, f"no recorded comparison {trace[:128]!r}", "$.trace_id", "alertmedic gateway status"
            )
        if self.state.comparisons[trace].judged is not None:
            raise GatewayError(409, f"comparison {trace[:128]!r} is judged already", "$.trace_id")
        await self._store.record(GatewayJudged(at=self._clock(), trace=trace, cause=cause, service=service, who=who))

    async def promote(self, who: str, note: str, *, force: bool = False) -> None:
        """Makes the candidate primary. Refused (GatewayError 409) unless the score shows that it is better; `force`
        leaves only what safety asks."""
        async with self._moving:
            if self.state.primary == "candidate":
                raise GatewayError(409, "the candidate is primary already")
            try:
                found = await self._candidate_packs()
            except (PackError, OSError) as error:
                raise GatewayError(409, f"the candidate's packs cannot be read: {error}"[:500]) from error
            if found is None:
                raise GatewayError(409, "no candidate that may act is configured: an endpoint or engine only advises")
            if not force:
                self._guard_promotion(found[1])
            await self._moved("candidate", note or "promoted by the score", who, found[1])
            self._take(*found)
            await self._reopen_b()

    def _guard_promotion(self, version: str) -> None:
        board, least = self.state.board, self._config.min_judged
        if board.b_version != version:
            raise GatewayError(409, "the score is not about the candidate as it is configured now")
        if board.judged < least:
            raise GatewayError(409, f"{board.judged} comparisons are judged, at least {least} are needed")
        if decision(board) != "b":
            raise GatewayError(409, "the score does not show that the candidate is better", hint="gateway status")

    async def rollback(self, who: str, note: str) -> None:
        """Makes the stable channel primary again. Raises GatewayError 409 when it is."""
        async with self._moving:
            if self.state.primary == "stable":
                raise GatewayError(409, "the stable channel is primary already")
            packs, version = await asyncio.to_thread(_load, self._stable)
            await self._moved("stable", note or "rolled back by hand", who)
            self._take(packs, version)
            await self._reopen_b()

    def _watch(self, stored: Stored, _: Changes) -> None:
        """A promoted candidate that the old one beats is taken back by itself."""
        if not isinstance(stored.record, ChannelMoved) and self.regressed and not self._moving.locked():
            self._spawn(self._regress())

    @property
    def regressed(self) -> bool:
        return self.state.primary == "candidate" and decision(self.state.board) == "b"

    async def _regress(self) -> None:
        if self.regressed:
            board = self.state.board
            await self.rollback("alertmedic", f"regress: right alone {board.a_only} against {board.b_only} times")

    async def _moved(self, after: ChannelName, reason: str, who: str, version: str = "") -> None:
        before = self.state.primary
        logger.warning("gateway: %s -> %s: %s", before, after, reason)
        await self._store.record(
            ChannelMoved(at=self._clock(), before=before, after=after, version=version, reason=reason[:500], who=who)
        )

    def _take(self, packs: PackSet, version: str) -> None:
        self.packs, self.version = packs, version
        self.on_primary(packs)

    async def _candidate_packs(self) -> tuple[PackSet, str] | None:
        candidate = self._config.candidate
        if candidate is None or candidate.url or candidate.engine:
            return None
        return await asyncio.to_thread(_load, _setting(candidate, 0))

    async def _candidate_packs_or_none(self) -> tuple[PackSet, str] | None:
        try:
            return await self._candidate_packs()
        except (PackError, OSError) as error:
            logger.error("gateway.candidate: %s", error)
            return None

    def _open_b(self) -> None:
        """The channel that is not primary."""
        candidate = self._config.candidate
        if candidate is None:
            self.b = None
        elif self.state.primary == "candidate":
            self.b = ProcessChannel(self._stable)
        elif candidate.url:
            self.b = HttpChannel(candidate.url)
        else:
            setting = _setting(candidate, self._config.memory_bytes)
            self.b = ProcessChannel(msgspec.structs.replace(setting, engine=candidate.engine))

    async def _reopen_b(self) -> None:
        if self.b is not None:
            await self.b.close()
        self._open_b()


def _setting(of: Any, memory_bytes: int) -> Setting:
    return Setting(
        dirs=tuple(str(d) for d in of.dirs),
        disable=tuple(of.disable),
        model=str(of.model) if of.model is not None else "",
        memory_bytes=memory_bytes,
    )


def _load(setting: Setting) -> tuple[PackSet, str]:
    """Packs and version of a channel."""
    model = Path(setting.model) if setting.model else None
    packs = load_packs([Path(d) for d in setting.dirs], setting.disable, model)
    return packs, version_of(setting, packs.version)


def freeze(situation: Situation, trace: str, flags: dict[str, bool]) -> Frozen:
    pickled = pickle.dumps(situation, protocol=pickle.HIGHEST_PROTOCOL)
    digest = blake2b(pickled, digest_size=16).hexdigest()
    return Frozen(situation=situation, pickled=pickled, digest=digest, trace=trace, flags=flags)


def share(id: str) -> float:
    """Where an id stands between 0 and 100: the same at every time and place."""
    return int.from_bytes(blake2b(id.encode(), digest_size=4).digest()) / 2**32 * 100


def confined(root: Path, name: str) -> Path:
    """The recording `name` under `root`. Raises RecordingError when it, or a file of it, lies anywhere else."""
    base = root.resolve()
    try:
        path = (base / name).resolve()
        inside = path != base and path.is_relative_to(base) and path.is_dir()
        if inside and all(entry.resolve().is_relative_to(base) for entry in path.iterdir()):
            return path
    except (OSError, ValueError, RuntimeError):  # a NUL, a name that is too long, links in a circle
        pass
    raise RecordingError(f"recording {name[:200]!r}: not below {root}")
