"""The Hopper kernels of flash_attention: interpreted with race detection, lowered for CUDA, and explained.

The interpreter is slow (10 to 70 ms per tile and head), so sizes are a few tiles; what varies is the edge. By default
one case of each kind runs; the others are slow.
"""

import functools
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat, flash_attention, masks
from pallas_kernels.attention import mosaic_sm90, reference, xla
from pallas_kernels.attention.limits import Limits
from pallas_kernels.attention.mosaic_sm90 import BackwardConfig, Config, backward, forward
from pallas_kernels.attention.mosaic_sm90.operands import prepare
from pallas_kernels.attention.skip import Skip, SkipTile

SMALL = Config(block_q=64, block_k=64, stages=2)
SMALL_BACKWARD = BackwardConfig(block_q=64, block_k=64, q_stages=2, k_stages=2)

# name: (mask, batch, T, S, N, K, H, dtype, limits); all but the first are slow.
CASES = {
    "causal, odd length, two heads": (masks.Causal(), 1, 65, 65, 2, 1, 64, "bfloat16", ""),
    "causal": (masks.Causal(), 1, 129, 129, 2, 1, 64, "bfloat16", ""),
    "causal, single token": (masks.Causal(), 1, 1, 1, 1, 1, 64, "bfloat16", ""),
    "causal, more queries": (masks.Causal(), 1, 130, 63, 1, 1, 64, "float16", ""),
    "causal, fewer queries": (masks.Causal(), 1, 65, 200, 1, 1, 64, "bfloat16", ""),
    "full, many tiles": (masks.Full(), 1, 64, 321, 1, 1, 64, "bfloat16", ""),
    "full, lengths": (masks.Full(), 3, 60, 130, 1, 1, 64, "bfloat16", "lengths"),
    "window and sinks": (masks.SlidingWindow(70, 5), 1, 250, 250, 1, 1, 64, "bfloat16", ""),
    "window, unseen keys": (masks.SlidingWindow(40), 1, 64, 256, 1, 1, 64, "bfloat16", ""),
    "window, segments": (masks.SlidingWindow(100, 3), 1, 200, 200, 1, 1, 64, "bfloat16", "segments"),
    "block causal": (masks.BlockCausal(48), 1, 130, 130, 1, 1, 64, "bfloat16", ""),
    "doubled": (masks.BlockDiffusion(100, 16), 1, 200, 200, 1, 1, 64, "bfloat16", ""),
    "doubled, full tiles": (masks.BlockDiffusion(192, 64), 1, 384, 384, 1, 1, 64, "bfloat16", ""),
    "doubled, noisy half": (masks.BlockDiffusion(96, 64, "token"), 1, 96, 192, 1, 1, 64, "bfloat16", ""),
    "prefix": (masks.PrefixBidirectional(60), 1, 127, 127, 1, 1, 64, "bfloat16", ""),
    "causal, segments": (masks.Causal(), 2, 150, 150, 2, 1, 64, "bfloat16", "segments"),
    "full, segments": (masks.Full(), 1, 70, 130, 1, 1, 64, "bfloat16", "segments"),
    "window, positions": (masks.SlidingWindow(40, 3), 1, 70, 130, 1, 1, 64, "bfloat16", "positions"),
    "causal, positions, lengths": (masks.Causal(), 2, 70, 130, 1, 1, 64, "bfloat16", "positions lengths"),
    "wide heads": (masks.Causal(), 1, 128, 128, 2, 2, 128, "bfloat16", ""),
    "96": (masks.Causal(), 1, 128, 128, 1, 1, 96, "float16", ""),
    "256": (masks.Causal(), 1, 128, 128, 1, 1, 256, "bfloat16", ""),
    "192 with values of 128": (masks.Causal(), 1, 129, 129, 1, 1, (192, 128), "bfloat16", ""),
    "eight heads to one": (masks.Causal(), 1, 65, 65, 8, 1, 64, "bfloat16", ""),
}


PARAMETERS = [
    pytest.param(*case, id=name, marks=[pytest.mark.slow] if i else []) for i, (name, case) in enumerate(CASES.items())
]


