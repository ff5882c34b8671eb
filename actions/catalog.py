"""Actions as data: reads, checks and holds the definitions.

`agent.app` loads the catalogue at start, `agent.cli` lists it, `actions.guard` chooses from it. Definitions come from
the YAML files beside this module (`packs/*.yaml`) and from directories that the configuration names (YAML, and classes
in Python files, which are read but not executed: `actions.classes`). A file with any
fault is refused with all of its faults, each with the path of its key. Never runs anything.

The form of a definition is described in docs/actions.md.
"""

from __future__ import annotations

import importlib.resources
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec
import yaml

from actions.classes import definitions_of
from actions.model import Declined, ParamValue, Refusal
from actions.parameters import (
    ORIGINS,
    PARAM_TYPES,
    Origin,
    Parameter,
    ParameterError,
    collect,
    malformed,
    placeholders,
)
from sandbox.model import MIB, Limits, Needs

Where = Literal["host", "network"]
BlastRadius = Literal["none", "session", "process", "service", "host"]
Changes = Literal["nothing", "runtime", "persistent"]
SPECIALS = frozenset({"python"})
MAX_FILE_BYTES = MIB
QUERY_VARIABLES = frozenset({"scope", "service", "rate"})  # filled in, escaped, as in the queries of packs
_VARIABLE = re.compile(r"\$([a-zA-Z_][a-zA-Z0-9_]*)")
NAME = re.compile(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)*")
PARAM_NAME = re.compile(r"[a-z][a-z0-9_]*")
ENV_NAME = re.compile(r"[A-Z][A-Z0-9_]*")
USER = re.compile(r"[a-z_][a-z0-9_-]*")
SIZE = re.compile(r"([0-9]+)(B|KiB|MiB|GiB)?")
_UNITS = {None: 1, "B": 1, "KiB": 1024, "MiB": MIB, "GiB": 1024 * MIB}
SHELLS = frozenset(
    {"sh", "ash", "bash", "rbash", "dash", "zsh", "ksh", "mksh", "fish", "csh", "tcsh", "pwsh", "busybox"}
    | {"env", "eval", "ssh", "su", "watch", "script", "parallel"}
)


class CatalogError(ValueError):
    """Definitions that cannot be used. `faults`: every one of them, as `where.key: what is wrong`."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__(f"{len(faults)} fault(s) in action definitions:\n" + "\n".join(faults))
        self.faults = tuple(faults)


class Risk(msgspec.Struct, frozen=True, kw_only=True):
    """What can go wrong. `changes`: nothing, the running system, or data or configuration that a restart keeps.
    `acts_on`: the diagnosed cause itself, or something else that others share."""

    reversible: bool
    blast_radius: BlastRadius
    changes: Changes
    auto: Literal["allowed", "never"]
    acts_on: Literal["cause", "other"] = "cause"
    persons: Annotated[int, msgspec.Meta(ge=1, le=2)] = 1  # that must approve it, where a person must


class Secret(msgspec.Struct, frozen=True, kw_only=True):
    """An environment variable handed through to the action. Its value never enters an argv, a plan or the journal, and
    is taken out of captured output. `by`: `descriptor` puts it into a file in memory whose descriptor's number is in
    the variable NAME_FD, so that it stays out of the environment, too."""

    name: str
    required: bool = True
    by: Literal["environment", "descriptor"] = "environment"


class Precondition(msgspec.Struct, frozen=True, kw_only=True):
    """A read-only command that must end with 0 before a plan is made."""

    text: str
    argv: tuple[str, ...]


class ActionDefinition(msgspec.Struct, frozen=True, kw_only=True):
    """One action. argv templates hold `{parameter}` and `{python}` placeholders only."""

    name: str
    family: str
    version: int
    description: str
    where: Where  # `host`: acts on this machine's processes or files; `network`: through an address in the inventory
    parameters: dict[str, Parameter]
    target: str = ""  # identity, where there is no `resolve`
    resolve: tuple[str, ...] = ()
    max_targets: int = 1
    preconditions: tuple[Precondition, ...] = ()
    argv: tuple[str, ...]
    check: tuple[str, ...] = ()
    undo: tuple[str, ...] = ()  # empty: `undo: none`
    dry_run: tuple[str, ...] = ()  # a command that only says what would happen; empty: `dry_run: resolve`
    verify_query: str = ""  # PromQL that answers with something once it has helped, besides the series of the diagnosis
    verify: Literal["each", "last"] = "last"
    verify_seconds: float = 60.0
    idempotent: bool = False
    read_only: bool = False
    risk: Risk
    limits: Limits = Limits()
    environment: tuple[Secret, ...] = ()
    needs: Needs = Needs()
    user: str = ""
    source: str = ""

    def missing_inventory(self, entry: Mapping[str, str]) -> list[str]:
        """Keys that the service's inventory lacks for this action."""
        return [
            p.source_key
            for p in self.parameters.values()
            if p.origin == "inventory" and p.required and p.default is None and not entry.get(p.source_key)
        ]

    def values(self, given: Mapping[Origin, Mapping[str, object]]) -> dict[str, ParamValue] | Declined:
        """Checked values of the parameters whose origin is in `given`."""
        values, missing, faults = collect(self.parameters, given)
        if faults:
            return Declined(reason=Refusal.BAD_PARAMETERS, detail="; ".join(faults), action=self.name)
        if missing:
            what = f"without a value: {', '.join(missing)}"
            return Declined(reason=Refusal.BAD_PARAMETERS, detail=what, action=self.name)
        return values


