"""durable-rules as the rule engine, in a child process.

Made by `agent.engines.engine_of`. Exists because the package is a forward-chaining engine that people know, and because
two engines that agree on everything are better than one; it lives in a child because its extension in C is not safe on
every input. What reaches it are flags and short tokens, never a text from outside: conditions on one record are tested
here, by the code of the built-in matcher, and the engine joins. A child that dies, hangs or answers nonsense is
reported, and the next look starts another.

A record may stand at several places of one rule, which durable-rules does not do with one fact: each place gets a fact
of its own.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from agent.engines import EngineError
from rules.engine import CompiledPattern, Fired, Matcher, Record, select
from rules.packs import Rule, Scalar

CHILD = Path(__file__).with_name("durable_child.py")
SECONDS = 10.0  # for one request
MAX_FACTS = 20_000
MAX_FLAGS = 8  # of one fact: it takes at most 250 properties, and grows slow long before
MAX_ANSWER = 64 << 20
HINT = "install alertmedic[durable] (a C compiler, Python 3.12 or older), or set packs.engine: builtin"


@dataclass(frozen=True, slots=True)
class _Place:
    """One pattern at one place of a rule. `joins`: (own field, earlier pattern, its field)."""

    pattern: CompiledPattern
    flag: str
    joins: tuple[tuple[str, int, str], ...]


class Durable:
    """Starts its child with the first request, and again after it died. For any number of threads, one at a time."""

    def __init__(self, rules: Mapping[str, Rule], seconds: float = SECONDS) -> None:
        """Raises EngineError where durable-rules is not installed."""
        if importlib.util.find_spec("durable") is None:
            raise EngineError(f"packs.engine: durable-rules is not installed; hint: {HINT}")
        self._seconds = seconds
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._fields: dict[str, str] = {}
        self._flags: list[tuple[int, CompiledPattern]] = []  # what flag `p<n>` stands for: a pattern at a place
        self._rules = {name: tuple(self._places(patterns)) for name, patterns in Matcher(rules).patterns.items()}

    def match(self, records: Mapping[str, Sequence[Record]]) -> tuple[Fired, ...]:
        """Every match of every rule. Raises EngineError."""
        facts, told = self._facts(records)
        if len(told) > MAX_FACTS:
            raise EngineError(f"durable-rules: {len(told)} facts, at most {MAX_FACTS}; hint: packs.engine: builtin")
        with self._lock:
            answer = self._ask({"facts": told})
        try:
            found = {self._fired(name, [facts[at] for at in places]) for name, places in answer["matches"]}
        except (KeyError, IndexError, TypeError, ValueError) as error:
            self.close()  # what it says next may be the answer to this
            raise EngineError(f"durable-rules: an answer that is none ({error!r})") from error
        return tuple(sorted(found, key=lambda f: (f.rule, str(f.binding))))

    def close(self) -> None:
        with self._lock:
            self._end()

    @property
    def pid(self) -> int | None:
        """Of the child that runs now."""
        return self._child.pid if self._child is not None else None

    # -- what the engine is told

    def _places(self, patterns: Sequence[CompiledPattern]) -> Iterator[_Place]:
        bound: dict[str, tuple[int, str]] = {}  # variable -> where it was bound first
        for at, pattern in enumerate(patterns):
            own: dict[str, str] = {}
            for name, variable in pattern.variables:
                own.setdefault(variable, self._field(name))
            joins = tuple((field, *bound[variable]) for variable, field in own.items() if variable in bound)
            for variable, field in own.items():
                bound.setdefault(variable, (at, field))
            if (at, pattern) not in self._flags:
                self._flags.append((at, pattern))
            yield _Place(pattern, f"p{self._flags.index((at, pattern))}", joins)

    def _field(self, name: str) -> str:
        return self._fields.setdefault(name, f"f{len(self._fields)}")

    def _facts(self, records: Mapping[str, Sequence[Record]]) -> tuple[list[Record], list[dict[str, Any]]]:
        """The records that stand somewhere, and the facts made of them: same order, same length."""
        flags: dict[tuple[int, int], tuple[Record, set[str], set[str]]] = {}  # (place in rule, id) -> flags, fields
        indexes: dict[tuple[str, str], dict[Scalar, list[Record]]] = {}
        for places in self._rules.values():
            for at, place in enumerate(places):
                for record in select(place.pattern, records, indexes):
                    if _binds(place.pattern, record):
                        entry = flags.setdefault((at, id(record)), (record, set(), set()))
                        entry[1].add(place.flag)
                        entry[2].update(name for name, _ in place.pattern.variables)
        tokens: dict[Scalar, str] = {}
        kept: list[Record] = []
        told: list[dict[str, Any]] = []
        for record, raised, names in flags.values():
            fields = {self._field(n): tokens.setdefault(record[n], f"v{len(tokens)}") for n in sorted(names)}
            every = sorted(raised)
            for first in range(0, len(every), MAX_FLAGS):
                kept.append(record)
                told.append({"flags": every[first : first + MAX_FLAGS], "fields": fields})
        return kept, told

    def _fired(self, name: str, records: Sequence[Record]) -> Fired:
        binding: dict[str, Scalar] = {}
        for place, record in zip(self._rules[name], records, strict=True):
            for field, variable in place.pattern.variables:
                binding.setdefault(variable, record[field])
        return Fired(name, tuple(sorted(binding.items())))

    # -- the child

    def _ask(self, request: Mapping[str, Any]) -> Any:
        try:
            if self._child is None or self._child.poll() is not None:
                self._end()
                self._child = self._started()
                rules = {name: [[p.flag, list(p.joins)] for p in places] for name, places in self._rules.items()}
                self._exchange(self._child, {"rules": rules})
            return self._exchange(self._child, request)
        except (OSError, EOFError, ValueError) as error:
            raise EngineError(f"durable-rules: {self._died(error)}; it is started again with the next look") from error

    def _exchange(self, child: subprocess.Popen[bytes], request: Mapping[str, Any]) -> Any:
        """One request and its answer; a child that is late is killed, which ends the reading."""
        assert child.stdin is not None
        assert child.stdout is not None
        timer = threading.Timer(self._seconds, child.kill)
        timer.start()
        try:
            body = json.dumps(request).encode()
            child.stdin.write(len(body).to_bytes(4, "big") + body)
            child.stdin.flush()
            return json.loads(_exactly(child.stdout, _length(child.stdout)))
        finally:
            timer.cancel()

    @staticmethod
    def _started() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-I", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            start_new_session=True,
        )

    def _died(self, error: Exception) -> str:
        """What became of the child, and its end."""
        child = self._child
        self._end()
        if isinstance(error, ValueError):
            return f"its process answered nonsense ({error})"
        code = child.returncode if child is not None else None
        if code is not None and code < 0:
            return f"its process was ended by signal {-code} (or took more than {self._seconds:g} s)"
        return f"its process ended with {code} ({type(error).__name__}: {error})"

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        if child.poll() is None and child.stdout is not None and not child.stdout.closed:
            child.kill()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    continue  # what was not sent does not matter any more
        child.wait()


def _binds(pattern: CompiledPattern, record: Record) -> bool:
    """Whether the record has a value for each variable, the same for fields that share one."""
    seen: dict[str, Scalar] = {}
    for name, variable in pattern.variables:
        value = record.get(name)
        if value is None or seen.setdefault(variable, value) != value:
            return False
    return True


def _length(pipe: IO[bytes]) -> int:
    length = int.from_bytes(_exactly(pipe, 4), "big")
    if length > MAX_ANSWER:
        raise ValueError(f"an answer of {length} bytes")
    return length


def _exactly(pipe: IO[bytes], count: int) -> bytes:
    body = pipe.read(count)
    if len(body) != count:
        raise EOFError("it ended before it answered")
    return body
