"""Autoregressive decoding as pure functions over one state: prefill some rows, or step all of them.

    state = init_state(cache, vocab_size)
    state, first = prefill(params, state, prompt)    # prompt: right-padded rows; any subset of the batch
    state, sampled = step(params, state)             # one token for every row that is not done
    state, chunk = steps(params, state, active)      # up to n tokens without returning to the host

Jit them with the state donated (`donate_argnums=1`): the cache is then written in place. Shapes never change
after that, so `prefill` compiles once per padded prompt length and `step` once. Every per-request value
(sampling options, EOS ids, token budget) is an array in the state.

A prompt may also be read in pieces, through the cache: `extend` for all but the last, then a `prefill` made with
`resume=True`. Its memory is that of one piece, and no more lengths than pieces have are compiled.

A row's cache holds all its tokens but the last: a sampled token is written by the step that reads it. So a
prompt of P tokens and n new ones take P + n - 1 slots of a `KVCache`; a `SinkRingCache` never fills up.
"""

from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from jaxmodels.cache import CacheRows, KVCache, SinkRingCache
from jaxmodels.decoding.sampling import (
    IN_OUTPUT,
    IN_PROMPT,
    Sampling,
    SamplingOptions,
    Top,
    mark_seen,
    most_probable,
    sample,
)
from jaxmodels.sparse_attention import SkipAttention


class ARState(flax.struct.PyTreeNode):
    """All that decoding carries from step to step; every leaf but the cache's has the row axis first."""

    cache: KVCache | SinkRingCache  # the tokens before `token`
    token: Int[Array, "B"]  # each row's last token, not in the cache yet
    done: Bool[Array, "B"]  # rows that finished or were never started: they do nothing
    remaining: Int[Array, "B"]  # tokens the row may still produce
    eos: Int[Array, "B E"]  # ids that end the row, filled up with -1
    sampling: Sampling
    seen: UInt8[Array, "B V"]  # which tokens occurred: bits IN_PROMPT, IN_OUTPUT of `sampling`


class Prompt(flax.struct.PyTreeNode):
    """P prompts and where they go. A row index outside the batch marks filler: nothing is written for it."""

    tokens: Int[Array, "P T"]  # right-padded with any id
    lengths: Int[Array, "P"]  # 1 <= length <= T
    rows: Int[Array, "P"]
    remaining: Int[Array, "P"]  # tokens to produce, >= 1
    eos: Int[Array, "P E"]
    sampling: Sampling
    first: Bool[Array, "P"] | None = None  # with resume: rows that begin here, not continued from a piece


class Piece(flax.struct.PyTreeNode):
    """A piece of P prompts, not their last one. A row index outside the batch marks filler."""

    tokens: Int[Array, "P T"]  # right-padded with any id
    lengths: Int[Array, "P"]  # 1 <= length <= T
    rows: Int[Array, "P"]
    first: Bool[Array, "P"]  # whether the row begins with this piece


class Sampled(flax.struct.PyTreeNode):
    """Tokens of a prefill or step; `valid` is False where the row was done before."""

    token: Int[Array, "B"]
    logprob: Float[Array, "B"]
    valid: Bool[Array, "B"]
    top: Top | None = None  # [B, k], if asked for


class SampledChunk(flax.struct.PyTreeNode):
    """Tokens of up to n steps; row i has `counts[i]` of them, then zeros."""

    tokens: Int[Array, "B n"]
    logprobs: Float[Array, "B n"]
    counts: Int[Array, "B"]
    top: Top | None = None  # [B, n, k], if asked for


def init_state(cache: KVCache | SinkRingCache, vocab_size: int, max_eos: int = 8) -> ARState:
    """A state with an empty cache and no running row; `max_eos` is the most EOS ids a row may have."""
    B = cache.lengths.shape[0]
    return ARState(
        cache=cache,
        token=jnp.zeros(B, jnp.int32),
        done=jnp.ones(B, bool),
        remaining=jnp.zeros(B, jnp.int32),
        eos=jnp.full((B, max_eos), -1, jnp.int32),
        sampling=Sampling.stack([SamplingOptions()] * B),
        seen=jnp.zeros((B, vocab_size), jnp.uint8),
    )


