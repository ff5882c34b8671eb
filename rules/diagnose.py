"""From a frozen situation to a ranked, explained diagnosis: the one function `agent.investigate` calls.

Features, rules and Bayes in sequence; pure and deterministic: the same situation gives the same bytes, whatever the
order of its series, facts and edges, and the same ranking whatever the services are called.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from rules.anyalert import PARTS_OF_ALERT, with_parts
from rules.bayes import MAX_RULE_NATS, MISSING, STATE_INDEX, SYMPTOM_ABSENT, Model, combined_confidence, posteriors
from rules.causality import Clock, Lead, direction
from rules.derived import derived_findings
from rules.engine import Matcher, graph_of, records_of
from rules.evidence import NOTHING, Observation, Observer, clean, describe, describe_change, describe_fact
from rules.explaining import Explained, explained
from rules.features import WEAK, findings_of
from rules.model import Contribution, Diagnosis, FloatArray, Hypothesis, ParamValue, Proposal, Situation
from rules.owners import parts
from rules.packs import REACHED, At, Cause, Likelihood, PackSet, ProposalTemplate, Reference

CLEAR_POSTERIOR = 0.5  # more likely than everything else together
CLEAR_MARGIN = 0.15
NAMED_AT_ALL = 0.5  # posterior of all candidates together: more likely than the background
TOP = 3
CHANGED_BEFORE, CHANGED_AFTER = 6 * 3600.0, -60.0  # seconds of the onset: changes worth telling of
MAX_CHANGES_TOLD = 10
BATCH = 4096  # candidates weighed at a time
_AUTONOMY = ("observe", "suggest", "approve", "auto")
_FACT_WORDS = {
    "pid": "pid",
    "process": "name",
    "user": "user",
    "cpu_percent": "group_cpu_percent",
    "mountpoint": "mount",
    "flag": "flag",
}
# Contributions that are no look at the candidate itself.
_NO_EVIDENCE = frozenset({"rules", "prior", "effects", "order", "direction"})
_WORD = re.compile(r"\{([a-z_]+)\}")


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A (service, cause) that is weighed. `log_odds` is against the background: the sum of all contributions."""

    cause: str
    service: str
    path: tuple[str, ...]
    rules: tuple[str, ...]
    log_odds: float
    posterior: float
    parts: FloatArray  # log ratios by column of the model
    explains: Explained | None = None  # what it accounts for of generic causes; in `log_odds`
    lead: Lead | None = None  # whether it moved before the alerting service, or after it; in `log_odds`


def diagnose(situation: Situation, packs: PackSet, limit: int = TOP) -> Diagnosis:
    """The `limit` best explained root causes, or `insufficient_evidence` when "something we have no name for" is as
    likely as all of them. Only a hypothesis that stands clear proposes anything. Never raises on data: NaN, empty,
    constant or duplicate series and missing evidence are all situations."""
    return conclude(observe(situation, packs), limit)


def conclude(observer: Observer, limit: int = TOP) -> Diagnosis:
    """The diagnosis of a situation that was observed already."""
    situation, packs = observer.situation, observer.packs
    ranked = weigh(observer)
    # The most likely other one need not be the second: services come by what all of their causes have together.
    rival = max((c.posterior for c in ranked[1:]), default=0.0)
    clear = bool(ranked) and ranked[0].posterior >= CLEAR_POSTERIOR and ranked[0].posterior - rival >= CLEAR_MARGIN
    ranked_at_all = math.fsum(c.posterior for c in ranked) > NAMED_AT_ALL
    hypotheses = tuple(_hypothesis(c, observer, propose=clear) for c in ranked[:limit])
    missing = {name: clean(reason, 300) for name, reason in sorted(situation.missing().items())}
    return Diagnosis(
        verdict="ranked" if ranked_at_all else "insufficient_evidence",
        hypotheses=hypotheses,
        candidates=len(ranked),
        missing=missing,
        sentence=_sentence(clear, ranked_at_all, hypotheses, missing),
        version=packs.version,
        clear=clear,
        owner=observer.owners.of(situation.entry),
        changes=_changes_told(observer),
    )


