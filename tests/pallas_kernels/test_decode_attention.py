"""decode_attention: both implementations against a NumPy float64 oracle; then its promises about the cache."""

import functools
import re
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import decode_attention, flash_attention, masks
from pallas_kernels.decode_attention import xla
from pallas_kernels.decode_attention.cases import CASES as REAL_CASES

LAYERS, BATCH, HEAD_DIM, SCALE = 3, 3, 8, 0.4
TILINGS = {
    "one chunk": xla.Tiling(tile_t=128, chunk=256, one_chunk=512),
    "chunks": xla.Tiling(tile_t=128, chunk=16, one_chunk=16),
    "query tiles": xla.Tiling(tile_t=8, chunk=32, one_chunk=0),
}
# name: (T, S, N, K, has own keys, options). kv_lengths are 0, a part, and all of S unless given.
CASES = {
    "one token": (1, 40, 4, 2, True, {}),
    "one token, all heads alike": (1, 57, 3, 1, True, {}),
    "cache only": (5, 63, 4, 4, False, {}),
    "ragged own keys": (7, 33, 4, 2, True, dict(own_mask=masks.Full(), own_lengths=[0, 3, 7])),
    "block of queries": (32, 100, 4, 1, True, dict(own_mask=masks.Full())),
    "fused commit": (16, 50, 2, 2, True, dict(own_mask=masks.BlockCausal(8))),
    "window": (6, 70, 4, 2, True, dict(window=9)),
    "window, long chunk": (37, 70, 2, 1, True, dict(window=20, num_sinks=3)),
    "ring": (
        4,
        24,
        4,
        2,
        True,
        dict(k_positions="ring", kv_lengths=[5, 24, 61], window=20, num_sinks=4),
    ),
    "positions of the queries": (
        3,
        40,
        2,
        2,
        True,
        dict(q_positions=[[3, 9, 4], [50, 51, 52], [0, 1, 2]], window=7),
    ),
}


def brute_force(num_queries, capacity, has_own, options):
    """Who sees whom [B, T, S + T], pair by pair from the documented rules."""
    lengths = options["kv_lengths"]
    seen = np.zeros((BATCH, num_queries, capacity + num_queries * has_own), bool)
    q_positions = options.get("q_positions", lengths[:, None] + np.arange(num_queries))
    own_mask = options.get("own_mask", masks.Causal())
    for b, i, j in np.ndindex(*seen.shape):
        if j < capacity:
            position = options["k_positions"][b, j] if "k_positions" in options else j
            visible = j < lengths[b] and position >= 0
        else:
            position = q_positions[b, j - capacity]
            visible = bool(own_mask.allowed(np.int64(i), np.int64(j - capacity)))
            if "own_lengths" in options:
                visible &= bool(j - capacity < options["own_lengths"][b])
        if "window" in options:
            visible &= bool(q_positions[b, i] - position < options["window"] or position < options.get("num_sinks", 0))
        seen[b, i, j] = visible
    return seen


def ring_positions(lengths, capacity, num_sinks):
    """What a sink + ring cache of this many tokens holds, token by token."""
    positions = np.full((BATCH, capacity), -1)
    for b, length in enumerate(lengths):
        for token in range(length):
            slot = token if token < num_sinks else num_sinks + (token - num_sinks) % (capacity - num_sinks)
            positions[b, slot] = token
    return positions