def _is_eos(token: Int[Array, "B"], eos: Int[Array, "B E"]) -> Bool[Array, "B"]:
    return jnp.any(token[:, None] == eos, axis=-1)


def _read(
    lm: Any, params: Any, state: ARState, piece: Piece | Prompt
) -> tuple[Float[Array, "P T D"], KVCache | SinkRingCache, UInt8[Array, "P V"]]:
    """(hidden states of a piece, the cache with it, marks of its rows with its tokens)."""
    assert piece.first is not None
    cache = state.cache.restart(jnp.where(piece.first, piece.rows, state.done.shape[0]))
    hidden = lm.hidden(params, piece.tokens, cache=CacheRows(cache, piece.rows), lengths=piece.lengths)
    seen = state.seen.at[piece.rows].get(mode="fill", fill_value=0)
    seen = jnp.where(piece.first[:, None], 0, seen).astype(jnp.uint8)
    return hidden.states, cache.append(hidden.kv, piece.lengths, piece.rows), _mark_prompt(seen, piece)


def _mark_prompt(seen: UInt8[Array, "P V"], prompt: Piece | Prompt) -> UInt8[Array, "P V"]:
    real = jnp.arange(prompt.tokens.shape[1]) < prompt.lengths[:, None]
    return mark_seen(seen, prompt.tokens, IN_PROMPT, real)


def make_extend(lm: Any) -> Callable:
    """`extend(params, state, piece) -> state`: reads a piece of some rows' prompts; they must not be stepped yet."""

    def extend(params, state: ARState, piece: Piece) -> ARState:
        _, cache, seen = _read(lm, params, state, piece)
        return state.replace(cache=cache, seen=state.seen.at[piece.rows].set(seen, mode="drop"))

    return extend


def make_prefill(lm: Any, skip: SkipAttention | None = None, *, resume: bool = False, top: int = 0) -> Callable:
    """`prefill(params, state, prompt) -> (state, Sampled [P])`: (re)starts rows and samples their first token.

    The prompts run as one right-padded batch of their own, then their keys and values are written to their
    rows of the cache; the other rows are not touched.

    Args:
      lm: jaxmodels CausalLM.
      skip: read the prompts with skip-softmax attention; each prompt's own length counts. Not with resume: it
        judges prompts that are read in one piece.
      resume: the prompt is the last piece of one that `extend` has begun, where `prompt.first` is False.
      top: number of most probable tokens to report.
    """

    if resume and skip is not None:
        raise NotImplementedError("skip judges prompts that are read in one piece; leave out resume or skip")

    def prefill(params, state: ARState, prompt: Prompt) -> tuple[ARState, Sampled]:
        P = len(prompt.rows)
        if resume:
            states, cache, seen = _read(lm, params, state, prompt)
            position = cache.lengths.at[prompt.rows].get(mode="fill", fill_value=0)
        else:
            hidden = lm.hidden(params, prompt.tokens, lengths=prompt.lengths, return_kv=True, skip=skip)
            states, cache = hidden.states, state.cache.fill(hidden.kv, prompt.lengths, prompt.rows)
            seen = _mark_prompt(jnp.zeros((P, state.seen.shape[1]), jnp.uint8), prompt)
            position = prompt.lengths
        logits = lm.head(params, states[jnp.arange(P), prompt.lengths - 1])
        token, logprob = sample(logits, prompt.sampling, position=position, seen=seen)
        seen = mark_seen(seen, token[:, None], IN_OUTPUT, jnp.ones((P, 1), bool))
        remaining = prompt.remaining - 1

        def put(old, new):
            return old.at[prompt.rows].set(new.astype(old.dtype), mode="drop")

        state = state.replace(
            cache=cache,
            token=put(state.token, token),
            done=put(state.done, _is_eos(token, prompt.eos) | (remaining <= 0)),
            remaining=put(state.remaining, remaining),
            eos=put(state.eos, prompt.eos),
            sampling=jax.tree.map(put, state.sampling, prompt.sampling),
            seen=put(state.seen, seen),
        )
        valid = prompt.rows < state.done.shape[0]
        return state, Sampled(token, logprob, valid, most_probable(logits, top) if top else None)

    return prefill


