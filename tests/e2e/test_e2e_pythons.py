"""The other Pythons that are installed: the locked packages install there, and the suites without servers pass."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SUITES = ["tests/rules", "tests/flow", "tests/config", "tests/intake", "tests/journal"]


def interpreter(version: str) -> str | None:
    """A working python of that version: on PATH, or beside this one where several are kept."""
    found = [shutil.which(f"python{version}")]
    home = Path(sys.base_prefix).parent
    found += [str(p / "bin" / "python") for p in sorted(home.glob(f"{version}.*"))]
    for candidate in found:
        if candidate is None:
            continue
        asked = "import sys; print('%d.%d' % sys.version_info[:2])"
        told = subprocess.run([candidate, "-c", asked], capture_output=True, text=True, check=False)
        if told.returncode == 0 and told.stdout.strip() == version:
            return candidate
    return None


@pytest.mark.full
@pytest.mark.parametrize("version", ["3.12", "3.13"])
def test_another_python(version: str, tmp_path: Path) -> None:
    if sys.version_info[:2] == tuple(map(int, version.split("."))):
        pytest.skip("it is the one that runs the tests")
    python = interpreter(version)
    if python is None:
        pytest.skip(f"no Python {version} here")
    subprocess.run([python, "-m", "venv", str(tmp_path / "venv")], check=True)
    inside = str(tmp_path / "venv" / "bin" / "python")
    lock = str(ROOT / "requirements-dev.lock")
    subprocess.run([inside, "-m", "pip", "install", "-q", "--require-hashes", "-r", lock], check=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    tests = [inside, "-m", "pytest", "-m", "not full", *SUITES]
    done = subprocess.run(tests, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
