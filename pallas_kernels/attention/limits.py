"""What a call's arrays, beside its static mask, say about which keys a row of the batch may see."""

from typing import NamedTuple

from jax import Array


class Limits(NamedTuple):
    """Run-time limits of visibility; None where the call gave none. B batch, T queries, S keys; all int32.

    A key slot is *empty* when it lies at or beyond `kv_lengths`, or its position or segment is negative. Whatever
    an empty slot holds, NaN included, reaches neither outputs nor gradients, and its gradient is 0.
    """

    q_segments: Array | None = None  # [B, T]; pairs must agree; negative sees nothing
    k_segments: Array | None = None  # [B, S]; negative is empty
    q_positions: Array | None = None  # [B, T]; the mask's predicate then compares positions, not indices
    k_positions: Array | None = None  # [B, S]; negative is empty
    kv_lengths: Array | None = None  # [B]; leading slots in use
