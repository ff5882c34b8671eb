"""What is wrong with a rule pack, told key by key. Made by `rules.packs` and `agent.packs`; everybody else imports it
from `rules.packs`."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec


class Fault(msgspec.Struct, frozen=True):
    """One thing wrong with a pack. `path` are the keys down to it; `line` counts from 1, 0: not known."""

    path: tuple[str | int, ...]
    reason: str
    line: int = 0

    @property
    def key(self) -> str:
        return ".".join(str(p) for p in self.path) or "(top level)"

    def __str__(self) -> str:
        at = f"line {self.line}: " if self.line else ""
        return f"{self.key}: {at}{self.reason}"


class PackError(ValueError):
    """A pack (or the set of them) is refused; `faults` are all that was found."""

    def __init__(self, where: str, faults: Iterable[Fault]) -> None:
        self.where = where
        self.faults = tuple(faults)
        super().__init__("\n".join(f"{where}: {fault}" for fault in self.faults))
