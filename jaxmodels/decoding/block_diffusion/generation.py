"""Decoding in blocks: all tokens of a block start masked and are revealed in a few parallel passes.

A pass over a block reads the cache and writes nothing (denoise). Once a row's block is finished, one more
pass over its clean tokens gives the keys and values that are appended (commit): those of a denoising pass saw
mask tokens and are never kept. Everything here is pure and has fixed shapes; what a user may change from
request to request (threshold, steps, factor, budget, lookahead, temperature, filters, seed, end tokens, number of
tokens) is a traced array with one entry per row, so a stream compiles its block once, and a row's result is a
function of that row alone.

Letters: B rows, n = block length, V vocabulary, D model dim, E end tokens.

Source: Efficient-DLM (arXiv 2512.14067), section on generation; threshold and factor rules: Fast-dLLM
(arXiv 2505.22618); margin and entropy confidences: Dream (arXiv 2508.15487).
"""

import dataclasses
import logging
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmodels.decoding.block_diffusion.bound import require_mask_id, suppressed_ids
from jaxmodels.decoding.block_diffusion.corruption import check_block_size
from jaxmodels.decoding.sampling import Sampling, filter_limit
from pallas_kernels.masks import BlockCausal, Causal, Full, Mask

logger = logging.getLogger("jaxstream")

CONFIDENCES = ("prob", "top_p_margin", "neg_entropy", "random")
EVERYTHING = 2**30  # more tokens than any block has
PROMPT_ATTENTIONS = ("bidirectional", "block_causal", "causal")


@dataclasses.dataclass(frozen=True)
class BlockDecoding:
    """What is static about a stream; hashable. `for_model` fills it from a model's configuration."""

    block_length: int
    """tokens that are decoded together; need not be the training block"""
    mask_id: int
    suppress: tuple[int, ...] = ()
    """ids that are never produced: -inf before argmax, noise and confidence"""
    token_shift: bool = False
    """the state before a position predicts it (models that kept the autoregressive alignment)"""
    confidence: str = "prob"
    """"prob": probability of the chosen token at temperature 1. "top_p_margin": difference of the two largest
    probabilities, scaled to [0, 1] over the row's masked positions. "neg_entropy": exp(-entropy in nats),
    which orders like the negative entropy and lies in (0, 1]. "random": uniform noise"""
    suppress_confidence: bool = True
    """whether probabilities are over admissible tokens; False reproduces the released code, whose confidence
    counts the mask token in"""
    prompt_attention: str = "block_causal"
    """how the prompt sees itself: one of PROMPT_ATTENTIONS"""
    prompt_block_size: int = 1
    """block of "block_causal" prompts: the training block"""
    commit_attention: str = "block"
    """how a finished block sees itself when committed: "block", all of it, or "causal" for models whose clean half was
    causal in training"""
    infill: bool = False
    """prompts may contain mask tokens, to be filled in"""

    def __post_init__(self):
        check_block_size(self.block_length)
        check_block_size(self.prompt_block_size)
        if self.confidence not in CONFIDENCES:
            raise ValueError(f"confidence must be one of {list(CONFIDENCES)}; got {self.confidence!r}")
        if self.commit_attention not in ("block", "causal"):
            raise ValueError(f"commit_attention must be 'block' or 'causal'; got {self.commit_attention!r}")
        if self.prompt_attention not in PROMPT_ATTENTIONS:
            raise ValueError(
                f"prompt_attention must be one of {list(PROMPT_ATTENTIONS)}; got {self.prompt_attention!r}"
            )

    @classmethod
    def for_model(
        cls,
        config: Any,
        *,
        block_length: int | None = None,
        prompt_attention: str | None = None,
        **changes: Any,
    ) -> "BlockDecoding":
        """Settings of a model's configuration: mask id, shift, prompt attention, training block.

        block_length None takes the training block (32 if the configuration has none).
        """
        train_block = config.block_size
        if block_length is None:
            block_length = train_block or 32
        check_block_size(block_length)
        if train_block is not None and train_block < 16 and block_length > 2 * train_block:
            logger.warning(
                "block_length %d is more than twice the training block of %d tokens: models trained on small blocks "
                "decode larger ones badly", block_length, train_block,
            )  # fmt: skip
        fields = {
            "block_length": block_length,
            "mask_id": require_mask_id(config),
            "suppress": suppressed_ids(config),
            "token_shift": config.token_shift,
            "prompt_attention": prompt_attention or config.prompt_attention,
            "prompt_block_size": train_block or block_length,
            "commit_attention": "causal" if config.prompt_attention == "causal" else "block",
        }
        return cls(**(fields | changes))

    @property
    def commit_mask(self) -> Mask:
        return Full() if self.commit_attention == "block" else Causal()

    @property
    def fused_mask(self) -> Mask:
        """Over [finished block ; following block]."""
        n = self.block_length
        return BlockCausal(n) if self.commit_attention == "block" else CausalThenFull(n)

    @property
    def prompt_mask(self) -> Mask:
        if self.prompt_attention == "causal":
            return Causal()
        return Full() if self.prompt_attention == "bidirectional" else BlockCausal(self.prompt_block_size)