@functools.cache
def solved(name, oracle):
    """Arrays, NumPy options and expected results of a case."""
    num_queries, capacity, heads, kv_heads, has_own, options = CASES[name]
    options = dict(options)
    options.setdefault("kv_lengths", [0, capacity // 2, capacity])
    if "k_positions" in options:
        options["k_positions"] = ring_positions(options["kv_lengths"], capacity, options["num_sinks"])
    options = {k: np.asarray(v) if isinstance(v, list) else v for k, v in options.items()}
    rng = np.random.default_rng(sum(map(ord, name)))
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    q = draw(BATCH, num_queries, heads, HEAD_DIM)
    k_cache, v_cache = (draw(LAYERS, BATCH, capacity, kv_heads, HEAD_DIM) for _ in range(2))
    own_k, own_v = (draw(BATCH, num_queries, kv_heads, HEAD_DIM) for _ in range(2))
    seen = brute_force(num_queries, capacity, has_own, options)
    k, v = k_cache[1], v_cache[1]
    arrays = dict(q=q, k_cache=k_cache, v_cache=v_cache)
    if has_own:
        k, v = np.concatenate([k, own_k], axis=1), np.concatenate([v, own_v], axis=1)
        arrays |= dict(own_k=own_k, own_v=own_v)
    return arrays, options, seen, oracle(q, k, v, seen, SCALE)


def compute(arrays, options, implementation, layer=1):
    static = {k: v for k, v in options.items() if not isinstance(v, np.ndarray)}
    traced = arrays | {k: v for k, v in options.items() if isinstance(v, np.ndarray)}
    call = functools.partial(decode_attention, **static, scale=SCALE, return_lse=True, implementation=implementation)
    return jax.jit(lambda layer, arguments: call(layer=layer, **arguments))(jnp.int32(layer), traced)


@pytest.mark.parametrize("variant", ["reference", *TILINGS])
@pytest.mark.parametrize("name", CASES)
def test_outputs(oracle, monkeypatch, name, variant):
    arrays, options, seen, (out, lse) = solved(name, oracle)
    if variant != "reference":
        monkeypatch.setattr(xla, "default_tiling", lambda *_: TILINGS[variant])
    got, got_lse = compute(arrays, options, "reference" if variant == "reference" else "xla")
    np.testing.assert_allclose(got, out, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(got_lse, lse, rtol=2e-5, atol=2e-5)
    empty = ~seen.any(axis=2)
    assert (np.asarray(got)[empty] == 0).all() and (np.swapaxes(got_lse, 1, 2)[empty] == -np.inf).all()


def test_cases_reach_the_edges(oracle):
    """Guards the table above: rows without any key occur, and windows do cut."""
    assert (~solved("ragged own keys", oracle)[2].any(axis=2)).any()
    assert (~solved("cache only", oracle)[2].any(axis=2)).any()
    _, options, seen, _ = solved("window, long chunk", oracle)
    wide = brute_force(37, 70, True, options | {"window": 10**6})
    assert (wide & ~seen)[:, :, :70].any() and (wide & ~seen)[:, :, 70:].any()


@pytest.mark.parametrize("variant", ["reference", "chunks", "query tiles"])
def test_nan_in_empty_slots_never_leaks(oracle, monkeypatch, variant):
    if variant != "reference":
        monkeypatch.setattr(xla, "default_tiling", lambda *_: TILINGS[variant])
    for name in ("ring", "ragged own keys"):
        arrays, options, _, (out, lse) = solved(name, oracle)
        capacity = arrays["k_cache"].shape[2]
        empty = np.arange(capacity) >= options["kv_lengths"][:, None]
        if "k_positions" in options:
            empty |= options["k_positions"] < 0
        assert empty.any()
        poisoned = dict(arrays)
        for key in ("k_cache", "v_cache"):
            poisoned[key] = np.where(empty[None, :, :, None, None], np.nan, arrays[key])
            poisoned[key][[0, 2]] = np.nan  # the other layers
        if "own_lengths" in options:
            beyond = np.arange(arrays["own_k"].shape[1]) >= options["own_lengths"][:, None]
            for key in ("own_k", "own_v"):
                poisoned[key] = np.where(beyond[:, :, None, None], np.nan, arrays[key])
        got, got_lse = compute(poisoned, options, "reference" if variant == "reference" else "xla")
        np.testing.assert_allclose(got, out, rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(got_lse, lse, rtol=2e-5, atol=2e-5)


def quantized(rng, dtype, kind, scale_dtype, capacity, kv_heads):
    """A random cache as codes, its scales as `decode_attention` takes them, and the real values in float64."""
    shape = (LAYERS, BATCH, capacity, kv_heads, HEAD_DIM)
    if dtype == "int8":
        codes = jnp.asarray(rng.integers(-127, 128, shape), jnp.int8)
    else:
        codes = jnp.asarray(rng.normal(size=shape) * 100, jnp.float8_e4m3fn)
    scale_shape = {
        "layer": (LAYERS,),
        "head": (LAYERS, kv_heads),
        "token": (LAYERS, BATCH, kv_heads, capacity),
    }[kind]
    scales = jnp.asarray(rng.uniform(0.005, 0.02, scale_shape), scale_dtype)
    exact = np.asarray(scales.astype(jnp.float32), np.float64)
    exact = {
        "layer": lambda: exact[:, None, None, None, None],
        "head": lambda: exact[:, None, None, :, None],
        "token": lambda: np.swapaxes(exact, 2, 3)[..., None],
    }[kind]()
    return codes, scales, np.asarray(codes.astype(jnp.float32), np.float64) * exact


QUANTIZED = {
    "int8, per token": ("int8", "token", "token", "float32", "block of queries"),
    "int8, bfloat16 scales, ring": ("int8", "token", "token", "bfloat16", "ring"),
    "fp8, per head": ("float8_e4m3fn", "head", "head", "float32", "one token"),
    "fp8, per layer": ("float8_e4m3fn", "layer", "layer", "float32", "window, long chunk"),
    "int8, kinds differ": ("int8", "token", "head", "float32", "ragged own keys"),
}


@pytest.mark.parametrize(
    "name, variant",
    [
        *((name, variant) for name in QUANTIZED for variant in ("reference", "chunks")),
        ("int8, kinds differ", "query tiles"),
    ],
)
def test_codes_equal_dequantizing_first(oracle, monkeypatch, name, variant):
    if variant != "reference":
        monkeypatch.setattr(xla, "default_tiling", lambda *_: TILINGS[variant])
    dtype, k_kind, v_kind, scale_dtype, case = QUANTIZED[name]
    arrays, options, seen, _ = solved(case, oracle)
    capacity, kv_heads = arrays["k_cache"].shape[2:4]
    rng = np.random.default_rng(sum(map(ord, name)))
    k_codes, k_scale, k = quantized(rng, dtype, k_kind, scale_dtype, capacity, kv_heads)
    v_codes, v_scale, v = quantized(rng, dtype, v_kind, scale_dtype, capacity, kv_heads)
    k, v = k[1], v[1]
    if "own_k" in arrays:
        k, v = np.concatenate([k, arrays["own_k"]], axis=1), np.concatenate([v, arrays["own_v"]], axis=1)
    out, lse = oracle(arrays["q"], k, v, seen, SCALE)
    # What an empty slot holds, codes and scales, must not matter.
    empty = jnp.arange(capacity) >= jnp.asarray(options["kv_lengths"])[:, None]
    if "k_positions" in options:
        empty |= jnp.asarray(options["k_positions"]) < 0
    if k_kind == "token":
        k_scale = jnp.where(empty[:, None], jnp.nan, k_scale)
    if v_kind == "token":
        v_scale = jnp.where(empty[:, None], jnp.nan, v_scale)
    if dtype != "int8":
        k_codes, v_codes = (jnp.where(empty[:, :, None, None], jnp.nan, x).astype(dtype) for x in (k_codes, v_codes))
    given = arrays | dict(k_cache=k_codes, v_cache=v_codes, k_scale=k_scale, v_scale=v_scale)
    got, got_lse = compute(given, options, "reference" if variant == "reference" else "xla")
    np.testing.assert_allclose(got, out, rtol=3e-5, atol=3e-5)
    np.testing.assert_allclose(got_lse, lse, rtol=3e-5, atol=3e-5)


def test_codes_are_never_dequantized_whole():
    """Temporary memory stays below a quarter of one layer's codes."""
    layers, batch, capacity, kv_heads, head_dim = 4, 2, 16384, 2, 64
    codes = jax.ShapeDtypeStruct((layers, batch, capacity, kv_heads, head_dim), jnp.int8)
    scales = jax.ShapeDtypeStruct((layers, batch, kv_heads, capacity), jnp.float32)
    q = jax.ShapeDtypeStruct((batch, 1, 4, head_dim), jnp.float32)

    def call(q, k, v, k_scale, v_scale, layer, lengths):
        return decode_attention(q, k, v, layer=layer, kv_lengths=lengths, k_scale=k_scale, v_scale=v_scale)

    index, lengths = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((batch,), jnp.int32)
    compiled = jax.jit(call).lower(q, codes, codes, scales, scales, index, lengths).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < batch * capacity * kv_heads * head_dim / 4


@pytest.mark.smoke
@pytest.mark.parametrize("window", [None, 9])
def test_decoding_token_by_token_equals_the_full_forward(window):
    rng = np.random.default_rng(0)
    length = 40
    q = jnp.asarray(rng.normal(size=(1, length, 4, HEAD_DIM)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(1, length, 2, HEAD_DIM)), jnp.float32) for _ in range(2))
    mask = masks.Causal() if window is None else masks.SlidingWindow(window)
    expected = flash_attention(q, k, v, mask=mask)

    @jax.jit
    def at(i):
        here = lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1, axis=1)  # noqa: E731
        lengths = jnp.full((1,), i)
        own = dict(own_k=here(k), own_v=here(v))
        return decode_attention(here(q), k[None], v[None], layer=0, kv_lengths=lengths, window=window, **own)

    got = jnp.concatenate([at(i) for i in range(length)], axis=1)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_traced_options_equal_static_ones():
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(BATCH, 2, 4, HEAD_DIM)), jnp.float32)
    cache = jnp.asarray(rng.normal(size=(LAYERS, BATCH, 30, 2, HEAD_DIM)), jnp.float32)
    lengths = jnp.array([30, 20, 3])
    compiled = jax.jit(
        lambda layer, window, sinks: decode_attention(
            q, cache, cache, layer=layer, kv_lengths=lengths, window=window, num_sinks=sinks
        )
    )
    seen = set()
    for layer, window, sinks in [(0, 5, 0), (2, 5, 0), (2, 9, 0), (2, 9, 2)]:
        want = decode_attention(q, cache, cache, layer=layer, kv_lengths=lengths, window=window, num_sinks=sinks)
        np.testing.assert_allclose(compiled(layer, window, sinks), want, atol=1e-6)
        seen.add(float(want.sum()))
    assert len(seen) == 4 and compiled._cache_size() == 1


