"""BLASST, skip-softmax attention: the rule by which tiles of the score matrix are left out. The one definition of it.

Everything that decides goes by this page: the reference, the XLA path, the kernels, the calibration. Decisions are
part of a call's meaning; two implementations may differ in one only where rounding moves a score across the
threshold.

**Tiles.** Queries of one query head are cut into tiles of `rows` consecutive queries, by index from query 0; keys into
tiles of `width` consecutive slots, by index from slot 0. The last ones may be short. The cut knows nothing of masks,
positions, segments or lengths.

**Visited.** A tile pair is *visited* if at least one of its (query, key) pairs is visible: by the mask, segments,
positions and lengths together, all that `flash_attention` documents. Other tile pairs take part in nothing and count
nowhere.

**Order.** Each query tile visits its key tiles by ascending tile index. The order matters because a decision depends on
what came before. Ascending can be followed by every implementation whatever its own tiles are: it depends neither on
a kernel's tile sizes nor on run-time limits, which "full tiles first, then partial ones" would. For Full, Causal,
BlockCausal and PrefixBidirectional the two orders are the same as long as no segments or positions are given; a
kernel that walks runs of full tiles before partial ones can take those masks as they are, and any other mask by
treating all its live tiles as partial, in one ascending list.

**Rule.** s = scale · q · k, float32, natural units, -inf where not visible. For row r of the query tile and key tile j:

    top[r, j]     = max over the keys of tile j of s[r, key]              (-inf: sees nothing in this tile)
    before[r, j]  = max over the tiles visited before j of top[r, ·]      (-inf: has seen nothing yet)
    row r votes to skip  iff  top[r, j] = -inf   or   top[r, j] - before[r, j] < log λ     (strict)
    tile j is skipped    iff  all rows vote to skip

Rows beyond the last query, and rows that see nothing in the tile, vote to skip. A row that sees keys for the first
time (`before` = -inf, `top` finite) votes to keep, so the first visited tile of a query tile is always kept, and no row
that sees a key ends up empty. A NaN score votes to keep, in this tile and all later ones: it must reach the output.

With base-2 arithmetic compare `top2 - before2 < log2 λ` where `top2 = top · log2(e)`. With 0 < λ < 1 a skipped tile
raises no maximum, hence `before` may be the running maximum of the kept tiles, of all tiles, or the kernel's `m`: the
three are equal.

**Effect.** A skipped tile adds nothing: no exponentials, no sum, no product with V, no gradient. The output and the
log-sum-exp are those of plain attention over the visible keys in kept tiles. The decision is a constant in
differentiation; the backward pass uses the decisions of the forward pass (kept as one flag per tile pair).

**Threshold.** One λ per row of the batch. `skip_threshold` gives λ itself; `skip_scale_factor` gives λ = factor / L,
with L the number of keys of that row: `kv_lengths[b]` (at most S), less the empty slots where `k_positions` has any,
else S; in a chunked prefill T < S it is still all S. Dense guard: a row of the batch whose λ is not inside (0, 1), NaN
included, skips nothing (log λ = -inf does exactly that) and is counted.

**Decode.** With few queries against a cache all rows of one *key* head vote together: its N / K query heads times the T
new tokens; `rows` plays no part. L counts the cache slots in use and the row's own new keys. `width` cuts the cache
slots, from slot 0. The tiles form `chains` independent chains, tile t in chain t mod chains, each with its own `before`
that starts at -inf and runs over that chain's tiles in ascending order; so split-KV needs no communication, and
the first visited tile of every chain is kept. What a call adds beside the cache (own keys) is never skipped and
raises no `before`: chains see the cache alone. `flash_attention` has one chain. Results of several calls that are
merged afterwards by their log-sum-exp have a chain per call.

Source: BLASST (arXiv 2512.12087), and the skip-softmax conventions of TensorRT-LLM and FlashInfer.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.masks import Mask, SlidingWindow


@dataclasses.dataclass(frozen=True)
class SkipTile:
    """Geometry of the vote. It decides which numbers come out, so it is an argument and never tuned.

    A threshold is only as good as the tile that it was calibrated with: store the two together.

    Attributes:
      rows: consecutive queries of one query head that vote together (prefill).
      width: keys of one tile.
      chains: independent chains of tiles (decode); tile t belongs to chain t mod chains.
    """

    rows: int = 64
    width: int = 128
    chains: int = 1

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or value < 1:
                raise ValueError(f"SkipTile.{field.name} must be a positive integer; got {value!r}")


DECODE_TILE = SkipTile(width=128, chains=16)
"""What decoding takes by default. Times 8 key heads that is work for nearly all multiprocessors of a Hopper GPU."""


class Skip(NamedTuple):
    """The resolved options of a call, as implementations get them."""

    log_threshold: Array  # float32 [B], natural log of λ; -inf: this row of the batch skips nothing
    tile: SkipTile


class SkipStats(NamedTuple):
    """Exact counts of tile pairs. Counts add up over heads, devices and layers; never average ratios."""

    visited: Int[Array, "B N"]  # tile pairs with a visible (query, key) pair
    skipped: Int[Array, "B N"]  # those of them that were skipped
    dense_guarded: Int[Array, ""]  # rows of the batch whose λ was not inside (0, 1)


def number_of_keys(num_keys: int, batch: int, kv_lengths: Array | None, k_positions: Array | None) -> Int[Array, "B"]:
    """L of `skip_scale_factor`: key slots in use, per row of the batch."""
    used = jnp.ones((batch, num_keys), bool)
    if k_positions is None:
        return jnp.full((batch,), num_keys) if kv_lengths is None else jnp.clip(kv_lengths, 0, num_keys)
    if kv_lengths is not None:
        used = jnp.arange(num_keys) < kv_lengths[:, None]
    return (used & (k_positions >= 0)).sum(axis=1)


def resolve(
    skip_threshold: Any, skip_scale_factor: Any, skip_tile: SkipTile | None, lengths: Int[Array, "B"]
) -> Skip | None:
    """The options of a call as a `Skip`; None when no threshold was asked for.

    Args:
      skip_threshold: λ, a number or an array `[]` or `[B]`. Python and NumPy values must lie inside (0, 1); values
        that JAX holds, traced ones among them, mean "dense" outside of it and never cause a compilation.
      skip_scale_factor: λ · L, a number or an array `[]` or `[B]`; Python and NumPy values must be positive and finite.
      skip_tile: None is `SkipTile()`.
      lengths: L, the keys of each row of the batch.

    Raises:
      ValueError: both were given, a value out of range, a wrong shape, or a tile without a threshold.
    """
    if skip_threshold is None and skip_scale_factor is None:
        if skip_tile is not None:
            raise ValueError(f"skip_tile={skip_tile} does nothing without skip_threshold or skip_scale_factor")
        return None
    if skip_threshold is not None and skip_scale_factor is not None:
        raise ValueError(
            f"give skip_threshold or skip_scale_factor, not both; got {skip_threshold!r} and {skip_scale_factor!r}"
        )
    tile = SkipTile() if skip_tile is None else skip_tile
    if not isinstance(tile, SkipTile):
        raise ValueError(f"skip_tile must be a SkipTile or None; got {skip_tile!r}")
    if skip_threshold is not None:
        log_threshold = _log("skip_threshold", skip_threshold, lengths.shape, "inside (0, 1)", 1.0)
    else:
        log_factor = _log("skip_scale_factor", skip_scale_factor, lengths.shape, "positive and finite", np.inf)
        log_threshold = log_factor - jnp.log(jnp.maximum(lengths, 1).astype(jnp.float32))
    inside = (log_threshold > -jnp.inf) & (log_threshold < 0.0)  # False for NaN
    return Skip(jnp.where(inside, log_threshold, -jnp.inf), tile)


def _log(name: str, value: Any, shape: tuple[int, ...], rule: str, upper: float) -> Float[Array, "B"]:
    """Natural logarithm of an option, one per row of the batch; NaN for negative values."""
    if isinstance(value, jax.Array):
        if not jnp.issubdtype(value.dtype, jnp.floating) and not jnp.issubdtype(value.dtype, jnp.integer):
            raise ValueError(f"{name} must be real; got {value.dtype}")
        logarithm = jnp.log(value.astype(jnp.float32))
    else:
        try:
            known = np.asarray(value, np.float64)
        except (TypeError, ValueError):
            raise ValueError(f"{name} must be a number or an array; got {value!r}") from None
        if isinstance(value, bool) or not ((known > 0.0) & (known < upper)).all():
            raise ValueError(f"{name} must be {rule}, or None for dense attention; got {value!r}")
        logarithm = jnp.asarray(np.log(known), jnp.float32)  # in double precision: 1 - 1e-9 is below 1
    if logarithm.shape not in ((), shape):
        raise ValueError(f"{name} must be a number or have shape {shape}; got {logarithm.shape}")
    return jnp.broadcast_to(logarithm, shape)


def check_mask(mask: Mask) -> None:
    """Skipping has no meaning in the field for windows: production stacks leave such layers dense."""
    if isinstance(mask, SlidingWindow):
        raise ValueError(f"tiles are skipped in full attention only; leave the skip options out for {mask}")


def margins(top: Float[Array, "*A rows tiles"], chains: int = 1) -> Float[Array, "*A tiles"]:
    """max over voting rows of `top - before`: a tile is kept iff its margin >= log λ (or is NaN). The rule, as numbers.

    +inf where some row sees its first keys; -inf where no row sees any. All thresholds at once: one pass over the
    scores tells what every λ would skip.

    Args:
      top: largest visible score of each row in each tile, -inf where it sees none; tiles in ascending order.
      chains: tile t follows the tiles t' < t with t' mod chains = t mod chains.
    """
    tiles = top.shape[-1]
    padded = jnp.pad(top, [(0, 0)] * (top.ndim - 1) + [(0, -tiles % chains)], constant_values=-jnp.inf)
    chained = padded.reshape(*top.shape[:-1], -1, chains)
    highest = jax.lax.cummax(chained, axis=chained.ndim - 2)
    before = jnp.concatenate([jnp.full_like(highest[..., :1, :], -jnp.inf), highest[..., :-1, :]], axis=-2)
    before = before.reshape(padded.shape)[..., :tiles]
    return row_margin(top, before).max(axis=-2)


def tile_tops(scores: Float[Array, "*A T S"], tile: SkipTile) -> Float[Array, "*A query_tiles rows key_tiles"]:
    """Largest score of each row in each key tile, from scores that are -inf where not visible. Grows with T x S."""
    *rest, num_queries, num_keys = scores.shape
    padding = [(0, 0)] * len(rest) + [(0, -num_queries % tile.rows), (0, -num_keys % tile.width)]
    scores = jnp.pad(scores, padding, constant_values=-jnp.inf)
    return scores.reshape(*rest, -1, tile.rows, scores.shape[-1] // tile.width, tile.width).max(axis=-1)


def per_pair(
    keep: Bool[Array, "*A query_tiles key_tiles"], tile: SkipTile, num_queries: int, num_keys: int
) -> Bool[Array, "*A T S"]:
    """Decisions of tiles as decisions of (query, key) pairs. Grows with T x S."""
    keep = jnp.repeat(jnp.repeat(keep, tile.rows, axis=-2), tile.width, axis=-1)
    return keep[..., :num_queries, :num_keys]


def row_margin(top: Array, before: Array) -> Array:
    """`top - before` without inf - inf: -inf where the row sees nothing, +inf where it sees its first keys."""
    base = jnp.where(before == -jnp.inf, 0.0, before)
    difference = jnp.where(before == -jnp.inf, jnp.inf, top - base)
    return jnp.where(top == -jnp.inf, -jnp.inf, jnp.where(jnp.isnan(top), jnp.nan, difference))


def keeps(margin: Array, log_threshold: Array) -> Bool[Array, "..."]:
    """Which tiles are kept, from their margins; a tile in which nothing is visible counts as not kept."""
    return ~(margin < log_threshold) & (margin != -jnp.inf)


def stats(keep: Bool[Array, "B N query_tiles key_tiles"], visited: Int[Array, "B"], skip: Skip) -> SkipStats:
    """Counts from the decisions and the number of visited tile pairs of each row of the batch."""
    total = jnp.broadcast_to(visited[:, None], keep.shape[:2])
    guarded = (skip.log_threshold == -jnp.inf).sum()
    return SkipStats(total, total - keep.sum(axis=(2, 3)), guarded)
