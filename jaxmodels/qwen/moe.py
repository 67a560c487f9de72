"""The mixture of experts of Qwen3-MoE, in place of a block's MLP."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxmodels.functional import weight
from jaxmodels.layers import gated_silu, linear
from jaxmodels.layers.experts import Tiles, expert_linears, route
from jaxmodels.qwen.config import QwenConfig
from jaxmodels.sharding import constrain, row_parts

MAX_ROWS = 65_536
"""Rows that are routed and multiplied at a time: in their tiles they take several times the memory of activations.

An expert then gets so many of them that the next ones have to read its weight again anyway."""


class Moe(nnx.Module):
    """SwiGLU experts, of which a router picks some for every token (transformers, `Qwen3MoeSparseMoeBlock`).

    E experts. A token's result depends on that token alone: no expert has a limit of tokens.
    """

    def __init__(self, config: QwenConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        assert config.moe is not None
        E, D, F = config.moe.num_experts, config.dim, config.mlp_dim
        self.router = weight(rngs, (E, D), ("experts", "embed"), dtype)
        self.gate = weight(rngs, (E, F, D), ("experts", "mlp", "embed"), dtype)
        self.up = weight(rngs, (E, F, D), ("experts", "mlp", "embed"), dtype)
        self.down = weight(rngs, (E, D, F), ("experts", "embed", "mlp"), dtype)
        self.config = config.moe

    @property
    def readers(self) -> tuple[Any, ...]:
        """Weights that `x` may be turned for: none, as the router reads it too."""
        return ()

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        parts = row_parts(len(x))
        if parts == 1:
            return self._mixture(x.reshape(-1, x.shape[-1])).reshape(x.shape)
        # Devices that hold different rows sort and multiply their own.
        split = constrain(x.reshape(parts, -1, x.shape[-1]), ("batch", None, None))
        return jax.vmap(self._mixture)(split).reshape(x.shape)

    def _mixture(self, x: Float[Array, "R D"]) -> Float[Array, "R D"]:
        """Rows in equal pieces of at most MAX_ROWS, rows of 0 at the end of the last one."""
        rows, pieces = len(x), -(-len(x) // MAX_ROWS)
        if pieces <= 1:
            return self._piece(x)
        size = -(-rows // pieces)
        x = jnp.pad(x, ((0, pieces * size - rows), (0, 0))).reshape(pieces, size, -1)
        return jax.lax.map(self._piece, x).reshape(pieces * size, -1)[:rows]

    def _piece(self, x: Float[Array, "R D"]) -> Float[Array, "R D"]:
        logits = linear(x, self.router[...], "RD,ED->RE")
        weights, experts = route(logits, self.config.top_k, normalize=self.config.normalize)
        tiles = Tiles.of(experts, self.config.num_experts)
        gate, up = expert_linears(
            tiles.gather(x), (self.gate[...], self.up[...]), tiles.experts, axes=("experts", "mlp", None)
        )
        (y,) = expert_linears(gated_silu(gate, up), (self.down[...],), tiles.experts, axes=("experts", None, "mlp"))
        return tiles.combine(y, weights)
