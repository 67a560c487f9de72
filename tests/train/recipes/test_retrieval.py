"""The recipe from the command line to its results, small; its losses; what it refuses."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train.__main__ as cli
from jaxmodels.demo.recall import Recall
from jaxmodels.qwen import build
from jaxmodels.qwen.config import QwenConfig
from jaxmodels.sparse_attention import SkipAttention
from pallas_kernels.attention.skip import SkipTile
from train.recipes.retrieval import THRESHOLDS, make_recall_loss

SMALL = ["--lengths", "32", "64", "--steps", "3", "3", "--batch-sizes", "8", "4", "--tune-steps", "2", "--pairs", "5"]
SMALL += ["--rows", "4", "--width", "4", "--dim", "64", "--layers", "1", "--test-rows", "8"]


@pytest.mark.slow
def test_trains_both_copies_and_reports(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    command = ["retrieval", "--directory", str(tmp_path), *SMALL]
    assert cli.main(command) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == str(tmp_path / "results.json")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["chance"] == 1 / 128 and results["questions"] == 40
    for records in results["arms"].values():
        skips = [record for record in records if record["kind"] == "skip"]
        assert [record["value"] for record in skips] == pytest.approx(THRESHOLDS)
        sparsities = [record["sparsity"] for record in skips]
        assert sparsities == sorted(sparsities) and records[0]["sparsity"] == 0.0
        windows = [record["sparsity"] for record in records if record["kind"] == "window"]
        assert len(windows) == 1 and 0.3 < windows[0] < 0.6
    weights = {name: tmp_path / name / "checkpoints" for name in ("grow-32", "grow-64", "dense", "aware")}
    assert all(directory.is_dir() for directory in weights.values())
    logged = [json.loads(line) for line in (tmp_path / "aware" / "metrics.jsonl").read_text().splitlines()]
    assert any("train/sparsity" in line for line in logged) and any("train/accuracy" in line for line in logged)
    # Another threshold would be another run.
    assert cli.main([*command, "--threshold", "0.5"]) == 1
    assert "skip.threshold was 0.3 and is now 0.5" in capsys.readouterr().err


def test_loss_is_that_of_the_answers():
    task = Recall(40, 4, 8, 8, 8)
    lm = build(QwenConfig.tiny(vocab_size=task.vocab_size, layers=1, eos_ids=(), pad_id=None, mask_id=None))
    params = lm.init(jax.random.key(0))
    tokens = jnp.asarray(task.rows(np.random.default_rng(0), 3))
    logits = np.asarray(lm.apply(params, tokens), np.float64)
    at = np.arange(40 - 8, 40, 2)
    logs = logits[:, at] - np.log(np.exp(logits[:, at]).sum(-1, keepdims=True))
    expected = -np.take_along_axis(logs, tokens[:, at + 1, None], -1).sum()
    loss, count, metrics = make_recall_loss(lm, task)(params, {"tokens": tokens}, jax.random.key(0))
    assert float(loss) == pytest.approx(expected, rel=1e-4) and count == 12 and set(metrics) == {"accuracy"}
    assert float(metrics["accuracy"]) == (logits[:, at].argmax(-1) == tokens[:, at + 1]).sum()
    skip = SkipAttention.create(threshold=0.99, tile=SkipTile(2, 2))
    other, _, metrics = make_recall_loss(lm, task, skip)(params, {"tokens": tokens}, jax.random.key(0))
    skipped, visited = metrics["sparsity"]
    assert 0 < skipped < visited and float(other) != float(loss)
    # Of the tokens before the questions those that are neither key nor value, as much in all as the answers.
    both, _, metrics = make_recall_loss(lm, task, text=True)(params, {"tokens": tokens}, jax.random.key(0))
    place = np.nonzero(tokens[:, 1 : task.context] > task.num_keys + task.num_values)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    text_nll = -logs[place[0], place[1], tokens[place[0], place[1] + 1]]
    assert metrics["text_nll"][1] == len(text_nll) > 20
    assert float(metrics["text_nll"][0]) == pytest.approx(text_nll.sum(), rel=1e-4)
    assert float(both) == pytest.approx(expected + 12 * text_nll.mean(), rel=1e-4)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--steps", "3"], "lengths, steps and batch_sizes must be equally many"),
        (["--threshold", "1.5"], "threshold must lie in (0, 1); got 1.5"),
        (["--dim", "100"], "dim must be a multiple of 64"),
        (["--test-rows", "7"], "test_rows must be a multiple of 8; got 7"),
    ],
)
def test_bad_flags_are_explained(flags, message, capsys):
    assert cli.main(["retrieval", *flags]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
