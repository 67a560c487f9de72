"""Caches: cached forward = full recompute, fixed shapes, ragged appends, overflow, and no copies in a step."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.cache import KV, CacheRows, KVCache, KVCodes, Scales, SinkRingCache
from jaxmodels.layers import RopeConfig
from jaxmodels.qwen import QwenConfig, build, sliding_windows
from pallas_kernels.masks import Causal, Full, SlidingWindow

CONFIGS = {
    "qwen3": QwenConfig.tiny(layers=2, dim=32, mlp_dim=32, head_dim=16),
    "qwen2": QwenConfig.tiny(layers=2, dim=32, mlp_dim=32, head_dim=8, qk_norm=False, qkv_bias=True, tied_head=True),
    "windows": QwenConfig.tiny(layers=3, dim=32, mlp_dim=32, head_dim=16, layer_attention=sliding_windows(None, 5, 5)),
}


def random_model(config, seed=0):
    """Random norms and biases too."""
    lm = build(config)
    params = lm.init(jax.random.key(seed))
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [leaf + 0.2 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return lm, jax.tree.unflatten(treedef, noisy)


def random_kv(config, batch, time, seed=0):
    shape = (config.layers, batch, time, config.kv_heads, config.head_dim)
    return KV(*(jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(seed))))


def run_cached(lm, params, cache, tokens, lengths, chunk):
    """Feeds ragged rows in chunks of one shape; logits `[B, T, V]` of every valid token."""

    @jax.jit
    def step(params, cache, tokens, count):
        hidden = lm.hidden(params, tokens, cache=cache, lengths=count)
        return cache.append(hidden.kv, count), lm.head(params, hidden.states)

    batch, time = tokens.shape
    padded = np.zeros((batch, -(-time // chunk) * chunk), np.int32)
    padded[:, :time] = tokens
    outputs = []
    for start in range(0, padded.shape[1], chunk):
        count = jnp.clip(lengths - start, 0, chunk).astype(jnp.int32)
        cache, logits = step(params, cache, jnp.asarray(padded[:, start : start + chunk]), count)
        outputs.append(logits)
    assert step._cache_size() == 1
    return cache, np.concatenate(outputs, axis=1)[:, :time]


def assert_rows_close(actual, expected, lengths):
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(actual[row, :length], expected[row, :length], rtol=0, atol=1e-5)


@pytest.mark.smoke
@pytest.mark.parametrize(("name", "chunk"), [("qwen3", 7), ("qwen2", 1), ("windows", 4)])
def test_growing_cache_equals_full_forward(name, chunk):
    lm, params = random_model(CONFIGS[name])
    lengths = jnp.asarray([13, 1, 8], jnp.int32)
    tokens = jax.random.randint(jax.random.key(2), (3, 13), 0, lm.config.vocab_size)
    cache = KVCache.init(lm.config, batch=3, capacity=16, dtype=jnp.float32)
    # Empty slots hold garbage: it must never reach a result.
    cache = cache.replace(k=cache.k + jnp.nan, v=cache.v + jnp.nan)
    cache, logits = run_cached(lm, params, cache, tokens, lengths, chunk)
    assert_rows_close(logits, jax.jit(lm.apply)(params, tokens), lengths)
    np.testing.assert_array_equal(cache.lengths, lengths)
    np.testing.assert_array_equal(cache.remaining(), 16 - lengths)


@pytest.mark.parametrize(("chunk", "num_sinks", "ring"), [(1, 2, 6), (6, 2, 6), (4, 0, 5)])
def test_sink_ring_equals_full_forward_with_window_and_sinks(chunk, num_sinks, ring):
    """Long after the ring has wrapped, at every chunk size, in ragged rows."""
    lm, params = random_model(CONFIGS["qwen3"])
    lengths = jnp.asarray([23, 2, 11], jnp.int32)
    tokens = jax.random.randint(jax.random.key(2), (3, 23), 0, lm.config.vocab_size)
    cache = SinkRingCache.init(lm.config, batch=3, capacity=num_sinks + ring, dtype=jnp.float32, num_sinks=num_sinks)
    cache = cache.replace(k=cache.k + jnp.nan, v=cache.v + jnp.nan)
    cache, logits = run_cached(lm, params, cache, tokens, lengths, chunk)
    mask = SlidingWindow(ring, num_sinks)
    expected = lm.apply(params, tokens, mask=mask)
    assert_rows_close(logits, expected, lengths)
    dense = jax.jit(lm.apply)(params, tokens)
    assert np.abs(np.asarray(dense)[0, -1] - logits[0, -1]).max() > 1e-3, "the window must matter"
    # Row 0 holds the sinks and the latest `ring` positions.
    assert sorted(cache.positions[0].tolist()) == [*range(num_sinks), *range(23 - ring, 23)]


def test_a_smaller_window_of_the_model_is_kept_without_sinks():
    lm, params = random_model(
        QwenConfig.tiny(layers=2, dim=32, mlp_dim=32, head_dim=16, layer_attention=sliding_windows(4, 4))
    )
    tokens = jax.random.randint(jax.random.key(2), (1, 15), 0, lm.config.vocab_size)
    cache = SinkRingCache.init(lm.config, batch=1, capacity=10, dtype=jnp.float32, num_sinks=2)
    _, logits = run_cached(lm, params, cache, tokens, jnp.asarray([15]), 5)
    assert_rows_close(logits, lm.apply(params, tokens), [15])


def test_dynamic_rope_equals_full_forward_within_the_trained_length_only():
    """Beyond it cached keys keep the rotation they were written with, as in transformers: documented, shown here."""
    rope = RopeConfig(theta=10_000.0, kind="dynamic", factor=4.0, original_max_positions=8)
    lm, params = random_model(QwenConfig.tiny(layers=2, dim=32, mlp_dim=32, head_dim=16, rope=rope))
    tokens = jax.random.randint(jax.random.key(2), (1, 12), 0, lm.config.vocab_size)
    cache = KVCache.init(lm.config, batch=1, capacity=12, dtype=jnp.float32)
    _, logits = run_cached(lm, params, cache, tokens, jnp.asarray([12]), 1)
    np.testing.assert_allclose(logits[:, :8], lm.apply(params, tokens[:, :8]), rtol=0, atol=1e-5)
    assert np.abs(logits[:, 11] - lm.apply(params, tokens)[:, 11]).max() > 1e-4


def test_own_mask_full_is_a_block_that_sees_itself():
    """A denoising forward: bidirectional among the own tokens, nothing written."""
    lm, params = random_model(CONFIGS["qwen3"])
    tokens = jax.random.randint(jax.random.key(2), (2, 9), 0, lm.config.vocab_size)
    hidden = lm.hidden(params, tokens[:, :5], return_kv=True)
    cache = KVCache.init(lm.config, batch=2, capacity=9, dtype=jnp.float32).append(hidden.kv)
    block = lm.hidden(params, tokens[:, 5:], cache=cache, own_mask=Full())

    # Oracle: one token at a time cannot see ahead; the last one of a causal chunk sees all, as here, only if every
    # earlier layer did too. So compare with a dense forward under the block mask, written as segments of positions.
    class Block(SlidingWindow):
        def allowed(self, q, k):
            return (k <= q) | ((q >= 5) & (k >= 5))

        def key_intervals(self, q, num_keys):
            return [(np.zeros_like(q), np.where(q >= 5, num_keys, q + 1))]

    expected = lm.hidden(params, tokens, mask=Block(99))
    np.testing.assert_allclose(block.states, expected.states[:, 5:], rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        block.kv.k, lm.hidden(params, tokens, mask=Block(99), return_kv=True).kv.k[:, :, 5:], atol=1e-5
    )


@pytest.mark.parametrize("kind", [KVCache, SinkRingCache])
def test_append_writes_valid_tokens_only(kind):
    """Row by row against a plain loop, with rows that append nothing and rows that append up to the end."""
    config = CONFIGS["qwen3"]
    options = {"num_sinks": 2} if kind is SinkRingCache else {}
    cache = kind.init(config, batch=3, capacity=7, dtype=jnp.float32, **options)
    append = jax.jit(lambda cache, kv, count: cache.append(kv, count))
    stored = [{} for _ in range(3)]  # row -> position -> key
    counts = [(3, 0, 4), (0, 4, 3), (4, 1, 0), (0, 0, 0)]
    for seed, count in enumerate(counts):
        kv = random_kv(config, 3, 4, seed)
        for row, n in enumerate(count):
            base = int(cache.lengths[row])
            stored[row] |= {base + i: kv.k[:, row, i] for i in range(n)}
        cache = append(cache, kv, jnp.asarray(count))
    np.testing.assert_array_equal(cache.lengths, np.sum(counts, axis=0))
    for row, keys in enumerate(stored):
        for position, key in keys.items():
            if kind is SinkRingCache and position >= 2:
                slot = 2 + (position - 2) % 5
                assert int(cache.positions[row, slot]) == max(p for p in keys if p >= 2 and (p - position) % 5 == 0)
                if int(cache.positions[row, slot]) != position:
                    continue  # overwritten since
            else:
                slot = position
            np.testing.assert_array_equal(cache.k[:, row, slot], key)


def test_overflow_drops_what_does_not_fit_and_shows():
    config = CONFIGS["qwen3"]
    first, second = random_kv(config, 2, 4, 0), random_kv(config, 2, 4, 1)
    cache = KVCache.init(config, batch=2, capacity=6, dtype=jnp.float32).append(first)
    full = jax.jit(lambda cache, kv: cache.append(kv, jnp.asarray([2, 4])))(cache, second)
    assert full.remaining().tolist() == [0, -2]
    np.testing.assert_array_equal(full.k[:, :, :4], first.k)
    np.testing.assert_array_equal(full.k[:, :, 4:], second.k[:, :, :2])


def test_bad_input_is_refused_by_name():
    config = CONFIGS["qwen3"]
    lm, params = random_model(config)
    cache = KVCache.init(config, batch=2, capacity=4, dtype=jnp.float32)
    ring = SinkRingCache.init(config, batch=2, capacity=6, dtype=jnp.float32, num_sinks=2)
    with pytest.raises(ValueError, match="chunk of 5 tokens does not fit into 4 cache slots"):
        cache.append(random_kv(config, 2, 5))
    with pytest.raises(ValueError, match="chunk of 5 tokens does not fit into 4 ring slots"):
        ring.append(random_kv(config, 2, 5))
    with pytest.raises(ValueError, match="kv must have the shape"):
        cache.append(random_kv(config, 3, 2))
    with pytest.raises(ValueError, match="num_sinks must lie in"):
        SinkRingCache.init(config, batch=2, capacity=4, dtype=jnp.float32, num_sinks=4)
    with pytest.raises(ValueError, match="batch and capacity must be at least 1; got 2 and 0"):
        KVCache.init(config, batch=2, capacity=0, dtype=jnp.float32)
    with pytest.raises(ValueError, match="holds 2 rows; got a batch of 3"):
        lm.hidden(params, jnp.zeros((3, 1), jnp.int32), cache=cache)
    with pytest.raises(ValueError, match="the cache is for 2 layers"):
        build(CONFIGS["windows"]).hidden(params, jnp.zeros((2, 1), jnp.int32), cache=cache)


def decode_step(lm):
    def step(params, cache, token):
        hidden = lm.hidden(params, token, cache=cache)
        return cache.append(hidden.kv), lm.head(params, hidden.states).argmax(-1).astype(jnp.int32)

    return jax.jit(step, donate_argnums=1)


MOVING = ("copy", "transpose", "concatenate", "convert", "pad", "dynamic-slice", "slice", "gather", "reshape")


def moved(hlo: str, sizes: set[int]) -> list[str]:
    """Instructions of an HLO module's text that move data and whose result has one of these counts of elements."""
    found = []
    for line in hlo.splitlines():
        match = re.match(r"\s*(?:ROOT )?%?[\w.-]+ = \w+\[([\d,]*)\]\S* ([\w-]+)\(", line)
        if match and match.group(2) in MOVING:
            size = int(np.prod([int(n) for n in match.group(1).split(",") if n] or [1]))
            if size in sizes:
                found.append(line.strip())
    return found


