"""One YAML document, taken strictly: typed structs out of it, or every fault with its file, line and key.

Called by `agent.config`. Exists because a parser that builds dictionaries first has lost the lines by the time a value
is judged, keeps the last of two equal keys silently, and guesses types (`no` is false, `1:30` is ninety). Here the text
of a scalar is read as what the schema wants, so nothing is guessed. It never evaluates a tag, never follows an alias (a
few of them expand without bound), and never stops at the first fault.

The schema is msgspec Structs: field names are keys, defaults are defaults, `msgspec.Meta` holds ranges and patterns,
and `kind("url")` in an annotation names one of the checks of `agent.strict_kinds`. A struct whose keys are not all
known here names in `__rest__` the field that takes the others, a mapping.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

import msgspec
import yaml

from agent.strict_kinds import Secret, expand_path, read_secret, wrong

MAX_BYTES = 1024 * 1024
MAX_DEPTH = 24
_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_INT = re.compile(r"[-+]?[0-9]{1,18}\Z")
_FLOAT = re.compile(r"[-+]?([0-9]{1,18}(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]{1,3})?\Z")
_BYTES = re.compile(r"([0-9]{1,12}) ?(KiB|MiB|GiB)\Z")
_UNITS = {"KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}
T = TypeVar("T", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True)
class kind:  # noqa: N801 - reads as an annotation: Annotated[str, kind("url")]
    """Names a check of `agent.strict_kinds` for the annotated scalar."""

    name: str


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong. `file` is the file as named by the caller or the environment variable; `line` is from 1, 0 where
    there is none; `key` is dotted (`guard.storm.incidents`, `auth.basic[0].name`), "" for the whole file."""

    file: str
    line: int
    key: str
    what: str
    hint: str = ""

    def __str__(self) -> str:
        parts = [f"{self.file}:{self.line}" if self.line else self.file]
        parts += [self.key] if self.key else []
        text = f"{': '.join(parts)}: {self.what}" + (f", {self.hint}" if self.hint else "")
        return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


class ConfigError(ValueError):
    """The configuration is not usable. `faults` holds all of them, in the order of files and lines."""

    def __init__(self, faults: tuple[Fault, ...]) -> None:
        self.faults = faults
        super().__init__("\n".join(map(str, faults)))


@dataclass(slots=True)
class _Node:
    """A piece of the document. `value` is text (with `plain` telling whether it was unquoted), a list or a mapping."""

    file: str
    line: int
    value: str | list[_Node] | dict[str, _Node]
    plain: bool = False
    base: Path = field(default_factory=Path)
    broken: bool = False  # a fault was already reported inside: do not report what follows from it

    @property
    def is_null(self) -> bool:
        return self.plain and isinstance(self.value, str) and self.value in _NULLS


@dataclass(slots=True)
class _Open:
    """A collection whose end has not been met, and its key that waits for a value."""

    node: _Node
    path: str
    key: _Node | None = None


