"""The engine: batching, streaming, stop strings, defaults, usage, errors; one compilation per program."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infer.text.decoders import ARDecoder, prefill_buckets
from infer.text.engine import TextEngine, join_events
from infer.text.requests import Request
from jaxmodels.cache import Scales
from jaxmodels.pretrained import GenerationDefaults
from pallas_kernels.masks import SlidingWindow

CAPACITY = 64


@pytest.fixture(scope="module")
def engine(tiny):
    return TextEngine.from_pretrained(tiny, batch=3, capacity=CAPACITY, chunk=4)


@pytest.fixture(scope="module")
def plain(tiny):
    """One slot, one token per call: the simplest way to run a request."""
    return TextEngine.from_pretrained(tiny, batch=1, capacity=CAPACITY)


def some_requests():
    """Ragged in prompt, length and options; more of them than slots."""
    texts = ["a", "hello world", "def f(x):\n", "€uro", "zz", "The quick brown fox jumps over", "1 2 3"]
    changes = [{}, {"temperature": 1.0}, {"top_k": 5, "temperature": 0.7}, {"top_p": 0.5, "temperature": 2.0}]
    return [
        Request(prompt=text, max_new_tokens=3 + 4 * i, seed=i, eos_ids=(), logprobs=True, **changes[i % 4])
        for i, text in enumerate(texts)
    ]


@pytest.mark.smoke
def test_a_request_does_not_depend_on_its_batch(engine, plain):
    """Alone, in order, reversed, and among copies of itself: equal tokens and text; the slots are refilled."""
    requests = some_requests()
    together = engine.complete(requests)
    assert [len(c.tokens) for c in together] == [r.max_new_tokens for r in requests]
    reverse = engine.complete(requests[::-1])[::-1]
    copies = engine.complete([requests[5], requests[1], requests[5], requests[5]])
    for i, request in enumerate(requests):
        alone = plain.complete([request])[0]
        for other in (together[i], reverse[i], *([copies[0], copies[2], copies[3]] if i == 5 else [])):
            assert (other.tokens, other.text) == (alone.tokens, alone.text)
            # Values of size 4 from products of other shapes: float32 rounds them by a little more than 1e-5.
            np.testing.assert_allclose(other.logprobs, alone.logprobs, rtol=1e-5, atol=1e-5)


def test_prefilling_several_rows_at_once_changes_nothing(tiny, plain):
    engine = TextEngine.from_pretrained(tiny, batch=2, capacity=CAPACITY, chunk=3, prefill_rows=2)
    requests = some_requests()[:5]
    assert [c.tokens for c in engine.complete(requests)] == [plain.complete([r])[0].tokens for r in requests]


def test_everything_compiles_once(tiny):
    heard = []

    def make():  # a size of its own: programs are shared between engines of equal sizes
        return TextEngine.from_pretrained(
            tiny, batch=2, capacity=66, chunk=2, on_compile=lambda *args: heard.append(args)
        )

    engine = make()
    engine.complete([Request(prompt="short", max_new_tokens=4)])
    engine.complete([Request(prompt="a longer one with more than 32 tokens", max_new_tokens=4)])
    make().complete([Request(prompt="another engine", max_new_tokens=4)])
    assert [name for name, seconds in heard if seconds is None] == ["prefill 32", "decode", "prefill 64"]
    assert all(seconds > 0 for name, seconds in heard if seconds is not None)
    compiled = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        engine.complete([dataclasses.replace(r, max_new_tokens=9) for r in some_requests()])
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled == []
    assert len(heard) == 6


def test_events_stream_in_order_and_add_up(engine, tiny):
    requests = some_requests()
    parts = {}
    for event in engine.generate(requests):
        assert event.index not in parts or parts[event.index][-1].finish_reason is None
        parts.setdefault(event.index, []).append(event)
    for index, request in enumerate(requests):
        done = join_events(parts[index])
        assert done.finish_reason == "length" and len(done.tokens) == len(done.logprobs) == request.max_new_tokens
        assert done.text == tiny.tokenizer.decode(done.tokens)
        assert len(parts[index]) == 1 + -(-(request.max_new_tokens - 1) // 4)  # the first token, then chunks of 4
        usage = done.usage
        assert usage.prompt_tokens == len(tiny.tokenizer.encode(request.prompt))
        assert usage.new_tokens == request.max_new_tokens
        assert usage.forwards == usage.decode_tokens == request.max_new_tokens - 1
        assert usage.prefill_seconds > 0 and usage.decode_seconds > 0 and usage.tokens_per_second > 0
    assert any("\ufffd" in join_events(parts[i]).text for i in parts)  # broken UTF-8 occurs, whole text agrees


def test_stop_strings_end_the_text_and_do_not_show(engine, plain):
    request = Request(prompt="hello", max_new_tokens=30, eos_ids=())
    whole = engine.complete([request])[0]
    text = whole.text.replace("\ufffd", "")
    stop = next(text[i : i + 2] for i in range(4, len(text)) if whole.text.count(text[i : i + 2]) == 1)
    stopped = dataclasses.replace(request, stop=("not there", stop))
    for result in (plain.complete([stopped])[0], engine.complete([request, stopped, request])[1]):
        assert result.finish_reason == "stop"
        assert result.text == whole.text[: whole.text.index(stop)]
        assert result.tokens == whole.tokens[: len(result.tokens)] and len(result.tokens) < 30
    shown = ""
    for event in plain.generate([stopped]):
        shown += event.text
        assert not any(shown.endswith(stop[:n]) for n in range(1, len(stop) + 1)) or event.finish_reason


def test_each_eos_id_ends_the_text_and_does_not_show(engine, tiny):
    request = Request(prompt="hello", max_new_tokens=30, eos_ids=())
    whole = engine.complete([request])[0]
    others = [token for token in range(4, 260) if token not in whole.tokens]
    for place in (0, 5, 11):
        token = whole.tokens[place]
        first = whole.tokens.index(token)
        result = engine.complete([dataclasses.replace(request, eos_ids=(others[0], token, others[1]))])[0]
        assert result.finish_reason == "eos"
        assert result.tokens == whole.tokens[: first + 1]
        assert result.text == tiny.tokenizer.decode(whole.tokens[:first])


def test_defaults_come_from_the_checkpoint_and_requests_override_them(tiny):
    generation = GenerationDefaults(temperature=0.9, top_k=7, max_new_tokens=5, eos_ids=(1, 2))
    engine = TextEngine.from_pretrained(dataclasses.replace(tiny, generation=generation), capacity=CAPACITY)
    job = engine.prepare(Request(prompt="x"))
    assert (job.sampling.temperature, job.sampling.top_k, job.sampling.top_p) == (0.9, 7, 1.0)
    assert (job.max_new_tokens, job.eos_ids, job.sampling.seed) == (5, (1, 2), 0)
    job = engine.prepare(Request(prompt="x", temperature=0.0, top_k=0, max_new_tokens=2, eos_ids=(), seed=4))
    assert (job.sampling.temperature, job.sampling.top_k, job.sampling.seed) == (0.0, 0, 4)
    assert (job.max_new_tokens, job.eos_ids) == (2, ())


def test_messages_go_through_the_chat_template(engine, tiny):
    messages = [{"role": "user", "content": "hi"}]
    ids = tiny.tokenizer.encode("<turn>user:hi<turn>assistant:")
    assert engine.prepare(Request(messages=messages, max_new_tokens=1)).prompt.tolist() == ids
    assert ids.count(3) == 2


def test_without_a_tokenizer_ids_go_in_and_out(tiny):
    engine = TextEngine.from_pretrained(dataclasses.replace(tiny, tokenizer=None), capacity=CAPACITY)
    result = engine.complete([Request(ids=[10, 11, 12], max_new_tokens=4, eos_ids=())])[0]
    assert len(result.tokens) == 4 and result.text == ""
    with pytest.raises(ValueError, match="needs a tokenizer"):
        engine.prepare(Request(prompt="x"))
    with pytest.raises(ValueError, match="need a tokenizer"):
        engine.prepare(Request(ids=[5], max_new_tokens=1, stop=["."]))


BAD = [
    ({"prompt": "", "max_new_tokens": 1}, "the prompt is empty"),
    ({"ids": [], "max_new_tokens": 1}, "the prompt is empty"),
    ({"prompt": "x" * 65, "max_new_tokens": 1}, "prompt has 65 tokens, more than the cache capacity 64"),
    ({"prompt": "x" * 60, "max_new_tokens": 5}, "need 65 cache slots, the capacity is 64"),
    ({"prompt": "x", "max_new_tokens": 0}, r"max_new_tokens must be >= 1 and < 2\*\*31; got 0"),
    ({"prompt": "x", "max_new_tokens": 2**31}, r"max_new_tokens must be >= 1 and < 2\*\*31; got 2147483648"),
    ({"prompt": "x", "max_new_tokens": 1, "top_logprobs": 2}, "top_logprobs must be at most 0 here; got 2"),
    ({"prompt": "x<fill:2>", "infill": True}, "infill needs a diffusion decoder made for it"),
    ({"prompt": "x", "temperature": -1.0}, "temperature must be >= 0; got -1.0"),
    ({"prompt": "x", "stop": [""]}, "stop strings must not be empty"),
    ({"ids": [260], "max_new_tokens": 1}, "prompt token 260 lies outside the vocabulary of 260"),
    ({"ids": [5, 2**40], "max_new_tokens": 1}, "ids must fit into 32 bits; got 1099511627776"),
    ({"ids": [-1], "max_new_tokens": 1}, "prompt token -1 lies outside"),
    ({"prompt": "x", "max_new_tokens": 1, "eos_ids": range(9)}, "at most 8 EOS ids are possible; got 9"),
    ({"prompt": "x", "max_new_tokens": 1, "options": {"threshold": 0.9}}, "unknown options .'threshold'."),
]


@pytest.mark.parametrize("fields, message", BAD, ids=[message for _, message in BAD])
def test_bad_requests_are_refused_before_anything_runs(engine, fields, message):
    with pytest.raises(ValueError, match=f"request 1: .*{message}"):
        engine.generate([Request(prompt="fine", max_new_tokens=2), Request(**fields)])


def test_a_request_has_exactly_one_prompt():
    for fields in ({}, {"prompt": "x", "ids": [1]}):
        with pytest.raises(ValueError, match="exactly one of prompt, ids and messages"):
            Request(**fields)
    with pytest.raises(ValueError, match="stop must be a sequence of strings; got the string 'END'"):
        Request(prompt="x", stop="END")


def test_leaving_the_iterator_early_leaves_the_engine_usable(engine, plain):
    requests = some_requests()
    expected = plain.complete([requests[2]])[0].tokens
    events = engine.generate(requests)
    next(events)
    with pytest.raises(RuntimeError, match="already generating"):
        next(engine.generate(requests))
    events.close()
    assert engine.complete([requests[2]])[0].tokens == expected


def test_an_interrupt_that_loses_the_state_leaves_the_engine_usable(engine):
    """Ctrl-C can come after a step has taken the donated state and before its result is kept."""
    request = some_requests()[1]
    expected = engine.complete([request])[0].tokens
    for array in jax.tree.leaves(engine.decoder.state):
        array.delete()
    assert engine.complete([request])[0].tokens == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(engine, tiny, temperature):
    params = tiny.params | {"final_norm": tiny.params["final_norm"] * np.nan}
    broken = TextEngine.from_pretrained(dataclasses.replace(tiny, params=params), batch=3, capacity=CAPACITY, chunk=4)
    with pytest.raises(FloatingPointError, match="request 0: the model's logits are not finite after 0 new tokens"):
        broken.complete([Request(prompt="x", max_new_tokens=3, temperature=temperature)])


def test_a_decoder_checks_its_sizes(tiny):
    def make(**options):
        return ARDecoder(tiny.lm, tiny.params, **{"capacity": 64, **options})

    with pytest.raises(ValueError, match="batch must be >= 1; got 0"):
        make(batch=0)
    with pytest.raises(ValueError, match="capacity 512 exceeds the model's 256 positions"):
        make(capacity=512)
    with pytest.raises(ValueError, match="give capacity or window, one of them; got 64 and 8"):
        make(window=8)
    with pytest.raises(ValueError, match="window 250 and num_sinks 7 exceed the model's 256 positions"):
        make(capacity=None, window=250, num_sinks=7)
    with pytest.raises(ValueError, match="num_sinks must be >= 0; got -1"):
        make(capacity=None, window=8, num_sinks=-1)
    with pytest.raises(ValueError, match="prefill_chunk must be >= 1; got 0"):
        make(prefill_chunk=0)
    with pytest.raises(ValueError, match="top_logprobs must lie in"):
        make(top_logprobs=-1)
    with pytest.raises(ValueError, match=r"prefill_rows must lie in \[1, batch = 1\]; got 2"):
        make(prefill_rows=2)
    with pytest.raises(ValueError, match=r"buckets must be >= 1 and end with the longest piece 64; got \(16, 32\)"):
        make(buckets=[32, 16])
    assert prefill_buckets(100) == (32, 64, 100) and prefill_buckets(32) == (32,) and prefill_buckets(8) == (8,)


@pytest.mark.parametrize("prefill_rows", [pytest.param(1, marks=pytest.mark.slow), 2])  # both passed 2026-11-27
def test_long_prompts_in_pieces_change_nothing(tiny, plain, prefill_rows):
    """Prompts of one and of two pieces mixed, with alternatives: the tokens are those of whole prompts."""
    requests = [
        dataclasses.replace(request, prompt=request.prompt * times)
        for request, times in zip(some_requests(), (1, 2, 3, 1, 2, 1), strict=False)
    ]
    expected = plain.complete(requests)
    heard = []
    engine = TextEngine.from_pretrained(
        tiny, batch=2, capacity=CAPACITY, chunk=3, prefill_rows=prefill_rows, prefill_chunk=16,
        top_logprobs=2, on_compile=lambda name, seconds: heard.append(name) if seconds is None else None,
    )  # fmt: skip
    done = engine.complete([dataclasses.replace(r, top_logprobs=i % 3) for i, r in enumerate(requests)])
    for i, (one, other) in enumerate(zip(done, expected, strict=True)):
        assert one.tokens == other.tokens
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=1e-5, atol=1e-5)
        if i % 3 == 0:
            assert one.top_logprobs is None
            continue
        assert [len(pairs) for pairs in one.top_logprobs] == [i % 3] * len(one.tokens)
        if requests[i].temperature is None:  # greedy: the best alternative is the token itself
            assert [pairs[0] for pairs in one.top_logprobs] == list(zip(one.tokens, one.logprobs, strict=True))
    assert sorted(heard) == ["decode", "last piece 16", "piece 16", "prefill 16"]


def test_a_window_runs_prompt_and_text_beyond_every_length(tiny, caplog):
    """Prompt and text longer than the cache, the window and the model's positions; equal to recomputation."""
    window, sinks, new = 24, 3, 40
    # With the weights of `tiny` one unit in the last place of float32 moves some of these values by 5e-4; with a
    # quarter of them by 3e-6 at most, so that the tolerance can tell a wrong key from rounding.
    tiny = dataclasses.replace(tiny, params=jax.tree.map(lambda x: x / 4 if x.ndim > 1 else x, tiny.params))
    engine = TextEngine.from_pretrained(tiny, batch=2, window=window, num_sinks=sinks, chunk=4, prefill_chunk=16)
    assert engine.decoder.state.cache.capacity == window + sinks
    prompt = np.random.default_rng(0).integers(4, 260, 300).tolist()
    requests = [
        Request(ids=prompt, max_new_tokens=new, eos_ids=(), logprobs=True),
        Request(ids=prompt[:70], max_new_tokens=new, eos_ids=(), logprobs=True, temperature=1.0),
    ]
    done = engine.complete(requests)
    assert "go beyond the model's 256 positions" in caplog.text
    score = jax.jit(lambda t: jax.nn.log_softmax(tiny.lm.apply(tiny.params, t, mask=SlidingWindow(window, sinks))))
    for request, completion in zip(requests, done, strict=True):
        tokens = np.array(completion.tokens)
        whole = np.zeros((1, 340), np.int32)  # causal: what follows does not matter
        whole[0, : len(request.ids) + new] = [*request.ids, *tokens]
        logprobs = np.asarray(score(whole))[0, len(request.ids) - 1 : len(request.ids) + new - 1]
        np.testing.assert_allclose(completion.logprobs, logprobs[np.arange(new), tokens], rtol=1e-5, atol=2e-5)
        if request.temperature is None:
            assert tokens.tolist() == logprobs.argmax(-1).tolist()


