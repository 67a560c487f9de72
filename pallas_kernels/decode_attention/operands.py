"""The arrays of a `decode_attention` call beside its queries and cache, after the checks of the api."""

from typing import NamedTuple

from jax import Array

CODES = ("int8", "float8_e4m3fn")  # dtypes of a quantized cache


class Operands(NamedTuple):
    """B batch, T queries, S cache slots, K kv heads, H head dim; integers are int32."""

    layer: Array  # []
    kv_lengths: Array  # [B]; leading cache slots that may be read; may exceed S for a ring that has wrapped
    k_positions: Array | None  # [B, S]; negative is empty; None: slot j holds position j
    q_positions: Array  # [B, T]; also the positions of the own keys
    own_k: Array | None  # [B, T, K, H]
    own_v: Array | None  # [B, T, K, H]
    own_lengths: Array | None  # [B]; leading own keys that may be seen
    window: Array | int | None  # keys at a position distance of `window` or more are cut ...
    num_sinks: Array | int  # ... unless their position is below `num_sinks`
    k_scale: Array | None = None  # [L, K] or [L, B, K, S]; a key is its codes times its scale; None: not codes
    v_scale: Array | None = None  # the same for values
