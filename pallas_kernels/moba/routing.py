"""Which candidate blocks each query chooses: a running top-k over tiles of centroids, never all scores at once.

Tiles are walked from the last candidate to the first, and the columns of a tile from high to low, so that among equal
scores a stable top-k finds the higher block first.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.moba.centroids import centroids_at
from pallas_kernels.moba.heads import join_groups, map_heads, split_groups
from pallas_kernels.moba.layout import Layout

ROWS, COLUMNS = 1024, 128  # scores held at once: changes memory and speed only


Choose = Callable[..., Int[Array, "B T N ranks"]]


def select(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    layout: Layout,
    *,
    block_size: int,
    top_k: int,
    causal: bool,
    choose: Choose | None = None,
) -> Int[Array, "B T N top_k"]:
    """Selected blocks of each query head, counted from the start of its sequence; see `moba_select`.

    `choose` finds the candidates, `choose_all` unless another is given.
    """
    q, k = jax.lax.stop_gradient((q, k))
    batch, num_queries, num_heads, _ = q.shape
    ranks = min(top_k - causal, layout.block_start.shape[1])
    if ranks:
        indices = (choose or choose_all)(q, k, layout, block_size=block_size, ranks=ranks)
    else:
        indices = jnp.zeros((batch, num_queries, num_heads, 0), jnp.int32)
    if causal:
        own = jnp.where(layout.key >= 0, layout.eligible, -1)
        own = jnp.broadcast_to(own[:, :, None, None], (batch, num_queries, num_heads, 1))
        indices = jnp.concatenate([own, indices], axis=3)
    return jnp.pad(indices, [(0, 0)] * 3 + [(0, top_k - indices.shape[3])], constant_values=-1)


def choose_all(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], layout: Layout, *, block_size: int, ranks: int
) -> Int[Array, "B T N ranks"]:
    """The best `ranks` of each query's candidates, counted from its sequence's first; -1 is none."""
    batch, num_queries, num_heads, head_dim = q.shape
    group = num_heads // k.shape[2]

    def one_head(start, length, *, q, k, first, eligible, chosen):
        del chosen  # nothing so far
        means = centroids_at(k.pick(), start, length, block_size)
        first, eligible = (jnp.repeat(x.pick(), group) for x in (first, eligible))
        found = choose(q.pick().reshape(num_queries * group, head_dim), means, first, eligible, ranks)
        return (found.reshape(num_queries, group, ranks),)

    per_head = (batch, num_queries, k.shape[2])
    first, eligible = (jnp.broadcast_to(x[..., None], per_head) for x in (layout.first, layout.eligible))
    arrays = {"q": split_groups(q, k), "k": k, "first": first, "eligible": eligible}
    chosen = jnp.zeros((*per_head, group, ranks), jnp.int32)
    return join_groups(*map_heads(one_head, layout, arrays, {"chosen": chosen}))


def choose(
    q: Float[Array, "R H"], means: Float[Array, "C H"], first: Int[Array, "R"], eligible: Int[Array, "R"], ranks: int
) -> Int[Array, "R ranks"]:
    """The best `ranks` of the candidates first..first + eligible - 1 of each row, counted from `first`; -1 is none."""
    num_rows, rows, columns = q.shape[0], min(ROWS, q.shape[0]), min(COLUMNS, means.shape[0])
    means = jnp.pad(means, ((0, -means.shape[0] % columns), (0, 0)))

    def cut(x):
        x = jnp.pad(x, [(0, -num_rows % rows)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(-1, rows, *x.shape[1:])

    def some_rows(arguments):
        q, first, eligible = arguments
        lowest = jnp.where(eligible > 0, first, means.shape[0]).min() // columns
        highest = -(-(first + eligible).max() // columns)

        def visit(step, best):
            tile = highest - 1 - step
            keys = jax.lax.dynamic_slice_in_dim(means, tile * columns, columns)[::-1]
            slot = tile * columns + jnp.arange(columns - 1, -1, -1, dtype=jnp.int32)
            scores = eligible_scores(q, keys, slot - first[:, None], eligible[:, None])
            scores = jnp.concatenate([best[0], scores], axis=1)
            slots = jnp.concatenate([best[1], jnp.broadcast_to(slot, (rows, columns))], axis=1)
            scores, place = jax.lax.top_k(scores, ranks)
            return scores, jnp.take_along_axis(slots, place, axis=1)

        start = jnp.full((rows, ranks), -jnp.inf, jnp.promote_types(q.dtype, jnp.float32))
        steps = jnp.maximum(highest - lowest, 0)
        scores, slots = jax.lax.fori_loop(0, steps, visit, (start, jnp.zeros((rows, ranks), jnp.int32)))
        return jnp.where(scores > -jnp.inf, slots - first[:, None], -1)

    return jax.lax.map(some_rows, (cut(q), cut(first), cut(eligible))).reshape(-1, ranks)[:num_rows]


def eligible_scores(
    q: Float[Array, "R H"], means: Float[Array, "C H"], block: Int[Array, "#R C"], eligible: Int[Array, "R #C"]
) -> Float[Array, "R C"]:
    """The gate: unscaled products, at least float32; -inf for NaN and where `block` is not in 0..eligible - 1."""
    precise = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("RH,CH->RC", q, means, preferred_element_type=precise, precision="highest")
    scores = jnp.where((block >= 0) & (block < eligible) & ~jnp.isnan(scores), scores, -jnp.inf)
    return jnp.where(scores == 0, 0.0, scores)  # -0 and 0 are equal, but not to every top-k
