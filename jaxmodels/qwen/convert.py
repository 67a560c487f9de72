"""From a dense decoder to one whose layers select blocks, to be trained on."""

import dataclasses
from collections.abc import Collection

import jax.numpy as jnp

from jaxmodels.functional import Params
from jaxmodels.qwen.config import MobaConfig, QwenConfig
from jaxmodels.qwen.model import is_stacked


def route_layers(
    config: QwenConfig, params: Params, layers: Collection[int], *, moba: MobaConfig | None, key_conv: int | None = None
) -> tuple[QwenConfig, Params]:
    """Configuration and parameters with blocks to select in the given layers, rotated as before.

    The new taps are 0, which leaves keys as they are: up to `top_k` blocks of tokens this is the same function. Beyond
    them it is another one until it has been trained.

    Args:
      config: of the dense model.
      params: its parameters, stacked; their arrays are shared.
      layers: which layers, counted from 0; they must have full attention.
      moba: block size and number of blocks; None: the layers keep full attention and only convolve their keys.
      key_conv: taps of a convolution over the keys of these layers; None: there is none.
    """
    if config.key_conv_taps is not None and key_conv not in (None, config.key_conv_taps):
        raise ValueError(f"key_conv must be the {config.key_conv_taps} taps that other layers have; got {key_conv}")
    attention = list(config.layer_attention)
    for layer in layers:
        if not 0 <= layer < config.layers:
            raise ValueError(f"layers must lie in [0, {config.layers}); got {layer}")
        if not attention[layer].full or attention[layer].key_conv is not None:
            raise ValueError(f"layer {layer} must have full attention and no key convolution; got {attention[layer]}")
        attention[layer] = dataclasses.replace(attention[layer], moba=moba, key_conv=key_conv)
    routed = dataclasses.replace(config, layer_attention=tuple(attention))
    if key_conv is None or config.key_conv_taps is not None:
        return routed, params
    if not is_stacked(params["layers"]):
        raise ValueError("params must be stacked; got those of unstack()")
    shape = (config.layers, key_conv, config.kv_heads, config.head_dim)
    taps = {"k_conv": jnp.zeros(shape, params["final_norm"].dtype)}
    stacked = params["layers"] | {"attention": params["layers"]["attention"] | taps}
    return routed, params | {"layers": stacked}
