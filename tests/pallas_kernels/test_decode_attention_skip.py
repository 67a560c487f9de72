"""decode_attention with skipped tiles: both implementations against the rule applied pair by pair in NumPy float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import decode_attention, masks
from pallas_kernels.attention.skip import SkipTile
from pallas_kernels.decode_attention import xla

LAYERS, BATCH, HEAD_DIM, SCALE = 2, 3, 8, 0.4
TILE = SkipTile(width=8, chains=2)
TILINGS = {"one chunk": xla.Tiling(128, chunk=256, one_chunk=512), "chunks": xla.Tiling(128, chunk=32, one_chunk=16)}
# name: (T, S, N, K, tile, thresholds per row, options)
CASES = {
    "one token": (1, 100, 4, 2, TILE, [0.9, 0.8, 0.9], {}),
    "block, own keys": (3, 90, 2, 1, SkipTile(width=4, chains=2), [0.95, 0.9, 0.9], dict(own=masks.Full())),
    "dense guard": (2, 64, 2, 2, TILE, [0.0, 1.5, 0.95], dict(own=masks.Causal())),
    "positions": (3, 77, 4, 2, SkipTile(width=5, chains=3), [0.95] * 3, dict(positions=True, own_lengths=[0, 2, 3])),
    "one chain, int8": (2, 100, 4, 2, SkipTile(width=7), [0.95] * 3, dict(codes=True)),
}  # fmt: skip


def keep_by_the_rule(q, k, filled, thresholds, tile):
    """Which tiles each key head keeps, bool [B, K, tiles], and which are visited [B, tiles]: one row at a time."""
    batch, _, heads, _ = q.shape
    capacity, kv_heads = k.shape[1:3]
    tiles = -(-capacity // tile.width)
    keep = np.zeros((batch, kv_heads, tiles), bool)
    visited = np.zeros((batch, tiles), bool)
    group = heads // kv_heads
    for b, head in np.ndindex(batch, kv_heads):
        # A threshold outside (0, 1) means dense.
        log_threshold = np.log(thresholds[b]) if 0 < thresholds[b] < 1 else -np.inf
        rows = q[b, :, head * group : (head + 1) * group].reshape(-1, q.shape[3])
        before = np.full((tile.chains, len(rows)), -np.inf)
        for t in range(tiles):
            slots = [j for j in range(t * tile.width, min((t + 1) * tile.width, capacity)) if filled[b, j]]
            if not slots:
                continue
            visited[b, t] = True
            top = (SCALE * rows @ k[b, slots, head].T).max(axis=1)
            keep[b, head, t] = any(
                seen == -np.inf or now - seen >= log_threshold
                for now, seen in zip(top, before[t % tile.chains], strict=True)
            )
            before[t % tile.chains] = np.maximum(before[t % tile.chains], top)
    return keep, visited


@functools.cache
def solved(name, oracle):
    """Arguments of the call and what it must return."""
    num_queries, capacity, heads, kv_heads, tile, thresholds, options = CASES[name]
    rng = np.random.default_rng(sum(map(ord, name)))
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    q = draw(BATCH, num_queries, heads, HEAD_DIM)
    k_cache, v_cache = (draw(LAYERS, BATCH, capacity, kv_heads, HEAD_DIM) for _ in range(2))
    lengths = np.asarray([capacity, capacity // 2, capacity - 3])
    given = dict(q=q, k_cache=k_cache, v_cache=v_cache, kv_lengths=lengths)
    filled = np.arange(capacity) < lengths[:, None]
    k, v = k_cache[1].astype(np.float64), v_cache[1].astype(np.float64)
    if "codes" in options:
        for key, x in (("k", k), ("v", v)):
            scales = rng.uniform(0.02, 0.04, (LAYERS, BATCH, kv_heads, capacity)).astype(np.float32)
            codes = rng.integers(-100, 101, k_cache.shape).astype(np.int8)
            given |= {f"{key}_cache": codes, f"{key}_scale": scales}
            x[:] = codes[1] * np.swapaxes(scales[1], 1, 2)[..., None].astype(np.float64)
    if "positions" in options:
        positions = np.where(rng.random((BATCH, capacity)) < 0.2, -1, np.arange(capacity))
        positions[:, 10:20] = -1  # whole tiles
        given["k_positions"] = positions
        filled &= positions >= 0
    keep, visited = keep_by_the_rule(q.astype(np.float64), k, filled, thresholds, tile)
    own_mask, seen_own = options.get("own", masks.Causal()), np.zeros((BATCH, num_queries, 0), bool)
    if "own" in options or "own_lengths" in options:
        own_k, own_v = (draw(BATCH, num_queries, kv_heads, HEAD_DIM) for _ in range(2))
        given |= dict(own_k=own_k, own_v=own_v)
        k, v = np.concatenate([k, own_k], axis=1), np.concatenate([v, own_v], axis=1)
        seen_own = np.broadcast_to(own_mask.dense(num_queries, num_queries), (BATCH, num_queries, num_queries))
        if "own_lengths" in options:
            given["own_lengths"] = np.asarray(options["own_lengths"])
            seen_own = seen_own & (np.arange(num_queries) < given["own_lengths"][:, None, None])
    group, results = heads // kv_heads, []
    for head in range(kv_heads):
        here = filled & np.repeat(keep[:, head], tile.width, axis=1)[:, :capacity]
        seen = np.concatenate([np.broadcast_to(here[:, None], (BATCH, num_queries, capacity)), seen_own], axis=2)
        mine = slice(head * group, (head + 1) * group)
        results.append(oracle(q[:, :, mine], k[:, :, head : head + 1], v[:, :, head : head + 1], seen, SCALE))
    out = np.concatenate([out for out, _ in results], axis=2)
    lse = np.concatenate([lse for _, lse in results], axis=1)
    return given, own_mask, tile, np.asarray(thresholds, np.float32), (out, lse, keep, visited)


@pytest.mark.parametrize("variant", ["reference", *TILINGS])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_counts(oracle, monkeypatch, name, variant):
    if variant != "reference":
        monkeypatch.setattr(xla, "default_tiling", lambda *_: TILINGS[variant])
    given, own_mask, tile, thresholds, (out, lse, keep, visited) = solved(name, oracle)
    call = functools.partial(
        decode_attention, own_mask=own_mask, scale=SCALE, skip_tile=tile, return_lse=True, return_stats=True,
        implementation="reference" if variant == "reference" else "xla",
    )  # fmt: skip
    got, got_lse, stats = jax.jit(lambda t, given: call(layer=1, skip_threshold=t, **given))(thresholds, given)
    np.testing.assert_allclose(got, out, rtol=3e-5, atol=3e-5)
    np.testing.assert_allclose(got_lse, lse, rtol=3e-5, atol=3e-5)
    np.testing.assert_array_equal(stats.visited, np.repeat(visited.sum(axis=1)[:, None], keep.shape[1], axis=1))
    np.testing.assert_array_equal(stats.visited - stats.skipped, keep.sum(axis=2))
    assert stats.dense_guarded == ((thresholds <= 0) | (thresholds >= 1)).sum()


def test_cases_reach_the_decision(oracle):
    """Guards the table above: with thresholds inside (0, 1) tiles are skipped and kept, with others all are kept."""
    for name in CASES:
        *_, thresholds, (_, _, keep, visited) = solved(name, oracle)
        skipped = visited.sum(axis=1) * keep.shape[1] - keep.sum(axis=(1, 2))
        inside = (thresholds > 0) & (thresholds < 1)
        assert skipped[inside].sum() >= 3 and keep[inside].sum() >= 3, (name, skipped)
        assert (skipped[~inside] == 0).all()


def test_the_scale_factor_is_divided_by_the_keys_of_each_row(oracle):
    given, own_mask, tile, _, _ = solved("block, own keys", oracle)
    given = {name: jnp.asarray(x) for name, x in given.items()}
    call = functools.partial(decode_attention, layer=1, own_mask=own_mask, scale=SCALE, skip_tile=tile, **given)
    keys = given["kv_lengths"] + given["q"].shape[1]
    by_factor, stats = call(skip_scale_factor=45.0, return_stats=True)
    by_threshold = call(skip_threshold=jnp.asarray(45.0 / keys, jnp.float32))
    np.testing.assert_allclose(by_factor, by_threshold, atol=1e-6)
    assert stats.skipped.sum() > 0


@pytest.mark.parametrize(
    "options, match",
    [
        (dict(skip_threshold=1.5), r"skip_threshold must be inside \(0, 1\)"),
        (dict(skip_threshold=0.5, skip_scale_factor=3.0), "skip_threshold or skip_scale_factor, not both"),
        (dict(skip_tile=TILE), "does nothing without skip_threshold"),
        (dict(return_stats=True), "return_stats tells of skipped tiles"),
        (dict(skip_threshold=0.5, window=4), "leave the skip options out with a window"),
    ],
)
def test_bad_options_are_explained(options, match):
    cache = jnp.zeros((1, 1, 8, 1, 16))
    with pytest.raises(ValueError, match=match):
        decode_attention(jnp.zeros((1, 1, 2, 16)), cache, cache, layer=0, kv_lengths=jnp.array([3]), **options)
