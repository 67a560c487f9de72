"""The decoders behind `TextEngine`: they own a batch of slots on the device and know nothing of text."""

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from infer.text.events import Chunk, Job
from jaxmodels.cache import KVCache
from jaxmodels.decoding.autoregressive import (
    ARState,
    Prompt,
    SampledChunk,
    init_state,
    make_prefill,
    make_step,
    make_steps,
)
from jaxmodels.decoding.sampling import Sampling, SamplingOptions
from jaxmodels.sparse_attention import SkipAttention

OnCompile = Callable[[str, float | None], None]


@runtime_checkable
class Decoder(Protocol):
    """What the engine asks of a decoder. Calls only dispatch: the engine fetches a chunk's arrays later."""

    batch: int
    """number of slots"""
    capacity: int
    """tokens that fit in a slot"""
    prefill_rows: int
    """most rows that one call of `start` takes"""
    in_flight: int
    """chunks that the engine may leave unread when it asks for the next one: 1, or 0 to be read at once"""

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


def prefill_buckets(capacity: int, smallest: int = 32) -> tuple[int, ...]:
    """Padded prompt lengths: powers of two from `smallest`, the last one being the capacity itself."""
    sizes = [smallest << i for i in range(32) if smallest << i < capacity]
    return (*sizes, capacity)


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
        counts = sampled.valid.astype(np.int32)
        return state, SampledChunk(sampled.token[:, None], sampled.logprob[:, None], counts)

    return run


