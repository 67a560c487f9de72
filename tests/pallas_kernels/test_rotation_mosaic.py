"""The Hopper kernel of rotations: interpreted, lowered for CUDA; its gradients, transforms and errors.

The interpreter runs the steps in another body (the kernel's own is MLIR): tiles, groups, layers and padding are tested
here, the steps themselves by `python -m benchmarks.rotation check` on a GPU (46 of 46 on an H200, 2026-11-29).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import rotation as benchmark
from pallas_kernels import compat, dispatch
from pallas_kernels.quantized_matmul import Rotation, quantized_matmul, quantized_matmuls
from pallas_kernels.quantized_matmul.rounding import round_weight
from pallas_kernels.rotation import Normed, Turn, api, made, mosaic_sm90, pairwise_rotations

SHAPES = [
    benchmark.Shape(rows=1, channels=256, layers=3),
    benchmark.Shape(rows=19, channels=64, group_size=32, steps=3, rotations=2, dtype="float32", layers=3),
    benchmark.Shape(rows=5, channels=256, group_size=256, steps=2, layers=3),
    benchmark.Shape(rows=33, channels=8, group_size=2, steps=1, rotations=3, layers=3),
    benchmark.Shape(rows=3, channels=128, group_size=64, steps=2, rotations=2, layers=3),
    benchmark.Shape(rows=6, channels=256, group_size=32, steps=2, rotations=2, layers=3, is_normed=True),
    benchmark.Shape(rows=1, channels=256, steps=0, rotations=2, layers=3, is_normed=True),
    benchmark.Shape(rows=17, channels=128, group_size=64, steps=2, layers=3, is_normed=True, dtype="float32"),
]


def of_layer(turns, layer):
    return [turn._replace(layer=jnp.int32(layer)) for turn in turns]


def check(shape, results, x, turns, layer):
    for turn, result in zip(turns, results, strict=True):
        right = benchmark.expected(x, turn, layer, shape)
        error = np.linalg.norm(np.asarray(result, np.float64) - right) / np.linalg.norm(right)
        assert result.dtype == x.dtype and error < benchmark.LIMITS[shape.dtype]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_equals_float64(shape):
    x, turns = shape.arguments()
    run = jax.jit(
        lambda x, turns: mosaic_sm90.run(
            x,
            turns,
            group_size=shape.group_size,
            interpret=compat.interpret_params(detect_races=True),
        )
    )
    for layer in (1, 2) if shape.rows == 1 else (1,):
        check(shape, run(x, of_layer(turns, layer)), x, turns, layer)
    if shape.rows == 1:  # a layer outside is the nearest
        check(shape, run(x, of_layer(turns, 7)), x, turns, 2)


def test_without_scales_and_rows():
    shape = SHAPES[1]
    x, turns = shape.arguments()
    options = {"group_size": 32, "interpret": compat.interpret_params()}
    plain = [turn._replace(channel_scales=None, layer=jnp.int32(0)) for turn in turns]
    ones = [turn._replace(channel_scales=jnp.ones_like(turn.channel_scales)) for turn in turns]
    check(shape, mosaic_sm90.run(x, plain, **options), x, ones, 0)
    assert mosaic_sm90.run(x[:0], plain, **options)[0].shape == (0, 64)
    assert mosaic_sm90.run(x, [], **options) == ()


@pytest.mark.parametrize(
    "shape", [benchmark.Shape(rows=3, rotations=3), benchmark.Shape(rows=40, group_size=32)], ids=str
)
def test_lowers_for_cuda(shape):
    x, turns = shape.arguments()
    call = jax.jit(lambda x, turns: mosaic_sm90.run(x, turns, group_size=shape.group_size))
    text = call.trace(x, of_layer(turns, 0)).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 1, "one launch"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": jnp.ones((2, 64), jnp.float16)}, "rows in bfloat16 or float32; got float16"),
        ({"group_size": 6, "channels": 24}, "a power of two up to 256 channels; got 6"),
        ({"pairs": jnp.int8}, "pairs in int16 or int32; got int8"),
        ({"theta": jnp.float8_e4m3fn}, "angles and scales in .*; got float8_e4m3fn"),
        ({}, "needs an NVIDIA GPU"),
    ],
)
def test_what_it_cannot_do(change, message):
    shape = benchmark.Shape(rows=2, channels=change.get("channels", 64), group_size=change.get("group_size", 32))
    x, (turn,) = shape.arguments()
    turn = Turn(
        turn.theta.astype(change.get("theta", turn.theta.dtype)),
        turn.pairs.astype(change.get("pairs", turn.pairs.dtype)),
        layer=jnp.int32(0),
    )
    with pytest.raises(NotImplementedError, match=f'"mosaic": .*{message}'):
        pairwise_rotations(change.get("x", x), [turn], group_size=shape.group_size, implementation="mosaic")


# ---------------------------------------------------------------------------------------------------------------
# As the automatic choice


@pytest.fixture
def hopper(monkeypatch):
    """A Hopper GPU whose kernel is XLA's path in disguise; the launches."""
    launches = []

    def run(x, turns, *, group_size):
        launches.append(len(turns))
        return api._plain(api.xla.run, x, turns, group_size, inverse=False)

    monkeypatch.setattr(mosaic_sm90, "run", run)
    monkeypatch.setattr(compat, "missing_hopper", lambda: None)
    monkeypatch.setattr(dispatch, "undivided", lambda **_: None)

    def preferred(op, *_, **__):
        return (("mosaic", "xla") if op == "pairwise_rotation" else ("xla",)), ""

    monkeypatch.setattr(dispatch, "preferred", preferred)
    return launches


