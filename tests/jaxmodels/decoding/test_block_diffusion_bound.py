"""Attention patterns and likelihood bounds, on a real decoder and on a toy one that also runs in float64."""

import dataclasses
import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels import load_pretrained
from jaxmodels.decoding import block_diffusion
from jaxmodels.decoding.block_diffusion import Pattern, ar_nll, exact_nelbo, gathered_nll, nelbo
from jaxmodels.decoding.block_diffusion.bound import require_mask_id, suppressed_ids
from jaxmodels.qwen import QwenConfig
from jaxmodels.qwen.model import Hidden
from pallas_kernels.masks import BlockCausal, BlockDiffusion, Causal, Full, PrefixBidirectional

GOLDEN = Path(__file__).parents[1] / "goldens/qwen3"
STATIC = ("lm", "pattern", "mask_id", "token_shift", "shift_context")
predict = jax.jit(block_diffusion.predict, static_argnames=STATIC)


@dataclasses.dataclass(frozen=True)
class Toy:
    """A language model of one nonlinear mixing layer over visible tokens, with the interface of `CausalLM`."""

    config: QwenConfig

    def init(self, seed: int = 0, dtype=np.float32):
        rng, d, v = np.random.default_rng(seed), 8, self.config.vocab_size
        shapes = {"embed": (v, d), "position": (64, d), "mix": (d, d), "head": (d, v)}
        return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}

    def hidden(self, params, tokens, *, positions=None, mask=Causal(), segment_ids=None, remat=None):
        T = tokens.shape[1]
        positions = jnp.arange(T)[None] if positions is None else positions
        x = params["embed"][tokens] + params["position"][positions]
        visible = jnp.asarray(mask.dense(T, T))[None]
        if segment_ids is not None:
            visible = visible & (segment_ids[:, :, None] == segment_ids[:, None, :])
        x = x + jnp.tanh(jnp.einsum("bts,bsd->btd", visible.astype(x.dtype), jnp.tanh(x @ params["mix"])))
        x = x + jnp.tanh(jnp.einsum("bts,bsd->btd", visible.astype(x.dtype), jnp.sin(3 * x)))
        return Hidden(x, None, None)

    def head(self, params, states):
        return states @ params["head"]


def toy(**changes) -> Toy:
    fields = {"vocab_size": 7, "mask_id": 6, "pad_id": None, "eos_ids": (1,)}
    return Toy(QwenConfig.tiny(**(fields | changes)))


@functools.cache
def golden():
    loaded = load_pretrained(GOLDEN, mask_id=5)
    return loaded.lm, loaded.params


def test_pattern_names_and_masks():
    assert Pattern("autoregressive").mask(8) == Causal()
    assert Pattern("bidirectional").mask(8) == Full()
    assert Pattern("block_causal", 4).mask(8) == BlockCausal(4)
    assert Pattern("block_diffusion", 4).mask(8) == BlockDiffusion(8, 4)
    assert Pattern("block_diffusion", 4, clean="token").mask(8) == BlockDiffusion(8, 4, "token")
    assert Pattern("prefix_bidirectional", prefix_len=3).mask(8) == PrefixBidirectional(3)
    for size in (1, 2, 4, 8, 16, 32):
        assert BlockDiffusion(32, size).dense(64, 64).mean() == 0.25 + size / (4 * 32)


@pytest.mark.smoke
def test_noisy_half_equals_a_forward_of_every_block_by_itself():
    lm, params = golden()
    length, size = 11, 4
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(6, 60, (2, length)), jnp.int32)
    masked = jnp.asarray(rng.random((2, length)) < 0.5)
    out = predict(lm, params, tokens, masked, Pattern("block_diffusion", size), mask_id=5)
    logits, clean = lm.head(params, out.states), lm.head(params, out.clean)
    noisy = jnp.where(masked, 5, tokens)
    for start in range(0, length, size):
        stop = min(start + size, length)
        inputs = jnp.concatenate([tokens[:, :start], noisy[:, start:stop]], axis=1)
        alone = lm.apply(params, inputs, mask=BlockCausal(size))
        np.testing.assert_allclose(logits[:, start:stop], alone[:, start:], atol=1e-5)
    np.testing.assert_allclose(clean, lm.apply(params, tokens, mask=BlockCausal(size)), atol=1e-5)


