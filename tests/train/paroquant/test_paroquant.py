"""Pairs, grids and the two stages of ParoQuant."""

import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quantized_matmul import dequantize, quantized_matmul
from pallas_kernels.quantized_matmul.grid import codes_of, grid_of, quantize
from pallas_kernels.quantized_matmul.rounding import round_weight
from pallas_kernels.quantized_matmul.tensor import matrix
from train.paroquant.config import ParoquantConfig
from train.paroquant.optimize import _step, optimize_block
from train.paroquant.pairs import select_pairs


def smooth_l1(difference):
    """Mean of d^2 / 2 below 1 and of |d| - 1 / 2 above."""
    size = np.abs(np.asarray(difference, np.float64))
    return np.where(size < 1, size**2 / 2, size - 0.5).mean()


def slow_pairs(seed, num_groups, group_size, num_rotations):
    """The rule, written down again: for each rotation scan the whole shuffled list."""
    rng = random.Random(seed)
    shuffled = []
    for _ in range(num_groups):
        every = [(i, j) for i in range(group_size) for j in range(i + 1, group_size)]
        rng.shuffle(every)
        shuffled.append(every)
    result = []
    for _ in range(num_rotations):
        result.append([])
    for every in shuffled:
        used_before = set()
        for r in range(num_rotations):
            used, pairs = set(), []
            for i, j in every:
                if i in used or j in used or (i, j) in used_before:
                    continue
                pairs.append((i, j))
                used |= {i, j}
                if len(pairs) == group_size // 2:
                    break
            used_before |= set(pairs)
            result[r] += [*itertools.chain(*pairs), *(c for c in range(group_size) if c not in used)]
    return np.asarray(result)


@pytest.mark.parametrize("seed, groups, size, rotations", [(0, 2, 8, 3), (7, 1, 128, 8), (3, 3, 6, 8), (1, 1, 2, 2)])
def test_pairs(seed, groups, size, rotations):
    pairs = select_pairs(seed, groups, group_size=size, num_rotations=rotations)
    np.testing.assert_array_equal(pairs.channels, slow_pairs(seed, groups, size, rotations))
    assert pairs.channels.dtype == np.int16
    groups_of = pairs.channels.reshape(rotations, groups, size)
    assert (np.sort(groups_of, axis=2) == np.arange(size)).all(), "each step is a permutation of each group"
    for group in range(groups):
        real = groups_of[:, group].reshape(rotations, -1, 2)[pairs.is_real.reshape(rotations, groups, -1)[:, group]]
        assert len({tuple(pair) for pair in real}) == len(real) and (real[:, 0] < real[:, 1]).all()
    if (size, rotations) == (6, 8):  # 15 pairs are fewer than 8 * 3: some channels are left over
        assert not pairs.is_real.all() and pairs.is_real[0].all()
    assert (
        select_pairs(seed + 1, groups, group_size=size, num_rotations=rotations).channels != pairs.channels
    ).any() or size == 2


@pytest.mark.parametrize("options, message", [({"group_size": 3}, "even"), ({"num_rotations": 0}, "positive")])
def test_bad_pairs(options, message):
    with pytest.raises(ValueError, match=message):
        select_pairs(0, 1, **options)


def by_hand(weight, group_size, reference_range):
    """NumPy, group by group."""
    values, codes = np.empty_like(weight), np.empty(weight.shape, int)
    for row in range(len(weight)):
        for first in range(0, weight.shape[1], group_size):
            w = weight[row, first : first + group_size]
            low, high = (w.min(), w.max()) if reference_range else (min(w.min(), 0), max(w.max(), 0))
            scale = max(high - low, 1e-5) / 15
            zero = min(max(-np.round(low / scale), 0), 15)
            code = np.clip(np.round(w / scale) + zero, 0, 15)
            codes[row, first : first + group_size] = code
            values[row, first : first + group_size] = (code - zero) * scale
    return values, codes


