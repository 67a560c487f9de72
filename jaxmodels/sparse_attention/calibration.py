"""From a wish, "skip half of the tiles", to a threshold that grants it at every length.

At a fixed share of skipped tiles the threshold falls with the length L as λ = factor / L, and the factor grows with the
share S as a · exp(b · S). Calibration measures what many trial thresholds skip on samples of several lengths, one
forward pass for all of them (`skip.margins`), and fits log(λ · L) = log a + b · S.

What is counted is what the kernels would skip: the same tiles, the same rule. Counts are summed before any ratio.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmodels.sparse_attention.config import ScaleFit
from pallas_kernels.attention import skip as rule
from pallas_kernels.attention import xla
from pallas_kernels.attention.limits import Limits
from pallas_kernels.attention.skip import SkipTile
from pallas_kernels.masks import Causal, Mask

Numbers = Sequence[float | int] | np.ndarray

TRIAL_THRESHOLDS = (
    1e-6, 5e-6, 1e-5, 5e-5, 1e-4, 5e-4, 1e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.3, 0.5, 0.7,
)  # fmt: skip
"""λ to try, those of the public calibration tool (ModelOpt)."""


class SkipMeasure(flax.struct.PyTreeNode):
    """What a forward pass is to count, see `CausalLM.hidden`; make it with `create`, which checks it.

    Attributes:
      thresholds: J trial λ, the one leaf: other values compile nothing.
      prefill: tiles of the pass itself; static.
      decode: tiles of decode steps that each of the last `decode_tokens` tokens of a row would have been; None: none.
      decode_tokens: how many.
    """

    thresholds: Any  # float32 [J]
    prefill: SkipTile = flax.struct.field(pytree_node=False, default=SkipTile())
    decode: SkipTile | None = flax.struct.field(pytree_node=False, default=None)
    decode_tokens: int = flax.struct.field(pytree_node=False, default=10)

    @classmethod
    def create(
        cls,
        thresholds: Numbers = TRIAL_THRESHOLDS,
        *,
        prefill: SkipTile = SkipTile(),
        decode: SkipTile | None = None,
        decode_tokens: int = 10,
    ) -> "SkipMeasure":
        check_thresholds(thresholds)
        if prefill.chains != 1:
            raise ValueError(f"a forward pass over all tokens has one chain; got {prefill}")
        if decode_tokens < 1:
            raise ValueError(f"decode_tokens must be at least 1; got {decode_tokens}")
        return cls(jnp.asarray(thresholds, jnp.float32), prefill, decode, decode_tokens)


class SkipCounts(NamedTuple):
    """Tile pairs of all heads together; of J trial thresholds."""

    visited: Int[Array, "*L B"]
    skipped: Int[Array, "*L B J"]
    decode_visited: Int[Array, "*L B"] | None
    decode_skipped: Int[Array, "*L B J"] | None


def check_thresholds(thresholds: Numbers) -> None:
    if not len(thresholds) or not all(0.0 < t < 1.0 for t in thresholds):
        raise ValueError(f"thresholds must lie in (0, 1) and not be empty; got {thresholds}")


def _count(margins: Array, thresholds: Array) -> tuple[Array, Array]:
    """Visited `[B]` and skipped `[B, J]` tile pairs from margins `[B, ...]`."""
    axes = tuple(range(1, margins.ndim))
    visited = margins != -jnp.inf
    skipped = jax.lax.map(
        lambda level: (visited & (margins < level)).sum(axis=axes, dtype=jnp.int32), jnp.log(thresholds)
    )
    return visited.sum(axis=axes, dtype=jnp.int32), skipped.T


def measure_sparsity(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    thresholds: Float[Array, "J"],
    tile: SkipTile = SkipTile(),
    *,
    mask: Mask = Causal(),
    limits: Limits = Limits(),
    scale: float | None = None,
) -> tuple[Int[Array, "B"], Int[Array, "B J"]]:
    """Tile pairs that `flash_attention` would visit, and skip at each threshold; heads summed.

    One pass over the scores serves all thresholds; memory is one float32 per tile pair.
    """
    rule.check_mask(mask)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _count(xla.skip_margins(q, k, mask=mask, limits=limits, scale=scale, tile=tile), thresholds)


def measure_decode_sparsity(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    thresholds: Float[Array, "J"],
    tile: SkipTile,
    *,
    lengths: Int[Array, "B"],
    num_tokens: int,
    scale: float | None = None,
) -> tuple[Int[Array, "B"], Int[Array, "B J"]]:
    """What decode steps would visit and skip, had the last `num_tokens` tokens of each row been decoded one by one.

    The token at position p attends to a cache of the p keys before it; the query heads of a key head vote together.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    batch, num_keys, num_kv_heads, _ = k.shape
    num_tokens = min(num_tokens, q.shape[1])
    positions = lengths[:, None] - num_tokens + jnp.arange(num_tokens)  # negative: the row has no such token
    q = jnp.take_along_axis(q, jnp.maximum(positions, 0)[:, :, None, None], axis=1)
    q = q.reshape(batch, num_tokens, num_kv_heads, -1, q.shape[-1])
    precise = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("BTKGH,BSKH->BTKGS", q, k, preferred_element_type=precise) * scale
    before = jnp.arange(num_keys) < positions[:, :, None]
    scores = jnp.where(before[:, :, None, None], jax.lax.stop_gradient(scores), -jnp.inf)
    top = rule.tile_tops(scores, SkipTile(rows=scores.shape[3], width=tile.width))[:, :, :, 0]
    return _count(rule.margins(top, tile.chains), thresholds)


