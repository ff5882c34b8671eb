"""The JSON Schema of a file of actions, made from the very constants that the loader checks with.

Called by `alertmedic actions schema` and by the test that holds docs/schemas/actions.schema.json against it. Exists so
that an editor can check an action while it is written. Structure and the checks of single values are here; what needs a
second key to tell (a placeholder without a parameter, a missing undo of what lasts) only `actions lint` can say. Never
reads a file.
"""

from __future__ import annotations

from typing import Any, get_args

from actions.catalog import ENV_NAME, NAME, PARAM_NAME, SIZE, SPECIALS, USER, BlastRadius, Changes, Where
from actions.parameters import ORIGINS, PARAM_TYPES

DIALECT = "https://json-schema.org/draft/2020-12/schema"
Schema = dict[str, Any]
_TEXT: Schema = {"type": "string"}
_FLAG: Schema = {"type": "boolean"}
_WORD: Schema = {"type": "string", "minLength": 1}


def actions_schema() -> Schema:
    """Draft 2020-12, of a whole file."""
    return {
        "$schema": DIALECT,
        "title": "AlertMedic actions",
        **_mapping({"actions": {"type": "array", "items": {"$ref": "#/$defs/Action"}}}, ["actions"]),
        "$defs": {
            "Action": _action(),
            "Argv": {"type": "array", "items": _WORD, "minItems": 1},
            "Environment": _environment(),
            "Limits": _limits(),
            "Needs": _needs(),
            "Parameter": _parameter(),
            "Precondition": _mapping({"text": _TEXT, "argv": {"$ref": "#/$defs/Argv"}}, ["text", "argv"]),
            "Risk": _risk(),
        },
    }


def _mapping(properties: Schema, required: list[str]) -> Schema:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _number(low: float, high: float, *, whole: bool = False) -> Schema:
    return {"type": "integer" if whole else "number", "minimum": low, "maximum": high}


def _named(pattern: str, *, empty: bool = False) -> Schema:
    return {"type": "string", "pattern": f"^({pattern})?$" if empty else f"^({pattern})$"}


def _action() -> Schema:
    argv: Schema = {"$ref": "#/$defs/Argv"}
    names = {"pattern": f"^{PARAM_NAME.pattern}$", "not": {"enum": sorted(SPECIALS)}}
    return _mapping(
        {
            "name": _named(NAME.pattern),
            "family": _named(NAME.pattern),
            "version": _number(1, 1_000_000, whole=True),
            "description": _TEXT,
            "where": {"enum": list(get_args(Where))},
            "parameters": {
                "type": "object",
                "propertyNames": names,
                "additionalProperties": {"$ref": "#/$defs/Parameter"},
            },
            "target": _TEXT,
            "resolve": argv,
            "max_targets": _number(1, 100, whole=True),
            "preconditions": {"type": "array", "items": {"$ref": "#/$defs/Precondition"}},
            "argv": argv,
            "check": argv,
            "undo": {"anyOf": [{"const": "none"}, argv]},
            "dry_run": {"anyOf": [{"const": "resolve"}, argv]},
            "verify": {"enum": ["each", "last"]},
            "verify_query": _TEXT,
            "verify_seconds": _number(1, 3600),
            "idempotent": _FLAG,
            "read_only": _FLAG,
            "risk": {"$ref": "#/$defs/Risk"},
            "limits": {"$ref": "#/$defs/Limits"},
            "needs": {"$ref": "#/$defs/Needs"},
            "environment": {"type": "array", "items": {"$ref": "#/$defs/Environment"}},
            "user": _named(USER.pattern, empty=True),
        },
        ["name", "description", "argv", "undo", "idempotent", "risk"],
    )


def _parameter() -> Schema:
    scalar: Schema = {"type": ["string", "number", "boolean"]}
    schema = _mapping(
        {
            "from": {"enum": list(ORIGINS)},
            "type": {"enum": list(PARAM_TYPES)},
            "description": _TEXT,
            "required": _FLAG,
            "default": scalar,
            "pattern": {"type": "string", "format": "regex"},
            "enum": {"type": "array", "items": scalar},
            "min": _number(-(2**53), 2**53),
            "max": _number(-(2**53), 2**53),
            "max_length": _number(1, 4096, whole=True),
            "leading_dash": _FLAG,
            "key": _named(PARAM_NAME.pattern, empty=True),
        },
        ["from"],
    )
    text = {"properties": {"type": {"const": "string"}}}
    bounded = {"anyOf": [_filled("pattern", "minLength"), _filled("enum", "minItems")]}
    schema["allOf"] = [
        {"if": text, "then": bounded, "else": {"properties": {"pattern": {"maxLength": 0}}}},
    ]
    return schema


def _filled(key: str, how: str) -> Schema:
    return {"required": [key], "properties": {key: {how: 1}}}


def _risk() -> Schema:
    return _mapping(
        {
            "reversible": _FLAG,
            "blast_radius": {"enum": list(get_args(BlastRadius))},
            "changes": {"enum": list(get_args(Changes))},
            "acts_on": {"enum": ["cause", "other"]},
            "auto": {"enum": ["allowed", "never"]},
            "persons": _number(1, 2, whole=True),
        },
        ["reversible", "blast_radius", "changes", "auto"],
    )


def _limits() -> Schema:
    size: Schema = {"anyOf": [{"type": "integer", "minimum": 0}, _named(SIZE.pattern)]}
    return _mapping(
        {
            "cpu_percent": _number(1, 6400),
            "memory": size,
            "swap": size,
            "pids": _number(1, 4096, whole=True),
            "timeout_seconds": _number(0.1, 3600),
            "output": size,
            "open_files": _number(16, 65536, whole=True),
            "file_size": size,
        },
        [],
    )


def _needs() -> Schema:
    path = {"type": "string", "pattern": "^/", "not": {"pattern": r"(^|/)\.\.(/|$)"}}
    return _mapping(
        {
            "network": {"enum": ["none", "loopback", "any"]},
            "processes": {"enum": ["own", "host"]},
            "write": {"type": "array", "items": path},
            "inspect": _FLAG,
            "isolation": {"enum": ["automatic", "required"]},
        },
        [],
    )


def _environment() -> Schema:
    return _mapping(
        {"name": _named(ENV_NAME.pattern), "required": _FLAG, "by": {"enum": ["environment", "descriptor"]}}, ["name"]
    )
