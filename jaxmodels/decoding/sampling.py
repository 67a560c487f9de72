"""From logits to a token: temperature, top-k, top-p, min-p, penalties and seeds as traced per-row arrays.

Order of operations, that of Hugging Face `transformers` 5 (`GenerationMixin._get_logits_processor`):

    penalties -> / temperature -> top-k -> top-p (on the survivors of top-k, renormalised) -> min-p -> draw

Conventions where the field disagrees:

* repetition penalty (Keskar et al. 2019, section 4.1; `RepetitionPenaltyLogitsProcessor`): a logit of a token
  that occurs in the PROMPT OR in the generated text is divided by the penalty when positive, multiplied when
  negative.
* presence penalty (OpenAI API reference; vLLM `SamplingParams.presence_penalty`): subtracted once from the
  logit of each token that occurs in the GENERATED text; the prompt does not count.
* log-probabilities are those of the model: `log_softmax(logits)` before penalties, temperature and filters.
* ties: all tokens that tie with the last one kept are kept: the result depends on no sort order.

Each filter is a threshold on the scaled logit, so none of them needs a sort: the threshold is found by
bisecting the 31 bits of a non-negative float (vocabulary 151 936 on two CPU cores: 1.1 ms against 32 ms for
one sort). A batch in which no row draws, filters or penalises skips that part at run time (`lax.cond`):
greedy rows cost an argmax.

Row i of the result is a function of row i of the arguments alone: the noise comes from the row's own seed and
position, never from its place in the batch. (The logits are the model's business: a matrix product may round
differently at another batch size.)
"""

import dataclasses
import math
from collections.abc import Sequence

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8, UInt32

IN_PROMPT, IN_OUTPUT = 1, 2  # bits of `seen`
_INF_BITS = 0x7F800000


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How one request samples: plain Python values, checked here (ValueError names field and value)."""

    temperature: float = 0.0
    """0 is exactly greedy (top_k, top_p, min_p and seed are then without effect)"""
    top_k: int = 0
    """keep the k most probable tokens; 0 keeps all, as does any k >= vocabulary size"""
    top_p: float = 1.0
    """keep the smallest set of most probable tokens whose mass reaches top_p; 1 keeps all"""
    min_p: float = 0.0
    """keep tokens with at least min_p times the probability of the most probable one; 0 keeps all"""
    repetition_penalty: float = 1.0
    """> 1 discourages tokens of prompt and output; 1 is off"""
    presence_penalty: float = 0.0
    """> 0 discourages tokens of the output; 0 is off"""
    seed: int = 0
    """0 <= seed < 2**32; equal requests with equal seeds give equal tokens"""

    def __post_init__(self):
        def check(name: str, good: bool, allowed: str) -> None:
            if not good:
                raise ValueError(f"{name} must be {allowed}; got {getattr(self, name)!r}")

        for name in ("top_k", "seed"):
            value = getattr(self, name)
            check(name, isinstance(value, int | np.integer) and not isinstance(value, bool), "an integer")
        for field in dataclasses.fields(self):
            if field.name not in ("top_k", "seed"):
                value = getattr(self, field.name)
                number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
                check(field.name, number and math.isfinite(value), "a finite number")
        check("temperature", self.temperature >= 0, ">= 0")
        check("top_k", 0 <= self.top_k < 2**31, ">= 0 (0 keeps all tokens)")
        check("top_p", 0 <= self.top_p <= 1, "in [0, 1]")
        check("min_p", 0 <= self.min_p <= 1, "in [0, 1]")
        check("repetition_penalty", self.repetition_penalty > 0, "> 0")
        check("seed", 0 <= self.seed < 2**32, "in [0, 2**32)")


class Sampling(flax.struct.PyTreeNode):
    """`SamplingOptions` of a batch, one array entry per row; traced, so changing a value never recompiles."""

    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    min_p: Float[Array, "B"]
    repetition_penalty: Float[Array, "B"]
    presence_penalty: Float[Array, "B"]
    seed: UInt32[Array, "B"]

    @classmethod
    def stack(cls, rows: Sequence[SamplingOptions]) -> "Sampling":
        """The rows' options as arrays (float32, int32, uint32)."""
        dtypes = {"top_k": np.int32, "seed": np.uint32}
        columns = {
            f.name: np.array([getattr(row, f.name) for row in rows], dtypes.get(f.name, np.float32))
            for f in dataclasses.fields(SamplingOptions)
        }
        return cls(**jax.device_put(columns))


def _reach(distance: Float[Array, "B V"], weight: Array | int, target: Array) -> Float[Array, "B"]:
    """The smallest x >= 0 such that the tokens with distance <= x weigh at least `target` (inf if none).

    `distance` must not be negative: the bits of non-negative floats are ordered like the floats.
    """
    bits = jax.lax.bitcast_convert_type(distance, jnp.int32)

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        enough = jnp.sum(jnp.where(bits <= middle[:, None], weight, 0), axis=-1) >= target
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    zero = jnp.zeros(distance.shape[:1], jnp.int32)
    _, found = jax.lax.fori_loop(0, 31, halve, (zero, zero + _INF_BITS))
    return jax.lax.bitcast_convert_type(found, jnp.float32)


def _when(condition: Array, function, otherwise: Array, *args) -> Array:
    """`function(*args)` where any row asks for it, else `otherwise` without computing anything."""
    return jax.lax.cond(jnp.any(condition), function, lambda *_: otherwise, *args)


