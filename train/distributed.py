"""Several processes: joining them, and the few things they must agree on outside of compiled code."""

import os
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from train.config import HostsConfig

__all__ = ["any_process", "initialize", "is_main", "on_main"]


def initialize(config: HostsConfig) -> None:
    """Joins the processes of a run; call it before anything touches a device. One process: does nothing.

    With `coordinator` as given; else under SLURM (srun with more than one task) as JAX detects it.
    """
    if config.coordinator is not None:
        jax.distributed.initialize(config.coordinator, config.num_processes, config.process_id)
    elif int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ:
        jax.distributed.initialize()


def is_main() -> bool:
    """Whether this process writes logs and reports; all processes take part in checkpoints."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Whether `flag` is true on any process. Every process must call it at the same point."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def on_main(action: Callable[[], object]) -> None:
    """Runs `action` on process 0 while the others wait. If it fails, all processes end with an error."""
    error = None
    if is_main():
        try:
            action()
        except Exception as caught:
            error = caught
    if any_process(error is not None):
        raise error or RuntimeError("process 0 has failed; its output says why")
