"""Quantized weights: rounding, what they stand for, and products with them."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.quantized_matmul import QuantizedTensor, Rotation, dequantize, interleave, nibbles, quantized_matmul
from pallas_kernels.quantized_matmul.rounding import activations, round_weight, to_e2m1, to_fp8
from pallas_kernels.quantized_matmul.tensor import matrix

FORMATS = {
    "int4": dict(format="int4", group_size=32),
    "int4 symmetric": dict(format="int4", group_size=32, symmetric=True),
    "int4 by output": dict(format="int4", group_size=-1),
    "int8": dict(format="int8"),
    "fp8": dict(format="fp8"),
    "fp8 per tensor": dict(format="fp8", per_tensor=True),
    "nvfp4": dict(format="nvfp4"),
}


def normal(seed: int, *shape: int, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def turned(weight: QuantizedTensor, seed: int = 0, steps: int = 3) -> QuantizedTensor:
    """The weight with random scales, rotation and order of inputs on top."""
    inputs, group = weight.inputs, weight.group_size
    rng = np.random.default_rng(seed)
    pairs = [np.concatenate([rng.permutation(group) for _ in range(inputs // group)]) for _ in range(steps)]
    return dataclasses.replace(
        weight,
        input_scales=jnp.asarray(rng.uniform(0.3, 3, inputs), jnp.float16),
        rotation=Rotation(jnp.asarray(rng.normal(0, 0.7, (steps, inputs // 2)), jnp.float16), jnp.asarray(pairs)),
        order=jnp.asarray(rng.permutation(inputs), jnp.int32),
    )


def float64_product(x, weight: QuantizedTensor) -> np.ndarray:
    """`x @ dequantize(weight).T` in float64 and straight from the definitions, rounding of activations apart."""
    x, codes = np.asarray(x, np.float64), np.asarray(weight.codes)
    if weight.input_scales is not None:
        x = x * np.asarray(weight.input_scales, np.float64)
    if weight.rotation is not None:
        theta, pairs = np.asarray(weight.rotation.theta, np.float64), np.asarray(weight.rotation.pairs)
        for step in range(len(theta)):
            for pair in range(weight.inputs // 2):
                first = 2 * pair // weight.group_size * weight.group_size
                i, j = first + pairs[step, 2 * pair], first + pairs[step, 2 * pair + 1]
                cos, sin = np.cos(theta[step, pair]), np.sin(theta[step, pair])
                x[:, i], x[:, j] = cos * x[:, i] + sin * x[:, j], cos * x[:, j] - sin * x[:, i]
    if weight.order is not None:
        x = x[:, np.asarray(weight.order)]
    if weight.format in ("int4", "nvfp4"):
        codes = np.stack([codes & 15, codes >> 4], -1).reshape(len(codes), -1).astype(np.int64)
        magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        int4 = weight.format == "int4"
        codes = np.where(codes > 7, codes - 16, codes) if int4 else np.where(codes > 7, -1, 1) * magnitudes[codes & 7]
    codes = codes.astype(np.float64)
    zeros = 0 if weight.zeros is None else np.asarray(weight.zeros, np.float64).T.repeat(weight.group_size, 1)
    scales = np.asarray(weight.scales.astype(jnp.float32), np.float64).T.repeat(weight.group_size, 1)
    overall = 1.0 if weight.global_scale is None else float(weight.global_scale)
    return x @ ((codes - zeros) * scales * overall).T


# ----------------------------------------------------------------------------------------------------
# Rounding


def test_e2m1_codes_are_those_of_the_type_ties_included():
    x = jnp.concatenate([jnp.linspace(-6, 6, 4801), jnp.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -2.5, -0.0])])
    np.testing.assert_array_equal(to_e2m1(x), np.asarray(x).astype(ml_dtypes.float4_e2m1fn).view(np.uint8))
    packed = nibbles.pack(jnp.arange(16, dtype=jnp.uint8))
    expected = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(nibbles.e2m1(packed), expected)


def test_fp8_saturates_where_the_plain_cast_does_not():
    assert np.isnan(np.float32(jnp.float32(500).astype(jnp.float8_e4m3fn)))
    np.testing.assert_array_equal(
        to_fp8(jnp.array([500.0, -1e9, 464, 2.0**-9])).astype(np.float32), [448, -448, 448, 2.0**-9]
    )


@pytest.mark.parametrize("codes", [np.arange(16), np.arange(-8, 8)], ids=["unsigned", "signed"])
def test_nibbles(codes):
    packed = nibbles.pack(jnp.asarray(codes))
    np.testing.assert_array_equal(nibbles.unpack(packed), codes & 15)
    np.testing.assert_array_equal(nibbles.signed(packed), np.where(codes & 8, (codes & 15) - 16, codes))
    np.testing.assert_array_equal(nibbles.pack(np.asarray(codes)), packed)
    with pytest.raises(ValueError, match=r"even number of codes .* got 3"):
        nibbles.pack(jnp.arange(3))


@pytest.mark.parametrize("name", FORMATS)
def test_no_nearer_code_exists(name):
    """A step up or down from the chosen code is never nearer than half a step of the grid allows."""
    weight = normal(0, 24, 128) + 0.3
    quantized = round_weight(weight, **FORMATS[name])
    error = np.abs(np.asarray(weight - matrix(quantized)))
    scales = quantized.scales.astype(jnp.float32) * (1 if quantized.global_scale is None else quantized.global_scale)
    scales = np.asarray(scales).T.repeat(quantized.group_size, 1)
    units = {"int4": 0.5, "int8": 0.5, "fp8": 16.0, "nvfp4": 1.0}[quantized.format]  # half of the widest step
    slack = 1.02 if quantized.format == "int4" else 1.08  # scales are rounded themselves
    assert (error <= units * scales * slack).all()
    assert error.max() > 0.5 * (units * scales).max() * 0.5
    if quantized.zeros is not None:  # 0 is on every grid, exactly
        zero = round_weight(weight.at[:, ::7].set(0), **FORMATS[name])
        np.testing.assert_array_equal(np.asarray(matrix(zero))[:, ::7], 0)


@pytest.mark.parametrize("name", FORMATS)
def test_rounding_again_changes_nothing(name):
    first = round_weight(normal(1, 16, 128), **FORMATS[name])
    again = round_weight(matrix(first), **FORMATS[name])
    np.testing.assert_allclose(matrix(again), matrix(first), rtol=2e-3, atol=1e-6)


def test_nvfp4_scales_are_those_of_modelopt():
    weight = normal(2, 8, 64).at[3, 16:32].set(0)
    quantized = round_weight(weight, "nvfp4")
    blocks = np.abs(np.asarray(weight)).reshape(8, 4, 16).max(2)
    overall = np.abs(np.asarray(weight)).max() / np.float32(6 * 448)
    expected = np.where(blocks == 0, 1, blocks / (6 * overall)).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(quantized.scales.astype(jnp.float32), expected.T)
    assert quantized.scales.astype(jnp.float32)[1, 3] == 1
    np.testing.assert_allclose(quantized.global_scale, overall, rtol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [0.0, 1e-30, 3.0])
def test_constant_weights(name, value):
    """Nothing but zeros, or one value far from 0: no NaN, and no lost sign."""
    dense = np.asarray(matrix(round_weight(jnp.full((4, 32), value), **FORMATS[name])))
    np.testing.assert_allclose(dense, value, rtol=0.04, atol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(format="int3"), "format must be one of .*'int3'"),
        (dict(format="int8", group_size=32), "options of int4.*'int8'"),
        (dict(format="fp8", symmetric=True), "options of int4.*'fp8'"),
        (dict(format="nvfp4", per_tensor=True), "per_tensor.*'nvfp4'"),
        (dict(format="int4", group_size=48), "divide the 64 inputs; got 48"),
        (dict(format="int4", num_inputs=2), "num_inputs.*2 axes.*got 2"),
        (dict(format="int8", activations="fp8"), "fp8 activations need fp8 codes; got int8"),
        (dict(format="int4", group_size=32, activations="int8"), "int8 activations need int8 codes; got int4"),
    ],
)
def test_options_that_do_not_fit(plain_calls, options, message):
    with pytest.raises(ValueError, match=message):
        round_weight(jnp.ones((8, 64)), **options)


# ----------------------------------------------------------------------------------------------------
# Products


@pytest.mark.parametrize("implementation", [None, "xla", "reference"])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "turned"])
def test_products_against_float64(name, extras, implementation):
    weight = round_weight(normal(3, 24, 128) + 0.1, **FORMATS[name])
    weight = turned(weight) if extras else weight
    x = normal(4, 5, 128)
    expected = float64_product(x, weight)
    result = quantized_matmul(x, weight, implementation=implementation)
    assert np.linalg.norm(result - expected) < 1e-5 * np.linalg.norm(expected)
    dense = np.asarray(x @ dequantize(weight).T)
    assert np.linalg.norm(dense - expected) < 1e-5 * np.linalg.norm(expected)
    low = quantized_matmul(x.astype(jnp.bfloat16), weight, implementation=implementation, dtype=jnp.float32)
    expected = float64_product(x.astype(jnp.bfloat16), weight)
    # Rounding to bfloat16 has a relative error of 1.7e-3 at most in the mean square: of the weight, and of activations
    # that were turned.
    assert np.linalg.norm(low - expected) < (2.5e-3 if extras else 2e-3) * np.linalg.norm(expected)


@pytest.mark.parametrize("wrong", ["zeros", "scales", "order", "input_scales", "rotation"])
def test_every_part_counts(wrong):
    """Leaving out any part of a weight changes the product."""
    weight = turned(round_weight(normal(5, 16, 64) + 0.2, "int4", group_size=32))
    x = normal(6, 3, 64)
    changed = weight.scales[::-1] if wrong == "scales" else None
    other = quantized_matmul(x, dataclasses.replace(weight, **{wrong: changed}))
    expected = float64_product(x, weight)
    assert np.linalg.norm(other - expected) > 0.05 * np.linalg.norm(expected)


@pytest.mark.parametrize("kind, levels", [("int8", 127), ("fp8", 448)])
@pytest.mark.parametrize("static", [False, True], ids=["by token", "static"])
def test_rounded_activations(kind, levels, static):
    weight = round_weight(normal(7, 12, 64), kind, activations=kind)
    x = normal(8, 6, 64) * jnp.logspace(-3, 3, 6)[:, None]
    if static:
        weight = dataclasses.replace(weight, activation_scale=jnp.float32(0.02))
    scale = np.full((6, 1), 0.02) if static else np.abs(np.asarray(x)).max(1, keepdims=True) / levels
    ratio = np.clip(np.asarray(x, np.float64) / scale, -levels, levels)
    codes = np.round(ratio) if kind == "int8" else ratio.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    expected = float64_product(codes * scale, weight)
    for implementation in ("xla", "reference"):
        result = quantized_matmul(x, weight, implementation=implementation)
        rows = np.linalg.norm(result - expected, axis=1) / np.maximum(np.linalg.norm(expected, axis=1), 1e-6)
        assert rows.max() < 1e-2 and np.median(rows) < 1e-3  # a code at a tie may fall to either side
    found, _ = activations(jnp.zeros((2, 4)), kind)
    np.testing.assert_array_equal(found.astype(jnp.float32), 0)


@pytest.mark.parametrize("rows", [(), (0,), (1,), (3, 2), (2, 0)])
def test_leading_axes(rows):
    weight = round_weight(normal(9, 6, 4, 64), "int4", group_size=32)
    result = quantized_matmul(jnp.ones((*rows, 64), jnp.bfloat16), weight)
    assert result.shape == (*rows, 24) and result.dtype == jnp.bfloat16
    assert weight.shape == (6, 4, 64) and (weight.outputs, weight.inputs, weight.group_size) == (24, 64, 32)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_activations_beyond_float16_do_not_overflow(dtype):
    """A channel of 60,000, times its scale of 3, is beyond float16; its weight makes it small again."""
    weight = turned(round_weight(normal(10, 16, 64) * 1e-3, "int4", group_size=32))
    weight = dataclasses.replace(weight, input_scales=jnp.full(64, 3.0, jnp.float16))
    x = normal(11, 4, 64).at[:, 7].set(60_000).astype(dtype)
    result = quantized_matmul(x, weight)
    expected = float64_product(x, weight)
    assert np.isfinite(np.asarray(result, np.float32)).all()
    assert np.linalg.norm(np.asarray(result, np.float64) - expected) < 5e-3 * np.linalg.norm(expected)


@pytest.mark.smoke
def test_a_layer_of_a_stack_and_one_compilation():
    stack = [round_weight(normal(20 + n, 8, 64), "int4", group_size=32) for n in range(3)]
    weights = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stack)
    x, traces = normal(30, 2, 64), 0

    @jax.jit
    def product(layer):
        nonlocal traces
        traces += 1
        return quantized_matmul(x, weights.of_layer(layer))

    for layer, own in enumerate(stack):
        np.testing.assert_allclose(product(layer), quantized_matmul(x, own), rtol=1e-6)
    assert traces == 1
    _, scanned = jax.lax.scan(lambda _, own: (None, quantized_matmul(x, own)), None, weights)
    np.testing.assert_allclose(scanned[2], quantized_matmul(x, stack[2]), rtol=1e-6)


def test_gradients_of_activations_are_those_of_the_dense_weight():
    weight = turned(round_weight(normal(12, 8, 64), "int4", group_size=32))
    x, out = normal(13, 3, 64), normal(14, 3, 8)
    found = jax.grad(lambda x: (quantized_matmul(x, weight) * out).sum())(x)
    np.testing.assert_allclose(found, out @ dequantize(weight), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(format="int5"), "format must be one of .*'int5'"),
        (dict(codes=jnp.zeros((8, 64), jnp.int8)), r"codes must be uint8 of shape \(8, 32\); got int8 \(8, 64\)"),
        (dict(scales=jnp.ones((3, 8))), "G a divisor of 64 inputs"),
        (dict(scales=jnp.ones((2, 7))), r"scales must be .* of shape \(2, 8\); got float32 \(2, 7\)"),
        (dict(zeros=jnp.zeros((2, 8))), "zeros must be int8"),
        (dict(input_scales=jnp.ones(63)), r"input_scales .* \(64,\); got float32 \(63,\)"),
        (dict(order=jnp.arange(64.0)), "order must be int32"),
        (dict(activations="fp8"), "fp8 activations need fp8 codes; got int4"),
        (dict(activations="int4"), "activations must be None, 'int8' or 'fp8'; got 'int4'"),
        (dict(num_inputs=2), "must have outputs and 2 axes of inputs"),
        (dict(rotation=Rotation(jnp.zeros((2, 31)), jnp.zeros((2, 64), jnp.int16))), "rotation.theta"),
    ],
)
def test_parts_that_do_not_fit(plain_calls, change, message):
    weight = dataclasses.replace(round_weight(normal(15, 8, 64), "int4", group_size=32), **change)
    with pytest.raises(ValueError, match=message):
        quantized_matmul(jnp.ones((2, 64)), weight)


def test_calls_that_do_not_fit(plain_calls):
    weight = round_weight(normal(16, 16, 64), "int4", group_size=32)
    with pytest.raises(ValueError, match="end with 64 inputs; got float32 of shape \\(2, 63\\)"):
        quantized_matmul(jnp.ones((2, 63)), weight)
    with pytest.raises(ValueError, match=r"implementation must be None or one of .*'cuda'"):
        quantized_matmul(jnp.ones((2, 64)), weight, implementation="cuda")
    with pytest.raises(NotImplementedError, match='"mosaic": needs bfloat16 activations; got float32'):
        quantized_matmul(jnp.ones((2, 64)), weight, implementation="mosaic")
    with pytest.raises(NotImplementedError, match=r'"mosaic": needs an NVIDIA GPU of compute capability 9\.0'):
        quantized_matmul(jnp.ones((2, 64), jnp.bfloat16), weight, implementation="mosaic")
    with pytest.raises(NotImplementedError, match='"mosaic": needs a multiple of 16 outputs; got 8'):
        narrow = round_weight(normal(16, 8, 64), "int4", group_size=32)
        quantized_matmul(jnp.ones((2, 64), jnp.bfloat16), narrow, implementation="mosaic")
    with pytest.raises(NotImplementedError, match='"mosaic": needs a multiple of 16 inputs; got 40'):
        quantized_matmul(
            jnp.ones((2, 40), jnp.bfloat16), round_weight(normal(16, 16, 40), "int8"), implementation="mosaic"
        )
    with pytest.raises(TypeError, match="no parts"):
        weight[0]


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "nvfp4"])
def test_interleaved_codes_stand_for_the_same_weight(name):
    weight = round_weight(normal(0, 8, 256), **FORMATS[name])
    other = interleave(weight)
    other.check()
    assert other.interleaved and interleave(other) is other
    assert not np.array_equal(np.asarray(weight.codes).view("u1"), np.asarray(other.codes).view("u1"))
    np.testing.assert_array_equal(matrix(other), matrix(weight))
    x = normal(1, 3, 256, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(quantized_matmul(x, other), quantized_matmul(x, weight))
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), weight)
    np.testing.assert_array_equal(interleave(stack).codes[1].view(jnp.uint8), other.codes.view(jnp.uint8))


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
def test_codes_change_places_within_their_groups(group_size):
    """By figures of the layout: the first word of a thread holds the first codes of four parts of the group."""
    width = min(group_size, 128)
    codes = np.arange(512) % 16
    weight = round_weight(normal(0, 1, 512), "int4", group_size=group_size)
    weight = dataclasses.replace(weight, codes=jnp.asarray(nibbles.pack(codes[None])))
    found = np.asarray(nibbles.unpack(interleave(weight).codes))[0].reshape(-1, width)
    for first, places in zip(range(0, 512, width), found, strict=True):
        # The low and high halves of its pairs are neighbouring inputs; the next pair's are 8 inputs further on.
        inputs = [0, 8, 16, 24, 1, 9, 17, 25]
        assert places[:8].tolist() == codes[[first + i for i in inputs]].tolist()
        assert places[width // 4 : width // 4 + 8].tolist() == codes[[first + 2 + i for i in inputs]].tolist()


def test_weights_that_cannot_be_interleaved():
    by_token = round_weight(normal(0, 8, 256), "int8", activations="int8")
    of_blocks = round_weight(normal(0, 8, 256), "nvfp4")
    uneven = round_weight(normal(0, 8, 96), "int8")
    for weight, reason in (
        (by_token, "eight-bit products of XLA"),
        (of_blocks, "codes of NVFP4 stay with the scales"),
        (uneven, "96 inputs in groups of 96"),
        (round_weight(normal(0, 8, 384), "int4", group_size=192), "384 inputs in groups of 192"),
    ):
        assert interleave(weight) is weight
        with pytest.raises(ValueError, match=f"up: cannot be interleaved: {reason}"):
            dataclasses.replace(weight, interleaved=True).check("up")
