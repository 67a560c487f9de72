"""`pairwise_rotation`: argument checks and the choice of implementation."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.rotation import reference, xla

NAMES = ("mosaic", "xla", "reference")


def pairwise_rotation(
    x: Float[Array, "*rows I"],
    theta: Float[Array, "R half"],
    pairs: Int[Array, "R I"],
    channel_scales: Float[Array, "I"] | None = None,
    *,
    group_size: int,
    inverse: bool = False,
    implementation: str | None = None,
) -> Float[Array, "*rows I"]:
    """Scales channels, then applies R steps of disjoint Givens rotations within groups (ParoQuant, arXiv 2511.10645).

    Step r turns channels i and j of a pair by its angle: `x_i' = cos x_i + sin x_j`, `x_j' = cos x_j - sin x_i`. The
    whole is `x * channel_scales` times an orthogonal matrix that is block-diagonal in the groups. Computed in float32
    (float64 for float64 inputs), rounded once at the end. Differentiable in x, theta and channel_scales.

    Args:
      x: rows of activations, or of a weight `[O, I]`.
      theta: angle in radians of pair t of group k at `[r, k * group_size / 2 + t]`.
      pairs: within each group and step a permutation of 0..group_size - 1; pair t is its elements 2 t and 2 t + 1.
      channel_scales: factor of each channel before the first step; None: 1. Not with `inverse`.
      group_size: channels of a group, even, divides I.
      inverse: apply the transposed matrix instead: the steps in reverse order with negative angles.
      implementation: "xla" or "reference"; None is "xla". "mosaic" is not written yet.

    Raises:
      ValueError: arguments that do not fit together.
      NotImplementedError: "mosaic".
    """
    if implementation not in (None, *NAMES):
        raise ValueError(f"implementation must be None or one of {[*NAMES]}; got {implementation!r}")
    if implementation == "mosaic":
        raise NotImplementedError('pairwise_rotation "mosaic": there is no Hopper kernel yet; use "xla"')
    if x.ndim < 1 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be floating with at least one axis; got {x.dtype} of shape {x.shape}")
    channels = x.shape[-1]
    if group_size < 2 or group_size % 2 or channels % group_size:
        raise ValueError(f"group_size must be even and divide the {channels} channels of x; got {group_size}")
    if pairs.ndim != 2 or pairs.shape[1] != channels or not jnp.issubdtype(pairs.dtype, jnp.integer):
        raise ValueError(f"pairs must be integers of shape [R, {channels}]; got {pairs.dtype} of shape {pairs.shape}")
    if theta.shape != (pairs.shape[0], channels // 2):
        raise ValueError(f"theta must have shape {(pairs.shape[0], channels // 2)}; got {theta.shape}")
    if channel_scales is not None and channel_scales.shape != (channels,):
        raise ValueError(f"channel_scales must have shape {(channels,)}; got {channel_scales.shape}")
    if inverse and channel_scales is not None:
        raise ValueError("channel_scales come before the rotation and have no place in its inverse")
    run = reference.run if implementation == "reference" else xla.run
    precise = jnp.promote_types(x.dtype, jnp.float32)
    rotated = x.astype(precise)
    if channel_scales is not None:
        rotated = rotated * channel_scales.astype(precise)
    return run(rotated, theta.astype(precise), pairs, group_size, inverse=inverse).astype(x.dtype)
