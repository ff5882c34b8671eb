"""Restarts a unit through systemd. Action `service.restart.systemd`.

Runs as `python -I -m actions.builtin.systemd resolve|run|check`. systemd is the parent of what it starts, so nothing of
the service ends with our sandbox. A unit's identity is its name with the invocation id that systemd gives each start;
where that has changed since the plan, somebody else has restarted it and nothing is done.

Never enables, masks or edits units.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

from actions.builtin import CANNOT_TELL, DONE, FAILED, NOTHING_DONE, crashed

SHOW_SECONDS = 5.0
POLL_SECONDS = 0.1
PROPERTIES = ("Id", "LoadState", "ActiveState", "SubState", "MainPID", "InvocationID", "RefuseManualStop")
TRANSITIONAL = ("activating", "deactivating", "reloading")


class SystemctlError(Exception):
    """systemctl could not be asked, or knows no such unit."""


def show(unit: str) -> dict[str, str]:
    """The unit's properties. Raises SystemctlError."""
    argv = ["systemctl", "show", "--no-pager", *(f"--property={p}" for p in PROPERTIES), "--", unit]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=SHOW_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SystemctlError(str(error)) from error
    if done.returncode != 0:
        raise SystemctlError(done.stderr.strip() or f"exit code {done.returncode}")
    found = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    if found.get("LoadState") != "loaded":
        raise SystemctlError(f"{unit} is {found.get('LoadState', 'unknown')}")
    return found


def resolve(unit: str) -> int:
    found = show(unit)
    if found.get("RefuseManualStop") == "yes":
        _say([])
        return DONE
    target = {
        "identity": f"unit={unit}",
        "params": {"invocation": found.get("InvocationID") or "none"},
        "note": f"{unit} is {found['ActiveState']} ({found.get('SubState', '')}), main pid {found.get('MainPID', '0')}",
    }
    _say([target])
    return DONE


def run(unit: str, invocation: str, seconds: float) -> int:
    before = show(unit)
    if (before.get("InvocationID") or "none") != invocation:
        _say({"refused": f"{unit} has been started anew since the plan was made"})
        return NOTHING_DONE
    argv = ["systemctl", "restart", "--", unit]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=seconds, check=False)
    after = show(unit)
    _say({"unit": unit, "before": before, "after": after, "stderr": done.stderr[-2000:]})
    return DONE if done.returncode == 0 and after["ActiveState"] == "active" else FAILED


def check(unit: str, invocation: str, seconds: float) -> int:
    """It has happened when the unit is active under another invocation id than planned."""
    deadline = time.monotonic() + seconds
    found = show(unit)
    while found["ActiveState"] in TRANSITIONAL and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        found = show(unit)
    _say({"unit": unit, "now": found})
    if found["ActiveState"] in TRANSITIONAL:
        return CANNOT_TELL
    changed = (found.get("InvocationID") or "none") != invocation
    return DONE if changed and found["ActiveState"] == "active" else FAILED


def _say(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("operation", choices=("resolve", "run", "check"))
    parser.add_argument("--unit", required=True)
    parser.add_argument("--invocation", default="")
    parser.add_argument("--seconds", type=float, default=90.0)
    args = parser.parse_args(argv)
    try:
        if args.operation == "resolve":
            return resolve(args.unit)
        if args.operation == "check":
            return check(args.unit, args.invocation, min(args.seconds, 10.0))
        return run(args.unit, args.invocation, args.seconds)
    except (SystemctlError, OSError, subprocess.SubprocessError) as error:
        sys.stderr.write(f"systemctl: {args.operation} {args.unit}: {error}\n")
        return CANNOT_TELL if args.operation == "check" else FAILED


if __name__ == "__main__":
    sys.excepthook = crashed
    sys.exit(main())
