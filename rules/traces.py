"""What spans and logs say: time lost between a caller and its callee, and log lines that no longer follow each other.

Called by `rules.derived`; pure. Events are compared like samples (median before, held level after, floors), but their
normal window is only the first half of what was recorded before the onset: an alert fires some time after the fault
began, and single events, unlike rates, show it at once.

**Gap**: duration of a calling span minus that of the span it called in another service. Whatever the callee does is in
both; what is left is network, queueing and connection time.

**New lines**: where lines belong to no span, all that can be said is that a service writes lines of templates that it
never wrote: how many after the onset, beyond what was to be expected, since every service writes something new now and
then. Lines of severity error count in full, others never as strong; what a callee at any depth shows as clearly is its.

**Broken log flow**: within one execution of an operation (all spans of one service below the one that another service
called) line B nearly always followed line A, and no longer does; or a line of severity error appears that this
operation never wrote. Callers of a broken service stop early too, so a break counts only in the deepest broken service.
Measured on two public systems by Nezha (Yu et al., FSE 2023), whose pattern of operations and lines this follows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rules.features import STRONG, WEAK, Finding, compared
from rules.model import BoolArray, FloatArray, IntArray, Logs, SeriesId, Situation, Spans
from rules.packs import Signal, State

NORMAL_PART = 0.5  # of the time before the onset: the first half is normal, the second may hold the fault already
FOLLOWS = 0.9  # a line that follows in nine of ten executions is expected
MIN_EXECUTIONS = 4  # in either window; fewer say nothing
MIN_KNOWN = 20  # lines of a service before the onset, for its templates to be known
NO_ERROR_MOST = 5.0  # scales that new lines without an error among them count at most: weak
MAX_DEPTH = 64  # of spans within one service
MAX_LINES = 400  # templates of one operation that are compared; the most frequent ones
_IDS = re.compile(r"\b(?:trace|span)_?id\W{0,3}\S+\s*", re.IGNORECASE)
_HEAD = re.compile(r"^[\dTZ:.,/+ \-]{8,}")  # a time at the head
_SEVERITY = re.compile(r"^\W*(?:TRACE|DEBUG|INFO|NOTICE|WARN(?:ING)?|ERROR|FATAL|CRITICAL)\b[\W_]*", re.IGNORECASE)
_VALUE = re.compile(r"[:=：]")
_NUMBER = re.compile(r"(?<![#\w])(?:0x)?[0-9a-f]*\d[\w.\-]*", re.IGNORECASE)
_LOOKED_AT = 400  # characters of a message: identities and time at its head, and the template
_TEMPLATE_CHARS = 100


def template_of(message: str) -> str:
    """The constant part of a log message: without time, severity and identities, up to the first value (`:`, `=`), and
    numbers masked but for line numbers (`File#12`)."""
    text = _SEVERITY.sub("", _HEAD.sub("", message[:_LOOKED_AT]))
    text = _IDS.sub("", text)
    head = _VALUE.split(text, maxsplit=1)[0]
    if len(head.split()) < 2:
        head = text
    return _NUMBER.sub("*", head)[:_TEMPLATE_CHARS].strip()


def trace_findings(situation: Situation, signals: Mapping[str, Signal]) -> list[Finding]:
    """Findings of the signals that are derived from spans and logs: without spans, of new lines alone."""
    spans, logs = situation.spans, situation.logs
    if spans is None or not spans.start.size or logs is None or not (logs.span >= 0).any():
        new = _new_lines(logs, signals, situation) if logs is not None and logs.time.size else []
        if spans is None or not spans.start.size:
            return new
    else:
        new = []
    found: list[Finding] = new
    worst: dict[str, _Break] | None = None
    slow: set[str] = set()
    kinds = {name: s.derive.kind for name, s in signals.items() if s.derive is not None}
    for name in sorted(kinds, key=lambda n: (kinds[n] != "call_gap", n)):  # slow calls explain broken flow
        signal, kind = signals[name], kinds[name]
        if kind == "call_gap":
            gaps = _gaps(name, signal, spans, situation)
            slow |= {f.service for f in gaps if f.state == "strong"}
            found += gaps
        elif kind in ("log_break", "log_missing", "log_error") and logs is not None:
            worst = _worst_breaks(spans, logs, situation) if worst is None else worst
            found += _breaks(name, signal, worst, slow, _reachable(spans, situation))
    return found


def _new_lines(logs: Logs, signals: Mapping[str, Signal], situation: Situation) -> list[Finding]:
    """One finding a service that wrote enough before the onset to know its templates."""
    kinds = [name for name, s in signals.items() if s.derive is not None and s.derive.kind == "log_new"]
    if not kinds:
        return []
    normal, abnormal = _windows(logs.time, float(logs.time.min()), situation)
    abnormal &= logs.time <= situation.until
    seen = {
        logs.services[code]: _novelty(logs, logs.service == code, normal, abnormal)
        for code in np.unique(logs.service).tolist()
        if (normal & (logs.service == code)).sum() >= MIN_KNOWN
    }
    below = _below({(a, b) for a, b in situation.topology.edges if a != b})
    found = []
    for name in sorted(kinds):
        signal = signals[name]
        z = {service: new.beyond / signal.floor for service, new in seen.items()}
        for service, new in sorted(seen.items()):
            of = z[service] if new.error else min(z[service], NO_ERROR_MOST)
            bar = STRONG if of >= STRONG else WEAK
            if any(z.get(callee, 0.0) >= bar for callee in below.get(service, set()) - {service}):
                of = 0.0
            series = SeriesId.of(name, {"service": service, "line": new.line})
            found.append(_finding(series, signal, 0.0, signal.floor, new.lines, of))
    return found


@dataclass(frozen=True, slots=True)
class _New:
    """New lines after the onset, how many of them beyond what was to be expected, whether any is an error, and the most
    frequent template among them, errors first."""

    lines: float
    beyond: float
    error: bool
    line: str


def _novelty(logs: Logs, mine: BoolArray, normal: BoolArray, abnormal: BoolArray) -> _New:
    """Lines of templates that the normal window lacks, in deviations of the count to be expected: of the second half of
    the normal window so many lines were new to the first, which is more than are new to the whole of it."""
    times, template = logs.time[mine], logs.template[mine]
    before, after = normal[mine], abnormal[mine]
    begin, end = float(times[before].min()), float(times[before].max())
    early = before & (times < (begin + end) / 2.0)
    usual = float((~np.isin(template[before & ~early], np.unique(template[early]))).sum())
    length = float(np.ptp(times[after])) if after.any() else 0.0
    expected = usual * length / max((end - begin) / 2.0, 1e-9)
    fresh = after & ~np.isin(template, np.unique(template[before]))
    errors = fresh & logs.error[mine]
    told = errors if errors.any() else fresh
    names, counts = np.unique(template[told], return_counts=True)
    line = min(((-int(c), logs.templates[int(t)]) for t, c in zip(names, counts, strict=True)), default=(0, ""))[1]
    lines = float((errors if errors.any() else fresh).sum())
    beyond = max(lines - expected, 0.0) / (1.0 + expected**0.5)
    return _New(lines, beyond, bool(errors.any()), line)


def _below(edges: set[tuple[str, str]]) -> dict[str, set[str]]:
    """Every service's direct and indirect callees."""
    direct: dict[str, set[str]] = {}
    for caller, callee in edges:
        direct.setdefault(caller, set()).add(callee)
    below: dict[str, set[str]] = {}
    for service, callees in direct.items():
        reached, frontier = set(callees), list(callees)
        while frontier:
            fresh = direct.get(frontier.pop(), set()) - reached
            reached |= fresh
            frontier += fresh
        below[service] = reached
    return below