def make_limits(kind, batch, num_queries, num_keys):
    rng = np.random.default_rng(3)
    given = {}
    if "lengths" in kind:
        given["kv_lengths"] = [77, 0, num_keys][:batch]
    if "segments" in kind:
        segments = np.sort(rng.integers(0, 4, (batch, num_keys)), axis=1)
        given["k_segments"] = np.where(segments == 3, -1, segments)
        given["q_segments"] = given["k_segments"][:, -num_queries:]
    if "positions" in kind:
        order = np.stack([rng.permutation(num_keys) for _ in range(batch)])
        given["k_positions"] = np.where(order < 20, -1, order)
        given["q_positions"] = np.tile(np.arange(num_queries) + num_keys - num_queries, (batch, 1))
    return Limits(**{name: jnp.asarray(value, jnp.int32) for name, value in given.items()})


def make_arrays(batch, num_queries, num_keys, heads, kv_heads, head_dim, dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    head_dim, value_dim = head_dim if isinstance(head_dim, tuple) else (head_dim, head_dim)
    kv_shape = (batch, num_keys, kv_heads)
    shapes = ((batch, num_queries, heads, head_dim), (*kv_shape, head_dim), (*kv_shape, value_dim))
    return tuple(jax.random.normal(a, s).astype(dtype) for a, s in zip(keys, shapes, strict=True))


def empty_slots(mask, limits, num_queries, num_keys):
    """Bool [B or 1, S]: key slots whose contents must not matter, by the limits or because the mask hides them."""
    index = jnp.arange(num_keys)[None]
    empty = jnp.zeros((1, num_keys), bool)
    if limits.q_positions is None:
        empty = ~jnp.asarray(mask.dense(num_queries, num_keys)).any(0)[None]
    for limit in (limits.k_segments, limits.k_positions):
        if limit is not None:
            empty |= limit < 0
    if limits.kv_lengths is not None:
        empty |= index >= limits.kv_lengths[:, None]
    return empty


class Interpreter:
    """The interpreter's private state, which JAX 0.11 does not export."""

    def __init__(self):
        package = "jax._src.pallas.mosaic_gpu.interpret"
        self.calls = importlib.import_module(f"{package}.interpret_pallas_call")
        self.callbacks = importlib.import_module(f"{package}.gpu_callbacks")

    def reset(self):
        self.callbacks.reset_gpu_interpret_mode_state()

    def _finish(self, results):
        results = jax.block_until_ready(results)
        assert not self.calls.get_races().races_found, "race detected"
        return results

    def run(self, q, k, v, **options):
        """The kernel's results; fails on a race."""
        return self._finish(mosaic_sm90.run(q, k, v, **options, interpret=compat.interpret_params(detect_races=True)))

    def run_both(self, q, k, v, cotangents, **options):
        """Results, and (dq, dk, dv) for cotangents of the first two; fails on a race."""

        def attend(q, k, v):
            results = mosaic_sm90.run(q, k, v, **options, interpret=compat.interpret_params(detect_races=True))
            return results[:2], results

        _, pull, results = jax.vjp(attend, q, k, v, has_aux=True)
        return self._finish((results, pull(cotangents)))


@pytest.fixture
def interpreter():
    found = Interpreter()
    found.reset()
    yield found
    found.reset()


@pytest.mark.parametrize("mask, batch, num_queries, num_keys, heads, kv_heads, head_dim, dtype, kind", PARAMETERS)
def test_interpreted_kernels_agree_with_the_definition(
    interpreter, oracle, mask, batch, num_queries, num_keys, heads, kv_heads, head_dim, dtype, kind
):
    q, k, v = make_arrays(batch, num_queries, num_keys, heads, kv_heads, head_dim, dtype)
    d_out = jax.random.normal(jax.random.key(1), (*q.shape[:3], v.shape[3])).astype(dtype)
    d_lse = jax.random.normal(jax.random.key(2), (batch, heads, num_queries))
    options = {"mask": mask, "limits": make_limits(kind, batch, num_queries, num_keys), "scale": 0.3}
    seen = np.broadcast_to(
        reference.visible(mask, options["limits"], num_queries, num_keys), (batch, num_queries, num_keys)
    )
    expected = oracle(*(np.asarray(x, np.float64) for x in (q, k, v)), seen, 0.3, np.asarray(d_out, np.float64), d_lse)
    # What takes part in no pair must not matter, whatever it and its cotangent hold.
    blind = ~seen.any(2)[:, :, None, None]
    garbage = empty_slots(mask, options["limits"], num_queries, num_keys)[:, :, None, None]
    q, d_out = (jnp.where(blind, jnp.nan, x) for x in (q, d_out))
    k, v = (jnp.where(garbage, jnp.nan, x) for x in (k, v))
    options |= {"config": SMALL, "backward_config": SMALL_BACKWARD}
    if has_gradients := (q.shape[3], v.shape[3]) in mosaic_sm90.BACKWARD_HEAD_DIMS:
        (out, lse), gradients = interpreter.run_both(q, k, v, (d_out, d_lse), **options)
    else:
        out, lse = interpreter.run(q, k, v, **options)
    assert out.dtype == q.dtype and lse.dtype == jnp.float32
    rounding = 2e-2 if dtype == "bfloat16" else 2e-3
    np.testing.assert_allclose(out.astype(jnp.float32), expected[0], atol=rounding)
    np.testing.assert_allclose(lse, expected[1], atol=1e-4)
    if not has_gradients:
        return
    for got, want, like in zip(gradients, expected[2:], (q, k, v), strict=True):
        assert got.dtype == like.dtype
        # Sums of products of rounded numbers: the error grows with the largest sum, of which it is 1 % (0.1 %).
        np.testing.assert_allclose(got.astype(jnp.float32), want, atol=rounding * max(1.0, np.abs(want).max() / 2))


# name: (mask, batch, T, S, limits, tile)
SKIPPED = {
    "full": (masks.Full(), 1, 65, 320, "", SkipTile(64, 64)),
    "causal": (masks.Causal(), 1, 130, 257, "", SkipTile(64, 64)),
    "doubled": (masks.BlockDiffusion(128, 64), 1, 256, 256, "", SkipTile(64, 64)),
    "lengths": (masks.Full(), 3, 60, 200, "lengths", SkipTile(64, 64)),
    "segments": (masks.Full(), 1, 300, 640, "segments", SkipTile(64, 64)),
    "positions": (masks.Causal(), 1, 70, 200, "positions", SkipTile(64, 64)),
    "default tile": (masks.Full(), 1, 64, 400, "", SkipTile()),
}


def uneven_arrays(batch, num_queries, num_keys, head_dim=64):
    """Keys whose tiles differ much in size, so that a threshold leaves out some of them."""
    q, k, v = make_arrays(batch, num_queries, num_keys, 1, 1, head_dim, "bfloat16")
    size = jnp.asarray([1.0, 0.1, 2.0, 0.1, 0.4])[jnp.arange(num_keys) // 64 % 5]
    return jnp.abs(q), (k * size[:, None, None]).astype(k.dtype), v


@pytest.mark.slow
@pytest.mark.parametrize("mask, batch, num_queries, num_keys, kind, tile", SKIPPED.values(), ids=SKIPPED.keys())
def test_interpreted_kernel_skips_the_tiles_of_the_rule(interpreter, mask, batch, num_queries, num_keys, kind, tile):
    q, k, v = uneven_arrays(batch, num_queries, num_keys)
    lse_shape = (batch, 1, num_queries)
    limits = make_limits(kind, batch, num_queries, num_keys)
    # One row of the batch is dense, as a threshold outside (0, 1) means.
    skip = Skip(jnp.asarray([-1.0, -jnp.inf, -3.0])[:batch], tile)
    options = {"mask": mask, "limits": limits, "scale": 0.3, "skip": skip}
    d_out = jax.random.normal(jax.random.key(1), q.shape).astype(q.dtype)
    d_lse = jax.random.normal(jax.random.key(2), lse_shape)
    (out, lse, keep), gradients = interpreter.run_both(q, k, v, (d_out, d_lse), **options)
    exact = [x.astype(jnp.float32) for x in (q, k, v)]
    expected, pull = jax.vjp(lambda *a: reference.run(*a, **options)[:2], *exact)
    np.testing.assert_array_equal(keep, reference.run(*exact, **options)[2])
    for got, want in zip(gradients, pull((d_out.astype(jnp.float32), d_lse)), strict=True):
        # Peaked weights: dS is the small difference of dP and delta, which carries the rounding of the output.
        np.testing.assert_allclose(got.astype(jnp.float32), want, atol=2e-2 * max(1.0, np.abs(want).max()))
    visited = xla.visited_tiles(mask, limits, batch, num_queries, num_keys, tile)
    assert 0 < keep.sum() < visited.sum()
    np.testing.assert_allclose(out.astype(jnp.float32), expected[0], atol=2e-2)
    np.testing.assert_allclose(lse, expected[1], atol=1e-4)


@pytest.mark.slow
def test_large_scores_and_rows_that_start_masked_stay_finite(interpreter):
    q, k, v = make_arrays(1, 64, 64, 1, 1, 64, "bfloat16")
    options = {"mask": masks.Causal(), "limits": Limits(), "scale": 1e4}
    expected, expected_lse = reference.run(*(x.astype(jnp.float32) for x in (q, k, v)), **options)
    out, lse = interpreter.run(q, k, v, **options, config=SMALL)
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=2e-2)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5)


