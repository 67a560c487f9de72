"""The decoders behind `TextEngine`: they own the device state of a batch of slots and know nothing of
text.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from infer.text.events import Chunk, Job


class Decoder(Protocol):
    """What the engine asks of a decoder. Calls only dispatch: the engine fetches a chunk's arrays later."""

    batch: int
    """number of slots"""
    capacity: int
    """tokens that fit in a slot"""
    prefill_rows: int
    """most rows that one call of `start` takes"""

    def check(self, job: Job) -> None:
        """Raises ValueError, naming argument and value, if the job can not be run."""

    def start(self, rows: Sequence[int], jobs: Sequence[Job]) -> Chunk:
        """Prefills the jobs' prompts into slots `rows` (whatever ran there is forgotten); the first tokens,
        if any.
        """

    def advance(self, active: np.ndarray) -> Chunk:
        """Runs all slots for one chunk; rows where bool [batch] `active` is False do no work from here on."""