@dataclasses.dataclass(frozen=True)
class CausalThenFull(Mask):
    """The first `length` tokens are causal, all later ones see everything: [finished block ; block of masks]."""

    length: int

    def allowed(self, q_index, k_index):
        return (k_index <= q_index) | (q_index >= self.length)

    def key_intervals(self, q_index, num_keys):
        return [(np.zeros_like(q_index), np.where(q_index >= self.length, num_keys, q_index + 1))]


@dataclasses.dataclass(frozen=True)
class RevealOptions:
    """How one request reveals its tokens; plain Python values, checked here.

    With none of threshold, factor and budget a block is revealed in equal portions over its steps, most confident
    first; by default one token per step.
    """

    threshold: float | None = None
    """reveal every masked token with at least this confidence, and always the most confident one; 0 decodes a
    block in one step, 1 (nearly) one token per step"""
    factor: float | None = None
    """reveal the n most confident tokens, n the largest with (n + 1) (1 - c_n) < factor, c_n the n-th
    confidence"""
    budget: float | None = None
    """reveal the n most confident tokens, n the largest with (1 - c_1) + ... + (1 - c_n) < budget, and always one: with
    confidences that are probabilities, a bound on the chance that any of the n differs from what its own
    distribution would draw (in the spirit of the entropy-bounded sampler, arXiv 2505.24857)"""
    lookahead: int | None = None
    """with a threshold, factor or budget: reveal only among this many masked tokens, the first of the block. Tokens far
    from what is known depend most on each other, which no confidence of one token tells. None: among all"""
    steps: int | None = None
    """denoising steps for the whole request, spread evenly over its blocks (rounded up); the last step of a
    block reveals all that is left. None: as many as needed"""

    def __post_init__(self):
        if self.threshold is not None and not 0.0 <= self.threshold <= 1.0:
            raise ValueError(f"threshold must lie in [0, 1]; got {self.threshold}")
        for name in ("factor", "budget"):
            if (value := getattr(self, name)) is not None and not value > 0.0:
                raise ValueError(f"{name} must be positive; got {value}")
        given = {n: v for n in ("threshold", "factor", "budget") if (v := getattr(self, n)) is not None}
        if len(given) > 1:
            raise ValueError(f"give one of threshold, factor and budget; got {given}")
        for name in ("lookahead", "steps"):
            if (number := getattr(self, name)) is not None and (isinstance(number, bool) or number < 1):
                raise ValueError(f"{name} must be at least 1; got {number}")
        if self.lookahead is not None and not given:
            raise ValueError(f"lookahead needs a threshold, factor or budget; got lookahead {self.lookahead} alone")

    def steps_per_block(self, blocks: int, block_length: int) -> int:
        """Most denoising steps in each of `blocks` blocks."""
        return block_length if self.steps is None else -(-self.steps // max(blocks, 1))


class RowOptions(flax.struct.PyTreeNode):
    """Traced options, one entry per row."""

    threshold: Float[Array, " B"]  # NaN: no threshold
    factor: Float[Array, " B"]  # NaN: no factor
    budget: Float[Array, " B"]  # NaN: no budget
    lookahead: Int[Array, " B"]  # masked tokens that take part
    steps: Int[Array, " B"]  # most denoising steps per block
    eos: Int[Array, "B E"]  # tokens that end the row; -1 fills up
    sampling: Sampling  # temperature, top_k, top_p, min_p, seed; no penalties

    @classmethod
    def stack(
        cls,
        reveal: list[RevealOptions],
        steps: list[int],
        eos: list[tuple[int, ...]],
        sampling: list[Any],
        *,
        eos_slots: int | None = None,
    ) -> "RowOptions":
        """Rows' plain options as arrays; `steps` per block, `eos_slots` fixes E."""
        for options in sampling:
            for name, off in (("repetition_penalty", 1.0), ("presence_penalty", 0.0)):
                if getattr(options, name) != off:
                    raise ValueError(
                        f"{name} must be {off} (off) for block diffusion, whose tokens are not drawn in order; "
                        f"got {getattr(options, name)}"
                    )
        slots = max([1, *map(len, eos)]) if eos_slots is None else eos_slots
        if any(len(ids) > slots for ids in eos):
            raise ValueError(f"eos_ids must be at most {slots} tokens; got {max(eos, key=len)}")

        def number(values: list[float | None]) -> Array:
            return jnp.asarray([np.nan if value is None else value for value in values], jnp.float32)

        padded = np.full((len(eos), slots), -1, np.int32)
        for row, ids in enumerate(eos):
            padded[row, : len(ids)] = ids
        return cls(
            threshold=number([r.threshold for r in reveal]),
            factor=number([r.factor for r in reveal]),
            budget=number([r.budget for r in reveal]),
            lookahead=jnp.asarray([min(r.lookahead or EVERYTHING, EVERYTHING) for r in reveal], jnp.int32),
            steps=jnp.asarray(steps, jnp.int32),
            eos=jnp.asarray(padded),
            sampling=Sampling.stack(sampling),
        )


class DecodeState(flax.struct.PyTreeNode):
    """What a batch of rows carries from block to block.

    cache: keys and values of prompts and committed blocks.
    context: state of the last token in the cache, which predicts the next one; None without token shift.
    remaining: tokens each row may still give out; 0 = the row is done (or never started).
    """

    cache: Any
    context: Float[Array, "B D"] | None
    remaining: Int[Array, " B"]

    @classmethod
    def init(cls, lm: Any, decoding: BlockDecoding, cache: Any, dtype: Any) -> "DecodeState":
        """No rows started; `cache` is empty. `dtype` is that of the parameters."""
        rows = cache.lengths.shape[0]
        context = jnp.zeros((rows, lm.config.dim), dtype) if decoding.token_shift else None
        return cls(cache, context, jnp.zeros((rows,), jnp.int32))


class Block(flax.struct.PyTreeNode):
    """One block of every row, while it is being decoded.

    tokens: ids; the mask token where `masked`.
    masked: not yet revealed.
    given: known from the start (tail of the prompt, text around a hole).
    hole: masked positions with prompt after them, where no row may end.
    skip: leading given tokens that the row does not give out (the tail of its prompt).
    reveal: denoising step (from 0) at which a token was fixed, -1 while masked and for given tokens.
    confidence: confidence at that step; 1 for given tokens.
    logprob: log-probability of the token at that step; 0 for given tokens.
    step: number of reveals so far.
    steps: denoising passes in which the row took part.
    forced: tokens revealed only because the steps were used up.
    """

    tokens: Int[Array | np.ndarray, "B n"]
    masked: Bool[Array | np.ndarray, "B n"]
    given: Bool[Array | np.ndarray, "B n"]
    hole: Bool[Array | np.ndarray, "B n"]
    skip: Int[Array | np.ndarray, " B"]
    reveal: Int[Array | np.ndarray, "B n"]
    confidence: Float[Array | np.ndarray, "B n"]
    logprob: Float[Array | np.ndarray, "B n"]
    step: Int[Array | np.ndarray, ""]
    steps: Int[Array | np.ndarray, " B"]
    forced: Int[Array | np.ndarray, " B"]


class Guess(flax.struct.PyTreeNode):
    """What a denoising pass proposes for every position of a block."""

    token: Int[Array | np.ndarray, "B n"]
    confidence: Float[Array | np.ndarray, "B n"]  # raw; see `BlockDecoding.confidence`
    logprob: Float[Array | np.ndarray, "B n"]


def new_block(
    tokens: Int[Array, "B n"],
    masked: Bool[Array, "B n"],
    *,
    mask_id: int,
    hole: Bool[Array, "B n"] | None = None,
    skip: Int[Array, " B"] | None = None,
) -> Block:
    """A block whose `masked` positions are to be decoded; the others hold `tokens`. By default nothing is a
    hole and nothing is skipped.
    """
    rows = jnp.zeros(tokens.shape[:1], jnp.int32)
    return Block(
        tokens=jnp.where(masked, mask_id, tokens).astype(jnp.int32),
        masked=masked,
        given=~masked,
        hole=jnp.zeros_like(masked) if hole is None else hole,
        skip=rows if skip is None else skip,
        reveal=jnp.full(tokens.shape, -1, jnp.int32),
        confidence=jnp.where(masked, 0.0, 1.0),
        logprob=jnp.zeros(tokens.shape, jnp.float32),
        step=jnp.zeros((), jnp.int32),
        steps=rows,
        forced=rows,
    )


def ends_at(block: Block, eos: Int[Array, "B E"]) -> Int[Array, " B"]:
    """Index of the first generated end token, n if there is none yet. Those of the prompt do not count."""
    length = block.tokens.shape[1]
    is_end = jnp.any(block.tokens[:, :, None] == eos[:, None, :], axis=-1)
    is_end &= ~block.masked & ~block.given & ~block.hole
    return _first(is_end, length)


def unfinished(block: Block, options: RowOptions, remaining: Int[Array, " B"]) -> Bool[Array, " B"]:
    """Rows that need another denoising pass: a masked position before their first end token, and among the
    `remaining` tokens that they still give out. Rows with none remaining are at rest.
    """
    needed = jnp.minimum(ends_at(block, options.eos), block.skip + remaining)
    return (remaining > 0) & (_first(block.masked, block.tokens.shape[1]) < needed)


def _first(where: Any, otherwise: int) -> Int[Array, " B"]:
    return jnp.where(jnp.any(where, axis=1), jnp.argmax(where, axis=1), otherwise).astype(jnp.int32)


def guess_tokens(
    logits: Float[Array, "B n V"],
    options: RowOptions,
    decoding: BlockDecoding,
    *,
    start: Int[Array, " B"],
    step: Int[Array, ""],
    hole: Bool[Array, "B n"],
) -> Guess:
    """Chosen token, its confidence and its log-probability at every position.

    The noise of a row comes from its seed, the position of its block and the step. Confidence and
    log-probability are those of the chosen token at temperature 1, without noise or filters, in float32; they
    need a maximum and sums over V only, so no array of probabilities outlives a reduction. Ties go to the
    lowest id.
    """
    batch, length, vocab = logits.shape
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
    raw = logits.astype(jnp.float32)
    logits = raw
    for i in decoding.suppress:
        logits = jnp.where(ids == i, -jnp.inf, logits)
    if decoding.infill:
        ends = jnp.any(ids[:, :, :, None] == options.eos[:, None, None, :], axis=-1)
        logits = jnp.where(ends & hole[:, :, None], -jnp.inf, logits)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    sampling = options.sampling

    def keys(salt: int) -> Array:
        def row(seed, start):
            key = jax.random.fold_in(jax.random.key(seed), start)
            return jax.random.fold_in(jax.random.fold_in(key, step), salt)

        return jax.vmap(row)(sampling.seed, start)

    def draw() -> Array:
        temperature = jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)[:, None, None]
        distance = (jnp.max(logits, axis=-1, keepdims=True) - logits) / temperature
        per_position = jax.tree.map(lambda x: jnp.repeat(x, length), sampling)
        limit = filter_limit(distance.reshape(-1, vocab), per_position).reshape(batch, length, 1)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, (length, vocab), jnp.float32))(keys(0))
        return jnp.argmax(jnp.where(distance <= limit, noise - distance, -jnp.inf), axis=-1).astype(jnp.int32)

    draws = sampling.temperature > 0
    drawn = jax.lax.cond(jnp.any(draws), draw, lambda: greedy)
    token = jnp.where(draws[:, None], drawn, greedy)

    measured = logits if decoding.suppress_confidence else raw
    lse = jax.nn.logsumexp(measured, axis=-1)
    logprob = jnp.take_along_axis(measured, token[..., None], axis=-1)[..., 0] - lse
    if decoding.confidence == "prob":
        confidence = jnp.exp(logprob)
    elif decoding.confidence == "top_p_margin":
        best = jnp.argmax(measured, axis=-1)[..., None]
        second = jnp.max(jnp.where(ids == best, -jnp.inf, measured), axis=-1)
        confidence = jnp.exp(jnp.max(measured, axis=-1) - lse) - jnp.exp(second - lse)
    elif decoding.confidence == "neg_entropy":
        p_log_p = jnp.where(measured > -jnp.inf, jnp.exp(measured - lse[..., None]) * (measured - lse[..., None]), 0.0)
        confidence = jnp.exp(jnp.sum(p_log_p, axis=-1))
    else:
        confidence = jax.vmap(lambda key: jax.random.uniform(key, (length,)))(keys(1))
    return Guess(token, confidence, logprob)


