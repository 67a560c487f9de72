"""cuDNN's fused attention through `jax.nn.dot_product_attention`, for the calls whose meaning it shares.

Taken by name, or where a committed GPU check shows that it agrees and a timing that it is faster (`dispatch`).
"""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.attention.limits import Limits
from pallas_kernels.attention.skip import Skip
from pallas_kernels.masks import Causal, Full, Mask


def unsupported(
    q: Array, k: Array, v: Array, *, mask: Mask, limits: Limits, scale: float, return_lse: bool, skip: Skip | None
) -> str | None:
    """Why this call cannot go to cuDNN; None if it can.

    Left out because cuDNN means something else or nothing by it: causal masks with T != S (top-left there), rows
    without any key (undefined there), hence every run-time limit, and masks that are neither causal nor full.
    """
    if skip is not None:
        return "cuDNN attention skips no tiles; leave out skip_threshold and skip_scale_factor"
    if (platform := jax.default_backend()) != "gpu":
        return f"cuDNN needs an NVIDIA GPU; the default backend is {platform}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN attention takes bfloat16 or float16; got {q.dtype}"
    if q.shape[3] % 8 or q.shape[3] > 128:
        return f"cuDNN attention is used for head dims up to 128 that are multiples of 8; got {q.shape[3]}"
    if v.shape[3] != q.shape[3]:
        return f"cuDNN attention is used for values of the head dim of the keys; got {v.shape[3]} and {k.shape[3]}"
    if not isinstance(mask, Causal | Full):
        return f"cuDNN attention is used for Causal and Full masks; got {mask}"
    if q.shape[1] % 2 or k.shape[1] % 2:
        # T = S = 257 raised inside the call on an H100 (JAX 0.11.2, 2026-11-23); 64 and 1024 agreed.
        return f"cuDNN attention is used for even lengths; got T={q.shape[1]} and S={k.shape[1]}"
    if isinstance(mask, Causal) and q.shape[1] != k.shape[1]:
        return f"cuDNN aligns causal masks top left, we bottom right; T={q.shape[1]} and S={k.shape[1]} differ"
    if return_lse:
        return f"JAX rounds cuDNN's log-sum-exp to {q.dtype}, we return float32"
    if any(limit is not None for limit in limits):
        given = [name for name, limit in limits._asdict().items() if limit is not None]
        return f"cuDNN attention is used without run-time limits; got {', '.join(given)}"
    return None


def run(q: Array, k: Array, v: Array, *, mask: Mask, limits: Limits, scale: float) -> tuple[Array, None]:
    """The output; cuDNN's log-sum-exp is not offered."""
    causal = isinstance(mask, Causal)
    return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=causal, implementation="cudnn"), None
