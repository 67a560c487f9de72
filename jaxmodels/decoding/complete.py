"""Completions of many prompts in batches of one shape: what judging a model and teaching one from another need.

Offline and plain: prompts in, token ids out. Streaming, stop strings and text live in `infer`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.cache import KVCache
from jaxmodels.decoding.autoregressive import Prompt, init_state, make_prefill, make_step, make_steps
from jaxmodels.decoding.block_diffusion import BlockDecoding, BlockStream, RevealOptions, generate
from jaxmodels.decoding.sampling import Sampling, SamplingOptions

OnBatch = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a model made of one prompt.

    `forwards` counts every pass that gave or committed tokens. A diffusion model's prefill gives none and is left
    out; an AR model's gives its first token and counts.
    """

    tokens: tuple[int, ...]
    forwards: int


def complete_autoregressive(
    lm: Any,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch: int,
    temperature: float = 0.0,
    seed: int = 0,
    on_batch: OnBatch | None = None,
) -> list[Completion]:
    """Completions one token at a time. Prompt i draws with seed `seed + i`, whatever the batch.

    Args:
        lm: model.
        params: its weights.
        prompts: token ids, at least one each.
        max_new_tokens: longest completion; an end token of the configuration ends it earlier.
        batch: rows decoded together.
        temperature: 0 is greedy.
        seed: of the first prompt.
        on_batch: called with the number of finished prompts after each batch.
    """
    longest = max(map(len, prompts))
    # One program for prefill and decoding; the state is made inside, so nothing is carried between batches.
    steps = make_steps(make_step(lm), max_new_tokens - 1) if max_new_tokens > 1 else None

    @jax.jit
    def complete(params, prompt):
        cache = KVCache.init(lm.config, batch=batch, capacity=longest + max_new_tokens, dtype=params["embed"].dtype)
        state, first = make_prefill(lm)(params, init_state(cache, lm.config.vocab_size), prompt)
        if steps is None:
            return first.token[:, None], jnp.ones(batch, jnp.int32)
        _, chunk = steps(params, state, ~state.done)
        return jnp.concatenate([first.token[:, None], chunk.tokens], axis=1), 1 + chunk.counts

    eos = np.full((batch, 8), -1, np.int32)
    eos[:, : len(lm.config.eos_ids)] = lm.config.eos_ids
    done: list[Completion] = []
    for start, real, rows in _batches(prompts, batch):
        tokens = np.zeros((batch, longest), np.int32)
        for i, ids in enumerate(rows):
            tokens[i, : len(ids)] = ids
        prompt = Prompt(
            tokens=jnp.asarray(tokens),
            lengths=jnp.asarray([len(ids) for ids in rows], jnp.int32),
            rows=jnp.arange(batch),
            remaining=jnp.full(batch, max_new_tokens, jnp.int32),
            eos=jnp.asarray(eos),
            sampling=Sampling.stack(_sampling(temperature, seed + start, batch)),
        )
        out, counts = jax.device_get(complete(params, prompt))
        for i in range(real):
            count = int(counts[i])
            done.append(Completion(tuple(out[i, :count].tolist()), count))
        if on_batch is not None:
            on_batch(len(done))
    return done


def complete_blocks(
    lm: Any,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch: int,
    reveal: RevealOptions = RevealOptions(),  # noqa: B008 (frozen)
    block_length: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    on_batch: OnBatch | None = None,
) -> list[Completion]:
    """Completions block by block: `reveal` says when tokens are fixed, by default one per pass, and `block_length` how
    many are decoded together, by default the training block. Other arguments as in `complete_autoregressive`.
    """
    decoding = BlockDecoding.for_model(lm.config, block_length=block_length)
    length = decoding.block_length
    capacity = max(map(len, prompts)) + -(-max_new_tokens // length) * length
    stream = BlockStream(lm, params, decoding, batch=batch, capacity=capacity, fused=True)
    done: list[Completion] = []
    for start, real, rows in _batches(prompts, batch):
        results, _ = generate(
            lm, params, rows, max_new_tokens=max_new_tokens, decoding=decoding, reveal=reveal,
            sampling=_sampling(temperature, seed + start, batch), stream=stream,
        )  # fmt: skip
        done += [Completion(tuple(r.tokens), r.denoise_steps + r.commits) for r in results[:real]]
        if on_batch is not None:
            on_batch(len(done))
    return done


def _batches(prompts: Sequence[Any], batch: int) -> Iterator[tuple[int, int, list[Any]]]:
    """(index of the first, how many are real, `batch` prompts): the last batch is filled up with its first."""
    for start in range(0, len(prompts), batch):
        rows = list(prompts[start : start + batch])
        real = len(rows)
        yield start, real, rows + rows[:1] * (batch - real)


def _sampling(temperature: float, seed: int, rows: int) -> list[SamplingOptions]:
    return [SamplingOptions(temperature=temperature, seed=seed + i) for i in range(rows)]
