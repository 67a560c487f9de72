"""Block-routed attention: definition and XLA path against a NumPy oracle in another formulation; then its promises."""

import functools
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import moba_theory
from pallas_kernels import flash_attention
from pallas_kernels.moba import (
    append_centroids,
    block_centroids,
    init_centroids,
    invert_selection,
    key_conv,
    lists,
    moba_attention,
    moba_decode,
    moba_select,
    reference,
    routing,
    theory,
    xla,
)
from pallas_kernels.moba.routed import Tiling

BATCH, SCALE = 2, 0.4


def moonshot(q, k, v, q_segments, k_segments, block_size, top_k, causal, scale, d_out, d_lse):
    """The original's formulation, sequence by sequence: own chunk and top_k - 1 routed whole chunks, merged by lse.

    NumPy, float64, gradients by hand. Returns out, lse, dq, dk, dv and the selection as sets of blocks [B, T, N].
    """
    q, k, v, d_out, d_lse = (np.asarray(x, np.float64) for x in (q, k, v, d_out, d_lse))
    batch, num_queries, heads, _ = q.shape
    group = heads // k.shape[2]
    out, lse = np.zeros_like(d_out), np.full((batch, heads, num_queries), -np.inf)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    chosen = np.full((batch, num_queries, heads), None)
    for b, n in np.ndindex(batch, heads):
        for name in np.unique(q_segments[b]):
            rows, keys = np.flatnonzero(q_segments[b] == name), np.flatnonzero(k_segments[b] == name)
            chunks = [keys[i : i + block_size] for i in range(0, len(keys), block_size)]
            means = np.array([k[b, chunk, n // group].mean(axis=0) for chunk in chunks]).reshape(-1, q.shape[3])
            for back, i in enumerate(rows[::-1]):
                position = len(keys) - 1 - back
                chosen[b, i, n] = frozenset()
                if name < 0 or position < 0:
                    continue
                own = position // block_size
                gate = means[:own] @ q[b, i, n] if causal else means @ q[b, i, n]
                order = np.lexsort((np.arange(len(gate)), gate))[::-1]  # by gate, then by index, falling
                routed = order[: top_k - 1] if causal else order[:top_k]
                chosen[b, i, n] = frozenset(routed) | (frozenset([own]) if causal else frozenset())
                parts = [chunks[c] for c in routed]
                if causal:
                    parts.append(keys[own * block_size : position + 1])
                scores = [scale * k[b, part, n // group] @ q[b, i, n] for part in parts]
                part_lse = np.array([np.log(np.exp(s - s.max()).sum()) + s.max() for s in scores])
                part_out = [
                    np.exp(s - part) @ v[b, where, n // group] for s, part, where in zip(scores, part_lse, parts)
                ]
                total = np.log(np.exp(part_lse - part_lse.max()).sum()) + part_lse.max()
                out[b, i, n] = sum(np.exp(part - total) * o for part, o in zip(part_lse, part_out))
                lse[b, n, i] = total
                delta = d_out[b, i, n] @ out[b, i, n] - d_lse[b, n, i]
                for s, where in zip(scores, parts):
                    p = np.exp(s - total)
                    ds = scale * p * (v[b, where, n // group] @ d_out[b, i, n] - delta)
                    dq[b, i, n] += ds @ k[b, where, n // group]
                    dk[b, where, n // group] += np.outer(ds, q[b, i, n])
                    dv[b, where, n // group] += np.outer(p, d_out[b, i, n])
    return out, lse, dq, dk, dv, chosen


def runs(*rows):
    """Segment ids [B, length] from (id, length) pairs."""
    return np.stack([np.concatenate([np.full(length, name, np.int32) for name, length in row]) for row in rows])


PACKED = runs([(3, 41), (1, 24), (0, 1), (4, 34), (-1, 7)], [(0, 1), (5, 80), (2, 7), (-1, 19)])
# Sequences that only one side has, fewer queries than keys and more, padding in the middle.
PACKED_QUERIES = runs([(3, 10), (7, 3), (4, 34), (-1, 3)], [(-1, 5), (5, 30), (2, 15)])
# name: (T, S, N, K, block_size, top_k, segments, causal)
CASES = {
    "one partial block": (9, 9, 2, 1, 16, 3, None, True),
    "odd length, groups": (147, 147, 4, 2, 16, 3, None, True),
    "one query": (1, 147, 2, 2, 16, 4, None, True),
    "fewer queries": (37, 203, 4, 1, 32, 2, None, True),
    "more queries": (100, 37, 2, 1, 8, 3, None, True),
    "own block only": (50, 50, 2, 1, 16, 1, None, True),
    "all blocks": (50, 50, 2, 2, 8, 9, None, True),
    "blocks of one key": (20, 20, 2, 1, 1, 3, None, True),
    "packed": (107, 107, 4, 2, 8, 3, PACKED, True),
    "packed, pair": (50, 107, 2, 1, 8, 3, (PACKED_QUERIES, PACKED), True),
    "not causal": (60, 100, 2, 1, 16, 3, None, False),
    "first block for everybody": (96, 96, 4, 2, 16, 2, None, True),
    "equal keys": (64, 64, 2, 1, 8, 3, None, True),
    "equal gates": (80, 80, 2, 1, 8, 3, None, True),
}
HEAD_DIMS = {"fewer queries": (59, 8), "packed": (8, 5), "not causal": (8, 12)}  # of keys and values, else 8 and 8


def make_arrays(name, rng):
    num_queries, num_keys, heads, kv_heads, block_size, *_ = CASES[name]
    head_dim, value_dim = HEAD_DIMS.get(name, (8, 8))
    q = rng.normal(size=(BATCH, num_queries, heads, head_dim))
    k, v = (rng.normal(size=(BATCH, num_keys, kv_heads, width)) for width in (head_dim, value_dim))
    if name == "first block for everybody":
        q[..., 0], k[:, :block_size, :, 0] = 1.0, 5.0
    if name == "equal keys":
        q, k = np.round(q), np.round(k)  # so that means and products are exact
        k[:] = k[:, :1]
        q[:, :20] = 0.0
    if name == "equal gates":  # small integers, so that means and products are exact and often equal
        q, k = np.round(q), np.round(k)
        k[:, block_size:] = np.repeat(k[:, block_size::block_size], block_size, axis=1)
    d_out = rng.normal(size=(BATCH, num_queries, heads, value_dim))
    return [jnp.asarray(x, jnp.float32) for x in (q, k, v, d_out, rng.normal(size=(BATCH, heads, num_queries)))]


@functools.cache
def solved(name):
    """Arguments and expected results of a case."""
    num_queries, num_keys, *_, block_size, top_k, segments, causal = CASES[name]
    arrays = make_arrays(name, np.random.default_rng(sum(map(ord, name))))
    if segments is None:
        pair = np.zeros((BATCH, num_queries), np.int32), np.zeros((BATCH, num_keys), np.int32)
    else:
        pair = segments if isinstance(segments, tuple) else (segments, segments)
    expected = moonshot(*arrays[:3], *pair, block_size, top_k, causal, SCALE, *arrays[3:])
    return arrays, pair, expected


def with_gradients(run):
    """q, k, v, d_out, d_lse -> out, lse, selection, dq, dk, dv, compiled."""

    @jax.jit
    def both(q, k, v, d_out, d_lse):
        def split(q, k, v):
            out, lse, indices = run(q, k, v)
            return (out, lse), indices

        (out, lse), pull, indices = jax.vjp(split, q, k, v, has_aux=True)
        return out, lse, indices, *pull((d_out, d_lse))

    return both


def variants(name, pair):
    *_, block_size, top_k, segments, causal = CASES[name]
    options = dict(block_size=block_size, top_k=top_k, causal=causal)
    pair = tuple(map(jnp.asarray, pair))
    if not isinstance(segments, tuple):
        pair = (pair[0], pair[0]) if segments is not None else pair
    given = None if segments is None else pair
    return {
        "reference": lambda q, k, v: reference.run(q, k, v, *pair, **options, scale=SCALE),
        "xla": lambda q, k, v: moba_attention(
            q,
            k,
            v,
            **options,
            segment_ids=given if isinstance(segments, tuple) or given is None else given[0],
            scale=SCALE,
            return_lse=True,
            return_selection=True,
            implementation="xla",
        ),
        "small tiles": lambda q, k, v: xla.run(q, k, v, given, **options, scale=SCALE, tiling=Tiling(16, 3)),
    }


@functools.cache
def computed(variant, name):
    """Results of a case, and the compiled function that gave them."""
    arrays, pair, _ = solved(name)
    run = with_gradients(variants(name, pair)[variant])
    return run(*arrays), run


# The XLA path at its default tiling, or with tiles so small that lists fill several of them in several steps.
SMALL = ("odd length, groups", "packed", "not causal", "first block for everybody")


@pytest.mark.parametrize(
    "variant,name",
    [("reference", name) for name in CASES] + [("small tiles" if name in SMALL else "xla", name) for name in CASES],
)
def test_outputs_selection_and_gradients(variant, name):
    *numbers, chosen = solved(name)[2]
    out, lse, indices, *gradients = computed(variant, name)[0]
    got = np.asarray(indices)
    for at in np.ndindex(chosen.shape):
        real = got[at][got[at] >= 0]
        assert len(set(real)) == len(real) and set(real) == chosen[at], (at, got[at], chosen[at])
        assert (got[at][len(real) :] == -1).all()
    for label, got, want in zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *gradients), numbers, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5, err_msg=label)
    empty = np.isneginf(numbers[1]).swapaxes(1, 2)
    assert (np.asarray(out)[empty] == 0).all() and (np.asarray(gradients[0])[empty] == 0).all()


def test_ranks_are_the_same_in_definition_and_xla():
    """The order of the ranks too: own block first, then by score, equal ones from the last block on."""
    for name in ("equal keys", "equal gates", "packed, pair"):
        got, want = (computed(variant, name)[0][2] for variant in ("xla", "reference"))
        np.testing.assert_array_equal(got, want, err_msg=name)
    indices = np.asarray(computed("xla", "equal keys")[0][2])
    assert indices[0, 63, 0].tolist() == [7, 6, 5] and indices[0, 10, 0].tolist() == [1, 0, -1]


def test_cases_reach_the_edges():
    """Guards the table: empty rows, blocks that nobody and that everybody selects, ties, decisions that matter."""
    empty = {name: int(np.isneginf(solved(name)[2][1]).sum()) for name in CASES}
    assert empty["more queries"] and empty["packed"] and empty["packed, pair"] and not empty["one query"]
    chosen = solved("first block for everybody")[2][-1]
    later = [blocks for b, t, n in np.ndindex(chosen.shape) if t >= 16 for blocks in [chosen[b, t, n]]]
    assert all(0 in blocks for blocks in later)  # so nobody selects a block of the others' past but 0
    arrays, _, expected = solved("odd length, groups")
    dense = flash_attention(*arrays[:3], scale=SCALE)
    assert np.abs(dense - expected[0]).max() > 0.1  # the selection decides the result
    q, k, *_ = solved("equal gates")[0]
    gates = np.einsum("btnh,bsh->btns", q, block_centroids(k, block_size=8)[:, :, 0])[:, 40:, :, :5]
    ties = (np.sort(gates)[..., 1:] == np.sort(gates)[..., :-1]).any(axis=-1)
    assert ties.mean() > 0.2


@pytest.mark.parametrize("mutation", ["all blocks", "shifted blocks"])
def test_a_wrong_selection_is_noticed(monkeypatch, mutation):
    name = "odd length, groups"
    arrays, pair, expected = solved(name)
    select = routing.select

    def wrong(q, k, layout, *, block_size, top_k, causal, choose):
        del choose
        if mutation == "all blocks":
            return select(q, k, layout, block_size=block_size, top_k=10, causal=causal)
        indices = select(q, k, layout, block_size=block_size, top_k=top_k, causal=causal)
        return indices.at[..., 1:].set(jnp.where(indices[..., 1:] > 0, indices[..., 1:] - 1, indices[..., 1:]))

    monkeypatch.setattr(routing, "select", wrong)
    out, *_ = jax.jit(variants(name, pair)["xla"])(*arrays[:3])
    assert np.abs(out - expected[0]).max() > 0.1


def test_all_blocks_is_dense_causal_attention():
    q, k, v, *_ = solved("odd length, groups")[0]
    want, want_lse = flash_attention(q, k, v, return_lse=True)
    for implementation in (None, "xla"):
        got, lse = moba_attention(q, k, v, block_size=16, top_k=10, return_lse=True, implementation=implementation)
        np.testing.assert_allclose(got, want, atol=1e-5)
        np.testing.assert_allclose(lse, want_lse, atol=1e-5)
    text = str(jax.make_jaxpr(lambda q: moba_attention(q, k, v, block_size=16, top_k=10))(q))
    assert "top_k" not in text and "sort" not in text  # nothing is routed where everything is selected
    text = str(jax.make_jaxpr(lambda q: moba_attention(q, k, v, block_size=16, top_k=9))(q))
    assert "top_k" in text  # and dense attention never stands in for a selection


def test_every_run_gives_the_same_bits():
    arrays = solved("packed")[0]
    first, run = computed("small tiles", "packed")
    first = [np.asarray(x).tobytes() for x in first]
    for _ in range(9):
        assert [np.asarray(x).tobytes() for x in run(*arrays)] == first


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
def test_half_precision(dtype):
    """No more than 2 (output) and 3 (gradients) times the error of plain attention of that dtype over the same keys."""
    name = "odd length, groups"
    arrays, pair, _ = solved(name)
    q, k, v, d_out = (x.astype(dtype) for x in arrays[:4])
    options = dict(block_size=16, top_k=3, causal=True)
    out, _, indices, *gradients = with_gradients(variants(name, pair)["xla"])(q, k, v, d_out, 0 * arrays[4])
    wanted, _ = reference.select(q, k, *map(jnp.asarray, pair), **options)
    differs = np.asarray(jnp.sort(indices) != jnp.sort(wanted)).any(axis=-1)
    assert differs.mean() < 0.005
    means = np.repeat(block_centroids(k, block_size=16).astype(jnp.float32), 2, axis=2)
    gate = np.einsum("btnh,bcnh->btnc", q.astype(jnp.float32), means)
    for at in zip(*np.nonzero(differs)):  # only between scores that rounding cannot tell apart
        odd = list(set(np.asarray(indices)[at]) ^ set(np.asarray(wanted)[at]))
        assert np.ptp(gate[at][odd]) < 1e-4
    kept = (indices[..., None] == jnp.arange(147) // 16).any(axis=3) & np.tri(147, dtype=bool)[:, None]
    kept = jnp.swapaxes(kept, 1, 2)  # [B, N, T, S]

    def plain(q, k, v):
        k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
        scores = SCALE * jnp.einsum("BTNH,BSNH->BNTS", q, k, preferred_element_type=jnp.float32)
        p = jax.nn.softmax(jnp.where(kept, scores, -jnp.inf)).astype(dtype)
        return jnp.einsum("BNTS,BSNH->BTNH", p, v)

    def exact(q, k, v):
        return reference.attend(q, k, v, kept.any(axis=1), SCALE, kept)[0]

    def both(attention, q, k, v, d_out):
        out, pull = jax.vjp(attention, q, k, v)
        return out, *pull(d_out)

    want = jax.jit(functools.partial(both, exact))(*(x.astype(jnp.float32) for x in (q, k, v, d_out)))
    rough = jax.jit(functools.partial(both, plain))(q, k, v, d_out)
    for label, got, near, true, times in zip(
        ("out", "dq", "dk", "dv"), (out, *gradients), rough, want, (2, 3, 3, 3), strict=True
    ):
        assert got.dtype == dtype
        ours, theirs = (np.abs(np.asarray(x, np.float64) - np.asarray(true, np.float64)) for x in (got, near))
        if label == "out":
            np.testing.assert_allclose(np.asarray(got, np.float32), true, atol=2e-2, rtol=2e-2)
        assert ours.max() <= times * theirs.max() and ours.mean() <= times * theirs.mean(), label


def test_strange_keys_stay_where_they_are():
    """NaN and infinite keys are never selected as NaN or -inf, reach only who sees them, and break no index."""
    q, k, v, *_ = solved("odd length, groups")[0]
    q = q.at[..., 0].set(1.0)
    options = dict(block_size=16, top_k=4, return_selection=True)
    run = {
        name: jax.jit(functools.partial(moba_attention, **options, implementation=name))
        for name in ("xla", "reference")
    }
    bad = {"nan": (slice(16, 32), jnp.nan), "minus infinity": (slice(32, 33), -jnp.inf)}
    for label, (where, value) in bad.items():
        spoiled = k.at[:, where, :, 0].set(value)
        for implementation in run:
            out, indices = run[implementation](q, spoiled, v)
            block = where.start // 16
            assert not (np.asarray(indices[:, (block + 1) * 16 :]) == block).any(), (label, implementation)
            assert (np.asarray(indices[:, block * 16 : (block + 1) * 16, :, 0]) == block).all()
            assert np.isfinite(np.asarray(out)[:, (block + 1) * 16 :]).all(), (label, implementation)
    _, indices = run["xla"](q, k.at[:, 16, :, 0].set(jnp.inf), v)
    assert (np.asarray(indices)[:, 32:, :, 1] == 1).all()  # +inf is the best of scores


def test_what_padding_holds_never_matters():
    """NaN in padded queries and keys and in the cotangents of queries that see nothing."""
    arrays, pair, _ = solved("packed, pair")
    clean, run = computed("xla", "packed, pair")
    q, k, v, d_out, d_lse = arrays
    empty = np.isneginf(np.asarray(clean[1])).swapaxes(1, 2)[..., None]
    padding = (pair[1] < 0)[..., None, None]
    q, d_out = (jnp.where(empty, jnp.nan, x) for x in (q, d_out))
    k, v = (jnp.where(padding, jnp.nan, x) for x in (k, v))
    for got, want in zip(run(q, k, v, d_out, d_lse), clean, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.slow
def test_under_transformations():
    """vmap and checkpoint change nothing; a second derivative is refused."""
    arrays = [x[:, :24] for x in solved("odd length, groups")[0][:3]]

    def loss(q, k, v):
        out, lse, _ = xla.run(q, k, v, None, block_size=8, top_k=2, causal=True, scale=1.0, tiling=Tiling(16, 2))
        return (out**2).sum() + lse.sum()

    gradient = jax.grad(loss, argnums=(0, 1, 2))
    want = jax.jit(gradient)(*arrays)
    each = [x[:, None] for x in arrays]
    got = jax.jit(jax.vmap(jax.grad(jax.checkpoint(loss), argnums=(0, 1, 2))))(*each)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a[:, 0], b, atol=1e-4, rtol=1e-5)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        jax.grad(lambda q: (jax.grad(loss)(q, *arrays[1:]) ** 2).sum())(arrays[0])


def test_an_empty_batch():
    q, k, v, *_ = solved("odd length, groups")[0]
    assert moba_attention(q[:0], k[:0], v[:0], block_size=16, top_k=3).shape == (0, *q.shape[1:])


def compiled_sizes(compiled) -> set[int]:
    found = re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", compiled.as_text())
    return {int(np.prod([int(n) for n in dims.split(",")])) for dims in found}


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_no_buffer_grows_with_queries_times_blocks(packed):
    """From the compiled forward and backward: the largest array, and memory that doubles when the length does."""
    block_size, top_k, heads, head_dim = 8, 3, 2, 8

    def compile_at(length, implementation="xla"):
        q = jax.ShapeDtypeStruct((1, length, heads, head_dim), jnp.float32)
        kv = jax.ShapeDtypeStruct((1, length, 1, head_dim), jnp.float32)
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)

        def loss(q, k, v, ids):
            options = dict(block_size=block_size, top_k=top_k, implementation=implementation)
            return moba_attention(q, k, v, segment_ids=ids if packed else None, **options).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, kv, kv, ids).compile()

    small, large = compile_at(8192), compile_at(16384)
    for compiled, length in ((small, 8192), (large, 16384)):
        # Partial rows, with those that fill tiles up; and what a step of the own blocks' attention may hold.
        linear = max(2 * length * heads * (top_k - 1) * head_dim, 2**20)
        assert max(compiled_sizes(compiled)) <= linear < length * heads * length // block_size
    before, after = (c.memory_analysis().temp_size_in_bytes for c in (small, large))
    assert before < 4 * heads * 8192 * 8192 // block_size and after < 2.2 * before
    dense = compile_at(2048, "reference")  # the measure has teeth
    assert max(compiled_sizes(dense)) >= 2048 * 2048


@pytest.mark.parametrize("kind", ["random", "one list", "nothing"])
def test_inversion(kind):
    rng = np.random.default_rng(0)
    num_rows, ranks, num_blocks = 45, 3, 7
    indices = np.stack([rng.permutation(num_blocks + 2)[:ranks] - 2 for _ in range(num_rows)]).astype(np.int32)
    indices = np.maximum(indices, -1)
    indices[indices == 4] = -1  # a block without a list
    if kind == "one list":
        indices = np.tile(np.int32([0, -1, -1]), (num_rows, 1))
    if kind == "nothing":
        indices[:] = -1
    offsets, entries = (np.asarray(x) for x in invert_selection(jnp.asarray(indices), num_blocks))
    flat = indices.reshape(-1)
    assert sorted(entries) == list(range(flat.size))
    for block in range(num_blocks):
        assert entries[offsets[block] : offsets[block + 1]].tolist() == np.flatnonzero(flat == block).tolist()
    num_tiles = lists.most_tiles(flat.size, num_blocks, 16)
    tiles = lists.cut(invert_selection(jnp.asarray(indices), num_blocks), 16, num_tiles)
    assert num_blocks <= tiles.total <= num_tiles
    block = np.asarray(tiles.block)
    assert (np.diff(block) >= 0).all() and (np.diff(block) <= 1).all() and block[0] == 0
    seen = {}
    for tile in range(num_tiles):
        for n in range(int(tiles.size[tile])):
            pair = int(entries[int(tiles.start[tile]) + n])
            assert flat[pair] == block[tile] and int(tiles.place[pair]) == tile * 16 + n
            seen[pair] = tile
    assert sorted(seen) == np.flatnonzero(flat >= 0).tolist()


@pytest.mark.parametrize("num_blocks, bits", [(255, 8), (256, 16), (65_535, 16), (65_536, 32)])
def test_keys_of_the_sort_have_no_more_bits_than_the_number_that_stands_for_none(num_blocks, bits):
    indices = jnp.asarray([[num_blocks - 1], [-1], [0], [num_blocks - 1], [-1], [num_blocks // 2]])
    offsets, entries = invert_selection(indices, num_blocks)
    assert entries.tolist() == [2, 5, 0, 3, 1, 4]
    assert (offsets[-1], offsets[-2], offsets[0]) == (4, 2, 0)
    text = str(jax.make_jaxpr(lambda indices: invert_selection(indices, num_blocks))(indices))
    assert re.search(rf"u{bits}\[1,6\].*= sort\[", text), text


def test_centroids():
    k = jnp.asarray(np.random.default_rng(0).normal(size=(2, 21, 3, 4)), jnp.bfloat16)
    got = block_centroids(k, block_size=8, kv_lengths=jnp.asarray([21, 9]))
    assert got.dtype == jnp.bfloat16 and got.shape == (2, 3, 3, 4)
    exact = np.asarray(k, np.float64)
    for row, block, real in ((0, 0, 8), (0, 2, 5), (1, 1, 1)):
        mean = exact[row, block * 8 : block * 8 + real].mean(axis=0)
        np.testing.assert_allclose(np.asarray(got[row, block], np.float64), mean, rtol=2**-8)
    assert (np.asarray(got[1, 2], np.float32) == 0).all()
    # A mean that bfloat16 sums would miss: 256 + 1 is 256 there.
    long = jnp.ones((1, 512, 1, 1), jnp.bfloat16)
    assert block_centroids(long, block_size=512)[0, 0, 0, 0] == 1.0


def test_a_growing_cache_has_the_same_centroids():
    """Chunks of any length, ragged ones too, end at the centroids of all keys."""
    rng = np.random.default_rng(0)
    keys = jnp.asarray(rng.normal(size=(2, 64, 1, 4)), jnp.float32)
    cache = init_centroids(2, 64, 1, 4, block_size=8, dtype=jnp.float32)
    append = jax.jit(functools.partial(append_centroids, block_size=8))
    done = np.zeros(2, int)
    for counts in ((5, 3), (8, 0), (3, 8), (1, 1), (8, 8), (7, 8), (8, 1)):
        chunk = np.full((2, 8, 1, 4), np.nan, np.float32)
        for row, count in enumerate(counts):
            chunk[row, :count] = keys[row, done[row] : done[row] + count]
        done += counts
        cache = append(cache, jnp.asarray(chunk), new_lengths=jnp.asarray(counts))
        want = block_centroids(keys, block_size=8)
        assert (np.asarray(cache.lengths) == done).all()
        for row in range(2):
            full = done[row] // 8
            np.testing.assert_allclose(cache.centroids[row, :full], want[row, :full], rtol=1e-6, atol=1e-6)
            rest = np.asarray(keys[row, full * 8 : done[row]]).sum(axis=0)
            np.testing.assert_allclose(cache.open_sum[row], rest, rtol=1e-5, atol=1e-6)


@pytest.mark.smoke
def test_training_prompt_and_decoding_agree():
    """The same selection and output from one call, from chunks of a prompt, and token by token from a cache."""
    rng = np.random.default_rng(1)
    length, prompt, block_size, options = 75, 30, 8, dict(block_size=8, top_k=3)
    q = jnp.asarray(rng.normal(size=(2, length, 4, 8)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(2, length, 2, 8)), jnp.float32) for _ in range(2))
    whole = jax.jit(functools.partial(moba_attention, **options, return_selection=True, implementation="xla"))
    want, selection = whole(q, k, v)
    for start, end in ((0, 19), (19, prompt)):
        out, indices = whole(q[:, start:end], k[:, :end], v[:, :end])
        np.testing.assert_array_equal(indices, selection[:, start:end])
        np.testing.assert_allclose(out, want[:, start:end], atol=1e-5)
    k_cache, v_cache = (jnp.full((3, 2, 80, 2, 8), jnp.nan).at[1, :, :prompt].set(x[:, :prompt]) for x in (k, v))
    centroids = append_centroids(
        init_centroids(2, 80, 2, 8, block_size=block_size, dtype=jnp.float32), k[:, :prompt], block_size=block_size
    )

    @jax.jit
    def step(state, q, k, v, layer):
        k_cache, v_cache, centroids = state
        out = moba_decode(q, k_cache, v_cache, k, v, centroids, layer=layer, **options, return_selection=True)
        at = centroids.lengths[0]
        k_cache, v_cache = (c.at[layer, :, at].set(x[:, 0]) for c, x in ((k_cache, k), (v_cache, v)))
        return (k_cache, v_cache, append_centroids(centroids, k, block_size=block_size)), out

    state = k_cache, v_cache, centroids
    for t in range(prompt, length):
        state, (out, indices) = step(state, *(x[:, t : t + 1] for x in (q, k, v)), 1)
        np.testing.assert_array_equal(indices[:, 0], selection[:, t], err_msg=str(t))
        np.testing.assert_allclose(out[:, 0], want[:, t], atol=1e-5)
    assert step._cache_size() == 1


def test_decoding_reads_only_the_selected_blocks():
    shapes = [(2, 1, 4, 8), (1, 2, 4096, 2, 8), (1, 2, 4096, 2, 8), (2, 1, 2, 8), (2, 1, 2, 8)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    cache = jax.eval_shape(lambda: init_centroids(2, 4096, 2, 8, block_size=16, dtype=jnp.bfloat16))
    run = lambda *a: moba_decode(*a, layer=0, block_size=16, top_k=4)  # noqa: E731
    compiled = jax.jit(run).lower(*arrays, cache).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 4096 * 2 * 8 * 2  # the keys of one layer


def numpy_conv(k, weight):
    """One sequence [T, channels], tap by tap."""
    total = np.zeros_like(k)
    for t in range(len(k)):
        for lag in range(min(len(weight), t + 1)):
            total[t] += weight[lag] * k[t - lag]
    return k + total / (1 + np.exp(-total))


@pytest.mark.parametrize("width", [1, 3, pytest.param(5, marks=pytest.mark.slow)])
def test_key_conv(width):
    rng = np.random.default_rng(0)
    k = jnp.asarray(rng.normal(size=(2, 23, 2, 3)), jnp.float32)
    weight = jnp.asarray(rng.normal(size=(width, 6)), jnp.float32)
    want = np.stack([numpy_conv(x, np.asarray(weight)) for x in np.asarray(k).reshape(2, 23, 6)])
    whole, state = key_conv(k, weight)
    np.testing.assert_allclose(np.asarray(whole).reshape(2, 23, 6), want, atol=1e-5)
    np.testing.assert_array_equal(state, k[:, 23 - (width - 1) :])
    pieces, state = [], None
    for start, end in ((0, 1), (1, 2), (2, 9), (9, 23)):
        piece, state = key_conv(k[:, start:end], weight, state=state)
        pieces.append(piece)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole, atol=1e-6)
    ids = jnp.asarray(np.repeat([[0, 4, 1, -1]], [2, 9, 9, 3], axis=1).repeat(2, axis=0))
    packed, state = key_conv(k, weight, segment_ids=ids)
    for start, end in ((0, 2), (2, 11), (11, 20)):
        np.testing.assert_allclose(packed[:, start:end], key_conv(k[:, start:end], weight)[0], atol=1e-6)
    ends_in_one = key_conv(k[:, :12], weight, segment_ids=ids[:, :12])[1]
    np.testing.assert_array_equal(ends_in_one[:, : max(0, width - 2)], 0)  # nothing of the sequence before


@pytest.mark.slow  # many programs to compile
def test_the_filter_learns_through_attention():
    q, k, v, *_ = (x[:, :40] for x in solved("odd length, groups")[0][:3])

    @jax.jit
    def loss(weight):
        return (moba_attention(q, key_conv(k, weight)[0], v, block_size=8, top_k=3) ** 2).sum()

    weight = jnp.full((3, k.shape[2] * k.shape[3]), 0.1)
    gradient, step = jax.jit(jax.grad(loss))(weight), 1e-3
    direction = gradient / jnp.linalg.norm(gradient)
    slope = (loss(weight + step * direction) - loss(weight - step * direction)) / (2 * step)
    np.testing.assert_allclose(slope, jnp.linalg.norm(gradient), rtol=2e-2)


@pytest.mark.parametrize("block_size,snr,failure", [(512, 0.177, 0.430), (128, 0.354, 0.362), (64, 0.5, 0.309)])
def test_theory(block_size, snr, failure):
    """The worked values for heads of 64 and a gap of 0.7071, and a simulation of what they claim."""
    got = theory.routing_snr(0.7071, 64, block_size)
    assert got == pytest.approx(snr, abs=5e-4)
    assert theory.routing_failure_probability(got) == pytest.approx(failure, abs=5e-4)
    rng, trials = np.random.default_rng(0), 4000
    # A product of unit vectors, one of random direction, has mean 0 and variance 1 / head_dim.
    random = rng.normal(size=(trials, 64))
    first = random[:, 0] / np.linalg.norm(random, axis=1)
    assert first.var() == pytest.approx(1 / 64, rel=0.1)

    def block_scores():
        keys = np.stack([rng.permutation(first) for _ in range(block_size)], axis=1)
        return keys.mean(axis=1)

    signal = block_scores() + 0.7071 / block_size
    assert (block_scores() > signal).mean() == pytest.approx(failure, abs=4 * np.sqrt(0.25 / trials))


def test_theory_of_choices():
    assert theory.effective_gap(0.3, related=5, related_gap=0.1) == pytest.approx(0.7)
    assert theory.required_snr(8, 64) == pytest.approx(1.1503, abs=1e-4)  # the 0.875 quantile
    assert theory.required_snr(8, 8) == -np.inf
    gap = theory.required_gap(head_dim=64, block_size=128, top_k=8, length=8192)
    assert theory.routing_snr(gap, 64, 128) == pytest.approx(theory.required_snr(8, 64))
    assert theory.scoring_cost(524288, 128, 8) == 1.0
    for bad in (
        lambda: theory.routing_snr(1.0, 0, 8),
        lambda: theory.required_snr(0, 8),
        lambda: theory.effective_gap(1.0, related=0),
    ):
        with pytest.raises(ValueError, match=r"at least 1.*got 0"):
            bad()


def test_the_page_has_the_numbers_of_the_theory():
    """docs/moba.md tells what `python -m benchmarks.moba_theory` prints."""
    assert moba_theory.table() in (Path(__file__).parents[2] / "docs/moba.md").read_text()


SHARDED = """
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from pallas_kernels.moba import moba_attention

mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
rng = np.random.default_rng(0)
q = jnp.asarray(rng.normal(size=(4, 60, 4, 8)), jnp.float32)
k, v = (jnp.asarray(rng.normal(size=(4, 60, 2, 8)), jnp.float32) for _ in range(2))
ids = jnp.asarray(np.sort(rng.integers(0, 3, (4, 60))), jnp.int32)
heads, rows = NamedSharding(mesh, P("data", None, "tensor", None)), NamedSharding(mesh, P("data", None))
placed = [jax.device_put(x, s) for x, s in ((q, heads), (k, heads), (v, heads), (ids, rows))]

for packed in (False, True):
    def gradient(q, k, v, ids):
        run = lambda q, k, v: moba_attention(q, k, v, block_size=8, top_k=3, segment_ids=ids if packed else None)
        out, pull = jax.vjp(run, q, k, v)
        return out, pull(out)

    compiled = jax.jit(gradient).lower(*placed).compile()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"):
        assert collective not in compiled.as_text(), collective
    got, want = compiled(*placed), jax.jit(gradient)(q, k, v, ids)
    assert got[1][0].sharding.is_equivalent_to(heads, 4), got[1][0].sharding
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), got, want)
print("sharded ok")
"""


@pytest.mark.slow
def test_sharded_over_batch_and_heads_without_communication():
    done = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "sharded ok" in done.stdout, done.stderr[-3000:]


def zeros(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


BAD_CALLS = {
    "block_size": (dict(block_size=0), ValueError, "block_size must be a positive Python integer; got 0"),
    "top_k": (dict(top_k=0), ValueError, "top_k must be a positive Python integer; got 0"),
    "traced top_k": (dict(top_k=2.0), ValueError, "top_k .* got 2.0"),
    "causal": (dict(causal=None), ValueError, "causal must be True or False; got None"),
    "integers": (dict(q=zeros(2, 8, 4, 16, dtype=jnp.int32)), ValueError, "q must be one of .* got int32"),
    "mixed": (dict(k=zeros(2, 8, 2, 16, dtype=jnp.bfloat16)), ValueError, "k must have the dtype of q"),
    "groups": (dict(q=zeros(2, 8, 3, 16)), ValueError, "the 3 heads of q must be a multiple of the 2 of k"),
    "one array": (dict(q=zeros(2, 4, 4, 16), segment_ids=zeros(2, 4, dtype=jnp.int32)), ValueError, "must be a pair"),
    "in pieces": (
        dict(segment_ids=jnp.asarray([[0, 0, 1, 1, 0, 2, 2, 2]] * 2)),
        ValueError,
        "row 0 has a sequence in pie",
    ),
    "float segments": (dict(segment_ids=zeros(2, 8)), ValueError, "segment_ids must be integers; got float32"),
    "scale": (dict(scale=0.0), ValueError, "scale must be a positive finite"),
    "name": (dict(implementation="fast"), ValueError, "implementation must be None or one of .*'fast'"),
    "mosaic": (dict(implementation="mosaic"), NotImplementedError, '"mosaic": needs block_size 64 or a mul.* got 4'),
    "not causal": (
        dict(causal=False, segment_ids=zeros(2, 8, dtype=jnp.int32)),
        NotImplementedError,
        "segment_ids need causal=True",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_name_argument_and_value(plain_calls, name):
    changes, error, message = BAD_CALLS[name]
    arguments = dict(q=zeros(2, 8, 4, 16), k=zeros(2, 8, 2, 16), v=zeros(2, 8, 2, 16), block_size=4, top_k=2) | changes
    with pytest.raises(error, match=message):
        moba_attention(**arguments)


def test_bad_calls_of_the_other_functions(plain_calls):
    k = zeros(2, 8, 2, 16)
    cache = init_centroids(2, 8, 2, 16, block_size=4, dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"weight must be \[taps, 32\] .* got shape \(3, 16\)"):
        key_conv(k, zeros(3, 16))
    with pytest.raises(ValueError, match=r"state must be float32 of shape \(2, 2, 2, 16\); got .* \(2, 3, 2, 16\)"):
        key_conv(k, zeros(3, 32), state=zeros(2, 3, 2, 16))
    with pytest.raises(ValueError, match="segment_ids and state cannot be given together"):
        key_conv(k, zeros(3, 32), zeros(2, 8, dtype=jnp.int32), zeros(2, 2, 2, 16))
    with pytest.raises(ValueError, match=r"k must be float32 of shape .* got bfloat16"):
        append_centroids(cache, k.astype(jnp.bfloat16), block_size=4)
    with pytest.raises(ValueError, match="capacity must be at least 1; got 0"):
        init_centroids(2, 0, 2, 16, block_size=4, dtype=jnp.float32)
    q, own, stacked = zeros(2, 1, 4, 16), zeros(2, 1, 2, 16), zeros(1, 2, 8, 2, 16)
    with pytest.raises(ValueError, match=r"centroids of 8 slots must be .*\(2, 4, 2, 16\); got .*\(2, 2, 2, 16\)"):
        moba_decode(q, stacked, stacked, own, own, cache, layer=0, block_size=2, top_k=2)
    with pytest.raises(ValueError, match="must hold one token"):
        moba_decode(zeros(2, 2, 4, 16), stacked, stacked, own, own, cache, layer=0, block_size=4, top_k=2)
    q, k = (jax.ShapeDtypeStruct((1, 2**25, heads, 8), jnp.bfloat16) for heads in (32, 1))
    with pytest.raises(NotImplementedError, match=r"must be below 2\^30; got"):
        jax.eval_shape(lambda q, k: moba_select(q, k, block_size=128, top_k=8), q, k)


# T, S, N, K, H, block_size, top_k
LARGER = [
    (1, 147, 4, 4, 32, 64, 2),
    (113, 203, 4, 2, 59, 64, 3),
    (512, 256, 4, 1, 64, 128, 2),
    (1023, 1024, 4, 2, 96, 128, 4),
    (1023, 1024, 4, 1, 111, 256, 2),
    (700, 1024, 2, 2, 128, 64, 4),
    (300, 900, 4, 4, 160, 128, 3),
]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", LARGER, ids=str)
def test_definition_and_xla_at_larger_sizes(sizes):
    num_queries, num_keys, heads, kv_heads, head_dim, block_size, top_k = sizes
    rng = np.random.default_rng(0)
    shapes = [(1, num_queries, heads, head_dim), *[(1, num_keys, kv_heads, head_dim)] * 2]
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in [*shapes, shapes[0]]]
    segments = [jnp.zeros((1, length), jnp.int32) for length in (num_queries, num_keys)]
    options = dict(block_size=block_size, top_k=top_k, causal=True, scale=head_dim**-0.5)
    d_lse = jnp.zeros((1, heads, num_queries))
    want = with_gradients(lambda q, k, v: reference.run(q, k, v, *segments, **options))(*arrays, d_lse)
    got = with_gradients(lambda q, k, v: xla.run(q, k, v, None, **options))(*arrays, d_lse)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend, loops", [("cpu", True), ("gpu", False)])
def test_lists_are_searched_in_a_loop_where_written_out_would_compile_for_minutes(monkeypatch, backend, loops):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    text = str(jax.make_jaxpr(lambda indices: lists.invert_selection(indices, 64))(jnp.zeros((256, 7), jnp.int32)))
    assert ("while" in text or re.search(r"unroll=1\b", text) is not None) == loops
