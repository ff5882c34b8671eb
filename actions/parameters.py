"""Typed parameters of actions, and how their values become elements of an argv.

Used by `actions.catalog` (which reads them from YAML) and `actions.guard` (which fills them in). This is the only way
by which anything that came with an alert reaches a command. There is no shell, no evaluation and no format language: a
placeholder `{name}` is replaced by one checked value inside one element, so a value can never become a second element,
and never an option unless its parameter says so.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from actions.model import ParamValue

ParamType = Literal["string", "int", "number", "bool"]
Origin = Literal["proposal", "inventory", "target", "plan"]
ORIGINS: tuple[Origin, ...] = ("proposal", "inventory", "target", "plan")
PARAM_TYPES: tuple[ParamType, ...] = ("string", "int", "number", "bool")
DEFAULT_MAX_LENGTH = 256
# Control, format (bidirectional overrides, zero width), surrogate, line and paragraph separators.
_FORBIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_PLACEHOLDER = re.compile(r"\{([a-z][a-z0-9_]*)\}")
_INT = re.compile(r"-?[0-9]{1,18}", re.ASCII)
_NUMBER = re.compile(r"-?[0-9]{1,18}(\.[0-9]{1,18})?", re.ASCII)


class ParameterError(ValueError):
    """A value that its parameter does not allow. The text names the parameter and never repeats the whole value."""


class Parameter(msgspec.Struct, frozen=True, kw_only=True):
    """What one parameter may be. A string has a `pattern` (full match) or an `enum`; numbers may have a range."""

    name: str
    origin: Origin
    type: ParamType = "string"
    description: str = ""
    required: bool = True
    default: ParamValue | None = None
    pattern: str = ""
    enum: tuple[ParamValue, ...] = ()
    min: float | None = None
    max: float | None = None
    max_length: int = DEFAULT_MAX_LENGTH
    leading_dash: bool = False  # may stand at the beginning of an element although it begins with "-"
    key: str = ""  # its name at the origin, where that is another one

    @property
    def source_key(self) -> str:
        return self.key or self.name

    def check(self, value: object) -> ParamValue:
        """The value as this parameter's type. Raises ParameterError. Inventory text becomes a number or boolean where
        the parameter is one, a boolean becomes `true` or `false` where the parameter is text; nothing else is
        converted."""
        typed = self._typed(value)
        if isinstance(typed, str):
            self._check_text(typed)
        if isinstance(typed, float) and not math.isfinite(typed):
            raise ParameterError(f"{self.name}: not a finite number")
        if isinstance(typed, (int, float)) and not isinstance(typed, bool):
            if self.min is not None and typed < self.min:
                raise ParameterError(f"{self.name}: below {self.min:g}")
            if self.max is not None and typed > self.max:
                raise ParameterError(f"{self.name}: above {self.max:g}")
        if self.enum and typed not in self.enum:
            allowed = ", ".join(str(e) for e in self.enum)
            raise ParameterError(f"{self.name}: {_shown(value)} is none of {allowed}")
        return typed

    def _typed(self, value: object) -> ParamValue:
        text = value if isinstance(value, str) and self.origin == "inventory" else None
        match self.type:
            case "string":
                if isinstance(value, str):
                    return value
                if isinstance(value, bool):  # YAML reads `value: off` as a boolean
                    return as_text(value)
            case "bool":
                if isinstance(value, bool):
                    return value
                if text in ("true", "false"):
                    return text == "true"
            case "int":
                if isinstance(value, int) and not isinstance(value, bool):
                    return value
                # JSON and Prometheus know only one kind of number: 12.0 is an integer too.
                if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
                    return int(value)
                if text is not None and _INT.fullmatch(text):
                    return int(text)
            case "number":
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    return value
                if text is not None and _NUMBER.fullmatch(text):
                    return float(text)
        raise ParameterError(f"{self.name}: {_shown(value)} is no {self.type}")

    def _check_text(self, text: str) -> None:
        if not text:
            raise ParameterError(f"{self.name}: empty")
        if len(text) > self.max_length:
            raise ParameterError(f"{self.name}: {len(text)} characters, at most {self.max_length} are allowed")
        for c in text:
            # Not printable are also unassigned and private characters, and spaces that look like the plain one.
            if unicodedata.category(c) in _FORBIDDEN_CATEGORIES or not c.isprintable():
                raise ParameterError(f"{self.name}: has the character U+{ord(c):04X}")
        if self.pattern and not re.fullmatch(self.pattern, text):
            raise ParameterError(f"{self.name}: {_shown(text)} does not match {self.pattern}")


def collect(
    parameters: Mapping[str, Parameter], given: Mapping[Origin, Mapping[str, object]]
) -> tuple[dict[str, ParamValue], list[str], list[str]]:
    """Values of all parameters whose origin is in `given`: (values, names that are missing, faults in words)."""
    values: dict[str, ParamValue] = {}
    missing: list[str] = []
    faults: list[str] = []
    for parameter in parameters.values():
        if parameter.origin not in given:
            continue
        value = given[parameter.origin].get(parameter.source_key)
        if value is None or value == "":
            if parameter.default is not None:
                values[parameter.name] = parameter.default
            elif parameter.required:
                missing.append(parameter.source_key)
            continue
        try:
            values[parameter.name] = parameter.check(value)
        except ParameterError as error:
            faults.append(str(error))
    return values, missing, faults


def placeholders(template: Sequence[str]) -> set[str]:
    """The names of all placeholders in an argv template."""
    return {name for element in template for name in _PLACEHOLDER.findall(element)}


def malformed(element: str) -> bool:
    """Whether an element has a brace that belongs to no placeholder."""
    return any(c in "{}" for c in _PLACEHOLDER.sub("", element))


def render(
    template: Sequence[str],
    values: Mapping[str, ParamValue],
    parameters: Mapping[str, Parameter],
    specials: Mapping[str, str],
) -> tuple[str, ...]:
    """The argv of a template. An element whose placeholder has no value (an optional parameter) is left out.

    Raises ParameterError when a value would make its element an option, and KeyError for an undeclared placeholder
    (the catalogue refuses such templates).
    """
    argv: list[str] = []
    for element in template:
        names = _PLACEHOLDER.findall(element)
        if any(n not in specials and n not in values and not parameters[n].required for n in names):
            continue
        rendered = _PLACEHOLDER.sub(lambda m: specials.get(m[1]) or as_text(values[m[1]]), element)
        first = _PLACEHOLDER.match(element)
        if first and first[1] not in specials and rendered.startswith("-") and not parameters[first[1]].leading_dash:
            raise ParameterError(f'{first[1]}: begins with "-" and would be read as an option')
        if "\0" in rendered:
            raise ParameterError(f"{element}: has a NUL")
        argv.append(rendered)
    return tuple(argv)


def as_text(value: ParamValue) -> str:
    """The one spelling of a value in an argv: true/false, decimal integers, shortest exact floats, text as it is."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value) if isinstance(value, float) else str(value)


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
