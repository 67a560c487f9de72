"""The block-diffusion decoder behind `TextEngine`: a chunk is a block of every slot."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from infer.text.decoders import OnCompile, check_vocabulary
from infer.text.events import Chunk, Job
from jaxmodels.cache import KVCodes
from jaxmodels.decoding.block_diffusion.generation import Block, BlockDecoding, RevealOptions, RowOptions
from jaxmodels.decoding.block_diffusion.stream import BlockStream, Plan, plan_request, prefill_length
from jaxmodels.decoding.sampling import SamplingOptions

OPTIONS = tuple(field.name for field in dataclasses.fields(RevealOptions))
"""What a request may say about its decoding."""


def reveal_options(options: Mapping[str, Any], default: RevealOptions) -> RevealOptions:
    """A request's options; without any of them the default."""
    unknown = sorted(options.keys() - set(OPTIONS))
    if unknown:
        raise ValueError(f"unknown option {unknown[0]!r}; a diffusion decoder has {', '.join(OPTIONS)}")
    for name, value in options.items():
        whole = name in ("lookahead", "steps")
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            raise ValueError(f"{name} must be {'an integer' if whole else 'a number'}; got {value!r}")
    return RevealOptions(**options) if options else default


class DiffusionDecoder:
    """Several tokens per forward pass and row.

    Args:
      lm: jaxmodels CausalLM whose configuration names a mask token.
      params: its parameters, which it takes `for_decoding`.
      decoding: static settings; None: those of the model's configuration.
      batch: slots, that is requests in flight.
      capacity: cache slots per request: prompt and new tokens.
      default: how requests without options reveal their tokens.
      align_blocks: blocks start at multiples of their length, as in training, instead of at the end of the prompt.
      fused: commit a block in the pass that starts the next one.
      on_step: called with the block after every denoising pass, and the host waits for each: for watching.
      prefill_rows: prompts per prefill call.
      max_eos: most EOS ids that a request may have.
      kv_codes: keep keys and values in eight bits; None: in the dtype of the weights.
      on_compile: called with (name, None) before a compilation and (name, seconds) after it.
    """

    def __init__(
        self,
        lm: Any,
        params: Any,
        decoding: BlockDecoding | None = None,
        *,
        batch: int = 1,
        capacity: int,
        default: RevealOptions = RevealOptions(threshold=0.9),  # noqa: B008 (frozen)
        align_blocks: bool = False,
        fused: bool = True,
        on_step: Callable[[Block], None] | None = None,
        prefill_rows: int = 1,
        max_eos: int = 8,
        kv_codes: KVCodes | None = None,
        on_compile: OnCompile | None = None,
    ):
        for name, value in (("batch", batch), ("capacity", capacity)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1; got {value}")
        if capacity > lm.config.max_positions:
            raise ValueError(f"capacity {capacity} exceeds the model's {lm.config.max_positions} positions")
        self.decoding = BlockDecoding.for_model(lm.config) if decoding is None else decoding
        self.lm, self.batch, self.capacity, self.max_eos = lm, batch, capacity, max_eos
        self.default, self.align_blocks, self.on_step, self.on_compile = default, align_blocks, on_step, on_compile
        self.prefill_rows = min(prefill_rows, batch)
        # A chunk that is watched is finished before the next one starts: its text comes first.
        self.in_flight = 1 if on_step is None else 0
        self.stream = BlockStream(
            lm,
            lm.for_decoding(params),
            self.decoding,
            batch=batch,
            capacity=capacity,
            fused=fused and on_step is None,
            prefill_rows=self.prefill_rows,
            eos_slots=max_eos,
            kv_codes=kv_codes,
        )
        self.mask_id = self.decoding.mask_id if self.decoding.infill else None
        self._rows = tuple(range(batch))

    def check(self, job: Job) -> None:
        """Raises ValueError for options, sampling, end tokens or prompts that cannot be decoded."""
        reveal = reveal_options(job.options, self.default)
        if len(job.eos_ids) > self.max_eos:
            raise ValueError(f"at most {self.max_eos} EOS ids are possible; got {len(job.eos_ids)}")
        RowOptions.stack([reveal], [1], [job.eos_ids], [job.sampling])
        if job.top_logprobs:
            raise ValueError(f"top_logprobs needs an autoregressive decoder; got {job.top_logprobs}")
        check_vocabulary(job, self.lm.config.vocab_size)
        self.stream.check(self._plan(job))

    def _plan(self, job: Job) -> Plan:
        return plan_request(job.prompt, job.max_new_tokens, self.decoding, align_blocks=self.align_blocks)

    def warm(self, prompt_lengths: Iterable[int]) -> None:
        """Runs an empty request through each program that prompts of these lengths need."""
        n = self.decoding.block_length
        prefixes = {length - length % n if self.align_blocks else length for length in prompt_lengths}
        for longest in sorted({prefill_length(prefix, self.capacity) for prefix in prefixes}):
            shape = (1, n)
            plan = Plan(
                prefix=np.zeros(min(longest, self.capacity), np.int32),
                tokens=np.zeros(shape, np.int32),
                masked=np.ones(shape, bool),
                hole=np.zeros(shape, bool),
                skip=0,
                total=0,
            )
            self._note(f"prefill {longest}", "prefill", lambda plan=plan: self._begin([0], [plan], [_EMPTY]))
        if prefixes and self.on_step is None:
            self._note("block", "fused" if self.stream.fused else "block", self._advance)

    def _begin(self, rows: Sequence[int], plans: Sequence[Plan], jobs: Sequence[Job]) -> None:
        self.stream.start(
            rows,
            plans,
            [reveal_options(job.options, self.default) for job in jobs],
            [tuple(job.eos_ids) for job in jobs],
            [job.sampling for job in jobs],
        )

    def _advance(self) -> None:
        jax.block_until_ready(self.stream.advance(np.zeros(self.batch, bool)))

    def _note(self, name: str, program: str, call: Callable[[], None]) -> None:
        """Runs `call`, reporting it as a compilation if `program` is traced in it."""
        before, started = self.stream.traces[program], time.perf_counter()
        call()
        if self.on_compile is not None and self.stream.traces[program] > before:
            self.on_compile(name, None)
            self.on_compile(name, time.perf_counter() - started)

    def start(self, rows: Sequence[int], jobs: Sequence[Job]) -> Chunk:
        """Prefills prompts into slots; the chunk is empty, tokens come with the first block."""
        self._begin(rows, [self._plan(job) for job in jobs], jobs)
        none = np.zeros((len(rows), 0), np.int32)
        count = np.zeros(len(rows), np.int32)
        return Chunk(tuple(rows), none, count, none.astype(np.float32), forwards=count, commits=count, reveal=none)

    def advance(self, active: np.ndarray) -> Chunk:
        """One block of every slot."""
        if self.on_step is None:
            output = self.stream.advance(active)
        else:
            for item in self.stream.advance_live(active):
                if isinstance(item, Block):
                    self.on_step(item)
                else:
                    output = item
        return Chunk(
            self._rows,
            output.tokens,
            output.counts,
            output.logprob,
            forwards=output.steps + output.commits,
            commits=output.commits,
            reveal=output.reveal,
        )


_EMPTY = Job(prompt=np.zeros(0, np.int32), max_new_tokens=1, sampling=SamplingOptions(), eos_ids=())
