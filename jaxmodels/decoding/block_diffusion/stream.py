"""The driver of block-diffusion decoding: requests laid out in blocks, rows of a batch started and advanced.

`BlockStream` owns the device state of a fixed number of rows. Each row runs a `Plan`, its request cut into
blocks; rows may be started at any time while others go on. `generate` runs one batch of requests to its end.
"""

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.cache import KVCache, KVCodes
from jaxmodels.decoding.block_diffusion.generation import (
    Block,
    BlockDecoding,
    BlockSteps,
    DecodeState,
    Guess,
    Output,
    RevealOptions,
    RowOptions,
    new_block,
    unfinished,
)
from jaxmodels.decoding.sampling import SamplingOptions

MIN_PREFILL = 16
"""Shortest padded prompt; prompts are padded to powers of two times this, so few lengths are compiled."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """One request cut into blocks.

    prefix: leading prompt tokens that go to the cache at once, int32 [p].
    tokens, masked, hole: the rest of the prompt and the positions to decode, [blocks, n]; a hole is masked
        and has prompt after it.
    skip: leading tokens of the first block that the request already knows.
    total: tokens the request gives out at most: new ones, and from the first hole on also those of the
        prompt.
    """

    prefix: np.ndarray
    tokens: np.ndarray
    masked: np.ndarray
    hole: np.ndarray
    skip: int
    total: int

    @property
    def blocks(self) -> int:
        return len(self.tokens)

    @property
    def slots(self) -> int:
        """Cache slots that the request takes; its last block is never written."""
        return len(self.prefix) + (self.blocks - 1) * self.tokens.shape[1]


def plan_request(
    prompt: Sequence[int] | np.ndarray,
    max_new_tokens: int,
    decoding: BlockDecoding,
    *,
    align_blocks: bool = False,
) -> Plan:
    """Lays a prompt and `max_new_tokens` out in blocks; the last block is filled up and cut afterwards.

    Blocks start where the prompt ends, as in the released code. With `align_blocks` they start at multiples
    of the
    block length, as in training: the first block then begins with the last tokens of the prompt. With
    `decoding.infill` the prompt may contain mask tokens: everything from the first of them on is laid out in
    blocks and read with its surroundings inside the block.
    """
    prompt = np.asarray(prompt, np.int32).reshape(-1)
    n = decoding.block_length
    holes = prompt == decoding.mask_id
    if holes.any() and not decoding.infill:
        where = int(np.argmax(holes))
        raise ValueError(
            f"the prompt contains the mask token {decoding.mask_id} at position {where}; set infill=True to have it "
            "filled in"
        )
    if max_new_tokens < (0 if holes.any() else 1):
        raise ValueError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
    known = int(np.argmax(holes)) if holes.any() else len(prompt)  # tokens before the first one to decode
    prefix = known - known % n if align_blocks else known
    total = len(prompt) - known + max_new_tokens
    blocks = -(-(len(prompt) - prefix + max_new_tokens) // n)
    rest = np.full(blocks * n, decoding.mask_id, np.int32)
    rest[: len(prompt) - prefix] = prompt[prefix:]
    masked = np.ones(blocks * n, bool)
    masked[: len(prompt) - prefix] = holes[prefix:]
    hole = masked & (np.arange(blocks * n) < len(prompt) - prefix)
    if decoding.token_shift and prefix == 0 and masked[0]:
        raise ValueError(
            "prompt must have at least one token (for instance BOS) for a model with token shift; got none"
        )
    shape = (blocks, n)
    return Plan(
        prompt[:prefix],
        rest.reshape(shape),
        masked.reshape(shape),
        hole.reshape(shape),
        known - prefix,
        total,
    )


def prefill_length(longest: int, capacity: int) -> int:
    """Padded length of a prefill: a power of two times MIN_PREFILL, at most the capacity."""
    padded = MIN_PREFILL
    while padded < longest:
        padded *= 2
    return max(longest, min(padded, capacity))


class Programs:
    """The jitted programs of a model under static settings; state is donated. `traces` counts their
    compilations."""

    def __init__(self, lm: Any, decoding: BlockDecoding):
        steps = BlockSteps(lm, decoding)
        self.steps = steps
        self.traces: collections.Counter[str] = collections.Counter()

        def stop(state, active):
            return state.replace(remaining=jnp.where(active, state.remaining, 0))

        def block(params, state, active, block, options):
            return steps.run_block(params, stop(state, active), block, options)

        def fused(params, state, active, block, guess, options, following):
            return steps.run_fused_block(params, stop(state, active), block, guess, options, following)

        def first_guess(params, state, block, options, fresh, old):
            new = steps.guess(params, state, block, options)
            return jax.tree.map(lambda a, b: jnp.where(fresh[:, None], a, b), new, old)

        def denoise(params, state, block, options):
            block = steps.denoise(params, state, block, options)
            return block, jnp.any(unfinished(block, options, state.remaining))

        self.stop = self._jit("stop", stop, donate=(0,))
        self.prefill = self._jit("prefill", steps.prefill, donate=(1,))
        self.first_guess = self._jit("first_guess", first_guess)
        self.block = self._jit("block", block, donate=(1,))
        self.fused = self._jit("fused", fused, donate=(1,))
        self.denoise = self._jit("denoise", denoise)
        self.commit = self._jit("commit", steps.commit, donate=(1,))

    def _jit(self, name: str, function: Callable, donate: tuple[int, ...] = ()) -> Callable:
        @functools.wraps(function)
        def traced(*args):
            self.traces[name] += 1
            return function(*args)

        return jax.jit(traced, donate_argnums=donate)


@functools.lru_cache(maxsize=16)
def programs(lm: Any, decoding: BlockDecoding) -> Programs:
    """Shared by all streams of equal model and settings, so that a second stream compiles nothing."""
    return Programs(lm, decoding)


class BlockStream:
    """Rows of one batch, decoded block by block. Calls only dispatch; the host reads a result when it wants
    it.

    Args:
        lm: model.
        params: its weights (stacked or from `lm.unstack`, which decodes faster on CPUs).
        decoding: static settings.
        batch: rows.
        capacity: tokens of prompt and committed blocks that fit in a row.
        fused: commit a block in the same pass that starts the next one; same tokens, one pass less per block.
        prefill_rows: most rows that one `start` takes; prefills are padded to that many.
        eos_slots: most end tokens a row may have.
        kv_codes: keep keys and values in eight bits; None: in the dtype of the weights.
    """

    def __init__(
        self,
        lm: Any,
        params: Any,
        decoding: BlockDecoding,
        *,
        batch: int,
        capacity: int,
        fused: bool = True,
        prefill_rows: int | None = None,
        eos_slots: int = 8,
        kv_codes: KVCodes | None = None,
    ):
        vocab = lm.config.vocab_size
        if not 0 <= decoding.mask_id < vocab:
            raise ValueError(f"mask_id must lie in [0, {vocab}); got {decoding.mask_id}")
        self.params, self.decoding, self.fused = params, decoding, fused
        self.batch, self.capacity, self.eos_slots = batch, capacity, eos_slots
        self.prefill_rows = batch if prefill_rows is None else min(prefill_rows, batch)
        dtype = params["embed"].dtype
        cache = KVCache.init(lm.config, batch=batch, capacity=capacity, dtype=dtype, codes=kv_codes)
        # Arrays that are not committed to the weights' device would make the first call compile a program of its own.
        self._state = jax.device_put(DecodeState.init(lm, decoding, cache, dtype), self._placement)
        self._plans: list[Plan | None] = [None] * batch
        self._cursor = [0] * batch
        idle: tuple[RevealOptions, int, tuple[int, ...], SamplingOptions] = (RevealOptions(), 1, (), SamplingOptions())
        self._requests = [idle] * batch
        self._options: RowOptions | None = None
        self._guess: Guess | None = None
        self._programs = programs(lm, decoding)

    @property
    def traces(self) -> collections.Counter[str]:
        """How often each program of this model and these settings was traced, over all streams that share
        them.

        A stream traces its block once: "fused" or "block".
        """
        return self._programs.traces

    @property
    def _placement(self) -> jax.sharding.Sharding:
        """On the device of the weights; on all of theirs if they are many."""
        sharding = self.params["embed"].sharding
        if isinstance(sharding, jax.sharding.NamedSharding):
            return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
        return sharding

    # -- host ------

    def check(self, plan: Plan) -> None:
        """Raises ValueError when a plan does not fit the cache."""
        if len(plan.prefix) > self.capacity:
            raise ValueError(f"the prompt has {len(plan.prefix)} tokens; the cache holds {self.capacity}")
        if plan.slots > self.capacity:
            raise ValueError(
                f"prompt and new tokens need {plan.slots} cache slots ({len(plan.prefix)} for the prompt); the cache "
                f"holds {self.capacity}"
            )

    def start(
        self,
        rows: Sequence[int],
        plans: Sequence[Plan],
        reveal: Sequence[RevealOptions],
        eos_ids: Sequence[tuple[int, ...]],
        sampling: Sequence[SamplingOptions],
    ) -> None:
        """Begins requests in `rows`; what ran there is forgotten."""
        if not len(rows) == len(plans) == len(reveal) == len(eos_ids) == len(sampling) <= self.prefill_rows:
            raise ValueError(
                f"start takes one entry per row for at most {self.prefill_rows} rows; got {len(rows)} rows"
            )
        for plan in plans:
            self.check(plan)
        for row, plan, own, eos, draws in zip(rows, plans, reveal, eos_ids, sampling, strict=True):
            self._plans[row], self._cursor[row] = plan, 0
            self._requests[row] = (own, own.steps_per_block(plan.blocks, self.decoding.block_length), eos, draws)
        columns = [list(column) for column in zip(*self._requests, strict=True)]
        self._options = RowOptions.stack(*columns, eos_slots=self.eos_slots)

        filler = self.prefill_rows - len(rows)
        longest = max(len(plan.prefix) for plan in plans)
        tokens = np.zeros((self.prefill_rows, prefill_length(longest, self.capacity)), np.int32)
        lengths = np.zeros(self.prefill_rows, np.int32)
        for i, plan in enumerate(plans):
            lengths[i] = len(plan.prefix)
            tokens[i, : lengths[i]] = plan.prefix
        remaining = [plan.total for plan in plans] + [0] * filler
        self._state = self._programs.prefill(
            self.params, self._state, tokens, lengths,
            np.asarray([*rows] + [self.batch] * filler, np.int32), np.asarray(remaining, np.int32),
        )  # fmt: skip
        if self.fused:
            fresh = np.isin(np.arange(self.batch), rows)
            if self._guess is None:
                shape = (self.batch, self.decoding.block_length)
                guess = Guess(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32))
                self._guess = jax.device_put(guess, self._placement)
            self._guess = self._programs.first_guess(
                self.params, self._state, self._blocks(), self._options, fresh, self._guess
            )

    def _blocks(self, ahead: int = 0) -> Block:
        """The current block of every row, or one further ahead; rows without one get given zeros."""
        n = self.decoding.block_length
        tokens = np.zeros((self.batch, n), np.int32)
        masked, hole = np.zeros((self.batch, n), bool), np.zeros((self.batch, n), bool)
        skip = np.zeros(self.batch, np.int32)
        for row, plan in enumerate(self._plans):
            number = self._cursor[row] + ahead
            if plan is not None and number < plan.blocks:
                tokens[row], masked[row], hole[row] = (
                    plan.tokens[number],
                    plan.masked[number],
                    plan.hole[number],
                )
                skip[row] = plan.skip if number == 0 else 0
        return _device_block(tokens, masked, hole, skip, mask_id=self.decoding.mask_id)

    def _next(self) -> None:
        self._cursor = [cursor + 1 for cursor in self._cursor]

    @property
    def has_blocks(self) -> bool:
        """Whether any row has a block left that was not yet advanced (it may have ended all the same)."""
        return any(plan is not None and at < plan.blocks for plan, at in zip(self._plans, self._cursor, strict=True))

    def advance(self, active: np.ndarray | None = None) -> Output:
        """Decodes and commits the current block of every row; rows outside `active` are stopped first."""
        if self._options is None:
            raise RuntimeError("advance() before start(): no row is running")
        active = np.ones(self.batch, bool) if active is None else np.asarray(active, bool)
        if self.fused:
            self._state, output, self._guess = self._programs.fused(
                self.params, self._state, active, self._blocks(), self._guess, self._options, self._blocks(1)
            )
        else:
            self._state, output = self._programs.block(self.params, self._state, active, self._blocks(), self._options)
        self._next()
        return output

    def advance_live(self, active: np.ndarray | None = None) -> Iterator[Block | Output]:
        """Like `advance`, one denoising pass per item: the block after each of them, then what it gives out.

        The host looks at every pass, so this is for watching, not for speed. The stream must not be fused.
        """
        if self.fused:
            raise ValueError("live decoding needs a stream with fused=False")
        if self._options is None:
            raise RuntimeError("advance_live() before start(): no row is running")
        if active is not None:
            self._state = self._programs.stop(self._state, np.asarray(active, bool))
        block, options = self._blocks(), self._options
        running = bool(jnp.any(unfinished(block, options, self._state.remaining)))
        while running:
            block, more = self._programs.denoise(self.params, self._state, block, options)
            yield block
            running = bool(more)
        self._state, output = self._programs.commit(self.params, self._state, block, options)
        self._next()
        yield output


@functools.partial(jax.jit, static_argnames="mask_id")
def _device_block(tokens, masked, hole, skip, *, mask_id: int) -> Block:
    return new_block(tokens, masked, mask_id=mask_id, hole=hole, skip=skip)


@dataclasses.dataclass
class Generated:
    """The result of one request.

    tokens: new tokens, an end token included; with infill everything from the first hole on.
    reveal: denoising step within its block at which each token was fixed, -1 for tokens of the prompt.
    confidence, logprob: of each token at that step.
    ids: the whole sequence, prompt included.
    denoise_steps, commits: passes over its blocks that revealed tokens; that only committed.
    forced: tokens that were revealed because the steps were used up, not because their rule chose them.
    """

    tokens: list[int]
    reveal: list[int]
    confidence: list[float]
    logprob: list[float]
    ids: list[int]
    denoise_steps: int = 0
    commits: int = 0
    forced: int = 0

    @property
    def tpf_denoise(self) -> float:
        """Tokens per denoising pass (what papers call tokens per forward)."""
        return len(self.tokens) / self.denoise_steps if self.denoise_steps else float("nan")

    @property
    def tpf_total(self) -> float:
        """Tokens per pass, commits included."""
        passes = self.denoise_steps + self.commits
        return len(self.tokens) / passes if passes else float("nan")


@dataclasses.dataclass
class Stats:
    """Totals of a `generate` call over its rows; `seconds` is wall time, compilation included."""

    denoise_steps: int
    commits: int
    tokens: int
    seconds: float

    @property
    def tpf_denoise(self) -> float:
        return self.tokens / self.denoise_steps if self.denoise_steps else float("nan")

    @property
    def tpf_total(self) -> float:
        passes = self.denoise_steps + self.commits
        return self.tokens / passes if passes else float("nan")


def generate(
    lm: Any,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    decoding: BlockDecoding | None = None,
    reveal: RevealOptions | Sequence[RevealOptions] = RevealOptions(),  # noqa: B008 (frozen)
    sampling: SamplingOptions | Sequence[SamplingOptions] = SamplingOptions(),  # noqa: B008 (frozen)
    eos_ids: Sequence[int] | None = None,
    align_blocks: bool = False,
    fused: bool = True,
    live: bool = False,
    strict: bool = False,
    capacity: int | None = None,
    on_block: Callable[[Output], None] | None = None,
    on_step: Callable[[Block], None] | None = None,
    stream: BlockStream | None = None,
) -> tuple[list[Generated], Stats]:
    """Runs a batch of requests to its end.

    Args:
        lm: model.
        params: its weights.
        prompts: token ids, of any lengths, also empty.
        max_new_tokens: one for all, or one per prompt.
        reveal: one for all, or one per prompt.
        sampling: one for all, or one per prompt.
        decoding: static settings; None: those of the model's configuration.
        eos_ids: end tokens; None: the configuration's; () never ends early.
        align_blocks: see `plan_request`.
        fused: see `BlockStream`.
        live: one denoising pass per call, each followed by `on_step(block)`; slower.
        strict: raise when a row's `steps` do not suffice for its rule, instead of revealing the rest at once.
        capacity: cache slots per row; None: as many as these requests need, in multiples of 64.
        on_block: called with the output of each block (device arrays).
        on_step: called with the block after each pass of the live mode.
        stream: a stream of the same model and settings to run in, to compile nothing again.
    """
    if len(prompts) == 0:
        raise ValueError("prompts must not be empty; got none")
    rows = len(prompts)
    if stream is not None and decoding is None:
        decoding = stream.decoding
    decoding = BlockDecoding.for_model(lm.config) if decoding is None else decoding
    if stream is not None and stream.decoding != decoding:
        raise ValueError(f"stream decodes with {stream.decoding}; got decoding={decoding}")

    def per_row(value: Any, name: str) -> list:
        values = list(value) if isinstance(value, list | tuple) else [value] * rows
        if len(values) != rows:
            raise ValueError(f"{name} must have one entry per prompt ({rows}); got {len(values)}")
        return values

    if on_step is not None and not live:
        raise ValueError("on_step is called in live mode only; set live=True")
    eos = tuple(lm.config.eos_ids if eos_ids is None else eos_ids)
    plans = [
        plan_request(prompt, new, decoding, align_blocks=align_blocks)
        for prompt, new in zip(prompts, per_row(max_new_tokens, "max_new_tokens"), strict=True)
    ]
    if stream is None:
        needed = -(-max([1, *(plan.slots for plan in plans)]) // 64) * 64  # few shapes, few compilations
        stream = BlockStream(
            lm, params, decoding, batch=rows, capacity=needed if capacity is None else capacity,
            fused=fused and not live, eos_slots=max(8, len(eos)),
        )  # fmt: skip
    if stream.batch != rows:
        raise ValueError(f"stream has {stream.batch} rows; got {rows} prompts")
    if live and stream.fused:
        raise ValueError("live decoding needs a stream with fused=False")
    begun = time.perf_counter()
    reveals, samplings = per_row(reveal, "reveal"), per_row(sampling, "sampling")
    stream.start(range(rows), plans, reveals, [eos] * rows, samplings)
    results = [
        Generated([], [], [], [], [int(t) for t in prompt[: len(plan.prefix) + plan.skip]])
        for prompt, plan in zip(prompts, plans, strict=True)
    ]

    def next_output() -> Output:
        if not live:
            return stream.advance()
        output = None
        for item in stream.advance_live():
            if not isinstance(item, Block):
                output = item
            elif on_step is not None:
                on_step(item)
        assert output is not None  # the last item
        return output

    done = np.zeros(rows, bool)
    output = None
    while not done.all():
        current = next_output() if output is None else output
        # The next block is dispatched before this one is read, unless it is to be watched: rows end by themselves.
        output = next_output() if not live and stream.has_blocks else None
        if on_block is not None:
            on_block(current)
        host = jax.device_get(current)
        done = host.done
        if strict and host.forced.any():
            row = int(np.argmax(host.forced > 0))
            raise ValueError(
                f"steps: row {row} had {int(host.forced[row])} masked tokens left after the "
                f"{int(host.steps[row])} steps of a block (steps={reveals[row].steps})"
            )
        for row, result in enumerate(results):
            count = int(host.counts[row])
            result.tokens += host.tokens[row, :count].tolist()
            result.reveal += host.reveal[row, :count].tolist()
            result.confidence += host.confidence[row, :count].tolist()
            result.logprob += host.logprob[row, :count].tolist()
            result.denoise_steps += int(host.steps[row])
            result.commits += int(host.commits[row])
            result.forced += int(host.forced[row])
    for result in results:
        result.ids += result.tokens
    return results, Stats(
        denoise_steps=sum(r.denoise_steps for r in results),
        commits=sum(r.commits for r in results),
        tokens=sum(len(r.tokens) for r in results),
        seconds=time.perf_counter() - begun,
    )
