"""The update step and the evaluation step: pure functions that the loop, tests and benchmarks jit."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from train.state import TrainState

__all__ = ["LossFn", "make_eval_step", "make_train_step"]


LossFn = Callable[..., tuple[Any, Any, dict[str, Any]]]
"""What a recipe minimises, as sums so that parts of a batch add up to the batch.

`(params, batch, key)`, with a fourth argument `frozen` in runs that have frozen weights, to

- the sum of the losses of all targets, scalar;
- its denominator: the number (or total weight) of the targets. The step minimises sum / denominator;
- metrics: name -> a sum that is reported divided by the denominator, or a pair (sum, weight) that is
  reported as sum / weight. Values may be arrays; they are then reported as lists.
"""


def _cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def _pairs(metrics: dict[str, Any], denominator: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
    return {
        name: tuple(jnp.asarray(v, jnp.float32) for v in (value if isinstance(value, tuple) else (value, denominator)))
        for name, value in metrics.items()
    }


def _num_tokens(batch: dict[str, jax.Array]) -> jax.Array:
    """Tokens of a batch that are no padding (segment 0 is padding)."""
    if "segment_ids" in batch:
        return jnp.sum(batch["segment_ids"] > 0, dtype=jnp.float32)
    return jnp.float32(jax.tree.leaves(batch)[0].size)


def _mesh_scope(sharding: jax.sharding.Sharding | None) -> contextlib.AbstractContextManager:
    """The mesh of a sharding as the mesh in scope while a function is traced; nothing for other shardings."""
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh)
    return contextlib.nullcontext()


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    compute_dtype: Any = jnp.float32,
    schedule: optax.Schedule | None = None,
    state_shardings: TrainState | None = None,
    batch_sharding: jax.sharding.Sharding | None = None,
) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
    """`step(state, batch[, frozen]) -> (state, metrics)`, jitted, donating `state`.

    The batch is cut into `accumulate` parts of equal row count; gradients of the loss *sums* are added in
    float32 and divided by the summed denominators once, so parts with few targets weigh as little as they do
    in one big batch. Part i draws from fold_in(fold_in(state.key, state.step), i), or without parts from
    fold_in(state.key, state.step).

    Forward and backward run on a copy of the parameters in `compute_dtype`; masters, gradient sums and the
    update are float32. A step whose loss or gradient norm is not finite changes neither parameters nor
    optimiser state; it is counted in `state.rejected` and `state.rejected_in_a_row`.

    Metrics (float32 scalars): loss, grad_norm (before clipping), tokens (no padding), rejected (0 or 1),
    rejected_in_a_row, learning_rate if `schedule` is given; under "sums" the pairs (sum, weight) of "loss"
    and of what `loss_fn` returned, for the caller to add up over steps.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1; got {accumulate}")

    def sums_and_gradients(params, batch, key, frozen):
        def objective(p):
            loss_sum, denominator, metrics = loss_fn(p, batch, key, *frozen)
            loss_sum, denominator = jnp.float32(loss_sum), jnp.float32(denominator)
            return loss_sum, (denominator, _pairs(metrics, denominator))

        # With the mesh in scope the model pins its activations to the rows of the batch, and gradients of experts find
        # their weights gathered; otherwise XLA may split activations like the embedding and exchange them where it
        # should gather weights.
        with _mesh_scope(batch_sharding):
            (loss_sum, (denominator, pairs)), grads = jax.value_and_grad(objective, has_aux=True)(params)
        return (loss_sum, denominator, pairs), _cast(grads, jnp.float32)

    def place(grads):
        # Gradients sharded like the parameters become reduce-scatters; left alone they may be replicated.
        if state_shardings is None:
            return grads
        return jax.lax.with_sharding_constraint(grads, state_shardings.params)

    def parts_of(x):
        if x.shape[0] % accumulate:
            raise ValueError(f"accumulate={accumulate} must divide the batch of {x.shape[0]} rows")
        # Rows i, i + A, ...: every device keeps the rows it has and gets its share of every part.
        x = x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1)
        if isinstance(batch_sharding, jax.sharding.NamedSharding):
            spec = jax.sharding.PartitionSpec(None, *batch_sharding.spec)
            x = jax.lax.with_sharding_constraint(x, jax.sharding.NamedSharding(batch_sharding.mesh, spec))
        return x

    def step(state: TrainState, batch: dict[str, jax.Array], *frozen: Any):
        key = jax.random.fold_in(state.key, state.step)
        params = _cast(state.params, compute_dtype)
        if accumulate == 1:
            sums, grads = sums_and_gradients(params, batch, key, frozen)
            grads = place(grads)
        else:

            def one(total, part):
                index, rows = part
                sums, grads = sums_and_gradients(params, rows, jax.random.fold_in(key, index), frozen)
                return jax.tree.map(jnp.add, total, (sums, place(grads))), None

            parts = (jnp.arange(accumulate), jax.tree.map(parts_of, batch))
            first = jax.tree.map(lambda x: x[0], parts[1])
            shapes = jax.eval_shape(sums_and_gradients, params, first, key, frozen)
            zeros, zero_grads = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            start = (zeros, place(zero_grads))
            (sums, grads), _ = jax.lax.scan(one, start, parts)

        loss_sum, denominator, pairs = sums
        scale = 1.0 / jnp.where(denominator > 0, denominator, 1.0)
        grads = jax.tree.map(lambda g: g * scale, grads)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss_sum) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        keep = functools.partial(jax.tree.map, functools.partial(jnp.where, finite))
        in_a_row = jnp.where(finite, 0, state.rejected_in_a_row + 1)
        metrics = {
            "loss": loss_sum * scale,
            "grad_norm": norm,
            "tokens": _num_tokens(batch),
            "rejected": 1.0 - finite.astype(jnp.float32),
            "rejected_in_a_row": in_a_row,
            "sums": {"loss": (loss_sum, denominator)} | pairs,
        }
        if schedule is not None:
            metrics["learning_rate"] = jnp.float32(schedule(state.step - state.rejected))
        new = TrainState(
            step=state.step + 1,
            params=keep(params, state.params),
            opt_state=keep(opt_state, state.opt_state),
            key=state.key,
            rejected=state.rejected + (~finite).astype(jnp.int32),
            rejected_in_a_row=in_a_row,
        )
        return new, metrics

    # Metrics on every device: each process can read them.
    out = None if state_shardings is None else (state_shardings, state_shardings.step)
    return jax.jit(step, donate_argnums=0, out_shardings=out)


def make_eval_step(
    loss_fn: LossFn, *, compute_dtype: Any = jnp.float32, out_sharding: jax.sharding.Sharding | None = None
) -> Callable[..., dict[str, Any]]:
    """`evaluate(params, batch, key[, frozen])` -> name -> (sum, weight), "loss" among them; jitted."""

    @functools.partial(jax.jit, out_shardings=out_sharding)
    def evaluate(params: Any, batch: dict[str, jax.Array], key: jax.Array, *frozen: Any):
        with _mesh_scope(out_sharding):
            loss_sum, denominator, metrics = loss_fn(_cast(params, compute_dtype), batch, key, *frozen)
        denominator = jnp.float32(denominator)
        return {"loss": (jnp.float32(loss_sum), denominator)} | _pairs(metrics, denominator)

    return evaluate