# Distinct sizes, so that a count of elements tells what an array is; more cache slots than attention reads at once.
STEP_CONFIG = QwenConfig(
    vocab_size=640, dim=192, layers=5, heads=4, kv_heads=2, head_dim=32, mlp_dim=352, qkv_bias=True, tied_head=True,
    rope=RopeConfig(theta=10_000.0),
)  # fmt: skip


def test_moved_finds_what_it_looks_for():
    x = jnp.zeros((6, 7, 8))
    hlo = jax.jit(lambda x: jnp.transpose(x, (2, 0, 1)).copy()).lower(x).compile().as_text()
    assert moved(hlo, {x.size}) and not moved(hlo, {x.size + 1})


@pytest.mark.parametrize(
    ("path", "batch", "kind"),
    [
        ("scanned", 1, KVCache),
        ("scanned", 3, SinkRingCache),
        ("unrolled", 1, KVCache),
        ("unrolled", 3, KVCache),
        ("unrolled", 1, SinkRingCache),
    ],
)
def test_no_copy_of_cache_or_weights_in_a_compiled_step(path, batch, kind):
    """The donated cache is updated in place; no weight is copied, transposed or, unrolled, even sliced out.

    A scan on a CPU does slice out the weights of the layer at hand, one at a time: XLA's CPU backend cannot hand a
    slice of a buffer to a matrix product. That is the reason for `CausalLM.unstack`.
    """
    lm = build(STEP_CONFIG)
    stacked = lm.init(jax.random.key(0))
    params = lm.unstack(stacked) if path == "unrolled" else stacked
    cache = kind.init(lm.config, batch=batch, capacity=1100, dtype=jnp.float32)
    compiled = decode_step(lm).lower(params, cache, jnp.zeros((batch, 1), jnp.int32)).compile()
    hlo = compiled.as_text()

    big = {leaf.size for leaf in jax.tree.leaves(stacked) if leaf.size > 50_000}
    big |= {cache.k.size, cache.k.size // lm.config.layers}
    one_layer = {leaf.size // lm.config.layers for leaf in jax.tree.leaves(stacked["layers"]) if leaf.size > 50_000}
    assert not big & one_layer
    found = moved(hlo, big | one_layer)
    if path == "scanned":
        found = [line for line in found if not re.search(r"dynamic-slice\(", line)]
    assert not found, "\n".join(found)

    # The outputs are the donated cache, and scratch space has no room for another one, nor for the weights.
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * cache.k.nbytes
    scratch = memory.temp_size_in_bytes
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(stacked["layers"]))
    layer = 1.1 * weights / lm.config.layers if path == "scanned" else 0
    chunk = 2 * batch * 256 * lm.config.kv_heads * lm.config.head_dim * 4  # what attention reads at once
    assert scratch < layer + 3 * chunk
    assert 3 * chunk < 2 * cache.k.nbytes


# ----------------------------------------------------------------------------------------------------
# Keys and values in eight bits


CODES = {
    "int8": KVCodes("int8"),
    "fp8": KVCodes("fp8"),
    "fp8 scaled": KVCodes("fp8", Scales(np.array([0.5, 2.0], np.float32), np.array([0.1, 0.25], np.float32))),
}


def coded(kind, codes, batch=2, capacity=12, **options):
    config = QwenConfig.tiny(layers=2, kv_heads=2, head_dim=8)
    return kind.init(config, batch=batch, capacity=capacity, dtype=jnp.float32, codes=codes, **options)


def some_kv(time, seed=0, batch=2, scale=1.0):
    rng = np.random.default_rng(seed)
    k, v = (rng.normal(size=(2, batch, time, 2, 8)).astype(np.float32) * scale for _ in range(2))
    k[..., 3] *= 20  # an outlier channel, and tokens of very different sizes
    v *= np.logspace(-2, 1, time, dtype=np.float32)[:, None, None]
    return KV(jnp.asarray(k), jnp.asarray(v))


def decoded(cache, name):
    """Values [L, B, S, K, H] that the codes stand for."""
    codes, scale = getattr(cache, name).astype(jnp.float32), getattr(cache, f"{name}_scale")
    if scale.ndim == 1:
        return codes * scale[:, None, None, None, None]
    return codes * jnp.swapaxes(scale.astype(jnp.float32), 2, 3)[..., None]


@pytest.mark.smoke
@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("kind", [KVCache, SinkRingCache])
def test_codes_stand_for_what_was_appended(kind, name):
    cache = coded(kind, CODES[name])
    assert cache.k.dtype == (jnp.int8 if name == "int8" else jnp.float8_e4m3fn)
    kv = some_kv(7)
    cache = cache.append(kv, count=jnp.array([7, 4]))
    for part, values in (("k", kv.k), ("v", kv.v)):
        found = decoded(cache, part)
        for row, count in enumerate((7, 4)):
            real, own = np.asarray(values[:, row, :count]), np.asarray(found[:, row, :count])
            if name == "int8":  # half a step of the token's and head's own grid, which float16 makes a little wider
                allowed = 0.502 * np.abs(real).max(axis=-1, keepdims=True) / 127
            else:  # three bits of mantissa; below the normal numbers of the format half of its smallest step
                scale = np.asarray(getattr(cache, f"{part}_scale"))[:, None, None, None]
                allowed = np.maximum(np.abs(real) / 16, scale * 2.0**-10)
            assert (np.abs(real - own) <= allowed + 1e-7).all()
    assert not np.asarray(cache.k.astype(jnp.float32))[:, 1, 4:].any(), "padding is dropped"


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("kind", [KVCache, SinkRingCache])
def test_attention_reads_codes_as_their_values(kind, name):
    """The same attention as from a float cache that holds the decoded values; rows by themselves too."""
    cache = coded(kind, CODES[name]).append(some_kv(8), count=jnp.array([8, 5]))
    plain = cache.replace(k=decoded(cache, "k"), v=decoded(cache, "v"), k_scale=None, v_scale=None)
    rng = np.random.default_rng(1)
    q = jnp.asarray(rng.normal(size=(2, 3, 4, 8)), jnp.float32)
    own = [jnp.asarray(rng.normal(size=(2, 3, 2, 8)), jnp.float32) for _ in range(2)]
    for layer in range(2):
        options = {"layer": layer, "own_mask": Causal()}
        expected = plain.attend(q, *own, **options)
        np.testing.assert_allclose(cache.attend(q, *own, **options), expected, atol=2e-5)
        turned = CacheRows(cache, jnp.array([1, 0]))
        np.testing.assert_allclose(
            turned.attend(q[::-1], *[x[::-1] for x in own], **options), expected[::-1], atol=2e-5
        )


@pytest.mark.parametrize("name", CODES)
def test_what_stays_in_a_ring_is_never_rounded_again(name):
    cache = coded(SinkRingCache, CODES[name], capacity=6, num_sinks=2).append(some_kv(4))
    sinks = np.asarray(cache.k.astype(jnp.float32))[:, :, :2].copy()
    for step in range(8):
        before = cache
        cache = cache.append(some_kv(1, seed=step + 1, scale=10.0 ** (step % 3)))
        changed = np.asarray(cache.positions != before.positions)
        assert changed.sum() == 2
        same = np.broadcast_to(~changed[None, :, :, None, None], cache.k.shape)
        np.testing.assert_array_equal(
            np.asarray(cache.k.astype(jnp.float32))[same], np.asarray(before.k.astype(jnp.float32))[same]
        )
        if name == "int8":
            same = np.broadcast_to(~changed[None, :, None], cache.k_scale.shape)
            np.testing.assert_array_equal(np.asarray(cache.k_scale)[same], np.asarray(before.k_scale)[same])
    np.testing.assert_array_equal(np.asarray(cache.k.astype(jnp.float32))[:, :, :2], sinks)


@pytest.mark.parametrize("name", CODES)
def test_a_prompt_fills_rows_like_appending(name):
    kv, count = some_kv(5), jnp.array([5, 3])
    filled = coded(KVCache, CODES[name]).append(some_kv(2, seed=3)).fill(kv, count, jnp.array([0, 1]))
    expected = coded(KVCache, CODES[name]).append(kv)
    np.testing.assert_array_equal(filled.lengths, count)
    for row, n in enumerate((5, 3)):
        for part in ("k", "v"):
            np.testing.assert_array_equal(decoded(filled, part)[:, row, :n], decoded(expected, part)[:, row, :n])


def test_values_beyond_the_scale_saturate_and_nothing_is_not_a_number():
    kv = some_kv(3, scale=1e6)
    cache = coded(KVCache, KVCodes("fp8")).append(kv)
    assert float(jnp.abs(decoded(cache, "k")[:, :, :3]).max()) == 448
    zero = coded(KVCache, KVCodes("int8")).append(jax.tree.map(jnp.zeros_like, kv))
    assert not np.asarray(decoded(zero, "k")).any()


@pytest.mark.parametrize(
    "codes, message",
    [
        (KVCodes("int4"), "the codes of a cache are 'int8' or 'fp8'; got 'int4'"),
        (KVCodes("int8", Scales(np.ones(2), np.ones(2))), "scales per layer are for fp8 codes; got 'int8'"),
        (KVCodes("fp8", Scales(np.ones(3), np.ones(2))), r"scales must have shape \(2,\), one per layer; got \(3,\)"),
    ],
)
def test_codes_that_do_not_exist(plain_calls, codes, message):
    with pytest.raises(ValueError, match=message):
        coded(KVCache, codes)
