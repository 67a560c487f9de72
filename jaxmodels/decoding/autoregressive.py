"""Autoregressive decoding as pure functions over one state: prefill some rows, or step all of them.

    state = init_state(cache, vocab_size)
    state, first = prefill(params, state, prompt)    # prompt: right-padded rows; any subset of the batch
    state, sampled = step(params, state)             # one token for every row that is not done
    state, chunk = steps(params, state, active)      # up to n tokens without returning to the host

Jit them with the state donated (`donate_argnums=1`): the cache is then written in place. Shapes never change
after that, so `prefill` compiles once per padded prompt length and `step` once. Every per-request value
(sampling options, EOS ids, token budget) is an array in the state.

A row's cache holds all its tokens but the last: a sampled token is written by the step that reads it. So a
prompt of P tokens and n new ones take P + n - 1 slots.
"""

from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from jaxmodels.cache import KV, KVCache
from jaxmodels.decoding.sampling import (
    IN_OUTPUT,
    IN_PROMPT,
    Sampling,
    SamplingOptions,
    mark_seen,
    sample,
)
from jaxmodels.sparse_attention import SkipAttention


class ARState(flax.struct.PyTreeNode):
    """All that decoding carries from step to step; every leaf but the cache's has the row axis first."""

    cache: KVCache  # the tokens before `token`
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


class Sampled(flax.struct.PyTreeNode):
    """Tokens of a prefill or step; `valid` is False where the row was done before."""

    token: Int[Array, "B"]
    logprob: Float[Array, "B"]
    valid: Bool[Array, "B"]


class SampledChunk(flax.struct.PyTreeNode):
    """Tokens of up to n steps; row i has `counts[i]` of them, then zeros."""

    tokens: Int[Array, "B n"]
    logprobs: Float[Array, "B n"]
    counts: Int[Array, "B"]


def init_state(cache: KVCache, vocab_size: int, max_eos: int = 8) -> ARState:
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


def fill_rows(cache: KVCache, kv: KV, rows: Int[Array, "P"], lengths: Int[Array, "P"]) -> KVCache:
    """The cache with rows `rows` holding only the first `lengths` of these tokens; rows outside it are dropped."""
    T = kv.k.shape[2]
    if cache.capacity < T:
        raise ValueError(f"a prompt padded to {T} tokens does not fit the cache capacity {cache.capacity}")

    def put(buffer: Array, new: Array) -> Array:  # what stands beyond a row's length is never read
        return buffer.at[:, rows, :T].set(new.astype(buffer.dtype), mode="drop")

    lengths = cache.lengths.at[rows].set(lengths.astype(jnp.int32), mode="drop")
    return cache.replace(k=put(cache.k, kv.k), v=put(cache.v, kv.v), lengths=lengths)


def make_prefill(lm: Any, skip: SkipAttention | None = None) -> Callable:
    """`prefill(params, state, prompt) -> (state, Sampled [P])`: (re)starts rows and samples their first token.

    The prompts run as one right-padded batch of their own, then their keys and values are written to their
    rows of the cache; the other rows are not touched. `lm` is a jaxmodels CausalLM. With `skip` the prompts are read
    with skip-softmax attention; each prompt's own length counts.
    """

    def prefill(params, state: ARState, prompt: Prompt) -> tuple[ARState, Sampled]:
        P, T = prompt.tokens.shape
        hidden = lm.hidden(params, prompt.tokens, lengths=prompt.lengths, return_kv=True, skip=skip)
        last = hidden.states[jnp.arange(P), prompt.lengths - 1]
        real = jnp.arange(T) < prompt.lengths[:, None]
        seen = jnp.zeros((P, state.seen.shape[1]), jnp.uint8)
        seen = mark_seen(seen, prompt.tokens, IN_PROMPT, real)
        token, logprob = sample(lm.head(params, last), prompt.sampling, position=prompt.lengths, seen=seen)
        seen = mark_seen(seen, token[:, None], IN_OUTPUT, jnp.ones((P, 1), bool))
        remaining = prompt.remaining - 1

        def put(old, new):
            return old.at[prompt.rows].set(new.astype(old.dtype), mode="drop")

        state = state.replace(
            cache=fill_rows(state.cache, hidden.kv, prompt.rows, prompt.lengths),
            token=put(state.token, token),
            done=put(state.done, _is_eos(token, prompt.eos) | (remaining <= 0)),
            remaining=put(state.remaining, remaining),
            eos=put(state.eos, prompt.eos),
            sampling=jax.tree.map(put, state.sampling, prompt.sampling),
            seen=put(state.seen, seen),
        )
        return state, Sampled(token=token, logprob=logprob, valid=prompt.rows < state.done.shape[0])

    return prefill


def make_step(lm: Any, skip: SkipAttention | None = None) -> Callable:
    """`step(params, state) -> (state, Sampled [B])`: one forward pass, one token for each row that is not done.

    With `skip` attention leaves out tiles of the cache.
    """

    def step(params, state: ARState) -> tuple[ARState, Sampled]:
        live = ~state.done
        hidden = lm.hidden(params, state.token[:, None], cache=state.cache, skip=skip)
        cache = state.cache.append(hidden.kv, live.astype(jnp.int32))
        # What a row that is done asked for must not cost its neighbours the work of drawing and filtering.
        greedy = Sampling.stack([SamplingOptions()] * live.shape[0])
        token, logprob = sample(
            lm.head(params, hidden.states[:, 0]),
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
        return state, Sampled(token=token, logprob=logprob, valid=live)

    return step


def make_steps(step: Callable, n: int) -> Callable:
    """`steps(params, state, active) -> (state, SampledChunk [B, n])`: n steps in one program, fewer if all rows end.

    Rows where bool [B] `active` is False are ended and forgotten first (a stop string was found, the user left).
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
            return state, SampledChunk(
                tokens=sampled.token[:, None],
                logprobs=sampled.logprob[:, None],
                counts=sampled.valid.astype(jnp.int32),
            )
        chunk = SampledChunk(
            tokens=jnp.zeros((B, n), jnp.int32), logprobs=jnp.zeros((B, n)), counts=jnp.zeros(B, jnp.int32)
        )

        def more(carry):
            i, state, _ = carry
            return (i < n) & ~jnp.all(state.done)

        def once(carry):
            i, state, chunk = carry
            state, sampled = step(params, state)
            chunk = SampledChunk(
                tokens=chunk.tokens.at[:, i].set(sampled.token),
                logprobs=chunk.logprobs.at[:, i].set(sampled.logprob),
                counts=chunk.counts + sampled.valid,
            )
            return i + 1, state, chunk

        _, state, chunk = jax.lax.while_loop(more, once, (jnp.int32(0), state, chunk))
        return state, chunk

    return steps
