"""Diagnosis, pure: parsed packs, series and facts in; ranked hypotheses with their evidence out.

Called by `agent`. Never reads a clock, a file, the network or randomness, and knows neither `actions` nor `sandbox`.
"""
