"""Layers that select blocks and convolve their keys: against NumPy, with padding, packed, and in every loop.

Tests share shapes where they can: each new one is a program to compile.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels import load_pretrained, save_pretrained
from jaxmodels.cache import CacheRows, KVCache, KVCodes, SinkRingCache
from jaxmodels.checkpoints.huggingface import Checkpoint, write_weights
from jaxmodels.qwen import LayerAttention, MobaConfig, QwenConfig, build, hybrid_layers, route_layers
from jaxmodels.qwen.load import Layout, config_from_hf, config_to_hf, table
from jaxmodels.sparse_attention import SkipAttention, SkipMeasure
from pallas_kernels.attention.skip import SkipTile
from pallas_kernels.masks import Full

BLOCK, TOP_K, TAPS = 4, 2, 3
LOCAL = LayerAttention(window=6)
ROUTED = LayerAttention(moba=MobaConfig(BLOCK, TOP_K), key_conv=TAPS, rotary=False)
FULL = LayerAttention(key_conv=TAPS, rotary=False)
TIME = 29


def hybrid(*layers: LayerAttention) -> QwenConfig:
    layers = layers or hybrid_layers(4, window=6, moba=MobaConfig(BLOCK, TOP_K), key_conv=TAPS)
    sizes = {"layers": len(layers), "dim": 32, "mlp_dim": 48, "head_dim": 16, "vocab_size": 61}
    return QwenConfig.tiny(layer_attention=layers, **sizes)


def random_params(config: QwenConfig, seed: int = 0):
    """Random norms and taps too, also for layers that have no convolution."""
    leaves, structure = jax.tree.flatten(build(config).init(jax.random.key(seed)))
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [leaf + 0.3 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, noisy)


def random_tokens(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), shape, 3, 61)


CONFIG = hybrid()
LM = build(CONFIG)
PARAMS = random_params(CONFIG)
hidden = jax.jit(LM.hidden, static_argnames=("unroll", "remat", "return_kv", "layer_states", "skip_stats"))


def numpy_states(config: QwenConfig, params, tokens: np.ndarray) -> np.ndarray:
    """Final states [T, D] of one sequence, float64, query by query: shares no code with the model."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    N, K, H = config.heads, config.kv_heads, config.head_dim
    time = len(tokens)

    def norm(x, weight):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * weight

    def silu(x):
        return x / (1 + np.exp(-x))

    def rotate(x):
        angle = np.arange(time)[:, None] * config.rope.theta ** (-np.arange(H // 2) / (H // 2))
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        a, b = x[..., : H // 2], x[..., H // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def seen(layer, q, k, t):
        """Keys that one query head sees at position t."""
        if layer.window is not None:
            return np.arange(max(0, t + 1 - layer.window), t + 1)
        if layer.moba is None:
            return np.arange(t + 1)
        size, own = layer.moba.block_size, t // layer.moba.block_size
        scores = [q[t] @ k[j * size : (j + 1) * size].mean(0) for j in range(own)]
        chosen = {own, *np.argsort(scores)[::-1][: layer.moba.top_k - 1].tolist()}
        return np.array([i for i in range(t + 1) if i // size in chosen])

    x = params["embed"][tokens]
    for index, layer in enumerate(config.layer_attention):
        own = jax.tree.map(lambda leaf: leaf[index], params["layers"])  # noqa: B023
        attention, mlp = own["attention"], own["mlp"]
        y = norm(x, own["attention_norm"])
        q, k, v = (np.einsum("TD,NHD->TNH", y, attention[name]) for name in "qkv")
        q, k = norm(q, attention["q_norm"]), norm(k, attention["k_norm"])
        if layer.key_conv is not None:
            total = np.zeros_like(k)
            for lag in range(layer.key_conv):
                total[lag:] += attention["k_conv"][lag] * k[: time - lag]
            k = k + silu(total)
        if layer.rotary:
            q, k = rotate(q), rotate(k)
        out = np.zeros((time, N, H))
        for n in range(N):
            head = n // (N // K)
            for t in range(time):
                keys = seen(layer, q[:, n], k[:, head], t)
                p = np.exp(k[keys, head] @ q[t, n] / np.sqrt(H))
                out[t, n] = p / p.sum() @ v[keys, head]
        x = x + np.einsum("TNH,DNH->TD", out, attention["o"])
        y = norm(x, own["mlp_norm"])
        x = x + (silu(y @ mlp["gate"].T) * (y @ mlp["up"].T)) @ mlp["down"].T
    return norm(x, params["final_norm"])


# ----------------------------------------------------------------------------------------------------
# Without a cache


@pytest.mark.smoke
@pytest.mark.parametrize(
    "layers",
    [
        (LOCAL, ROUTED) * 2,
        pytest.param(
            (FULL, ROUTED, LayerAttention(moba=MobaConfig(BLOCK, 3)), LayerAttention()), marks=pytest.mark.slow
        ),
    ],
    ids=["pattern", "all different"],
)
def test_forward_equals_numpy(layers):
    config = hybrid(*layers)
    params, tokens = random_params(config), random_tokens(1, TIME)
    states = jax.jit(build(config).hidden)(params, tokens).states
    np.testing.assert_allclose(states[0], numpy_states(config, params, tokens[0]), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"moba": MobaConfig(BLOCK, 1)},
        pytest.param({"moba": MobaConfig(BLOCK, 3)}, marks=pytest.mark.slow),
        pytest.param({"moba": MobaConfig(2 * BLOCK, TOP_K)}, marks=pytest.mark.slow),
        {"moba": None},
        {"key_conv": None},
        {"rotary": True},
    ],
    ids=str,
)
def test_every_part_of_a_layer_matters(changes):
    """The numbers above depend on which blocks are selected, not on some other way to see less."""
    layers = tuple(a if a == LOCAL else dataclasses.replace(a, **changes) for a in CONFIG.layer_attention)
    other = dataclasses.replace(CONFIG, layer_attention=layers)
    params = {**PARAMS, "layers": {**PARAMS["layers"]}}
    if other.key_conv_taps is None:
        params["layers"]["attention"] = {k: v for k, v in PARAMS["layers"]["attention"].items() if k != "k_conv"}
    tokens = random_tokens(1, TIME)
    before, after = hidden(PARAMS, tokens).states, jax.jit(build(other).hidden)(params, tokens).states
    assert np.abs(before - after).max() > 1e-2


def test_enough_blocks_are_full_attention():
    layers = (LOCAL, dataclasses.replace(ROUTED, moba=MobaConfig(BLOCK, -(-TIME // BLOCK)))) * 2
    tokens = random_tokens(2, TIME)
    for options in ({}, {"lengths": np.array([TIME, 11], np.int32)}):
        routed = jax.jit(build(hybrid(*layers)).hidden)(PARAMS, tokens, **options).states
        dense = jax.jit(build(hybrid(LOCAL, FULL, LOCAL, FULL)).hidden)(PARAMS, tokens, **options).states
        np.testing.assert_allclose(routed[0], dense[0], rtol=0, atol=1e-5)
        np.testing.assert_allclose(routed[1, :11], dense[1, :11], rtol=0, atol=1e-5)


def test_packed_rows_equal_separate_ones():
    """Blocks begin anew with each document, and the convolution does not reach into the one before."""
    lengths = (9, 3, 13)
    tokens = random_tokens(1, TIME)
    segments = np.concatenate([np.full(n, i) for i, n in enumerate(lengths)] + [np.full(TIME - sum(lengths), -1)])
    positions = np.concatenate([np.arange(n) for n in (*lengths, TIME - sum(lengths))])
    options = {"positions": positions[None].astype(np.int32), "segment_ids": segments[None].astype(np.int32)}
    poison = {**PARAMS, "embed": PARAMS["embed"].at[0].set(jnp.nan)}
    packed = hidden(poison, jnp.where(segments < 0, 0, tokens), **options).states[0]
    starts = np.cumsum((0, *lengths))[:-1]
    alone = hidden(PARAMS, jnp.stack([jnp.roll(tokens[0], -start) for start in starts])).states
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        np.testing.assert_allclose(packed[start : start + length], alone[row, :length], rtol=0, atol=1e-5)
    assert np.abs(packed[9:12] - alone[0, 9:12]).max() > 1e-2, "row 0 is the whole"


def test_padding_is_seen_by_nobody():
    """Not even where it is no number."""
    poison = {**PARAMS, "embed": PARAMS["embed"].at[0].set(jnp.nan)}
    tokens, lengths = random_tokens(3, TIME), np.array([TIME, 1, 14], np.int32)
    padded = np.where(np.arange(TIME) < lengths[:, None], tokens, 0)
    whole = hidden(PARAMS, tokens).states
    for options in ({}, {"segment_ids": np.zeros((3, TIME), np.int32)}):
        states = hidden(poison, padded, lengths=lengths, **options).states
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(states[row, :length], whole[row, :length], rtol=0, atol=1e-5)


@pytest.mark.slow  # many programs to compile
@pytest.mark.parametrize(
    "options",
    [{"remat": "attention"}, {"unroll": True, "remat": "full"}],
    ids=["remat", "unrolled"],
)
def test_gradients_do_not_depend_on_the_loop(options):
    tokens = random_tokens(2, TIME)
    target = jax.random.normal(jax.random.key(5), (2, TIME, CONFIG.dim))

    def gradients(**options):
        loss = lambda params: jnp.mean((LM.hidden(params, tokens, **options).states - target) ** 2)  # noqa: E731
        return jax.jit(jax.grad(loss))(PARAMS)

    expected = gradients()
    for path, leaf in jax.tree.leaves_with_path(expected):
        assert np.isfinite(leaf).all(), path
    found = gradients(**options)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), found, expected)
    taps = np.abs(expected["layers"]["attention"]["k_conv"]).max(axis=(1, 2, 3))
    assert (taps[1::2] > 1e-6).all() and (taps[::2] == 0).all(), "taps of layers without a convolution are never read"


@pytest.mark.slow  # many programs to compile
def test_unstacked_and_block_by_block():
    tokens = random_tokens(2, TIME)
    expected = hidden(PARAMS, tokens, return_kv=True, layer_states=True)
    found = hidden(LM.unstack(PARAMS), tokens, return_kv=True, layer_states=True)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), found, expected)
    block = jax.jit(LM.block, static_argnames="layer")
    for layer in (0, 1):
        own = jax.tree.map(lambda leaf: leaf[layer], PARAMS["layers"])  # noqa: B023
        states = block(own, expected.layers[layer], layer=layer)
        np.testing.assert_allclose(states, expected.layers[layer + 1], rtol=0, atol=1e-4)


def test_a_repeating_pattern_is_one_scan():
    jaxpr = jax.make_jaxpr(lambda params, tokens: LM.hidden(params, tokens).states)(PARAMS, random_tokens(1, TIME))
    assert [e.params["length"] for e in jaxpr.eqns if e.primitive.name == "scan"] == [2]


@pytest.mark.slow  # many programs to compile
def test_skip_softmax_is_for_full_attention():
    config = hybrid(ROUTED, FULL)
    params, tokens = random_params(config), random_tokens(2, TIME)
    tile = SkipTile(4, 8)
    run = jax.jit(build(config).hidden, static_argnames="skip_stats")
    dense = run(
        params, tokens, skip_measure=SkipMeasure.create((0.1,), prefill=tile, decode=SkipTile(width=4, chains=2))
    )
    counts = dense.skip_counts
    assert (counts.visited[0] == 0).all() and (counts.visited[1] > 0).all()
    assert (counts.decode_visited[0] == 0).all() and (counts.decode_visited[1] > 0).all()
    found = run(params, tokens, skip=SkipAttention.create(threshold=0.1, tile=tile), skip_stats=True)
    assert (found.skip_stats.visited[0] == 0).all() and (found.skip_stats.visited[1] > 0).all()
    np.testing.assert_allclose(found.states[:, :4], dense.states[:, :4], rtol=0, atol=1e-5)


def test_weights_of_the_convolution():
    params = LM.init(jax.random.key(0), jnp.bfloat16)
    weight = params["layers"]["attention"]["k_conv"]
    assert weight.shape == (4, TAPS, 2, 16) and weight.dtype == jnp.bfloat16 and not weight.any()
    assert LM.logical_axes["layers"]["attention"]["k_conv"] == ("layers", None, "kv_heads", None)
    assert ("layers", "attention", "k_conv") not in LM.linears
    without = jax.eval_shape(build(hybrid(dataclasses.replace(ROUTED, key_conv=None))).init, jax.random.key(0))
    assert "k_conv" not in without["layers"]["attention"]


def test_refusals():
    with pytest.raises(ValueError, match="window of a layer must be None or at least 1; got 0"):
        LayerAttention(window=0)
    with pytest.raises(ValueError, match="key_conv of a layer must be None or at least 1; got 0"):
        LayerAttention(key_conv=0)
    with pytest.raises(ValueError, match="block_size of moba must be at least 1; got 0"):
        MobaConfig(block_size=0)
    with pytest.raises(ValueError, match="top_k of moba must be at least 1; got -1"):
        MobaConfig(top_k=-1)
    with pytest.raises(ValueError, match=r"a window or moba; got window=4 and MobaConfig\(block_size=128, top_k=8\)"):
        LayerAttention(window=4, moba=MobaConfig())
    with pytest.raises(ValueError, match=r"different taps of key convolutions, \[2, 3\]"):
        hybrid(LayerAttention(key_conv=2), FULL)
    with pytest.raises(ValueError, match=r"different block sizes of moba, \[4, 8\]"):
        hybrid(ROUTED, LayerAttention(moba=MobaConfig(8)))
    with pytest.raises(ValueError, match="layer_attention must name 3 layers; got 2"):
        dataclasses.replace(CONFIG, layers=3, layer_attention=(LOCAL, ROUTED))
    for layer, what in ((FULL, "a key convolution"), (dataclasses.replace(ROUTED, key_conv=None), "MobaConfig")):
        config = hybrid(layer)
        with pytest.raises(ValueError, match=rf"a layer with {what}.* needs the mask Causal\(\); got Full"):
            build(config).hidden(random_params(config), random_tokens(1, 4), mask=Full())


# ----------------------------------------------------------------------------------------------------
# With a cache


def empty_cache(config: QwenConfig, batch: int, capacity: int) -> KVCache:
    """Whatever holds nothing yet is no number: it must never reach a result."""
    cache = KVCache.init(config, batch=batch, capacity=capacity, dtype=jnp.float32)
    return jax.tree.map(lambda x: x + jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else x, cache)


@functools.partial(jax.jit, static_argnums=0)
def step(lm, params, cache, tokens, count):
    found = lm.hidden(params, tokens, cache=cache, lengths=count)
    return cache.append(found.kv, count), found.states


@functools.partial(jax.jit, static_argnums=0)
def piece_of_rows(lm, params, cache, tokens, count, rows):
    found = lm.hidden(params, tokens, cache=CacheRows(cache, rows), lengths=count)
    return cache.append(found.kv, count, rows), found.states


def assert_rows_close(found, expected, lengths):
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(found[row, :length], expected[row, :length], rtol=0, atol=1e-4)


def in_pieces(cache, tokens, lengths, chunk, lm=LM, params=PARAMS):
    """Feeds ragged rows in chunks of one shape; the states [B, T, D] of every valid token."""
    padded = np.pad(tokens, ((0, 0), (0, -tokens.shape[1] % chunk)))
    outputs = []
    for start in range(0, tokens.shape[1], chunk):
        count = jnp.asarray(np.clip(lengths - start, 0, chunk), jnp.int32)
        cache, states = step(lm, params, cache, jnp.asarray(padded[:, start : start + chunk]), count)
        outputs.append(states)
    return cache, np.concatenate(outputs, axis=1)


LENGTHS = np.array([TIME, 1, 14], np.int32)
CAPACITY = TIME + 1  # not a whole number of blocks


@pytest.mark.smoke
@pytest.mark.parametrize("chunk", [1, pytest.param(2, marks=pytest.mark.slow), 7])
def test_cached_equals_full_forward(chunk):
    """Token by token and in pieces of two kinds, over the ends of blocks, in rows of different lengths."""
    tokens = random_tokens(3, TIME)
    cache, states = in_pieces(empty_cache(CONFIG, 3, CAPACITY), tokens, LENGTHS, chunk)
    assert_rows_close(states, hidden(PARAMS, tokens).states, LENGTHS)
    np.testing.assert_array_equal(cache.lengths, LENGTHS)


def test_a_prompt_then_tokens_then_a_piece():
    """The state after each way to write is that of any other: whole prompt, one token, several."""
    tokens, lengths = random_tokens(3, TIME), np.array([13, 4, 9], np.int32)
    expected = hidden(PARAMS, tokens).states
    prompt = hidden(PARAMS, tokens[:, :13], lengths=jnp.asarray(lengths), return_kv=True)
    cache = empty_cache(CONFIG, 3, CAPACITY).fill(prompt.kv, jnp.asarray(lengths), jnp.arange(3))
    appended = empty_cache(CONFIG, 3, CAPACITY).append(prompt.kv, jnp.asarray(lengths))
    for name in ("centroids", "open_sum", "raw_k"):
        np.testing.assert_allclose(getattr(cache, name), getattr(appended, name), atol=1e-6, err_msg=name)
    for chunk in (1, 1, 7, 1, 2):
        begin = jnp.asarray(lengths)[:, None] + jnp.arange(chunk)
        own = jnp.take_along_axis(tokens, begin, axis=1)
        count = jnp.full(3, chunk, jnp.int32)
        cache, states = step(LM, PARAMS, cache, own, count)
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(
                states[row], expected[row, length : length + chunk], rtol=0, atol=1e-4, err_msg=f"{row} {chunk}"
            )
        lengths = lengths + chunk


@pytest.mark.slow  # many programs to compile
def test_half_precision():
    """With blocks enough for all, so that no rounding changes a selection; as near float32 as without a cache."""
    config = hybrid(dataclasses.replace(ROUTED, moba=MobaConfig(BLOCK, 8)))
    lm, tokens = build(config), random_tokens(3, TIME)
    exact = random_params(config)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), exact)
    expected = jax.jit(lm.hidden)(exact, tokens).states
    whole = jax.jit(lm.hidden)(params, tokens).states
    cost = max(np.abs(whole[row, :length] - expected[row, :length]).max() for row, length in enumerate(LENGTHS))
    for chunk in (1, 5):
        cache = KVCache.init(config, batch=3, capacity=TIME + 3, dtype=jnp.bfloat16)
        cache, states = in_pieces(cache, tokens, LENGTHS, chunk, lm, params)
        assert states.dtype == cache.centroids.dtype == cache.raw_k.dtype == jnp.bfloat16
        for row, length in enumerate(LENGTHS):
            assert np.abs(states[row, :length].astype(np.float32) - expected[row, :length]).max() < 2 * cost


@pytest.mark.slow  # many programs to compile
def test_other_orders_of_layers_unstacked():
    config = hybrid(FULL, ROUTED, LOCAL)
    params, tokens = random_params(config), random_tokens(3, TIME)
    expected = jax.jit(build(config).hidden)(params, tokens).states
    cache = empty_cache(config, 3, CAPACITY)
    _, states = in_pieces(cache, tokens, LENGTHS, 5, build(config), build(config).unstack(params))
    assert_rows_close(states, expected, LENGTHS)


def test_rows_are_read_written_and_forgotten_by_themselves():
    """A piece of two rows in another order; a row that begins anew, however it was forgotten."""
    tokens = random_tokens(3, TIME)
    expected = hidden(PARAMS, tokens).states
    cache, _ = in_pieces(empty_cache(CONFIG, 3, CAPACITY), tokens, np.array([6, 7, 5], np.int32), 7)
    rows, count = jnp.array([2, 0, 3]), jnp.array([5, 3, 5])
    own = jnp.stack([tokens[2, 5:10], tokens[0, 6:11], tokens[1, :5]])
    cache, states = piece_of_rows(LM, PARAMS, cache, own, count, rows)
    np.testing.assert_allclose(states[0], expected[2, 5:10], rtol=0, atol=1e-4)
    np.testing.assert_allclose(states[1, :3], expected[0, 6:9], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(cache.lengths, [9, 7, 10])
    for forgotten in (cache.restart(jnp.array([1])), cache.replace(lengths=cache.lengths.at[1].set(0))):
        again = jnp.stack([tokens[2, :5]] * 3)  # two of them filler
        after, states = piece_of_rows(LM, PARAMS, forgotten, again, jnp.array([5, 5, 5]), jnp.array([1, 3, 3]))
        np.testing.assert_allclose(states[0], expected[2, :5], rtol=0, atol=1e-4)
        each = jnp.stack([tokens[0, 9], tokens[2, 5], tokens[2, 10]])[:, None]
        _, states = step(LM, PARAMS, after, each, jnp.ones(3, jnp.int32))
        for row, (source, position) in enumerate(((0, 9), (2, 5), (2, 10))):
            np.testing.assert_allclose(states[row, 0], expected[source, position], rtol=0, atol=1e-4)


def test_one_token_of_some_rows():
    """Through `CacheRows` too it reads the means that the cache holds."""
    tokens = random_tokens(3, TIME)
    cache, _ = in_pieces(empty_cache(CONFIG, 3, CAPACITY), tokens, np.array([13, 13, 10], np.int32), 7)
    own = jnp.stack([tokens[2, 10:11], tokens[0, 13:14]])
    _, states = piece_of_rows(LM, PARAMS, cache, own, jnp.ones(2, jnp.int32), jnp.array([2, 0]))
    expected = hidden(PARAMS, tokens).states
    np.testing.assert_allclose(states[:, 0], jnp.stack([expected[2, 10], expected[0, 13]]), rtol=0, atol=1e-4)


def test_a_step_reads_means_and_selected_blocks():
    """Of the keys themselves nothing but the selected blocks: what others hold does not matter, their means do."""
    config = hybrid(dataclasses.replace(ROUTED, moba=MobaConfig(BLOCK, 1)))
    params, tokens = random_params(config), random_tokens(1, TIME)
    cache, _ = in_pieces(
        empty_cache(config, 1, TIME + 3), tokens, np.array([TIME - 3], np.int32), 7, build(config), params
    )
    own, count = tokens[:, -3:-2], jnp.ones(1, jnp.int32)
    spoilt = cache.replace(k=cache.k.at[:, :, :24].set(jnp.nan), v=cache.v.at[:, :, :24].set(jnp.nan))
    assert int(cache.lengths[0]) // BLOCK * BLOCK == 24
    one, other = (step(build(config), params, c, own, count)[1] for c in (cache, spoilt))
    np.testing.assert_array_equal(one, other)
    # With a second place the means decide.
    lm = build(hybrid(ROUTED))
    turned = cache.replace(centroids=-cache.centroids)
    one, other = (step(lm, params, c, own, count)[1] for c in (cache, turned))
    assert np.abs(one - other).max() > 1e-2


@pytest.mark.parametrize("config", [hybrid(LOCAL, LayerAttention()), CONFIG], ids=["plain", "hybrid"])
def test_a_cache_has_what_its_model_needs(config):
    cache = KVCache.init(config, batch=2, capacity=10, dtype=jnp.bfloat16)
    shapes = {name: getattr(cache, name) for name in ("centroids", "open_sum", "raw_k")}
    if config is not CONFIG:
        assert shapes == {"centroids": None, "open_sum": None, "raw_k": None} and len(jax.tree.leaves(cache)) == 3
        return
    found = {name: (leaf.shape, leaf.dtype) for name, leaf in shapes.items()}
    assert found == {
        "centroids": ((4, 2, 3, 2, 16), jnp.bfloat16),
        "open_sum": ((4, 2, 2, 16), jnp.float32),
        "raw_k": ((4, 2, TAPS - 1, 2, 16), jnp.bfloat16),
    }


def test_a_convolution_alone_works_on_codes():
    config = hybrid(FULL, LOCAL)
    params, tokens = random_params(config), random_tokens(3, TIME)
    cache = KVCache.init(config, batch=3, capacity=TIME + 3, dtype=jnp.float32, codes=KVCodes("int8"))
    _, states = in_pieces(cache, tokens, LENGTHS, 4, build(config), params)
    expected = jax.jit(build(config).hidden)(params, tokens).states
    for row, length in enumerate(LENGTHS):
        assert np.abs(states[row, :length] - expected[row, :length]).max() < 0.05 * np.abs(expected).max()


def test_cache_refusals():
    plain = hybrid(*[LayerAttention()] * 4)
    sizes = {"batch": 1, "capacity": 8, "dtype": jnp.float32}
    token = random_tokens(1, 1)
    for what, layer in (("that select blocks", dataclasses.replace(ROUTED, key_conv=None)), ("with a key conv", FULL)):
        config = hybrid(*[layer] * 4)
        with pytest.raises(NotImplementedError, match=f"a ring forgets what layers {what}.* need; use a KVCache"):
            SinkRingCache.init(config, **sizes)
        with pytest.raises(NotImplementedError, match=f"a ring forgets what layers {what}"):
            build(config).hidden(random_params(config), token, cache=SinkRingCache.init(plain, **sizes))
    for codes in (KVCodes("int8"), KVCodes("fp8")):
        with pytest.raises(
            NotImplementedError, match=rf"moba\) read keys and values as they are; got codes '{codes[0]}'"
        ):
            KVCache.init(CONFIG, **sizes, codes=codes)
    with pytest.raises(ValueError, match="holds the means of blocks of a size: None; the model has 4"):
        LM.hidden(PARAMS, token, cache=KVCache.init(plain, **sizes))
    with pytest.raises(ValueError, match="holds the means of blocks of a size: 4; the model has None"):
        build(plain).hidden(random_params(plain), token, cache=KVCache.init(CONFIG, **sizes))
    with pytest.raises(ValueError, match="the raw keys for a number of taps: 3; the model has 2"):
        other = hybrid(*[dataclasses.replace(ROUTED, key_conv=2)] * 4)
        build(other).hidden(random_params(other), token, cache=CacheRows(KVCache.init(CONFIG, **sizes), jnp.arange(1)))
    with pytest.raises(ValueError, match=r"needs the mask Causal\(\); got Full"):
        LM.hidden(PARAMS, token, cache=KVCache.init(CONFIG, **sizes), own_mask=Full())
    with pytest.raises(ValueError, match="kv must hold raw keys"):
        kv = LM.hidden(PARAMS, token, return_kv=True).kv
        KVCache.init(CONFIG, **sizes).append(kv._replace(raw_k=None))


def test_a_step_writes_in_place_and_copies_no_layer():
    lm = build(hybrid(LOCAL, ROUTED))
    params = lm.unstack(random_params(lm.config))
    cache = KVCache.init(lm.config, batch=2, capacity=4096, dtype=jnp.float32)

    def decode(params, cache, token):
        found = lm.hidden(params, token, cache=cache)
        return cache.append(found.kv), found.states

    token = jnp.zeros((2, 1), jnp.int32)
    memory = jax.jit(decode, donate_argnums=1).lower(params, cache, token).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert memory.temp_size_in_bytes < cache.k[0].nbytes


# ----------------------------------------------------------------------------------------------------
# Presets, conversion, files


@pytest.mark.parametrize(("preset", "millions"), [(QwenConfig.moba_340m, 341), (QwenConfig.moba_1b, 1676)])
def test_presets(preset, millions):
    config = preset()
    layers = config.layer_attention
    assert layers[::2] == (LayerAttention(window=256),) * 12
    assert layers[1::2] == (LayerAttention(moba=MobaConfig(128, 8), key_conv=3, rotary=False),) * 12
    shapes = jax.eval_shape(build(config).init, jax.random.key(0))
    assert round(sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6) == millions
    assert preset(MobaConfig(512, 2), 5).layer_attention[1] == LayerAttention(None, MobaConfig(512, 2), 5, False)
    assert preset(None, None).layer_attention[1] == LayerAttention(rotary=False)


@pytest.mark.parametrize("key_conv", [None, TAPS])
def test_a_converted_model_is_the_same_function_up_to_its_blocks(key_conv):
    dense = QwenConfig.tiny(dim=32, mlp_dim=48, head_dim=16, vocab_size=61)
    params, tokens = random_params(dense), random_tokens(2, TIME)
    config, routed = route_layers(dense, params, (0, 2), moba=MobaConfig(BLOCK, 3), key_conv=key_conv)
    chosen = LayerAttention(moba=MobaConfig(BLOCK, 3), key_conv=key_conv)
    assert config == dataclasses.replace(dense, layer_attention=(chosen, LayerAttention(), chosen))
    assert jax.tree.map(jnp.shape, routed) == jax.tree.map(jnp.shape, build(config).init(jax.random.key(0)))
    before, after = (jax.jit(build(c).hidden)(p, tokens).states for c, p in ((dense, params), (config, routed)))
    np.testing.assert_allclose(after[:, : 3 * BLOCK], before[:, : 3 * BLOCK], rtol=0, atol=1e-5)
    assert np.abs(after[:, 3 * BLOCK :] - before[:, 3 * BLOCK :]).max() > 1e-2
    more, _ = route_layers(config, routed, [1], moba=MobaConfig(BLOCK, 3), key_conv=key_conv)
    assert more.layer_attention == (chosen,) * 3


def test_conversions_that_are_refused():
    moba = MobaConfig(BLOCK, TOP_K)
    with pytest.raises(ValueError, match=r"layer 0 must have full attention and no key convolution; got .*window=6"):
        route_layers(CONFIG, PARAMS, [0], moba=moba)
    with pytest.raises(ValueError, match=r"layers must lie in \[0, 4\); got 4"):
        route_layers(CONFIG, PARAMS, [4], moba=moba)
    with pytest.raises(ValueError, match="key_conv must be the 3 taps that other layers have; got 2"):
        route_layers(CONFIG, PARAMS, [], moba=moba, key_conv=2)
    dense = hybrid(LayerAttention())
    with pytest.raises(ValueError, match="must be stacked"):
        route_layers(dense, build(dense).unstack(random_params(dense)), [0], moba=moba, key_conv=2)


def cleared(config: QwenConfig, params):
    """Without the taps of layers that have none, which no file stores."""
    with_taps = jnp.array([layer.key_conv is not None for layer in config.layer_attention])
    attention = dict(params["layers"]["attention"])
    attention["k_conv"] = jnp.where(with_taps[:, None, None, None], attention["k_conv"], 0)
    return params | {"layers": params["layers"] | {"attention": attention}}


NAMES = {name for row in table(CONFIG, Layout()) for name in row.names(CONFIG.layers)}


@pytest.mark.parametrize("qk_norm", [True, False])
def test_saved_models_are_read_back_bit_by_bit(tmp_path, qk_norm):
    config = dataclasses.replace(CONFIG, qk_norm=qk_norm)
    lm, params = build(config), cleared(config, random_params(config))
    save_pretrained(tmp_path / "model", lm, params)
    names = Checkpoint(tmp_path / "model").names()
    assert {name for name in names if "k_conv" in name} == {f"model.layers.{n}.self_attn.k_conv.weight" for n in (1, 3)}
    found = load_pretrained(tmp_path / "model")
    assert found.config == config
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
    stored = json.loads((tmp_path / "model" / "config.json").read_text())
    assert {name: stored[name] for name in ("model_type", "layer_types", "moba_block_size", "moba_top_k")} == {
        "model_type": "qwen_moba", "layer_types": ["sliding_attention", "moba_attention"] * 2,
        "moba_block_size": BLOCK, "moba_top_k": TOP_K,
    }  # fmt: skip
    assert stored["key_conv_taps"] == TAPS
    assert stored["layer_key_conv"] == [False, True] * 2 and stored["layer_rotary"] == [True, False] * 2


def test_convolutions_of_pytorch_are_turned(tmp_path):
    """[channels, 1, taps], the last tap weighing the current token; a tensor of another shape is refused."""
    params = cleared(CONFIG, PARAMS)
    save_pretrained(tmp_path, LM, params)
    source = Checkpoint(tmp_path)
    tensors = {name: np.array(source.view(name)) for name in source.names()}
    name = "model.layers.1.self_attn.k_conv.weight"
    ours = tensors[name]
    assert ours.shape == (TAPS, 32)
    np.testing.assert_array_equal(ours[0], params["layers"]["attention"]["k_conv"][1, 0].reshape(-1))
    theirs = np.stack([ours[TAPS - 1 - tap] for tap in range(TAPS)], axis=-1)[:, None]
    write_weights(tmp_path, tensors | {name: theirs}, max_shard_bytes=10**9)
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(tmp_path).params, params)
    write_weights(tmp_path, tensors | {name: ours.T.copy()}, max_shard_bytes=10**9)
    with pytest.raises(ValueError, match=rf"tensor '{name}' has shape \(32, 3\); config.json implies \(3, 32\)"):
        load_pretrained(tmp_path)
    write_weights(tmp_path, tensors | {name.replace("1", "0"): ours}, max_shard_bytes=10**9)
    with pytest.raises(ValueError, match=r"nothing uses: model\.layers\.0\.self_attn\.k_conv\.weight"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    "layers",
    [
        (LOCAL, ROUTED),
        (ROUTED, FULL, LayerAttention(), LOCAL),
        (LayerAttention(rotary=False), LayerAttention()),
        (LayerAttention(window=6, key_conv=1),) * 2,
    ],
    ids=["hybrid", "all different", "rotation", "convolved window"],
)
def test_layers_are_written_and_read(layers):
    for config in (hybrid(*layers), dataclasses.replace(hybrid(*layers), block_size=16, token_shift=True)):
        written = config_to_hf(config, dtype="float32")
        assert written["model_type"] == "qwen_moba"
        assert config_from_hf(written, {"model.embed_tokens.weight", "lm_head.weight"}) == config, "without weights too"


def test_any_qwen_can_be_written_so():
    config = QwenConfig.tiny()
    written = config_to_hf(config, dtype="float32", family="qwen_moba")
    names = {name for row in table(config, Layout()) for name in row.names(config.layers)}
    assert config_from_hf(written, names) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"moba_top_k": None}, "'moba_top_k' must be an integer; got None"),
        ({"moba_block_size": "128"}, "'moba_block_size' must be an integer; got '128'"),
        ({"moba_block_size": 0}, "block_size of moba must be at least 1; got 0"),
        ({"key_conv_taps": None}, "'key_conv_taps' must be an integer; got None"),
        ({"layer_key_conv": None}, "'key_conv_taps' is 3, but for no layer 'layer_key_conv' is true"),
        ({"layer_types": ["sliding_attention"] * 4}, "'moba_block_size' is 4, but for no layer 'layer_types' has moba"),
        ({"layer_key_conv": [True]}, r"'layer_key_conv' must say true or false of 4 layers; got \[True\]"),
        ({"layer_rotary": [1, 0, 1, 0]}, r"'layer_rotary' must say true or false of 4 layers; got \[1, 0, 1, 0\]"),
        ({"layer_types": ["moba"] * 4}, "'layer_types' has 'moba'; known: .*, moba_attention"),
        ({"layer_types": None}, "field 'layer_types' is missing"),
        ({"qk_norm": None}, "field 'qk_norm' is missing"),
        ({"qkv_bias": 0}, "'qkv_bias' must be true or false; got 0"),
        ({"attention_bias": True}, "'attention_bias' is true; implemented for 'qwen_moba': false"),
        ({"model_type": "qwen3"}, "unknown fields key_conv_taps=3, layer_key_conv=.*, moba_top_k=2"),
    ],
)
def test_fields_that_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf(config_to_hf(CONFIG, dtype="float32") | fields, NAMES)


def test_what_no_file_can_hold():
    with pytest.raises(ValueError, match="family 'qwen3' cannot express layers with moba"):
        config_to_hf(CONFIG, dtype="float32", family="qwen3")
    two = hybrid(ROUTED, dataclasses.replace(ROUTED, moba=MobaConfig(BLOCK, 3)))
    with pytest.raises(ValueError, match=r"moba of several kinds .*top_k=2.*top_k=3.*; config.json holds one"):
        config_to_hf(two, dtype="float32")
