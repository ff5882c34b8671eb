"""Reads rule packs, the shipped ones and those of the configuration's directories, and the learned model. Called once
at start and by `check-config`; what they mean is decided in `rules.packs` and `rules.learn`, which read no files."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
import yaml

from rules.learn import LearnedModel, ModelError, applied, parse_model
from rules.packs import Fault, Pack, PackError, PackSet, parse_pack, parse_rest

MAX_PACK_BYTES = 1 << 20
MAX_MODEL_BYTES = 16 << 20
SHIPPED_MODEL = "rules/model.json"
MAX_DEPTH = 20


class _Loader(yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader):  # type: ignore[misc]
    """Safe YAML that refuses a key given twice instead of keeping the last."""


def _mapping(loader: Any, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[str, int] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key.value!r} comes twice (first in line {seen[key.value]})", key.start_mark
                )
            seen[key.value] = key.start_mark.line + 1
    loader.flatten_mapping(node)
    return {loader.construct_object(k, deep=True): loader.construct_object(v, deep=True) for k, v in node.value}


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def load_packs(dirs: Iterable[Path] = (), disable: Collection[str] = (), model: Path | None = None) -> PackSet:
    """The shipped packs and every `*.yaml` of `dirs`, with the tables that were learned: by the shipped model, or by
    the file `model`. A pack named in `disable` asks nothing and proposes nothing; its words (signals and groups) stay
    known, since causes of other packs may mention them as contra-evidence.

    Raises PackError with all faults of all files, each with file, line and key; OSError if a directory cannot be read.
    """
    packs = load_bare_packs(dirs, disable)
    where = SHIPPED_MODEL if model is None else str(model)
    try:
        return applied(packs, read_model(model), where)
    except ModelError as error:
        raise PackError(where, [Fault((), str(error).removeprefix(f"{where}: "))]) from error


def read_model(path: Path | None = None) -> LearnedModel:
    """The shipped model, or that of a file. Raises ModelError for one that is broken, OSError."""
    if path is None:
        return parse_model(resources.files("rules").joinpath("model.json").read_bytes(), SHIPPED_MODEL)
    if path.stat().st_size > MAX_MODEL_BYTES:
        raise ModelError(f"{path}: larger than {MAX_MODEL_BYTES} bytes")
    return parse_model(path.read_bytes(), str(path))


def load_bare_packs(dirs: Iterable[Path] = (), disable: Collection[str] = ()) -> PackSet:
    """The packs with the tables that their authors wrote, as `load_packs` reads them: what is learned from."""
    packs: list[Pack] = []
    faults: list[Fault] = []
    shipped, given = shipped_texts(), texts_in(dirs)
    for where, text in (*shipped, *given):
        try:
            # The shape of what is shipped is checked by the tests, not at every start.
            pack = read_pack(text, where, checked=(where, text) in shipped)
        except PackError as error:
            faults += [msgspec.structs.replace(f, path=(error.where, *f.path)) for f in error.faults]
            continue
        disabled = pack.pack in disable
        packs.append(msgspec.structs.replace(pack, alerts={}, queries={}, causes={}, rules={}) if disabled else pack)
    unknown = sorted(set(disable) - {p.pack for p in packs})
    faults += [Fault(("disable", name), "there is no such pack") for name in unknown]
    if faults:
        raise PackError("packs", faults)
    return PackSet.of(_without_disabled(packs) if disable else packs)


def _without_disabled(packs: list[Pack]) -> list[Pack]:
    """Alerts no longer name causes that went with their pack; an alert that names no other is not known any more."""
    left = {cause for pack in packs for cause in pack.causes}
    found = []
    for pack in packs:
        kept = {
            name: msgspec.structs.replace(entry, causes=causes)
            for name, entry in pack.alerts.items()
            if (causes := tuple(c for c in entry.causes if c in left))
        }
        found.append(msgspec.structs.replace(pack, alerts=kept))
    return found


def shipped_texts() -> list[tuple[str, str]]:
    """(name, YAML) of the packs that come with AlertMedic."""
    return [
        (f"rules/packs/{entry.name}", entry.read_text("utf-8"))
        for entry in sorted(resources.files("rules").joinpath("packs").iterdir(), key=lambda e: e.name)
        if entry.name.endswith(".yaml")
    ]


def texts_in(dirs: Iterable[Path]) -> list[tuple[str, str]]:
    """(path, YAML) of every `*.yaml` of the directories. Raises PackError for a file that is too large or no text,
    OSError."""
    found: list[tuple[str, str]] = []
    for directory in dirs:
        for path in sorted(directory.iterdir()):
            if path.suffix == ".yaml":
                if path.stat().st_size > MAX_PACK_BYTES:
                    raise PackError(str(path), [Fault((str(path),), f"larger than {MAX_PACK_BYTES} bytes")])
                try:
                    found.append((str(path), path.read_text("utf-8")))
                except UnicodeDecodeError as error:
                    raise PackError(str(path), [Fault((str(path),), f"no UTF-8 text: {error.reason}")]) from None
    return found


def read_pack(text: str, where: str, *, checked: bool = False) -> Pack:
    """One pack from YAML text. Raises PackError whose faults carry line numbers. `checked`: its shape is known to be
    fine (no aliases, no deep nesting)."""
    try:
        if not checked:
            _check_shape(text, where)
        data = yaml.load(text, Loader=_Loader)  # noqa: S506 -- derives from SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = f"no valid YAML: {getattr(error, 'problem', None) or error}"
        raise PackError(where, [Fault((), reason, mark.line + 1 if mark is not None else 0)]) from None
    try:
        return parse_pack(data, where)
    except PackError as error:
        lines = lines_of(text)
        located = [msgspec.structs.replace(f, line=line_at(lines, f.path)) for f in error.faults]
        raise PackError(where, located) from None


def read_rest(text: str, where: str) -> tuple[Pack, dict[str, frozenset[str]]] | None:
    """What `rules.packs.parse_rest` makes of a text that `read_pack` refused; None if it is no YAML of ours at all."""
    try:
        _check_shape(text, where)
        return parse_rest(yaml.load(text, Loader=_Loader), where)  # noqa: S506 -- derives from SafeLoader
    except (yaml.YAMLError, PackError):
        return None


def _check_shape(text: str, where: str) -> None:
    """Refuses aliases, which could make a small file huge or endless, and nesting that no pack needs."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        line = event.start_mark.line + 1 if event.start_mark is not None else 1
        if isinstance(event, yaml.AliasEvent):
            raise PackError(where, [Fault((), f"aliases (*{event.anchor}) are not allowed in packs", line)])
        if depth > MAX_DEPTH:
            raise PackError(where, [Fault((), f"nested deeper than {MAX_DEPTH}", line)])


def lines_of(text: str) -> dict[tuple[str | int, ...], int]:
    """Line of every key path of a pack that is valid YAML."""
    return _lines(yaml.compose(text, Loader=_Loader), ())


def _lines(node: yaml.Node | None, path: tuple[str | int, ...]) -> dict[tuple[str | int, ...], int]:
    if node is None:
        return {path: 1}
    found = {path: node.start_mark.line + 1}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*path, str(getattr(key, "value", "")))
            found.update(_lines(value, inner))
            found[inner] = key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            found.update(_lines(value, (*path, i)))
    return found


def line_at(lines: dict[tuple[str | int, ...], int], path: tuple[str | int, ...]) -> int:
    """The line of a path, or of the nearest key above it."""
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path, 1)