def test_block_of_all_is_bidirectional_and_block_of_one_has_a_causal_clean_half():
    lm, params = golden()
    rng = np.random.default_rng(1)
    tokens = jnp.asarray(rng.integers(6, 60, (2, 7)), jnp.int32)
    masked = jnp.asarray(rng.random((2, 7)) < 0.5)
    whole = predict(lm, params, tokens, masked, Pattern("block_diffusion", 7), mask_id=5)
    plain = predict(lm, params, tokens, masked, Pattern("bidirectional"), mask_id=5)
    np.testing.assert_allclose(whole.states, plain.states, atol=1e-5)
    one = predict(lm, params, tokens, masked, Pattern("block_diffusion", 1), mask_id=5)
    causal = lm.hidden(params, tokens).states
    np.testing.assert_allclose(one.clean, causal, atol=1e-5)
    token = predict(lm, params, tokens, masked, Pattern("block_diffusion", 4, clean="token"), mask_id=5)
    np.testing.assert_allclose(token.clean, causal, atol=1e-5)
    assert not np.allclose(
        token.states, predict(lm, params, tokens, masked, Pattern("block_diffusion", 4), mask_id=5)[0]
    )


@pytest.mark.parametrize(
    "pattern, shift",
    [
        (Pattern("block_diffusion", 4), True),
        pytest.param(Pattern("block_diffusion", 4), False, marks=pytest.mark.slow),
        pytest.param(Pattern("block_causal", 4), False, marks=pytest.mark.slow),
        pytest.param(Pattern("bidirectional"), False, marks=pytest.mark.slow),
        (Pattern("autoregressive"), False),
    ],
)
def test_packed_documents_are_independent(pattern, shift):
    lm, params = golden()
    rng = np.random.default_rng(2)
    # Boundaries at multiples of the block: each document then equals itself alone, in every pattern.
    parts = [4, 8]
    tokens = jnp.asarray(rng.integers(6, 60, (1, 12)), jnp.int32)
    masked = jnp.asarray(rng.random((1, 12)) < 0.5)
    segments = jnp.asarray([[1] * 4 + [2] * 8])
    both = predict(lm, params, tokens, masked, pattern, mask_id=5, segment_ids=segments, token_shift=shift)
    start = 0
    for length in parts:
        part = slice(start, start + length)
        alone = predict(lm, params, tokens[:, part], masked[:, part], pattern, mask_id=5, token_shift=shift)
        valid = np.asarray(alone.valid[0])
        np.testing.assert_array_equal(both.valid[0, part], valid)
        np.testing.assert_allclose(both.states[0, part][valid], alone.states[0][valid], atol=1e-5)
        start += length
    assert bool(both.valid[0, 4]) == (not shift and pattern.kind != "autoregressive")


def test_token_shift_takes_the_state_before():
    lm = toy()
    params = lm.init()
    tokens, masked = jnp.asarray([[0, 1, 2, 3, 4, 5]]), jnp.asarray([[1, 0, 1, 1, 0, 1]], bool)
    pattern = Pattern("block_diffusion", 3)
    plain = predict(lm, params, tokens, masked, pattern, mask_id=6)
    noisy = predict(lm, params, tokens, masked, pattern, mask_id=6, token_shift=True)
    clean = predict(lm, params, tokens, masked, pattern, mask_id=6, token_shift=True, shift_context="clean")
    np.testing.assert_array_equal(noisy.states[:, 1:], plain.states[:, :-1])
    np.testing.assert_array_equal(clean.states[:, 3], plain.clean[:, 2])
    np.testing.assert_array_equal(clean.states[:, [1, 2, 4, 5]], plain.states[:, [0, 1, 3, 4]])
    assert noisy.valid.tolist() == [[False] + [True] * 5]


@pytest.mark.parametrize("masked_count, fits", [(9, True), (30, False)])
@pytest.mark.parametrize("groups", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_gathered_positions_give_the_loss_and_gradient_of_all(masked_count, fits, groups):
    lm = toy()
    params = lm.init()
    rng = np.random.default_rng(3)
    states = jnp.asarray(rng.normal(size=(4, 8, 8)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 6, (4, 8)))
    where = np.zeros(32, bool)
    where[rng.permutation(32)[:masked_count]] = True
    where = jnp.asarray(where.reshape(4, 8))
    weight = jnp.asarray(rng.random((4, 8)), jnp.float32)

    def gathered(params, states, **options):
        nll, z = gathered_nll(lm, params, states, targets, where, suppress=(6,), z_loss=0.1, **options)
        return jnp.sum(nll * weight + z)

    def plain(params, states):
        logits = jnp.where(jnp.arange(7) == 6, -jnp.inf, lm.head(params, states))
        lse = jax.nn.logsumexp(logits, -1)
        nll = lse - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return jnp.sum(jnp.where(where, nll * weight + 0.1 * lse**2, 0.0))

    want = jax.value_and_grad(plain, (0, 1))(params, states)
    for options in ({"groups": groups}, {"groups": groups, "chunk_size": 5}):
        got = jax.value_and_grad(functools.partial(gathered, **options), (0, 1))(params, states)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), got, want)
    assert fits == (masked_count / 32 <= 0.625)


