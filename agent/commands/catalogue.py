"""`actions`: what can be done, whether the definitions are sound, and what one of them would execute.

`dry-run` goes the guard's own way from parameters to the exact argv, look-ups included (they are read-only, and run in
the sandbox), and stops there: it never executes the action, its check or its undo.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.commands.output import CommandError, Exit, emit_json, say, table

if TYPE_CHECKING:
    from actions.catalog import ActionDefinition, Catalog
    from actions.model import Declined, Step
    from agent.config import Config
    from rules.model import ParamValue
    from sandbox.model import Limits, Needs, RunResult


def _catalog(config: Config) -> Catalog:
    from actions.catalog import load_catalog

    return load_catalog(config.actions.dirs, config.actions.disable)


def _variants(catalog: Catalog, name: str) -> tuple[ActionDefinition, ...]:
    found = catalog.get(name)
    variants = (found,) if found is not None else catalog.variants(name)
    if not variants:
        raise CommandError(f"no action {name!r}", "alertmedic actions list")
    return variants


def list_actions(config: Config, *, as_json: bool) -> Exit:
    """Every action, and for which services of the inventory it has all it needs."""
    rows = [("action", "undo", "risk", "services", "description")]
    listed: list[dict[str, Any]] = []
    for definition in _catalog(config):
        usable = [s for s, entry in config.inventory_with().items() if not definition.missing_inventory(entry)]
        entry = {
            "name": definition.name,
            "family": definition.family,
            "version": definition.version,
            "description": definition.description,
            "read_only": definition.read_only,
            "undo": bool(definition.undo),
            "auto": definition.risk.auto,
            "services": usable,
        }
        listed.append(entry)
        undo = "nothing to undo" if definition.read_only else "yes" if definition.undo else "none"
        auto = "may be automatic" if definition.risk.auto == "allowed" else "never automatic"
        rows.append((definition.name, undo, auto, ", ".join(usable), definition.description))
    if as_json:
        emit_json({"actions": listed})
    else:
        table(rows, empty="no actions")
    return Exit.OK


def show(config: Config, name: str, *, as_json: bool) -> Exit:
    """The whole definition of an action, or of every variant of a family."""
    import msgspec

    shown = [msgspec.to_builtins(d) for d in _variants(_catalog(config), name)]
    if as_json:
        emit_json({"actions": shown})
        return Exit.OK
    import yaml

    for definition in shown:
        say(yaml.safe_dump(definition, sort_keys=False, allow_unicode=False), lines=True)
    return Exit.OK


def lint(config: Config, dirs: tuple[Path, ...], *, as_json: bool) -> Exit:
    """Every fault of the shipped actions and of `dirs` (none: the configured directories)."""
    from actions.catalog import CatalogError, load_catalog

    faults: tuple[str, ...] = ()
    for path in dirs:
        if not path.is_dir():
            raise CommandError(f"actions lint: {path} is no directory", "name the directory that holds the actions")
    try:
        catalog = load_catalog(dirs or config.actions.dirs)
        faults = (*_bad_queries(catalog), *_hidden_programs(catalog))
    except CatalogError as error:
        faults = tuple(error.faults)
    if as_json:
        emit_json({"ok": not faults, "faults": list(faults)})
    else:
        for fault in faults or ("actions: in order",):
            say(fault)
    return Exit.FAULT if faults else Exit.OK


def _bad_queries(catalog: Catalog) -> Iterator[str]:
    """Queries that are no PromQL once a service is filled in."""
    import promql_parser

    from agent.sources.promql import TemplateError, render

    for definition in catalog:
        if definition.verify_query:
            try:
                promql_parser.parse(render(definition.verify_query, "service", ["a", "b"], "1m"))
            except (TemplateError, ValueError) as error:
                yield f"{definition.source}.verify_query: {' '.join(str(error).split())}"


def _hidden_programs(catalog: Catalog) -> Iterator[str]:
    """Files that the steps of an action would not find, since what it needs gets it directories of its own there."""
    from sandbox.model import Needs

    for definition in catalog:
        hidden = [] if definition.needs == Needs() else ["/tmp/"]  # noqa: S108 - not used, only named
        hidden += ["/run/"] if definition.needs.network == "none" else []
        shown = tuple(f"{path.rstrip('/')}/" for path in definition.needs.write)
        for key in ("argv", "check", "undo", "resolve", "dry_run"):
            for word in getattr(definition, key) or ():
                if word.startswith(tuple(hidden)) and not f"{word}/".startswith(shown):
                    yield f"{definition.source}.{key}: a step with these `needs` does not see {word}: put it elsewhere"


def schema() -> Exit:
    """The JSON Schema of a file of actions (docs/schemas/actions.schema.json)."""
    from actions.schema import actions_schema

    emit_json(actions_schema())
    return Exit.OK


def dry_run(config: Config, name: str, service: str, given: tuple[str, ...], *, as_json: bool) -> Exit:
    """The exact steps that the action would consist of now, with these parameters, what its look-up notes about each
    target, and what its own `dry_run` command says of each, where it has one."""
    from actions.model import Declined

    found = asyncio.run(_steps(config, name, service, _params(given)))
    if isinstance(found, Declined):
        detail = f": {found.detail}" if found.detail else ""
        raise CommandError(f"{found.action or name} on {service}: {found.reason.value}{detail}", "nothing was executed")
    steps, notes = found
    said = asyncio.run(_tried(config, steps))
    if as_json:
        import msgspec

        emit_json({"steps": [msgspec.to_builtins(s) for s in steps], "notes": notes, "dry_run": said})
        return Exit.OK
    for step, note, words in zip(steps, notes, said, strict=True):
        say(f"{step.action} on {step.target}" + (f" at {step.host}" if step.host else ""))
        say(f"  run    {shlex.join(step.argv)}")
        say(f"  check  {shlex.join(step.check) if step.check else 'none'}")
        say(f"  undo   {shlex.join(step.undo) if step.undo else 'none'}")
        if note:
            say(f"  note   {note}")
        if words is not None:
            say(f"  says   {words}")
    say("nothing was executed")
    return Exit.OK


async def _steps(
    config: Config, name: str, service: str, params: Mapping[str, ParamValue]
) -> tuple[tuple[Step, ...], tuple[str, ...]] | Declined:
    """The steps, and for each what the look-up of its target noted ("" for nothing)."""
    from actions.gates import GuardContext
    from actions.guard import early_values, host_of, make_step, resolve_targets
    from actions.model import Declined
    from rules.model import Proposal
    from sandbox import current

    inventory = config.inventory_with((service,))
    definition = _catalog(config).choose(name, inventory.get(service))
    if isinstance(definition, Declined):
        return definition
    if unknown := sorted(params.keys() - definition.parameters.keys()):
        takes = ", ".join(p.name for p in definition.parameters.values() if p.origin == "proposal") or "none"
        raise CommandError(
            f"{definition.name} has no parameter {', '.join(unknown)}", f"from a proposal it takes: {takes}"
        )
    context = GuardContext(
        now=time.time(),
        incident="inc-dryrun",
        cause="",
        posterior=0.0,
        margin=0.0,
        firing=False,
        evidence_at=0.0,
        policy=config.guard_policy,
        inventory=inventory,
        enforced_by=current().enforced_by,
        remote_hosts=frozenset(config.hosts),
    )
    host = host_of(service, definition, context)
    values = early_values(Proposal(action=name, service=service, params=dict(params)), definition, context)
    if isinstance(values, Declined):
        return values
    secrets = {s.name: os.environ[s.name] for s in definition.environment if s.name in os.environ}
    targets = await resolve_targets(definition, values, _read_only(config, host), secrets)
    if isinstance(targets, Declined):
        return targets
    steps: list[Step] = []
    for target in targets:
        step = make_step(definition, values, target, host)
        if isinstance(step, Declined):
            return step
        steps.append(step)
    return tuple(steps), tuple(target.note for target in targets)


async def _tried(config: Config, steps: tuple[Step, ...]) -> list[str | None]:
    """What the action's own dry run says of each step; None where it has none. Raises CommandError if it fails."""
    from actions.guard import describe, rendered

    catalog = _catalog(config)
    said: list[str | None] = []
    for step in steps:
        definition = catalog.get(step.action)
        if definition is None or not definition.dry_run:
            said.append(None)
            continue
        secrets = {name: os.environ[name] for name in step.environment if name in os.environ}
        argv = rendered(definition.dry_run, step.params, definition)
        result = await _read_only(config, step.host)(argv, definition.limits, secrets, definition.needs)
        if not result.ok:
            raise CommandError(f"the dry run of {step.action} on {step.target}: {describe(result)}")
        said.append(" ".join(result.stdout.split()))
    return said


def _read_only(config: Config, host: str = "") -> Any:
    """Runs a look-up's argv in the sandbox, on the host where the action would run."""

    async def run(argv: tuple[str, ...], limits: Limits, environment: Mapping[str, str], needs: Needs) -> RunResult:
        from agent.remote import Executors

        settings = config.sandbox
        return await Executors(config.hosts).run(
            argv, limits, env=environment, user=settings.user, protection=settings.protection, needs=needs, host=host,
            redact=tuple(environment.values()),
        )  # fmt: skip

    return run


def _params(given: tuple[str, ...]) -> dict[str, ParamValue]:
    """`name=value`; a value that is a JSON number or boolean is one, anything else is text."""
    params: dict[str, ParamValue] = {}
    for item in given:
        name, equals, text = item.partition("=")
        if not equals or not name:
            raise CommandError(f"{item!r} is not NAME=VALUE", "write --param pid=12", Exit.USAGE)
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        params[name] = value if isinstance(value, str | int | float | bool) else text
    return params
