import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train.config import OptimConfig, RunConfig
from train.optimizers import decay_mask, make_optimizer, make_schedule
from train.state import TrainState
from train.step import make_eval_step, make_train_step


def make_problem(seed=0, rows=12, width=6):
    """A regression with a very uneven number of targets per row; sums, as recipes return them."""
    rng = np.random.default_rng(seed)
    params = {"w": jnp.asarray(rng.normal(size=(width, 3)), jnp.float32), "bias": jnp.zeros(3)}
    batch = {
        "x": jnp.asarray(rng.normal(size=(rows, 5, width)), jnp.float32),
        "y": jnp.asarray(rng.normal(size=(rows, 5, 3)), jnp.float32),
        "loss_mask": jnp.asarray(rng.random((rows, 5)) < np.linspace(0.02, 1, rows)[:, None], jnp.float32),
    }
    return params, batch


def loss_fn(params, batch, key):
    del key
    error = batch["x"].astype(params["w"].dtype) @ params["w"] + params["bias"] - batch["y"]
    squares = (error.astype(jnp.float32) ** 2).sum(-1) * batch["loss_mask"]
    worst = (squares.max(initial=0.0), jnp.float32(1))
    return squares.sum(), batch["loss_mask"].sum(), {"squares": squares.sum(), "worst": worst}


def new_state(params, optimizer, seed=0):
    return TrainState.create(jax.tree.map(jnp.array, params), optimizer, jax.random.key(seed))


@pytest.mark.smoke
@pytest.mark.parametrize("parts", [2, 3, 12])
def test_accumulation_equals_one_big_batch(parts):
    params, batch = make_problem()
    optimizer, schedule = make_optimizer(OptimConfig(learning_rate=1e-2, schedule="constant"), 10)
    results = []
    for accumulate in (1, parts):
        state = new_state(params, optimizer)
        step = make_train_step(loss_fn, optimizer, accumulate=accumulate, schedule=schedule)
        for _ in range(3):
            state, metrics = step(state, batch)
        results.append((state.params, state.opt_state, metrics["loss"], metrics["grad_norm"], metrics["sums"]["loss"]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), *results)


