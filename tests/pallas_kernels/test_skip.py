"""Skip-softmax (BLASST): the rule against loops that share nothing with it, and what calls promise about it."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import flash_attention, masks
from pallas_kernels.attention import reference, skip, xla
from pallas_kernels.attention.limits import Limits
from pallas_kernels.attention.skip import Skip, SkipTile

BATCH, HEAD_DIM, SCALE = 2, 8, 0.7
VARIANTS = {
    "reference": reference.run,
    "one tile": functools.partial(xla.run, tiling=xla.Tiling(1024, 1024)),
    "tiles": functools.partial(xla.run, tiling=xla.Tiling(32, 16)),
    "lanes": functools.partial(xla.run, tiling=xla.Tiling(16, 16, lanes=3)),
}
# name: (mask, T, S, N, K, Hv, which limits, tile, λ of both rows of the batch)
CASES = {
    "one token": (masks.Causal(), 1, 1, 2, 1, 8, "", SkipTile(4, 4), (0.5, 0.1)),
    "shorter than a tile": (masks.Causal(), 7, 7, 2, 2, 8, "", SkipTile(16, 16), (0.9, 0.1)),
    "causal": (masks.Causal(), 63, 63, 4, 2, 8, "", SkipTile(4, 8), (0.3, 0.05)),
    "causal, one key head": (masks.Causal(), 65, 65, 4, 1, 5, "", SkipTile(8, 4), (0.6, 0.2)),
    "causal, one dense": (masks.Causal(), 50, 50, 2, 2, 8, "", SkipTile(4, 8), (0.5, 2.0)),
    "wide tiles": (masks.Causal(), 90, 90, 2, 2, 8, "", SkipTile(2, 32), (0.7, 0.3)),
    "chunk of a prefill": (masks.Causal(), 37, 100, 4, 2, 8, "", SkipTile(8, 8), (0.6, 0.1)),
    "more queries than keys": (masks.Causal(), 60, 37, 2, 1, 8, "", SkipTile(8, 4), (0.6, 0.1)),
    "ragged": (masks.Causal(), 48, 96, 2, 1, 8, "lengths", SkipTile(4, 8), (0.6, 0.1)),
    "full, ragged": (masks.Full(), 40, 70, 2, 2, 12, "lengths", SkipTile(4, 8), (0.5, 0.5)),
    "packed": (masks.Causal(), 70, 70, 4, 2, 8, "packed", SkipTile(4, 4), (0.6, 0.1)),
    "block causal": (masks.BlockCausal(7), 65, 65, 2, 2, 8, "", SkipTile(4, 8), (0.5, 0.1)),
    "doubled": (masks.BlockDiffusion(33, 5), 66, 66, 4, 2, 8, "", SkipTile(4, 8), (0.7, 0.2)),
    "positions": (masks.Causal(), 40, 57, 2, 2, 8, "positions", SkipTile(4, 8), (0.7, 0.2)),
}
# What every run compares; `pytest -m slow` compares every variant on every case.
QUICK = ("causal, one dense", "chunk of a prefill", "ragged", "packed", "doubled")


def variants_and_cases():
    for variant, name in itertools.product(VARIANTS, CASES):
        quick = name in QUICK and (variant == "tiles" or (variant == "lanes" and name == "ragged"))
        yield pytest.param(variant, name, marks=() if quick else pytest.mark.slow, id=f"{variant}, {name}")


def make_limits(kind, num_queries, num_keys, rng) -> Limits:
    """Random limits with an empty row of the batch, padding, empty slots."""
    given = {}
    if kind == "lengths":
        given["kv_lengths"] = [num_keys // 2 + 3, 0]
    if kind == "packed":
        segments = np.sort(rng.integers(0, 3, (BATCH, num_keys)), axis=1)
        given["q_segments"] = given["k_segments"] = np.where(segments == 2, -1, segments)
    if kind == "positions":
        given["q_positions"] = rng.integers(0, num_keys, (BATCH, num_queries))
        given["k_positions"] = rng.integers(-1, num_keys, (BATCH, num_keys))
    return Limits(**{name: jnp.asarray(value, jnp.int32) for name, value in given.items()})


def visible_pairs(mask, limits, num_queries, num_keys):
    """Who sees whom [B, T, S], pair by pair from the documented rules."""
    given = {name: np.asarray(value) for name, value in limits._asdict().items() if value is not None}
    seen = np.zeros((BATCH, num_queries, num_keys), bool)
    for b, i, j in np.ndindex(*seen.shape):
        q_position = (
            given["q_positions"][b, i] if "q_positions" in given else i + mask.query_offset(num_queries, num_keys)
        )
        k_position = given["k_positions"][b, j] if "k_positions" in given else j
        visible = k_position >= 0 and bool(mask.allowed(np.int64(q_position), np.int64(k_position)))
        if "kv_lengths" in given:
            visible &= j < given["kv_lengths"][b]
        if "q_segments" in given:
            visible &= given["q_segments"][b, i] == given["k_segments"][b, j] >= 0
        seen[b, i, j] = visible
    return seen


def blasst_loop(q, k, v, seen, scale, thresholds, tile):
    """The kernel's loop in float64: running maximum, sum and output of each row, tile after tile.

    Returns output, log-sum-exp, kept tiles, visited tiles, and the distance of each decision from its threshold.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, num_queries, heads, _ = q.shape
    num_keys, group = k.shape[1], heads // k.shape[2]
    grid = (batch, heads, -(-num_queries // tile.rows), -(-num_keys // tile.width))
    keep, visited, distance = np.zeros(grid, bool), np.zeros(grid, bool), np.full(grid, np.inf)
    out, lse = np.zeros((*q.shape[:3], v.shape[3])), np.full((batch, heads, num_queries), -np.inf)
    for b, n, i in np.ndindex(*grid[:3]):
        rows = range(i * tile.rows, min((i + 1) * tile.rows, num_queries))
        log_threshold = np.log(thresholds[b]) if 0.0 < thresholds[b] < 1.0 else -np.inf
        state = {r: (-np.inf, 0.0, np.zeros(v.shape[3])) for r in rows}  # m, l, o
        for j in range(grid[3]):
            cells = {}  # row -> (keys it sees in this tile, their scores)
            for r in rows:
                keys = [c for c in range(j * tile.width, min((j + 1) * tile.width, num_keys)) if seen[b, r, c]]
                if keys:
                    cells[r] = keys, np.array([scale * k[b, c, n // group] @ q[b, r, n] for c in keys])
            if not cells:
                continue
            visited[b, n, i, j] = True
            gaps = [scores.max() - state[r][0] for r, (_, scores) in cells.items()]  # +inf for a first sight
            distance[b, n, i, j] = np.abs(max(gaps) - log_threshold)
            if max(gaps) < log_threshold:
                continue
            keep[b, n, i, j] = True
            for r, (keys, scores) in cells.items():
                m, total, o = state[r]
                m_new = max(m, scores.max())
                weights, shrink = np.exp(scores - m_new), np.exp(m - m_new)
                state[r] = m_new, total * shrink + weights.sum(), o * shrink + weights @ v[b, keys, n // group]
        for r, (m, total, o) in state.items():
            if total > 0:
                out[b, r, n], lse[b, n, r] = o / total, m + np.log(total)
    return out, lse, keep, visited, distance


def block_mask_keep(q, k, seen, scale, thresholds, tile):
    """Kept tiles without a loop over tiles: block maxima, cumulative row maxima, a comparison. NumPy float64."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
    scores = np.where(seen[:, None], scale * np.einsum("bthd,bshd->bhts", q, k), -np.inf)
    scores = np.pad(
        scores,
        ((0, 0), (0, 0), (0, -scores.shape[2] % tile.rows), (0, -scores.shape[3] % tile.width)),
        constant_values=-np.inf,
    )
    batch, heads, rows, columns = scores.shape
    top = scores.reshape(batch, heads, rows, columns // tile.width, tile.width).max(4)
    running = np.maximum.accumulate(top, axis=3)
    before = np.concatenate([np.full_like(top[..., :1], -np.inf), running[..., :-1]], axis=3)
    level = np.asarray([np.log(t) if 0 < t < 1 else -np.inf for t in thresholds])[:, None, None, None]
    above = (top > -np.inf) & (top >= np.where(before > -np.inf, before + level, -np.inf))
    return above.reshape(batch, heads, -1, tile.rows, columns // tile.width).any(3)


def arrays_of(name, mask, num_queries, num_keys, heads, kv_heads, value_dim):
    rng = np.random.default_rng(sum(map(ord, name)))
    q = rng.normal(size=(BATCH, num_queries, heads, HEAD_DIM))
    k = rng.normal(size=(BATCH, num_keys, kv_heads, HEAD_DIM))
    k *= rng.choice([0.2, 1.0, 2.0], (BATCH, num_keys // 8 + 1, 1, 1)).repeat(8, axis=1)[:, :num_keys]  # weak stretches
    v = rng.normal(size=(BATCH, num_keys, kv_heads, value_dim))
    return [jnp.asarray(x, jnp.float32) for x in (q, k, v)], rng


@functools.cache
def solved(name):
    mask, num_queries, num_keys, heads, kv_heads, value_dim, kind, tile, thresholds = CASES[name]
    arrays, rng = arrays_of(name, mask, num_queries, num_keys, heads, kv_heads, value_dim)
    limits = make_limits(kind, num_queries, num_keys, rng)
    seen = visible_pairs(mask, limits, num_queries, num_keys)
    cotangents = [
        jnp.asarray(rng.normal(size=s), jnp.float32)
        for s in ((*arrays[0].shape[:3], value_dim), (BATCH, heads, num_queries))
    ]
    return mask, limits, seen, tile, thresholds, arrays, cotangents, blasst_loop(*arrays, seen, SCALE, thresholds, tile)


def as_skip(thresholds, tile):
    inside = [0 < t < 1 for t in thresholds]
    return Skip(jnp.asarray(np.where(inside, np.log(thresholds), -np.inf), jnp.float32), tile)


@pytest.mark.parametrize("variant,name", list(variants_and_cases()))
def test_decisions_outputs_and_gradients(oracle, variant, name):
    mask, limits, seen, tile, thresholds, (q, k, v), (d_out, d_lse), expected = solved(name)
    out, lse, keep, _, distance = expected
    assert distance.min() > 1e-4  # no decision hangs on rounding

    @jax.jit
    def both(q, k, v, log_threshold):
        def run(q, k, v):
            out, lse, keep = VARIANTS[variant](
                q, k, v, mask=mask, limits=limits, scale=SCALE, skip=Skip(log_threshold, tile)
            )
            return (out, lse), keep

        results, pull, keep = jax.vjp(run, q, k, v, has_aux=True)
        return *results, keep, *pull((d_out, d_lse))

    got_out, got_lse, got_keep, *gradients = both(q, k, v, as_skip(thresholds, tile).log_threshold)
    np.testing.assert_array_equal(got_keep, keep)
    np.testing.assert_allclose(got_out, out, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(got_lse, lse, rtol=2e-5, atol=2e-5)
    # Gradients: those of dense attention over the pairs in kept tiles, head by head.
    per_pair = keep.repeat(tile.rows, axis=2).repeat(tile.width, axis=3)[:, :, : q.shape[1], : k.shape[1]]
    wanted = [np.zeros(x.shape) for x in (q, k, v)]
    group = q.shape[2] // k.shape[2]
    for n in range(q.shape[2]):
        one, shared = slice(n, n + 1), slice(n // group, n // group + 1)
        parts = oracle(
            q[:, :, one],
            k[:, :, shared],
            v[:, :, shared],
            seen & per_pair[:, n],
            SCALE,
            d_out[:, :, one],
            d_lse[:, one],
        )[2:]
        for total, part, heads in zip(wanted, parts, (one, shared, shared)):
            total[:, :, heads] += part
    for label, got, want in zip(("dq", "dk", "dv"), gradients, wanted):
        np.testing.assert_allclose(got, want, rtol=5e-5, atol=5e-5, err_msg=label)


@pytest.mark.parametrize("name", QUICK)
def test_decisions_and_outputs_of_the_definition(name):
    mask, limits, _, tile, thresholds, arrays, _, (out, lse, keep, _, _) = solved(name)
    run = functools.partial(reference.run, mask=mask, limits=limits, scale=SCALE, skip=as_skip(thresholds, tile))
    got_out, got_lse, got_keep = jax.jit(run)(*arrays)
    np.testing.assert_array_equal(got_keep, keep)
    np.testing.assert_allclose(got_out, out, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(got_lse, lse, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_two_oracles_agree(name):
    _, _, seen, tile, thresholds, (q, k, _), _, (_, _, keep, _, _) = solved(name)
    np.testing.assert_array_equal(block_mask_keep(q, k, seen, SCALE, thresholds, tile), keep)


def test_cases_skip_something():
    """Guards the table: decisions differ between heads and rows, tiles are skipped before and after kept ones."""
    shares = {name: 1 - solved(name)[-1][2].sum() / max(1, solved(name)[-1][3].sum()) for name in CASES}
    assert sum(0.05 < share < 0.95 for share in shares.values()) >= 10, shares
    keep, visited = solved("causal")[-1][2:4]
    assert (keep.any(1) & (visited & ~keep).any(1)).any()  # heads of one row of the batch disagree
    later = np.logical_and(keep[..., 1:], (visited & ~keep)[..., :-1])
    assert later.any()  # a kept tile follows a skipped one


@pytest.mark.parametrize("name", ["doubled"])
def test_a_wrong_decision_would_be_seen(name):
    """The comparison above has teeth: never skipping, or the decisions of the next tile, give other outputs."""
    _mask, _limits, seen, tile, _thresholds, (q, k, v), _, (out, _, keep, visited, _) = solved(name)
    shape = q.shape[1], k.shape[1]
    visited_pairs = skip.per_pair(jnp.asarray(visited), tile, *shape)
    shifted = skip.per_pair(jnp.asarray(np.roll(keep, 1, axis=3)), tile, *shape) & visited_pairs
    for wrong in (visited_pairs, shifted):
        got, _ = jax.jit(reference.attend, static_argnums=4)(q, k, v, jnp.asarray(seen), SCALE, wrong)
        assert np.abs(np.nan_to_num(np.asarray(got)) - out).max() > 1e-2


@pytest.mark.parametrize("rows,tiles", [(16, 64), (64, 32), (64, 256)])
def test_skip_rate_of_independent_scores(rows, tiles):
    """λ -> 1: tile j is skipped when no row sets a record, (1 - 1/j)^rows of the time."""
    samples = 300
    top = np.random.default_rng(rows + tiles).random((samples, rows, tiles), np.float32)
    keep = jax.jit(lambda top: skip.keeps(skip.margins(top), jnp.log(jnp.float32(1 - 1e-7))))(jnp.asarray(top))
    expected = sum((1 - 1 / j) ** rows for j in range(2, tiles + 1)) / tiles
    deviation = np.sqrt(tiles * expected + 1e-3) / (tiles * np.sqrt(samples))  # above that of independent tiles
    assert abs(1 - keep.mean() - expected) < 5 * deviation, (1 - keep.mean(), expected)


def test_skip_rate_of_random_queries_and_keys():
    """Shared keys tie the rows together; the published simulation at head dim 128 gives 0.152."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(4, 256, 4, 128)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(4, 1024, 4, 128)), jnp.float32) for _ in range(2))
    options = dict(mask=masks.Full(), skip_threshold=1 - 1e-9, skip_tile=SkipTile(64, 16), return_stats=True)
    _, stats = jax.jit(functools.partial(flash_attention, **options))(q, k, v)
    assert stats.visited.sum() == 4 * 4 * 4 * 64
    assert abs(stats.skipped.sum() / stats.visited.sum() - 0.152) < 0.02


def test_margins_follow_each_chain():
    rng = np.random.default_rng(0)
    top = rng.normal(size=(3, 5, 11)).astype(np.float32)
    top[rng.random(top.shape) < 0.3] = -np.inf
    top[0, :, 4] = -np.inf
    margins = jax.jit(skip.margins, static_argnums=1)
    for chains in (1, 3, 16):
        expected = np.full((3, 11), -np.inf)
        for a, j in np.ndindex(3, 11):
            for r in range(5):
                before = max([top[a, r, i] for i in range(j) if i % chains == j % chains], default=-np.inf)
                if top[a, r, j] > -np.inf:
                    expected[a, j] = max(expected[a, j], top[a, r, j] - before)
        np.testing.assert_allclose(margins(jnp.asarray(top), chains), expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["chunk of a prefill", "packed", "positions"])
def test_margins_and_counts_of_the_lean_path(name):
    """One pass that serves every threshold: its margins are those of the definition, its counts those of the loop."""
    mask, limits, seen, tile, thresholds, (q, k, _), _, (_, _, keep, visited, _) = solved(name)

    @jax.jit
    def both(q, k):
        scores = reference.visible_scores(q, k, jnp.asarray(seen), SCALE)
        top = skip.tile_tops(scores.reshape(BATCH, q.shape[2], q.shape[1], k.shape[1]), tile)
        counts = xla.visited_tiles(mask, limits, BATCH, q.shape[1], k.shape[1], tile)
        return skip.margins(top), xla.skip_margins(q, k, mask=mask, limits=limits, scale=SCALE, tile=tile), counts

    expected, got, counts = both(q, k)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(counts, visited[:, 0].sum((1, 2)))
    found = skip.stats(jnp.asarray(keep), counts, as_skip(thresholds, tile))
    np.testing.assert_array_equal(found.skipped, (visited & ~keep).sum((2, 3)))
    np.testing.assert_array_equal(found.visited, visited.sum((2, 3)))


def random_arrays(num_queries, num_keys, heads=2, kv_heads=1, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    q = jnp.asarray(rng.normal(size=(BATCH, num_queries, heads, HEAD_DIM)), dtype)
    k, v = (jnp.asarray(rng.normal(size=(BATCH, num_keys, kv_heads, HEAD_DIM)), dtype) for _ in range(2))
    return q, k, v


TILE = SkipTile(4, 8)
attend_with_stats = jax.jit(
    functools.partial(flash_attention, scale=SCALE, return_stats=True, return_selection=True),
    static_argnames=("mask", "skip_tile", "implementation"),
)


def test_public_function_and_its_extras():
    q, k, v = random_arrays(48, 48)
    results = {}
    for name in ("xla", "reference"):
        out, stats, keep = attend_with_stats(q, k, v, skip_threshold=0.3, skip_tile=TILE, implementation=name)
        assert keep.shape == (BATCH, 2, 12, 6) and keep.dtype == bool
        # Each row of tiles of the causal mask sees the key tiles up to its last query's.
        assert (stats.visited == sum(-(-4 * (i + 1) // 8) for i in range(12))).all()
        np.testing.assert_array_equal(stats.skipped, stats.visited - keep.sum((2, 3)))
        assert stats.dense_guarded == 0 and stats.skipped.sum() > 0
        results[name] = out, keep
    np.testing.assert_array_equal(*(keep for _, keep in results.values()))
    np.testing.assert_allclose(*(out for out, _ in results.values()), atol=1e-5)
    for extras in ((), ("return_lse",), ("return_lse", "return_selection")):
        options = dict(skip_threshold=0.3, implementation="reference") | dict.fromkeys(extras, True)
        got = jax.jit(functools.partial(flash_attention, **options))(q, k, v)
        assert isinstance(got, tuple) == bool(extras)
        shapes = [(BATCH, 48, 2, HEAD_DIM), (BATCH, 2, 48), (BATCH, 2, 1, 1)]  # the default tile is 64 x 128
        assert [x.shape for x in jax.tree.leaves(got)] == shapes[: 1 + len(extras)]


def test_square_causal_tiles_are_counted_as_published():
    """nr (2 nc - nr + 1) / 2 tiles for nr rows and nc columns of tiles, aligned at the end."""
    for num_queries, num_keys in ((64, 64), (32, 64), (8, 128)):
        nr, nc = num_queries // 8, num_keys // 8
        got = xla.visited_tiles(masks.Causal(), Limits(), 1, num_queries, num_keys, SkipTile(8, 8))
        assert int(got[0]) == nr * (2 * nc - nr + 1) // 2


def test_tiny_threshold_is_dense_to_the_bit():
    """λ = 1e-30 skips nothing: bitwise what the guard gives; the path without skipping differs by rounding alone."""
    q, k, v = random_arrays(100, 100)
    visited = BATCH * 2 * masks.Causal().schedule(100, 100, TILE.rows, TILE.width).num_live
    common = dict(mask=masks.Causal(), limits=Limits(), scale=SCALE, tiling=xla.Tiling(32, 16))
    run = jax.jit(lambda level: xla.run(q, k, v, **common, skip=Skip(level, TILE)))
    tiny, guarded = (run(jnp.full((BATCH,), level)) for level in (np.log(1e-30), -np.inf))
    jax.tree.map(np.testing.assert_array_equal, tiny, guarded)
    assert int(tiny[2].sum()) == visited
    dense = jax.jit(functools.partial(xla.run, **common))(q, k, v)
    for got, want in zip(tiny, dense):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6)


def test_thresholds_nest():
    """A larger λ skips a superset: margins do not depend on λ."""
    q, k, v = random_arrays(64, 64, seed=5)
    kept = [attend_with_stats(q, k, v, skip_threshold=t, skip_tile=TILE)[2] for t in (1e-6, 1e-2, 0.1, 0.5, 0.999)]
    assert all((more | ~less).all() for more, less in itertools.pairwise(kept))
    assert len({int(keep.sum()) for keep in kept}) >= 4


def test_error_bound():
    """|y - y_dense| <= 2 δ/(1 + δ) max|v| with δ = skipped tiles of the row · width · λ."""
    dense = jax.jit(functools.partial(flash_attention, scale=SCALE))
    live = masks.Causal().dense(64, 64).reshape(64 // TILE.rows, TILE.rows, 64 // TILE.width, TILE.width).any((1, 3))
    skips = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        q, k, v = random_arrays(64, 64, seed=seed)
        k = k * jnp.asarray(rng.uniform(0.1, 8, (1, 8, 1, 1)).repeat(8, axis=1), jnp.float32)
        threshold = 10.0 ** rng.uniform(-4, -0.5)
        out, stats, keep = attend_with_stats(q, k, v, skip_threshold=jnp.float32(threshold), skip_tile=TILE)
        skipped = (live & ~np.asarray(keep)).sum(-1).repeat(TILE.rows, axis=-1)  # [B, N, T]
        delta = np.swapaxes(skipped, 1, 2) * TILE.width * threshold
        bound = 2 * delta / (1 + delta) * np.linalg.norm(v, axis=-1).max()
        error = np.linalg.norm(out - dense(q, k, v), axis=-1)
        assert (error <= bound + 1e-5).all()
        assert (error > 1e-6)[delta > 0].any() or stats.skipped.sum() == 0
        skips += int(stats.skipped.sum() > 0)
    assert skips >= 8


def test_traced_thresholds_compile_once_and_guard():
    q, k, v = random_arrays(48, 48)
    traces = []

    @jax.jit
    def run(q, k, v, threshold):
        traces.append(1)
        return flash_attention(q, k, v, scale=SCALE, skip_threshold=threshold, skip_tile=TILE, return_stats=True)

    dense = flash_attention(q, k, v, scale=SCALE)
    for value in (0.0, -1.0, 1.0, 7.0, np.nan, np.inf):
        out, stats = run(q, k, v, jnp.float32(value))
        np.testing.assert_allclose(out, dense, atol=1e-6)
        assert stats.dense_guarded == BATCH and stats.skipped.sum() == 0
    for value in (1e-3, 0.1, 0.5):
        out, stats = run(q, k, v, jnp.float32(value))
        want, want_stats, _ = attend_with_stats(q, k, v, skip_threshold=value, skip_tile=TILE)
        np.testing.assert_allclose(out, want, atol=1e-6)
        np.testing.assert_array_equal(stats.skipped, want_stats.skipped)
        assert stats.dense_guarded == 0
    assert len(traces) == 1


def test_scale_factor_divides_by_each_rows_own_length():
    q, k, v = random_arrays(40, 80)
    lengths = jnp.array([60, 20])
    factors = jnp.array([12.0, 12.0])
    got = attend_with_stats(q, k, v, mask=masks.Full(), kv_lengths=lengths, skip_scale_factor=factors, skip_tile=TILE)
    want = attend_with_stats(
        q, k, v, mask=masks.Full(), kv_lengths=lengths, skip_threshold=jnp.array([0.2, 0.6]), skip_tile=TILE
    )
    np.testing.assert_array_equal(got[2], want[2])
    assert got[1].skipped[0].sum() > 0 and got[1].dense_guarded == 0
    # L <= factor: that row alone becomes dense. Without lengths L is all S, in a chunk of a prefill too.
    for factor, guarded in ((20.0, 1), (21.0, 1), (60.0, 2), (19.0, 0)):
        _, stats, _ = attend_with_stats(
            q, k, v, mask=masks.Full(), kv_lengths=lengths, skip_scale_factor=factor, skip_tile=TILE
        )
        assert stats.dense_guarded == guarded, factor
    got = attend_with_stats(q, k, v, skip_scale_factor=24.0, skip_tile=TILE)
    want = attend_with_stats(q, k, v, skip_threshold=0.3, skip_tile=TILE)
    np.testing.assert_array_equal(got[2], want[2])
    # Empty slots are no keys.
    positions = jnp.where(jnp.arange(80) % 2 == 0, jnp.arange(80), -1)[None].repeat(BATCH, 0)
    common = dict(k_positions=positions, q_positions=jnp.full((BATCH, 40), 99), skip_tile=TILE)
    got = attend_with_stats(q, k, v, skip_scale_factor=12.0, **common)
    want = attend_with_stats(q, k, v, skip_threshold=0.3, **common)
    np.testing.assert_array_equal(got[2], want[2])


def test_unseen_garbage_decides_nothing_and_visible_nan_is_kept():
    q, k, v = random_arrays(48, 48)
    lengths = jnp.array([30, 48])
    where = (jnp.arange(48) >= lengths[:, None])[:, :, None, None]
    common = dict(kv_lengths=lengths, skip_threshold=0.4, skip_tile=TILE)
    clean = attend_with_stats(q, k, v, **common)
    dirty = attend_with_stats(q, jnp.where(where, jnp.nan, k), jnp.where(where, jnp.nan, v), **common)
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    assert clean[1].skipped.sum() > 0
    for implementation in ("xla", "reference"):
        poisoned = k.at[0, 17].set(jnp.nan)
        out, _, keep = attend_with_stats(q, poisoned, v, **common, implementation=implementation)
        assert np.isnan(out[0, 17:]).all() and not np.isnan(out[0, :17]).any() and not np.isnan(out[1]).any()
        assert keep[0, :, 6:, 2].all()  # rows 24.. are wholly NaN from tile 2 on


@pytest.mark.parametrize("dtype,tolerance", [(jnp.bfloat16, 2e-2), (jnp.float16, 2e-3)])
def test_half_precision(dtype, tolerance):
    """Given the decisions, the error is that of the dtype; decisions differ only next to the threshold."""
    q, k, v = random_arrays(64, 64, dtype=dtype)
    threshold = np.array([0.3, 0.3])
    seen = np.broadcast_to(masks.Causal().dense(64, 64), (BATCH, 64, 64))
    out, _, keep, _, distance = blasst_loop(
        *(np.asarray(x, np.float64) for x in (q, k, v)), seen, SCALE, threshold, TILE
    )
    got, stats, got_keep = attend_with_stats(q, k, v, skip_threshold=0.3, skip_tile=TILE)
    assert got.dtype == dtype and stats.skipped.sum() > 0
    assert (distance[keep != got_keep] < 1e-4).all()
    np.testing.assert_array_equal(got_keep, keep)
    np.testing.assert_allclose(np.asarray(got, np.float64), out, atol=tolerance)


def test_under_transformations():
    q, k, v = random_arrays(40, 40)
    thresholds = jnp.array([0.3, 0.1])

    def loss(q, k, v, thresholds):
        return (flash_attention(q, k, v, scale=SCALE, skip_threshold=thresholds, skip_tile=TILE) ** 2).sum()

    gradient = jax.grad(loss, argnums=(0, 1, 2, 3))
    *expected, d_threshold = jax.jit(gradient)(q, k, v, thresholds)
    assert (d_threshold == 0).all()  # a decision is a constant
    policy = jax.checkpoint_policies.save_only_these_names("attention")
    remat = jax.grad(jax.checkpoint(loss, policy=policy), argnums=(0, 1, 2))
    for a, b in zip(jax.jit(remat)(q, k, v, thresholds), expected):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        jax.eval_shape(lambda q: jax.jvp(lambda q: gradient(q, k, v, thresholds)[0], (q,), (q,)), q)


@pytest.mark.slow
def test_under_vmap():
    q, k, v = random_arrays(40, 40)
    thresholds = jnp.array([0.3, 0.1])
    run = lambda q, k, v, t: flash_attention(q, k, v, scale=SCALE, skip_threshold=t, skip_tile=TILE)  # noqa: E731
    got = jax.jit(jax.vmap(lambda q, k, v, t: run(q[None], k[None], v[None], t)))(q, k, v, thresholds)
    np.testing.assert_allclose(got[:, 0], run(q, k, v, thresholds), rtol=1e-5, atol=1e-5)


BAD_CALLS = {
    "zero": (dict(skip_threshold=0.0), r"skip_threshold must be inside \(0, 1\), or None for dense attention; got 0.0"),
    "one": (dict(skip_threshold=1), "skip_threshold must be inside .*got 1"),
    "negative": (dict(skip_threshold=-0.1), "skip_threshold must be inside .*got -0.1"),
    "nan": (dict(skip_threshold=float("nan")), "skip_threshold must be inside .*got nan"),
    "bool": (dict(skip_threshold=True), "skip_threshold must be inside .*got True"),
    "word": (dict(skip_threshold="auto"), "skip_threshold must be a number or an array; got 'auto'"),
    "one row": (dict(skip_threshold=np.array([0.1, 2.0])), "skip_threshold must be inside"),
    "shape": (
        dict(skip_threshold=np.full(3, 0.1)),
        r"skip_threshold must be a number or have shape \(2,\); got \(3,\)",
    ),
    "traced shape": (dict(skip_threshold=jnp.full((2, 1), 0.1)), r"have shape \(2,\); got \(2, 1\)"),
    "complex": (dict(skip_threshold=jnp.complex64(1)), "skip_threshold must be real; got complex64"),
    "factor": (dict(skip_scale_factor=0), "skip_scale_factor must be positive and finite, .*got 0"),
    "infinite": (dict(skip_scale_factor=float("inf")), "skip_scale_factor must be positive and finite, .*got inf"),
    "both": (
        dict(skip_threshold=0.1, skip_scale_factor=9.0),
        "skip_threshold or skip_scale_factor, not both; got 0.1 and 9",
    ),
    "tile alone": (dict(skip_tile=SkipTile()), "skip_tile=.* does nothing without skip_threshold or skip_scale_factor"),
    "tile": (dict(skip_threshold=0.1, skip_tile=(64, 128)), r"skip_tile must be a SkipTile or None; got \(64, 128\)"),
    "chains": (dict(skip_threshold=0.1, skip_tile=SkipTile(chains=2)), "chains are for decode_attention"),
    "window": (
        dict(skip_threshold=0.1, mask=masks.SlidingWindow(4)),
        r"leave the skip options out for SlidingWindow\(window=4",
    ),
    "packed": (
        dict(skip_scale_factor=9.0, segment_ids=jnp.zeros((2, 8), jnp.int32)),
        "a row packed by segment_ids does not tell; give skip_threshold",
    ),
    "stats": (dict(return_stats=True), "return_stats and return_selection tell of skipped tiles: give a threshold"),
    "selection": (dict(return_selection=True), "return_stats and return_selection tell of skipped tiles"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_are_explained(plain_calls, name):
    changes, match = BAD_CALLS[name]
    arguments = dict(q=jnp.zeros((2, 8, 4, 16)), k=jnp.zeros((2, 8, 2, 16)), v=jnp.zeros((2, 8, 2, 16))) | changes
    with pytest.raises(ValueError, match=match):
        flash_attention(**arguments)


def test_bad_tiles_are_explained(plain_calls):
    for field, value in (("rows", 0), ("width", -8), ("chains", 1.5), ("rows", True)):
        with pytest.raises(ValueError, match=f"SkipTile.{field} must be a positive integer; got {value!r}"):
            SkipTile(**{field: value})


def test_cudnn_cannot_skip_and_says_so():
    q = jnp.zeros((1, 64, 2, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=r"flash_attention 'cudnn': .*skips no tiles"):
        flash_attention(q, q, q, skip_threshold=0.1, implementation="cudnn")


def test_empty_batch():
    q, k = jnp.zeros((0, 8, 4, 16)), jnp.zeros((0, 8, 2, 16))
    call = functools.partial(flash_attention, skip_threshold=0.1, return_stats=True)
    out, stats = jax.eval_shape(call, q, k, k)
    assert out.shape == (0, 8, 4, 16) and stats.skipped.shape == (0, 4)