@pytest.mark.parametrize("steps", [200, pytest.param(10_000, marks=pytest.mark.slow)])  # passed 2026-11-27, 5 minutes
def test_an_endless_stream_compiles_once_and_keeps_memory_flat(tiny, steps):
    engine = TextEngine.from_pretrained(tiny, window=24, num_sinks=3)
    events = engine.generate([Request(prompt="on and on", max_new_tokens=2**31 - 100, eos_ids=(), temperature=1.0)])
    for _ in range(20):
        next(events)
    programs, arrays = dict(engine.decoder.programs.seconds), len(jax.live_arrays())
    size = sum(array.nbytes for array in jax.live_arrays())
    for _ in range(steps):
        next(events)
    assert engine.decoder.programs.seconds == programs and len(programs) == 2
    assert len(jax.live_arrays()) == arrays
    assert sum(array.nbytes for array in jax.live_arrays()) == size
    events.close()


@pytest.mark.slow  # 45 s on two busy cores, passed 2026-11-27
def test_ten_thousand_steps_compile_nothing_and_keep_memory_flat(tiny):
    engine = TextEngine.from_pretrained(tiny, batch=2, capacity=256)
    requests = [Request(prompt=f"{i}", max_new_tokens=200, eos_ids=(), temperature=float(i % 2)) for i in range(10)]
    engine.complete(requests)
    programs, arrays = dict(engine.decoder.programs.seconds), len(jax.live_arrays())
    size = sum(array.nbytes for array in jax.live_arrays())
    steps = 0
    while steps < 10_000:
        done = engine.complete(requests)
        steps += sum(c.usage.forwards for c in done) // 2  # two rows per step
    assert engine.decoder.programs.seconds == programs
    assert len(jax.live_arrays()) == arrays
    assert sum(array.nbytes for array in jax.live_arrays()) == size