class Sabotaged:
    """`plgpu` without the calls of one function that `chosen` picks by their order of tracing."""

    def __init__(self, function, chosen):
        self.function, self.chosen, self.count = function, chosen, 0

    def __getattr__(self, name):
        original = getattr(plgpu, name)
        if name != self.function:
            return original

        def call(*args, **kwargs):
            self.count += 1
            return None if self.count - 1 in self.chosen else original(*args, **kwargs)

        return call


# What is never released is no case here: the interpreter waits for ever, as the GPU would.
CAUGHT = r"(?i)race|deadlock|barrier|wait|complet"


@pytest.mark.parametrize(
    "function, chosen",
    [
        pytest.param("barrier_wait", {8}, id="the load of K does not wait for its slot"),
        pytest.param("commit_smem", {0}, id="the store does not wait for the output", marks=pytest.mark.slow),
    ],
)
def test_a_missing_synchronisation_of_the_forward_is_caught(interpreter, monkeypatch, function, chosen):
    q, k, v = make_arrays(1, 64, 256, 1, 1, 64, "bfloat16")
    sabotaged = Sabotaged(function, chosen)
    monkeypatch.setattr(forward, "plgpu", sabotaged)
    with pytest.raises(Exception, match=CAUGHT):
        interpreter.run(q, k, v, mask=masks.Full(), limits=Limits(), scale=0.3, config=SMALL)
    assert sabotaged.count > max(chosen)


