"""Masks against brute force written from the definitions, and schedules against the dense truth."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import masks

# (mask, T, S, the rule for sequence indices q and k)
L = 22


def doubled(q, k, block, clean="block"):
    """Spec: noisy -> own noisy block; noisy -> earlier clean blocks; clean -> clean block-causal or causal."""
    q_clean, k_clean = q >= L, k >= L
    q_block, k_block = (q - L * q_clean) // block, (k - L * k_clean) // block
    if not q_clean:
        return q_block > k_block if k_clean else q_block == k_block
    return k_clean and (k <= q if clean == "token" else q_block >= k_block)


CASES = {
    "full": (masks.Full(), 13, 22, lambda q, k: True),
    "causal": (masks.Causal(), 23, 23, lambda q, k: k <= q),
    "causal, fewer queries": (masks.Causal(), 9, 23, lambda q, k: k <= q),
    "causal, more queries": (masks.Causal(), 23, 9, lambda q, k: k <= q),
    "one pair": (masks.Causal(), 1, 1, lambda q, k: k <= q),
    "window": (masks.SlidingWindow(5), 23, 23, lambda q, k: q - 5 < k <= q),
    "window and sinks": (masks.SlidingWindow(4, 3), 30, 30, lambda q, k: k <= q and (q - 4 < k or k < 3)),
    "window of one": (masks.SlidingWindow(1), 7, 9, lambda q, k: k == q),
    "sinks beyond the window": (masks.SlidingWindow(2, 9), 12, 12, lambda q, k: k <= q and (q - 2 < k or k < 9)),
    "block causal": (masks.BlockCausal(4), 23, 23, lambda q, k: k // 4 <= q // 4),
    "block causal, fewer queries": (masks.BlockCausal(4), 6, 23, lambda q, k: k // 4 <= q // 4),
    "block causal of one": (masks.BlockCausal(1), 9, 9, lambda q, k: k <= q),
    "block diffusion": (masks.BlockDiffusion(L, 4), 2 * L, 2 * L, lambda q, k: doubled(q, k, 4)),
    "block diffusion, noisy half": (masks.BlockDiffusion(L, 4), L, 2 * L, lambda q, k: doubled(q, k, 4)),
    "block diffusion, one block": (masks.BlockDiffusion(L, L), 2 * L, 2 * L, lambda q, k: doubled(q, k, L)),
    "block diffusion, token": (
        masks.BlockDiffusion(L, 4, "token"),
        2 * L,
        2 * L,
        lambda q, k: doubled(q, k, 4, "token"),
    ),
    "prefix": (masks.PrefixBidirectional(5), 17, 17, lambda q, k: k <= 5 or q >= 5),
    "prefix of none": (masks.PrefixBidirectional(0), 5, 5, lambda q, k: True),
}


@pytest.mark.parametrize("name", CASES)
def test_dense_is_the_definition(name):
    mask, num_queries, num_keys, rule = CASES[name]
    offset = 0 if isinstance(mask, masks.BlockDiffusion) else num_keys - num_queries
    expected = [[bool(rule(i + offset, j)) for j in range(num_keys)] for i in range(num_queries)]
    np.testing.assert_array_equal(mask.dense(num_queries, num_keys), expected)


@pytest.mark.parametrize("name", CASES)
def test_predicate_is_the_same_in_jax(name):
    mask, num_queries, num_keys, _ = CASES[name]
    q_index = jnp.arange(num_queries)[:, None] + mask.query_offset(num_queries, num_keys)
    allowed = jax.jit(mask.allowed)(q_index, jnp.arange(num_keys)[None])
    assert allowed.dtype == bool
    np.testing.assert_array_equal(allowed, mask.dense(num_queries, num_keys))


@pytest.mark.parametrize("tiles", [(1, 1), (4, 4), (3, 7), (8, 2), (64, 64)])
@pytest.mark.parametrize("name", CASES)
def test_schedule_covers_the_dense_mask(name, tiles):
    mask, num_queries, num_keys, _ = CASES[name]
    tile_q, tile_k = tiles
    dense = mask.dense(num_queries, num_keys)
    schedule = mask.schedule(num_queries, num_keys, tile_q, tile_k)
    num_q_tiles, num_k_tiles = -(-num_queries // tile_q), -(-num_keys // tile_k)
    assert len(schedule.q_to_k) == num_q_tiles and len(schedule.k_to_q) == num_k_tiles
    for i in range(num_q_tiles):
        for j in range(num_k_tiles):
            tile = dense[i * tile_q : (i + 1) * tile_q, j * tile_k : (j + 1) * tile_k]
            live = bool(tile.any())
            assert (j in schedule.q_to_k[i]) == live and (i in schedule.k_to_q[j]) == live
            whole = bool(tile.all()) and tile.shape[1] == tile_k  # a tile cut by the end of the keys is partial
            assert schedule.is_partial[i, j] == (live and not whole)
    for row in (*schedule.q_to_k, *schedule.k_to_q):
        assert row.dtype == np.int32 and (np.diff(row) > 0).all()


# Published counts of the block-diffusion schedule: (sequence length, block, tile) -> (live tiles, partial ones).
COUNTS = {
    (4096, 16, 128): (1088, 96),
    (4096, 32, 128): (1088, 96),
    (4096, 64, 128): (1088, 96),
    (4096, 64, 64): (4160, 0),
    (4096, 16, 64): (4224, 192),
    (4096, 32, 64): (4224, 192),
    (1024, 64, 128): (80, 24),
}


@pytest.mark.smoke
@pytest.mark.parametrize("seq_len,block,tile", COUNTS)
def test_block_diffusion_tile_counts(seq_len, block, tile):
    schedule = masks.BlockDiffusion(seq_len, block).schedule(2 * seq_len, 2 * seq_len, tile, tile)
    assert (schedule.num_live, schedule.num_partial) == COUNTS[seq_len, block, tile]


@pytest.mark.parametrize("block,tile", [(8, 8), (4, 16), (16, 4), (32, 8)])
def test_block_diffusion_tile_counts_follow_the_formulas(block, tile):
    seq_len = 64
    n = seq_len // tile
    live = masks.BlockDiffusion(seq_len, block).schedule(2 * seq_len, 2 * seq_len, tile, tile).num_live
    if tile == block:
        assert live == n * n + n
    elif tile > block:
        assert live == n * n + 2 * n
    else:
        r = block // tile
        noisy = sum(r + r * (i // r) for i in range(n))
        clean = sum(r * (i // r + 1) for i in range(n))
        assert live == noisy + clean


@pytest.mark.parametrize("seq_len,block", [(24, 4), (64, 64), (30, 1), (32, 8)])
def test_block_diffusion_density(seq_len, block):
    dense = masks.BlockDiffusion(seq_len, block).dense(2 * seq_len, 2 * seq_len)
    assert dense.mean() == pytest.approx(1 / 4 + block / (4 * seq_len), abs=1e-12)


def test_block_diffusion_limits():
    """One block: the noisy half is plain bidirectional. Blocks of one: the clean half is plain causal."""
    whole = masks.BlockDiffusion(12, 12).dense(24, 24)
    assert whole[:12, :12].all() and not whole[:12, 12:].any()
    single = masks.BlockDiffusion(12, 1).dense(24, 24)
    np.testing.assert_array_equal(single[12:, 12:], masks.Causal().dense(12, 12))
    assert not single[12:, :12].any()


def test_schedule_of_a_long_sequence_is_cheap():
    """Work and memory of the schedule do not grow with T x S elements: 2**34 pairs here."""
    schedule = masks.BlockDiffusion(2**16, 64).schedule(2**17, 2**17, 512, 512)
    n = 2**16 // 512
    assert schedule.num_live == n * n + 2 * n


def test_masks_are_static_values():
    assert masks.SlidingWindow(4, 1) == masks.SlidingWindow(4, 1) != masks.SlidingWindow(4, 2)
    assert hash(masks.BlockDiffusion(8, 2)) == hash(masks.BlockDiffusion(8, 2))
    first = masks.Causal().schedule(64, 64, 8, 8)
    assert masks.Causal().schedule(64, 64, 8, 8) is first
    with pytest.raises(dataclasses.FrozenInstanceError):
        masks.BlockCausal(4).block_size = 8


@pytest.mark.parametrize(
    "make,match",
    [
        (lambda: masks.SlidingWindow(0), "window must be at least 1; got 0"),
        (lambda: masks.SlidingWindow(4, -1), "num_sinks must not be negative; got -1"),
        (lambda: masks.BlockCausal(0), "block_size must be at least 1; got 0"),
        (lambda: masks.BlockDiffusion(0, 4), "seq_len must be at least 1; got 0"),
        (lambda: masks.BlockDiffusion(8, 0), "block_size must be at least 1; got 0"),
        (lambda: masks.PrefixBidirectional(-1), "prefix_len must not be negative; got -1"),
        (lambda: masks.BlockDiffusion(8, 2).dense(8, 8), r"needs 2 \* seq_len = 16 keys .* got 8 keys"),
        (lambda: masks.BlockDiffusion(8, 2).schedule(17, 16, 4, 4), "17 queries"),
        (lambda: masks.Causal().schedule(8, 8, 0, 4), "tile_q and tile_k must be positive; got 0 and 4"),
    ],
)
def test_bad_arguments(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_unknown_clean_order():
    from jaxtyping import config

    config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match="got 'causal'"):
            masks.BlockDiffusion(8, 2, "causal")
    finally:
        config.update("jaxtyping_disable", False)
