"""Sampling against a NumPy float64 oracle that sorts, as the definitions in papers and transformers do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.decoding import sampling as module
from jaxmodels.decoding.sampling import (
    IN_OUTPUT,
    IN_PROMPT,
    Sampling,
    SamplingOptions,
    filter_limit,
    mark_seen,
    penalise,
    sample,
)

sample_jit = jax.jit(sample)
limit_jit = jax.jit(filter_limit)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def oracle_kept(logits, o: SamplingOptions) -> np.ndarray:
    """Which tokens survive: temperature, then top-k, top-p, min-p one after the other, each renormalised."""
    scaled = np.asarray(logits, np.float64) / o.temperature
    if o.top_k:
        kth = np.sort(scaled)[::-1][min(o.top_k, len(scaled)) - 1]
        scaled = np.where(scaled < kth, -np.inf, scaled)
    if o.top_p < 1:
        p = softmax(scaled)
        order = np.argsort(-p, kind="stable")
        before = np.concatenate([[0.0], np.cumsum(p[order])[:-1]])  # mass of more probable tokens
        kept = np.zeros(len(p), bool)
        kept[order[before < o.top_p]] = True
        kept[order[0]] = True
        scaled = np.where(kept, scaled, -np.inf)
    if o.min_p > 0:
        p = softmax(scaled)
        scaled = np.where(p < o.min_p * p.max(), -np.inf, scaled)
    return np.isfinite(scaled)


def oracle_penalised(logits, prompt, output, o: SamplingOptions) -> np.ndarray:
    out = np.asarray(logits, np.float64).copy()
    for token in set(prompt) | set(output):
        out[token] = out[token] / o.repetition_penalty if out[token] > 0 else out[token] * o.repetition_penalty
    for token in set(output):
        out[token] -= o.presence_penalty
    return out


def random_logits(rows, V, seed=0, scale=3.0):
    return np.random.default_rng(seed).normal(size=(rows, V)).astype(np.float32) * scale


FILTERS = [
    dict(top_k=1),
    dict(top_k=5),
    dict(top_k=96),
    dict(top_p=0.0),
    dict(top_p=0.1),
    dict(top_p=0.73),
    dict(top_p=0.999),
    dict(min_p=0.02),
    dict(min_p=0.5),
    dict(min_p=1.0),
    dict(top_k=20, top_p=0.8),
    dict(top_k=20, min_p=0.05),
    dict(top_p=0.9, min_p=0.05),
    dict(top_k=9, top_p=0.7, min_p=0.1),
]


@pytest.mark.smoke
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_filters_keep_what_the_oracle_keeps(options, temperature):
    o = SamplingOptions(temperature=temperature, **options)
    logits = random_logits(16, 97, seed=1)
    distance = (logits.max(-1, keepdims=True) - logits) / np.float32(temperature)
    limit = limit_jit(jnp.asarray(distance), Sampling.stack([o] * 16))
    kept = distance <= np.asarray(limit)[:, None]
    expected = np.stack([oracle_kept(row, o) for row in logits])
    np.testing.assert_array_equal(kept, expected)
    assert expected.sum() < expected.size  # the case filters something


def test_rows_filter_by_their_own_options():
    rows = [SamplingOptions(temperature=1.0, **f) for f in FILTERS] + [SamplingOptions(temperature=1.0)]
    logits = random_logits(len(rows), 97, seed=2)
    distance = logits.max(-1, keepdims=True) - logits
    kept = distance <= np.asarray(limit_jit(jnp.asarray(distance), Sampling.stack(rows)))[:, None]
    np.testing.assert_array_equal(kept, np.stack([oracle_kept(x, o) for x, o in zip(logits, rows)]))


def test_ties_with_the_last_token_kept_are_kept():
    logits = jnp.asarray([[0.0, 2.0, 1.0, 1.0, 1.0, -1.0]])
    distance = 2.0 - logits
    for options, kept in [
        (dict(top_k=2), [1, 2, 3, 4]),
        (dict(top_k=1), [1]),
        (dict(top_p=0.6), [1, 2, 3, 4]),
        (dict(min_p=float(np.exp(-1.0)) * 0.999), [1, 2, 3, 4]),
    ]:
        limit = limit_jit(distance, Sampling.stack([SamplingOptions(temperature=1.0, **options)]))
        assert np.flatnonzero(np.asarray(distance[0]) <= float(limit[0])).tolist() == kept, options


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(temperature=0.5),
        dict(temperature=1.7, top_k=4),
        dict(top_p=0.97),
        dict(top_k=5, top_p=0.9, min_p=0.05),
    ],
    ids=str,
)
def test_frequencies_follow_the_filtered_distribution(options):
    """60 000 seeds, one draw each: chi-square against the oracle's probabilities."""
    n, V = 60_000, 8
    o = SamplingOptions(**{"temperature": 1.0} | options)
    logits = random_logits(1, V, seed=3, scale=1.5)[0]
    probability = softmax(np.where(oracle_kept(logits, o), logits.astype(np.float64) / o.temperature, -np.inf))
    batch = jax.tree.map(lambda x: jnp.broadcast_to(x, (n,)), Sampling.stack([o]))
    batch = batch.replace(seed=jnp.arange(n, dtype=jnp.uint32))
    token, _ = sample_jit(jnp.broadcast_to(jnp.asarray(logits), (n, V)), batch, position=jnp.zeros(n, jnp.int32))
    counts = np.bincount(np.asarray(token), minlength=V)
    live = probability > 0
    assert counts[~live].sum() == 0
    chi_square = ((counts - n * probability)[live] ** 2 / (n * probability[live])).sum()
    degrees = live.sum() - 1
    assert degrees > 0 and chi_square < degrees + 5 * np.sqrt(2 * degrees)  # about 5 sigma


