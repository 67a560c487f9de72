"""Skip-softmax in whole models: checkpoint configuration, calibration, forward passes."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels import load_pretrained, save_pretrained
from jaxmodels.cache import KVCache, SinkRingCache
from jaxmodels.qwen import build
from jaxmodels.qwen.config import QwenConfig, sliding_windows
from jaxmodels.sparse_attention import (
    Phase,
    ScaleFit,
    SkipAttention,
    SkipMeasure,
    SkipSoftmaxConfig,
    fit_inverse_length,
    fit_threshold_scale,
    measure_decode_sparsity,
    measure_sparsity,
)
from jaxmodels.sparse_attention.calibration import TRIAL_THRESHOLDS
from pallas_kernels import flash_attention
from pallas_kernels.attention.skip import DECODE_TILE, SkipTile

# ------------------------------------------------------------------------------------------------------------------
# config.json

LANGUAGE = {
    "config_groups": {
        "group_0": {
            "algorithm": "skip_softmax",
            "threshold_scale_factor": {
                "formula": "a * exp(b * target_sparsity)",
                "prefill": {"a": 100.0, "b": 5.0},
                "decode": {"a": 0.05, "b": 10.0},
            },
            "target_sparsity": {"prefill": 0.5, "decode": 0.3},
            "ignore": ["model.layers.0.self_attn", "layers.2.*"],
        }
    }
}
DIFFUSION = {
    "config_groups": {
        "group_0": {
            "algorithm": "skip_softmax",
            "targets": ["WanAttention"],
            "threshold_scale_factor": {
                "formula": "a*exp(b*target_sparsity)",
                "coefficients": {"a": 2822.62, "b": 4.38825},
            },
            "target_sparsity": 0.7,
            "disabled_until_timestep": 0.93,
        }
    }
}
OLDER = {
    "config_groups": {"group_0": {"sparse_algo": "softmax_skip", "targets": ["LlamaAttention"]}},
    "threshold_scale_factor": {
        "formula": "a * exp(b * target_sparsity)",
        "prefill": {"log_a": math.log(7.93), "b": 8.61},
        "decode": {"a": 0.12, "b": 9.85},
    },
    "target_sparse_ratio": 0.5,
    "producer": {"name": "modelopt", "version": "0.37.0"},
}
BARE = {
    "prefill": {"a": 7.93, "b": 8.61},
    "decode": {"log_a": -2.0, "b": 9.85},
    "target_sparse_ratio": {"prefill": 0.4},
}


def test_reads_all_layouts_of_the_field():
    language = SkipSoftmaxConfig.from_hf(LANGUAGE)
    assert language.prefill == Phase(ScaleFit(100.0, 5.0), target_sparsity=0.5)
    assert language.decode == Phase(ScaleFit(0.05, 10.0), target_sparsity=0.3)
    assert language.scale_factor("prefill") == pytest.approx(100 * math.exp(2.5))
    assert language.scale_factor("decode", 0.6) == pytest.approx(0.05 * math.exp(6))
    assert language.dense_layers([f"model.layers.{i}.self_attn" for i in range(4)]) == (0, 2)

    diffusion = SkipSoftmaxConfig.from_hf(DIFFUSION)
    assert diffusion.prefill == Phase(ScaleFit(2822.62, 4.38825), target_sparsity=0.7) and diffusion.decode is None
    assert diffusion.disabled_until_timestep == 0.93 and diffusion.targets == ("WanAttention",)

    older = SkipSoftmaxConfig.from_hf(OLDER)
    assert older.prefill.fit.a == pytest.approx(7.93) and older.prefill.target_sparsity == 0.5
    assert older.decode == Phase(ScaleFit(0.12, 9.85), target_sparsity=0.5)

    bare = SkipSoftmaxConfig.from_hf(BARE)
    assert bare.decode.fit.a == pytest.approx(math.exp(-2)) and bare.decode.target_sparsity is None
    assert bare.scale_factor("prefill") == pytest.approx(7.93 * math.exp(8.61 * 0.4))

    numbers = SkipSoftmaxConfig.from_hf(
        {"config_groups": {"x": {"algorithm": "skip_softmax", "threshold_scale_factor": {"prefill": 1000.0}}}}
    )
    assert numbers.scale_factor("prefill") == 1000.0 and numbers.decode is None


def test_what_is_written_reads_back():
    config = SkipSoftmaxConfig(
        Phase(ScaleFit(7.9, 8.6), None, 0.5, SkipTile(32, 64)),
        Phase(ScaleFit(0.1, 9.9), None, 0.25, SkipTile(width=32, chains=4)),
        ignore=("model.layers.1.self_attn",),
    )
    written = json.loads(json.dumps(config.to_hf()))
    assert SkipSoftmaxConfig.from_hf(written) == config
    group = written["config_groups"]["group_0"]
    assert group["algorithm"] == "skip_softmax" and group["skip_tile"]["prefill"] == {"rows": 32, "width": 64}
    for block in (LANGUAGE, DIFFUSION, OLDER):
        once = SkipSoftmaxConfig.from_hf(block)
        assert SkipSoftmaxConfig.from_hf(once.to_hf()) == once


def group(**changes):
    return {"config_groups": {"group_0": {**LANGUAGE["config_groups"]["group_0"], **changes}}}


BAD_BLOCKS = {
    "not an object": ([], "sparse_attention_config must be an object; got"),
    "another algorithm": (group(algorithm="rocket"), "algorithm 'rocket' is not implemented"),
    "unknown key": (group(block_topk=16), "unknown key 'block_topk' = 16"),
    "formula": (group(threshold_scale_factor={"formula": "a + b"}), r"formula 'a \+ b' is not implemented"),
    "coefficients": (group(threshold_scale_factor={"prefill": {"a": 1.0}}), "must have 'b' and either 'a' or 'log_a'"),
    "both": (group(threshold_scale_factor={"prefill": {"a": 1.0, "log_a": 0.0, "b": 1.0}}), "either 'a' or 'log_a'"),
    "negative": (group(threshold_scale_factor={"prefill": {"a": -1.0, "b": 1.0}}), "a positive; got a=-1.0"),
    "words": (group(threshold_scale_factor={"prefill": {"a": "x", "b": 1.0}}), "coefficients must be numbers"),
    "target": (group(target_sparsity={"prefill": 1.5}), r"target_sparsity of 'prefill' must lie in \[0, 1\); got 1.5"),
    "tile": (group(skip_tile={"prefill": {"rows": 3}}), r"must have the keys \('rows', 'width'\)"),
    "timestep": (group(disabled_until_timestep=3), r"disabled_until_timestep must lie in \[0, 1\]; got 3"),
    "two groups": ({"config_groups": {"a": {}, "b": {}}}, r"has the groups \['a', 'b'\]; implemented: one"),
    "ignore": (group(ignore="layers.0"), "ignore must be a list of strings"),
    "nothing": ({"config_groups": {}}, "names no algorithm"),
}


@pytest.mark.parametrize("name", BAD_BLOCKS)
def test_bad_blocks_are_explained(name):
    block, match = BAD_BLOCKS[name]
    with pytest.raises(ValueError, match=match):
        SkipSoftmaxConfig.from_hf(block)


def test_missing_choices_are_explained():
    config = SkipSoftmaxConfig.from_hf(BARE)
    with pytest.raises(ValueError, match="names no target sparsity for 'decode'; give one"):
        config.scale_factor("decode")
    with pytest.raises(ValueError, match="has nothing for 'decode'; calibrate it"):
        SkipSoftmaxConfig.from_hf(DIFFUSION).scale_factor("decode", 0.5)
    fixed = SkipSoftmaxConfig(Phase(factor=100.0))
    with pytest.raises(ValueError, match=r"has the scale factor 100.0 .* but no coefficients"):
        fixed.scale_factor("prefill", 0.5)


# ------------------------------------------------------------------------------------------------------------------
# Calibration

QWEN3_30B = {  # published scale factors of Qwen3-30B-A3B-Instruct-2507: sparsity -> (prefill, decode)
    0.1: (18.76, 0.32), 0.2: (44.37, 0.86), 0.3: (104.97, 2.30), 0.4: (248.40, 6.17), 0.5: (587.18, 16.52),
    0.6: (1390.63, 44.26), 0.7: (3293.04, 118.62), 0.8: (7799.91, 317.99), 0.9: (18471.56, 852.20),
}  # fmt: skip


@pytest.mark.parametrize("phase,a,b", [(0, 7.92, 8.615), (1, 0.1196, 9.857)])
def test_refits_a_published_table(phase, a, b):
    length = 1e6
    thresholds = [factors[phase] / length for factors in QWEN3_30B.values()]
    # Sample i has the sparsity of threshold i alone; all others lie outside of the fitted range.
    sparsities = np.where(np.eye(9, dtype=bool), [*QWEN3_30B], 1.0)
    fit = fit_threshold_scale(thresholds, [length] * 9, sparsities)
    assert fit.a == pytest.approx(a, rel=0.01) and fit.b == pytest.approx(b, rel=0.01)
    for sparsity, factors in QWEN3_30B.items():
        assert fit.scale_factor(sparsity) == pytest.approx(factors[phase], rel=0.02)


def test_recovers_synthetic_coefficients():
    a, b = 12.5, 7.25
    lengths = np.array([4096, 8192, 16384, 65536])
    thresholds = np.array(TRIAL_THRESHOLDS)
    sparsities = (np.log(thresholds * lengths[:, None]) - np.log(a)) / b
    sparsities = np.clip(sparsities, 0.0, 1.0)  # what lies outside is saturated, and must not take part
    fit = fit_threshold_scale(thresholds, lengths, sparsities)
    assert abs(fit.a / a - 1) < 1e-6 and abs(fit.b / b - 1) < 1e-6
    target = 0.45
    factor = a * math.exp(b * target)
    assert fit_inverse_length(factor / lengths, lengths) == pytest.approx(factor, rel=1e-6)


def test_hopeless_fits_are_explained():
    with pytest.raises(ValueError, match=r"only 0 different sparsities lie in \[0.1, 0.9\].*0.000 to 0.050"):
        fit_threshold_scale([0.1, 0.2], [100], [[0.0, 0.05]])
    with pytest.raises(ValueError, match=r"sparsities must have shape \(2, 2\)"):
        fit_threshold_scale([0.1, 0.2], [100, 200], [[0.1, 0.2]])
    with pytest.raises(ValueError, match="thresholds must lie in"):
        fit_threshold_scale([0.1, 1.2], [100], [[0.1, 0.2]])
    with pytest.raises(ValueError, match="equally many"):
        fit_inverse_length([0.1], [1, 2])


def random_heads(time=60, heads=4, kv_heads=2, seed=0):
    rng = np.random.default_rng(seed)
    q = jnp.asarray(rng.normal(size=(2, time, heads, 8)), jnp.float32)
    k = jnp.asarray(rng.normal(size=(2, time, kv_heads, 8)) * 1.5, jnp.float32)
    return q, k


def test_measures_what_attention_skips():
    q, k = random_heads()
    thresholds, tile = (0.01, 0.1, 0.3, 0.6), SkipTile(4, 8)
    visited, skipped = jax.jit(functools.partial(measure_sparsity, tile=tile))(q, k, jnp.asarray(thresholds))
    for j, threshold in enumerate(thresholds):
        _, stats = flash_attention(q, k, k, skip_threshold=threshold, skip_tile=tile, return_stats=True)
        np.testing.assert_array_equal(visited, stats.visited.sum(1))
        np.testing.assert_array_equal(skipped[:, j], stats.skipped.sum(1))
    assert (np.diff(skipped, axis=1) > 0).all()


def test_measures_what_decode_steps_would_skip():
    """Against loops over tokens, key heads, chains and tiles."""
    q, k = random_heads(time=50)
    tile, thresholds, lengths = SkipTile(width=4, chains=3), (0.1, 0.4, 0.8), (50, 3)
    got = jax.jit(functools.partial(measure_decode_sparsity, tile=tile, num_tokens=5))(
        q, k, jnp.asarray(thresholds), lengths=jnp.asarray(lengths)
    )
    visited, skipped = np.zeros(2, int), np.zeros((2, 3), int)
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    for b in range(2):
        for p in range(max(0, lengths[b] - 5), lengths[b]):
            for head in range(2):
                scores = q[b, p, 2 * head : 2 * head + 2] @ k[b, :p, head].T * 8**-0.5
                tops = [scores[:, t : t + 4].max(axis=1) for t in range(0, p, 4)]
                for t, top in enumerate(tops):
                    visited[b] += 1
                    before = [tops[i] for i in range(t) if i % 3 == t % 3]
                    if before:
                        gap = (top - np.max(before, axis=0)).max()
                        skipped[b] += gap < np.log(thresholds)
    np.testing.assert_array_equal(got[0], visited)
    np.testing.assert_array_equal(got[1], skipped)
    assert skipped[0, 0] < skipped[0, 2]


# ------------------------------------------------------------------------------------------------------------------
# Forward passes

TILE = SkipTile(4, 8)
CONFIG = QwenConfig.tiny(layers=3, layer_attention=sliding_windows(None, 16, None))
LM = build(CONFIG)


@functools.cache
def weights():
    """Random weights with attention sharp enough to skip."""
    params = LM.init(jax.random.key(0))
    attention = params["layers"]["attention"]
    attention["q_norm"] = attention["q_norm"] * 6.0
    return params


@functools.cache
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(3, 97, (2, 56)), jnp.int32)


hidden = jax.jit(LM.hidden, static_argnames="skip_stats")


@pytest.mark.slow  # many programs to compile
def test_settings_reach_every_full_layer():
    # What many thresholds would skip is counted in one dense pass.
    measure = SkipMeasure.create((1e-3, 0.1, 0.5), prefill=TILE, decode=SkipTile(width=4, chains=2))
    dense = hidden(weights(), tokens(), skip_measure=measure)
    assert dense.skip_stats is None
    counts = dense.skip_counts
    assert counts.skipped.shape == (3, 2, 3) and counts.decode_skipped.shape == (3, 2, 3)
    assert (counts.skipped[1] == 0).all() and (counts.decode_visited[::2] > 0).all()  # layer 1 has a window

    skip = SkipAttention.create(threshold=0.1, tile=TILE)
    got = hidden(weights(), tokens(), skip=skip, skip_stats=True)
    assert got.skip_stats.skipped.shape == (3, 2, 4)
    skipped = got.skip_stats.skipped.sum((1, 2))
    assert skipped[0] > 0 and skipped[1] == 0 and skipped[2] > 0
    assert np.abs(got.states - dense.states).max() > 1e-3
    # In the first layer, whose input is the same, that pass skipped what had been counted.
    np.testing.assert_array_equal(counts.skipped[0, :, 1], got.skip_stats.skipped[0].sum(-1))
    np.testing.assert_array_equal(counts.visited[0], got.skip_stats.visited[0].sum(-1))
    # Another number compiles nothing new.
    count = hidden._cache_size()
    more = hidden(weights(), tokens(), skip=skip.replace(threshold=0.5), skip_stats=True)
    assert more.skip_stats.skipped.sum() > got.skip_stats.skipped.sum()
    nothing = hidden(weights(), tokens(), skip=skip.replace(threshold=1e-30), skip_stats=True)
    np.testing.assert_allclose(nothing.states, dense.states, atol=1e-4)
    assert hidden._cache_size() == count


def test_dense_layers_and_lengths():
    skip = SkipAttention.create(scale_factor=8.0, tile=TILE, dense_layers=(2,))
    got = hidden(weights(), tokens(), skip=skip, skip_stats=True)
    assert got.skip_stats.skipped[0].sum() > 0 and got.skip_stats.skipped[2].sum() == 0
    np.testing.assert_array_equal(got.skip_stats.dense_guarded, [0, 0, 2])
    # A padded row is read as it would be alone: L is its own length, and padding has no vote.
    lengths = jnp.asarray([41, 56])
    padded = hidden(weights(), tokens(), lengths=lengths, skip=skip, skip_stats=True)
    alone = hidden(weights(), tokens()[:1, :41], skip=skip, skip_stats=True)
    np.testing.assert_allclose(padded.states[0, :41], alone.states[0], atol=1e-4)
    np.testing.assert_array_equal(padded.skip_stats.visited[:, 0], alone.skip_stats.visited[:, 0])
    np.testing.assert_array_equal(padded.skip_stats.skipped[:, 0], alone.skip_stats.skipped[:, 0])


def test_gradients_follow_the_skipped_forward_pass():
    skip = SkipAttention.create(threshold=0.2, tile=TILE)

    @jax.jit
    def value_and_slope(scale):
        def loss(scale):
            params = {**weights(), "embed": weights()["embed"] * scale}
            return LM.hidden(params, tokens(), skip=skip, remat="attention").states[..., 0].sum()

        return jax.value_and_grad(loss)(scale)

    step = 1e-3
    difference = (value_and_slope(1 + step)[0] - value_and_slope(1 - step)[0]) / (2 * step)
    assert value_and_slope(1.0)[1] == pytest.approx(float(difference), rel=2e-2)


def test_bad_settings_are_explained():
    with pytest.raises(ValueError, match="give threshold or scale_factor; for dense attention pass skip=None"):
        SkipAttention.create()
    with pytest.raises(ValueError, match=r"skip_threshold must be inside \(0, 1\).*got 1.5"):
        SkipAttention.create(threshold=1.5)
    with pytest.raises(ValueError, match="not both"):
        SkipAttention.create(threshold=0.5, scale_factor=3.0)
    with pytest.raises(ValueError, match="chains are for decode_attention"):
        LM.hidden(weights(), tokens(), skip=SkipAttention.create(threshold=0.5, tile=SkipTile(chains=2)))
    with pytest.raises(ValueError, match="skip_stats counts skipped tiles: give skip"):
        LM.hidden(weights(), tokens(), skip_stats=True)
    ring = SinkRingCache.init(CONFIG, batch=2, capacity=64, dtype=jnp.float32)
    with pytest.raises(ValueError, match="tiles are skipped in full attention only, and a ring is a window"):
        LM.hidden(weights(), tokens(), cache=ring, skip=SkipAttention.create(threshold=0.1))
    with pytest.raises(NotImplementedError, match="skip_measure counts in passes over all tokens"):
        LM.hidden(weights(), tokens(), cache=ring, skip_measure=SkipMeasure.create())


def test_steps_with_a_cache_skip_tiles_of_it():
    """A step skips what a measuring pass over all tokens had counted for its last token."""
    tile = SkipTile(width=4, chains=2)
    measure = SkipMeasure.create((0.1, 0.5), prefill=TILE, decode=tile, decode_tokens=1)
    counts = hidden(weights(), tokens(), skip_measure=measure).skip_counts
    before = jax.jit(lambda params, tokens: LM.hidden(params, tokens, return_kv=True).kv)(weights(), tokens()[:, :-1])
    cache = KVCache.init(CONFIG, batch=2, capacity=64, dtype=jnp.float32).append(before)

    @jax.jit
    def step(threshold):
        skip = SkipAttention.create(threshold=threshold, tile=tile)
        return LM.hidden(weights(), tokens()[:, -1:], cache=cache, skip=skip, skip_stats=True)

    got = step(jnp.float32(0.5))
    assert got.skip_stats.skipped.shape == (3, 2, CONFIG.kv_heads) and got.skip_stats.skipped[1].sum() == 0
    np.testing.assert_array_equal(got.skip_stats.skipped[0].sum(-1), counts.decode_skipped[0, :, 1])
    np.testing.assert_array_equal(got.skip_stats.visited[0].sum(-1), counts.decode_visited[0])
    assert got.skip_stats.skipped[0].sum() > 0
    dense = LM.hidden(weights(), tokens()[:, -1:], cache=cache).states
    np.testing.assert_allclose(step(jnp.float32(1e-30)).states, dense, atol=1e-4)
    assert np.abs(got.states - dense).max() > 1e-4


def test_a_checkpoints_calibration_is_used(tmp_path):
    lm = build(QwenConfig.tiny(layers=2))
    save_pretrained(tmp_path / "model", lm, lm.init(jax.random.key(0)))
    plain = load_pretrained(tmp_path / "model")
    assert plain.sparse_attention is None
    with pytest.raises(ValueError, match="target_sparsity needs a calibrated sparse_attention_config in "):
        plain.skip(target_sparsity=0.5)
    assert plain.skip(scale_factor=9.0) == SkipAttention(scale_factor=9.0)
    assert plain.skip("decode", scale_factor=9.0).tile == DECODE_TILE
    path = tmp_path / "model" / "config.json"
    content = json.loads(path.read_text())
    block = group(ignore=["model.layers.0.self_attn"], skip_tile={"prefill": {"rows": 8, "width": 16}})
    path.write_text(json.dumps(content | {"sparse_attention_config": block}))
    model = load_pretrained(tmp_path / "model")
    skip = model.skip(target_sparsity=0.2)
    assert skip == SkipAttention(None, pytest.approx(100 * math.exp(1.0)), SkipTile(8, 16), (0,))
    assert model.skip().scale_factor == pytest.approx(100 * math.exp(2.5))
    assert model.skip(threshold=0.1).tile == SkipTile(8, 16)
    assert model.skip("decode").scale_factor == pytest.approx(0.05 * math.exp(3.0))
    logits = model.apply(model.params, tokens(), skip=skip)
    assert logits.shape == (2, 56, 97)
    with pytest.raises(ValueError, match="give one of target_sparsity, threshold and scale_factor"):
        model.skip(target_sparsity=0.2, threshold=0.1)
    path.write_text(json.dumps(content | {"sparse_attention_config": group(algorithm="rocket")}))
    with pytest.raises(ValueError, match=r"config.json: .*algorithm 'rocket' is not implemented"):
        load_pretrained(tmp_path / "model")
    ignoring = load_pretrained(tmp_path / "model", ignore_config=["sparse_attention_config"])
    assert ignoring.sparse_attention is None
