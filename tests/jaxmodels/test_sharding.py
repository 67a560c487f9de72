"""Rules, shardings of a model, and a sharded forward pass on simulated devices."""

import os
import subprocess
import sys
import textwrap

import jax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from jaxmodels.qwen import QwenConfig, build
from jaxmodels.sharding import AXIS_RULES, param_shardings, partition_spec


def mesh_of(data=1, fsdp=1, tensor=1):
    return AbstractMesh((data, fsdp, tensor), ("data", "fsdp", "tensor"))


def test_rules_cover_every_logical_axis_of_the_model():
    lm = build(QwenConfig.tiny(qkv_bias=True))
    axes = jax.tree.leaves(lm.logical_axes, is_leaf=lambda node: isinstance(node, tuple))
    assert {name for names in axes for name in names if name is not None} <= AXIS_RULES.keys()


def test_partition_spec():
    mesh = mesh_of(2, 2, 2)
    assert partition_spec(("layers", "heads", None, "embed"), mesh) == PartitionSpec(None, "tensor", None, "fsdp")
    assert partition_spec(("batch", None), mesh) == PartitionSpec(("data", "fsdp"), None)
    assert partition_spec(("batch", "embed"), AbstractMesh((4,), ("data",))) == PartitionSpec("data", None)
    with pytest.raises(ValueError, match="'head'"):
        partition_spec(("head",), mesh)


@pytest.mark.parametrize("tied", [True, False])
def test_param_shardings_match_the_parameters(tied):
    lm = build(QwenConfig.tiny(vocab_size=96, tied_head=tied, qkv_bias=True))
    shapes = jax.eval_shape(lm.init, jax.random.key(0))
    shardings = param_shardings(lm, mesh_of(1, 2, 2))
    assert jax.tree.structure(shapes) == jax.tree.structure(shardings)
    assert shardings["layers"]["mlp"]["down"].spec == PartitionSpec(None, "fsdp", "tensor")
    assert shardings["embed"].spec == PartitionSpec("tensor", "fsdp")
    assert ("head" in shardings) is not tied


def test_a_mesh_that_does_not_divide_names_the_parameter():
    lm = build(QwenConfig.tiny(vocab_size=96))
    with pytest.raises(ValueError, match=r"layers\.attention\.k \(3, 2, 32, 64\).*2 is not divisible by 4"):
        param_shardings(lm, mesh_of(tensor=4))


SHARDED = """
    import jax, numpy as np
    from jax.sharding import AxisType
    from jaxmodels.qwen import QwenConfig, build
    from jaxmodels.sharding import batch_sharding, param_shardings

    lm = build(QwenConfig.tiny(vocab_size=96, qkv_bias=True))
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    place = param_shardings(lm, mesh)
    params = jax.jit(lm.init, out_shardings=place)(jax.random.key(0))
    single = jax.device_put(params, jax.devices()[0])
    part = params["layers"]["attention"]["q"].addressable_shards[0].data.shape
    assert part == (3, 2, 32, 32), part
    tokens = jax.random.randint(jax.random.key(1), (4, 12), 0, 96)

    want = jax.jit(lm.apply)(single, tokens)
    with jax.set_mesh(mesh):
        got = jax.jit(lm.apply)(params, jax.device_put(tokens, batch_sharding(mesh)))
        one = jax.jit(lm.apply)(params, tokens[:1])  # fewer rows than devices
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    np.testing.assert_allclose(one, want[:1], rtol=0, atol=1e-5)
    assert got.sharding.shard_shape(got.shape) == (1, 12, 48), got.sharding  # rows and vocabulary stay split
    print("equal")
"""


def test_sharded_forward_equals_one_device():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SHARDED)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "equal" in done.stdout, done.stderr
