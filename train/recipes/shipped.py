"""Recipe `shipped`: trains the two models that the project ships."""

import dataclasses
from pathlib import Path
from typing import Literal

from train.machine import command_line
from train.recipes import demo
from train.recipes.demo import DemoConfig, DistillConfig, StageConfig


@dataclasses.dataclass(frozen=True)
class Shipped(DemoConfig):
    """Train the shipped models: 3.8 M parameters, one AR and one block-diffusion model, 8 MB each.

    python -m train shipped

    The corpus is the standard library of Python 3.12.1; under another Python the command warns. To train on
    another machine, make the rows first (`--until store`), carry the store there, and give it with `--store`.
    """

    directory: Path = Path("runs/shipped")
    store: Path | None = None
    vocab_size: int = 1024
    dim: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    mlp_dim: int = 512
    seq_len: int = 512
    block_size: int = 16
    half_life_ratio: float = 0.1
    input_dropout: float = 0.15
    cuts: int = 8
    ar: StageConfig = dataclasses.field(
        default_factory=lambda: StageConfig(2500, 64, 2e-3, 200, weight_decay=0.3, eval_every=250)
    )
    dlm: StageConfig = dataclasses.field(
        default_factory=lambda: StageConfig(5000, 64, 1e-3, 200, weight_decay=0.3, eval_every=500)
    )
    distill: DistillConfig = dataclasses.field(
        default_factory=lambda: DistillConfig(98_304, StageConfig(2000, 64, 5e-4, 100, weight_decay=0.1))
    )
    completions: int = 128
    seed: int = 0
    until: Literal["store", "ar", "dlm", "distilled", "evaluation"] = "evaluation"
    measure: bool = False
    eval_rows: int = 1024


def main(config: Shipped) -> int:
    """Runs the recipe; 0 when all stages are done, 1 when interrupted."""
    return demo.run(config, command_line())
