"""No shell ever reads an argument: whatever it holds reaches the program to the byte."""

from __future__ import annotations

import json
import os
import sys

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sandbox import Limits, run

ROOMY = Limits(timeout_seconds=60, memory_bytes=512 << 20)
PYTHON = [sys.executable, "-I", "-S", "-c"]


async def test_hostile_arguments_arrive_verbatim() -> None:
    hostile = [
        "$(touch /tmp/pwned)",
        "`id`",
        "; rm -rf /",
        "-n",
        "--",
        "a\nb",
        "*",
        "~",
        "",
        " ",
        "\\",
        "'",
        '"',
        "${IFS}",
    ]
    script = "import json, sys; print(json.dumps(sys.argv[1:]))"
    result = await run([*PYTHON, script, *hostile], ROOMY)
    assert json.loads(result.stdout) == hostile


ARGUMENT = st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"])) | st.binary().map(
    lambda data: os.fsdecode(data.replace(b"\0", b""))
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(ARGUMENT, max_size=5))
@example(["Ł\x81\x88ł", os.fsdecode(bytes(range(1, 256)))])  # the bytes that dash uses internally as escapes
async def test_arguments_round_trip_to_the_byte(arguments: list[str]) -> None:
    script = "import os, sys; print(' '.join('x' + os.fsencode(a).hex() for a in sys.argv[1:]))"
    result = await run([*PYTHON, script, *arguments], ROOMY)
    assert result.stdout.split() == ["x" + os.fsencode(a).hex() for a in arguments], result
