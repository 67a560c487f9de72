"""`python -m infer TASK [--flags]`. Exit codes: 0 done, 1 failed or interrupted, 2 usage."""

import dataclasses
import difflib
import importlib
import logging
import os
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Task(NamedTuple):
    """Something to run.

    `config` is a frozen dataclass in `module` whose fields are the flags; the module's `main(config)` runs it and
    returns the exit code. The module must not import JAX at its top, so that help is quick.
    """

    name: str
    module: str
    config: str
    help: str


TASKS = (
    Task(
        "quickstart",
        "infer.quickstart",
        "Quickstart",
        "watch the shipped models complete real code, and what block diffusion gains and costs",
    ),
    Task("text", "infer.text.cli", "Text", "complete prompts with a language model: one, a chat, or a JSONL file"),
    Task("env", "infer.env", "Env", "show versions, devices, and which kernels are active and why others are not"),
    Task(
        "completions",
        "infer.evaluation.completions",
        "Completions",
        "judge an AR and a block-diffusion model on completions of held-out Python code",
    ),
)
CACHE = "~/.cache/jaxstream/xla"


class UsageError(Exception):
    """What the user typed cannot be understood; the message says what and where."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    try:
        return _main(argv)
    except BrokenPipeError:  # the reader, say `head`, has gone; the interpreter must not try to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _main(argv: Sequence[str] | None) -> int:
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(_usage(), file=sys.stdout if args else sys.stderr)
        return 0 if args else 2
    try:
        task = _find(args[0])
        config = _parse(task, args[1:])
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SystemExit as error:  # tyro has printed help (0) or what is wrong (2)
        return error.code if isinstance(error.code, int) else 2

    _prepare_environment()
    try:
        code = importlib.import_module(task.module).main(config)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 1
    except BrokenPipeError:
        raise
    except Exception as error:
        expected = (ValueError, NotImplementedError, OSError, RuntimeError, MemoryError, ArithmeticError)
        if not isinstance(error, expected) or os.environ.get("JAXSTREAM_TRACEBACK"):
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {text}", file=sys.stderr)
        return 1


def _usage() -> str:
    width = max(len(task.name) for task in TASKS)
    lines = [f"  {task.name:<{width}}  {task.help}" for task in TASKS]
    return "\n".join(
        [
            "usage: python -m infer TASK [--config FILE.toml] [--flags]",
            "",
            "tasks:",
            *lines,
            "",
            "python -m infer TASK --help lists the flags. Results go to stdout, progress and errors to stderr.",
            "Exit codes: 0 done, 1 failed or interrupted, 2 usage.",
            f"Compiled programs are kept in {CACHE} and reused by later runs; set JAX_COMPILATION_CACHE_DIR to keep",
            "them elsewhere. JAXSTREAM_TRACEBACK=1 shows where an error came from.",
        ]
    )


def _find(name: str) -> Task:
    for task in TASKS:
        if task.name == name:
            return task
    names = [task.name for task in TASKS]
    raise UsageError(f"task must be one of {', '.join(names)}; got {name!r}{_hint(name, names)}")


def _hint(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _parse(task: Task, args: list[str]) -> Any:
    import tyro

    cls = getattr(importlib.import_module(task.module), task.config)
    flags: list[str] = []
    words = iter(args)
    for word in words:
        if word == "--config" or word.startswith("--config="):
            file = word[len("--config=") :] if "=" in word else next(words, None)
            if not file:
                raise UsageError("--config needs the name of a TOML file")
            flags = [*_file_flags(Path(file), cls), *flags]  # before the others, which therefore win
        else:
            flags.append(word)
    try:
        return tyro.cli(cls, args=flags, prog=f"python -m infer {task.name}")
    except ValueError as error:  # the dataclass refuses the combination of its fields
        raise UsageError(str(error)) from None


def _file_flags(file: Path, cls: type) -> Iterator[str]:
    """The keys of a TOML file as flags."""
    try:
        table = tomllib.loads(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"--config {file}: {error}") from None
    known = [field.name for field in dataclasses.fields(cls)]
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in known:
            raise UsageError(f"--config {file}: unknown key {key!r}{_hint(name, known)}")
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            yield flag if value else flag.replace("--", "--no-", 1)
        elif isinstance(value, list):
            for item in value:
                yield from (flag, str(item))
        elif isinstance(value, dict):
            raise UsageError(f"--config {file}: {key!r} must be a value; got a table")
        else:
            yield f"{flag}={value}"


def _prepare_environment() -> None:
    """Logging, and XLA's persistent compilation cache unless the user has chosen one; JAX is not imported yet."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("jaxstream")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(CACHE).expanduser()))


if __name__ == "__main__":
    sys.exit(main())
