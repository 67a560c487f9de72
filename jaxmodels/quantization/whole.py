"""Rounding the linears of a whole model to the nearest codes."""

import dataclasses
import functools
from typing import Any, Literal

import jax

from jaxmodels.checkpoints.mapping import flatten, unflatten
from jaxmodels.functional import Params
from jaxmodels.qwen.model import CausalLM
from pallas_kernels.quantized_matmul import QuantizedTensor
from pallas_kernels.quantized_matmul.rounding import round_weight
from pallas_kernels.quantized_matmul.tensor import Activations, Format


def round_params(
    lm: CausalLM,
    params: Params,
    format: Format,
    *,
    group_size: int | None = None,
    symmetric: bool = False,
    activations: Activations | None = None,
) -> Params:
    """The parameters with the linears of all blocks rounded to the nearest codes of a format; see `round_weight`.

    Embedding, head, norms, biases and routers stay as they are. Jit it to round on the devices that hold them.
    """
    leaves = flatten(params)

    def one(weight: Any, num_inputs: int) -> QuantizedTensor:
        return round_weight(
            weight, format, num_inputs=num_inputs, group_size=group_size, symmetric=symmetric, activations=activations
        )

    for path, num_inputs in lm.linears.items():
        if isinstance(leaves[path], QuantizedTensor):
            raise ValueError(f"parameter {'.'.join(path)!r} is quantized already ({leaves[path].format})")
        try:
            # One layer, or expert, after the other: the float32 copies that rounding makes are those of one.
            rounded = functools.partial(one, num_inputs=num_inputs)
            if path in lm.expert_linears:
                rounded = functools.partial(jax.lax.map, rounded)
            leaves[path] = jax.lax.map(rounded, leaves[path])
        except ValueError as error:
            raise ValueError(f"parameter {'.'.join(path)!r}: {error}") from None
    return unflatten(leaves)


def round_head(
    lm: CausalLM, params: Params, format: Literal["int8", "fp8"], *, activations: Activations | None = None
) -> tuple[CausalLM, Params]:
    """The model with its vocabulary projection in eight bits, one scale per token.

    A head that is the embedding becomes a matrix of its own: the embedding is still looked up as it is.
    """
    if format not in ("int8", "fp8"):
        raise ValueError(f"a head is rounded to int8 or fp8; got {format!r}")
    matrix = params["embed"] if lm.config.tied_head else params["head"]
    if isinstance(matrix, QuantizedTensor):
        raise ValueError(f"the head is quantized already ({matrix.format})")
    head = round_weight(matrix, format, activations=activations)
    return dataclasses.replace(lm, config=dataclasses.replace(lm.config, tied_head=False)), params | {"head": head}
