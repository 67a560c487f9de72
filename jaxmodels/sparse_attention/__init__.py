"""Skip-softmax attention (BLASST) for whole models: settings, checkpoint configuration, calibration."""

from jaxmodels.sparse_attention.calibration import (
    SkipCounts,
    SkipMeasure,
    fit_inverse_length,
    fit_threshold_scale,
    measure_decode_sparsity,
    measure_sparsity,
)
from jaxmodels.sparse_attention.config import Phase, ScaleFit, SkipSoftmaxConfig
from jaxmodels.sparse_attention.options import SkipAttention

__all__ = [
    "Phase",
    "ScaleFit",
    "SkipAttention",
    "SkipCounts",
    "SkipMeasure",
    "SkipSoftmaxConfig",
    "fit_inverse_length",
    "fit_threshold_scale",
    "measure_decode_sparsity",
    "measure_sparsity",
]
