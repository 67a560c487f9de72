import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.decoding.block_diffusion import corruption
from jaxmodels.decoding.block_diffusion.corruption import (
    Corruption,
    complement,
    draw_block_size,
    make_groups,
    plackett_luce_inclusion,
    position_inclusion,
    sample_block_mask,
    sample_uniform_mask,
    sample_uniform_subset,
)

# P(masked) at offsets 0, n/4, n/2, 3n/4, n-1 for block size n and half-life ratio lambda (published table).
REFERENCE = {
    (16, math.inf): (0.50, 0.50, 0.50, 0.50, 0.50),
    (16, 0.25): (0.377, 0.433, 0.502, 0.585, 0.658),
    (16, 0.10): (0.269, 0.353, 0.486, 0.678, 0.833),
    (16, 0.05): (0.196, 0.295, 0.482, 0.755, 0.926),
    (64, 0.25): (0.373, 0.424, 0.494, 0.573, 0.663),
    (64, 0.10): (0.264, 0.340, 0.468, 0.657, 0.852),
    (64, 0.05): (0.187, 0.277, 0.454, 0.726, 0.939),
}


def many_blocks(block_size: int, half_life_ratio: float, *, blocks: int, seed: int = 0) -> Corruption:
    """`blocks` independent full blocks, one per group."""
    eligible = jnp.ones((64, blocks // 64 * block_size), bool)
    return jax.jit(
        lambda key: sample_block_mask(key, eligible, block_size=block_size, half_life_ratio=half_life_ratio)
    )(jax.random.key(seed))


@pytest.mark.parametrize("size, ratio", REFERENCE)
def test_position_probabilities_follow_the_published_table(size, ratio):
    blocks = 19200
    masked = np.asarray(many_blocks(size, ratio, blocks=blocks).masked).reshape(-1, size)
    places = [0, size // 4, size // 2, 3 * size // 4, size - 1]
    sigma = math.sqrt(0.25 / blocks)
    # The table itself was sampled, to +-0.006.
    np.testing.assert_allclose(masked.mean(0)[places], REFERENCE[size, ratio], atol=0.006 + 3 * sigma)
    if size == 16:
        np.testing.assert_allclose(masked.mean(0), position_inclusion(size, ratio), atol=4 * sigma)


def test_plackett_luce_matches_enumeration_and_reference_numbers():
    log_weights = math.log(2) / (0.1 * 4) * 0.5 * np.arange(4)
    weights = np.exp(log_weights)
    pairs = {}
    for i, j in itertools.permutations(range(4), 2):
        chance = weights[i] / weights.sum() * weights[j] / (weights.sum() - weights[i])
        pairs[frozenset((i, j))] = pairs.get(frozenset((i, j)), 0.0) + chance
    exact = np.array([sum(p for pair, p in pairs.items() if i in pair) for i in range(4)])
    np.testing.assert_allclose(exact, [0.130879, 0.303699, 0.667538, 0.897885], atol=1e-6)
    np.testing.assert_allclose(plackett_luce_inclusion(log_weights, 2), exact, atol=1e-9)
    assert pairs[frozenset((2, 3))] == pytest.approx(0.575602, abs=1e-6)
    assert pairs[frozenset((0, 1))] == pytest.approx(0.010180, abs=1e-6)
    for count in (1, 3):
        np.testing.assert_allclose(plackett_luce_inclusion(log_weights, count).sum(), count, atol=1e-9)


@pytest.mark.smoke
def test_sampler_is_plackett_luce(monkeypatch):
    """At a fixed level t = 0.5, all subset frequencies lie within 3 sigma of the exact ones."""
    monkeypatch.setattr(corruption, "_draw_level", lambda key, groups, low: jnp.full(groups.group.shape, 0.5))
    blocks = 200_000 // 64 * 64
    masked = np.asarray(many_blocks(4, 0.1, blocks=blocks, seed=3).masked).reshape(-1, 4)
    assert (masked.sum(1) == 2).all()
    for want, got in zip((0.130879, 0.303699, 0.667538, 0.897885), masked.mean(0), strict=True):
        assert abs(got - want) < 3 * math.sqrt(want * (1 - want) / blocks)
    for pair, want in (((2, 3), 0.575602), ((0, 1), 0.010180)):
        got = (masked[:, pair[0]] & masked[:, pair[1]]).mean()
        assert abs(got - want) < 3 * math.sqrt(want * (1 - want) / blocks)


@pytest.mark.parametrize(
    "size, bias", [(1, 0.694), (2, 0.838), (4, 0.917), (8, 0.958), (16, 0.980), (32, 0.990), (64, 0.996)]
)
def test_rounding_bias_of_the_exact_count(size, bias):
    """E[round(t n) / (t n)]: the 1/t weight with exact counts is no unbiased estimator."""
    blocks = 128_000 // size // 64 * 64 if size > 4 else 64_000
    sample = many_blocks(size, math.inf, blocks=blocks, seed=1)
    weight = np.asarray(sample.masked / sample.level).reshape(-1, size).sum(1) / size
    sigma = weight.std() / math.sqrt(len(weight))
    assert abs(weight.mean() - bias) < 3 * sigma + 5e-4
    assert sigma < 0.02


def test_counts_are_exact_in_full_short_and_partly_supervised_blocks():
    length, size = 22, 8  # last block: 6 positions
    loss_mask = np.ones((3, length), bool)
    loss_mask[1, 3:11] = False
    loss_mask[2, 20:] = False
    for seed in range(20):
        masked, level = sample_block_mask(
            jax.random.key(seed), jnp.asarray(loss_mask), block_size=size, half_life_ratio=0.1
        )
        masked, level = np.asarray(masked), np.asarray(level)
        assert not (masked & ~loss_mask).any()
        for row in range(3):
            for start in range(0, length, size):
                part = slice(start, start + size)
                assert len(set(level[row, part])) == 1
                count = loss_mask[row, part].sum()
                assert masked[row, part].sum() == np.round(level[row, start] * np.float32(count))
    assert len(np.unique(level)) == 9  # 3 rows x 3 blocks


def test_short_block_keeps_the_nominal_beta(monkeypatch):
    monkeypatch.setattr(corruption, "_draw_level", lambda key, groups, low: jnp.full(groups.group.shape, 0.5))
    eligible = jnp.ones((60_000, 4), bool)
    masked = sample_block_mask(jax.random.key(0), eligible, block_size=16, half_life_ratio=0.1).masked
    beta = math.log(2) / (0.1 * 16)
    want = plackett_luce_inclusion(beta * 0.5 * np.arange(4), 2)
    np.testing.assert_allclose(np.asarray(masked).mean(0), want, atol=3 * math.sqrt(0.25 / 60_000))


def test_half_life_zero_masks_the_rightmost():
    sample = sample_block_mask(jax.random.key(0), jnp.ones((8, 64), bool), block_size=16, half_life_ratio=0.0)
    blocks = np.asarray(sample.masked).reshape(-1, 16)
    assert (np.diff(blocks.astype(int), axis=1) >= 0).all() and blocks.any() and not blocks.all()


def test_whole_sequence_mode_masks_at_least_one():
    kwargs = {"block_size": None, "half_life_ratio": math.inf}
    eligible = jnp.ones((4000, 3), bool).at[0].set(False)
    one = np.asarray(sample_block_mask(jax.random.key(0), eligible, min_masked=1, **kwargs).masked).sum(1)
    none = np.asarray(sample_block_mask(jax.random.key(0), eligible, **kwargs).masked).sum(1)
    assert one[0] == 0 and one[1:].min() == 1 and none[1:].min() == 0


def test_uniform_mask_shares_one_level_per_document():
    segments = jnp.asarray([[1] * 500 + [2] * 300 + [0] * 200])
    loss_mask = segments > 0
    masked, level = sample_uniform_mask(jax.random.key(5), loss_mask, segment_ids=segments)
    level = np.asarray(level[0])
    assert len(set(level[:500])) == 1 and len(set(level[500:800])) == 1 and level[0] != level[600]
    for part in (slice(0, 500), slice(500, 800)):
        rate, want = np.asarray(masked[0, part]).mean(), level[part][0]
        assert abs(rate - want) < 4 * math.sqrt(want * (1 - want) / 300)
    assert not np.asarray(masked[0, 800:]).any()
    per_block = sample_uniform_mask(jax.random.key(5), jnp.ones((1, 12), bool), block_size=4).level
    assert len(np.unique(per_block)) == 3


def test_groups_end_at_blocks_and_documents():
    segments = jnp.asarray([[1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 0]])
    groups = make_groups((1, 12), 4, segment_ids=segments)
    assert groups.group.tolist() == [[0, 0, 0, 0, 1, 2, 2, 2, 3, 3, 4, 4]]
    assert groups.offset.tolist() == [[0, 1, 2, 3, 0, 0, 1, 2, 0, 1, 0, 1]]
    assert make_groups((1, 12), None, segment_ids=segments).group.tolist() == [[0] * 5 + [1] * 5 + [2] * 2]


def test_complement_covers_every_supervised_token_once():
    loss_mask = jnp.ones((2, 30), bool).at[1, :7].set(False)
    first = sample_block_mask(jax.random.key(2), loss_mask, block_size=8, half_life_ratio=0.1)
    second = complement(first, loss_mask)
    assert bool(((first.masked ^ second.masked) == loss_mask).all())
    assert not bool((first.masked & second.masked).any())
    np.testing.assert_allclose(second.level, np.maximum(1 - first.level, 1e-3), rtol=1e-6)


def test_uniform_subset_is_uniform_over_sizes_and_subsets():
    blocks = 60_000
    masked, weight = sample_uniform_subset(jax.random.key(0), jnp.ones((blocks, 3), bool), block_size=3)
    masked, weight = np.asarray(masked), np.asarray(weight)
    np.testing.assert_allclose(weight[:, 0], 3 / masked.sum(1))
    code = masked @ np.array([1, 2, 4])
    counts = np.bincount(code, minlength=8) / blocks
    want = np.array([0, 1, 1, 1, 1, 1, 1, 3]) / 9  # P(k) = 1/3, uniform among the k-subsets
    assert counts[0] == 0
    assert (np.abs(counts - want) < 4 * np.sqrt(want * (1 - want) / blocks) + 1e-12).all()


def test_random_block_size():
    keys = jax.random.split(jax.random.key(0), 4000)
    index = np.asarray(jax.vmap(lambda key: draw_block_size(key, 16, 0.5)[0])(keys))
    sizes = draw_block_size(keys[0], 16, 0.5)[1]
    assert sizes == (16, 4, 8, 12, 16, 20, 24, 28)
    share = np.bincount(index, minlength=8) / 4000
    np.testing.assert_allclose(share, [0.5] + [0.5 / 7] * 7, atol=0.03)
    assert int(draw_block_size(keys[0], 16, 0.0)[0]) == 0


@pytest.mark.parametrize("size", [0, -1, True])
def test_bad_block_size(size):
    with pytest.raises(ValueError, match=f"block_size must be an integer >= 1; got {size}"):
        sample_block_mask(jax.random.key(0), jnp.ones((1, 4), bool), block_size=size)


def test_bad_ratio_and_probability():
    with pytest.raises(ValueError, match=r"half_life_ratio must lie in \[0, inf\]; got -0.5"):
        sample_block_mask(jax.random.key(0), jnp.ones((1, 4), bool), block_size=2, half_life_ratio=-0.5)
    with pytest.raises(ValueError, match="half_life_ratio"):
        position_inclusion(4, math.nan)
    with pytest.raises(ValueError, match=r"random_length_prob must lie in \[0, 1\]; got 1.5"):
        draw_block_size(jax.random.key(0), 4, 1.5)
    with pytest.raises(ValueError, match=r"min_level must lie in \(0, 1\); got 0.0"):
        sample_uniform_mask(jax.random.key(0), jnp.ones((1, 4), bool), min_level=0.0)
