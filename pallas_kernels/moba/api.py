"""`moba_attention` and `moba_select`: argument checks and the choice of implementation."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.attention import flash_attention
from pallas_kernels.attention.checks import check_heads, check_scale, int_array
from pallas_kernels.masks import Causal, Full
from pallas_kernels.moba import mosaic_sm90, reference, xla
from pallas_kernels.moba.centroids import check_block_size

NAMES = ("mosaic", "xla", "reference")
Segments = Int[Array, "B T"] | tuple[Int[Array, "B T"], Int[Array, "B S"]]


def moba_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    *,
    block_size: int,
    top_k: int,
    causal: bool = True,
    segment_ids: Segments | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    return_selection: bool = False,
    implementation: str | None = None,
) -> Any:
    """Softmax attention of each query head over the keys of the `top_k` blocks that it selects (MoBA).

    Keys are cut into blocks of `block_size`. A query always selects its own block, which counts as one of the
    `top_k`, and those past blocks whose centroids, the mean keys, have the largest products with it; see `moba_select`.
    One softmax runs over the union of the selected keys, in the own block up to the query itself. With `top_k` not
    below the number of blocks this is causal attention. The selection is a constant: no gradient flows through it.

    Query head n reads key head n // (N / K) and selects for itself. Scores, softmax and sums are float32 (float64 for
    float64 inputs). Query i of T stands at key i + S - T; a query before the first key gives output 0, log-sum-exp
    -inf and gradient 0. Without `causal` a query selects among all blocks, its own has no privilege.

    Sources: MoBA (arXiv 2502.13189); small blocks and the key convolution of `key_conv`: FlashMoBA (arXiv 2511.11571).

    Args:
      q: queries; bfloat16, float16, float32 or float64.
      k: keys, dtype of `q`; N a multiple of K.
      v: values, like `k` but for a head dim of their own (Hv).
      block_size: keys of a block, static; the last block of a sequence may be shorter.
      top_k: blocks that each query selects, static.
      causal: whether queries see only themselves and the past.
      segment_ids: sequences of a packed row, one array for T = S or a pair for queries and keys. Each sequence has
        blocks of its own, from its first key on, and its last query stands at its last key. Negative ids are
        padding. Equal ids must be neighbours; of arrays that are not traced this is checked. Needs `causal`, but for
        the reference.
      scale: of the scores of attention, not of routing; None is H ** -0.5. Static.
      return_lse: also return the natural log-sum-exp of the scaled selected scores, float32 `[B, N, T]`.
      return_selection: also return the selection, as of `moba_select`.
      implementation: "mosaic", "xla" or "reference"; None is the automatic choice (`automatic`), but for calls whose
        selection is everything, which may take `flash_attention`.

    Returns:
      The output `[B, T, N, Hv]`; if anything else was asked for, a tuple of output, log-sum-exp and selection, those
      asked for in this order.

    Raises:
      ValueError: arguments that do not fit together.
      NotImplementedError: the implementation asked for cannot run this call, and why.
    """
    check_heads(("q", q), ("k", k), ("v", v))
    segments = _check(q, k, block_size, top_k, causal, segment_ids)
    scale = check_scale(scale, q.shape[-1])
    name = _choose("moba_attention", implementation, q, k, segments, top_k=top_k, causal=causal)
    routing: dict[str, Any] = {"block_size": block_size, "top_k": top_k, "causal": causal}
    gradients = True
    if implementation is None:
        choice = automatic(q, k, v, packed=segments is not None, **routing)
        name, gradients = choice.forward, choice.gradient == "mosaic"
    elif name == "mosaic" and (reason := mosaic_sm90.unsupported(q, k, v, **routing)) is not None:
        raise NotImplementedError(f'moba_attention "mosaic": {reason}')
    if name == "reference":
        out, lse, indices = reference.run(q, k, v, *_dense_segments(q, k, segments), **routing, scale=scale)
    elif implementation is None and not return_selection and _selects_everything(k, block_size, top_k, segments):
        out, lse = flash_attention(
            q,
            k,
            v,
            mask=Causal() if causal else Full(),
            segment_ids=None if segments is None else segments[0],
            scale=scale,
            return_lse=True,
        )
    else:
        own = None if implementation is None and name == "xla" else name
        run = functools.partial(mosaic_sm90.run, gradients=gradients) if name == "mosaic" else xla.run
        out, lse, indices = run(q, k, v, segments, **routing, scale=scale, own_implementation=own)
    results = [out]
    if return_lse:
        results.append(lse)
    if return_selection:
        results.append(indices)
    return tuple(results) if len(results) > 1 else out


def moba_select(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    *,
    block_size: int,
    top_k: int,
    causal: bool = True,
    segment_ids: Segments | None = None,
    implementation: str | None = None,
) -> Int[Array, "B T N top_k"]:
    """The blocks that each query head selects in `moba_attention`, int32, counted within the query's sequence.

    The score of a block is the product of the query with its centroid, the mean of its real keys (see
    `block_centroids`), without the scale of attention and in float32. Rank 0 is the query's own block, whatever its
    score; then follow past blocks by falling score, of equal ones the later first. A block with a score of NaN or -inf
    is never selected, nor one after the query; what is left of the `top_k` places holds -1. Without `causal` all ranks
    go by score. Nothing of size T x blocks is held ("xla"). Not differentiable.

    The arguments are those of `moba_attention`.
    """
    check_heads(("q", q), ("k", k))
    segments = _check(q, k, block_size, top_k, causal, segment_ids)
    options: dict[str, Any] = {"block_size": block_size, "top_k": top_k, "causal": causal}
    name = _choose("moba_select", implementation, q, k, segments, top_k=top_k, causal=causal)
    if name == "reference":
        return reference.select(q, k, *_dense_segments(q, k, segments), **options)[0]
    if name == "xla":
        return xla.select(q, k, segments, **options)
    if (reason := mosaic_sm90.select_unsupported(q, k, top_k=top_k, causal=causal)) is not None:
        raise NotImplementedError(f'moba_select "mosaic": {reason}')
    return xla.select(q, k, segments, **options, choose=mosaic_sm90.choose)


class Choice(NamedTuple):
    """Implementations of the two passes, and why not others, in words."""

    forward: str
    gradient: str
    reasons: dict[str, str]


def automatic(q: Any, k: Any, v: Any, *, block_size: int, top_k: int, causal: bool, packed: bool) -> Choice:
    """What a call without a name takes: the kernels where a GPU has checked calls of their kind."""
    kind = dispatch.MobaKind(str(q.dtype), q.shape[3], block_size, packed)
    why_not = mosaic_sm90.unsupported(q, k, v, block_size=block_size, top_k=top_k, causal=causal)
    chosen, reasons = {}, {}
    for use in ("forward", "gradient"):
        if why_not is not None:
            chosen[use], reasons[use] = "xla", f"mosaic: {why_not}"
            continue
        names, _, reasons[use] = dispatch.proven("moba_attention", kind, gradients=use == "gradient")
        chosen[use] = "mosaic" if "mosaic" in names else "xla"
    return Choice(**chosen, reasons=reasons)


def _check(
    q: Array, k: Array, block_size: int, top_k: int, causal: bool, segment_ids: Segments | None
) -> tuple[Array, Array] | None:
    """Checks what routing needs; returns the segments of queries and keys."""
    check_block_size(block_size)
    if not isinstance(top_k, int) or top_k < 1:
        raise ValueError(f"top_k must be a positive Python integer; got {top_k!r}")
    if not isinstance(causal, bool):
        raise ValueError(f"causal must be True or False; got {causal!r}")
    if segment_ids is None:
        return None
    q_shape, k_shape = q.shape[:2], k.shape[:2]
    if isinstance(segment_ids, tuple):
        names = ["segment_ids of the queries", "segment_ids of the keys"]
        arguments = list(zip(names, segment_ids, (q_shape, k_shape), strict=True))
    elif q_shape != k_shape:
        raise ValueError(
            f"segment_ids must be a pair (queries, keys) when T != S; got one array for T={q_shape[1]}, S={k_shape[1]}"
        )
    else:
        arguments = [("segment_ids", segment_ids, q_shape)]
    segments = [int_array(*argument) for argument in arguments]
    for (name, *_), ids in zip(arguments, segments):
        _check_neighbours(name, ids)
    return segments[0], segments[-1]


def _check_neighbours(name: str, ids: Array) -> None:
    if isinstance(ids, jax.core.Tracer):
        return
    for row, of_row in enumerate(np.asarray(ids)):
        starts = of_row[np.flatnonzero(np.diff(of_row, prepend=of_row[0] - 1))]
        real = starts[starts >= 0]
        if np.unique(real).size < real.size:
            raise ValueError(f"{name} must have equal ids side by side; row {row} has a sequence in pieces")


def _choose(
    function: str,
    implementation: str | None,
    q: Array,
    k: Array,
    segments: tuple[Array, Array] | None,
    *,
    top_k: int,
    causal: bool,
) -> str:
    """The implementation that a call runs on."""
    if implementation not in (None, *NAMES):
        raise ValueError(f"implementation must be None or one of {[*NAMES]}; got {implementation!r}")
    name = implementation or "xla"
    if name != "reference":
        reason = xla.unsupported(q, k, segments, top_k=top_k, causal=causal)
        if reason is not None:
            raise NotImplementedError(f'{function} "{name}": {reason}')
    return name


def _dense_segments(q: Array, k: Array, segments: tuple[Array, Array] | None) -> tuple[Array, Array]:
    if segments is not None:
        return segments
    return jnp.zeros(q.shape[:2], jnp.int32), jnp.zeros(k.shape[:2], jnp.int32)


def _selects_everything(k: Array, block_size: int, top_k: int, segments: tuple[Array, Array] | None) -> bool:
    """Whether the call is dense attention that `flash_attention` lines up in the same way."""
    return top_k >= -(-k.shape[1] // block_size) and (segments is None or segments[0] is segments[1])
