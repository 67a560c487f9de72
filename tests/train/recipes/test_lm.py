"""The recipe from the command line to a model directory."""

import json

import numpy as np
import pytest

import train.__main__ as cli
from jaxmodels import load_pretrained


@pytest.fixture(scope="module")
def start(make_start):
    """(initial model, corpus)."""
    return make_start(dtype="bfloat16", layers=1)


@pytest.fixture
def lm(start, tmp_path, monkeypatch, compiled_programs):
    """`lm(*flags)`: exit code of a short run in `tmp_path / "run"`."""
    init, corpus = start
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    common = ["--init", str(init), "--data", str(corpus), "--directory", str(tmp_path / "run")]
    common += ["--steps", "12", "--batch-size", "4", "--rows.seq-len", "32", "--rows.validation-fraction", "0.2"]
    common += ["--optim.learning-rate", "3e-3", "--log-every", "4", "--eval-batches", "2"]
    return lambda *flags: cli.main(["lm", *common, *flags])


def records(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.smoke
def test_trains_evaluates_exports_and_refuses_another_configuration(lm, start, tmp_path, capsys):
    assert lm() == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == str(tmp_path / "run" / "model")
    assert "memory per device" in captured.err and "compiled the training step" in captured.err
    lines = records(tmp_path / "run")
    trained = [r["train/loss"] for r in lines if "train/loss" in r]
    assert len(trained) == 3 and trained[-1] < trained[0] - 0.3
    held_out = [r["eval/loss"] for r in lines if "eval/loss" in r]
    assert len(held_out) == 1 and held_out[0] < trained[0] - 0.3

    model, initial = load_pretrained(tmp_path / "run" / "model"), load_pretrained(start[0])
    assert model.params["embed"].dtype == initial.params["embed"].dtype == "bfloat16"
    assert not np.array_equal(model.params["embed"], initial.params["embed"])
    text = "def f3(x):"
    assert model.tokenizer.encode(text) == initial.tokenizer.encode(text)

    for flags, message in (
        (["--optim.weight-decay", "0.3"], "optim.weight_decay was 0.1 and is now 0.3"),
        (["--z-loss", "0.5"], "z_loss was 0.0 and is now 0.5"),
        (["--rows.seq-len", "16"], "seq_len"),
    ):
        assert lm(*flags) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and message in error


@pytest.mark.slow  # 13 s; last passed on 2026-11-27
def test_other_options(lm, tmp_path):
    """Random weights, parts of a batch, bfloat16, recomputation and the z-loss in one run, then its continuation."""
    flags = ["--random-weights", "--accumulate", "2", "--compute-dtype", "bfloat16", "--remat", "full"]
    flags += ["--z-loss", "1e-4", "--export-dtype", "float32", "--optim.schedule", "constant", "--steps", "4"]
    assert lm(*flags) == 0
    lines = records(tmp_path / "run")
    assert lines[0]["train/loss"] > lines[0]["train/nll"]  # the z term
    assert load_pretrained(tmp_path / "run" / "model").params["embed"].dtype == "float32"
    assert lm(*flags, "--steps", "6", "--export", str(tmp_path / "continued")) == 0
    assert [r["step"] for r in records(tmp_path / "run") if "train/loss" in r] == [4, 6]
    # Shuffled rows and all: the continued run has the weights of an undisturbed one, bit for bit.
    undisturbed = [*flags, "--steps", "6", "--directory", str(tmp_path / "other")]
    assert lm(*undisturbed, "--export", str(tmp_path / "undisturbed")) == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("continued", "undisturbed")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--mesh.tensor", "3"], "mesh.data * mesh.fsdp * mesh.tensor must equal"),
        (["--rows.seq-len", "512"], "rows.seq_len must be at most the model's 256 positions; got 512"),
        (["--rows.validation-fraction", "1e-9"], "--rows.validation-fraction"),
        (["--data", "/nowhere"], "/nowhere"),
        (["--init", "/nowhere"], "/nowhere"),
    ],
)
def test_bad_input_is_one_line(lm, flags, message, capsys):
    assert lm(*flags) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]


def test_trains_with_skipped_tiles(lm, tmp_path, capsys):
    """Forward and backward leave out the same tiles, the share is logged, and another threshold is another run."""
    flags = ["--skip-rows", "4", "--skip-width", "4"]
    assert lm(*flags, "--skip-threshold", "0.9", "--rows.validation-fraction", "0") == 0
    shares = [r["train/sparsity"] for r in records(tmp_path / "run") if "train/sparsity" in r]
    assert len(shares) == 3 and all(0.0 < share < 1.0 for share in shares)
    capsys.readouterr()
    assert lm(*flags, "--skip-threshold", "0.5", "--rows.validation-fraction", "0") == 1
    assert "skip.threshold was 0.9 and is now 0.5" in capsys.readouterr().err
    assert lm(*flags) == 2 and lm("--skip-threshold", "1.0") == 2
    error = capsys.readouterr().err
    assert "skip_rows=4 does nothing without skip_threshold" in error
    assert "skip_threshold must lie in (0, 1) or be None; got 1.0" in error
