"""The shipped actions: small programs that run in the sandbox, one module each, started as `python -I -m`.

Called by nobody in this process. They import as little as they can (they get a quarter of a CPU), take everything as
arguments, print one JSON document, and end with one of the exit codes below. Each looks at its target's identity again
at the moment it acts. A program that fails in a way it does not know ends with CANNOT_TELL: Python's own exit code for
that is 1, with which a check would say that nothing has happened, and the action would be done again.
"""

import os
import sys
from types import TracebackType

DONE = 0  # of an action: done; of a check: it has happened
FAILED = 1  # of an action: it failed, perhaps half-way; of a check: it has not happened
NOTHING_DONE = 93  # of an action: the target is not what was planned, or must not be touched; nothing was changed
CANNOT_TELL = 94  # of a check
MAX_SECRET = 65536  # bytes


def secret(name: str) -> str:
    """A secret of this run, "" if there is none. By descriptor (`NAME_FD` holds its number: `by: descriptor` in
    the action) or, where a person starts the program, in the variable NAME itself."""
    number = os.environ.get(f"{name}_FD", "")
    if number.isdecimal():
        return os.pread(int(number), MAX_SECRET, 0).decode()
    return os.environ.get(name, "")


def crashed(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The `sys.excepthook` of every shipped program."""
    sys.__excepthook__(kind, error, trace)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(CANNOT_TELL)
