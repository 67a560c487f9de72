"""How ParoQuant optimises a block. Imports nothing heavy."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ParoquantConfig:
    """How a block is optimised; defaults are those of the release (ParoQuant, arXiv 2511.10645)."""

    group_size: int = 128
    """Input channels that share a grid and rotate among themselves."""
    num_rotations: int = 8
    """Rotations of each channel, one after the other."""
    epochs: tuple[int, int] = (5, 5)
    """Passes over the samples in the first and the second stage."""
    batch_size: int = 16
    """Samples of a step."""
    rotation_rate: float = 0.05
    """Learning rate of scales and angles (first stage)."""
    weight_rate: float = 1e-5
    """Learning rate of weights (second stage)."""
    grid_rate: float = 1e-6
    """Learning rate of the grids' scales and offsets (second stage)."""
    seed: int = 0
    """Of pairs (plus the index of the block) and of the order of samples."""
    reference_range: bool = False
    """Ranges of weights as the original has them, which need not hold 0."""

    def __post_init__(self):
        if min(self.epochs) < 0:
            raise ValueError(f"epochs must not be negative; got {self.epochs}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be positive; got {self.batch_size}")
        for name in ("rotation_rate", "weight_rate", "grid_rate"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative; got {getattr(self, name)}")
