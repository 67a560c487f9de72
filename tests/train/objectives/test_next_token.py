from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxmodels import load_pretrained, save_pretrained
from jaxmodels.qwen import build
from jaxmodels.qwen.config import QwenConfig
from train.objectives.next_token import make_next_token_loss, next_token_targets

GOLDENS = Path(__file__).parents[2] / "jaxmodels" / "goldens"


def test_targets_stay_inside_their_document():
    tokens = jnp.asarray([[5, 6, 7, 8, 9, 4, 0, 0]])
    segments = jnp.asarray([[1, 1, 1, 2, 2, 2, 0, 0]])
    mask = jnp.asarray([[True, True, True, True, False, True, False, False]])
    targets, weights = next_token_targets(tokens, segments, mask)
    np.testing.assert_array_equal(weights, [[1, 1, 0, 0, 1, 0, 0, 0]])  # 8 -> 9 is not to be trained on
    np.testing.assert_array_equal(targets[0, [0, 1, 4]], [6, 7, 4])


def test_a_full_row_does_not_predict_its_own_beginning():
    tokens, segments = jnp.asarray([[3, 4, 5]]), jnp.ones((1, 3), jnp.int32)
    _, weights = next_token_targets(tokens, segments, jnp.ones((1, 3), bool))
    np.testing.assert_array_equal(weights, [[1, 1, 0]])


def packed_batch(*documents, length):
    """Documents side by side in one row."""
    tokens = np.zeros((1, length), np.int32)
    segments, positions = np.zeros_like(tokens), np.zeros_like(tokens)
    at = 0
    for number, document in enumerate(documents, 1):
        here = slice(at, at + len(document))
        tokens[0, here], segments[0, here], positions[0, here] = document, number, np.arange(len(document))
        at += len(document)
    batch = {"tokens": tokens, "segment_ids": segments, "positions": positions, "loss_mask": segments > 0}
    return jax.tree.map(jnp.asarray, batch)


@pytest.mark.smoke
@pytest.mark.parametrize("options", [{}, {"chunk_size": 4, "z_loss": 1e-2, "remat": "full"}])
def test_packed_documents_have_the_losses_they_have_alone(options):
    lm = build(QwenConfig.tiny(layers=2))
    params = lm.init(jax.random.key(0))
    documents = [[5, 9, 60, 3, 7], [8, 2, 33], [70, 71, 72, 73, 74, 75]]
    loss_fn = jax.jit(make_next_token_loss(lm, **options))
    total, count, metrics = loss_fn(params, packed_batch(*documents, length=18), jax.random.key(0))
    apply = jax.jit(lm.apply)
    nll, z, n = 0.0, 0.0, 0
    for document in documents:
        alone = jnp.asarray([document + [0] * (6 - len(document))])  # causal: what follows does not matter
        logits = apply(params, alone)[0, : len(document) - 1]
        lse = jax.nn.logsumexp(logits, axis=-1)
        nll += (lse - logits[jnp.arange(len(document) - 1), jnp.asarray(document[1:])]).sum()
        z += (lse**2).sum()
        n += len(document) - 1
    assert count == n
    np.testing.assert_allclose(metrics["nll"], nll, rtol=1e-5)
    np.testing.assert_allclose(total, nll + options.get("z_loss", 0) * z, rtol=1e-5)


@pytest.mark.parametrize("name", ["qwen2_tied", "qwen3", "qwen2_linear_window"])
def test_loss_and_gradients_equal_torch_autograd(name, tmp_path):
    """Goldens from transformers: mean cross-entropy of a row, and the gradient of every parameter."""
    model, golden = load_pretrained(GOLDENS / name), np.load(GOLDENS / name / "outputs.npz")
    row = golden["tokens"][0, : golden["lengths"][0]]
    batch = packed_batch(row, length=len(row) + 3)  # padding must not matter
    loss_fn = make_next_token_loss(model.lm, chunk_size=8)

    @jax.jit
    @jax.value_and_grad
    def mean_loss(params):
        total, count, _ = loss_fn(params, batch, jax.random.key(0))
        return total / count

    value, grads = mean_loss(model.params)
    np.testing.assert_allclose(value, golden["loss"], rtol=1e-5)
    save_pretrained(tmp_path / "gradients", model.lm, grads)  # under the names that torch knows
    ours = load_file(tmp_path / "gradients" / "model.safetensors")
    wanted = {key.removeprefix("grad/"): golden[key] for key in golden.files if key.startswith("grad/")}
    assert ours.keys() == wanted.keys()
    for key, want in wanted.items():
        np.testing.assert_allclose(ours[key], want, rtol=1e-4, atol=1e-4 * np.abs(want).max(), err_msg=key)
