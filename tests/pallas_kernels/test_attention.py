"""flash_attention: every implementation against a NumPy float64 oracle, outputs and gradients; then its promises."""

import functools
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import flash_attention, masks
from pallas_kernels.attention import api, reference, xla
from pallas_kernels.attention.cases import CASES as REAL_CASES
from pallas_kernels.attention.limits import Limits

VARIANTS = {
    "reference": reference.run,
    "one tile": functools.partial(xla.run, tiling=xla.Tiling(1024, 1024)),
    "tiles": functools.partial(xla.run, tiling=xla.Tiling(32, 16)),
    "lanes": functools.partial(xla.run, tiling=xla.Tiling(16, 16, lanes=3)),
}
# name: (mask, T, S, N, K, which limits)
CASES = {
    "single token": (masks.Causal(), 1, 1, 2, 1, ""),
    "causal": (masks.Causal(), 63, 63, 4, 2, ""),
    "causal, fewer queries": (masks.Causal(), 37, 100, 4, 1, "lengths"),
    "causal, more queries": (masks.Causal(), 100, 37, 2, 2, ""),
    "full, segments": (masks.Full(), 33, 65, 2, 2, "segments"),
    "causal, packed": (masks.Causal(), 70, 70, 4, 2, "packed"),
    "window and sinks": (masks.SlidingWindow(9, 3), 100, 100, 2, 1, "lengths"),
    "block causal": (masks.BlockCausal(7), 65, 65, 2, 2, "lengths packed"),
    "block diffusion": (masks.BlockDiffusion(33, 5), 66, 66, 4, 2, ""),
    "block diffusion, packed": (masks.BlockDiffusion(32, 8), 64, 64, 2, 1, "doubled"),
    "block diffusion, noisy half": (masks.BlockDiffusion(33, 5, "token"), 33, 66, 2, 2, ""),
    "prefix": (masks.PrefixBidirectional(7), 50, 50, 2, 1, "lengths"),
    "positions": (masks.Causal(), 40, 57, 4, 2, "positions"),
    "window by position": (masks.SlidingWindow(8, 2), 40, 57, 2, 2, "positions lengths"),
    "long": (masks.SlidingWindow(40), 257, 257, 1, 1, "lengths"),
}
BATCH, HEAD_DIM, SCALE = 2, 8, 0.4
VALUE_DIMS = {"causal, fewer queries": 5, "causal, packed": 12, "block diffusion": 3, "positions": 9}  # else HEAD_DIM