def any_order_nll(lm, params, tokens, block, context) -> float:
    """-log p of `block` averaged over all orders of revealing it: one forward per order and step."""
    config = lm.config
    total = 0.0
    orders = list(itertools.permutations(range(len(block))))
    cache = {}
    for order in orders:
        shown: set[int] = set()
        for place in order:
            key = frozenset(shown)
            if key not in cache:
                noisy = [t if i in shown else config.mask_id for i, t in enumerate(block)]
                inputs = jnp.asarray([[*context, *noisy]])
                logits = lm.head(params, lm.hidden(params, inputs, mask=BlockCausal(len(block))).states)[0]
                logits = np.array(logits[len(context) :])
                logits[:, config.mask_id] = -np.inf
                cache[key] = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
            total -= cache[key][place, block[place]]
            shown.add(place)
    return total / len(orders)


@pytest.mark.parametrize("size", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_bound_by_enumeration_is_the_average_over_all_orders(size):
    with jax.enable_x64(True):
        lm = toy()
        params = lm.init(dtype=np.float64)
        tokens = np.random.default_rng(size).integers(0, 6, 2 * size)
        score = exact_nelbo(lm, params, jnp.asarray(tokens[None]), block_size=size)
        first = any_order_nll(lm, params, tokens, tokens[:size], [])
        second = any_order_nll(lm, params, tokens, tokens[size:], tokens[:size])
        assert score.nats.dtype == np.float64
        assert abs(float(score.nats[0]) - (first + second)) < 1e-9
        # One bidirectional block over the row, and a short last block.
        alone = exact_nelbo(lm, params, jnp.asarray(tokens[None, :size]), block_size=size)
        assert abs(float(alone.nats[0]) - first) < 1e-9
        short = exact_nelbo(lm, params, jnp.asarray(tokens[None, : size + 2]), block_size=size)
        tail = any_order_nll_short(lm, params, tokens[: size + 2], size)
        assert abs(float(short.nats[0]) - (first + tail)) < 1e-9


def any_order_nll_short(lm, params, tokens, size) -> float:
    """The same for the two tokens of a short last block: both orders written out."""
    mask, last = lm.config.mask_id, tokens[size:]

    def log_p(noisy):
        inputs = jnp.asarray([[*tokens[:size], *noisy]])
        logits = np.array(lm.head(params, lm.hidden(params, inputs, mask=BlockCausal(size)).states)[0, size:])
        logits[:, mask] = -np.inf
        return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)

    both = log_p([mask, mask])
    orders = [
        both[0, last[0]] + log_p([last[0], mask])[1, last[1]],
        both[1, last[1]] + log_p([mask, last[1]])[0, last[0]],
    ]
    return -sum(orders) / 2


@pytest.mark.slow  # many programs to compile
def test_sampled_bound_has_the_enumerated_expectation():
    lm = toy()
    params = lm.init(4)
    rng = np.random.default_rng(4)
    tokens = jnp.asarray(rng.integers(0, 6, (3, 12)))
    loss_mask = jnp.ones((3, 12), bool).at[1, :5].set(False)
    segments = jnp.asarray([[1] * 12, [1] * 12, [1] * 6 + [2] * 4 + [0] * 2])
    options = {"block_size": 4, "loss_mask": loss_mask, "segment_ids": segments}
    exact = exact_nelbo(lm, params, tokens, **options)
    sampled = jax.jit(functools.partial(nelbo, lm, num_samples=4000, **options))(params, tokens, jax.random.key(0))
    assert exact.tokens.tolist() == sampled.tokens.tolist() == [12, 7, 10]
    assert (np.abs(sampled.nats - exact.nats) < 4 * sampled.stderr).all()
    assert (sampled.stderr < 0.02 * exact.nats).all() and (sampled.stderr > 0).all()
    np.testing.assert_allclose(sampled.per_token, exact.per_token, atol=0.5)
    assert not np.asarray(sampled.per_token)[~np.asarray(loss_mask & (segments > 0))].any()
    # A training-style weight 1/t with rounded counts would miss by more than that: the test has teeth.
    biased = sampled.nats * 0.917
    assert (np.abs(biased - exact.nats) > 4 * sampled.stderr).all()


