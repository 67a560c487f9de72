"""Cached block decoding against a brute-force decoder that recomputes everything with its own attention."""

import collections
import dataclasses
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxmodels import load_pretrained
from jaxmodels.decoding.block_diffusion import generation, stream
from jaxmodels.decoding.block_diffusion.generation import (
    BlockDecoding,
    Guess,
    RevealOptions,
    RowOptions,
    guess_tokens,
    new_block,
    unfinished,
)
from jaxmodels.decoding.block_diffusion.stream import BlockStream, generate, plan_request
from jaxmodels.decoding.sampling import SamplingOptions
from jaxmodels.layers.rope import RopeConfig
from jaxmodels.qwen import QwenConfig, build

VOCAB, MASK, EOS, PAD = 23, 2, 1, 0
GOLDEN = Path(__file__).parents[1] / "goldens/qwen3"


def tiny(**changes) -> QwenConfig:
    fields = {
        "vocab_size": VOCAB, "dim": 16, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 8, "mlp_dim": 24,
        "rope": RopeConfig(theta=100.0), "qk_norm": True, "qkv_bias": True, "max_positions": 64,
        "eos_ids": (EOS,), "pad_id": PAD, "mask_id": MASK, "block_size": 4,
    }  # fmt: skip
    return QwenConfig(**(fields | changes))


@functools.cache
def model(seed: int = 0, **changes):
    lm = build(tiny(**changes))
    leaves, tree = jax.tree.flatten(jax.eval_shape(lm.init, jax.random.key(0)))
    rng = np.random.default_rng(seed)
    leaves = [jnp.asarray(rng.normal(size=leaf.shape, scale=0.4), jnp.float32) for leaf in leaves]
    return lm, jax.tree.unflatten(tree, leaves)


@functools.partial(jax.jit, static_argnums=0)
def brute_force_logits(config, params, tokens, visible):
    """The decoder written out once more: logits [B, S, V] under a dense mask [B, S, S]."""

    def norm(x, scale):
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + config.norm_eps) * scale

    def rotate(x):  # [B, S, heads, H]
        half = config.head_dim // 2
        angle = jnp.arange(x.shape[1])[:, None] / config.rope.theta ** (jnp.arange(half) / half)
        cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
        a, b = x[..., :half], x[..., half:]
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    x = params["embed"][tokens]
    for i in range(config.layers):
        p = jax.tree.map(lambda w, i=i: w[i], params["layers"])
        a, h = p["attention"], norm(x, p["attention_norm"])
        q = rotate(norm(jnp.einsum("BTD,NHD->BTNH", h, a["q"]) + a["q_bias"], a["q_norm"]))
        k = rotate(norm(jnp.einsum("BTD,NHD->BTNH", h, a["k"]) + a["k_bias"], a["k_norm"]))
        v = jnp.einsum("BTD,NHD->BTNH", h, a["v"]) + a["v_bias"]
        k, v = (jnp.repeat(y, config.heads // config.kv_heads, axis=2) for y in (k, v))
        scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) / math.sqrt(config.head_dim)
        weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -1e30), -1)
        x = x + jnp.einsum("BNTS,BSNH,DNH->BTD", weights, v, a["o"])
        h, m = norm(x, p["mlp_norm"]), p["mlp"]
        x = x + (jax.nn.silu(h @ m["gate"].T) * (h @ m["up"].T)) @ m["down"].T
    return norm(x, params["final_norm"]) @ params["head"].T