def fit_threshold_scale(
    thresholds: Numbers,
    lengths: Numbers,
    sparsities: Sequence[Numbers] | np.ndarray,
    *,
    least: float = 0.1,
    most: float = 0.9,
) -> ScaleFit:
    """Least squares of log(λ · L) on the measured sparsity.

    Args:
      thresholds: J trial λ.
      lengths: L of each of the I samples.
      sparsities: share of skipped tiles, `[I, J]`.
      least: only sparsities from here take part: near 0 and 1 the line bends.
      most: and only those up to here.

    Raises:
      ValueError: shapes that do not fit, or too few points to fit a line.
    """
    check_thresholds(thresholds)
    sparsity = np.asarray(sparsities, np.float64)
    length = np.asarray(lengths, np.float64)
    if sparsity.shape != (length.size, len(thresholds)):
        raise ValueError(
            f"sparsities must have shape {(length.size, len(thresholds))}, one row per length; got {sparsity.shape}"
        )
    if not (length >= 1).all():
        raise ValueError(f"lengths must be at least 1; got {lengths}")
    used = (sparsity >= least) & (sparsity <= most)
    x, y = sparsity[used], np.log(np.asarray(thresholds) * length[:, None])[used]
    if np.unique(x).size < 2:
        raise ValueError(
            f"only {np.unique(x).size} different sparsities lie in [{least}, {most}], a line needs 2; measured "
            f"{sparsity.min():.3f} to {sparsity.max():.3f}: try other thresholds, longer samples or smaller tiles"
        )
    x_mean, y_mean = x.mean(), y.mean()
    b = ((x - x_mean) * (y - y_mean)).sum() / ((x - x_mean) ** 2).sum()
    return ScaleFit(float(np.exp(y_mean - b * x_mean)), float(b))


def fit_inverse_length(thresholds: Numbers, lengths: Numbers) -> float:
    """The scale factor of one fixed target: least squares of λ = a / L, a = Σ xy / Σ x² with x = 1 / L.

    Args:
      thresholds: the λ that reached the target on each sample.
      lengths: L of each sample.
    """
    y, x = np.asarray(thresholds, np.float64), 1.0 / np.asarray(lengths, np.float64)
    if y.shape != x.shape or y.size == 0:
        raise ValueError(f"thresholds and lengths must be equally many and not none; got {y.shape} and {x.shape}")
    return float((x * y).sum() / (x * x).sum())
