"""The optimiser and its schedule, from optax."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from train.config import OptimConfig

__all__ = ["decay_mask", "make_optimizer", "make_schedule"]


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate of update n = 0 ... steps - 1: linear warm-up, then `config.schedule`.

    Update 0 already has a rate above 0, peak / (warmup_steps + 1); update `warmup_steps` has the peak.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    if warmup >= steps:
        raise ValueError(f"warmup_steps must be smaller than the {steps} steps of the run; got {warmup}")
    final = peak / 10 if config.final_learning_rate is None else config.final_learning_rate
    rest = steps - warmup
    if config.schedule == "constant":
        main = optax.constant_schedule(peak)
    elif config.schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, max(1, rest - 1), alpha=final / peak)
    else:
        decay = min(rest, max(1, round(config.decay_fraction * steps)))
        main = optax.join_schedules(
            [optax.constant_schedule(peak), optax.linear_schedule(peak, final, max(1, decay - 1))],
            [rest - decay],
        )
    if warmup == 0:
        return main
    return optax.join_schedules([optax.linear_schedule(peak / (warmup + 1), peak, warmup), main], [warmup])


def decay_mask(params: Any) -> Any:
    """True where weight decay applies: every parameter but norms and biases, told by their names.

    Names, not ranks: layers are stacked, so a norm's scale [L, D] has two dimensions like a matrix.
    """

    def decays(path: tuple, _: Any) -> bool:
        name = str(getattr(path[-1], "key", path[-1])) if path else ""
        return not ("norm" in name or "bias" in name)

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(config: OptimConfig, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Clipping and AdamW as one transformation, and the schedule it follows."""
    schedule = make_schedule(config, steps)
    adamw = optax.adamw(
        schedule,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decay_mask,
        mu_dtype=jnp.dtype(config.moment_dtype),
    )
    if config.clip_norm is None:
        return adamw, schedule
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw), schedule
