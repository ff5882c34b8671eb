"""`diagnose` and `evaluate`: what the packs say about recorded incidents or given alerts, and how often they are right.

Recordings and alerts go through the code that a live incident goes through; only `evaluate` looks at the answers,
afterwards. Nothing is journalled and nothing is done.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from agent.commands.output import CommandError, Exit, emit_json, say, table
from agent.engines import Engine, EngineError, diagnosed, engine_for
from agent.log import printable

_COLUMNS = ("ac1", "ac3", "ac5", "avg5")

if TYPE_CHECKING:
    from agent.config import Config
    from rules.model import Alert, Diagnosis, Hypothesis, Situation
    from rules.packs import PackSet


MAX_ALERT_BYTES = 8 << 20


def diagnose(config: Config, recordings: tuple[Path, ...], limit: int, *, as_json: bool) -> Exit:
    """Ranking, evidence and sentences of each recording."""
    from agent.packs import load_packs
    from agent.sources.recorded import RecordingError, read_recording
    from rules.diagnose import TOP

    packs = load_packs(config.packs.dirs, config.packs.disable, config.packs.model)
    answers: list[dict[str, Any]] = []
    with _engine(config, packs) as engine:
        for path in recordings:
            try:
                situation = read_recording(path)
            except RecordingError as error:
                hint = "a recording is a directory with alert.json and series.csv.gz"
                raise CommandError(str(error), hint) from error
            diagnosis = diagnosed(situation, packs, limit or TOP, engine)
            if as_json:
                answers.append({"recording": str(path), "diagnosis": msgspec.to_builtins(diagnosis)})
            else:
                _tell(path, diagnosis)
    if as_json:
        emit_json({"diagnoses": answers})
    return Exit.OK


def diagnose_alerts(
    config: Config, files: tuple[Path, ...], url: str, at: float | None, limit: int, *, as_json: bool
) -> Exit:
    """Ranking, evidence and sentences of the alerts in each file (a webhook's body, `-`: standard input), by what the
    Prometheus at `url` (default: the configured one) holds at the time `at` (default: now)."""
    from agent.packs import load_packs
    from rules.diagnose import TOP

    prometheus = msgspec.structs.replace(config.prometheus, url=url) if url else config.prometheus
    config = msgspec.structs.replace(config, prometheus=prometheus)
    if not config.prometheus.url:
        raise CommandError("diagnose --alert: which Prometheus?", "give --prometheus URL, or set prometheus.url")
    packs = load_packs(config.packs.dirs, config.packs.disable, config.packs.model)
    now = time.time() if at is None else at
    answers: list[dict[str, Any]] = []
    with _engine(config, packs) as engine:
        for path in files:
            situation = asyncio.run(_around(config, packs, _alerts_in(path), now))
            diagnosis = diagnosed(situation, packs, limit or TOP, engine)
            if as_json:
                answers.append({"alert": str(path), "diagnosis": msgspec.to_builtins(diagnosis)})
            else:
                _tell(path, diagnosis)
    if as_json:
        emit_json({"diagnoses": answers})
    return Exit.OK


@contextmanager
def _engine(config: Config, packs: PackSet) -> Iterator[Engine | None]:
    """The configured rule engine, for the time of the block. Raises CommandError where it cannot be had."""
    try:
        with engine_for(config.packs.engine, packs) as engine:
            yield engine
    except EngineError as error:
        raise CommandError(str(error), "set packs.engine: builtin") from error


def _alerts_in(path: Path) -> tuple[Alert, ...]:
    """The good alerts of a webhook's body. Raises CommandError."""
    from agent.alerts import PayloadError, parse_payload

    try:
        if str(path) == "-":
            body = sys.stdin.buffer.read(MAX_ALERT_BYTES + 1)
        else:
            with path.open("rb") as file:
                body = file.read(MAX_ALERT_BYTES + 1)
        if len(body) > MAX_ALERT_BYTES:
            raise CommandError(f"{path}: larger than {MAX_ALERT_BYTES} bytes", "give one group of alerts")
        payload = parse_payload(body, "default")
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror or error}", "a file with a webhook's body") from error
    except PayloadError as error:
        raise CommandError(f"{path}: {error}", "docs/webhook.md says what a webhook's body is") from error
    if not payload.alerts:
        bad = payload.bad[0]
        raise CommandError(f"{path}: no alert can be understood: {bad.path}: {bad.reason}", "docs/webhook.md")
    return payload.alerts


async def _around(config: Config, packs: PackSet, alerts: tuple[Alert, ...], now: float) -> Situation:
    from agent.app import prometheus_of
    from agent.expressions import Expressions, rules_of
    from agent.situation import Situations
    from agent.sources.prometheus import PrometheusSource
    from agent.systems import SystemsSeen
    from agent.topology import Discovery, load_topology

    try:
        source = PrometheusSource(prometheus_of(config))
    except ValueError as error:
        raise CommandError(str(error), "http://HOST:PORT") from error
    async with source as prometheus:
        discover = Discovery(prometheus).topology if config.topology.service_graph else None
        expressions = Expressions(rules_of(prometheus))
        sources = [prometheus]
        situations = Situations(
            config, packs, sources, load_topology(config), discover, clock=lambda: now, expressions=expressions
        )
        situations.systems = SystemsSeen(prometheus, at=now)
        return await situations.around(alerts, alerts[0].tenant)


_WORDS = {  # of what is no evidence group
    "order": "which moved first",
    "direction": "how it spreads",
    "effects": "what it explains",
    "rules": "rules that fired",
    "prior": "to begin with",
}