@pytest.mark.parametrize("reference_range", [False, True])
def test_grid_and_rounding(reference_range):
    weight = np.random.default_rng(0).normal(size=(5, 32))
    weight[0, :8], weight[1, 8:16], weight[2, 16:24] = 0, np.linspace(1, 2, 8), -3
    want, codes = by_hand(weight, 8, reference_range)
    with jax.enable_x64(True):
        grid = grid_of(jnp.asarray(weight), 8, reference_range=reference_range)
        np.testing.assert_allclose(quantize(jnp.asarray(weight), grid), want, atol=1e-15)
        got_codes, zeros = codes_of(jnp.asarray(weight), grid)
    np.testing.assert_array_equal(got_codes, codes)
    assert zeros.shape == (5, 4) and zeros.min() >= 0 and zeros.max() <= 15
    # A group of one sign: the original's range makes all of its codes the largest.
    assert (len(set(codes[1, 8:16])) == 1) == reference_range


def test_gradients_pass_straight_through():
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8)), jnp.float32)
    grid = grid_of(weight, 8)
    factor = jnp.asarray(np.random.default_rng(1).normal(size=(2, 8)), jnp.float32)

    def value(weight, grid):
        return (quantize(weight, grid) * factor).sum()

    of_weight, of_grid = jax.grad(value, argnums=(0, 1))(weight * 3, grid)  # many are clipped
    np.testing.assert_allclose(of_weight, factor, rtol=1e-5)
    codes, zeros = codes_of(weight * 3, grid)
    slope = codes - zeros - weight * 3 / grid.scale  # d/ds of (w / s + zero - zero) s, rounding and clipping ignored
    np.testing.assert_allclose(of_grid.scale[:, 0], (factor * slope).sum(axis=1), rtol=1e-4)
    np.testing.assert_allclose(of_grid.offset, 0.0, atol=1e-5)  # the zero is added and taken away


