"""The demo's shop: the system that is watched, broken and healed.

Started by `agent.demo.world`: `front`, `orders` and `worker` under a supervisor, `payments` (somebody else's service)
and `load` (the customers) beside it. It knows nothing of AlertMedic, and nothing in it is scripted: every fault of
the demo is something a shop like this can suffer.
"""
