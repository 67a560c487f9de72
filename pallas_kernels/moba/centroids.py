"""Mean keys of blocks: computed from keys, and kept up to date in a cache that grows."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.checks import DTYPES, int_array


def check_block_size(block_size: int) -> None:
    if not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f"block_size must be a positive Python integer; got {block_size!r}")


def check_keys(name: str, k: Array) -> None:
    if k.ndim != 4 or 0 in k.shape[1:]:
        raise ValueError(f"{name} must be [batch, length, kv_heads, head_dim], not empty; got shape {k.shape}")
    if str(k.dtype) not in DTYPES:
        raise ValueError(f"{name} must be one of {', '.join(DTYPES)}; got {k.dtype}")


def block_centroids(
    k: Float[Array, "B S K H"], *, block_size: int, kv_lengths: Int[Array, "B"] | None = None
) -> Float[Array, "B blocks K H"]:
    """Means over the real keys of each block of `block_size`, summed in float32, rounded to the dtype of `k`.

    The last block of a row may be partial and is divided by its true size; blocks without a real key are 0.

    Args:
      k: keys.
      block_size: keys of a block; S // block_size, rounded up, blocks.
      kv_lengths: leading keys that are real, per row; None: all.
    """
    check_keys("k", k)
    check_block_size(block_size)
    batch, num_keys = k.shape[:2]
    lengths = jnp.full((batch,), num_keys, jnp.int32)
    if kv_lengths is not None:
        lengths = int_array("kv_lengths", kv_lengths, (batch,))
    start = jnp.arange(-(-num_keys // block_size), dtype=jnp.int32) * block_size
    length = jnp.clip(lengths[:, None] - start, 0, block_size)
    return centroids_of_all(k, jnp.broadcast_to(start, length.shape), length, block_size)


def centroids_of_all(
    k: Float[Array, "B S K H"], start: Int[Array, "B C"], length: Int[Array, "B C"], block_size: int
) -> Float[Array, "B C K H"]:
    """`centroids_at` for every row."""
    return jax.vmap(centroids_at, in_axes=(0, 0, 0, None))(k, start, length, block_size)


def centroids_at(
    k: Float[Array, "S *K H"], start: Int[Array, "C"], length: Int[Array, "C"], block_size: int
) -> Float[Array, "C *K H"]:
    """Mean of `length` keys from each `start` on, of one head or of all; 0 where the length is 0."""
    size, heads = min(block_size, k.shape[0]), range(1, k.ndim)

    def total(start, length):
        # A slice of neighbours, unlike a gather, is summed where it lies: no float32 copy of all keys is written.
        begin = jnp.minimum(start, k.shape[0] - size)
        index = begin + jnp.arange(size, dtype=jnp.int32)
        is_real = jnp.expand_dims((index >= start) & (index < start + length), heads)
        keys = jax.lax.dynamic_slice_in_dim(k, begin, size)
        return jnp.where(is_real, keys, 0).sum(axis=0, dtype=jnp.promote_types(k.dtype, jnp.float32))

    sums = jax.vmap(total)(start, length)
    return (sums / jnp.expand_dims(jnp.maximum(length, 1), heads)).astype(k.dtype)


class CentroidCache(NamedTuple):
    """What routing needs of a growing key cache: means of the complete blocks, and the running sum of the open one."""

    centroids: Float[Array, "B C K H"]  # in the dtype of the keys; only the first lengths // block_size are in use
    open_sum: Float[Array, "B K H"]  # float32; over the lengths % block_size keys of the open block
    lengths: Int[Array, "B"]  # keys seen so far


def init_centroids(
    batch: int, capacity: int, kv_heads: int, head_dim: int, *, block_size: int, dtype: DTypeLike
) -> CentroidCache:
    """The cache of no keys, for at most `capacity` of them."""
    check_block_size(block_size)
    if capacity < 1:
        raise ValueError(f"capacity must be at least 1; got {capacity}")
    return CentroidCache(
        centroids=jnp.zeros((batch, -(-capacity // block_size), kv_heads, head_dim), dtype),
        open_sum=jnp.zeros((batch, kv_heads, head_dim), jnp.promote_types(dtype, jnp.float32)),
        lengths=jnp.zeros((batch,), jnp.int32),
    )


def append_centroids(
    cache: CentroidCache,
    k: Float[Array, "B T K H"],
    *,
    block_size: int,
    new_lengths: Int[Array, "B"] | None = None,
) -> CentroidCache:
    """The cache after the keys `k`; of row b only the first `new_lengths[b]` are real (None: all T).

    The keys must be those of attention: after the key convolution and rotation, if there are any. Blocks beyond the
    capacity of the cache are dropped.
    """
    check_keys("k", k)
    check_block_size(block_size)
    batch, num_new = k.shape[:2]
    if k.dtype != cache.centroids.dtype or (batch, *k.shape[2:]) != cache.open_sum.shape:
        want = (cache.open_sum.shape[0], "T", *cache.open_sum.shape[1:])
        raise ValueError(f"k must be {cache.centroids.dtype} of shape {want}; got {k.dtype} of shape {k.shape}")
    counts = jnp.full((batch,), num_new, jnp.int32)
    if new_lengths is not None:
        counts = int_array("new_lengths", new_lengths, (batch,))
    num_blocks = -(-(num_new + block_size - 1) // block_size)  # that T keys can touch

    def one_row(centroids, open_sum, length, k, count):
        # The new keys on the grid of blocks, which begins at the start of the open block.
        index = jnp.arange(num_blocks * block_size, dtype=jnp.int32) - length % block_size
        keys = k.at[index].get(mode="clip").astype(open_sum.dtype)
        keys = jnp.where(((index >= 0) & (index < count))[:, None, None], keys, 0)
        sums = keys.reshape(num_blocks, block_size, *keys.shape[1:]).sum(axis=1).at[0].add(open_sum)
        completed = (length % block_size + count) // block_size
        means = (sums / block_size).astype(centroids.dtype)
        place = jnp.arange(num_blocks, dtype=jnp.int32)
        place = jnp.where(place < completed, length // block_size + place, centroids.shape[0])  # the others: dropped
        centroids = centroids.at[place].set(means, mode="drop")
        rest = jnp.concatenate([sums, jnp.zeros_like(sums[:1])])[completed]
        return CentroidCache(centroids, rest, length + count)

    return jax.vmap(one_row)(*cache, k, counts)
