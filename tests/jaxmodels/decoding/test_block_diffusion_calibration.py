import numpy as np
import pytest

from jaxmodels.decoding.block_diffusion.calibration import adaptive_block_length, calibrate
from jaxmodels.decoding.block_diffusion.presets import PRESETS
from jaxmodels.decoding.block_diffusion.stream import Generated
from train.objectives.config import DiffusionObjective


def completions(steps: int, count: int = 50) -> list[Generated]:
    return [Generated([0] * 10, [], [], [], [], denoise_steps=steps) for _ in range(count)]


# threshold -> (passes per completion, mean loss of score)
BEHAVIOUR = {None: (10, 0.0), 0.95: (6, 0.0), 0.9: (5, 0.01), 0.7: (3, 0.02), 0.5: (2, 0.3)}


def run(threshold):
    return completions(BEHAVIOUR[threshold][0])


def score_with(noise):
    """The loss of the threshold that produced a completion, told by its passes."""
    losses = dict(BEHAVIOUR.values())

    def score(i, result):
        return 1.0 - losses[result.denoise_steps] - (noise[i] if result.denoise_steps < 10 else 0.0)

    return score


def test_fastest_threshold_within_the_tolerance():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=50)
    noise = 0.01 * (noise - noise.mean()) / noise.std(ddof=1)  # standard error 0.0014
    score = score_with(noise)
    options = {"thresholds": (0.5, 0.7, 0.9, 0.95)}
    assert calibrate(run, score, tolerance=0.025, **options).threshold == 0.7
    assert calibrate(run, score, tolerance=0.0201, **options).threshold == 0.9  # 0.02 plus the interval is too much
    assert calibrate(run, score, tolerance=0.0201, z=0.0, **options).threshold == 0.7
    assert calibrate(run, score, tolerance=0.0, **options).threshold is None
    assert calibrate(run, score, tolerance=1.0, **options).threshold == 0.5
    trials = calibrate(run, score, tolerance=0.025, **options).trials
    assert [trial.threshold for trial in trials] == [None, 0.95, 0.9, 0.7, 0.5]
    np.testing.assert_allclose([trial.loss for trial in trials], [0, 0, 0.01, 0.02, 0.3], atol=1e-12)
    np.testing.assert_allclose(trials[3].loss_upper, 0.02 + 1.645 * 0.01 / np.sqrt(50), rtol=1e-6)
    np.testing.assert_allclose([trial.tokens_per_step for trial in trials], [1, 10 / 6, 2, 10 / 3, 5])


def test_bad_calibrations():
    score = score_with(np.zeros(50))
    with pytest.raises(ValueError, match=r"tolerance must not be negative; got -1.0"):
        calibrate(run, score, tolerance=-1.0)
    with pytest.raises(ValueError, match=r"thresholds must lie in \[0, 1\]; got 1.5"):
        calibrate(run, score, tolerance=0.1, thresholds=(0.9, 1.5))
    with pytest.raises(ValueError, match="thresholds must not be empty"):
        calibrate(run, score, tolerance=0.1, thresholds=())
    with pytest.raises(ValueError, match="at least one validation prompt"):
        calibrate(lambda threshold: [], score, tolerance=0.1)


def test_block_length_follows_the_load():
    assert [adaptive_block_length(batch) for batch in (1, 4, 8, 16, 32, 64)] == [32, 32, 32, 16, 8, 8]
    assert adaptive_block_length(1, longest=16) == 16
    with pytest.raises(ValueError, match="at least 1; got 0"):
        adaptive_block_length(0)


def test_presets_describe_objectives_that_exist():
    for name, preset in PRESETS.items():
        in_blocks = preset.pattern == "block_diffusion"
        DiffusionObjective(
            pattern=preset.pattern,
            block_size=preset.train_block or 32,
            masking="uniform" if preset.half_life_ratio is None else "position",
            token_shift=preset.token_shift,
            complementary=preset.complementary,
            joint_weight=preset.joint_weight,
        )
        assert in_blocks or preset.train_block is None, name
    released = [PRESETS[f"efficient_dlm_{size}"] for size in ("1_5b", "4b", "8b")]
    sizes = [(p.train_block, p.eval_block, p.tokens) for p in released]
    assert sizes == [
        (16, 16, 3e11),
        (64, 32, 3e11),
        (64, 32, 5e11),
    ]
    assert {p.half_life_ratio for p in released} == {0.1}
