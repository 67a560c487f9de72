"""`flash_attention`: argument checks and the choice of implementation."""

from typing import Any

from jaxtyping import Array, Float, Int

from pallas_kernels.attention import cudnn, mosaic_sm90, reference, xla
from pallas_kernels.attention import skip as rule
from pallas_kernels.attention.checks import check_choice, check_heads, check_scale, int_array_or_none
from pallas_kernels.attention.limits import Limits
from pallas_kernels.attention.skip import SkipTile
from pallas_kernels.masks import BlockDiffusion, Causal, Mask

# Each module has `unsupported(q, k, v, *, mask, limits, scale, return_lse, skip)`: None, or why not, in words; and
# `run(...)` without `return_lse`, returning (output, log-sum-exp), with a `skip` (output, log-sum-exp, kept tiles).
# `run` of a module that never skips need not know `skip`.
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
    skip_threshold: float | Float[Array, ""] | Float[Array, "B"] | None = None,
    skip_scale_factor: float | Float[Array, ""] | Float[Array, "B"] | None = None,
    skip_tile: SkipTile | None = None,
    return_lse: bool = False,
    return_stats: bool = False,
    return_selection: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T N Hv"] | tuple[Any, ...]:
    """Softmax attention over the keys that a structured mask lets each query see, optionally with skipped tiles.

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
      skip_threshold: λ of BLASST: leaves out tiles whose every score lies ln λ or more below what its row has seen
        before, as `attention/skip.py` defines. A number or an array `[]` or `[B]`. Python and NumPy values must lie
        inside (0, 1); a JAX array, traced or not, never recompiles and means dense outside. None is dense.
      skip_scale_factor: the same as λ · L with L the keys of each row (`kv_lengths`, else S): one value for all
        lengths. Rows with L <= factor are dense. Not with `segment_ids`, whose lengths a row does not tell.
      skip_tile: which rows vote on which keys; None is `SkipTile()`. Part of the meaning, never tuned.
      return_lse: also return the natural log-sum-exp of the scaled visible scores in kept tiles, float32 `[B, N, T]`.
      return_stats: also return `SkipStats`, exact counts of visited and skipped tiles; costs time.
      return_selection: also return which tiles were kept, bool `[B, N, ceil(T / rows), ceil(S / width)]`.
      implementation: None chooses; a name runs that or raises. "mosaic" (Hopper) has gradients up to head dim 128.

    Returns:
      The output `[B, T, N, Hv]`; if anything else was asked for, a tuple of output, log-sum-exp, statistics and
      selection, those asked for in this order.

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
    lengths = rule.number_of_keys(num_keys, batch, limits.kv_lengths, limits.k_positions)
    skip = rule.resolve(skip_threshold, skip_scale_factor, skip_tile, lengths)
    if skip is not None:
        rule.check_mask(mask)
        if skip.tile.chains != 1:
            raise ValueError(f"chains are for decode_attention, flash_attention has one; got {skip.tile}")
        if skip_scale_factor is not None and segment_ids is not None:
            raise ValueError(
                "skip_scale_factor divides by the length of a sequence, which a row packed by segment_ids does not "
                "tell; give skip_threshold"
            )
    elif return_stats or return_selection:
        raise ValueError("return_stats and return_selection tell of skipped tiles: give a threshold")
    options: dict[str, Any] = {"mask": mask, "limits": limits, "scale": check_scale(scale, q.shape[-1])}
    reason = None
    for name in AUTOMATIC if implementation is None else (implementation,):
        reason = IMPLEMENTATIONS[name].unsupported(q, k, v, **options, return_lse=return_lse, skip=skip)
        if reason is not None:
            continue
        if skip is None:
            out, lse = IMPLEMENTATIONS[name].run(q, k, v, **options)
            return (out, lse) if return_lse else out
        out, lse, keep = IMPLEMENTATIONS[name].run(q, k, v, **options, skip=skip)
        results = [out]
        if return_lse:
            results.append(lse)
        if return_stats:
            visited = xla.visited_tiles(mask, limits, batch, num_queries, num_keys, skip.tile)
            results.append(rule.stats(keep, visited, skip))
        if return_selection:
            results.append(keep)
        return tuple(results) if len(results) > 1 else out
    raise NotImplementedError(f"flash_attention {implementation!r}: {reason}")
