"""What one rotation consists of."""

from typing import Any, NamedTuple


class Turn(NamedTuple):
    """Channel scales and rotation of one linear's inputs, or of a stack of them with the index of one."""

    theta: Any  # floating [R, I / 2], or [L, R, I / 2]; None, as `pairs`: no rotation
    pairs: Any  # integer [R, I], or [L, R, I]
    channel_scales: Any = None  # floating [I], or [L, I]; None: 1
    layer: Any = None  # int32 [], of a stack; None: no stack

    @property
    def steps(self) -> int:
        """R."""
        return 0 if self.pairs is None else self.pairs.shape[-2]