def test_blocks_of_one_give_the_exact_likelihood():
    lm = toy()
    params = lm.init(5)
    tokens = jnp.asarray(np.random.default_rng(5).integers(0, 6, (2, 6)))
    score = nelbo(lm, params, tokens, jax.random.key(0), block_size=1, num_samples=2)
    want = np.zeros(2)
    for i in range(6):
        inputs = jnp.concatenate([tokens[:, :i], jnp.full((2, 1), 6)], axis=1)
        logits = lm.head(params, lm.hidden(params, inputs, mask=Causal()).states)[:, -1, :6]
        want -= np.asarray(jax.nn.log_softmax(logits))[np.arange(2), tokens[:, i]]
    np.testing.assert_allclose(score.nats, want, rtol=1e-5)
    np.testing.assert_allclose(score.stderr, 0.0, atol=0.02)
    assert score.tokens.tolist() == [6, 6]


@pytest.mark.slow  # many programs to compile
def test_shifted_blocks_of_one_are_the_autoregressive_likelihood():
    lm, params = golden()
    tokens = jnp.asarray(np.random.default_rng(6).integers(6, 60, (2, 9)), jnp.int32)
    exact = ar_nll(lm, params, tokens)
    logp = jax.nn.log_softmax(lm.apply(params, tokens), -1)
    want = -np.take_along_axis(np.asarray(logp)[:, :-1], np.asarray(tokens)[:, 1:, None], -1)[..., 0].sum(1)
    np.testing.assert_allclose(exact.nats, want, rtol=1e-5)
    assert exact.tokens.tolist() == [8, 8]
    shifted = nelbo(lm, params, tokens, jax.random.key(0), block_size=1, token_shift=True)
    # The bound leaves the mask token out of the softmax.
    without = np.array(lm.apply(params, tokens))[:, :-1]
    without[:, :, list(suppressed_ids(lm.config))] = -np.inf
    logp = without - np.logaddexp.reduce(without, axis=-1, keepdims=True)
    want = -np.take_along_axis(logp, np.asarray(tokens)[:, 1:, None], -1)[..., 0].sum(1)
    np.testing.assert_allclose(shifted.nats, want, rtol=1e-5)
    assert shifted.tokens.tolist() == [8, 8]


@pytest.mark.slow  # many programs to compile
def test_autoregressive_score_of_packed_documents():
    lm = toy()
    params = lm.init(7)
    tokens = jnp.asarray(np.random.default_rng(7).integers(0, 6, (1, 9)))
    segments = jnp.asarray([[1, 1, 1, 2, 2, 2, 2, 0, 0]])
    score = ar_nll(lm, params, tokens, segment_ids=segments)
    parts = [ar_nll(lm, params, tokens[:, :3]), ar_nll(lm, params, tokens[:, 3:7])]
    np.testing.assert_allclose(score.nats, sum(p.nats for p in parts), rtol=1e-5)
    assert score.tokens.tolist() == [5]


def test_bad_arguments():
    lm = toy()
    params, tokens = lm.init(), jnp.zeros((1, 4), jnp.int32)
    cases = [
        (lambda: Pattern("sideways"), "pattern must be one of .* got 'sideways'"),
        (lambda: Pattern("block_diffusion"), "needs block_size; got None"),
        (lambda: Pattern("block_diffusion", 0), "block_size must be an integer >= 1; got 0"),
        (lambda: Pattern("bidirectional", 4), "block_size must be None; got 4"),
        (lambda: Pattern("block_causal", 4, clean="token"), "clean='token' needs pattern 'block_diffusion'"),
        (lambda: Pattern("bidirectional", prefix_len=3), "prefix_len belongs to"),
        (lambda: Pattern("prefix_bidirectional"), "prefix_len belongs to"),
        (lambda: nelbo(lm, params, tokens, jax.random.key(0), block_size=0), "block_size must be"),
        (lambda: nelbo(lm, params, tokens, jax.random.key(0), block_size=2, num_samples=0), "num_samples"),
        (lambda: exact_nelbo(lm, params, tokens, block_size=13), "at most 12 for enumeration; got 13"),
        (lambda: require_mask_id(QwenConfig.tiny(mask_id=None)), "names no mask token"),
        (
            lambda: predict(lm, params, tokens, tokens > 0, Pattern("bidirectional"), mask_id=6, shift_context="clean"),
            "needs token_shift=True and a block_diffusion pattern",
        ),
        (lambda: gathered_nll(lm, params, jnp.zeros((1, 4, 8)), tokens, tokens > 0, groups=3), "groups must divide"),
        (
            lambda: gathered_nll(lm, params, jnp.zeros((1, 4, 8)), tokens, tokens > 0, fraction=0.0),
            r"fraction must lie in \(0, 1\]; got 0.0",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_suppressed_ids():
    assert suppressed_ids(QwenConfig.tiny(mask_id=2, pad_id=0, eos_ids=(1,))) == (2, 0)
    assert suppressed_ids(QwenConfig.tiny(mask_id=2, pad_id=1, eos_ids=(1,))) == (2,)
