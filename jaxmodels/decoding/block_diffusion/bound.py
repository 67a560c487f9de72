"""How likely a model finds a text: an unbiased likelihood bound for diffusion, the exact value for AR models.

For a block of n tokens draw k uniformly from 1..n, mask a uniform k-subset, and weight the summed
cross-entropy of the masked tokens by n / k. The expectation over draws equals the continuous-time
negative evidence lower bound (weight 1/t, t uniform), and also the negative log-likelihood averaged over
all orders in which the tokens could be revealed. With n = 1 it is the exact negative log-likelihood.
The training loss is none of these: rounded counts and position-dependent masks bias it.

All values are in nats. Letters: B rows, L positions of a row. Source: Efficient-DLM (arXiv 2512.14067);
any-order view: Hoogeboom et al., Autoregressive Diffusion Models (arXiv 2110.02037).
"""

import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmodels.decoding.block_diffusion.corruption import (
    _eligible_count,
    check_block_size,
    make_groups,
    sample_uniform_subset,
)
from jaxmodels.decoding.block_diffusion.patterns import Pattern, gathered_nll, predict


class Score(flax.struct.PyTreeNode):
    """Negative log-likelihood, or an upper bound of it, of the scored tokens of each row.

    nats: sum over the row's scored tokens.
    tokens: how many tokens were scored.
    per_token: contribution of each position, 0 where not scored. For a bound only sums over whole blocks
        mean something as likelihood; averaged over many rows they show the loss per in-block offset.
    stderr: standard error of `nats` from the spread of the samples; 0 for exact values, NaN for one sample.
    """

    nats: Float[Array, "B"]
    tokens: Int[Array, "B"]
    per_token: Float[Array, "B L"]
    stderr: Float[Array, "B"]


def suppressed_ids(config: Any) -> tuple[int, ...]:
    """Ids that a diffusion model never produces: its mask token, and padding that does not double as eos."""
    ids = [config.mask_id]
    pad = getattr(config, "pad_id", None)
    if pad is not None and pad not in config.eos_ids:
        ids.append(pad)
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def require_mask_id(config: Any) -> int:
    if config.mask_id is None:
        raise ValueError("mask_id is None: the model's configuration names no mask token, and none is guessed")
    return config.mask_id


def _scored(tokens: Array, loss_mask: Array | None, segment_ids: Array | None) -> Array:
    scored = jnp.ones(tokens.shape, bool) if loss_mask is None else loss_mask.astype(bool)
    return scored if segment_ids is None else scored & (segment_ids > 0)


def _bound_pattern(length: int, block_size: int | None) -> Pattern:
    # One block over the whole row needs no clean half: the doubled mask reduces to plain bidirectional.
    if block_size is None or check_block_size(block_size) >= length:
        return Pattern("bidirectional")
    return Pattern("block_diffusion", block_size)


def _subset_nll(lm, params, tokens, masked, pattern, segment_ids, token_shift, options):
    context = "clean" if token_shift and pattern.doubled else "noisy"
    mask_id = require_mask_id(lm.config)
    out = predict(
        lm,
        params,
        tokens,
        masked,
        pattern,
        mask_id=mask_id,
        segment_ids=segment_ids,
        token_shift=token_shift,
        shift_context=context,
    )
    return gathered_nll(
        lm, params, out.states, tokens, masked & out.valid, suppress=suppressed_ids(lm.config), **options
    )[0]


def _droppable(scored: Array, segment_ids: Array | None, token_shift: bool) -> Array:
    """Without the first token of each document when the model is shifted: nothing predicts it."""
    if not token_shift:
        return scored
    if segment_ids is None:
        return scored.at[:, 0].set(False)
    same = segment_ids[:, 1:] == segment_ids[:, :-1]
    return scored & jnp.pad(same, ((0, 0), (1, 0)))


