"""The decoders against transformers: goldens of every option of the family (see goldens/make_goldens.py)."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxmodels.cache import KVCache
from jaxmodels.layers import RopeConfig
from jaxmodels.qwen import CausalLM, QwenConfig, build
from pallas_kernels.masks import BlockDiffusion

GOLDENS = Path(__file__).parent / "goldens"
NAMES = sorted(path.parent.name for path in GOLDENS.glob("*/outputs.npz"))
WHOLE = [name for name in NAMES if "window" not in name]  # goldens whose layers all take one mask
TOLERANCE = 1e-5


@functools.cache
def outputs(name: str) -> dict[str, np.ndarray]:
    """Arrays of a golden; what a model takes as input as JAX arrays."""
    with np.load(GOLDENS / name / "outputs.npz") as file:
        return {key: jnp.asarray(x) if x.dtype == np.int32 else x for key, x in file.items()}


def config_of(folder: Path) -> QwenConfig:
    raw = json.loads((folder / "config.json").read_text())
    rope = raw["rope_parameters"]
    kind = rope["rope_type"]
    trained = {
        "dynamic": raw["max_position_embeddings"],
        "yarn": rope.get("original_max_position_embeddings"),
    }
    extra = ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
    return QwenConfig(
        vocab_size=raw["vocab_size"],
        dim=raw["hidden_size"],
        layers=raw["num_hidden_layers"],
        heads=raw["num_attention_heads"],
        kv_heads=raw["num_key_value_heads"],
        head_dim=raw.get("head_dim", raw["hidden_size"] // raw["num_attention_heads"]),
        mlp_dim=raw["intermediate_size"],
        rope=RopeConfig(
            theta=rope["rope_theta"],
            kind=kind,
            original_max_positions=trained.get(kind),
            **{key: rope[key] for key in extra if key in rope},
        ),
        norm_eps=raw["rms_norm_eps"],
        qkv_bias=raw["model_type"] == "qwen2",
        qk_norm=raw["model_type"] == "qwen3",
        tied_head=raw["tie_word_embeddings"],
        layer_windows=tuple(
            raw["sliding_window"] if kind.startswith("sliding") else None for kind in raw["layer_types"]
        ),
        max_positions=raw["max_position_embeddings"],
    )


def tree_of(tensors: dict[str, np.ndarray], config: QwenConfig) -> dict:
    """Our parameters from the names of a checkpoint; also for gradients."""
    N, K, H = config.heads, config.kv_heads, config.head_dim

    def stack(key, *shape):
        parts = [tensors[f"model.layers.{i}.{key}"] for i in range(config.layers)]
        return jnp.stack([part.reshape(shape or part.shape) for part in parts])

    attention = {
        "q": stack("self_attn.q_proj.weight", N, H, -1),
        "k": stack("self_attn.k_proj.weight", K, H, -1),
        "v": stack("self_attn.v_proj.weight", K, H, -1),
        "o": stack("self_attn.o_proj.weight", -1, N, H),
    }
    if config.qkv_bias:
        attention |= {f"{x}_bias": stack(f"self_attn.{x}_proj.bias", -1, H) for x in "qkv"}
    if config.qk_norm:
        attention |= {f"{x}_norm": stack(f"self_attn.{x}_norm.weight") for x in "qk"}
    params = {
        "embed": jnp.asarray(tensors["model.embed_tokens.weight"]),
        "final_norm": jnp.asarray(tensors["model.norm.weight"]),
        "layers": {
            "attention_norm": stack("input_layernorm.weight"),
            "attention": attention,
            "mlp_norm": stack("post_attention_layernorm.weight"),
            "mlp": {x: stack(f"mlp.{x}_proj.weight") for x in ("gate", "up", "down")},
        },
    }
    if not config.tied_head:
        params["head"] = jnp.asarray(tensors["lm_head.weight"])
    return params


@functools.cache
def load(name: str) -> tuple[CausalLM, dict]:
    config = config_of(GOLDENS / name)
    return build(config), tree_of(load_file(GOLDENS / name / "model.safetensors"), config)


def assert_close(actual, expected, tolerance=TOLERANCE):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=tolerance)


@pytest.mark.smoke
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_layers(name):
    """Padded rows in one batch equal the unpadded rows of transformers, layer by layer."""
    lm, params = load(name)
    golden = outputs(name)
    hidden = jax.jit(lambda p, t, n: lm.hidden(p, t, lengths=n, layer_states=True))(
        params, golden["tokens"], golden["lengths"]
    )
    logits = lm.head(params, hidden.states)
    for row, length in enumerate(golden["lengths"]):
        assert_close(hidden.layers[:, row, :length], golden["layers"][:, row, :length])
        assert_close(hidden.states[row, :length], golden["states"][row, :length])
        assert_close(logits[row, :length], golden["logits"][row, :length])


@pytest.mark.parametrize("name", ["qwen2_tied", "qwen3_dynamic"])
def test_apply_is_the_ordinary_forward(name):
    lm, params = load(name)
    golden = outputs(name)
    for row, length in enumerate(golden["lengths"]):
        logits = jax.jit(lm.apply)(params, golden["tokens"][row : row + 1, :length])
        assert logits.dtype == jnp.float32
        assert_close(logits[0], golden["logits"][row, :length])


@pytest.mark.parametrize("name", NAMES)
def test_greedy_continuation(name):
    """Both rows in one ragged batch, from a cache, give the ids of `generate`; scanned, some also unrolled."""
    lm, params = load(name)
    golden = outputs(name)
    tokens, lengths, expected = golden["tokens"], golden["lengths"], golden["greedy"]
    batch, steps = expected.shape

    def prefill(params, tokens, lengths):
        hidden = lm.hidden(params, tokens, lengths=lengths, return_kv=True)
        cache = KVCache.init(lm.config, batch=batch, capacity=tokens.shape[1] + steps, dtype=jnp.float32)
        last = jnp.take_along_axis(hidden.states, lengths[:, None, None] - 1, axis=1)
        return cache.append(hidden.kv, lengths), lm.head(params, last).argmax(-1).astype(jnp.int32)

    @jax.jit
    def step(params, cache, token):
        hidden = lm.hidden(params, token, cache=cache)
        return cache.append(hidden.kv), lm.head(params, hidden.states).argmax(-1).astype(jnp.int32)

    state = jax.jit(prefill)(params, tokens, lengths)
    unrolled = [lm.unstack(params)] if name in ("qwen2_tied", "qwen3_alternating_window") else []
    for weights in (params, *unrolled):
        cache, token = state
        generated = [token]
        for _ in range(steps - 1):
            cache, token = step(weights, cache, token)
            generated.append(token)
        np.testing.assert_array_equal(np.concatenate(generated, axis=1), expected)


@pytest.mark.parametrize("name", WHOLE)
def test_doubled_mask(name):
    """The block-diffusion mask over [noisy ; clean], both halves at positions 0..L-1."""
    lm, params = load(name)
    golden = outputs(name)
    tokens = golden["doubled_tokens"]
    length = tokens.shape[1] // 2
    positions = jnp.tile(jnp.arange(length, dtype=jnp.int32), 2)[None]
    mask = BlockDiffusion(length, int(golden["doubled_block"]))
    logits = lm.apply(params, tokens, positions=positions, mask=mask)
    assert_close(logits, golden["doubled_logits"])


@pytest.mark.parametrize("name", WHOLE)
def test_packed_documents(name):
    lm, params = load(name)
    golden = outputs(name)
    logits = lm.apply(
        params,
        golden["packed_tokens"],
        positions=golden["packed_positions"],
        segment_ids=golden["packed_segments"],
    )
    assert_close(logits, golden["packed_logits"])


GRADIENTS = [
    *((name, "none") for name in ("qwen2_tied", "qwen2_linear_window", "qwen3_alternating_window")),
    *(("qwen3", remat) for remat in ("none", "full", "dots", "attention")),
    *(pytest.param(name, "none", marks=pytest.mark.slow) for name in NAMES if "yarn" in name or "dynamic" in name),
]


@pytest.mark.parametrize(("name", "remat"), GRADIENTS)
def test_gradients(name, remat):
    """Of the mean next-token cross-entropy with respect to every parameter, under every remat policy.

    The slow cases differ from the others in the kind of RoPE only, which no gradient flows into.
    """
    lm, params = load(name)
    golden = outputs(name)
    row = golden["tokens"][:1, : golden["lengths"][0]]

    def loss_fn(params):
        logits = lm.head(params, lm.hidden(params, row, remat=remat).states)
        log_probs = jax.nn.log_softmax(logits[0, :-1])
        return -jnp.take_along_axis(log_probs, row[0, 1:, None], axis=1).mean()

    loss, grads = jax.jit(jax.value_and_grad(loss_fn))(params)
    assert_close(loss, golden["loss"])
    expected = tree_of({key[5:]: x for key, x in golden.items() if key.startswith("grad/")}, lm.config)
    assert jax.tree.structure(grads) == jax.tree.structure(expected)
    for (path, actual), wanted in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(expected), strict=True):
        scale = float(np.abs(wanted).max())
        assert scale > 0, f"the golden gradient of {jax.tree_util.keystr(path)} is zero and would prove nothing"
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-4 * scale, err_msg=jax.tree_util.keystr(path))
