"""Choosing the confidence threshold: the fastest one whose loss of quality is tolerated."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from jaxmodels.decoding.block_diffusion.stream import Generated

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


@dataclasses.dataclass(frozen=True)
class Trial:
    """One threshold on the validation prompts; None stands for one token per step.

    quality: mean score. loss: mean of (reference score - score), paired by prompt. loss_upper: upper end of its
    one-sided confidence interval. tokens_per_step: new tokens per denoising pass.
    """

    threshold: float | None
    quality: float
    loss: float
    loss_upper: float
    tokens_per_step: float


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The chosen threshold (None: no threshold was good enough, decode one token per step) and all trials."""

    threshold: float | None
    trials: tuple[Trial, ...]


def calibrate(
    run: Callable[[float | None], Sequence[Generated]],
    score: Callable[[int, Generated], float],
    *,
    tolerance: float,
    thresholds: Sequence[float] = THRESHOLDS,
    z: float = 1.645,
) -> Calibration:
    """Runs every threshold on the same prompts and picks the one with most tokens per step among the good ones.

    A threshold is good when the upper end of the one-sided interval of its mean loss against one token per step lies
    at or below `tolerance`, so a small validation set chooses carefully.

    Args:
        run: decodes all validation prompts at a threshold, None meaning one token per step.
        score: quality of the completion of prompt number i, higher is better.
        tolerance: mean loss of score that is accepted, in units of the score.
        thresholds: candidates in [0, 1].
        z: normal quantile of the interval; 1.645 is 95 % one-sided, 0 takes the mean itself.
    """
    if not tolerance >= 0.0:
        raise ValueError(f"tolerance must not be negative; got {tolerance}")
    if len(thresholds) == 0:
        raise ValueError("thresholds must not be empty")
    for threshold in thresholds:
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(f"thresholds must lie in [0, 1]; got {threshold}")

    def measure(threshold: float | None) -> tuple[np.ndarray, float]:
        results = run(threshold)
        if len(results) == 0:
            raise ValueError("calibration needs at least one validation prompt; got none")
        steps = sum(result.denoise_steps for result in results)
        tokens = sum(len(result.tokens) for result in results)
        return np.array([score(i, result) for i, result in enumerate(results)], float), tokens / max(steps, 1)

    reference, speed = measure(None)
    trials = [Trial(None, float(reference.mean()), 0.0, 0.0, speed)]
    best, fastest = None, speed
    for threshold in sorted(thresholds, reverse=True):
        scores, speed = measure(threshold)
        lost = reference - scores
        error = lost.std(ddof=1) / np.sqrt(len(lost)) if len(lost) > 1 else np.inf
        upper = float(lost.mean() + z * error) if z > 0 else float(lost.mean())
        trials.append(Trial(threshold, float(scores.mean()), float(lost.mean()), upper, speed))
        if upper <= tolerance and speed > fastest:
            best, fastest = threshold, speed
    return Calibration(best, tuple(trials))


def adaptive_block_length(batch: int, longest: int = 32) -> int:
    """A block length that suits the load: a block costs `batch * length` rows in every matrix product.

    Hopper GPUs read weights for free up to some 200 to 300 rows; beyond that long blocks cost compute. Powers of two
    with at most 256 rows, at least 8 tokens (beyond a batch of 32 one token at a time may be faster), at most
    `longest`.
    """
    if batch < 1 or longest < 1:
        raise ValueError(f"batch and longest must be at least 1; got {batch} and {longest}")
    length = longest
    while length > 8 and batch * length > 256:
        length //= 2
    return length
