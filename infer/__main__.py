"""`python -m infer TASK [--flags]`. Exit codes: 0 done, 1 failed or interrupted, 2 usage."""

import sys

from jaxmodels.command_line import Command, CommandLine

LINE = CommandLine(
    program="python -m infer",
    kind="task",
    commands=(
        Command(
            "quickstart",
            "infer.quickstart",
            "Quickstart",
            "watch the shipped models complete real code, and what block diffusion gains and costs",
        ),
        Command("text", "infer.text.cli", "Text", "complete prompts with a language model, one or many"),
        Command(
            "calibrate-sparsity",
            "infer.calibrate_sparsity",
            "CalibrateSparsity",
            "measure skip-softmax thresholds for a model and store them in its config.json",
        ),
        Command(
            "calibrate-threshold",
            "infer.text.calibrate",
            "CalibrateThreshold",
            "choose the confidence threshold of a block-diffusion model for a tolerated loss",
        ),
        Command("env", "infer.env", "Env", "show versions, devices, and which kernels are active"),
        Command(
            "completions",
            "infer.evaluation.completions",
            "Completions",
            "judge an AR and a block-diffusion model on completions of held-out Python code",
        ),
    ),
)
main = LINE.main

if __name__ == "__main__":
    sys.exit(main())
