"""Where crash tests kill, and what: the failpoints of the code, and the runs of the kill matrix."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

USUAL = [
    "intake_before_parse",
    "intake_before_record",
    "intake_after_record",
    "intake_before_response",
    "store_before_apply",
    "wal_before_write",
    "wal_after_write",
    "wal_before_sync",
    "wal_after_sync",
    "wal_before_ack",
    "investigate_before_evidence",
    "investigate_after_evidence",
    "investigate_before_diagnosed",
    "investigate_after_diagnosed",
    "investigate_before_plan",
    "investigate_after_plan",
    "investigate_after_verifying",
    "guard_after_plan",
    "runner_before_intent",
    "runner_after_intent",
    "runner_after_run",
    "runner_before_result",
    "runner_after_result",
    "runner_before_verify",
    "runner_after_verify",
    "sandbox_before_spawn",
    "sandbox_after_spawn",
    "sandbox_after_exit",
    "sandbox_before_cleanup",
]
UNDO = ["runner_before_undo", "runner_after_undo_intent", "runner_after_undo"]
APPROVAL = ["operations_after_approval"]
AGAIN = ["investigate_before_confirmed"]
TINY = ["wal_segment_created", "wal_snapshot_written", "wal_snapshot_renamed", "wal_pruned"]
CASES = [(name, "usual") for name in USUAL] + [(n, "undo") for n in UNDO] + [(n, "approval") for n in APPROVAL]
CASES += [(name, "tiny") for name in TINY] + [(name, "again") for name in AGAIN]
# These run in every test run, the others with the full volume (the kills around effects: test_crash_kills).
ALWAYS = {
    "intake_before_record",
    "wal_after_write",
    "wal_before_ack",
    "investigate_before_diagnosed",
    "operations_after_approval",
    "investigate_before_confirmed",
    "wal_snapshot_renamed",
}
# The journal's failpoints are passed by every record: the third passage is the record that a webhook makes.
PASSAGE = {"wal_before_write": 3, "wal_after_write": 3, "wal_before_sync": 3, "wal_after_sync": 3, "wal_before_ack": 3}
PASSAGE |= {"store_before_apply": 3, "wal_segment_created": 2, "wal_pruned": 1}
TINY_JOURNAL = "journal: {segment_bytes: 4KiB, snapshot_bytes: 8KiB}"


def service_of(name: str, scenario: str) -> str:
    return f"{name.replace('_', '-')}-sick" if scenario == "undo" else name.replace("_", "-")


# What the sandboxed process of tests/worlds/effect.py passes.
DO = ["do_begin", "do_done", "do_healed"]
UNDOES = ["undo_begin", "undo_done"]
CHECKS = ["check_begin", "check_end"]
# The agent's places around one effect.
AROUND = [
    "runner_after_intent",
    "sandbox_before_spawn",
    "sandbox_after_spawn",
    "sandbox_after_exit",
    "sandbox_before_cleanup",
    "runner_after_run",
    "runner_before_result",
    "runner_after_result",
]
SANDBOX = ["sandbox_before_spawn", "sandbox_after_spawn", "sandbox_after_exit", "sandbox_before_cleanup"]
SEED = 20261126
OUTSIDE = 24


@dataclass(frozen=True)
class Kill:
    """One run: who is killed where. `agent` is a failpoint with the passage, `process` a point of the effect; `outside`
    is (who, seconds after the effect's process was first seen). `sick`: the action does not help, so it is undone."""

    agent: str = ""
    process: str = ""
    outside: tuple[str, float] | None = None
    sick: bool = False
    linger: bool = False
    approval: bool = False
    number: int = 0

    @property
    def service(self) -> str:
        return f"kill-{self.number}" + ("-sick" if self.sick else "")

    @property
    def name(self) -> str:
        who = [self.agent and f"agent@{self.agent}", self.process and f"process@{self.process}"]
        who += [f"{self.outside[0]}@+{self.outside[1]:.2f}s"] if self.outside else []
        flags = [name for name in ("sick", "linger", "approval") if getattr(self, name)]
        return f"{self.number}: {' '.join(filter(None, [*who, *flags]))}"


def kill_matrix() -> list[Kill]:
    """Every failpoint of agent and process, alone and together; then seeded kills from outside at any moment."""
    runs = [Kill(agent=f"{f}:{PASSAGE.get(f, 1)}", linger=linger) for f in USUAL for linger in (False, True)]
    runs += [Kill(agent=f, sick=True, linger=linger) for f in UNDO for linger in (False, True)]
    runs += [Kill(agent=f"{f}:2", sick=True, linger=linger) for f in SANDBOX for linger in (False, True)]
    runs += [Kill(agent=f, approval=True) for f in [*APPROVAL, "investigate_after_plan", *AROUND]]
    runs += [
        Kill(process=p, sick=sick, linger=linger) for p in DO for sick in (False, True) for linger in (False, True)
    ]
    runs += [Kill(process=p, sick=True, linger=linger) for p in UNDOES for linger in (False, True)]
    runs += [Kill(agent=f, process=p, sick=sick) for f in AROUND for p in DO for sick in (False, True)]
    runs += [Kill(agent=f, process=p, linger=True) for f in AROUND for p in CHECKS]
    undoing = [*UNDO, *(f"{f}:2" for f in SANDBOX)]
    runs += [Kill(agent=f, process=p, sick=True) for f in undoing for p in [*UNDOES, "check_begin"]]
    dice = random.Random(SEED)
    for n in range(OUTSIDE):
        who = ("agent", "process", "both")[n % 3]
        runs.append(Kill(outside=(who, dice.uniform(0.0, 1.6)), linger=bool(n % 2), sick=n % 4 == 3))
    return [replace(run, number=n) for n, run in enumerate(runs)]


def dozen() -> list[Kill]:
    """A seeded choice that has every sort of run in it."""
    dice = random.Random(SEED)
    runs = kill_matrix()
    sorts = [
        [r for r in runs if r.agent and not r.process and not r.sick],
        [r for r in runs if r.agent in UNDO and not r.process],
        [r for r in runs if r.process in DO and not r.agent],
        [r for r in runs if r.process in UNDOES and not r.agent],
        [r for r in runs if r.agent in AROUND and r.process in DO],
        [r for r in runs if r.agent in AROUND and r.process in CHECKS],
    ]
    chosen = [run for sort in sorts for run in dice.sample(sort, 2)]
    return sorted(chosen, key=lambda r: r.number)


def all_services() -> list[str]:
    return [service_of(name, scenario) for name, scenario in CASES] + [run.service for run in kill_matrix()]
