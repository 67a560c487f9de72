"""Pairwise rotation against a float64 loop, a golden and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.rotation import pairwise_rotation


def loop(x, theta, pairs, scales, group_size, inverse=False):
    """NumPy, float64, pair by pair."""
    x = np.array(x, np.float64) * (1 if scales is None else np.asarray(scales, np.float64))
    steps = range(len(pairs))
    for r in reversed(steps) if inverse else steps:
        for t in range(x.shape[-1] // 2):
            base = 2 * t // group_size * group_size
            i, j = base + pairs[r][2 * t], base + pairs[r][2 * t + 1]
            angle = -theta[r][t] if inverse else theta[r][t]
            a, b = x[..., i].copy(), x[..., j].copy()
            x[..., i] = np.cos(angle) * a + np.sin(angle) * b
            x[..., j] = np.cos(angle) * b - np.sin(angle) * a
    return x


def golden_arguments():
    m, i, r, j = np.arange(3)[:, None], np.arange(256), np.arange(8)[:, None], np.arange(128)
    pairs = [((2 * r + 3) * j + 7 * k + r) % 128 for k in (0, 1)]
    return (
        np.sin(0.37 * (m * 256 + i)),
        0.5 * np.cos(0.11 * (r * 128 + j)),
        np.concatenate(pairs, axis=1).astype(np.int16),
        1 + 0.25 * np.sin(0.05 * i),
    )


def random_arguments(rows, channels, group_size, steps, seed=0):
    rng = np.random.default_rng(seed)
    groups = channels // group_size
    pairs = [[rng.permutation(group_size) for _ in range(groups)] for _ in range(steps)]
    return (
        rng.normal(size=(*rows, channels)),
        rng.normal(size=(steps, channels // 2)),
        np.reshape(pairs, (steps, channels)).astype(np.int16),
        rng.uniform(0.2, 3, channels),
    )


def test_golden():
    x, theta, pairs, scales = golden_arguments()
    with jax.enable_x64(True):
        options = {"group_size": 128}
        y = np.asarray(pairwise_rotation(*(jnp.asarray(a) for a in (x, theta, pairs, scales)), **options))
        back = pairwise_rotation(jnp.asarray(y), jnp.asarray(theta), jnp.asarray(pairs), inverse=True, **options)
    np.testing.assert_allclose(y[0, :4], [-0.18562736, 0.75759132, 1.02836272, 0.73166190], atol=5e-9)
    np.testing.assert_allclose(y[2, 252:], [-0.04231110, -0.08689015, 1.08993699, 1.73573986], atol=5e-9)
    sums = [y.sum(), (y**2).sum(), (y * np.arange(256)).sum()]
    np.testing.assert_allclose(sums, [-60.14051767, 395.29136489, -6808.70843383], atol=5e-8)
    np.testing.assert_allclose(back, x * scales, atol=2e-15)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize(
    "rows, channels, group_size, steps",
    [((), 2, 2, 1), ((3,), 24, 6, 2), ((0,), 8, 4, 1), ((2, 1), 64, 32, 3), ((9, 5), 64, 32, 3), ((7,), 24, 6, 2)],
)  # the last two have more rows than a group has channels
def test_equals_the_loop(implementation, rows, channels, group_size, steps):
    x, theta, pairs, scales = random_arguments(rows, channels, group_size, steps)
    arrays = [jnp.asarray(a, jnp.float32) for a in (x, theta)] + [jnp.asarray(pairs)]
    for inverse in (False, True):
        options = {"group_size": group_size, "inverse": inverse, "implementation": implementation}
        given = None if inverse else scales
        y = pairwise_rotation(*arrays, None if inverse else jnp.asarray(scales, jnp.float32), **options)
        assert y.dtype == jnp.float32
        np.testing.assert_allclose(y, loop(x, theta, pairs, given, group_size, inverse), atol=2e-5)
    norms = (np.linalg.norm(a, axis=-1) for a in (pairwise_rotation(*arrays, group_size=group_size), arrays[0]))
    np.testing.assert_allclose(*norms, rtol=1e-6)


def test_another_order_or_direction_is_another_result():
    """What is silent while angles are small."""
    x, theta, pairs, scales = random_arguments((4,), 32, 16, 3)
    right = loop(x, theta, pairs, scales, 16)
    scaled_after = loop(x, theta, pairs, None, 16) * scales
    for wrong in (loop(x, theta[::-1], pairs[::-1], scales, 16), loop(x, -theta, pairs, scales, 16), scaled_after):
        assert np.abs(wrong - right).max() > 0.1


@pytest.mark.parametrize("rows", [3, 6])  # fewer and more than channels of a group
def test_gradients_equal_finite_differences(rows):
    x, theta, pairs, scales = random_arguments((rows,), 8, 4, 2)
    weight = np.random.default_rng(1).normal(size=x.shape)
    with jax.enable_x64(True):

        @jax.jit
        def value(x, theta, scales):
            return (pairwise_rotation(x, theta, jnp.asarray(pairs), scales, group_size=4) * weight).sum() ** 2

        arguments = [jnp.asarray(a) for a in (x, theta, scales)]
        gradients = jax.grad(value, argnums=(0, 1, 2))(*arguments)
        for nth, gradient in enumerate(gradients):
            for at in [*np.ndindex(gradient.shape)][::5]:
                step = [a.at[at].add(d) if n == nth else a for d in (1e-6, -1e-6) for n, a in enumerate(arguments)]
                slope = (value(*step[:3]) - value(*step[3:])) / 2e-6
                np.testing.assert_allclose(gradient[at], slope, rtol=1e-6, atol=1e-6)


def test_float32_inside():
    x, theta, pairs, scales = golden_arguments()
    right = loop(np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64), theta, pairs, scales, 128)
    arrays = (jnp.asarray(x, jnp.bfloat16), jnp.asarray(theta), jnp.asarray(pairs), jnp.asarray(scales))
    y = pairwise_rotation(*arrays, group_size=128)
    assert y.dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(y, np.float64) - right) / np.linalg.norm(right)
    assert error < 2.5e-3, "one rounding at the end"


@pytest.mark.usefixtures("plain_calls")
@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": jnp.zeros((2, 8), jnp.int32)}, "x must be floating"),
        ({"group_size": 3}, "group_size must be even and divide the 8"),
        ({"group_size": 16}, "group_size must be even and divide the 8"),
        ({"theta": jnp.zeros((2, 3))}, r"theta must have shape \(1, 4\)"),
        ({"pairs": jnp.zeros((1, 6), jnp.int32)}, r"pairs must be integers of shape \[R, 8\]"),
        ({"pairs": jnp.zeros((1, 8))}, "pairs must be integers"),
        ({"channel_scales": jnp.zeros(4)}, r"channel_scales must have shape \(8,\)"),
        ({"channel_scales": jnp.zeros(8), "inverse": True}, "no place in its inverse"),
        ({"implementation": "triton"}, "implementation must be"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {
        "x": jnp.zeros((2, 8)), "theta": jnp.zeros((1, 4)), "pairs": jnp.arange(8)[None] % 4, "group_size": 4,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        pairwise_rotation(**arguments | change)
    with pytest.raises(NotImplementedError, match='"mosaic": needs an NVIDIA GPU'):
        pairwise_rotation(**arguments, implementation="mosaic")
