"""`check-config`: is what people wrote in order?

Lists every fault it finds, and ends with 1 if there is one.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.commands.output import Exit, emit_json, say
from agent.config import Config, ConfigError, Fault, load, placed
from agent.config_checks import unknown_inventory
from agent.strict_kinds import Secret

if TYPE_CHECKING:
    from actions.catalog import Catalog


def check_config(file: Path | None, options: Mapping[str, str], *, as_json: bool, show: bool) -> Exit:
    """Every fault of the configuration, and of the packs, actions and service graph that it names."""
    faults: list[dict[str, Any]] = []
    lines: list[str] = []
    config: Config | None = None
    try:
        config = load(file, options=options)
    except ConfigError as error:
        faults += [dataclasses.asdict(f) for f in error.faults]
        lines += [str(f) for f in error.faults]
    if config is not None:
        named, keys = _faults_of_what_is_named(config)
        named += placed(keys, file, options=options)
        lines += map(str, named)
        faults += [dataclasses.asdict(f) for f in named]
    effective = effective_config(config) if config is not None and show else None
    if as_json:
        answer: dict[str, Any] = {"ok": not faults, "faults": faults}
        emit_json(answer if effective is None else answer | {"config": effective})
    else:
        for line in lines:
            say(line)
        if effective is not None:
            import yaml

            sys.stdout.write(yaml.safe_dump(effective, sort_keys=False, allow_unicode=False))
        elif not lines:
            say(f"{file or 'the defaults'}: in order")
    return Exit.FAULT if faults else Exit.OK


def effective_config(config: Config) -> dict[str, Any]:
    """The configuration as plain values. A secret shows as the path of its file."""
    import msgspec

    def plain(value: Any) -> str:
        if isinstance(value, Secret):
            return str(value.path)
        if isinstance(value, Path):
            return str(value)
        raise NotImplementedError(f"configuration: cannot show a {type(value).__name__}")

    shown: dict[str, Any] = msgspec.to_builtins(config, enc_hook=plain)
    for entry in shown["inventory"].values():
        entry |= entry.pop("more")  # as it is written
    return shown


def _faults_of_what_is_named(config: Config) -> tuple[list[Fault], list[Fault]]:
    """Faults of other files; and those of the configuration's own keys that only show beside these, not placed yet."""
    from actions.catalog import CatalogError, load_catalog
    from agent.packs import load_packs
    from agent.topology import TopologyError, load_topology
    from rules.packs import PackError

    faults: list[Fault] = []
    keys: list[Fault] = []
    try:
        load_packs(config.packs.dirs, config.packs.disable)
    except PackError as error:
        faults += [Fault("packs", 0, "", str(fault)) for fault in error.faults]
    except OSError as error:
        faults.append(Fault("packs", 0, "", f"packs: {error}", "check packs.dirs"))
    try:
        keys += _unusable_inventory(config, load_catalog(config.actions.dirs, config.actions.disable))
        keys += unknown_inventory(config, load_catalog(config.actions.dirs))
    except CatalogError as error:
        faults += [Fault("actions", 0, "", str(fault)) for fault in error.faults]
    try:
        load_topology(config)
    except TopologyError as error:
        faults += error.faults
    return faults, keys


def _unusable_inventory(config: Config, catalog: Catalog) -> list[Fault]:
    """What an action would refuse on the day it is needed: its pattern is narrower than the configuration's."""
    from actions.parameters import ParameterError

    faults: dict[str, Fault] = {}
    for service, entry in config.inventory_strings.items():
        for definition in catalog:
            for parameter in definition.parameters.values():
                text = entry.get(parameter.source_key, "") if parameter.origin == "inventory" else ""
                key = f"inventory.{service}.{parameter.source_key}"
                try:
                    if text:
                        parameter.check(text)
                except ParameterError as error:
                    faults.setdefault(key, Fault("inventory", 0, key, f"{definition.name} cannot take it", str(error)))
    return list(faults.values())
