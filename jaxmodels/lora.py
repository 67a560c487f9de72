"""Low-rank adaptation (Hu et al., arXiv 2106.09685) of a decoder's linear layers.

    W = W0 + (alpha / rank) B A

Every projection of the attention and of the MLP gets an A and a B and keeps its W0 frozen; embedding, head, norms and
biases stay trainable as they are, without which a conversion to diffusion has to learn the mask token through frozen
weights. The adapted weights are computed when they are used and merged for export: a merged model is an ordinary one.

Letters: L layers, r rank. W [L, outputs..., inputs...], A [L, r, inputs...], B [L, outputs..., r].
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

OUTPUT_AXES = {"q": 2, "k": 2, "v": 2, "o": 1, "gate": 1, "up": 1, "down": 1}
"""Number of output axes of each adapted weight of a layer, by the name of its parameter."""


def _check(rank: int) -> None:
    if isinstance(rank, bool) or rank < 1:
        raise ValueError(f"rank must be at least 1; got {rank}")


def _is_adapted(path: tuple) -> bool:
    return path[0].key == "layers" and path[-1].key in OUTPUT_AXES


def split(params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(weights that are adapted and frozen, all others), nested dicts; works on any leaves (arrays, shapes, ...)."""
    frozen: dict[str, Any] = {}
    dense: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        if path[-1].key == "router":
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(f"parameter {name}: low-rank adapters of a mixture of experts are not implemented")
        tree = frozen if _is_adapted(path) else dense
        for key in path[:-1]:
            tree = tree.setdefault(key.key, {})
        tree[path[-1].key] = leaf
    return frozen, dense


def _pair(leaf: Any, outputs: int, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of A and B for one weight."""
    layers, shape = leaf.shape[0], leaf.shape[1:]
    return (layers, rank, *shape[outputs:]), (layers, *shape[:outputs], rank)


def adapter_shapes(frozen: dict[str, Any], rank: int) -> dict[str, Any]:
    """Nested dict like `frozen` with {"a": ..., "b": ...} of float32 `ShapeDtypeStruct`s in place of each weight.

    Shardings are those of the weights, with the rank on every device.
    """
    _check(rank)

    def one(path: tuple, leaf: Any) -> dict[str, jax.ShapeDtypeStruct]:
        outputs = OUTPUT_AXES[path[-1].key]
        a, b = _pair(leaf, outputs, rank)
        shardings: tuple[Any, Any] = (None, None)
        if isinstance(getattr(leaf, "sharding", None), NamedSharding):
            spec = (*leaf.sharding.spec, *[None] * (len(leaf.shape) - len(leaf.sharding.spec)))
            parts = (spec[0], None, *spec[1 + outputs :]), (*spec[: 1 + outputs], None)
            mesh = leaf.sharding.mesh
            shardings = NamedSharding(mesh, PartitionSpec(*parts[0])), NamedSharding(mesh, PartitionSpec(*parts[1]))
        return {
            name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
            for name, shape, sharding in zip("ab", (a, b), shardings, strict=True)
        }

    return jax.tree.map_with_path(one, frozen)


def init_adapters(key: jax.Array, shapes: dict[str, Any]) -> dict[str, Any]:
    """Adapters of `adapter_shapes`: A from N(0, 1 / inputs), B zero, so that training starts from W0."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    made = []
    for number, (path, leaf) in enumerate(leaves):
        if path[-1].key == "b":
            made.append(jnp.zeros(leaf.shape, leaf.dtype))
        else:
            noise = jax.random.normal(jax.random.fold_in(key, number), leaf.shape, leaf.dtype)
            made.append(noise * np.float32(np.prod(leaf.shape[2:]) ** -0.5))
    return jax.tree.unflatten(tree, made)


def merge(
    frozen: dict[str, Any], dense: dict[str, Any], adapters: dict[str, Any], *, rank: int, alpha: float
) -> dict[str, Any]:
    """The parameters of an ordinary model, in the dtype of the frozen weights; the update is computed in float32."""
    _check(rank)

    def one(path: tuple, weight: jax.Array, pair: dict[str, jax.Array]) -> jax.Array:
        a, b = (pair[name].astype(jnp.float32) for name in "ab")
        layers = weight.shape[0]
        update = b.reshape(layers, -1, rank) @ a.reshape(layers, rank, -1)
        merged = weight.astype(jnp.float32) + (alpha / rank) * update.reshape(weight.shape)
        return merged.astype(weight.dtype)

    adapted = jax.tree.map_with_path(one, frozen, adapters)
    return _union(dense, adapted)


def _union(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    result = dict(a)
    for key, value in b.items():
        result[key] = _union(a[key], value) if key in a else value
    return result
