"""The autoregressive objective: every token from those before it, inside its own document."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmodels.decoding.cross_entropy import token_nll
from jaxmodels.sparse_attention import SkipAttention
from train.step import LossFn

__all__ = ["make_next_token_loss", "next_token_targets"]


def next_token_targets(
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    loss_mask: Bool[Array, "B T"] | Float[Array, "B T"],
) -> tuple[Int[Array, "B T"], Float[Array, "B T"]]:
    """Target and weight at every position: token t + 1, weighted by its own `loss_mask`.

    The weight is 0 at the last position, where a document ends (the next token belongs to another segment)
    and on padding (segment 0).
    """
    following = jnp.roll(segment_ids, -1, axis=1)
    inside = (segment_ids == following) & (segment_ids > 0)
    inside = inside & (jnp.arange(tokens.shape[1]) < tokens.shape[1] - 1)
    return jnp.roll(tokens, -1, axis=1), inside * jnp.roll(loss_mask, -1, axis=1).astype(jnp.float32)


def make_next_token_loss(
    lm: Any,
    *,
    z_loss: float = 0.0,
    chunk_size: int | None = None,
    remat: str | None = None,
    skip: SkipAttention | None = None,
) -> LossFn:
    """Loss of a `CausalLM`: sum of -log p(next token) + z term (nats), over batches of packed rows.

    Args:
        lm: the model's pure functions.
        z_loss: coefficient of logsumexp(logits)**2, see `token_nll`.
        chunk_size: rows of hidden states whose logits are in memory at once, see `token_nll`.
        remat: what the blocks recompute in the backward pass, see `CausalLM.hidden`.
        skip: train with skip-softmax attention: forward and backward pass leave out the same tiles.

    Metrics: "nll", the loss without the z term; with `skip` "sparsity", the share of visited tile pairs that were
    skipped, all layers, heads and rows together.
    """

    def loss_fn(params: Any, batch: dict[str, Array], key: Array):
        del key  # nothing is drawn
        targets, weights = next_token_targets(batch["tokens"], batch["segment_ids"], batch["loss_mask"])
        hidden = lm.hidden(
            params,
            batch["tokens"],
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
            skip=skip,
            skip_stats=skip is not None,
            remat=remat,
        )
        states = hidden.states
        metrics: dict[str, Any] = {}
        if skip is not None:
            counts = hidden.skip_stats.skipped, hidden.skip_stats.visited
            metrics["sparsity"] = tuple(jnp.sum(count.astype(jnp.float32)) for count in counts)
        with jax.named_scope("cross_entropy"):
            nll, z = token_nll(
                lambda rows: lm.head(params, rows),
                states.reshape(-1, states.shape[-1]),
                targets.reshape(-1),
                chunk_size=chunk_size,
                z_loss=z_loss,
            )
            weights = weights.reshape(-1)
            nll_sum = jnp.sum(weights * nll)
            return nll_sum + jnp.sum(weights * z), jnp.sum(weights), metrics | {"nll": nll_sum}

    return loss_fn