@pytest.mark.parametrize("dtype,tolerance", [(jnp.bfloat16, 2e-2), (jnp.float16, 2e-3)])
def test_half_precision(oracle, dtype, tolerance):
    arrays, options, _, _ = solved("block of queries", oracle)
    arrays = {name: jnp.asarray(x, dtype) for name, x in arrays.items()}
    exact = {name: x.astype(jnp.float32) for name, x in arrays.items()}
    want, want_lse = compute(exact, options, "reference")
    for implementation in ("xla", "reference"):
        got, lse = compute(arrays, options, implementation)
        assert got.dtype == dtype and lse.dtype == jnp.float32
        np.testing.assert_allclose(got.astype(jnp.float32), want, atol=tolerance)
        np.testing.assert_allclose(lse, want_lse, atol=1e-4)


def large_cache(layers=4, batch=2, capacity=16384, kv_heads=2, head_dim=64):
    return jax.ShapeDtypeStruct((layers, batch, capacity, kv_heads, head_dim), jnp.float32)


def sizes(text: str) -> dict[str, int]:
    """Largest number of elements that each kind of instruction of a compiled program produces."""
    largest: dict[str, int] = {}
    for dims, kind in re.findall(r"= [a-z]+\d*\[([\d,]*)\]\S* ([a-z-]+)\(", text):
        count = int(np.prod([int(n) for n in dims.split(",") if n]))
        largest[kind] = max(largest.get(kind, 0), count)
    return largest


