"""The block-diffusion decoder behind the text engine."""

import functools
import io
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infer.text.cli import Text
from infer.text.diffusion import DiffusionDecoder
from infer.text.engine import TextEngine
from infer.text.live import MASK, BlockView
from infer.text.requests import Request
from jaxmodels.cache import KVCodes
from jaxmodels.decoding.block_diffusion import BlockDecoding, RevealOptions, generate
from jaxmodels.decoding.sampling import SamplingOptions
from jaxmodels.qwen import QwenConfig, build


@functools.cache
def model():
    lm = build(QwenConfig.tiny(layers=2, dim=32, mlp_dim=48, head_dim=16, block_size=4))
    leaves, tree = jax.tree.flatten(jax.eval_shape(lm.init, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return lm, jax.tree.unflatten(tree, [jnp.asarray(rng.normal(size=s.shape) * 0.3, jnp.float32) for s in leaves])


def engine(**options) -> TextEngine:
    fields = {"batch": 2, "capacity": 64, "prefill_rows": 2, "default": RevealOptions(threshold=0.1)}
    return TextEngine(DiffusionDecoder(*model(), **(fields | options)))


def requests() -> list[Request]:
    rng = np.random.default_rng(1)
    return [
        Request(
            ids=rng.integers(3, 97, 3 + 4 * i).tolist(), max_new_tokens=5 + 3 * i, temperature=0.5 * (i % 2), seed=i,
            logprobs=True, options={} if i % 2 else {"steps": 3},
        )
        for i in range(5)
    ]  # fmt: skip


def test_engine_gives_what_generate_gives_and_reports_its_cost():
    lm, params = model()
    compiled = []
    own = engine(on_compile=lambda name, seconds: compiled.append((name, seconds is None)))
    own.decoder.warm([9, 17])
    done = own.complete(requests())
    assert [name for name, begins in compiled if begins] == ["prefill 16", "prefill 32", "block"]
    for i, (request, completion) in enumerate(zip(requests(), done, strict=True)):
        want, _ = generate(
            lm, lm.unstack(params), [request.ids], max_new_tokens=request.max_new_tokens, capacity=64, eos_ids=(),
            decoding=BlockDecoding.for_model(lm.config),
            reveal=RevealOptions(**request.options) if request.options else RevealOptions(threshold=0.1),
            sampling=SamplingOptions(temperature=request.temperature, seed=request.seed),
        )  # fmt: skip
        assert list(completion.tokens) == want[0].tokens, i
        np.testing.assert_allclose(completion.logprobs, want[0].logprob, atol=1e-5)
        usage = completion.usage
        assert (usage.forwards, usage.commits) == (want[0].denoise_steps, 0)
        assert usage.decode_tokens == usage.new_tokens == len(want[0].tokens)
    plain = engine(fused=False).complete(requests()[:1])[0]
    assert plain.tokens == done[0].tokens and plain.usage.commits == 1  # two blocks, the last is not committed
    assert plain.usage.forwards == done[0].usage.forwards + 1


def test_watched_decoding_shows_every_pass_in_order():
    events, passes = [], []
    own = engine(batch=1, prefill_rows=1, on_step=lambda block: passes.append(int(block.masked.sum())))
    request = Request(ids=[5, 6, 7], max_new_tokens=8, options={"steps": 8})
    for event in own.generate([request]):
        events.append((event.tokens, len(passes)))
        assert len(event.reveal) == len(event.tokens)
    assert passes == [3, 2, 1, 0, 3, 2, 1, 0]
    assert [seen for _, seen in events] == [4, 8]  # a block's text comes before the next block is drawn
    assert sum((tokens for tokens, _ in events), ()) == engine().complete([request])[0].tokens


def test_block_view_writes_a_sign_per_masked_token(capsys):
    class Words:
        def decode(self, ids):
            return "".join(f"<{i}>" for i in ids)

    view = BlockView(Words())
    text = view.text(np.array([7, 8, 2, 2, 9]), np.array([0, 0, 1, 1, 0], bool), 1)
    assert text == f"<8>{MASK}{MASK}<9>"
    own = engine(batch=1, prefill_rows=1, on_step=BlockView(None))
    own.complete([Request(ids=[5], max_new_tokens=4, options={"steps": 2})])
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 2 and captured.err.count(MASK) == 2


def test_holes_are_filled_in_and_the_rest_is_kept():
    """Against `generate`: holes inside and across blocks, an end token in the text after them, new tokens behind."""
    lm, params = model()
    decoding = BlockDecoding.for_model(lm.config, infill=True)
    own = engine(decoding=decoding)
    asked = [
        ([5, 6, 2, 2, 9, 10, 2, 1, 11], None, 7),
        ([2, 2, 8], 4, 7),
        ([5, 6, 7, 8, 9, 2], 0, 1),
    ]
    jobs = [own.prepare(Request(ids=ids, infill=True, max_new_tokens=new, eos_ids=(1,))) for ids, new, _ in asked]
    assert [job.total for job in jobs] == [total for *_, total in asked]
    for job, completion, (ids, new, _) in zip(jobs, own.complete(jobs), asked, strict=True):
        want, _ = generate(
            lm, lm.unstack(params), [ids], max_new_tokens=new or 0, capacity=64, eos_ids=(1,), decoding=decoding,
            reveal=RevealOptions(threshold=0.1),
        )  # fmt: skip
        assert list(completion.tokens) == want[0].tokens
        for token, known in zip(completion.tokens, ids[job.first_hole :], strict=False):
            assert token == known if known != 2 else token not in (1, 2)
    with pytest.raises(ValueError, match="the ids have no hole; the mask token 2"):
        own.prepare(Request(ids=[5], infill=True))
    with pytest.raises(ValueError, match=r"max_new_tokens must be >= 0 .* got -1"):
        own.prepare(Request(ids=[5, 2], infill=True, max_new_tokens=-1))
    with pytest.raises(ValueError, match="infill needs a diffusion decoder made for it"):
        engine().prepare(Request(ids=[5, 2], infill=True))


def test_block_view_makes_room_before_it_draws(monkeypatch):
    """Else drawing on the last line of a terminal scrolls, and the saved cursor points into older text."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", "10")
    monkeypatch.setenv("LINES", "24")
    terminal = Terminal()
    tokens, masked = np.arange(12)[None], np.ones((1, 12), bool)
    block = SimpleNamespace(tokens=tokens, masked=masked, skip=np.zeros(1, int))
    monkeypatch.setattr(sys, "stdout", terminal)
    BlockView(None)(block)
    assert terminal.getvalue() == "\x1bD" * 2 + "\x1b[2A\x1b7\x1b[J\x1b[2m" + MASK * 12 + "\x1b[0m\x1b8"
    block.masked = np.zeros((1, 12), bool)
    BlockView(None)(block)
    assert terminal.getvalue().endswith("\x1b8\x1b[J")  # nothing is left when the block is done


BAD = [
    ({"options": {"threshold": 1.5}}, r"threshold must lie in \[0, 1\]; got 1.5"),
    ({"options": {"threshold": "high"}}, "threshold must be a number; got 'high'"),
    ({"options": {"steps": 2.5}}, "steps must be an integer; got 2.5"),
    ({"options": {"speed": 3}}, "unknown option 'speed'; a diffusion decoder has threshold, factor, budget"),
    ({"repetition_penalty": 1.1}, "repetition_penalty must be 1.0 .off."),
    ({"ids": [3, 2, 4]}, "the prompt contains the mask token 2 at position 1"),
    ({"ids": [300]}, "prompt token 300 lies outside the vocabulary of 97"),
    ({"eos_ids": range(3, 20)}, "at most 8 EOS ids are possible; got 17"),
    ({"ids": []}, "the prompt is empty"),
    ({"top_logprobs": 1}, "top_logprobs needs an autoregressive decoder; got 1"),
    ({"ids": [3] * 65}, "the prompt has 65 tokens, more than the cache capacity 64"),
]


@pytest.mark.parametrize("fields, message", BAD)
def test_bad_requests(fields, message):
    with pytest.raises(ValueError, match=message):
        engine().generate([Request(**({"ids": [3, 4], "max_new_tokens": 4} | fields))])


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"threshold": -0.1}, r"--threshold must lie in \[0, 1\]; got -0.1"),
        ({"factor": 0.0}, "--factor must be positive; got 0.0"),
        ({"factor": 1.0, "threshold": 0.5}, "--factor cannot be combined with --threshold"),
        ({"block_length": 0}, "--block-length must be at least 1; got 0"),
        ({"steps": 0}, "--steps must be at least 1; got 0"),
        ({"decoder": "ar", "align_blocks": True}, "--align-blocks needs the diffusion decoder"),
        ({"budget": 0.0}, "--budget must be positive; got 0.0"),
        ({"factor": 1.0, "budget": 0.5}, "--budget cannot be combined with --factor"),
        ({"lookahead": 4}, "--lookahead needs --threshold, --factor or --budget"),
        ({"lookahead": 0, "budget": 0.5}, "--lookahead must be at least 1; got 0"),
        ({"window": 9, "target_sparsity": 0.5}, "--window cannot be combined with --target-sparsity"),
        ({"decoder": "ar", "mask_id": 5}, "--mask-id needs the diffusion decoder"),
        ({"decoder": "diffusion", "window": 5}, "--window needs the autoregressive decoder"),
        ({"window": 5, "capacity": 9}, "--capacity cannot be combined with --window"),
        ({"window": 0}, "--window must be at least 1; got 0"),
        ({"sinks": 2}, "--sinks needs --window"),
        ({"sinks": -1, "window": 5}, "--sinks must not be negative; got -1"),
        ({"prefill_chunk": 9, "window": 5}, "--prefill-chunk must be at most --window; got 9 and 5"),
        ({"top_logprobs": 21, "json": True}, r"--top-logprobs must lie in 0..20; got 21"),
        ({"top_logprobs": 2}, "--top-logprobs needs --json or --jsonl"),
        ({"infill": True, "chat": True}, "--infill cannot be combined with --chat"),
        ({"infill": True, "stop": ("a",)}, "--infill cannot be combined with --stop"),
        ({"live": True, "json": True}, "--live cannot be combined with --json"),
        ({"live": True, "batch": 2}, "--batch must be 1"),
    ],
)
def test_bad_flags(fields, message):
    with pytest.raises(ValueError, match=message):
        Text(model="none", **fields)


@pytest.mark.slow  # many programs to compile
@pytest.mark.parametrize("form", ["int8", "fp8"])  # both passed 2026-11-27
def test_a_cache_in_eight_bits(form):
    """It decodes, keeps codes, and comes near the float cache: most first tokens are the same."""
    own = engine(kv_codes=KVCodes(form))
    done, plain = own.complete(requests()), engine().complete(requests())
    cache = own.decoder.stream._state.cache
    assert cache.k.dtype == {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}[form]
    assert [len(a.tokens) for a in done] == [len(b.tokens) for b in plain]
    assert sum(a.tokens[0] == b.tokens[0] for a, b in zip(done, plain, strict=True)) >= 3
