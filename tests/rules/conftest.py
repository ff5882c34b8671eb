"""Fixtures of the rules' tests: the shipped packs."""

from __future__ import annotations

import pytest

from agent.packs import load_packs
from rules.packs import PackSet


@pytest.fixture(scope="session")
def packs() -> PackSet:
    return load_packs()