class Catalog:
    """All definitions, by name and in the order in which variants of a family are tried."""

    def __init__(self, definitions: Sequence[ActionDefinition]) -> None:
        self._by_name = {d.name: d for d in definitions}

    def __iter__(self) -> Iterator[ActionDefinition]:
        return iter(self._by_name.values())

    def __len__(self) -> int:
        return len(self._by_name)

    def get(self, name: str) -> ActionDefinition | None:
        return self._by_name.get(name)

    def variants(self, family: str) -> tuple[ActionDefinition, ...]:
        return tuple(d for d in self if d.family == family)

    def choose(self, name: str, entry: Mapping[str, str] | None) -> ActionDefinition | Declined:
        """The action called `name`, or the first variant of the family `name` whose inventory is complete.

        `entry` is the service's inventory; None means that the inventory does not know the service, and then nothing
        may act on it.
        """
        exact = self.get(name)
        candidates = (exact,) if exact else self.variants(name)
        if not candidates:
            return Declined(reason=Refusal.UNKNOWN_ACTION, detail=f"no action or family is called {name}", action=name)
        if entry is None:
            what = "the inventory does not know this service: add it under `inventory`"
            return Declined(reason=Refusal.NO_INVENTORY, detail=what, action=name)
        for definition in candidates:
            if not definition.missing_inventory(entry):
                return definition
        lacks = "; ".join(f"{d.name} needs {', '.join(d.missing_inventory(entry))}" for d in candidates)
        return Declined(reason=Refusal.NO_INVENTORY, detail=f"the inventory is incomplete: {lacks}", action=name)


def load_catalog(dirs: Sequence[Path] = (), disable: Sequence[str] = ()) -> Catalog:
    """The shipped definitions and those of `dirs` (*.yaml, by name), without those whose name matches a `disable` glob.

    A definition of a later directory replaces one of the same name. Raises CatalogError with every fault of all files.
    """
    faults: list[str] = []
    found: dict[str, ActionDefinition] = {}
    for origin, files in _sources(dirs, faults):
        here: dict[str, ActionDefinition] = {}
        for name, text in files:
            read = _read_classes if name.endswith(".py") else _read
            for definition in read(text, f"{origin}{name}", faults):
                if definition.name in here:
                    first = here[definition.name].source
                    faults.append(f"{definition.source}.name: {definition.name} is defined in {first} too")
                here[definition.name] = definition
        found |= here
    for definition in found.values():
        if definition.name in {d.family for d in found.values() if d.family != d.name}:
            faults.append(f"{definition.source}.name: {definition.name} is the name of a family")
    if faults:
        raise CatalogError(faults)
    return Catalog([d for d in found.values() if not any(fnmatchcase(d.name, glob) for glob in disable)])


def parse_action(data: object, where: str) -> ActionDefinition:
    """A definition from plain data. Raises CatalogError with every fault, each beginning with `where` and the key."""
    faults: list[str] = []
    definition = _definition(data, where, faults)
    if faults or definition is None:
        raise CatalogError(faults)
    return definition


