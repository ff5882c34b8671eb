"""The command line: what can be said, and which function of `agent.commands.calls` does it. No logic.

Called by `agent.__main__`. Imports nothing heavy: what a command needs is imported when it runs, so that `serve` never
pays for what only people need (rich) and `version` pays for nothing.

Exit codes: 0 done, 1 a fault was found, 2 wrong usage, 3 a service cannot be reached; 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from agent import __version__
from agent.commands import calls
from agent.commands.output import CommandError, Exit, complain

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

EPILOG = "Exit codes: 0 done; 1 a fault was found; 2 wrong usage; 3 a service cannot be reached; 130 interrupted."
Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and gives the exit code."""
    arguments = parser().parse_args(argv)
    command: Command = arguments.command
    try:
        code = command(arguments)
        sys.stdout.flush()
        return code
    except CommandError as error:
        complain(error.what, error.hint)
        return error.code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader went away (`| head`). Python would complain once more while it closes standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.OK
    except _expected() as error:
        return _told(error)


def _expected() -> tuple[type[Exception], ...]:
    """What loading and the journal raise for reasons that a person can mend. Asked for only when something was raised,
    so that the imports cost nothing."""
    from actions.catalog import CatalogError
    from agent.config import ConfigError
    from agent.engines import EngineError
    from agent.fold_state import StateError
    from agent.journal.files import JournalError
    from agent.topology import TopologyError
    from agent.tracing import TracingError
    from rules.packs import PackError

    return (
        ConfigError,
        EngineError,
        JournalError,
        StateError,
        PackError,
        CatalogError,
        TopologyError,
        TracingError,
        OSError,
    )


def _told(error: Exception) -> int:
    from agent.config import ConfigError
    from agent.journal.files import JournalLocked

    faults = error.faults if isinstance(error, ConfigError) else (error,)
    for fault in faults:
        complain(str(fault))
    return Exit.UNREACHABLE if isinstance(error, JournalLocked) else Exit.FAULT


