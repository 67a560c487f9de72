"""What the command lines of both loops have in common; knows nothing of either.

A command is a frozen dataclass whose fields are its flags, and a function that runs it. Its settings come from, last
wins: the dataclass's defaults, the keys of `--config FILE.toml`, the flags. Nothing here imports JAX or NumPy, so that
help is quick; the parser is imported where flags are read, so that a loop called from Python does without it.
"""

import dataclasses
import difflib
import importlib
import json
import logging
import os
import sys
import tomllib
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

CACHE = "~/.cache/jaxstream/xla"
EXPECTED = (ValueError, NotImplementedError, OSError, RuntimeError, MemoryError, ArithmeticError)
"""Errors that are reported in one line; anything else is a bug and shows where it happened."""


class Command(NamedTuple):
    """Something to run.

    `config` is a frozen dataclass in `module` whose fields are the flags; the module's `main(config)` runs it and
    returns the exit code. The module must import neither JAX nor NumPy at its top.
    """

    name: str
    module: str
    config: str
    help: str


class UsageError(Exception):
    """What the user typed cannot be understood; the message says what and where."""


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """`python -m PACKAGE COMMAND [--config FILE.toml] [--flags]`.

    Attributes:
      program: how it is called, such as "python -m infer".
      kind: what a command is called, such as "task".
      commands: all of them.
      notes: lines of the help about all of them.
      interrupted: what Ctrl-C prints after "error: ".
    """

    program: str
    kind: str
    commands: tuple[Command, ...]
    notes: tuple[str, ...] = ()
    interrupted: str = "interrupted"

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Runs the command line; returns the exit code: 0 done, 1 failed or interrupted, 2 usage."""
        try:
            code = self._main(list(sys.argv[1:] if argv is None else argv))
            sys.stdout.flush()
            return code
        except BrokenPipeError:  # the reader, say `head`, has gone; the interpreter must not try to flush at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1

    def _main(self, args: list[str]) -> int:
        if not args or args[0] in ("-h", "--help"):
            print(self.usage(), file=sys.stdout if args else sys.stderr)
            return 0 if args else 2
        try:
            command = self.find(args[0])
            show, config = self.parse(command, args[1:])
        except UsageError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except SystemExit as error:  # tyro has printed help (0) or what is wrong (2)
            return error.code if isinstance(error.code, int) else 2
        if show:
            print(json.dumps(to_json(config), indent=1))
            return 0
        prepare_environment()
        try:
            return importlib.import_module(command.module).main(config)
        except KeyboardInterrupt:
            print(f"error: {self.interrupted}", file=sys.stderr)
            return 1
        except BrokenPipeError:
            raise
        except Exception as error:
            if not isinstance(error, EXPECTED) or os.environ.get("JAXSTREAM_TRACEBACK"):
                raise
            print(f"error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
            return 1

    def usage(self) -> str:
        """The help of the program as a whole."""
        width = max(len(command.name) for command in self.commands)
        name = self.kind.upper()
        return "\n".join(
            [
                f"usage: {self.program} {name} [--config FILE.toml] [--flags]",
                "",
                f"{self.kind}s:",
                *(f"  {command.name:<{width}}  {command.help}" for command in self.commands),
                "",
                f"{self.program} {name} --help lists the flags. A TOML file holds them as keys, and flags win over it;",
                "--show-config prints the configuration that results, as JSON, and runs nothing.",
                *self.notes,
                "Results go to stdout, progress and errors to stderr.",
                "Exit codes: 0 done, 1 failed or interrupted, 2 usage.",
                "JAXSTREAM_TRACEBACK=1 shows where an error came from.",
                f"Compiled programs are kept in {CACHE} and reused by later runs;",
                "set JAX_COMPILATION_CACHE_DIR to keep them elsewhere.",
            ]
        )

    def find(self, name: str) -> Command:
        """The command of that name."""
        for command in self.commands:
            if command.name == name:
                return command
        names = [command.name for command in self.commands]
        raise UsageError(f"{self.kind} must be one of {', '.join(names)}; got {name!r}{_hint(name, names)}")

    def parse(self, command: Command, args: Sequence[str]) -> tuple[bool, Any]:
        """(whether the configuration is only to be shown, the command's configuration)."""
        import tyro

        cls = getattr(importlib.import_module(command.module), command.config)
        file, show, flags = _own_flags(args)
        first = [] if file is None else list(_file_flags(file, cls, flags))
        try:
            return show, tyro.cli(cls, args=[*first, *flags], prog=f"{self.program} {command.name}")
        except ValueError as error:  # the dataclass refuses the combination of its fields
            raise UsageError(str(error)) from None


def _hint(name: str, known: Sequence[str], otherwise: str = "") -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]!r}?" if close else otherwise


