"""What the journal says of the two diagnosis channels: comparisons, the score, and which one is primary.

Written by the fold (`agent.incidents`) only, read by `agent.gateway`, the API and the command line. Pure. A is the
channel that was primary at the time, B the other. A score belongs to one pair of versions: another pair starts anew,
and so does every move. An incident that a verified plan has healed judges its newest comparison: what the plan was for
was the cause.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from agent.gateway.score import Answered, Board, Right, right

MAX_COMPARISONS = 1_000
MAX_CHANNEL_MOVES = 20
Channel = Literal["stable", "candidate"]


class GatewayCompared(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="gateway_compared"):
    """Both channels looked at the same evidence. Recorded for each look at a live incident, and for a request when they
    differ. `evidence` is the digest of what both saw."""

    at: float
    trace: str
    incident: str = ""
    evidence: str
    a: Answered
    b: Answered
    differences: tuple[str, ...] = ()


class GatewayJudged(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="gateway_judged"):
    """A person says what the cause was; "" twice: there was no fault."""

    at: float
    trace: str
    cause: str
    service: str
    who: str


class ChannelMoved(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="channel_moved"):
    """`after` is primary from here on. `version` is the candidate's that was promoted."""

    at: float
    before: Channel
    after: Channel
    version: str = ""
    reason: str
    who: str


class Comparison(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A `GatewayCompared` with the judgement on it."""

    record: GatewayCompared
    judged: Right | None = None


class GatewayState(msgspec.Struct, kw_only=True, omit_defaults=True):
    primary: Channel = "stable"
    promoted_version: str = ""
    board: Board = Board()
    compared: int = 0
    differed: int = 0
    comparisons: dict[str, Comparison] = {}  # by trace, oldest first
    moves: list[ChannelMoved] = []

    def compare(self, record: GatewayCompared) -> None:
        self.compared += 1
        self.differed += bool(record.differences)
        self.comparisons.pop(record.trace, None)
        self.comparisons[record.trace] = Comparison(record=record)
        while len(self.comparisons) > MAX_COMPARISONS:
            del self.comparisons[next(iter(self.comparisons))]

    def judge(self, trace: str, truth: tuple[str, str]) -> None:
        """`truth` is (cause, service). Each comparison counts once; one that is forgotten, or of other versions than
        the newest, counts no more."""
        found = self.comparisons.get(trace)
        if found is None or found.judged is not None:
            return
        record = found.record
        verdict = right(truth, record.a, record.b)
        self.comparisons[trace] = Comparison(record=record, judged=verdict)
        board = self.board
        versions = record.a.version, record.b.version or board.b_version
        if versions != (board.a_version, board.b_version):
            board = Board(a_version=versions[0], b_version=versions[1])
        field = {"both": "both", "a": "a_only", "b": "b_only", "neither": "neither"}[verdict]
        self.board = msgspec.structs.replace(board, **{field: getattr(board, field) + 1})

    def outcome(self, incident: str, truth: tuple[str, str]) -> None:
        """The incident's newest comparison, judged by what healed it."""
        for trace in reversed(self.comparisons):
            if self.comparisons[trace].record.incident == incident:
                self.judge(trace, truth)
                return

    def move(self, record: ChannelMoved) -> None:
        self.primary, self.promoted_version = record.after, record.version
        self.board = Board()
        self.comparisons = {}
        self.moves.append(record)
        del self.moves[:-MAX_CHANNEL_MOVES]

    def copy(self) -> GatewayState:
        return msgspec.structs.replace(self, comparisons=dict(self.comparisons), moves=list(self.moves))
