"""Which tokens of a training sequence are replaced by the mask token, and at which noise level.

Everything works on groups: runs of consecutive positions that are noised together. A group is a block of
`block_size` positions, cut short where the row or the document inside a packed row ends. Letters: B rows,
L positions of a row.

Source: Efficient-DLM (arXiv 2512.14067), section on position-dependent masking; the sampler is the
Gumbel-top-k trick, that is, Plackett-Luce sampling without replacement.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

MIN_LEVEL = 1e-3
"""Smallest noise level that training draws: levels are uniform on [MIN_LEVEL, 1)."""


class Corruption(NamedTuple):
    """A mask and the level it was drawn at.

    masked: True where the token is replaced by the mask token.
    level: float32 noise level t of the position's group; the probability with which a token is masked when
        masking is uniform. 1/level is the weight of the loss.
    """

    masked: Bool[Array, "B L"]
    level: Float[Array, "B L"]


class Groups(NamedTuple):
    """Groups of consecutive positions; `group` is non-decreasing along a row and starts at 0."""

    group: Int[Array, "B L"]
    start: Int[Array, "B L"]
    """Row index at which the position's group begins."""

    @property
    def offset(self) -> Int[Array, "B L"]:
        """Index of a position inside its group, from 0."""
        return jnp.arange(self.group.shape[1], dtype=jnp.int32) - self.start


def check_block_size(block_size: int) -> int:
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f"block_size must be an integer >= 1; got {block_size!r}")
    return block_size


def make_groups(
    shape: tuple[int, ...],
    block_size: int | None,
    *,
    segment_ids: Int[Array, "B L"] | None = None,
) -> Groups:
    """Splits rows of `shape` = (B, L) into groups of `block_size` positions (None: as long as possible).

    Blocks are aligned to the row: boundaries lie at multiples of `block_size` of the row index, which is
    what the attention masks use too. A group also ends where `segment_ids` change, so a document that
    starts inside a block begins with a short group. Pack documents to start at multiples of `block_size`
    to have blocks that are aligned to documents as well.
    """
    length = shape[1]
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), shape)
    first = index == 0
    if segment_ids is not None:
        first |= segment_ids != jnp.roll(segment_ids, 1, axis=1)
    if block_size is not None:
        first |= index % check_block_size(block_size) == 0
    start = jax.lax.cummax(jnp.where(first, index, 0), axis=1)
    return Groups(jnp.cumsum(first, axis=1, dtype=jnp.int32) - 1, start)


def _eligible_count(eligible: Bool[Array, "B L"], groups: Groups) -> Int[Array, "B L"]:
    """Number of eligible positions in each position's group."""
    length = eligible.shape[1]
    per_group = jax.vmap(functools.partial(jax.ops.segment_sum, num_segments=length))(
        eligible.astype(jnp.int32), groups.group
    )
    return jnp.take_along_axis(per_group, groups.group, axis=1)


def _per_group(values: Array, groups: Groups) -> Array:
    """Spreads one value per potential group [B, L] over the positions of the groups."""
    return jnp.take_along_axis(values, groups.group, axis=1)


def _choose(
    score: Float[Array, "B L"], count: Int[Array, "B L"], eligible: Bool[Array, "B L"], groups: Groups
) -> Bool[Array, "B L"]:
    """The `count` highest scores among the eligible positions of each group."""
    score = jnp.where(eligible, score, -jnp.inf)
    index = jnp.broadcast_to(jnp.arange(score.shape[1], dtype=jnp.int32), score.shape)
    # Groups are contiguous and ordered, so sorting by (group, score) keeps every group in its own range.
    _, _, order = jax.lax.sort((groups.group, -score, index), dimension=1, num_keys=2)
    rank = jnp.argsort(order, axis=1).astype(jnp.int32) - groups.start
    return eligible & (rank < count)


def sample_uniform_mask(
    key: Array,
    loss_mask: Bool[Array, "B L"],
    *,
    block_size: int | None = None,
    segment_ids: Int[Array, "B L"] | None = None,
    min_level: float = MIN_LEVEL,
) -> Corruption:
    """Every position of `loss_mask` is masked independently with probability level.

    One level per document (per row without `segment_ids`) as in the released training code, or one per
    block when `block_size` is given.
    """
    groups = make_groups(loss_mask.shape, block_size, segment_ids=segment_ids)
    level_key, mask_key = jax.random.split(key)
    level = _draw_level(level_key, groups, min_level)
    masked = (jax.random.uniform(mask_key, loss_mask.shape) < level) & loss_mask.astype(bool)
    return Corruption(masked, level)


