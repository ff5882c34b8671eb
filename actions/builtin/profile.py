"""Where a service's processes spend time, and what their memory consists of. Actions `diagnostic.cpu_profile` and
`diagnostic.heap_profile`; read-only.

Runs as `python -I -m actions.builtin.profile run --port PORT --mode cpu|heap`. The processes are the ones that listen
on the service's port with all that descends from them. cpu: py-spy samples the one that uses most CPU, if it is a
Python; without pausing it (--nonblocking), so a sample may be torn and is then left out. heap: the kernel's own account
of the memory of each (/proc/PID/smaps), by kind of mapping, looked at twice to show what grows. No value of any
variable is read, and no process is stopped. py-spy needs the right to read another process' memory (same user with
ptrace allowed, or CAP_SYS_PTRACE).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from actions.builtin import DONE, proc
from actions.builtin.diagnostic import service_processes
from actions.builtin.proc import Process
from actions.builtin.program import Trouble, execute, options, say, shorten, tool

MAX_STACKS = 25
MAX_PROCESSES = 10
MAX_MAPPINGS = 12


def processes(port: int) -> list[Process]:
    found = service_processes(proc.everyone(), {port})
    if not found:
        raise Trouble(f"nobody that may be looked at listens on port {port}")
    return found


def busiest(found: list[Process]) -> Process:
    """The process that uses most CPU within a moment."""
    time.sleep(0.3)
    later = {p.pid: p.cpu_ticks for p in map(proc.read, (p.pid for p in found)) if p is not None}
    return max(found, key=lambda p: later.get(p.pid, 0) - p.cpu_ticks)


def cpu(args: argparse.Namespace) -> dict[str, Any]:
    chosen = busiest(processes(args.port))
    program = Path(sys.executable).parent / "py-spy"
    if not program.exists():
        raise Trouble("py-spy is not installed: pip install 'alertmedic[profile]'")
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "stacks"
        tool(
            [str(program), "record", "--pid", str(chosen.pid), "--duration", str(args.duration), "--rate", "50",
             "--nonblocking", "--format", "raw", "--output", str(out)],
            seconds=args.duration + 15.0,
        )  # fmt: skip
        lines = out.read_text(errors="replace").splitlines()
    stacks: Counter[str] = Counter()
    leaves: Counter[str] = Counter()
    for line in lines:
        stack, _, count = line.rpartition(" ")
        if count.isdecimal() and stack:
            stacks[stack] += int(count)
            leaves[stack.rpartition(";")[2]] += int(count)
    total = sum(stacks.values())
    if not total:
        raise Trouble(f"pid {chosen.pid} ({chosen.name}) did not run Python code within {args.duration} s")
    return {
        "pid": chosen.pid,
        "command": proc.command_line(chosen.pid),
        "samples": total,
        "functions": {shorten(f, 160): round(n / total, 3) for f, n in leaves.most_common(MAX_STACKS)},
        "stacks": {shorten(s, 700): round(n / total, 3) for s, n in stacks.most_common(MAX_STACKS)},
    }


def kind_of(mapping: str) -> str:
    """heap, stack, anonymous, shared memory, or the file that is mapped."""
    if mapping in ("[heap]", "[stack]"):
        return mapping[1:-1]
    if not mapping or mapping.startswith("["):
        return "anonymous"
    return "shared memory" if mapping.startswith(("/dev/shm/", "/memfd:", "/SYSV")) else mapping  # noqa: S108


def memory(pid: int) -> Counter[str]:
    """Proportional bytes by kind of mapping (proc(5), smaps). Raises OSError."""
    kinds: Counter[str] = Counter()
    kind = ""
    with Path(f"/proc/{pid}/smaps").open(errors="replace") as file:
        for line in file:
            words = line.split()
            if words[0] == "Pss:":
                kinds[kind] += int(words[1]) * 1024
            elif not words[0].endswith(":"):
                kind = kind_of(line.split(maxsplit=5)[5].strip() if len(words) > 5 else "")
    return kinds


def heap(args: argparse.Namespace) -> dict[str, Any]:
    found = processes(args.port)[:MAX_PROCESSES]
    first = {p.pid: memory(p.pid) for p in found}
    time.sleep(args.duration)
    listed = []
    for p in found:
        try:
            now = memory(p.pid)
        except OSError:
            continue
        listed.append(
            {
                "pid": p.pid,
                "name": p.name,
                "pss_bytes": sum(now.values()),
                "grown_bytes": sum(now.values()) - sum(first[p.pid].values()),
                "kinds": {
                    shorten(kind, 120): {"bytes": n, "grown": n - first[p.pid][kind]}
                    for kind, n in now.most_common(MAX_MAPPINGS)
                },
            }
        )
    if not listed:
        raise Trouble("the processes have ended meanwhile")
    return {"seconds": args.duration, "processes": listed}


def run(args: argparse.Namespace) -> int:
    say({"cpu": cpu, "heap": heap}[args.mode](args))
    return DONE


def main() -> int:
    parser = options("run")
    parser.add_argument("--mode", choices=("cpu", "heap"), required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--duration", type=int, default=5)
    return execute(parser, {"run": run})


if __name__ == "__main__":
    sys.exit(main())
