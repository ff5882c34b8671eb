"""Evaluations and the score as JSON, the same over HTTP and on the command line. Called by both; decides nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from agent.fold_gateway import GatewayState
from agent.gateway.score import decision, evidence_ratio, interval, mcnemar

if TYPE_CHECKING:
    from agent.gateway.channel import Answer
    from agent.gateway.gateway import Evaluation

SHOWN: Final = 20  # comparisons, newest first


def _answer_json(answer: Answer) -> dict[str, Any]:
    short = answer.short
    return {
        "status": short.status,
        "version": short.version,
        "verdict": short.verdict or None,
        "cause": short.cause or None,
        "service": short.service or None,
        "score": short.posterior if short.status == "ok" else None,
        "reason": short.reason,
        "seconds": answer.seconds,
        "diagnosis": msgspec.to_builtins(answer.diagnosis) if answer.diagnosis is not None else None,
    }


def evaluation_json(of: Evaluation) -> dict[str, Any]:
    """`consensus.agreed` is null when only A answered. What counts is always A's answer."""
    return {
        "trace_id": of.trace,
        "evidence": of.evidence,
        "a": _answer_json(of.a),
        "b": _answer_json(of.b),
        "consensus": {
            "agreed": of.agreed,
            "verdict": of.a.short.verdict,
            "cause": of.a.short.cause or None,
            "service": of.a.short.service or None,
        },
        "differences": list(of.differences),
        "recorded": of.recorded,
        "problem": of.problem,
    }


def state_json(state: GatewayState) -> dict[str, Any]:
    """Who is primary, the score of the versions that are compared now, and the newest comparisons."""
    board = state.board
    difference, low, high = interval(board)
    newest = list(state.comparisons.values())[: -SHOWN - 1 : -1]
    return {
        "primary": state.primary,
        "promoted_version": state.promoted_version,
        "compared": state.compared,
        "differed": state.differed,
        "score": {
            "a_version": board.a_version,
            "b_version": board.b_version,
            "judged": board.judged,
            "both": board.both,
            "a_only": board.a_only,
            "b_only": board.b_only,
            "neither": board.neither,
            "p_value": mcnemar(board.a_only, board.b_only),
            "evidence_ratio": evidence_ratio(board.a_only, board.b_only),
            "difference": difference,
            "interval": [low, high],
            "decision": decision(board),
        },
        "comparisons": [msgspec.to_builtins(c.record) | {"judged": c.judged} for c in newest],
        "moves": msgspec.to_builtins(state.moves),
    }