def compile_step(cache, num_queries, layers, tied):
    """A whole decode step: attention in every layer, then one write of the new keys into the donated cache.

    `tied`: a barrier puts the write after the last read, as a caller must; nothing else orders the two.
    """
    num_layers, batch, _, kv_heads, head_dim = cache.shape
    x = jax.ShapeDtypeStruct((batch, num_queries, 4, head_dim), jnp.float32)
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)

    def step(x, k_cache, v_cache, lengths):
        def layer(x, index):
            own = x[:, :, :kv_heads] * 0.5
            out = decode_attention(
                x, k_cache, v_cache, layer=index, kv_lengths=lengths, own_k=own, own_v=own, own_mask=masks.Full()
            )
            return x + out, own

        if layers == "scanned":
            x, own = jax.lax.scan(layer, x, jnp.arange(num_layers))
        else:
            kept = []
            for index in range(num_layers):
                x, own = layer(x, index)
                kept.append(own)
            own = jnp.stack(kept)
        if tied:
            x, own = jax.lax.optimization_barrier((x, own))
        for row in range(batch):
            at = (0, row, lengths[row], 0, 0)
            k_cache = jax.lax.dynamic_update_slice(k_cache, own[:, row : row + 1], at)
            v_cache = jax.lax.dynamic_update_slice(v_cache, own[:, row : row + 1], at)
        return x, k_cache, v_cache

    return jax.jit(step, donate_argnums=(1, 2)).lower(x, cache, cache, lengths).compile()


