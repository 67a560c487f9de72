"""`python -m train RECIPE [--config file.toml] [--flags]`. Exit codes: 0 done, 1 failed or interrupted, 2 usage."""

import sys

from jaxmodels.command_line import Command, CommandLine

LINE = CommandLine(
    program="python -m train",
    kind="recipe",
    commands=(
        Command("lm", "train.recipes.lm", "LM", "train or fine-tune an autoregressive language model on text"),
        Command("dlm", "train.recipes.dlm", "DLM", "turn an autoregressive language model into a block-diffusion one"),
        Command("quickstart", "train.recipes.quickstart", "Quickstart", "the whole chain, small, on a CPU in minutes"),
        Command("ablation", "train.recipes.ablation", "Ablation", "which choices of the conversion matter, over seeds"),
        Command(
            "retrieval",
            "train.recipes.retrieval",
            "Retrieval",
            "does a small model that skips tiles of attention still find what it is asked for",
        ),
        Command("blocks", "train.recipes.blocks", "Blocks", "do small blocks of block-routed attention find more"),
        Command(
            "quantize", "train.recipes.quantize", "Quantize", "round a model's weights to int4, int8, fp8 or nvfp4"
        ),
        Command("paroquant", "train.recipes.paroquant", "Paroquant", "quantize a model to INT4 with rotations"),
        Command("shipped", "train.recipes.shipped", "Shipped", "train the models that the project ships"),
    ),
    notes=("The same command continues an interrupted run.",),
    interrupted="stopped at once; the last checkpoint is intact",
)
main = LINE.main

if __name__ == "__main__":
    sys.exit(main())
