"""Streams of models with layers that select blocks: batches, refilled slots, prompts in pieces, from a checkpoint."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infer.__main__ import main
from infer.text.engine import TextEngine
from infer.text.requests import Request
from jaxmodels import command_line
from jaxmodels.pretrained import load_pretrained, save_pretrained
from jaxmodels.qwen import MobaConfig, QwenConfig, build, hybrid_layers
from jaxmodels.tokenizer import Tokenizer

CAPACITY = 62  # not a whole number of blocks


@pytest.fixture(scope="module")
def directory(tmp_path_factory, tiny_directory):
    layers = hybrid_layers(2, window=6, moba=MobaConfig(block_size=4, top_k=3), key_conv=3)
    sizes = {"vocab_size": 260, "layers": 2, "dim": 32, "mlp_dim": 64, "head_dim": 16}
    lm = build(QwenConfig.tiny(**sizes, layer_attention=layers))
    params = jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, lm.init(jax.random.key(0)))
    taps = params["layers"]["attention"]["k_conv"]
    params["layers"]["attention"]["k_conv"] = taps.at[1].set(jax.random.normal(jax.random.key(1), taps.shape[1:]))
    directory = tmp_path_factory.mktemp("model") / "hybrid"
    save_pretrained(directory, lm, params, tokenizer=Tokenizer.from_directory(tiny_directory))
    return directory


@pytest.fixture(scope="module")
def hybrid(directory):
    return load_pretrained(directory)


def some_requests():
    """Ragged in prompt and length, more of them than slots; greedy and sampled."""
    random = np.random.default_rng(0)
    lengths = ((1, 9), (33, 20), (17, 5), (5, 41), (40, 12), (16, 1))
    return [
        Request(
            ids=random.integers(4, 260, prompt).tolist(), max_new_tokens=new, eos_ids=(), logprobs=True, seed=i,
            temperature=float(i % 2),
        )
        for i, (prompt, new) in enumerate(lengths)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"batch": 1}, marks=pytest.mark.slow),
        pytest.param({"batch": 3, "chunk": 4}, marks=pytest.mark.slow),
        {"batch": 2, "chunk": 3, "prefill_rows": 2, "prefill_chunk": 16},
    ],
    ids=["alone", "batch", "pieces"],
)
def test_streams_equal_the_full_forward(hybrid, options):
    """Every token's log-probability is that of one pass over the whole text, and greedy tokens are its best."""
    engine = TextEngine.from_pretrained(hybrid, capacity=CAPACITY, **options)
    score = jax.jit(lambda tokens: jax.nn.log_softmax(hybrid.lm.apply(hybrid.params, tokens)))
    requests = some_requests()
    for request, done in zip(requests, engine.complete(requests), strict=True):
        text = np.zeros((1, CAPACITY), np.int32)  # causal: what follows does not matter
        start, count = len(request.ids), len(done.tokens)
        assert count == request.max_new_tokens
        text[0, : start + count] = [*request.ids, *done.tokens]
        logprobs = np.asarray(score(jnp.asarray(text)))[0, start - 1 : start + count - 1]
        np.testing.assert_allclose(done.logprobs, logprobs[np.arange(count), done.tokens], rtol=1e-4, atol=1e-4)
        if not request.temperature:
            assert list(done.tokens) == logprobs.argmax(-1).tolist()


def test_what_such_models_cannot_stream_with(hybrid):
    with pytest.raises(NotImplementedError, match="a ring forgets what layers that select blocks need"):
        TextEngine.from_pretrained(hybrid, window=16)
    with pytest.raises(
        NotImplementedError, match=r"layers that select blocks \(moba\) read keys and values as they are"
    ):
        TextEngine.from_pretrained(hybrid, capacity=CAPACITY, kv_cache="int8")


@pytest.mark.slow  # many programs to compile
def test_the_command_line_streams_from_such_a_checkpoint(directory, hybrid, capsys, monkeypatch):
    monkeypatch.setattr(command_line, "prepare_environment", lambda: None)
    options = ["--prompt", "one prompt in two pieces", "--prefill-chunk", 16, "--max-new-tokens", 9, "--ignore-eos"]
    code = main([str(arg) for arg in ("text", "--model", directory, "--json", "--capacity", 64, *options)])
    out, error = capsys.readouterr()
    assert code == 0, error
    engine = TextEngine.from_pretrained(hybrid, capacity=64)
    expected = engine.complete([Request(prompt=options[1], max_new_tokens=9, eos_ids=())])[0]
    assert json.loads(out)["text"] == expected.text
    code = main([str(arg) for arg in ("text", "--model", directory, "--prompt", "x", "--window", 16)])
    assert code == 1 and "a ring forgets what layers that select blocks need" in capsys.readouterr().err
