"""What quantization costs: likelihood of held-out text, and how far the predictions are from those of the original."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxmodels.qwen.model import CausalLM
from pallas_kernels.masks import BlockCausal, Causal, Mask
from train.objectives.next_token import next_token_targets

Batch = dict[str, np.ndarray]


class Quality(NamedTuple):
    """Means over the tokens of held-out rows."""

    nll: float | None
    """Nats per token of the next token; None for block-diffusion models, whose likelihood is another matter."""
    bits_per_byte: float | None
    """The same in bits per byte of the text."""
    kl: float
    """Nats per token that the predictions are from those of the original, KL(original || this)."""
    agreement: float
    """Share of tokens whose most probable next token is that of the original."""
    tokens: int


@functools.partial(jax.jit, static_argnames=("lm",))
def _row(original: Any, own: Any, row: dict[str, Array], *, lm: CausalLM) -> tuple[Array, Array, Array, Array]:
    """Sums over rows `[B, T]` of likelihood, divergence, agreement and weights."""
    mask: Mask = Causal() if lm.config.block_size is None else BlockCausal(lm.config.block_size)
    options: dict[str, Any] = {"positions": row["positions"], "segment_ids": row["segment_ids"], "mask": mask}
    expected, found = (
        jax.nn.log_softmax(lm.apply(params, row["tokens"], **options), axis=-1) for params in (original, own)
    )
    targets, weights = next_token_targets(row["tokens"], row["segment_ids"], row["loss_mask"])
    nll = -jnp.take_along_axis(found, targets[..., None], axis=-1)[..., 0]
    kl = (jnp.exp(expected) * (expected - found)).sum(axis=-1)
    same = expected.argmax(axis=-1) == found.argmax(axis=-1)
    real = row["segment_ids"] > 0
    return (weights * nll).sum(), (real * kl).sum(), (real * same).sum(), jnp.stack([weights.sum(), real.sum()])


def row_sums(lm: CausalLM, original: Any, own: Any, row: Batch) -> np.ndarray:
    """Of rows `[B, T]`: nats of the next tokens, KL(original || own), agreeing tokens, predicted tokens, tokens."""
    nll, kl, same, counts = _row(original, own, {name: jnp.asarray(x) for name, x in row.items()}, lm=lm)
    return np.array([float(nll), float(kl), float(same), *map(float, counts)])


def measure_quality(lm: CausalLM, original: Any, own: Any, rows: Batch, *, num_bytes: int) -> Quality:
    """Compares two sets of parameters of one model.

    Args:
      lm: the model.
      original: its parameters.
      own: the quantized ones.
      rows: held-out rows with "tokens", "positions", "segment_ids" and "loss_mask", `[S, T]`.
      num_bytes: of the text whose tokens are predicted.
    """
    each = [
        row_sums(lm, original, own, {name: x[i : i + 1] for name, x in rows.items()})
        for i in range(len(rows["tokens"]))
    ]
    nll, kl, same, predicted, real = np.sum(each, axis=0)
    causal = lm.config.block_size is None
    return Quality(
        nll=nll / predicted if causal else None,
        bits_per_byte=nll / math.log(2) / num_bytes if causal else None,
        kl=kl / real,
        agreement=same / real,
        tokens=int(real),
    )
