"""Options of the block-diffusion objective; imports nothing heavy."""

import dataclasses
from typing import Literal

PatternName = Literal["block_diffusion", "block_causal", "bidirectional", "prefix_bidirectional", "autoregressive"]


@dataclasses.dataclass(frozen=True)
class DiffusionObjective:
    """What a block-diffusion model is trained on. The defaults are those of Efficient-DLM."""

    pattern: PatternName = "block_diffusion"
    """Who sees whom; the default gives noisy blocks a clean context, the others are for comparison."""
    block_size: int = 32
    """Tokens that are denoised together; not used by patterns without blocks."""
    masking: Literal["position", "uniform", "uniform_block"] = "position"
    """position: exactly round(t n) tokens per block, later ones more often. uniform: each token with probability t,
    one t per document. uniform_block: the same with one t per block."""
    half_life_ratio: float = 0.1
    """Part of a block over which the chance of being masked doubles at low noise; inf: no preference."""
    weighting: Literal["level", "inclusion", "none"] = "level"
    """Weight of a masked token: level: 1/t. inclusion: 1/P(its offset in the block is masked), which gives all
    positions equal weight in expectation. none: 1."""
    normalization: Literal["tokens", "masked", "supervised"] = "tokens"
    """What the weighted sum is divided by: all tokens; the masked ones, as in the released training code; or those
    that the data marks as targets."""
    token_shift: bool = False
    """Keep the autoregressive alignment: the state before a token predicts it."""
    shift_context: Literal["noisy", "clean"] = "noisy"
    """With token_shift: which half predicts the first token of a block; clean is what decoding does."""
    complementary: bool = False
    """Train every row twice, with a mask and with its complement."""
    random_length_prob: float = 0.0
    """Chance that a step uses a random block size of 4, 8, ... 28 tokens."""
    joint_weight: float | None = None
    """Add the autoregressive loss, read off a causal clean half, and weigh the diffusion loss by this (0.3)."""
    prefix_len: int | None = None
    """Tokens of the bidirectional prefix, never masked; pattern prefix_bidirectional only."""
    suppress: bool = True
    """Leave mask and padding token out of the softmax, as decoding does; the released training code keeps them in."""

    def __post_init__(self):
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1; got {self.block_size}")
        if not self.half_life_ratio >= 0.0:
            raise ValueError(f"half_life_ratio must lie in [0, inf]; got {self.half_life_ratio}")
        if not 0.0 <= self.random_length_prob <= 1.0:
            raise ValueError(f"random_length_prob must lie in [0, 1]; got {self.random_length_prob}")
        if self.joint_weight is not None and not self.joint_weight > 0.0:
            raise ValueError(f"joint_weight must be positive or None; got {self.joint_weight}")
        if (self.prefix_len is not None) != (self.pattern == "prefix_bidirectional"):
            raise ValueError(
                f"prefix_len belongs to pattern prefix_bidirectional; got {self.prefix_len} with {self.pattern}"
            )
        if not self.in_blocks and self.random_length_prob > 0:
            raise ValueError(f"random_length_prob needs a pattern with blocks; got {self.pattern}")
        if self.joint_weight is not None and self.pattern != "block_diffusion":
            raise ValueError(f"joint_weight needs pattern block_diffusion; got {self.pattern}")
        if self.shift_context == "clean" and not (self.token_shift and self.pattern == "block_diffusion"):
            raise ValueError("shift_context clean needs token_shift and pattern block_diffusion")
        if self.weighting == "inclusion" and not (self.masking == "position" and self.in_blocks):
            raise ValueError(
                f"weighting inclusion needs masking position in blocks; got {self.masking} and {self.pattern}"
            )
        if self.pattern == "autoregressive" and (self.token_shift or self.complementary):
            raise ValueError("pattern autoregressive masks nothing: token_shift and complementary do not apply")

    @property
    def in_blocks(self) -> bool:
        return self.pattern in ("block_diffusion", "block_causal")