def _changes_told(observer: Observer) -> tuple[str, ...]:
    """What was changed at any node that the diagnosis looked at, newest first: worth knowing whatever it weighs."""
    looked_at = {*observer.graph.paths, observer.graph.entry}
    found: list[tuple[float, str]] = []
    for fact, attributes in observer.facts():
        age = attributes.get("age_at_onset_seconds")
        known = fact.kind.startswith("change.") and fact.service in looked_at
        if known and isinstance(age, float) and CHANGED_AFTER <= age <= CHANGED_BEFORE:
            found.append((age, describe_change(fact, attributes)))
    return tuple(dict.fromkeys(text for _, text in sorted(found)))[:MAX_CHANGES_TOLD]


def observe(situation: Situation, packs: PackSet) -> Observer:
    """Findings and call graph of a situation, ready to be asked about any node."""
    situation = with_parts(situation)
    findings = (*findings_of(situation, packs), *derived_findings(situation, packs))
    return Observer(situation, packs, findings, graph_of(situation, packs, findings))


def moved(situation: Situation, packs: PackSet) -> frozenset[str]:
    """The evidence of which the same time of earlier days is worth knowing: what moved, what that was computed from,
    and what may have failed to rise: requests, rates that should not fall, and what the alert itself is about. For
    whoever gathers `Situation.history`."""
    findings = observe(situation, packs).findings
    names = {f.signal for f in findings if f.state not in (None, "absent") or abs(f.z) >= WEAK}
    names |= {name for name, s in packs.signals.items() if s.kind == "rate" and s.bad in ("down", "both")}
    names |= {name for s in packs.signals.values() if s.derive is not None for name in s.derive.traffic}
    names |= {name for pack in packs.packs if pack.fallback for name in pack.signals}
    open_ends = [name for name in names if name in packs.signals]
    while open_ends:
        derive = packs.signals[open_ends.pop()].derive
        if derive is not None:
            fresh = {*derive.of, *derive.traffic, *([derive.minus] if derive.minus else [])} - names
            names |= fresh
            open_ends += [name for name in fresh if name in packs.signals]
    return frozenset(names | PARTS_OF_ALERT)


def weigh(observer: Observer) -> tuple[Candidate, ...]:
    """Every candidate that something speaks for, best first.

    A candidate is a cause that fits the kind of a node on a path from the entry service, was not pruned by a rule, and
    has its defining evidence or a rule for it; all others stay with the background. Services come by what all of their
    causes have together: one that is surely the place, though the fault may be either of two, comes first. Of equals
    the deeper comes first (symptoms travel towards the caller), then what rests on the larger changes; names decide
    last.
    """
    packs = observer.packs
    fired = _fire(observer, compiled(packs)[1])
    known = frozenset(packs.causes) - (packs.alert_causes - observer.named) | _reached(observer)
    specific = _weighed(observer, known - packs.fallback_causes, *fired)
    if not packs.fallback_causes or math.fsum(c.posterior for c in specific) > NAMED_AT_ALL:
        return specific
    return _weighed(observer, known, *fired)


def _reached(observer: Observer) -> frozenset[str]:
    """The causes that no alert here names, of what services on a path have: those whose evidence was looked at."""
    packs = observer.packs
    seen = {f.group for f in observer.findings if f.bad}
    return frozenset(c for c in packs.reachable_causes - observer.named if seen.intersection(packs.causes[c].needs))


def _prior(observer: Observer, model: Model, row: int) -> float:
    """Log-odds before any evidence; of a cause that is reached along a path, less than where an alert names it."""
    cause = model.causes[row]
    reached = cause in observer.packs.alert_causes and cause not in observer.named
    return float(model.prior[row]) + (math.log(REACHED) if reached else 0.0)