def _windows(times: FloatArray, begin: float, situation: Situation) -> tuple[BoolArray, BoolArray]:
    normal = times < begin + NORMAL_PART * (situation.onset - begin)
    for start, end in situation.quiet:
        normal &= ~((times >= start) & (times <= end))
    return normal, times >= situation.onset


def _gaps(name: str, signal: Signal, spans: Spans, situation: Situation) -> list[Finding]:
    called = np.flatnonzero(spans.parent >= 0)
    called = called[spans.service[called] != spans.service[spans.parent[called]]]
    if not called.size:
        return []
    caller = spans.service[spans.parent[called]]
    gap = spans.duration[spans.parent[called]] - spans.duration[called]
    normal, abnormal = _windows(spans.start[called], float(spans.start.min()), situation)
    keys, group = np.unique(spans.service[called] * len(spans.services) + caller, return_inverse=True)
    before, after = _padded(gap, group, normal, len(keys)), _padded(gap, group, abnormal, len(keys))
    features = compared(before, after, signal)
    found = []
    for i, key in enumerate(keys.tolist()):
        callee, by = (spans.services[j] for j in divmod(key, len(spans.services)))
        series = SeriesId.of(name, {"service": callee, "caller": by})
        found.append(_finding(series, signal, *(float(column[i]) for column in features)))
    return found