class ARDecoder:
    """One token per forward pass and row.

    Args:
      lm: jaxmodels CausalLM.
      params: its parameters; stacked ones are unstacked on a CPU, where slices of them would be copied.
      batch: slots, that is requests in flight.
      capacity: cache slots per request: prompt and new tokens.
      chunk: decode steps per call. More hides the host behind a small model, and streams that many tokens at once.
      prefill_rows: prompts per prefill call, padded to the longest; 1 wastes nothing once the slots are full.
      buckets: padded prompt lengths; each one in use is compiled once. None: `prefill_buckets(capacity)`.
      max_eos: most EOS ids that a request may have.
      skip: read prompts with skip-softmax attention; its numbers are Python floats here.
      decode_skip: leave out tiles of the cache in decode steps.
      on_compile: see `Programs.get`.
    """

    in_flight = 1

    def __init__(
        self,
        lm: Any,
        params: Any,
        *,
        batch: int = 1,
        capacity: int,
        chunk: int = 1,
        prefill_rows: int = 1,
        buckets: Sequence[int] | None = None,
        max_eos: int = 8,
        skip: SkipAttention | None = None,
        decode_skip: SkipAttention | None = None,
        on_compile: OnCompile | None = None,
    ):
        for name, value in (("batch", batch), ("capacity", capacity), ("chunk", chunk)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1; got {value}")
        if not 1 <= prefill_rows <= batch:
            raise ValueError(f"prefill_rows must lie in [1, batch = {batch}]; got {prefill_rows}")
        if capacity > lm.config.max_positions:
            raise ValueError(f"capacity {capacity} exceeds the model's {lm.config.max_positions} positions")
        buckets = prefill_buckets(capacity) if buckets is None else tuple(sorted(set(buckets)))
        if not buckets or buckets[0] < 1 or buckets[-1] != capacity:
            raise ValueError(f"buckets must be >= 1 and end with the capacity {capacity}; got {buckets}")
        self.lm, self.batch, self.capacity, self.chunk = lm, batch, capacity, chunk
        self.prefill_rows, self.buckets, self.max_eos = prefill_rows, buckets, max_eos
        self.on_compile = on_compile
        on_cpu = jax.tree.leaves(params)[0].devices().pop().platform == "cpu"
        self.params = lm.unstack(params) if on_cpu and isinstance(params["layers"], dict) else params
        leaves, structure = jax.tree.flatten(self.params)
        shapes = tuple((leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves)
        skips = skip, decode_skip
        self.programs = _programs(lm, batch, capacity, chunk, prefill_rows, max_eos, structure, shapes, skips)
        self._prefill = _as_chunk(make_prefill(lm, skip))
        self._steps = make_steps(make_step(lm, decode_skip), chunk)
        self._all_rows = tuple(range(batch))
        self.state = self._new_state()

    def _new_state(self) -> ARState:
        config, dtype = self.lm.config, self.params["embed"].dtype

        def init() -> ARState:
            cache = KVCache.init(config, batch=self.batch, capacity=self.capacity, dtype=dtype)
            return init_state(cache, config.vocab_size, self.max_eos)

        return jax.jit(init)()

    def check(self, job: Job) -> None:
        """Raises ValueError for options (there are none), too many EOS ids, and ids outside the vocabulary."""
        if job.options:
            raise ValueError(f"unknown options {sorted(job.options)}: an autoregressive decoder has none")
        if len(job.eos_ids) > self.max_eos:
            raise ValueError(f"at most {self.max_eos} EOS ids are possible; got {len(job.eos_ids)}")
        vocab_size = self.lm.config.vocab_size
        bad = job.prompt[(job.prompt < 0) | (job.prompt >= vocab_size)]
        if len(bad):
            raise ValueError(f"prompt token {bad[0]} lies outside the vocabulary of {vocab_size}")

    def start(self, rows: Sequence[int], jobs: Sequence[Job]) -> Chunk:
        """One prefill of up to `prefill_rows` prompts; the chunk holds each row's first token."""
        T = self._bucket(max(len(job.prompt) for job in jobs))
        prompt = self._prompt(rows, jobs, T)
        self.state, out = self._prefill_program(T, prompt)(self.params, self.state, prompt)
        none = np.zeros(self.prefill_rows, np.int32)
        return Chunk(tuple(rows), out.tokens, out.counts, out.logprobs, forwards=none)

    def advance(self, active: np.ndarray) -> Chunk:
        """Up to `chunk` decode steps; the program ends early when every row is done."""
        self.state, out = self._decode_program()(self.params, self.state, active)
        return Chunk(self._all_rows, out.tokens, out.counts, out.logprobs, forwards=out.counts)

    def warm(self, prompt_lengths: Iterable[int]) -> None:
        """Compiles the decode program and the prefill of each bucket in use."""
        if self.state.token.is_deleted():  # an interrupt came between giving the state away and getting the next one
            self.state = self._new_state()
        for T in sorted({self._bucket(length) for length in prompt_lengths}):
            self._prefill_program(T, self._prompt([], [], T))
        self._decode_program()

    def _bucket(self, length: int) -> int:
        return next(size for size in self.buckets if size >= length)

    def _prefill_program(self, T: int, prompt: Prompt) -> Callable:
        return self.programs.get(
            f"prefill {T}", self._prefill, self.params, self.state, prompt, donate=(1,), on_compile=self.on_compile
        )

    def _decode_program(self) -> Callable:
        active = np.ones(self.batch, bool)
        return self.programs.get(
            "decode", self._steps, self.params, self.state, active, donate=(1,), on_compile=self.on_compile
        )

    def _prompt(self, rows: Sequence[int], jobs: Sequence[Job], T: int) -> Prompt:
        filler = self.prefill_rows - len(jobs)
        tokens = np.zeros((self.prefill_rows, T), np.int32)
        eos = np.full((self.prefill_rows, self.max_eos), -1, np.int32)
        for i, job in enumerate(jobs):
            tokens[i, : len(job.prompt)] = job.prompt
            eos[i, : len(job.eos_ids)] = job.eos_ids
        columns = {
            "tokens": tokens,
            "lengths": np.array([*(len(job.prompt) for job in jobs), *[1] * filler], np.int32),
            "rows": np.array([*rows, *[self.batch] * filler], np.int32),
            "remaining": np.array([*(job.max_new_tokens for job in jobs), *[1] * filler], np.int32),
            "eos": eos,
        }
        return Prompt(
            **jax.device_put(columns),
            sampling=Sampling.stack([*(job.sampling for job in jobs), *[SamplingOptions()] * filler]),
        )