def _weighed(
    observer: Observer,
    known: frozenset[str],
    supports: dict[tuple[str, str], tuple[str, ...]],
    pruned: set[tuple[str, str]],
) -> tuple[Candidate, ...]:
    """`weigh` among the causes `known`."""
    packs, graph = observer.packs, observer.graph
    model, _ = compiled(packs)
    kinds = {graph.kind(service) for service in graph.paths}
    rows = [(row, cause) for row, cause in enumerate(model.causes) if cause in known]
    fitting = {kind: [(row, cause) for row, cause in rows if packs.causes[cause].fits(kind)] for kind in kinds}
    pairs = [
        (service, row)
        for service in graph.paths
        for row, cause in fitting[graph.kind(service)]
        if (service, cause) not in pruned
    ]
    if not pairs:
        return ()
    boosts = np.array([_boost(packs, supports.get((s, model.causes[r]), ())) for s, r in pairs])
    symptom = SYMPTOM_ABSENT if observer.symptom().state == "absent" else 0.0
    evidence, speaking, parts = _parts(observer, model, pairs, boosts)
    named = [(service, model.causes[row]) for service, row in pairs]
    explains = explained(observer, named, evidence.tolist(), speaking.tolist())
    gains = np.array([explains[i].nats if i in explains else 0.0 for i in range(len(pairs))])
    priors = np.array([_prior(observer, model, row) for _, row in pairs])
    log_odds = priors + symptom + boosts + evidence + gains
    chosen = np.flatnonzero(speaking)
    leads = _leads(observer, model, pairs, parts, chosen.tolist())
    for i, lead in leads.items():
        log_odds[i] += lead.nats
    weights = posteriors(log_odds[chosen])
    candidates: list[Candidate] = []
    for i, posterior in zip(chosen.tolist(), weights.tolist(), strict=True):
        service, row = pairs[i]
        fired = supports.get((service, model.causes[row]), ())
        candidates.append(
            Candidate(
                cause=model.causes[row],
                service=service,
                path=graph.paths[service],
                rules=fired,
                log_odds=float(log_odds[i]),
                posterior=posterior,
                parts=parts[i],
                explains=explains.get(i),
                lead=leads.get(i),
            )
        )
    mass: dict[str, float] = {}
    for candidate in sorted(candidates, key=lambda c: (c.posterior, c.cause)):  # in order of size: names change no bit
        mass[candidate.service] = mass.get(candidate.service, 0.0) + candidate.posterior
    deviations: dict[str, list[float]] = {}
    for finding in observer.findings:
        if finding.bad:
            deviations.setdefault(finding.service, []).append(finding.z)
    changes = {s: math.fsum(deviations.get(s, ())) for s in graph.paths}
    return tuple(
        sorted(
            candidates,
            key=lambda c: (
                -round(mass[c.service], 9),
                -round(c.log_odds, 9),
                -len(c.path),
                c.cause,
                -changes[c.service],
                c.service,
            ),
        )
    )


@lru_cache(maxsize=4)
def compiled(packs: PackSet) -> tuple[Model, Matcher]:
    """Log-odds matrix and matcher of a pack set."""
    return Model.compile(packs.causes), Matcher(packs.rules)


def contributions_of(candidate: Candidate, observer: Observer) -> tuple[Contribution, ...]:
    """Everything that makes up a candidate's log-odds, largest first; what is missing is listed with exactly 0."""
    packs = observer.packs
    model, _ = compiled(packs)
    cause = packs.causes[candidate.cause]
    column = {c: j for j, c in enumerate(model.columns)}
    found = [
        _contribution(line, observer.observe(candidate.service, line.group, line.at), observer, value)
        for line in cause.evidence
        for value in (float(candidate.parts[column[line.group, line.at]]),)
    ]
    if candidate.rules:
        titles = "; ".join(packs.rules[r].title for r in candidate.rules)
        boost = _boost(packs, candidate.rules)
        found.append(Contribution(evidence="rules", state="fired", log_odds=boost, text=titles))
    if candidate.explains is not None:
        effects = "; ".join(f"{packs.causes[c].title} ({s})" for s, c in candidate.explains.effects[:3])
        text = f"it would account for what else is seen: {effects}"
        found.append(Contribution(evidence="effects", state="explained", log_odds=candidate.explains.nats, text=text))
    if candidate.lead is not None:
        found.append(_order_told(candidate.lead))
    found += _direction_told(candidate, observer)
    if observer.symptom().state == "absent":
        text = f"nothing is wrong at {observer.graph.entry} itself"
        found.append(Contribution(evidence="symptom", state="absent", log_odds=SYMPTOM_ABSENT, text=text))
    found.sort(key=lambda c: (-abs(c.log_odds), c.evidence))
    prior = _prior(observer, model, model.causes.index(candidate.cause))
    text = "how often this is the cause, before any evidence"
    return (*found, Contribution(evidence="prior", state="prior", log_odds=prior, text=text))