def test_draws_differ_between_positions_and_between_seeds():
    logits = jnp.zeros((64, 1000))

    def options(seeds):
        return Sampling.stack([SamplingOptions(temperature=1.0, seed=int(s)) for s in seeds])

    along, _ = sample_jit(logits, options([7] * 64), position=jnp.arange(64))
    across, _ = sample_jit(logits, options(range(64)), position=jnp.zeros(64, jnp.int32))
    assert len(set(np.asarray(along).tolist())) > 55  # 62 expected of 1000
    assert len(set(np.asarray(across).tolist())) > 55


@pytest.mark.parametrize("repetition, presence", [(1.3, 0.0), (0.8, 0.0), (1.0, 0.7), (1.2, -0.5), (1.0, 0.0)])
def test_penalties(repetition, presence):
    o = SamplingOptions(repetition_penalty=repetition, presence_penalty=presence)
    logits = random_logits(2, 23, seed=4)
    prompts, outputs = [[1, 2, 3, 3], [5]], [[3, 4], [7, 7, 8]]
    seen = np.zeros((2, 23), np.uint8)
    for row in range(2):
        seen[row, prompts[row]] |= IN_PROMPT
        seen[row, outputs[row]] |= IN_OUTPUT
    result = penalise(jnp.asarray(logits), Sampling.stack([o] * 2), jnp.asarray(seen))
    expected = [oracle_penalised(logits[i], prompts[i], outputs[i], o) for i in range(2)]
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-6)
    # and they decide what a greedy row takes, not only what a drawn one does
    token, _ = sample_jit(
        jnp.asarray(logits), Sampling.stack([o] * 2), position=jnp.zeros(2, int), seen=jnp.asarray(seen)
    )
    assert token.tolist() == np.argmax(expected, -1).tolist()


def test_mark_seen_keeps_both_bits_and_skips_invalid_tokens():
    seen = jnp.zeros((2, 6), jnp.uint8)
    tokens = jnp.asarray([[1, 1, 2], [3, 4, 5]])
    seen = mark_seen(seen, tokens, IN_PROMPT, jnp.asarray([[True, True, True], [True, False, False]]))
    seen = mark_seen(seen, jnp.asarray([[2], [5]]), IN_OUTPUT, jnp.asarray([[True], [True]]))
    assert seen.tolist() == [[0, 1, 3, 0, 0, 0], [0, 0, 0, 1, 0, 2]]


def test_temperature_zero_is_exactly_greedy_whatever_else_is_set():
    logits = jnp.asarray(random_logits(6, 50, seed=5)).at[2, [7, 30]].set(99.0)  # a tie: the lower id wins
    greedy = SamplingOptions(top_k=3, top_p=0.2, min_p=0.3, seed=9)
    rows = [greedy] * 5 + [SamplingOptions(temperature=2.0)]  # a drawing neighbour switches the noise on
    token, _ = sample_jit(logits, Sampling.stack(rows), position=jnp.arange(6))
    assert token[:5].tolist() == jnp.argmax(logits[:5], -1).tolist()
    assert token[2] == 7