def _tell(path: Path, diagnosis: Diagnosis) -> None:
    from agent.story import weighed

    say(f"{path.name}: {diagnosis.verdict.replace('_', ' ')}; {weighed(diagnosis.candidates)}")
    say(f"  {diagnosis.sentence}")
    if diagnosis.owner:
        say(f"  the object to change: {diagnosis.owner}")
    for change in diagnosis.changes:
        say(f"  changed: {change}")
    for rank, hypothesis in enumerate(diagnosis.hypotheses, 1):
        _tell_hypothesis(rank, hypothesis)
    say("")


def _tell_hypothesis(rank: int, hypothesis: Hypothesis) -> None:
    say(f"  {rank}. {hypothesis.title} ({hypothesis.cause} on {hypothesis.service}): {hypothesis.posterior:.1%}")
    say(f"     path: {' -> '.join(hypothesis.path)}")
    for c in hypothesis.contributions:
        if c.log_odds or c.evidence == "direction":  # which weighs nothing by itself, and says how the trouble spreads
            say(f"     {c.log_odds:+6.2f}  {_WORDS.get(c.evidence) or f'{c.evidence} is {c.state}'}: {c.text}")
    for proposal in hypothesis.proposals:
        say(f"     proposed: {proposal.action}: {proposal.reason}")
    if hypothesis.no_remedy:
        say(f"     no safe remedy: {hypothesis.no_remedy}")
    if hypothesis.runbook:
        say(f"     runbook: {hypothesis.runbook}")


def evaluate(
    config: Config,
    directories: tuple[Path, ...],
    *,
    as_json: bool,
    misses: bool,
    cross: bool,
    unlicensed: tuple[str, ...] = (),
) -> Exit:
    """Accuracy over all recordings under the directories; with `cross` also of likelihoods counted from other cases."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from agent import evaluate as scoring
    from agent.crossval import cross_validate
    from agent.packs import load_bare_packs, load_packs
    from agent.sources.recorded import RecordingError

    packs = load_packs(config.packs.dirs, config.packs.disable, config.packs.model)
    bare = load_bare_packs(config.packs.dirs, config.packs.disable)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    try:
        cases = scoring.find_cases(directories)
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("diagnosing", total=len(cases) * (2 if cross else 1))

            def advance(case: scoring.Case) -> None:
                bar.update(task, advance=1, description=printable(case.set))

            with _engine(config, packs) as engine:
                scored = scoring.evaluate(cases, packs, advance, engine)
                crossed = cross_validate(cases, bare, advance, unlicensed, engine) if cross else {}
    except RecordingError as error:
        raise CommandError(str(error), "evaluate needs directories of recordings, each with truth.json") from error
    found = scoring.report(scored)
    if as_json:
        emit_json(found | ({"cross": crossed} if cross else {}))
        return Exit.OK
    told = {
        "service": "cross-validated: likelihoods counted anew, leaving out every case of the true service",
        "system": "from other systems only: likelihoods counted anew, leaving out every case of the same system",
    }
    for left_out, figures in crossed.items():
        say(f"{told[left_out]}\n", lines=True)
        _tables(figures)
        say("")
    say(f"as shipped (model {packs.model}; learned from the licensed ones of these cases)\n", lines=True)
    _tables(found)
    if misses:
        _misses(scored)
    return Exit.OK


def _tables(found: dict[str, Any]) -> None:
    rows = [("set", "level", "cases", "AC@1", "AC@3", "AC@5", "Avg@5", "s/case")]
    for name, figures in found["sets"].items():
        for level, title in (("service", "service"), ("pair", "service, fault type"), ("metric", "metric")):
            of = figures.get(level)
            if of and of["cases"]:
                seconds = f"{figures['seconds_per_case']:.3f}" if level == "service" else ""
                rows.append((name, title, str(of["cases"]), *(_share(of[k]) for k in _COLUMNS), seconds))
        for method, levels in figures.get("baselines", {}).items():
            for level, of in levels.items():
                if of["cases"]:
                    title = f"{level}, {method.replace('_', '-')}"
                    rows.append((name, title, str(of["cases"]), *(_share(of[k]) for k in _COLUMNS), ""))
    table(rows, empty="no case with a fault")
    calm = found["sets"].get("nofault")
    if calm:
        say("")
        shares = [(name, _share(share)) for name, share in calm["by_source"].items()]
        shares.append((f"all {calm['cases']}", _share(calm["specificity"])))
        table([("fault-free cases of", "specificity"), *shares], empty="")
    of = found["calibration"]
    if of["cases"]:
        say("")
        say(f"calibration over {of['cases']} first answers: Brier {of['brier']:.3f}, ECE {of['ece']:.3f}")


def _misses(scored: tuple[Any, ...]) -> None:
    """Every case whose first answer was wrong: what it was, and what was said."""
    rows = [("case", "truth", "rank", "said")]
    for s in scored:
        right = not s.ranking.ranked if s.truth.service is None else s.pair == 1
        if not right:
            said = " ".join(s.ranking.pairs[0]) if s.ranking.pairs else "nothing"
            said = said if s.ranking.ranked else f"insufficient evidence ({said})"
            truth = f"{s.truth.service} {s.truth.fault}" if s.truth.service else "no fault"
            rows.append((f"{s.case.set}/{s.case.directory.name}", truth, str(s.service or "-"), said))
    say("")
    table(rows, empty="every first answer was right")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