def reveal(
    block: Block, guess: Guess, options: RowOptions, decoding: BlockDecoding, remaining: Int[Array, " B"]
) -> Block:
    """One reveal: fixes the most confident masked tokens of each unfinished row by the row's own rule."""
    running = unfinished(block, options, remaining)
    masked = block.masked & running[:, None]
    confidence = guess.confidence
    if decoding.confidence == "top_p_margin":
        low = jnp.min(jnp.where(masked, confidence, jnp.inf), axis=1, keepdims=True)
        high = jnp.max(jnp.where(masked, confidence, -jnp.inf), axis=1, keepdims=True)
        confidence = jnp.where(high > low, (confidence - low) / jnp.where(high > low, high - low, 1.0), 1.0)

    def column(values: Any) -> Array:
        return values[:, None]

    near = masked & (jnp.cumsum(masked, axis=1) <= column(options.lookahead))
    ranked = jnp.where(near, confidence, -jnp.inf)
    order = jnp.argsort(-ranked, axis=1, stable=True)  # ties: earlier positions first
    rank = jnp.argsort(order, axis=1)
    initial = jnp.sum(~block.given, axis=1)
    portion = initial // options.steps + (block.step < initial % options.steps)
    by_count = rank < column(portion)
    by_threshold = near & ((confidence >= column(options.threshold)) | (rank == 0))
    descending = jnp.take_along_axis(ranked, order, axis=1)
    number = jnp.arange(1, rank.shape[1] + 1)
    takes_part = jnp.isfinite(descending)
    doubt = jnp.cumsum(jnp.where(takes_part, 1.0 - descending, 0.0), axis=1)

    def most(good: Array) -> Array:
        """The first ranks up to the last good one, and at least one."""
        return rank < column(jnp.maximum(jnp.max(jnp.where(good & takes_part, number, 0), axis=1), 1))

    rules = (
        (options.threshold, by_threshold),
        (options.factor, most((number + 1) * (1.0 - descending) < column(options.factor))),
        (options.budget, most(doubt < column(options.budget))),
    )
    chosen = by_count
    for value, by_rule in rules:
        chosen = jnp.where(column(~jnp.isnan(value)), by_rule, chosen)
    last = column(block.step >= options.steps - 1)
    now = masked & (chosen | last)
    return block.replace(
        tokens=jnp.where(now, guess.token, block.tokens),
        masked=block.masked & ~now,
        reveal=jnp.where(now, block.step, block.reveal),
        confidence=jnp.where(now, confidence, block.confidence),
        logprob=jnp.where(now, guess.logprob, block.logprob),
        step=block.step + 1,
        steps=block.steps + running,
        forced=block.forced + jnp.sum(now & ~chosen, axis=1),
    )


