"""Releases of `orders`: directories, of which a link `current` names the one that runs, as deployment tools keep them.

Written by `agent.chaos.world`, deployed by the injector. A release is its version and the part of the program that
differs between them; switching is one rename, and takes effect when the program is started again.
"""

from __future__ import annotations

from pathlib import Path

FIRST, HARMLESS, BAD = "20260301120000", "20260308120000", "20260315120000"
CURRENT = "current"
_SAME = '''"""What a product costs."""


def total(product, cents):
    return cents
'''
# The new tax table was tried with the newest articles of the catalogue only.
_BROKEN = '''"""What a product costs, with its tax."""

TAX = dict.fromkeys(range(21, 41), 0)


def total(product, cents):
    return cents + TAX[product]
'''


def write(directory: Path) -> None:
    """All releases, the first being the one that runs."""
    for version, program in ((FIRST, _SAME), (HARMLESS, _SAME), (BAD, _BROKEN)):
        (directory / version).mkdir(parents=True)
        (directory / version / "VERSION").write_text(version + "\n")
        (directory / version / "pricing.py").write_text(program)
    switch(directory, FIRST)


def current(directory: Path) -> str:
    return (directory / CURRENT).readlink().name


def switch(directory: Path, version: str) -> None:
    """Makes `current` name this release, at once."""
    new = directory / f".{CURRENT}.new"
    new.unlink(missing_ok=True)
    new.symlink_to(version)
    new.replace(directory / CURRENT)