def nelbo(
    lm: Any,
    params: Any,
    tokens: Int[Array, "B L"],
    key: Array,
    *,
    block_size: int | None,
    num_samples: int = 1,
    loss_mask: Bool[Array, "B L"] | None = None,
    segment_ids: Int[Array, "B L"] | None = None,
    token_shift: bool | None = None,
    chunk_size: int | None = None,
) -> Score:
    """Unbiased estimate of the block-diffusion bound -log p(tokens of `loss_mask` | the other tokens).

    Tokens outside `loss_mask` are never masked, so they are conditions: those of a block are seen by the
    whole block. Probabilities are over the tokens the decoder may produce (not the mask token).

    Args:
        lm: model.
        params: its weights.
        tokens: clean tokens; padding has segment 0 or lies outside `loss_mask`.
        key: PRNG key of the draws.
        block_size: evaluation block; None (or >= L) is one bidirectional block per document.
        num_samples: independent draws that are averaged, one forward each.
        token_shift: states predict the next index; None: as `lm.config.token_shift` says. The first token
            of a document is then not scored.
        loss_mask: tokens to score; None: all.
        segment_ids: documents of packed rows, 0 = padding.
        chunk_size: see `token_nll`.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1; got {num_samples}")
    shifted = lm.config.token_shift if token_shift is None else token_shift
    scored = _droppable(_scored(tokens, loss_mask, segment_ids), segment_ids, shifted)
    pattern = _bound_pattern(tokens.shape[1], block_size)

    def draw(sums, sample_key):
        subset = sample_uniform_subset(sample_key, scored, block_size=pattern.block_size, segment_ids=segment_ids)
        nll = _subset_nll(lm, params, tokens, subset.masked, pattern, segment_ids, shifted, {"chunk_size": chunk_size})
        value = nll * subset.weight
        total = value.sum(1)
        return (sums[0] + value, sums[1] + total, sums[2] + total**2), None

    rows = jnp.zeros(tokens.shape[0])
    zero = (jnp.zeros(tokens.shape), rows, rows)
    sums, _ = jax.lax.scan(draw, zero, jax.random.split(key, num_samples))
    per_token, total, squares = (s / num_samples for s in sums)
    variance = jnp.maximum(squares - total**2, 0.0) / (num_samples - 1 or math.nan)
    return Score(total, scored.sum(1).astype(jnp.int32), per_token, jnp.sqrt(variance))


@functools.lru_cache(maxsize=16)
def _subset_weights(block_size: int) -> np.ndarray:
    """[2^n - 1, n]: P(subset) * m / k of subset number s among blocks of m = 1..n tokens, 0 if s >= 2^m."""
    subsets = np.arange(1, 2**block_size)
    size = np.array([int(s).bit_count() for s in subsets])
    table = np.zeros((len(subsets), block_size))
    for m in range(1, block_size + 1):
        inside = subsets < 2**m
        chance = 1.0 / (m * np.array([math.comb(m, k) for k in size[inside]]))  # P(k) P(subset | k)
        table[inside, m - 1] = chance * m / size[inside]
    return table


def exact_nelbo(
    lm: Any,
    params: Any,
    tokens: Int[Array, "B L"],
    *,
    block_size: int,
    loss_mask: Bool[Array, "B L"] | None = None,
    segment_ids: Int[Array, "B L"] | None = None,
    token_shift: bool | None = None,
    chunk_size: int | None = None,
) -> Score:
    """The value that `nelbo` estimates, by enumeration: 2^block_size - 1 forwards, so for small blocks only.

    Blocks are independent given the clean tokens, so one forward evaluates one subset of every block.
    """
    if check_block_size(block_size) > 12:
        raise ValueError(f"block_size must be at most 12 for enumeration; got {block_size}")
    shifted = lm.config.token_shift if token_shift is None else token_shift
    scored = _droppable(_scored(tokens, loss_mask, segment_ids), segment_ids, shifted)
    pattern = _bound_pattern(tokens.shape[1], block_size)
    groups = make_groups(tokens.shape, pattern.block_size, segment_ids=segment_ids)
    size = _eligible_count(scored, groups)
    before = jnp.cumsum(scored, axis=1) - scored
    order = before - jnp.take_along_axis(before, groups.start, axis=1)  # index among the scored of the block
    weights = _subset_weights(block_size)
    dtype = jnp.result_type(jnp.float32, jax.tree.leaves(params)[0].dtype)

    def evaluate(total, subset):
        number, weight_of_size = subset
        weight = jnp.where(scored, weight_of_size[jnp.maximum(size, 1) - 1], 0.0)
        masked = scored & ((number >> order) & 1 == 1) & (weight > 0)
        nll = _subset_nll(lm, params, tokens, masked, pattern, segment_ids, shifted, {"chunk_size": chunk_size})
        return total + nll * weight, None

    numbers = jnp.arange(1, 2**block_size, dtype=jnp.int32)
    per_token, _ = jax.lax.scan(evaluate, jnp.zeros(tokens.shape, dtype), (numbers, jnp.asarray(weights, dtype)))
    tokens_scored = scored.sum(1).astype(jnp.int32)
    return Score(per_token.sum(1), tokens_scored, per_token, jnp.zeros(tokens.shape[0], dtype))


def ar_nll(
    lm: Any,
    params: Any,
    tokens: Int[Array, "B L"],
    *,
    loss_mask: Bool[Array, "B L"] | None = None,
    segment_ids: Int[Array, "B L"] | None = None,
    chunk_size: int | None = None,
) -> Score:
    """Exact -log p under the causal mask; the first token of each document is a condition, not scored.

    To compare with a bound, give the bound a `loss_mask` without those first tokens.
    """
    scored = _droppable(_scored(tokens, loss_mask, segment_ids), segment_ids, True)
    pattern = Pattern("autoregressive")
    out = predict(lm, params, tokens, scored, pattern, mask_id=0, segment_ids=segment_ids)
    nll, _ = gathered_nll(lm, params, out.states, tokens, scored, fraction=1.0, chunk_size=chunk_size)
    return Score(nll.sum(1), scored.sum(1).astype(jnp.int32), nll, jnp.zeros(tokens.shape[0], nll.dtype))