class Document:
    """Collects faults while a document is read, overridden by the environment and built, once."""

    def __init__(self, name: str = "", base: Path | None = None) -> None:
        self.name = name
        self.faults: list[Fault] = []
        self._base = base or Path.cwd()
        self._root = _Node(name, 0, {}, base=self._base)
        self._at: dict[str, _Node] = {}

    def read(self, body: bytes) -> None:
        """Takes the YAML text. Faults of syntax and structure are collected, and the sound rest is kept."""
        if len(body) > MAX_BYTES:
            self._add(self._root, "", f"the file has {len(body)} bytes", f"at most {MAX_BYTES} are read")
            return
        try:
            root = self._compose(_events(body), self.name, self._base)
        except yaml.YAMLError as error:
            line, what = _yaml_problem(error, body)
            self.faults.append(Fault(self.name, line, "", f"not YAML: {what}", "check indentation and quoting"))
            self._root.broken = True
            return
        if root is None:
            self._root.broken = bool(self.faults)
        elif not root.is_null:
            self._root = root

    def override(self, variable: str, path: tuple[str, ...], text: str, *, literal: bool, base: Path) -> None:
        """Puts an environment variable's text at `path`. `literal` text is a scalar as it stands; other text is YAML
        (`[a, b]`, `{a: b}`), or a list separated by commas."""
        node: _Node | None = _Node(variable, 0, text, plain=not literal, base=base)
        if not literal and text.lstrip()[:1] in ("[", "{"):
            try:
                node = self._compose(_events(text.encode("utf-8", "replace")), variable, base)
            except yaml.YAMLError as error:
                self.faults.append(Fault(variable, 0, ".".join(path), f"not YAML: {_yaml_problem(error, b'')[1]}"))
                return
        if node is None:
            return
        at = self._root
        for name in path[:-1]:
            if isinstance(at.value, dict):
                if name not in at.value or at.value[name].is_null:
                    at.value[name] = _Node(variable, 0, {}, base=base)
                at = at.value[name]
        if isinstance(at.value, dict):
            at.value[path[-1]] = node

    def build(self, struct: type[T]) -> T | None:
        """The document as `struct`, or None when there are faults (all are in `faults`)."""
        built = self._struct(self._root, struct, "")
        return None if self.faults else typing.cast(T, built)

    def fault(self, key: str, what: str, hint: str = "") -> None:
        """Adds a fault found by a check across keys, at the line of `key` or of the nearest mapping that holds it."""
        at = key
        while at and at not in self._at:
            at = at[: max(at.rfind("."), at.rfind("["), 0)]
        self._add(self._at.get(at, self._root), key, what, hint)

    def given(self, key: str) -> bool:
        """Whether the file or the environment has the key (a default has no line to point at)."""
        return key in self._at

    def _add(self, node: _Node, key: str, what: str, hint: str = "") -> None:
        self.faults.append(Fault(node.file, node.line, key, what, hint))

    # -- YAML events to nodes -------------------------------------------------------------------------------------

    def _compose(self, events: Iterator[Any], file: str, base: Path) -> _Node | None:
        """Builds the tree without recursion, so that no document can exhaust the stack."""
        stack: list[_Open] = []
        root: _Node | None = None
        documents = 0
        for event in events:
            line = event.start_mark.line + 1 if file == self.name else 0
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    self.faults.append(Fault(file, line, "", "a second document begins", "write one document a file"))
                    return root
                continue
            if isinstance(event, yaml.SequenceEndEvent | yaml.MappingEndEvent):
                stack.pop()
                continue
            if not isinstance(event, yaml.NodeEvent):
                continue
            node = self._node(event, file, line, base)
            path = ""
            if stack:
                path = self._put(stack[-1], node)
            else:
                root = node
            if isinstance(node.value, dict | list):
                stack.append(_Open(node, path))
                if len(stack) > MAX_DEPTH:
                    self.faults.append(Fault(file, line, "", f"nested deeper than {MAX_DEPTH}", "no key needs that"))
                    return None
        return root

    def _node(self, event: Any, file: str, line: int, base: Path) -> _Node:
        if isinstance(event, yaml.AliasEvent):
            what = f"alias *{event.anchor}"
            self.faults.append(Fault(file, line, "", what, "repeat the value: aliases are not taken"))
            return _Node(file, line, "", base=base, broken=True)
        if event.tag is not None and event.tag not in ("!", "tag:yaml.org,2002:str"):
            self.faults.append(Fault(file, line, "", f"tag {event.tag}", "tags are not taken: write the plain value"))
            return _Node(file, line, _empty_like(event), base=base, broken=True)
        if isinstance(event, yaml.ScalarEvent):
            return _Node(file, line, event.value, plain=event.style in (None, "") and event.tag is None, base=base)
        return _Node(file, line, _empty_like(event), base=base)

    def _put(self, top: _Open, node: _Node) -> str:
        """Puts the node into the open collection, as key or value, and gives its path."""
        parent = top.node
        if isinstance(parent.value, list):
            parent.value.append(node)
            return f"{top.path}[{len(parent.value) - 1}]"
        assert isinstance(parent.value, dict)
        if top.key is None:
            top.key = node
            return top.path
        key, top.key = top.key, None
        if not isinstance(key.value, str):
            self._add(key, top.path, "a key that is no plain word", "keys are words")
            return top.path
        path = _join(top.path, key.value)
        if key.value in parent.value:
            first = parent.value[key.value].line
            self._add(key, path, "duplicate key", f"it is already set in line {first}: keep one of them")
        else:
            node.line = node.line if isinstance(node.value, str) else key.line
            parent.value[key.value] = node
        return path

    # -- nodes to structs -----------------------------------------------------------------------------------------

    def _struct(self, node: _Node, struct: type[msgspec.Struct], path: str) -> msgspec.Struct | None:
        self._at[path] = node
        if node.broken:
            return None
        if not isinstance(node.value, dict):
            if node.is_null:
                node.value = {}
            else:
                self._add(node, path, f"{_describe(node)} where a mapping is expected", "write `key: value` lines")
                return None
        assert isinstance(node.value, dict)
        fields = {f.name: f for f in msgspec.structs.fields(struct)}
        values: dict[str, Any] = {}
        before = len(self.faults)
        rest = fields.pop(getattr(struct, "__rest__", ""), None)
        others = {name: child for name, child in node.value.items() if name not in fields and not child.broken}
        if rest is not None:
            base, _, _ = _unwrap(rest.type)
            key, value = typing.get_args(base)
            values[rest.name] = self._mapping(_Node(node.file, node.line, others, base=node.base), key, value, path)
        for name, child in others.items() if rest is None else ():
            self._add(child, _join(path, name), "unknown key", _suggest(name, fields, "keys here"))
        sound = rest is None or len(self.faults) == before
        for name, info in fields.items():
            if name in node.value:
                before = len(self.faults)
                values[name] = self._value(node.value[name], info.type, _join(path, name))
                sound = sound and len(self.faults) == before
            elif info.required:
                self._add(node, _join(path, name), "missing key", "it has no default")
                sound = False
        return struct(**values) if sound else None

    def _value(self, node: _Node, wanted: Any, path: str) -> Any:
        """The node as `wanted`; on a fault it is recorded and the result means nothing."""
        self._at[path] = node
        if node.broken:
            return None
        base, metas, check = _unwrap(wanted)
        origin, arguments = typing.get_origin(base), typing.get_args(base)
        if origin in (Union, types.UnionType):
            if node.is_null:
                return None
            (inner,) = [a for a in arguments if a is not type(None)]
            return self._value(node, inner, path)
        if isinstance(base, type) and issubclass(base, msgspec.Struct):
            return self._struct(node, base, path)
        if origin is tuple:
            return self._tuple(node, arguments[0], path)
        if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
            return self._mapping(node, arguments[0], arguments[1], path)
        return self._scalar(node, base, metas, check, path)

    def _tuple(self, node: _Node, item: Any, path: str) -> tuple[Any, ...]:
        if node.is_null:
            return ()
        if isinstance(node.value, str) and node.line == 0:  # an environment variable: a,b,c
            items = [_Node(node.file, 0, t.strip(), base=node.base) for t in node.value.split(",") if t.strip()]
            node = _Node(node.file, 0, items, base=node.base)
        if not isinstance(node.value, list):
            self._add(node, path, f"{_describe(node)} where a list is expected", "write `[a, b]` or `- a` lines")
            return ()
        return tuple([self._value(child, item, f"{path}[{i}]") for i, child in enumerate(node.value)])

    def _mapping(self, node: _Node, key: Any, value: Any, path: str) -> Mapping[str, Any]:
        if node.is_null:
            return {}
        if not isinstance(node.value, dict):
            self._add(node, path, f"{_describe(node)} where a mapping is expected", "write `name: value` lines")
            return {}
        base, metas, check = _unwrap(key)
        found = {}
        for name, child in node.value.items():
            at = _join(path, name)
            self._scalar(_Node(child.file, child.line, name, base=child.base), base, metas, check, at)
            found[name] = self._value(child, value, at)
        return found

    def _scalar(self, node: _Node, wanted: Any, metas: list[msgspec.Meta], check: str, path: str) -> Any:
        expected = _expected(wanted)
        if not isinstance(node.value, str) or node.is_null:
            self._add(node, path, f"{_describe(node)} where {expected} is expected", "write the value after the colon")
            return None
        text = node.value
        if typing.get_origin(wanted) is Literal:
            allowed = {str(a): a for a in typing.get_args(wanted)}
            if text not in allowed:
                self._add(node, path, f"{_quote(text)} is not one of them", _suggest(text, allowed, "allowed"))
            return allowed.get(text)
        if wanted is Secret:
            secret = read_secret(expand_path(text, node.base))
            if isinstance(secret, str):
                self._add(node, path, secret, "name a readable file that holds the secret and nothing else")
            return secret
        value = expand_path(text, node.base) if wanted is Path else _SCALARS[wanted](text, check)
        if value is None:
            self._add(node, path, f"{_quote(text)} where {expected} is expected", _SCALAR_HINTS.get(wanted, ""))
            return None
        problem = next((p for m in metas if (p := _outside(value, m))), None)
        if problem is None and check:
            problem = wrong(check, value)
        if problem is not None:
            self._add(node, path, *problem)
        return value


