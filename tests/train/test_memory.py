import jax
import jax.numpy as jnp

from train.config import OptimConfig
from train.memory import MemoryEstimate, count_flops, peak_flops
from train.optimizers import make_optimizer
from train.state import TrainState
from train.step import make_train_step


def test_prediction_holds_masters_and_both_moments():
    params = {"w": jax.ShapeDtypeStruct((512, 1024), jnp.float32)}

    def loss(params, batch, key):
        return jnp.sum((batch["x"] @ params["w"]) ** 2), jnp.float32(1), {}

    optimizer, _ = make_optimizer(OptimConfig(), 10)
    state = jax.eval_shape(lambda p: TrainState.create(p, optimizer, jax.random.key(0)), params)
    batch = {"x": jax.ShapeDtypeStruct((8, 512), jnp.float32)}
    estimate = MemoryEstimate.of(make_train_step(loss, optimizer).lower(state, batch).compile())
    weights = 512 * 1024 * 4
    assert 3 * weights < estimate.state < 3.1 * weights
    assert 0.9 * weights < estimate.working < 4 * weights  # a gradient at least
    assert estimate.total == estimate.state + estimate.working


def test_remedies_are_named_when_memory_is_short():
    estimate = MemoryEstimate(state=6_000_000_000, working=3_000_000_000)
    text = estimate.describe(10_000_000_000, ("--accumulate", "--remat"))
    assert "9.00 GB predicted" in text and "of 10.00 GB" in text and "--accumulate, --remat" in text
    assert "lower it" not in estimate.describe(100_000_000_000, ("--accumulate",))


def test_flops_of_products_scans_and_branches():
    x, w = jnp.ones((3, 4)), jnp.ones((4, 4))
    once = 2 * 3 * 4 * 4
    assert count_flops(lambda x, w: x @ w + 1, x, w) == once
    assert count_flops(lambda x, w: jax.lax.scan(lambda h, _: (h @ w, None), x, None, length=5)[0], x, w) == 5 * once
    assert count_flops(jax.jit(lambda x, w: jax.checkpoint(lambda a: a @ w)(x)), x, w) == once
    branches = lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)  # noqa: E731
    assert count_flops(branches, x, w) == 2 * once
    batched = lambda a, b: jnp.einsum("bij,bjk->bik", a, b)  # noqa: E731
    assert count_flops(batched, jnp.ones((7, 3, 4)), jnp.ones((7, 4, 4))) == 7 * once


def test_flops_of_a_decoder_are_six_per_weight_and_token_and_attention():
    from jaxmodels.qwen import build
    from jaxmodels.qwen.config import QwenConfig
    from train.objectives.next_token import make_next_token_loss

    config = QwenConfig.tiny()
    lm = build(config)
    params = jax.eval_shape(lambda: lm.init(jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    batch = dict.fromkeys(("tokens", "segment_ids", "positions"), tokens)
    batch["loss_mask"] = jax.ShapeDtypeStruct((2, 64), jnp.float32)
    counted = count_flops(make_next_token_loss(lm), params, batch, jax.random.key(0))
    matrices = sum(x.size for x in jax.tree.leaves(params["layers"]) if x.ndim > 2) + config.vocab_size * config.dim
    dense = 2 * 2 * 64 * matrices
    attention = config.layers * 2 * 2 * 2 * 64 * 64 * config.heads * config.head_dim  # all T x T pairs
    assert dense + 0.4 * attention < counted < 1.02 * (dense + attention)


def test_peaks_are_known_by_the_name_of_the_device():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
    assert peak_flops("NVIDIA H200", "bfloat16") == 989e12
    assert peak_flops("cpu", "float32") is None