class Output(flax.struct.PyTreeNode):
    """What a finished block gives out: the first `counts` tokens, an end token included.

    Arrays as in `Block`, moved to the left by its `skip`; `commits` are passes (0 or 1) that did nothing else
    than committing the row; `done` rows give out no more.
    """

    tokens: Int[Array | np.ndarray, "B n"]
    reveal: Int[Array | np.ndarray, "B n"]
    confidence: Float[Array | np.ndarray, "B n"]
    logprob: Float[Array | np.ndarray, "B n"]
    counts: Int[Array | np.ndarray, " B"]
    steps: Int[Array | np.ndarray, " B"]
    forced: Int[Array | np.ndarray, " B"]
    commits: Int[Array | np.ndarray, " B"]
    done: Bool[Array | np.ndarray, " B"]


@dataclasses.dataclass(frozen=True)
class BlockSteps:
    """The pure steps of a stream, to be jitted by its driver (donate `state`)."""

    lm: Any
    decoding: BlockDecoding

    # -- prompt ------

    def prefill(
        self,
        params: Any,
        state: DecodeState,
        tokens: Int[Array, "R P"],
        lengths: Int[Array, " R"],
        rows: Int[Array, " R"],
        remaining: Int[Array, " R"],
    ) -> DecodeState:
        """Starts rows `rows` of the batch afresh with prompts of `lengths` tokens (0 allowed); others keep
        going.

        A row index at or beyond the batch is dropped, so R can be a fixed bucket.
        """
        hidden = self.lm.hidden(params, tokens, mask=self.decoding.prompt_mask, lengths=lengths, return_kv=True)
        cache = state.cache.fill(hidden.kv, lengths, rows)
        context = state.context
        if context is not None:
            last = jnp.maximum(lengths - 1, 0)[:, None, None]
            picked = jnp.take_along_axis(hidden.states, last, axis=1)[:, 0]
            context = context.at[rows].set(picked.astype(context.dtype), mode="drop")
        return DecodeState(cache, context, state.remaining.at[rows].set(remaining, mode="drop"))

    # -- one block ------

    def _logits(self, params: Any, states: Array, context: Array | None) -> Array:
        if context is not None:
            states = jnp.concatenate([context.astype(states.dtype)[:, None], states[:, :-1]], axis=1)
        return self.lm.head(params, states)

    def _guess(self, params, states, context, block, start, options) -> Guess:
        logits = self._logits(params, states, context)
        return guess_tokens(logits, options, self.decoding, start=start, step=block.step, hole=block.hole)

    def guess(self, params: Any, state: DecodeState, block: Block, options: RowOptions) -> Guess:
        """A denoising pass: reads the cache, writes nothing."""
        hidden = self.lm.hidden(params, block.tokens, cache=state.cache, own_mask=Full())
        return self._guess(params, hidden.states, state.context, block, state.cache.lengths, options)

    def denoise(self, params: Any, state: DecodeState, block: Block, options: RowOptions) -> Block:
        """One denoising pass and the reveal after it (the live mode calls this once per pass)."""
        guess = self.guess(params, state, block, options)
        return reveal(block, guess, options, self.decoding, state.remaining)

    def _finish(self, params, state, block, guess, options) -> Block:
        """Denoises until no row is unfinished; the first reveal takes `guess` if there is one."""
        remaining = state.remaining
        if guess is not None:
            block = reveal(block, guess, options, self.decoding, remaining)
        return jax.lax.while_loop(
            lambda block: jnp.any(unfinished(block, options, remaining)),
            lambda block: self.denoise(params, state, block, options),
            block,
        )

    def settle(self, state: DecodeState, block: Block, options: RowOptions) -> tuple[Output, Array]:
        """(what the finished block gives out, remaining tokens afterwards)."""
        length = block.tokens.shape[1]
        active = state.remaining > 0
        end = ends_at(block, options.eos)
        wanted = jnp.minimum(jnp.where(end < length, end + 1, length) - block.skip, state.remaining)
        counts = jnp.where(active, wanted, 0)
        remaining = jnp.where(end < length, 0, state.remaining - counts)
        order = jnp.minimum(block.skip[:, None] + jnp.arange(length), length - 1)
        tokens, steps, confidence, logprob = (
            jnp.take_along_axis(x, order, axis=1) for x in (block.tokens, block.reveal, block.confidence, block.logprob)
        )
        done = remaining <= 0
        output = Output(
            tokens, steps, confidence, logprob, counts, block.steps, block.forced,
            commits=(active & ~done).astype(jnp.int32), done=done,
        )  # fmt: skip
        return output, remaining

    def commit(self, params: Any, state: DecodeState, block: Block, options: RowOptions) -> tuple[DecodeState, Output]:
        """Writes the finished block of every row that goes on; the pass is skipped if none does."""
        output, remaining = self.settle(state, block, options)
        time = block.tokens.shape[1]

        def forward():
            hidden = self.lm.hidden(params, block.tokens, cache=state.cache, own_mask=self.decoding.commit_mask)
            return hidden.kv, hidden.states[:, -1]

        def nothing():
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(forward))

        goes_on = output.commits > 0
        kv, last = jax.lax.cond(jnp.any(goes_on), forward, nothing)
        cache = state.cache.append(kv, jnp.where(goes_on, time, 0))
        return DecodeState(cache, self._new_context(state, last, goes_on), remaining), output

    def _new_context(self, state: DecodeState, last: Array, goes_on: Any) -> Array | None:
        if state.context is None:
            return None
        return jnp.where(goes_on[:, None], last.astype(state.context.dtype), state.context)

    def run_block(
        self, params: Any, state: DecodeState, block: Block, options: RowOptions
    ) -> tuple[DecodeState, Output]:
        """Decodes one block of every row and commits it, without the host."""
        return self.commit(params, state, self._finish(params, state, block, None, options), options)

    # -- commit fused with the first denoising pass of the next block ------

    def run_fused_block(
        self,
        params: Any,
        state: DecodeState,
        block: Block,
        guess: Guess,
        options: RowOptions,
        following: Block,
    ) -> tuple[DecodeState, Output, Guess]:
        """Like `run_block`, from a guess that is there already, and with that of the `following` block.

        One pass over [finished block ; following block] commits the first and denoises the second, which sees
        it: one pass less per block. The tokens are those of `run_block`.
        """
        block = self._finish(params, state, block, guess, options)
        output, remaining = self.settle(state, block, options)
        goes_on = output.commits > 0
        output = output.replace(commits=jnp.zeros_like(output.commits))
        length = block.tokens.shape[1]
        own = jnp.concatenate([block.tokens, following.tokens], axis=1)

        def forward():
            hidden = self.lm.hidden(params, own, cache=state.cache, own_mask=self.decoding.fused_mask)
            committed = jax.tree.map(lambda x: x[:, :, :length], hidden.kv)
            last = hidden.states[:, length - 1]
            context = last if self.decoding.token_shift else None
            start = state.cache.lengths + length
            guess = self._guess(params, hidden.states[:, length:], context, following, start, options)
            return committed, last, (guess.token, guess.confidence, guess.logprob)

        def nothing():
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(forward))

        kv, last, guess = jax.lax.cond(jnp.any(goes_on), forward, nothing)
        cache = state.cache.append(kv, jnp.where(goes_on, length, 0))
        state = DecodeState(cache, self._new_context(state, last, goes_on), remaining)
        return state, output, Guess(*guess)
