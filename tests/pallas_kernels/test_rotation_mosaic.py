"""The Hopper kernel of rotations: interpreted, lowered for CUDA; its gradients, transforms and errors.

The interpreter runs the steps in another body (the kernel's own is MLIR): tiles, groups, layers and padding are tested
here, the steps themselves and the exchange of a cluster by `python -m benchmarks.rotation check` on a GPU (327 of 327
on an H200, 2026-11-30).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import rotation as benchmark
from pallas_kernels import compat, dispatch
from pallas_kernels.norm_rope import rms_norm
from pallas_kernels.partial import Partial, made
from pallas_kernels.quantized_matmul import Rotation, Turned, add_norm, quantized_matmul, quantized_matmuls
from pallas_kernels.quantized_matmul.rounding import round_weight
from pallas_kernels.rotation import Normed, Turn, api, mosaic_sm90, normed_rotations, pairwise_rotations

SHAPES = [
    benchmark.Shape(rows=1, channels=256, layers=3),
    benchmark.Shape(rows=19, channels=64, group_size=32, steps=3, rotations=2, dtype="float32", layers=3),
    benchmark.Shape(rows=5, channels=256, group_size=256, steps=2, layers=3),
    benchmark.Shape(rows=33, channels=8, group_size=2, steps=1, rotations=3, layers=3),
    benchmark.Shape(rows=3, channels=128, group_size=64, steps=2, rotations=2, layers=3),
    benchmark.Shape(rows=6, channels=256, group_size=32, steps=2, rotations=2, layers=3, source="normed"),
    benchmark.Shape(rows=1, channels=256, steps=0, rotations=2, layers=3, source="normed"),
    benchmark.Shape(rows=17, channels=128, group_size=64, steps=2, layers=3, source="normed", dtype="float32"),
    benchmark.Shape(rows=1, channels=1024, steps=2, rotations=3, layers=2, source="normed sum"),
    benchmark.Shape(rows=9, channels=512, group_size=64, steps=2, layers=2, source="normed sum", dtype="float32"),
    benchmark.Shape(rows=5, channels=96, group_size=32, steps=0, layers=2, source="normed sum", parts=3),
    benchmark.Shape(rows=5, channels=256, steps=0, layers=2, source="normed sum", parts=0),
    benchmark.Shape(rows=5, channels=256, steps=2, rotations=2, layers=2, source="gated", parts=2),
    benchmark.Shape(rows=3, channels=64, group_size=32, steps=2, layers=2, source="gated", parts=0, dtype="float32"),
]


def of_layer(turns, layer):
    return [turn._replace(layer=jnp.int32(layer)) for turn in turns]


def check(shape, results, x, turns, layer):
    if isinstance(x, Normed):
        total, *results = results
        right = benchmark.expected_sum(x)
        limit = 0 if x.y is None else benchmark.LIMITS[shape.dtype]
        assert np.abs(np.asarray(total, np.float64) - right).max() <= limit * np.abs(right).max()
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


@pytest.mark.parametrize("source", ["", "normed sum", "gated"])
def test_tiles_change_nothing(source):
    shape = benchmark.Shape(rows=17, channels=64, group_size=32, steps=2, layers=2, source=source, parts=2)
    x, turns = shape.arguments()
    options = {"group_size": 32, "interpret": compat.interpret_params()}
    run = functools.partial(mosaic_sm90.run, x, of_layer(turns, 1), **options)
    jax.tree.map(np.testing.assert_array_equal, run(tile=8), run())
    if source:
        with pytest.raises(ValueError, match="tiles of 16 rows need 32 rows of parts; got 24"):
            run(tile=16)


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
        return normed_rotations(Normed(x, weight, 0.1), [turn], group_size=32, implementation=implementation)[1][0]

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


# Sums and norms before products


def random_readers(rng):
    plain = [
        round_weight(jnp.asarray(rng.normal(size=(16, 256)), jnp.float32), "int4", group_size=size)
        for size in (128, 128, 32)
    ]
    scales = jnp.asarray(rng.uniform(0.5, 2, 256), jnp.float16)

    def rotated(weight):
        pairs = np.argsort(rng.random((2, 256 // weight.group_size, weight.group_size)), axis=-1).reshape(2, 256)
        rotation = Rotation(jnp.asarray(rng.normal(size=(2, 128)), jnp.float16), jnp.asarray(pairs, jnp.int16))
        return dataclasses.replace(weight, rotation=rotation)

    ordered = dataclasses.replace(plain[1], order=jnp.asarray(rng.permutation(256), jnp.int32))
    scaled = dataclasses.replace(plain[0], input_scales=scales)
    return {
        "plain": plain[0], "small": plain[2], "ordered": ordered, "scaled": scaled,
        "rotated": rotated(plain[1]), "rotated in 32": rotated(plain[2]),
    }  # fmt: skip


@pytest.mark.parametrize(
    "names, launches",
    [
        (("plain", "small"), [1]),  # one result for all
        (("plain", "ordered"), [1]),
        (("plain", "scaled", "rotated", "small"), [3]),
        (("rotated", "ordered"), [2]),
        (("rotated", "rotated in 32"), [1, 1]),  # groups of two sizes: by themselves, after XLA's norm
    ],
)
@pytest.mark.parametrize("y", ["none", "array", "parts"])
def test_sums_and_norms_are_made_by_what_rotates(hopper, names, launches, y):
    rng = np.random.default_rng(5)
    x, other = (jnp.asarray(rng.normal(size=(3, 256)) * 2, jnp.bfloat16) for _ in range(2))
    weight = jnp.asarray(rng.normal(size=256), jnp.bfloat16)
    if y == "parts":
        parts = jnp.asarray(rng.normal(size=(4, 8, 512)), jnp.float32)
        other = Partial(parts, 256, 256, (3, 256), jnp.dtype(jnp.bfloat16))
    second = None if y == "none" else other
    readers = [random_readers(rng)[name] for name in names]
    total, normed = add_norm(x, second, weight, 1e-6, readers=readers)
    np.testing.assert_array_equal(total, x if second is None else x + made(second))
    results = quantized_matmuls(normed, readers)
    assert sorted(hopper) == launches
    for result, reader in zip(results, readers, strict=True):
        right = quantized_matmul(rms_norm(total, weight, 1e-6), reader, implementation="xla")
        np.testing.assert_allclose(result.astype(jnp.float32), right.astype(jnp.float32), rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("rows, names, launches", [(32, "rotated ordered", [2]), (33, "rotated ordered", [1]),
                                                   (33, "plain small", [1])])  # fmt: skip
def test_many_rows_are_normalised_before_they_are_rotated(hopper, rows, names, launches):
    rng = np.random.default_rng(5)
    x, weight = jnp.asarray(rng.normal(size=(rows, 256)), jnp.bfloat16), jnp.ones(256, jnp.bfloat16)
    readers = [random_readers(rng)[name] for name in names.split()]
    total, normed = add_norm(x, x, weight, 1e-6, readers=readers)
    np.testing.assert_array_equal(total, 2 * x)
    results = quantized_matmuls(normed, readers)
    assert hopper == launches
    for result, reader in zip(results, readers, strict=True):
        right = quantized_matmul(rms_norm(2 * x, weight, 1e-6), reader, implementation="xla")
        np.testing.assert_allclose(result.astype(jnp.float32), right.astype(jnp.float32), rtol=2**-7, atol=2**-7)


def test_norms_for_others_are_arrays(hopper):
    """For dense weights, for none at all, and in float16, whose rotated channels are float32."""
    rng = np.random.default_rng(5)
    x, weight = jnp.ones((3, 256)), jnp.ones(256)
    reader = random_readers(rng)["rotated"]
    for dtype, readers in ((jnp.float32, ()), (jnp.float32, (reader, jnp.ones((16, 256)))), (jnp.float16, (reader,))):
        total, normed = add_norm(x.astype(dtype), 2 * x.astype(dtype), weight, 1e-6, readers=readers)
        np.testing.assert_array_equal(total, 3 * x)
        np.testing.assert_allclose(normed, x, rtol=1e-3)
        assert normed.dtype == dtype
    assert not hopper


@pytest.mark.parametrize("y", ["array", "parts"])
def test_gradients_of_sums_and_norms(hopper, y):
    shape = benchmark.Shape(rows=3, channels=128, group_size=32, steps=2, dtype="float32", source="normed sum", parts=3)
    rows, turns = dataclasses.replace(shape, parts=3 if y == "parts" else 0).arguments()
    turns = of_layer(turns, 1)

    def value(implementation):
        def call(rows):
            if isinstance(rows.y, Partial):  # as a product's, which has numbers in all of it
                rows = dataclasses.replace(rows, y=dataclasses.replace(rows.y, parts=jnp.nan_to_num(rows.y.parts)))
            total, (turned,) = normed_rotations(rows, turns, group_size=32, implementation=implementation)
            return jnp.sin(turned).sum() + 2 * jnp.cos(total).sum()

        return jax.jit(jax.value_and_grad(call))(rows)

    found, expected = value(None), value("xla")
    assert hopper == [1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


def test_vmap_over_sums_in_parts(hopper):
    shape = benchmark.Shape(rows=3, channels=128, group_size=32, steps=2, dtype="float32", source="normed sum", parts=3)
    rows, turns = shape.arguments()
    turns = of_layer(turns, 1)
    stack = dataclasses.replace(rows, x=jnp.stack([rows.x, -rows.x]))
    stack = dataclasses.replace(stack, y=dataclasses.replace(rows.y, parts=jnp.stack([rows.y.parts, 2 * rows.y.parts])))
    axes = jax.tree.map(lambda _: 0, stack)
    axes = dataclasses.replace(axes, weight=None)
    results = jax.vmap(lambda rows: normed_rotations(rows, turns, group_size=32), in_axes=(axes,))(stack)
    assert hopper[-1] == 1
    for i in range(2):
        own = dataclasses.replace(rows, x=stack.x[i], y=dataclasses.replace(rows.y, parts=stack.y.parts[i]))
        right = normed_rotations(own, turns, group_size=32, implementation="xla")
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-5), results, right)


def test_norms_that_do_not_fit():
    x, turns = jnp.ones((2, 64)), [Turn(None, None)]
    with pytest.raises(ValueError, match=r"the weight of a norm must have shape \(64,\); got \(32,\)"):
        normed_rotations(Normed(x, jnp.ones(32), 1e-6), turns, group_size=32)
    with pytest.raises(ValueError, match=r"what is added to float32 \(2, 64\) must be like it; got bfloat16 \(2, 64\)"):
        normed_rotations(Normed(x, jnp.ones(64), 1e-6, x.astype(jnp.bfloat16)), turns, group_size=32)
    wide = Normed(jnp.ones((2, 17 * 256)), jnp.ones(17 * 256), 1e-6)
    assert "norms of up to 2048 channels" in mosaic_sm90.unsupported(wide, turns, group_size=256)
    with pytest.raises(ValueError, match="x was turned for 1 weights; got 2"):
        readers = [random_readers(np.random.default_rng(0))["plain"]] * 2
        quantized_matmuls(Turned((jnp.ones((2, 256)),)), readers)
