"""The block-diffusion loss: against torch autograd, and its options against sums written out."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels import load_pretrained
from jaxmodels.decoding.block_diffusion import corruption, patterns
from jaxmodels.qwen import QwenConfig
from jaxmodels.qwen.load import Layout, table
from train.objectives import block_diffusion
from train.objectives.block_diffusion import make_ar_loss, make_block_diffusion_loss, make_bound_loss
from train.objectives.config import DiffusionObjective

HERE = Path(__file__).parent
MODEL = HERE.parents[1] / "jaxmodels/goldens/qwen3"
MASK = 5


@functools.cache
def model():
    loaded = load_pretrained(MODEL, mask_id=MASK)
    return loaded.lm, loaded.params


def batch_of(tokens, segment_ids=None, loss_mask=None):
    tokens = jnp.asarray(tokens, jnp.int32)
    segment_ids = jnp.ones(tokens.shape, jnp.int32) if segment_ids is None else jnp.asarray(segment_ids, jnp.int32)
    loss_mask = segment_ids > 0 if loss_mask is None else jnp.asarray(loss_mask)
    first = segment_ids != jnp.roll(segment_ids, 1, axis=1)
    index = jnp.arange(tokens.shape[1])
    start = jax.lax.cummax(jnp.where(first | (index == 0), index, 0), axis=1)
    return {"tokens": tokens, "segment_ids": segment_ids, "positions": index - start, "loss_mask": loss_mask}


def draw(seed=0, rows=2, length=12):
    return np.random.default_rng(seed).integers(6, 60, (rows, length))


def test_loss_and_gradients_equal_torch(monkeypatch):
    golden = np.load(HERE / "goldens/block_diffusion.npz")
    lm, params = model()
    given = corruption.Corruption(jnp.asarray(golden["masked"]), jnp.asarray(golden["level"]))
    monkeypatch.setattr(block_diffusion, "_corrupt", lambda *args: given)
    assert int(golden["mask_id"]) == MASK
    objective = DiffusionObjective(block_size=int(golden["block"]), suppress=False)
    loss_fn = make_block_diffusion_loss(lm, objective, chunk_size=5)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        total, count, _ = loss_fn(params, batch_of(golden["tokens"]), jax.random.key(0))
        return total / count

    value, grads = loss(params)
    np.testing.assert_allclose(value, golden["loss"], rtol=1e-5)
    for row in table(lm.config, Layout(head=None if lm.config.tied_head else "lm_head.weight")):
        actual = functools.reduce(lambda tree, key: tree[key], row.path, grads)
        for index in row.indices(lm.config.layers):
            name, part = row.name(*index), actual[index]
            want = golden[f"grad/{name}"]
            scale = np.abs(want).max()
            assert scale > 0
            np.testing.assert_allclose(part.reshape(want.shape), want, rtol=0, atol=1e-4 * scale, err_msg=name)


def recorded(monkeypatch, nll_of=lambda tokens: tokens / 10.0):
    """Replaces model and head by known numbers; returns what `predict` was called with."""
    calls = []

    def predict(lm, params, tokens, masked, pattern, **options):
        calls.append({"tokens": tokens, "masked": masked, "pattern": pattern} | options)
        states = jnp.zeros((*tokens.shape, 1))
        valid = jnp.ones(tokens.shape, bool).at[:, 0].set(not options["token_shift"])
        return patterns.Predictions(states, valid, states)

    def gathered_nll(lm, params, states, targets, where, *, z_loss=0.0, **options):
        return jnp.where(where, nll_of(targets), 0.0), jnp.where(where, z_loss, 0.0)

    monkeypatch.setattr(block_diffusion, "predict", predict)
    monkeypatch.setattr(block_diffusion, "gathered_nll", gathered_nll)
    return calls


class Named:
    config = QwenConfig.tiny(mask_id=MASK)


SEGMENTS = [[1] * 8 + [2] * 4, [1] * 10 + [0] * 2]


def run(monkeypatch, objective, *, loss_mask=None, z_loss=0.0, key=0):
    calls = recorded(monkeypatch)
    batch = batch_of(draw(), SEGMENTS, loss_mask)
    result = make_block_diffusion_loss(Named(), objective, z_loss=z_loss)(None, batch, jax.random.key(key))
    return calls[0], batch, result


@pytest.mark.smoke
def test_weights_and_normalisations(monkeypatch):
    loss_mask = np.array(SEGMENTS) > 0
    loss_mask[0, :3] = False
    key = jax.random.key(0)
    masked, level = corruption.sample_block_mask(
        key, jnp.asarray(loss_mask), block_size=4, half_life_ratio=0.1, segment_ids=jnp.asarray(SEGMENTS)
    )
    nll = draw() / 10.0
    counts = {"tokens": 22, "masked": int(masked.sum()), "supervised": 19}
    for normalization, count in counts.items():
        objective = DiffusionObjective(block_size=4, normalization=normalization)
        call, _, (total, denominator, metrics) = run(monkeypatch, objective, loss_mask=loss_mask, z_loss=0.5)
        np.testing.assert_array_equal(call["masked"], masked)
        assert call["pattern"].kind == "block_diffusion" and call["pattern"].block_size == 4
        want = (nll / level)[np.asarray(masked)].sum() + 0.5 * counts["masked"]
        np.testing.assert_allclose(total, want, rtol=1e-5)
        assert float(denominator) == count
        np.testing.assert_allclose(metrics["masked_nll"], [nll[np.asarray(masked)].sum(), counts["masked"]], rtol=1e-5)
        np.testing.assert_allclose(metrics["masked"], [counts["masked"], 19])
        by_offset = (nll * np.asarray(masked)).sum(0).reshape(-1, 4).sum(0)
        np.testing.assert_allclose(metrics["offset_nll"][0], by_offset, rtol=1e-5)
    _, _, (total, *_) = run(monkeypatch, DiffusionObjective(block_size=4, weighting="none"), loss_mask=loss_mask)
    np.testing.assert_allclose(total, nll[np.asarray(masked)].sum(), rtol=1e-5)


def test_inclusion_weights_count_every_offset_once(monkeypatch):
    recorded(monkeypatch, lambda tokens: jnp.ones(tokens.shape))
    objective = DiffusionObjective(block_size=8, weighting="inclusion")
    loss_fn = make_block_diffusion_loss(Named(), objective)
    batch = batch_of(draw(rows=64, length=512))
    total, count, metrics = jax.jit(functools.partial(loss_fn, None))(batch, jax.random.key(3))
    assert abs(float(total / count) - 1.0) < 0.03  # every token has weight 1 in expectation
    chance = corruption.position_inclusion(8, 0.1)
    np.testing.assert_allclose(metrics["offset_nll"][1] / (64 * 64), chance, atol=0.03)


def test_empty_masks_do_not_divide_by_zero(monkeypatch):
    monkeypatch.setattr(corruption, "_draw_level", lambda key, groups, low: jnp.full(groups.group.shape, 0.01))
    _, _, (total, denominator, metrics) = run(
        monkeypatch, DiffusionObjective(block_size=4, normalization="masked", joint_weight=0.3)
    )
    assert float(denominator) == 19 and np.isfinite(total)  # the autoregressive targets
    assert float(metrics["masked_nll"][1]) == 0
    _, _, (total, denominator, _) = run(monkeypatch, DiffusionObjective(block_size=4, normalization="masked"))
    assert float(total) == 0 and float(denominator) == 0  # which the update step takes as "no targets"


def test_shift_drops_positions_that_nothing_predicts(monkeypatch):
    objective = DiffusionObjective(block_size=4, token_shift=True, shift_context="clean", weighting="none")
    call, batch, (total, _, metrics) = run(monkeypatch, objective, key=1)
    assert call["token_shift"] and call["shift_context"] == "clean"
    where = np.asarray(call["masked"]).copy()
    where[:, 0] = False
    np.testing.assert_allclose(total, (np.asarray(batch["tokens"]) / 10)[where].sum(), rtol=1e-5)
    assert float(metrics["masked_nll"][1]) == where.sum()


def test_complementary_masks_train_every_target_once(monkeypatch):
    objective = DiffusionObjective(block_size=4, complementary=True, weighting="none")
    call, batch, (total, denominator, _) = run(monkeypatch, objective)
    masked = np.asarray(call["masked"])
    np.testing.assert_array_equal(call["tokens"], np.repeat(batch["tokens"], 2, axis=0))
    np.testing.assert_array_equal(masked[::2] ^ masked[1::2], np.array(SEGMENTS) > 0)
    np.testing.assert_allclose(total, (np.asarray(batch["tokens"]) / 10)[np.array(SEGMENTS) > 0].sum(), rtol=1e-5)
    assert float(denominator) == 44


def test_joint_loss_is_a_weighted_sum_of_means(monkeypatch):
    objective = DiffusionObjective(block_size=4, joint_weight=0.3)
    call, batch, (total, denominator, metrics) = run(monkeypatch, objective)
    assert call["pattern"].clean == "token"
    _, _, (alone, count, _) = run(monkeypatch, DiffusionObjective(block_size=4))
    nll = np.asarray(batch["tokens"]) / 10
    inside = np.ones((2, 12), bool)
    inside[0, [0, 8]] = inside[1, [0, 10, 11]] = False
    ar = nll[inside].mean()
    np.testing.assert_allclose(total / denominator, ar + 0.3 * alone / count, rtol=1e-5)
    np.testing.assert_allclose(metrics["ar_nll"][0] / metrics["ar_nll"][1], ar, rtol=1e-5)


def test_patterns_without_blocks(monkeypatch):
    for pattern in ("bidirectional", "prefix_bidirectional"):
        prefix = 5 if pattern.startswith("prefix") else None
        objective = DiffusionObjective(pattern=pattern, prefix_len=prefix, masking="position", half_life_ratio=0.1)
        for key in range(5):
            call, *_ = run(monkeypatch, objective, key=key)
            masked = np.asarray(call["masked"])
            assert masked[0].any() and masked[1].any()  # whole sequences always lose a token
            assert not masked[:, : prefix or 0].any() and not masked[1, 10:].any()
    objective = DiffusionObjective(pattern="autoregressive")
    call, _, (_, denominator, _) = run(monkeypatch, objective)
    assert call["pattern"].kind == "autoregressive" and float(denominator) == 22
    levels = []
    for masking in ("uniform", "uniform_block"):
        seen = {}
        monkeypatch.setattr(
            corruption, "sample_uniform_mask",
            lambda key, mask, seen=seen, **options: seen.update(options) or corruption.Corruption(mask, mask + 0.5),
        )  # fmt: skip
        run(monkeypatch, DiffusionObjective(block_size=4, masking=masking))
        levels.append(seen["block_size"])
    assert levels == [None, 4]


def test_random_block_sizes_take_every_branch(monkeypatch):
    calls = recorded(monkeypatch)
    loss_fn = make_block_diffusion_loss(Named(), DiffusionObjective(block_size=6, random_length_prob=0.9))
    batch = batch_of(draw(length=30))
    losses = jax.jit(jax.vmap(lambda key: loss_fn(None, batch, key)[0]))(jax.random.split(jax.random.key(0), 3))
    assert np.isfinite(losses).all()
    assert {call["pattern"].block_size for call in calls} == {6, 4, 8, 12, 16, 20, 24, 28}


def test_bound_of_a_real_model_agrees_with_its_parts():
    lm, params = model()
    batch = batch_of(draw(7), SEGMENTS)
    total, count, metrics = jax.jit(make_bound_loss(lm, block_size=4, num_samples=2))(params, batch, jax.random.key(1))
    assert int(count) == 19  # without the first token of each document
    np.testing.assert_allclose(jnp.sum(metrics["offset_nats"][0]), total, rtol=1e-5)
    assert metrics["offset_nats"][1].tolist() == [3, 6, 5, 5]
    ar_total, ar_count, _ = make_ar_loss(lm)(params, batch, jax.random.key(0))
    assert int(ar_count) == 19 and float(ar_total) > 0


BAD = [
    ({"block_size": 0}, "block_size must be at least 1; got 0"),
    ({"half_life_ratio": -1.0}, r"half_life_ratio must lie in \[0, inf\]; got -1.0"),
    ({"random_length_prob": 2.0}, r"random_length_prob must lie in \[0, 1\]; got 2.0"),
    ({"joint_weight": 0.0}, "joint_weight must be positive or None; got 0.0"),
    ({"joint_weight": 0.3, "pattern": "bidirectional"}, "joint_weight needs pattern block_diffusion"),
    ({"prefix_len": 3}, "prefix_len belongs to pattern prefix_bidirectional"),
    ({"pattern": "bidirectional", "random_length_prob": 0.5}, "needs a pattern with blocks"),
    ({"shift_context": "clean"}, "shift_context clean needs token_shift"),
    ({"weighting": "inclusion", "masking": "uniform"}, "weighting inclusion needs masking position in blocks"),
    ({"pattern": "autoregressive", "complementary": True}, "masks nothing"),
]


@pytest.mark.parametrize("fields, message", BAD)
def test_bad_objectives(fields, message):
    with pytest.raises(ValueError, match=message):
        DiffusionObjective(**fields)


def test_a_model_without_mask_token_is_refused():
    class Unmasked:
        config = QwenConfig.tiny(mask_id=None)

    with pytest.raises(ValueError, match="names no mask token, and none is guessed"):
        make_block_diffusion_loss(Unmasked(), DiffusionObjective())
