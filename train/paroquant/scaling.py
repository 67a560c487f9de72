"""Activation-aware scaling, the baseline (AWQ, arXiv 2306.00978).

Channels whose activations are large are scaled up before rounding, by the mean magnitude to a power that is searched.
Linears that read the same activations share their scales, because AWQ folds these into what comes before. Here the
inverse stays beside the weight as `input_scales`. Without AWQ's search for clipped ranges.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmodels.checkpoints.mapping import flatten, unflatten
from jaxmodels.functional import Params
from jaxmodels.layers import embed, rms_norm
from jaxmodels.qwen.model import CausalLM
from pallas_kernels.quantized_matmul import QuantizedTensor
from pallas_kernels.quantized_matmul.rounding import round_weight
from pallas_kernels.quantized_matmul.tensor import matrix

POWERS = tuple(i / 20 for i in range(20))
SHARED = (
    (("attention", "q"), ("attention", "k"), ("attention", "v")),
    (("attention", "o"),),
    (("mlp", "gate"), ("mlp", "up")),
    (("mlp", "down"),),
)


def scale_model(
    lm: CausalLM, params: Params, rows: dict[str, np.ndarray], *, group_size: int
) -> tuple[Params, dict[str, list[float]]]:
    """The parameters rounded to INT4 under the best scales, and the power that was chosen, by linear and layer.

    `rows` has "tokens", "positions" and "segment_ids", int32 `[S, T]`: calibration text for an autoregressive model.
    A mixture of experts is refused.
    """
    if lm.config.moe is not None:
        raise ValueError(f"activation-aware scaling of a mixture of experts is not implemented; got {lm.config.moe}")
    states = jnp.concatenate([embed(params["embed"], jnp.asarray(tokens[None])) for tokens in rows["tokens"]])
    about: dict[str, Any] = {name: jnp.asarray(rows[name]) for name in ("positions", "segment_ids")}
    layers = flatten(params["layers"])
    powers: dict[str, list[float]] = {}
    finished: list[dict[tuple[str, ...], QuantizedTensor]] = []
    for layer in range(lm.config.layers):
        own = {path: leaf[layer] for path, leaf in layers.items()}
        inputs = _inputs(lm, own, states, about, layer)
        done: dict[tuple[str, ...], QuantizedTensor] = {}
        for group in SHARED:
            x = inputs[group[0]].reshape(-1, inputs[group[0]].shape[-1]).astype(jnp.float32)
            weights = [own[path].reshape(-1, x.shape[1]).astype(jnp.float32) for path in group]
            power, scaled = _search(x, weights, group_size)
            for path, weight in zip(group, scaled, strict=True):
                num_inputs = lm.linears[("layers", *path)]
                done[path] = dataclasses.replace(weight, shape=own[path].shape, num_inputs=num_inputs)
                powers.setdefault(".".join(path), []).append(power)
        finished.append(done)
        states = lm.block(unflatten(own), states, layer=layer, **about)
    stacked = {
        path: jax.tree.map(lambda *leaves: jnp.stack(leaves), *(block[path] for block in finished))
        for path in finished[0]
    }
    return params | {"layers": unflatten(layers | stacked)}, powers


def _inputs(lm: CausalLM, own: dict[tuple[str, ...], Array], states: Array, about: dict[str, Any], layer: int) -> Any:
    """What each group of linears reads. A block whose later linears are identities or nothing gives it away.

    With the output projection an identity and no MLP, the block's output is its input plus what that projection reads;
    the widths need not agree with the model's, so the residual is taken away from a block of zeros.
    """
    config = lm.config
    first = rms_norm(states, own[("attention_norm",)], config.norm_eps)
    width, heads = config.heads * config.head_dim, (config.heads, config.head_dim)
    # Columns of the identity in pieces of the model's width: the residual stream has no more.
    pieces = []
    nothing = {path: jnp.zeros_like(own[path]) for path in (("mlp", "down"),)}
    for start in range(0, width, config.dim):
        rows = jnp.eye(config.dim, width, start, dtype=own[("attention", "o")].dtype)
        probe = own | nothing | {("attention", "o"): rows.reshape(config.dim, *heads)}
        pieces.append((lm.block(unflatten(probe), states, layer=layer, **about) - states)[..., : width - start])
    attended = jnp.concatenate(pieces, axis=-1)
    after = lm.block(unflatten(own | nothing), states, layer=layer, **about)
    second = rms_norm(after, own[("mlp_norm",)], config.norm_eps)
    gated = jax.nn.silu(second @ own[("mlp", "gate")].T) * (second @ own[("mlp", "up")].T)
    return {SHARED[0][0]: first, SHARED[1][0]: attended, SHARED[2][0]: second, SHARED[3][0]: gated}


@functools.partial(jax.jit, static_argnames="group_size")
def _error(
    x: Float[Array, "M I"], weights: list[Array], scales: Float[Array, "I"], group_size: int
) -> tuple[Array, list[QuantizedTensor]]:
    """Squared error of the products under some scales, and the weights."""
    total, rounded = jnp.float32(0), []
    for weight in weights:
        quantized = round_weight(weight * scales, "int4", group_size=group_size)
        total += ((x @ (matrix(quantized) / scales - weight).T) ** 2).sum()
        rounded.append(dataclasses.replace(quantized, input_scales=1 / scales))
    return total, rounded


def _search(x: Array, weights: list[Array], group_size: int) -> tuple[float, list[QuantizedTensor]]:
    magnitude = jnp.maximum(jnp.abs(x).mean(axis=0), 1e-8)
    found = []
    for power in POWERS:
        scales = magnitude**power
        scales = scales / jnp.sqrt(scales.max() * scales.min())
        error, rounded = _error(x, weights, scales, group_size)
        found.append((float(error), power, rounded))
    _, power, rounded = min(found, key=lambda one: one[0])
    return power, rounded
