"""Kernels on a mesh of automatic axes, on eight simulated devices, each case in a process of its own.

The interpreter of kernels cannot run inside a partitioned call, so plain functions stand in for them."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import flash_attention

HEAD = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from pallas_kernels import compat, dispatch, flash_attention, masks, partitioning
from pallas_kernels.attention import mosaic_sm90, xla
from pallas_kernels.attention.mosaic_sm90 import backward, forward
from pallas_kernels.attention.skip import Skip, SkipTile
mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
def put(x, *spec):
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))
rng = np.random.default_rng(0)
"""

# Any function that treats rows and heads alike, and how its operands may lie.
CUT = """
shapes = set()
axes = {"q": "b t (k g) h", "k": "b s k h", "length": "b", "scores": "b (k g) t", "twice": "b t (k g) h"}
def function(q, k, length):
    shapes.add((q.shape, k.shape, length.shape))
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    scores = jnp.einsum("btkgh,bskh->bkgt", grouped, k).reshape(q.shape[0], -1, q.shape[1])
    return scores * length[:, None, None], q * 2
def run(q, k, length):
    given = {"q": q, "k": k, "length": length, "absent": None}
    return partitioning.cut(function, given, axes=axes, results=("scores", "twice"), along="bk", units={"g": 2})
q = jnp.asarray(rng.normal(size=(4, 6, 8, 3)), jnp.float32)
k, length = jnp.asarray(rng.normal(size=(4, 5, 4, 3)), jnp.float32), jnp.arange(4.0)
want = function(q, k, length)
def check(got, *local):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    if local:  # also traced whole, for its result shapes
        assert shapes - {((4, 6, 8, 3), (4, 5, 4, 3), (4,))} == {local} - {(q.shape, k.shape, (4,))}, shapes
    shapes.clear()
    jax.clear_caches()
both = put(q, "data", None, "tensor"), put(k, "data", None, "tensor"), put(length, "data")
check(jax.jit(run)(*both), (1, 6, 4, 3), (1, 5, 2, 3), (1,))
with jax.set_mesh(mesh):
    check(jax.jit(run)(*both), (1, 6, 4, 3), (1, 5, 2, 3), (1,))
assert jax.jit(run)(*both)[1].sharding.spec == P("data", None, "tensor")
shapes.clear()
# Rows that only one operand has cut, along two axes of the mesh.
mixed = put(q), put(k, ("data",)), put(length)
check(jax.jit(run)(*mixed), (1, 6, 8, 3), (1, 5, 4, 3), (1,))
# What must not be cut is gathered: positions, and query heads in more parts than there are key heads.
check(jax.jit(run)(put(q, None, "tensor"), put(k, None, None, None), put(length)), q.shape, k.shape, (4,))
flat = jax.make_mesh((8,), ("all",), axis_types=(AxisType.Auto,))
along = NamedSharding(flat, P(None, None, "all"))
whole = NamedSharding(flat, P())
check(jax.jit(run)(jax.device_put(q, along), *(jax.device_put(x, whole) for x in (k, length))), q.shape, k.shape, (4,))
# Heads that only one operand has cut.
check(jax.jit(run)(put(q, None, None, "tensor"), put(k), put(length)), (4, 6, 4, 3), (4, 5, 2, 3), (4,))
# One axis of the mesh for rows of one operand and heads of another: rows win.
check(jax.jit(run)(put(q, "data"), put(k, None, None, "data"), put(length)), (1, 6, 8, 3), (1, 5, 4, 3), (1,))
# Without any sharding, and under transformations.
check(jax.jit(run)(q, k, length))
mapped = jax.jit(jax.vmap(run, in_axes=(0, 0, None)))(q[:, None], k[:, None], jnp.ones(1))
assert mapped[0].shape == (4, 1, 8, 6) and (mapped[1][:, 0] == want[1]).all()
pairs = [x.reshape(2, 2, *x.shape[1:]) for x in (q, k, length)]
check([x.reshape(4, *x.shape[2:]) for x in jax.jit(jax.vmap(run))(*pairs)])
pairs = [jnp.moveaxis(x, 0, 1) for x in pairs]
mapped = jax.jit(jax.vmap(run, in_axes=1, out_axes=1))(*pairs)
check([jnp.moveaxis(x, 1, 0).reshape(4, *x.shape[2:]) for x in mapped])
# Inside shard_map the function itself is called.
specs = P("data", None, "tensor"), P("data", None, "tensor"), P("data")
alone = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=(P("data", "tensor"), specs[0]), check_vma=False)
assert "custom_partitioning" in str(jax.make_jaxpr(run)(*both))
assert "custom_partitioning" not in str(jax.make_jaxpr(alone)(*both))
check(jax.jit(alone)(*both))
shapes.clear()
def body(carry, _):
    scores, twice = jax.checkpoint(run)(carry, *both[1:])
    return twice / 2, scores
scanned = jax.jit(lambda q: jax.lax.scan(body, q, None, length=3)[1])(both[0])
assert ((1, 6, 4, 3), (1, 5, 2, 3), (1,)) in shapes
np.testing.assert_allclose(scanned[2], want[0], rtol=1e-6, atol=1e-6)
"""