def toy(rows=256):
    """A linear with outliers in weights and inputs."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(64, 256)) * 0.02
    weight[:, rng.choice(256, 8, replace=False)] *= 12
    x = rng.normal(size=(2 * rows, 256))
    x[:, rng.choice(256, 4, replace=False)] *= 10
    weight, x = (jnp.asarray(a, jnp.float32) for a in (weight, x))
    return weight, x[:rows], x[rows:]


def apply(weights, x, rest):
    return x @ weights["linear"].T


def test_two_stages_on_a_linear_with_outliers():
    weight, x, held_out = toy()
    y, held_out_y = x @ weight.T, held_out @ weight.T
    config = ParoquantConfig(epochs=(100, 50), batch_size=128)
    seen = []
    result = optimize_block(
        apply, {"linear": weight}, (x, y), (held_out, held_out_y), config, report=lambda *line: seen.append(line)
    )
    linear = result.linears["linear"]
    nearest = quantize(weight, grid_of(weight, 128))
    of_rounding = float(((x @ nearest.T - y) ** 2).mean())
    first = result.losses["rotation"]
    assert len(first) == 101 and len(result.losses["rounding"]) == 51
    assert [line[:2] for line in seen[:2] + seen[-1:]] == [("rotation", 0), ("rotation", 1), ("rounding", 50)]
    stored = dequantize(linear)
    mean_square = float(((x @ stored.T - y) ** 2).mean())
    assert mean_square < 0.03 * of_rounding, "rotation and scales remove nearly all of the error"
    assert min(first) < 0.03 * first[0] and min(result.losses["rounding"]) <= min(first)
    # What is stored gives what was optimised, and the linear it is stored for.
    # Rounding angles, scales and factors to float16 moves a few codes.
    assert smooth_l1(held_out @ stored.T - held_out_y) == pytest.approx(min(result.losses["rounding"]), rel=0.05)
    np.testing.assert_allclose(quantized_matmul(held_out, linear), held_out @ stored.T, atol=2e-4)
    theta = np.asarray(linear.rotation.theta)
    dummies = ~select_pairs(0, 2).is_real
    assert dummies.any() and not theta[dummies].any(), "left-over channels are never rotated"
    assert theta.any()


def test_the_untouched_state_is_kept_when_training_only_harms():
    weight, x, held_out = toy(32)
    config = ParoquantConfig(epochs=(0, 2), batch_size=16, weight_rate=1e3, grid_rate=1e3)
    result = optimize_block(apply, {"linear": weight}, (x, x @ weight.T), (held_out, held_out @ weight.T), config)
    linear, losses = result.linears["linear"], result.losses
    assert len(losses["rotation"]) == 1 and min(losses["rounding"][1:]) > losses["rounding"][0]
    np.testing.assert_array_equal(linear.input_scales, 1.0)
    np.testing.assert_allclose(dequantize(linear), matrix(round_weight(weight, "int4")), atol=1e-6)


def test_linears_of_a_block_are_optimised_together():
    """Two linears in a row: only the output of both counts, and each keeps a shape and pairs of its own."""
    rng = np.random.default_rng(0)
    weights = {
        "up": jnp.asarray(rng.normal(size=(32, 16)), jnp.float32),
        "down": jnp.asarray(rng.normal(size=(16, 32)), jnp.float32),
    }

    def block(weights, x, rest):
        return jax.nn.silu(x["hidden"] @ weights["up"].T) @ weights["down"].T + x["hidden"] + rest

    x, rest = {"hidden": rng.normal(size=(64, 3, 16)).astype(np.float32)}, jnp.float32(0.5)
    y = np.asarray(block(weights, x, rest))
    config = ParoquantConfig(group_size=8, num_rotations=2, epochs=(4, 2), batch_size=8)
    train, held_out = {"hidden": x["hidden"][:48]}, {"hidden": x["hidden"][48:]}
    result = optimize_block(block, weights, (train, y[:48]), (held_out, y[48:]), config, rest=rest)
    traced = _step._cache_size()
    optimize_block(block, weights, (train, y[:48]), (held_out, y[48:]), config, rest=rest, layer=1)
    assert _step._cache_size() == traced, "the next block runs the same programs"
    assert min(result.losses["rotation"]) < result.losses["rotation"][0]
    for name, linear in result.linears.items():
        linear.check(name)
        assert linear.shape == weights[name].shape and linear.group_size == 8
    final = block({name: dequantize(linear) for name, linear in result.linears.items()}, held_out, rest)
    assert smooth_l1(final - y[48:]) == pytest.approx(min(result.losses["rounding"]), rel=0.05)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weights": {"linear": jnp.zeros((4, 100))}}, "linear must be .* a multiple of 128; got shape"),
        ({"samples": (jnp.zeros((3, 128)), jnp.zeros((3, 4)))}, "needs 16 samples"),
        (
            {"validation": (jnp.zeros((0, 128)), jnp.zeros((0, 4)))},
            "needs 16 samples and one for validation; got 16 and 0",
        ),
    ],
)
def test_bad_input(change, message):
    arguments = {
        "weights": {"linear": jnp.zeros((4, 128))}, "samples": (jnp.zeros((16, 128)), jnp.zeros((16, 4))),
        "validation": (jnp.zeros((1, 128)), jnp.zeros((1, 4))), "config": ParoquantConfig(),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        optimize_block(apply, **arguments | change)


def test_a_loss_that_is_not_finite_is_named():
    weight, x, held_out = toy(16)
    with pytest.raises(FloatingPointError, match="before the first step is nan"):
        optimize_block(
            apply, {"linear": weight.at[0, 0].set(jnp.nan)}, (x, x @ weight.T), (held_out, held_out @ weight.T),
            ParoquantConfig(epochs=(1, 1)),
        )  # fmt: skip


@pytest.mark.parametrize("options", [{"epochs": (-1, 2)}, {"batch_size": 0}, {"weight_rate": -1.0}])
def test_bad_configurations(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ParoquantConfig(**options)