@pytest.mark.parametrize("temperature", [1e-30, 1e-3, 1e30])
def test_extreme_temperatures_stay_finite(temperature):
    logits = jnp.asarray(random_logits(1, 50, seed=6)).at[0, 3].set(-jnp.inf)
    token, logprob = sample_jit(
        logits, Sampling.stack([SamplingOptions(temperature=temperature)]), position=jnp.zeros(1, int)
    )
    assert np.isfinite(logprob[0]) and token[0] != 3
    if temperature < 1:
        assert token[0] == jnp.argmax(logits[0])


def test_filters_that_keep_everything_change_nothing():
    logits = jnp.asarray(random_logits(64, 97, seed=7))
    plain = [SamplingOptions(temperature=1.3, seed=i) for i in range(64)]
    token, _ = sample_jit(logits, Sampling.stack(plain), position=jnp.arange(64))
    for change in (dict(top_k=97), dict(top_k=2**31 - 1), dict(top_p=1.0), dict(min_p=0.0), dict(top_k=0)):
        rows = [dataclasses.replace(o, **change) for o in plain]
        again, _ = sample_jit(logits, Sampling.stack(rows), position=jnp.arange(64))
        np.testing.assert_array_equal(token, again, err_msg=str(change))


def test_logprobs_are_those_of_the_raw_logits():
    logits = random_logits(5, 40, seed=8)
    o = SamplingOptions(temperature=0.4, top_k=3, repetition_penalty=2.0)
    seen = jnp.full((5, 40), IN_PROMPT, jnp.uint8)
    token, logprob = sample_jit(jnp.asarray(logits), Sampling.stack([o] * 5), position=jnp.arange(5), seen=seen)
    expected = [np.log(softmax(row.astype(np.float64)))[t] for row, t in zip(logits, token)]
    np.testing.assert_allclose(logprob, expected, atol=1e-5)


MIXED = [
    SamplingOptions(temperature=0.0),
    SamplingOptions(temperature=0.8, seed=1),
    SamplingOptions(temperature=1.5, top_k=7, seed=2),
    SamplingOptions(temperature=1.0, top_p=0.6, seed=3),
    SamplingOptions(temperature=1.0, top_k=30, top_p=0.9, min_p=0.02, repetition_penalty=1.4, seed=4),
    SamplingOptions(temperature=0.7, presence_penalty=1.5, seed=2**32 - 1),
]


def test_a_row_does_not_depend_on_its_batch():
    """The same six requests alone, together, reversed, and doubled: bit for bit the same tokens."""
    logits = jnp.asarray(random_logits(6, 97, seed=9))
    seen = jnp.asarray(np.random.default_rng(0).integers(0, 4, (6, 97)), jnp.uint8)
    position = jnp.asarray([0, 5, 5, 1000, 3, 8])

    def tokens(rows):
        rows = np.asarray(rows)
        token, _ = sample_jit(
            logits[rows],
            Sampling.stack([MIXED[i] for i in rows]),
            position=position[rows],
            seen=seen[rows],
        )
        return dict(zip(rows.tolist(), np.asarray(token).tolist()))

    together = tokens(range(6))
    assert tokens(range(5, -1, -1)) == together
    assert tokens([3, 3, 0, 1, 2, 3, 4, 5, 5]) == together
    assert {i: tokens([i])[i] for i in range(6)} == together


def test_changing_any_option_never_recompiles(monkeypatch):
    traces = []
    original = module.filter_limit
    monkeypatch.setattr(module, "filter_limit", lambda *args: traces.append(1) or original(*args))
    run = jax.jit(lambda *args, **kwargs: sample(*args, **kwargs))
    logits, seen = jnp.zeros((2, 50)), jnp.zeros((2, 50), jnp.uint8)
    for first in [*MIXED, SamplingOptions(temperature=3.0, top_k=2**31 - 1, top_p=0.0)]:
        for second in MIXED:
            run(logits, Sampling.stack([first, second]), position=jnp.arange(2), seen=seen)
    assert run._cache_size() == 1
    assert len(traces) == 1


def test_no_sort_is_compiled():
    """A sort of the vocabulary costs 30 times the whole filter; see the module's docstring."""
    args = (jnp.zeros((2, 50)), Sampling.stack(MIXED[:2]))
    program = str(jax.make_jaxpr(sample)(*args, position=jnp.arange(2), seen=jnp.zeros((2, 50), jnp.uint8)))
    assert "scan" in program or "while" in program  # the bisection is there
    assert "sort[" not in program and "top_k[" not in program


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_k", True),
        ("top_k", 2**31),
        ("top_p", -0.01),
        ("top_p", 1.01),
        ("min_p", -0.01),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("presence_penalty", float("inf")),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_invalid_values_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"{field} must be .*; got {value!r}"):
        SamplingOptions(**{field: value})