def _fire(observer: Observer, matcher: Matcher) -> tuple[dict[tuple[str, str], tuple[str, ...]], set[tuple[str, str]]]:
    """Rules that support each (service, cause), and the pairs that rules exclude."""
    packs = observer.packs
    supports: dict[tuple[str, str], set[str]] = {}
    pruned: set[tuple[str, str]] = set()
    found = observer.fired
    if found is None:
        found = matcher.match(records_of(observer.graph, observer.findings, observer.facts()))
    for fired in found:
        then = packs.rules[fired.rule].then
        service = fired.value(then.service) if then.service.startswith("$") else then.service
        if not isinstance(service, str):
            continue
        if then.prune:
            pruned.add((service, then.prune))
        else:
            supports.setdefault((service, then.support), set()).add(fired.rule)
    return {key: tuple(sorted(names)) for key, names in supports.items()}, pruned


def _leads(
    observer: Observer, model: Model, pairs: list[tuple[str, int]], parts: Mapping[int, FloatArray], chosen: list[int]
) -> dict[int, Lead]:
    """Who moved first: each candidate by the leading series of its defining evidence, against the alerting service."""
    clock = Clock(observer)
    found: dict[int, Lead] = {}
    for i in chosen:
        service, row = pairs[i]
        if service == observer.graph.entry:
            continue
        for j in np.flatnonzero((parts[i] > 0) & model.needs[row]).tolist():
            seen = observer.observe(service, *model.columns[j])
            lead = clock.lead(seen.findings[0]) if seen.findings else None
            if lead is not None and (i not in found or lead.p < found[i].p):
                found[i] = lead
    return found


def _order_told(lead: Lead) -> Contribution:
    order = "before" if lead.nats > 0 else "after"
    text = f"{lead.cause} moved {abs(lead.seconds):g} s {order} {lead.effect} (shifted surrogates: p = {lead.p:.2g})"
    return Contribution(
        evidence="order", state="leads" if lead.nats > 0 else "follows", log_odds=lead.nats, text=clean(text, 400)
    )


def _direction_told(candidate: Candidate, observer: Observer) -> list[Contribution]:
    """How the trouble lies around the candidate on the call graph, in words; the evidence at callers and callees weighs
    it already."""
    suffering, callers, below, callees = direction(observer, candidate.service)
    if not suffering and not below:
        return []
    told = [f"{suffering} of {callers} that depend on it suffer"] * bool(callers)
    told += [f"{below} of {callees} that it calls do"] * bool(callees)
    state = "travels up" if suffering and not below else "shared" if suffering else "comes from below"
    return [Contribution(evidence="direction", state=state, log_odds=0.0, text=", ".join(told))]


def _parts(
    observer: Observer, model: Model, pairs: list[tuple[str, int]], boosts: FloatArray
) -> tuple[FloatArray, NDArray[np.bool_], dict[int, FloatArray]]:
    """What the evidence says of each pair in all, for which of them anything defining or any rule speaks, and of these
    the log ratios by column. A batch at a time: all at once would be gigabytes where there are very many services."""
    evidence, speaking = np.zeros(len(pairs)), np.zeros(len(pairs), dtype=bool)
    kept: dict[int, FloatArray] = {}
    for start in range(0, len(pairs), BATCH):
        batch = pairs[start : start + BATCH]
        rows = np.array([row for _, row in batch], dtype=np.intp)
        parts = model.contributions(rows, _states(observer, model, batch))
        here = slice(start, start + len(batch))
        evidence[here] = parts.sum(axis=1)
        speaking[here] = ((parts > 0) & model.needs[rows]).any(axis=1) | (boosts[here] > 0)
        kept.update((start + i, parts[i].copy()) for i in np.flatnonzero(speaking[here]).tolist())
    return evidence, speaking, kept