def variables(struct: type[msgspec.Struct], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], bool]]:
    """Every key that an environment variable can name: (path, whether its text is taken as it stands). Lists and
    mappings are named as a whole; nothing inside them is."""
    for info in msgspec.structs.fields(struct):
        at = (*path, info.name)
        base, _, _ = _unwrap(info.type)
        if typing.get_origin(base) in (Union, types.UnionType):
            (inner,) = [a for a in typing.get_args(base) if a is not type(None)]
            base, _, _ = _unwrap(inner)
        if isinstance(base, type) and issubclass(base, msgspec.Struct):
            yield from variables(base, at)
        else:
            origin = typing.get_origin(base)
            yield at, origin in (None, Literal)


def _events(body: bytes) -> Iterator[Any]:
    return typing.cast(Iterator[Any], yaml.parse(body, Loader=yaml.CSafeLoader))


def _empty_like(event: Any) -> str | list[_Node] | dict[str, _Node]:
    if isinstance(event, yaml.MappingStartEvent):
        return {}
    return [] if isinstance(event, yaml.SequenceStartEvent) else ""


def _yaml_problem(error: yaml.YAMLError, body: bytes) -> tuple[int, str]:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        return (mark.line + 1 if mark else 0), error.problem or error.context or "unreadable"
    position = getattr(error, "position", None)
    if isinstance(position, int):
        return body[:position].count(b"\n") + 1, f"{getattr(error, 'reason', 'unreadable')} at byte {position}"
    return 0, str(error).splitlines()[0] if str(error) else "unreadable"


