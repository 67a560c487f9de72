"""`decode_attention`: argument checks and the choice of implementation."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from pallas_kernels import dispatch
from pallas_kernels.attention import skip as rule
from pallas_kernels.attention.checks import check_choice, check_heads, check_scale, int_array, int_array_or_none
from pallas_kernels.attention.skip import DECODE_TILE, Skip, SkipStats, SkipTile
from pallas_kernels.decode_attention import mosaic_sm90, reference, xla
from pallas_kernels.decode_attention.operands import CODES, Operands
from pallas_kernels.masks import BlockDiffusion, Causal, Mask

# Each module has `unsupported(q, k_cache, v_cache, *, operands, own_mask, scale, skip)`: None, or why
# not, in words; and `run(...)` of the same arguments, returning (output, log-sum-exp), with a `skip` (output,
# log-sum-exp, kept tiles bool [B, K, tiles]). `run` of a module that never skips need not know `skip`.
IMPLEMENTATIONS: dict[str, Any] = {"mosaic": mosaic_sm90, "xla": xla, "reference": reference}


def decode_attention(
    q: Float[Array, "B T N H"],
    k_cache: Num[Array, "L B S K H"],
    v_cache: Num[Array, "L B S K H"],
    *,
    layer: int | Int[Array, ""],
    kv_lengths: Int[Array, "B"],
    k_positions: Int[Array, "B S"] | None = None,
    k_scale: Float[Array, "..."] | None = None,
    v_scale: Float[Array, "..."] | None = None,
    q_positions: Int[Array, "B T"] | None = None,
    own_k: Float[Array, "B T K H"] | None = None,
    own_v: Float[Array, "B T K H"] | None = None,
    own_mask: Mask = Causal(),
    own_lengths: Int[Array, "B"] | None = None,
    window: int | Int[Array, ""] | None = None,
    num_sinks: int | Int[Array, ""] = 0,
    scale: float | None = None,
    skip_threshold: float | Float[Array, ""] | Float[Array, "B"] | None = None,
    skip_scale_factor: float | Float[Array, ""] | Float[Array, "B"] | None = None,
    skip_tile: SkipTile | None = None,
    return_lse: bool = False,
    return_stats: bool = False,
    implementation: str | None = None,
) -> Any:
    """Attention of new tokens to one layer of a stacked cache and to each other; reads the cache, never writes it.

    Query head n reads key head n // (N / K). Scores, softmax and sums are float32 (float64 for float64 inputs); the
    output has the dtype of `q`. For inference: no gradient is defined. Work follows max(kv_lengths), not S.

    - Cache slot j of row b is seen by every query when `j < kv_lengths[b]` and, if given, `k_positions[b, j] >= 0`.
    - Own key j is seen by query i when `own_mask.allowed(i, j)` (indices 0..T-1 among the new tokens) and
      `j < own_lengths[b]`.
    - With a `window`, either kind must also be near, `q_position - k_position < window`, or a sink,
      `k_position < num_sinks`.

    A query that sees nothing gives output 0 and log-sum-exp -inf. What an empty slot holds (beyond `kv_lengths`, at a
    negative position, or an own key beyond `own_lengths`) never matters, be it NaN.

    A cache may hold codes, int8 or float8_e4m3fn, whose real values are `codes * scale`. The scales are multiplied into
    scores and probabilities, so that no dequantized cache is ever made.

    Args:
      q: queries of the new tokens; bfloat16, float16, float32 or float64.
      k_cache: keys of all layers, dtype of `q` or codes; N a multiple of K.
      v_cache: values of all layers, like `k_cache`.
      layer: which of the L layers to read; may be traced (then it is clamped to 0..L-1).
      kv_lengths: leading slots in use. May exceed S (a ring that has wrapped), then all S are in use.
      k_positions: position held by each slot, negative is empty; None: slot j holds position j.
      k_scale: with codes only: float32, bfloat16 or float16; `[L]` per layer, `[L, K]` per layer and key head, or
        `[L, B, K, S]` per token and key head (slots last: a kernel reads a tile of them as one line).
      v_scale: the same for values; its shape may be another of the three.
      q_positions: positions of the new tokens; None is `kv_lengths[b] + i`.
      own_k: keys of the new tokens, dtype of `q`, not (yet) in the cache; None: only the cache is read.
      own_v: values of the new tokens.
      own_mask: who among the new tokens sees whom. Not `BlockDiffusion`.
      own_lengths: leading new tokens that are real, per row.
      window: sliding window in positions, static or traced; None sees everything.
      num_sinks: with a window, positions below this stay visible; static or traced.
      scale: of the scores; None is H ** -0.5. Static.
      skip_threshold: λ of BLASST: leaves out tiles of the cache whose every score lies ln λ or more below what its row
        has seen before in the tile's chain, as `attention/skip.py` defines. A number or an array `[]` or `[B]`. Python
        and NumPy values must lie inside (0, 1); for values that JAX holds, others mean dense. Not with a `window`.
      skip_scale_factor: the same as λ · L, with L the slots in use and the own keys of each row.
      skip_tile: keys of a tile and number of chains; None is `DECODE_TILE`; its `rows` play no part: all queries of a
        key head vote together. Part of the meaning, never tuned.
      return_lse: also return the natural log-sum-exp of the scaled visible scores, float32 `[B, N, T]`.
      return_stats: also return `SkipStats` with counts per key head `[B, K]`; needs a threshold.
      implementation: None chooses what was measured to be fastest (`automatic`); a name runs that or raises.

    Returns:
      The output `[B, T, N, H]`; or a tuple of it and what `return_lse` and `return_stats` ask for, in this order.

    Raises:
      ValueError: arguments that do not fit together.
      NotImplementedError: the implementation asked for cannot run this call, and why.
    """
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.ndim != 5:
            raise ValueError(f"{name} must be [layers, batch, slots, kv_heads, head_dim]; got shape {cache.shape}")
    if k_cache.shape != v_cache.shape:
        raise ValueError(f"k_cache and v_cache must have one shape; got {k_cache.shape} and {v_cache.shape}")
    if k_cache.dtype != v_cache.dtype:
        raise ValueError(f"k_cache and v_cache must have one dtype; got {k_cache.dtype} and {v_cache.dtype}")
    num_layers, _, capacity = k_cache.shape[:3]
    has_codes = str(k_cache.dtype) in CODES
    # Codes stand for values of q's dtype; everything else must have it.
    one_layer = jax.ShapeDtypeStruct(k_cache.shape[1:], q.dtype if has_codes else k_cache.dtype)
    check_heads(("q", q), ("k_cache", one_layer), ("v_cache", one_layer))
    batch, num_queries = q.shape[:2]
    if isinstance(layer, int) and not 0 <= layer < num_layers:
        raise ValueError(f"layer must lie in 0..{num_layers - 1}; got {layer}")
    if (own_k is None) != (own_v is None):
        raise ValueError("own_k and own_v must be given together")
    if own_k is not None and own_v is not None:
        shape = (batch, num_queries, *k_cache.shape[3:])
        for name, own in (("own_k", own_k), ("own_v", own_v)):
            if own.shape != shape or own.dtype != q.dtype:
                raise ValueError(f"{name} must be {q.dtype}{list(shape)}; got {own.dtype}{list(own.shape)}")
    elif own_lengths is not None:
        raise ValueError("own_lengths needs own_k and own_v")
    if not isinstance(own_mask, Mask) or isinstance(own_mask, BlockDiffusion):
        raise ValueError(f"own_mask must be a Mask over the new tokens and not BlockDiffusion; got {own_mask!r}")
    if isinstance(window, int) and window < 1:
        raise ValueError(f"window must be at least 1 or None; got {window}")
    if isinstance(num_sinks, int) and num_sinks < 0:
        raise ValueError(f"num_sinks must not be negative; got {num_sinks}")
    if window is None and isinstance(num_sinks, int) and num_sinks:
        raise ValueError(f"num_sinks={num_sinks} needs a window: without one every key is seen")
    lengths = int_array("kv_lengths", kv_lengths, (batch,))
    positions = int_array_or_none("q_positions", q_positions, (batch, num_queries))
    k_scale, v_scale = (
        _scales(name, scales, cache_name, k_cache)
        for name, scales, cache_name in (("k_scale", k_scale, "k_cache"), ("v_scale", v_scale, "v_cache"))
    )
    operands = Operands(
        layer=jnp.asarray(layer, jnp.int32),
        kv_lengths=lengths,
        k_positions=int_array_or_none("k_positions", k_positions, (batch, capacity)),
        q_positions=lengths[:, None] + jnp.arange(num_queries) if positions is None else positions,
        own_k=own_k,
        own_v=own_v,
        own_lengths=int_array_or_none("own_lengths", own_lengths, (batch,)),
        window=window,
        num_sinks=num_sinks,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    options: dict[str, Any] = {"operands": operands, "own_mask": own_mask, "scale": check_scale(scale, q.shape[-1])}
    check_choice(implementation, IMPLEMENTATIONS)
    keys = rule.number_of_keys(capacity, batch, lengths, operands.k_positions)
    if own_k is not None:
        keys += num_queries if operands.own_lengths is None else jnp.clip(operands.own_lengths, 0, num_queries)
    has_threshold = skip_threshold is not None or skip_scale_factor is not None
    tile = DECODE_TILE if skip_tile is None and has_threshold else skip_tile
    skip = rule.resolve(skip_threshold, skip_scale_factor, tile, keys)
    if skip is None and return_stats:
        raise ValueError("return_stats tells of skipped tiles: give a threshold")
    if skip is not None and window is not None:
        raise ValueError("tiles are skipped in full attention only; leave the skip options out with a window")
    if implementation is None:
        implementation, _ = automatic(q, k_cache, v_cache, **options, skip=skip)
    elif (reason := IMPLEMENTATIONS[implementation].unsupported(q, k_cache, v_cache, **options, skip=skip)) is not None:
        raise NotImplementedError(f"decode_attention {implementation!r}: {reason}")
    if skip is None:
        out, lse = IMPLEMENTATIONS[implementation].run(q, k_cache, v_cache, **options)
        return (out, lse) if return_lse else out
    out, lse, keep = IMPLEMENTATIONS[implementation].run(q, k_cache, v_cache, **options, skip=skip)
    results = [out, lse] if return_lse else [out]
    if return_stats:
        visited = reference.visited_tiles(operands, capacity, skip.tile)
        total = jnp.broadcast_to(visited[:, None], keep.shape[:2])
        guarded = (skip.log_threshold == -jnp.inf).sum()
        results.append(SkipStats(total, total - keep.sum(axis=2), guarded))
    return tuple(results) if len(results) > 1 else out


def automatic(
    q: Any, k_cache: Any, v_cache: Any, *, operands: Operands, own_mask: Mask, scale: float, skip: Skip | None
) -> tuple[str, str]:
    """What `implementation=None` runs for a call, by the rules of `pallas_kernels.dispatch`, and why nothing else.

    Needs shapes only.
    """
    batch, num_queries, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[3]
    forms = {scales.ndim: "head" if scales.ndim == 2 else "token" for scales in operands[-2:] if scales is not None}
    given = {
        "own_lengths": operands.own_lengths is not None,
        "positions": operands.k_positions is not None,
        "window": operands.window is not None,
    }
    kind = dispatch.Kind(
        mask=dispatch.OWN_KEYS if operands.own_k is not None else f"no {dispatch.OWN_KEYS}",
        dtype=str(q.dtype),
        head_dims=f"{head_dim}/{head_dim}",
        limits=" ".join(name for name, value in given.items() if value),
        # Scales of two forms are checked as neither, so nothing covers them.
        cache=f"{k_cache.dtype} per {' and '.join(forms.values())}" if forms else "",
        skip="" if skip is None else f"{skip.tile.width} chains {skip.tile.chains}",
    )
    sizes = {"batch": batch, "rows": num_queries * (num_heads // num_kv_heads), "keys": k_cache.shape[2]}
    spec, reason = dispatch.partition(q)
    names: tuple[str, ...] = ("xla",)
    if batch == 0:
        reason = "nothing to do"
    elif spec is not None:
        reason = "a mesh of explicit axes: call the kernel by name under shard_map"
    elif reason is None:
        names, reason = dispatch.preferred("decode_attention", kind, sizes, gradients=False)
    for name in names:
        why_not = IMPLEMENTATIONS[name].unsupported(
            q, k_cache, v_cache, operands=operands, own_mask=own_mask, scale=scale, skip=skip
        )
        if why_not is None:
            return name, reason or ""
        reason = f"{name}: {why_not}"
    raise NotImplementedError(f"decode_attention: {reason}")


def _scales(name: str, scales: Array | None, cache_name: str, cache: Array) -> Array | None:
    """Checked scales of a cache of codes, `[L, K]` or `[L, B, K, S]`; None for any other cache."""
    if str(cache.dtype) not in CODES:
        if scales is not None:
            raise ValueError(f"{name} needs a {cache_name} of {' or '.join(CODES)}; got {cache.dtype}")
        return None
    if scales is None:
        raise ValueError(f"{cache_name} holds {cache.dtype} codes, which need {name}")
    num_layers, batch, capacity, num_kv_heads, _ = cache.shape
    shapes = ((num_layers,), (num_layers, num_kv_heads), (num_layers, batch, num_kv_heads, capacity))
    if scales.shape not in shapes:
        raise ValueError(f"{name} must have one of the shapes {', '.join(map(str, shapes))}; got {scales.shape}")
    if str(scales.dtype) not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"{name} must be float32, bfloat16 or float16; got {scales.dtype}")
    if scales.ndim == 1:
        return jnp.broadcast_to(scales[:, None], shapes[1])
    return scales