def test_gradient_is_that_of_sum_over_denominator():
    params, batch = make_problem()
    optimizer = optax.sgd(1.0)
    state, metrics = make_train_step(loss_fn, optimizer, accumulate=4)(new_state(params, optimizer), batch)
    value, grad = jax.value_and_grad(lambda p: loss_fn(p, batch, None)[0] / batch["loss_mask"].sum())(params)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    np.testing.assert_allclose(state.params["w"], params["w"] - grad["w"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics["sums"]["worst"][1], 4)  # a pair keeps its own weight


def test_parts_draw_different_noise_and_steps_too():
    def noisy(params, batch, key):
        draw = jax.random.uniform(key)
        return params["w"].sum() * 0 + draw, jnp.float32(1), {"square": draw**2}

    params, batch = make_problem()
    optimizer = optax.sgd(0.0)
    step = make_train_step(noisy, optimizer, accumulate=2)
    state = new_state(params, optimizer)
    state, first = step(state, batch)
    mean, square = first["loss"], first["sums"]["square"][0] / 2
    assert abs(square - mean**2) > 1e-6  # equal draws would have no variance
    _, second = step(state, batch)
    assert second["loss"] != mean


def test_bfloat16_compute_updates_float32_masters():
    params, batch = make_problem()
    seen = []

    def spying(params, batch, key):
        seen.append(params["w"].dtype)
        return loss_fn(params, batch, key)

    optimizer = optax.sgd(1e-6)
    state = new_state(params, optimizer)
    before = np.asarray(state.params["w"])
    step = make_train_step(spying, optimizer, compute_dtype=jnp.bfloat16)
    for _ in range(50):
        state, _ = step(state, batch)
    assert seen and set(seen) == {jnp.dtype(jnp.bfloat16)}
    assert state.params["w"].dtype == jnp.float32
    moved = np.asarray(state.params["w"]) - before
    exact = jax.grad(lambda p: loss_fn(p, batch, None)[0] / batch["loss_mask"].sum())(params)["w"]
    # Every update is far below a bfloat16 ulp of the weights: without masters nothing would move.
    assert (np.abs(1e-6 * exact) < 2**-9 * np.abs(before)).all()
    np.testing.assert_allclose(moved, -50 * 1e-6 * exact, rtol=0.05, atol=3e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_non_finite_step_changes_nothing_and_is_counted(bad, accumulate):
    params, batch = make_problem()
    optimizer, schedule = make_optimizer(OptimConfig(warmup_steps=4), 10)
    step = make_train_step(loss_fn, optimizer, accumulate=accumulate, schedule=schedule)
    state, _ = step(new_state(params, optimizer), batch)
    kept = jax.tree.map(np.asarray, (state.params, state.opt_state))
    poisoned = batch | {"x": batch["x"].at[-1, :, 0].set(bad)}
    for n in (1, 2):
        state, metrics = step(state, poisoned)
        assert metrics["rejected"] == 1 and metrics["rejected_in_a_row"] == n
        jax.tree.map(np.testing.assert_array_equal, kept, (state.params, state.opt_state))
    assert int(state.step) == 3 and int(state.rejected) == 2
    rate = metrics["learning_rate"]
    state, metrics = step(state, batch)
    assert metrics["rejected"] == 0 and int(state.rejected_in_a_row) == 0 and int(state.rejected) == 2
    assert metrics["learning_rate"] == rate  # rejected steps do not advance the schedule
    assert not np.array_equal(kept[0]["w"], state.params["w"])


def test_infinite_gradient_of_a_finite_loss_is_rejected():
    def sharp(params, batch, key):
        return jnp.sqrt(jnp.sum(params["w"] * 0)), jnp.float32(1), {}  # d sqrt(x) / dx at 0

    params, batch = make_problem()
    optimizer = optax.sgd(1.0)
    state, metrics = make_train_step(sharp, optimizer)(new_state(params, optimizer), batch)
    assert metrics["loss"] == 0 and metrics["rejected"] == 1
    np.testing.assert_array_equal(state.params["w"], params["w"])


def test_batch_without_targets_is_no_division_by_zero():
    params, batch = make_problem()
    optimizer = optax.sgd(1.0)
    empty = batch | {"loss_mask": batch["loss_mask"] * 0}
    state, metrics = make_train_step(loss_fn, optimizer)(new_state(params, optimizer), empty)
    assert metrics["loss"] == 0 and metrics["rejected"] == 0
    np.testing.assert_array_equal(state.params["w"], params["w"])


def test_state_is_donated_and_compiled_once():
    params, batch = make_problem()
    optimizer, _ = make_optimizer(OptimConfig(), 10)
    step = make_train_step(loss_fn, optimizer)
    state = new_state(params, optimizer)
    for _ in range(3):
        old, (state, _) = state, step(state, batch)
        assert old.params["w"].is_deleted()
    assert step._cache_size() == 1


def test_padding_is_not_counted_as_tokens():
    params, batch = make_problem()
    optimizer = optax.sgd(1.0)
    batch = batch | {"segment_ids": jnp.ones((12, 5), jnp.int32).at[3].set(0)}
    assert make_train_step(loss_fn, optimizer)(new_state(params, optimizer), batch)[1]["tokens"] == 55


def test_frozen_weights_reach_the_loss_and_stay():
    params, batch = make_problem()

    def loss(params, batch, key, frozen):
        return loss_fn(params | {"bias": frozen["bias"]}, batch, key)

    optimizer = optax.sgd(0.1)
    frozen = {"bias": jnp.full(3, 7.0)}
    for accumulate in (1, 2):
        step = make_train_step(loss, optimizer, accumulate=accumulate)
        state, metrics = step(new_state({"w": params["w"]}, optimizer), batch, frozen)
        want = loss_fn(params | frozen, batch, None)
        np.testing.assert_allclose(metrics["loss"], want[0] / want[1], rtol=1e-5)
        assert set(state.params) == {"w"} and not frozen["bias"].is_deleted()
    sums = make_eval_step(loss)({"w": params["w"]}, batch, jax.random.key(0), frozen)
    np.testing.assert_allclose(sums["loss"][0], want[0], rtol=1e-5)
    np.testing.assert_allclose(sums["squares"], (want[0], want[1]), rtol=1e-5)


def test_accumulation_must_divide_the_batch():
    params, batch = make_problem()
    optimizer = optax.sgd(1.0)
    with pytest.raises(ValueError, match="accumulate=5 must divide the batch of 12 rows"):
        make_train_step(loss_fn, optimizer, accumulate=5)(new_state(params, optimizer), batch)


def test_schedules():
    rates = {
        kind: np.array(
            [make_schedule(OptimConfig(1.0, kind, warmup_steps=4, final_learning_rate=0.1), 20)(n) for n in range(20)]
        )
        for kind in ("constant", "cosine", "wsd")
    }
    for values in rates.values():
        np.testing.assert_allclose(values[:5], [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)
    np.testing.assert_allclose(rates["constant"][4:], 1.0)
    half = 0.1 + 0.9 * (1 + np.cos(np.pi * np.arange(16) / 15)) / 2
    np.testing.assert_allclose(rates["cosine"][4:], half, rtol=1e-5)
    np.testing.assert_allclose(rates["wsd"][4:16], 1.0)
    np.testing.assert_allclose(rates["wsd"][16:], [1.0, 0.7, 0.4, 0.1], rtol=1e-5)
    assert float(make_schedule(OptimConfig(1.0), 100)(99)) == pytest.approx(0.1)  # default: a tenth
    with pytest.raises(ValueError, match="warmup_steps must be smaller than the 20 steps"):
        make_schedule(OptimConfig(warmup_steps=20), 20)


def test_decay_skips_norms_and_biases():
    params = {
        "embed": 1,
        "final_norm": 1,
        "layers": {"attention": {"q": 1, "q_bias": 1, "k_norm": 1}, "mlp_norm": 1},
    }
    params = jax.tree.map(lambda _: jnp.ones((2, 3)), params)
    assert decay_mask(params) == {
        "embed": True,
        "final_norm": False,
        "layers": {"attention": {"q": True, "q_bias": False, "k_norm": False}, "mlp_norm": False},
    }
    optimizer, _ = make_optimizer(OptimConfig(learning_rate=0.1, weight_decay=0.5, schedule="constant"), 10)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    assert (updates["embed"] < 0).all() and not updates["final_norm"].any()
    assert not updates["layers"]["attention"]["q_bias"].any()


def test_clipping_bounds_the_update_not_the_reported_norm():
    params, batch = make_problem()
    base = OptimConfig(learning_rate=1e-3, schedule="constant", weight_decay=0.0, beta1=0.0, beta2=0.0)
    moved = {}
    for clip in (None, 1e-12):
        # Without memory Adam's update is g / (|g| + eps): only an eps of the size of g sees the clipping.
        config = OptimConfig(**(vars(base) | {"clip_norm": clip, "epsilon": 1e-8}))
        optimizer, _ = make_optimizer(config, 10)
        state, metrics = make_train_step(loss_fn, optimizer)(new_state(params, optimizer), batch)
        moved[clip] = np.abs(state.params["w"] - params["w"]).max()
        assert metrics["grad_norm"] > 1e-2
    assert moved[None] > 0.9e-3 and moved[1e-12] < 1e-6


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: OptimConfig(learning_rate=0.0), "learning_rate must be positive; got 0.0"),
        (lambda: OptimConfig(beta2=1.0), r"beta2 must lie in \[0, 1\); got 1.0"),
        (lambda: OptimConfig(clip_norm=0.0), "clip_norm must be positive or None; got 0.0"),
        (lambda: OptimConfig(learning_rate=1e-3, final_learning_rate=1e-2), "final_learning_rate"),
        (
            lambda: RunConfig(batch_size=10, accumulate=3),
            "accumulate must divide batch_size=10; got accumulate=3",
        ),
        (lambda: RunConfig(profile="3"), "profile must be START:COUNT"),
        (lambda: RunConfig(steps=0), "steps must be positive; got 0"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