def _draw_level(key: Array, groups: Groups, min_level: float) -> Float[Array, "B L"]:
    if not 0.0 < min_level < 1.0:
        raise ValueError(f"min_level must lie in (0, 1); got {min_level}")
    uniform = jax.random.uniform(key, groups.group.shape)
    return _per_group(min_level + (1.0 - min_level) * uniform, groups)


def check_half_life_ratio(half_life_ratio: float) -> float:
    if not half_life_ratio >= 0.0:  # also catches NaN
        raise ValueError(f"half_life_ratio must lie in [0, inf]; got {half_life_ratio}")
    return float(half_life_ratio)


def _log_weight(
    offset: Int[Array, "B L"], level: Float[Array, "B L"], block_size: int, half_life_ratio: float
) -> Float[Array, "B L"]:
    """log w_i(t) = beta (1 - t) i with beta = ln 2 / (half_life_ratio * block_size)."""
    if half_life_ratio == 0.0:  # the limit: always the rightmost positions; no Gumbel draw reaches 1000
        return 1e3 * offset.astype(jnp.float32)
    beta = math.log(2.0) / (half_life_ratio * block_size)
    return beta * (1.0 - level) * offset


def sample_block_mask(
    key: Array,
    loss_mask: Bool[Array, "B L"],
    *,
    block_size: int | None,
    half_life_ratio: float = math.inf,
    segment_ids: Int[Array, "B L"] | None = None,
    min_masked: int = 0,
    min_level: float = MIN_LEVEL,
) -> Corruption:
    """Exactly k = round(t n) of the n positions of `loss_mask` in each block, later ones preferred.

    A block with level t gives offset i the weight exp(beta (1 - t) i), beta = ln 2 / (half_life_ratio *
    block_size): `half_life_ratio` is the fraction of a block over which the weight doubles as t -> 0
    (inf: uniform; 0: always the rightmost k). beta follows the nominal block size in short blocks too, and
    positions outside `loss_mask` are never chosen. k is drawn without replacement in proportion to the
    weights.

    Args:
        key: PRNG key.
        loss_mask: positions that may be masked; padding and prompts are False.
        block_size: nominal block length; None makes each document (row) one block.
        half_life_ratio: lambda of the paper; the released models use 0.1.
        segment_ids: documents of packed rows; no block reaches over two of them.
        min_masked: at least this many per block that has as many eligible positions; 0 in block mode, 1 in
            whole-sequence mode.
        min_level: lower end of the levels.
    """
    check_half_life_ratio(half_life_ratio)
    eligible = loss_mask.astype(bool)
    groups = make_groups(eligible.shape, block_size, segment_ids=segment_ids)
    level_key, gumbel_key = jax.random.split(key)
    level = _draw_level(level_key, groups, min_level)
    size = _eligible_count(eligible, groups)
    count = jnp.clip(jnp.round(level * size).astype(jnp.int32), jnp.minimum(min_masked, size), size)
    nominal = block_size if block_size is not None else eligible.shape[1]
    score = _log_weight(groups.offset, level, nominal, half_life_ratio)
    score = score + jax.random.gumbel(gumbel_key, eligible.shape)
    return Corruption(_choose(score, count, eligible, groups), level)


def complement(corruption: Corruption, loss_mask: Bool[Array, "B L"]) -> Corruption:
    """Masks exactly what `corruption` left, at level 1 - t; with it every token of a row is trained once."""
    level = jnp.maximum(1.0 - corruption.level, MIN_LEVEL)
    return Corruption(loss_mask.astype(bool) & ~corruption.masked, level)


class SubsetSample(NamedTuple):
    """A mask for the unbiased bound: `weight` is n / k in each group (n its size, k its masked count)."""

    masked: Bool[Array, "B L"]
    weight: Float[Array, "B L"]


def sample_uniform_subset(
    key: Array,
    loss_mask: Bool[Array, "B L"],
    *,
    block_size: int | None,
    segment_ids: Int[Array, "B L"] | None = None,
) -> SubsetSample:
    """k uniform on 1..n in each block of n eligible positions, then a uniform k-subset, with weight n / k."""
    eligible = loss_mask.astype(bool)
    groups = make_groups(eligible.shape, block_size, segment_ids=segment_ids)
    count_key, subset_key = jax.random.split(key)
    size = _eligible_count(eligible, groups)
    uniform = _per_group(jax.random.uniform(count_key, eligible.shape), groups)
    count = jnp.minimum(1 + jnp.floor(uniform * size).astype(jnp.int32), size)
    masked = _choose(jax.random.uniform(subset_key, eligible.shape), count, eligible, groups)
    return SubsetSample(masked, size / jnp.maximum(count, 1))


