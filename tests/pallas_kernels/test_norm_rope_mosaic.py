"""The Hopper kernel of norm and rotation: interpreted, lowered for CUDA; its gradients, transforms and errors.

The interpreter runs a warp's work in another body (the kernel's own is MLIR): grid, numbering of heads and layouts are
tested here, that work itself by `python -m benchmarks.norm_rope check` on a GPU.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import norm_rope as benchmark
from pallas_kernels import compat, dispatch
from pallas_kernels.norm_rope import api, mosaic_sm90, norm_rope
from pallas_kernels.partial import Partial, made

SHAPES = [
    benchmark.Shape(rows=1, heads=(5, 1)),
    benchmark.Shape(rows=3, heads=(1,), head_dim=64, weights="float32"),
    benchmark.Shape(rows=1, heads=(32,), head_dim=256, dtype="float32"),
    benchmark.Shape(rows=3, heads=(5, 1, 3), head_dim=64, dtype="float32", weights="float32"),
    benchmark.Shape(rows=2, heads=(2, 2), head_dim=192),
    benchmark.Shape(rows=3, heads=(3, 2, 1), head_dim=64, parts=3),
    benchmark.Shape(rows=2, heads=(2,), head_dim=128, dtype="float32", parts=1),
]


def by_rows(shape):
    heads, (weights,), cos, sin = shape.arguments()
    return tuple(x.reshape(x.shape[1:]) for x in heads), weights, cos[0], sin[0]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_equals_float64(shape):
    heads, weights, cos, sin = by_rows(shape)
    interpret = compat.interpret_params(detect_races=True)
    results = mosaic_sm90.run(heads, weights, cos, sin, epsilon=benchmark.EPSILON, interpret=interpret)
    for result, x, weight in zip(results, heads, weights, strict=True):
        assert result.dtype == x.dtype and result.shape == x.shape
        right = benchmark.expected(x, weight, cos, sin)
        # Interpreted, XLA may leave out the rounding between the steps.
        assert benchmark.error_of(result, right) < 10 * benchmark.LIMITS[shape.dtype]


def test_without_rows_or_heads():
    heads, weights, cos, sin = by_rows(SHAPES[0])
    options = {"epsilon": 1e-6, "interpret": compat.interpret_params()}
    empty = mosaic_sm90.run(tuple(x[:0] for x in heads), weights, cos[:0], sin[:0], **options)
    assert [x.shape for x in empty] == [(0, 5, 128), (0, 1, 128)]
    none = mosaic_sm90.run(tuple(x[:, :0] for x in heads), weights, cos, sin, **options)
    assert [x.shape for x in none] == [(1, 0, 128)] * 2


@pytest.mark.smoke
@pytest.mark.parametrize(
    "shape",
    [
        benchmark.Shape(),
        benchmark.Shape(rows=3, heads=(5, 1, 3), head_dim=192, dtype="float32"),
        benchmark.Shape(heads=(32, 8, 8), parts=6),
    ],
    ids=str,
)
def test_lowers_for_cuda(shape):
    call = jax.jit(functools.partial(mosaic_sm90.run, epsilon=1e-6))
    text = call.trace(*by_rows(shape)).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 1, "one launch"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dtype": "float16"}, "heads in bfloat16 or float32; got float16"),
        ({"head_dim": 96}, "a multiple of 64 up to 256; got 96"),
        ({"head_dim": 320}, "a multiple of 64 up to 256; got 320"),
        ({"weights": "float16"}, "weights in one of bfloat16, float32; got float16"),
        ({}, "needs an NVIDIA GPU"),
    ],
)
def test_what_it_cannot_do(change, message):
    heads, (weights,), cos, sin = benchmark.Shape(**change).arguments()
    with pytest.raises(NotImplementedError, match=f'norm_rope "mosaic": .*{message}'):
        norm_rope(heads, weights, cos, sin, epsilon=1e-6, implementation="mosaic")


def test_mixed_weights_other_tables_and_huge_arrays():
    heads, weights, cos, sin = by_rows(SHAPES[0])
    options = {"interpret": object()}
    assert mosaic_sm90.unsupported(heads, weights, cos, sin, **options) is None
    mixed = (weights[0], weights[1].astype(jnp.float32))
    assert "all weights in one of" in mosaic_sm90.unsupported(heads, mixed, cos, sin, **options)
    other = cos.astype(jnp.bfloat16)
    assert "tables in float32; got bfloat16" in mosaic_sm90.unsupported(heads, weights, other, sin, **options)
    huge = tuple(jax.ShapeDtypeStruct((2**20, 16, 128), jnp.bfloat16) for _ in heads)
    assert "2^31 elements" in mosaic_sm90.unsupported(huge, weights, cos, sin, **options)


# ---------------------------------------------------------------------------------------------------------------
# As the automatic choice


@pytest.fixture
def hopper(monkeypatch):
    """A Hopper GPU whose kernel is XLA's path in disguise; the rows of its launches."""
    launches = []

    def run(heads, weights, cos, sin, *, epsilon):
        launches.append(len(cos))
        heads = [made(x) for x in heads]
        results = api.xla.run(tuple(x[None] for x in heads), weights, cos[None], sin[None], epsilon)
        return tuple(x[0] for x in results)

    monkeypatch.setattr(mosaic_sm90, "run", run)
    monkeypatch.setattr(compat, "missing_hopper", lambda: None)
    monkeypatch.setattr(dispatch, "undivided", lambda **_: None)
    monkeypatch.setattr(dispatch, "preferred", lambda *_, **__: (("mosaic", "xla"), ""))
    return launches


