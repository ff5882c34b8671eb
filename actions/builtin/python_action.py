"""Runs one method of an action that is a Python class. See `actions.classes`.

Runs as `python -I -m actions.builtin.python_action resolve|run|check|undo|dry_run --file F --class C`. The file must
have the digest that the plan was made with. `Action`, `Refused` and `Trouble` are here for such files to import:

- `resolve` returns a list of `{"identity", "params", "note"}`; `dry_run` returns text;
- `run` and `undo` return what is to be noted, raise Refused if nothing was changed, anything else if it failed;
- `check` returns True (it has happened), False (it has not) or None (nobody can tell).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from actions.builtin import CANNOT_TELL, DONE, FAILED
from actions.builtin.program import Refused, Trouble, execute, options, say

__all__ = ["Action", "Refused", "Trouble"]


class Action:
    """The base by which a class is known to be an action."""


def method_of(args: argparse.Namespace) -> Any:
    """The bound method. Raises Refused when the file is another one, Trouble when it has no such class."""
    path = Path(args.file)
    source = path.read_bytes()
    if hashlib.blake2b(source, digest_size=16).hexdigest() != args.digest:
        raise Refused(f"{path} has been changed since the plan was made")
    spec = importlib.util.spec_from_file_location("alertmedic_action", path)
    if spec is None:
        raise Trouble(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    exec(compile(source, str(path), "exec"), module.__dict__)  # noqa: S102 - what was compared, not what is there now
    made = getattr(module, getattr(args, "class"), None)
    if made is None:
        raise Trouble(f"{path} has no class {getattr(args, 'class')}")
    return getattr(made(), args.operation)


def values_of(args: argparse.Namespace) -> dict[str, Any]:
    """The parameters as the types that the definition gives them: their text has been checked there."""
    kinds = dict(item.split(":", 1) for item in args.type)
    convert: dict[str, Any] = {"int": int, "number": float, "bool": lambda text: text == "true"}
    pairs = (item.split("=", 1) for item in args.value)
    return {name: convert.get(kinds.get(name, ""), str)(text) for name, text in pairs}


def call(args: argparse.Namespace) -> int:
    answer = method_of(args)(**values_of(args))
    if args.operation == "check":
        say({"happened": answer})
        return CANNOT_TELL if not isinstance(answer, bool) else DONE if answer else FAILED
    say(answer)
    return DONE


def main() -> int:
    operations = ("resolve", "run", "check", "undo", "dry_run")
    parser = options(*operations)
    parser.add_argument("--file", required=True)
    parser.add_argument("--class", required=True)
    parser.add_argument("--digest", required=True)
    parser.add_argument("--type", action="append", default=[])
    parser.add_argument("--value", action="append", default=[])
    return execute(parser, dict.fromkeys(operations, call))


if __name__ == "__main__":
    # The file imports Refused from here by its full name: that must be the class which `execute` knows.
    sys.modules["actions.builtin.python_action"] = sys.modules["__main__"]
    sys.exit(main())
