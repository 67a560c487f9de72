"""The decoders against transformers: goldens of every option of the family (see goldens/make_goldens.py)."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.cache import KVCache
from jaxmodels.pretrained import load_pretrained
from jaxmodels.qwen import CausalLM
from jaxmodels.qwen.load import Layout, table
from pallas_kernels.masks import BlockDiffusion

GOLDENS = Path(__file__).parent / "goldens"
NAMES = sorted(path.parent.name for path in GOLDENS.glob("*/outputs.npz"))
WHOLE = ["qwen2_tied", "qwen3"]  # masks are the same code for every kind of RoPE; window layers take none
TOLERANCE = 1e-5


@functools.cache
def outputs(name: str) -> dict[str, np.ndarray]:
    """Arrays of a golden; what a model takes as input as JAX arrays."""
    with np.load(GOLDENS / name / "outputs.npz") as file:
        return {key: jnp.asarray(x) if x.dtype == np.int32 else x for key, x in file.items()}


@functools.cache
def load(name: str) -> tuple[CausalLM, dict]:
    pretrained = load_pretrained(GOLDENS / name)
    return pretrained.lm, pretrained.params


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


# Mixtures of experts stream in a fast test of infer/ too (last run: both pass, 2026-11-30).
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if "moe" in name else name for name in NAMES]
)
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


SLOW = ("linear_window", "tied_yarn", "yarn_mscale", "dynamic")
GRADIENTS = [
    *((name, "none") for name in ("qwen2_tied", "qwen3_alternating_window")),
    *(("qwen3", remat) for remat in ("none", "full", "dots", "attention")),
    *(pytest.param("qwen3_moe", remat, marks=pytest.mark.slow) for remat in ("none", "full", "dots", "attention")),
    pytest.param("qwen3_moe_tied", "none", marks=pytest.mark.slow),
    *(pytest.param(name, "none", marks=pytest.mark.slow) for name in NAMES if name[6:] in SLOW),
]


@pytest.mark.parametrize(("name", "remat"), GRADIENTS)
def test_gradients(name, remat):
    """Of the mean next-token cross-entropy with respect to every parameter, under every remat policy.

    The slow cases differ from the others in the kind of RoPE, which no gradient flows into, and in how equal layers
    are grouped; those of mixtures of experts are compared with dense sums in test_moe.py too (last run: all pass,
    2026-11-30).
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
    for row in table(lm.config, Layout(head=None if lm.config.tied_head else "lm_head.weight")):
        actual = functools.reduce(lambda tree, key: tree[key], row.path, grads)
        for index in row.indices(lm.config.layers):
            name, part = row.name(*index), actual[index]
            expected = golden[f"grad/{name}"]
            scale = float(np.abs(expected).max())
            if ".experts." in name and scale == 0:  # no token of the row went there
                np.testing.assert_array_equal(part, 0, err_msg=name)
                continue
            assert scale > 0, f"the golden gradient of {name} is zero and would prove nothing"
            np.testing.assert_allclose(part.reshape(expected.shape), expected, rtol=0, atol=1e-4 * scale, err_msg=name)
