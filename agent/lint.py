"""What is wrong with rule packs beyond what the loader refuses: every fault with file, line and key.

Called by `alertmedic packs lint` and `packs test`. The loader refuses what it cannot use; this says as well what could
be used and would never work: a query that no Prometheus parses, an action nobody has, a rule that cannot fire, a cause
that nothing can speak against, two causes that nothing tells apart. It changes nothing and runs no query.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import promql_parser

from agent.packs import line_at, lines_of, read_pack, read_rest, shipped_texts, texts_in
from agent.sources.promql import TemplateError, render
from rules.features import Harm
from rules.packs import (
    STATES,
    Cause,
    Pack,
    PackError,
    PackSet,
    Pattern,
    Rule,
    Scalar,
    Signal,
    State,
    loose_references,
)
from rules.subjects import ENTITIES, bindings_of

KINDS = frozenset(
    {"http", "worker", "service", "postgres", "host", "external", *ENTITIES}
)  # node kinds that a topology may name
FACTS = frozenset(
    {f"host.{name}" for name in ("process", "listener", "cpu", "memory", "disk", "pressure")}
    | {f"change.{name}" for name in ("release", "commit", "deploy", "flag")}
)
BAD = frozenset({"strong", "weak", "bad"})
Path_ = tuple[str | int, ...]


@dataclass(frozen=True, slots=True, order=True)
class LintFault:
    """One fault. `line` counts from 1 (0: of the file as a whole); `key` is the dotted path in the file."""

    file: str
    line: int
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.key}: {self.reason}" if self.line else f"{self.file}: {self.reason}"


@dataclass(frozen=True, slots=True)
class _Read:
    """One file that could be read: where, its text and its pack."""

    where: str
    text: str
    pack: Pack


def lint(
    dirs: Iterable[Path], disable: Collection[str] = (), actions: Collection[str] | None = None
) -> tuple[LintFault, ...]:
    """Every fault of the shipped packs and those of `dirs`, by file and line. `actions`: names and families that the
    catalogue has (None: not checked). Raises OSError for a directory that cannot be read."""
    try:
        texts = [*shipped_texts(), *texts_in(dirs)]
    except PackError as error:
        return tuple(LintFault(error.where, f.line, "", f.reason) for f in error.faults)
    faults: list[LintFault] = []
    read: list[_Read] = []
    names: dict[str, set[str]] = {}
    readable = True
    for where, text in texts:
        try:
            read.append(_Read(where, text, read_pack(text, where)))
        except PackError as error:
            faults += [LintFault(where, f.line, f.key, f.reason) for f in error.faults]
            rest = read_rest(text, where)
            readable &= rest is not None
            if rest is not None:
                read.append(_Read(where, text, rest[0]))
                for table, defined in rest[1].items():
                    names.setdefault(table, set()).update(defined)
    kept = [r for r in read if r.pack.pack not in disable]
    found: list[tuple[str, Path_, str]] = []
    if not faults:
        try:
            packs = PackSet.of(r.pack for r in read)
        except PackError as error:
            found += [(str(f.path[0]), f.path[1:], f.reason) for f in error.faults if f.path]
        else:
            for r in kept:
                found += [(r.pack.pack, path, reason) for path, reason in _of_set(r.pack, packs)]
    elif readable:  # else nobody knows what the file defines that is no YAML
        loose = loose_references((r.pack for r in read), names)
        found += [(str(f.path[0]), f.path[1:], f.reason) for f in loose]
    for r in kept:
        found += [(r.pack.pack, path, reason) for path, reason in _of_pack(r.pack, actions)]
    told = {(f.file, f.key) for f in faults}
    return tuple(sorted({*faults, *(f for f in _located(found, read) if (f.file, f.key) not in told)}))


def _located(found: Iterable[tuple[str, Path_, str]], read: Sequence[_Read]) -> list[LintFault]:
    """With file and line. A pack that was given twice is looked for where the key is."""
    lines = {r.where: lines_of(r.text) for r in read}
    located = []
    for pack, path, reason in found:
        at = [r for r in read if r.pack.pack == pack]
        r = next((r for r in reversed(at) if path in lines[r.where]), at[-1])
        located.append(LintFault(r.where, line_at(lines[r.where], path), ".".join(map(str, path)), reason))
    return located


# -- one pack


def _of_pack(pack: Pack, actions: Collection[str] | None) -> list[tuple[Path_, str]]:
    faults: list[tuple[Path_, str]] = []
    for name, text in pack.queries.items():
        if problem := promql_fault(text):
            faults.append((("queries", name), problem))
    for name, cause in pack.causes.items():
        at: Path_ = ("causes", name)
        if not cause.proposals and not cause.no_remedy:
            faults.append((at, "proposes nothing and does not say why: give `proposals` or `no_remedy`"))
        if cause.proposals and cause.no_remedy:
            faults.append(((*at, "no_remedy"), "says that there is no safe remedy, and proposes one"))
        if not any(given < otherwise for line in cause.evidence for given, otherwise in line.states.values()):
            faults.append(((*at, "evidence"), "nothing speaks against it: no state is less likely under this cause"))
        for i, proposal in enumerate(cause.proposals):
            if actions is not None and proposal.action not in actions:
                where = (*at, "proposals", i, "action")
                faults.append((where, f"unknown action {proposal.action}; `alertmedic actions list` names them"))
    return faults


def promql_fault(text: str) -> str:
    """Why the query is no PromQL once its variables are filled in; "" if it is."""
    try:
        bound = [b for items in re.findall(r"\$alert\(([^()]*)\)", text) for b in bindings_of(items)]
        for some in (bound, [b for b in bound if not b.optional]):  # with and without what an alert may lack
            labels = {source: "a" for b in some for source in b.sources}
            promql_parser.parse(render(text, "service", ["a", "b"], "1m", [labels]))
    except (TemplateError, ValueError) as error:
        return f"no PromQL: {' '.join(str(error).split())[:200]}"
    return ""


# -- one pack among all


def _of_set(pack: Pack, packs: PackSet) -> list[tuple[Path_, str]]:
    faults: list[tuple[Path_, str]] = []
    for name, cause in pack.causes.items():
        if twin := _twin(name, cause, packs):
            faults.append(
                (("causes", name, "evidence"), f"is a copy of the evidence of {twin}: nothing tells them apart")
            )
    for name, rule in pack.rules.items():
        for i, pattern in enumerate(rule.when):
            for key, reason in _unreachable(pattern, packs):
                faults.append((("rules", name, "when", i, "where", key), f"the rule can never fire: {reason}"))
        if reason := _never_a_candidate(rule, packs):
            faults.append((("rules", name, "then"), f"the rule can never matter: {reason}"))
    return faults


def _twin(name: str, cause: Cause, packs: PackSet) -> str:
    """A cause before this one with the same columns and tables."""

    def table(of: Cause) -> dict[str, dict[State, tuple[float, float]]]:
        return {line.column: line.states for line in of.evidence}

    mine = table(cause)
    return next(
        (other for other, theirs in sorted(packs.causes.items()) if other < name and table(theirs) == mine),
        "",
    )


def _unreachable(pattern: Pattern, packs: PackSet) -> list[tuple[str, str]]:
    """(key, why) of conditions that no signal, node or fact can meet."""
    where = pattern.where
    faults = [
        (key, f"no number is {condition}")
        for key, condition in where.items()
        if isinstance(condition, dict) and _empty(condition)
    ]
    if pattern.match == "finding":
        faults += _finding(pattern, packs)
    elif pattern.match == "fact":
        kinds = FACTS | {g.facts.kind for g in packs.groups.values() if g.facts is not None}
        faults += [
            ("kind", f"nothing brings facts of kind {k}") for k in _constants(where.get("kind")) if k not in kinds
        ]
    elif pattern.match == "node":
        kinds = KINDS | {s.implies for s in packs.signals.values() if s.implies}
        wanted = _constants(where.get("kind"))
        if wanted and not kinds & set(map(str, wanted)):
            faults.append(("kind", f"no node is of kind {', '.join(map(str, wanted))}"))
    return faults


def _finding(pattern: Pattern, packs: PackSet) -> list[tuple[str, str]]:
    where = pattern.where
    names, groups, states = (_constants(where.get(key)) for key in ("signal", "group", "state"))
    signals: list[Signal] = [
        signal
        for name, signal in packs.signals.items()
        if (not names or name in names) and (not groups or signal.group in groups)
    ]
    if not signals:
        both = f"no signal {', '.join(map(str, names))} is of group" if names else "no signal is of group"
        return [("group" if groups else "signal", f"{both} {', '.join(map(str, groups))}")]
    faults = [("state", f"there is no state {s}") for s in states if s not in (*STATES, "bad")]
    if states and not faults and not any(_can_be(signal, str(state)) for signal in signals for state in states):
        faults.append(("state", f"these signals are never {', '.join(map(str, states))}"))
    harms = _constants(where.get("harm"))
    faults += [("harm", f"there is no harm {h!r}: it is `later` or empty") for h in harms if h not in get_args(Harm)]
    if "peer" in where and not any(signal.peer for signal in signals):
        faults.append(("peer", "no such signal describes calls (`peer`)"))
    return faults


def _can_be(signal: Signal, state: str) -> bool:
    """Whether a finding of the signal can be in that state."""
    if state == "silent":
        return signal.silent == "silent"
    if state == "contrary":
        return signal.bad in ("up", "down")
    return state not in BAD or signal.bad != "none" or signal.silent in ("weak", "strong")


def _never_a_candidate(rule: Rule, packs: PackSet) -> str:
    """Why what the rule says of its cause never concerns a candidate, "" if it may."""
    then = rule.then
    cause = packs.causes[then.support or then.prune]
    for pattern in rule.when:
        if pattern.match == "node" and pattern.where.get("service") == then.service:
            wanted = _constants(pattern.where.get("kind"))
            if wanted and not set(map(str, wanted)) & set(cause.kinds):
                return f"{then.support or then.prune} is no cause of a {' or '.join(map(str, wanted))}"
    return ""


def _constants(condition: object) -> list[Scalar]:
    """The values that a condition names; none for a variable, a comparison or no condition."""
    if isinstance(condition, list):
        return [value for value in condition if isinstance(value, (str, int, float))]
    if isinstance(condition, (str, int, float)) and not (isinstance(condition, str) and condition.startswith("$")):
        return [condition]
    return []


def _empty(comparison: Mapping[Literal[">=", ">", "<=", "<"], float]) -> bool:
    """Whether no number meets all of the comparisons."""
    low = max((bound for op, bound in comparison.items() if op[0] == ">"), default=float("-inf"))
    high = min((bound for op, bound in comparison.items() if op[0] == "<"), default=float("inf"))
    open_ended = comparison.get(">") == low or comparison.get("<") == high
    return low > high or (low == high and open_ended)
