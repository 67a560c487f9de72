"""Rounding to nearest from the command line, and what does not train."""

import jax
import numpy as np
import pytest

import train.__main__ as cli
from jaxmodels import load_pretrained


@pytest.fixture(scope="module")
def start(make_start):
    """(dense model, corpus)."""
    return make_start(layers=2, dim=64, mlp_dim=96)


@pytest.mark.parametrize(
    "flags, title, most",
    [
        (["--format", "int4", "--group-size", "32"], "AWQ, 4 bits, groups of 32", 0.3),
        (["--round-inputs"], "compressed-tensors int-quantized, int8, scales per channel, dynamic int8 inputs", 0.03),
        (["--format", "fp8"], "compressed-tensors float-quantized, float8, scales per channel", 0.1),
        (["--format", "nvfp4"], "compressed-tensors nvfp4-pack-quantized, float4, scales per tensor_group", 0.3),
    ],
)
@pytest.mark.smoke
def test_rounds_reports_and_is_loaded(start, tmp_path, capsys, flags, title, most):
    out = tmp_path / "out"
    assert cli.main(["quantize", "--model", str(start[0]), "--out", str(out), *flags]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == str(out)
    assert "mlp.down" in captured.err and "weight SNR" in captured.err and "MB ->" in captured.err
    dense, model = load_pretrained(start[0]), load_pretrained(out)
    assert model.quantization == title and model.tokenizer is not None
    tokens = np.arange(3, 40)[None] % 300
    expected = np.asarray(dense.apply(dense.params, tokens))
    error = np.linalg.norm(np.asarray(model.apply(model.params, tokens)) - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < most


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--format", "int8", "--group-size", "32"], "options of int4; format is int8"),
        (["--format", "nvfp4", "--round-inputs"], "round_inputs needs format int8 or fp8; got nvfp4"),
        (["--format", "int4"], "group_size must be -1 or divide the 64 inputs; got 128"),
    ],
)
def test_bad_input(start, tmp_path, capsys, flags, message):
    assert cli.main(["quantize", "--model", str(start[0]), "--out", str(tmp_path / "out"), *flags]) in (1, 2)
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_quantized_weights_are_no_start(start, tmp_path, capsys):
    out, corpus = str(tmp_path / "out"), str(start[1])
    assert cli.main(["quantize", "--model", str(start[0]), "--out", out]) == 0
    capsys.readouterr()
    run = str(tmp_path / "run")
    for command in (
        ["quantize", "--model", out, "--out", str(tmp_path / "again")],
        ["paroquant", "--model", out, "--data", corpus, "--out", str(tmp_path / "again"), "--rows.seq-len", "32"],
        ["lm", "--init", out, "--data", corpus, "--directory", run],
        ["dlm", "--init", out, "--data", corpus, "--directory", run, "--mask-id", "1"],
    ):
        assert cli.main(command) == 1
        assert "is quantized" in capsys.readouterr().err
    assert jax.tree.leaves(load_pretrained(out).params)
