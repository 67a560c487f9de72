"""Everything that training changes, as one pytree."""

from typing import Any

import flax.struct
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key


class TrainState(flax.struct.PyTreeNode):
    """State of a run; saved and restored as a whole. Every field is replaced, never mutated.

    The same class holds the shardings or the abstract shapes of a state, hence no array annotations.
    """

    step: Any  # int32 scalar: batches consumed, rejected ones included
    params: Any  # plain nested dict of the trained weights: float32 masters
    opt_state: Any
    key: Any  # typed key, constant: step n draws from fold_in(key, n), so a resumed run repeats exactly
    rejected: Any  # int32 scalar: non-finite steps so far
    rejected_in_a_row: Any  # int32 scalar

    @classmethod
    def create(cls, params: Any, optimizer: optax.GradientTransformation, key: Key[Array, ""]) -> "TrainState":
        """The state before the first step. Jit it with `out_shardings` to place it on a mesh."""
        # Three arrays, not one: a donated buffer may appear only once.
        step, rejected, in_a_row = (jnp.zeros((), jnp.int32) for _ in range(3))
        return cls(step, params, optimizer.init(params), key, rejected, in_a_row)
