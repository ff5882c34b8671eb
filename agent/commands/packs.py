"""`packs`: what the rule packs know, whether they are in order, and whether they still find what they found.

Called by `agent.cli`. Prints; what is wrong with a pack says `agent.lint`, what became of a golden incident
`agent.golden`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from agent.commands.output import CommandError, Exit, emit_json, say, table

if TYPE_CHECKING:
    from agent.config import Config
    from agent.golden import Outcome
    from agent.lint import LintFault
    from rules.packs import Cause, PackSet

INDENT = "  "


def load(config: Config) -> PackSet:
    """Raises CommandError whose text has one fault a line."""
    from agent.packs import load_packs
    from rules.packs import PackError

    try:
        return load_packs(config.packs.dirs, config.packs.disable, config.packs.model)
    except PackError as error:
        raise CommandError("\n".join(map(str, error.faults)), "docs/packs.md") from error
    except OSError as error:
        raise CommandError(f"packs: {error}", "check packs.dirs") from error


def list_causes(config: Config, *, as_json: bool) -> Exit:
    """The causes that are known, with the pack they come from."""
    found = load(config)
    causes = [
        {"cause": name, "pack": pack.pack, "fault": cause.fault, "title": cause.title}
        for pack in found.packs
        for name, cause in pack.causes.items()
    ]
    if as_json:
        emit_json({"version": found.version, "causes": causes})
    else:
        rows = [("cause", "pack", "fault", "title")]
        rows += [(c["cause"], c["pack"], c["fault"], c["title"]) for c in causes]
        table(rows, empty="no packs")
    return Exit.OK


def show(config: Config, name: str, *, as_json: bool) -> Exit:
    """One cause: its evidence with what each state says, its rules and what it proposes; or one pack."""
    found = load(config)
    pack = next((p for p in found.packs if p.pack == name), None)
    if pack is not None:
        if as_json:
            emit_json(msgspec.to_builtins(pack))
            return Exit.OK
        say(f"{pack.pack} {pack.version}: {pack.description}")
        say(f"{len(pack.queries)} queries, {len(pack.signals)} signals, {len(pack.rules)} rules; causes:")
        for cause in pack.causes:
            say(f"{INDENT}{cause}: {pack.causes[cause].title}")
        return Exit.OK
    if name not in found.causes:
        raise CommandError(f"there is no pack and no cause {name!r}", "alertmedic packs list")
    cause_found, rules = found.causes[name], _rules_of(found, name)
    if as_json:
        emit_json({"id": name, "cause": msgspec.to_builtins(cause_found), "rules": rules})
        return Exit.OK
    _tell(name, cause_found, found, rules)
    return Exit.OK


def _rules_of(packs: PackSet, cause: str) -> dict[str, str]:
    return {n: r.title for n, r in packs.rules.items() if cause in (r.then.support, r.then.prune)}


def _tell(name: str, cause: Cause, packs: PackSet, rules: dict[str, str]) -> None:
    import math

    say(f"{name}: {cause.title} (fault {cause.fault}, at {', '.join(cause.kinds)}, prior {cause.prior:g})")
    for line in cause.evidence:
        need = ", defining" if line.column in cause.needs else ""
        said = ", ".join(f"{state} {math.log(p / q):+.2f}" for state, (p, q) in line.states.items())
        say(f"{INDENT}{line.column} ({packs.groups[line.group].title}{need}): {said}")
    for rule, title in rules.items():
        say(f"{INDENT}rule {rule}: {title}")
    for proposal in cause.proposals:
        where = f", where {proposal.configured} is configured" if proposal.configured else ""
        say(f"{INDENT}proposes {proposal.action}, at most {proposal.autonomy_cap}{where}")
    if not cause.proposals:
        say(f"{INDENT}no safe remedy{': ' if cause.no_remedy else ''}{cause.no_remedy}")
    if cause.runbook:
        say(f"{INDENT}runbook {cause.runbook}")


def schema() -> Exit:
    """The JSON Schema of a pack."""
    from rules.schema import pack_schema

    emit_json(pack_schema())
    return Exit.OK


def lint(config: Config, dirs: tuple[Path, ...], *, as_json: bool) -> Exit:
    """Every fault of the packs that the configuration names, or of those in the given directories and the shipped
    ones."""
    faults = _faults(config, dirs)
    if as_json:
        emit_json({"ok": not faults, "faults": _plain(faults)})
    else:
        for fault in faults:
            say(str(fault))
        if not faults:
            say("packs: in order")
    return Exit.FAULT if faults else Exit.OK


def test(config: Config, dirs: tuple[Path, ...], *, as_json: bool) -> Exit:
    """`lint`, and then the golden incidents: the shipped ones and those in `golden` of each directory of packs, their
    rules run by the configured engine."""
    from agent import golden
    from agent.engines import EngineError, engine_for

    given = _with(config, dirs)
    faults = _faults(config, dirs)
    outcomes: tuple[Outcome, ...] = ()
    if not faults:
        packs = load(given)
        try:
            with engine_for(config.packs.engine, packs) as engine:
                directories = [golden.shipped(), *(d / "golden" for d in given.packs.dirs)]
                outcomes = golden.judge_all(directories, packs, engine)
        except EngineError as error:
            raise CommandError(str(error), "set packs.engine: builtin") from error
    failed = [o for o in outcomes if o.fault]
    if as_json:
        golden_json = [{"name": o.name, "passed": not o.fault, "reason": o.fault} for o in outcomes]
        emit_json({"ok": not faults and not failed, "faults": _plain(faults), "golden": golden_json})
    else:
        _tell_test(faults, outcomes)
    return Exit.FAULT if faults or failed else Exit.OK


def _tell_test(faults: Sequence[LintFault], outcomes: Sequence[Outcome]) -> None:
    for fault in faults:
        say(str(fault))
    for outcome in outcomes:
        say(f"{'failed' if outcome.fault else 'passed'}  {outcome.name}{': ' if outcome.fault else ''}{outcome.fault}")
    if faults:
        say(f"{len(faults)} faults: the golden incidents were not run")
    else:
        say(f"packs: in order; {sum(not o.fault for o in outcomes)} of {len(outcomes)} golden incidents as expected")


def _faults(config: Config, dirs: tuple[Path, ...]) -> tuple[LintFault, ...]:
    from actions.catalog import CatalogError, load_catalog
    from agent.lint import lint as lint_packs

    given = _with(config, dirs)
    try:
        catalog = load_catalog(given.actions.dirs, given.actions.disable)
    except CatalogError as error:
        raise CommandError(str(error), "alertmedic actions lint") from error
    names = {d.name for d in catalog} | {d.family for d in catalog if d.family}
    return lint_packs(given.packs.dirs, given.packs.disable, names)


def _with(config: Config, dirs: tuple[Path, ...]) -> Config:
    """The configuration with these directories of packs, if there are any."""
    for path in dirs:
        if not path.is_dir():
            raise CommandError(f"packs: {path} is no directory", "name the directory that holds the packs")
    if not dirs:
        return config
    return msgspec.structs.replace(config, packs=msgspec.structs.replace(config.packs, dirs=dirs))


def _plain(faults: Sequence[LintFault]) -> list[dict[str, Any]]:
    return [{"file": f.file, "line": f.line, "key": f.key, "reason": f.reason} for f in faults]
