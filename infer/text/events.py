"""What flows through the engine: a decoder's `Chunk`s in, the user's `Event`s out. Imports neither JAX nor NumPy."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

FinishReason = Literal["eos", "stop", "length"]
Alternatives = tuple[tuple[int, float], ...]
"""Tokens and their log-probabilities, most probable first."""


@dataclasses.dataclass
class Chunk:
    """What one call of a decoder produced for some rows. Arrays may still be on the device: R rows, n tokens.

    The engine fetches all arrays of a chunk in one transfer, a chunk behind the one that is running.
    """

    rows: tuple[int, ...]
    """slot of each of the R rows"""
    tokens: Any
    """int32 [R, n], new tokens in order, the first `counts` of each row valid; an EOS token is the row's last one"""
    counts: Any
    """int32 [R]"""
    logprobs: Any
    """float32 [R, n], log-probability (confidence, for a diffusion decoder) of each token under the raw logits"""
    forwards: Any
    """int32 [R], forward passes over the row's new tokens; 0 in the chunk of a prefill"""
    top_tokens: Any = None
    """int32 [R, n, k], the k most probable tokens at each place (autoregressive, if the decoder reports them)"""
    top_logprobs: Any = None
    """float32 [R, n, k]"""
    commits: Any = None
    """int32 [R], those forwards that only wrote a finished block to the cache (diffusion)"""
    reveal: Any = None
    """int32 [R, n], the denoising step within its block at which each token was fixed (diffusion)"""


@dataclasses.dataclass(frozen=True)
class Job:
    """A request after preparation: ids, every default resolved."""

    prompt: Any
    """int32 NumPy array [P], P >= 1"""
    max_new_tokens: int
    sampling: Any
    """jaxmodels.decoding.sampling.SamplingOptions"""
    eos_ids: tuple[int, ...]
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    top_logprobs: int = 0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """options of the decoder, checked by it"""
    first_hole: int | None = None
    """infilling: position of the first token to fill in; all tokens from there on are given out"""

    @property
    def total(self) -> int:
        """Most tokens that are given out."""
        return self.max_new_tokens + (0 if self.first_hole is None else len(self.prompt) - self.first_hole)


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a request cost."""

    prompt_tokens: int
    new_tokens: int
    decode_tokens: int
    """those of them that came after the prefill (which gives an autoregressive request its first token)"""
    forwards: int
    """decoding forward passes in which the request took part; the prefill is not counted"""
    commits: int
    """those of them that only committed a finished block (diffusion)"""
    prefill_seconds: float
    """from the start of the prefill until its result is on the host: the time to first token without queueing"""
    decode_seconds: float
    """from then until the last token is on the host"""

    @property
    def tokens_per_second(self) -> float:
        """`decode_tokens` over decode time; nan if there is none."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds > 0 else float("nan")

    @property
    def tokens_per_forward(self) -> float:
        """`decode_tokens` over all decoding forwards, commits included; nan without a forward."""
        return self.decode_tokens / self.forwards if self.forwards else float("nan")

    def to_json(self) -> dict[str, Any]:
        """A flat dictionary; nan becomes None."""
        result = dataclasses.asdict(self)
        for name in ("tokens_per_second", "tokens_per_forward"):
            value = getattr(self, name)
            result[name] = value if value == value else None
        return result


@dataclasses.dataclass(frozen=True)
class Event:
    """News of one request. Texts of all events of a request joined are its result."""

    index: int
    """place of the request among those given to `generate`"""
    row: int
    """slot of the batch it runs in"""
    text: str
    """newly certain text: complete UTF-8 characters, never part of a stop string"""
    tokens: tuple[int, ...]
    """new tokens, EOS included; the text may lag behind them"""
    logprobs: tuple[float, ...] | None = None
    """one per token, if the request asked for them"""
    top_logprobs: tuple[Alternatives, ...] | None = None
    """one per token: its most probable alternatives, itself among them or not, if the request asked for them"""
    reveal: tuple[int, ...] | None = None
    """diffusion: denoising step of each token within its block"""
    finish_reason: FinishReason | None = None
    """set on the last event: an EOS token, a stop string, or max_new_tokens"""
    usage: Usage | None = None
    """set on the last event"""


@dataclasses.dataclass(frozen=True)
class Completion:
    """A finished request: its events put together."""

    index: int
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    finish_reason: FinishReason
    usage: Usage
    top_logprobs: tuple[Alternatives, ...] | None = None