def brute_force_decode(lm, params, prompts, new, reveal, decoding, *, align=False, shift=False, eos=()):
    """Every step recomputes prompt, finished blocks and current block; a plain loop over rows decides."""
    config, n, rows = lm.config, decoding.block_length, len(prompts)
    starts = [len(p) - len(p) % n if align else len(p) for p in prompts]
    blocks = [-(-(len(p) - s + new) // n) for p, s in zip(prompts, starts, strict=True)]
    size = 48
    canvas = np.full((rows, size), MASK)
    for row, prompt in enumerate(prompts):
        canvas[row, : len(prompt)] = prompt
    q, k = np.arange(size)[:, None], np.arange(size)[None, :]
    whole = np.zeros((rows, size, size), bool)
    for row, start in enumerate(starts):
        if decoding.prompt_attention == "causal":
            in_prompt = k <= q
        elif decoding.prompt_attention == "bidirectional":
            in_prompt = k >= 0
        else:
            in_prompt = k // decoding.prompt_block_size <= q // decoding.prompt_block_size
        later = (q >= start) & ((k < start) | ((k - start) // n <= (q - start) // n))
        whole[row] = np.where(q < start, in_prompt & (k < start), later)
    visible = whole.copy()
    block, step, done = [0] * rows, [0] * rows, [False] * rows
    shown = [{} for _ in range(rows)]
    passes, initial = [0] * rows, [0] * rows
    while not all(done):
        logits = np.array(brute_force_logits(config, params, canvas, visible), np.float64)
        if shift:
            logits = np.roll(logits, 1, axis=1)
        logits[:, :, [MASK, PAD]] = -np.inf
        for row in range(rows):
            if done[row]:
                continue
            low = starts[row] + block[row] * n
            high, end = low + n, len(prompts[row]) + new
            masked = [i for i in range(low, high) if canvas[row, i] == MASK]
            if step[row] == 0:
                initial[row] = len(masked)
            probability = np.exp(logits[row] - logits[row].max(-1, keepdims=True))
            probability /= probability.sum(-1, keepdims=True)
            best = {i: (probability[i].max(), int(probability[i].argmax())) for i in masked}
            ranked = sorted(masked, key=lambda i: (-best[i][0], i))
            rule = reveal[row]
            per_block = rule.steps_per_block(blocks[row], n)
            everything = ranked
            if rule.lookahead is not None:
                ranked = [i for i in ranked if i in masked[: rule.lookahead]]
            if step[row] == per_block - 1:
                chosen = everything
            elif rule.threshold is not None:
                chosen = [i for i in ranked if best[i][0] >= rule.threshold] or ranked[:1]
            elif rule.factor is not None:
                good = [
                    m for m in range(1, len(ranked) + 1)
                    if (m + 1) * (1 - best[ranked[m - 1]][0]) < rule.factor
                ]  # fmt: skip
                chosen = ranked[: max([1, *good])]
            elif rule.budget is not None:
                doubts = np.cumsum([1 - best[i][0] for i in ranked])
                chosen = ranked[: max(1, int((doubts < rule.budget).sum()))]
            else:
                chosen = ranked[: initial[row] // per_block + (step[row] < initial[row] % per_block)]
            for i in chosen:
                canvas[row, i] = best[i][1]
                shown[row][i] = (step[row], best[i][0])
            step[row] += 1
            passes[row] += 1
            content = canvas[row, max(low, len(prompts[row])) : min(high, end)].tolist()
            ended = next((i for i, t in enumerate(content) if t in eos), None)
            finished = MASK not in content
            if ended is not None and MASK not in content[:ended]:
                finished = done[row] = True
            if finished:
                block[row], step[row] = block[row] + 1, 0
                if decoding.commit_attention == "causal":
                    visible[row, low:high] = whole[row, low:high] & (k <= q)[low:high]
                done[row] |= high >= end
    result = []
    for row, prompt in enumerate(prompts):
        ids = canvas[row, len(prompt) : len(prompt) + new].tolist()
        ended = next((i for i, t in enumerate(ids) if t in eos), len(ids) - 1)
        ids = ids[: ended + 1]
        facts = [shown[row][len(prompt) + i] for i in range(len(ids))]
        result.append((ids, [s for s, _ in facts], [c for _, c in facts], passes[row]))
    return result


def all_prompts(seed: int, lengths=range(18)) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCAB, size).tolist() for size in lengths]


RULES = [
    RevealOptions(),
    RevealOptions(threshold=0.3),
    RevealOptions(steps=5),
    RevealOptions(factor=1.2),
    RevealOptions(budget=0.9),
    RevealOptions(threshold=0.0),
    RevealOptions(threshold=0.5, steps=6),
    RevealOptions(budget=0.9, lookahead=3),
    RevealOptions(threshold=0.2, lookahead=2, steps=12),
    RevealOptions(factor=1.6, lookahead=4),
    RevealOptions(budget=0.9, lookahead=10**12),
]


def compare(length, seeds, *, align=False, shift=False, fused=False, eos=(), **changes):
    lm, _ = model(0, token_shift=shift)
    decoding = BlockDecoding.for_model(lm.config, block_length=length, **changes)
    rows = BlockStream(lm, model(0)[1], decoding, batch=18, capacity=40, fused=fused)
    lengths = [*range(1, 18), 1] if shift else list(range(18))
    for seed in seeds:
        params = model(seed, token_shift=shift)[1]
        rows.params = params
        prompts = all_prompts(seed, lengths)
        rules = [RULES[(i + seed) % len(RULES)] for i in range(18)]
        if not prompts[0]:  # masks alone tie exactly: reveal them together
            rules[0] = RevealOptions(threshold=0.0)
        got, stats = generate(
            lm, params, prompts, max_new_tokens=9, reveal=rules, eos_ids=eos, align_blocks=align, stream=rows
        )
        want = brute_force_decode(lm, params, prompts, 9, rules, decoding, align=align, shift=shift, eos=eos)
        for row, (ids, steps, confidence, passes) in enumerate(want):
            where = f"seed {seed}, prompt of {len(prompts[row])}, {rules[row]}"
            assert got[row].tokens == ids, where
            assert got[row].reveal == steps, where
            np.testing.assert_allclose(got[row].confidence, confidence, atol=1e-5, err_msg=where)
            np.testing.assert_allclose(np.exp(got[row].logprob), confidence, atol=1e-5, err_msg=where)
            assert got[row].denoise_steps == passes, where
        assert stats.tokens == sum(len(ids) for ids, *_ in want)
    assert rows.traces["fused" if fused else "block"] == 1


@pytest.mark.smoke
def test_cached_decoding_equals_full_recomputation():
    compare(4, range(3))


@pytest.mark.parametrize(
    "length, options",
    [
        pytest.param(3, {"prompt_attention": "bidirectional", "align": True}, marks=pytest.mark.slow),
        (8, {"prompt_attention": "causal", "commit_attention": "causal", "fused": True, "eos": (5, 9, 14)}),
        pytest.param(5, {"shift": True, "fused": True, "align": True, "eos": (4,)}, marks=pytest.mark.slow),
        pytest.param(1, {"shift": True, "prompt_attention": "causal"}, marks=pytest.mark.slow),
    ],
)
def test_cached_decoding_equals_full_recomputation_in_all_variants(length, options):
    compare(length, range(3), **options)


@pytest.mark.slow  # last passed on 2026-11-27
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("length", range(1, 9))
def test_cached_decoding_of_a_hundred_models(length, fused):
    """Seven models per block length and kind of stream: 112 models."""
    seeds = range(7 * (2 * length - 2 + fused), 7 * (2 * length - 1 + fused))
    attention = generation.PROMPT_ATTENTIONS[length % 3]
    commit = "causal" if length % 4 == 3 else "block"
    compare(
        length, seeds, prompt_attention=attention, commit_attention=commit, align=length % 2 == 0, fused=fused, eos=(7,)
    )


@pytest.mark.slow  # many programs to compile
def test_blocks_of_one_with_shift_are_the_autoregressive_model():
    """Token ids of transformers' greedy `generate` on the model before any conversion."""
    golden = np.load(GOLDEN / "outputs.npz")
    prompts = [row[:length].tolist() for row, length in zip(golden["tokens"], golden["lengths"], strict=True)]
    used = {*golden["greedy"].ravel().tolist(), *golden["tokens"].ravel().tolist()}
    loaded = load_pretrained(GOLDEN, mask_id=next(i for i in range(67) if i not in used))
    lm = build(dataclasses.replace(loaded.config, token_shift=True, pad_id=None))
    decoding = BlockDecoding.for_model(lm.config, block_length=1, prompt_attention="causal")
    new = golden["greedy"].shape[1]
    got, stats = generate(lm, loaded.params, prompts, max_new_tokens=new, decoding=decoding, eos_ids=())
    assert [row.tokens for row in got] == golden["greedy"].tolist()
    assert stats.tpf_denoise == 1.0


def test_fused_live_and_plain_decoding_agree_and_count_their_passes():
    lm, params = model(1)
    prompts = all_prompts(1, [0, 3, 7, 17])
    rules = RULES[:4]
    options = {"max_new_tokens": 10, "reveal": rules, "eos_ids": ()}
    plain, plain_stats = generate(lm, params, prompts, fused=False, **options)
    blocks, steps = [], []
    fused, fused_stats = generate(lm, params, prompts, on_block=blocks.append, **options)
    live, _ = generate(lm, params, prompts, live=True, on_step=steps.append, **options)
    for a, b, c in zip(plain, fused, live, strict=True):
        assert (a.tokens, a.reveal) == (b.tokens, b.reveal) == (c.tokens, c.reveal)
        np.testing.assert_allclose(a.confidence, b.confidence, atol=1e-6)
    assert len(blocks) == 3  # 10 tokens in blocks of 4
    assert plain_stats.commits == 4 * 2 and fused_stats.commits == 0  # the last block is never committed
    assert plain_stats.denoise_steps == fused_stats.denoise_steps
    assert fused_stats.tpf_total == fused_stats.tpf_denoise > plain_stats.tpf_total
    # The live mode shows masks disappearing, pass by pass.
    left = [int(step.masked[0].sum()) for step in steps]
    assert left[:4] == [3, 2, 1, 0]


def test_rows_do_not_depend_on_their_batch_mates():
    lm, params = model(2)
    prompts = all_prompts(2, [5, 0, 11, 16])
    rules = [RevealOptions(threshold=0.2), RevealOptions(), RevealOptions(factor=1.0), RevealOptions(steps=4)]
    sampling = [SamplingOptions(temperature=t, seed=s, top_k=k) for t, s, k in
                [(0.0, 0, 0), (1.0, 7, 0), (0.7, 7, 5), (2.0, 8, 0)]]  # fmt: skip
    new = [9, 4, 13, 1]
    together, _ = generate(lm, params, prompts, max_new_tokens=new, reveal=rules, sampling=sampling, capacity=64)
    rows = BlockStream(lm, params, BlockDecoding.for_model(lm.config), batch=4, capacity=64)
    for i in range(4):  # alone, in another row
        row = (i + 1) % 4
        plan = plan_request(prompts[i], new[i], rows.decoding)
        rows.start([row], [plan], [rules[i]], [(EOS,)], [sampling[i]])
        tokens, done = [], False
        while not done:
            output = jax.device_get(rows.advance(np.arange(4) == row))
            tokens += output.tokens[row, : output.counts[row]].tolist()
            done = output.done[row]
        assert tokens == together[i].tokens
    # Another seed gives another text, the same seed the same.
    again, _ = generate(lm, params, prompts, max_new_tokens=new, reveal=rules, sampling=sampling, capacity=64)
    assert [r.tokens for r in again] == [r.tokens for r in together]
    other = [SamplingOptions(temperature=o.temperature, seed=99, top_k=o.top_k) for o in sampling]
    changed, _ = generate(lm, params, prompts, max_new_tokens=new, reveal=rules, sampling=other, capacity=64)
    assert changed[0].tokens == together[0].tokens and changed[2].tokens != together[2].tokens


def test_rows_start_and_stop_while_others_go_on_and_nothing_recompiles():
    lm, params = model(4)
    rows = BlockStream(lm, params, BlockDecoding.for_model(lm.config), batch=4, capacity=64, prefill_rows=2)
    before = collections.Counter(rows.traces)
    prompts, new = all_prompts(4, [3, 9, 14, 6, 1]), [11, 5, 17, 8, 6]
    rules = [RULES[i] for i in range(5)]
    collected, owner, waiting = {i: [] for i in range(5)}, [None] * 4, [0, 1, 2, 3, 4]
    while waiting or any(o is not None for o in owner):
        free = [row for row in range(4) if owner[row] is None][: min(2, len(waiting))]
        if free:
            jobs = [waiting.pop(0) for _ in free]
            for row, job in zip(free, jobs, strict=True):
                owner[row] = job
            plans = [plan_request(prompts[j], new[j], rows.decoding) for j in jobs]
            sampling = [SamplingOptions(temperature=0.5 * (j % 2), seed=j) for j in jobs]
            rows.start(free, plans, [rules[j] for j in jobs], [()] * len(jobs), sampling)
        output = jax.device_get(rows.advance(np.array([o is not None for o in owner])))
        for row, job in enumerate(owner):
            if job is not None:
                collected[job] += output.tokens[row, : output.counts[row]].tolist()
                if output.done[row]:
                    owner[row] = None
            else:
                assert output.counts[row] == 0
    assert all(count == 1 for count in (rows.traces - before).values())
    for job in range(5):
        alone, _ = generate(
            lm, params, [prompts[job]], max_new_tokens=new[job], reveal=rules[job], eos_ids=(), capacity=64,
            sampling=SamplingOptions(temperature=0.5 * (job % 2), seed=job),
        )  # fmt: skip
        assert alone[0].tokens == collected[job]


def test_stopped_rows_rest():
    lm, params = model(4)
    rows = BlockStream(lm, params, BlockDecoding.for_model(lm.config), batch=4, capacity=64)
    plan = plan_request([3, 4, 5], 12, rows.decoding)
    rows.start([0, 1], [plan, plan], [RevealOptions()] * 2, [()] * 2, [SamplingOptions()] * 2)
    rows.advance()
    output = jax.device_get(rows.advance(np.array([True, False, True, True])))
    assert output.counts.tolist() == [4, 0, 0, 0] and output.done.tolist() == [False, True, True, True]
    assert output.steps.tolist() == [4, 0, 0, 0]


def row_options(n=1, *, eos=(), reveal=None, steps=99, sampling=None) -> RowOptions:
    reveal = RevealOptions() if reveal is None else reveal
    sampling = SamplingOptions() if sampling is None else sampling
    return RowOptions.stack([reveal] * n, [steps] * n, [tuple(eos)] * n, [sampling] * n)


def guessed(logits, decoding, options=None, **kwargs) -> Guess:
    batch, n, _ = logits.shape
    fields = {"start": jnp.zeros(batch, jnp.int32), "step": jnp.int32(0), "hole": jnp.zeros((batch, n), bool)}
    options = row_options(batch) if options is None else options
    return guess_tokens(jnp.asarray(logits, jnp.float32), options, decoding, **(fields | kwargs))


def test_mask_and_padding_are_never_proposed():
    logits = np.array([[[5.0, 1.0, 9.0, 3.0, 2.0]]])  # 0 padding, 2 mask
    decoding = BlockDecoding(block_length=1, mask_id=2, suppress=(2, 0))
    guess = guessed(logits, decoding)
    rest = np.exp([1.0, 3.0, 2.0])
    assert guess.token.item() == 3
    assert guess.confidence.item() == pytest.approx(np.exp(3.0) / rest.sum(), rel=1e-6)
    compat = guessed(logits, BlockDecoding(1, 2, (2, 0), suppress_confidence=False))
    assert compat.token.item() == 3
    assert compat.confidence.item() == pytest.approx(np.exp(3.0) / np.exp(logits).sum(), rel=1e-6)


def test_confidences():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 3, 7)) * 2
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    ordered = np.sort(p, -1)
    kinds = {
        "prob": ordered[..., -1],
        "top_p_margin": ordered[..., -1] - ordered[..., -2],
        "neg_entropy": np.exp((p * np.log(p)).sum(-1)),
    }
    for kind, want in kinds.items():
        guess = guessed(logits, BlockDecoding(3, 6, confidence=kind))
        np.testing.assert_allclose(guess.confidence, want, rtol=1e-5)
        np.testing.assert_array_equal(guess.token, logits.argmax(-1))
        np.testing.assert_allclose(guess.logprob, np.log(ordered[..., -1]), rtol=1e-5)
    noise = guessed(logits, BlockDecoding(3, 6, confidence="random")).confidence
    other = guessed(logits, BlockDecoding(3, 6, confidence="random"), step=jnp.int32(1)).confidence
    assert ((noise >= 0) & (noise < 1)).all() and not np.allclose(noise, other)


def test_margins_are_scaled_over_the_masked_positions_of_the_row():
    decoding = BlockDecoding(4, 9, confidence="top_p_margin")
    masked = jnp.array([[True, True, False, True], [False, False, True, False]])
    block = new_block(jnp.zeros((2, 4), jnp.int32), masked, mask_id=9)
    guess = Guess(jnp.ones((2, 4), jnp.int32), jnp.array([[0.2, 0.6, 0.9, 0.4]] * 2), jnp.zeros((2, 4)))
    remaining = jnp.array([4, 4])
    after = generation.reveal(block, guess, row_options(2, reveal=RevealOptions(threshold=0.45)), decoding, remaining)
    np.testing.assert_allclose(after.confidence, [[0.0, 1.0, 1.0, 0.5], [1.0, 1.0, 1.0, 1.0]], atol=1e-6)
    assert after.masked.tolist() == [[True, False, False, False], [False] * 4]


@pytest.mark.slow  # many programs to compile
def test_temperature_samples_the_softmax():
    logits = np.array([1.0, 0.0, -1.0, 2.0, 0.5])
    rows, n = 200, 50
    decoding = BlockDecoding(n, 5)
    options = RowOptions.stack(
        [RevealOptions()] * rows, [9] * rows, [()] * rows,
        [SamplingOptions(temperature=0.7, seed=i) for i in range(rows)],
    )  # fmt: skip
    guess = guessed(np.broadcast_to(logits, (rows, n, 5)), decoding, options)
    share = np.bincount(np.asarray(guess.token).ravel(), minlength=5) / (rows * n)
    want = np.exp(logits / 0.7) / np.exp(logits / 0.7).sum()
    assert (np.abs(share - want) < 4 * np.sqrt(want * (1 - want) / (rows * n))).all()
    # Confidence is that of the drawn token without temperature.
    p = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(guess.confidence, p[np.asarray(guess.token)], rtol=1e-5)
    filtered = RowOptions.stack(
        [RevealOptions()] * rows, [9] * rows, [()] * rows,
        [SamplingOptions(temperature=5.0, seed=i, top_k=2) for i in range(rows)],
    )  # fmt: skip
    drawn = np.asarray(guessed(np.broadcast_to(logits, (rows, n, 5)), decoding, filtered).token)
    assert set(np.unique(drawn)) == {0, 3}


def test_end_token_finishes_a_row_only_when_nothing_before_it_is_masked():
    options = row_options(4, eos=(7,))
    tokens = jnp.array([[5, 7, 0, 0], [0, 7, 3, 0], [7, 4, 0, 0], [5, 7, 0, 0]])
    masked = jnp.array([[0, 0, 1, 1], [1, 0, 0, 1], [0, 0, 1, 1], [0, 0, 1, 1]], bool)
    block = new_block(jnp.zeros((4, 4), jnp.int32), jnp.ones((4, 4), bool), mask_id=9)
    given = jnp.zeros((4, 4), bool).at[2, 0].set(True)  # an end token of the prompt does not count
    block = block.replace(tokens=jnp.where(masked, 9, tokens), masked=masked, given=given, skip=jnp.array([0, 0, 1, 0]))
    remaining = jnp.array([9, 9, 9, 0])
    assert unfinished(block, options, remaining).tolist() == [False, True, True, False]
    # Masks beyond the last wanted token do not keep a row busy.
    assert unfinished(block, options, jnp.array([9, 9, 1, 0])).tolist() == [False, True, False, False]


def test_text_is_cut_after_the_first_end_token():
    lm, params = model(5)
    prompts = [[3, 4, 5], [6, 7, 8, 9], [3, 9], [10]]
    free, _ = generate(lm, params, prompts, max_new_tokens=12, eos_ids=())
    end = free[0].tokens[5]
    cut, stats = generate(lm, params, prompts, max_new_tokens=12, eos_ids=(end,))
    first = free[0].tokens.index(end)
    assert cut[0].tokens == free[0].tokens[: first + 1]
    assert stats.tokens == sum(len(row.tokens) for row in cut)


def test_tail_of_the_prompt_stays_and_its_end_tokens_do_not_count():
    lm, params = model(6)
    prompt = [3, 4, 5, 6, EOS, 8, 9]  # the end token stands in the tail of the aligned first block
    got, _ = generate(lm, params, [prompt] * 4, max_new_tokens=6, align_blocks=True, eos_ids=(EOS,))
    assert got[0].ids[:7] == prompt and len(got[0].tokens) >= 1
    assert got[0].tokens[:-1].count(EOS) == 0


@pytest.mark.slow  # many programs to compile
def test_holes_are_filled_in_their_surroundings():
    lm, params = model(7)
    prompt = [3, 4, 5, MASK, MASK, 6, 7, 8, MASK, 9, 10]
    with pytest.raises(ValueError, match=r"mask token 2 at position 3; set infill=True"):
        generate(lm, params, [prompt], max_new_tokens=4)
    decoding = BlockDecoding.for_model(lm.config, block_length=4, infill=True)
    for align in (False, True):
        got, _ = generate(
            lm, params, [prompt], max_new_tokens=3, decoding=decoding, eos_ids=(6, 11), align_blocks=align
        )
        ids = got[0].ids
        known = [i for i, token in enumerate(prompt) if token != MASK]
        assert [ids[i] for i in known] == [prompt[i] for i in known]
        assert MASK not in ids and got[0].tokens == ids[3:]
        assert not {ids[3], ids[4], ids[8]} & {6, 11}  # no end token inside a hole
    first = got[0].ids
    prompt[6] = 12  # known text after the hole, in its block, matters
    changed, _ = generate(lm, params, [prompt], max_new_tokens=3, decoding=decoding, eos_ids=(), align_blocks=True)
    assert changed[0].confidence[0] != got[0].confidence[0]
    only, _ = generate(lm, params, [prompt], max_new_tokens=0, decoding=decoding, eos_ids=())
    assert len(only[0].ids) == len(prompt) and len(first) == len(prompt) + 3
    # A model that fills one hole sees a block of its own: the brute-force forward agrees.
    start = 3
    canvas = np.full((1, 48), MASK)
    canvas[0, :11] = prompt
    q, k = np.arange(48)[:, None], np.arange(48)[None, :]
    visible = np.where(q < start, k // 4 <= q // 4, (k < start) | ((k - start) // 4 <= (q - start) // 4)) & (
        (q >= start) | (k < start)
    )
    logits = np.array(brute_force_logits(lm.config, params, canvas, visible[None]))[0, 3:5]
    logits[:, [MASK, PAD]] = -np.inf
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    best = int(p.max(-1).argmax())
    assert only[0].tokens[best] == p[best].argmax()
    assert only[0].confidence[best] == pytest.approx(p[best].max(), abs=1e-5)


def test_steps_bound_a_thresholded_block_and_strict_says_so():
    lm, params = model(8)
    rule = RevealOptions(threshold=1.0, steps=4)  # two blocks, two steps each
    got, _ = generate(lm, params, [[3, 4]] * 4, max_new_tokens=8, reveal=rule, eos_ids=())
    assert got[0].denoise_steps == 4 and got[0].forced == 4 and len(got[0].tokens) == 8
    with pytest.raises(ValueError, match=r"steps: row 0 had 2 masked tokens left after the 2 steps"):
        generate(lm, params, [[3, 4]] * 4, max_new_tokens=8, reveal=rule, eos_ids=(), strict=True)
    easy, _ = generate(
        lm, params, [[3, 4]] * 4, max_new_tokens=8, reveal=RevealOptions(threshold=1.0), eos_ids=(), strict=True
    )
    assert easy[0].forced == 0 and easy[0].denoise_steps == 8


def test_threshold_sweep_is_monotone_in_passes():
    lm, params = model(9)
    prompts = all_prompts(9, [4, 6, 8, 10])
    rows = BlockStream(lm, params, BlockDecoding.for_model(lm.config), batch=4, capacity=64)
    passes, traces = [], {}
    for threshold in (0.0, 0.05, 0.15, 0.3, 0.6, 1.0):
        _, stats = generate(
            lm, params, prompts, max_new_tokens=16, reveal=RevealOptions(threshold=threshold), eos_ids=(),
            stream=rows,
        )  # fmt: skip
        traces = traces or dict(rows.traces)
        passes.append(stats.denoise_steps)
    assert passes[0] == 4 * 4 and passes[-1] == 4 * 16
    assert passes == sorted(passes)
    assert rows.traces == traces  # the threshold is traced


@pytest.mark.parametrize("fused", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiled_block_copies_no_cache(fused, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # lower() fills pytrees with placeholders
    lm, params = model(0)
    capacity = 4096
    rows = BlockStream(lm, params, BlockDecoding.for_model(lm.config), batch=2, capacity=capacity, fused=fused)
    options = row_options(2)
    block = rows._blocks()
    program = rows._programs.fused if fused else rows._programs.block
    args = [rows.params, rows._state, np.ones(2, bool), block]
    if fused:
        args += [Guess(block.tokens, block.confidence, block.confidence), options, block]
    else:
        args += [options]
    memory = program.lower(*args).compile().memory_analysis()
    cache_bytes = rows._state.cache.k.nbytes
    assert cache_bytes == 2 * 2 * capacity * 8 * 4
    assert memory.temp_size_in_bytes < cache_bytes
    assert memory.alias_size_in_bytes >= 2 * cache_bytes  # both halves are updated in place


BAD = [
    ({"threshold": 1.5}, r"threshold must lie in \[0, 1\]; got 1.5"),
    ({"threshold": -0.1}, r"threshold must lie in \[0, 1\]; got -0.1"),
    ({"threshold": math.nan}, r"threshold must lie in \[0, 1\]; got nan"),
    ({"factor": 0.0}, r"factor must be positive; got 0.0"),
    ({"budget": -1.0}, r"budget must be positive; got -1.0"),
    ({"threshold": 0.5, "factor": 1.0}, "give one of threshold, factor and budget; got {'threshold': 0.5, 'fa"),
    ({"steps": 0}, "steps must be at least 1; got 0"),
    ({"budget": 0.5, "lookahead": 0}, "lookahead must be at least 1; got 0"),
    ({"lookahead": 4}, "lookahead needs a threshold, factor or budget; got lookahead 4 alone"),
]


@pytest.mark.parametrize("fields, message", BAD)
def test_bad_reveal_options(fields, message):
    with pytest.raises(ValueError, match=message):
        RevealOptions(**fields)


def test_bad_requests():
    lm, params = model(0)
    for length in (0, -3):
        with pytest.raises(ValueError, match=f"block_size must be an integer >= 1; got {length}"):
            BlockDecoding.for_model(lm.config, block_length=length)
    with pytest.raises(ValueError, match=r"confidence must be one of .* got 'loud'"):
        BlockDecoding(4, MASK, confidence="loud")
    with pytest.raises(ValueError, match=r"prompt_attention must be one of .* got 'sideways'"):
        BlockDecoding(4, MASK, prompt_attention="sideways")
    with pytest.raises(ValueError, match="mask_id is None"):
        BlockDecoding.for_model(tiny(mask_id=None))
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1; got 0"):
        generate(lm, params, [[3]], max_new_tokens=0)
    with pytest.raises(ValueError, match="prompts must not be empty"):
        generate(lm, params, [], max_new_tokens=4)
    with pytest.raises(ValueError, match="reveal must have one entry per prompt"):
        generate(lm, params, [[3]], max_new_tokens=4, reveal=[RevealOptions()] * 2)
    with pytest.raises(ValueError, match="the prompt has 9 tokens; the cache holds 8"):
        generate(lm, params, [[3] * 9], max_new_tokens=4, capacity=8)
    with pytest.raises(ValueError, match=r"need 10 cache slots .6 for the prompt.; the cache holds 8"):
        generate(lm, params, [[3] * 6], max_new_tokens=8, capacity=8)
    with pytest.raises(ValueError, match=r"repetition_penalty must be 1.0"):
        generate(lm, params, [[3]], max_new_tokens=4, sampling=SamplingOptions(repetition_penalty=1.2))
    shifted, shifted_params = model(0, token_shift=True)
    with pytest.raises(ValueError, match="at least one token"):
        generate(shifted, shifted_params, [[]], max_new_tokens=4)
    with pytest.raises(ValueError, match="on_step is called in live mode only"):
        generate(lm, params, [[3]], max_new_tokens=4, on_step=print)
    with pytest.raises(ValueError, match="fused=False"):
        next(BlockStream(lm, params, BlockDecoding.for_model(lm.config), batch=1, capacity=8).advance_live())
    with pytest.raises(ValueError, match=r"eos_ids must be at most 1 tokens; got \(3, 4\)"):
        RowOptions.stack([RevealOptions()], [1], [(3, 4)], [SamplingOptions()], eos_slots=1)


def test_large_block_for_a_small_training_block_warns(caplog):
    with caplog.at_level("WARNING", logger="jaxstream"):
        BlockDecoding.for_model(tiny(block_size=4), block_length=8)
        assert not caplog.records
        BlockDecoding.for_model(tiny(block_size=4), block_length=9)
        BlockDecoding.for_model(tiny(block_size=16), block_length=64)
    assert len(caplog.records) == 1 and "more than twice the training block" in caplog.text


def test_prefill_lengths_are_few():
    lengths = {stream.prefill_length(n, 1000) for n in range(1000)}
    assert lengths == {16, 32, 64, 128, 256, 512, 1000}
