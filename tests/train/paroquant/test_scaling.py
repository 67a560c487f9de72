"""Activation-aware scales: the activations are the linears' own, and outliers profit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.checkpoints.mapping import flatten
from jaxmodels.qwen import QwenConfig, build
from pallas_kernels.quantized_matmul import QuantizedTensor, quantized_matmul
from pallas_kernels.quantized_matmul.rounding import round_weight
from train.paroquant.scaling import SHARED, _inputs, _search, scale_model

# More values of heads than the model is wide, and fewer: the identity goes through in pieces.
CONFIGS = {
    "wide heads": QwenConfig.tiny(layers=2, dim=64, heads=4, kv_heads=2, head_dim=32, mlp_dim=96),
    "narrow heads": QwenConfig.tiny(layers=2, dim=64, heads=2, kv_heads=1, head_dim=16, mlp_dim=96),
}


def model(name):
    lm = build(CONFIGS[name])
    params = jax.tree.map(lambda x: x * 6 if x.ndim > 2 else x, lm.init(jax.random.key(0)))
    tokens = jax.random.randint(jax.random.key(1), (4, 24), 3, 97)
    rows = {
        "tokens": tokens,
        "positions": jnp.tile(jnp.arange(24), (4, 1)),
        "segment_ids": jnp.ones((4, 24), jnp.int32),
    }
    return lm, params, {key: np.asarray(x) for key, x in rows.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_inputs_of_the_linears_make_the_block(name):
    lm, params, rows = model(name)
    own = {path: leaf[0] for path, leaf in flatten(params["layers"]).items()}
    states = jax.random.normal(jax.random.key(2), (4, 24, 64))
    about = {key: jnp.asarray(rows[key]) for key in ("positions", "segment_ids")}
    inputs = _inputs(lm, own, states, about, 0)
    attended, gated = inputs[("attention", "o")], inputs[("mlp", "down")]
    assert attended.shape[-1] == lm.config.heads * lm.config.head_dim
    found = states + attended @ own[("attention", "o")].reshape(64, -1).T + gated @ own[("mlp", "down")].T
    layer = jax.tree.map(lambda leaf: leaf[0], params["layers"])
    np.testing.assert_allclose(found, lm.block(layer, states, layer=0, **about), atol=2e-5)


def test_channels_with_large_activations_are_rounded_better():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 128))
    x[:, ::32] *= 30
    x, weight = jnp.asarray(x, jnp.float32), jnp.asarray(rng.normal(size=(64, 128)), jnp.float32)
    power, [scaled] = _search(x, [weight], 32)
    errors = [
        float(jnp.linalg.norm(quantized_matmul(x, own) - x @ weight.T))
        for own in (scaled, round_weight(weight, "int4", group_size=32))
    ]
    assert power > 0 and errors[0] < 0.5 * errors[1]


def test_a_model_is_scaled_linear_by_linear():
    lm, params, rows = model("wide heads")
    scaled, powers = scale_model(lm, params, rows, group_size=32)
    assert set(powers) == {".".join(path) for group in SHARED for path in group}
    assert powers["mlp.gate"] == powers["mlp.up"] and len(powers["mlp.gate"]) == 2, "scales are shared"
    for path in lm.linears:
        weight = flatten(scaled)[path]
        assert isinstance(weight, QuantizedTensor) and weight.shape == flatten(params)[path].shape[1:]
    tokens = jnp.asarray(rows["tokens"])
    exact = lm.apply(params, tokens)
    assert float(jnp.linalg.norm(lm.apply(scaled, tokens) - exact)) < 0.5 * float(jnp.linalg.norm(exact))
