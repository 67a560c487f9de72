"""Kernels on a mesh of automatic axes, on eight simulated devices, each case in a process of its own.

The interpreter of kernels cannot run inside a partitioned call, so plain functions stand in for them."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import flash_attention
from pallas_kernels.quantized_matmul import QuantizedTensor, Rotation, quantized_matmul

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
# One key head for all query heads, and one for each; rows that do not divide are padded.
for heads, rows in ((1, 4), (8, 4), (4, 3)):
    given = q[:rows], k[:rows, :, :1].repeat(heads, 2), length[:rows]
    def uneven(q, k, length):
        q = jax.lax.with_sharding_constraint(q, NamedSharding(mesh, P("data", None, "tensor")))
        operands = {"q": q, "k": k, "length": length}
        return partitioning.cut(
            function, operands, axes=axes, results=("scores", "twice"), along="bk", units={"g": 8 // heads}
        )
    for a, b in zip(jax.jit(uneven)(*given), function(*given), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
assert ((1, 6, 8, 3), (1, 5, 1, 3), (1,)) in shapes and ((1, 6, 4, 3), (1, 5, 4, 3), (1,)) in shapes
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

PRODUCTS = """
import dataclasses, re
import stand_ins
from pallas_kernels.quantized_matmul import QuantizedTensor, Rotation, api, interleave, quantized_matmuls
stand_ins.install()
def stack(outputs, inputs, format="int4", size=None, **options):
    groups = inputs // size if size else 1
    bits, (grid, both) = 4 if format in ("int4", "nvfp4") else 8, ((2, groups, outputs), (2, outputs, inputs))
    codes = rng.integers(0, 256, (*both[:2], inputs * bits // 8)).astype("u1")
    parts = {"codes": jnp.asarray(codes if bits == 4 else codes.view("i1"))}
    parts["scales"] = jnp.asarray(rng.uniform(0.01, 0.02, grid), {"nvfp4": "float8_e4m3fn"}.get(format, "float16"))
    if format == "int4":
        parts["zeros"] = jnp.asarray(rng.integers(-8, 8, grid), jnp.int8)
    if format == "nvfp4":
        parts["global_scale"] = jnp.asarray([3.0, 0.5])
    return QuantizedTensor(**parts, format=format, shape=(outputs, inputs), **options)
def rotated(weight):
    inputs, size = weight.shape[1], weight.of_layer(0).group_size
    pairs = np.argsort(rng.random((2, 1, inputs // size, size)), axis=-1).reshape(2, 1, inputs)
    theta = jnp.asarray(rng.normal(size=(2, 1, inputs // 2)), jnp.float32)
    return dataclasses.replace(weight, rotation=Rotation(theta, jnp.asarray(pairs, jnp.int16)))
def place(weight, outputs, inputs):
    grid = (None, inputs if weight.scales.shape[1] > 1 else None, outputs)
    turn = None if weight.rotation is None else Rotation(*(put(x, None, None, inputs) for x in weight.rotation))
    zeros = None if weight.zeros is None else put(weight.zeros, *grid)
    parts = {"codes": put(weight.codes, None, outputs, inputs), "scales": put(weight.scales, *grid)}
    return dataclasses.replace(weight, **parts, zeros=zeros, rotation=turn)
def run(x, weights, dtype="bfloat16", implementation=None):
    return quantized_matmuls(x, [w.of_layer(1) for w in weights], dtype=dtype, implementation=implementation)
def check(name, x, weights, lie, local, sent=(), dtype="bfloat16", atol=1e-4):
    \"\"\"`lie`: mesh axes of rows and inputs of x, then of outputs and inputs of each weight. `local`: what each device
    multiplies, rows and inputs, then outputs of each weight. `sent`: collectives, and what they exchange.\"\"\"
    want = run(x, weights, dtype, "reference")
    given = put(x, *lie[0]), [place(w, *own) for w, own in zip(weights, lie[1:], strict=True)]
    compiled = jax.jit(lambda *given: run(*given, dtype)).lower(*given).compile()  # a new trace for each
    for a, b in zip(compiled(*given), want, strict=True):  # bfloat16: sums in another order may round the other way
        a, b = (np.asarray(y, np.float32) for y in (a, b))
        np.testing.assert_allclose(a, b, rtol=1e-2 if dtype == "bfloat16" else 1e-5, atol=atol, err_msg=name)
    rows, inputs, *outputs = local
    shapes = [((rows, inputs), (2, n, w.codes.shape[2] * inputs // x.shape[1])) for n, w in zip(outputs, weights)]
    is_last = dtype == "bfloat16" and weights[0].activations is None and inputs == x.shape[1]
    assert ("bfloat16" if is_last else "float32", *shapes) == stand_ins.products[-1], (name, stand_ins.products)
    pattern = r"= (.*) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)[(]"
    lines = re.findall(pattern, compiled.as_text())
    found = sorted((kind, what) for types, kind in lines for what in re.findall(r"[a-z0-9]+\\[[0-9,]*\\]", types))
    assert found == sorted(sent), (name, found)
x = jnp.asarray(rng.normal(size=(8, 256)), jnp.bfloat16)
two = [stack(64, 256, size=32), stack(32, 256, size=32)]
rows, outputs, inputs = ("data",), ("tensor", None), (None, "tensor")
check("M", x, two, (rows, (None, None), (None, None)), (2, 256, 64, 32))
check("O", x, two, ((), outputs, outputs), (8, 256, 32, 16))
check("M and O", x, two, (rows, outputs, outputs), (2, 256, 32, 16))
check("O of one", x, two, ((), outputs, (None, None)), (8, 256, 32, 32))
sums = [("all-reduce", "f32[8,64]"), ("all-reduce", "f32[8,32]")]
check("I", x, two, (inputs, inputs, inputs), (8, 128, 64, 32), sums)
check("I in float32", x, two, ((), inputs, inputs), (8, 128, 64, 32), sums, "float32")
sums = [("all-reduce", "f32[2,64]"), ("all-reduce", "f32[2,32]")]
check("M and I", x, two, (("data", "tensor"), inputs, inputs), (2, 128, 64, 32), sums)
# Codes lie whole beside inputs in parts: the latter are gathered. So are codes whose inputs the rows' axis cuts.
check("x alone", x, two[:1], (inputs, outputs), (8, 256, 32), [("all-gather", "f32[8,256]")])
gathered = [("all-gather", "u8[2,32,128]"), ("all-gather", "f16[2,8,32]"), ("all-gather", "s8[2,8,32]")]
check("rows win", x, two[1:], (rows, (None, "data")), (2, 256, 32), gathered)
# Of two weights one has outputs and the other inputs on one axis of the mesh: outputs keep it.
first = [("all-gather", "u8[2,64,128]"), ("all-gather", "f16[2,8,64]"), ("all-gather", "s8[2,8,64]")]
check("two ways", x, two, ((), inputs, outputs), (8, 256, 64, 16), first)
# On two axes: the first weight decides, and devices exchange quarters of the other until each has its half.
moved = [("all-reduce", "f32[8,64]"), ("all-reduce", "f32[8,32]")]
for kind, codes, grid in (("collective-permute", "2,32,32", "2,2,32"), ("all-gather", "2,32,64", "2,4,32")):
    moved += [(kind, f"u8[{codes}]"), (kind, f"f16[{grid}]"), (kind, f"s8[{grid}]")]
check("two axes", x, two, ((), inputs, (None, "data")), (8, 128, 64, 32), moved)
# A group, the kernel's 16 outputs, and the codes that were interleaved would be cut through.
three = [stack(48, 96, size=32)]
gathered = [("all-gather", "u8[2,48,48]"), ("all-gather", "f16[2,3,48]"), ("all-gather", "s8[2,3,48]")]
place_whole = place
def place(weight, outputs, inputs):
    \"\"\"Scales of 3 groups cannot lie in 2 parts.\"\"\"
    whole = place_whole(weight, outputs, None)
    return dataclasses.replace(whole, codes=put(weight.codes, None, outputs, inputs))
check("through a group", x[:, :96], three, ((), inputs), (8, 96, 48), gathered[:1])
check("through a unit", x[:, :96], three, ((), outputs), (8, 96, 48), gathered)
place = place_whole
turned = [rotated(stack(32, 256, size=32))]
check("rotated", x, turned, (inputs, inputs), (8, 128, 32), [("all-reduce", "f32[8,32]")])
codes = [("all-gather", "u8[2,32,128]"), ("all-gather", "f16[2,8,32]"), ("all-gather", "s8[2,8,32]")]
parts = [("all-gather", "f32[8,256]")]  # turned in parts, two groups on each device
turned = [interleave(turned[0])]
check("interleaved", x, turned, (inputs, inputs), (8, 128, 32), [("all-reduce", "f32[8,32]")])
check("through what is interleaved", x, turned, ((None, "data"), (None, "data")), (8, 256, 32), codes + parts)
# One scale for all inputs, codes of eight bits, of activations too, and nvfp4.
by_token = [stack(32, 64, "int8", activations="int8")]
narrow = x[:, :64]
check("int8", narrow, [stack(32, 64, "int8")], (inputs, inputs), (8, 32, 32), [("all-reduce", "f32[8,32]")])
token = [("all-reduce", "f32[8]"), ("all-reduce", "f32[8,32]")]
# One activation in another code, if it lies in the middle of two: a step of 3 / 127 times a weight of at most 2.6.
check("by token", narrow, by_token, (inputs, inputs), (8, 32, 32), token, atol=0.1)
check("nvfp4", narrow, [stack(32, 64, "nvfp4", size=16)], ((), inputs), (8, 32, 32), [("all-reduce", "f32[8,32]")])
# Under transformations, and where XLA does not cut.
given = put(x, "data", "tensor"), [place(w, None, "tensor") for w in two]
def loss(x, weights, implementation=None):
    return sum((y * jnp.arange(y.shape[1])).sum() for y in run(x, weights, "float32", implementation))
gradient = jax.jit(jax.grad(loss), static_argnums=2)
want = np.asarray(gradient(x, two, "xla"), np.float32)
np.testing.assert_allclose(np.asarray(gradient(*given), np.float32), want, rtol=2e-2, atol=1e-2 * np.abs(want).max())
mapped = jax.jit(jax.vmap(lambda x: run(x[None], given[1])[0][0]))(given[0])
np.testing.assert_allclose(*(np.asarray(y, np.float32) for y in (mapped, run(x, two)[0])), rtol=1e-2, atol=1e-4)
assert ("float32", *(((2, 128), (2, n, 64)) for n in (64, 32))) in stand_ins.products
assert "custom_partitioning" in str(jax.make_jaxpr(run)(*given))
alone = jax.shard_map(lambda x: run(x, two)[0], mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
assert "custom_partitioning" not in str(jax.make_jaxpr(alone)(x))
with jax.set_mesh(jax.make_mesh((8,), ("all",), axis_types=(AxisType.Explicit,))):
    assert api.automatic(x, two[0].of_layer(0), dtype=x.dtype) == (
        "xla", "mosaic: 8 devices: XLA cannot partition this kernel; call it under shard_map"
    )
"""

TURNS = """
import re
import stand_ins
from pallas_kernels.norm_rope import norm_rope
from pallas_kernels.rotation import Gated, Normed, Turn, gated_rotations, normed_rotations, pairwise_rotations
stand_ins.install()
def turn():
    pairs = np.argsort(rng.random((2, 2, 8, 32)), axis=-1).reshape(2, 2, 256)
    theta, scales = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 2, 128), (2, 256)))
    return Turn(theta, jnp.asarray(pairs, jnp.int16), scales, jnp.int32(1))
turns = [turn(), turn()._replace(theta=None, pairs=None)]
x, weight = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((8, 256), (256,)))
def rotate(x, turns, weight=None, implementation=None):
    options = {"group_size": 32, "implementation": implementation}
    if weight is None:
        return pairwise_rotations(x, turns, **options)
    total, turned = normed_rotations(Normed(x, weight, 1e-6, x / 2), turns, **options)
    return total, *turned
def place(turn, channels):
    spec = {"theta": (None, None, channels), "pairs": (None, None, channels), "channel_scales": (None, channels)}
    given = {name: getattr(turn, name) for name in spec if getattr(turn, name) is not None}
    return turn._replace(**{name: put(part, *spec[name]) for name, part in given.items()})
def check(function, record, given, want, local, is_quiet=True):
    compiled = jax.jit(lambda *given: function(*given)).lower(*given).compile()  # a new trace for each
    for a, b in zip(compiled(*given), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert record[-1] == local, record
    assert is_quiet == (not re.search(r"all-(gather|reduce|to-all)|collective-permute", compiled.as_text())), local
for norm, lie, channels, local, is_quiet in (
    (None, ("data",), None, (2, 256), True),
    (None, (None, "tensor"), "tensor", (8, 128), True),
    (None, ("data", "tensor"), "tensor", (2, 128), True),
    (None, ("data",), "data", (2, 256), False),  # one axis of the mesh for both: rows win
    (weight, ("data",), None, (2, 256), True),
    (weight, ("data", "tensor"), "tensor", (2, 256), False),  # the norm is of all channels
):
    given = put(x, *lie), [place(turn, channels) for turn in turns], norm if norm is None else put(norm)
    scales = (2, local[1])
    check(rotate, stand_ins.rotations, given, rotate(x, turns, norm, "xla"), (local, scales, scales), is_quiet)
def gated(x, turns, implementation=None):
    return gated_rotations(Gated(x, x / 2), turns, group_size=32, implementation=implementation)
given = put(x, "data", "tensor"), [place(turn, "tensor") for turn in turns]
check(gated, stand_ins.rotations, given, gated(x, turns, "xla"), ((2, 128), (2, 128), (2, 128)))
heads = [jnp.asarray(rng.normal(size=(4, 2, n, 64)), jnp.float32) for n in (8, 4)]
weights = [jnp.asarray(rng.normal(size=64), jnp.float32) for _ in heads]
cos, sin = (jnp.asarray(f(rng.normal(size=(4, 2, 32))), jnp.float32) for f in (np.cos, np.sin))
def normed(*given, implementation=None):
    return norm_rope(*given, epsilon=1e-6, implementation=implementation)
want = normed(heads, weights, cos, sin, implementation="xla")
for first, second, local, is_quiet in (
    (("data",), ("data",), ((2, 8, 64), (2, 4, 64)), True),
    ((None, None, "tensor"), (None, None, "tensor"), ((8, 4, 64), (8, 2, 64)), True),
    (("data", None, "tensor"), ("data",), ((2, 4, 64), (2, 4, 64)), True),
    ((None, None, None, "tensor"), (), ((8, 8, 64), (8, 4, 64)), False),
):
    tables = (put(table, *first[:1]) for table in (cos, sin))
    given = [put(heads[0], *first), put(heads[1], *second)], weights, *tables
    check(normed, stand_ins.norms, given, want, local, is_quiet)
"""


@pytest.mark.parametrize("script", ["CUT", "ATTENTION", "PRODUCTS", "TURNS"])
def test_on_a_mesh_of_automatic_axes(script):
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    environment |= {"PATH": "/usr/bin:/bin", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parent)
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


@pytest.mark.gpu
@pytest.mark.parametrize("axis", ["rows", "outputs", "inputs"])
def test_two_gpus_multiply_as_one(axis):
    """The kernels of a rotation and a product on halves of one axis; the split of the inputs changes float32 sums."""
    if jax.default_backend() != "gpu" or jax.device_count() < 2:
        pytest.skip("needs two GPUs")
    rng, (layers, outputs, inputs) = np.random.default_rng(0), (2, 512, 1024)
    pairs = np.argsort(rng.random((layers, 8, inputs // 128, 128)), axis=-1).reshape(layers, 8, inputs)
    grid = (layers, inputs // 128, outputs)
    weight = QuantizedTensor(
        codes=rng.integers(0, 256, (layers, outputs, inputs // 2)).astype(np.uint8),
        scales=rng.uniform(0.01, 0.02, grid).astype(np.float16),
        zeros=rng.integers(-8, 8, grid).astype(np.int8),
        rotation=Rotation(rng.normal(size=(layers, 8, inputs // 2)).astype(np.float16), pairs.astype(np.int16)),
        shape=(outputs, inputs),
    )
    x = jnp.asarray(rng.normal(size=(16, inputs)), jnp.bfloat16)

    def product(x, weight):
        return quantized_matmul(x, weight.of_layer(1), dtype=jnp.float32, implementation="mosaic")

    one = jax.device_put((x, weight), jax.devices()[0])
    want = np.asarray(jax.jit(product)(*one))
    mesh = jax.make_mesh((2,), ("both",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    rows, out, into = ("both" if axis == name else None for name in ("rows", "outputs", "inputs"))
    specs = dataclasses.replace(
        weight,
        codes=P(None, out, into),
        scales=P(None, into, out),
        zeros=P(None, into, out),
        rotation=Rotation(P(None, None, into), P(None, None, into)),
    )
    place = lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec))  # noqa: E731
    got = jax.jit(product)(place(x, P(rows, into)), jax.tree.map(place, weight, specs))
    np.testing.assert_allclose(np.asarray(got), want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