IN_PLACE = {"parameter", "get-tuple-element", "while", "tuple", "bitcast", "dynamic-update-slice", "fusion", "call"}


@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
@pytest.mark.parametrize("num_queries", [1, 32])
def test_cache_is_read_in_place(layers, num_queries):
    """No instruction copies an array of the size of a layer, and temporary memory stays far below one.

    Fusions of that size are the writes into the donated cache; what else they could be shows in the memory.
    """
    cache = large_cache()
    compiled = compile_step(cache, num_queries, layers, tied=True)
    one_layer = int(np.prod(cache.shape[1:]))
    made = {kind for kind, count in sizes(compiled.as_text()).items() if count >= one_layer}
    assert made <= IN_PLACE, made
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 4 * one_layer / 4
    assert memory.alias_size_in_bytes == 2 * 4 * one_layer * cache.shape[0]


def test_the_copy_detector_has_teeth():
    """Unordered, the write of the last layer's keys may overtake that layer's reads, and XLA copies the cache."""
    cache = large_cache()
    compiled = compile_step(cache, 1, "unrolled", tied=False)
    made = {kind for kind, count in sizes(compiled.as_text()).items() if count >= int(np.prod(cache.shape))}
    assert "copy" in made
    assert compiled.memory_analysis().temp_size_in_bytes >= 2 * 4 * int(np.prod(cache.shape))


def test_long_chunks_hold_no_queries_by_slots_buffer():
    cache = large_cache(layers=2, batch=1, capacity=8192, kv_heads=1, head_dim=16)
    num_queries = 2048
    x = jax.ShapeDtypeStruct((1, num_queries, 2, 16), jnp.float32)
    own = jax.ShapeDtypeStruct((1, num_queries, 1, 16), jnp.float32)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)

    def call(q, k_cache, v_cache, own_k, own_v, kv_lengths):
        return decode_attention(q, k_cache, v_cache, layer=1, kv_lengths=kv_lengths, own_k=own_k, own_v=own_v)

    compiled = jax.jit(call).lower(x, cache, cache, own, own, lengths).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * num_queries * num_queries / 4


def test_chunks_follow_the_longest_row_and_the_window():
    def span(lengths, window=None, num_sinks=0, positions=None):
        operands = xla.Operands(
            layer=jnp.int32(0),
            kv_lengths=jnp.asarray(lengths),
            k_positions=positions,
            q_positions=jnp.asarray(lengths)[:, None],
            own_k=None,
            own_v=None,
            own_lengths=None,
            window=window,
            num_sinks=num_sinks,
        )
        return tuple(int(n) for n in xla._chunk_range(operands.q_positions, operands, 1000, 64))

    assert span([0, 0]) == (0, 0)
    assert span([1, 0]) == (0, 1)
    assert span([64, 65]) == (0, 2)
    assert span([5000, 3]) == (0, 16)
    assert span([640, 700], window=10) == (9, 11)  # row 0 sees slots 631 and up
    assert span([640, 700], window=10, num_sinks=2) == (0, 11)
    assert span([640, 700], window=10, positions=jnp.zeros((2, 1000), jnp.int32)) == (0, 11)


