"""The two stages of one decoder block: first scales and angles, then the weights and their grids.

The loss is that of the block's output, so that errors of its linears may cancel. Memory is that of one block.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from pallas_kernels.quantized_matmul import QuantizedTensor, Rotation
from pallas_kernels.quantized_matmul.grid import Grid, codes_of, grid_of, quantize
from pallas_kernels.quantized_matmul.rounding import from_unsigned, storable
from pallas_kernels.rotation import pairwise_rotation
from train.paroquant.config import ParoquantConfig
from train.paroquant.pairs import select_pairs

Weights = dict[str, Array]  # of one block, each [O, I], by name
Apply = Callable[[Weights, Any, Any], Array]
"""The block as a function of its quantized weights, its inputs, and its other parameters."""
Samples = tuple[Any, Any]  # inputs and outputs of a block; trees of arrays whose first axis is samples


class Rotated(NamedTuple):
    """What the first stage trains for one linear."""

    scale: Float[Array, "I"]  # multiplies the weight's channels; checkpoints hold its inverse
    theta: Float[Array, "R half"]


class Tuned(NamedTuple):
    """What the second stage trains for one linear."""

    weight: Float[Array, "O I"]
    grid: Grid


class Frozen(NamedTuple):
    """What a stage does not train."""

    rest: Any  # the block's other parameters
    weights: Weights
    pairs: dict[str, Array]  # [R, I]
    turns: dict[str, Rotated] | None  # what the first stage found


class Result(NamedTuple):
    """What became of one block."""

    linears: dict[str, QuantizedTensor]  # as checkpoints hold them: scales, angles and factors in float16
    losses: dict[str, list[float]]  # validation loss before the first epoch and after each, of both stages


def optimize_block(
    apply: Apply,
    weights: Mapping[str, Array],
    samples: Samples,
    validation: Samples,
    config: ParoquantConfig,
    *,
    layer: int = 0,
    seeds: Mapping[str, int] | None = None,
    rest: Any = None,
    place: Callable[[Any], Any] = jax.device_put,
    report: Callable[[str, int, float], None] = lambda stage, epoch, loss: None,
) -> Result:
    """Quantizes the linears of one block so that its output changes least.

    Blocks with the same `apply` (the same object), shapes and configuration share their compiled programs.

    Args:
      apply: the block; pure. Gets float32 weights.
      weights: of the linears to quantize, `[O, I]` with I a multiple of the group size.
      samples: inputs as the quantized blocks before this one give them, and what the original block makes of the
        original inputs; first axes are samples, of which there must be at least a batch. NumPy arrays stay on the host.
      validation: the same, of other samples.
      config: see there.
      layer: index of the block, which changes the pairs.
      seeds: by name what else is added to the seed of a weight's pairs; None: nothing.
      rest: third argument of `apply`.
      place: puts a batch on the devices that are to work on it.
      report: called with "rotation" or "rounding", the epoch (0: before the first) and the validation loss.

    Raises:
      ValueError: a weight whose channels are no multiple of the group size, or too few samples.
      FloatingPointError: the loss of the untouched block is not finite.
    """
    for name, weight in weights.items():
        if weight.ndim != 2 or weight.shape[1] % config.group_size:
            raise ValueError(f"{name} must be [O, I], I a multiple of {config.group_size}; got shape {weight.shape}")
    if _count(samples) < config.batch_size or not _count(validation):
        raise ValueError(
            f"optimising needs {config.batch_size} samples and one for validation; got {_count(samples)} and "
            f"{_count(validation)}"
        )
    weights = {name: jnp.asarray(weight, jnp.float32) for name, weight in weights.items()}
    devices = next(iter(weights.values())).sharding
    pairs = {
        name: select_pairs(
            config.seed + layer + (seeds or {}).get(name, 0),
            weight.shape[1] // config.group_size,
            group_size=config.group_size,
            num_rotations=config.num_rotations,
        )
        for name, weight in weights.items()
    }
    frozen = Frozen(rest, weights, {name: jax.device_put(pair.channels, devices) for name, pair in pairs.items()}, None)
    train = functools.partial(
        _train, apply=apply, samples=samples, validation=validation, config=config, place=place, report=report
    )

    start = {name: _unturned(weight, config) for name, weight in weights.items()}
    real = {name: Rotated(jnp.ones(()), jnp.asarray(pair.is_real)) for name, pair in pairs.items()}
    rates = jax.tree.map(lambda x: jnp.float32(config.rotation_rate), start)
    turns, first_losses = train("rotation", frozen, start, rates, config.epochs[0], keep=real)

    frozen = frozen._replace(turns=turns)
    tuned = {name: _untuned(weights[name], turns[name], frozen.pairs[name], config) for name in weights}
    weight_rate, grid_rate = jnp.float32(config.weight_rate), jnp.float32(config.grid_rate)
    rates = {name: Tuned(weight_rate, Grid(grid_rate, grid_rate)) for name in tuned}
    tuned, second_losses = train("rounding", frozen, tuned, rates, config.epochs[1], keep=None)
    linears = {name: _store(tuned[name], turns[name], frozen.pairs[name], config) for name in tuned}
    return Result(linears, {"rotation": first_losses, "rounding": second_losses})


# Beginnings and ends run as one program per shape of a linear.


@functools.partial(jax.jit, static_argnames="config")
def _unturned(weight: Array, config: ParoquantConfig) -> Rotated:
    channels = weight.shape[1]
    return Rotated(jnp.ones_like(weight[0]), jnp.zeros_like(weight, shape=(config.num_rotations, channels // 2)))


@functools.partial(jax.jit, static_argnames="config")
def _untuned(weight: Array, turn: Rotated, pairs: Array, config: ParoquantConfig) -> Tuned:
    rotated = rotate(weight * turn.scale, turn.theta, pairs, config.group_size)
    return Tuned(weight, grid_of(rotated, config.group_size, reference_range=config.reference_range))


def rotate(weight: Array, theta: Array, pairs: Array, group_size: int, *, inverse: bool = False) -> Array:
    return pairwise_rotation(weight, theta, pairs, group_size=group_size, inverse=inverse)


@functools.partial(jax.jit, static_argnames="config")
def _store(tuned: Tuned, turn: Rotated, pairs: Array, config: ParoquantConfig) -> QuantizedTensor:
    """The linear as a checkpoint holds it. Codes are chosen after everything else is rounded to float16."""
    factors, theta = storable(1 / turn.scale), turn.theta.astype(jnp.float16)
    rotated = rotate(tuned.weight / factors.astype(jnp.float32), theta, pairs, config.group_size)
    scales = storable(tuned.grid.scale)
    codes, zeros = codes_of(rotated, tuned.grid._replace(scale=scales.astype(jnp.float32)))
    return QuantizedTensor(
        **from_unsigned(codes, zeros.T, scales.T),
        input_scales=factors,
        rotation=Rotation(theta, pairs),
        format="int4",
        shape=tuned.weight.shape,
    )


def _turn(
    weights: Weights, frozen: Frozen, config: ParoquantConfig, turns: dict[str, Rotated] | None = None
) -> Weights:
    turns = frozen.turns if turns is None else turns
    assert turns is not None
    return {
        name: rotate(weight * turns[name].scale, turns[name].theta, frozen.pairs[name], config.group_size)
        for name, weight in weights.items()
    }


def _unturn(rotated: Weights, frozen: Frozen, config: ParoquantConfig, turns: dict[str, Rotated]) -> Weights:
    back = {
        name: rotate(weight, turns[name].theta, frozen.pairs[name], config.group_size, inverse=True)
        for name, weight in rotated.items()
    }
    return {name: weight / turns[name].scale for name, weight in back.items()}


Stage = Literal["rotation", "rounding"]


def _output(stage: Stage, apply: Apply, config: ParoquantConfig, frozen: Frozen, trained: Any, x: Any) -> Array:
    """What the block makes of x with weights rounded as a stage rounds them."""
    if stage == "rotation":
        turns, rotated = trained, _turn(frozen.weights, frozen, config, trained)
        grids = {
            name: grid_of(weight, config.group_size, reference_range=config.reference_range)
            for name, weight in rotated.items()
        }
    else:
        assert frozen.turns is not None
        turns, rotated = frozen.turns, _turn({name: tuned.weight for name, tuned in trained.items()}, frozen, config)
        grids = {name: tuned.grid for name, tuned in trained.items()}
    rounded = {name: quantize(weight, grids[name]) for name, weight in rotated.items()}
    return apply(_unturn(rounded, frozen, config, turns), x, frozen.rest)


def _optimizer(steps: int) -> optax.GradientTransformation:
    cosine = optax.cosine_decay_schedule(1.0, steps, alpha=1 / 20)

    def decay(count):  # the original asks its scheduler once before the first step
        return cosine(jnp.maximum(count - 1, 0))

    return optax.chain(
        optax.scale_by_adam(b1=0.9, b2=0.95, eps=1e-10), optax.add_decayed_weights(0.01), optax.scale_by_schedule(decay)
    )


@functools.partial(jax.jit, static_argnames=("stage", "apply", "config"))
def _loss(
    frozen: Frozen, trained: Any, batch: Samples, *, stage: Stage, apply: Apply, config: ParoquantConfig
) -> Array:
    x, y = batch
    found = _output(stage, apply, config, frozen, trained, x).astype(jnp.float32)
    return optax.losses.huber_loss(found, y.astype(jnp.float32)).mean()  # smooth L1


@functools.partial(jax.jit, static_argnames=("stage", "apply", "config", "steps"))
def _step(
    frozen: Frozen, trained: Any, momenta: Any, batch: Samples, rates: Any, keep: Any, *, stage: Stage, apply: Apply,
    config: ParoquantConfig, steps: int,
) -> tuple[Any, Any]:  # fmt: skip
    gradient = jax.grad(lambda trained: _loss(frozen, trained, batch, stage=stage, apply=apply, config=config))(trained)
    updates, momenta = _optimizer(steps).update(gradient, momenta, trained)
    trained = jax.tree.map(lambda p, rate, u: p - rate * u, trained, rates, updates)
    return trained if keep is None else jax.tree.map(jnp.multiply, trained, keep), momenta


def _count(samples: Samples) -> int:
    return len(jax.tree.leaves(samples)[0])


def _train(
    stage: Stage,
    frozen: Frozen,
    start: Any,
    rates: Any,
    epochs: int,
    *,
    keep: Any,
    apply: Apply,
    samples: Samples,
    validation: Samples,
    config: ParoquantConfig,
    place: Callable[[Any], Any],
    report: Callable[[str, int, float], None],
) -> tuple[Any, list[float]]:
    """The best state over the epochs by its validation loss, the untouched one included, and the losses.

    `rates` has the first learning rate of each leaf of `start`, and `keep` is None or factors that each leaf is
    multiplied by after every step.
    """
    per_epoch = _count(samples) // config.batch_size
    steps = max(1, epochs * per_epoch)
    fixed: dict[str, Any] = {"stage": stage, "apply": apply, "config": config}

    def validate(state: Any) -> float:
        total = 0.0
        for i in range(0, _count(validation), config.batch_size):
            part = jax.tree.map(lambda a: a[i : i + config.batch_size], validation)  # noqa: B023 (used at once)
            total += float(_loss(frozen, state, place(part), **fixed)) * _count(part)
        return total / _count(validation)

    # Placed like the weights from the beginning, or the second step would be compiled once more.
    devices = next(iter(frozen.weights.values())).sharding
    start, momenta, rates, keep = jax.device_put((start, _optimizer(steps).init(start), rates, keep), devices)
    best, state = start, start
    losses = [validate(start)]
    report(stage, 0, losses[0])
    if not np.isfinite(losses[0]):
        raise FloatingPointError(f"the validation loss before the first step is {losses[0]}")
    order = np.random.default_rng(config.seed)
    for epoch in range(1, epochs + 1):
        chosen = order.permutation(_count(samples))[: per_epoch * config.batch_size]
        for batch in chosen.reshape(per_epoch, config.batch_size):
            part = place(jax.tree.map(lambda a: a[batch], samples))  # noqa: B023 (used at once)
            state, momenta = _step(frozen, state, momenta, part, rates, keep, **fixed, steps=steps)
        losses.append(validate(state))
        report(stage, epoch, losses[-1])
        if losses[-1] < min(losses[:-1]):
            best = state
    return best, losses