def _own_flags(args: Sequence[str]) -> tuple[Path | None, bool, list[str]]:
    """(file of --config, whether --show-config was given, the other arguments)."""
    rest: list[str] = []
    file, show = None, False
    words = iter(args)
    for word in words:
        if word == "--show-config":
            show = True
        elif word == "--config" or word.startswith("--config="):
            name = word[len("--config=") :] if "=" in word else next(words, None)
            if not name:
                raise UsageError("--config needs the name of a TOML file")
            if file is not None:
                raise UsageError(f"--config must be given once; got {file} and {name}")
            file = Path(name)
        else:
            rest.append(word)
    return file, show, rest


def _file_flags(file: Path, cls: type, given: Sequence[str]) -> Iterator[str]:
    """A TOML file as flags; those on the command line (`given`) come after them and therefore win."""
    try:
        table = tomllib.loads(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"--config {file}: {error}") from None
    yield from _flags(table, cls, file, given, (), ())


def _flags(
    table: dict[str, Any], cls: type, file: Path, given: Sequence[str], path: tuple[str, ...], prefix: tuple[str, ...]
) -> Iterator[str]:
    """Flags of a table; `path` names it in the file, `prefix` in flags, where some tables have none."""
    import tyro

    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    for key, value in table.items():
        name = key.replace("-", "_")
        dotted = ".".join((*path, name))
        if name not in fields:
            hint = _hint(name, list(fields), f"; known: {', '.join(fields)}")
            raise UsageError(f"--config {file}: unknown key {dotted!r}{hint}")
        kind = fields[name]
        marks = getattr(kind, "__metadata__", ())
        inner: Any = kind.__origin__ if typing.get_origin(kind) is typing.Annotated else kind
        flag = "--" + ".".join((*prefix, name)).replace("_", "-")
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            if not isinstance(value, dict):
                raise UsageError(f"--config {file}: {dotted!r} must be a table; got {value!r}")
            flat = any(getattr(mark, "name", None) == "" for mark in marks)
            yield from _flags(value, inner, file, given, (*path, name), prefix if flat else (*prefix, name))
        elif isinstance(value, dict):
            raise UsageError(f"--config {file}: {dotted!r} must be a value; got a table")
        elif isinstance(value, bool):
            yield flag if value else "--" + ".".join((*prefix, "no-" + name)).replace("_", "-")
        elif isinstance(value, list) and tyro.conf.UseAppendAction in marks:
            if not any(word == flag or word.startswith(flag + "=") for word in given):
                yield from (f"{flag}={item}" for item in value)
        elif isinstance(value, list):
            yield flag
            yield from map(str, value)
        else:
            yield f"{flag}={value}"


def to_json(config: Any) -> Any:
    """Nested dicts, lists, numbers and strings of a configuration."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: to_json(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {str(key): to_json(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_json(value) for value in config]
    if config is None or isinstance(config, (bool, int, float, str)):
        return config
    return str(config)


def prepare_environment() -> None:
    """Logging, and XLA's persistent compilation cache unless the user has chosen one; JAX is not imported yet."""
    logger = logging.getLogger("jaxstream")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # its errors are raised, and reported by us
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(CACHE).expanduser()))
