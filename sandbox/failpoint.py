"""Named places at which a test may kill this process with SIGKILL.

`ALERTMEDIC_FAILPOINT=name` (or `name:3` for the third passage) arms one; without it a passage costs one comparison.
Lives here because the lowest layer needs it too. Never does anything but kill: a failpoint cannot change behaviour.
"""

from __future__ import annotations

import os
import signal

_name, _, _count = os.environ.get("ALERTMEDIC_FAILPOINT", "").partition(":")
_left = int(_count or "1") if _name else 0
# By descriptor: a sandbox thread has given up the right to signal the agent by its number (`sandbox.syscalls`).
_self = os.pidfd_open(os.getpid()) if _name else -1


def failpoint(name: str) -> None:
    """Passing here ends the process if the environment armed `name`. Names are listed in tests/crash/failpoints.txt."""
    global _left
    if not _left or name != _name:
        return
    _left -= 1
    if _left == 0:
        signal.pidfd_send_signal(_self, signal.SIGKILL)
