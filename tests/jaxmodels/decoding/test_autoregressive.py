"""Prefill and steps against full recomputation, and the promises of the state: ragged, masked, donated, one trace."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.cache import KVCache, SinkRingCache
from jaxmodels.decoding.autoregressive import (
    Piece,
    Prompt,
    init_state,
    make_extend,
    make_prefill,
    make_step,
    make_steps,
)
from jaxmodels.decoding.sampling import Sampling, SamplingOptions
from jaxmodels.qwen import QwenConfig, build
from pallas_kernels.masks import Causal, SlidingWindow

CONFIG = QwenConfig.tiny(layers=2, dim=32, mlp_dim=64, head_dim=16)
LM = build(CONFIG)
B, S, T = 3, 48, 16


class Counted:
    """A function that counts how often it is traced, jitted with its state donated."""

    def __init__(self, function):
        def traced(*args):
            self.traces += 1
            return function(*args)

        self.traces = 0
        self.call = jax.jit(traced, donate_argnums=1)

    def __call__(self, *args):
        return self.call(*args)


PREFILL, STEP = Counted(make_prefill(LM)), Counted(make_step(LM))
STEPS = Counted(make_steps(make_step(LM), 5))
ALL = np.ones(B, bool)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: x * 6 if x.ndim > 1 else x, LM.init(jax.random.key(0)))


def empty():
    return init_state(KVCache.init(CONFIG, batch=B, capacity=S, dtype=jnp.float32), CONFIG.vocab_size, max_eos=2)


def prompt(rows, prompts, options=None, remaining=20, eos=()):
    """Up to B prompts, padded with garbage to [B, T]; the rest is filler."""
    filler = B - len(prompts)
    tokens = np.full((B, T), 96, np.int32)
    for i, ids in enumerate(prompts):
        tokens[i, : len(ids)] = ids
    return Prompt(
        tokens=jnp.asarray(tokens),
        lengths=jnp.array([len(ids) for ids in prompts] + [1] * filler),
        rows=jnp.array([*rows, *[B] * filler]),
        remaining=jnp.full(B, remaining),
        eos=jnp.tile(jnp.array([*eos, -1, -1][:2]), (B, 1)),
        sampling=Sampling.stack([*(options or [SamplingOptions()] * len(prompts)), *[SamplingOptions()] * filler]),
    )


PROMPTS = [[5, 6, 7], [9] * 16, [44]]
SAMPLED = [SamplingOptions(temperature=1.0, seed=i, repetition_penalty=1.2) for i in range(3)]


def decode(params, state, n):
    """Tokens [n, B] of n single steps, and the state."""
    out = []
    for _ in range(n):
        state, sampled = STEP(params, state)
        out.append(np.asarray(sampled.token))
    return np.stack(out), state


@pytest.mark.smoke
def test_cached_greedy_equals_full_recomputation(params):
    state, first = PREFILL(params, empty(), prompt(range(3), PROMPTS))
    tokens, state = decode(params, state, 8)
    tokens = np.concatenate([np.asarray(first.token)[None], tokens])
    full = jax.jit(LM.apply)
    for row, ids in enumerate(PROMPTS):
        sequence = np.array([*ids, *tokens[:, row]])
        logits = np.asarray(full(params, jnp.asarray(sequence[None])))[0, len(ids) - 1 : -1]
        assert logits.argmax(-1).tolist() == tokens[:, row].tolist()
    assert state.cache.lengths.tolist() == [len(ids) + 8 for ids in PROMPTS]
    assert len(set(tokens.ravel().tolist())) > 5  # a constant output would prove little


def test_cached_logprobs_equal_full_recomputation(params):
    state, first = PREFILL(params, empty(), prompt(range(3), PROMPTS, SAMPLED))
    tokens, logprobs = [np.asarray(first.token)], [np.asarray(first.logprob)]
    for _ in range(6):
        state, sampled = STEP(params, state)
        tokens.append(np.asarray(sampled.token))
        logprobs.append(np.asarray(sampled.logprob))
    for row, ids in enumerate(PROMPTS):
        new = [int(step[row]) for step in tokens]
        logits = LM.apply(params, jnp.asarray([[*ids, *new]]))[0, len(ids) - 1 : -1]
        expected = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.array(new)[:, None], 1)[:, 0]
        np.testing.assert_allclose([step[row] for step in logprobs], expected, atol=1e-5)


@pytest.mark.parametrize("options", [None, SAMPLED], ids=["greedy", "sampled"])
def test_chunks_equal_single_steps(params, options):
    state, _ = PREFILL(params, empty(), prompt(range(3), PROMPTS, options))
    one, _ = decode(params, state, 10)
    state, _ = PREFILL(params, empty(), prompt(range(3), PROMPTS, options))
    state, a = STEPS(params, state, ALL)
    state, b = STEPS(params, state, ALL)
    np.testing.assert_array_equal(np.concatenate([a.tokens, b.tokens], 1).T, one)
    assert a.counts.tolist() == b.counts.tolist() == [5, 5, 5]


def test_a_token_budget_and_either_eos_id_end_a_row(params):
    state, first = PREFILL(params, empty(), prompt(range(3), PROMPTS, SAMPLED))
    tokens, _ = decode(params, state, 9)
    tokens = np.concatenate([np.asarray(first.token)[None], tokens])
    eos = [int(tokens[2, 0]), int(tokens[3, 1])]
    ends = []  # how many tokens each row has with these EOS ids and a budget of 7
    for row in range(3):
        hits = [i for i in range(7) if tokens[i, row] in eos]
        ends.append(hits[0] + 1 if hits else 7)
    assert ends[0] < 7 and ends[1] < 7
    state, _ = PREFILL(params, empty(), prompt(range(3), PROMPTS, SAMPLED, remaining=7, eos=eos))
    state, a = STEPS(params, state, ALL)
    state, b = STEPS(params, state, ALL)
    assert (1 + a.counts + b.counts).tolist() == ends
    assert state.done.all()
    for row in range(3):
        given = np.concatenate([a.tokens[row, : a.counts[row]], b.tokens[row, : b.counts[row]]])
        np.testing.assert_array_equal(given, tokens[1 : ends[row], row])
    state, c = STEPS(params, state, ALL)  # nothing is left to do
    assert c.counts.tolist() == [0, 0, 0]


def test_a_row_that_is_not_active_does_no_work(params):
    state, _ = PREFILL(params, empty(), prompt(range(3), PROMPTS, SAMPLED))
    before = jax.tree.map(jnp.copy, state)
    active = np.array([True, False, True])
    state, chunk = STEPS(params, state, active)
    after = state
    assert chunk.counts.tolist() == [5, 0, 5]
    assert after.cache.lengths.tolist() == [8, 0, 6]
    for name in ("token", "remaining", "seen"):
        np.testing.assert_array_equal(getattr(after, name)[1], getattr(before, name)[1], err_msg=name)
    np.testing.assert_array_equal(after.cache.k[:, 1], before.cache.k[:, 1])
    assert (after.cache.k[:, 0] != before.cache.k[:, 0]).any()


def test_a_refilled_row_leaves_its_neighbours_alone_and_forgets_its_past(params):
    """Row 1 is restarted while 0 and 2 run: all three give what they give on their own, bit for bit."""
    state, _ = PREFILL(params, empty(), prompt(range(3), PROMPTS, SAMPLED))
    undisturbed, _ = decode(params, state, 8)
    state, fresh = PREFILL(params, empty(), prompt([1], [[8, 8]], [SAMPLED[0]]))
    alone, _ = decode(params, state, 4)

    state, _ = PREFILL(params, empty(), prompt(range(3), PROMPTS, SAMPLED))
    start, state = decode(params, state, 4)
    state, again = PREFILL(params, state, prompt([1], [[8, 8]], [SAMPLED[0]]))
    rest, _ = decode(params, state, 4)
    both = np.concatenate([start, rest])
    np.testing.assert_array_equal(both[:, [0, 2]], undisturbed[:, [0, 2]])
    assert again.token[0] == fresh.token[0] and again.valid.tolist() == [True, False, False]
    np.testing.assert_array_equal(rest[:, 1], alone[:, 1])


def test_a_sequence_cut_anywhere_goes_on_as_it_would_have(params):
    """The noise depends on seed and position, so prompt + output with the same seed continues the output."""
    options = [SamplingOptions(temperature=1.0, seed=3)]
    state, first = PREFILL(params, empty(), prompt([0], [PROMPTS[0]], options))
    tokens, _ = decode(params, state, 9)
    sequence = [*PROMPTS[0], int(first.token[0]), *tokens[:, 0].tolist()]
    state, first = PREFILL(params, empty(), prompt([2], [sequence[:8]], options))
    tokens, _ = decode(params, state, 4)
    assert [int(first.token[0]), *tokens[:, 2].tolist()] == sequence[8:13]


def test_a_state_saved_in_mid_stream_continues_identically(params):
    state, _ = PREFILL(params, empty(), prompt(range(3), PROMPTS, SAMPLED))
    _, state = decode(params, state, 3)
    leaves, structure = jax.tree.flatten(state)
    saved = [np.array(leaf) for leaf in leaves]
    expected, _ = decode(params, state, 5)
    again, _ = decode(params, jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in saved]), 5)
    np.testing.assert_array_equal(again, expected)


def test_everything_above_was_traced_once(params):
    state, _ = PREFILL(params, empty(), prompt(range(2), PROMPTS[:2], SAMPLED[:2], remaining=3, eos=[4]))
    state, _ = STEPS(params, state, ALL)
    decode(params, state, 2)
    assert (PREFILL.traces, STEP.traces, STEPS.traces) == (1, 1, 1)


IN_PLACE = {
    "step": (make_step(LM), ()),
    "steps": (make_steps(make_step(LM), 5), (ALL,)),
    "prefill": (make_prefill(LM), (prompt([1], [[5]]),)),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_the_cache_is_updated_in_place(params, name):
    """The donated cache is the output's memory, and nothing of its size is allocated beside it."""
    function, extra = IN_PLACE[name]
    capacity = 20_000
    cache = KVCache.init(CONFIG, batch=B, capacity=capacity, dtype=jnp.float32)
    args = (LM.unstack(params), init_state(cache, CONFIG.vocab_size, max_eos=2), *extra)
    leaves, structure = jax.tree.flatten(args)
    weights = len(jax.tree.leaves(args[0]))
    donated = tuple(range(weights, weights + len(jax.tree.leaves(args[1]))))
    flat = jax.jit(lambda *leaves: function(*jax.tree.unflatten(structure, leaves)), donate_argnums=donated)
    memory = flat.lower(*leaves).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * cache.k.nbytes
    assert memory.temp_size_in_bytes < cache.k.nbytes / 2


