"""Running one command in its own cgroup v2 leaf, or saying honestly what held it instead.

Called by `actions.runner`. Never decides whether something may run, and never parses a command.
"""