MESH = """
import sys
import jax
jax.config.update("jax_platforms", "cpu"); jax.config.update("jax_num_cpu_devices", 4)
from jax.sharding import AxisType
from infer.text.engine import TextEngine
from infer.text.requests import Request
from jaxmodels.pretrained import load_pretrained
mesh = jax.make_mesh((1, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
requests = [Request(prompt="hello" * i, max_new_tokens=9, eos_ids=(), temperature=float(i % 2)) for i in range(1, 6)]
results = []
for where in (None, mesh):
    engine = TextEngine.from_pretrained(load_pretrained(sys.argv[1], mesh=where), batch=2, capacity=64)
    results.append([c.tokens for c in engine.complete(requests)])
assert results[0] == results[1]
assert engine.decoder.state.cache.k.sharding.spec[3] == "tensor"  # the cache is split over the heads
print("OK")
"""


@pytest.mark.slow  # 38 s on two busy cores, passed 2026-11-27
def test_weights_sharded_over_a_mesh_give_the_same_tokens(tiny_directory):
    done = subprocess.run(
        [sys.executable, "-c", MESH, str(tiny_directory)], capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip() == "OK", done.stderr


def test_no_requests_no_events(engine):
    assert engine.complete([]) == []


@pytest.mark.parametrize("form, window", [pytest.param("int8", None, marks=pytest.mark.slow), ("fp8", 24)])
def test_a_cache_in_eight_bits(tiny, form, window):
    """The log-probabilities of the first tokens are near those of a float cache, and the cache holds codes. Three bits
    of mantissa are few for keys as large as those of random weights."""
    requests = [dataclasses.replace(request, logprobs=True) for request in some_requests()[:2]]
    sizes = {"batch": 2} | ({"capacity": 64} if window is None else {"window": window})
    plain = TextEngine.from_pretrained(tiny, **sizes).complete(requests)
    engine = TextEngine.from_pretrained(tiny, **sizes, kv_cache=form)
    done = engine.complete(requests)
    cache = engine.decoder.state.cache
    assert cache.k.dtype == {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}[form]
    for own, expected in zip(done, plain, strict=True):
        assert own.logprobs[0] == expected.logprobs[0], "a prompt read in one piece sees itself as it is"
        if own.tokens[1] == expected.tokens[1]:
            np.testing.assert_allclose(own.logprobs[1], expected.logprobs[1], atol={"int8": 0.1, "fp8": 1.0}[form])


def test_scales_of_the_checkpoint_reach_an_fp8_cache(tiny, plain_calls):
    scales = Scales(np.linspace(0.5, 1, tiny.config.layers), np.linspace(1, 2, tiny.config.layers))
    own = dataclasses.replace(tiny, kv_scales=scales)
    engine = TextEngine.from_pretrained(own, capacity=64, kv_cache="fp8")
    np.testing.assert_allclose(engine.decoder.state.cache.v_scale, scales.v)
    with pytest.raises(ValueError, match="'int8' or 'fp8'; got 'fp4'"):
        TextEngine.from_pretrained(own, capacity=64, kv_cache="fp4")
