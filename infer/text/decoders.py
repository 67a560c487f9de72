"""The decoders behind `TextEngine`: they own a batch of slots on the device and know nothing of text."""

import functools
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from infer.text.events import Chunk, Job
from jaxmodels.cache import KVCache, KVCodes, SinkRingCache
from jaxmodels.decoding.autoregressive import (
    ARState,
    Piece,
    Prompt,
    SampledChunk,
    as_chunk,
    init_state,
    make_extend,
    make_prefill,
    make_step,
    make_steps,
)
from jaxmodels.decoding.sampling import Sampling, SamplingOptions
from jaxmodels.sparse_attention import SkipAttention

log = logging.getLogger("jaxstream")

OnCompile = Callable[[str, float | None], None]


@runtime_checkable
class Decoder(Protocol):
    """What the engine asks of a decoder. Calls only dispatch: the engine fetches a chunk's arrays later."""

    batch: int
    """number of slots"""
    prefill_rows: int
    """most rows that one call of `start` takes"""
    in_flight: int
    """chunks that the engine may leave unread when it asks for the next one: 1, or 0 to be read at once"""

    @property
    def capacity(self) -> int | None:
        """Tokens that fit in a slot; None: a slot never fills up."""

    @property
    def mask_id(self) -> int | None:
        """Token that stands for one to be filled in; None: prompts have no holes."""

    def check(self, job: Job) -> None:
        """Raises ValueError, naming argument and value, if the job can not be run."""

    def warm(self, prompt_lengths: Iterable[int]) -> None:
        """Compiles what prompts of these lengths need; later calls do not compile, so they can be timed."""

    def start(self, rows: Sequence[int], jobs: Sequence[Job]) -> Chunk:
        """Prefills prompts into slots, where whatever ran is forgotten; the chunk has the first tokens, if any."""

    def advance(self, active: np.ndarray) -> Chunk:
        """Runs all slots for one chunk; rows where bool [batch] `active` is False do no work from here on."""


class Programs:
    """Functions compiled ahead of time, each once, by name.

    A call whose shapes differ from those it was compiled for is an error instead of a silent second compilation.

    Attributes:
      seconds: compile time by name.
    """

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._programs: dict[str, Callable] = {}

    def get(
        self,
        name: str,
        function: Callable,
        *args: Any,
        donate: tuple[int, ...] = (),
        on_compile: OnCompile | None = None,
    ) -> Callable:
        """The program for `function(*args)`, compiled when `name` is new; it takes arguments `donate` for itself.

        `on_compile` hears (name, None) before a compilation and (name, seconds) after it.
        """
        program = self._programs.get(name)
        if program is None:
            on_compile = on_compile or (lambda name, seconds: None)
            on_compile(name, None)
            started = time.perf_counter()
            program = self._programs[name] = _compile(function, args, donate)
            self.seconds[name] = time.perf_counter() - started
            on_compile(name, self.seconds[name])
        return program


DEFAULT_PREFILL_CHUNK = 8192
"""With a window, whose prompts may have any length."""


def prefill_buckets(longest: int, smallest: int = 32) -> tuple[int, ...]:
    """Padded lengths: powers of two from `smallest`, the last one being `longest` itself."""
    sizes = [smallest << i for i in range(32) if smallest << i < longest]
    return (*sizes, longest)


@functools.lru_cache(maxsize=16)
def _programs(*_: Any) -> Programs:
    """The programs of equal models, sizes and parameter shapes: a second decoder of its kind compiles nothing."""
    return Programs()


def _compile(function: Callable, args: tuple, donate: tuple[int, ...]) -> Callable:
    """`function` compiled for these arguments' shapes.

    Compiled over the flat leaves: `lower` would rebuild the arguments with placeholders for leaves, which classes that
    check the types of their fields refuse.
    """
    structure: Any  # PyTreeDef, which has no usable type
    leaves, structure = jax.tree.flatten(args)
    sizes = [len(jax.tree.leaves(arg)) for arg in args]
    first = [sum(sizes[:i]) for i in range(len(args))]
    donated = tuple(leaf for i in donate for leaf in range(first[i], first[i] + sizes[i]))
    flat = jax.jit(lambda *leaves: function(*jax.tree.unflatten(structure, leaves)), donate_argnums=donated)
    compiled = flat.lower(*leaves).compile()

    def run(*args: Any) -> Any:
        leaves, given = jax.tree.flatten(args)
        if structure != given:
            raise TypeError(f"compiled for arguments of structure {structure}; got {given}")
        return compiled(*leaves)

    return run


