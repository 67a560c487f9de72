"""Options that every recipe shares, as frozen dataclasses; each field is a flag. Imports nothing heavy."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from jaxmodels.command_line import to_json as to_json  # recipes take it from here with their options


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with a learning-rate schedule and clipping."""

    learning_rate: float = 3e-4
    """Peak learning rate."""
    schedule: Literal["constant", "cosine", "wsd"] = "cosine"
    """After the warm-up: constant; cosine down to the final rate; or constant, then linear down over the
    last `decay_fraction` of the run (wsd)."""
    warmup_steps: int = 0
    """Updates over which the rate rises linearly to its peak."""
    final_learning_rate: float | None = None
    """Rate at the end of cosine and wsd; None: a tenth of the peak."""
    decay_fraction: float = 0.2
    """wsd only: part of the run in which the rate falls."""
    weight_decay: float = 0.1
    """Decoupled weight decay; norms and biases are exempt."""
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip_norm: float | None = 1.0
    """Largest global gradient norm; None: no clipping."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the first moment; bfloat16 saves 2 bytes per parameter."""

    def __post_init__(self):
        _positive(self, "learning_rate", "epsilon")
        _not_negative(self, "warmup_steps", "weight_decay")
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must lie in [0, 1); got {getattr(self, name)}")
        if not 0.0 < self.decay_fraction <= 1.0:
            raise ValueError(f"decay_fraction must lie in (0, 1]; got {self.decay_fraction}")
        if self.clip_norm is not None and not self.clip_norm > 0.0:
            raise ValueError(f"clip_norm must be positive or None; got {self.clip_norm}")
        if self.final_learning_rate is not None and not 0.0 <= self.final_learning_rate <= self.learning_rate:
            raise ValueError(
                f"final_learning_rate must lie in [0, learning_rate={self.learning_rate}]; "
                f"got {self.final_learning_rate}"
            )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices are arranged; the product of the three axes is the number of devices of all hosts."""

    data: int | None = None
    """Copies of the model, each with its own rows; None: all devices that fsdp and tensor leave over."""
    fsdp: int = 1
    """Devices over which every copy's parameters and optimiser state are spread, each with its own rows."""
    tensor: int = 1
    """Devices that share the heads, the mlp and the vocabulary of the same rows."""

    def __post_init__(self):
        for name in ("data", "fsdp", "tensor"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"mesh.{name} must be at least 1; got {size}")


@dataclasses.dataclass(frozen=True)
class HostsConfig:
    """Several processes, one per host or per GPU. Under SLURM nothing need be given."""

    coordinator: str | None = None
    """host:port of process 0."""
    num_processes: int | None = None
    process_id: int | None = None

    def __post_init__(self):
        given = [getattr(self, f.name) is not None for f in dataclasses.fields(self)]
        if any(given) and not all(given):
            raise ValueError(
                "coordinator, num_processes and process_id belong together; got "
                f"{self.coordinator!r}, {self.num_processes!r}, {self.process_id!r}"
            )
        if all(given) and not 0 <= self.process_id < self.num_processes:  # type: ignore[operator]
            raise ValueError(f"process_id must lie in [0, num_processes={self.num_processes}); got {self.process_id}")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Length of the run, and what it writes where."""

    directory: Path = Path("runs/default")
    """Everything of this run: config.json, metrics.jsonl, checkpoints/, tb/, profile/. The same command
    with the same directory continues the run from its latest checkpoint."""
    steps: int = 1000
    """Updates in total, those before a restart included."""
    batch_size: int = 32
    """Rows per update, over all hosts."""
    accumulate: int = 1
    """Parts into which each batch is cut; one is in memory at a time."""
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of forward and backward pass; parameters and their update stay float32. None: bfloat16 on a GPU,
    float32 on a CPU."""
    seed: int = 0
    log_every: int = 10
    """Steps between two lines of metrics."""
    eval_every: int = 0
    """Steps between two evaluations on held-out data; 0: only at the end."""
    eval_batches: int = 50
    """Held-out batches per evaluation at most."""
    checkpoint_every: int = 500
    """Steps between two checkpoints; one is also written at the end and when the run is interrupted."""
    keep: int = 2
    """Checkpoints kept."""
    max_rejected: int = 10
    """Non-finite steps in a row that end the run; fewer are skipped and counted."""
    tensorboard: bool = False
    """Also write TensorBoard event files to tb/."""
    profile: str | None = None
    """START:COUNT records a profiler trace of COUNT steps from step START into profile/."""

    def __post_init__(self):
        _positive(self, "steps", "batch_size", "accumulate", "log_every", "checkpoint_every")
        _positive(self, "keep", "max_rejected", "eval_batches")
        _not_negative(self, "eval_every", "seed")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate must divide batch_size={self.batch_size}; got accumulate={self.accumulate}")
        self.profile_range  # noqa: B018 (checks the format)

    @property
    def profile_range(self) -> tuple[int, int] | None:
        """(first step, number of steps) of `profile`."""
        if self.profile is None:
            return None
        start, _, count = self.profile.partition(":")
        if not (start.isdecimal() and count.isdecimal() and int(count) > 0):
            raise ValueError(f"profile must be START:COUNT with COUNT > 0, such as 10:3; got {self.profile!r}")
        return int(start), int(count)


def _positive(config: Any, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} must be positive; got {getattr(config, name)}")


def _not_negative(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 0:
            raise ValueError(f"{name} must not be negative; got {getattr(config, name)}")
