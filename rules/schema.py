"""The JSON Schema of a rule pack, made from the types that the loader reads it into.

Called by `alertmedic packs schema` and by the test that holds docs/schemas/pack.schema.json against it. Exists so that
an editor can check a pack while it is written. Structure and the checks of single values are here; what needs a second
place of the pack to tell (probabilities that sum over 1, a reference that leads nowhere) only `packs lint` can say.
Never reads a file.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

from rules.packs import REFERENCE, STATES, Pack
from rules.subjects import ENTITIES, SUBJECT

DIALECT = "https://json-schema.org/draft/2020-12/schema"
NAME = r"^[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)*$"
COMPARISONS = (">=", ">", "<=", "<")
TABLES = ("queries", "signals", "groups", "causes", "rules")
_POSITIVE = {"type": "number", "exclusiveMinimum": 0}
_PROBABILITY = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}


def pack_schema() -> dict[str, Any]:
    """Draft 2020-12. Definitions have the names of the types in `rules.packs`."""
    (top,), definitions = msgspec.json.schema_components([Pack], ref_template="#/$defs/{name}")
    for definition in definitions.values():
        if isinstance(text := definition.get("description"), str):
            definition["description"] = " ".join(text.split())
    of = {name: definition["properties"] for name, definition in definitions.items() if "properties" in definition}
    for table in TABLES:
        of["Pack"][table]["propertyNames"] = {"pattern": NAME}
    of["Pack"]["queries"]["additionalProperties"] = {"type": "string", "allOf": _queries()}
    of["Signal"]["floor"] = dict(_POSITIVE)
    of["Signal"]["node"]["enum"] = ["", SUBJECT, *ENTITIES]
    of["AlertEntry"]["subject"]["enum"] = ["", *ENTITIES]
    of["AlertEntry"]["causes"]["minItems"] = 1
    of["Cause"]["prior"] = dict(_PROBABILITY)
    of["Cause"]["kinds"]["minItems"] = of["Cause"]["needs"]["minItems"] = of["Rule"]["when"]["minItems"] = 1
    of["Outcome"]["weight"] |= {"exclusiveMinimum": 0, "maximum": 3}
    of["Derivation"]["full"] = {"anyOf": [dict(_POSITIVE), {"type": "null"}], "default": None}
    of["Reference"]["from"]["pattern"] = f"^{REFERENCE.pattern}$"
    pair = {"type": "array", "minItems": 2, "maxItems": 2, "prefixItems": [_PROBABILITY, _PROBABILITY], "items": False}
    of["Likelihood"]["states"] |= {"additionalProperties": pair, "propertyNames": {"enum": list(STATES)}}
    for owner, key in (("FactTest", "where"), ("FactTest", "strong"), ("FactTest", "weak"), ("Pattern", "where")):
        _bound_comparisons(of[owner][key])
    definitions["Signal"]["allOf"] = [_saturation()]
    definitions["Outcome"]["oneOf"] = [_only("support", "prune"), _only("prune", "support")]
    schema = {"$schema": DIALECT, "title": "AlertMedic rule pack", **top, "$defs": dict(sorted(definitions.items()))}
    plain: dict[str, Any] = json.loads(json.dumps(schema))
    return plain


def _bound_comparisons(conditions: dict[str, Any]) -> None:
    """Says which comparisons there are: the types' own schema leaves out what the keys of a mapping may be."""
    for table in (conditions, *conditions.get("anyOf", ())):
        for choice in table.get("additionalProperties", {}).get("anyOf", ()):
            if choice.get("type") == "object":
                choice["propertyNames"] = {"enum": list(COMPARISONS)}


def _queries() -> list[dict[str, Any]]:
    """A query is bounded by `$scope` or `$alert(...)` and knows four variables."""
    known = r"\$(?!(scope|service|rate)(?![a-zA-Z_])|alert\()[a-zA-Z_]"
    return [{"pattern": r"\$scope|\$alert\("}, {"not": {"pattern": known}}]


def _saturation() -> dict[str, Any]:
    kind = {"properties": {"kind": {"const": "saturation"}}, "required": ["kind"]}
    return {"if": kind, "then": {"properties": {"limit": {"type": "number"}}, "required": ["limit"]}}


def _only(one: str, other: str) -> dict[str, Any]:
    """`one` is said and `other` is not ("" is not said)."""
    return {"properties": {one: {"minLength": 1}, other: {"maxLength": 0}}, "required": [one]}
