"""Actions written as Python classes: the same definitions as in YAML, with methods instead of programs.

Called by `actions.catalog`, which reads `*.py` beside `*.yaml` in the configured directories. A class is an action when
its base is called `Action`. Its attributes are the keys of a definition, as literals; its methods `resolve`, `run`,
`check`, `undo` and `dry_run` become the programs. Nothing of the file is executed here: the declaration is read from
the syntax tree. The methods run in the sandbox, through `actions.builtin.python_action`, which gets the file's digest
and refuses when the file has been changed since the plan was made.
"""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path
from typing import Any

BASE = "Action"
METHODS = ("resolve", "run", "check", "undo", "dry_run")


def definitions_of(source: bytes, path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The definitions of a file as plain data, as YAML would give them, and the faults in words."""
    try:
        tree = ast.parse(source, str(path))
    except (SyntaxError, ValueError, RecursionError) as error:
        return [], [f"{path}: no valid Python: {error}"]
    digest = hashlib.blake2b(source, digest_size=16).hexdigest()
    found: list[dict[str, Any]] = []
    faults: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and any(_base_name(base) == BASE for base in node.bases):
            data = _attributes(node, path, faults)
            found.append(data | _programs(node, data, path, digest, faults))
    return found, faults


def _base_name(base: ast.expr) -> str:
    return base.attr if isinstance(base, ast.Attribute) else base.id if isinstance(base, ast.Name) else ""


def _attributes(node: ast.ClassDef, path: Path, faults: list[str]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    if text := ast.get_docstring(node):
        data["description"] = " ".join(text.split("\n\n")[0].split())
    for item in node.body:
        if isinstance(item, ast.Assign) and len(item.targets) == 1 and isinstance(item.targets[0], ast.Name):
            key, value = item.targets[0].id, item.value
        elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.value is not None:
            key, value = item.target.id, item.value
        else:
            continue
        if key.startswith("_"):
            continue
        if key in METHODS and key not in ("undo", "dry_run"):
            faults.append(f"{path}: {node.name}.{key}: is a method in a class, not a list")
            continue
        try:
            data[key] = ast.literal_eval(value)
        except ValueError:
            faults.append(f"{path}: {node.name}.{key}: must be a literal: the class is read, not executed")
    return data


def _programs(
    node: ast.ClassDef, data: dict[str, Any], path: Path, digest: str, faults: list[str]
) -> dict[str, list[str]]:
    """The argument lists by which the sandbox calls the methods, each with the parameters that the method takes."""
    parameters = data.get("parameters", {})
    declared = set(parameters) if isinstance(parameters, dict) else set()
    methods = {m.name: m for m in node.body if isinstance(m, ast.FunctionDef) and m.name in METHODS}
    if "run" not in methods:
        faults.append(f"{path}: {node.name}: has no method run")
    programs: dict[str, list[str]] = {}
    for name, method in methods.items():
        taken = [a.arg for a in (*method.args.args[1:], *method.args.kwonlyargs)]
        if unknown := [a for a in taken if a not in declared]:
            faults.append(f"{path}: {node.name}.{name}: takes {', '.join(unknown)}, no parameter of this action")
            continue
        call = ["{python}", "-I", "-m", "actions.builtin.python_action", name, f"--file={path}", f"--class={node.name}"]
        kinds = [f"--type={a}:{parameters[a].get('type', 'string')}" for a in taken if isinstance(parameters[a], dict)]
        values = [f"--value={a}={{{a}}}" for a in taken]
        programs["argv" if name == "run" else name] = [*call, f"--digest={digest}", *kinds, *values]
    return programs
