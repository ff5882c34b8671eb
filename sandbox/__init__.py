"""Running one command in its own cgroup v2 leaf, or saying honestly what held it instead.

Called by `actions.runner`. Never decides whether something may run, and never parses a command.
"""

from sandbox.capability import Capability, SandboxUnavailable, probe
from sandbox.execution import current, kill_leaf, leaf_name, run, sweep, use
from sandbox.hardening import absent as absent_layers
from sandbox.hardening import present as host_layers
from sandbox.hardening import shield
from sandbox.model import EnforcedBy, Layer, Limits, Needs, Protection, RunResult, Totals

__all__ = [
    "Capability",
    "EnforcedBy",
    "Layer",
    "Limits",
    "Needs",
    "Protection",
    "RunResult",
    "SandboxUnavailable",
    "Totals",
    "absent_layers",
    "current",
    "host_layers",
    "kill_leaf",
    "leaf_name",
    "probe",
    "run",
    "shield",
    "sweep",
    "use",
]