def _sources(dirs: Sequence[Path], faults: list[str]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    shipped = importlib.resources.files("actions") / "packs"
    files = sorted((f for f in shipped.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    yield "", [(f.name, f.read_text("utf-8")) for f in files]
    for directory in dirs:
        texts: list[tuple[str, str]] = []
        if not directory.is_dir():
            faults.append(f"{directory}: no such directory")
        for path in sorted([*directory.glob("*.yaml"), *directory.glob("*.py")]) if directory.is_dir() else []:
            try:
                body = path.read_bytes()
                if len(body) > MAX_FILE_BYTES:
                    faults.append(f"{path}: more than {MAX_FILE_BYTES} bytes")
                    continue
                texts.append((path.name, body.decode("utf-8")))
            except (OSError, UnicodeDecodeError) as error:
                faults.append(f"{path}: cannot be read: {error}")
        yield f"{directory}/", texts


_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_SafeLoader):  # type: ignore[misc]
    """Safe, and a key that is there twice is an error instead of the last one winning."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            text = str(key.value)
            if text in seen:
                raise yaml.constructor.ConstructorError(None, None, f'the key "{text}" is there twice', key.start_mark)
            seen.add(text)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def _read(text: str, name: str, faults: list[str]) -> list[ActionDefinition]:
    try:
        document = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, RecursionError) as error:
        faults.append(f"{name}: no valid YAML: {' '.join(str(error).split())}")
        return []
    if not isinstance(document, dict) or set(document) != {"actions"} or not isinstance(document["actions"], list):
        faults.append(f"{name}: expected one key, `actions`, with a list")
        return []
    found = []
    for i, data in enumerate(document["actions"]):
        definition = _definition(data, f"{name}: actions[{i}]", faults)
        if definition is not None:
            found.append(definition)
    return found


def _read_classes(text: str, name: str, faults: list[str]) -> list[ActionDefinition]:
    """Actions that are Python classes. The file is named by its absolute path in what runs."""
    found, wrong = definitions_of(text.encode(), Path(name).absolute())
    faults += wrong
    made = (_definition(data, f"{name}: {data.get('name', 'a class')}", faults) for data in found)
    return [definition for definition in made if definition is not None]


class _Keys:
    """Reads the keys of one mapping, notes what is wrong, and at the end notes what nobody asked for."""

    def __init__(self, data: object, where: str, faults: list[str]) -> None:
        self.where, self.faults = where, faults
        self.data: dict[str, Any] = {}
        if isinstance(data, dict) and all(isinstance(k, str) for k in data):
            self.data = dict(data)
        else:
            faults.append(f"{where}: expected a mapping")

    def fault(self, key: str, what: str) -> None:
        self.faults.append(f"{self.where}.{key}: {what}")

    def take(self, key: str, kind: type | tuple[type, ...], default: Any = ..., words: str = "") -> Any:
        """The value, or the default. Without a default the key is required; then a fault leaves None."""
        if key not in self.data:
            if default is ...:
                self.fault(key, "is absent")
                return None
            return default
        value = self.data.pop(key)
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            self.fault(key, f"expected {words or ' or '.join(k.__name__ for k in kinds)}, not {type(value).__name__}")
            return None if default is ... else default
        return value

    def text(self, key: str, default: Any = ..., pattern: re.Pattern[str] | None = None) -> str:
        value = self.take(key, str, default, "text")
        if isinstance(value, str) and pattern is not None and value != default and not pattern.fullmatch(value):
            self.fault(key, f'"{value}" does not match {pattern.pattern}')
        return value if isinstance(value, str) else ""

    def choice(self, key: str, allowed: Sequence[str], default: Any = ...) -> Any:
        value = self.take(key, str, default, "text")
        if isinstance(value, str) and value not in allowed:
            self.fault(key, f'"{value}" is none of {", ".join(allowed)}')
        return value

    def number(self, key: str, default: Any, low: float, high: float, *, whole: bool = False) -> Any:
        kinds = (int,) if whole else (int, float)
        value = self.take(key, kinds, default, "a whole number" if whole else "a number")
        if isinstance(value, (int, float)) and not low <= value <= high:
            self.fault(key, f"{value:g} is not within {low:g} to {high:g}")
            return default if default is not ... else low
        return value

    def flag(self, key: str, default: Any = ...) -> bool:
        return bool(self.take(key, bool, default, "true or false"))

    def items(self, key: str) -> list[Any]:
        value = self.take(key, list, [], "a list")
        return list(value)

    def argv(self, key: str, default: Any = ...) -> tuple[str, ...]:
        value = self.take(key, list, default, "a list of texts")
        if not value:
            if value == [] and key in ("argv", "resolve", "check", "dry_run"):
                self.fault(key, "is empty")
            return ()
        if not all(isinstance(v, str) and v for v in value):
            self.fault(key, "every element must be a text that is not empty (put numbers in quotes)")
            return ()
        _check_program(tuple(value), f"{self.where}.{key}", self.faults)
        return tuple(value)

    def done(self) -> None:
        for key in self.data:
            self.fault(key, "is no key that this place knows")


def _definition(data: object, where: str, faults: list[str]) -> ActionDefinition | None:
    before = len(faults)
    keys = _Keys(data, where, faults)
    name = keys.text("name", pattern=NAME)
    undo_given = keys.data.get("undo")
    if undo_given == "none":
        keys.data["undo"] = []
    if keys.data.get("dry_run") == "resolve":
        del keys.data["dry_run"]
    definition = ActionDefinition(
        name=name,
        family=keys.text("family", name, NAME),
        version=keys.number("version", 1, 1, 1_000_000, whole=True),
        description=keys.text("description"),
        where=keys.choice("where", get_args(Where), "host"),
        parameters=_parameters(keys.take("parameters", dict, {}, "a mapping"), f"{where}.parameters", faults),
        target=keys.text("target", ""),
        resolve=keys.argv("resolve", None),
        max_targets=keys.number("max_targets", 1, 1, 100, whole=True),
        preconditions=_preconditions(keys.items("preconditions"), f"{where}.preconditions", faults),
        argv=keys.argv("argv"),
        check=keys.argv("check", None),
        undo=keys.argv("undo"),
        dry_run=keys.argv("dry_run", None),
        verify_query=keys.text("verify_query", ""),
        verify=keys.choice("verify", ("each", "last"), "last"),
        verify_seconds=float(keys.number("verify_seconds", 60.0, 1, 3600) or 60.0),
        idempotent=keys.flag("idempotent"),
        read_only=keys.flag("read_only", False),
        risk=_risk(keys.take("risk", dict, ..., "a mapping"), f"{where}.risk", faults),
        limits=_limits(keys.take("limits", dict, {}, "a mapping"), f"{where}.limits", faults),
        environment=_environment(keys.items("environment"), f"{where}.environment", faults),
        needs=_needs(keys.take("needs", dict, {}, "a mapping"), f"{where}.needs", faults),
        user=keys.text("user", "", USER),
        source=where,
    )
    if undo_given == []:
        keys.fault("undo", "is empty: write `undo: none` if there is none")
    keys.done()
    if len(faults) == before:
        _cross_checks(definition, where, faults)
    return definition if len(faults) == before else None


def _parameters(data: Mapping[str, Any], where: str, faults: list[str]) -> dict[str, Parameter]:
    found: dict[str, Parameter] = {}
    for name, body in data.items():
        at = f"{where}.{name}"
        if not isinstance(name, str) or not PARAM_NAME.fullmatch(name) or name in SPECIALS:
            faults.append(f"{at}: not a possible name of a parameter")
            continue
        found[name] = _parameter(name, _Keys(body, at, faults))
    return found


def _parameter(name: str, keys: _Keys) -> Parameter:
    scalar = (str, int, float, bool)
    enum = keys.items("enum")
    parameter = Parameter(
        name=name,
        origin=keys.choice("from", ORIGINS),
        type=keys.choice("type", PARAM_TYPES, "string"),
        description=keys.text("description", ""),
        required=keys.flag("required", True),
        pattern=keys.text("pattern", ""),
        enum=tuple(enum),
        min=keys.number("min", None, -(2**53), 2**53),
        max=keys.number("max", None, -(2**53), 2**53),
        max_length=keys.number("max_length", 256, 1, 4096, whole=True),
        leading_dash=keys.flag("leading_dash", False),
        key=keys.text("key", "", PARAM_NAME),
    )
    default = keys.take("default", scalar, None, "text, a number, true or false")
    keys.done()
    if not all(isinstance(e, scalar) for e in enum):
        keys.fault("enum", "every value must be text, a number, true or false")
    try:
        re.compile(parameter.pattern)
    except re.error as error:
        keys.fault("pattern", f"no regular expression: {error}")
        return parameter
    if parameter.type == "string" and not parameter.pattern and not enum:
        keys.fault("pattern", "is absent: text needs a pattern or an enum")
    if parameter.type != "string" and parameter.pattern:
        keys.fault("pattern", f"a {parameter.type} has no pattern")
    if default is None:
        return parameter
    try:
        return msgspec.structs.replace(parameter, default=parameter.check(default))
    except ParameterError as error:
        keys.fault("default", str(error))
        return parameter


def _preconditions(data: list[Any], where: str, faults: list[str]) -> tuple[Precondition, ...]:
    found = []
    for i, body in enumerate(data):
        keys = _Keys(body, f"{where}[{i}]", faults)
        found.append(Precondition(text=keys.text("text"), argv=keys.argv("argv")))
        keys.done()
    return tuple(found)


def _risk(data: Any, where: str, faults: list[str]) -> Risk:
    keys = _Keys({} if data is None else data, where, faults)
    risk = Risk(
        reversible=keys.flag("reversible"),
        blast_radius=keys.choice("blast_radius", get_args(BlastRadius)),
        changes=keys.choice("changes", get_args(Changes)),
        auto=keys.choice("auto", ("allowed", "never")),
        acts_on=keys.choice("acts_on", ("cause", "other"), "cause"),
        persons=keys.number("persons", 1, 1, 2, whole=True),
    )
    keys.done()
    return risk


def _limits(data: Mapping[str, Any], where: str, faults: list[str]) -> Limits:
    keys, base = _Keys(data, where, faults), Limits()
    percent = keys.number("cpu_percent", 25, 1, 6400)
    limits = Limits(
        cpu_quota_us=int(percent * base.cpu_period_us / 100),
        memory_bytes=_size(keys, "memory", base.memory_bytes),
        swap_bytes=_size(keys, "swap", base.swap_bytes, low=0),
        pids=keys.number("pids", base.pids, 1, 4096, whole=True),
        timeout_seconds=float(keys.number("timeout_seconds", base.timeout_seconds, 0.1, 3600)),
        output_bytes=_size(keys, "output", base.output_bytes),
        open_files=keys.number("open_files", base.open_files, 16, 65536, whole=True),
        file_bytes=_size(keys, "file_size", base.file_bytes),
    )
    keys.done()
    return limits


def _size(keys: _Keys, key: str, default: int, low: int = 1024) -> int:
    """Bytes from `128MiB`, `64KiB` or a plain number."""
    value = keys.take(key, (int, str), default, "a size such as 128MiB")
    match = SIZE.fullmatch(str(value))
    if match is None:
        keys.fault(key, f'"{value}" is no size: write it like 128MiB')
        return default
    size = int(match[1]) * _UNITS[match[2]]
    if not low <= size <= 2**40:
        keys.fault(key, f"{size} bytes is not within {low} to {2**40}")
        return default
    return size


def _environment(data: list[Any], where: str, faults: list[str]) -> tuple[Secret, ...]:
    found = []
    for i, body in enumerate(data):
        keys = _Keys(body, f"{where}[{i}]", faults)
        name, required = keys.text("name", pattern=ENV_NAME), keys.flag("required", True)
        by = keys.choice("by", ("environment", "descriptor"), "environment")
        found.append(Secret(name=name, required=required, by=by))
        keys.done()
    return tuple(found)


def _needs(data: Mapping[str, Any], where: str, faults: list[str]) -> Needs:
    keys, base = _Keys(data, where, faults), Needs()
    write = keys.take("write", list, list(base.write), "a list of absolute paths")
    if not all(isinstance(path, str) and path.startswith("/") and ".." not in path.split("/") for path in write):
        keys.fault("write", "every element must be an absolute path")
    needs = Needs(
        network=keys.choice("network", ("none", "loopback", "any"), base.network),
        processes=keys.choice("processes", ("own", "host"), base.processes),
        write=tuple(write),
        inspect=keys.flag("inspect", base.inspect),
        isolation=keys.choice("isolation", ("automatic", "required"), base.isolation),
    )
    keys.done()
    if needs.isolation == "required" and not needs.restricted:
        keys.fault("isolation", "is required, but these needs leave nothing to isolate")
    return needs


def _check_program(argv: tuple[str, ...], where: str, faults: list[str]) -> None:
    for i, element in enumerate(argv):
        if malformed(element):
            faults.append(f"{where}[{i}]: a brace that belongs to no {{parameter}}")
    program = argv[0]
    if placeholders([program]) and program != "{python}":
        faults.append(f"{where}[0]: the program may not come from a parameter")
    if program.rsplit("/", 1)[-1] in SHELLS:
        faults.append(f"{where}[0]: {program} would parse what it is given; name the program itself")
    own: Sequence[str] = ()
    if program == "{python}":
        own = argv[1 : argv.index("-m")] if "-m" in argv else argv[1:]
    elif re.fullmatch(r"python[0-9.]*", program.rsplit("/", 1)[-1]):
        own = list(itertools.takewhile(lambda e: e.startswith("-") and e != "-m", argv[1:]))
    if any(e.startswith("-") and not e.startswith("--") and "c" in e for e in own):
        faults.append(f"{where}: python -c evaluates text; use a module")


def _cross_checks(definition: ActionDefinition, where: str, faults: list[str]) -> None:
    """What only shows when all keys are known."""
    declared = set(definition.parameters)
    early = {n for n, p in definition.parameters.items() if p.origin != "target"}
    templates: list[tuple[str, Sequence[str], set[str]]] = [
        ("argv", definition.argv, declared),
        ("check", definition.check, declared),
        ("undo", definition.undo, declared),
        ("dry_run", definition.dry_run, declared),
        ("resolve", definition.resolve, early),
        ("target", [definition.target], early),
        *((f"preconditions[{i}].argv", p.argv, early) for i, p in enumerate(definition.preconditions)),
    ]
    used: set[str] = set()
    for key, template, allowed in templates:
        names = placeholders(template) - SPECIALS
        used |= names
        for name in sorted(names - declared):
            faults.append(f"{where}.{key}: {{{name}}} is no parameter of this action")
        for name in sorted((names & declared) - allowed):
            faults.append(f"{where}.{key}: {{{name}}} is known only when the target has been resolved")
    for name in sorted(declared - used):
        faults.append(f"{where}.parameters.{name}: is used nowhere")
    if bool(definition.target) == bool(definition.resolve):
        faults.append(f"{where}.target: exactly one of `target` and `resolve` says what is acted on")
    if not definition.resolve and any(p.origin == "target" for p in definition.parameters.values()):
        faults.append(f"{where}.resolve: is absent, but a parameter comes from the target")
    for variable in sorted(set(_VARIABLE.findall(definition.verify_query)) - QUERY_VARIABLES):
        faults.append(f"{where}.verify_query: ${variable} is none of {', '.join(sorted(QUERY_VARIABLES))}")
    if definition.verify_query and "$scope" not in definition.verify_query:
        faults.append(f"{where}.verify_query: lacks $scope: it would ask for every series of the server")
    if not definition.check and not (definition.read_only or definition.idempotent):
        faults.append(f"{where}.check: is absent: after a crash nobody could tell whether it had happened")
    risk = definition.risk
    if risk.changes == "persistent" and not definition.undo and risk.auto == "allowed":
        faults.append(f"{where}.risk.auto: it changes what lasts and cannot be undone, so it must be `never`")
    if risk.acts_on == "other" and risk.auto == "allowed":
        faults.append(f"{where}.risk.auto: it acts on something else than the cause, so it must be `never`")
    if risk.reversible and not definition.undo and not definition.read_only:
        faults.append(f"{where}.risk.reversible: is true, but undo is none")
    if definition.read_only and (risk.changes != "nothing" or definition.undo):
        faults.append(f"{where}.read_only: a read-only action changes nothing and needs no undo")
