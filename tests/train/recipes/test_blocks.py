"""The recipe from the command line to its results, small; what it makes of accuracies; what it refuses."""

import json
import math

import pytest

import train.__main__ as cli
from train.recipes import blocks

SMALL = ["--lengths", "17", "--steps", "3", "--batch-sizes", "8", "--length", "128", "--arm-steps", "2", "--pairs", "5"]
SMALL += ["--arm-batch-size", "4", "--test-rows", "8", "--dim", "64"]


@pytest.mark.slow
def test_trains_every_arm_and_reports(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    command = ["blocks", "--directory", str(tmp_path), *SMALL, "--seeds", "0", "7", "--arms", "32x2", "16x4+3"]
    assert cli.main(command) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == str(tmp_path / "results.json")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["chance"] == 1 / 128 and results["questions"] == 40
    assert [*results["accuracy"]] == ["dense", "32x2", "16x4+3"]
    assert all([*of_seeds] == ["0", "7"] for of_seeds in results["accuracy"].values())
    assert results["differences"]["16x4+3 - 32x2"]["n"] == 2
    runs = {path.name for path in (tmp_path / "seed-7").iterdir()}
    assert runs == {"grow-17", "dense", "32x2", "16x4+3"}
    # The same command finds everything done; other blocks under the same name would be another run.
    assert cli.main(command) == 0
    assert json.loads((tmp_path / "results.json").read_text())["accuracy"] == results["accuracy"]


def test_arms():
    assert blocks.parse("64x2") == (64, 2, None) and blocks.parse("16x8+3") == (16, 8, 3)
    for wrong in ("64", "64x0", "x8", "16x8+", "16x8+0", "dense", "16x8+3 "):
        with pytest.raises(ValueError, match="an arm must look like 16x8"):
            blocks.parse(wrong)


def test_differences_are_paired_by_seed():
    accuracies = {
        "dense": {"0": 1.0, "1": 1.0, "2": 1.0},
        "64x2": {"0": 0.2, "1": 0.5, "2": 0.8},
        "32x4": {"0": 0.3, "1": 0.6, "2": 0.9},
        "16x8": {"0": 0.6, "2": 1.0},
    }
    found = blocks.differences(accuracies)
    assert [*found] == ["32x4 - 64x2", "16x8 - 32x4"]
    assert found["32x4 - 64x2"]["mean"] == pytest.approx(0.1) and found["32x4 - 64x2"]["interval"] < 1e-12
    assert found["16x8 - 32x4"]["n"] == 2 and found["16x8 - 32x4"]["mean"] == pytest.approx(0.2)
    # Gains of 0.3 and 0.1: standard error 0.1, one degree of freedom.
    assert found["16x8 - 32x4"]["interval"] == pytest.approx(12.7062047 * 0.1)
    assert math.isnan(blocks.interval([0.3]))
    assert blocks.interval([0.0, 1.0] * 20) == pytest.approx(2.0227 * 0.50637 / math.sqrt(40), rel=1e-4)
    lines = blocks.table({"accuracy": accuracies, "differences": found, "questions": 40, "chance": 0.1})
    assert "64x2 0.5000 ± 0.7452   0.2000 0.5000 0.8000" in lines[2]
    assert lines[-1].split() == ["16x8", "-", "32x4", "+0.2000", "±", "1.2706"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--steps", "3"], "lengths, steps and batch_sizes must be equally many"),
        (["--arms", "16x8", "16x8"], "arms must be different ones"),
        (["--arms", "16"], "an arm must look like 16x8"),
        (["--seeds", "1", "1"], "seeds must be different ones"),
        (["--arm-steps", "0"], "arm_steps must be at least 1; got 0"),
        (["--dim", "100"], "dim must be a multiple of 64"),
        (["--test-rows", "100"], "test_rows must be a multiple of arm_batch_size"),
    ],
)
def test_what_it_refuses(capsys, flags, message):
    assert cli.main(["blocks", *flags]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_more_pairs_than_a_row_holds(tmp_path, capsys):
    assert cli.main(["blocks", "--directory", str(tmp_path), "--length", "32"]) == 1
    assert "pairs must be at most 7 in rows of 32 tokens; got 16" in capsys.readouterr().err
