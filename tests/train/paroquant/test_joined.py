"""What is optimised as one matrix, taken together and apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.checkpoints.mapping import flatten
from jaxmodels.qwen import MoeConfig, QwenConfig, build
from pallas_kernels.quantized_matmul import dequantize
from pallas_kernels.quantized_matmul.rounding import round_weight
from train.paroquant.joined import joined_linears

SIZES = dict(layers=2, dim=16, heads=2, kv_heads=1, head_dim=8, mlp_dim=24)


@pytest.mark.parametrize("moe", [pytest.param(None, marks=pytest.mark.slow), MoeConfig(3, 2)])
def test_joined_and_split(moe):
    lm = build(QwenConfig.tiny(**SIZES, moe=moe))
    own = {path: np.asarray(leaf[1]) for path, leaf in flatten(lm.init(jax.random.key(0))["layers"]).items()}
    joined = joined_linears(lm)
    names = {"attention.q", "attention.k", "attention.v", "attention.o"}
    assert set(joined) - names == ({"mlp.gate", "mlp.up", "mlp.down"} if moe is None else {"mlp.gate_up", "mlp.down"})
    assert sorted(path for one in joined.values() for path in one.paths) == sorted(path[1:] for path in lm.linears)
    for name, one in joined.items():
        matrix = one.join(own)
        assert one.seed == (97 if moe and name == "mlp.down" else 0)
        for path, part in one.split(matrix).items():
            np.testing.assert_array_equal(part, own[path])
        if one.is_experts is (moe is None):
            continue  # what is no mixture of experts is rounded in the other case
        # Parts of the rounded matrix are the rounded parts: grids are those of rows.
        quantized = round_weight(jnp.asarray(matrix), "int4", group_size=8)
        parts, dense = one.split_quantized(jax.device_get(quantized)), one.split(np.asarray(dequantize(quantized)))
        for path, part in parts.items():
            each = jax.vmap(dequantize) if one.is_experts else dequantize
            np.testing.assert_array_equal(each(jax.tree.map(jnp.asarray, part)), dense[path])
    if moe is not None:
        np.testing.assert_array_equal(joined["mlp.gate_up"].join(own)[24:48], own["mlp", "up"][0])
