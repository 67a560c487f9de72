"""What both command lines share: settings from defaults, file and flags; errors and exit codes; no heavy import."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated

import pytest
import tyro

from jaxmodels.command_line import Command, CommandLine, UsageError, to_json


@dataclasses.dataclass(frozen=True)
class Part:
    size: int = 1


@dataclasses.dataclass(frozen=True)
class Toy:
    """A command for tests."""

    model: str
    chat: bool = False
    top_k: int | None = None
    files: tuple[Path, ...] = ()
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    part: Part = Part()
    flat: Annotated[Part, tyro.conf.arg(name="")] = Part()

    def __post_init__(self):
        if self.top_k == 13:
            raise ValueError(f"top_k must not be unlucky; got {self.top_k}")


@pytest.fixture
def line(monkeypatch):
    module = ModuleType("toy_command")
    module.Toy, module.ran = Toy, []
    module.main = module.ran.append
    monkeypatch.setitem(sys.modules, "toy_command", module)
    monkeypatch.setattr("jaxmodels.command_line.prepare_environment", lambda: None)
    return CommandLine("python -m toy", "thing", (Command("run", "toy_command", "Toy", "runs"),))


def parse(line, *args):
    return line.parse(line.find("run"), args)[1]


def test_file_first_then_flags(line, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        'model = "m"\ntop-k = 3\nstop = ["-a", "b c"]\nchat = true\nfiles = ["x", "y"]\nflat = {size = 5}\n'
        "[part]\nsize = 4\n"
    )
    expected = Toy("m", True, 3, (Path("x"), Path("y")), ("-a", "b c"), Part(4), Part(5))
    assert parse(line, "--config", str(file)) == parse(line, f"--config={file}") == expected
    flags = ("--top-k", "4", "--no-chat", "--stop", "z", "--files", "w", "--part.size", "6", "--size", "7")
    assert parse(line, *flags, "--config", str(file)) == Toy("m", False, 4, (Path("w"),), ("z",), Part(6), Part(7))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle = 1", "unknown key 'modle'; did you mean 'model'"),
        ("zzz = 1", "unknown key 'zzz'; known: model, chat"),
        ("[part]\nsiez = 1", "unknown key 'part.siez'; did you mean 'size'"),
        ("part = 1", "'part' must be a table; got 1"),
        ("[model]\nx = 1", "'model' must be a value; got a table"),
        ("model = = 1", "Invalid value"),
        (b"\xff", "utf-8"),
    ],
)
def test_bad_files_are_usage_errors_that_name_file_and_key(line, tmp_path, capsys, text, message):
    file = tmp_path / "bad.toml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    assert line.main(["run", "--model", "m", "--config", str(file)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: --config {file}: ") and message in captured.err and not captured.out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "usage: python -m toy THING"),
        (["rum"], "error: thing must be one of run; got 'rum'; did you mean 'run'?"),
        (["run", "--config"], "--config needs the name of a TOML file"),
        (["run", "--config", "/nowhere.toml"], "--config /nowhere.toml: "),
        (["run", "--config", "a", "--config=b"], "--config must be given once; got a and b"),
        (["run", "--model", "m", "--top-k", "13"], "top_k must not be unlucky; got 13"),
        (["run", "--model", "m", "--top-k", "many"], "many"),
        (["run", "--model", "m", "--modle", "n"], "--model"),
    ],
)
def test_usage_errors_exit_with_2(line, capsys, args, message):
    assert line.main(args) == 2
    captured = capsys.readouterr()
    assert message in captured.err and not captured.out


def test_the_resolved_configuration_can_be_seen(line, capsys):
    assert line.main(["run", "--show-config", "--model", "m", "--files", "x"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == to_json(Toy("m", files=(Path("x"),))) and shown["files"] == ["x"] and shown["part"] == {"size": 1}
    assert sys.modules["toy_command"].ran == []


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("two\n lines"), "error: two lines\n"),
        (MemoryError(), "error: MemoryError\n"),
        (KeyboardInterrupt(), "error: interrupted\n"),
    ],
)
def test_failures_exit_with_1_and_one_line(line, capsys, monkeypatch, error, message):
    def fail(config):
        raise error

    monkeypatch.setattr(sys.modules["toy_command"], "main", fail)
    assert line.main(["run", "--model", "m"]) == 1
    assert capsys.readouterr() == ("", message)


def test_bugs_are_not_hidden(line, monkeypatch):
    def fail(config):
        raise KeyError("a bug")

    monkeypatch.setattr(sys.modules["toy_command"], "main", fail)
    with pytest.raises(KeyError):
        line.main(["run", "--model", "m"])
    monkeypatch.setenv("JAXSTREAM_TRACEBACK", "1")
    monkeypatch.setattr(sys.modules["toy_command"], "main", lambda config: int("x"))
    with pytest.raises(ValueError):
        line.main(["run", "--model", "m"])


def test_an_unknown_command_is_an_error(line):
    with pytest.raises(UsageError):
        line.find("")


def test_it_imports_nothing_heavy():
    code = (
        "import sys, jaxmodels.command_line;"
        "heavy = {'jax', 'numpy', 'flax', 'tokenizers', 'matplotlib', 'train', 'infer'} & sys.modules.keys();"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
