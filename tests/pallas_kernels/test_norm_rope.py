"""Norm and rotation of heads against float64, and the two steps one by one; what a call may not be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from benchmarks import norm_rope as benchmark
from pallas_kernels import dispatch
from pallas_kernels.norm_rope import api, apply_rope, norm_rope, rms_norm

# XLA may leave out the rounding between the two steps, so bfloat16 may be off by half a unit of the last place.
LIMITS = {"float32": 1e-6, "bfloat16": 3e-3}


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows, heads, head_dim", [(1, (3, 1), 8), (3, (2,), 6), (5, (1, 2, 1), 2)])
def test_equals_float64(implementation, dtype, rows, heads, head_dim):
    shape = benchmark.Shape(rows=rows, heads=heads, head_dim=head_dim, dtype=dtype, weights="float32")
    arrays, (weights,), cos, sin = shape.arguments()
    results = norm_rope(arrays, weights, cos, sin, epsilon=0.1, implementation=implementation)
    for result, x, weight in zip(results, arrays, weights, strict=True):
        assert result.dtype == x.dtype and result.shape == x.shape
        assert benchmark.error_of(result, benchmark.expected(x, weight, cos, sin, 0.1)) < LIMITS[dtype]


def test_is_the_two_steps():
    (q, k), ((w, v),), cos, sin = benchmark.Shape(rows=3, heads=(4, 2), head_dim=16).arguments()
    together = norm_rope((q, k), (w, v), cos, sin, epsilon=1e-6)
    for result, x, weight in zip(together, (q, k), (w, v), strict=True):
        np.testing.assert_array_equal(result, apply_rope(rms_norm(x, weight, 1e-6), cos, sin))


def test_no_step_may_be_missing_or_swapped():
    """The rounding between the steps is what the GPU's check would miss first."""
    (x,), ((weight,),), cos, sin = benchmark.Shape(rows=64, heads=(4,)).arguments()
    right, limit = benchmark.expected(x, weight, cos, sin), benchmark.LIMITS["bfloat16"]
    wide = x.astype(jnp.float32)
    unrounded = apply_rope(rms_norm(wide, weight, 1e-6), cos, sin).astype(x.dtype)
    swapped = rms_norm(apply_rope(x, cos, sin), weight, 1e-6)
    backwards = apply_rope(rms_norm(x, weight, 1e-6), cos, -sin)
    for wrong in (unrounded, swapped, backwards):
        assert benchmark.error_of(wrong, right) > 4 * limit


def test_gradients_equal_finite_differences():
    (q, k), ((w, v),), cos, sin = benchmark.Shape(rows=2, heads=(2, 1), head_dim=4, dtype="float32").arguments()
    operands = (q, k, w.astype(jnp.float32), v.astype(jnp.float32), cos, sin)

    def value(*operands):
        q, k, w, v, cos, sin = (jnp.asarray(x) for x in operands)
        results = norm_rope((q / 8, k * 3), (w, v), cos, sin, epsilon=0.1)
        return sum(jnp.sin(result).sum() for result in results)

    check_grads(value, operands, order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


@pytest.mark.usefixtures("plain_calls")
@pytest.mark.parametrize(
    "change, message",
    [
        ({"heads": ()}, "heads need a weight each, and there must be some; got 0 and 2"),
        ({"heads": (jnp.zeros((1, 2, 3, 64)),)}, "got 1 and 2"),
        ({"heads": (jnp.zeros((1, 2, 3, 64), int),) * 2}, "heads must be floating"),
        ({"heads": (jnp.zeros((1, 2, 3, 5)),) * 2}, "with an even H; got float32"),
        ({"heads": (jnp.zeros((2, 3, 64)),) * 2}, r"heads must be floating \[B, T, N, H\]"),
        ({"heads": (jnp.zeros((1, 2, 3, 64)), jnp.zeros((1, 3, 3, 64)))}, "heads must agree in dtype, B, T and H"),
        ({"heads": (jnp.zeros((1, 2, 3, 64)), jnp.zeros((1, 2, 3, 64), jnp.bfloat16))}, "heads must agree"),
        ({"weights": (jnp.zeros(64), jnp.zeros(32))}, r"weights must have shape \(64,\); got \(32,\)"),
        ({"cos": jnp.zeros((1, 2, 64))}, r"cos and sin must have shape \(1, 2, 32\); got \(1, 2, 64\)"),
        ({"sin": jnp.zeros((2, 1, 32))}, r"cos and sin must have shape"),
        ({"implementation": "triton"}, "implementation must be"),
    ],
)
def test_bad_arguments(change, message):
    given = {
        "heads": (jnp.zeros((1, 2, 3, 64)), jnp.zeros((1, 2, 1, 64))),
        "weights": (jnp.zeros(64),) * 2,
        "cos": jnp.zeros((1, 2, 32)),
        "sin": jnp.zeros((1, 2, 32)),
    }
    with pytest.raises(ValueError, match=message):
        norm_rope(**given | change, epsilon=1e-6)
    with pytest.raises(NotImplementedError, match='"mosaic": needs an NVIDIA GPU'):
        norm_rope(**given, epsilon=1e-6, implementation="mosaic")


def test_the_automatic_choice(monkeypatch):
    shape = benchmark.Shape()
    arrays, (weights,), cos, sin = shape.arguments()
    given = (arrays, weights, cos, sin)
    name, reason = api.automatic(*given)
    assert name == "xla" and ("not an NVIDIA GPU" in reason or jax.default_backend() == "gpu")
    assert api.automatic(tuple(x[:, :0] for x in arrays), weights, cos[:, :0], sin[:, :0]) == ("xla", "nothing to do")
    monkeypatch.setattr(dispatch, "preferred", lambda *_, **__: (("mosaic", "xla"), ""))
    if jax.default_backend() != "gpu":  # what was preferred cannot run
        assert api.automatic(*given)[0] == "xla" and "needs an NVIDIA GPU" in api.automatic(*given)[1]
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    explicit = jax.sharding.AbstractMesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.sharding.use_abstract_mesh(explicit):
        assert api.automatic(*given)[0] == "xla" and "2 devices" in api.automatic(*given)[1]
