"""The block-diffusion objective: masked tokens from their noisy block and the clean blocks before it.

    loss = sum over masked tokens of  -log p(token | noisy block, clean blocks before it) / t,   per token of the batch

with t the noise level of the token's block (document, for uniform masking). This is a training loss: rounded counts
and masks that prefer late positions bias it, so it is no perplexity. Evaluate with `make_bound_loss`.

Packed rows: tokens see only their own document. Block boundaries lie at multiples of the block size of the row; a
document that starts inside a block begins with a short block. Packing can align documents to blocks
(`StoreConfig.align`, which the recipe `dlm` uses), and then boundaries count from the start of each document.

Source: Efficient-DLM (arXiv 2512.14067); complementary masks: Fast-dLLM v2 (arXiv 2509.26328).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxmodels.decoding.block_diffusion import corruption as corrupt
from jaxmodels.decoding.block_diffusion.bound import ar_nll, nelbo, require_mask_id, suppressed_ids
from jaxmodels.decoding.block_diffusion.patterns import Pattern, gathered_nll, predict
from train.objectives.config import DiffusionObjective
from train.step import LossFn

__all__ = ["make_ar_loss", "make_block_diffusion_loss", "make_bound_loss"]


def _pattern(objective: DiffusionObjective, block_size: int) -> Pattern:
    return Pattern(
        objective.pattern,
        block_size if objective.in_blocks else None,
        clean="block" if objective.joint_weight is None else "token",
        prefix_len=objective.prefix_len,
    )


def _corrupt(key: Array, targets: Array, segment_ids: Array, objective: DiffusionObjective, block_size: int | None):
    if objective.masking == "position":
        return corrupt.sample_block_mask(
            key,
            targets,
            block_size=block_size,
            half_life_ratio=objective.half_life_ratio,
            segment_ids=segment_ids,
            min_masked=0 if objective.in_blocks else 1,
        )
    per = block_size if objective.masking == "uniform_block" else None
    return corrupt.sample_uniform_mask(key, targets, block_size=per, segment_ids=segment_ids)


def make_block_diffusion_loss(
    lm: Any,
    objective: DiffusionObjective,
    *,
    chunk_size: int | None = None,
    z_loss: float = 0.0,
    remat: str | None = None,
    gather_groups: int = 1,
) -> LossFn:
    """Loss of a `CausalLM` over batches of packed rows.

    Args:
        lm: model; its configuration names the mask token.
        objective: what to train on.
        chunk_size: rows of states whose logits are in memory at once, see `token_nll`.
        z_loss: coefficient of logsumexp(logits)**2 of the masked positions.
        remat: see `CausalLM.hidden`.
        gather_groups: batch shards of the mesh, see `gathered_nll`.

    Metrics: "masked_nll", the plain mean of -log p over masked tokens; "masked", the share of targets that were
    masked; "offset_nll", masked_nll by offset in the block (fixed block size only; rising within blocks is the
    expected signature); "ar_nll" with `joint_weight`.
    """
    mask_id = require_mask_id(lm.config)
    suppress = suppressed_ids(lm.config) if objective.suppress else ()
    head: dict[str, Any] = {"chunk_size": chunk_size, "z_loss": z_loss, "groups": gather_groups}
    autoregressive = objective.pattern == "autoregressive"

    def loss_at(block_size: int, params: Any, batch: dict[str, Array], key: Array):
        tokens, segment_ids, positions = batch["tokens"], batch["segment_ids"], batch["positions"]
        real = segment_ids > 0
        supervised = targets = batch["loss_mask"].astype(bool) & real
        if objective.prefix_len is not None:
            targets = targets & (jnp.arange(tokens.shape[1]) >= objective.prefix_len)
        if autoregressive:
            masked, level = targets, jnp.ones(tokens.shape)
        else:
            blocks = block_size if objective.in_blocks else None
            drawn = _corrupt(key, targets, segment_ids, objective, blocks)
            masked, level = drawn
            if objective.complementary:
                other = corrupt.complement(drawn, targets)
                # Interleaved, so that every device keeps the rows it has.
                masked, level, tokens, segment_ids, positions, real, supervised = (
                    jnp.stack(pair, axis=1).reshape(-1, tokens.shape[1])
                    for pair in (
                        (masked, other.masked), (level, other.level),
                        *((x, x) for x in (tokens, segment_ids, positions, real, supervised)),
                    )
                )  # fmt: skip
        out = predict(
            lm, params, tokens, masked, _pattern(objective, block_size), mask_id=mask_id, positions=positions,
            segment_ids=segment_ids, token_shift=objective.token_shift, shift_context=objective.shift_context,
            remat=remat,
        )  # fmt: skip
        where = masked & out.valid
        with jax.named_scope("cross_entropy"):
            fraction = 1.0 if autoregressive else 0.625
            nll, z = gathered_nll(
                lm, params, out.states, tokens, where, suppress=() if autoregressive else suppress,
                fraction=fraction, **head,
            )  # fmt: skip
        if objective.weighting == "level":
            weight = 1.0 / level
        elif objective.weighting == "inclusion":
            chance = jnp.asarray(corrupt.position_inclusion(block_size, objective.half_life_ratio), jnp.float32)
            groups = corrupt.make_groups(tokens.shape, block_size, segment_ids=segment_ids)
            weight = 1.0 / chance[groups.offset]
        else:
            weight = jnp.ones(tokens.shape)
        loss_sum = jnp.sum(weight * nll) + jnp.sum(z)
        count = jnp.sum(where, dtype=jnp.float32)
        counted = {"tokens": real, "masked": where, "supervised": supervised}[objective.normalization]
        denominator = jnp.sum(counted, dtype=jnp.float32)
        metrics: dict[str, Any] = {
            "masked_nll": (jnp.sum(nll), count),
            "masked": (jnp.sum(masked, dtype=jnp.float32), jnp.sum(supervised, dtype=jnp.float32)),
        }
        if objective.in_blocks and objective.random_length_prob == 0:
            metrics["offset_nll"] = (_by_offset(nll, block_size), _by_offset(where, block_size))
        if objective.joint_weight is not None:
            ar_sum, ar_count = _clean_half_nll(lm, params, out.clean, tokens, segment_ids, supervised, head)
            metrics["ar_nll"] = (ar_sum, ar_count)
            # Both losses are means over their own targets, expressed over the denominator of the first.
            share = jnp.where(denominator > 0, ar_count / jnp.where(denominator > 0, denominator, 1.0), 0.0)
            loss_sum = ar_sum + objective.joint_weight * share * loss_sum
            denominator = ar_count
        return loss_sum, denominator, metrics

    def loss_fn(params: Any, batch: dict[str, Array], key: Array):
        if objective.random_length_prob == 0:
            return loss_at(objective.block_size, params, batch, key)
        size_key, key = jax.random.split(key)
        index, sizes = corrupt.draw_block_size(size_key, objective.block_size, objective.random_length_prob)
        branches = [lambda *args, size=size: loss_at(size, *args) for size in sizes]
        return jax.lax.switch(index, branches, params, batch, key)

    return loss_fn


def _by_offset(values: Array, block_size: int) -> Array:
    """[block_size]: sums over rows and blocks by offset in the block."""
    total = jnp.sum(values, axis=0, dtype=jnp.float32)
    total = jnp.pad(total, (0, -total.shape[0] % block_size))
    return jnp.sum(total.reshape(-1, block_size), axis=0)


def _clean_half_nll(lm, params, clean, tokens, segment_ids, supervised, head) -> tuple[Array, Array]:
    """(sum, count) of the next-token loss of a causal clean half."""
    same = jnp.pad(segment_ids[:, 1:] == segment_ids[:, :-1], ((0, 0), (1, 0)))
    where = supervised & same
    states = jnp.pad(clean, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    nll, z = gathered_nll(lm, params, states, tokens, where, fraction=1.0, **head)
    return jnp.sum(nll) + jnp.sum(z), jnp.sum(where, dtype=jnp.float32)


def make_bound_loss(
    lm: Any,
    *,
    block_size: int | None,
    token_shift: bool = False,
    num_samples: int = 1,
    chunk_size: int | None = None,
) -> LossFn:
    """The unbiased bound in nats per token as an evaluation loss; `block_size` None: one bidirectional block.

    The first token of each document is a condition, so that the value compares with an autoregressive model's.
    Metrics: "offset_nats", the bound by offset in the block.
    """

    def loss_fn(params: Any, batch: dict[str, Array], key: Array):
        segment_ids = batch["segment_ids"]
        same = jnp.pad(segment_ids[:, 1:] == segment_ids[:, :-1], ((0, 0), (1, 0)))
        scored = batch["loss_mask"].astype(bool) & same & (segment_ids > 0)
        score = nelbo(
            lm, params, batch["tokens"], key, block_size=block_size, num_samples=num_samples, loss_mask=scored,
            segment_ids=segment_ids, token_shift=token_shift, chunk_size=chunk_size,
        )  # fmt: skip
        metrics = {}
        if block_size is not None:
            metrics["offset_nats"] = (_by_offset(score.per_token, block_size), _by_offset(scored, block_size))
        return jnp.sum(score.nats), jnp.sum(score.tokens), metrics

    return loss_fn


def make_ar_loss(lm: Any, *, chunk_size: int | None = None) -> LossFn:
    """Exact next-token likelihood in nats per token, over the same tokens as `make_bound_loss`."""

    def loss_fn(params: Any, batch: dict[str, Array], key: Array):
        del key
        score = ar_nll(
            lm, params, batch["tokens"], loss_mask=batch["loss_mask"].astype(bool),
            segment_ids=batch["segment_ids"], chunk_size=chunk_size,
        )  # fmt: skip
        return jnp.sum(score.nats), jnp.sum(score.tokens), {}

    return loss_fn
