"""How far weights have moved: mean |W - W0| per layer, of attention and MLP."""

from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["weight_drift"]


@jax.jit
def _drift(params: Any, initial: Any) -> dict[str, jax.Array]:
    sums: dict[str, list[Any]] = {}
    before = jax.tree_util.tree_flatten_with_path(initial["layers"])[0]
    after = jax.tree.leaves(params["layers"])
    for (path, old), new in zip(before, after, strict=True):
        names = [key.key for key in path]
        if names[0] in ("attention", "mlp") and not ("norm" in names[-1] or "bias" in names[-1]):
            moved = jnp.abs(new.astype(jnp.float32) - old.astype(jnp.float32))
            total = jnp.sum(moved, axis=tuple(range(1, moved.ndim)))
            entry = sums.setdefault(names[0], [0.0, 0])
            entry[0], entry[1] = entry[0] + total, entry[1] + moved[0].size
    return {name: total / count for name, (total, count) in sums.items()}


def weight_drift(params: Any, initial: Any) -> dict[str, list[float] | float]:
    """mean |W - W0| over the projections of each part of the blocks (norms and biases left out).

    Returns "drift_attention" and "drift_mlp", the means over layers, and "drift_attention_layers" and
    "drift_mlp_layers" per layer. Both trees are stacked parameters of one `CausalLM`.
    """
    result: dict[str, list[float] | float] = {}
    for name, layers in _drift(params, initial).items():
        values = [float(value) for value in layers]
        result[f"drift_{name}_layers"] = values
        result[f"drift_{name}"] = sum(values) / len(values)
    return result
