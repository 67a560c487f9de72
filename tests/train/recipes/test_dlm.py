"""The conversion recipe from the command line to a model directory that decodes in blocks."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train.__main__ as cli
from jaxmodels import load_pretrained
from jaxmodels.decoding.block_diffusion import generate, nelbo
from train.drift import weight_drift
from train.recipes.dlm import DLM, LoraConfig


@pytest.fixture(scope="module")
def start(make_start):
    """(initial autoregressive model without mask token, corpus)."""
    return make_start(layers=1)


@pytest.fixture
def dlm(start, tmp_path, monkeypatch, compiled_programs):
    """`dlm(*flags)`: exit code of a short run in `tmp_path / "run"`."""
    init, corpus = start
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    common = ["--init", str(init), "--data", str(corpus), "--directory", str(tmp_path / "run"), "--mask-id", "1"]
    common += ["--steps", "12", "--batch-size", "4", "--rows.seq-len", "32", "--rows.validation-fraction", "0.2"]
    common += ["--optim.learning-rate", "1e-2", "--log-every", "4", "--eval-batches", "2", "--block-size", "8"]
    return lambda *flags: cli.main(["dlm", *common, *flags])


def records(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.smoke
def test_converts_reports_bound_and_drift_and_exports(dlm, start, tmp_path, capsys):
    assert dlm() == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "run" / "model")
    lines = records(tmp_path / "run")
    trained = [r["train/masked_nll"] for r in lines if "train/masked_nll" in r]
    assert len(trained) == 3 and trained[-1] < trained[0] - 0.3
    last = lines[-1]
    assert len(last["eval/offset_nats"]) == 8 and last["drift_attention"] > 0
    model, initial = load_pretrained(tmp_path / "run" / "model"), load_pretrained(start[0])
    config = model.config
    assert (config.mask_id, config.block_size, config.prompt_attention) == (1, 8, "block_causal")
    before = jax.tree.map(lambda x: x.astype(jnp.float32), initial.params)
    drift = weight_drift(model.params, before)
    assert drift["drift_mlp"] == pytest.approx(last["drift_mlp"], rel=1e-4)
    up = np.abs(np.asarray(model.params["layers"]["mlp"]["up"] - initial.params["layers"]["mlp"]["up"])).mean()
    gate = np.abs(np.asarray(model.params["layers"]["mlp"]["gate"] - initial.params["layers"]["mlp"]["gate"])).mean()
    down = np.abs(np.asarray(model.params["layers"]["mlp"]["down"] - initial.params["layers"]["mlp"]["down"])).mean()
    assert drift["drift_mlp"] == pytest.approx((up + gate + down) / 3, rel=1e-4)

    # The exported model scores as the run said it does, and decodes.
    tokens = jnp.asarray([model.tokenizer.encode("def f3(x):\n    return x + 3\n" * 8)[:32]], jnp.int32)
    bound = nelbo(model.lm, model.params, tokens, jax.random.key(0), block_size=8, num_samples=8)
    assert float(bound.nats[0] / bound.tokens[0]) < np.log(304) - 0.3
    done, _ = generate(model.lm, model.params, [tokens[0, :5].tolist()], max_new_tokens=8, eos_ids=())
    assert len(done[0].tokens) == 8 and 1 not in done[0].tokens


@pytest.mark.slow  # 21 s; last passed on 2026-11-27
def test_low_rank_conversion_freezes_projections_and_continues_after_a_stop(dlm, start, tmp_path):
    flags = ["--lora.rank", "2", "--checkpoint-every", "6", "--optim.schedule", "constant"]
    assert dlm(*flags, "--steps", "6") == 0
    assert dlm(*flags) == 0  # the same run, longer
    whole = load_pretrained(tmp_path / "run" / "model")
    initial = load_pretrained(start[0])
    steps = [r["step"] for r in records(tmp_path / "run") if "train/loss" in r]
    assert steps == sorted(set(steps)) and steps[-1] == 12
    for part, name in (("attention", "o"), ("mlp", "up")):
        moved = np.asarray(whole.params["layers"][part][name] - initial.params["layers"][part][name])[0]
        rank = np.linalg.matrix_rank(moved.reshape(moved.shape[0], -1), tol=1e-5)
        assert rank == 2
    assert not np.array_equal(whole.params["embed"], initial.params["embed"])


def test_a_mask_token_is_never_guessed(start, tmp_path, capsys):
    init, corpus = start
    flags = ["--init", str(init), "--data", str(corpus), "--directory", str(tmp_path / "run"), "--block-size", "8"]
    assert cli.main(["dlm", *flags]) == 1
    assert "names no mask_token_id; give --mask-id" in capsys.readouterr().err


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"eval_block": 0}, "eval_block must be at least 1 or None; got 0"),
        ({"eval_samples": 0}, "eval_samples must be at least 1; got 0"),
        ({"z_loss": -1.0}, "z_loss must not be negative; got -1.0"),
    ],
)
def test_bad_flags(fields, message):
    with pytest.raises(ValueError, match=message):
        DLM(init="none", data=(), **fields)


def test_bad_lora():
    with pytest.raises(ValueError, match=r"lora.rank must not be negative; got -1"):
        LoraConfig(rank=-1)
    with pytest.raises(ValueError, match=r"lora.alpha must be positive and needs lora.rank; got 8.0 with rank 0"):
        LoraConfig(alpha=8.0)
