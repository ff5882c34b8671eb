"""`learn`: likelihoods from recorded incidents whose cause is known, as a file that the service can use.

Called by `agent.cli`. What is learned and how it is checked is in `agent.learn`; this prints and writes.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from agent.commands.output import CommandError, Exit, emit_json, say
from agent.log import printable

if TYPE_CHECKING:
    from agent.config import Config
    from rules.learn import LearnedModel


def learn(config: Config, directories: tuple[Path, ...], output: Path, version: str, *, as_json: bool) -> Exit:
    """Learns from every recording under the directories and writes the model to `output`."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from agent.evaluate import Case, find_cases
    from agent.learn import LearnError
    from agent.learn import learn as learn_from
    from agent.packs import load_bare_packs
    from agent.sources.recorded import RecordingError

    packs = load_bare_packs(config.packs.dirs, config.packs.disable)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    try:
        cases = find_cases(directories)
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("counting", total=len(cases))

            def advance(case: Case) -> None:
                bar.update(task, advance=1, description=printable(case.set))

            model = learn_from(cases, packs, version, advance)
    except (RecordingError, LearnError) as error:
        raise CommandError(str(error), "learn needs directories of recordings, each with truth.json") from error
    model = model if version else msgspec.structs.replace(model, version=digest(model))
    try:
        output.write_bytes(msgspec.json.format(msgspec.json.encode(model), indent=1) + b"\n")
    except OSError as error:
        raise CommandError(f"learn: {output}: {error.strerror or error}", "choose another --output") from error
    if as_json:
        emit_json({"output": str(output), "version": model.version, "causes": sorted(model.causes)})
    else:
        told = f"{model.incidents} recordings ({model.fault_free} without a fault)"
        say(f"{len(model.causes)} causes learned from {told}")
        say(f"{output}: model {model.version}; packs.model of the configuration makes the service use it")
    return Exit.OK


def digest(model: LearnedModel) -> str:
    """A version that says which tables these are."""
    return hashlib.sha256(msgspec.json.encode(model.causes, order="sorted")).hexdigest()[:12]
