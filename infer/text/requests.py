"""What a user asks of the text engine. Imports no JAX."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "seed")
MAX_TOP_LOGPROBS = 20


@dataclasses.dataclass(frozen=True)
class Request:
    """One text to complete. Exactly one of `prompt`, `ids` and `messages`; None elsewhere takes the default.

    Defaults come from the checkpoint's generation_config.json, then from `SamplingOptions` (greedy, no
    penalty) and from the engine (max_new_tokens). A request is a pure function of its fields: equal requests,
    equal seeds, equal text; give different seeds to get different samples.
    """

    prompt: str | None = None
    """text to continue, encoded as it is"""
    ids: Sequence[int] | None = None
    """token ids to continue"""
    messages: Sequence[Mapping[str, Any]] | None = None
    """a conversation ({"role": ..., "content": ...} each), rendered by the checkpoint's chat template"""
    max_new_tokens: int | None = None
    stop: Sequence[str] = ()
    """strings that end the text; none of them, nor a beginning of it that ended it, is emitted"""
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    """0 <= seed < 2**32; None is 0"""
    eos_ids: Sequence[int] | None = None
    """token ids that end the text; None takes the checkpoint's, () runs to max_new_tokens"""
    logprobs: bool = False
    """report the log-probability of each token under the model (before penalties, temperature and filters)"""
    top_logprobs: int = 0
    """report so many of the most probable tokens at each place, with their log-probabilities; autoregressive decoders
    have them if made so"""
    infill: bool = False
    """each <fill:N> in the prompt stands for N tokens to fill in, in `ids` the mask token for one; max_new_tokens, then
    by default 0, come after the end; needs a diffusion decoder"""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """options of the decoder behind the engine; an autoregressive one has none"""

    def __post_init__(self):
        given = [name for name in ("prompt", "ids", "messages") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a request needs exactly one of prompt, ids and messages; got {given or 'none'}")
        if isinstance(self.stop, str):
            raise ValueError(f"stop must be a sequence of strings; got the string {self.stop!r}")
        if self.infill and self.stop:
            raise ValueError(f"stop cannot be combined with infill; got {list(self.stop)!r}")
        if not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            raise ValueError(f"top_logprobs must lie in 0..{MAX_TOP_LOGPROBS}; got {self.top_logprobs}")


_HOLE = re.compile(r"<fill:(\d+)>")
_LARGEST_HOLE = 2**20  # beyond any cache; more would cost seconds and memory before a decoder could say so


def split_holes(text: str) -> list[str | int]:
    """The text cut at each <fill:N>, which becomes the integer N; empty pieces are left out.

    >>> split_holes("a = <fill:3> + b")
    ['a = ', 3, ' + b']
    """
    pieces: list[str | int] = list(_HOLE.split(text))
    for i in range(1, len(pieces), 2):
        digits = str(pieces[i])
        if len(digits) > 7 or not 0 < int(digits) <= _LARGEST_HOLE:
            allowed = f"at least one token and at most {_LARGEST_HOLE:,}"
            raise ValueError(f"infill: a hole must have {allowed}; got <fill:{digits:.20}>")
        pieces[i] = int(digits)
    if len(pieces) == 1:
        raise ValueError("infill: the prompt has no hole; write <fill:N> where N tokens are to be filled in")
    return [piece for piece in pieces if piece != ""]
