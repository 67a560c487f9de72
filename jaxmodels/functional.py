"""Between modules that define structure and pure functions over plain dicts.

Flax NNX modules say which weights a model has, what shape they take and how they are called. Outside of a
traced function no module exists: parameters are plain nested dicts, and `Structure` turns a dict back into
a module for the length of one trace.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

Params = dict[str, Any]
"""A plain nested dict of arrays."""
Axes = tuple[str | None, ...]
"""One logical axis name, or None, per dimension of an array."""


def weight(rngs: nnx.Rngs, shape: tuple[int, ...], axes: Axes, dtype: jnp.dtype, *, stddev: float = 0.02) -> nnx.Param:
    """A normal random weight with one logical axis name (or None) per dimension, for the sharding rules."""
    return nnx.Param(nnx.initializers.normal(stddev)(rngs.params(), shape, dtype), axes=axes)


def constant(value: float, shape: tuple[int, ...], axes: Axes, dtype: jnp.dtype) -> nnx.Param:
    """A weight that starts at one value: norms at 1, biases at 0."""
    return nnx.Param(jnp.full(shape, value, dtype), axes=axes)


@dataclasses.dataclass(frozen=True)
class Structure:
    """What is static about a module: how it is called, and the logical axes of its weights.

    Attributes:
      graphdef: static graph of the module.
      axes: nested dict like the parameters, with a tuple of logical axis names per weight.
    """

    graphdef: nnx.GraphDef
    axes: dict[str, Any]

    @classmethod
    def of(cls, make: Callable[[nnx.Rngs, jnp.dtype], nnx.Module]) -> "Structure":
        """Traces `make(rngs, dtype)` without allocating anything."""
        with nnx.use_eager_sharding(False):
            abstract = nnx.eval_shape(lambda: make(nnx.Rngs(0), jnp.dtype(jnp.float32)))
            graphdef, state = nnx.split(abstract)
        axes = jax.tree.map(
            lambda variable: variable.get_metadata()["axes"],
            state,
            is_leaf=lambda node: isinstance(node, nnx.Variable),
        )
        return cls(graphdef, nnx.to_pure_dict(axes))

    def module(self, params: Params) -> nnx.Module:
        """The module over these parameters; use inside one traced function, never keep."""
        return nnx.merge(self.graphdef, params)


def init_params(make: Callable[[nnx.Rngs, jnp.dtype], nnx.Module], key: Array, dtype: jnp.dtype) -> Params:
    """Fresh parameters of `make(rngs, dtype)` as a plain nested dict."""
    with nnx.use_eager_sharding(False):
        return nnx.to_pure_dict(nnx.state(make(nnx.Rngs(params=key), dtype), nnx.Param))
