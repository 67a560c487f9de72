"""`flash_attention`: argument checks and the choice of implementation."""

from typing import Any

from jaxtyping import Array, Float, Int

from pallas_kernels.attention import cudnn, mosaic_sm90, reference, xla
from pallas_kernels.attention.checks import check_choice, check_heads, check_scale, int_array_or_none
from pallas_kernels.attention.limits import Limits
from pallas_kernels.masks import BlockDiffusion, Causal, Mask

# Each module has `unsupported(q, k, v, *, mask, limits, scale, return_lse)`: None, or why not, in words; and `run(...)`
# without `return_lse`, returning (output, log-sum-exp).
IMPLEMENTATIONS: dict[str, Any] = {"mosaic": mosaic_sm90, "cudnn": cudnn, "xla": xla, "reference": reference}
# Tried in this order when implementation is None. A GPU kernel joins once a committed GPU result covers it.
AUTOMATIC = ("xla",)


def flash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    *,
    mask: Mask = Causal(),
    segment_ids: Int[Array, "B T"] | tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    q_positions: Int[Array, "B T"] | None = None,
    k_positions: Int[Array, "B S"] | None = None,
    kv_lengths: Int[Array, "B"] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T N Hv"] | tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
    """Softmax attention over the keys that a structured mask lets each query see.

    Query head n reads key head n // (N / K). Scores, softmax and sums are float32 (float64 for float64 inputs);
    the output has the dtype of `q`. A pair is visible when all of these hold:

    - `mask.allowed(i, j)`, by index (query i stands for `i + mask.query_offset(T, S)`, bottom right for causal
      kinds) or by position where positions are given;
    - the segment ids are equal and not negative;
    - slot j is not empty: `j < kv_lengths[b]` and `k_positions[b, j] >= 0`.

    A query that sees nothing gives output 0, log-sum-exp -inf and gradient 0. What an empty slot holds never
    matters, be it NaN.

    Args:
      q: queries; bfloat16, float16, float32 or float64.
      k: keys, dtype of `q`; N a multiple of K.
      v: values, like `k` but for a head dim of their own (Hv).
      mask: static structure, see `pallas_kernels.masks`.
      segment_ids: documents of a packed row; one array for T = S, or a pair for queries and keys.
      q_positions: what the mask compares instead of query indices. Positions may be given for one side alone. Not
        for `BlockDiffusion`, whose indices run over the doubled sequence. With positions the live tiles are not
        known at compile time, so every tile is visited.
      k_positions: the same for key slots; negative is empty.
      kv_lengths: leading key slots in use, per row.
      scale: of the scores; None is H ** -0.5. Static.
      return_lse: also return the natural log-sum-exp of the scaled visible scores, float32 `[B, N, T]`.
      implementation: None chooses; a name runs that or raises. "mosaic" (Hopper) has no gradients.

    Raises:
      ValueError: arguments that do not fit together.
      NotImplementedError: the implementation asked for cannot run this call, and why.
    """
    check_heads(("q", q), ("k", k), ("v", v))
    batch, num_queries = q.shape[:2]
    num_keys = k.shape[1]
    if not isinstance(mask, Mask):
        raise ValueError(f"mask must be a pallas_kernels.masks.Mask; got {mask!r}")
    mask.check(num_queries, num_keys)
    if isinstance(mask, BlockDiffusion) and (q_positions is not None or k_positions is not None):
        raise ValueError(f"positions cannot be given with {mask}: it compares indices of the doubled sequence")
    if segment_ids is None:
        q_segments = k_segments = None
    elif isinstance(segment_ids, tuple):
        q_segments, k_segments = segment_ids
    elif num_queries != num_keys:
        raise ValueError(
            f"segment_ids must be a pair (queries, keys) when T != S; got one array for T={num_queries}, S={num_keys}"
        )
    else:
        q_segments = k_segments = segment_ids
    limits = Limits(
        q_segments=int_array_or_none("segment_ids of the queries", q_segments, (batch, num_queries)),
        k_segments=int_array_or_none("segment_ids of the keys", k_segments, (batch, num_keys)),
        q_positions=int_array_or_none("q_positions", q_positions, (batch, num_queries)),
        k_positions=int_array_or_none("k_positions", k_positions, (batch, num_keys)),
        kv_lengths=int_array_or_none("kv_lengths", kv_lengths, (batch,)),
    )
    check_choice(implementation, IMPLEMENTATIONS)
    options = {"mask": mask, "limits": limits, "scale": check_scale(scale, q.shape[-1])}
    reason = None
    for name in AUTOMATIC if implementation is None else (implementation,):
        reason = IMPLEMENTATIONS[name].unsupported(q, k, v, **options, return_lse=return_lse)
        if reason is None:
            out, lse = IMPLEMENTATIONS[name].run(q, k, v, **options)
            return (out, lse) if return_lse else out
    raise NotImplementedError(f"flash_attention {implementation!r}: {reason}")
