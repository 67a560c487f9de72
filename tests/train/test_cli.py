import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

import train.__main__ as cli
from train.recipes.lm import LM


def parse(*args):
    return cli.LINE.parse(cli.LINE.find("lm"), list(args))[1]


NEEDED = ("--init", "a", "--data", "b", "c")


@pytest.mark.smoke
def test_help_lists_recipes_and_flags_without_importing_jax(clean_env):
    code = (
        "import sys, train.__main__ as m; code = m.main(sys.argv[1:]);"
        "assert not {'jax', 'numpy', 'grain', 'optax', 'orbax'} & sys.modules.keys(); sys.exit(code)"
    )
    for args, expected in ((["--help"], "lm"), (["lm", "--help"], "--learning-rate")):
        done = subprocess.run([sys.executable, "-c", code, *args], env=clean_env, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout.replace("optim.", "--")


def test_flags_reach_every_part():
    config = parse(
        *NEEDED, "--steps", "7", "--optim.learning-rate", "0.5", "--mesh.fsdp", "2", "--rows.seq-len", "16",
        "--coordinator", "h:1", "--num-processes", "2", "--process-id", "1", "--remat", "full", "--tensorboard",
    )  # fmt: skip
    assert config.data == (Path("b"), Path("c")) and config.run.steps == 7 and config.run.tensorboard
    assert config.optim.learning_rate == 0.5 and config.mesh.fsdp == 2 and config.rows.seq_len == 16
    assert dataclasses.astuple(config.hosts) == ("h:1", 2, 1) and config.remat == "full"


def test_config_file_first_then_flags(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        'init = "a"\ndata = ["b", "c"]\nz-loss = 1e-4\nrandom_weights = true\n'
        "[run]\nsteps = 5\nbatch_size = 8\ntensorboard = true\n[optim]\nlearning_rate = 0.25\n"
        '[hosts]\ncoordinator = "h:1"\nnum-processes = 1\nprocess_id = 0\n'
    )
    config = parse("--config", str(file), "--steps", "9", "--no-tensorboard", "--data", "d")
    assert config == parse(
        "--init", "a", "--data", "d", "--z-loss", "1e-4", "--random-weights", "--steps", "9", "--batch-size", "8",
        "--optim.learning-rate", "0.25", "--coordinator", "h:1", "--num-processes", "1", "--process-id", "0",
    )  # fmt: skip
    assert parse(f"--config={file}").run.steps == 5


@pytest.mark.parametrize(
    "text, message",
    [
        ("stesp = 1", "unknown key 'stesp'"),
        ("[optim]\nlearning_rat = 1", "unknown key 'optim.learning_rat'; did you mean 'learning_rate'"),
        ("optim = 1", "'optim' must be a table"),
        ("[init]\nx = 1", "'init' must be a value"),
        ("steps = = 1", "Invalid"),
    ],
)
def test_bad_config_files_are_usage_errors(text, message, tmp_path, capsys):
    file = tmp_path / "bad.toml"
    file.write_text(text)
    assert cli.main(["lm", *NEEDED, "--config", str(file)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and str(file) in captured.err and not captured.out


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "usage: python -m train RECIPE"),
        (["ml"], "recipe must be one of"),
        (["lm"], "--data"),
        (["lm", "--data", "b"], "give --init DIR or --preset NAME, one of them; got neither"),
        (["lm", *NEEDED, "--preset", "moba-340m"], "one of them; got both"),
        (["lm", *NEEDED, "--tokenizer", "t"], "--tokenizer belongs to --preset"),
        (["lm", "--data", "b", "--preset", "moba-340m"], "--preset moba-340m needs --tokenizer DIR"),
        (["lm", "--data", "b", "--preset", "moba-2b", "--tokenizer", "t"], "moba-340m"),
        (["lm", "--data", "b", "--preset", "moba-1b", "--tokenizer", "t", "--random-weights"], "belongs to --init"),
        (["lm", *NEEDED, "--moba.top-k", "4"], "moba.top_k=4 does nothing without moba.layers"),
        (["lm", *NEEDED, "--moba.layers", "1", "1"], "moba.layers must be different ones; got (1, 1)"),
        (["lm", *NEEDED, "--moba.layers", "1", "--moba.key-conv", "0"], "moba.key_conv must be at least 1; got 0"),
        (["lm", *NEEDED, "--step", "3"], "--steps"),
        (["lm", *NEEDED, "--steps", "0"], "steps must be positive; got 0"),
        (["lm", *NEEDED, "--batch-size", "6", "--accumulate", "4"], "accumulate must divide batch_size=6"),
        (["lm", *NEEDED, "--z-loss", "-1"], "z_loss must not be negative"),
        (["lm", *NEEDED, "--num-processes", "2"], "belong together"),
        (["lm", "--config"], "--config needs the name"),
        (["lm", "--config", "/nowhere.toml"], "/nowhere.toml"),
    ],
)
def test_usage_errors_exit_2_and_say_what(args, message, capsys):
    assert cli.main(args) == 2
    captured = capsys.readouterr()
    assert message in captured.err and not captured.out


def test_failures_exit_1_with_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    assert cli.main(["lm", "--init", str(tmp_path), "--data", "x", "--directory", str(tmp_path / "run")]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "tokenizer.json" in lines[0]


def test_programming_errors_are_not_hidden(monkeypatch):
    def broken(config):
        raise KeyError("a bug")

    monkeypatch.setattr("train.recipes.lm.main", broken)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    with pytest.raises(KeyError):
        cli.main(["lm", *NEEDED])


def test_every_recipe_is_a_frozen_dataclass_with_a_docstring_and_a_main():
    import importlib

    for recipe in cli.LINE.commands:
        module = importlib.import_module(recipe.module)
        config = getattr(module, recipe.config)
        assert dataclasses.is_dataclass(config) and config.__dataclass_params__.frozen and config.__doc__
        assert callable(module.main)
    assert LM.__doc__ and "python -m train lm" in LM.__doc__
