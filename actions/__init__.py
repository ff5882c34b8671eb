"""Remediation: deciding what may be done, and doing it step by step in the sandbox.

Called by `agent`. Never diagnoses: it gets a proposal as plain data. May import `sandbox` only.
"""
