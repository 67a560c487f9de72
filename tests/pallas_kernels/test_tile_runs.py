"""Tables of runs list exactly the live tiles of a mask, full ones apart from partial ones, under every limit."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import masks
from pallas_kernels.tile_runs import TileRuns, all_runs, limit_runs, mask_runs, tile_limits

MASKS = [
    (masks.Full(), 100, 70),
    (masks.Causal(), 100, 130),
    (masks.SlidingWindow(30, 9), 150, 150),
    (masks.BlockDiffusion(60, 7), 120, 120),
    (masks.PrefixBidirectional(33), 90, 90),
]


def expand(runs: TileRuns, columns: int) -> np.ndarray:
    """int [batch, tile, columns]: 0 dead, 1 partial, 2 full; fails when a tile is listed twice."""
    table = np.asarray(runs.table)
    result = np.zeros((table.shape[0], table.shape[1], columns), int)
    for batch, lines in enumerate(table):
        assert sorted(lines[:, 0]) == list(range(len(lines)))
        for line in lines:
            for i in range(runs.num_full + runs.num_partial):
                start, length = line[1 + 2 * i : 3 + 2 * i]
                assert length >= 0
                assert not result[batch, line[0], start : start + length].any()
                result[batch, line[0], start : start + length] = 2 if i < runs.num_full else 1
    return result


@pytest.mark.parametrize("mask, num_queries, num_keys", MASKS, ids=lambda value: str(value))
@pytest.mark.parametrize("by_key", [False, True])
def test_runs_list_the_schedule(mask, num_queries, num_keys, by_key):
    runs = mask_runs(mask, num_queries, num_keys, 32, 16, by_key=by_key)
    dense = np.zeros((-(-num_queries // 32) * 32, -(-num_keys // 16) * 16), bool)
    dense[:num_queries, :num_keys] = mask.dense(num_queries, num_keys)
    tiles = dense.reshape(-1, 32, dense.shape[1] // 16, 16).swapaxes(1, 2)
    rows = np.minimum(num_queries - np.arange(len(tiles)) * 32, 32)[:, None]  # rows of a tile that count
    visible = tiles.sum((2, 3))
    expected = np.where(visible == 0, 0, np.where(visible == rows * 16, 2, 1))
    if by_key:
        expected = expected.T
    np.testing.assert_array_equal(expand(runs, expected.shape[1])[0], expected)
    work = (expected[runs.table[0, :, 0]] > 0).sum(1)
    assert (np.diff(work) <= 0).all()  # most work first


@pytest.mark.parametrize("mask, num_queries, num_keys", MASKS, ids=lambda value: str(value))
def test_limits_cut_runs(mask, num_queries, num_keys):
    runs = mask_runs(mask, num_queries, num_keys, 32, 16)
    rows, columns = runs.table.shape[1], -(-num_keys // 16)
    before = expand(runs, columns)
    rng = np.random.default_rng(0)
    index = np.arange(columns)
    for _ in range(20):
        bounds = np.sort(rng.integers(0, columns + 1, (2, rows, 4)), axis=-1)
        bounds[rng.random((2, rows)) < 0.2] = 0  # nothing lives
        live = (bounds[..., :1] <= index) & (index < bounds[..., 3:])
        full = (bounds[..., 1:2] <= index) & (index < bounds[..., 2:3])
        limited = expand(limit_runs(runs, tile_limits(jnp.asarray(live), jnp.asarray(full))), columns)
        expected = np.where(~live, 0, np.where(full, before, np.minimum(before, 1)))
        np.testing.assert_array_equal(limited, expected)


def test_full_tiles_with_a_gap_are_masked():
    live = jnp.ones((1, 1, 5), bool)
    full = jnp.asarray([[[False, True, False, True, False]]])
    runs = mask_runs(masks.Full(), 32, 80, 32, 16)
    np.testing.assert_array_equal(expand(limit_runs(runs, tile_limits(live, full)), 5)[0, 0], [1] * 5)


def test_all_runs_are_partial():
    np.testing.assert_array_equal(expand(all_runs(3, 4), 4), np.ones((1, 3, 4)))