# flash_attention with the XLA path in place of both kernels: dispatch, limits, decisions, gradients.
ATTENTION = """
shapes = []
def options(mask, limits, scale, log_threshold=None):
    skip = None if log_threshold is None else Skip(log_threshold, SkipTile(64, 128))
    return {"mask": mask, "limits": limits, "scale": scale, "skip": skip}
def forward_run(q, k, v, limits, *, mask, scale, config, log_threshold=None, interpret):
    shapes.append(("forward", q.shape, k.shape))
    out, lse, *keep = xla.run(q, k, v, **options(mask, limits, scale, log_threshold))
    return out, lse, keep[0] if keep else None
def backward_run(q, k, v, limits, out, lse, d_out, d_lse, *, keep=None, mask, scale, config, interpret):
    shapes.append(("backward", q.shape, k.shape))
    if keep is not None:  # the decisions of one row of tiles that all stay
        assert keep.shape[:2] == (q.shape[0], q.shape[2])
    threshold = None if keep is None else jnp.full(q.shape[0], jnp.log(0.3))
    return jax.vjp(lambda *x: xla.run(*x, **options(mask, limits, scale, threshold))[:2], q, k, v)[1]((d_out, d_lse))
forward.run, backward.run = forward_run, backward_run
compat.missing_hopper = lambda: None
dispatch.preferred = lambda *_, **__: (("mosaic", "xla"), "")
q = jnp.asarray(rng.normal(size=(4, 256, 8, 64)), jnp.bfloat16)
k, v = (jnp.asarray(rng.normal(size=(4, 256, 4, 64)), jnp.bfloat16) for _ in range(2))
lengths = jnp.asarray([256, 3, 17, 140])
segments = jnp.asarray(rng.integers(0, 2, (4, 256)))
def loss(q, k, v, lengths, segments, **more):
    given = {"kv_lengths": lengths, "segment_ids": segments, "return_lse": True, "return_selection": True}
    out, lse, keep = flash_attention(q, k, v, skip_threshold=0.3, **given, **more)
    return (out.astype(jnp.float32) ** 2).sum() + jnp.where(lse == -jnp.inf, 0, lse).sum(), keep
grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True), static_argnames="implementation")
want = grad(q, k, v, lengths, segments, implementation="xla")
for given in (
    (*(put(x, "data", None, "tensor") for x in (q, k, v)), put(lengths, "data"), put(segments, "data")),
    (*(put(x, "data") for x in (q, k, v)), put(lengths), put(segments, None, "tensor")),
):
    shapes.clear()
    got = grad(*given)
    local = {(name, x[0], x[1]) for name, *x in shapes if x[0][0] == 1}
    heads = 4 if "tensor" in given[0].sharding.spec else 8
    assert local == {(name, (1, 256, heads, 64), (1, 256, heads // 2, 64)) for name in ("forward", "backward")}, shapes
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=2e-2, rtol=1e-2)
"""


@pytest.mark.parametrize("script", ["CUT", "ATTENTION"])
def test_on_a_mesh_of_automatic_axes(script):
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    environment |= {"PATH": "/usr/bin:/bin", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-c", HEAD + globals()[script] + "print('ok')"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=500)
    assert done.returncode == 0 and done.stdout == "ok\n", done.stderr[-3000:]


@pytest.mark.gpu
def test_two_gpus_give_what_one_gives():
    """The kernels themselves, forward and backward, on halves of the rows and heads of a mesh of automatic axes."""
    if jax.default_backend() != "gpu" or jax.device_count() < 2:
        pytest.skip("needs two GPUs")
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(4, 1000, 8, 128)), jnp.bfloat16)
    k, v = (jnp.asarray(rng.normal(size=(4, 1000, 2, 128)), jnp.bfloat16) for _ in range(2))
    lengths = jnp.asarray([1000, 0, 17, 640])

    def loss(q, k, v, lengths):
        given = {"kv_lengths": lengths, "implementation": "mosaic"}
        return (flash_attention(q, k, v, **given).astype(jnp.float32) ** 2).sum()

    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    want = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*(jax.device_put(x, one) for x in (q, k, v, lengths)))
    for spec in (P("both"), P(None, None, "both")):
        mesh = jax.make_mesh((2,), ("both",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
        shardings = [NamedSharding(mesh, P(*spec[: x.ndim])) for x in (q, k, v)] + [NamedSharding(mesh, P())]
        cut = [jax.device_put(x, sharding) for x, sharding in zip((q, k, v, lengths), shardings, strict=True)]
        for a, b in zip(jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*cut), want, strict=True):
            np.testing.assert_array_equal(*(np.asarray(x, np.float32) for x in (a, b)))
