"""`flash_attention`: argument checks and the choice of implementation."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.attention import cudnn, mosaic_sm90, reference, xla
from pallas_kernels.attention import skip as rule
from pallas_kernels.attention.checks import check_choice, check_heads, check_scale, int_array_or_none
from pallas_kernels.attention.limits import Limits
from pallas_kernels.attention.skip import Skip, SkipTile
from pallas_kernels.masks import BlockDiffusion, Causal, Mask

# Each module has `unsupported(q, k, v, *, mask, limits, scale, return_lse, skip)`: None, or why not, in words; and
# `run(...)` without `return_lse`, returning (output, log-sum-exp), with a `skip` (output, log-sum-exp, kept tiles).
# `run` of a module that never skips need not know `skip`.
IMPLEMENTATIONS: dict[str, Any] = {"mosaic": mosaic_sm90, "cudnn": cudnn, "xla": xla, "reference": reference}


class Choice(NamedTuple):
    """What `implementation=None` runs, and why no other was preferred, in words."""

    forward: str
    gradient: str  # where a gradient is taken
    spec: PartitionSpec | None  # of q, k and v, which a kernel must be cut by; XLA cuts its own work
    reasons: dict[str, str]  # for "forward" and "gradient"


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
      implementation: None chooses what was measured to be fastest (`automatic`), perhaps one for a call and another for
        a call whose gradient is taken; a name runs that or raises. "mosaic" (Hopper) has gradients up to head dim 128.

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
    if implementation is None:
        choice = automatic(q, k, v, **options, return_lse=return_lse, skip=skip)
    else:
        reason = IMPLEMENTATIONS[implementation].unsupported(q, k, v, **options, return_lse=return_lse, skip=skip)
        if reason is not None:
            raise NotImplementedError(f"flash_attention {implementation!r}: {reason}")
        choice = Choice(implementation, implementation, None, {})
    out, lse, keep = _run(choice, q, k, v, limits, mask=mask, scale=options["scale"], skip=skip)
    results: list[Any] = [out]
    if return_lse:
        results.append(lse)
    if skip is not None and keep is not None and return_stats:
        visited = xla.visited_tiles(mask, limits, batch, num_queries, num_keys, skip.tile)
        results.append(rule.stats(keep, visited, skip))
    if return_selection:
        results.append(keep)
    return tuple(results) if len(results) > 1 else out


def automatic(
    q: Any, k: Any, v: Any, *, mask: Mask, limits: Limits, scale: float, return_lse: bool, skip: Skip | None
) -> Choice:
    """What `implementation=None` runs for a call, by the rules of `pallas_kernels.dispatch`. Needs shapes only."""
    batch, num_queries, num_heads, head_dim = q.shape
    kind = dispatch.Kind(
        mask=type(mask).__name__ + "(token)" * (getattr(mask, "clean", "") == "token"),
        dtype=str(q.dtype),
        head_dims=f"{head_dim}/{v.shape[3]}",
        limits=_names(limits),
        skip="" if skip is None else f"{skip.tile.rows}x{skip.tile.width}",
        square=num_queries == k.shape[1],
    )
    sizes = {"queries": num_queries, "keys": k.shape[1], "work": batch * num_heads * num_queries}
    if batch == 0:
        return Choice("xla", "xla", None, {"forward": "nothing to do", "gradient": "nothing to do"})
    spec, unable = dispatch.partition(q, k, v, is_cut=True)
    chosen: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for use in ("forward", "gradient"):
        names: tuple[str, ...] = ("xla",)
        reason = unable or ""
        if unable is None:
            names, reason = dispatch.preferred("flash_attention", kind, sizes, gradients=use == "gradient")
        for name in names:
            why_not = IMPLEMENTATIONS[name].unsupported(
                q, k, v, mask=mask, limits=limits, scale=scale, return_lse=return_lse, skip=skip
            )
            if why_not is None:
                chosen[use], reasons[use] = name, reason
                break
            reason = f"{name}: {why_not}"
        else:
            raise NotImplementedError(f"flash_attention: {reason}")
    return Choice(**chosen, spec=spec, reasons=reasons)


def _names(limits: Limits) -> str:
    """The run-time limits that are given, in the words of the checks, which give both sides of a pair."""
    given = {name for name, limit in limits._asdict().items() if limit is not None}
    pairs = {"segments": {"q_segments", "k_segments"}, "positions": {"q_positions", "k_positions"}}
    for name, both in pairs.items():
        if both <= given:
            given = (given - both) | {name}
    return " ".join(sorted("lengths" if name == "kv_lengths" else name for name in given))


def _run(
    choice: Choice, q: Array, k: Array, v: Array, limits: Limits, *, mask: Mask, scale: float, skip: Skip | None
) -> tuple[Array, Array | None, Array | None]:
    """Output, log-sum-exp and kept tiles; None is what the implementation does not give."""

    def named(name: str) -> Callable[..., Any]:
        def call(q, k, v, limits, log_threshold):
            if skip is None:
                results = (*IMPLEMENTATIONS[name].run(q, k, v, mask=mask, limits=limits, scale=scale), None)
            else:
                here = skip._replace(log_threshold=log_threshold)
                results = IMPLEMENTATIONS[name].run(q, k, v, mask=mask, limits=limits, scale=scale, skip=here)
            # Both sides of `by_derivative` must return the same; cuDNN is taken where no log-sum-exp is wanted.
            return (results[0], None, None) if without_lse else results

        return call

    without_lse = choice.forward != choice.gradient and "cudnn" in choice[:2]
    call = named(choice.forward)
    if choice.forward != choice.gradient:
        call = dispatch.by_derivative(call, named(choice.gradient))
    arguments = (q, k, v, limits, None if skip is None else skip.log_threshold)
    if choice.spec is None or choice.forward == choice.gradient == "xla":
        return call(*arguments)
    return dispatch.sharded(call, choice.spec)(*arguments)
