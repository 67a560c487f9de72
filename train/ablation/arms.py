"""The arms: the default conversion, and conversions that differ from it in one choice. Imports nothing heavy."""

import dataclasses
from typing import Literal

from train.objectives.config import DiffusionObjective

BLOCK = 16
"""Training block of the default arm."""
BLOCKS = (4, 8, 16, 32)
"""Training blocks that are compared, and blocks that every arm's bound is evaluated on."""
SHARE = 0.2
"""Steps of a conversion, as a part of the steps of the autoregressive training."""


@dataclasses.dataclass(frozen=True)
class Decode:
    """One way in which an arm's completions are made."""

    block: int
    prompt_attention: Literal["block_causal", "bidirectional"] = "block_causal"

    @property
    def name(self) -> str:
        return f"{self.block}" + ("-bidirectional" if self.prompt_attention == "bidirectional" else "")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One kind of conversion; everything that is not named here is equal in all arms.

    Attributes:
        name: also of its files.
        objective: what it is trained on.
        share: its steps as a part of the autoregressive steps.
        from_scratch: starts from random weights instead of the autoregressive model.
        lora_rank: rank of the trained updates; 0: all weights are trained.
        decodes: completions to make.
    """

    name: str
    objective: DiffusionObjective
    share: float = SHARE
    from_scratch: bool = False
    lora_rank: int = 0
    decodes: tuple[Decode, ...] = ()

    @property
    def own_block(self) -> int | None:
        """Block of its training; None: whole rows."""
        return self.objective.block_size if self.objective.in_blocks else None


DEFAULT = "default"


def _objective(**changes) -> DiffusionObjective:
    return DiffusionObjective(**({"block_size": BLOCK, "half_life_ratio": 0.1} | changes))


def _ratio(name: str) -> Arm:
    return Arm(f"lambda-{name}", _objective(half_life_ratio=float(name)), decodes=(Decode(BLOCK),))


def _block(size: int, *decodes: int) -> Arm:
    return Arm(f"block-{size}", _objective(block_size=size), decodes=tuple(map(Decode, decodes)))


ARMS = (
    Arm(DEFAULT, _objective(), decodes=(*map(Decode, BLOCKS), Decode(BLOCK, "bidirectional"))),
    Arm("noisy-context", _objective(pattern="block_causal")),
    Arm("bidirectional", _objective(pattern="bidirectional")),
    Arm("scratch", _objective(), from_scratch=True),
    Arm("steps-half", _objective(), share=SHARE / 2),
    _block(4, 4, 32),
    _block(32, 4, 32),
    _ratio("inf"),
    _ratio("0"),
    _ratio("0.25"),
    _ratio("0.05"),
    Arm("shift", _objective(token_shift=True), decodes=(Decode(BLOCK),)),
    _block(8, 8, 32),
    Arm("lora-64", _objective(), lora_rank=64),
    Arm("lora-16", _objective(), lora_rank=16),
    Arm("steps-double", _objective(), share=2 * SHARE),
)
"""In the order in which they are run: what is asked most comes first."""