def _padded(values: FloatArray, group: IntArray, use: BoolArray, groups: int) -> FloatArray:
    """Values by group as rows of equal length, NaN at the end; sorted, so that their order in time changes nothing."""
    values, group = values[use], group[use]
    order = np.lexsort((values, group))
    values, group = values[order], group[order]
    counts = np.bincount(group, minlength=groups)
    table = np.full((groups, int(counts.max(initial=0))), np.nan)
    table[group, np.arange(values.size) - np.repeat(np.cumsum(counts) - counts, counts)] = values
    return table


@dataclass(frozen=True, slots=True)
class _Break:
    """The worst of one service: the part of executions in which an expected line is missing, and in which an error line
    stands that was never there before; each with its operation and line."""

    missing: float = 0.0
    missing_at: tuple[str, str] = ("", "")
    error: float = 0.0
    error_at: tuple[str, str] = ("", "")

    @property
    def part(self) -> float:
        return max(self.missing, self.error)

    def worse(self, other: _Break) -> _Break:
        missing = max((self.missing, self.missing_at), (other.missing, other.missing_at))
        error = max((self.error, self.error_at), (other.error, other.error_at))
        return _Break(*missing, *error)


def _breaks(
    name: str, signal: Signal, worst: Mapping[str, _Break], slow: set[str], reachable: Mapping[str, set[str]]
) -> list[Finding]:
    """One finding a service whose executions can be compared. Of log_break, what a callee explains is absent: that it
    is broken as clearly itself, or that calls into it are slow (`slow`), so that its callers time out."""
    kind = signal.derive.kind if signal.derive is not None else ""
    broken = {s for s, b in worst.items() if b.part / signal.floor >= WEAK}
    clear = {s for s, b in worst.items() if b.part / signal.floor >= STRONG}
    below = reachable if kind == "log_break" else {}
    found = []
    for service, seen in worst.items():
        by_error = kind == "log_error" or (kind == "log_break" and seen.error > seen.missing)
        part, (operation, line) = (seen.error, seen.error_at) if by_error else (seen.missing, seen.missing_at)
        if below.get(service, set()) & ((clear if service in clear else broken) | slow) - {service}:
            part = 0.0
        series = SeriesId.of(name, {"service": service, "operation": operation, "line": line})
        found.append(_finding(series, signal, 0.0, signal.floor, part, part / signal.floor))
    return found