def penalise(logits: Float[Array, "B V"], sampling: Sampling, seen: UInt8[Array, "B V"]) -> Float[Array, "B V"]:
    """Logits after repetition and presence penalty; `seen` holds the bits IN_PROMPT and IN_OUTPUT."""
    repetition = sampling.repetition_penalty[:, None]
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    # Rows with penalty 1 and 0 come out bit for bit: x / 1, x * 1 and x - 0 are exact.
    logits = jnp.where(seen > 0, repeated, logits)
    return logits - jnp.where(seen & IN_OUTPUT > 0, sampling.presence_penalty[:, None], 0.0)


def filter_limit(distance: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B"]:
    """Which tokens top-k, top-p and min-p keep: those with `distance <= limit` (inf keeps all).

    `distance` is (largest logit - logit) / temperature, so exp(-distance) is a token's probability relative
    to the most probable one. The most probable token (distance 0) always survives.
    """
    V = distance.shape[-1]
    infinity = jnp.full(distance.shape[:1], jnp.inf)
    uses_top_k = (sampling.top_k > 0) & (sampling.top_k < V)
    uses_top_p = sampling.top_p < 1

    def top_k():
        limit = _reach(distance, 1, sampling.top_k)
        return jnp.where(uses_top_k, limit, jnp.inf)

    limit = _when(uses_top_k, top_k, infinity)

    def top_p(limit):
        mass = jnp.where(distance <= limit[:, None], jnp.exp(-distance), 0.0)
        reached = _reach(distance, mass, sampling.top_p * jnp.sum(mass, axis=-1))
        return jnp.where(uses_top_p, jnp.minimum(limit, reached), limit)

    limit = _when(uses_top_p, top_p, limit, limit)
    return jnp.minimum(limit, -jnp.log(sampling.min_p))  # -log(0) = inf


def _gumbel(seed: UInt32[Array, "B"], position: Int[Array, "B"], V: int) -> Float[Array, "B V"]:
    def row(seed, position):
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), (V,), jnp.float32)

    return jax.vmap(row)(seed, position)


def _draw(logits: Float[Array, "B V"], sampling: Sampling, position: Int[Array, "B"]) -> Int[Array, "B"]:
    """Gumbel-argmax over the tokens that the filters keep; exact for any temperature > 0, however small."""
    temperature = jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)[:, None]
    # Subtracting first keeps a tiny temperature from overflowing: the best token is at 0.
    distance = (jnp.max(logits, axis=-1, keepdims=True) - logits) / temperature
    limit = filter_limit(distance, sampling)
    noisy = _gumbel(sampling.seed, position, logits.shape[-1]) - distance
    return jnp.argmax(jnp.where(distance <= limit[:, None], noisy, -jnp.inf), axis=-1).astype(jnp.int32)


def sample(
    logits: Float[Array, "B V"],
    sampling: Sampling,
    *,
    position: Int[Array, "B"],
    seen: UInt8[Array, "B V"] | None = None,
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Chooses the next token of each row; returns (int32 token, float32 log-probability under `logits`).

    `position` is where in its sequence the token will stand; with the row's seed it determines the noise, so
    a sequence cut anywhere and continued with the same seed goes on as it would have.
    `seen` marks the tokens of prompt (bit IN_PROMPT) and output (bit IN_OUTPUT); without it the caller
    vouches that no row uses a penalty. Ties of greedy rows go to the lowest token id.
    """
    logits = logits.astype(jnp.float32)
    chosen = logits
    if seen is not None:
        penalises = (sampling.repetition_penalty != 1) | (sampling.presence_penalty != 0)
        chosen = _when(penalises, lambda: penalise(logits, sampling, seen), logits)
    greedy = jnp.argmax(chosen, axis=-1).astype(jnp.int32)
    draws = sampling.temperature > 0
    drawn = _when(draws, lambda: _draw(chosen, sampling, position), greedy)
    token = jnp.where(draws, drawn, greedy)
    return token, token_logprob(logits, token)


def token_logprob(logits: Float[Array, "*B V"], token: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """log_softmax(logits)[token] without materialising the other log-probabilities."""
    picked = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    return picked - jax.nn.logsumexp(logits, axis=-1)


class Top(flax.struct.PyTreeNode):
    """The k most probable tokens, most probable first, ties in the order of their ids."""

    tokens: Int[Array, "*B k"]
    logprobs: Float[Array, "*B k"]


def most_probable(logits: Float[Array, "*B V"], k: int) -> Top:
    """Tokens with the k largest logits and their log-probabilities; k is static."""
    logits = logits.astype(jnp.float32)
    values, tokens = jax.lax.top_k(logits, k)
    return Top(tokens, values - jax.nn.logsumexp(logits, axis=-1, keepdims=True))


def mark_seen(
    seen: UInt8[Array, "B V"], token: Int[Array, "B T"], bit: int, valid: Bool[Array, "B T"]
) -> UInt8[Array, "B V"]:
    """Sets `bit` for each row's valid tokens."""
    rows = jnp.arange(seen.shape[0])[:, None]
    outside = jnp.where(valid, token, seen.shape[1])  # out of range is dropped
    # `max` would lose the other bit, `add` would count twice: read, or, write. Duplicates write equal values.
    return seen.at[rows, outside].set(seen.at[rows, outside].get(mode="fill", fill_value=0) | bit, mode="drop")
