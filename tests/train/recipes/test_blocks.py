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
    command = ["blocks", "--directory", str(tmp_path), *SMALL, "--arms", "32x2", "dense+3"]
    files = [str(tmp_path / f"{seed}.json") for seed in (0, 7)]
    for seed, file in zip(("0", "7"), files):
        assert cli.main([*command, "--seeds", seed, "--results", file]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == files[1]
    whole = tmp_path / "whole.json"
    assert cli.main(["blocks", "--merge", *files, "--results", str(whole)]) == 0
    results = json.loads(whole.read_text())
    assert results["chance"] == 1 / 128 and results["questions"] == 40
    for name in blocks.OF_ARMS:
        assert [*results[name]] == ["dense", "32x2", "dense+3"]
        assert all([*of_seeds] == ["0", "7"] for of_seeds in results[name].values())
    assert [step for step, accuracy in results["training"]["32x2"]["7"]] == [1, 2]
    # Taps of 0 leave the dense model what it is until it trains on.
    assert results["untrained"]["dense"] == results["untrained"]["dense+3"]
    assert [*results["differences"]] == ["dense+3 - dense"] and results["differences"]["dense+3 - dense"]["n"] == 2
    runs = {path.name for path in (tmp_path / "seed-7").iterdir()}
    assert runs == {"grow-17", "dense", "32x2", "dense+3"}
    # The same command finds everything done.
    before = json.loads((tmp_path / "7.json").read_text())
    assert cli.main([*command, "--seeds", "7", "--results", files[1]]) == 0
    assert json.loads((tmp_path / "7.json").read_text())["accuracy"] == before["accuracy"]


@pytest.mark.slow
def test_a_convolution_from_the_beginning(tmp_path, monkeypatch):
    """Its arms have a beginning of their own, whose weights begin as the other's do."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    command = ["blocks", "--directory", str(tmp_path), *SMALL, "--arms", "16x4+3", "--taps", "grown"]
    command += ["--no-rotary", "--value-length", "2", "--seeds", "0", "--arm-learning-rate", "1e-4"]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("One after the other. " * 100)
    command += ["--text", str(tmp_path / "texts")]
    assert cli.main(command) == 0
    metrics = (tmp_path / "seed-0" / "dense" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(metrics[0])["train/text_nll"] > 1
    runs = {path.name for path in (tmp_path / "seed-0").iterdir()}
    assert runs == {"grow-17", "grow-17+3", "dense", "16x4+3"}
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["questions"] == 80 and results["differences"] == {}
    identity = json.loads((tmp_path / "seed-0" / "16x4+3" / "config.json").read_text())["identity"]
    last = identity["model"]["layer_attention"][1]
    assert last == {"window": None, "moba": {"block_size": 16, "top_k": 4}, "key_conv": 3, "rotary": False}
    assert identity["optim"]["learning_rate"] == 1e-4 and identity["task"]["value_length"] == 2


def test_arms():
    assert blocks.parse("64x2") == (64, 2, None) and blocks.parse("16x8+3") == (16, 8, 3)
    assert blocks.parse("dense") == (None, None, None) and blocks.parse("dense+3") == (None, None, 3)
    for wrong in ("64", "64x0", "x8", "16x8+", "16x8+0", "dense3", "16x8+3 "):
        with pytest.raises(ValueError, match="an arm must look like 16x8"):
            blocks.parse(wrong)


def test_differences_are_paired_by_seed():
    accuracies = {
        "dense": {"0": 1.0, "1": 1.0, "2": 1.0},
        "64x2": {"0": 0.2, "1": 0.5, "2": 0.8},
        "32x4": {"0": 0.3, "1": 0.6, "2": 0.9},
        "16x8": {"0": 0.6, "2": 1.0},
        "16x8+3": {"0": 0.7, "2": 1.0},
        "8x16+3": {"0": 0.7, "2": 1.0},
    }
    found = blocks.differences(accuracies)
    assert [*found] == ["32x4 - 64x2", "16x8 - 32x4", "16x8+3 - 16x8"]
    assert found["16x8+3 - 16x8"]["mean"] == pytest.approx(0.05)
    assert found["32x4 - 64x2"]["mean"] == pytest.approx(0.1) and found["32x4 - 64x2"]["interval"] < 1e-12
    assert found["16x8 - 32x4"]["n"] == 2 and found["16x8 - 32x4"]["mean"] == pytest.approx(0.2)
    # Gains of 0.3 and 0.1: standard error 0.1, one degree of freedom.
    assert found["16x8 - 32x4"]["interval"] == pytest.approx(12.7062047 * 0.1)
    assert math.isnan(blocks.interval([0.3]))
    assert blocks.interval([0.0, 1.0] * 20) == pytest.approx(2.0227 * 0.50637 / math.sqrt(40), rel=1e-4)
    results = {"accuracy": accuracies, "untrained": {"dense": {}, "64x2": {"0": 0.25}}, "differences": found}
    lines = blocks.table(results | {"questions": 40, "chance": 0.1})
    assert [line.split()[0] for line in lines[1:6]] == ["as", "64x2", "trained:", "dense", "64x2"]
    assert "64x2 0.5000 ± 0.7452   0.2000 0.5000 0.8000" in lines[5]
    assert lines[-2].split() == ["16x8", "-", "32x4", "+0.2000", "±", "1.2706"]


def test_seeds_are_merged(tmp_path, capsys):
    def part(seed, **changes):
        accuracy = {"dense": {str(seed): 1.0}, "16x8": {str(seed): 0.25 * seed}}
        config = {"seeds": [seed], "directory": "a", "results": None, "merge": [], "arm_steps": 3}
        numbers = {"questions": 40, "chance": 0.1, "command": "c", "machine": {}, "seconds": 1.0}
        return numbers | {"config": config | changes, **dict.fromkeys(blocks.OF_ARMS, accuracy)}

    whole = blocks.merged([part(1), part(3, directory="b")])
    assert whole["accuracy"]["16x8"] == whole["untrained"]["16x8"] == {"1": 0.25, "3": 0.75}
    assert whole["training"] == whole["accuracy"]
    assert whole["config"]["seeds"] == [1, 3] and whole["seconds"] == [1.0, 1.0] and whole["command"] == ["c", "c"]
    with pytest.raises(ValueError, match="cannot merge: arm_steps is 3 and 4"):
        blocks.merged([part(1), part(3, arm_steps=4)])
    with pytest.raises(ValueError, match="cannot merge: seed 1 of dense is there twice"):
        blocks.merged([part(1), part(1)])
    (tmp_path / "1.json").write_text(json.dumps(part(1)))
    assert cli.main(["blocks", "--merge", str(tmp_path / "1.json"), "--results", str(tmp_path / "all.json")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "all.json")
    assert json.loads((tmp_path / "all.json").read_text())["accuracy"] == part(1)["accuracy"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--steps", "3"], "lengths, steps and batch_sizes must be equally many"),
        (["--arms", "16x8", "16x8"], "arms must be different ones"),
        (["--arms", "16"], "an arm must look like 16x8"),
        (["--arms", "dense"], "arms need not name dense"),
        (["--merge", "a.json"], "--merge needs --results FILE"),
        (["--arm-learning-rate", "0"], "arm_learning_rate must be positive or None; got 0.0"),
        (["--seeds", "1", "1"], "seeds must be different ones"),
        (["--arm-steps", "0"], "arm_steps must be at least 1; got 0"),
        (["--dim", "100"], "dim must be a multiple of 64"),
        (["--test-rows", "100"], "test_rows must be a multiple of arm_batch_size"),
    ],
)
def test_what_it_refuses(capsys, flags, message):
    assert cli.main(["blocks", *flags]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_reads_text_in_the_order_of_names(tmp_path, capsys):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.txt").write_text("ü")
    (tmp_path / "a.py").write_text("x = 1")
    (tmp_path / "z.bin").write_bytes(b"\xff\xfe")
    assert blocks.read_text(tmp_path).tobytes() == "x = 1\nü".encode()
    assert cli.main(["blocks", "--directory", str(tmp_path / "run"), "--text", str(tmp_path)]) == 1
    assert "must hold at least 5120 bytes of UTF-8; got 8" in capsys.readouterr().err


def test_more_pairs_than_a_row_holds(tmp_path, capsys):
    assert cli.main(["blocks", "--directory", str(tmp_path), "--length", "32"]) == 1
    assert "pairs must be at most 7 in rows of 32 tokens; got 16" in capsys.readouterr().err