def _as_chunk(prefill: Callable) -> Callable:
    """A prefill whose sampled tokens come as a chunk of one."""

    def run(params: Any, state: ARState, prompt: Prompt) -> tuple[ARState, SampledChunk]:
        state, sampled = prefill(params, state, prompt)
        return state, as_chunk(sampled)

    return run


class ARDecoder:
    """One token per forward pass and row.

    Args:
      lm: jaxmodels CausalLM.
      params: its parameters, which it takes `for_decoding`.
      batch: slots, that is requests in flight.
      capacity: cache slots per request: prompt and new tokens. None: with a window.
      window: each token sees the first `num_sinks` tokens and the latest `window` ones, itself among them; the cache
        holds no more than these, so that neither prompt nor output has a longest length. Not for models with layers
        that select blocks or convolve keys.
      num_sinks: see `window`.
      chunk: decode steps per call. More hides the host behind a small model, and streams that many tokens at once.
      prefill_rows: prompts per prefill call, padded to the longest; 1 wastes nothing once the slots are full.
      prefill_chunk: longer prompts are read in pieces of this many tokens, through the cache: less memory for long
        prompts, and no longer programs. None: one piece, with a window at most the window and 8192.
      buckets: padded lengths of prompts and last pieces; each one in use is compiled once, at most twice (first and
        later pieces). None: `prefill_buckets(prefill_chunk)`.
      max_eos: most EOS ids that a request may have.
      skip: read prompts with skip-softmax attention, in one piece; its numbers are Python floats here.
      decode_skip: leave out tiles of the cache in decode steps; not with a window.
      kv_codes: keep keys and values in eight bits, not for models with layers that select blocks; None: in the dtype of
        the weights.
      top_logprobs: most alternatives per token that a request may ask for; 0 leaves them out of the programs.
      on_compile: see `Programs.get`.
    """

    in_flight = 1
    mask_id = None

    def __init__(
        self,
        lm: Any,
        params: Any,
        *,
        batch: int = 1,
        capacity: int | None = None,
        window: int | None = None,
        num_sinks: int = 4,
        chunk: int = 1,
        prefill_rows: int = 1,
        prefill_chunk: int | None = None,
        buckets: Sequence[int] | None = None,
        max_eos: int = 8,
        skip: SkipAttention | None = None,
        decode_skip: SkipAttention | None = None,
        kv_codes: KVCodes | None = None,
        top_logprobs: int = 0,
        on_compile: OnCompile | None = None,
    ):
        if (capacity is None) == (window is None):
            raise ValueError(f"give capacity or window, one of them; got {capacity} and {window}")
        sizes = (("batch", batch), ("capacity", capacity), ("window", window), ("chunk", chunk))
        for name, value in (*sizes, ("prefill_chunk", prefill_chunk)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1; got {value}")
        if num_sinks < 0:
            raise ValueError(f"num_sinks must be >= 0; got {num_sinks}")
        if not 1 <= prefill_rows <= batch:
            raise ValueError(f"prefill_rows must lie in [1, batch = {batch}]; got {prefill_rows}")
        limit = lm.config.max_positions
        if window is None:
            self.slots = most = capacity or 0
            if self.slots > limit:
                raise ValueError(f"capacity {capacity} exceeds the model's {limit} positions")
        else:
            self.slots, most = window + num_sinks, window
            if self.slots > limit:
                raise ValueError(f"window {window} and num_sinks {num_sinks} exceed the model's {limit} positions")
        if not 0 <= top_logprobs <= lm.config.vocab_size:
            raise ValueError(f"top_logprobs must lie in [0, vocab_size={lm.config.vocab_size}]; got {top_logprobs}")
        if skip is not None and (window is not None or prefill_chunk is not None):
            raise NotImplementedError(
                "skip cannot be combined with window or prefill_chunk: it judges prompts read in one piece"
            )
        if decode_skip is not None and window is not None:
            raise NotImplementedError("decode_skip cannot be combined with window: tiles are skipped in full attention")
        if prefill_chunk is None:
            prefill_chunk = most if window is None else DEFAULT_PREFILL_CHUNK
        prefill_chunk = min(most, prefill_chunk)
        buckets = prefill_buckets(prefill_chunk) if buckets is None else tuple(sorted(set(buckets)))
        if not buckets or buckets[0] < 1 or buckets[-1] != prefill_chunk:
            raise ValueError(f"buckets must be >= 1 and end with the longest piece {prefill_chunk}; got {buckets}")
        self.lm, self.batch, self.capacity, self.chunk = lm, batch, capacity, chunk
        self.window, self.num_sinks, self.top_logprobs = window, num_sinks, top_logprobs
        self.prefill_rows, self.prefill_chunk, self.buckets = prefill_rows, prefill_chunk, buckets
        self.max_eos, self.kv_codes = max_eos, kv_codes
        self.on_compile = on_compile
        self.params = lm.for_decoding(params)
        leaves, structure = jax.tree.flatten(self.params)
        shapes = tuple((leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves)
        codes = None if kv_codes is None else kv_codes.format
        static = (batch, capacity, window, num_sinks, chunk, prefill_rows, max_eos, top_logprobs, codes)
        self.programs = _programs(lm, *static, structure, shapes, (skip, decode_skip))
        self._prefill = _as_chunk(make_prefill(lm, skip, top=top_logprobs))
        self._extend = make_extend(lm)
        self._finish = _as_chunk(make_prefill(lm, resume=True, top=top_logprobs))
        self._steps = make_steps(make_step(lm, decode_skip, top=top_logprobs), chunk, top=top_logprobs)
        self._all_rows = tuple(range(batch))
        self._warned = False
        self.state = self._new_state()

    def _new_state(self) -> ARState:
        config = self.lm.config
        sizes: dict[str, Any] = {"batch": self.batch, "capacity": self.slots, "dtype": self.params["embed"].dtype}
        sizes["codes"] = self.kv_codes

        def init() -> ARState:
            if self.window is None:
                return init_state(KVCache.init(config, **sizes), config.vocab_size, self.max_eos)
            cache = SinkRingCache.init(config, **sizes, num_sinks=self.num_sinks)
            return init_state(cache, config.vocab_size, self.max_eos)

        return jax.jit(init)()

    def check(self, job: Job) -> None:
        """Raises ValueError for what it does not have: options, more EOS ids or alternatives, ids of no token."""
        if job.options:
            raise ValueError(f"unknown options {sorted(job.options)}: an autoregressive decoder has none")
        if len(job.eos_ids) > self.max_eos:
            raise ValueError(f"at most {self.max_eos} EOS ids are possible; got {len(job.eos_ids)}")
        if job.top_logprobs > self.top_logprobs:
            raise ValueError(f"top_logprobs must be at most {self.top_logprobs} here; got {job.top_logprobs}")
        check_vocabulary(job, self.lm.config.vocab_size)
        limit = self.lm.config.max_positions
        if not self._warned and len(job.prompt) + job.max_new_tokens > limit:
            self._warned = True
            log.warning(
                "prompt (%d tokens) and max_new_tokens (%d) go beyond the model's %d positions: distances inside the "
                "window stay those of training, those to the sinks do not", len(job.prompt), job.max_new_tokens, limit,
            )  # fmt: skip

    def start(self, rows: Sequence[int], jobs: Sequence[Job]) -> Chunk:
        """Prefills up to `prefill_rows` prompts; the chunk holds each row's first token."""
        pieces = max(self._pieces(len(job.prompt)) for job in jobs)
        # Every prompt ends in the last piece; shorter ones begin later.
        for back in range(pieces - 1, 0, -1):
            piece = self._piece(rows, jobs, back)
            self.state = self._extend_program(piece)(self.params, self.state, piece)
        T = self._bucket(max(self._rest(len(job.prompt)) for job in jobs))
        prompt = self._prompt(rows, jobs, T, resume=pieces > 1)
        self.state, out = self._prefill_program(T, prompt)(self.params, self.state, prompt)
        return self._chunk(tuple(rows), out, np.zeros(self.prefill_rows, np.int32))

    def advance(self, active: np.ndarray) -> Chunk:
        """Up to `chunk` decode steps; the program ends early when every row is done."""
        self.state, out = self._decode_program()(self.params, self.state, active)
        return self._chunk(self._all_rows, out, out.counts)

    def _chunk(self, rows: tuple[int, ...], out: SampledChunk, forwards: Any) -> Chunk:
        top = {} if out.top is None else {"top_tokens": out.top.tokens, "top_logprobs": out.top.logprobs}
        return Chunk(rows, out.tokens, out.counts, out.logprobs, forwards=forwards, **top)

    def warm(self, prompt_lengths: Iterable[int]) -> None:
        """Compiles the decode program and those that prompts of these lengths need."""
        if self.state.token.is_deleted():  # an interrupt came between giving the state away and getting the next one
            self.state = self._new_state()
        lengths = set(prompt_lengths)
        long = {length for length in lengths if length > self.prefill_chunk}
        if long:
            self._extend_program(self._piece([], [], 1))
        # In a prefill of several rows a short prompt may go along with a long one.
        for resume, some in ((False, lengths - long), (True, lengths if self.prefill_rows > 1 and long else long)):
            for T in sorted({self._bucket(self._rest(length)) for length in some}):
                self._prefill_program(T, self._prompt([], [], T, resume=resume))
        self._decode_program()

    def _pieces(self, length: int) -> int:
        return -(-length // self.prefill_chunk)

    def _rest(self, length: int) -> int:
        """Tokens of a prompt's last piece."""
        return length - (self._pieces(length) - 1) * self.prefill_chunk

    def _bucket(self, length: int) -> int:
        return next(size for size in self.buckets if size >= length)

    def _extend_program(self, piece: Piece) -> Callable:
        name = f"piece {self.prefill_chunk}"
        return self.programs.get(
            name, self._extend, self.params, self.state, piece, donate=(1,), on_compile=self.on_compile
        )

    def _prefill_program(self, T: int, prompt: Prompt) -> Callable:
        resume = prompt.first is not None
        name, function = (f"last piece {T}", self._finish) if resume else (f"prefill {T}", self._prefill)
        return self.programs.get(
            name, function, self.params, self.state, prompt, donate=(1,), on_compile=self.on_compile
        )

    def _decode_program(self) -> Callable:
        active = np.ones(self.batch, bool)
        return self.programs.get(
            "decode", self._steps, self.params, self.state, active, donate=(1,), on_compile=self.on_compile
        )

    def _piece(self, rows: Sequence[int], jobs: Sequence[Job], back: int) -> Piece:
        """The piece of each prompt that has `back` pieces after it; filler for those that begin later."""
        shape = (self.prefill_rows, self.prefill_chunk)
        tokens, first = np.zeros(shape, np.int32), np.zeros(shape[0], bool)
        where = np.full(shape[0], self.batch, np.int32)
        for i, (row, job) in enumerate(zip(rows, jobs, strict=True)):
            number = self._pieces(len(job.prompt)) - 1 - back
            if number >= 0:
                begin = number * self.prefill_chunk
                tokens[i] = job.prompt[begin : begin + self.prefill_chunk]
                where[i], first[i] = row, number == 0
        lengths = np.full(shape[0], self.prefill_chunk, np.int32)
        return Piece(**jax.device_put({"tokens": tokens, "lengths": lengths, "rows": where, "first": first}))

    def _prompt(self, rows: Sequence[int], jobs: Sequence[Job], T: int, *, resume: bool) -> Prompt:
        """The prompts' last pieces: the whole of them unless `resume`."""
        filler = self.prefill_rows - len(jobs)
        tokens = np.zeros((self.prefill_rows, T), np.int32)
        eos = np.full((self.prefill_rows, self.max_eos), -1, np.int32)
        lengths = [self._rest(len(job.prompt)) for job in jobs]
        for i, job in enumerate(jobs):
            tokens[i, : lengths[i]] = job.prompt[len(job.prompt) - lengths[i] :]
            eos[i, : len(job.eos_ids)] = job.eos_ids
        columns = {
            "tokens": tokens,
            "lengths": np.array([*lengths, *[1] * filler], np.int32),
            "rows": np.array([*rows, *[self.batch] * filler], np.int32),
            "remaining": np.array([*(job.max_new_tokens for job in jobs), *[1] * filler], np.int32),
            "eos": eos,
        }
        if resume:
            columns["first"] = np.array([*(self._pieces(len(job.prompt)) == 1 for job in jobs), *[True] * filler])
        return Prompt(
            **jax.device_put(columns),
            sampling=Sampling.stack([*(job.sampling for job in jobs), *[SamplingOptions()] * filler]),
        )


def check_vocabulary(job: Job, vocab_size: int) -> None:
    """Raises ValueError when a prompt token has no embedding."""
    bad = job.prompt[(job.prompt < 0) | (job.prompt >= vocab_size)]
    if len(bad):
        raise ValueError(f"prompt token {bad[0]} lies outside the vocabulary of {vocab_size}")