def make_limits(kind: str, num_queries: int, num_keys: int, rng: np.random.Generator) -> Limits:
    """Random limits with the edges in them: an empty row of the batch, padding, empty slots, lonely segments."""
    given = {}
    if "lengths" in kind:
        given["kv_lengths"] = [num_keys // 2, 0]
    if "segments" in kind:
        given["q_segments"] = rng.integers(-1, 3, (BATCH, num_queries))
        given["k_segments"] = rng.integers(-1, 2, (BATCH, num_keys))
    if "packed" in kind:
        cuts = np.sort(rng.integers(0, num_keys, (BATCH, 2)), axis=1)
        segments = 1 + (np.arange(num_keys) >= cuts[:, :1]) + (np.arange(num_keys) >= cuts[:, 1:])
        given["q_segments"] = given["k_segments"] = np.where(segments == 3, -1, segments)  # the tail is padding
    if "doubled" in kind:
        half = np.repeat([[1, 1, 2, 2]], num_keys // 8, axis=1)[:, : num_keys // 2]
        given["q_segments"] = given["k_segments"] = np.tile(np.sort(half), (BATCH, 2))
    if "positions" in kind:
        given["q_positions"] = rng.integers(0, num_keys, (BATCH, num_queries))
        given["k_positions"] = rng.integers(-1, num_keys, (BATCH, num_keys))
    return Limits(**{name: jnp.asarray(value, jnp.int32) for name, value in given.items()})


def brute_force(mask: masks.Mask, limits: Limits, num_queries: int, num_keys: int) -> np.ndarray:
    """Who sees whom [B, T, S], pair by pair from the documented rules."""
    offset = mask.query_offset(num_queries, num_keys)
    given = {name: np.asarray(value) for name, value in limits._asdict().items() if value is not None}
    seen = np.zeros((BATCH, num_queries, num_keys), bool)
    for b, i, j in np.ndindex(*seen.shape):
        q_position = given["q_positions"][b, i] if "q_positions" in given else i + offset
        k_position = given["k_positions"][b, j] if "k_positions" in given else j
        visible = k_position >= 0 and bool(mask.allowed(np.int64(q_position), np.int64(k_position)))
        if "kv_lengths" in given:
            visible &= j < given["kv_lengths"][b]
        if "q_segments" in given:
            visible &= given["q_segments"][b, i] == given["k_segments"][b, j] >= 0
        seen[b, i, j] = visible
    return seen


def make_arrays(num_queries, num_keys, heads, kv_heads, rng, value_dim=HEAD_DIM):
    keys = (BATCH, num_keys, kv_heads)
    shapes = (BATCH, num_queries, heads, HEAD_DIM), (*keys, HEAD_DIM), (*keys, value_dim)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def with_gradients(run, mask, limits):
    """q, k, v, d_out, d_lse -> out, lse, dq, dk, dv, compiled."""

    @jax.jit
    def both(q, k, v, d_out, d_lse):
        (out, lse), pull = jax.vjp(lambda q, k, v: run(q, k, v, mask=mask, limits=limits, scale=SCALE), q, k, v)
        return out, lse, *pull((d_out, d_lse))

    return both


# The whole table on the definition and on the tiled walk; the two special walks where they differ from it.
FEWER = ("single token", "causal, more queries", "causal, packed", "block diffusion", "window by position")


@functools.cache
def solved(name, oracle):
    """Arguments and expected results of a case."""
    mask, num_queries, num_keys, heads, kv_heads, kind = CASES[name]
    rng = np.random.default_rng(sum(map(ord, name)))
    limits = make_limits(kind, num_queries, num_keys, rng)
    seen = brute_force(mask, limits, num_queries, num_keys)
    value_dim = VALUE_DIMS.get(name, HEAD_DIM)
    arrays = make_arrays(num_queries, num_keys, heads, kv_heads, rng, value_dim)
    arrays.append(jnp.asarray(rng.normal(size=(*arrays[0].shape[:3], value_dim)), jnp.float32))
    arrays.append(jnp.asarray(rng.normal(size=(BATCH, heads, num_queries)), jnp.float32))
    return mask, limits, seen, arrays, oracle(*arrays[:3], seen, SCALE, *arrays[3:])


@pytest.mark.parametrize(
    "variant,name", [(v, n) for v in VARIANTS for n in CASES if v in ("reference", "tiles") or n in FEWER]
)
def test_outputs_and_gradients(oracle, variant, name):
    mask, limits, seen, arrays, expected = solved(name, oracle)
    actual = with_gradients(VARIANTS[variant], mask, limits)(*arrays)
    for label, got, want in zip(("out", "lse", "dq", "dk", "dv"), actual, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5, err_msg=label)
    empty = ~seen.any(axis=2)
    assert (np.asarray(actual[0])[empty] == 0).all() and (np.asarray(actual[2])[empty] == 0).all()
    assert (np.swapaxes(actual[1], 1, 2)[empty] == -np.inf).all()


def test_cases_reach_the_edges(oracle):
    """Guards the table above: empty rows, empty batch rows and partly filled tiles do occur in it."""
    empty = {name: int((~solved(name, oracle)[2].any(axis=2)).sum()) for name in CASES}
    assert sum(count > 0 for count in empty.values()) >= 8, empty
    assert empty["causal, more queries"] == BATCH * 63


@pytest.mark.parametrize("variant", VARIANTS)
def test_nan_in_unseen_places_never_leaks(variant):
    """Empty key slots and queries without a key hold NaN, the cotangents of such queries too."""
    rng = np.random.default_rng(0)
    num_queries, num_keys = 40, 53
    q, k, v = make_arrays(num_queries, num_keys, 4, 2, rng)
    segments = rng.integers(-1, 2, (BATCH, num_keys))
    positions = np.where(rng.random((BATCH, num_keys)) < 0.2, -1, np.arange(num_keys))
    lengths = np.array([31, 53])
    limits = Limits(
        q_segments=jnp.asarray(segments[:, -num_queries:]),
        k_segments=jnp.asarray(segments),
        q_positions=jnp.asarray(np.tile(np.arange(num_keys)[-num_queries:], (BATCH, 1))),
        k_positions=jnp.asarray(positions),
        kv_lengths=jnp.asarray(lengths),
    )
    seen = brute_force(masks.Causal(), limits, num_queries, num_keys)
    slot_empty = (segments < 0) | (positions < 0) | (np.arange(num_keys) >= lengths[:, None])
    query_empty = ~seen.any(axis=2)
    assert slot_empty.any() and query_empty.any()
    d_out = jnp.asarray(rng.normal(size=q.shape), jnp.float32)
    d_lse = jnp.asarray(rng.normal(size=(BATCH, 4, num_queries)), jnp.float32)
    run = with_gradients(VARIANTS[variant], masks.Causal(), limits)
    clean = run(q, k, v, d_out, d_lse)
    poison = lambda x, where: jnp.where(where[:, :, None, None], jnp.nan, x)  # noqa: E731
    q, d_out = (poison(x, query_empty) for x in (q, d_out))
    k, v = (poison(x, slot_empty) for x in (k, v))
    for label, got, want in zip(("out", "lse", "dq", "dk", "dv"), run(q, k, v, d_out, d_lse), clean, strict=True):
        np.testing.assert_array_equal(got, want, err_msg=label)
        assert not np.isnan(got).any(), label


def test_dead_tiles_are_not_visited():
    """A visited tile multiplies what it masks by 0, and 0 * NaN is NaN: rows stay clean only if it is skipped."""
    rng = np.random.default_rng(0)
    q, k, v = make_arrays(64, 64, 2, 1, rng)
    v = v.at[:, 16:].set(jnp.nan)
    for lanes in (1, 2):
        out, _ = xla.run(q, k, v, mask=masks.Causal(), limits=Limits(), scale=1.0, tiling=xla.Tiling(16, 16, lanes))
        assert not np.isnan(out[:, :16]).any() and np.isnan(out[:, 16:]).all()


@pytest.mark.parametrize("lanes", [1, 4, 7])
def test_walk_visits_each_live_pair_once_on_separate_tiles(lanes):
    mask = masks.BlockDiffusion(192, 16)
    shape = xla._Shape(1, 384, 384, 1, 1, 8, 32, 32)
    plain, masked = xla._steps(mask, shape, lanes, True, False)
    schedule = mask.schedule(384, 384, 32, 32)
    visited = []
    for steps, partial in ((plain, False), (masked, True)):
        for step in steps:
            assert len(set(step[:, 0])) == len(set(step[:, 1])) == lanes
            pairs = [(int(i), int(j)) for i, j in step if i < 12]
            assert all(schedule.is_partial[pair] == partial for pair in pairs)
            visited += pairs
    assert sorted(visited) == [(i, j) for i, row in enumerate(schedule.q_to_k) for j in row]
    assert len(plain) + len(masked) <= 2 * -(-schedule.num_live // lanes) + 12  # lanes are mostly busy


@pytest.mark.parametrize("dtype,tolerance", [(jnp.bfloat16, 2e-2), (jnp.float16, 2e-3)])
def test_half_precision(oracle, dtype, tolerance):
    rng = np.random.default_rng(3)
    q, k, v = (x.astype(dtype) for x in make_arrays(100, 100, 4, 2, rng))
    d_out = jnp.asarray(rng.normal(size=q.shape), dtype)
    d_lse = jnp.zeros((BATCH, 4, 100))
    seen = np.broadcast_to(masks.Causal().dense(100, 100), (BATCH, 100, 100))
    expected = oracle(*(np.asarray(x, np.float64) for x in (q, k, v)), seen, SCALE, d_out.astype(jnp.float32))
    for variant in ("reference", "tiles"):
        actual = with_gradients(VARIANTS[variant], masks.Causal(), Limits())(q, k, v, d_out, d_lse)
        assert actual[0].dtype == dtype and actual[1].dtype == jnp.float32
        np.testing.assert_allclose(actual[1], expected[1], atol=1e-4)
        for label, got, want in zip(("out", "dq", "dk", "dv"), (actual[0], *actual[2:]), (expected[0], *expected[2:])):
            assert got.dtype == dtype
            error = np.abs(np.asarray(got, np.float64) - want).max() / max(1.0, np.abs(want).max())
            assert error <= tolerance, (variant, label, error)


@pytest.mark.smoke
def test_agrees_with_jax(oracle):
    rng = np.random.default_rng(1)
    q, k, v = make_arrays(63, 63, 4, 2, rng)
    expected = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    np.testing.assert_allclose(flash_attention(q, k, v), expected, atol=1e-5)
    out, lse = flash_attention(q, k, v, mask=masks.Full(), scale=SCALE, return_lse=True)
    want, want_lse = oracle(q, k, v, np.ones((BATCH, 63, 63), bool), SCALE)
    np.testing.assert_allclose(out, want, atol=1e-5)
    np.testing.assert_allclose(lse, want_lse, atol=1e-5)


def test_large_scores_stay_finite():
    q, k, v = (100.0 * x for x in make_arrays(33, 33, 2, 2, np.random.default_rng(0)))
    arguments = dict(mask=masks.Causal(), limits=Limits(), scale=1.0)
    got = jax.jit(functools.partial(xla.run, **arguments, tiling=xla.Tiling(16, 16)))(q, k, v)
    for a, b in zip(got, reference.run(q, k, v, **arguments)):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-3)


def test_public_function_passes_every_option_on():
    """Each option changes the result, and does so equally in both implementations."""
    rng = np.random.default_rng(0)
    q, k, v = make_arrays(20, 20, 4, 2, rng)
    segments = jnp.asarray(rng.integers(0, 2, (BATCH, 20)))
    shuffled = jnp.asarray(np.stack([rng.permutation(20) for _ in range(BATCH)]))
    plain = flash_attention(q, k, v)
    for options in (
        dict(mask=masks.BlockCausal(4)),
        dict(segment_ids=segments),
        dict(segment_ids=(segments, 1 - segments)),
        dict(q_positions=shuffled),
        dict(k_positions=shuffled),
        dict(kv_lengths=jnp.array([5, 7])),
        dict(scale=2.0),
    ):
        got, want = (
            jax.jit(functools.partial(flash_attention, **options, implementation=name))(q, k, v)
            for name in ("xla", "reference")
        )
        np.testing.assert_allclose(got, want, atol=1e-5, err_msg=str(options))
        assert np.abs(got - plain).max() > 1e-2, options


def test_under_transformations():
    """jit, vmap, checkpoint and scan around forward and backward change nothing."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.stack([x, x[::-1] + 1]) for x in make_arrays(40, 40, 4, 2, rng))  # a leading axis of 2
    lengths = jnp.array([[30, 40], [40, 7]])

    def loss(q, k, v, lengths):
        tiling = xla.Tiling(16, 16)
        limits = Limits(kv_lengths=lengths)
        out, lse = xla.run(q, k, v, mask=masks.BlockCausal(4), limits=limits, scale=SCALE, tiling=tiling)
        return (out**2).sum() + jnp.where(lse > -jnp.inf, lse, 0).sum()

    gradient = jax.value_and_grad(loss, argnums=(0, 1, 2))
    one_by_one = [jax.jit(gradient)(q[i], k[i], v[i], lengths[i]) for i in range(2)]
    expected = jax.tree.map(lambda *x: jnp.stack(x), *one_by_one)
    remat = jax.value_and_grad(jax.checkpoint(loss), argnums=(0, 1, 2))
    variants = {
        "vmap": jax.jit(jax.vmap(gradient))(q, k, v, lengths),
        "scan": jax.lax.scan(lambda _, x: (None, gradient(*x)), None, (q, k, v, lengths))[1],
        "remat": jax.lax.map(lambda x: remat(*x), (q, k, v, lengths)),
    }
    for name, got in variants.items():
        jax.tree.map(
            lambda a, b, name=name: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4, err_msg=name), got, expected
        )


def test_second_derivative_is_refused():
    q, k, v = make_arrays(8, 8, 2, 1, np.random.default_rng(0))

    def twice(implementation, outer):
        loss = lambda q: (flash_attention(q, k, v, implementation=implementation) ** 2).sum()  # noqa: E731
        gradient = jax.grad(loss)
        if outer == "reverse":
            return jax.grad(lambda q: (gradient(q) ** 2).sum())(q)
        return jax.jvp(gradient, (q,), (q,))[1]

    with pytest.raises(NotImplementedError, match="no second derivative"):
        twice("xla", "reverse")
    for outer in ("reverse", "forward"):
        assert np.isfinite(twice("reference", outer)).all()


def compiled_shapes(compiled) -> set[tuple[int, ...]]:
    found = re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", compiled.as_text())
    return {tuple(int(n) for n in dims.split(",")) for dims in found}


@pytest.mark.parametrize("kind", ["", "packed", "skip"])
def test_no_buffer_grows_with_queries_times_keys(kind):
    """From the compiled forward and backward: the largest array, and memory that doubles when the length does."""

    def compile_at(length, implementation="xla"):
        q = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        kv = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)

        def loss(q, k, v, ids):
            options = {"": {}, "packed": {"segment_ids": ids}, "skip": {"skip_threshold": 0.1}}[kind]
            mask = masks.BlockDiffusion(length // 2, 32)
            return flash_attention(q, k, v, mask=mask, implementation=implementation, **options).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, kv, kv, ids).compile()

    tiling = xla.default_tiling(1, 2, 4096, 4096, jax.default_backend())
    one_step = 2 * tiling.lanes * tiling.tile_q * tiling.tile_k  # scores of all heads
    assert one_step <= 2 * 4096 * 512
    small, large = compile_at(4096), compile_at(8192)
    for compiled, length in ((small, 4096), (large, 8192)):
        largest = max(int(np.prod(dims)) for dims in compiled_shapes(compiled))
        assert one_step <= largest <= max(one_step, length * 2 * 16), largest
    before, after = (c.memory_analysis().temp_size_in_bytes for c in (small, large))
    assert before < 4096 * 4096  # a quarter of one head's float32 scores
    assert after < 2.2 * before
    dense = compile_at(4096, "reference")  # the measure has teeth: the dense definition fails it
    assert dense.memory_analysis().temp_size_in_bytes > 4096 * 4096


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_default_tiling_bounds_a_step(platform):
    for batch, heads, length in [(1, 1, 1), (1, 32, 100_000), (16, 14, 512), (64, 32, 4096), (3, 5, 777)]:
        tiling = xla.default_tiling(batch, heads, length, length, platform)
        assert 1 <= tiling.tile_q <= min(512, length) and 1 <= tiling.tile_k <= min(512, length)
        step = batch * heads * tiling.lanes * tiling.tile_q * tiling.tile_k
        assert step <= 2**26 or (tiling.tile_q <= 64 and tiling.lanes == 1)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from pallas_kernels import flash_attention, masks

mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
rng = np.random.default_rng(0)
q = jnp.asarray(rng.normal(size=(4, 1100, 4, 8)), jnp.float32)
k, v = (jnp.asarray(rng.normal(size=(4, 1100, 2, 8)), jnp.float32) for _ in range(2))
ids = jnp.asarray(np.sort(rng.integers(0, 3, (4, 1100))), jnp.int32)

def loss(q, k, v, ids):
    return (flash_attention(q, k, v, segment_ids=ids) ** 2).sum(axis=(1, 3))

def gradient(q, k, v, ids):
    out, pull = jax.vjp(lambda q, k, v: loss(q, k, v, ids), q, k, v)
    return out, pull(jnp.ones_like(out))

heads, rows = NamedSharding(mesh, P("data", None, "tensor", None)), NamedSharding(mesh, P("data", None))
placed = [jax.device_put(x, s) for x, s in ((q, heads), (k, heads), (v, heads), (ids, rows))]
compiled = jax.jit(gradient).lower(*placed).compile()
text = compiled.as_text()
for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"):
    assert collective not in text, collective
got, want = compiled(*placed), jax.jit(gradient)(q, k, v, ids)
assert got[1][0].sharding.is_equivalent_to(heads, 4), got[1][0].sharding
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), got, want)
print("sharded ok")
"""


def run_on_eight_devices(code: str) -> str:
    preamble = "import jax; jax.config.update('jax_platforms', 'cpu'); jax.config.update('jax_num_cpu_devices', 8)\n"
    done = subprocess.run([sys.executable, "-c", preamble + code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_sharded_over_batch_and_heads_without_communication():
    assert "sharded ok" in run_on_eight_devices(SHARDED)


def test_importing_creates_no_devices():
    code = (
        "import pallas_kernels, sys\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends, 'devices were created'\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]


def zeros(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


BAD_CALLS = {
    "rank": (dict(q=zeros(2, 8, 16)), r"q must be \[batch, length, heads, head_dim\]; got shape \(2, 8, 16\)"),
    "no queries": (dict(q=zeros(2, 0, 4, 16)), r"q must have no empty axis .* \(2, 0, 4, 16\)"),
    "integers": (dict(q=zeros(2, 8, 4, 16, dtype=jnp.int32)), "q must be one of bfloat16, .*got int32"),
    "mixed": (dict(k=zeros(2, 8, 2, 16, dtype=jnp.bfloat16)), "k must have the dtype of q, float32; got bfloat16"),
    "batch": (dict(k=zeros(3, 8, 2, 16), v=zeros(3, 8, 2, 16)), "k must share batch and head_dim with q"),
    "values": (
        dict(v=zeros(2, 9, 2, 16)),
        r"v must share batch, length and heads with k \(2, 8, 2, 16\); got \(2, 9, 2, 16\)",
    ),
    "heads": (dict(k=zeros(2, 8, 3, 16), v=zeros(2, 8, 3, 16)), "the 4 heads of q must be a multiple of the 3 of k"),
    "mask": (dict(mask="causal"), "mask must be a pallas_kernels.masks.Mask; got 'causal'"),
    "mask size": (dict(mask=masks.BlockDiffusion(5, 2)), r"needs 2 \* seq_len = 10 keys"),
    "doubled positions": (
        dict(mask=masks.BlockDiffusion(4, 2), q_positions=zeros(2, 8, dtype=jnp.int32)),
        "positions cannot be given with BlockDiffusion",
    ),
    "scale": (dict(scale=-1.0), "scale must be a positive finite Python number or None; got -1.0"),
    "segments": (dict(segment_ids=zeros(2, 7, dtype=jnp.int32)), r"segment_ids .* shape \(2, 8\); got \(2, 7\)"),
    "one segment array": (
        dict(q=zeros(2, 4, 4, 16), segment_ids=zeros(2, 8, dtype=jnp.int32)),
        r"segment_ids must be a pair .* T=4, S=8",
    ),
    "float positions": (dict(k_positions=zeros(2, 8)), "k_positions must be integers; got float32"),
    "lengths": (dict(kv_lengths=zeros(3, dtype=jnp.int32)), r"kv_lengths must have shape \(2,\); got \(3,\)"),
    "implementation": (
        dict(implementation="flash3"),
        rf"implementation must be None or one of {re.escape(str([*api.IMPLEMENTATIONS]))}; got 'flash3'",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_are_explained(plain_calls, name):
    changes, match = BAD_CALLS[name]
    arguments = dict(q=zeros(2, 8, 4, 16), k=zeros(2, 8, 2, 16), v=zeros(2, 8, 2, 16)) | changes
    with pytest.raises(ValueError, match=match):
        flash_attention(**arguments)


def test_empty_batch():
    assert flash_attention(zeros(0, 8, 4, 16), zeros(0, 8, 2, 16), zeros(0, 8, 2, 16)).shape == (0, 8, 4, 16)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="checks what happens without a GPU")
def test_cudnn_by_name_explains_itself_without_a_gpu():
    q = zeros(1, 8, 2, 16, dtype=jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="'cudnn': cuDNN needs an NVIDIA GPU; the default backend is cpu"):
        flash_attention(q, q, q, implementation="cudnn")


def test_real_shapes_take_few_steps():
    """On a GPU the steps run one after the other: 1024 tile pairs one by one would leave it idle."""
    for case in REAL_CASES:
        tiling = xla.default_tiling(case.batch, case.heads, case.num_queries, case.num_keys, "gpu")
        group = case.heads // case.kv_heads
        sizes = (case.batch, case.num_queries, case.num_keys, case.kv_heads, group, case.head_dim)
        shape = xla._Shape(*sizes, tiling.tile_q, tiling.tile_k)
        steps = sum(len(part) for part in xla._steps(case.mask, shape, tiling.lanes, True, False))
        assert steps <= 80, (case.name, steps)


@pytest.mark.gpu
@pytest.mark.parametrize("case", REAL_CASES, ids=lambda case: case.name)
def test_real_shapes_on_a_gpu(case):
    """One group of heads of every real shape, default tiling, against the reference."""
    group = case.heads // case.kv_heads
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(1, case.num_queries, group, case.head_dim)), jnp.bfloat16)
    k, v = (jnp.asarray(rng.normal(size=(1, case.num_keys, 1, case.head_dim)), jnp.bfloat16) for _ in range(2))
    results = []
    for name in ("xla", "reference"):
        loss = lambda q, k, v, name=name: (  # noqa: E731
            flash_attention(q, k, v, mask=case.mask, implementation=name).astype(jnp.float32) ** 2
        ).sum()
        results.append(jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v))
    for got, want in zip(*map(jax.tree.leaves, results)):
        got, want = (np.asarray(x, np.float32) for x in (got, want))
        assert np.abs(got - want).max() <= 2e-2 * max(1.0, np.abs(want).max())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype,tolerance", [(jnp.bfloat16, 2e-2), (jnp.float16, 2e-3)])
@pytest.mark.parametrize("length", [64, 1024])
@pytest.mark.parametrize("mask", [masks.Causal(), masks.Full()])
def test_cudnn_agrees_with_the_reference(dtype, tolerance, length, mask):
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(2, length, 8, 128)), dtype)
    k, v = (jnp.asarray(rng.normal(size=(2, length, 2, 128)), dtype) for _ in range(2))
    results = {}
    for name in ("cudnn", "reference"):
        loss = lambda q, k, v, name=name: (  # noqa: E731
            flash_attention(q, k, v, mask=mask, implementation=name).astype(jnp.float32) ** 2
        ).sum()
        out = flash_attention(q, k, v, mask=mask, implementation=name)
        results[name] = [out, *jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)]
    for got, want in zip(results["cudnn"], results["reference"]):
        got, want = (np.asarray(x, np.float32) for x in (got, want))
        assert np.abs(got - want).max() <= tolerance * max(1.0, np.abs(want).max())


@pytest.mark.gpu
def test_cudnn_refuses_odd_lengths():
    q = zeros(1, 257, 8, 128, dtype=jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="even lengths; got T=257 and S=257"):
        flash_attention(q, q, q, implementation="cudnn")
