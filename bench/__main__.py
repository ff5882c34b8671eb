"""`make bench`: every benchmark in one run, each as ratios against a named reference measured in the same run.

Absolute figures depend on the machine and the moment; the ratios are what to quote. `--json` prints them for programs,
and build/bench.json keeps them.

    python -m bench [--json] [--quick]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from bench import diagnosis, gateway, journal, kubernetes, lag, live, sandbox, startup, webhook

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "build" / "bench.json"


def _in_vm(seconds: float) -> dict[str, Any]:
    """The sandbox's bench where limits are enforced: inside user-mode-linux, unless this machine enforces them."""
    command = [str(ROOT / "tools" / "cgroup-vm"), "--", sys.executable, "-m", "bench.sandbox", str(seconds)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return {"not_measured": f"tools/cgroup-vm ended with {done.returncode}: it needs root and user-mode-linux"}
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Ratios against named references.")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.add_argument("--quick", action="store_true", help="a quarter of the time, for a first look")
    given = parser.parse_args()
    share = 0.25 if given.quick else 1.0
    benches: dict[str, Callable[[], dict[str, Any]]] = {
        "webhook": lambda: webhook.bench(48.0 * share),
        "journal": lambda: journal.bench(18.0 * share),
        "sandbox": lambda: sandbox.bench(24.0 * share),
        "sandbox_in_user_mode_linux": lambda: _in_vm(24.0 * share),
        "live_diagnosis": lambda: live.bench(5 if given.quick else 15),
        "gateway": lambda: gateway.bench(60.0 * share),
        "lag": lambda: lag.bench(250 if given.quick else lag.STEPS),
        "diagnosis": lambda: diagnosis.bench(18.0 * share),
        "kubernetes_10000_pods": lambda: kubernetes.bench(60.0 * share),
        "startup": lambda: startup.bench(3 if given.quick else 9),
    }
    figures: dict[str, Any] = {}
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=given.json) as progress:
        for name, run in benches.items():
            task = progress.add_task(f"measuring {name}")
            figures[name] = run()
            progress.remove_task(task)
            if not given.json:
                print(f"{name}:\n{json.dumps(figures[name], indent=2)}", flush=True)
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(json.dumps(figures, indent=2) + "\n")
    if given.json:
        print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
