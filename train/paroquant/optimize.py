"""The two stages of one decoder block: first scales and angles, then the weights and their grids.

The loss is that of the block's output, so that errors of its linears may cancel. Memory is that of one block.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from pallas_kernels.quantized_matmul.grid import Grid, codes_of, grid_of, quantize
from pallas_kernels.rotation import pairwise_rotation
from train.paroquant.pairs import Pairs, select_pairs

Weights = dict[str, Array]  # of one block, each [O, I], by name
Apply = Callable[[Weights, Array], Array]  # the block as a function of its quantized weights and its input


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


class Rotated(NamedTuple):
    """What the first stage trains for one linear."""

    scale: Float[Array, "I"]  # multiplies the weight's channels; checkpoints hold its inverse
    theta: Float[Array, "R half"]


class Tuned(NamedTuple):
    """What the second stage trains for one linear."""

    weight: Float[Array, "O I"]
    grid: Grid


class QuantizedLinear(NamedTuple):
    """One linear ready to be stored: `x -> rotate(x * channel_scales) @ ((codes - zeros) * scales).T`."""

    codes: Int[Array, "O I"]  # int32 in 0..15
    zeros: Int[Array, "O G"]
    scales: Float[Array, "O G"]
    theta: Float[Array, "R half"]
    pairs: np.ndarray  # int16 [R, I]
    channel_scales: Float[Array, "I"]

    def weight(self) -> Float[Array, "O I"]:
        """The weight that this linear stands for, without rotation and scales."""
        group_size = self.codes.shape[1] // self.zeros.shape[1]
        zeros, scales = (jnp.repeat(x, group_size, axis=1) for x in (self.zeros, self.scales))
        rotated = (self.codes - zeros) * scales
        return rotate(rotated, self.theta, self.pairs, group_size, inverse=True) * self.channel_scales


class Result(NamedTuple):
    """What became of one block."""

    linears: dict[str, QuantizedLinear]
    losses: dict[str, list[float]]  # validation loss before the first epoch and after each, of both stages


def optimize_block(
    apply: Apply,
    weights: Mapping[str, Array],
    samples: tuple[Array, Array],
    validation: tuple[Array, Array],
    config: ParoquantConfig,
    *,
    layer: int = 0,
    report: Callable[[str, int, float], None] = lambda stage, epoch, loss: None,
) -> Result:
    """Quantizes the linears of one block so that its output changes least.

    Args:
      apply: the block; pure. Gets float32 weights.
      weights: of the linears to quantize, `[O, I]` with I a multiple of the group size.
      samples: inputs as the quantized blocks before this one give them, and what the original block makes of the
        original inputs; first axes are samples, of which there must be at least a batch.
      validation: the same, of other samples.
      config: see there.
      layer: index of the block, which changes the pairs.
      report: called with "rotation" or "rounding", the epoch (0: before the first) and the validation loss.

    Raises:
      ValueError: a weight whose channels are no multiple of the group size, or too few samples.
      FloatingPointError: the loss of the untouched block is not finite.
    """
    for name, weight in weights.items():
        if weight.ndim != 2 or weight.shape[1] % config.group_size:
            raise ValueError(f"{name} must be [O, I], I a multiple of {config.group_size}; got shape {weight.shape}")
    if len(samples[0]) < config.batch_size or not len(validation[0]):
        raise ValueError(
            f"optimising needs {config.batch_size} samples and one for validation; got {len(samples[0])} and "
            f"{len(validation[0])}"
        )
    weights = {name: jnp.asarray(weight, jnp.float32) for name, weight in weights.items()}
    pairs = {
        name: select_pairs(
            config.seed + layer,
            weight.shape[1] // config.group_size,
            group_size=config.group_size,
            num_rotations=config.num_rotations,
        )
        for name, weight in weights.items()
    }
    turn = functools.partial(_turn, pairs=pairs, group_size=config.group_size)
    train = functools.partial(_train, samples=samples, validation=validation, config=config)

    def first_stage(trained: dict[str, Rotated]) -> Weights:
        rotated = turn(weights, trained)
        grids = {
            name: grid_of(weight, config.group_size, reference_range=config.reference_range)
            for name, weight in rotated.items()
        }
        return _unturn({name: quantize(rotated[name], grids[name]) for name in rotated}, trained, pairs, config)

    start = {
        name: Rotated(jnp.ones(weight.shape[1]), jnp.zeros((config.num_rotations, weight.shape[1] // 2)))
        for name, weight in weights.items()
    }
    real = {name: Rotated(jnp.ones(()), jnp.asarray(pair.is_real)) for name, pair in pairs.items()}
    rates = jax.tree.map(lambda x: config.rotation_rate, start)
    turns, first_losses = train(
        lambda trained, x: apply(first_stage(trained), x), start, rates, config.epochs[0], keep=real,
        report=functools.partial(report, "rotation"),
    )  # fmt: skip

    def second_stage(trained: dict[str, Tuned]) -> Weights:
        rotated = turn({name: tuned.weight for name, tuned in trained.items()}, turns)
        return _unturn({name: quantize(rotated[name], trained[name].grid) for name in rotated}, turns, pairs, config)

    rotated = turn(weights, turns)
    tuned = {
        name: Tuned(weight, grid_of(rotated[name], config.group_size, reference_range=config.reference_range))
        for name, weight in weights.items()
    }
    weight_rate, grid_rate = jnp.float32(config.weight_rate), jnp.float32(config.grid_rate)
    rates = {name: Tuned(weight_rate, Grid(grid_rate, grid_rate)) for name in tuned}
    tuned, second_losses = train(
        lambda trained, x: apply(second_stage(trained), x), tuned, rates, config.epochs[1], keep=None,
        report=functools.partial(report, "rounding"),
    )  # fmt: skip

    rotated = turn({name: x.weight for name, x in tuned.items()}, turns)
    linears = {}
    for name, of_turn in turns.items():
        codes, zeros = codes_of(rotated[name], tuned[name].grid)
        linears[name] = QuantizedLinear(
            codes, zeros, tuned[name].grid.scale, of_turn.theta, pairs[name].channels, 1 / of_turn.scale
        )
    return Result(linears, {"rotation": first_losses, "rounding": second_losses})


def rotate(weight: Array, theta: Array, pairs: np.ndarray, group_size: int, *, inverse: bool = False) -> Array:
    return pairwise_rotation(weight, theta, jnp.asarray(pairs), group_size=group_size, inverse=inverse)


def _turn(weights: Weights, turns: dict[str, Rotated], *, pairs: dict[str, Pairs], group_size: int) -> Weights:
    return {
        name: rotate(weight * turns[name].scale, turns[name].theta, pairs[name].channels, group_size)
        for name, weight in weights.items()
    }


def _unturn(rotated: Weights, turns: dict[str, Rotated], pairs: dict[str, Pairs], config: ParoquantConfig) -> Weights:
    back = {
        name: rotate(weight, turns[name].theta, pairs[name].channels, config.group_size, inverse=True)
        for name, weight in rotated.items()
    }
    return {name: weight / turns[name].scale for name, weight in back.items()}


def _train(
    model: Callable[[Any, Array], Array],
    start: Any,
    rates: Any,
    epochs: int,
    *,
    keep: Any,
    samples: tuple[Array, Array],
    validation: tuple[Array, Array],
    config: ParoquantConfig,
    report: Callable[[int, float], None],
) -> tuple[Any, list[float]]:
    """The best state over the epochs by its validation loss, the untouched one included, and the losses.

    `model` is a function of what is trained and the inputs, `rates` the first learning rate of each leaf, and `keep`
    None or factors that each leaf is multiplied by after every step.
    """
    per_epoch = len(samples[0]) // config.batch_size
    steps = max(1, epochs * per_epoch)

    cosine = optax.cosine_decay_schedule(1.0, steps, alpha=1 / 20)

    def decay(count):  # the original asks its scheduler once before the first step
        return cosine(jnp.maximum(count - 1, 0))

    optimizer = optax.chain(
        optax.scale_by_adam(b1=0.9, b2=0.95, eps=1e-10), optax.add_decayed_weights(0.01), optax.scale_by_schedule(decay)
    )

    def loss(state, x, y):
        return optax.losses.huber_loss(model(state, x).astype(jnp.float32), y.astype(jnp.float32)).mean()  # smooth L1

    @jax.jit
    def step(state, momenta, x, y):
        updates, momenta = optimizer.update(jax.grad(loss)(state, x, y), momenta, state)
        state = jax.tree.map(lambda p, rate, u: p - rate * u, state, rates, updates)
        return state if keep is None else jax.tree.map(jnp.multiply, state, keep), momenta

    evaluate = jax.jit(loss)

    def validate(state) -> float:
        batches = range(0, len(validation[0]), config.batch_size)
        parts = [tuple(x[i : i + config.batch_size] for x in validation) for i in batches]
        return sum(float(evaluate(state, *part)) * len(part[0]) for part in parts) / len(validation[0])

    best, state, momenta = start, start, optimizer.init(start)
    losses = [validate(start)]
    report(0, losses[0])
    if not np.isfinite(losses[0]):
        raise FloatingPointError(f"the validation loss before the first step is {losses[0]}")
    order = np.random.default_rng(config.seed)
    for epoch in range(1, epochs + 1):
        chosen = order.permutation(len(samples[0]))[: per_epoch * config.batch_size]
        for batch in chosen.reshape(per_epoch, config.batch_size):
            state, momenta = step(state, momenta, *(x[batch] for x in samples))
        losses.append(validate(state))
        report(epoch, losses[-1])
        if losses[-1] < min(losses[:-1]):
            best = state
    return best, losses
