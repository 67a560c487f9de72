"""The short causal convolution over keys that gathers related keys in the same block."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.checks import int_array
from pallas_kernels.moba.centroids import check_keys


def key_conv(
    k: Float[Array, "B T K H"],
    weight: Float[Array, "W channels"],
    segment_ids: Int[Array, "B T"] | None = None,
    state: Float[Array, "B W_minus_1 K H"] | None = None,
) -> tuple[Float[Array, "B T K H"], Float[Array, "B W_minus_1 K H"]]:
    """k_t + SiLU(sum over l of weight[l] * k_{t-l}), channel by channel, in float32; FlashMoBA (arXiv 2511.11571).

    Keys before the first are 0. Use the result for centroids and attention alike, so that the filter learns through
    attention.

    Args:
      k: raw keys, after their projection (and norm, if any) and before rotation.
      weight: taps, W of K * H channels each; tap 0 weighs the current token. (A PyTorch `Conv1d` has its taps in the
        other order: `conv.weight[:, 0, ::-1].T`.)
      segment_ids: sequences of a packed row: the filter does not reach across them, nor into negative ids.
      state: the last W - 1 raw keys before these, oldest first, as returned before; None: there are none.

    Returns:
      The new keys, in the dtype of `k`, and the state after them. The state of a packed row is that of its last
      sequence.
    """
    check_keys("k", k)
    batch, num_keys, num_kv_heads, head_dim = k.shape
    if weight.ndim != 2 or weight.shape[0] < 1 or weight.shape[1] != num_kv_heads * head_dim:
        channels = num_kv_heads * head_dim
        raise ValueError(f"weight must be [taps, {channels}] for keys {k.shape}; got shape {weight.shape}")
    width = weight.shape[0]
    shape = (batch, width - 1, num_kv_heads, head_dim)
    if segment_ids is not None and state is not None:
        raise ValueError("segment_ids and state cannot be given together: a state belongs to one sequence")
    if state is None:
        state = jnp.zeros(shape, k.dtype)
    elif state.shape != shape or state.dtype != k.dtype:
        raise ValueError(f"state must be {k.dtype} of shape {shape}; got {state.dtype} of shape {state.shape}")
    precise = jnp.promote_types(k.dtype, jnp.float32)
    taps = weight.astype(precise).reshape(width, num_kv_heads, head_dim)
    keys = jnp.concatenate([state, k], axis=1)
    same = jnp.ones((width, batch, num_keys), bool)
    if segment_ids is not None:
        ids = int_array("segment_ids", segment_ids, (batch, num_keys))
        padded = jnp.pad(ids, ((0, 0), (width - 1, 0)), constant_values=-1)
        before = jnp.stack([padded[:, width - 1 - lag : width - 1 - lag + num_keys] for lag in range(width)])
        same = (before == ids) & (ids >= 0)
        last = padded[:, num_keys:] == ids[:, -1:]
        state = jnp.where(last[:, :, None, None], keys[:, num_keys:], 0)
    else:
        state = keys[:, num_keys:]
    total = jnp.zeros(k.shape, precise)
    for lag in range(width):
        shifted = keys[:, width - 1 - lag : width - 1 - lag + num_keys]
        total += taps[lag] * jnp.where(same[lag][:, :, None, None], shifted, 0)
    return (k + jax.nn.silu(total)).astype(k.dtype), state