def test_time_follows_the_live_length():
    rng = np.random.default_rng(0)
    cache = jnp.asarray(rng.normal(size=(1, 1, 65536, 2, 64)), jnp.float32)
    q = jnp.ones((1, 1, 4, 64))
    call = jax.jit(lambda n: decode_attention(q, cache, cache, layer=0, kv_lengths=n))

    def best(length):
        times = []
        for _ in range(5):
            start = time.perf_counter()
            call(jnp.array([length])).block_until_ready()
            times.append(time.perf_counter() - start)
        return min(times)

    best(65536)
    assert best(200) * 8 < best(65536)


SHARDED = """
import re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from pallas_kernels import decode_attention

mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
rng = np.random.default_rng(0)
q = jnp.asarray(rng.normal(size=(4, 2, 4, 8)), jnp.float32)
own = jnp.asarray(rng.normal(size=(4, 2, 2, 8)), jnp.float32)
cache = jnp.asarray(rng.normal(size=(2, 4, 1500, 2, 8)), jnp.float32)
lengths = jnp.array([0, 3, 700, 1500], jnp.int32)
call = lambda q, c, own, n: decode_attention(q, c, c, layer=1, kv_lengths=n, own_k=own, own_v=own)
heads = NamedSharding(mesh, P("data", None, "tensor", None))
stacked = NamedSharding(mesh, P(None, "data", None, "tensor", None))
placed = jax.device_put((q, cache, own, lengths), (heads, stacked, heads, NamedSharding(mesh, P("data"))))
compiled = jax.jit(call).lower(*placed).compile()
text = compiled.as_text()
for collective in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
    assert collective not in text, collective
# The trip count is the only thing that the devices agree on.
assert set(re.findall(r"= (\\S+?)(?:{\\S*})? all-reduce\\(", text)) <= {"s32[]"}, text
np.testing.assert_allclose(compiled(*placed), call(q, cache, own, lengths), rtol=1e-5, atol=1e-5)
print("sharded ok")
"""


