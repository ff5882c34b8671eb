"""The journal: what happened, durable before anybody is told. See `records` (kinds) and `wal` (the local log)."""
