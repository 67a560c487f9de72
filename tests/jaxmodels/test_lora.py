import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxmodels import lora
from jaxmodels.qwen import MoeConfig, QwenConfig, build


def weights(**changes):
    lm = build(QwenConfig.tiny(layers=2, dim=16, mlp_dim=24, head_dim=8, qkv_bias=True, **changes))
    leaves, tree = jax.tree.flatten(jax.eval_shape(lm.init, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return lm, jax.tree.unflatten(tree, [jnp.asarray(rng.normal(size=s.shape), jnp.float32) for s in leaves])


def test_projections_are_frozen_and_everything_else_is_dense():
    _, params = weights()
    frozen, dense = lora.split(params)
    assert set(frozen) == {"layers"} and set(frozen["layers"]) == {"attention", "mlp"}
    assert set(frozen["layers"]["attention"]) == {"q", "k", "v", "o"}
    assert set(frozen["layers"]["mlp"]) == {"gate", "up", "down"}
    assert {"embed", "head", "final_norm", "layers"} == set(dense)
    assert set(dense["layers"]["attention"]) == {"q_bias", "k_bias", "v_bias", "q_norm", "k_norm"}
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
    assert count(frozen) + count(dense) == count(params)


@pytest.mark.smoke
def test_merged_weights_act_like_the_sum_of_both_paths():
    _, params = weights()
    frozen, dense = lora.split(params)
    shapes = lora.adapter_shapes(frozen, 3)
    adapters = lora.init_adapters(jax.random.key(1), shapes)
    start = lora.merge(frozen, dense, adapters, rank=3, alpha=6.0)
    jax.tree.map(np.testing.assert_array_equal, start, params)  # B is zero
    rng = np.random.default_rng(1)
    adapters = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), adapters)
    merged = lora.merge(frozen, dense, adapters, rank=3, alpha=6.0)
    equations = {"q": "d,nhd->nh", "k": "d,nhd->nh", "v": "d,nhd->nh", "o": "nh,dnh->d"}
    equations |= {"gate": "d,fd->f", "up": "d,fd->f", "down": "f,df->d"}
    for part in ("attention", "mlp"):
        for name, weight in frozen["layers"][part].items():
            full = equations[name]
            a, b = adapters["layers"][part][name]["a"], adapters["layers"][part][name]["b"]
            inputs, outputs = full.split(",")[0], full.split("->")[1]
            for layer in range(2):
                x = rng.normal(size=weight.shape[1 + len(outputs) :])
                low = np.einsum(f"{inputs},r{inputs}->r", x, a[layer])
                want = np.einsum(full, x, weight[layer]) + 2.0 * np.einsum(f"r,{outputs}r->{outputs}", low, b[layer])
                got = np.einsum(full, x, merged["layers"][part][name][layer])
                np.testing.assert_allclose(got, want, atol=1e-3)
    np.testing.assert_array_equal(merged["embed"], params["embed"])


def test_adapters_are_sharded_like_their_weights():
    _, params = weights()
    frozen, _ = lora.split(params)
    mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = {"q": PartitionSpec(None, "tensor", None, "fsdp"), "o": PartitionSpec(None, "fsdp", "tensor")}
    attention = frozen["layers"]["attention"]
    placed = {
        name: jax.ShapeDtypeStruct(attention[name].shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for name, spec in specs.items()
    }
    shapes = lora.adapter_shapes({"layers": {"attention": placed}}, 2)["layers"]["attention"]
    assert shapes["q"]["a"].sharding.spec == PartitionSpec(None, None, "fsdp")
    assert shapes["q"]["b"].sharding.spec == PartitionSpec(None, "tensor", None, None)
    assert shapes["o"]["a"].sharding.spec == PartitionSpec(None, None, "tensor", None)
    assert shapes["o"]["b"].sharding.spec == PartitionSpec(None, "fsdp", None)


def test_bad_rank():
    _, params = weights()
    frozen, _ = lora.split(params)
    for rank in (0, -2):
        with pytest.raises(ValueError, match=f"rank must be at least 1; got {rank}"):
            lora.adapter_shapes(frozen, rank)


def test_mixtures_of_experts_have_no_adapters():
    _, params = weights(moe=MoeConfig(4, 2))
    with pytest.raises(ValueError, match=r"parameter layers\.mlp\.router: low-rank adapters of a mixture of experts"):
        lora.split(params)
