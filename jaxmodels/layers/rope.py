"""Rotary position embeddings: plain, and the length extensions linear, dynamic NTK and YaRN."""

import dataclasses
import math
from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

RopeKind = Literal["default", "linear", "dynamic", "yarn"]

_YARN = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
_UNUSED = {  # fields that must keep their defaults, so that no option is ignored silently
    "default": ("factor", "original_max_positions", *_YARN),
    "linear": ("original_max_positions", *_YARN),
    "dynamic": _YARN,
    "yarn": (),
}


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """How positions become rotation angles; names follow `rope_parameters` of Hugging Face configurations.

    Attributes:
      theta: base of the frequencies `theta ** (-2 i / head_dim)`.
      kind: "default"; "linear" divides every frequency by `factor`; "dynamic" raises theta once a sequence is
        longer than `original_max_positions` (NTK); "yarn" interpolates the low frequencies only
        (arXiv 2309.00071).
      factor: how many times longer than trained.
      original_max_positions: trained length, of "dynamic" and "yarn". (Hugging Face's "dynamic" reads it from
        `max_position_embeddings`.)
      attention_factor: YaRN's factor on cosine and sine; None computes it from `factor` and the mscales.
      beta_fast, beta_slow: rotations over the trained length at which YaRN's ramp starts and ends.
      mscale, mscale_all_dim: coefficients of YaRN's attention factor, used if both are given and not zero.
      truncate: whether YaRN rounds the ends of its ramp outwards to whole dimensions.
    """

    theta: float = 10_000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_positions: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self):
        if self.kind not in get_args(RopeKind):
            raise ValueError(f"RoPE kind must be one of {get_args(RopeKind)}; got {self.kind!r}")
        if self.theta <= 1:
            raise ValueError(f"theta must exceed 1; got {self.theta}")
        if not (self.factor > 0 if self.kind == "yarn" else self.factor >= 1):  # some YaRN models shorten
            raise ValueError(f"factor of RoPE kind {self.kind!r} is out of range; got {self.factor}")
        if self.kind in ("dynamic", "yarn") and not self.original_max_positions:
            raise ValueError(f"RoPE kind {self.kind!r} needs original_max_positions; got {self.original_max_positions}")
        for field in dataclasses.fields(self):
            if field.name in _UNUSED[self.kind] and getattr(self, field.name) != field.default:
                raise ValueError(f"RoPE kind {self.kind!r} does not use {field.name}; got {getattr(self, field.name)}")
        if not self.beta_fast > self.beta_slow > 0:
            raise ValueError(f"need beta_fast > beta_slow > 0; got {self.beta_fast} and {self.beta_slow}")


def _trained_length(config: RopeConfig) -> int:
    assert config.original_max_positions is not None  # RopeConfig checks it for the kinds that need it
    return config.original_max_positions


def _inverse_frequencies(config: RopeConfig, head_dim: int) -> np.ndarray:
    """float64 `[H / 2]`; everything about the frequencies that does not depend on the sequence."""
    frequencies = config.theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if config.kind == "linear":
        return frequencies / config.factor
    if config.kind != "yarn":
        return frequencies

    def dimension(rotations: float) -> float:
        """The (fractional) dimension that turns `rotations` times over the trained length."""
        trained = _trained_length(config) / (rotations * 2 * math.pi)
        return head_dim * math.log(trained) / (2 * math.log(config.theta))

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 0.001), 0, 1)
    return frequencies / config.factor * ramp + frequencies * (1 - ramp)


def _attention_factor(config: RopeConfig) -> float:
    """YaRN's factor on cosine and sine, which scales the scores by its square; 1 for the other kinds."""
    if config.kind != "yarn":
        return 1.0
    if config.attention_factor is not None:
        return config.attention_factor

    def scale(coefficient: float) -> float:
        return 0.1 * coefficient * math.log(max(config.factor, 1.0)) + 1.0

    if config.mscale and config.mscale_all_dim:
        return scale(config.mscale) / scale(config.mscale_all_dim)
    return scale(1.0)


def rope_tables(
    config: RopeConfig,
    head_dim: int,
    positions: Int[Array, "B T"],
    lengths: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """Cosine and sine of the rotation angles, float32.

    The "dynamic" kind depends on the sequence length, which is the largest position of the row plus one.
    Keys that are already cached stay rotated as they were when they were written, as in transformers;
    unlike there, a row never depends on other rows of the batch. `lengths` (valid tokens per row) keeps
    padding out of that length.
    """
    frequencies = jnp.asarray(_inverse_frequencies(config, head_dim), jnp.float32)  # [H / 2]
    if config.kind == "dynamic":
        own = positions
        if lengths is not None:
            own = jnp.where(jnp.arange(positions.shape[1]) < lengths[:, None], positions, 0)
        trained = _trained_length(config)
        length = jnp.maximum(jnp.max(own, axis=1) + 1, trained).astype(jnp.float32)  # [B]
        # theta grows by stretch ** (H / (H - 2)), so frequency i shrinks by stretch ** (-2 i / (H - 2)).
        stretch = config.factor * length / trained - (config.factor - 1)
        exponent = jnp.asarray(-np.arange(0, head_dim, 2) / (head_dim - 2), jnp.float32)
        frequencies = frequencies * stretch[:, None, None] ** exponent  # [B, 1, H / 2]
    angles = positions[..., None].astype(jnp.float32) * frequencies
    factor = _attention_factor(config)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor
