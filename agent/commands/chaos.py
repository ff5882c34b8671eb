"""`alertmedic chaos`: run scenarios, list them, report what they showed. Logic is `agent.chaos`'s; this only speaks."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from agent.commands.output import CommandError, Exit, emit_json, on_terminal, say, table

if TYPE_CHECKING:
    from agent.chaos.measure import Run
    from agent.chaos.run import Block, MakeRuns, Progress, Results
    from agent.chaos.scenario import Scenario

RESULTS = Path("build/chaos/runs.jsonl")


def load(
    files: tuple[Path, ...], only: tuple[str, ...] = (), *, quick: bool = False, workload: Path | None = None
) -> dict[str, Scenario]:
    """The wanted scenarios. Raises CommandError for a name that none has; ScenarioError, OSError."""
    from agent.chaos.faults import known
    from agent.chaos.scenario import load_scenarios
    from agent.chaos.workload import load_workload
    from agent.chaos.world import HARNESS_FAULTS

    if workload is not None and not files:
        raise CommandError("chaos: a workload of your own needs scenarios of your own", "--file FILE", Exit.USAGE)
    faults = known() | HARNESS_FAULTS if workload is None else frozenset(load_workload(workload).faults)
    found = load_scenarios(files or None, faults)
    if absent := [name for name in only if name not in found]:
        raise CommandError(f"chaos: no scenario {', '.join(absent)}", "alertmedic chaos list", Exit.USAGE)
    wanted = {name: found[name] for name in only} or found
    return {name: s for name, s in wanted.items() if s.quick or not quick}


def listing(files: tuple[Path, ...], workload: Path | None, *, as_json: bool) -> int:
    import msgspec

    scenarios = load(files, workload=workload)
    if as_json:
        emit_json({"scenarios": [msgspec.to_builtins(s) for s in scenarios.values()]})
        return Exit.OK
    rows = [("scenario", "kind", "healed by", "quick", "title")]
    rows += [(s.name, s.kind, s.healed_by, "yes" if s.quick else "", s.title) for s in scenarios.values()]
    table(rows, empty="no scenarios")
    return Exit.OK


class Wanted(NamedTuple):
    """How runs are to be made; what the options of `chaos run` say."""

    arms: tuple[str, ...]
    results: Path
    repetitions: int
    seed: int
    share: int
    worlds: int
    kill_agent: bool
    keep: bool
    record: Path | None
    workload: Path | None


def run(scenarios: dict[str, Scenario], wanted: Wanted, *, named: bool, as_json: bool) -> int:
    """Makes the runs that are not in the results yet; exit code 1 when the agent did anything wrong or needless.
    `named`: the scenarios were asked for by name."""
    from agent.chaos.run import Progress, Results, ResultsError, made_by, plan
    from agent.demo.children import WorldError, adopt_orphans

    _check(wanted)
    if wanted.kill_agent and not named:  # what nobody heals, a killed agent does not heal either
        scenarios = {name: s for name, s in scenarios.items() if s.healed_by == "action"}
    version = made_by()
    blocks = plan(
        scenarios,
        wanted.arms,
        repetitions=wanted.repetitions,
        seed=wanted.seed,
        share=wanted.share,
        kill_agent=wanted.kill_agent,
    )
    progress = Progress(sum(len(b.jobs) for b in blocks), lambda what, made: None)
    adopt_orphans()
    try:
        with Results.writing(wanted.results) as book, _shown(progress, quiet=as_json), _swept():
            if others := {r.made_by for r in book.runs} - {version}:
                progress.tell(
                    f"there are runs by another version: {', '.join(sorted(others))}; this is {version}", None
                )
            with _makes(wanted, version, progress) as (make, worlds):
                asyncio.run(_until_done_or_told(blocks, book, progress, make, worlds))
    except ResultsError as error:
        raise CommandError(str(error)) from error
    except WorldError as error:
        hint = f"the runs so far are in {wanted.results}; the same command goes on"
        raise CommandError(f"chaos: {error}", hint) from error
    return report(wanted.results, as_json=as_json)


def _check(wanted: Wanted) -> None:
    """Raises CommandError for what cannot be run."""
    from agent.chaos.arms import ARMS
    from agent.demo.children import missing_programs

    if unknown := [arm for arm in wanted.arms if arm not in ARMS]:
        raise CommandError(f"chaos: no arm {', '.join(unknown)}", f"there are {', '.join(ARMS)}", Exit.USAGE)
    if wanted.workload is not None and wanted.arms != ("auto",):
        raise CommandError("chaos: a workload of your own has one arm, the agent that runs there", code=Exit.USAGE)
    if wanted.workload is not None and wanted.record is not None:
        raise CommandError(
            "chaos: --record is for the demo's shop", "set investigate.recordings of your agent", Exit.USAGE
        )
    if wanted.workload is None and (missing := missing_programs()):
        raise CommandError("chaos: " + "; ".join(missing), code=Exit.USAGE)


@contextlib.contextmanager
def _makes(wanted: Wanted, version: str, progress: Progress) -> Iterator[tuple[MakeRuns, int]]:
    """Where runs are made, and how many worlds at once: one, where worlds cannot be kept apart."""
    from agent.chaos.isolation import Keeping, obstacle
    from agent.chaos.run import in_workload, in_worlds, place_for_worlds
    from agent.chaos.workload import load_workload

    if wanted.workload is not None:
        left_behind = wanted.results.with_suffix(".active.json")
        yield in_workload(load_workload(wanted.workload), left_behind, version), 1
        return
    record = "" if wanted.record is None else str(wanted.record.resolve())
    keeping = Keeping(worlds=wanted.keep, record=record, made_by=version)
    if why := obstacle():
        progress.tell(f"worlds cannot be isolated here, so there is one at a time: {why}", None)
        yield in_worlds(keeping, None), 1
        return
    with place_for_worlds(wanted.results, wanted.keep) as place:
        yield in_worlds(keeping, place), wanted.worlds


async def _until_done_or_told(
    blocks: list[Block], book: Results, progress: Progress, make: MakeRuns, worlds: int
) -> None:
    from agent.chaos.run import run_all

    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        await run_all(blocks, book, progress, make, worlds)
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


@contextlib.contextmanager
def _swept() -> Iterator[None]:
    """Whatever a world left behind ends with the command."""
    import psutil

    from agent.demo.children import end_descendants

    try:
        yield
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            end_descendants(psutil.Process().children(recursive=True))


@contextlib.contextmanager
def _shown(progress: Progress, *, quiet: bool) -> Iterator[None]:
    """Tells every run as a line, and on a terminal a bar with an estimate of the time left."""
    if quiet:
        yield
        return
    if not on_terminal():

        def line(what: str, made: Run | None) -> None:
            say(_line(progress, what, made))
            sys.stdout.flush()  # who runs this for hours reads a file

        progress.tell = line
        yield
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("chaos"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Bar(*columns) as bar:
        at = bar.add_task("", total=progress.total)

        def tell(what: str, made: Run | None) -> None:
            bar.console.print(_line(progress, what, made), markup=False, highlight=False)
            left = progress.left()
            until = time.strftime("%H:%M", time.localtime(time.time() + (left or 0.0)))
            about = "" if left is None else f"about {left / 60:.0f} min left, until {until}"
            bar.update(at, completed=progress.done, description=about)

        progress.tell = tell
        yield


def _line(progress: Progress, what: str, made: Run | None) -> str:
    from agent.chaos.report import harmful

    if made is None:
        return what
    left = progress.left()
    parts = [f"[{progress.done}/{progress.total}]", f"{what:<34}"]
    if made.degraded is None:
        parts.append("never out of bounds")
    else:
        parts.append("not recovered" if made.recovered is None else f"recovered after {made.recovered:.1f} s")
    if made.top:
        parts.append(f"said {made.top[0]}" + ("" if made.rank == 1 or not made.truth else " (WRONG)"))
    if made.actions:
        parts.append("did " + ", ".join(made.actions))
    if made.killed_at is not None:
        parts.append(f"agent killed after {made.killed_at:.1f} s")
    parts += [f"DONE TWICE: {what}" for what in made.repeated]
    if harmful(made):
        parts.append("WRONG OR NEEDLESS: " + ", ".join(harmful(made)))
    if made.void:
        parts.append(f"VOID: {made.void}")
    if left is not None:
        parts.append(f"about {left / 60:.0f} min left")
    return "; ".join(parts)


def report(results: Path, *, as_json: bool, out: Path | None = None) -> int:
    """Prints the summary; writes the page and the metrics beside the results, or into the directory `out` all there is
    to keep of them. 1 when something was done wrongly."""
    from agent.chaos import page as shown
    from agent.chaos import report as told
    from agent.chaos.run import Results, ResultsError

    try:
        runs = Results.open(results).runs
    except ResultsError as error:
        raise CommandError(str(error)) from error
    if not runs:
        raise CommandError(f"chaos: {results} has no runs", "alertmedic chaos run")
    place = out or results.parent
    place.mkdir(parents=True, exist_ok=True)
    page, metrics = place / "report.html", place / "metrics.prom"
    page.write_text(shown.page(runs))
    metrics.write_bytes(told.metrics(runs))
    summary = told.summary(runs)
    if out is not None:
        _keep(runs, summary, out)
    kept = [r for r in told.counting(runs) if r.arm in told.OURS]
    harm = sum(len(told.harmful(r)) + len(r.repeated) for r in kept)
    if as_json:
        emit_json(summary)
    else:
        _say(summary)
        say(f"the page: {page}; metrics: {metrics}")
        if harm:
            say(f"{harm} actions that were wrong, needless or done twice")
    return Exit.FAULT if harm else Exit.OK


def _keep(runs: list[Run], summary: dict[str, object], out: Path) -> None:
    """The summary, and every run: packed, and the same bytes for the same runs."""
    import gzip

    import msgspec

    (out / "summary.json").write_bytes(msgspec.json.format(msgspec.json.encode(summary), indent=1) + b"\n")
    lines = b"".join(msgspec.json.encode(run) + b"\n" for run in runs)
    (out / "runs.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))


def _say(summary: dict[str, object]) -> None:
    arms = summary["arms"]
    assert isinstance(arms, dict)
    rows = [
        (
            "arm",
            "runs",
            "mean s",
            "healable: mean s",
            "healed",
            "top 1",
            "wrong",
            "needless",
            "detect",
            "diagnose",
            "recover",
        )
    ]
    for name, a in arms.items():
        stages = a["stages"]

        def of(value: dict[str, object]) -> str:
            return "-" if not value["of"] else f"{value['hits']}/{value['of']}"

        def number(value: object) -> str:
            return "-" if value is None else f"{value:.1f}"

        rows.append(
            (
                name,
                str(a["runs"]),
                number(a["restricted_mean_seconds"]["value"]),
                number(a["restricted_mean_seconds_healable"]["value"]),
                of(a["healed_of_healable"]),
                of(a["top1"]),
                str(a["wrong_actions"]),
                str(a["needless_actions"]),
                number(stages["alert"]["mean"]),
                number(stages["diagnosed"]["mean"]),
                number(stages["recovered"]["mean"]),
            )
        )
    table(rows, empty="no runs")
    against = summary["against"]
    assert isinstance(against, dict)
    for pair, a in against.items():
        value = a["reduction_healable"]
        if value["value"] is not None:
            low, mid, high = (f"{value[k]:.0%}" for k in ("low", "value", "high"))
            say(f"{pair}: {mid} less time out of bounds ({low} to {high}), healable faults")
    killed = summary["killed_agent"]
    assert isinstance(killed, dict)
    if killed["runs"]:
        healed = killed["healed_of_healable"]
        say(
            f"{killed['runs']} runs with the agent killed ({killed['before_recovery']} before the recovery): "
            f"{healed['hits']} of {healed['of']} healable healed, {killed['repeated']} steps done twice"
        )
    say(f"{summary['runs']} runs, {summary['void']} void, {len(summary['misses'])} misses")  # type: ignore[arg-type]