@pytest.mark.slow
@pytest.mark.parametrize(
    "function, chosen",
    [
        pytest.param("barrier_wait", {1}, id="dK and dV do not wait for Q"),
        pytest.param("barrier_wait", {2}, id="the load of Q does not wait for its slot"),
        pytest.param("barrier_wait", {7}, id="the load of K does not wait for its slot"),
    ],
)
def test_a_missing_synchronisation_of_the_backward_is_caught(interpreter, monkeypatch, function, chosen):
    q, k, v = make_arrays(1, 256, 256, 1, 1, 64, "bfloat16")
    options = {"mask": masks.Full(), "limits": Limits(), "scale": 0.3}
    sabotaged = Sabotaged(function, chosen)
    monkeypatch.setattr(backward, "plgpu", sabotaged)
    cotangents = (q, jnp.zeros((1, 1, 256)))
    with pytest.raises(Exception, match=CAUGHT):
        interpreter.run_both(q, k, v, cotangents, **options, config=SMALL, backward_config=SMALL_BACKWARD)
    assert sabotaged.count > max(chosen)


def lower(mask, *, head_dim=64, kind="", num_queries=129, num_keys=201, dtype="bfloat16", gradients=True, skip=None):
    """Lowers a call for CUDA: catches what the interpreter accepts and the compiler does not."""
    limits = make_limits(kind, 2, num_queries, num_keys)
    call = functools.partial(mosaic_sm90.run, mask=mask, scale=0.3, skip=skip)
    q, k, v = make_arrays(2, num_queries, num_keys, 4, 2, head_dim, dtype)

    def with_gradients(q, k, v, limits):
        def differentiable(q, k, v):
            results = call(q, k, v, limits=limits)
            return results[:2], results

        cotangents, pull, results = jax.vjp(differentiable, q, k, v, has_aux=True)
        return results, pull(cotangents)

    jitted = jax.jit(with_gradients if gradients else lambda q, k, v, limits: call(q, k, v, limits=limits))
    return jitted.trace(q, k, v, limits).lower(lowering_platforms=("cuda",)).as_text()