def parser() -> argparse.ArgumentParser:
    """The whole grammar."""
    top = argparse.ArgumentParser(
        prog="alertmedic",
        description="An on-call agent for Prometheus.",
        allow_abbrev=False,
        epilog=EPILOG,
    )
    top.add_argument("--version", action="version", version=f"alertmedic {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    common = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    common.add_argument("--config", metavar="FILE", type=Path, help="configuration (default: $ALERTMEDIC_CONFIG)")
    common.add_argument("--state-dir", metavar="DIR", help="state directory, instead of the configured one")
    common.add_argument("--json", action="store_true", help="print JSON")
    for add in (
        *(_serving, _looking, _deciding, _gateway, _diagnosing, _checking),
        *(_catalogues, _sandboxing, _exploring, _breaking),
    ):
        add(commands, common)
    return top


def _add(
    commands: Commands, common: argparse.ArgumentParser, name: str, command: Command, text: str
) -> argparse.ArgumentParser:
    made = commands.add_parser(name, parents=[common], help=text, description=text, allow_abbrev=False)
    made.set_defaults(command=command)
    return made


def _group(commands: Commands, name: str, text: str) -> Commands:
    group = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    return group.add_subparsers(title="commands", metavar="COMMAND", required=True)


def _serving(commands: Commands, common: argparse.ArgumentParser) -> None:
    serve = _add(commands, common, "serve", calls.serve, "run the agent")
    serve.add_argument("--listen", metavar="HOST:PORT", help="address of the HTTP port, instead of the configured one")
    _add(commands, common, "version", calls.version, "say which version this is")


def _looking(commands: Commands, common: argparse.ArgumentParser) -> None:
    incidents = _add(commands, common, "incidents", calls.incidents, "list incidents, or tell the story of one")
    incidents.add_argument("id", nargs="?", default="", help="an incident's id, or the beginning of one")
    incidents.add_argument("--state", action="append", default=[], help="only these states (repeatable)")
    incidents.add_argument("--tenant", default="", help="only this tenant")
    incidents.add_argument("--limit", type=_count, default=0, help="at most so many, newest first")
    story = _add(commands, common, "story", calls.story, "tell an incident's story; --json: its whole audit trail")
    story.add_argument("id", help="an incident's id, or the beginning of one")
    story.add_argument("--output", action="store_true", help="instead, all that its steps printed")
    _add(commands, common, "quarantine", calls.quarantine, "show what could not be understood")


def _deciding(commands: Commands, common: argparse.ArgumentParser) -> None:
    for name, text in (("approve", "let a waiting plan run"), ("reject", "turn a waiting plan down")):
        made = _add(commands, common, name, calls.decide, text)
        made.add_argument("id", help="the incident's id")
        made.add_argument("--digest", default="", help="only if the waiting plan has this digest")
        made.add_argument("--note", default="", help="kept in the story")
        made.set_defaults(decision=name)
    for name, text in (("pause", "stop all actions"), ("resume", "let actions start again")):
        made = _add(commands, common, name, calls.pause, text)
        made.add_argument("--note", default="", help="kept in the journal")
        made.set_defaults(paused=name == "pause")
    made = _add(commands, common, "feedback", calls.feedback, "say what an incident's cause was")
    made.add_argument("id", metavar="INCIDENT", help="an incident's id, or the beginning of one")
    made.add_argument("--cause", required=True, metavar="CAUSE@SERVICE", help="the true cause and where it was")
    made.add_argument("--helped", choices=["yes", "no"], default="", help="whether what was done helped")
    made.add_argument("--note", default="", help="kept in the story")
    changes = _group(commands, "change", "say what was changed: a cause that metrics may not tell of")
    made = _add(changes, common, "add", calls.change_add, "tell of a change")
    made.add_argument("--service", required=True, metavar="SERVICE", help="what was changed")
    made.add_argument(
        "--kind", choices=["deploy", "release", "commit", "flag"], default="deploy", help="default: deploy"
    )
    made.add_argument("--id", default="", help="a version, a commit, a flag: told again, it counts once")
    made.add_argument("--text", default="", help="what a person should read of it")
    made.add_argument("--time", type=_time, default=None, help="when it was made (RFC 3339, unix; default: now)")
    made.add_argument("--tenant", default="default", help="whose incidents it concerns")
    _add(changes, common, "list", calls.change_list, "list what was told, newest first")
    models = _group(commands, "model", "the model that ranks causes: shipped, or with feedback taken into account")
    _add(models, common, "list", calls.model, "list the models").set_defaults(what="list")
    made = _add(models, common, "use", calls.model, "choose the model that serves")
    made.add_argument("version", metavar="VERSION", help="shipped, a number, or latest (whatever is learned)")
    made.set_defaults(what="use")
    back = _add(models, common, "revert", calls.model, "go back to the model that served before")
    back.set_defaults(what="revert")
    for one in (made, back):
        one.add_argument("--note", default="", help="kept in the journal")
    breakers = _add(commands, common, "breakers", calls.breakers, "list circuit breakers, or close one by hand")
    breakers.add_argument("reset", nargs="?", choices=["reset"], help="close the breaker KEY")
    breakers.add_argument("key", nargs="?", default="", metavar="KEY", help="ACTION or ACTION|TARGET")
    breakers.add_argument("--note", default="", help="kept in the journal")


def _gateway(commands: Commands, common: argparse.ArgumentParser) -> None:
    group = _group(commands, "gateway", "compare two diagnosis channels, and say which one decides")
    _add(group, common, "status", calls.gateway_status, "who is primary, and the score")
    for name, text in (
        ("promote", "make the candidate primary, if the score shows that it is better"),
        ("rollback", "make the stable channel primary again"),
    ):
        made = _add(group, common, name, calls.gateway_move, text)
        made.add_argument("--note", default="", help="kept in the journal")
        made.set_defaults(move=name, force=False)
        if name == "promote":
            made.add_argument("--force", action="store_true", help="whatever the score shows")
    judge = _add(
        group, common, "judge", calls.gateway_judge, "say what the cause was in a comparison that was recorded"
    )
    judge.add_argument("trace", help="its trace id, as `gateway status` shows it")
    judge.add_argument("cause", help="the cause's id, for example postgres.blocking_session")
    judge.add_argument("service", help="the service")


def _diagnosing(commands: Commands, common: argparse.ArgumentParser) -> None:
    made = _add(
        commands, common, "diagnose", calls.diagnose, "rank the causes of recorded incidents, or of given alerts"
    )
    made.add_argument("recordings", nargs="*", type=Path, metavar="RECORDING", help="a recording's directory")
    made.add_argument(
        "--alert", action="append", default=[], type=Path, metavar="FILE", help="a webhook's body, - for standard input"
    )
    made.add_argument("--prometheus", default="", metavar="URL", help="with --alert: where to look")
    made.add_argument(
        "--at", type=_time, default=None, metavar="TIME", help="with --alert: as of then (RFC 3339, unix)"
    )
    made.add_argument("--limit", type=_count, default=0, help="at most so many hypotheses (default: three)")
    made = _add(commands, common, "record", calls.record, "write an incident's evidence as a recording")
    made.add_argument("id", metavar="INCIDENT", help="an incident's id, or the beginning of one")
    made.add_argument("--out", type=Path, metavar="DIR", help="where to (default: a directory named by the incident)")
    made.add_argument("--now", action="store_true", help="up to now, instead of what the last diagnosis looked at")
    made.add_argument(
        "--expect", default="", metavar="CAUSE@SERVICE", help="make it a golden incident whose first cause is this"
    )
    made = _add(
        commands,
        common,
        "evaluate",
        calls.evaluate,
        "measure the accuracy of diagnosis on recordings with known causes",
    )
    made.add_argument("dirs", nargs="+", type=Path, metavar="DIR", help="a recording, a set of them, or several sets")
    made.add_argument(
        "--cross",
        action="store_true",
        help="also with likelihoods counted from other services, and other systems, only",
    )
    made.add_argument(
        "--unlicensed",
        action="append",
        default=[],
        metavar="SET",
        help="with --cross: never count this set (repeatable)",
    )
    made.add_argument("--misses", action="store_true", help="also list every case whose first answer was wrong")
    made = _add(commands, common, "learn", calls.learn, "learn likelihoods from recordings with known causes")
    made.add_argument("dirs", nargs="+", type=Path, metavar="DIR", help="recordings that may be learned from")
    made.add_argument("--output", type=Path, required=True, metavar="FILE", help="the model's file (JSON)")
    made.add_argument("--version", default="", help="the model's version (default: a digest of its tables)")


def _checking(commands: Commands, common: argparse.ArgumentParser) -> None:
    check = _add(commands, common, "check-config", calls.check_config, "list every fault of the configuration")
    check.add_argument("file", nargs="?", type=Path, metavar="FILE", help="the file (default: as for every command)")
    check.add_argument("--show", action="store_true", help="print the configuration in effect, without secrets")
    journal = _group(commands, "journal", "check, repair or print the journal")
    for name, text in (
        ("verify", "check every record; nothing is changed"),
        ("repair", "mend what opening would mend, and say what truncating would lose"),
        ("dump", "print the records, one JSON object a line"),
    ):
        made = _add(journal, common, name, calls.journal, text)
        made.set_defaults(what=name)
        if name == "repair":
            made.add_argument("--truncate", action="store_true", help="cut after the last good record; copies are kept")
        if name == "dump":
            made.add_argument("--after", type=_count, default=0, metavar="SEQ", help="only records after this one")


def _catalogues(commands: Commands, common: argparse.ArgumentParser) -> None:
    packs = _group(commands, "packs", "rule packs: the causes that are known")
    _add(packs, common, "list", calls.packs, "list the causes").set_defaults(what="list")
    made = _add(packs, common, "show", calls.packs, "show a pack, or a cause with its evidence, rules and proposals")
    made.add_argument("name", help="a pack's or a cause's name")
    made.set_defaults(what="show")
    _add(packs, common, "schema", calls.packs, "print the JSON Schema of a pack").set_defaults(what="schema")
    for name, text in (
        ("lint", "list every fault of the packs"),
        ("test", "lint, then diagnose the golden incidents and compare with what is expected"),
    ):
        made = _add(packs, common, name, calls.packs, text)
        made.add_argument("dirs", nargs="*", type=Path, metavar="DIR", help="instead of the configured directories")
        made.set_defaults(what=name)
    actions = _group(commands, "actions", "actions: what can be done")
    _add(actions, common, "list", calls.actions, "list the actions").set_defaults(what="list")
    _add(actions, common, "schema", calls.actions, "print the JSON Schema of a file of actions").set_defaults(
        what="schema"
    )
    show = _add(actions, common, "show", calls.actions, "show one action")
    lint = _add(actions, common, "lint", calls.actions, "list every fault of the actions")
    lint.add_argument("dirs", nargs="*", type=Path, metavar="DIR", help="instead of the configured directories")
    dry = _add(actions, common, "dry-run", calls.actions, "print what an action would execute; only its look-ups run")
    dry.add_argument("--service", required=True, help="the service it would act on")
    dry.add_argument("--param", action="append", default=[], metavar="NAME=VALUE", help="a parameter (repeatable)")
    for made, name in ((show, "show"), (lint, "lint"), (dry, "dry-run")):
        made.set_defaults(what=name)
    for made in (show, dry):
        made.add_argument("name", help="the action's name, or its family's")


def _sandboxing(commands: Commands, common: argparse.ArgumentParser) -> None:
    group = _group(commands, "sandbox", "the sandbox of this host, and steps on other hosts")
    probe = _add(group, common, "probe", calls.sandbox, "say what holds steps here, and what is missing")
    probe.add_argument("--parent", default="", metavar="DIR", help="cgroup directory to make leaves in")
    run = _add(group, common, "run", calls.sandbox, "run one command; without one, take a request from standard input")
    run.add_argument("--limits", default="{}", metavar="JSON", help="limits, where not the defaults")
    run.add_argument("--needs", default="{}", metavar="JSON", help="what it needs of the host (default: all)")
    run.add_argument("--user", default="", help="user to run it as")
    run.add_argument("argv", nargs="*", metavar="ARG", help="the command, behind --")
    on = _add(group, common, "on", calls.sandbox, "run one command on configured hosts, in batches, until one fails")
    on.add_argument("--batch", type=_count, default=1, help="hosts at once")
    on.add_argument("--host", action="append", required=True, dest="hosts", help="a host of the configuration")
    on.add_argument("argv", nargs="+", metavar="ARG", help="the command, behind --")
    for made, name in ((probe, "probe"), (run, "run"), (on, "on")):
        made.set_defaults(what=name)


def _exploring(commands: Commands, common: argparse.ArgumentParser) -> None:
    metrics = _group(commands, "metrics", "explore the Prometheus behind it (needs alertmedic[explore])")
    names = _add(metrics, common, "names", calls.metrics, "names of metrics")
    names.add_argument("pattern", nargs="?", default="", metavar="TEXT", help="only names that contain it")
    labels = _add(metrics, common, "labels", calls.metrics, "labels of a metric and their values")
    labels.add_argument("metric", help="the metric's name")
    samples = _add(metrics, common, "samples", calls.metrics, "newest samples of a query")
    samples.add_argument("query", metavar="PROMQL", help="an instant query")
    for made, name in ((names, "names"), (labels, "labels"), (samples, "samples")):
        made.add_argument("--url", default="", help="the server, instead of the configured one")
        made.add_argument("--limit", type=_count, default=0, help="at most so many")
        made.set_defaults(what=name)


def _breaking(commands: Commands, common: argparse.ArgumentParser) -> None:
    chaos = _group(commands, "chaos", "break the demo's shop on purpose and measure who heals it how fast")
    listed = _add(chaos, common, "list", calls.chaos, "list the scenarios")
    run = _add(chaos, common, "run", calls.chaos, "run scenarios; interrupted, the same command goes on")
    report = _add(chaos, common, "report", calls.chaos, "say what the runs showed, and write the page")
    run.add_argument("names", nargs="*", metavar="SCENARIO", help="only these")
    run.add_argument("--quick", action="store_true", help="only the scenarios marked quick")
    run.add_argument(
        "--arms", default="auto", help="nothing, liveness, command, auto, approve; by commas (default: auto)"
    )
    run.add_argument("--repetitions", type=_count, default=1)
    run.add_argument("--seed", type=_count, default=1)
    run.add_argument("--share", type=_count, default=1, help="so many scenarios share a world (default: 1)")
    run.add_argument("--worlds", type=_count, default=1, help="so many worlds at once (default: 1)")
    run.add_argument("--record", type=Path, default=None, metavar="DIR", help="keep incidents as recordings in it")
    run.add_argument(
        "--kill-agent",
        action="store_true",
        help="kill -9 the agent at a random moment of each run (healable scenarios)",
    )
    report.add_argument(
        "--out", type=Path, default=None, metavar="DIR", help="keep page, summary and packed runs there"
    )
    run.add_argument("--keep", action="store_true", help="keep the worlds' directories")
    for made in (listed, run):
        made.add_argument("--file", action="append", default=[], type=Path, help="scenarios of your own (repeatable)")
        made.add_argument("--workload", type=Path, default=None, metavar="FILE", help="break a workload of your own")
    for made in (run, report):
        made.add_argument("--results", type=Path, default=None, metavar="FILE", help="default: build/chaos/runs.jsonl")
    for made, name in ((listed, "list"), (run, "run"), (report, "report")):
        made.set_defaults(what=name)


def _time(text: str) -> float:
    from agent.alerts import parse_time

    try:
        return float(text) if text.replace(".", "", 1).isdigit() else parse_time(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number")
    return int(text)
