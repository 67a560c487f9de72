"""Plain functions in the place of Hopper kernels, for tests on simulated devices; processes of their own import this.

The interpreter of kernels cannot run inside a partitioned call. These say what each device was given, and fail where
the kernel would not take it.
"""

import jax.numpy as jnp

from pallas_kernels import compat, dispatch
from pallas_kernels.norm_rope import mosaic_sm90 as norm_rope_kernel
from pallas_kernels.norm_rope import xla as norm_rope_xla
from pallas_kernels.quantized_matmul import QuantizedTensor
from pallas_kernels.quantized_matmul import mosaic_sm90 as product_kernel
from pallas_kernels.quantized_matmul import xla as product_xla
from pallas_kernels.quantized_matmul.mosaic_sm90 import form_of
from pallas_kernels.rotation import api as rotation_api
from pallas_kernels.rotation import mosaic_sm90 as rotation_kernel

OPS = ("quantized_matmul", "pairwise_rotation", "norm_rope")

products: list[tuple] = []
"""Dtype of the result, then shapes of activations and codes of each weight, of each traced launch."""
rotations: list[tuple] = []
"""Shape of the rows, then of the channel scales of each turn."""
norms: list[tuple] = []
"""Shapes of the heads."""


def run_together(operands, *, group_size, format, dtype, interleaved):
    products.append((jnp.dtype(dtype).name, *((of_weight.x.shape, of_weight.codes.shape) for of_weight in operands)))
    results = []
    for of_weight in operands:
        given = of_weight._asdict() | {"group_size": group_size, "format": format, "dtype": dtype}
        assert (reason := product_kernel.unsupported(**given)) is None, reason
        form = form_of(of_weight, format, dtype, interleaved)
        options = {"format": format, "shape": (form.outputs, form.inputs), "interleaved": interleaved}
        parts = (of_weight.codes, of_weight.scales, of_weight.zeros, of_weight.global_scale)
        weight = QuantizedTensor(*parts, layer=of_weight.layer, **options)
        assert not interleaved or weight.width == form.width
        exact = of_weight.x.astype(jnp.float32)  # the kernel rounds no weight to bfloat16 either
        results.append(product_xla.run(exact, weight.sliced()).astype(dtype))
    return tuple(results)


def run_rotation(x, turns, *, group_size):
    rotations.append((x.shape, *(None if turn.channel_scales is None else turn.channel_scales.shape for turn in turns)))
    assert (reason := rotation_kernel.unsupported(x, turns, group_size=group_size)) is None, reason
    return rotation_api._plain(rotation_api.xla.run, x, turns, group_size, inverse=False)


def run_norm_rope(heads, weights, cos, sin, *, epsilon):
    norms.append(tuple(x.shape for x in heads))
    assert (reason := norm_rope_kernel.unsupported(heads, weights, cos, sin)) is None, reason
    results = norm_rope_xla.run(tuple(x[None] for x in heads), weights, cos[None], sin[None], epsilon)
    return tuple(x[0] for x in results)


def install() -> None:
    """The automatic choice takes these functions wherever the kernel itself could run."""
    compat.missing_hopper = lambda: None
    dispatch.preferred = lambda op, *_, **__: (("mosaic", "xla") if op in OPS else ("xla",), "")
    product_kernel.run_together = run_together
    rotation_kernel.run = run_rotation
    norm_rope_kernel.run = run_norm_rope
