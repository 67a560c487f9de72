"""Recipe `quickstart`: the whole chain at toy size, on two CPU cores in a few minutes."""

import dataclasses
from pathlib import Path
from typing import Literal

from train.machine import command_line
from train.recipes import demo
from train.recipes.demo import DemoConfig, DistillConfig, StageConfig


@dataclasses.dataclass(frozen=True)
class Quickstart(DemoConfig):
    """The whole chain, small: corpus, tokeniser, AR training, conversion to block diffusion, evaluation.

    python -m train quickstart

    The text is the running Python's own standard library. The same command continues after an interruption.
    Models of this size show the mechanics; they write no useful code.
    """

    directory: Path = Path("runs/quickstart")
    store: Path | None = None
    vocab_size: int = 512
    dim: int = 128
    layers: int = 3
    heads: int = 2
    kv_heads: int = 1
    mlp_dim: int = 256
    seq_len: int = 128
    block_size: int = 8
    half_life_ratio: float = 0.1
    input_dropout: float = 0.0
    cuts: int = 1
    ar: StageConfig = dataclasses.field(default_factory=lambda: StageConfig(500, 16, 3e-3, 50))
    dlm: StageConfig = dataclasses.field(default_factory=lambda: StageConfig(350, 16, 2e-3, 40))
    distill: DistillConfig = dataclasses.field(
        default_factory=lambda: DistillConfig(
            512, StageConfig(100, 16, 5e-4, 10), rounds=0, shortest_prompt=32, longest_prompt=64, new_tokens=64
        )
    )
    completions: int = 24
    seed: int = 0
    until: Literal["store", "ar", "dlm", "distilled", "evaluation"] = "evaluation"
    measure: bool = False
    eval_rows: int = 128


def main(config: Quickstart) -> int:
    """Runs the recipe; 0 when all stages are done, 1 when interrupted."""
    return demo.run(config, command_line())
