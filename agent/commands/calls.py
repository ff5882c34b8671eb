"""From a parsed command line to the function of `agent.commands` that does it: one a command, each with an exit code.

Called by `agent.cli`, which holds the grammar. Imports nothing heavy at the top: what a command needs is imported when
it runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from agent import __version__
from agent.commands.output import CommandError, Exit, emit_json, say

if TYPE_CHECKING:
    from agent.config import Config


def _options(arguments: argparse.Namespace) -> dict[str, str]:
    given = {"listen": getattr(arguments, "listen", None), "state_dir": arguments.state_dir}
    return {key: text for key, text in given.items() if text is not None}


def _config(arguments: argparse.Namespace) -> Config:
    from agent.config import load

    return load(arguments.config, options=_options(arguments))


def _state_dir(arguments: argparse.Namespace) -> Path:
    """Given on the command line it is taken as it stands: looking at a journal needs no sound configuration."""
    if arguments.state_dir is not None:
        return Path(arguments.state_dir).absolute()
    return _config(arguments).state_dir


def serve(arguments: argparse.Namespace) -> int:
    import asyncio

    config = _config(arguments)
    from agent import app
    from agent.config import ConfigError, placed

    try:
        return asyncio.run(app.serve(config))
    except ConfigError as error:  # of keys that were held against the catalogue
        raise ConfigError(placed(error.faults, arguments.config, options=_options(arguments))) from error


def version(arguments: argparse.Namespace) -> int:
    if arguments.json:
        emit_json({"version": __version__})
    else:
        say(f"alertmedic {__version__}")
    return Exit.OK


def incidents(arguments: argparse.Namespace) -> int:
    from agent.commands import look

    return look.incidents(
        _state_dir(arguments),
        arguments.id,
        as_json=arguments.json,
        states=tuple(arguments.state),
        tenant=arguments.tenant,
        limit=arguments.limit,
    )


def story(arguments: argparse.Namespace) -> int:
    from agent.commands import story

    return story.story(_state_dir(arguments), arguments.id, as_json=arguments.json, output=arguments.output)


def quarantine(arguments: argparse.Namespace) -> int:
    from agent.commands import look

    return look.quarantine(_state_dir(arguments), as_json=arguments.json)


def decide(arguments: argparse.Namespace) -> int:
    from agent.commands import decide

    return decide.decide(
        _state_dir(arguments),
        arguments.id,
        arguments.decision,
        digest=arguments.digest,
        note=arguments.note,
        as_json=arguments.json,
    )


def feedback(arguments: argparse.Namespace) -> int:
    from agent.commands import learned

    return learned.feedback(
        _config(arguments),
        _state_dir(arguments),
        arguments.id,
        arguments.cause,
        helped=arguments.helped,
        note=arguments.note,
        as_json=arguments.json,
    )


def change_add(arguments: argparse.Namespace) -> int:
    from agent.commands import changes

    return changes.add(
        _state_dir(arguments),
        arguments.service,
        arguments.kind,
        id=arguments.id,
        text=arguments.text,
        at=arguments.time,
        tenant=arguments.tenant,
        as_json=arguments.json,
    )


def change_list(arguments: argparse.Namespace) -> int:
    from agent.commands import changes

    return changes.list_changes(_state_dir(arguments), as_json=arguments.json)


def model(arguments: argparse.Namespace) -> int:
    from agent.commands import learned

    state_dir = _state_dir(arguments)
    if arguments.what == "use":
        return learned.use(state_dir, arguments.version, note=arguments.note, as_json=arguments.json)
    if arguments.what == "revert":
        return learned.revert(state_dir, note=arguments.note, as_json=arguments.json)
    return learned.list_models(state_dir, as_json=arguments.json)


def gateway_status(arguments: argparse.Namespace) -> int:
    from agent.commands.gateway import status

    return status(_state_dir(arguments), as_json=arguments.json)


def gateway_move(arguments: argparse.Namespace) -> int:
    from agent.commands.gateway import move

    return move(_state_dir(arguments), arguments.move, arguments.note, force=arguments.force, as_json=arguments.json)


def gateway_judge(arguments: argparse.Namespace) -> int:
    from agent.commands.gateway import judge

    return judge(_state_dir(arguments), arguments.trace, arguments.cause, arguments.service, as_json=arguments.json)


def pause(arguments: argparse.Namespace) -> int:
    from agent.commands import decide

    return decide.pause(_state_dir(arguments), paused=arguments.paused, note=arguments.note, as_json=arguments.json)


def breakers(arguments: argparse.Namespace) -> int:
    if arguments.reset:
        from agent.commands import decide

        if not arguments.key:
            raise CommandError("breakers reset: which one?", "alertmedic breakers reset KEY", Exit.USAGE)
        return decide.reset_breaker(_state_dir(arguments), arguments.key, note=arguments.note, as_json=arguments.json)
    from agent.commands import look

    return look.breakers(_state_dir(arguments), as_json=arguments.json)


def diagnose(arguments: argparse.Namespace) -> int:
    from agent.commands import diagnose

    if bool(arguments.alert) == bool(arguments.recordings):
        raise CommandError("diagnose: what?", "name recordings, or alerts by --alert FILE", Exit.USAGE)
    if arguments.alert:
        return diagnose.diagnose_alerts(
            _config(arguments),
            tuple(arguments.alert),
            arguments.prometheus,
            arguments.at,
            arguments.limit,
            as_json=arguments.json,
        )
    return diagnose.diagnose(_config(arguments), tuple(arguments.recordings), arguments.limit, as_json=arguments.json)


def record(arguments: argparse.Namespace) -> int:
    from agent.commands import record

    return record.record(
        _config(arguments),
        _state_dir(arguments),
        arguments.id,
        arguments.out,
        up_to_now=arguments.now,
        expect=arguments.expect,
        as_json=arguments.json,
    )


def evaluate(arguments: argparse.Namespace) -> int:
    from agent.commands import diagnose

    return diagnose.evaluate(
        _config(arguments),
        tuple(arguments.dirs),
        as_json=arguments.json,
        misses=arguments.misses,
        cross=arguments.cross,
        unlicensed=tuple(arguments.unlicensed),
    )


def learn(arguments: argparse.Namespace) -> int:
    from agent.commands import learn

    return learn.learn(
        _config(arguments), tuple(arguments.dirs), arguments.output, arguments.version, as_json=arguments.json
    )


def check_config(arguments: argparse.Namespace) -> int:
    from agent.commands import check

    file = arguments.file or arguments.config
    return check.check_config(file, _options(arguments), as_json=arguments.json, show=arguments.show)


def journal(arguments: argparse.Namespace) -> int:
    from agent.commands import journal

    state_dir = _state_dir(arguments)
    if arguments.what == "dump":
        return journal.dump(state_dir, after=arguments.after)
    if arguments.what == "repair":
        return journal.repair(state_dir, truncate=arguments.truncate, as_json=arguments.json)
    return journal.verify(state_dir, as_json=arguments.json)


def packs(arguments: argparse.Namespace) -> int:
    from agent.commands import packs

    if arguments.what == "schema":
        return packs.schema()
    config = _config(arguments)
    if arguments.what == "list":
        return packs.list_causes(config, as_json=arguments.json)
    if arguments.what == "show":
        return packs.show(config, arguments.name, as_json=arguments.json)
    run = packs.test if arguments.what == "test" else packs.lint
    return run(config, tuple(arguments.dirs), as_json=arguments.json)


def actions(arguments: argparse.Namespace) -> int:
    from agent.commands import catalogue

    if arguments.what == "schema":
        return catalogue.schema()
    config = _config(arguments)
    if arguments.what == "list":
        return catalogue.list_actions(config, as_json=arguments.json)
    if arguments.what == "show":
        return catalogue.show(config, arguments.name, as_json=arguments.json)
    if arguments.what == "lint":
        return catalogue.lint(config, tuple(arguments.dirs), as_json=arguments.json)
    return catalogue.dry_run(config, arguments.name, arguments.service, tuple(arguments.param), as_json=arguments.json)


def chaos(arguments: argparse.Namespace) -> int:
    from agent.commands import chaos

    if arguments.what == "list":
        return chaos.listing(tuple(arguments.file), arguments.workload, as_json=arguments.json)
    results = arguments.results or chaos.RESULTS
    if arguments.what == "report":
        return chaos.report(results, as_json=arguments.json, out=arguments.out)
    wanted = chaos.Wanted(
        arms=tuple(name.strip() for name in arguments.arms.split(",") if name.strip()),
        results=results,
        repetitions=arguments.repetitions,
        seed=arguments.seed,
        share=arguments.share,
        worlds=arguments.worlds,
        kill_agent=arguments.kill_agent,
        keep=arguments.keep,
        record=arguments.record,
        workload=arguments.workload,
    )
    scenarios = chaos.load(
        tuple(arguments.file), tuple(arguments.names), quick=arguments.quick, workload=arguments.workload
    )
    return chaos.run(scenarios, wanted, named=bool(arguments.names), as_json=arguments.json)


def sandbox(arguments: argparse.Namespace) -> int:
    from agent.commands import sandboxed

    if arguments.what == "probe":
        return sandboxed.probe(arguments.parent, as_json=arguments.json)
    if arguments.what == "on":
        return sandboxed.run_there(_config(arguments), arguments.hosts, arguments.argv, arguments.batch)
    if arguments.argv:
        return sandboxed.run_here(arguments.argv, arguments.limits, arguments.needs, arguments.user)
    return sandboxed.serve_request()


def metrics(arguments: argparse.Namespace) -> int:
    from agent.commands import explore

    config = _config(arguments)
    if arguments.what == "names":
        return explore.names(config, arguments.url, arguments.pattern, arguments.limit, as_json=arguments.json)
    if arguments.what == "labels":
        return explore.labels(config, arguments.url, arguments.metric, arguments.limit, as_json=arguments.json)
    return explore.samples(config, arguments.url, arguments.query, arguments.limit, as_json=arguments.json)