def _states(
    observer: Observer, model: Model, pairs: list[tuple[str, int]]
) -> np.ndarray[tuple[int, int], np.dtype[np.intp]]:
    states = np.full((len(pairs), len(model.columns)), MISSING, dtype=np.intp)
    column = {c: j for j, c in enumerate(model.columns)}
    lines: dict[int, tuple[list[tuple[str, At]], list[int]]] = {}
    for i, (service, row) in enumerate(pairs):
        if row not in lines:
            looked_at = [(line.group, line.at) for line in observer.packs.causes[model.causes[row]].evidence]
            lines[row] = looked_at, [column[c] for c in looked_at]
        looked_at, at = lines[row]
        states[i, at] = [STATE_INDEX[observer.observe(service, *c).state] for c in looked_at]
    return states


def _boost(packs: PackSet, rules: tuple[str, ...]) -> float:
    """The largest weight, not the sum: rules for the same cause look at the same trouble."""
    return min(max((packs.rules[r].then.weight for r in rules), default=0.0), MAX_RULE_NATS)


def _contribution(line: Likelihood, seen: Observation, observer: Observer, value: float) -> Contribution:
    title = observer.packs.groups[line.group].title
    if seen.state is None:
        return Contribution(evidence=line.column, state="missing", log_odds=value, text=f"{title}: no data")
    told = [describe(f, observer.packs.signals[f.signal]) for f in seen.findings[:2]]
    told += [describe_fact(f, observer.attributes(f)) for f in seen.facts[:2]]
    return Contribution(
        evidence=line.column,
        state=seen.state,
        log_odds=value,
        text=f"{title}: {'; '.join(told) or 'none'}",
        series=tuple(str(f.series) for f in seen.findings),
    )


def _hypothesis(candidate: Candidate, observer: Observer, propose: bool) -> Hypothesis:
    cause = observer.packs.causes[candidate.cause]
    contributions = contributions_of(candidate, observer)
    words = _words(candidate, cause, observer, contributions)
    proposals = [_proposal(t, cause, candidate, observer, words) for t in cause.proposals] if propose else []
    return Hypothesis(
        cause=candidate.cause,
        service=candidate.service,
        fault=cause.fault,
        title=cause.title,
        posterior=candidate.posterior,
        confidence=combined_confidence(candidate.posterior, len(candidate.rules)),
        path=candidate.path,
        rules=candidate.rules,
        contributions=contributions,
        proposals=_once(p for p in proposals if p is not None),
        sentence=_filled(cause.sentence, words),
        no_remedy=cause.no_remedy,
        runbook=cause.runbook or _runbook(observer.situation),
    )


def _once(proposals: Iterable[Proposal]) -> tuple[Proposal, ...]:
    """Without those that say again what one before them said, from other evidence."""
    found: dict[tuple[str, tuple[tuple[str, ParamValue], ...]], Proposal] = {}
    for proposal in proposals:
        found.setdefault((proposal.action, tuple(sorted(proposal.params.items()))), proposal)
    return tuple(found.values())


def _runbook(situation: Situation) -> str:
    """The link that the alert itself brings; only a plain web address, since people will follow it."""
    urls = (clean(alert.annotations.get("runbook_url", ""), 500) for alert in situation.alerts)
    return next((url for url in urls if url.startswith(("https://", "http://"))), "")


def _words(
    candidate: Candidate, cause: Cause, observer: Observer, contributions: tuple[Contribution, ...]
) -> dict[str, str]:
    """The vocabulary of sentences, from the hypothesis and the leading bad fact and series of its evidence."""
    words = {
        "service": candidate.service,
        "entry": observer.graph.entry or "the alert",
        "path": " -> ".join(candidate.path),
        "posterior": f"{candidate.posterior * 100:.0f} %",
        "evidence": "; ".join(c.text for c in contributions if c.log_odds > 0 and c.evidence not in _NO_EVIDENCE),
    }
    for line in cause.evidence:
        seen = observer.observe(candidate.service, line.group, line.at)
        if seen.state not in ("strong", "weak", "silent"):
            continue
        for finding in seen.findings:
            words.setdefault("peer", finding.peer)
            for name, text in finding.series.labels:
                if name in ("flag", "queue", "mountpoint"):
                    words.setdefault(name, text)
        for fact in seen.facts:
            attributes = observer.attributes(fact)
            words.setdefault("subject", fact.subject)
            for word, name in _FACT_WORDS.items():
                value = attributes.get(name)
                if value is not None:
                    words.setdefault(word, f"{value:.0f}" if isinstance(value, float) else str(value))
    return {name: clean(value, 400) for name, value in words.items()}


