"""Where arrays live on a mesh: logical axis names, one table of rules, and the shardings of a model's parameters.

Mesh axes: "data" (replicas), "fsdp" (batch and parameters both split), "tensor" (heads, mlp and vocabulary split).
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxmodels.functional import Axes

AXIS_RULES: Mapping[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "layers": None,
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "experts": None,
}
"""Logical axis -> mesh axes that split it. A mesh axis that the mesh lacks splits nothing.

Each expert is cut along "mlp" like a dense MLP: all devices then have equal work whatever is routed where, and a loop
over tiles finds its part of any expert on the device."""


def partition_spec(axes: Axes, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The mesh axes of each dimension of an array with these logical axes (None: not split)."""
    parts: list[str | tuple[str, ...] | None] = []
    for axis in axes:
        if axis is not None and axis not in AXIS_RULES:
            raise ValueError(f"logical axis must be None or one of {[*AXIS_RULES]}; got {axis!r}")
        rule = AXIS_RULES[axis] if axis is not None else None
        names = (rule,) if isinstance(rule, str) else rule or ()
        present = tuple(name for name in names if name in mesh.shape)
        parts.append(present if len(present) > 1 else present[0] if present else None)
    return PartitionSpec(*parts)


def sharding(axes: Axes, mesh: Mesh | AbstractMesh, shape: tuple[int, ...], name: str) -> NamedSharding:
    """The sharding of one array; ValueError naming it when a mesh axis does not divide its dimension."""
    spec = partition_spec(axes, mesh)
    for dimension, (size, part) in enumerate(zip(shape, spec, strict=True)):
        names = _names(part)
        ways = math.prod(mesh.shape[mesh_axis] for mesh_axis in names)
        if size % ways:
            raise ValueError(
                f"mesh axes {names} split dimension {dimension} ({axes[dimension]!r}) of {name} {shape} "
                f"{ways} ways; {size} is not divisible by {ways}"
            )
    return NamedSharding(mesh, spec)


def constrain(x: Array, axes: Axes) -> Array:
    """`x` laid out by its logical axes over the mesh in scope, as a hint to the compiler; `x` itself without one.

    The mesh in scope is that of `jax.set_mesh`, or inside a traced function of `jax.sharding.use_abstract_mesh`.
    Left alone, XLA may split activations like the embedding matrix, along "embed", and exchange them instead of
    gathering weights. A mesh axis that does not divide its dimension splits nothing, so one row still runs.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return x
    parts = partition_spec(axes, mesh)
    ways = (math.prod(mesh.shape[name] for name in _names(part)) for part in parts)
    spec = PartitionSpec(*(part if size % n == 0 else None for part, size, n in zip(parts, x.shape, ways, strict=True)))
    return jax.lax.with_sharding_constraint(x, spec)


def row_parts(rows: int) -> int:
    """How many parts the mesh in scope (see `constrain`) cuts the rows of a batch into; 1 if it cannot evenly."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return 1
    ways = math.prod(mesh.shape[name] for name in _names(partition_spec(("batch",), mesh)[0]))
    return 1 if rows % ways else ways


def _names(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (part,) if isinstance(part, str) else part or ()


def batch_sharding(mesh: Mesh | AbstractMesh, ndim: int = 2) -> NamedSharding:
    """The sharding of a batch: its rows over "data" and "fsdp", the other dimensions whole."""
    return NamedSharding(mesh, partition_spec(("batch", *[None] * (ndim - 1)), mesh))


def param_shardings(lm: Any, mesh: Mesh | AbstractMesh) -> dict[str, Any]:
    """Nested dict of NamedSharding like the parameters of `lm`; allocates nothing.

    Raises:
      ValueError: a mesh axis does not divide a dimension; names the parameter, the dimension and both sizes.
    """
    shapes = jax.eval_shape(lm.init, jax.random.key(0))

    def one(path: tuple, shape: jax.ShapeDtypeStruct, axes: Axes) -> NamedSharding:
        return sharding(axes, mesh, shape.shape, jax.tree_util.keystr(path, simple=True, separator="."))

    return jax.tree.map_with_path(one, shapes, lm.logical_axes)
