"""The service: everything that touches the world.

`agent` takes alerts in, keeps the journal, gathers evidence, asks `rules` for hypotheses and `actions` for remediation.
It may import `rules`, `actions` and `sandbox`; nothing imports it.
"""

__version__ = "0.1.0"
