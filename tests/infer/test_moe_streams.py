"""Streams of a mixture of experts: a batch of requests from a checkpoint, and the command line."""

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
from jaxmodels.qwen import MoeConfig, QwenConfig, build
from jaxmodels.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory, tiny_directory):
    lm = build(QwenConfig.tiny(vocab_size=260, layers=2, dim=32, mlp_dim=16, head_dim=16, moe=MoeConfig(6, 2)))
    params = jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, lm.init(jax.random.key(0)))
    directory = tmp_path_factory.mktemp("model") / "moe"
    save_pretrained(directory, lm, params, tokenizer=Tokenizer.from_directory(tiny_directory))
    return directory


def test_the_command_line_streams_what_one_pass_over_the_text_says(directory, capsys, monkeypatch):
    monkeypatch.setattr(command_line, "prepare_environment", lambda: None)
    prompt = "one prompt"
    code = main(
        [str(arg) for arg in ("text", "--model", directory, "--json", "--capacity", 32, "--prompt", prompt,
                              "--max-new-tokens", 9, "--ignore-eos")]
    )  # fmt: skip
    out, error = capsys.readouterr()
    assert code == 0, error
    model = load_pretrained(directory)
    ids = model.tokenizer.encode(prompt)
    text, start = np.zeros((1, 32), np.int32), len(ids)
    text[0, :start] = ids
    logits = jax.jit(lambda tokens: model.lm.apply(model.params, tokens))  # causal: what follows does not matter
    for position in range(start, start + 9):
        text[0, position] = np.asarray(logits(jnp.asarray(text)))[0, position - 1].argmax()
    assert json.loads(out)["text"] == model.tokenizer.decode(text[0, start : start + 9].tolist())


@pytest.mark.slow
def test_ragged_batches_are_scored_like_single_rows(directory):
    """More requests than slots, in pieces: every log-probability is that of one pass (last run: 2026-11-30)."""
    model = load_pretrained(directory)
    engine = TextEngine.from_pretrained(model, capacity=40, batch=2, chunk=3, prefill_rows=2, prefill_chunk=8)
    random = np.random.default_rng(0)
    requests = [
        Request(ids=random.integers(4, 260, prompt).tolist(), max_new_tokens=new, eos_ids=(), logprobs=True, seed=i,
                temperature=float(i % 2))
        for i, (prompt, new) in enumerate(((1, 9), (20, 12), (17, 5), (5, 30)))
    ]  # fmt: skip
    score = jax.jit(lambda tokens: jax.nn.log_softmax(model.lm.apply(model.params, tokens)))
    for request, done in zip(requests, engine.complete(requests), strict=True):
        text, start, count = np.zeros((1, 40), np.int32), len(request.ids), len(done.tokens)
        text[0, : start + count] = [*request.ids, *done.tokens]
        logprobs = np.asarray(score(jnp.asarray(text)))[0, start - 1 : start + count - 1]
        np.testing.assert_allclose(done.logprobs, logprobs[np.arange(count), done.tokens], rtol=1e-4, atol=1e-4)
