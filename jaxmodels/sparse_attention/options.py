"""What a forward pass is told about skipping."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from pallas_kernels.attention import skip as rule
from pallas_kernels.attention.skip import SkipTile


class SkipAttention(flax.struct.PyTreeNode):
    """Skip-softmax settings of one forward pass; make it with `create`, which checks them.

    A pytree whose one leaf is the number: pass it through jit, and another number compiles nothing.

    Attributes:
      threshold: λ, or None.
      scale_factor: λ · L, or None; see `flash_attention` and, for passes with a cache, `decode_attention`.
      tile: which rows vote on which keys; static. Passes without a cache have one chain.
      dense_layers: layers that skip nothing; static. Layers with a window never do.
    """

    threshold: Any = None  # float or array [] or [B]
    scale_factor: Any = None  # float or array [] or [B]
    tile: SkipTile = flax.struct.field(pytree_node=False, default=SkipTile())
    dense_layers: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())

    @classmethod
    def create(
        cls,
        *,
        threshold: Any = None,
        scale_factor: Any = None,
        tile: SkipTile | None = None,
        dense_layers: tuple[int, ...] = (),
    ) -> "SkipAttention":
        """Settings after the checks of `flash_attention`; exactly one of `threshold` and `scale_factor`.

        Raises:
          ValueError: naming argument and value.
        """
        given = [value for value in (threshold, scale_factor) if value is not None]
        if not given:
            raise ValueError("give threshold or scale_factor; for dense attention pass skip=None")
        tile = SkipTile() if tile is None else tile
        shape = given[0].shape if isinstance(given[0], jax.Array) else np.shape(given[0])
        rule.resolve(threshold, scale_factor, tile, jnp.ones(shape or (1,), jnp.int32))
        return cls(threshold, scale_factor, tile, tuple(sorted(set(dense_layers))))

    def for_layer(self, layer: int | Array, lengths: Int[Array, " B"] | None = None) -> dict[str, Any]:
        """The arguments of the attention; in a dense layer the number is one that its guard makes dense.

        With `lengths`, the keys of each row, a scale factor becomes the threshold of each row.
        """
        threshold, factor = self.threshold, self.scale_factor
        if lengths is not None and factor is not None:
            threshold, factor = jnp.asarray(factor, jnp.float32) / jnp.maximum(lengths, 1), None
        if self.dense_layers:
            dense = jnp.isin(jnp.asarray(layer), jnp.asarray(self.dense_layers))
            if threshold is not None:
                threshold = jnp.where(dense, jnp.inf, jnp.asarray(threshold, jnp.float32))
            else:
                factor = jnp.where(dense, jnp.inf, jnp.asarray(factor, jnp.float32))
        return {"skip_threshold": threshold, "skip_scale_factor": factor, "skip_tile": self.tile}
