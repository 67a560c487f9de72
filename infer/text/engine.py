"""TextEngine: many requests through the slots of one batch, as one stream of events.

The engine keeps one chunk in flight: it dispatches chunk n + 1 before it fetches chunk n, so that reading
tokens, detokenising and the user's own code run while the device works. That is sound because a decoder ends
rows by itself (EOS, max_new_tokens); only stop strings are the host's business, and they cost at most one
chunk of wasted work in their own row. Finished slots are refilled at once; a request's result does not depend
on its neighbours.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from infer.text.decoders import ARDecoder, Decoder, OnCompile
from infer.text.events import Alternatives, Chunk, Completion, Event, FinishReason, Job, Usage
from infer.text.requests import SAMPLING_FIELDS, Request, split_holes
from infer.text.stops import StopScanner
from jaxmodels.cache import Codes, KVCodes
from jaxmodels.decoding.sampling import SamplingOptions
from jaxmodels.sparse_attention import SkipAttention
from jaxmodels.tokenizer import StreamDecoder

DEFAULT_MAX_NEW_TOKENS = 256
DEFAULT_CAPACITY = 4096


def encode(request: Request, tokenizer: Any, mask_id: int | None = None) -> np.ndarray:
    """The request's prompt as int32 ids [P]; `mask_id` stands for tokens to fill in, None where there can be none."""
    if request.infill and mask_id is None:
        raise ValueError("infill needs a diffusion decoder made for it; got a decoder without")
    if request.ids is not None:
        try:
            ids = np.asarray(request.ids, np.int32).reshape(-1)
        except OverflowError:
            raise ValueError(f"ids must fit into 32 bits; got {max(request.ids, key=abs)}") from None
        if request.infill and not (ids == mask_id).any():
            raise ValueError(f"infill: the ids have no hole; the mask token {mask_id} marks a token to be filled in")
        return ids
    if tokenizer is None:
        raise ValueError("a prompt given as text needs a tokenizer; this checkpoint has none, give token ids")
    if request.messages is not None and not request.infill:
        return np.asarray(tokenizer.chat(list(request.messages)), np.int32)
    if not request.infill:
        return np.asarray(tokenizer.encode(request.prompt), np.int32)
    text = request.prompt if request.prompt is not None else tokenizer.chat_text(list(request.messages or ()))
    parts: list[Any] = []
    for piece in split_holes(text):
        first = not parts and request.prompt is not None
        parts += [mask_id] * piece if isinstance(piece, int) else tokenizer.encode(piece, add_special_tokens=first)
    return np.asarray(parts, np.int32)


def resolve_max_new_tokens(request: Request, default: int | None, generation: Any) -> int:
    """The request's, the engine's, the checkpoint's, or 256: the first given; with holes the request's, or 0."""
    others = [0] if request.infill else [default, getattr(generation, "max_new_tokens", None), DEFAULT_MAX_NEW_TOKENS]
    value = next(value for value in (request.max_new_tokens, *others) if value is not None)
    least = 0 if request.infill else 1
    if not least <= value < 2**31:
        raise ValueError(f"max_new_tokens must be >= {least} and < 2**31; got {value}")
    return int(value)


