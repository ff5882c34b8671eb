"""Logs: one line a record, the incident's id from the task, nothing that a terminal would obey."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import log

NASTY = "a\x1b[2Jb\r\nc\x07\u202ed\x7fe\udc80"


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_json_lines_name_the_incident_of_their_task() -> None:
    out = io.StringIO()
    log.configure("json", "info", out)
    logger = logging.getLogger("alertmedic.test")

    async def work(incident: str) -> None:
        with log.incident(incident):
            await asyncio.sleep(0)
            logger.info("looked at %s", NASTY, extra={"state": "open"})

    async def both() -> None:
        await asyncio.gather(work("inc-a"), work("inc-b"))
        logger.warning("outside")

    asyncio.run(both())
    lines = out.getvalue().splitlines()
    assert out.getvalue().isascii()
    a, b, outside = map(json.loads, lines)
    assert (a["incident"], b["incident"]) == ("inc-a", "inc-b")
    assert a["message"] == "looked at " + NASTY
    assert (a["level"], a["logger"], a["state"]) == ("info", "alertmedic.test", "open")
    assert a["time"].endswith("Z")
    assert "incident" not in outside


def test_text_lines_are_one_line_and_printable() -> None:
    out = io.StringIO()
    log.configure("text", "debug", out)
    with log.incident("inc-a"):
        logging.getLogger("x").info("alert %s", NASTY, extra={"label": NASTY})
    (line,) = out.getvalue().splitlines()
    assert line.isprintable()
    assert line.endswith(r"a\x1b[2Jb\r\nc\x07\u202ed\x7fe\udc80")
    assert "INFO x alert a" in line
    assert "incident=inc-a label=" in line


def test_errors_keep_their_traceback() -> None:
    for form in ("text", "json"):
        out = io.StringIO()
        log.configure(form, "info", out)  # type: ignore[arg-type]
        try:
            raise ValueError(NASTY)
        except ValueError:
            logging.getLogger("x").exception("broken")
        text = out.getvalue()
        assert "Traceback" in text
        assert "\x1b" not in text
        assert "\x7f" not in text


def test_the_level_counts_and_configuring_again_replaces() -> None:
    first, second = io.StringIO(), io.StringIO()
    log.configure("text", "info", first)
    log.configure("text", "warning", second)
    logging.getLogger("x").info("quiet")
    logging.getLogger("x").warning("loud")
    assert first.getvalue() == ""
    assert second.getvalue().count("\n") == 1


@given(st.text())
def test_printable_leaves_nothing_that_a_terminal_obeys_and_keeps_what_is_printable(text: str) -> None:
    shown = log.printable(text)
    assert shown.isprintable()
    assert log.printable(shown) == shown
    if text.isprintable():
        assert shown == text
    kept = log.printable(text, lines=True)
    assert all(line.isprintable() for line in kept.replace("\t", " ").split("\n"))