def random_call():
    shape = benchmark.Shape(rows=3, channels=64, group_size=32, steps=2, rotations=2, dtype="float32")
    x, turns = shape.arguments()
    return x, of_layer(turns, 1)


def test_gradients_are_those_of_xla(hopper):
    x, turns = random_call()
    floats = [(turn.theta.astype(jnp.float32), turn.channel_scales.astype(jnp.float32)) for turn in turns]

    def value(implementation):
        def call(x, floats):
            own = [turn._replace(theta=a, channel_scales=s) for turn, (a, s) in zip(turns, floats, strict=True)]
            results = pairwise_rotations(x, own, group_size=32, implementation=implementation)
            return sum(jnp.sin(result).sum() * (i + 1) for i, result in enumerate(results))

        return jax.jit(jax.value_and_grad(call, argnums=(0, 1)))(x, floats)

    found, expected = value(None), value("xla")
    assert hopper == [2]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), found, expected)


@pytest.mark.parametrize("mapped", ["x", "turns", "both"])
def test_vmap(hopper, mapped):
    x, turns = random_call()
    xs = jnp.stack([x, -2 * x]) if mapped != "turns" else x
    stacks = [turn._replace(layer=jnp.arange(2)) if mapped != "x" else turn for turn in turns]
    layers = 0 if mapped != "x" else None
    axes = (0 if mapped != "turns" else None, [Turn(None, None, None, layers)] * 2)
    call = jax.vmap(lambda x, turns: pairwise_rotations(x, turns, group_size=32), in_axes=axes)
    results = call(xs, stacks)
    for i in range(2):
        own = [turn._replace(layer=jnp.int32(i if mapped != "x" else 1)) for turn in turns]
        alone = pairwise_rotations(xs[i] if mapped != "turns" else xs, own, group_size=32, implementation="xla")
        for result, right in zip(results, alone, strict=True):
            np.testing.assert_allclose(result[i], right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("axis", [0, None])
def test_vmap_over_norms(hopper, axis):
    """Over their rows, and over their weights too."""
    shape = benchmark.Shape(rows=3, channels=128, group_size=32, steps=2, rotations=1, dtype="float32")
    x, turns = shape.arguments()
    (turn,) = of_layer(turns, 1)
    weights = jnp.stack([jnp.linspace(1, 2, 128), jnp.linspace(-1, 3, 128)])
    xs = jnp.stack([x, -2 * x])

    def call(x, weight, implementation=None):
        return pairwise_rotations(Normed(x, weight, 0.1), [turn], group_size=32, implementation=implementation)[0]

    result = jax.vmap(call, in_axes=(0, axis))(xs, weights if axis == 0 else weights[0])
    assert hopper, "the kernel"
    for i in range(2):
        alone = call(xs[i], weights[i if axis == 0 else 0], "xla")
        np.testing.assert_allclose(result[i], alone, rtol=1e-6, atol=1e-6)


def test_weights_that_share_activations_rotate_in_one_launch(hopper):
    x, turns = random_call()
    rng = np.random.default_rng(3)

    def weight(turn, **options):
        plain = round_weight(jnp.asarray(rng.normal(size=(16, 64)), jnp.float32), "int4", **options)
        if turn is None:
            return plain
        own = jax.tree.map(lambda part: part[1], turn._replace(layer=None))
        rotation = Rotation(own.theta, own.pairs)
        return dataclasses.replace(plain, input_scales=own.channel_scales, rotation=rotation)

    weights = [weight(turns[0], group_size=32), weight(None, group_size=64), weight(turns[1], group_size=32)]
    together = quantized_matmuls(x, weights)
    assert hopper == [2]
    for result, weight in zip(together, weights, strict=True):
        np.testing.assert_array_equal(result, quantized_matmul(x, weight))


# ---------------------------------------------------------------------------------------------------------------
# Norms before products


def test_norms_are_made_by_what_rotates(hopper):
    rng = np.random.default_rng(5)
    x = jnp.asarray(rng.normal(size=(3, 256)) * 2, jnp.bfloat16)
    rows = Normed(x, jnp.asarray(rng.normal(size=256), jnp.bfloat16), 1e-6)
    plain = [
        round_weight(jnp.asarray(rng.normal(size=(16, 256)), jnp.float32), "int4", group_size=size)
        for size in (128, 128, 32)
    ]
    scaled = dataclasses.replace(plain[0], input_scales=jnp.asarray(rng.uniform(0.5, 2, 256), jnp.float16))

    def rotated(weight):
        pairs = np.argsort(rng.random((2, 256 // weight.group_size, weight.group_size)), axis=-1).reshape(2, 256)
        rotation = Rotation(jnp.asarray(rng.normal(size=(2, 128)), jnp.float16), jnp.asarray(pairs, jnp.int16))
        return dataclasses.replace(weight, rotation=rotation)

    weights = [*plain, scaled, rotated(plain[1]), rotated(plain[2])]
    results = quantized_matmuls(rows, weights)
    assert sorted(hopper) == [1, 3], "groups of 128 share a launch, and weights that change nothing its result"
    for result, weight in zip(results, weights, strict=True):
        right = quantized_matmul(made(rows), weight, implementation="xla")
        np.testing.assert_allclose(result.astype(jnp.float32), right.astype(jnp.float32), rtol=2**-7, atol=2**-7)


def test_norms_that_do_not_fit():
    x = jnp.ones((2, 64))
    with pytest.raises(ValueError, match=r"the weight of a norm must have shape \(64,\); got \(32,\)"):
        pairwise_rotations(Normed(x, jnp.ones(32), 1e-6), [Turn(None, None)], group_size=32)
    with pytest.raises(ValueError, match="the axis of a norm must stay 64"):
        Normed(x, jnp.ones(64), 1e-6).reshape((4, 32))
    rows = Normed(jnp.ones((2, 96)), jnp.ones(96), 1e-6)
    assert "norms over a multiple of 128 channels; got 96" in mosaic_sm90.unsupported(rows, [], group_size=32)