def test_bad_sizes_are_refused(params):
    with pytest.raises(ValueError, match="n must be >= 1; got 0"):
        make_steps(STEP, 0)
    small = init_state(KVCache.init(CONFIG, batch=B, capacity=T - 1, dtype=jnp.float32), CONFIG.vocab_size)
    with pytest.raises(ValueError, match="padded to 16 tokens does not fit the cache capacity 15"):
        jax.jit(make_prefill(LM))(params, small, prompt([0], [[1]]))


SINKS, RING, PIECE = 2, 6, 5
EXTEND, FINISH = Counted(make_extend(LM)), Counted(make_prefill(LM, resume=True, top=3))
TOP_STEPS = Counted(make_steps(make_step(LM, top=3), 5, top=3))


def ring():
    cache = SinkRingCache.init(CONFIG, batch=B, capacity=SINKS + RING, dtype=jnp.float32, num_sinks=SINKS)
    return init_state(cache, CONFIG.vocab_size, max_eos=2)


def read_in_pieces(params, state, rows, prompts, options=None, remaining=200):
    """Prompts of any lengths, PIECE tokens at a time, all ending in the last piece."""
    counts = [-(-len(ids) // PIECE) for ids in prompts]
    filler = B - len(prompts)

    def column(values, otherwise):
        return jnp.asarray([*values, *[otherwise] * filler])

    def piece(at):
        own = [at - max(counts) + count for count in counts]  # number of the piece, negative before the first
        parts = [ids[n * PIECE : (n + 1) * PIECE] if n >= 0 else [96] for n, ids in zip(own, prompts, strict=True)]
        tokens = np.full((B, PIECE), 96, np.int32)
        for i, part in enumerate(parts):
            tokens[i, : len(part)] = part
        return {
            "tokens": jnp.asarray(tokens),
            "lengths": column(map(len, parts), 1),
            "rows": column((row if n >= 0 else B for row, n in zip(rows, own, strict=True)), B),
            "first": column((n == 0 for n in own), True),
        }

    for at in range(max(counts) - 1):
        state = EXTEND(params, state, Piece(**piece(at)))
    options = [*(options or [SamplingOptions()] * len(prompts)), *[SamplingOptions()] * filler]
    more = {"remaining": jnp.full(B, remaining), "eos": jnp.full((B, 2), -1), "sampling": Sampling.stack(options)}
    return FINISH(params, state, Prompt(**piece(max(counts) - 1), **more))


LONG = [list(range(3, 26)), [7, 7], list(range(40, 51))]


@pytest.mark.parametrize("kind", ["growing", "ring"])
def test_prompts_in_pieces_equal_full_recomputation(params, kind):
    """Prompts of one and of several pieces, longer than the ring; then decoding until the ring has wrapped again."""
    state, mask = (empty(), Causal()) if kind == "growing" else (ring(), SlidingWindow(RING, SINKS))
    state, _ = read_in_pieces(params, state, [2, 0], LONG[:2])  # something to forget
    state, first = read_in_pieces(params, state, range(3), LONG, SAMPLED)
    state, a = TOP_STEPS(params, state, ALL)
    state, b = TOP_STEPS(params, state, ALL)
    tokens = np.concatenate([first.token[:, None], a.tokens, b.tokens], 1)
    logprobs = np.concatenate([first.logprob[:, None], a.logprobs, b.logprobs], 1)
    top_tokens, top_logprobs = (
        np.concatenate([getattr(first.top, name)[:, None], getattr(a.top, name), getattr(b.top, name)], 1)
        for name in ("tokens", "logprobs")
    )
    full = jax.jit(lambda tokens, lengths: jax.nn.log_softmax(LM.apply(params, tokens, mask=mask, lengths=lengths)))
    whole = np.zeros((B, 40), np.int32)
    for row, ids in enumerate(LONG):
        whole[row, : len(ids) + 11] = [*ids, *tokens[row]]
    lengths = jnp.asarray([len(ids) + 11 for ids in LONG])
    every = np.asarray(full(whole, lengths))
    for row, ids in enumerate(LONG):
        expected = every[row, len(ids) - 1 : len(ids) + 10]
        chosen = np.take_along_axis(expected, tokens[row][:, None], 1)[:, 0]
        # Logits of size 10, summed in another order: float32 rounds them by a little more than 1e-5.
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
        close(logprobs[row], chosen)
        close(top_logprobs[row], -np.sort(-expected, axis=1)[:, :3])
        close(np.take_along_axis(expected, top_tokens[row], 1), top_logprobs[row])
    if kind == "ring":
        dense = jax.nn.log_softmax(LM.apply(params, jnp.asarray(whole), lengths=lengths))
        assert np.abs(dense[0, 33] - every[0, 33]).max() > 1e-3, "the window must matter"
    # In pieces or at once: the same state, so the same tokens, whatever the options.
    if kind == "growing":
        state, once = PREFILL(params, empty(), prompt([1, 2], LONG[1:], SAMPLED[1:]))
        again, _ = decode(params, state, 10)
        np.testing.assert_array_equal(np.concatenate([once.token[None, :2], again[:, 1:]]).T, tokens[1:])


def test_reading_in_pieces_leaves_the_other_rows_alone(params):
    state, _ = read_in_pieces(params, ring(), range(3), LONG, SAMPLED)
    state, a = TOP_STEPS(params, state, ALL)
    state, b = TOP_STEPS(params, state, ALL)
    state, _ = read_in_pieces(params, ring(), range(3), LONG, SAMPLED)
    state, c = TOP_STEPS(params, state, ALL)
    state, fresh = read_in_pieces(params, state, [1], [LONG[0]], [SAMPLED[0]])
    state, d = TOP_STEPS(params, state, ALL)
    for row in (0, 2):
        np.testing.assert_array_equal([*c.tokens[row], *d.tokens[row]], [*a.tokens[row], *b.tokens[row]])
    state, alone = read_in_pieces(params, ring(), [1], [LONG[0]], [SAMPLED[0]])
    state, e = TOP_STEPS(params, state, ALL)
    assert fresh.token[0] == alone.token[0] and d.tokens[1].tolist() == e.tokens[1].tolist()


def test_an_endless_stream_saved_in_the_middle_continues_identically(params):
    state, _ = read_in_pieces(params, ring(), range(3), LONG, SAMPLED)
    state, _ = TOP_STEPS(params, state, ALL)
    leaves, structure = jax.tree.flatten(state)
    saved = [np.array(leaf) for leaf in leaves]
    state, expected = TOP_STEPS(params, state, ALL)
    _, again = TOP_STEPS(params, jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in saved]), ALL)
    np.testing.assert_array_equal(again.tokens, expected.tokens)
    np.testing.assert_array_equal(again.logprobs, expected.logprobs)
    assert (EXTEND.traces, FINISH.traces, TOP_STEPS.traces) == (2, 2, 2)  # for either cache once