def test_gradients_are_those_of_xla(hopper):
    heads, (weights,), cos, sin = benchmark.Shape(rows=3, heads=(4, 2), head_dim=64, dtype="float32").arguments()

    def value(implementation):
        def call(*operands):
            results = norm_rope(*operands, epsilon=0.1, implementation=implementation)
            return sum(jnp.sin(result).sum() * (i + 1) for i, result in enumerate(results))

        return jax.jit(jax.value_and_grad(call, argnums=(0, 1, 2, 3)))(heads, weights, cos, sin)

    found, expected = value(None), value("xla")
    assert hopper == [3]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


def in_parts(rows=3):
    """Queries, keys and values, the last without a norm; unknown numbers would make gradients of unknown ones."""
    shape = benchmark.Shape(rows=rows, heads=(4, 2, 2), head_dim=64, dtype="float32", parts=3)
    heads, (weights,), cos, sin = shape.arguments()
    return tuple(dataclasses.replace(x, parts=jnp.nan_to_num(x.parts)) for x in heads), weights, cos, sin


def test_heads_in_parts_have_the_gradients_of_their_sums(hopper):
    heads, weights, cos, sin = in_parts()

    def value(implementation, heads):
        def call(heads, norms, cos, sin):
            results = norm_rope(heads, (*norms, None), cos, sin, epsilon=0.1, implementation=implementation)
            return sum(jnp.sin(result).sum() * (i + 1) for i, result in enumerate(results))

        return jax.jit(jax.value_and_grad(call, argnums=(0, 1, 2, 3)))(heads, weights[:2], cos, sin)

    found, (expected, (of_heads, *rest)) = value(None, heads), value("xla", tuple(map(made, heads)))
    assert hopper == [3]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found[1][1:], tuple(rest))
    np.testing.assert_allclose(found[0], expected, rtol=1e-5)
    for x, own, right in zip(heads, found[1][0], of_heads, strict=True):
        for part in own.own:
            np.testing.assert_allclose(part.reshape(x.shape), right, rtol=1e-4, atol=1e-4)


def test_vmap_over_heads_in_parts(hopper):
    heads, weights, cos, sin = in_parts()
    stacks = tuple(dataclasses.replace(x, parts=jnp.stack([x.parts, -2 * x.parts])) for x in heads)
    results = jax.vmap(lambda heads: norm_rope(heads, weights, cos, sin, epsilon=0.1))(stacks)
    assert hopper[-1] == 6
    for i, factor in enumerate((1, -2)):
        alone = norm_rope(tuple(factor * made(x) for x in heads), weights, cos, sin, epsilon=0.1, implementation="xla")
        for result, right in zip(results, alone, strict=True):
            np.testing.assert_allclose(result[i], right, rtol=1e-5, atol=1e-5)


def test_which_heads_the_kernel_gets(hopper, monkeypatch):
    """All in as many parts, or the arrays that have a norm; what has none is left as it is."""
    heads, weights, cos, sin = in_parts()
    given = []
    run = mosaic_sm90.run
    monkeypatch.setattr(
        mosaic_sm90, "run", lambda heads, *rest, **options: given.append(heads) or run(heads, *rest, **options)
    )
    arrays = tuple(map(made, heads))
    fewer = dataclasses.replace(heads[1], parts=heads[1].parts[:2].at[1].add(heads[1].parts[2]))
    for call, kinds in (
        (heads, [Partial] * 3),
        (arrays, [jax.Array] * 2),
        ((heads[0], fewer, heads[2]), [jax.Array] * 2),
        ((heads[0], arrays[1], heads[2]), [jax.Array] * 2),
    ):
        results = norm_rope(call, weights, cos, sin, epsilon=0.1)
        assert [isinstance(x, kind) for x, kind in zip(given[-1], kinds, strict=True)] == [True] * len(kinds)
        right = norm_rope(arrays, weights, cos, sin, epsilon=0.1, implementation="xla")
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), results, right)
    assert norm_rope(arrays, weights, cos, sin, epsilon=0.1)[2] is arrays[2]
    only = norm_rope(arrays[2:], weights[2:], cos, sin, epsilon=0.1)
    assert only[0] is arrays[2] and len(given) == 5
    mixed = "as many parts of all heads"
    options = {"interpret": object()}
    flat = tuple(x.reshape((3, *x.shape[2:])) for x in (heads[0], arrays[1]))
    assert mixed in mosaic_sm90.unsupported(flat, weights[:2], cos[0], sin[0], **options)
    assert "the weight of a norm" in mosaic_sm90.unsupported(flat[:1], (None,), cos[0], sin[0], **options)


@pytest.mark.parametrize("tables_too", [True, False])
def test_vmap(hopper, tables_too):
    heads, (weights,), cos, sin = benchmark.Shape(rows=3, heads=(4, 2), head_dim=64, dtype="float32").arguments()
    stacks = tuple(jnp.stack([x, -2 * x]) for x in heads)
    tables = tuple(jnp.stack([x, x * x]) if tables_too else x for x in (cos, sin))
    call = lambda heads, cos, sin: norm_rope(heads, weights, cos, sin, epsilon=0.1)  # noqa: E731
    results = jax.vmap(call, in_axes=(0, *(0 if tables_too else None,) * 2))(stacks, *tables)
    assert hopper[-1] == 6, "as more rows"
    for i in range(2):
        own = tuple(x[i] if tables_too else x for x in tables)
        alone = norm_rope(tuple(x[i] for x in stacks), weights, *own, epsilon=0.1, implementation="xla")
        for result, right in zip(results, alone, strict=True):
            np.testing.assert_allclose(result[i], right, rtol=1e-6, atol=1e-6)