def log_sum_exp_length(text):
    """Row length of the buffer that the lowered kernel writes the log-sum-exp to."""
    (length,) = re.findall(r"custom_call @mosaic_gpu.*-> \(tensor<2x4x(\d+)xf32>, tensor<[\dx]+b?f16>\)", text)
    return int(length)


@pytest.mark.smoke
@pytest.mark.parametrize("head_dim, num_queries", [(64, 1), (96, 65), (128, 127), ((192, 128), 1), (256, 129)])
def test_lowers_for_cuda_and_every_tile_of_log_sum_exp_ends_inside_its_row(head_dim, num_queries):
    # On the GPU a tile that overlaps the end of a row is written into the next head's; the interpreter clips it there.
    text = lower(masks.Causal(), head_dim=head_dim, num_queries=num_queries, dtype="float16", gradients=False)
    tile = 128
    assert log_sum_exp_length(text) == -(-num_queries // tile) * tile


@pytest.mark.smoke
def test_skipping_lowers_for_cuda():
    skip = Skip(jnp.asarray([-1.0, -2.0]), SkipTile())
    assert lower(masks.Causal(), num_queries=65, skip=skip).count("@mosaic_gpu") == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "mask, kind, num_queries, num_keys",
    [
        (masks.Full(), "lengths", 129, 201),
        (masks.Full(), "positions", 129, 201),
        (masks.SlidingWindow(70, 5), "segments", 129, 201),
        (masks.SlidingWindow(70, 5), "positions lengths segments", 129, 201),
        (masks.BlockCausal(48), "", 129, 201),
        (masks.PrefixBidirectional(60), "", 129, 201),
        (masks.BlockDiffusion(100, 16), "", 200, 200),
        (masks.Causal(), "", 1, 1),
        (masks.Causal(), "", 7, 256),
    ],
)
def test_every_form_of_masking_lowers(mask, kind, num_queries, num_keys):
    assert lower(mask, kind=kind, num_queries=num_queries, num_keys=num_keys).count("@mosaic_gpu") == 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["", "lengths", "segments", "positions"])
@pytest.mark.parametrize("mask", [masks.Full(), masks.SlidingWindow(70), masks.BlockCausal(7)], ids=repr)
def test_every_combination_lowers(mask, kind):
    assert lower(mask, kind=kind).count("@mosaic_gpu") == 3


@pytest.mark.smoke
def test_an_unsupported_call_is_explained():
    q, k, v = make_arrays(1, 8, 8, 1, 1, 64, "bfloat16")
    with pytest.raises(NotImplementedError, match="default device is cpu"):
        flash_attention(q, k, v, implementation="mosaic")
    with pytest.raises(NotImplementedError, match="float32"):
        flash_attention(*(x.astype(jnp.float32) for x in (q, k, v)), implementation="mosaic")
    with pytest.raises(NotImplementedError, match=r"head dims.*192 with values of 128.*got 40"):
        flash_attention(*(x[..., :40] for x in (q, k, v)), implementation="mosaic")
    skipping = {"skip_threshold": 0.1, "implementation": "mosaic"}
    with pytest.raises(NotImplementedError, match=r"tiles of 64 rows.*rows=32"):
        flash_attention(q, k, v, skip_tile=SkipTile(rows=32), **skipping)
    with pytest.raises(NotImplementedError, match="default device is cpu"):
        flash_attention(q, k, v, **skipping)


@pytest.mark.parametrize("by_key", [False, True])
def test_padding_in_a_tile_does_not_join_it_to_other_segments(by_key):
    segments = jnp.repeat(jnp.asarray([[1, 2, 3, -1]], jnp.int32), jnp.asarray([64, 64, 96, 160]), axis=1)
    limits = Limits(q_segments=segments, k_segments=segments)
    _, runs = prepare(masks.Full(), limits, 384, 384, tile_q=64, tile_k=64, by_key=by_key)
    table = np.asarray(runs.table)[0]
    visits = dict(zip(table[:, 0].tolist(), table[:, 2::2].sum(axis=1).tolist(), strict=True))
    assert visits == {0: 1, 1: 1, 2: 2, 3: 2, 4: 0, 5: 0}  # tile 3 is half of segment 3, half padding


