"""A/B of two diagnosis channels on the same frozen evidence. `gateway` tells the whole story; see docs/gateway.md."""
