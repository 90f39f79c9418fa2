"""The one dispatcher: each op goes to the fastest implementation for its device and dtype, else to reference.py."""

from __future__ import annotations

from batch.kernels.reference import (
    add_rms_norm,
    linear,
    mlp,
    nope_qk,
    paged_attention,
    rms_norm,
    rope_qk,
    route,
    routed_experts,
    silu_mul,
    write_kv,
)

__all__ = [
    "add_rms_norm", "linear", "mlp", "nope_qk", "paged_attention", "rms_norm", "rope_qk", "route", "routed_experts",
    "silu_mul", "write_kv",
]  # fmt: skip
