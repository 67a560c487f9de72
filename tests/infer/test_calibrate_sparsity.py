"""`infer calibrate-sparsity`: from text to a config.json that `infer text --target-sparsity` uses."""

import argparse
import json
import re
import shutil
from pathlib import Path

import pytest

import infer.__main__ as cli
from infer.calibrate_sparsity import cut_samples, read_documents
from jaxmodels import command_line
from jaxmodels.checkpoints.huggingface import read_json, write_json
from jaxmodels.sparse_attention import SkipSoftmaxConfig

ASSETS = Path(cli.__file__).parent / "assets"
TEXT = Path(argparse.__file__)  # a hundred kilobytes of Python
SMALL = ["--max-length", "256", "--length-bins", "2", "--samples", "4", "--decode-tokens", "4"]
SMALL += ["--rows", "2", "--width", "8", "--decode-width", "4", "--decode-chains", "2"]


@pytest.fixture(autouse=True)
def no_side_effects(monkeypatch):
    monkeypatch.setattr(command_line, "prepare_environment", lambda: None)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "ar"
    shutil.copytree(ASSETS / "ar", directory)
    return directory


def run(capsys, *args):
    code = cli.main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return code, out, err


def test_calibrates_checks_and_is_used(model, capsys, tmp_path):
    before = read_json(model / "config.json")
    code, _, err = run(capsys, "text", "--model", model, "--prompt", "x", "--target-sparsity", "0.2")
    assert code == 1 and "error: target_sparsity needs a calibrated sparse_attention_config" in err

    command = ["calibrate-sparsity", "--model", model, "--data", TEXT, "--target-sparsity", "0.2", *SMALL]
    code, out, err = run(capsys, *command)
    assert code == 0, err
    assert out.count("share of skipped tiles") == 2 and out.splitlines()[-1] == str(model / "config.json")
    assert re.search(r"^ +λ +128 +256$", out, re.M) and "sample 4 of 4: 256 tokens" in err
    checks = re.findall(r"check at (\d+) tokens, target 0.2: prefill (\S+) .* decode (\S+) ", out)
    assert [length for length, _, _ in checks] == ["128", "256"]
    # One held-out sample of each length; the law is fitted to one other. Far from nothing and from everything.
    assert all(0.05 < float(share) < 0.5 for _, *shares in checks for share in shares), checks

    after = read_json(model / "config.json")
    block = SkipSoftmaxConfig.from_hf(after.pop("sparse_attention_config"))
    assert after == before
    assert block.prefill.target_sparsity == 0.2 and (block.prefill.tile.rows, block.prefill.tile.width) == (2, 8)
    assert (block.decode.tile.width, block.decode.tile.chains) == (4, 2) and block.decode.fit.b > 0

    prompt = "import os\n\n\ndef main():\n" * 8
    text = ["text", "--model", model, "--prompt", prompt, "--max-new-tokens", "4"]
    code, out, err = run(capsys, *text, "--target-sparsity", "0.6")
    assert code == 0, err
    assert all(re.search(rf"^{phase} beyond .* tokens skips tiles", err, re.M) for phase in ("prefill", "decode")), err
    code, _, err = run(capsys, *text, "--skip-decode-scale-factor", "4")
    assert code == 0 and "decode beyond 4 tokens" in err and "prefill beyond" not in err
    code, _, err = run(capsys, *text)
    assert code == 0 and "has calibrated skip-softmax thresholds; --target-sparsity uses them" in err
    code, _, err = run(capsys, *text, "--decoder", "diffusion", "--target-sparsity", "0.2")
    assert code == 2 and "--target-sparsity needs the autoregressive decoder" in err


def test_writes_nothing_when_told_or_when_it_fails(model, capsys, tmp_path):
    """Prefill alone, from one length."""
    content = (model / "config.json").read_bytes()
    command = ["calibrate-sparsity", "--model", model, "--data", TEXT, *SMALL, "--length-bins", "1", "--samples", "1"]
    command += ["--max-length", "128", "--decode-tokens", "0"]
    code, out, err = run(capsys, *command, "--target-sparsity", "0.1", "--output", tmp_path / "block.json", "--quiet")
    assert code == 0 and err == "" and "check at" not in out
    block = SkipSoftmaxConfig.from_hf(read_json(tmp_path / "block.json")["sparse_attention_config"])
    assert block.decode is None and block.prefill.target_sparsity == 0.1
    # A wish that cannot be granted says what was measured.
    code, out, err = run(capsys, *command, "--target-sparsity", "0.95")
    assert code == 1 and "target_sparsity 0.95 was not reached in prefill: the largest threshold, 0.7, skipped" in err
    assert "share of skipped tiles" in out and (model / "config.json").read_bytes() == content


def test_a_model_without_full_attention_is_refused(tiny_directory, capsys, tmp_path):
    shutil.copytree(tiny_directory, tmp_path / "windows")
    path = tmp_path / "windows" / "config.json"
    windows = {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention"] * 2}
    write_json(path, read_json(path) | windows)
    command = ["calibrate-sparsity", "--model", path.parent, "--data", TEXT, "--target-sparsity", "0.2", *SMALL]
    code, _, err = run(capsys, *command)
    assert code == 1 and "no layer has full attention, and others skip nothing" in err


BAD_FLAGS = {
    "target": (["--target-sparsity", "1.5"], 2, "target_sparsity must lie in (0, 1); got 1.5"),
    "few samples": (["--samples", "2"], 2, "samples must be at least length_bins=4; got 2"),
    "short": (
        ["--max-length", "512"],
        2,
        "the shortest samples, max_length=512 / 2^3, must hold two tiles of 128 keys",
    ),
    "positions": ([], 1, "max_length must be at most the model's 512 positions; got 32768"),
    "no file": ([*SMALL, "--data", "/nowhere/x.txt"], 1, "data file /nowhere/x.txt: "),
    "little text": ([*SMALL, "--samples", "4000"], 1, "4000 samples of up to 256 need 768000: give more text"),
    "repository": (["--model", "org/name"], 1, "org/name is not a local directory"),
}


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags_are_explained(name, capsys):
    flags, expected, message = BAD_FLAGS[name]
    code, _, err = run(capsys, "calibrate-sparsity", "--model", ASSETS / "ar", "--data", TEXT, *flags)
    assert code == expected and message in " ".join(err.split()), err


def test_documents_and_samples(tmp_path):
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "abc"}\n\n{"text": "de"}\n')
    plain = tmp_path / "b.txt"
    plain.write_text("fgh")
    assert list(read_documents((lines, plain), "text")) == ["abc", "de", "fgh"]
    samples = cut_samples(read_documents((lines, plain), "text"), lambda text: [ord(c) for c in text], [2, 4])
    assert ["".join(map(chr, sample)) for sample in samples] == ["ab", "cdef"]
    lines.write_text('{"text": "abc"}\n{"body": 1}\n')
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: must be a JSON object with text under 'text'"):
        list(read_documents((lines,), "text"))
    lines.write_text(json.dumps(["text"]))
    with pytest.raises(ValueError, match="line 1"):
        list(read_documents((lines,), "text"))