def _worst_breaks(spans: Spans, logs: Logs, situation: Situation) -> dict[str, _Break]:
    entry = _executions(spans)
    codes = {name: i for i, name in enumerate(spans.services)}
    names = np.array([codes.get(name, -1) for name in logs.services], dtype=np.intp)
    lines = np.flatnonzero(logs.span >= 0)
    lines = lines[names[logs.service[lines]] == spans.service[logs.span[lines]]]
    of_execution = entry[logs.span[lines]]
    rows = np.flatnonzero(entry == np.arange(entry.size))
    normal, abnormal = _windows(spans.start, float(spans.start.min()), situation)
    key = spans.service * len(spans.operations) + spans.operation
    worst: dict[str, _Break] = {}
    for code in np.unique(key[rows]).tolist():
        members = rows[key[rows] == code]
        if min(normal[members].sum(), abnormal[members].sum()) < MIN_EXECUTIONS:
            continue
        service, operation = (
            spans.services[code // len(spans.operations)],
            spans.operations[code % len(spans.operations)],
        )
        mine = lines[np.isin(of_execution, members)]
        templates, count = np.unique(logs.template[mine], return_counts=True)
        templates = np.sort(templates[np.argsort(-count, kind="stable")[:MAX_LINES]])
        mine = mine[np.isin(logs.template[mine], templates)]
        seen = np.zeros((members.size, templates.size))
        at = np.searchsorted(members, entry[logs.span[mine]])
        seen[at, np.searchsorted(templates, logs.template[mine])] = 1.0
        errors = np.zeros(templates.size, dtype=bool)
        errors[np.searchsorted(templates, logs.template[mine[logs.error[mine]]])] = True
        drop, rise = _break(seen[normal[members]], seen[abnormal[members]], errors)
        texts = [logs.templates[int(t)] for t in templates]
        missing = max(zip(drop.tolist(), texts, strict=True), default=(0.0, ""))
        error = max(zip(rise.tolist(), texts, strict=True), default=(0.0, ""))
        here = _Break(missing[0], (operation, missing[1]), error[0], (operation, error[1]))
        worst[service] = worst.get(service, _Break()).worse(here)
    return worst


def _break(before: FloatArray, after: FloatArray, errors: BoolArray) -> tuple[FloatArray, FloatArray]:
    """For each line B the largest drop of P(B | A) over the lines A that it used to follow, and, for lines of severity
    error that were never there before, the rise of P(B | operation). Half an execution is taken from either, so that
    few executions say little."""
    # The operation itself stands as the first "line": it is there in every execution.
    one, two = (np.hstack([np.ones((m.shape[0], 1)), m]) for m in (before, after))
    pairs_before, pairs_after = one.T @ one, two.T @ two
    given_before, given_after = np.diag(pairs_before)[:, None], np.diag(pairs_after)[:, None]
    with np.errstate(all="ignore"):
        expected = (pairs_before / given_before >= FOLLOWS) & (given_before >= MIN_EXECUTIONS)
        drop = (pairs_before - 0.5) / given_before - (pairs_after + 0.5) / given_after
    drop = np.where(expected & (given_after >= MIN_EXECUTIONS), drop, 0.0)[:, 1:]
    drop[:, errors] = 0.0  # an error that is no longer written is no fault
    rise = np.where(errors & (before.sum(axis=0) == 0), (after.sum(axis=0) - 0.5) / after.shape[0], 0.0)
    return np.maximum(drop.max(axis=0), 0.0), np.maximum(rise, 0.0)


def _executions(spans: Spans) -> IntArray:
    """For every span the row of the topmost span above it in the same service, by pointer doubling."""
    rows = np.arange(spans.parent.size)
    inside = (spans.parent >= 0) & (spans.service[spans.parent] == spans.service)
    entry = np.where(inside, spans.parent, rows)
    for _ in range(MAX_DEPTH.bit_length()):
        entry = entry[entry]
    return np.asarray(entry, dtype=np.intp)


def _reachable(spans: Spans, situation: Situation) -> dict[str, set[str]]:
    """Every service's direct and indirect callees, by the topology and by the spans themselves."""
    child = np.flatnonzero(spans.parent >= 0)
    called = np.unique(np.stack([spans.service[spans.parent[child]], spans.service[child]]), axis=1).T.tolist()
    return _below({*situation.topology.edges, *((spans.services[a], spans.services[b]) for a, b in called)})


def _finding(series: SeriesId, signal: Signal, baseline: float, scale: float, level: float, z: float) -> Finding:
    state: State | None = "strong" if z >= STRONG else "weak" if z >= WEAK else "absent"
    if not (np.isfinite(baseline) and np.isfinite(level)):
        state = None
    return Finding(
        series=series,
        signal=series.metric,
        group=signal.group,
        service=series.service,
        peer="",
        state=state,
        direction="up" if state in ("strong", "weak") else "flat",
        baseline=baseline,
        scale=scale,
        level=level,
        z=z if np.isfinite(z) else 0.0,
        onset=float("nan"),
    )
