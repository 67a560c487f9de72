"""Recipes on a mixture of experts: what trains, and what is refused before anything is spent."""

import json

import numpy as np
import pytest

import train.__main__ as cli
from jaxmodels import load_pretrained
from jaxmodels.checkpoints.mapping import flatten
from jaxmodels.qwen import MoeConfig
from train.paroquant.pairs import select_pairs


@pytest.fixture(scope="module")
def start(make_start):
    """(initial model, corpus)."""
    return make_start(layers=1, dim=32, mlp_dim=32, moe=MoeConfig(4, 2))


@pytest.fixture
def flags(start, tmp_path, monkeypatch, compiled_programs):
    init, corpus = start
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    common = ["--init", str(init), "--data", str(corpus), "--directory", str(tmp_path / "run")]
    return [*common, "--steps", "2", "--batch-size", "4", "--rows.seq-len", "32", "--rows.validation-fraction", "0"]


@pytest.mark.slow
def test_a_step_of_next_token_training_moves_router_and_experts(start, flags, tmp_path):
    """Last run: 2026-11-30."""
    assert cli.main(["lm", *flags, "--optim.learning-rate", "1e-3"]) == 0
    before, after = (flatten(load_pretrained(path).params) for path in (start[0], tmp_path / "run" / "model"))
    for name in ("router", "gate", "up", "down"):
        moved = np.abs(np.asarray(after["layers", "mlp", name] - before["layers", "mlp", name]))
        assert (moved.reshape(1, 4, -1).max(-1) > 1e-5).all(), name  # of every expert in every layer


@pytest.mark.slow
def test_rounds_experts_and_reports_them_together(start, tmp_path, capsys):
    """Last run: 2026-11-30."""
    out = tmp_path / "out"
    assert cli.main(["quantize", "--model", str(start[0]), "--out", str(out), "--format", "int8"]) == 0
    assert "mlp.down      weight SNR" in capsys.readouterr().err
    model = load_pretrained(out)
    assert model.params["layers"]["mlp"]["up"].codes.shape == (1, 4, 32, 32)
    assert np.isfinite(model.apply(model.params, np.arange(3, 40)[None])).all()


@pytest.mark.slow
def test_paroquant_shares_rotations_and_continues(start, tmp_path, capsys, monkeypatch, compiled_programs):
    """Last run: 2026-11-30."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    init, corpus = start
    out = tmp_path / "out"
    command = [
        "paroquant", "--model", str(init), "--data", str(corpus), "--rows.seq-len", "32",
        "--rows.validation-fraction", "0.3", "--samples", "16", "--validation-samples", "5", "--batch-size", "4",
        "--group-size", "16", "--num-rotations", "2", "--epochs", "2", "1", "--out", str(out), "--seed", "5",
    ]  # fmt: skip
    assert cli.main(command) == 0, capsys.readouterr().err
    dense, model = load_pretrained(init), load_pretrained(out)
    assert model.quantization == "ParoQuant, 4 bits, groups of 16, 2 rotations"
    mlp = model.params["layers"]["mlp"]
    for name, seed in (("gate", 5), ("up", 5), ("down", 5 + 97)):
        pairs = select_pairs(seed, 2, group_size=16, num_rotations=2)
        np.testing.assert_array_equal(mlp[name].rotation.pairs[0], pairs.channels)
        assert np.asarray(mlp[name].rotation.theta).any()
    np.testing.assert_array_equal(mlp["gate"].input_scales, mlp["up"].input_scales)
    np.testing.assert_array_equal(mlp["router"], dense.params["layers"]["mlp"]["router"])
    report = json.loads((tmp_path / "out.run" / "report.json").read_text())
    (block,) = report["blocks"]
    assert {"mlp.gate_up", "mlp.down"} < set(block["weight_snr"]) and block["snr"] > block["snr_nearest"]
    tokens = np.arange(3, 40)[None] % 300
    logits = [m.apply(m.params, tokens) for m in (dense, model)]
    assert 1e-5 < float(abs(logits[0] - logits[1]).max()) < 0.5 * float(abs(logits[0]).max())
    weights = (out / "model.safetensors").read_bytes()
    assert cli.main(command) == 0
    assert "block 1/1  from" in capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    "command, message",
    [
        (["lm", "--moba.layers", "0"], "with layer_attention=(LayerAttention(window=None, moba=MobaConfig("),
        (["dlm", "--mask-id", "1"], "top_k=2, normalize=True) with block_size=32; possible: none"),
    ],
)  # fmt: skip
def test_what_cannot_be_exported(flags, tmp_path, capsys, command, message):
    assert cli.main([*command[:1], *flags, *command[1:]]) == 1
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run" / "model").exists()
