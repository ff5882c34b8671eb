"""The chaos harness: breaks a real service on purpose, measures from outside how long it stays broken, and compares
what heals it.

`alertmedic chaos` runs it; `agent.chaos.scenario`, `agent.chaos.measure` and `agent.chaos.run` can be imported for
tests of one's own. Nothing of the agent's service imports it, and nothing here tells the agent what was broken.
"""
