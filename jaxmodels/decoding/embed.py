"""Sentence embeddings from a language model: the mean of its last hidden states.

Source: Efficient-DLM (arXiv 2512.14067), section on embeddings: a model converted to diffusion sees in both
directions; the autoregressive baseline pools the same way under a causal mask.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.masks import Causal, Full


def embed(
    lm: Any,
    params: Any,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    *,
    attention: str = "bidirectional",
    normalize: bool = False,
) -> Float[Array, "B D"]:
    """Mean over each row's first `lengths` tokens of the states after the final norm; float32.

    Padding is seen by no token and not averaged. A row of length 0 gives zeros.

    Args:
        lm: a `CausalLM`.
        params: its weights.
        tokens: right-padded with any id.
        lengths: real tokens per row.
        attention: "bidirectional", or "causal" for the autoregressive baseline.
        normalize: scale to unit length, so that a dot product is the cosine.
    """
    if attention not in ("bidirectional", "causal"):
        raise ValueError(f"attention must be 'bidirectional' or 'causal'; got {attention!r}")
    mask = Full() if attention == "bidirectional" else Causal()
    states = lm.hidden(params, tokens, mask=mask, lengths=lengths).states.astype(jnp.float32)
    real = (jnp.arange(tokens.shape[1]) < lengths[:, None])[:, :, None]
    mean = jnp.sum(jnp.where(real, states, 0.0), axis=1) / jnp.maximum(lengths, 1)[:, None]
    if normalize:
        mean = mean / jnp.maximum(jnp.linalg.norm(mean, axis=1, keepdims=True), 1e-12)
    return mean
