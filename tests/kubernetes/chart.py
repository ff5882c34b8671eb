"""Renders the chart with a real helm, for the tests of the chart and of what it grants."""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "alertmedic"
SETS = sorted(p.name.removesuffix("-values.yaml") for p in (CHART / "ci").glob("*-values.yaml"))
TOOLS = Path(
    os.environ.get("ALERTMEDIC_TOOLS")
    or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alertmedic"
)
KUBE_VERSION = "1.34.0"


def helms() -> list[Path]:
    """Every helm that tools/install-helm has installed, the newest first."""
    found = (TOOLS / "helm").glob("helm-*")
    return sorted((p for p in found if p.suffix != ".part"), key=_version, reverse=True)


def _version(path: Path) -> tuple[int, ...]:
    return tuple(int(n) for n in path.name.removeprefix("helm-").removeprefix("v").split("."))


def helm() -> Path:
    """The newest one; none: fails under CI=true, skips elsewhere."""
    if found := helms():
        return found[0]
    message = "no helm: run tools/install-helm test"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, check=False)


def template(program: Path, *arguments: str) -> str:
    done = run(program, "template", "alertmedic", str(CHART), "-n", "ops", "--kube-version", KUBE_VERSION, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def values_of(name: str) -> list[str]:
    return ["-f", str(CHART / "ci" / f"{name}-values.yaml")] if name != "default" else []


@functools.cache
def rendered(name: str) -> str:
    return template(helm(), *values_of(name))


def objects(text: str) -> list[dict[str, Any]]:
    return [o for o in yaml.safe_load_all(text) if o]


def kinds(items: list[dict[str, Any]], *wanted: str) -> list[dict[str, Any]]:
    return [o for o in items if o["kind"] in wanted]
