"""Parameters that ParoQuant optimises as one matrix.

Every linear by itself; of a mixture of experts all gate and up projections of a layer together, and all down
projections: each has grids of its own rows, and one rotation and one set of scales that all experts share.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from jaxmodels.qwen.model import CausalLM
from pallas_kernels.quantized_matmul import QuantizedTensor

ParamPath = tuple[str, ...]
DOWN_SEED = 97
"""Added to the seed of the pairs of experts' down projections, as in the original."""


@dataclasses.dataclass(frozen=True)
class Joined:
    """What makes up one matrix `[O, I]`.

    Attributes:
      paths: of the parameters within a block.
      shapes: theirs; of experts `[E, outputs, I]`, and the matrix has expert after expert, each with all its outputs.
      num_inputs: trailing axes that are contracted.
      is_experts: whether the first axis is one of experts.
      seed: added to the seed of its pairs.
    """

    paths: tuple[ParamPath, ...]
    shapes: tuple[tuple[int, ...], ...]
    num_inputs: int = 1
    is_experts: bool = False
    seed: int = 0

    @property
    def _edges(self) -> list[tuple[int, int]]:
        """Where each parameter's outputs begin and end among those of an expert."""
        ends = np.cumsum([shape[1] for shape in self.shapes]).tolist()
        return [(end - shape[1], end) for end, shape in zip(ends, self.shapes, strict=True)]

    def join(self, leaves: Mapping[ParamPath, np.ndarray]) -> np.ndarray:
        """The matrix of a block's parameters."""
        if not self.is_experts:
            (path,) = self.paths
            return leaves[path].reshape(-1, math.prod(self.shapes[0][-self.num_inputs :]))
        every = np.concatenate([leaves[path] for path in self.paths], axis=1)
        return every.reshape(-1, every.shape[-1])

    def split(self, matrix: Float[Array | np.ndarray, "O I"]) -> dict[ParamPath, Any]:
        """The parameters of a matrix."""
        if not self.is_experts:
            return {self.paths[0]: matrix.reshape(self.shapes[0])}
        every = matrix.reshape(self.shapes[0][0], -1, matrix.shape[-1])
        return {path: every[:, start:stop] for path, (start, stop) in zip(self.paths, self._edges, strict=True)}

    def split_quantized(self, weight: QuantizedTensor) -> dict[ParamPath, QuantizedTensor]:
        """The parameters of a quantized matrix; those of experts share its rotation and its scales of inputs."""
        if not self.is_experts:
            return {self.paths[0]: dataclasses.replace(weight, shape=self.shapes[0], num_inputs=self.num_inputs)}
        experts = self.shapes[0][0]
        codes = weight.codes.reshape(experts, -1, weight.codes.shape[-1])

        def grid(values: Any, start: int, stop: int) -> Any:
            """`[G, E * outputs]` to `[E, G, outputs]` of one parameter."""
            return values.reshape(len(values), experts, -1).swapaxes(0, 1)[..., start:stop]

        return {
            path: dataclasses.replace(
                weight,
                codes=codes[:, start:stop],
                scales=grid(weight.scales, start, stop),
                zeros=grid(weight.zeros, start, stop),
                shape=shape[1:],
            )
            for path, shape, (start, stop) in zip(self.paths, self.shapes, self._edges, strict=True)
        }


def joined_linears(lm: CausalLM) -> dict[str, Joined]:
    """The matrices of a block by name."""
    block = jax.eval_shape(lambda: jax.tree.map(lambda leaf: leaf[0], lm.init(jax.random.key(0))["layers"]))

    def shape(path: ParamPath) -> tuple[int, ...]:
        leaf: Any = block
        for key in path:
            leaf = leaf[key]
        return tuple(leaf.shape)

    result = {
        ".".join(path[1:]): Joined((path[1:],), (shape(path[1:]),), num_inputs)
        for path, num_inputs in lm.linears.items()
        if path not in lm.expert_linears
    }
    if lm.config.moe is not None:
        for name, parts, seed in (("gate_up", ("gate", "up"), 0), ("down", ("down",), DOWN_SEED)):
            paths = tuple(("mlp", part) for part in parts)
            result[f"mlp.{name}"] = Joined(paths, tuple(map(shape, paths)), is_experts=True, seed=seed)
    return result
