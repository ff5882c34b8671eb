"""Plain data, as YAML gives it, to typed structs, with every fault instead of the first.

Called by `rules.packs`. Exists because `msgspec.convert` stops at the first fault, and a person wants to mend a file at
once. It never guesses: a number in quotes is text, an unknown key is a fault.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import NoneType
from typing import Any, Union, get_args, get_origin

import msgspec

from rules.faults import Fault

Path = tuple[str | int, ...]


def converted(kind: Any, data: object, path: Path, faults: list[Fault]) -> Any:
    """`data` as `kind`: a Struct, a mapping of text to or a list of such, one of several, or whatever msgspec knows.
    Faults are added with the path of their key; what has any is None, or incomplete."""
    if _is_struct(kind):
        return _struct(kind, data, path, faults)
    origin, args = get_origin(kind), get_args(kind)
    if origin is dict and _holds_struct(args[1]):
        if not isinstance(data, Mapping):
            faults.append(Fault(path, f"expected a mapping, got {type(data).__name__}"))
            return None
        for key in data:
            if not isinstance(key, str):
                faults.append(Fault((*path, str(key)), "keys are strings"))
        return {k: converted(args[1], v, (*path, k), faults) for k, v in data.items() if isinstance(k, str)}
    if origin is tuple and args[-1] is Ellipsis and _holds_struct(args[0]):
        if not isinstance(data, list):
            faults.append(Fault(path, f"expected a list, got {type(data).__name__}"))
            return None
        return tuple(converted(args[0], v, (*path, i), faults) for i, v in enumerate(data))
    if structs := [a for a in args if _is_struct(a)]:
        others = tuple(a for a in args if not _is_struct(a))
        if isinstance(data, Mapping) or (others == (NoneType,) and data is not None):
            return converted(structs[0], data, path, faults)
        kind = Union[others]  # noqa: UP007 - of types that are only known here
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        faults.append(Fault(path, str(error)))
        return None


@cache
def fields_of(kind: type[msgspec.Struct]) -> dict[str, msgspec.structs.FieldInfo]:
    """By the name in a file. Looked up once a type: it resolves every annotation anew, most of the time of a start."""
    return {field.encode_name: field for field in msgspec.structs.fields(kind)}


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _holds_struct(kind: Any) -> bool:
    return _is_struct(kind) or any(map(_is_struct, get_args(kind)))


def _struct(kind: type[msgspec.Struct], data: object, path: Path, faults: list[Fault]) -> msgspec.Struct | None:
    if not isinstance(data, Mapping):
        faults.append(Fault(path, f"expected a mapping, got {type(data).__name__}"))
        return None
    fields = fields_of(kind)
    before = len(faults)
    for key in data:
        if key not in fields:
            faults.append(Fault((*path, str(key)), f"unknown key; known here: {', '.join(sorted(fields))}"))
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in data:
            values[field.name] = converted(field.type, data[name], (*path, name), faults)
        elif field.required:
            faults.append(Fault((*path, name), "missing"))
    return kind(**values) if len(faults) == before else None