def make_step(lm: Any, skip: SkipAttention | None = None, *, top: int = 0) -> Callable:
    """`step(params, state) -> (state, Sampled [B])`: one forward pass, one token for each row that is not done.

    With `skip` attention leaves out tiles of the cache. `top` is the number of most probable tokens to report.
    """

    def step(params, state: ARState) -> tuple[ARState, Sampled]:
        live = ~state.done
        hidden = lm.hidden(params, state.token[:, None], cache=state.cache, skip=skip)
        cache = state.cache.append(hidden.kv, live.astype(jnp.int32))
        # What a row that is done asked for must not cost its neighbours the work of drawing and filtering.
        greedy = Sampling.stack([SamplingOptions()] * live.shape[0])
        logits = lm.head(params, hidden.states[:, 0])
        token, logprob = sample(
            logits,
            jax.tree.map(lambda own, idle: jnp.where(live, own, idle), state.sampling, greedy),
            position=cache.next_positions(1)[:, 0],
            seen=state.seen,
        )
        remaining = state.remaining - live
        finished = _is_eos(token, state.eos) | (remaining <= 0)
        state = state.replace(
            cache=cache,
            token=jnp.where(live, token, state.token),
            done=state.done | finished,
            remaining=remaining,
            seen=mark_seen(state.seen, token[:, None], IN_OUTPUT, live[:, None]),
        )
        return state, Sampled(token, logprob, live, most_probable(logits, top) if top else None)

    return step


def as_chunk(sampled: Sampled) -> SampledChunk:
    """The tokens of one prefill or step as a chunk of one."""
    top = jax.tree.map(lambda x: x[:, None], sampled.top)
    counts = sampled.valid.astype(jnp.int32)
    return SampledChunk(sampled.token[:, None], sampled.logprob[:, None], counts, top)


def make_steps(step: Callable, n: int, *, top: int = 0) -> Callable:
    """`steps(params, state, active) -> (state, SampledChunk [B, n])`: n steps in one program, fewer if all rows end.

    Rows where bool [B] `active` is False are ended and forgotten first (a stop string was found, the user left).
    `top` is that of `step`.
    """
    if n < 1:
        raise ValueError(f"n must be >= 1; got {n}")

    def steps(params, state: ARState, active: Bool[Array, "B"]) -> tuple[ARState, SampledChunk]:
        # An idle row's old tokens are forgotten, so that attention, whose work follows the longest row, skips them.
        lengths = jnp.where(active, state.cache.lengths, 0)
        state = state.replace(done=state.done | ~active, cache=state.cache.replace(lengths=lengths))
        B = active.shape[0]
        if n == 1:
            state, sampled = step(params, state)
            return state, as_chunk(sampled)
        tops = Top(jnp.zeros((B, n, top), jnp.int32), jnp.zeros((B, n, top))) if top else None
        chunk = SampledChunk(jnp.zeros((B, n), jnp.int32), jnp.zeros((B, n)), jnp.zeros(B, jnp.int32), tops)

        def more(carry):
            i, state, _ = carry
            return (i < n) & ~jnp.all(state.done)

        def once(carry):
            i, state, chunk = carry
            state, sampled = step(params, state)
            new = as_chunk(sampled)
            chunk = jax.tree.map(
                lambda old, one: old.at[:, i].set(one[:, 0]) if old.ndim > 1 else old + one, chunk, new
            )
            return i + 1, state, chunk

        _, state, chunk = jax.lax.while_loop(more, once, (jnp.int32(0), state, chunk))
        return state, chunk

    return steps
