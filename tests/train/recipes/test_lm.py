"""The recipe from the command line to a model directory."""

import dataclasses
import json
from typing import get_args

import numpy as np
import pytest

import infer.__main__ as infer_cli
import train.__main__ as cli
from jaxmodels import load_pretrained
from jaxmodels.qwen import LayerAttention, MobaConfig, QwenConfig
from train.recipes.text import MobaLayersConfig, Preset, StartModel, open_preset, route


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


@pytest.mark.slow  # many programs to compile
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


def flags_of(directory, corpus):
    flags = ["--data", str(corpus), "--directory", str(directory), "--batch-size", "4", "--rows.seq-len", "64"]
    flags += ["--rows.validation-fraction", "0.2", "--optim.learning-rate", "3e-3", "--log-every", "2"]
    return [*flags, "--eval-batches", "1"]


def test_trains_a_preset_with_the_vocabulary_of_a_tokenizer(start, tmp_path, monkeypatch, compiled_programs, capsys):
    init, corpus = start
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    flags = ["lm", "--preset", "moba-tiny", "--tokenizer", str(init), *flags_of(tmp_path / "run", corpus)]
    assert cli.main([*flags, "--steps", "4"]) == 0 and cli.main([*flags, "--steps", "6"]) == 0
    assert "continuing from step 4" in capsys.readouterr().err
    lines = records(tmp_path / "run")
    trained = [r["train/loss"] for r in lines if "train/loss" in r]
    assert trained[-1] < trained[0] - 0.3 and len([r for r in lines if "eval/loss" in r]) == 2

    exported = tmp_path / "run" / "model"
    model, tokenizer = load_pretrained(exported), load_pretrained(init).tokenizer
    preset = QwenConfig.moba_tiny()
    assert 256 < tokenizer.vocab_size <= 384 == model.lm.config.vocab_size
    assert model.lm.config.layer_attention == preset.layer_attention and model.lm.config.eos_ids == (0,)
    assert model.params["embed"].dtype == "float32"
    text = ["text", "--model", str(exported), "--prompt", "def f3(x):\n    return", "--max-new-tokens", "40"]
    assert infer_cli.main([*text, "--ignore-eos"]) == 0

    assert cli.main([*flags, "--steps", "6", "--moba.layers", "0"]) == 1
    assert "layer 0 must have full attention" in capsys.readouterr().err
    assert cli.main([*flags, "--steps", "6", "--preset", "qwen2.5-0.5b"]) == 1
    assert "model.max_positions was 1024 and is now 32768" in capsys.readouterr().err


@pytest.mark.slow  # 35 s; last passed on 2026-11-30
def test_trains_a_dense_model_on_with_blocks(make_start, tmp_path, monkeypatch, compiled_programs, capsys):
    init, corpus = make_start(layers=2)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    flags = ["lm", "--init", str(init), *flags_of(tmp_path / "run", corpus), "--steps", "3"]
    flags += ["--rows.validation-fraction", "0"]
    moba = ["--moba.layers", "1", "--moba.block-size", "8", "--moba.top-k", "2", "--moba.key-conv", "3"]
    assert cli.main([*flags, *moba]) == 0
    model, initial = load_pretrained(tmp_path / "run" / "model"), load_pretrained(init)
    kinds = [(layer.moba, layer.key_conv, layer.rotary) for layer in model.lm.config.layer_attention]
    assert kinds == [(None, None, True), (MobaConfig(8, 2), 3, True)]
    # It has started from the weights of the dense model, and its taps have moved from 0.
    assert 0 < np.abs(np.subtract(model.params["embed"], initial.params["embed"])).max() < 0.02
    assert 0 < np.abs(model.params["layers"]["attention"]["k_conv"][1]).max() < 0.02

    capsys.readouterr()
    moba[moba.index("--moba.top-k") + 1] = "3"
    assert cli.main([*flags, *moba]) == 1
    assert "model.layer_attention was" in capsys.readouterr().err
    assert cli.main([*flags, "--moba.layers", "2"]) == 1
    assert "layers must lie in [0, 2); got 2" in capsys.readouterr().err


def test_route_converts_weights_when_they_are_made(start):
    """Read, they are the dense model's with taps of 0; random ones have nothing to convert."""
    init, _ = start
    dense = load_pretrained(init)
    model = StartModel(dense.lm, lambda: dense.params, dense.tokenizer, None, {}, "bfloat16")
    assert route(model, MobaLayersConfig()) is model
    moba = MobaLayersConfig(layers=(0,), block_size=8, top_k=2, key_conv=3)
    routed = route(model, moba)
    layer = LayerAttention(moba=MobaConfig(8, 2), key_conv=3)
    assert routed.lm.config == dataclasses.replace(dense.lm.config, layer_attention=(layer,))
    params = routed.create()
    attention = dict(params["layers"]["attention"])
    assert not attention.pop("k_conv").any() and params["embed"] is dense.params["embed"]
    assert attention == dense.params["layers"]["attention"]
    untrained = route(dataclasses.replace(model, create=None), moba)
    assert untrained.create is None and untrained.lm.config == routed.lm.config


def test_presets(start, tmp_path):
    """Every preset of the configuration can be named, and keeps all but its vocabulary."""
    init, _ = start
    methods = {name for name, member in vars(QwenConfig).items() if isinstance(member, classmethod)} - {"tiny"}
    assert {name.replace("-", "_").replace(".", "_") for name in get_args(Preset)} == methods
    vocabulary = {"vocab_size": 384, "eos_ids": (0,), "bos_id": None, "pad_id": None}
    for name in get_args(Preset):
        preset = getattr(QwenConfig, name.replace("-", "_").replace(".", "_"))()
        assert open_preset(name, str(init)).lm.config == dataclasses.replace(preset, **vocabulary)
    (tmp_path / "tokenizer.json").write_bytes((init / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match="names no eos_token"):
        open_preset("moba-tiny", str(tmp_path))