def attend(*arrays, **options):
    return mosaic_sm90.run(*arrays, mask=masks.Causal(), limits=Limits(), scale=1.0, **options)


def loss(*arrays):
    out, lse = attend(*arrays)
    return out.astype(jnp.float32).sum() + lse.sum()


def test_gradients_of_wide_heads_and_second_derivatives_are_refused():
    with pytest.raises(NotImplementedError, match=r'no gradients at head dim 256.*"xla"'):
        jax.eval_shape(jax.grad(jax.jit(loss)), *make_arrays(1, 8, 8, 1, 1, 256, "bfloat16"))
    arrays = make_arrays(1, 8, 8, 1, 1, 64, "bfloat16")
    with pytest.raises(NotImplementedError, match=r'"mosaic" has no second derivative.*"reference"'):
        jax.eval_shape(jax.grad(lambda *a: jax.grad(loss)(*a).astype(jnp.float32).sum()), *arrays)


def test_transformations_trace_the_kernels():
    q, k, v = make_arrays(2, 8, 8, 2, 1, 64, "bfloat16")

    def layer(x, _):
        return attend(x, k, v)[0], None

    def deep(q):
        return jax.lax.scan(jax.checkpoint(layer), q, None, length=3)[0].astype(jnp.float32).sum()

    gradient = jax.jit(jax.grad(deep))
    assert gradient.eval_shape(q).shape == q.shape
    assert gradient.trace(q).lower(lowering_platforms=("cuda",)).as_text().count("mosaic_gpu") >= 4
    stacked = tuple(jnp.stack([x] * 3) for x in (q, k, v))
    batched = jax.eval_shape(jax.vmap(jax.grad(loss, argnums=(0, 1, 2))), *stacked)
    assert [x.shape for x in batched] == [x.shape for x in stacked]


def test_rematerialisation_can_keep_the_results():
    arrays = make_arrays(1, 8, 8, 1, 1, 64, "bfloat16")
    kept = jax.checkpoint(loss, policy=jax.checkpoint_policies.save_only_these_names("attention"))
    forwards = [
        str(jax.make_jaxpr(jax.grad(f))(*arrays)).count("attention_forward") for f in (kept, jax.checkpoint(loss))
    ]
    assert 0 < forwards[0] < forwards[1]


def test_empty_batch():
    q, k, v = make_arrays(0, 8, 8, 2, 1, 64, "bfloat16")
    out, lse = mosaic_sm90.run(q, k, v, mask=masks.Causal(), limits=Limits(), scale=1.0)
    assert out.shape == q.shape and lse.shape == (0, 2, 8)


@pytest.mark.parametrize(
    "config, options, message",
    [
        (Config, {"block_q": 32}, "block_q.*32"),
        (Config, {"block_k": 96}, "block_k.*96"),
        (Config, {"block_k": 320}, "block_k.*320"),
        (Config, {"stages": 1}, "stages.*1"),
        (BackwardConfig, {"block_q": 96}, "block_q.*96"),
        (BackwardConfig, {"block_k": 256}, "block_k.*256"),
        (BackwardConfig, {"q_stages": 1}, "q_stages.*1"),
        (BackwardConfig, {"k_stages": 1}, "k_stages.*1"),
    ],
)
def test_a_config_that_cannot_be_is_refused(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_a_config_that_needs_too_much_memory_is_refused():
    q, k, v = make_arrays(1, 8, 8, 1, 1, 128, "bfloat16")
    config = Config(block_k=128, stages=4)
    needed = (2 * 64 + 2 * 4 * 128) * 128 * 2  # the tiles alone
    assert needed < config.smem_bytes(128, jnp.bfloat16) < needed + 4096
    with pytest.raises(ValueError, match=r"stages=4.*shared memory"):
        mosaic_sm90.run(q, k, v, mask=masks.Causal(), limits=Limits(), scale=1.0, config=config)
    backward_config = BackwardConfig(block_q=128, q_stages=4)
    needed = (4 * 64 + 2 * 4 * 128) * 128 * 2
    assert needed < backward_config.smem_bytes(128, jnp.bfloat16) < needed + 8192
    with pytest.raises(ValueError, match=r"q_stages=4.*shared memory"):
        mosaic_sm90.run(q, k, v, mask=masks.Causal(), limits=Limits(), scale=1.0, backward_config=backward_config)