RANDOM_BLOCK_SIZES = (4, 8, 12, 16, 20, 24, 28)
"""Block sizes that random-length training draws from, uniformly: 4 * randint(1..7)."""


def draw_block_size(key: Array, block_size: int, random_length_prob: float) -> tuple[Int[Array, ""], tuple[int, ...]]:
    """An index into the returned static sizes: `block_size`, or with `random_length_prob` a random one.

    Block sizes shape the attention mask and are therefore static: use the index with `jax.lax.switch`.
    """
    check_block_size(block_size)
    if not 0.0 <= random_length_prob <= 1.0:
        raise ValueError(f"random_length_prob must lie in [0, 1]; got {random_length_prob}")
    sizes = (block_size, *RANDOM_BLOCK_SIZES)
    coin_key, size_key = jax.random.split(key)
    other = jax.random.randint(size_key, (), 1, len(sizes))
    index = jnp.where(jax.random.uniform(coin_key) < random_length_prob, other, 0)
    return index.astype(jnp.int32), sizes


_legendre = functools.lru_cache(maxsize=16)(np.polynomial.legendre.leggauss)


def plackett_luce_inclusion(log_weights: np.ndarray, count: int) -> np.ndarray:
    """P(i is among the first `count` draws without replacement in proportion to exp(log_weights)); float64.

    With independent clocks E_j ~ Exp(w_j), the draw order is the order of the clocks, so the probability is
    the integral over E_i = s of P(fewer than `count` other clocks rang before s). That Poisson-binomial
    probability comes from the characteristic function on an odd number of roots of unity (none of them -1,
    where a factor could vanish), the integral from Gauss-Legendre quadrature in u = exp(-w_max s).
    """
    log_weights = np.asarray(log_weights, np.float64)
    size = log_weights.shape[0]
    if not 0 <= count <= size:
        raise ValueError(f"count must lie in 0..{size}; got {count}")
    if count in (0, size):
        return np.full(size, float(count > 0))
    # Substituting x = log s spreads the clocks evenly whatever the spread of the weights.
    low, high = -log_weights.max() - 40.0, -log_weights.min() + 5.0
    nodes, node_weights = _legendre(max(256, -(-int(6 * (high - low)) // 64) * 64))
    x = low + (high - low) * (nodes + 1) / 2
    hazard = np.exp(log_weights[None, :] + x[:, None])  # w_i s, [nodes, size]
    density = hazard * np.exp(-hazard) * (node_weights * (high - low) / 2)[:, None]
    rung = -np.expm1(-hazard)
    roots = size if size % 2 else size + 1  # counts of the others run over 0..size-1
    z = np.exp(2j * np.pi * np.arange(roots) / roots)
    factor = 1.0 + rung[:, :, None] * (z - 1.0)  # [nodes, size, roots]
    others = np.prod(factor, axis=1, keepdims=True) / factor
    # Sum over c < count of the inverse transform, folded into one vector over the roots.
    kernel = np.sum(z[None, :] ** -np.arange(count)[:, None], axis=0) / roots
    below = np.real(others @ kernel)
    return np.sum(density * below, axis=0)


@functools.lru_cache(maxsize=32)
def position_inclusion(
    block_size: int, half_life_ratio: float, min_level: float = MIN_LEVEL, nodes_per_count: int = 3
) -> tuple[float, ...]:
    """P(offset i of a full block is masked), over the level and the draw; exact up to quadrature (1e-4)."""
    check_block_size(block_size)
    check_half_life_ratio(half_life_ratio)
    offsets = np.arange(block_size, dtype=np.float64)
    nodes, node_weights = np.polynomial.legendre.leggauss(nodes_per_count)
    total = np.zeros(block_size)
    for count in range(1, block_size + 1):
        low = max((count - 0.5) / block_size, min_level)
        high = min((count + 0.5) / block_size, 1.0)
        if high <= low:
            continue
        for node, node_weight in zip(nodes, node_weights, strict=True):
            level = low + (high - low) * (node + 1) / 2
            if half_life_ratio == 0.0:
                chance = (offsets >= block_size - count).astype(np.float64)
            else:
                beta = math.log(2.0) / (half_life_ratio * block_size)
                chance = plackett_luce_inclusion(beta * (1.0 - level) * offsets, count)
            total += chance * node_weight * (high - low) / 2
    return tuple((total / (1.0 - min_level)).tolist())