def needed_capacity(pretrained: Any, requests: Sequence[Request], max_new_tokens: int | None = None) -> int:
    """Slots for the largest of the requests, rounded up: to a power of two up to 1024, then to multiples of 1024."""
    needed = 128
    for request in requests:
        try:
            prompt = len(encode(request, pretrained.tokenizer, pretrained.config.mask_id))
            needed = max(needed, prompt + resolve_max_new_tokens(request, max_new_tokens, pretrained.generation))
        except ValueError:
            continue  # `prepare` will report it
    return 1 << (needed - 1).bit_length() if needed <= 1024 else -(-needed // 1024) * 1024


class _Running:
    """A request in a slot."""

    def __init__(self, index: int, row: int, job: Job, tokenizer: Any):
        self.index, self.row, self.job = index, row, job
        self.decoder = StreamDecoder(tokenizer) if tokenizer is not None else None
        self.scanner = StopScanner(job.stop) if job.stop else None
        self.tokens = self.decode_tokens = self.forwards = self.commits = 0
        self.started = time.perf_counter()
        self.prefilled = self.started
        self.finished = False

    def text(self, tokens: Sequence[int]) -> tuple[str, int, bool]:
        """(certain text of these tokens, how many of them count, whether a stop string ended them)."""
        if self.decoder is None:
            return "", len(tokens), False
        if self.scanner is None:
            return self.decoder.push(tokens), len(tokens), False
        pieces = []
        for used, token in enumerate(tokens, 1):  # one by one: tokens after the stop string do not count
            piece, stop = self.scanner.push(self.decoder.push([token]))
            pieces.append(piece)
            if stop is not None:
                return "".join(pieces), used, True
        return "".join(pieces), len(tokens), False

    def rest(self) -> tuple[str, bool]:
        """(text held back so far, whether it completed a stop string), when no more tokens come."""
        if self.decoder is None:
            return "", False
        text, stop = self.decoder.flush(), None
        if self.scanner is not None:
            text, stop = self.scanner.push(text)
            text += self.scanner.flush()
        return text, stop is not None

    def usage(self, now: float) -> Usage:
        return Usage(
            prompt_tokens=len(self.job.prompt),
            new_tokens=self.tokens,
            decode_tokens=self.decode_tokens,
            forwards=self.forwards,
            commits=self.commits,
            prefill_seconds=self.prefilled - self.started,
            decode_seconds=now - self.prefilled,
        )


@dataclasses.dataclass
class _Flight:
    """A chunk whose arrays may not be there yet, and who ran in its rows when it was dispatched."""

    chunk: Chunk
    owners: list[_Running | None]
    prefill: bool


class TextEngine:
    """Runs requests through a decoder.

    Args:
      decoder: owns model, weights and the state of a fixed number of slots.
      tokenizer: jaxmodels.tokenizer.Tokenizer; None if requests carry ids (events then have no text).
      generation: the checkpoint's defaults (jaxmodels GenerationDefaults), or None.
      max_new_tokens: for requests that do not say; None takes the checkpoint's, else 256.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        tokenizer: Any = None,
        generation: Any = None,
        eos_ids: Sequence[int] = (),
        max_new_tokens: int | None = None,
    ):
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.generation = generation
        self.eos_ids = tuple(eos_ids)
        self.max_new_tokens = max_new_tokens
        self._busy = False
        self._started = time.perf_counter()

    @property
    def elapsed(self) -> float:
        """Seconds since the latest `generate` began to decode, compilation excluded."""
        return time.perf_counter() - self._started

    @classmethod
    def from_pretrained(
        cls,
        pretrained: Any,
        *,
        batch: int = 1,
        capacity: int | None = None,
        window: int | None = None,
        num_sinks: int = 4,
        requests: Sequence[Request] = (),
        chunk: int = 1,
        prefill_rows: int = 1,
        prefill_chunk: int | None = None,
        top_logprobs: int | None = None,
        max_new_tokens: int | None = None,
        on_compile: OnCompile | None = None,
        diffusion: Mapping[str, Any] | None = None,
        skip: SkipAttention | None = None,
        decode_skip: SkipAttention | None = None,
        kv_cache: Codes | None = None,
    ) -> "TextEngine":
        """The engine of a loaded model (`jaxmodels.load_pretrained`).

        Without a `capacity` the slots are as large as the `requests` need (rounded up so that similar ones share
        compiled programs), or 4096 tokens where there are none, and never larger than the model's `max_positions`.
        `top_logprobs` None reports as many alternatives as the `requests` ask for. With `diffusion`, the further
        arguments of a `DiffusionDecoder`, tokens are decoded in blocks. With a `kv_cache`, "int8" or "fp8", keys and
        values are kept in eight bits, fp8 by the checkpoint's scales if it has any. The other arguments are those of
        `ARDecoder` and of the engine; the skips are for the autoregressive decoder only.
        """
        if diffusion is not None and (skip is not None or decode_skip is not None):
            raise NotImplementedError("skip-softmax exists for the autoregressive decoder only; leave out the skips")
        limit = pretrained.config.max_positions
        if capacity is None and window is None:
            capacity = min(DEFAULT_CAPACITY, limit)
            if requests:
                capacity = min(limit, needed_capacity(pretrained, requests, max_new_tokens))
        options: dict[str, Any] = {"batch": batch, "capacity": capacity, "prefill_rows": prefill_rows}
        if kv_cache is not None:
            options["kv_codes"] = KVCodes(kv_cache, pretrained.kv_scales if kv_cache == "fp8" else None)
        if diffusion is None:
            if top_logprobs is None:
                top_logprobs = max((request.top_logprobs for request in requests), default=0)
            decoder: Decoder = ARDecoder(
                pretrained.lm, pretrained.params, chunk=chunk, on_compile=on_compile, window=window,
                num_sinks=num_sinks, prefill_chunk=prefill_chunk, top_logprobs=top_logprobs, skip=skip,
                decode_skip=decode_skip, **options,
            )  # fmt: skip
        else:
            for name, value in (("window", window), ("prefill_chunk", prefill_chunk), ("top_logprobs", top_logprobs)):
                if value is not None:
                    raise ValueError(f"{name} is an option of the autoregressive decoder; got {value}")
            from infer.text.diffusion import DiffusionDecoder

            decoder = DiffusionDecoder(pretrained.lm, pretrained.params, on_compile=on_compile, **options, **diffusion)
        return cls(
            decoder,
            tokenizer=pretrained.tokenizer,
            generation=pretrained.generation,
            eos_ids=pretrained.generation.eos_ids,
            max_new_tokens=max_new_tokens,
        )

    def prepare(self, request: Request) -> Job:
        """Encodes a request and resolves its defaults; every error a request can have is raised here."""
        prompt_ids = encode(request, self.tokenizer, self.decoder.mask_id)
        holes = np.flatnonzero(prompt_ids == self.decoder.mask_id) if request.infill else ()
        job = Job(
            prompt=prompt_ids,
            max_new_tokens=resolve_max_new_tokens(request, self.max_new_tokens, self.generation),
            sampling=self._sampling(request),
            eos_ids=self.eos_ids if request.eos_ids is None else tuple(request.eos_ids),
            stop=tuple(request.stop),
            logprobs=request.logprobs,
            top_logprobs=request.top_logprobs,
            options=request.options,
            first_hole=int(holes[0]) if len(holes) else None,
        )
        StopScanner(job.stop)
        if job.stop and self.tokenizer is None:
            raise ValueError(f"stop strings {list(job.stop)!r} need a tokenizer; this checkpoint has none")
        if len(job.prompt) == 0:
            raise ValueError("the prompt is empty; give at least one token")
        prompt, new, capacity = len(job.prompt), job.max_new_tokens, self.decoder.capacity
        if capacity is not None and prompt > capacity:
            raise ValueError(f"the prompt has {prompt} tokens, more than the cache capacity {capacity}")
        if capacity is not None and prompt + new > capacity:
            raise ValueError(
                f"prompt ({prompt} tokens) and max_new_tokens ({new}) need {prompt + new} cache slots, "
                f"the capacity is {capacity}"
            )
        self.decoder.check(job)
        return job

    def _sampling(self, request: Request) -> SamplingOptions:
        values = {}
        for name in SAMPLING_FIELDS:
            value = getattr(request, name)
            if value is None:
                value = getattr(self.generation, name, None)
            if value is not None:
                values[name] = value
        return SamplingOptions(**values)

    def generate(self, requests: Iterable[Request | Job]) -> Iterator[Event]:
        """Runs the requests, as many at a time as there are slots, and yields their events as they come.

        All requests are checked before the first one starts; the error names the request's place. Events of
        one request are in order, those of different requests interleave; each request ends with exactly one
        event that carries `finish_reason` and `usage`. Leaving the iterator early abandons what is still
        running.
        """
        jobs = []
        for index, request in enumerate(requests):
            try:
                jobs.append(request if isinstance(request, Job) else self.prepare(request))
            except ValueError as error:
                raise ValueError(f"request {index}: {error}") from error
        return self._run(jobs)

    def complete(self, requests: Iterable[Request | Job]) -> list[Completion]:
        """Runs the requests to their end; completions in the order of the requests."""
        parts: dict[int, list[Event]] = {}
        for event in self.generate(requests):
            parts.setdefault(event.index, []).append(event)
        return [join_events(parts[index]) for index in sorted(parts)]

    def _run(self, jobs: list[Job]) -> Iterator[Event]:
        if self._busy:
            raise RuntimeError("this engine is already generating; finish or close that iterator first")
        self._busy = True
        try:
            self.decoder.warm({len(job.prompt) for job in jobs})
            self._started = time.perf_counter()
            yield from self._loop(deque(enumerate(jobs)))
        finally:
            self._busy = False

    def _loop(self, waiting: deque[tuple[int, Job]]) -> Iterator[Event]:
        slots: list[_Running | None] = [None] * self.decoder.batch
        flights: deque[_Flight] = deque()
        depth = self.decoder.in_flight
        while waiting or flights or any(slots):
            while waiting and None in slots:
                flights.append(self._start(waiting, slots))
            while flights and depth == 0:
                yield from self._settle(flights.popleft())  # a prefill without tokens: it frees no slot
            if any(slots):
                active = np.array([slot is not None for slot in slots])
                flights.append(_Flight(self.decoder.advance(active), list(slots), prefill=False))
            while flights and (len(flights) > depth or not any(slots)):
                for event in self._settle(flights.popleft()):
                    if event.finish_reason is not None:
                        slots[event.row] = None
                    yield event

    def _start(self, waiting: deque[tuple[int, Job]], slots: list[_Running | None]) -> _Flight:
        free = [row for row, slot in enumerate(slots) if slot is None]
        rows = free[: min(self.decoder.prefill_rows, len(waiting))]
        owners: list[_Running | None] = []
        for row in rows:
            index, job = waiting.popleft()
            slots[row] = _Running(index, row, job, self.tokenizer)
            owners.append(slots[row])
        jobs = [owner.job for owner in owners if owner is not None]
        return _Flight(self.decoder.start(rows, jobs), owners, prefill=True)

    def _settle(self, flight: _Flight) -> Iterator[Event]:
        """Fetches a chunk, in one transfer, and turns it into events."""
        chunk = jax.device_get({f.name: getattr(flight.chunk, f.name) for f in dataclasses.fields(Chunk)})
        now = time.perf_counter()
        for i, owner in enumerate(flight.owners):
            if owner is None or owner.finished:
                continue
            if flight.prefill:
                owner.prefilled = now
            owner.forwards += int(chunk["forwards"][i])
            if chunk["commits"] is not None:
                owner.commits += int(chunk["commits"][i])
            count = int(chunk["counts"][i])
            if count:
                if np.isnan(chunk["logprobs"][i, :count]).any():
                    raise FloatingPointError(
                        f"request {owner.index}: the model's logits are not finite after {owner.tokens} new tokens; "
                        "check the weights, or compute in float32"
                    )
                part = {
                    name: chunk[name][i, :count].tolist() if chunk[name] is not None else None
                    for name in ("tokens", "logprobs", "top_tokens", "top_logprobs", "reveal")
                }
                yield self._event(owner, part, flight.prefill, now)

    def _event(self, owner: _Running, part: dict[str, Any], prefill: bool, now: float) -> Event:
        job = owner.job
        tokens = part["tokens"][: job.total - owner.tokens]
        reason: FinishReason | None = "length" if owner.tokens + len(tokens) >= job.total else None
        visible = len(tokens)
        given = [step < 0 for step in part["reveal"]] if part["reveal"] is not None else [False] * visible
        end = next((i for i, token in enumerate(tokens) if token in job.eos_ids and not given[i]), None)
        if end is not None:
            tokens, visible, reason = tokens[: end + 1], end, "eos"
        text, used, stopped = owner.text(tokens[:visible])
        if stopped:
            tokens, reason = tokens[:used], "stop"
        elif reason is not None:
            rest, stopped = owner.rest()
            text += rest
            reason = "stop" if stopped else reason
        owner.tokens += len(tokens)
        owner.decode_tokens += 0 if prefill else len(tokens)
        owner.finished = reason is not None
        count = len(tokens)
        return Event(
            index=owner.index,
            row=owner.row,
            text=text,
            tokens=tuple(tokens),
            logprobs=tuple(part["logprobs"][:count]) if job.logprobs else None,
            top_logprobs=_alternatives(part, count, job.top_logprobs) if job.top_logprobs else None,
            reveal=tuple(part["reveal"][:count]) if part["reveal"] is not None else None,
            finish_reason=reason,
            usage=owner.usage(now) if reason is not None else None,
        )


def _alternatives(part: dict[str, Any], count: int, k: int) -> tuple[Alternatives, ...]:
    pairs = zip(part["top_tokens"][:count], part["top_logprobs"][:count], strict=True)
    return tuple(tuple(zip(tokens[:k], logprobs[:k], strict=True)) for tokens, logprobs in pairs)


def join_events(events: Sequence[Event]) -> Completion:
    """The events of one request, put together; the last one must carry the finish reason."""
    last = events[-1]
    if last.finish_reason is None or last.usage is None:
        raise ValueError(f"the events of request {last.index} do not reach its end")
    tokens = tuple(token for event in events for token in event.tokens)
    logprobs = None
    if last.logprobs is not None:
        logprobs = tuple(value for event in events for value in event.logprobs or ())
    top = None
    if last.top_logprobs is not None:
        top = tuple(value for event in events for value in event.top_logprobs or ())
    text = "".join(event.text for event in events)
    return Completion(last.index, text, tokens, logprobs, last.finish_reason, last.usage, top)
