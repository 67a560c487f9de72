"""Block diffusion: corrupt and bound for training and scoring, denoise and commit for decoding.

`corruption`   which tokens are masked, at which level
`patterns`     attention patterns, the states that predict masked tokens, the head on gathered positions only
`bound`        unbiased likelihood bound, exact bound by enumeration, exact autoregressive likelihood
`generation`   pure steps: prefill, guess, reveal, denoise, commit, one compiled block
`stream`       the driver: requests laid out in blocks, rows started and advanced, `generate`
"""

from jaxmodels.decoding.block_diffusion.bound import Score, ar_nll, exact_nelbo, nelbo
from jaxmodels.decoding.block_diffusion.corruption import (
    Corruption,
    complement,
    sample_block_mask,
    sample_uniform_mask,
    sample_uniform_subset,
)
from jaxmodels.decoding.block_diffusion.generation import BlockDecoding, BlockSteps, RevealOptions, RowOptions
from jaxmodels.decoding.block_diffusion.patterns import Pattern, gathered_nll, predict
from jaxmodels.decoding.block_diffusion.stream import BlockStream, Generated, Stats, generate, plan_request

__all__ = [
    "BlockDecoding",
    "BlockSteps",
    "BlockStream",
    "Corruption",
    "Generated",
    "Pattern",
    "RevealOptions",
    "RowOptions",
    "Score",
    "Stats",
    "ar_nll",
    "complement",
    "exact_nelbo",
    "gathered_nll",
    "generate",
    "nelbo",
    "plan_request",
    "predict",
    "sample_block_mask",
    "sample_uniform_mask",
    "sample_uniform_subset",
]
