"""What the subcommands do. `agent.cli` parses and calls one function here; each returns an exit code.

Modules by what a person wants: `look` (incidents, breakers, quarantine), `decide` (approve, reject, pause, reset),
`check` (configuration, packs), `journal`, `catalogue` (actions), `explore` (a Prometheus). Heavy imports are inside
functions: a command loads what it needs.
"""