def _filled(template: str, words: Mapping[str, str]) -> str:
    """One pass of plain substitution: what is put in is never looked at again."""
    return _WORD.sub(lambda m: words.get(m.group(1)) or "unknown", template)


def _proposal(
    template: ProposalTemplate, cause: Cause, candidate: Candidate, observer: Observer, words: Mapping[str, str]
) -> Proposal | None:
    """The proposal with its references resolved, or None if one of them finds nothing. Where it points at one of
    several facts that come close to each other, a person must choose: at most `approve`."""
    if template.configured and template.configured not in observer.situation.configured:
        return None
    seen = NOTHING
    for line in cause.evidence:
        if line.column == template.using:
            seen = observer.observe(candidate.service, line.group, line.at)
    params: dict[str, ParamValue] = {}
    for name, value in template.params.items():
        found = _resolved(value, candidate, observer, seen) if isinstance(value, Reference) else value
        if found is not None:
            params[name] = found
        elif not (isinstance(value, Reference) and value.optional):
            return None
    reason = _filled(template.reason or cause.sentence, words)
    cap = template.autonomy_cap
    points = any(isinstance(v, Reference) and v.source.startswith("fact.") for v in template.params.values())
    if points and observer.rivalled(seen, template.using.partition("@")[0]):
        cap, reason = min(cap, "approve", key=_AUTONOMY.index), f"{reason} Another one is nearly as suspicious."
    return Proposal(
        action=template.action,
        service=candidate.service,
        params=params,
        reason=reason,
        runbook=template.runbook or cause.runbook or _runbook(observer.situation),
        autonomy_cap=cap,
    )


def _resolved(reference: Reference, candidate: Candidate, observer: Observer, seen: Observation) -> ParamValue | None:
    kind, _, name = reference.source.partition(".")
    if kind == "candidate":
        return candidate.service if name == "service" else observer.graph.entry
    if kind == "alert":
        values = {value for alert in observer.situation.alerts if (value := alert.labels.get(name, ""))}
        return values.pop() if len(values) == 1 else None
    if kind == "owner":
        return dict(parts(_owner(candidate, observer, seen))).get(name)
    if seen.state not in ("strong", "weak"):
        return None
    if kind == "fact":
        return observer.attributes(seen.facts[0]).get(name) if seen.facts else None
    return seen.findings[0].series.label(name) or None if seen.findings else None


def _owner(candidate: Candidate, observer: Observer, seen: Observation) -> str:
    """The object above the pod that the leading series or fact is about; without one, above the candidate."""
    owners = observer.owners
    if seen.state in ("strong", "weak"):
        if seen.facts and seen.facts[0].subject.startswith("pod/"):
            return owners.top(seen.facts[0].subject)
        series = seen.findings[0].series if seen.findings else None
        if series is not None and series.label("namespace") and series.label("pod"):
            return owners.top(f"pod/{series.label('namespace')}/{series.label('pod')}")
    return owners.of(candidate.service)


def _sentence(clear: bool, ranked: bool, hypotheses: tuple[Hypothesis, ...], missing: Mapping[str, str]) -> str:
    """The diagnosis in words, for the incident's story."""
    if clear:
        text = f"Most likely ({hypotheses[0].posterior * 100:.0f} %): {hypotheses[0].sentence}"
    elif ranked and hypotheses:
        told = [f"{h.title} at {h.service} ({h.posterior * 100:.0f} %)" for h in hypotheses[:3]]
        text = f"Nothing stands clear. Most likely first: {'; '.join(told)}."
    elif hypotheses:
        best = hypotheses[0]
        text = "Insufficient evidence: nothing stands clear; the best of it "
        text += f"({best.posterior * 100:.0f} %) is {best.title} at {best.service}."
    else:
        text = "Insufficient evidence: nothing that the rule packs know speaks for any cause."
    if missing:
        text += " Missing: " + ", ".join(f"{name} ({reason})" for name, reason in list(missing.items())[:5])
        text += f" and {len(missing) - 5} more." if len(missing) > 5 else "."
    return text
