"""Compute kernels: `ops.py` dispatches, `reference.py` is the specification and the fallback."""