def test_sharded_over_batch_and_heads():
    preamble = "import jax; jax.config.update('jax_platforms', 'cpu'); jax.config.update('jax_num_cpu_devices', 8)\n"
    done = subprocess.run([sys.executable, "-c", preamble + SHARDED], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "sharded ok" in done.stdout, done.stderr[-3000:]


def zeros(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


CODES = dict(k_cache=zeros(3, 2, 8, 2, 16, dtype=jnp.int8), v_cache=zeros(3, 2, 8, 2, 16, dtype=jnp.int8))
BAD_CALLS = {
    "rank": (dict(k_cache=zeros(2, 8, 2, 16)), r"k_cache must be \[layers, batch, slots, kv_heads, head_dim\]"),
    "values": (dict(v_cache=zeros(3, 2, 9, 2, 16)), "k_cache and v_cache must have one shape"),
    "dtype": (dict(q=zeros(2, 1, 4, 16, dtype=jnp.bfloat16)), "k_cache must have the dtype of q, bfloat16"),
    "heads": (dict(q=zeros(2, 1, 3, 16)), "the 3 heads of q must be a multiple of the 2 of k_cache"),
    "batch": (dict(q=zeros(1, 1, 4, 16)), "k_cache must share batch and head_dim with q"),
    "layer": (dict(layer=3), r"layer must lie in 0..2; got 3"),
    "own alone": (dict(own_k=zeros(2, 1, 2, 16)), "own_k and own_v must be given together"),
    "own shape": (
        dict(own_k=zeros(2, 2, 2, 16), own_v=zeros(2, 1, 2, 16)),
        r"own_k must be float32\[2, 1, 2, 16\]; got float32\[2, 2, 2, 16\]",
    ),
    "own lengths alone": (dict(own_lengths=zeros(2, dtype=jnp.int32)), "own_lengths needs own_k and own_v"),
    "own mask": (dict(own_mask=masks.BlockDiffusion(4, 2)), "own_mask must be .* not BlockDiffusion"),
    "window": (dict(window=0), "window must be at least 1 or None; got 0"),
    "sinks": (dict(window=3, num_sinks=-1), "num_sinks must not be negative; got -1"),
    "sinks alone": (dict(num_sinks=4), "num_sinks=4 needs a window"),
    "lengths": (dict(kv_lengths=zeros(2)), "kv_lengths must be integers; got float32"),
    "positions": (dict(k_positions=zeros(2, 7, dtype=jnp.int32)), r"k_positions must have shape \(2, 8\)"),
    "scale": (dict(scale=0.0), "scale must be a positive finite Python number or None; got 0.0"),
    "cache dtypes": (dict(v_cache=zeros(3, 2, 8, 2, 16, dtype=jnp.int8)), "must have one dtype; got float32 and int8"),
    "integers": (
        dict(k_cache=zeros(3, 2, 8, 2, 16, dtype=jnp.int32), v_cache=zeros(3, 2, 8, 2, 16, dtype=jnp.int32)),
        "k_cache must be one of .*; got int32",
    ),
    "scale of no codes": (dict(v_scale=zeros(3)), "v_scale needs a v_cache of int8 or float8_e4m3fn; got float32"),
    "codes alone": (dict(**CODES, v_scale=zeros(3)), "k_cache holds int8 codes, which need k_scale"),
    "scale shape": (
        dict(**CODES, k_scale=zeros(3, 2, 8, 2), v_scale=zeros(3)),
        r"k_scale must have one of the shapes \(3,\), \(3, 2\), \(3, 2, 2, 8\); got \(3, 2, 8, 2\)",
    ),
    "scale dtype": (
        dict(**CODES, k_scale=zeros(3), v_scale=zeros(3, dtype=jnp.int32)),
        "v_scale must be float32, bfloat16 or float16; got int32",
    ),
    "own codes": (
        dict(
            **CODES,
            k_scale=zeros(3),
            v_scale=zeros(3),
            own_k=zeros(2, 1, 2, 16, dtype=jnp.int8),
            own_v=zeros(2, 1, 2, 16),
        ),
        r"own_k must be float32\[2, 1, 2, 16\]; got int8",
    ),
    "implementation": (
        dict(implementation="paged"),
        r"implementation must be None or one of \['mosaic', 'xla', 'reference'\]; got 'paged'",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_are_explained(plain_calls, name):
    changes, match = BAD_CALLS[name]
    arguments = dict(
        q=zeros(2, 1, 4, 16),
        k_cache=zeros(3, 2, 8, 2, 16),
        v_cache=zeros(3, 2, 8, 2, 16),
        layer=0,
        kv_lengths=zeros(2, dtype=jnp.int32),
    )
    with pytest.raises(ValueError, match=match):
        decode_attention(**(arguments | changes))


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_default_tiling_bounds_a_chunk(platform):
    """Scores and keys of one chunk stay small for any batch; real single streams take few chunks on a GPU."""
    for batch, num_queries, heads, kv_heads, head_dim in [(1, 1, 14, 2, 64), (64, 64, 32, 8, 128), (3, 5000, 4, 1, 32)]:
        tiling = xla.default_tiling((batch, num_queries, heads, head_dim), kv_heads, platform)
        assert 64 <= tiling.chunk <= tiling.one_chunk <= 4096 and tiling.tile_t <= 128
        scores, keys = batch * heads * tiling.tile_t * tiling.chunk, batch * kv_heads * head_dim * tiling.chunk
        assert max(scores, keys) <= 2**26
    for case in REAL_CASES:
        q_shape = (case.batch, case.num_queries, case.heads, case.head_dim)
        assert -(-case.live // xla.default_tiling(q_shape, case.kv_heads, "gpu").chunk) <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("case", REAL_CASES, ids=lambda case: case.name)
def test_real_shapes_on_a_gpu(case):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)  # noqa: E731
    q = draw(case.batch, case.num_queries, case.heads, case.head_dim)
    k_cache, v_cache = (draw(2, case.batch, case.capacity, case.kv_heads, case.head_dim) for _ in range(2))
    own_k, own_v = (draw(case.batch, case.num_queries, case.kv_heads, case.head_dim) for _ in range(2))
    call = functools.partial(decode_attention, layer=1, own_k=own_k, own_v=own_v, own_mask=masks.Full())
    lengths = jnp.full((case.batch,), case.live)
    got, want = (
        jax.jit(functools.partial(call, implementation=name))(q, k_cache, v_cache, kv_lengths=lengths)
        for name in ("xla", "reference")
    )
    np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), atol=2e-2)
