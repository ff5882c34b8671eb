"""Walks the configuration's schema: every key with its default as the documentation writes it."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from agent.config import Config


def unwrap(wanted: Any) -> Any:
    while typing.get_origin(wanted) is Annotated:
        wanted = typing.get_args(wanted)[0]
    if typing.get_origin(wanted) in (typing.Union, types.UnionType):
        (inner,) = [a for a in typing.get_args(wanted) if a is not type(None)]
        return unwrap(inner)
    return wanted


def is_struct(wanted: Any) -> bool:
    return isinstance(wanted, type) and issubclass(wanted, msgspec.Struct)


def keys(struct: type[msgspec.Struct] = Config, path: str = "") -> Iterator[tuple[str, str]]:
    """(key, default): `guard.storm.incidents`, `auth.basic[].name`, `inventory.NAME.host`."""
    for info in msgspec.structs.fields(struct):
        at = f"{path}.{info.name}" if path else info.name
        if info.name == getattr(struct, "__rest__", ""):
            yield f"{path}.KEY", '""'  # any key that is not known here
            continue
        base = unwrap(info.type)
        origin = typing.get_origin(base)
        if is_struct(base):
            if info.default is None:
                yield at, "none"
            yield from keys(base, at)
            continue
        yield at, default_text(info)
        if origin is tuple and is_struct(unwrap(typing.get_args(base)[0])):
            yield from keys(unwrap(typing.get_args(base)[0]), f"{at}[]")
        elif origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
            value = unwrap(typing.get_args(base)[1])
            if is_struct(value):
                yield from keys(value, f"{at}.NAME")


def default_text(info: Any) -> str:
    if info.required:
        return "required"
    if info.name == "state_dir":
        return "$XDG_STATE_HOME/alertmedic"
    value = info.default if info.default is not msgspec.NODEFAULT else info.default_factory()
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if (isinstance(value, int) and info.name.endswith("_bytes")) or info.name == "max_bytes_in_flight":
        return f"{value // 2**20} MiB"
    if isinstance(value, float | int):
        return f"{value:.10g}"
    if isinstance(value, tuple):
        return "[" + ", ".join(f'"{v}"' if v == "*" else str(v) for v in value) + "]"
    if isinstance(value, Mapping):
        assert not value
        return "{}"
    if isinstance(value, Path):
        return str(value)
    return value if value and value != "*" else f'"{value}"'