def _unwrap(wanted: Any) -> tuple[Any, list[msgspec.Meta], str]:
    metas: list[msgspec.Meta] = []
    check = ""
    while typing.get_origin(wanted) is Annotated:
        wanted, *extras = typing.get_args(wanted)
        metas += [e for e in extras if isinstance(e, msgspec.Meta)]
        check = next((e.name for e in extras if isinstance(e, kind)), check)
    return wanted, metas, check


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _quote(text: str) -> str:
    return f'"{text[:77]}..."' if len(text) > 80 else f'"{text}"'


def _describe(node: _Node) -> str:
    if node.is_null:
        return "nothing"
    if isinstance(node.value, str):
        return _quote(node.value)
    return "a list" if isinstance(node.value, list) else "a mapping"


def _suggest(name: str, allowed: Mapping[str, Any], word: str) -> str:
    near = difflib.get_close_matches(name[:80], list(allowed), 1, 0.6)
    return f'did you mean "{near[0]}"?' if near else f"{word}: {', '.join(allowed)}"


def _expected(wanted: Any) -> str:
    if typing.get_origin(wanted) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(wanted)))
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
    return names.get(wanted, "the path of a file")


def _as_bool(text: str, check: str) -> bool | None:
    return {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}.get(text)


def _as_int(text: str, check: str) -> int | None:
    if check == "bytes" and (match := _BYTES.match(text)):
        return int(match[1]) * _UNITS[match[2]]
    return int(text) if _INT.match(text) else None


def _as_float(text: str, check: str) -> float | None:
    value = float(text) if _FLOAT.match(text) else math.nan
    return value if math.isfinite(value) else None


def _as_str(text: str, check: str) -> str | None:
    return text


_SCALARS: dict[Any, Callable[[str, str], Any]] = {bool: _as_bool, int: _as_int, float: _as_float, str: _as_str}
_SCALAR_HINTS = {
    bool: "write true or false",
    int: "write digits only (sizes also as 8 MiB)",
    float: "write a finite decimal number, without a unit",
}


def _outside(value: Any, meta: msgspec.Meta) -> tuple[str, str] | None:
    """What the constraint says against the value, as (what, hint)."""
    shown = _quote(value) if isinstance(value, str) else str(value)
    for bound, broken, word in (
        (meta.ge, operator.lt, "at least"),
        (meta.gt, operator.le, "more than"),
        (meta.le, operator.gt, "at most"),
        (meta.lt, operator.ge, "less than"),
    ):
        if bound is not None and broken(value, bound):
            return f"{shown} is out of range", f"it must be {word} {bound}"
    if meta.min_length is not None and len(value) < meta.min_length:
        return f"{shown} is too short", f"at least {meta.min_length} characters"
    if meta.max_length is not None and len(value) > meta.max_length:
        return f"{shown} is too long", f"at most {meta.max_length} characters"
    if meta.pattern is not None and not re.search(meta.pattern, value):
        return f"{shown} is not of the right form", f"it must match {meta.pattern}"
    return None
